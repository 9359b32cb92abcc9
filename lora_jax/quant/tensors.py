"""Dequantization, and the names of formats in files."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lora_jax._core import checks
from lora_jax._core.quantized import QuantizedTensor

__all__ = ["QuantizedTensor", "dequantize", "is_quantized", "register_format"]

_FORMATS: dict[str, type[QuantizedTensor]] = {}


def is_quantized(value: Any) -> bool:
    """Tells whether a value is a quantized tensor, of any format.

    It can be passed to the functions of `jax.tree` as `is_leaf`.

    Args:
        value: anything.

    Returns:
        A bool.
    """
    return isinstance(value, QuantizedTensor)


def dequantize(quantized: QuantizedTensor, dtype: DTypeLike | None = None) -> jax.Array:
    """Converts a quantized weight to a dense array.

    Call it in every forward pass: inside `jax.jit` the dense array lives only as long as
    the product that uses it. It has no gradient.

    Args:
        quantized: of any format.
        dtype: of the result, floating point with at least 16 bits. By default it is the
            dtype of the weight that was quantized.

    Returns:
        `quantized.shape`, in `dtype`. Computed in float32 and rounded once.

    Raises:
        TypeError: if the value is not a quantized tensor, or `dtype` is not such a dtype.

    Example:
        >>> import jax.numpy as jnp, lora_jax.quant
        >>> quantized = lora_jax.quant.quantize_int8(jnp.array([[-1.0, 2.0], [0.5, 4.0]]))
        >>> lora_jax.quant.dequantize(quantized, jnp.bfloat16)
        Array([[-1, 2.01562],
               [0.503906, 4]], dtype=bfloat16)
    """
    if not is_quantized(quantized):
        raise TypeError(
            f"expected a quantized tensor, got {type(quantized).__name__}: make one with "
            "quantize_nf4, quantize_int8 or quantize_fp8; where arrays are mixed with them "
            "ask is_quantized first."
        )
    given = jnp.dtype(quantized.dtype if dtype is None else dtype)
    if not checks.is_floating(given) or given.itemsize < 2:
        raise TypeError(
            f"dtype must be floating point and of at least 16 bits, got {given}: the codes "
            "themselves are the arrays of the quantized tensor."
        )
    return lax.stop_gradient(quantized.dequantize(jax.dtypes.canonicalize_dtype(given)))


def register_format(cls: type[QuantizedTensor], name: str) -> None:
    """Registers the name that files use for a format.

    Args:
        cls: a subclass of `QuantizedTensor`; see there for what it has to implement.
        name: of the format. Files store it, so change it if the meaning of the arrays
            changes.

    Raises:
        TypeError: if the class is not such a subclass, lacks one of the methods, or is not
            a pytree; or the name is not a string.
        ValueError: if the name is empty or taken, or the class already has a name.
    """
    if not (isinstance(cls, type) and issubclass(cls, QuantizedTensor)):
        raise TypeError(f"a format is a subclass of QuantizedTensor, got {cls!r}.")
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise TypeError(f"{cls.__name__} has to define {', '.join(missing)}.")
    if not dataclasses.is_dataclass(cls) or not _is_node(cls):
        raise TypeError(
            f"{cls.__name__} has to be a dataclass and a pytree: decorate it with "
            "jax.tree_util.register_dataclass on top of "
            "dataclasses.dataclass(frozen=True, eq=False, repr=False)."
        )
    if not isinstance(name, str):
        raise TypeError(f"the name of a format must be a string, got {name!r}.")
    if not name or _FORMATS.get(name, cls) is not cls:
        raise ValueError(
            f"the name {name!r} is empty or that of another format; taken are "
            f"{', '.join(_FORMATS)}."
        )
    if cls in _FORMATS.values() and name not in _FORMATS:
        raise ValueError(f"{cls.__name__} has the name {name_of(cls)!r} already.")
    _FORMATS[name] = cls


def _is_node(cls: type) -> bool:
    """Whether JAX treats instances of a class as inner nodes of a pytree."""
    empty = object.__new__(cls)
    try:
        return jax.tree.leaves(empty) != [empty]
    except AttributeError:  # JAX read the fields, which this instance lacks
        return True


def name_of(cls: type) -> str | None:
    """The name of a format in files, or None."""
    return next((name for name, known in _FORMATS.items() if known is cls), None)


def format_of(name: str) -> type[QuantizedTensor] | None:
    """The format with a name, or None."""
    return _FORMATS.get(name)


def format_names() -> tuple[str, ...]:
    """The names of all formats."""
    return tuple(_FORMATS)
