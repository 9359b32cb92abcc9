"""What the tests of `lora_jax.quant` share: weights, formats of all kinds, one of a toy."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import quant
from lora_jax.quant import _ggml
from tests.support import GOLDEN, asarray, draw

SHAPE = (16, 24)

# Every kind of quantized tensor, of a weight of SHAPE.
FORMATS = {
    "torchao": lambda w, **k: quant.quantize_nf4(w, 16, 4, **k),
    "torchao_plain": lambda w, **k: quant.quantize_nf4(w, 32, None, **k),
    "bitsandbytes": lambda w, **k: quant.quantize_nf4(w, 10, 4, codec="bitsandbytes", **k),
    "bitsandbytes_plain": lambda w, **k: quant.quantize_nf4(
        w, 64, None, codec="bitsandbytes", **k
    ),
    "int8": quant.quantize_int8,
    "int8_blocks": lambda w, **k: quant.quantize_int8(w, block_size=5, **k),
    "fp8": quant.quantize_fp8,
}


def golden_cases(suite):
    cases = json.loads((GOLDEN / "manifest.json").read_text())["quantized_cases"]
    return [case for case in cases if case["suite"] == suite]


def in_blocks(values, block):
    """`(n_blocks, block)`, float64, with zeros at the end."""
    flat = np.asarray(values, np.float64).reshape(-1)
    padded = np.pad(flat, (0, -flat.size % block))
    return padded.reshape(-1, block)


def nibbles(packed, n):
    """The codes in some bytes, the upper four bits first."""
    packed = np.asarray(packed).reshape(-1)
    return np.stack([packed >> 4, packed & 15], -1).reshape(-1)[:n]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SignTensor(quant.QuantizedTensor):
    """A toy format: the sign of each entry, and the mean size of them all."""

    positive: jax.Array
    scale: jax.Array
    weight_dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self):
        return tuple(self.positive.shape)

    @property
    def dtype(self):
        return jnp.dtype(self.weight_dtype)

    @property
    def batch_ndim(self):
        return self.scale.ndim

    def dequantize(self, dtype):
        axes = range(self.scale.ndim, self.positive.ndim)
        scale = jax.lax.expand_dims(self.scale, axes)
        return jnp.where(self.positive, scale, -scale).astype(dtype)

    def quantize_like(self, weight):
        return quantize_sign(weight, self.batch_ndim)

    def check(self):
        if self.positive.dtype != bool or self.positive.shape[: self.scale.ndim] != (
            self.scale.shape
        ):
            raise ValueError("positive and scale do not fit.")


def quantize_sign(weight, batch_axes=0):
    axes = tuple(range(batch_axes, weight.ndim))
    scale = jnp.mean(jnp.abs(weight).astype(jnp.float32), axis=axes)
    return SignTensor(weight > 0, scale, weight.dtype.name)


quant.register_format(SignTensor, "toy_sign")
ALL = FORMATS | {"sign": quantize_sign}
STORED = ("Q4_1", "Q6_K")  # types of GGUF, which are read and not written

GGUF_BLOCKS = dict(np.load(GOLDEN / "gguf" / "blocks.npz"))


def gguf_blocks(name, *shape, seed=0):
    """Random bytes of rows of blocks, `(*rows, n_in)`, with finite scales."""
    kind, (*rows, n_in) = _ggml.TYPES[name], shape
    finite = np.isfinite(GGUF_BLOCKS[f"{name}/values"]).all(axis=-1)
    small = np.abs(GGUF_BLOCKS[f"{name}/values"]).max(axis=-1, initial=0) < 10**3
    known = GGUF_BLOCKS[f"{name}/blocks"][finite & small]
    count = (*rows, n_in // kind.entries)
    chosen = known[np.random.default_rng(seed).integers(0, len(known), count)]
    return chosen.reshape(*rows, -1)


def gguf_tensor(name, *shape, seed=0, dtype="float32"):
    return quant.GGUFTensor(asarray(gguf_blocks(name, *shape, seed=seed)), name, dtype)


def make(name, *batch, seed=0, dtype="float32"):
    """A stack of quantized weights in any format."""
    if name in _ggml.TYPES:
        return gguf_tensor(name, *batch, SHAPE[0], 256, seed=seed, dtype=dtype)
    stack = draw(*batch, *SHAPE, seed=seed, dtype=dtype)
    return ALL[name](stack, batch_axes=len(batch))


def write_gguf(path, arrays, metadata=(), architecture="llama"):
    """Writes arrays, and pairs of a ggml type and bytes of rows, to a GGUF file."""
    gguf = pytest.importorskip("gguf", reason="in the extra `gguf`")
    writer = gguf.GGUFWriter(path, architecture)
    kinds = {list: "array", str: "string", int: "uint32", float: "float32"}
    for key, value in metadata:
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    for name, array in arrays.items():
        raw = gguf.GGMLQuantizationType[array[0]] if isinstance(array, tuple) else None
        data = array[1] if isinstance(array, tuple) else array
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
