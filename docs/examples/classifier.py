"""A sentence classifier: the frozen encoder, adapters in it, and a linear head.

Frozen and trainable arrays are two pytrees. What is trained is
`{"adapters": {path: adapter}, "head": {"kernel": (width,), "bias": ()}}`.

Shapes: `batch` sentences; `width` features of a sentence; `in` and `out` of a kernel.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import minilm
import numpy as np
import optax
import reviews

import lora_jax

ADAPTED = ("query/kernel", "value/kernel")  # how the paths of adapted kernels end

Adapters = dict[str, lora_jax.Adapter]
Head = dict[str, jax.Array]
Trainable = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """The choices that a classifier is made of; hashable, so static under `jit`."""

    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    epochs: int = 2
    seed: int = 0


class Method(NamedTuple):
    """The functions of the library for one weight."""

    init: Callable[..., lora_jax.Adapter]
    linear: Callable[..., jax.Array]
    merge: Callable[..., jax.Array]


METHODS = {
    "lora": Method(
        init=lora_jax.init_lora_adapter,
        linear=lora_jax.lora_linear,
        merge=lora_jax.merge_lora_weight,
    ),
    "dora": Method(
        init=lora_jax.init_dora_adapter,
        linear=lora_jax.dora_linear,
        merge=lora_jax.merge_dora_weight,
    ),
}


class Frozen(NamedTuple):
    """What is never trained.

    Attributes:
        params: the encoder, as `minilm.load` returns it.
        cache: by path, what `linear` would otherwise form again at every step from the
            frozen weight alone: nothing for LoRA; for DoRA `weight_norm_squared`,
            `(out,)`, the squared norm of each column.
    """

    params: minilm.Params
    cache: dict[str, dict[str, jax.Array]]


def by_path(tree: Any) -> dict[str, jax.Array]:
    """Returns the leaves of a tree by paths such as `encoder/layer_0/mlp/up/bias`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def targets(params: minilm.Params) -> dict[str, jax.Array]:
    """Returns the kernels that get an adapter, by path."""
    return {path: x for path, x in by_path(params).items() if path.endswith(ADAPTED)}


def freeze(params: minilm.Params, job: Job) -> Frozen:
    """Puts beside the parameters what the method can form of them beforehand."""
    if job.method != "dora":
        return Frozen(params, {path: {} for path in targets(params)})
    cache = {
        path: {"weight_norm_squared": lora_jax.dora_column_norm(kernel) ** 2}
        for path, kernel in targets(params).items()
    }
    return Frozen(params, cache)


def init_trainable(key: jax.Array, params: minilm.Params, job: Job) -> Trainable:
    """Returns adapters that change nothing yet, and a head of zeros."""
    kernels = targets(params)
    keys = jax.random.split(key, len(kernels))
    adapters = {
        path: METHODS[job.method].init(key, kernel, job.rank, init="kaiming_uniform")
        for key, (path, kernel) in zip(keys, kernels.items(), strict=True)
    }
    width = params["embeddings"]["word"].shape[1]
    head = {"kernel": jnp.zeros(width), "bias": jnp.zeros(())}
    return {"adapters": adapters, "head": head}


@functools.partial(jax.jit, static_argnames="job")
def encode(frozen: Frozen, adapters: Adapters, batch: reviews.Batch, job: Job) -> jax.Array:
    """Returns the features of each sentence: `(batch, width)`, float32.

    Args:
        frozen: what `freeze` returns.
        adapters: by path of the kernel; a kernel without one is used as it is.
        batch: the sentences.
        job: its method and alpha are used.
    """

    def dense(x: jax.Array, layer: minilm.Params, path: str) -> jax.Array:
        path = f"{path}/kernel"
        if path not in adapters:
            return minilm.plain_dense(x, layer, path)
        linear = functools.partial(METHODS[job.method].linear, **frozen.cache[path])
        return linear(x, layer["kernel"], adapters[path], job.alpha, bias=layer["bias"])

    hidden = minilm.encode(frozen.params, batch.tokens, batch.mask, dense=dense)
    return minilm.mean_pool(hidden, batch.mask)


def apply_head(head: Head, features: jax.Array) -> jax.Array:
    """Returns `(batch,)`, the logits of a favorable sentence."""
    return features @ head["kernel"] + head["bias"]


def loss_and_accuracy(
    trainable: Trainable, frozen: Frozen, batch: reviews.Batch, job: Job
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean cross-entropy of a batch, and the share that is right."""
    features = encode(frozen, trainable["adapters"], batch, job)
    logits = apply_head(trainable["head"], features)
    losses = optax.sigmoid_binary_cross_entropy(logits, batch.labels)
    right = ((logits > 0) == (batch.labels > 0)).astype(losses.dtype)
    weights = batch.weights / jnp.sum(batch.weights)
    return jnp.sum(losses * weights), jnp.sum(right * weights)


def make_step(optimizer: optax.GradientTransformation, job: Job) -> Callable[..., Any]:
    """Returns a compiled training step.

    The trainable and the optimizer state are donated: their memory holds the new ones.
    The frozen arrays are an argument; closed over, they would become constants of the
    program.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        trainable: Trainable,
        state: optax.OptState,
        frozen: Frozen,
        batch: reviews.Batch,
    ) -> tuple[optax.Params, optax.OptState, jax.Array, jax.Array]:
        value_and_grad = jax.value_and_grad(loss_and_accuracy, has_aux=True)
        (loss, accuracy), grads = value_and_grad(trainable, frozen, batch, job)
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss, accuracy

    return step


def merge(params: minilm.Params, adapters: Adapters, job: Job) -> minilm.Params:
    """Returns new parameters, with the adapters folded into their kernels."""

    def merged(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        adapter = adapters.get(_name(path))
        if adapter is None:
            return leaf
        return METHODS[job.method].merge(leaf, adapter, job.alpha)

    return jax.tree_util.tree_map_with_path(merged, params)


def fingerprint(params: minilm.Params) -> str:
    """Returns a hash of every path and every bit of the parameters."""
    digest = hashlib.sha256()
    for path, leaf in by_path(params).items():
        digest.update(path.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


def save(folder: pathlib.Path, trainable: Trainable, job: Job) -> None:
    """Writes `adapter.safetensors`, and `config.json` with what it takes to use it."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {path: np.asarray(leaf) for path, leaf in by_path(trainable).items()}
    safetensors_numpy = minilm.optional_import("safetensors.numpy")
    safetensors_numpy.save_file(arrays, folder / "adapter.safetensors")
    config = dataclasses.asdict(job) | {"base": minilm.MODEL._asdict()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
