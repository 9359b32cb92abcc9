"""Checks of arguments, with error messages that say what to do.

Shapes and dtypes are static, so under `jax.jit` these checks cost nothing at run time.
Values are checked only if they are known: Python numbers, and arrays outside a trace.
"""

import contextlib
import difflib
import json
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_LARGEST = float(jnp.finfo(jnp.float32).max)
_LARGEST_RANK = 2**31 - 1


def is_array(value: Any) -> bool:
    """Whether a value has the shape and dtype of an array: JAX, NumPy or abstract."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def has_jax_dtype(value: Any) -> bool:
    """Whether JAX has arrays of this dtype, in any byte order: not objects or strings."""
    kinds = np.number, np.bool_, jax.dtypes.extended
    return any(jnp.issubdtype(value.dtype, kind) for kind in kinds)


def is_floating(dtype: Any) -> bool:
    """Whether a dtype is a real floating-point one."""
    return jnp.issubdtype(dtype, jnp.floating)


def check_array(name: str, value: Any) -> None:
    """Raises unless `value` is an array of floating-point values."""
    check_has_values(name, value)
    check_abstract_array(name, value)


def check_has_values(name: str, value: Any) -> None:
    """Raises if `value`, or an array of a quantized `value`, is abstract or deleted."""
    for leaf in jax.tree.leaves(value):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{name} is a jax.ShapeDtypeStruct, or made of them, which has no values "
                "to compute with: pass an array, or call the function inside "
                "jax.eval_shape."
            )
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
            check_not_deleted(name, leaf)


def check_not_deleted(name: str, array: jax.Array) -> None:
    """Raises if an array outside a trace has been deleted."""
    if array.is_deleted():
        raise ValueError(
            f"{name} has been deleted or donated, for example to an earlier merge or to a "
            "function with donate_argnums, and its values are gone: use what that "
            "returned."
        )


def check_byte_order(name: str, value: Any) -> None:
    """Raises if an array has a byte order that JAX does not support."""
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        raise TypeError(
            f"{name} has the byte order of dtype {value.dtype.str!r}, which JAX does not "
            "take: convert it with x.astype(x.dtype.newbyteorder('='))."
        )


def check_abstract_array(name: str, value: Any) -> None:
    """Raises unless `value` has a shape and a floating-point dtype."""
    if not is_array(value):
        raise TypeError(
            f"{name} must be an array, got {type(value).__name__}: pass a jax or numpy "
            "array."
        )
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{name} must be an array of numbers, got a jax.random key: are the arguments "
            "in order? The key comes first."
        )
    if is_floating(value.dtype) and jnp.dtype(value.dtype).itemsize < 2:
        raise TypeError(
            f"{name} has the dtype {value.dtype}, whose values mean nothing without their "
            "scales: multiply them out in at least 16 bits, for example "
            "weight.astype('bfloat16') * scales."
        )
    check_byte_order(name, value)
    if not has_jax_dtype(value):
        raise TypeError(
            f"{name} must be an array of floating-point numbers, got dtype {value.dtype} "
            f"and shape {value.shape}, of which JAX has no arrays: make one with "
            "np.asarray(values, 'float32')."
        )
    if not is_floating(value.dtype):
        codes = value.dtype.itemsize == 1 and value.dtype != jnp.bool_
        raise TypeError(
            f"{name} must be floating point, got dtype {value.dtype} and shape "
            f"{value.shape}: "
            + (
                "codes of a quantized weight mean nothing without their scales, so pass "
                "the quantized weight itself, or its lora_jax.quant.dequantize."
                if codes
                else "cast it with .astype, for example to float32."
            )
        )


def check_weight(name: str, weight: Any, *, abstract: bool = False) -> None:
    """Raises unless `weight` is a floating-point `(*batch, in, out)` array."""
    (check_abstract_array if abstract else check_array)(name, weight)
    check_weight_shape(name, weight.shape)


def check_weight_shape(name: str, shape: tuple[int, ...]) -> None:
    """Raises unless `shape` is the shape of a matrix or of a stack of matrices."""
    if len(shape) < 2 or 0 in shape:
        raise ValueError(
            f"{name} must have a shape (*batch, in, out) without empty axes, got "
            f"{shape}: only matrices, or stacks of them, have low-rank adapters."
        )


def check_rank(rank: Any) -> None:
    """Raises unless `rank` is a positive integer."""
    value = as_index("rank", rank, "a positive integer")
    if value > _LARGEST_RANK:
        raise ValueError(f"rank must be below 2**31, got {value}.")
    if value < 1:
        raise ValueError(
            f"rank must be a positive integer, got {value}: to leave a weight without "
            "an adapter, do not make one for it."
        )


def as_index(name: str, value: Any, what: str = "an integer") -> int:
    """Converts an integer to an `int`; raises TypeError for other types and for bools."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be {what}, got {value!r:.60} ({type(value).__name__})."
        ) from None


