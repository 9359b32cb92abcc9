"""Haiku: layers stacked by `hk.layer_stack`, attention, a convolution."""

import jax
import jax.numpy as jnp
import pytest

from tests.frameworks import checks

hk = pytest.importorskip("haiku")

pytestmark = pytest.mark.frameworks


def decoder(tokens):
    embed = hk.Embed(11, 6, name="embed")

    def block(x):
        attention = hk.MultiHeadAttention(
            2, 4, w_init=hk.initializers.VarianceScaling(), model_size=6
        )
        x = x + attention(x, x, x)
        return x + hk.Linear(6, name="down")(jax.nn.gelu(hk.Linear(9, name="up")(x)))

    x = hk.experimental.layer_stack(3, name="layers")(block)(embed(tokens))
    return x @ embed.embeddings.T


def images(x):
    x = jax.nn.relu(hk.Conv2D(5, (3, 2), name="conv")(x))
    x = jax.nn.relu(hk.Conv2DTranspose(4, 3, name="up")(x))
    return hk.Linear(7, name="head")(x.mean((1, 2)))


def made(function, *args):
    model = hk.without_apply_rng(hk.transform(function))
    params = checks.drawn(jax.eval_shape(model.init, jax.random.key(0), *args))
    return checks.Model(model.apply, params, args)


@pytest.fixture(scope="module")
def stacked():
    return made(decoder, jnp.arange(8).reshape(2, 4))


def test_every_matrix_of_stacked_layers(stacked):
    attention = ("query", "key", "value", "linear")
    axes = {
        "embed/embeddings": "io",
        **{f"layers/multi_head_attention/{name}/w": "bio" for name in attention},
        "layers/up/w": "bio",
        "layers/down/w": "bio",
    }
    checks.check_training(stacked, axes)


def test_dora_on_chosen_weights_of_stacked_layers(stacked):
    checks.check_dora(stacked, ("*/query/w", "embed/*"))


def test_convolutions():
    model = made(images, checks.normal(2, 6, 7, 3))
    axes = {"conv/w": "iiio", "up/w": "iioi", "head/w": "io"}
    checks.check_training(model, axes, "*/w")
