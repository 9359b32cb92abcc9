"""Contestants of `bench_field.py` on a Flax linen model that knows of no adapters."""

from typing import Any

import _field_jax
import flax.linen as nn  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp
from _field_case import KERNELS, NORM_EPSILON, Case, Contestant, kernel_name
from _field_jax import device as device

import lora_jax


class Block(nn.Module):
    """A layer: heads of their own axis, as `nn.MultiHeadDotProductAttention` has them."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to `(batch, length, width)`."""
        width = x.shape[-1]
        split = self.heads, width // self.heads
        hidden = nn.LayerNorm(NORM_EPSILON, use_bias=False, name="attention_norm")(x)
        query, key, value = (
            nn.DenseGeneral(split, use_bias=False, name=name)(hidden)
            for name in ("query", "key", "value")
        )
        mixed = nn.dot_product_attention(query, key, value)
        output = nn.DenseGeneral(width, axis=(-2, -1), use_bias=False, name="output")
        x = x + output(mixed)
        hidden = nn.LayerNorm(NORM_EPSILON, use_bias=False, name="mlp_norm")(x)
        hidden = nn.gelu(nn.Dense(4 * width, use_bias=False, name="up")(hidden))
        return x + nn.Dense(width, use_bias=False, name="down")(hidden)


class Transformer(nn.Module):
    """The model."""

    layers: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the model to `(batch, length, width)`."""
        for i in range(self.layers):
            x = Block(self.heads, name=f"layers_{i}")(x)
        return nn.LayerNorm(NORM_EPSILON, use_bias=False, name="norm")(x)


def make(name: str, case: Case) -> Contestant:
    """Makes a contestant."""
    module, params = make_model(case)

    def model(params, x) -> Any:
        return module.apply({"params": params}, x)

    if name == "frozen, linen":
        return _field_jax.frozen(model, params, case)
    plan, adapters = _field_jax.adapt(model, params, case, name_of, targets="*/kernel")
    adapted = lora_jax.adapt(model, plan)

    def by_adapters(adapters, params, x):
        return adapted(params, adapters, x)

    return _field_jax.trained(by_adapters, params, adapters, case)


def make_model(case: Case) -> tuple[Transformer, Any]:
    """The module and its params, with the weights of the case."""
    module, arrays = Transformer(case.layers, case.heads), _field_jax.load(case.file)
    shapes = jax.eval_shape(module.init, jax.random.key(0), _field_jax.data(case)[0])
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, case.dtype), shapes["params"])
    for i in range(case.layers):
        for name in KERNELS:
            leaf = params[f"layers_{i}"][name]
            leaf["kernel"] = arrays[kernel_name(i, name)].reshape(leaf["kernel"].shape)
    return module, params


def name_of(path: str) -> tuple[int, str]:
    """The layer and the name in it of a path."""
    layer, name, *_ = path.split("/")  # "layers_0/query/kernel"
    return int(layer.removeprefix("layers_")), name
