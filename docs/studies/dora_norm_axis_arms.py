"""The arms of the study of DoRA's norm axis: adapters, and one encoder for all of them.

`"dora_out"` has a norm and a magnitude for each output, `"dora_in"` for each input, and
`"lora"` has neither, and spends the parameters on its rank.
"""

import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import lora_jax

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

import minilm
import reviews
import sentiment

Arm = Literal["dora_out", "dora_in", "lora"]
Adapters = dict[str, lora_jax.Adapter]
Plans = dict[Arm, lora_jax.AdapterPlan]
ARMS: tuple[Arm, ...] = ("dora_out", "dora_in", "lora")
RANK = 8
SCALE = 2.0  # alpha / rank, in all arms and at each rank
OPTIMIZER = optax.adamw(1.0)  # `step` multiplies its updates by the learning rate


def make_plan(
    params: minilm.Params, batch: reviews.Batch, arm: Arm
) -> lora_jax.AdapterPlan:
    """Plans an arm's adapters.

    LoRA has a rank more on the value kernels: for each such kernel `in + out` parameters,
    and for each pair of a query and a value kernel what the two magnitudes of DoRA have.
    """
    is_lora = arm == "lora"
    config = lora_jax.LoraConfig(
        rank=RANK,
        alpha=SCALE * RANK,
        targets=("*/query/kernel", "*/value/kernel"),
        train="head/*",
        rank_pattern={"*/value/kernel": RANK + 1} if is_lora else {},
        alpha_pattern={"*/value/kernel": SCALE * (RANK + 1)} if is_lora else {},
        use_dora=not is_lora,
    )
    return lora_jax.plan_adapters(config, params, sentiment.model, batch)


def make_plans(params: minilm.Params, batch: reviews.Batch) -> Plans:
    """Plans the adapters of every arm."""
    return {arm: make_plan(params, batch, arm) for arm in ARMS}


def init_adapters(
    key: jax.Array, params: minilm.Params, plan: lora_jax.AdapterPlan, arm: Arm
) -> Adapters:
    """Returns adapters that change nothing yet, and a copy of the head.

    One key makes the same `A` in both arms of DoRA, and in LoRA where the rank is theirs.
    """
    adapters = lora_jax.init_adapters(key, params, plan)
    if arm == "dora_in":
        for path in plan.targets:
            kernel = params
            for name in path.split("/"):
                kernel = kernel[name]
            norm = lora_jax.dora_column_norm(jnp.asarray(kernel), norm_axis="in")
            adapters[path]["m"] = norm
    return adapters


def count_parameters(params: minilm.Params, plans: Plans) -> int:
    """Returns how many parameters the adapters have, without the head: as many in each arm.

    Raises:
        RuntimeError: if it is not.
    """
    counts = {}
    for arm, plan in plans.items():
        adapters = init_adapters(jax.random.key(0), params, plan, arm)
        own = [adapters[path] for path in plan.targets]
        counts[arm] = sum(leaf.size for leaf in jax.tree.leaves(own))
    if len(set(counts.values())) > 1:
        raise RuntimeError(f"expected as many parameters in each arm, got {counts}.")
    return counts["lora"]


def place(params: minilm.Params, adapters: Adapters) -> minilm.Params:
    """Returns the params with each adapter beside its kernel, as `"adapter"`."""
    layers = {}
    for name, layer in params["encoder"].items():
        attention = dict(layer["attention"])
        for part in ("query", "value"):
            adapter = adapters[f"encoder/{name}/attention/{part}/kernel"]
            attention[part] = attention[part] | {"adapter": adapter}
        layers[name] = layer | {"attention": attention}
    return params | {"encoder": layers}


def apply_dense(x: jax.Array, layer: minilm.Params, *, arm: Arm) -> jax.Array:
    """Applies a layer, with the adapter beside its kernel if there is one."""
    if "adapter" not in layer:
        return minilm.apply_dense(x, layer)
    kernel, bias, adapter = layer["kernel"], layer["bias"], layer["adapter"]
    alpha = SCALE * adapter["A"].shape[-1]
    if arm == "lora":
        return lora_jax.lora_linear(x, kernel, adapter, alpha, bias=bias)
    axis = "in" if arm == "dora_in" else "out"
    return lora_jax.dora_linear(
        x, kernel, adapter, alpha, bias=bias, detach_norm=True, norm_axis=axis
    )


@functools.partial(jax.jit, static_argnames="arm")
def encode(
    params: minilm.Params, adapters: Adapters, batch: reviews.Batch, *, arm: Arm
) -> jax.Array:
    """Returns the features of each sentence, with adapters: `(batch, width)`, float32."""
    dense = functools.partial(apply_dense, arm=arm)
    placed = place(params, adapters)
    hidden = minilm.encode(placed, batch.tokens, batch.mask, dense=dense)
    return minilm.mean_pool(hidden, batch.mask)


@functools.partial(jax.jit, static_argnames="arm")
def model(
    params: minilm.Params, adapters: Adapters, batch: reviews.Batch, *, arm: Arm
) -> jax.Array:
    """Returns the logit of each sentence, with adapters and the trained head."""
    kernel, bias = (adapters[f"head/{name}"]["value"] for name in ("kernel", "bias"))
    return encode(params, adapters, batch, arm=arm) @ kernel + bias


@functools.partial(jax.jit, static_argnames="arm", donate_argnums=(0, 1))
def step(
    adapters: Adapters,
    state: optax.OptState,
    params: minilm.Params,
    batch: reviews.Batch,
    rate: jax.Array,
    *,
    arm: Arm,
) -> tuple[Adapters, optax.OptState]:
    """Takes a step of AdamW with this learning rate, in adapters and head."""

    def loss(adapters: Adapters) -> jax.Array:
        logits = model(params, adapters, batch, arm=arm)
        losses = optax.sigmoid_binary_cross_entropy(logits, batch.labels)
        return jnp.sum(losses * batch.weights) / jnp.sum(batch.weights)

    updates, state = OPTIMIZER.update(jax.grad(loss)(adapters), state, adapters)
    updates = jax.tree.map(lambda update: rate * update, updates)
    return jax.tree.map(jnp.add, adapters, updates), state


def disagreement(
    params: minilm.Params, batch: reviews.Batch, plan: lora_jax.AdapterPlan, arm: Arm
) -> float:
    """Compares the encoder of this study with `lora_jax.adapt`, at adapters that do much.

    Returns:
        The largest difference of the features, and of the gradients of the sum of their
        squares, as a part of the largest entry of the array.
    """
    plan = plan.subset("encoder/*")  # the features do not depend on the head
    fresh = init_adapters(jax.random.key(0), params, plan, arm)
    leaves, structure = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + 0.05 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]

    def evaluate(encode_with: Callable[[Any], jax.Array]) -> Any:
        def energy(adapters: Adapters) -> tuple[jax.Array, jax.Array]:
            features = encode_with(adapters)
            return jnp.sum(features**2), features

        return jax.grad(energy, has_aux=True)(jax.tree.unflatten(structure, moved))

    own = evaluate(lambda adapters: encode(params, adapters, batch, arm=arm))
    adapt = jax.jit(lora_jax.adapt(sentiment.features, plan))
    adapted = evaluate(lambda adapters: adapt(params, adapters, batch))
    pairs = zip(jax.tree.leaves(own), jax.tree.leaves(adapted), strict=True)
    parts = [jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)) for x, y in pairs]
    return float(jnp.max(jnp.stack(parts)))  # a NaN comes out as one