def check_factor_dtype(dtype: Any) -> jnp.dtype:
    """Checks the dtype of factors and returns it.

    Raises:
        TypeError: unless it is floating point and of at least 16 bits.
    """
    try:
        given = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype must be that of an array, got {dtype!r}.") from None
    if not is_floating(given) or given.itemsize < 2:
        raise TypeError(
            f"dtype must be floating point and of at least 16 bits, got {given}: adapters "
            "are trained."
        )
    return given


def check_key(name: str, key: Any) -> None:
    """Raises unless `key` is one `jax.random` key, typed or raw."""
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(
            f"{name} must be a jax.random key, got {type(key).__name__}: make one with "
            "jax.random.key(0)."
        )
    check_has_values(name, key)
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if key.shape != () if typed else (key.ndim != 1 or key.dtype != jnp.uint32):
        raise ValueError(
            f"{name} must be one jax.random key, got shape {key.shape} and dtype "
            f"{key.dtype}: make one with jax.random.key(0); for a batch of keys use "
            "jax.vmap."
        )


def check_number(name: str, value: Any) -> None:
    """Raises unless `value` is a finite real number, or a scalar array of one."""
    kinds = int | float | np.number | np.ndarray | jax.Array
    if isinstance(value, bool | np.bool_) or not isinstance(value, kinds):
        raise TypeError(
            f"{name} must be a number or a scalar array, got {value!r} "
            f"({type(value).__name__})."
        )
    if np.shape(value) != ():
        raise ValueError(
            f"{name} must be a scalar, got an array of shape {np.shape(value)}: for "
            "one value for each leading axis use jax.vmap."
        )
    dtype = None if isinstance(value, int | float) else value.dtype
    if dtype is not None and not (is_floating(dtype) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{name} must be a real number, got dtype {dtype}.")
    if not isinstance(value, Tracer) and not abs(value) <= _LARGEST:
        raise ValueError(f"{name} must be finite in float32, got {value}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises unless `value` is one of the strings `choices`."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.{hint}"
        )


def check_rate(name: str, rate: Any) -> None:
    """Raises unless `rate` is a static number in [0, 1)."""
    kinds = int | float | np.integer | np.floating
    if isinstance(rate, bool) or not isinstance(rate, kinds):
        raise TypeError(
            f"{name} must be a Python number, because rate 0 is another program "
            f"than any other, got {rate!r} ({type(rate).__name__})."
            + (" Make it a static argument of jax.jit." if is_array(rate) else "")
        )
    if not 0.0 <= rate < 1.0:
        raise ValueError(
            f"{name} must be at least 0 and below 1, got {rate}: it is the "
            "probability that an entry is dropped."
        )


def check_dropout(rate: Any, key: Any) -> None:
    """Raises unless `rate` is a static number in [0, 1), and has a key if it is not 0."""
    check_rate("dropout_rate", rate)
    if rate and key is None:
        raise ValueError(
            f"dropout_rate is {rate} but dropout_key is None: pass a jax.random key to "
            "train with dropout, or dropout_rate=0.0 to evaluate without it."
        )
    if key is not None:
        check_key("dropout_key", key)


def check_flags(**flags: Any) -> None:
    """Raises unless every value is a bool."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{name} must be True or False, got {value!r}.")


def check_fields(what: str, given: Any, allowed: Sequence[str]) -> None:
    """Raises unless `given` is a JSON object with no other fields than `allowed`."""
    if not isinstance(given, dict):
        raise ValueError(f"{what} must be a JSON object, got {type(given).__name__}.")
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.0)
            raise ValueError(
                f"{what} has no field {name!r}; the nearest is {near[0]!r}. Was the text "
                "written by a newer version of lora_jax?"
            )


@contextlib.contextmanager
def reading_json(what: str, text: Any) -> Iterator[Any]:
    """Parses a JSON text and yields its value.

    Raises:
        TypeError: if it is not text.
        ValueError: if it is not JSON, is nested too deeply, has a field twice in one
            object, or has a number that is not finite, which JSON does not allow.
    """
    if not isinstance(text, str | bytes | bytearray):
        raise TypeError(
            f"{what} must be a text, got {type(text).__name__}: pass what to_json returned."
        )
    try:
        try:
            value = json.loads(
                text, object_pairs_hook=_unique_fields, parse_constant=_refuse_constant
            )
        except ValueError as error:
            raise ValueError(
                f"{what} cannot be read: {error}. Pass what to_json returned."
            ) from None
        yield value
    except RecursionError:
        message = f"{what} is nested too deeply to be what to_json returned."
        raise ValueError(message) from None


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"an object has the field {name!r:.60} twice")
        fields[name] = value
    return fields


def _refuse_constant(word: str) -> None:
    raise ValueError(f"it has the number {word}, and only finite ones have a meaning")


def check_json(name: str, value: Any, kind: type, what: str) -> None:
    """Raises TypeError unless a value from a JSON text has exactly this Python type."""
    if type(value) is not kind:
        got = f"{value!r:.60} ({type(value).__name__})"
        raise TypeError(f"{name} must be {what}, got {got}.")


def check_input(x: Any, weight: Any) -> None:
    """Raises unless `x` is a floating-point `(*batch, *tokens, in)` array."""
    if hasattr(x, "dequantize"):
        raise TypeError(
            f"x is quantized ({type(x).__name__}), and only frozen weights may be: use "
            "lora_jax.quant.dequantize(x). Are the arguments in order? The input comes "
            "first."
        )
    check_array("x", x)
    batch, n_in = weight.shape[:-2], weight.shape[-2]
    if x.shape[: len(batch)] + x.shape[-1:] != (*batch, n_in):
        expected = ", ".join([*map(str, batch), "...", str(n_in)])
        hint = ""
        if batch:
            hint = (
                f" The leading axes {batch} of the weight are a stack of layers or "
                "experts, each with an x of its own: for one x for all of them map over "
                "the weight and the adapter with jax.vmap; fold other axes into in or out."
            )
        elif x.shape[-1:] == weight.shape[-1:]:
            hint = (
                f" Its last axis is the output width {weight.shape[-1]}: is the weight "
                "(out, in), as in PyTorch? Then pass weight.T."
            )
        raise ValueError(
            f"x does not fit a weight of shape {weight.shape}: expected x "
            f"({expected}), got {x.shape}.{hint}"
        )


def check_vector(name: str, value: Any, shape: tuple[int, ...], what: str) -> None:
    """Raises unless `value` is floating point and has exactly `shape`."""
    check_array(name, value)
    if value.shape != shape:
        raise ValueError(
            f"{name} does not fit: expected shape {shape}, {what}, got {value.shape}."
        )


def check_bias(name: str, bias: Any, weight_shape: tuple[int, ...]) -> None:
    """Raises unless `bias` is a floating-point `(*batch, out)` array."""
    *batch, _, n_out = weight_shape
    what = f"for a weight of shape {tuple(weight_shape)}"
    check_vector(name, bias, (*batch, n_out), what)


@contextlib.contextmanager
def at_path(path: str) -> Iterator[None]:
    """Puts the path of a leaf in front of the message of an error.

    If the class of the error makes its own text, the path is a note of the error.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        if type(error).__str__ in (Exception.__str__, KeyError.__str__):
            text = error.args[0] if len(error.args) == 1 else error
            error.args = (f"at {path!r}: {text}",)
        else:
            error.add_note(f"at {path!r}")
        raise
