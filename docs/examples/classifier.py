"""A sentence classifier: the frozen encoder, its adapters, and a linear head.

Frozen and trainable arrays are two pytrees. The trainable pytree is
`{"adapters": {path: adapter}, "head": {"kernel": (width,), "bias": ()}}`.

Shapes: `batch` sentences; `width` features of a sentence.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import minilm
import numpy as np
import optax
import reviews

import lora_jax

METHODS = ("lora", "dora")
Base = Literal["full", "nf4", "int8", "fp8"]
BASES: tuple[Base, ...] = get_args(Base)
Adapters = dict[str, lora_jax.Adapter]
Head = dict[str, jax.Array]
Trainable = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """The choices that a classifier is made of."""

    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    epochs: int = 2
    seed: int = 0
    base: Base = "full"


def quantize_base(params: minilm.Params, base: Base) -> minilm.Params:
    """Quantizes all kernels of the encoder; the rest is not changed.

    Args:
        params: what `minilm.load` returns.
        base: one of `BASES`; `"full"` leaves the kernels too.
    """
    if base == "full":
        return params
    return lora_jax.quantize_params(params, "encoder/*/kernel", base)


def megabytes(params: minilm.Params) -> float:
    """Returns what the parameters take, as they are stored, in 10^6 bytes."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6


@jax.jit
def encode(params: minilm.Params, batch: reviews.Batch) -> jax.Array:
    """Returns the features of each sentence: `(batch, width)`, float32."""
    hidden = minilm.encode(params, batch.tokens, batch.mask)
    return minilm.mean_pool(hidden, batch.mask)


@jax.jit
def encode_stored(params: minilm.Params, batch: reviews.Batch) -> jax.Array:
    """Returns the features of `encode`; kernels may be quantized."""
    return lora_jax.accept_quantized(encode)(params, batch)


@jax.jit
def encode_adapted(
    params: minilm.Params,
    adapters: Adapters,
    plan: lora_jax.AdapterPlan,
    batch: reviews.Batch,
) -> jax.Array:
    """Returns the features of `encode` with adapters; kernels may be quantized."""
    return lora_jax.adapt(encode, plan)(params, adapters, batch)


def make_plan(
    params: minilm.Params, batch: reviews.Batch, job: Job
) -> lora_jax.AdapterPlan:
    """Plans adapters of the query and value kernels; only the batch's shapes are used."""
    config = lora_jax.LoraConfig(
        rank=job.rank,
        alpha=job.alpha,
        targets=("*/query/kernel", "*/value/kernel"),
        use_dora=job.method == "dora",
    )
    return lora_jax.plan_adapters(config, params, encode, batch)


def init_trainable(
    key: jax.Array, params: minilm.Params, plan: lora_jax.AdapterPlan
) -> Trainable:
    """Returns adapters that change nothing yet, and a head of zeros."""
    width = params["embeddings"]["word"].shape[1]
    return {
        "adapters": lora_jax.init_adapters(key, params, plan),
        "head": {"kernel": jnp.zeros(width), "bias": jnp.zeros(())},
    }


def apply_head(head: Head, features: jax.Array) -> jax.Array:
    """Returns `(batch,)`, the logits of a favorable sentence."""
    return features @ head["kernel"] + head["bias"]


def loss_and_accuracy(
    trainable: Trainable,
    params: minilm.Params,
    plan: lora_jax.AdapterPlan,
    batch: reviews.Batch,
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean cross-entropy and the accuracy of a batch."""
    features = encode_adapted(params, trainable["adapters"], plan, batch)
    logits = apply_head(trainable["head"], features)
    losses = optax.sigmoid_binary_cross_entropy(logits, batch.labels)
    right = ((logits > 0) == (batch.labels > 0)).astype(losses.dtype)
    weights = batch.weights / jnp.sum(batch.weights)
    return jnp.sum(losses * weights), jnp.sum(right * weights)


def make_step(
    optimizer: optax.GradientTransformation, plan: lora_jax.AdapterPlan
) -> Callable[..., Any]:
    """Returns a compiled training step.

    The trainable and the optimizer state are donated: their memory holds the new ones.
    The frozen params are an argument; closed over, they would become constants of the
    program.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        trainable: Trainable,
        state: optax.OptState,
        params: minilm.Params,
        batch: reviews.Batch,
    ) -> tuple[optax.Params, optax.OptState, jax.Array, jax.Array]:
        value_and_grad = jax.value_and_grad(loss_and_accuracy, has_aux=True)
        (loss, accuracy), grads = value_and_grad(trainable, params, plan, batch)
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss, accuracy

    return step


def by_path(tree: Any) -> dict[str, np.ndarray]:
    """Returns the leaves of a tree by paths such as `encoder/layer_0/mlp/up/bias`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def fingerprint(params: minilm.Params) -> str:
    """Returns a hash of every path and every bit of the parameters, as they are stored."""
    digest = hashlib.sha256()
    for path, leaf in by_path(params).items():
        digest.update(path.encode() + leaf.tobytes())
    return digest.hexdigest()


def save(
    folder: pathlib.Path, trainable: Trainable, plan: lora_jax.AdapterPlan, job: Job
) -> None:
    """Writes what was trained, and what it takes to use it.

    `adapter.safetensors` has the arrays by path, `plan.json` is for
    `AdapterPlan.from_json`, and `config.json` has the job, and the base model with the
    format that it was stored in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    safetensors_numpy = minilm.optional_import("safetensors.numpy")
    safetensors_numpy.save_file(by_path(trainable), folder / "adapter.safetensors")
    (folder / "plan.json").write_text(plan.to_json() + "\n")
    base = minilm.MODEL._asdict() | {"format": job.base}
    config = dataclasses.asdict(job) | {"base": base}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
