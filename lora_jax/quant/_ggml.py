"""ggml's block types: the bytes of a block, and the values that they stand for.

A block is a run of entries that share scales. Each function of a type returns the values of
blocks, `(..., entries)`, float32. It takes the bytes of blocks, `(..., bytes)`, uint8. The
float16 numbers that a block of some types begins with are apart, `(..., 1)`, float32.

Scales are float16, and scales of scales and codes are integers of at most 8 bits. So each
product has at most 24 significant bits and is exact in float32; only a sum of two products
is rounded, once. Whatever the compiler fuses, the result has the bits of llama.cpp's
`gguf` package.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.quant import _packing

_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class BlockType(NamedTuple):
    """A block type.

    Attributes:
        entries: of a block.
        n_bytes: of a block.
        n_scales: how many float16 numbers a block begins with, if they are taken apart.
        values: of these numbers and the other bytes.
    """

    entries: int
    n_bytes: int
    n_scales: int
    values: Callable[..., jax.Array]

    def fields(self, blocks: jax.Array) -> list[jax.Array]:
        """The arguments of `values`, of blocks `(..., bytes)`."""
        *scales, rest = _split(blocks, *[2] * self.n_scales)
        return [*map(_half, scales), rest]


def _split(block: jax.Array, *widths: int) -> list[jax.Array]:
    """The fields of a block. The last one has the rest of the bytes."""
    ends = np.cumsum(widths).tolist()
    starts = [0, *ends]
    return [block[..., i:j] for i, j in zip(starts, [*ends, None], strict=True)]


def _half(field: jax.Array) -> jax.Array:
    """`(..., 2)` bytes of a float16 -> `(..., 1)`."""
    return _float(lax.bitcast_convert_type(field, jnp.float16))[..., None]


def _float(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32)


def _signed(field: jax.Array) -> jax.Array:
    return _float(lax.bitcast_convert_type(field, jnp.int8))


def _unpack(field: jax.Array, bits: int, run: int) -> jax.Array:
    """The codes in some bytes, `8 / bits` in each, uint8.

    A run of bytes has the lowest bits of as many codes, then the next bits of as many more.
    """
    runs = field.reshape(*field.shape[:-1], -1, 1, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (runs >> shifts.reshape(*[1] * (runs.ndim - 2), -1, 1)) & np.uint8(2**bits - 1)
    return codes.reshape(*field.shape[:-1], -1)


def _times(scales: jax.Array, codes: jax.Array) -> jax.Array:
    """Multiplies each of some scales, `(..., n)`, with an equal share of the codes."""
    shares = _float(codes).reshape(*scales.shape, -1)
    return (scales[..., None] * shares).reshape(codes.shape)


def _minus(values: jax.Array, offsets: jax.Array) -> jax.Array:
    """Subtracts each of some offsets, `(..., n)`, from an equal share of the values."""
    shares = values.reshape(*offsets.shape, -1)
    return (shares - offsets[..., None]).reshape(values.shape)


def _q4_0(scale: jax.Array, codes: jax.Array) -> jax.Array:
    return scale * (_float(_unpack(codes, 4, 16)) - 8)


def _q4_1(scale: jax.Array, offset: jax.Array, codes: jax.Array) -> jax.Array:
    return scale * _float(_unpack(codes, 4, 16)) + offset


def _five_bits(codes: jax.Array) -> jax.Array:
    high, low = _split(codes, 4)
    return _float(_unpack(low, 4, 16) | (_unpack(high, 1, 1) << np.uint8(4)))


def _q5_0(scale: jax.Array, codes: jax.Array) -> jax.Array:
    return scale * (_five_bits(codes) - 16)


def _q5_1(scale: jax.Array, offset: jax.Array, codes: jax.Array) -> jax.Array:
    return scale * _five_bits(codes) + offset


def _q8_0(scale: jax.Array, codes: jax.Array) -> jax.Array:
    return scale * _signed(codes)


def _iq4_nl(scale: jax.Array, codes: jax.Array) -> jax.Array:
    table = np.array(_IQ4_NL, np.float32)
    return scale * _packing.look_up(_unpack(codes, 4, 16), table)


def _q2_k(block: jax.Array) -> jax.Array:
    factors, codes, scale, offset = _split(block, 16, 64, 2)
    values = _times(_half(scale) * _float(factors & np.uint8(15)), _unpack(codes, 2, 32))
    return _minus(values, _half(offset) * _float(factors >> np.uint8(4)))


def _q3_k(block: jax.Array) -> jax.Array:
    high, low, factors, scale = _split(block, 32, 64, 12)
    low_factors, high_factors = _split(factors, 8)
    six_bits = _unpack(low_factors, 4, 8) | (_unpack(high_factors, 2, 4) << np.uint8(4))
    # The highest bit of a code says that 4 is not subtracted.
    codes = _float(_unpack(low, 2, 32) | (_unpack(high, 1, 32) << np.uint8(2))) - 4
    return _times(_half(scale) * (_float(six_bits) - 32), codes)


def _factors(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(..., 12)` bytes -> the 8 factors of the scale and the 8 of the offset, 6 bits each.

    The first two groups of four bytes have the first four of each, and in their upper two
    bits those of the last four; the lower bits of these are in the last group.
    """
    scale, offset, rest = _split(packed, 4, 4)

    def all_eight(first: jax.Array, low: jax.Array) -> jax.Array:
        last = low | ((first >> np.uint8(2)) & np.uint8(0x30))
        return _float(jnp.concatenate([first & np.uint8(0x3F), last], axis=-1))

    return all_eight(scale, rest & np.uint8(15)), all_eight(offset, rest >> np.uint8(4))


