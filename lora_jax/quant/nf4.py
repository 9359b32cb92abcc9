"""NF4: four bits for an entry, which stand for quantiles of a normal distribution.

The weight is taken as it lies in memory, `(in, out)` row by row, in blocks of entries that
share a scale. A PyTorch weight `(out, in)` has other blocks than its transpose: to get the
bits that torchao or bitsandbytes have, quantize it as it is stored there.

Two libraries have a format of that name, with other tables, other roundings and other ways
to store the scales, so there are two codecs.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

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

Codec = Literal["torchao", "bitsandbytes"]
"""Whose NF4 it is."""

_CODECS: dict[str, ModuleType] = {"torchao": _torchao, "bitsandbytes": _bitsandbytes}
BLOCK_SIZE = 64
_LARGEST_PADDING = 2**16
_ZERO = 7  # the code of 0
_LOG = logging.getLogger("lora_jax")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NF4Tensor(QuantizedTensor):
    """A weight of `n` entries in NF4, or a stack of such weights; see `quantize_nf4`.

    With `b = block_size`, `g = scaler_block_size`, entries and codes numbered in the order
    of memory, and `t` the ascending table of 16 values from -1 to 1 with `t[7] = 0`:

        n_blocks = ceil(n / b),  n_groups = ceil(n_blocks / g)

    The last block and the last group may be shorter. Then

        code[i]  = codes[i // 2] >> 4 if i is even, codes[i // 2] & 15 if it is odd
        w[i]     ~ t[code[i]] * s[i // b]

    - without nested scales: `s = scales`;
    - nested, torchao: `s[k] = scales[k] / group_scales[k // g] + mean`, each operation
      rounded to the dtype of the weight, and `t` too;
    - nested, bitsandbytes: `s[k] = map[scales[k]] * group_scales[k // g] + mean` in
      float32, with a map of 256 values from -0.993 to 1.

    The product is formed in float32 and rounded once. Blocks of zeros come back as exact
    zeros, and so do those with no entry of at least 2^-126 (below that are no normal
    float32). With `a[k]` the largest absolute value in a block, and `u` half a rounding
    unit of the dtype of the weight:

        |w[i] - dequantized[i]| <= 0.1520 a[k] + |s[k] - a[k]| + 3 u a[k]
        plain, torchao and bitsandbytes:  s[k] = a[k]
        nested, torchao:       |s[k] - a[k]| <= p / 128 + 5 u max(a)
        nested, bitsandbytes:  |s[k] - a[k]| <= 0.0071 p + 5 u max(a)

    where `p` is the largest `|a[k] - mean(a)|` in its group. (In float16 torchao's factor
    has its largest value, 65504, at most: there `p / 128` is at least `2^-17`.)

    Codes and scales are one row for each weight. With `row_axes = r` they are one row for
    each entry of its first `r` axes, the same numbers in the same order, so that they can
    be sharded along any of the first `r + 1` axes of the weight, as it is. Files have them
    without `row_axes`.

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
        codec: whose NF4 it is.
        row_axes: how many leading axes of one weight codes and scales have. A row then is
            a whole number of blocks.
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
        """How many leading axes are those of the stack."""
        return self.codes.ndim - 1 - self.row_axes

    def array_specs(self, spec: Sequence[Any], sizes: Mapping[Any, int]) -> "NF4Tensor":
        """Which mesh axes its arrays are split over: see `QuantizedTensor.array_specs`."""
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
        """The codes, the last axis of which starts with an axis of the weight."""
        return self.codes, self.codes.ndim

    def to_arrays(self) -> dict[str, jax.Array]:
        """The arrays by name, with codes and scales in one row for each weight."""
        arrays: dict[str, Any] = super().to_arrays()
        for name in ("codes", "scales") if self.row_axes else ():
            values = np.asarray(arrays[name])
            arrays[name] = values.reshape(*values.shape[: self.batch_ndim], -1)
        return arrays

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        """The weight, `shape`, in `dtype`, sharded as its codes are."""
        function = functools.partial(_dequantize, dtype=jnp.dtype(dtype).name)
        return placement.automatic(function, self, like=self.codes, ndim=self.ndim)

    def quantize_like(self, weight: jax.Array) -> "NF4Tensor":
        """A weight of the same shape, with the settings of this one."""
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
        # What is formed of codes and scales has whole blocks, and groups of them.
        if max(self.block_size, nested or 0) > max(n, _LARGEST_PADDING):
            raise ValueError(
                f"block_size {self.block_size} and scaler_block_size {nested} are too "
                f"large for a weight of {n} entries."
            )
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
    """Quantizes a weight of any size to four bits an entry.

    With the default sizes that is 0.516 bytes an entry. On a CPU the codes are those of
    torchao 0.17 and bitsandbytes 0.50, bit for bit, and the nested scales up to the last
    bit of the mean, where these libraries give something sensible: torchao makes -1 times
    a scale of the entries of a block of zeros. torchao itself refuses a weight that is not
    made of whole blocks and groups of them. Here the last block or group of it is shorter.

    A weight that is sharded along any of its axes is quantized where it lies, and its
    arrays are sharded as it is, wherever each shard is a whole number of blocks. Where it
    is not, a warning in the logger `"lora_jax"` says which block sizes would do.

    Args:
        weight: `(*batch, ...)`, float32, bfloat16 or float16.
        block_size: how many entries, in the order of memory, share a scale; even.
        scaler_block_size: how many of the scales share a scale of their own, 8 bits each;
            None to keep them in float32.
        codec: `"torchao"` or `"bitsandbytes"`.
        batch_axes: how many leading axes are a stack of weights (layers, experts). Each is
            quantized on its own, with the same bits as alone.
        row_axes: how many leading axes of one weight codes and scales have as axes of
            their own, so that they can be sharded along the next axis as well: see
            `NF4Tensor`. None is what the sharding of the weight needs, as far as it is
            known: in a trace it is known of explicit mesh axes only.

    Returns:
        The quantized weight. Under `jax.jit`, where values cannot be checked, a block with
        an entry that is infinite or NaN dequantizes to NaN, and with nested scales all of
        its weight does.

    Raises:
        TypeError: if the weight is no array of those dtypes, or a size no integer.
        ValueError: if the weight is empty or not finite, a size or the codec is none, or
            the rows that `row_axes` asks for are not of whole blocks.

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
    # With explicit mesh axes a block may reach across the devices.
    return placement.keep_sharding(lambda w: (quantize(w), ()), array)[0]


def _check_settings(block: Any, nested: Any, codec: Any) -> tuple[int, int | None]:
    checks.check_choice("codec", codec, tuple(_CODECS))
    block = inputs.check_count("block_size", block)
    if block % 2:
        raise ValueError(f"block_size must be even, got {block}: two codes share a byte.")
    if nested is not None:
        nested = inputs.check_count("scaler_block_size", nested)
    return block, nested


def _check_rows(row_axes: Any, entry: tuple[int, ...], block: int) -> None:
    if inputs.as_integer("row_axes", row_axes) < 0:
        raise ValueError(f"row_axes must be at least 0, got {row_axes}.")
    rest = math.prod(entry[row_axes:])
    if row_axes and (row_axes >= len(entry) or rest % block):
        raise ValueError(
            f"row_axes must be 0, or leave rows of whole blocks of {block}: with "
            f"{row_axes} a weight of shape {entry} has rows of {rest} entries."
        )


def rows_for(entry: Sequence[int], block: int, parts: Sequence[int]) -> int:
    """The `row_axes` with which arrays can be sharded as the weight is.

    Args:
        entry: the shape of one weight.
        block: the block size.
        parts: how many parts each axis of one weight is split into.

    Returns:
        The last axis that is split, if each part of what it starts is a whole number of
        blocks; else, with a warning in the log, the one before it that is.
    """
    for axis in reversed(range(len(entry))):
        if parts[axis] == 1:
            continue
        size = math.prod(entry[axis:]) // parts[axis]
        if size % block == 0:
            return axis
        others = [b for b in range(2, min(size, 4 * block) + 1, 2) if size % b == 0]
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
    q, methods = quantized, _CODECS[quantized.codec]
    scales = q.scales  # (*batch, *rows, n_blocks)
    if q.group_scales is not None and q.mean is not None:
        group = q.scaler_block_size or 1
        group_scales = _arithmetic.spread(q.group_scales, group, scales.shape)
        mean = q.mean.reshape(*q.mean.shape, *[1] * (scales.ndim - q.mean.ndim))
        scales = methods.unnest(scales, group_scales, mean, q.dtype)
    # (*batch, *rows, n_blocks, block_size / 2, 2)
    pairs = _packing.unpack(_arithmetic.in_rows(q.codes, q.block_size // 2))
    values = _packing.look_up(pairs, methods.table(q.dtype))
    flat = (values * scales[..., None, None]).astype(dtype).reshape(*scales.shape[:-1], -1)
    return flat[..., : math.prod(q.entry_shape[q.row_axes :])].reshape(q.shape)
