"""Quantized frozen weights: NF4, int8, float8, and formats of your own."""

from lora_jax.quant.files import load_quantized as load_quantized
from lora_jax.quant.files import save_quantized as save_quantized
from lora_jax.quant.fp8 import FP8Tensor as FP8Tensor
from lora_jax.quant.fp8 import quantize_fp8 as quantize_fp8
from lora_jax.quant.int8 import Int8Tensor as Int8Tensor
from lora_jax.quant.int8 import quantize_int8 as quantize_int8
from lora_jax.quant.nf4 import Codec as Codec
from lora_jax.quant.nf4 import NF4Tensor as NF4Tensor
from lora_jax.quant.nf4 import quantize_nf4 as quantize_nf4
from lora_jax.quant.tensors import QuantizedTensor as QuantizedTensor
from lora_jax.quant.tensors import dequantize as dequantize
from lora_jax.quant.tensors import is_quantized as is_quantized
from lora_jax.quant.tensors import register_format as register_format
