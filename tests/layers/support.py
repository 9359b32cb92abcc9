"""LoRA and DoRA of one weight, called and computed in float64 in the same way."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from tests import reference, support

ALPHA = 3.0
SCALE = ALPHA / support.RANK
AXES = ("out", "in")
# The name in `support.make_case`, the axis of norms, and whether norms have a gradient.
METHODS = (
    *("lora", "lora_bias", "dora out", "dora in"),
    *("dora out exact", "dora in exact"),
)


def each(*methods):
    return pytest.mark.parametrize("method", methods)


def axis_of(method):
    """The options of all functions of DoRA."""
    return {"norm_axis": method.split()[1]} if "dora" in method else {}


def options_of(method):
    """The options of the layer."""
    return axis_of(method) | ({"detach_norm": False} if "exact" in method else {})


def make_case(method, layout="rows", **settings):
    kind = {"method": method.split()[0]}
    return support.make_case(layout, **kind, **axis_of(method), **settings)


def linear(case, alpha=ALPHA, **options):
    function = lora_jax.dora_linear if "m" in case.adapter else lora_jax.lora_linear
    return function(case.x, case.weight, case.adapter, alpha, **options)


def output_and_gradients(case, **options):
    """The output, and the gradients of `sum(output * c)`, of one program."""

    def loss(x, adapter):
        y = linear(support.Case(x, case.weight, case.bias, adapter, case.c), **options)
        return jnp.sum((y * case.c).astype(jnp.float32)), y

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grad_x, grads), y = grad(case.x, case.adapter)
    return y, grads | {"x": grad_x}


def formula(method, case):
    """The output with the bias, and the gradients, in float64."""
    x, weight, bias, adapter, c = case.reference()
    given = x, weight, adapter, SCALE
    if "dora" not in method:
        return reference.lora_linear(*given, bias), reference.lora_gradients(*given, c)
    y = reference.dora_linear(*given, bias, **axis_of(method))
    return y, reference.dora_gradients(*given, c, **options_of(method))
