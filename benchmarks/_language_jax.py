"""Contestants of `bench_language_model.py` in this library, and its decoding."""

import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from _field_case import Contestant
from _language_case import LEARNING_RATE, NAMES, Kind, LanguageCase

import lora_jax

sys.path.append(str(pathlib.Path(__file__).parents[1] / "docs" / "examples"))
import smollm_model  # pyright: ignore[reportMissingImports]

MIB = 2**20


def config_of(case: LanguageCase) -> Any:
    """The config of the model."""
    return smollm_model.Config(case.heads, case.key_heads, case.rope_base, case.epsilon)


def make_loss(case: LanguageCase) -> Any:
    """The mean cross-entropy of the last two tokens, a function of params and a batch."""

    def loss(params: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        features, _ = smollm_model.apply(params, tokens, config_of(case))
        logits = features[:, -3:-1] @ params["embed"].T
        each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return each.mean()

    return loss


def make_plan(params: Any, case: LanguageCase, trains: str, *batch: Any) -> Any:
    """Plans adapters of the seven projections."""
    config = lora_jax.LoraConfig(
        rank=case.rank,
        alpha=2.0 * case.rank,
        targets=tuple(f"layers/{name}" for name in NAMES),
        use_dora=trains == "dora",
    )
    return lora_jax.plan_adapters(config, params, make_loss(case), *batch)


def make(kind: Kind, case: LanguageCase) -> Contestant:
    """Makes a contestant."""
    file = pathlib.Path(case.gguf)
    params, _, _ = smollm_model.load(file, "*" if kind.base == "dense" else "")
    arrays = safetensors.numpy.load_file(case.file)
    batch = [jnp.asarray(arrays[f"batch.{name}"]) for name in ("tokens", "targets")]
    loss = make_loss(case)
    if kind.trains == "nothing":
        return _frozen(lora_jax.accept_quantized(loss), params, batch)
    if kind.trains == "full":
        return _training(lambda own, _, *batch: loss(own, *batch), params, {}, batch)
    plan = make_plan(params, case, kind.trains, *batch)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    for path, adapter in adapters.items():
        name = path.removeprefix("layers/")
        adapter["A"] = jnp.asarray(arrays[f"A.{name}"])
    del arrays
    adapted = lora_jax.adapt(loss, plan)
    return _training(lambda own, p, *b: adapted(p, own, *b), adapters, params, batch)


def _frozen(loss: Any, params: Any, batch: list[jax.Array]) -> Contestant:
    compiled = jax.jit(loss).lower(params, *batch).compile()
    return Contestant(
        lambda: float(compiled(params, *batch)), lambda: _costs(compiled, {}, params)
    )


def _training(loss: Any, trained: Any, params: Any, batch: list[jax.Array]) -> Contestant:
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.0)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(trained: Any, state: Any, params: Any, *batch: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(loss)(trained, params, *batch)
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state = optimizer.init(trained)
    compiled = update.lower(trained, state, params, *batch).compile()
    kept = [trained, state]
    del trained, state

    def step() -> float:
        *kept[:], value = compiled(*kept, params, *batch)
        return float(value)

    return Contestant(step, lambda: _costs(compiled, kept[0], params))


def _costs(compiled: Any, trained: Any, params: Any) -> dict[str, float]:
    memory = compiled.memory_analysis()
    return {
        "trained": sum(x.size for x in jax.tree.leaves(trained)),
        "frozen_bytes": sum(x.nbytes for x in jax.tree.leaves(params)),
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
    }


def decoding(case: LanguageCase, most: int) -> dict[str, tuple[Any, float]]:
    """Programs that generate one token, and the MiB of their weights.

    Args:
        case: the model.
        most: how many tokens the cache is for. It is full but for one.
    """
    params, _, _ = smollm_model.load(pathlib.Path(case.gguf))
    dense, config = smollm_model.load(pathlib.Path(case.gguf), "*")[0], config_of(case)
    arrays = safetensors.numpy.load_file(case.file)
    batch = [arrays[f"batch.{name}"] for name in ("tokens", "targets")]
    plan = make_plan(params, case, "lora", *batch)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    normal = np.random.default_rng(0).standard_normal
    for adapter in adapters.values():  # else there is nothing to merge
        adapter["B"] = jnp.asarray(0.01 * normal(adapter["B"].shape), "float32")
    merged = lora_jax.merge_adapters(params, adapters, plan)

    def decode(params: Any, token: jax.Array, cache: Any, start: Any) -> Any:
        features, filled = smollm_model.apply(params, token, config, cache, start)
        logits = features[:, -1:] @ params["embed"].T
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), filled

    depth, n_out, _ = params["layers"]["key"].shape
    shape = depth, 1, most, case.key_heads, n_out // case.key_heads
    draws = (jnp.asarray(normal(shape), "float32") for _ in range(2))
    cache = dict(zip(("key", "value"), draws, strict=True))
    rest = jnp.ones((1, 1), "int32"), cache, most - 1
    plain, adapted = lora_jax.accept_quantized(decode), lora_jax.adapt(decode, plan)
    calls = {
        "frozen, q4": (plain, params),
        "frozen, dense": (plain, dense),
        "adapted, q4": (adapted, params, adapters),
        "adapted, dense": (adapted, dense, adapters),
        "merged": (plain, merged),
    }
    return {
        name: (
            functools.partial(jax.jit(f), *weights, *rest),
            sum(x.nbytes for x in jax.tree.leaves(weights)) / MIB,
        )
        for name, (f, *weights) in calls.items()
    }
