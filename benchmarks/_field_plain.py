"""Contestants of `bench_field.py` on plain JAX: this library, and forms by hand."""

import functools
from collections.abc import Callable
from typing import Any

import _field_jax
import _transformer
import jax
import jax.numpy as jnp
from _field_case import KERNELS, Case, Contestant, kernel_name
from _field_jax import device as device

import lora_jax

Params = Any
Linear = Callable[[jax.Array, jax.Array, Any, float], jax.Array]
"""Of input, weight, adapter and alpha."""


def make(name: str, case: Case) -> Contestant:
    """Makes a contestant."""
    params = make_params(case)
    model = functools.partial(_transformer.plain_loop, heads=case.heads)
    if name == "frozen":
        return _field_jax.frozen(model, params, case)
    if name == "full fine-tuning":
        own = jax.tree.map(jnp.array, params)  # a copy, to be donated
        return _field_jax.trained(lambda own, _, x: model(own, x), (), own, case)
    plan, adapters = _field_jax.adapt(
        model, params, case, _name_of, use_dora=name.endswith("DoRA")
    )
    adapted = make_model(name, model, plan, case)

    def by_adapters(adapters, params, x):
        return adapted(params, adapters, x)

    return _field_jax.trained(by_adapters, params, adapters, case)


def make_params(case: Case) -> Params:
    """The weights as `_transformer` has them."""
    arrays, ones = _field_jax.load(case.file), jnp.ones(case.width, case.dtype)

    def layer(i):
        kernels = {name: arrays[kernel_name(i, name)] for name in KERNELS}
        return kernels | {"attention_norm": ones, "mlp_norm": ones}

    return {"layers": [layer(i) for i in range(case.layers)], "norm": ones}


def make_model(
    name: str, model: _field_jax.Model, plan: lora_jax.AdapterPlan, case: Case
) -> Callable[[Params, Any, jax.Array], jax.Array]:
    """The adapted model of a contestant, of params, adapters and input."""
    if name.startswith("adapt "):
        return lora_jax.adapt(model, plan)
    if name == "merge every step":
        return lambda params, adapters, x: model(
            lora_jax.merge_adapters(params, adapters, plan), x
        )
    linears: dict[str, Linear] = {
        "by hand LoRA": lora_jax.lora_linear,
        "by hand DoRA": lora_jax.dora_linear,
        "textbook LoRA": textbook_linear,
    }
    return functools.partial(loop_by_hand, linears[name], case)


def loop_by_hand(
    linear: Linear, case: Case, params: Params, adapters: Any, x: jax.Array
) -> jax.Array:
    """`_transformer.plain_loop` with `linear` in place of every product."""
    for i, layer in enumerate(params["layers"]):

        def dense(x, name, i=i, layer=layer):
            adapter = adapters[f"layers/{i}/{name}"]
            return linear(x, layer[name], adapter, float(case.rank))

        x = _transformer.block(x, layer, dense, case.heads)
    return _transformer.norm(x, params["norm"])


def textbook_linear(x: jax.Array, weight: jax.Array, adapter: Any, alpha: float):
    """LoRA as papers write it."""
    a, b = (adapter[factor].astype(x.dtype) for factor in ("A", "B"))
    return x @ weight + alpha / a.shape[-1] * (x @ a @ b)


def _name_of(path: str) -> tuple[int, str]:
    _, layer, name = path.split("/")  # "layers/0/query"
    return int(layer), name
