"""Params with a weight of each kind of layout."""

import jax.numpy as jnp
import numpy as np

import lora_jax
from tests import reference
from tests.support import asarray, straight

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


def make(method="lora", dtype="float32", seed=0, names=None, factors=None, **fields):
    """Params, trained adapters and their plan, with a weight of each kind of layout."""
    rng = np.random.default_rng(seed)
    names = names or (tuple(SHAPES) if method == "lora" else ("w", "turned", "mixed"))
    fields |= {"use_dora": method == "dora", "dtype": factors}
    params, plan = make_params(rng, names, dtype, **fields)
    adapters = {}
    for path, target in plan.targets.items():
        adapters[path] = {
            name: asarray(rng.normal(6.0 * (name == "m"), 1.0, shape), "float32")
            for name, shape in target.adapter_shapes.items()
        }
    return params, adapters, plan


def merged_reference(weight, adapter, target):
    formula = getattr(reference, f"{target.method}_weight")
    return formula(straight(weight, target), reference.f64(adapter), target.scale)


def weights(params):
    return {f"block/{name}": value for name, value in params["block"].items()}


def weights_only(params):
    return {"block": params["block"], "bias": params["bias"]}