def _q4_k(block: jax.Array) -> jax.Array:
    scale, offset, packed, codes = _split(block, 2, 2, 12)
    return _scaled(scale, offset, packed, _unpack(codes, 4, 32))


def _q5_k(block: jax.Array) -> jax.Array:
    scale, offset, packed, high, low = _split(block, 2, 2, 12, 32)
    codes = _unpack(low, 4, 32) | (_unpack(high, 1, 32) << np.uint8(4))
    return _scaled(scale, offset, packed, codes)


def _scaled(
    scale: jax.Array, offset: jax.Array, packed: jax.Array, codes: jax.Array
) -> jax.Array:
    of_scale, of_offset = _factors(packed)
    return _minus(_times(_half(scale) * of_scale, codes), _half(offset) * of_offset)


def _q6_k(block: jax.Array) -> jax.Array:
    low, high, factors, scale = _split(block, 128, 64, 16)
    codes = _float(_unpack(low, 4, 64) | (_unpack(high, 2, 32) << np.uint8(4))) - 32
    return _times(_half(scale) * _signed(factors), codes)


TYPES = {
    "Q4_0": BlockType(32, 18, 1, _q4_0),
    "Q4_1": BlockType(32, 20, 2, _q4_1),
    "Q5_0": BlockType(32, 22, 1, _q5_0),
    "Q5_1": BlockType(32, 24, 2, _q5_1),
    "Q8_0": BlockType(32, 34, 1, _q8_0),
    "Q2_K": BlockType(256, 84, 0, _q2_k),
    "Q3_K": BlockType(256, 110, 0, _q3_k),
    "Q4_K": BlockType(256, 144, 0, _q4_k),
    "Q5_K": BlockType(256, 176, 0, _q5_k),
    "Q6_K": BlockType(256, 210, 0, _q6_k),
    "IQ4_NL": BlockType(32, 18, 1, _iq4_nl),
}
"""The block types by ggml's names."""

_RUN = 16  # entries that have consecutive codes, in each type with scales apart
_MOST = 64  # blocks in one loop


def multiply_row(kind: BlockType, blocks: jax.Array, x: jax.Array) -> jax.Array:
    """`W @ x`, `(out,)`, for one `x`, `(in,)`, and the blocks of `W`, `(out, n, bytes)`.

    XLA on the CPU computes the product of a matrix and a vector entry by entry, in order,
    together with what makes the matrix. Here each of 16 lanes sums every 16th entry of a
    row. So the loop over lanes is vectorized, and nothing of the size of `W` is written.

    Args:
        kind: a type with scales apart.
        blocks: of the rows.
        x: float32.
    """
    n_out, n, _ = blocks.shape
    size = next(size for size in range(_MOST, 0, -1) if n % size == 0)
    parts = blocks.reshape(n_out, -1, size, kind.n_bytes).swapaxes(0, 1)

    def add(lanes: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        fields, runs = kind.fields(part[0]), part[1]
        for i in range(size):
            values = kind.values(*(field[:, i] for field in fields))
            for j in range(kind.entries // _RUN):
                entries = lax.slice_in_dim(values, j * _RUN, (j + 1) * _RUN, axis=1)
                lanes += entries * runs[None, i, j]
        return lanes, None

    lanes = jnp.zeros((n_out, _RUN), jnp.float32)
    lanes, _ = lax.scan(
        add, lanes, (parts, x.reshape(-1, size, kind.entries // _RUN, _RUN))
    )
    # With a second column this is a product of matrices, which XLA does not take apart.
    return (lanes @ jnp.ones((_RUN, 2), jnp.float32))[:, 0]
