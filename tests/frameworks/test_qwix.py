"""Trees in which qwix trains adapters, against its own outputs."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from tests.support import assert_close, by_path, draw

nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")
qwix = pytest.importorskip("qwix")

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore"),  # flax warns of its own old names
]

ULPS = 2**10  # of float32, in which the layers compute
SCALE = 1.5
IDS = jnp.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def filled(tree):
    """A tree of the same shapes in which nothing is zero."""
    leaves, treedef = jax.tree.flatten(tree)
    drawn = [
        0.4 * draw(*leaf.shape, seed=i, dtype=leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else leaf
        for i, leaf in enumerate(leaves)
    ]
    return treedef.unflatten(drawn)


def check(params, layout, want, fn, *args, scale=SCALE):
    """Compares the model with imported adapters with what the library computes."""
    read = lora_jax.import_adapters(params, layout, fn, *args, scale=scale)
    assert type(read.params) is type(params)
    assert not [path for path in by_path(read.params) if "lora" in path.lower()]
    merged = lora_jax.merge_adapters(*read)
    assert_close(fn(merged, *args), want, ULPS, "float32")
    adapted = lora_jax.adapt(fn, read.plan)
    assert_close(jax.jit(adapted)(read.params, read.adapters, *args), want, ULPS, "float32")
    assert jnp.abs(fn(read.params, *args) - want).max() > 0.1
    return {path: target.axes for path, target in read.plan.targets.items()}


# ------------------------------------------------------------------------- qwix, linen


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(6, name="up")(x)), None


class Linen(nn.Module):
    stack_axis: int = 0

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 6, name="embed")
        x = embed(ids)
        x = nn.DenseGeneral((2, 3), name="q")(x)
        x = nn.DenseGeneral(6, axis=(-2, -1), name="o")(x)
        x = nn.Conv(6, (3,), name="conv")(x)
        layers = nn.scan(
            Block,
            variable_axes={"params": self.stack_axis},
            split_rngs={"params": True},
            length=4,
        )
        x, _ = layers(name="layers")(x, None)
        heads = x.reshape(-1, 5, 2, 3).swapaxes(0, 2)  # (heads, tokens, batch, width)
        heads = nn.DenseGeneral(7, batch_dims=(0,), name="heads")(heads)
        return embed.attend(x) + heads.sum()


@pytest.mark.parametrize("stack_axis", [0, 1])
def test_qwix_in_linen(stack_axis):
    model = Linen(stack_axis)
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=2 * SCALE)
    tuned = qwix.apply_lora_to_model(model, provider)
    params = filled(tuned.init(jax.random.key(0), IDS)["params"])
    axes = check(
        params,
        "qwix",
        tuned.apply({"params": params}, IDS),
        lambda params, ids: model.apply({"params": params}, ids),
        IDS,
    )
    assert axes == {
        "conv/kernel": "iio",
        "heads/kernel": "bio",
        "layers/up/kernel": "bio" if stack_axis == 0 else "ibo",
        "o/kernel": "iio",
        "q/kernel": "ioo",
    }


# --------------------------------------------------------------------------- qwix, nnx


class Einsums(nnx.Module):
    def __init__(self, rngs):
        def weight(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape))

        self.kv, self.out, self.experts = (
            weight(2, 6, 4, 3),
            weight(4, 3, 6),
            weight(2, 6, 6),
        )
        self.turned = weight(7, 6)

    def __call__(self, x):
        k, v = jnp.einsum("btd,cdnh->cbtnh", x, self.kv.value)
        x = x + jnp.einsum("btnh,nhd->btd", jnp.tanh(k) * v, self.out.value)
        x = jnp.einsum("ebtd,edf->ebtf", jnp.stack([x, jnp.sin(x)]), self.experts.value)
        return jax.lax.dot_general(x.sum(0), self.turned.value, (((2,), (1,)), ((), ())))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.linear = nnx.Linear(6, 7, rngs=rngs)
        self.heads = nnx.LinearGeneral(7, (2, 3), rngs=rngs)
        self.einsum = nnx.Einsum("btnh,nhd->btd", (2, 3, 6), (6,), rngs=rngs)
        self.own = Einsums(rngs)

    def __call__(self, ids):
        x = self.heads(jnp.tanh(self.linear(self.embed(ids))))
        return self.own(jnp.tanh(self.einsum(x)))


def test_qwix_in_nnx():
    model = Nnx(nnx.Rngs(0))
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=2 * SCALE)
    tuned = qwix.apply_lora_to_model(model, provider, IDS, rngs=nnx.Rngs(1))
    state = filled(nnx.state(tuned))
    nnx.update(tuned, state)
    graphdef = nnx.graphdef(model)
    axes = check(
        state,
        "qwix",
        tuned(IDS),
        lambda state, ids: nnx.merge(graphdef, state)(ids),
        IDS,
    )
    assert axes == {
        "einsum/kernel/value": "iio",
        "heads/kernel/value": "ioo",
        "linear/kernel/value": "io",
        "own/experts/value": "bio",
        "own/kv/value": "oioo",
        "own/out/value": "iio",
        "own/turned/value": "oi",
    }


def test_qwix_of_quantized_weights():
    provider = qwix.LoraProvider(
        module_path=".*", rank=2, alpha=3.0, weight_qtype="nf4", tile_size=2
    )
    tuned = qwix.apply_lora_to_model(nn.Dense(6), provider)
    params = tuned.init(jax.random.key(0), jnp.ones((2, 4)))["params"]
    with pytest.raises(ValueError, match="'kernel' is quantized: dequantize it first"):
        lora_jax.import_adapters(params, "qwix", scale=SCALE)


def test_qwix_of_feature_groups():
    model = nn.Conv(8, (3,), feature_group_count=2)
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=3.0)
    tuned, x = qwix.apply_lora_to_model(model, provider), jnp.ones((2, 5, 4), "float32")
    params = jax.eval_shape(tuned.init, jax.random.key(0), x)["params"]

    def fn(params, x):
        return jax.jit(model.apply)({"params": params}, x)

    with pytest.raises(ValueError, match=r"'kernel' is .* convolution with feature groups"):
        lora_jax.import_adapters(filled(params), "qwix", fn, x, scale=SCALE)
