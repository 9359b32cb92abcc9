"""Flax modules on a mesh with explicit axes, against the same modules on one device."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from tests.frameworks import checks
from tests.support import assert_close, set_mesh

nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")

pytestmark = pytest.mark.frameworks


def on(mesh, *spec):
    """A sharding on the mesh, or None on one device."""
    return mesh and NamedSharding(mesh, P(*spec))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 8, 16, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x, mesh):
        tokens = on(mesh, "data", None, None)
        heads = on(mesh, "data", None, "model", None)
        x = x + self.attention(self.norm(x), out_sharding=tokens, qkv_sharding=heads)
        return x + self.down(nnx.gelu(self.up(x)), out_sharding=tokens)


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(12, 8, dtype="float64", rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs):
            return Block(rngs)

        self.layers = blocks(rngs)

    def __call__(self, tokens, mesh):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x, mesh)

        x = self.embed(tokens, out_sharding=on(mesh, "data", None, None))
        x = run(x, self.layers)
        return self.embed.attend(x, out_sharding=on(mesh, "data", None, "model"))


NNX_SPECS = {
    "embedding": P("model", None),
    "query/kernel": P(None, None, "model", None),
    "key/kernel": P(None, None, "model", None),
    "value/kernel": P(None, None, "model", None),
    "out/kernel": P(None, "model", None, None),
    "up/kernel": P(None, None, "model"),
    "down/kernel": P(None, "model", None),
}


def nnx_model(mesh):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(nnx.Rngs(0))))

    def fn(state, tokens):
        return nnx.merge(graphdef, state)(tokens, mesh)

    return fn, checks.drawn(state), jnp.arange(12).reshape(4, 3), NNX_SPECS


class Perceptron(nn.Module):
    mesh: jax.sharding.Mesh | None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(12, name="up")(x))
        product = lax.dot_general
        if self.mesh is not None:
            out = on(self.mesh, "data", None)
            product = functools.partial(product, out_sharding=out)
        return nn.Dense(5, name="down", dot_general=product)(x)


LINEN_SPECS = {"up/kernel": P(None, "model"), "down/kernel": P("model", None)}


def linen_model(mesh):
    x = checks.normal(4, 8)
    shapes = jax.eval_shape(Perceptron(None).init, jax.random.key(0), x)
    return Perceptron(mesh).apply, checks.drawn(shapes), x, LINEN_SPECS


AXES = {
    nnx_model: {
        "embed/embedding/value": "io",
        **{f"layers/attention/{n}/kernel/value": "bioo" for n in ("query", "key", "value")},
        "layers/attention/out/kernel/value": "biio",
        "layers/up/kernel/value": "bio",
        "layers/down/kernel/value": "bio",
    },
    linen_model: {"params/up/kernel": "io", "params/down/kernel": "io"},
}


def put(mesh, params, specs):
    """The params on the mesh: those with a name that is known are sharded."""

    def place(path, leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((spec for end, spec in specs.items() if end in name), P())
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, params)


@pytest.mark.parametrize("make", [nnx_model, linen_model])
def test_modules_on_explicit_axes(make):
    kinds = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds)
    fn, params, x, _ = make(None)
    alone = checks.Model(fn, params, (x,))
    plan = alone.plan()
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    adapters = jax.tree.map(jnp.add, adapters, checks.drawn(adapters))
    want = jax.jit(lora_jax.adapt(fn, plan))(params, adapters, x)
    with set_mesh(mesh):
        fn, params, x, specs = make(mesh)
        x = jax.device_put(x, NamedSharding(mesh, P("data", None)))
        model = checks.Model(fn, put(mesh, params, specs), (x,))
        got = jax.jit(lora_jax.adapt(fn, plan))(model.params, adapters, x)
        checks.check_training(model, AXES[make])
        checks.check_dora(model, "*/down/kernel")
    assert_close(got, want, checks.ULPS)
