"""Plain dicts: einsums over scanned layers and experts, with no framework."""

import jax
import jax.numpy as jnp
import pytest

from tests.frameworks import checks

pytestmark = pytest.mark.frameworks

SHAPES = {
    "embed": (11, 6),
    "layers": {
        "qkv": (3, 3, 6, 2, 4),
        "out": (3, 2, 4, 6),
        "router": (3, 6, 5),
        "up": (3, 5, 6, 9),
        "down": (3, 5, 9, 6),
    },
}


def block(x, layer):
    q, k, v = jnp.einsum("btd,cdhk->cbthk", x, layer["qkv"])
    weights = jax.nn.softmax(jnp.einsum("bqhk,bthk->bhqt", q, k))
    x = x + jnp.einsum("bhqt,bthk,hkd->bqd", weights, v, layer["out"])
    gates = jax.nn.softmax(x @ layer["router"])
    hidden = jnp.einsum("btd,edf->ebtf", x, layer["up"])
    y = jnp.einsum("ebtf,efd->ebtd", jnp.tanh(hidden), layer["down"])
    return x + jnp.einsum("ebtd,bte->btd", y, gates), None


def decoder(params, tokens):
    x, _ = jax.lax.scan(block, params["embed"][tokens], params["layers"])
    return x @ params["embed"].T


@pytest.fixture(scope="module")
def model():
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, "float32"),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return checks.Model(decoder, checks.drawn(shapes), (jnp.arange(8).reshape(2, 4),))


def test_every_matrix(model):
    axes = {
        "embed": "io",
        "layers/qkv": "boioo",
        "layers/out": "biio",
        "layers/router": "bio",
        "layers/up": "boio",
        "layers/down": "bbio",
    }
    checks.check_training(model, axes)


def test_dora_on_chosen_weights(model):
    checks.check_dora(model, ("layers/qkv", "layers/down"))
