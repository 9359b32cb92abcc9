"""A format of quantized weights that a user might write: a byte an entry, one scale."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lora_jax.quant import QuantizedTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Bytes(QuantizedTensor):
    """`codes * scale`: codes `(*stack, size)` of int8, scale `(*stack, 1)` of float32."""

    codes: jax.Array
    scale: jax.Array
    entry_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    weight_dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self):
        return (*self.codes.shape[:-1], *self.entry_shape)

    @property
    def dtype(self):
        return jnp.dtype(self.weight_dtype)

    @property
    def batch_ndim(self):
        return self.codes.ndim - 1

    def dequantize(self, dtype):
        dense = self.codes.astype(jnp.float32) * self.scale
        return dense.reshape(self.shape).astype(dtype)

    def quantize_like(self, weight):
        return quantize(weight, self.batch_ndim)

    def check(self):
        if self.codes.dtype != jnp.int8 or self.scale.ndim != self.codes.ndim:
            raise ValueError("codes and scale do not fit.")


@functools.partial(jax.jit, static_argnums=1)
def quantize(weight, batch_ndim=0):
    flat = weight.reshape(*weight.shape[:batch_ndim], -1).astype(jnp.float32)
    scale = jnp.max(jnp.abs(flat), axis=-1, keepdims=True) / 127
    codes = jnp.round(flat / scale).astype(jnp.int8)
    return Bytes(codes, scale, weight.shape[batch_ndim:], str(weight.dtype))
