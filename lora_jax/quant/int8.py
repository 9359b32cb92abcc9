"""Eight-bit integers with a scale for each output."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from lora_jax._core import compat, placement
from lora_jax._core.quantized import QuantizedTensor
from lora_jax.quant import _channels, inputs
from lora_jax.quant.tensors import register_format

__all__ = ["Int8Tensor", "quantize_int8"]

_TOP = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Int8Tensor(QuantizedTensor):
    """A weight `(*batch, *inputs, out)` in int8; see `quantize_int8`.

    The input axes are folded into one, of size `n_in`. With `b = block_size`, or `n_in` if
    it is None:

        w[i, j] ~ codes[i, j] * scales[i // b, j]
        codes in -127 ... 127,  scales[k, j] = max |w[i, j]| / 127 over i in block k

    The product is computed in float32 and rounded once. Columns of zeros dequantize to
    exact zeros, and so do entries whose scale is below 2^-126, the smallest normal float32.

        |w[i, j] - dequantized[i, j]| <= scales[i // b, j] / 2

    plus roundings: `2^-14` of the scale, and one rounding to the dtype of the result.

    Attributes:
        codes: the shape of the weight, int8.
        scales: `(*batch, out)`, or `(*batch, ceil(n_in / block_size), out)`, float32.
        weight_dtype: name of the dtype of the weight.
        block_size: how many inputs share a scale, or None for all of them.
    """

    codes: jax.Array
    scales: jax.Array
    weight_dtype: str = dataclasses.field(metadata={"static": True})
    block_size: int | None = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, with the axes of the stack in front."""
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the weight that was quantized."""
        return jnp.dtype(self.weight_dtype)

    @property
    def batch_ndim(self) -> int:
        """How many leading axes form the stack."""
        return len(self.scales.shape) - (1 if self.block_size is None else 2)

    def array_specs(self, spec: Sequence[Any], sizes: Mapping[Any, int]) -> "Int8Tensor":
        """The mesh axes of each array: see `QuantizedTensor.array_specs`."""
        n = self.batch_ndim
        middle: tuple[Any, ...] = ()
        if self.block_size is not None:
            n_in = math.prod(self.shape[n:-1])
            folded = placement.axes_of_fold(spec[n:-1], n_in, self.block_size, sizes)
            middle = (folded,)
        scales: Any = PartitionSpec(*spec[:n], *middle, spec[-1])
        codes: Any = PartitionSpec(*spec)
        return dataclasses.replace(self, codes=codes, scales=scales)

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        """The dense weight, `shape`, in `dtype`, sharded like the codes."""
        function = functools.partial(_dequantize, dtype=jnp.dtype(dtype).name)
        return placement.automatic(function, self, like=self.codes, ndim=self.ndim)

    def quantize_like(self, weight: jax.Array) -> "Int8Tensor":
        """Quantizes a weight of the same shape with the settings of this one."""
        return quantize_int8(weight, block_size=self.block_size, batch_axes=self.batch_ndim)

    def check(self) -> None:
        """Raises ValueError unless the arrays and settings fit each other."""
        inputs.check_weight_dtype(self.weight_dtype)
        inputs.check_present(codes=self.codes, scales=self.scales)
        shape = self.shape
        batch_axes = self.batch_ndim
        if not 0 <= batch_axes <= len(shape) - 2 or 0 in shape:
            raise ValueError(
                f"codes of the shape {shape} do not fit scales of {self.scales.shape}."
            )
        middle: tuple[int, ...] = ()
        if self.block_size is not None:
            try:
                block = inputs.check_count("block_size", self.block_size)
            except TypeError as error:
                raise ValueError(*error.args) from None
            middle = (math.ceil(math.prod(shape[batch_axes:-1]) / block),)
        scales = (*shape[:batch_axes], *middle, shape[-1])
        inputs.check_leaf("codes", self.codes, shape, jnp.int8)
        inputs.check_leaf("scales", self.scales, scales, jnp.float32)


register_format(Int8Tensor, "int8")


def quantize_int8(
    weight: Any, *, block_size: int | None = None, batch_axes: int = 0
) -> Int8Tensor:
    """Quantizes a weight to int8, symmetrically, with a scale for each output.

    Args:
        weight: `(*batch, in, out)`, float32, bfloat16 or float16. There may be several
            input axes, such as those of a convolution.
        block_size: how many inputs share a scale; the last block may be shorter. None
            means all inputs.
        batch_axes: how many leading axes form a stack of weights (layers, experts). Each
            weight is quantized separately, with the same bits as if it were alone.

    Returns:
        The quantized weight. Values cannot be checked under `jax.jit`: there all entries
        that share a scale with an infinite or NaN entry dequantize to NaN.

    Raises:
        TypeError: if the weight is not an array of these dtypes, or the size is not an
            integer.
        ValueError: if the weight is a vector, empty or not finite, or the size is not
            positive.

    Example:
        >>> import jax.numpy as jnp, lora_jax.quant
        >>> lora_jax.quant.quantize_int8(jnp.ones((64, 32)))
        Int8Tensor(shape=(64, 32), dtype=float32, block_size=None)
    """
    if block_size is not None:
        block_size = inputs.check_count("block_size", block_size)
    array = inputs.check_matrix(weight, batch_axes, "int8")
    _check_padding(array, block_size, int(batch_axes))

    def quantize(w: jax.Array) -> tuple[Int8Tensor, tuple[()]]:
        return _quantize(w, block_size, int(batch_axes)), ()

    return placement.keep_sharding(quantize, array)[0]


def _check_padding(weight: jax.Array, block: int | None, batch_axes: int) -> None:
    """Raises if XLA would mix up the entries of the last block, which needs padding."""
    n_in = math.prod(weight.shape[batch_axes:-1])
    if block is None or n_in % block == 0 or compat.pads_sharded_axes():
        return
    if max(placement.parts(weight)[batch_axes:-1]) > 1:
        raise ValueError(
            f"with JAX {jax.__version__}, block_size must divide the inputs of a weight "
            f"that is sharded along them, got {block} for {n_in} inputs: choose another "
            "size, or use JAX 0.9 or newer."
        )


@functools.partial(jax.jit, static_argnames=("block", "batch_axes"), inline=True)
def _quantize(weight: jax.Array, block: int | None, batch_axes: int) -> Int8Tensor:
    batch, blocks = (
        weight.shape[:batch_axes],
        _channels.as_blocks(weight, batch_axes, block),
    )
    ratio, scales = _channels.normalize(blocks, _TOP)
    ratio = jnp.where(jnp.isnan(ratio), jnp.zeros_like(ratio), ratio)
    codes = jnp.clip(jnp.round(ratio), -_TOP, _TOP).astype(jnp.int8)
    return Int8Tensor(
        codes=_channels.from_blocks(codes, weight.shape),
        scales=scales if block is None else scales.reshape(*batch, -1, weight.shape[-1]),
        weight_dtype=weight.dtype.name,
        block_size=block,
    )


@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def _dequantize(quantized: Int8Tensor, dtype: str) -> jax.Array:
    codes = quantized.codes
    blocks = _channels.as_blocks(codes, quantized.batch_ndim, quantized.block_size)
    values = _channels.multiply(blocks, quantized.scales).astype(dtype)
    return _channels.from_blocks(values, codes.shape)
