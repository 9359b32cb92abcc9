"""Quantized frozen weights: NF4, int8, float8, GGUF, and formats of your own."""

from lora_jax.quant.files import load_quantized, save_quantized
from lora_jax.quant.fp8 import FP8Tensor, quantize_fp8
from lora_jax.quant.gguf import GGUFTensor, load_gguf, load_gguf_metadata
from lora_jax.quant.int8 import Int8Tensor, quantize_int8
from lora_jax.quant.nf4 import Codec, NF4Tensor, quantize_nf4
from lora_jax.quant.tensors import (
    QuantizedTensor,
    dequantize,
    is_quantized,
    register_format,
)

__all__ = [
    "Codec",
    "FP8Tensor",
    "GGUFTensor",
    "Int8Tensor",
    "NF4Tensor",
    "QuantizedTensor",
    "dequantize",
    "is_quantized",
    "load_gguf",
    "load_gguf_metadata",
    "load_quantized",
    "quantize_fp8",
    "quantize_int8",
    "quantize_nf4",
    "register_format",
    "save_quantized",
]


def __dir__() -> list[str]:
    return __all__
