"""What the contestants of `bench_field.py` that run on JAX share: arrays and training."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import _timing
import jax
import jax.numpy as jnp
import optax
import safetensors.flax
from _field_case import LEARNING_RATE, Case, Contestant, factor_name

import lora_jax

Model = Callable[[Any, jax.Array], jax.Array]
"""Of params and the input."""


@functools.cache
def load(file: str) -> Mapping[str, jax.Array]:
    """The arrays of a case, loaded once for all contestants of a process."""
    return safetensors.flax.load_file(file)


def data(case: Case) -> tuple[jax.Array, jax.Array]:
    """Input and target."""
    arrays = load(case.file)
    return arrays["x"], arrays["target"]


def device() -> dict[str, Any]:
    """What JAX runs on."""
    environment = _timing.environment()
    return {name: environment[name] for name in ("device", "platform", "threads")}


def make_optimizer() -> optax.GradientTransformation:
    """Adam, for every contestant."""
    return optax.adam(LEARNING_RATE)


def squared_error(output: jax.Array, target: jax.Array) -> jax.Array:
    """The loss, in float32."""
    error = (output - target).astype("float32")
    return jnp.mean(error * error)


def frozen(model: Model, params: Any, case: Case) -> Contestant:
    """A step that trains nothing: the loss and its gradient with respect to the input."""

    def loss(x, params, target):
        return squared_error(model(params, x), target)

    x, target = data(case)
    program = jax.jit(jax.value_and_grad(loss)).lower(x, params, target).compile()

    def step():
        return float(jax.block_until_ready(program(x, params, target))[0])

    return Contestant(step, lambda: {"trained": 0, "state_bytes": 0, **costs(program)})


def trained(
    model: Callable[[Any, Any, jax.Array], jax.Array],
    constant: Any,
    trainable: Any,
    case: Case,
) -> Contestant:
    """A step of training, jitted, with what it trains and the optimizer's state donated.

    Args:
        model: of `trainable`, `constant` and the input.
        constant: what is not trained.
        trainable: a tree of arrays that nobody else holds.
        case: the input, the target and the sizes.
    """
    optimizer = make_optimizer()

    def loss(trainable, constant, x, target):
        return squared_error(model(trainable, constant, x), target)

    def update(trainable, state, constant, x, target):
        value, gradient = jax.value_and_grad(loss)(trainable, constant, x, target)
        updates, state = optimizer.update(gradient, state, trainable)
        return value, optax.apply_updates(trainable, updates), state

    held = trainable, optimizer.init(trainable)
    rest = constant, *data(case)
    program = jax.jit(update, donate_argnums=(0, 1)).lower(*held, *rest).compile()
    counts = {
        "trained": sum(leaf.size for leaf in jax.tree.leaves(held[0])),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(held[1])),
    }

    def step():
        nonlocal held
        value, *held = jax.block_until_ready(program(*held, *rest))
        return float(value)

    return Contestant(step, lambda: {**counts, **costs(program)})


def costs(program: Any) -> dict[str, float]:
    """What the compiler says of a program."""
    memory = program.memory_analysis()
    return {
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "flops": _timing.flops(program),
    }


def adapt(
    model: Model,
    params: Any,
    case: Case,
    name_of: Callable[[str], tuple[int, str]],
    *,
    targets: str = "all-linear",
    use_dora: bool = False,
) -> tuple[lora_jax.AdapterPlan, Any]:
    """Plan and initial adapters of this library for a model of any kind.

    Args:
        model: of params and the input.
        params: its weights.
        case: the rank, and the file with the first values of `A`.
        name_of: makes of a path of the params the number of the layer and the name in it.
        targets: patterns of the paths to adapt.
        use_dora: whether the method is DoRA.
    """
    config = lora_jax.LoraConfig(
        case.rank, float(case.rank), targets=targets, use_dora=use_dora
    )
    plan = lora_jax.plan_adapters(config, params, model, data(case)[0])
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    for path, adapter in adapters.items():
        adapter["A"] = jnp.array(load(case.file)[factor_name(*name_of(path))])
    return plan, adapters
