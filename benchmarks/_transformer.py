"""A pre-LN transformer in which every matrix has an adapter, plainly and by hand.

Each is written twice: as a Python loop over the layers, `params["layers"]` a list of
dicts, and as `jax.lax.scan` over one dict of stacked layers. Activations are
`(batch, length, width)`.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any

import _timing
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Params = Mapping[str, Any]
Dense = Callable[[jax.Array, str], jax.Array]
Linear = Callable[..., jax.Array]
"""`lora_linear`, `dora_linear`, or another of their signature."""

ALPHA = 16.0
KERNELS = ("query", "key", "value", "output", "up", "down")

SIZES = ("layers", "batch", "length", "width", "heads", "rank", "dtype")
"""Options of a benchmark that say which transformer it is."""


def add_sizes(parser: argparse.ArgumentParser, *, layers: int) -> None:
    """Adds the options `SIZES`."""
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")


def check_sizes(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program if they do not fit each other."""
    if options.width % options.heads:
        parser.error(f"--heads {options.heads} does not divide --width {options.width}")


def result_of(
    options: argparse.Namespace, tables: list[Any], *names: str
) -> dict[str, Any]:
    """The environment, the sizes, the rounds and the options `names`, and the tables."""
    given = (*SIZES, "rounds", *names)
    return {
        **_timing.environment(),
        **{name: getattr(options, name) for name in given},
        "tables": tables,
    }


def describe_sizes(result: Mapping[str, Any]) -> str:
    """A result's transformer, in words."""
    r = result
    return (
        f"{r['layers']} layers of width {r['width']}, {r['heads']} heads, x "
        f"{[r['batch'], r['length'], r['width']]}, rank {r['rank']}, {r['dtype']}"
    )


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Layer normalization without a bias."""
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centered * centered, axis=-1, keepdims=True)
    return centered * lax.rsqrt(variance + 1e-6) * scale[None, None, :]


def block(x: jax.Array, layer: Params, dense: Dense, heads: int) -> jax.Array:
    """A layer of the transformer; `dense(x, name)` multiplies by a matrix."""
    batch, length, width = x.shape
    hidden = norm(x, layer["attention_norm"])
    query, key, value = (
        dense(hidden, name).reshape(batch, length, heads, -1)
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / (width // heads) ** 0.5
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
    x = x + dense(mixed.reshape(x.shape), "output")
    hidden = norm(x, layer["mlp_norm"])
    return x + dense(jax.nn.gelu(dense(hidden, "up")), "down")


def plain(layer: Params) -> Dense:
    """The products of the frozen model."""
    return lambda x, name: x @ layer[name]


def plain_loop(params: Params, x: jax.Array, *, heads: int) -> jax.Array:
    """The model, layer by layer."""
    for layer in params["layers"]:
        x = block(x, layer, plain(layer), heads)
    return norm(x, params["norm"])


def plain_scan(params: Params, x: jax.Array, *, heads: int) -> jax.Array:
    """The model with stacked layers."""

    def body(x, layer):
        return block(x, layer, plain(layer), heads), None

    return norm(lax.scan(body, x, params["layers"])[0], params["norm"])


def adapted(linear: Linear, layer: Params, adapters: Any) -> Dense:
    """The products of the adapted model, by a function of the library for one weight."""
    return lambda x, name: linear(x, layer[name], adapters[name], ALPHA)


def loop_by_hand(
    linear: Linear, params: Params, adapters: Any, x: jax.Array, *, heads: int
) -> jax.Array:
    """`plain_loop` with adapters."""
    for i, layer in enumerate(params["layers"]):
        own = {name: adapters[f"layers/{i}/{name}"] for name in KERNELS}
        x = block(x, layer, adapted(linear, layer, own), heads)
    return norm(x, params["norm"])


def scan_by_hand(
    linear: Linear, params: Params, adapters: Any, x: jax.Array, *, heads: int
) -> jax.Array:
    """`plain_scan` with adapters."""

    def body(x, layer_and_adapters):
        layer, own = layer_and_adapters
        return block(x, layer, adapted(linear, layer, own), heads), None

    stacked = {name: adapters[f"layers/{name}"] for name in KERNELS}
    x, _ = lax.scan(body, x, (params["layers"], stacked))
    return norm(x, params["norm"])


def make_params(layers: int, width: int, dtype: str, *, stacked: bool) -> Params:
    """Weights of the model; `layers` is a list of dicts, or one dict of stacks."""
    hidden = 4 * width
    shapes = dict.fromkeys(("query", "key", "value", "output"), (width, width))
    shapes |= {"up": (width, hidden), "down": (hidden, width)}
    normal = np.random.default_rng(0).standard_normal
    ones = jnp.ones(width, dtype)

    def layer():
        kernels = {
            name: jnp.asarray(normal(shape) / math.sqrt(shape[0]), dtype)
            for name, shape in shapes.items()
        }
        return kernels | {"attention_norm": ones, "mlp_norm": ones}

    all_layers = [layer() for _ in range(layers)]
    if stacked:
        all_layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *all_layers)
    return {"layers": all_layers, "norm": ones}
