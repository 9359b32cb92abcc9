"""What a frozen weight in few bits provides, whatever its format."""

import abc
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class QuantizedTensor(abc.ABC):
    """A frozen weight in few bits; the base class of every format.

    A format is a registered pytree whose leaves are arrays, with static metadata that is
    hashable. The leading axes of a weight may be a *stack* (layers, experts): its entries
    are quantized apart, every array has the axes of the stack in front, and the metadata
    are those of one entry. So `jax.tree.map(lambda array: array[i], q)` is an entry,
    `jax.lax.scan` and `jax.vmap` go over the entries, and a `PartitionSpec` of the stack
    is one of every array.

    Instances may hold anything in place of arrays (JAX rebuilds pytrees with shapes,
    tracers, None): `__init__` must check nothing.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """That of the weight, the axes of the stack included: read from the arrays."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """That of the weight that was quantized, floating point of at least 16 bits."""

    @property
    @abc.abstractmethod
    def stack_ndim(self) -> int:
        """The number of axes of the stack: read from the arrays."""

    @abc.abstractmethod
    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """The dense weight, in a dtype, or in that of the weight."""

    @abc.abstractmethod
    def quantize_like(self, weight: jax.Array) -> "QuantizedTensor":
        """A weight of the same shape, in the same format with the same settings."""

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
        """The bytes of all arrays; abstract ones count too."""
        leaves = jax.tree.leaves(self)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def is_quantized(value: Any) -> bool:
    """Whether a value is a weight in few bits."""
    return isinstance(value, QuantizedTensor)


def as_abstract(value: Any) -> Any:
    """The shape and dtype of a quantized weight; any other value as it is."""
    return jax.ShapeDtypeStruct(value.shape, value.dtype) if is_quantized(value) else value


def as_frozen(weight: Any) -> Any:
    """A frozen weight as an array of JAX, or as a quantized weight of such arrays."""
    return (
        jax.tree.map(jnp.asarray, weight) if is_quantized(weight) else jnp.asarray(weight)
    )


def as_dense(value: Any) -> Any:
    """A quantized weight as an array without a gradient; any other value as it is."""
    if not is_quantized(value):
        return value
    return jax.lax.stop_gradient(value).dequantize()
