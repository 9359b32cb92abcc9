"""What the tests of layers and models on quantized weights share."""

import jax
import pytest

import lora_jax
from lora_jax import quant
from tests.support import asarray, normal

SHAPE = (24, 20)
KEY = jax.random.key(0)
FORMATS = {
    "nf4": lambda w, **k: quant.quantize_nf4(w, 8, 5, **k),
    "bitsandbytes": lambda w, **k: quant.quantize_nf4(w, 16, 3, codec="bitsandbytes", **k),
    "int8": quant.quantize_int8,
    "fp8": quant.quantize_fp8,
}
SLOW = pytest.mark.slow


def slowly(quick, every):
    """Parameters of which only those of `quick` are no slow tests."""
    return [x if x in quick else pytest.param(*_tuple(x), marks=SLOW) for x in every]


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


EVERY_FORMAT = pytest.mark.parametrize("name", slowly(["int8"], FORMATS))


def dequantized(tree):
    """A tree with arrays in the place of its quantized weights."""
    return jax.tree.map(
        lambda leaf: quant.dequantize(leaf) if quant.is_quantized(leaf) else leaf,
        tree,
        is_leaf=quant.is_quantized,
    )


def matrix_plan(params, **config):
    """A plan for all matrices of some params."""
    return lora_jax.plan_adapters(lora_jax.LoraConfig(rank=2, **config), params)


def train(params, plan):
    """Adapters that are not new."""
    adapters = lora_jax.init_adapters(KEY, params, plan)
    return jax.tree.map(lambda v: v + 0.3 * asarray(normal(*v.shape), v.dtype), adapters)
