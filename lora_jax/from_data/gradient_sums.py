"""Gradients of adapters, summed over batches, for the initializers from data.

With `A = Q` and `B = 0` the gradient of `B` is `Q^T G`, and with `A = 0` the gradient of
`A` is `G B^T`, where `G (in, out)` is the gradient of the weight, which is never computed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core import checks, compat, numerics
from lora_jax.layers.lora import Adapter
from lora_jax.model import initialization, sharding
from lora_jax.plan.adapter_plan import AdapterPlan

Adapters: TypeAlias = dict[str, Adapter]

# Columns beyond those that are used. Halko et al., 2011, section 1.3, recommend 5 or 10.
OVERSAMPLING = 10


def widened(plan: AdapterPlan, ranks: Mapping[str, int]) -> AdapterPlan:
    """The plan of LoRA adapters with other ranks, the scale 1 and no dropout."""
    plain: dict[str, Any] = {"method": "lora", "scale": 1.0, "dropout": 0.0}
    targets = {
        path: dataclasses.replace(target, rank=ranks[path], **plain)
        for path, target in plan.targets.items()
    }
    return dataclasses.replace(plan, targets=targets, trained={})


def factor_dtype(leaves: Mapping[str, Any], plan: AdapterPlan, path: str) -> Any:
    """The dtype of new factors at a path, at least float32."""
    return numerics.accumulation_dtype(leaves[plan.leaf(path)].dtype)


def with_one_factor(
    name: str,
    factors: Mapping[str, jax.Array],
    leaves: Mapping[str, Any],
    plan: AdapterPlan,
) -> Adapters:
    """Adapters with the factor `name` and zeros for the other one, on the mesh."""
    places = sharding.init_shardings(leaves, plan)
    adapters: Adapters = {}
    for path, target in plan.targets.items():
        dtype = factor_dtype(leaves, plan, path)
        shapes = target.adapter_shapes
        adapter = {own: jnp.zeros(shapes[own], dtype) for own in "AB"}
        adapter[name] = factors[path].astype(dtype)
        if places is not None:
            adapter = initialization.put(adapter, places[path])
        adapters[path] = adapter
    return adapters


class GradientSums:
    """Sums gradients over the same batches in each call.

    Attributes:
        add: adds the gradient of one batch to a sum; compiled.
    """

    def __init__(
        self,
        loss: Callable[..., jax.Array],
        params: Any,
        batches: Iterable[tuple[Any, ...]],
        passes: int,
    ):
        """Checks the batches.

        Args:
            loss: a scalar function of params, the variables and a batch. What it closes
                over becomes a constant.
            params: may have leaves that are not arrays.
            batches: tuples of arguments.
            passes: the number of calls.
        """
        if not isinstance(batches, Iterable):
            raise TypeError(
                "batches must be an iterable of tuples of arguments, got "
                f"{type(batches).__name__}."
            )
        if passes > 1 and iter(batches) is batches:
            raise TypeError(
                f"batches are read {passes} times, and a {type(batches).__name__} can be "
                "read only once: pass a list, or an object whose __iter__ starts anew."
            )
        self._batches, self._count = batches, 0
        values, treedef = jax.tree.flatten(params)
        is_traced = list(map(_is_traced, values))
        self._arrays = [x for x, own in zip(values, is_traced, strict=True) if own]

        def add(total: Any, arrays: Any, variables: Any, batch: Any) -> Any:
            left = iter(arrays)
            pairs = zip(values, is_traced, strict=True)
            params = treedef.unflatten([next(left) if own else x for x, own in pairs])
            grads = jax.grad(lambda own: loss(params, own, *batch))(variables)
            return jax.tree.map(jnp.add, total, grads)

        self.add = jax.jit(add, donate_argnums=0)

    def __call__(self, variables: Any) -> Any:
        """The sum over the batches of the gradients for `variables`, a tree of arrays."""
        total, count = jax.tree.map(jnp.zeros_like, variables), 0
        for batch in self._batches:
            if not isinstance(batch, tuple):
                raise TypeError(
                    "each batch must be a tuple of the arguments after params, got "
                    f"{type(batch).__name__}: write (batch,) if there is one argument."
                )
            total, count = self.add(total, self._arrays, variables, batch), count + 1
        if not count:
            raise ValueError("batches are empty: at least one batch is needed.")
        if self._count not in (0, count):
            raise ValueError(
                f"each pass must read the same batches: the first one had {self._count}, "
                f"and a later one had {count}."
            )
        self._count = count
        return total


def _is_traced(value: Any) -> bool:
    """Whether a leaf of params is an argument of a compiled program, and no constant."""
    is_array = isinstance(value, np.ndarray) and checks.has_jax_dtype(value)
    return is_array or isinstance(value, jax.Array)


@functools.partial(jax.jit, static_argnums=0)
def on_automatic_axes(function: Callable[..., Any], *values: jax.Array) -> Any:
    """Calls a function of arrays as one program, with all mesh axes automatic."""
    return compat.automatically(function, compat.mesh_of(jax.typeof(values[0])), *values)


@functools.partial(jax.jit, static_argnums=1)
def orthonormal(matrix: jax.Array, transposed: bool = False) -> jax.Array:
    """Orthonormal columns, or rows, with the span of those of `(*batch, ...)`."""

    def of(matrix: jax.Array) -> jax.Array:
        return jnp.linalg.qr(matrix)[0]

    columns = on_automatic_axes(of, matrix.mT if transposed else matrix)
    return columns.mT if transposed else columns


def check_finite(path: str, values: jax.Array, what: str) -> None:
    """Raises FloatingPointError if a number is infinite or NaN."""
    if not numerics.are_finite(values):
        raise FloatingPointError(
            f"at {path!r}: {what} has an infinity or a NaN: compute them in float32, or "
            "leave out the batch that causes it."
        )
