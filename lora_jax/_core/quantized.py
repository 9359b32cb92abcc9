"""The interface of quantized frozen weights, for every format."""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from lora_jax._core import checks, compat
from lora_jax._core.tables import format_html

_SHOWN = ("entry_shape", "weight_dtype")  # in every repr as shape and dtype


class QuantizedTensor(abc.ABC):
    """A quantized frozen weight: a pytree of arrays with static settings.

    A format is a subclass that is a frozen dataclass with `eq=False` and `repr=False`,
    registered by `jax.tree_util.register_dataclass`. Its array fields are the leaves; an
    optional array may be None. All other fields have the metadata `static=True`, and are
    strings, numbers, None, or tuples of these. A field that only describes the layout of
    the arrays in memory has a default and `in_files=False`. A format implements `shape`,
    `dtype`, `batch_ndim`, `dequantize`, `quantize_like` and `check`; this class has the
    rest. `register_format` gives a format its name in files.

    - Leading axes of a stack (layers, experts) are leading axes of *all* arrays, and the
      settings describe one entry of the stack. So `shape` begins with the batch sizes of
      the arrays, and `jax.vmap`, `lax.scan` and
      `jax.tree.map(lambda x: x[i], quantized)` give entries that are quantized tensors
      themselves.
    - JAX rebuilds pytrees with leaves that are not arrays, so the constructor checks
      nothing. `check` checks tensors that are read from files.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, with the axes of the stack in front."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """The dtype of the weight that was quantized."""

    @property
    @abc.abstractmethod
    def batch_ndim(self) -> int:
        """The number of leading axes that form the stack, read from the arrays."""

    @abc.abstractmethod
    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        """The dense weight, `shape`, in `dtype`. Pure; every transformation applies."""

    @abc.abstractmethod
    def quantize_like(self, weight: jax.Array) -> "QuantizedTensor":
        """Quantizes a weight of the same shape with the settings of this one."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raises ValueError unless the arrays and settings, of any type, fit each other."""

    def array_specs(self, spec: Sequence[Any], sizes: Mapping[Any, int]) -> Any:
        """A tensor like this one with a `PartitionSpec` in place of each array.

        Arrays with the weight's shape are split as the weight is. All others are split
        along the axes of the stack. A format whose other arrays can be split further
        overrides this method.

        Args:
            spec: the mesh axes of each axis of the weight.
            sizes: of the mesh axes.
        """
        del sizes
        whole = PartitionSpec(*spec)
        stack = PartitionSpec(*spec[: self.batch_ndim])
        return jax.tree.map(lambda x: whole if x.shape == self.shape else stack, self)

    def array_with_axes(self) -> tuple[jax.Array, int]:
        """An array, and how many of its leading axes are split like the weight's.

        By default it is an array with the weight's shape. If there is none, it is the
        first array, with the axes of the stack.
        """
        arrays = jax.tree.leaves(self)
        alike = [array for array in arrays if array.shape == self.shape]
        return (alike[0], self.ndim) if alike else (arrays[0], self.batch_ndim)

    def multiply_row(self, x: jax.Array) -> jax.Array | None:
        """`W @ x` for a weight `(out, in)` and one `x`, `(in,)`, without a dense weight.

        None where a dense weight is as fast, which is the default.
        """
        del x
        return None

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries of the weight."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of the arrays in bytes."""
        leaves = jax.tree.leaves(self)
        return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in leaves)

    def to_arrays(self) -> dict[str, jax.Array]:
        """The arrays by name, in dtypes that safetensors has."""
        fields = {field.name: getattr(self, field.name) for field in _fields(self, False)}
        return {name: value for name, value in fields.items() if value is not None}

    def settings(self) -> dict[str, Any]:
        """The static settings by name, as JSON has them."""
        return {field.name: getattr(self, field.name) for field in _fields(self, True)}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, jax.Array], settings: Mapping[str, Any]
    ) -> "QuantizedTensor":
        """Creates a tensor from the results of `to_arrays` and `settings`; checks them."""
        names = {static: [f.name for f in _fields(cls, static)] for static in (True, False)}
        unknown = [*(set(arrays) - set(names[False])), *(set(settings) ^ set(names[True]))]
        if unknown:
            raise ValueError(
                f"expected arrays of {', '.join(names[False])} and the settings "
                f"{', '.join(names[True])}, got {', '.join(arrays) or 'none'} and "
                f"{', '.join(settings) or 'none'}."
            )
        values = {name: arrays.get(name) for name in names[False]}
        made = cls(**values, **{name: _frozen(value) for name, value in settings.items()})
        made.check()
        return made

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{self!r} is not an array, and this needs one: run the function through "
            "lora_jax.adapt or lora_jax.accept_quantized, or use "
            "lora_jax.quant.dequantize(weight)."
        )

    __array__ = __getitem__ = __matmul__ = __rmatmul__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __neg__ = _refuse
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse

    def __repr__(self) -> str:
        try:
            shape: Any = self.shape
        except (AttributeError, TypeError):
            shape = "?"  # the leaves are not arrays but, for example, shardings or None
        settings = {k: v for k, v in self.settings().items() if k not in _SHOWN}
        rest = "".join(f", {name}={value!r}" for name, value in settings.items())
        return f"{type(self).__name__}(shape={shape}, dtype={self.dtype}{rest})"

    def _repr_html_(self) -> str:
        rows = [("array", "shape", "dtype", "bytes")]
        for field in _fields(self, False):
            array = getattr(self, field.name)
            if checks.is_array(array):
                size = math.prod(array.shape) * jnp.dtype(array.dtype).itemsize
                rows.append((field.name, str(array.shape), str(array.dtype), f"{size:,}"))
        return format_html(rows, (3,), [repr(self)])


def _fields(owner: Any, static: bool) -> list[dataclasses.Field[Any]]:
    fields = [f for f in dataclasses.fields(owner) if f.metadata.get("in_files", True)]
    return [f for f in fields if f.metadata.get("static", False) == static]


def _frozen(value: Any) -> Any:
    """A JSON value as a static setting, with tuples in place of lists."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def is_quantized(value: Any) -> bool:
    """Whether a value is a quantized weight."""
    return isinstance(value, QuantizedTensor)


def as_abstract(value: Any) -> Any:
    """The shape and dtype of a quantized weight; any other value unchanged."""
    return jax.ShapeDtypeStruct(value.shape, value.dtype) if is_quantized(value) else value


def as_frozen(weight: Any) -> Any:
    """A frozen weight as a JAX array, or as a quantized weight of JAX arrays."""
    return jax.tree.map(jnp.asarray, weight)


Weight: TypeAlias = jax.Array | QuantizedTensor
"""A frozen weight, dense or quantized."""


def as_dense(value: Any) -> jax.Array:
    """A quantized weight as a dense array without a gradient; other values unchanged.

    The dense array lies on the device, also if the quantized one is in the host's memory.
    """
    if not is_quantized(value):
        return value
    here = jax.tree.map(compat.to_device, value)
    return jax.lax.stop_gradient(here.dequantize(value.dtype))
