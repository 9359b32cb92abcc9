"""Equinox: modules as params, with functions among their leaves; layers under scan."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from tests.frameworks import checks

eqx = pytest.importorskip("equinox")

pytestmark = pytest.mark.frameworks


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.attention = eqx.nn.MultiheadAttention(2, 6, qk_size=4, vo_size=5, key=key)
        self.mlp = eqx.nn.MLP(6, 6, 9, depth=1, activation=jax.nn.gelu, key=key)

    def __call__(self, x):
        return x + jax.vmap(self.mlp)(x + self.attention(x, x, x))


class Decoder(eqx.Module):
    embed: eqx.nn.Embedding
    layers: Block

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(11, 6, key=key)
        self.layers = eqx.filter_vmap(Block)(jax.random.split(key, 3))

    def __call__(self, tokens):
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def body(x, arrays):
            return eqx.combine(arrays, static)(x), None

        x, _ = jax.lax.scan(body, jax.vmap(self.embed)(tokens), arrays)
        return x @ self.embed.weight.T


class Images(eqx.Module):
    conv: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose2d
    cell: eqx.nn.GRUCell

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(3, 5, (3, 2), key=key)
        self.up = eqx.nn.ConvTranspose2d(5, 4, 3, key=key)
        self.cell = eqx.nn.GRUCell(4, 7, key=key)

    def __call__(self, image):
        x = self.up(jnp.tanh(self.conv(image)))
        return self.cell(x.mean((1, 2)), jnp.ones(7))


def made(module, *args):
    params = checks.drawn(eqx.filter_eval_shape(module, jax.random.key(0)))
    return checks.Model(lambda model, x: jax.vmap(model)(x), params, args)


@pytest.fixture(scope="module")
def decoder():
    return made(Decoder, jnp.arange(8).reshape(2, 4))


def test_every_matrix_of_scanned_layers(decoder):
    attention = ("query_proj", "key_proj", "value_proj", "output_proj")
    axes = {
        "embed/weight": "io",
        **{f"layers/attention/{name}/weight": "boi" for name in attention},
        "layers/mlp/layers/0/weight": "boi",
        "layers/mlp/layers/1/weight": "boi",
    }
    checks.check_training(decoder, axes)


def test_dora_on_chosen_weights_of_scanned_layers(decoder):
    checks.check_dora(decoder, ("layers/attention/*_proj/weight", "embed/*"))


def test_functions_stay_where_they_are(decoder):
    plan = decoder.plan("layers/mlp/*/weight")
    why = "layers/mlp/activation: no adapter, because it is not an array: function."
    assert plan.explain("layers/mlp/activation") == why
    adapters = lora_jax.init_adapters(jax.random.key(0), decoder.params, plan)
    merged = lora_jax.merge_adapters(decoder.params, adapters, plan)
    assert merged.layers.mlp.activation is jax.nn.gelu


def test_rows_of_an_embedding():
    model = made(
        lambda key: eqx.nn.Sequential([eqx.nn.Embedding(11, 6, key=key)]), jnp.arange(4)
    )
    axes = {"layers/0/weight": "io"}
    checks.check_training(model, axes, "*/weight")


def test_convolutions_and_a_cell():
    model = made(Images, checks.normal(2, 3, 6, 7))
    axes = {
        "conv/weight": "oiii",
        "up/weight": "oiii",
        "cell/weight_ih": "oi",
        "cell/weight_hh": "oi",
    }
    checks.check_training(model, axes, "*weight*", train="*bias*")
