"""Finds what a function does with each axis of each of its weights.

The function is traced, and its program is read: what moves axes says where each goes, and
a product which it contracts. Nothing is computed, and meshes do not matter.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax._core import compat
from lora_jax.plan.adapter_plan import Use
from lora_jax.transform import _tracing
from lora_jax.transform._finder import Finder
from lora_jax.transform._roles import STEPS
from lora_jax.transform._tracked import Dense, weight_of


def find_uses(
    function: _tracing.Function,
    params: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, tuple[Use, ...]]:
    """What `function(params, *args, **kwargs)` does with its weights.

    Args:
        function: is traced.
        params: a pytree of arrays or `jax.ShapeDtypeStruct`s.
        args: arguments of the function.
        kwargs: arguments of the function.

    Returns:
        The uses, in the order of the program, of each floating-point array of the params
        with two axes or more; an empty tuple for one that has no use.
    """
    traced = _tracing.trace(function, params, args, kwargs)
    jaxpr, _ = compat.open_jaxpr(traced.jaxpr)
    ndims: dict[str, int] = {}
    values: list[Any] = []
    for path, leaf, kind in zip(traced.paths, traced.arguments, jaxpr.invars, strict=True):
        if path is not None and _is_weight(leaf):
            ndims[path] = leaf.ndim
            values.append(weight_of(path, kind.aval.shape))
        else:
            values.append(Dense(is_constant=path is not None))
    finder = Finder(STEPS, closed_over_is_constant=None in traced.paths)
    finder.merge_all(finder.follow(jaxpr, values), None, "the function returns it")
    finder.uses.settle()
    uses: dict[str, list[Use]] = {path: [] for path in ndims}
    for found in finder.uses.found:
        uses[found.weight].append(found.use(ndims[found.weight]))
    return {path: tuple(dict.fromkeys(found)) for path, found in uses.items()}


def _is_weight(leaf: Any) -> bool:
    return leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
