"""Params with a weight of each kind of layout."""

import jax.numpy as jnp

import lora_jax
from tests.support import asarray

AXES = {"w": "io", "q": "ioo", "o": "oi", "stack": "bio", "turned": "boi", "mixed": "oib"}
SHAPES = {
    "w": (12, 9),
    "q": (12, 2, 3),
    "o": (9, 12),
    "stack": (3, 12, 9),
    "turned": (3, 9, 12),
    "mixed": (9, 12, 3),
}


def make_params(rng, names, stored, **fields):
    """Params with some of these weights and leaves without adapters, and their plan."""
    params = {"block": {}, "bias": jnp.ones(9), "name": "run", "step": 3}
    for name in names:
        params["block"][name] = asarray(rng.normal(size=SHAPES[name]), stored)
    axes = {f"*/{name}": AXES[name] for name in names}
    config = lora_jax.LoraConfig(4, 3.0, "block/*", axes=axes, **fields)
    return params, lora_jax.plan_adapters(config, params)
