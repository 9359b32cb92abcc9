"""A format of quantized weights that a user might write: a byte an entry, one scale."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lora_jax._quantized import QuantizedTensor


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale"],
    meta_fields=["entry_shape", "weight_dtype"],
)
@dataclasses.dataclass(frozen=True)
class Bytes(QuantizedTensor):
    """`codes * scale`: codes `(*stack, size)` of int8, scale `(*stack, 1)` of float32."""

    codes: jax.Array
    scale: jax.Array
    entry_shape: tuple[int, ...]
    weight_dtype: str

    @property
    def shape(self):
        return (*self.codes.shape[:-1], *self.entry_shape)

    @property
    def dtype(self):
        return jnp.dtype(self.weight_dtype)

    @property
    def stack_ndim(self):
        return self.codes.ndim - 1

    def dequantize(self, dtype=None):
        dense = self.codes.astype(jnp.float32) * self.scale
        return dense.reshape(self.shape).astype(dtype or self.dtype)

    def quantize_like(self, weight):
        return quantize(weight, self.stack_ndim)


def quantize(weight, stack_ndim=0):
    weight = jnp.asarray(weight)
    flat = weight.reshape(*weight.shape[:stack_ndim], -1).astype(jnp.float32)
    scale = jnp.max(jnp.abs(flat), axis=-1, keepdims=True) / 127
    codes = jnp.round(flat / scale).astype(jnp.int8)
    return Bytes(codes, scale, weight.shape[stack_ndim:], str(weight.dtype))
