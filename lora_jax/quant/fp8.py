"""float8: 8-bit floating-point codes with a scale for each output."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from lora_jax._core import placement
from lora_jax._core.quantized import QuantizedTensor
from lora_jax.quant import _channels, inputs
from lora_jax.quant.tensors import register_format

__all__ = ["FP8Tensor", "quantize_fp8"]

_DTYPE = jnp.float8_e4m3fn
_TOP = float(jnp.finfo(_DTYPE).max)  # 448
_TINY = float(jnp.finfo(_DTYPE).tiny)  # 2^-6, the smallest normal number
_MANTISSA_BITS = 3
_STEP = _TINY * 2.0**-_MANTISSA_BITS  # the distance of numbers below _TINY


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FP8Tensor(QuantizedTensor):
    """A weight `(*batch, *inputs, out)` in float8_e4m3fn; see `quantize_fp8`.

    With the input axes folded into one:

        w[i, j] ~ e4m3fn(codes[i, j]) * scales[j]
        scales[j] = max over i of |w[i, j]| / 448

    448 is the largest value of the format, and `e4m3fn` converts eight bits to a number:
    `jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)`. The codes are stored as bytes,
    as in Transformer Engine, because XLA on the CPU carries a stack of float8 through a
    loop as float16. The product is computed in float32 and rounded once. Columns of zeros
    dequantize to exact zeros, and so do columns whose scale is below 2^-126, the smallest
    normal float32.

        |w[i, j] - dequantized[i, j]| <= max(|w[i, j]| / 16, scales[j] / 1024)

    plus float32 roundings and one rounding to the dtype of the result. Entries have four
    significant bits, down to 2^-6 of the scale.

    Attributes:
        codes: the shape of the weight, the bits of float8_e4m3fn as uint8.
        scales: `(*batch, out)`, float32.
        weight_dtype: name of the dtype of the weight.
    """

    codes: jax.Array
    scales: jax.Array
    weight_dtype: str = dataclasses.field(metadata={"static": True})

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
        return self.scales.ndim - 1

    def array_specs(self, spec: Sequence[Any], sizes: Mapping[Any, int]) -> "FP8Tensor":
        """The mesh axes of each array: see `QuantizedTensor.array_specs`."""
        del sizes
        codes: Any = PartitionSpec(*spec)
        scales: Any = PartitionSpec(*spec[: self.batch_ndim], spec[-1])
        return dataclasses.replace(self, codes=codes, scales=scales)

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        """The dense weight, `shape`, in `dtype`, sharded like the codes."""
        function = functools.partial(_dequantize, dtype=jnp.dtype(dtype).name)
        return placement.automatic(function, self, like=self.codes, ndim=self.ndim)

    def quantize_like(self, weight: jax.Array) -> "FP8Tensor":
        """Quantizes a weight of the same shape with the settings of this one."""
        return quantize_fp8(weight, batch_axes=self.batch_ndim)

    def check(self) -> None:
        """Raises ValueError unless the arrays and settings fit each other."""
        inputs.check_weight_dtype(self.weight_dtype)
        inputs.check_present(codes=self.codes, scales=self.scales)
        shape, batch_axes = self.shape, len(self.scales.shape) - 1
        if not 0 <= batch_axes <= len(shape) - 2 or 0 in shape:
            raise ValueError(
                f"codes of the shape {shape} do not fit scales of {self.scales.shape}."
            )
        scales = (*shape[:batch_axes], shape[-1])
        inputs.check_leaf("codes", self.codes, shape, jnp.uint8)
        inputs.check_leaf("scales", self.scales, scales, jnp.float32)


register_format(FP8Tensor, "fp8_e4m3fn")


def quantize_fp8(weight: Any, *, batch_axes: int = 0) -> FP8Tensor:
    """Quantizes a weight to float8_e4m3fn, with a scale for each output.

    NVIDIA's Transformer Engine uses the same numbers for weights, usually with one scale
    for the whole tensor. It computes the scale from the largest values of past steps
    (delayed scaling) or of the current step (current scaling), and stores the factor
    `448 / largest` and its inverse. The scales here are such inverses, one for each output,
    which lose less. One scale per tensor is needed only for products in 8 bits, and this
    library has none.

    Args:
        weight: `(*batch, in, out)`, float32, bfloat16 or float16. There may be several
            input axes, such as those of a convolution.
        batch_axes: how many leading axes form a stack of weights (layers, experts). Each
            weight is quantized separately, with the same bits as if it were alone.

    Returns:
        The quantized weight. Values cannot be checked under `jax.jit`: there an output
        with an infinite or NaN entry dequantizes to NaN.

    Raises:
        TypeError: if the weight is not an array of these dtypes.
        ValueError: if the weight is a vector, empty or not finite.

    References:
        Micikevicius et al., 2022, https://arxiv.org/abs/2209.05433.

    Example:
        >>> import jax.numpy as jnp, lora_jax.quant
        >>> lora_jax.quant.quantize_fp8(jnp.ones((64, 32)))
        FP8Tensor(shape=(64, 32), dtype=float32)
    """
    array = inputs.check_matrix(weight, batch_axes, "fp8")

    def quantize(w: jax.Array) -> tuple[FP8Tensor, tuple[()]]:
        return _quantize(w, int(batch_axes)), ()

    return placement.keep_sharding(quantize, array)[0]


@functools.partial(jax.jit, static_argnames="batch_axes", inline=True)
def _quantize(weight: jax.Array, batch_axes: int) -> FP8Tensor:
    blocks = _channels.as_blocks(weight, batch_axes, None)
    ratio, scales = _channels.normalize(blocks, _TOP)
    codes = _round(jnp.clip(ratio, -_TOP, _TOP)).astype(_DTYPE)
    return FP8Tensor(
        codes=lax.bitcast_convert_type(
            _channels.from_blocks(codes, weight.shape), jnp.uint8
        ),
        scales=scales,
        weight_dtype=weight.dtype.name,
    )


def _round(x: jax.Array) -> jax.Array:
    """Rounds float32 values to the values of the format.

    The cast then rounds nothing. Some versions of XLA cast by way of float16, which would
    round twice.
    """
    steps = jnp.round(x / _STEP) * _STEP
    rounded = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=_MANTISSA_BITS)
    return jnp.where(jnp.abs(x) < _TINY, steps, rounded)


@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def _dequantize(quantized: FP8Tensor, dtype: str) -> jax.Array:
    codes, scales = quantized.codes, quantized.scales
    numbers = lax.bitcast_convert_type(codes, _DTYPE)
    blocks = _channels.as_blocks(numbers, scales.ndim - 1, None)
    values = _channels.multiply(blocks, scales).astype(dtype)
    return _channels.from_blocks(values, codes.shape)
