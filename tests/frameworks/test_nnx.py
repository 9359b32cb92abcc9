"""Flax NNX: states as params, with random counters and dropout; scanned layers."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from tests.frameworks import checks
from tests.support import assert_close

nnx = pytest.importorskip("flax.nnx")

pytestmark = pytest.mark.frameworks


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(6, 9, rngs=rngs)
        self.down = nnx.Linear(9, 6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(self.dropout(nnx.gelu(self.up(x))))


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 6, dtype="float64", rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs):
            return Block(rngs)

        self.layers = blocks(rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        return self.embed.attend(run(self.embed(tokens), self.layers))


class Images(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 5, (3, 2), rngs=rngs)
        self.head = nnx.LinearGeneral((6, 5), (7,), axis=(-2, -1), rngs=rngs)

    def __call__(self, images):
        return self.head(nnx.relu(self.conv(images)).mean(2))


def made(module, *args):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module(nnx.Rngs(0))))
    state = jax.tree.map(_counter, checks.drawn(state))
    return checks.Model(lambda state, *args: nnx.merge(graphdef, state)(*args), state, args)


def _counter(leaf):
    """A value for the shape of a random key or of its counter."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(1), leaf.shape)
    return leaf if isinstance(leaf, jax.Array) else jnp.zeros(leaf.shape, leaf.dtype)


@pytest.fixture(scope="module")
def decoder():
    return made(Decoder, jnp.arange(8).reshape(2, 4))


def test_every_matrix_of_scanned_layers(decoder):
    attention = {"query": "bioo", "key": "bioo", "value": "bioo", "out": "biio"}
    axes = {
        "embed/embedding/value": "io",
        **{f"layers/attention/{name}/kernel/value": attention[name] for name in attention},
        "layers/up/kernel/value": "bio",
        "layers/down/kernel/value": "bio",
    }
    checks.check_training(decoder, axes)


def test_dora_on_chosen_weights_of_scanned_layers(decoder):
    checks.check_dora(decoder, ("*/query/kernel", "embed/embedding"))


def test_random_counters_travel():
    rngs = nnx.Rngs(0)
    module = nnx.Sequential(nnx.Linear(6, 9, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def fn(params, rest, x):
        module = nnx.merge(graphdef, params, rest, copy=True)
        return module(x), nnx.state(module, nnx.RngState)

    args = rest, checks.normal(2, 6)
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=2), params, fn, *args)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    y, rest = jax.jit(lora_jax.adapt(fn, plan))(params, adapters, *args)
    assert_close(y, fn(params, *args)[0], ulps=4)
    assert rest["layers"][1]["rngs"]["count"][...] == 1


def test_convolutions():
    model = made(Images, checks.normal(2, 6, 7, 3))
    axes = {"conv/kernel/value": "iiio", "head/kernel/value": "iio"}
    checks.check_training(model, axes, "*/kernel", train="*/bias")


@pytest.mark.parametrize("ending", ["", "/value"])
@pytest.mark.parametrize("form", ["state", "pure_dict"])
def test_paths_with_and_without_their_ending(form, ending):
    graphdef, state = nnx.split(nnx.Linear(6, 9, rngs=nnx.Rngs(0)))
    params = state if form == "state" else nnx.to_pure_dict(state)

    def fn(params, x):
        if form == "state":
            return nnx.merge(graphdef, params)(x)
        return x @ params["kernel"] + params["bias"][None]

    config = lora_jax.LoraConfig(
        2,
        targets=f"*kernel{ending}",
        exclude=f"bias{ending}",
        rank_pattern={f"kernel{ending}": 3},
        axes={f"kernel{ending}": "io"},
        use_dora=True,
    )
    plan = lora_jax.plan_adapters(config, params, fn, jnp.ones((4, 6)))
    (path,) = plan.targets
    assert path == ("kernel/value" if form == "state" else "kernel")
    assert plan.targets[path].rank == 3
    for other in ("kernel", "kernel/value"):
        assert plan.explain(other) == plan.explain(path)
    assert "of exclude matches it" in plan.explain(f"bias{ending}")
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    norms = lora_jax.adapted_column_norms(params, adapters, plan)
    wrong = {
        f"{name}/value" if form != "state" else "kernel": norms[name] for name in norms
    }
    with pytest.raises(KeyError, match=f"the nearest is '{path}'"):
        lora_jax.adapt(fn, plan, column_norms=wrong)
