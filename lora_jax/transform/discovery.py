"""Infers what a function does with each axis of each of its weights.

The function is traced and its program is read. Primitives that move axes say where each
axis goes, and products say which axes they contract. No equation runs, and meshes do not
matter.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax._core import compat, tree_paths
from lora_jax._core.immutable import FrozenDict
from lora_jax.plan.adapter_plan import Use
from lora_jax.transform import _tracing
from lora_jax.transform._finder import Finder
from lora_jax.transform._roles import STEPS
from lora_jax.transform._tracked import Dense, Found, weight_of


def find_uses(
    function: _tracing.Function,
    params: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    products: Mapping[str, str] = FrozenDict(),
) -> dict[str, tuple[Use, ...]]:
    """The uses of each weight in `function(params, *args, **kwargs)`.

    They are those of each floating-point array of the params with two axes or more, in the
    order of the program. `products` are as in `LoraConfig`.

    Raises:
        ValueError: if no weight reaches a function named in `products`, or a stated
            equation does not fit a call.
    """
    found, ndims = _found(function, params, args, kwargs, products)
    uses: dict[str, list[Use]] = {path: [] for path in ndims}
    for each in found:
        uses[each.weight].append(each.use(ndims[each.weight]))
    return {path: tuple(dict.fromkeys(own)) for path, own in uses.items()}


def grouped_kernels(
    function: _tracing.Function, params: Any, args: tuple[Any, ...]
) -> set[str]:
    """The paths of the kernels of convolutions with feature groups in a function."""
    found, _ = _found(function, params, args, {}, FrozenDict())
    return {each.weight for each in found if each.groups > 1}


def _found(
    function: _tracing.Function,
    params: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    products: Mapping[str, str],
) -> tuple[list[Found], dict[str, int]]:
    """The uses of weights as `find_uses` records them, and the weights' numbers of axes."""
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
    finder = Finder(STEPS, products, closed_over_is_constant=None in traced.paths)
    finder.merge_all(finder.follow(jaxpr, values), None, "the function returns it")
    finder.uses.settle()
    called = finder.called
    for pattern in tree_paths.unmatched(products, called):
        near = tree_paths.nearest(pattern, called) or list(dict.fromkeys(called))
        raise ValueError(
            f"the pattern {pattern!r} of products matches no function that a weight "
            f"reaches; the nearest functions are {tree_paths.listed(near) or 'none'}. A "
            "pattern is a glob on the name of the function in the program, or 're:...'."
        )
    return finder.uses.found, ndims


def _is_weight(leaf: Any) -> bool:
    return leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
