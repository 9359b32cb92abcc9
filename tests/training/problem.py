"""A small real problem: handwritten digits, a transformer, and the steps of its training.

The transformer is pretrained on upright digits and fine-tuned on digits that lie on their
side, of which it knows next to nothing.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from tests.support import asarray

DIGITS = pathlib.Path(__file__).parents[1] / "golden" / "digits" / "digits.npz"
HEADS = 4


class Batch(NamedTuple):
    """Images `(number, rows, pixels of a row)`, from 0 to 1, and what they show."""

    images: Any
    labels: Any


def load_digits(*, turned=False):
    """600 digits to learn from, 300 to be tested with, upright or turned by 90 degrees."""
    with np.load(DIGITS) as file:
        images, labels = (
            file["images"].astype("float32") / 16,
            file["labels"].astype("int32"),
        )
    images = np.ascontiguousarray(np.rot90(images, axes=(1, 2))) if turned else images
    return [Batch(*map(jnp.asarray, (images[s], labels[s]))) for s in np.s_[:600, 600:]]


def make_params(seed=0, *, layers=2, width=32, hidden=64, dtype="float32"):
    """The params, with the weights of all layers stacked. `width` is a multiple of 4."""
    normal = np.random.default_rng(seed).normal

    def matrix(*shape):
        return asarray(normal(size=shape) / np.sqrt(shape[-2]), dtype)

    stack = {
        "norm_1": jnp.ones((layers, width), dtype),
        "qkv": matrix(layers, width, 3 * width),
        "out": matrix(layers, width, width),
        "norm_2": jnp.ones((layers, width), dtype),
        "up": matrix(layers, width, hidden),
        "bias": jnp.zeros((layers, hidden), dtype),
        "down": matrix(layers, hidden, width),
    }
    return {
        "embed": matrix(8, width),
        "position": matrix(8, width),
        "layers": stack,
        "norm": jnp.ones(width, dtype),
        "head": {"kernel": matrix(width, 10), "bias": jnp.zeros(10, dtype)},
    }


def unstack(params):
    """The same params with a list of layers."""
    stack = params["layers"]

    def layer(i):
        return jax.tree.map(lambda v: v[i], stack)

    return params | {"layers": [layer(i) for i in range(len(stack["qkv"]))]}


def like(value, x):
    """A vector, or an array without the axes that lead, with all the axes of `x`."""
    return jnp.broadcast_to(value, x.shape)


def normalize(x, scale):
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    return x * like(scale, x)


def attend(x, layer):
    *rows, width = x.shape
    qkv = (x @ layer["qkv"]).reshape(*rows, 3, HEADS, width // HEADS)
    query, key, value = jnp.moveaxis(qkv, 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / (width // HEADS) ** 0.5
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
    return mixed.reshape(x.shape) @ layer["out"]


def block(x, layer):
    """One pre-LN layer, of `x` `(batch, rows, width)`."""
    x = x + attend(normalize(x, layer["norm_1"]), layer)
    hidden = normalize(x, layer["norm_2"]) @ layer["up"]
    return x + jax.nn.gelu(hidden + like(layer["bias"], hidden)) @ layer["down"]


def apply(params, images, block=block):
    """Logits. Layers that are stacked are scanned over, those of a list come in turn."""
    x = images.astype(params["embed"].dtype) @ params["embed"]
    x = x + like(params["position"], x)
    if isinstance(params["layers"], dict):
        x, _ = jax.lax.scan(lambda x, layer: (block(x, layer), None), x, params["layers"])
    else:
        for layer in params["layers"]:
            x = block(x, layer)
    x = normalize(x, params["norm"]).mean(axis=-2)
    logits = x @ params["head"]["kernel"]
    logits = logits + like(params["head"]["bias"], logits)
    return logits if logits.dtype == "float64" else logits.astype("float32")


def checkpointed(params, images):
    """The model whose layers are run again for their gradients."""
    return apply(params, images, block=jax.checkpoint(block))


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def full_loss(params, batch):
    """Of full fine-tuning."""
    return cross_entropy(apply(params, batch.images), batch.labels)


def adapted_loss(plan, fn=apply):
    """`loss(adapters, params, batch, key=None)`; the key is that of dropout."""

    def loss(adapters, params, batch, key=None):
        adapted = lora_jax.adapt(fn, plan, dropout_key=key)
        return cross_entropy(adapted(params, adapters, batch.images), batch.labels)

    return loss


def merged_loss(plan, fn=apply):
    """The same with merged weights in every step, which `adapt` is there to avoid."""

    def loss(adapters, params, batch, key=None):
        del key
        merged = lora_jax.merge_adapters(params, adapters, plan)
        return cross_entropy(fn(merged, batch.images), batch.labels)

    return loss


def accumulated(loss):
    """Value and gradient of a loss of adapters, one microbatch after the other."""

    def total(adapters, params, microbatches):
        def add(sums, batch):
            found = jax.value_and_grad(loss)(adapters, params, batch)
            return jax.tree.map(jnp.add, sums, found), None

        first = jax.tree.map(lambda v: v[0], microbatches)
        shapes = jax.eval_shape(jax.value_and_grad(loss), adapters, params, first)
        zeros = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
        sums, _ = jax.lax.scan(add, zeros, microbatches)
        return jax.tree.map(lambda v: v / len(microbatches.labels), sums)

    return total


def make_step(loss, optimizer):
    """`step(trained, state, *rest) -> trained, state, loss`; the first two are donated."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained, state, *rest):
        value, gradients = jax.value_and_grad(loss)(trained, *rest)
        return *update(optimizer, trained, state, gradients), value

    return step


def update(optimizer, trained, state, gradients):
    with jax.numpy_dtype_promotion("standard"):  # optax.adam promotes
        updates, state = optimizer.update(gradients, state, trained)
    return optax.apply_updates(trained, updates), state


def batches(data, count, size=40, seed=0):
    """Random batches, drawn anew each time."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        rows = rng.choice(len(data.labels), size, replace=False)
        yield Batch(data.images[rows], data.labels[rows])


def train(step, trained, state, data, *rest):
    """What training comes to, and the loss of each batch. Takes `trained` and `state`."""
    losses = []
    for batch in data:
        trained, state, value = step(trained, state, *rest, batch)
        losses.append(value)
    return trained, np.array(losses)


full_optimizer = optax.adam(4e-3)
full_step = make_step(full_loss, full_optimizer)  # one program for all that need it


@functools.cache
def pretrained():
    """Params that know upright digits: trained once for all tests."""
    params, data = make_params(), batches(load_digits()[0], 150)
    return train(full_step, params, full_optimizer.init(params), data)[0]


@functools.partial(jax.jit, static_argnums=0)
def _accuracy(fn, params, data):
    return jnp.mean(jnp.argmax(fn(params, data.images), -1) == data.labels)


def accuracy(params, data):
    """The fraction of images that the model names rightly."""
    return float(_accuracy(apply, params, data))
