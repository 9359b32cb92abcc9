"""Flax linen: scanned and rematerialized layers, a tied head, convolutions, an LSTM."""

import jax
import jax.numpy as jnp
import pytest

from tests.frameworks import checks

nn = pytest.importorskip("flax.linen")
fp8_ops = pytest.importorskip("flax.linen.fp8_ops")

pytestmark = pytest.mark.frameworks


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2, qkv_features=8)(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.DenseGeneral((3, 4), name="up")(x))
        return x + nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="down")(hidden), None


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 6, name="embed")
        layers = nn.scan(
            nn.remat(Block), {"params": 0}, split_rngs={"params": True}, length=3
        )
        return embed.attend(layers(name="layers")(embed(tokens), None)[0])


class Images(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(6, (3, 2), name="conv")(images))
        x = nn.Conv(9, (3, 3), strides=2, feature_group_count=3, name="grouped")(x)
        return nn.Dense(7, name="head")(x.mean((1, 2)))


def made(module, *args):
    params = checks.drawn(jax.eval_shape(module.init, jax.random.key(0), *args))
    return checks.Model(module.apply, params, args)


ATTENTION = {
    f"params/layers/MultiHeadDotProductAttention_0/{name}/kernel": axes
    for name, axes in {
        "query": "bioo",
        "key": "bioo",
        "value": "bioo",
        "out": "biio",
    }.items()
}


def test_every_matrix_of_a_decoder():
    model = made(Decoder(), jnp.arange(8).reshape(2, 4))
    axes = ATTENTION | {
        "params/embed/embedding": "io",
        "params/layers/up/kernel": "bioo",
        "params/layers/down/kernel": "biio",
    }
    checks.check_training(model, axes)


def test_convolutions():
    model = made(Images(), checks.normal(2, 6, 7, 3))
    assert checks.axes_of(model.plan()) == {"params/head/kernel": "io"}
    axes = {
        "params/conv/kernel": "iiio",
        "params/grouped/kernel": "iiio",
        "params/head/kernel": "io",
    }
    checks.check_training(model, axes, "*kernel", train="*/bias")
    checks.check_dora(model, "*kernel")


def test_an_lstm():
    model = made(
        nn.RNN(nn.OptimizedLSTMCell(5, param_dtype="float64")), checks.normal(2, 4, 3)
    )
    names = ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho")
    paths = [f"params/cell/{name}/kernel" for name in names]
    axes = dict.fromkeys(sorted(paths), "io")
    checks.check_training(model, axes)


class RoundedDot(fp8_ops.Fp8DirectDotGeneralOp):
    """Has a name for the whole product, which Flax divides into several functions."""

    def __call__(self, x, kernel, dimensions, **_):
        def rounded_dot(x, kernel):
            return super(RoundedDot, self).__call__(x, kernel, dimensions)

        return jax.jit(rounded_dot)(x, kernel)


FLOAT8 = {
    "one function": (RoundedDot, {"rounded_dot": "...k,kn->...n"}),
    "functions of Flax": (
        fp8_ops.Fp8DotGeneralOp,
        {"in_qdq": "kn,_,_->kn", "dot_general_with_precision": "...k,kn->...n"},
    ),
}


@pytest.mark.filterwarnings("ignore:The Fp8DotGeneralOp is deprecated")
@pytest.mark.parametrize("kind", FLOAT8)
def test_float8(kind):
    operation, products = FLOAT8[kind]
    module = nn.Dense(7, use_bias=False, dot_general_cls=operation)
    x = jnp.asarray(checks.normal(2, 3, 8) * 4, "int8").astype("float32") / 4
    params = module.init(jax.random.key(0), x)
    params["params"] = checks.drawn(params["params"])
    params = jax.tree.map(lambda v: jnp.asarray(v, "float32"), params)
    checks.check_stated(checks.Model(module.apply, params, (x,)), "params/kernel", products)
