"""Keras 3 on JAX: `stateless_call` with variables in a dict by their paths."""

import jax.numpy as jnp
import pytest

from tests.frameworks import checks

keras = pytest.importorskip("keras")

pytestmark = pytest.mark.frameworks


def made(model, *args):
    """A model whose params are the trainable variables, by path."""
    frozen = [variable.value for variable in model.non_trainable_variables]

    def fn(params, *args):
        trained = [params[path] for path in paths]
        outputs, _ = model.stateless_call(trained, frozen, *args)
        return outputs

    paths = [variable.path for variable in model.trainable_variables]
    params = {variable.path: variable.value for variable in model.trainable_variables}
    return checks.Model(fn, params, args)


@pytest.fixture(scope="module", autouse=True)
def float64():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy(before)


@pytest.fixture(scope="module")
def encoder():
    layers = keras.layers
    tokens = layers.Input((4,), dtype="int32")
    x = layers.Embedding(11, 6, name="embed")(tokens)
    # Without dropout Keras calls JAX's attention, whose softmax is float32 in float64 too.
    attention = layers.MultiHeadAttention(2, 4, dropout=0.5, name="attention")
    x = x + attention(x, x)
    x = layers.LayerNormalization()(x)
    x = x + layers.Dense(6, name="down")(layers.Dense(9, "gelu", name="up")(x))
    x = layers.Dropout(0.5)(x)
    return made(keras.Model(tokens, x), jnp.arange(8).reshape(2, 4))


def test_every_matrix(encoder):
    axes = {
        "attention/query/kernel": "ioo",
        "attention/key/kernel": "ioo",
        "attention/value/kernel": "ioo",
        "attention/attention_output/kernel": "iio",
        "up/kernel": "io",
        "down/kernel": "io",
    }
    checks.check_training(encoder, axes)


def test_dora_on_chosen_weights(encoder):
    checks.check_dora(encoder, ("attention/query/kernel", "embed/*"))


def test_convolutions_and_a_recurrent_layer():
    layers = keras.layers
    images = layers.Input((6, 7, 3))
    x = layers.Conv2D(5, (3, 2), name="conv")(images)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x)
    x = layers.GRU(8, name="gru")(layers.Reshape((-1, 10))(x))
    model = made(keras.Model(images, x), checks.normal(2, 6, 7, 3))
    axes = {
        "conv/kernel": "iiio",
        "depthwise/kernel": "iioo",
        "gru/gru_cell/kernel": "io",
        "gru/gru_cell/recurrent_kernel": "io",
    }
    checks.check_training(model, axes, "*kernel")


def test_float8():
    """Keras rounds the input and the kernel in functions with derivatives of their own."""
    layer = keras.layers.Dense(7, use_bias=False, name="up", dtype="float32")
    images = keras.layers.Input((8,), dtype="float32")
    model = keras.Model(images, layer(images))
    layer.quantize("float8")
    x = jnp.asarray(checks.normal(3, 8) * 4, "int8").astype("float32") / 4
    # Some versions of JAX give all functions of `jax.custom_gradient` one name.
    name = "re:wrapped_fun|quantized_dequantize_inputs"
    checks.check_stated(made(model, x), "up/kernel", {name: "kn,_,_->kn"})
