"""Checks of weights to quantize, and of arrays from files."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike

from lora_jax._core import checks, quantized

DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes that can be quantized."""


def check_weight(weight: Any, batch_axes: Any) -> jax.Array:
    """Checks a weight to quantize and returns it as a JAX array.

    Raises:
        TypeError: if the weight is not a floating-point array of at most 32 bits, or
            `batch_axes` is not an integer.
        ValueError: if the weight is empty, all of its axes are batch axes, or (outside of
            `jax.jit`) a value is not finite.
    """
    if quantized.is_quantized(weight):
        raise TypeError(f"weight is quantized already: {weight!r}.")
    checks.check_array("weight", weight)
    array = jnp.asarray(weight)
    if array.dtype.name not in DTYPES:
        raise TypeError(
            f"weight must be {', '.join(DTYPES)}, got {array.dtype}: quantization keeps at "
            "most 8 bits of each entry, so cast it with .astype('float32')."
        )
    axes = checks.as_index("batch_axes", batch_axes)
    if not 0 <= axes < max(array.ndim, 1):
        raise ValueError(
            f"batch_axes must be at least 0 and below {array.ndim}, the number of axes of "
            f"the weight, got {axes}: the axes after the batch axes are the axes of one "
            "weight."
        )
    if 0 in array.shape:
        raise ValueError(f"weight has no entries to quantize, its shape is {array.shape}.")
    _check_finite(weight)
    return array


def check_matrix(weight: Any, batch_axes: Any, what: str) -> jax.Array:
    """Checks a weight as `check_weight` does, for a format with a scale for each output."""
    array = check_weight(weight, batch_axes)
    if array.ndim - batch_axes < 2:
        raise ValueError(
            f"{what} has a scale for each output of a weight (*batch, in, out), got shape "
            f"{array.shape} with {batch_axes} batch axes: do not quantize vectors, or use "
            "quantize_nf4."
        )
    return array


def _check_finite(weight: Any) -> None:
    """Raises if known values are not finite. A trace of other arrays does not matter."""
    if isinstance(weight, Tracer):
        return
    with jax.ensure_compile_time_eval():
        count = int(_count_not_finite(jnp.asarray(weight)))
    if count:
        raise ValueError(
            f"{count} of the {weight.size} entries of weight are infinite or NaN, and "
            "would make all entries with the same scale NaN: is the weight damaged?"
        )


@jax.jit
def _count_not_finite(array: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(array))


def check_count(name: str, value: Any) -> int:
    """Checks a positive integer and returns it as an `int`."""
    count = checks.as_index(name, value)
    if count < 1:
        raise ValueError(f"{name} must be a positive integer, got {count}.")
    return count


def check_weight_dtype(name: Any) -> None:
    """Raises unless `name` is the name of a dtype that can be quantized."""
    if name not in DTYPES:
        raise ValueError(f"weight_dtype must be one of {', '.join(DTYPES)}, got {name!r}.")


def check_present(**arrays: Any) -> None:
    """Raises if any of the arrays is None."""
    for name, array in arrays.items():
        if array is None:
            raise ValueError(f"the array {name} is missing.")


def check_leaf(name: str, array: Any, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """Raises unless an array has the given shape and dtype."""
    check_present(**{name: array})
    if tuple(array.shape) != shape or array.dtype != dtype:
        raise ValueError(
            f"the array {name} should be {jnp.dtype(dtype)} of the shape {shape}, and is "
            f"{array.dtype} of {tuple(array.shape)}."
        )
