"""NF4: 4-bit codes of quantiles of a normal distribution.

The entries of a weight are divided into blocks in the order of memory, `(in, out)` row by
row. The entries of a block share a scale. A PyTorch weight `(out, in)` has other blocks
than its transpose: to get the same bits as torchao or bitsandbytes, quantize the weight in
their layout.

torchao and bitsandbytes both have a format called NF4, with different tables, roundings
and ways to store the scales. So there are two codecs.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from lora_jax._core import checks, placement
from lora_jax._core.quantized import QuantizedTensor
from lora_jax.quant import _arithmetic, _bitsandbytes, _packing, _torchao, inputs
from lora_jax.quant.tensors import register_format

__all__ = ["Codec", "NF4Tensor", "quantize_nf4"]

Codec: TypeAlias = Literal["torchao", "bitsandbytes"]
"""The NF4 variant: torchao's or bitsandbytes'."""

_CODECS: dict[str, ModuleType] = {"torchao": _torchao, "bitsandbytes": _bitsandbytes}
BLOCK_SIZE = 64
_LARGEST_PADDING = 2**16
_ZERO = 7  # the code of 0
_LOG = logging.getLogger("lora_jax")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NF4Tensor(QuantizedTensor):
    """A weight of `n` entries in NF4, or a stack of such weights; see `quantize_nf4`.

    Let `b = block_size` and `g = scaler_block_size`, let entries and codes be numbered in
    the order of memory, and let `t` be the ascending table of 16 values from -1 to 1 with
    `t[7] = 0`:

        n_blocks = ceil(n / b),  n_groups = ceil(n_blocks / g)

    The last block and the last group may be shorter. Then

        code[i]  = codes[i // 2] >> 4 if i is even, codes[i // 2] & 15 if it is odd
        w[i]     ~ t[code[i]] * s[i // b]

    - without nested scales: `s = scales`;
    - nested, torchao: `s[k] = scales[k] / group_scales[k // g] + mean`, each operation
      rounded to the dtype of the weight, and `t` too;
    - nested, bitsandbytes: `s[k] = map[scales[k]] * group_scales[k // g] + mean` in
      float32, with a map of 256 values from -0.993 to 1.

    The product is computed in float32 and rounded once. A block of zeros dequantizes to
    exact zeros, and so does a block whose entries are all below 2^-126, the smallest normal
    float32. With `a[k]` the largest absolute value in block `k`, and `u` half a rounding
    unit of the dtype of the weight:

        |w[i] - dequantized[i]| <= 0.1520 a[k] + |s[k] - a[k]| + 3 u a[k]
        plain, torchao and bitsandbytes:  s[k] = a[k]
        nested, torchao:       |s[k] - a[k]| <= p / 128 + 5 u max(a)
        nested, bitsandbytes:  |s[k] - a[k]| <= 0.0071 p + 5 u max(a)

    where `p` is the largest `|a[k] - mean(a)|` in the group. (In float16 torchao's factor
    is at most 65504. There use at least `2^-17` for `p / 128`.)

    By default codes and scales have one row for each weight. With `row_axes = r` they have
    one row for each entry of the weight's first `r` axes, with the same numbers in the same
    order. Then they can be sharded like the weight along any of its first `r + 1` axes.
    Files store them without `row_axes`.

    Attributes:
        codes: `(*batch, *entry_shape[:row_axes], ceil(n / 2))`, uint8, with `n` the number
            of entries of a row; after an odd `n`, four bits of 0111.
        scales: `(*batch, *entry_shape[:row_axes], n_blocks)`, float32, or nested: int8 for
            torchao, uint8 for bitsandbytes.
        group_scales: `(*batch, n_groups)`, or None without nested scales. torchao's
            quantization factors, in the dtype of the weight; bitsandbytes' scales of
            scales, in float32.
        mean: `(*batch,)`, of the scales, or None without nested scales, in the dtype of
            `group_scales`.
        entry_shape: of one weight of the stack.
        weight_dtype: name of the dtype of the weight.
        block_size: how many entries share a scale.
        scaler_block_size: how many scales share a `group_scales`, or None.
        codec: the NF4 variant, `"torchao"` or `"bitsandbytes"`.
        row_axes: how many leading axes of one weight are axes of codes and scales. Each
            row is then a whole number of blocks.
    """

    codes: jax.Array
    scales: jax.Array
    group_scales: jax.Array | None
    mean: jax.Array | None
    entry_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    weight_dtype: str = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})
    scaler_block_size: int | None = dataclasses.field(metadata={"static": True})
    codec: Codec = dataclasses.field(metadata={"static": True})
    row_axes: int = dataclasses.field(
        default=0, metadata={"static": True, "in_files": False}
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, with the axes of the stack in front."""
        return (*self.codes.shape[: self.batch_ndim], *self.entry_shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the weight that was quantized."""
        return jnp.dtype(self.weight_dtype)

    @property
    def batch_ndim(self) -> int:
        """How many leading axes form the stack."""
        return self.codes.ndim - 1 - self.row_axes

    def array_specs(self, spec: Sequence[Any], sizes: Mapping[Any, int]) -> "NF4Tensor":
        """The mesh axes of each array: see `QuantizedTensor.array_specs`."""
        n = self.batch_ndim
        rows = [*spec[n : n + self.row_axes]]
        n_rest = math.prod(self.entry_shape[self.row_axes :])
        last = placement.axes_of_fold(
            spec[n + self.row_axes :], n_rest, self.block_size, sizes
        )
        split, stack = PartitionSpec(*spec[:n], *rows, last), PartitionSpec(*spec[:n])
        nested = None if self.group_scales is None else stack
        arrays: Any = {"codes": split, "scales": split}
        return dataclasses.replace(self, **arrays, group_scales=nested, mean=nested)

    def array_with_axes(self) -> tuple[jax.Array, int]:
        """The codes, all of whose axes are split like leading axes of the weight."""
        return self.codes, self.codes.ndim

    def to_arrays(self) -> dict[str, jax.Array]:
        """The arrays by name; codes and scales have one row for each weight."""
        arrays: dict[str, Any] = super().to_arrays()
        for name in ("codes", "scales") if self.row_axes else ():
            values = np.asarray(arrays[name])
            arrays[name] = values.reshape(*values.shape[: self.batch_ndim], -1)
        return arrays

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        """The dense weight, `shape`, in `dtype`, sharded like the codes."""
        function = functools.partial(_dequantize, dtype=jnp.dtype(dtype).name)
        return placement.automatic(function, self, like=self.codes, ndim=self.ndim)

    def quantize_like(self, weight: jax.Array) -> "NF4Tensor":
        """Quantizes a weight of the same shape with the settings of this one."""
        return quantize_nf4(
            weight,
            self.block_size,
            self.scaler_block_size,
            codec=self.codec,
            batch_axes=self.batch_ndim,
            row_axes=self.row_axes,
        )

    def check(self) -> None:
        """Raises ValueError unless the arrays and settings fit each other."""
        inputs.check_present(codes=self.codes)
        try:
            entry = tuple(inputs.check_count("entry_shape", n) for n in self.entry_shape)
            _check_settings(self.block_size, self.scaler_block_size, self.codec)
        except TypeError as error:
            raise ValueError(*error.args) from None
        inputs.check_weight_dtype(self.weight_dtype)
        n, codec, nested = math.prod(entry), _CODECS[self.codec], self.scaler_block_size
        _check_padding(n, self.block_size, nested)
        _check_rows(self.row_axes, entry, self.block_size)
        if self.batch_ndim < 0:
            raise ValueError(f"codes of the shape {self.codes.shape} lack the rows.")
        batch = tuple(self.codes.shape[: self.batch_ndim])
        rows, n_row = (*batch, *entry[: self.row_axes]), math.prod(entry[self.row_axes :])
        n_blocks = math.ceil(n / self.block_size)
        scales = jnp.float32 if nested is None else codec.SCALES
        in_row = math.ceil(n_row / 2), math.ceil(n_row / self.block_size)
        inputs.check_leaf("codes", self.codes, (*rows, in_row[0]), jnp.uint8)
        inputs.check_leaf("scales", self.scales, (*rows, in_row[1]), scales)
        if nested is None:
            if self.group_scales is not None or self.mean is not None:
                raise ValueError("group_scales and mean belong to nested scales.")
            return
        dtype, n_groups = codec.group_dtype(self.dtype), math.ceil(n_blocks / nested)
        inputs.check_leaf("group_scales", self.group_scales, (*batch, n_groups), dtype)
        inputs.check_leaf("mean", self.mean, batch, dtype)


register_format(NF4Tensor, "nf4")


def quantize_nf4(
    weight: Any,
    block_size: int = BLOCK_SIZE,
    scaler_block_size: int | None = 256,
    *,
    codec: Codec = "torchao",
    batch_axes: int = 0,
    row_axes: int | None = None,
) -> NF4Tensor:
    """Quantizes a weight of any size to NF4, 4 bits per entry.

    With the default sizes this takes 0.516 bytes per entry. On a CPU the codes have the
    bits of torchao 0.17 and bitsandbytes 0.50, and so do the nested scales, except for the
    last bit of the mean. One case differs on purpose: torchao gives each entry of a block
    of zeros -1 times the scale. torchao also refuses a weight that is not a whole number of
    blocks and groups; here the last block and the last group may be shorter.

    A sharded weight is quantized without moving it, and its arrays are sharded like the
    weight, if each shard is a whole number of blocks. If not, a warning in the logger
    `"lora_jax"` names block sizes that would keep the sharding.

    Args:
        weight: `(*batch, ...)`, float32, bfloat16 or float16.
        block_size: how many entries, in the order of memory, share a scale; even.
        scaler_block_size: how many scales share a scale of their own; they take 8 bits
            each. None keeps the scales in float32.
        codec: `"torchao"` or `"bitsandbytes"`.
        batch_axes: how many leading axes form a stack of weights (layers, experts). Each
            weight is quantized separately, with the same bits as if it were alone.
        row_axes: how many leading axes of one weight are axes of codes and scales, so that
            these can be sharded along the next axis as well: see `NF4Tensor`. None chooses
            it from the sharding of the weight. In a trace only explicit mesh axes are
            known.

    Returns:
        The quantized weight. Values cannot be checked under `jax.jit`: there a block with
        an infinite or NaN entry dequantizes to NaN, and with nested scales the whole weight
        does.

    Raises:
        TypeError: if the weight is not an array of these dtypes, or a size is not an
            integer.
        ValueError: if the weight is empty or not finite, a size or the codec is not valid,
            or the rows for `row_axes` are not whole blocks.

    References:
        Dettmers et al., 2023, section 3, https://arxiv.org/abs/2305.14314.

    Example:
        >>> import jax, lora_jax.quant
        >>> weight = jax.random.normal(jax.random.key(0), (256, 128))
        >>> quantized = lora_jax.quant.quantize_nf4(weight)
        >>> quantized.shape, 8 * quantized.nbytes / quantized.size
        ((256, 128), 4.1279296875)
        >>> lora_jax.quant.dequantize(quantized).dtype
        dtype('float32')
    """
    block, nested = _check_settings(block_size, scaler_block_size, codec)
    array = inputs.check_weight(weight, batch_axes)
    entry = array.shape[batch_axes:]
    _check_padding(math.prod(entry), block, nested)
    if row_axes is None:
        row_axes = rows_for(entry, block, placement.parts(array)[batch_axes:])
    _check_rows(row_axes, entry, block)
    quantize = functools.partial(
        _quantize,
        block=block,
        nested=nested,
        codec=codec,
        batch_axes=int(batch_axes),
        row_axes=int(row_axes),
    )
    # With explicit mesh axes a block may span several devices.
    return placement.keep_sharding(lambda w: (quantize(w), ()), array)[0]


def _check_settings(block: Any, nested: Any, codec: Any) -> tuple[int, int | None]:
    checks.check_choice("codec", codec, tuple(_CODECS))
    block = inputs.check_count("block_size", block)
    if block % 2:
        raise ValueError(f"block_size must be even, got {block}: two codes share a byte.")
    if nested is not None:
        nested = inputs.check_count("scaler_block_size", nested)
    return block, nested


def _check_padding(n: int, block: int, nested: int | None) -> None:
    """Raises for sizes to which codes and scales would be padded with many zeros."""
    most = max(n, _LARGEST_PADDING)
    if max(block, nested or 0) > most:
        raise ValueError(
            f"block_size {block} and scaler_block_size {nested} are too large for a "
            f"weight of {n} entries: give sizes of at most {most}."
        )


def _check_rows(row_axes: Any, entry: tuple[int, ...], block: int) -> None:
    if checks.as_index("row_axes", row_axes) < 0:
        raise ValueError(f"row_axes must be at least 0, got {row_axes}.")
    rest = math.prod(entry[row_axes:])
    if row_axes and rest % block:
        raise ValueError(
            f"row_axes must be 0, or leave rows of whole blocks of {block}: with "
            f"{row_axes} a weight of shape {entry} has rows of {rest} entries."
        )


def rows_for(entry: Sequence[int], block: int, parts: Sequence[int]) -> int:
    """The `row_axes` with which the arrays can be sharded like the weight.

    Args:
        entry: the shape of one weight.
        block: the block size.
        parts: how many parts each axis of one weight is split into.

    Returns:
        The last split axis whose parts are whole numbers of blocks. Each split axis after
        it cannot be sharded, and is named by a warning in the log. 0 if there is no such
        axis.
    """
    for axis in reversed(range(len(entry))):
        if parts[axis] == 1:
            continue
        size = math.prod(entry[axis:]) // parts[axis]
        if size % block == 0:
            return axis
        others = [b for b in range(2, 4 * block, 2) if size % b == 0]
        _LOG.warning(
            "NF4 of a weight of shape %s is not sharded along axis %d: its %d shards have "
            "runs of %d entries, which is no multiple of block_size %d. %s",
            tuple(entry),
            axis,
            parts[axis],
            size,
            block,
            f"block_size={max(others)} would keep the sharding."
            if others
            else "No even block size divides it: shard another axis.",
        )
    return 0


_STATIC = ("block", "nested", "codec", "batch_axes", "row_axes")


@functools.partial(jax.jit, static_argnames=_STATIC, inline=True)
def _quantize(
    weight: jax.Array,
    block: int,
    nested: int | None,
    codec: Codec,
    batch_axes: int,
    row_axes: int,
) -> NF4Tensor:
    methods, dtype = _CODECS[codec], weight.dtype
    batch, entry = weight.shape[:batch_axes], weight.shape[batch_axes:]
    rows, n = (*batch, *entry[:row_axes]), math.prod(entry[row_axes:])
    blocks = _arithmetic.in_rows(weight.reshape(*rows, n), block).astype(jnp.float32)
    absmax = _arithmetic.largest(blocks)  # (*rows, n_blocks)
    codes = methods.encode(blocks, absmax, dtype).reshape(*rows, -1)[..., :n]
    scales, group_scales, mean = absmax, None, None
    if nested is not None:
        flat = absmax.reshape(*batch, -1)
        scales, group_scales, mean = methods.nest(flat, nested, dtype)
        scales = scales.reshape(absmax.shape)
    return NF4Tensor(
        codes=_packing.pack(codes, _ZERO),
        scales=scales,
        group_scales=group_scales,
        mean=mean,
        entry_shape=entry,
        weight_dtype=dtype.name,
        block_size=block,
        scaler_block_size=nested,
        codec=codec,
        row_axes=row_axes,
    )


@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def _dequantize(quantized: NF4Tensor, dtype: str) -> jax.Array:
    q: Any = quantized
    methods = _CODECS[q.codec]
    scales = q.scales  # (*batch, *rows, n_blocks)
    if q.mean is not None:
        group = q.scaler_block_size
        group_scales = _arithmetic.spread(q.group_scales, group, scales.shape)
        mean = q.mean.reshape(*q.mean.shape, *[1] * (scales.ndim - q.mean.ndim))
        scales = methods.unnest(scales, group_scales, mean, q.dtype)
        top = float(jnp.finfo(q.dtype).max)  # roundings may exceed the largest scale
        scales = jnp.clip(scales, -top, top)
    # (*batch, *rows, n_blocks, block_size / 2, 2)
    pairs = _packing.unpack(_arithmetic.in_rows(q.codes, q.block_size // 2))
    values = _packing.look_up(pairs, methods.table(q.dtype))
    flat = (values * scales[..., None, None]).astype(dtype).reshape(*scales.shape[:-1], -1)
    return flat[..., : math.prod(q.entry_shape[q.row_axes :])].reshape(q.shape)
