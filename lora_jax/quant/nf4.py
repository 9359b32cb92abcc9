"""NF4: four bits for an entry, which stand for quantiles of a normal distribution.

The weight is taken as it lies in memory, `(in, out)` row by row, in blocks of entries that
share a scale. A PyTorch weight `(out, in)` has other blocks than its transpose: to get the
bits that torchao or bitsandbytes have, quantize it as it is stored there.

Two libraries have a format of that name, with other tables, other roundings and other ways
to store the scales, so there are two codecs.
"""

import dataclasses
import functools
import math
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax import _checks, _compat, _placement
from lora_jax._quantized import QuantizedTensor
from lora_jax.quant import _arithmetic, _bitsandbytes, _inputs, _packing, _torchao
from lora_jax.quant.tensors import register_format

__all__ = ["Codec", "NF4Tensor", "quantize_nf4"]

Codec = Literal["torchao", "bitsandbytes"]
"""Whose NF4 it is."""

_CODECS: dict[str, ModuleType] = {"torchao": _torchao, "bitsandbytes": _bitsandbytes}
_ZERO = 7  # the code of 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NF4Tensor(QuantizedTensor):
    """A weight of `n` entries in NF4, or a stack of such weights; see `quantize_nf4`.

    With `b = block_size`, `g = scaler_block_size`, entries and codes numbered in the order
    of memory, and `t` the ascending table of 16 values from -1 to 1 with `t[7] = 0`:

        n_blocks = ceil(n / b),  n_groups = ceil(n_blocks / g)
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

    Attributes:
        codes: `(*batch, ceil(n / 2))`, uint8; after an odd `n`, four bits of 0111.
        scales: `(*batch, n_blocks)`, float32, or nested: int8 for torchao, uint8 for
            bitsandbytes.
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

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, with the axes of the stack in front."""
        return (*self.codes.shape[:-1], *self.entry_shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the weight that was quantized."""
        return jnp.dtype(self.weight_dtype)

    @property
    def batch_ndim(self) -> int:
        """How many leading axes are those of the stack."""
        return self.codes.ndim - 1

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        """The weight, `shape`, in `dtype`."""
        return _dequantize(self, jnp.dtype(dtype).name)

    def quantize_like(self, weight: jax.Array) -> "NF4Tensor":
        """A weight of the same shape, with the settings of this one."""
        return quantize_nf4(
            weight,
            self.block_size,
            self.scaler_block_size,
            codec=self.codec,
            batch_axes=self.batch_ndim,
        )

    def check(self) -> None:
        """Raises ValueError unless the arrays and settings fit each other."""
        _inputs.check_present(codes=self.codes)
        try:
            entry = tuple(_inputs.check_count("entry_shape", n) for n in self.entry_shape)
            _check_settings(self.block_size, self.scaler_block_size, self.codec)
        except TypeError as error:
            raise ValueError(*error.args) from None
        _inputs.check_weight_dtype(self.weight_dtype)
        n, codec, nested = math.prod(entry), _CODECS[self.codec], self.scaler_block_size
        if self.codec == "torchao":
            _check_divides(n, self.block_size, nested)
        batch = tuple(self.codes.shape[:-1])
        n_blocks = math.ceil(n / self.block_size)
        scales = jnp.float32 if nested is None else codec.SCALES
        _inputs.check_leaf("codes", self.codes, (*batch, math.ceil(n / 2)), jnp.uint8)
        _inputs.check_leaf("scales", self.scales, (*batch, n_blocks), scales)
        if nested is None:
            if self.group_scales is not None or self.mean is not None:
                raise ValueError("group_scales and mean belong to nested scales.")
            return
        dtype, n_groups = codec.group_dtype(self.dtype), math.ceil(n_blocks / nested)
        _inputs.check_leaf("group_scales", self.group_scales, (*batch, n_groups), dtype)
        _inputs.check_leaf("mean", self.mean, batch, dtype)


register_format(NF4Tensor, "nf4")


def quantize_nf4(
    weight: Any,
    block_size: int = 64,
    scaler_block_size: int | None = 256,
    *,
    codec: Codec = "torchao",
    batch_axes: int = 0,
) -> NF4Tensor:
    """Quantizes a weight to four bits an entry.

    With the default sizes that is 0.516 bytes an entry. On a CPU the codes are those of
    torchao 0.17 and bitsandbytes 0.50, bit for bit, and the nested scales up to the last
    bit of the mean, where these libraries give something sensible: torchao makes -1 times
    a scale of the entries of a block of zeros.

    Args:
        weight: `(*batch, ...)`, float32, bfloat16 or float16.
        block_size: how many entries, in the order of memory, share a scale; even.
        scaler_block_size: how many of the scales share a scale of their own, 8 bits each;
            None to keep them in float32.
        codec: `"torchao"`, which needs whole blocks and groups of them; or
            `"bitsandbytes"`, where the last of each may be shorter.
        batch_axes: how many leading axes are a stack of weights (layers, experts). Each is
            quantized on its own, with the same bits as alone.

    Returns:
        The quantized weight. Under `jax.jit`, where values cannot be checked, a block with
        an entry that is infinite or NaN dequantizes to NaN, and with nested scales all of
        its weight does.

    Raises:
        TypeError: if the weight is no array of those dtypes, or a size no integer.
        ValueError: if the weight is empty, not finite, or not of whole blocks where it has
            to be, or a size or the codec is none.

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
    array = _inputs.check_weight(weight, batch_axes)
    if codec == "torchao":
        _check_divides(math.prod(array.shape[batch_axes:]), block, nested)
    quantize = functools.partial(
        _quantize, block=block, nested=nested, codec=codec, batch_axes=int(batch_axes)
    )
    if any(_compat.explicit_spec(array)):  # a block may reach across the devices
        return _placement.keep_sharding(lambda w: (quantize(w), ()), array)[0]
    return quantize(array)


def _check_settings(block: Any, nested: Any, codec: Any) -> tuple[int, int | None]:
    _checks.check_choice("codec", codec, tuple(_CODECS))
    block = _inputs.check_count("block_size", block)
    if block % 2:
        raise ValueError(f"block_size must be even, got {block}: two codes share a byte.")
    if nested is not None:
        nested = _inputs.check_count("scaler_block_size", nested)
    return block, nested


def _check_divides(n: int, block: int, nested: int | None) -> None:
    unit = block * (nested or 1)
    if n % unit:
        sizes = f"block_size {block}" + (f" x scaler_block_size {nested}" if nested else "")
        raise ValueError(
            f"a weight of {n} entries is no multiple of {unit} ({sizes}), as torchao's "
            'format needs it: choose sizes that divide it, or codec="bitsandbytes", where '
            "the last block may be shorter"
            + (", or scaler_block_size=None." if nested and n % block == 0 else ".")
        )


_STATIC = ("block", "nested", "codec", "batch_axes")


@functools.partial(jax.jit, static_argnames=_STATIC, inline=True)
def _quantize(
    weight: jax.Array, block: int, nested: int | None, codec: Codec, batch_axes: int
) -> NF4Tensor:
    methods, dtype = _CODECS[codec], weight.dtype
    batch, entry = weight.shape[:batch_axes], weight.shape[batch_axes:]
    n = math.prod(entry)
    blocks = _arithmetic.in_rows(weight.reshape(*batch, n), block).astype(jnp.float32)
    absmax = _arithmetic.largest(blocks)
    codes = methods.encode(blocks, absmax, dtype).reshape(*batch, -1)[..., :n]
    scales, group_scales, mean = absmax, None, None
    if nested is not None:
        scales, group_scales, mean = methods.nest(absmax, nested, dtype)
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
    )


@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def _dequantize(quantized: NF4Tensor, dtype: str) -> jax.Array:
    q, methods = quantized, _CODECS[quantized.codec]
    scales = q.scales
    if q.scaler_block_size is not None:
        nested = (q.group_scales, q.mean, q.scaler_block_size, q.dtype)
        scales = methods.unnest(q.scales, *nested)
    # (*batch, n_blocks, block_size / 2, 2)
    pairs = _packing.unpack(_arithmetic.in_rows(q.codes, q.block_size // 2))
    values = _packing.look_up(pairs, methods.table(q.dtype))
    flat = (values * scales[..., None, None]).astype(dtype).reshape(*scales.shape[:-1], -1)
    return flat[..., : math.prod(q.entry_shape)].reshape(q.shape)
