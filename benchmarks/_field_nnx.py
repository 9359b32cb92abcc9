"""Contestants of `bench_field.py` on a Flax nnx model: this library, and `nnx.LoRA`."""

import functools
from typing import Any

import _field_jax
import jax
import jax.numpy as jnp
from _field_case import (
    KERNELS,
    NORM_EPSILON,
    Case,
    Contestant,
    factor_name,
    kernel_name,
)
from _field_jax import device as device
from flax import nnx  # pyright: ignore[reportMissingImports]

import lora_jax


class Block(nnx.Module):
    """A layer."""

    def __init__(self, case: Case, rngs: nnx.Rngs):
        self.heads = case.heads
        norm = functools.partial(
            nnx.LayerNorm, case.width, epsilon=NORM_EPSILON, use_bias=False, rngs=rngs
        )
        self.attention_norm, self.mlp_norm = norm(), norm()

        def linear(name):
            return nnx.Linear(*case.shapes[name], use_bias=False, rngs=rngs)

        self.query, self.key, self.value = linear("query"), linear("key"), linear("value")
        self.output, self.up, self.down = linear("output"), linear("up"), linear("down")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to `(batch, length, width)`."""
        hidden = self.attention_norm(x)
        query, key, value = (
            project(hidden).reshape(*x.shape[:2], self.heads, -1)
            for project in (self.query, self.key, self.value)
        )
        mixed = nnx.dot_product_attention(query, key, value)
        x = x + self.output(mixed.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
    """The model."""

    def __init__(self, case: Case, rngs: nnx.Rngs):
        self.layers = nnx.List([Block(case, rngs) for _ in range(case.layers)])
        self.norm = nnx.LayerNorm(
            case.width, epsilon=NORM_EPSILON, use_bias=False, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the model to `(batch, length, width)`."""
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def make(name: str, case: Case) -> Contestant:
    """Makes a contestant."""
    if name == "nnx.LoRA":
        return nnx_lora(case)
    graphdef, params, rest = nnx.split(make_model(case), nnx.Param, ...)

    def model(params, x):
        return nnx.merge(graphdef, params, rest)(x)

    if name == "frozen, nnx":
        return _field_jax.frozen(model, params, case)
    plan, adapters = _field_jax.adapt(model, params, case, _name_of, targets="*/kernel")
    adapted = lora_jax.adapt(model, plan)

    def by_adapters(adapters, params, x):
        return adapted(params, adapters, x)

    return _field_jax.trained(by_adapters, params, adapters, case)


def make_model(case: Case) -> Transformer:
    """The model with the weights of the case."""
    arrays = _field_jax.load(case.file)
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: Transformer(case, nnx.Rngs(params=0)))
    )
    state = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, case.dtype), state)
    for i in range(case.layers):
        for name in KERNELS:
            state["layers"][i][name]["kernel"].set_value(arrays[kernel_name(i, name)])
    return nnx.merge(graphdef, state)


def add_lora(model: Transformer, case: Case) -> None:
    """Puts an `nnx.LoRA` around every linear layer."""
    arrays, rngs = _field_jax.load(case.file), nnx.Rngs(0)
    for i, layer in enumerate(model.layers):
        for name, (n_in, n_out) in case.shapes.items():
            lora = nnx.LoRA(
                n_in, case.rank, n_out, base_module=getattr(layer, name), rngs=rngs
            )
            lora.lora_a.set_value(jnp.array(arrays[factor_name(i, name)]))
            setattr(layer, name, lora)


def nnx_lora(case: Case) -> Contestant:
    """The step that the documentation of Flax shows, with `nnx.Optimizer` and `nnx.jit`."""
    model = jax.tree.map(jnp.array, make_model(case))  # copies, to be donated
    add_lora(model, case)
    optimizer = nnx.Optimizer(model, _field_jax.make_optimizer(), wrt=nnx.LoRAParam)

    def loss(model, x, target):
        return _field_jax.squared_error(model(x), target)

    def update(model, optimizer, x, target):
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        value, gradient = nnx.value_and_grad(loss, argnums=wrt)(model, x, target)
        optimizer.update(model, gradient)
        return value

    data = _field_jax.data(case)
    jitted: Any = nnx.jit(update, donate_argnames=("model", "optimizer"))

    def step():
        value = jitted(model, optimizer, *data)
        jax.block_until_ready((value, nnx.state(model), nnx.state(optimizer)))
        return float(value)

    def costs():
        trained = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
        state = jax.tree.leaves(nnx.state(optimizer, nnx.optimizer.OptState))
        program = jitted.lower(model, optimizer, *data).compile()
        return {
            "trained": sum(leaf.size for leaf in trained),
            "state_bytes": sum(leaf.nbytes for leaf in state),
            **_field_jax.costs(program),
        }

    return Contestant(step, costs)


def _name_of(path: str) -> tuple[int, str]:
    _, layer, name, *_ = path.split("/")  # "layers/0/query/kernel/value"
    return int(layer), name
