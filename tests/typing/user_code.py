"""What a user's type checker infers. tests/typing/test_typing.py runs pyright on it."""
# pyright: reportUnnecessaryTypeIgnoreComment=error

from typing import Any, NamedTuple, assert_type

import equinox as eqx
import jax
import optax
from flax import nnx

import lora_jax
from lora_jax import peft

Params = dict[str, jax.Array]


class Pair(NamedTuple):
    up: jax.Array
    down: jax.Array


class Model(eqx.Module):
    layer: eqx.nn.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x)


def apply(params: Params, x: jax.Array, *, train: bool = False) -> jax.Array:
    return x @ params["up"] if train else x


def plain_dict(params: Params, x: jax.Array, key: jax.Array) -> None:
    config = lora_jax.LoraConfig(rank=4, alpha=8.0)
    plan = lora_jax.plan_adapters(config, params, apply, x, train=True)
    adapters = lora_jax.init_adapters(key, params, plan)
    adapted = lora_jax.adapt(apply, plan)
    assert_type(adapted(params, adapters, x, train=True), jax.Array)
    adapted(params, adapters, "x")  # pyright: ignore[reportArgumentType]
    adapted(params, adapters, x, training=True)  # pyright: ignore[reportCallIssue]
    adapted(adapters, params, x)  # pyright: ignore[reportArgumentType]
    twice = lora_jax.adapt(adapted, plan)
    assert_type(twice(params, adapters, adapters, x), jax.Array)
    quantized = lora_jax.quantize_params(params, plan, "int8")
    assert_type(quantized, Params)
    frozen = lora_jax.accept_quantized(apply)
    assert_type(frozen(quantized, x, train=False), jax.Array)
    frozen(quantized)  # pyright: ignore[reportCallIssue]
    merged = lora_jax.merge_adapters(params, adapters, plan)
    assert_type(merged, Params)
    assert_type(lora_jax.unmerge_adapters(merged, adapters, plan), Params)
    assert_type(peft.replace_leaves(params, {"up": x}), Params)
    made = lora_jax.decompose_params(params, plan, "pissa")
    assert_type(made.params, Params)
    assert_type(made, lora_jax.Decomposed[Params])
    lora_jax.save_adapters("directory", made.adapters, plan)


def adapters_of_optax(params: Params, x: jax.Array, plan: lora_jax.AdapterPlan) -> None:
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    optimizer = optax.adam(1e-3)
    updates, _ = optimizer.update(adapters, optimizer.init(adapters))
    trained = optax.apply_updates(adapters, updates)
    lora_jax.adapt(apply, plan)(params, trained, x)
    assert_type(lora_jax.merge_adapters(params, trained, plan), Params)
    lora_jax.save_adapters("directory", trained, plan)
    peft.save("directory", trained, plan)


def equinox_module(model: Model, x: jax.Array, plan: lora_jax.AdapterPlan) -> None:
    def call(model: Model, x: jax.Array) -> jax.Array:
        return model(x)

    lora_jax.plan_adapters(plan.config, model, call, x)
    adapters = lora_jax.init_adapters(jax.random.key(0), model, plan)
    assert_type(lora_jax.adapt(call, plan)(model, adapters, x), jax.Array)
    lora_jax.adapt(call, plan)(x, adapters, x)  # pyright: ignore[reportArgumentType]
    assert_type(lora_jax.merge_adapters(model, adapters, plan), Model)
    assert_type(lora_jax.quantize_params(model, "*/weight"), Model)
    lora_jax.count_parameters(model, plan)
    lora_jax.optim.trainable_and_frozen(model, "*/weight", optax.adam(1e-3))
    peft.load("directory", model, call, x)


def nnx_state(state: nnx.State, pair: Pair, plan: lora_jax.AdapterPlan) -> None:
    adapters = lora_jax.init_adapters(jax.random.key(0), state, plan)
    assert_type(lora_jax.merge_adapters(state, adapters, plan), nnx.State)
    assert_type(lora_jax.merge_adapters(pair, adapters, plan), Pair)
    assert_type(lora_jax.decompose_params(pair, plan, "olora").params, Pair)


def functions_of_other_types(plan: lora_jax.AdapterPlan, params: Params) -> None:
    def many(params: Params, *rows: int, **flags: bool) -> tuple[jax.Array, dict[str, Any]]:
        return params["up"], {"rows": rows, **flags}

    adapted = lora_jax.adapt(many, plan)
    assert_type(adapted(params, {}, 1, 2, ok=True), tuple[jax.Array, dict[str, Any]])
    lora_jax.adapt(jax.jit(many), plan)(params, {}, 1)
    lora_jax.adapt(many, "plan")  # pyright: ignore[reportArgumentType]


def one_weight(weight: jax.Array, x: jax.Array, key: jax.Array) -> None:
    made = lora_jax.init_pissa_adapter(weight, 4, quantize=lora_jax.quant.quantize_nf4)
    assert_type(made, lora_jax.DecomposedWeight)
    assert_type(lora_jax.lora_linear(x, made.weight, made.adapter), jax.Array)
    base, adapter = lora_jax.init_olora_adapter(weight, 4)
    lora_jax.merge_lora_weight(base, adapter)
    adapter = lora_jax.init_orthogonal_adapter(key, weight, 4)
    assert_type(adapter, lora_jax.Adapter)
    lora_jax.init_loftq_adapter(weight, 4)  # pyright: ignore[reportCallIssue]
