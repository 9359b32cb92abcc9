"""Initializes the adapters of a plan, one weight at a time."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from lora_jax._core import checks, numerics, placement
from lora_jax.layers import initializers
from lora_jax.layers.lora import Adapter, init_lora_adapter
from lora_jax.model.column_norms import column_norm
from lora_jax.plan.adapter_plan import Target
from lora_jax.plan.config import LoraConfig


def init_adapter(
    key: jax.Array, weight: Any, target: Target, config: LoraConfig, shardings: Any
) -> Adapter:
    """Initializes the adapter of a weight; each device makes its own part of a factor."""
    dtype = config.dtype or numerics.accumulation_dtype(weight.dtype)
    options = {"rank": target.rank, "dtype": dtype, "init": config.init}
    if shardings is None or isinstance(key, Tracer):
        matrix = jax.ShapeDtypeStruct(target.matrix_shape, weight.dtype)
        adapter = init_lora_adapter(key, matrix, **options)
        adapter = adapter if shardings is None else put(adapter, shardings)
    else:
        adapter = _init_factors(key, target.matrix_shape, shardings, **options)
    if target.method == "dora":
        checks.check_array("the weight", weight)
        init = config.init
        zero = not isinstance(init, tuple) and init != "orthogonal"  # B and A @ B are zero
        m = column_norm(weight, {} if zero else adapter, target)
        adapter["m"] = m if shardings is None else placement.put(m, shardings["m"])
    return adapter


def put(adapter: Adapter, shardings: Mapping[str, Any]) -> Adapter:
    """The arrays of an adapter with their shardings."""
    return {name: placement.put(x, shardings[name]) for name, x in adapter.items()}


def _init_factors(
    key: jax.Array, shape: tuple[int, ...], shardings: Mapping[str, Any], **options: Any
) -> Adapter:
    """The factors of one adapter, each part made on its device.

    Args:
        key: a `jax.random` key, not traced.
        shape: `(*batch, in, out)` of the weight.
        shardings: of the adapter.
        options: `rank`, `dtype` and `init` of `initializers.init_factors`.
    """
    out = {name: shardings[name] for name in ("A", "B")}
    if not initializers.drawn_by_place(key):  # then the numbers depend on the parts
        return jax.device_put(_factors(key, shape, **options), out)
    given = str(jax.random.key_impl(key)), shape, (*options.items(),), (*out.items(),)
    data = np.asarray(jax.random.key_data(key))
    if initializers.is_own(options["init"]):
        return _compiled(*given)(data)
    try:  # anew for each weight: a function may return other values in each call
        return _compiled.__wrapped__(*given)(data)
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
        return jax.device_put(_factors(key, shape, **options), out)


def _factors(key: jax.Array, shape: tuple[int, ...], **options: Any) -> Adapter:
    a, b = initializers.init_factors(key, shape, **options)
    return {"A": a, "B": b}


@functools.lru_cache(maxsize=256)
def _compiled(impl: str, shape: tuple[int, ...], options: Any, out: Any) -> Any:
    """A compiled function from the data of a key to factors. It is cached by layer size."""

    def draw(data: jax.Array) -> Adapter:
        return _factors(jax.random.wrap_key_data(data, impl=impl), shape, **dict(options))

    return jax.jit(draw, out_shardings=dict(out))
