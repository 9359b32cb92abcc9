"""The contestant of `bench_field.py` that adapts the Flax linen model with qwix."""

from typing import Any

import _field_jax
import _field_linen
import flax.traverse_util  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp
import qwix  # pyright: ignore[reportMissingImports]
from _field_case import Case, Contestant, factor_name
from _field_jax import device as device


def make(name: str, case: Case) -> Contestant:
    """Makes the contestant: `qwix.apply_lora_to_model` on the model of `_field_linen`."""
    module, params = _field_linen.make_model(case)
    provider = qwix.LoraProvider(module_path=".*", rank=case.rank, alpha=float(case.rank))
    model: Any = qwix.apply_lora_to_model(module, provider)
    factors = make_factors(model, case)

    def adapted(factors, params, x):
        joined = flax.traverse_util.unflatten_dict(params | factors, sep="/")
        return model.apply({"params": joined}, x)

    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return _field_jax.trained(adapted, flat, factors, case)


def make_factors(model: Any, case: Case) -> dict[str, jax.Array]:
    """What qwix adds to the params, by path, with the first values of the case."""
    arrays = _field_jax.load(case.file)
    shapes = jax.eval_shape(model.init, jax.random.key(0), arrays["x"])["params"]
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(shapes, sep="/")
    factors = {}
    for path, leaf in flat.items():
        if path.endswith("_lora_a"):
            start = arrays[factor_name(*_field_linen.name_of(path))]
            factors[path] = jnp.array(start.reshape(leaf.shape))
        elif path.endswith("_lora_b"):
            factors[path] = jnp.zeros(leaf.shape, "float32")
    return factors
