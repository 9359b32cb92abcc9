"""Gradients of adapters, summed over batches, for the initializers from data.

With `A = Q` and `B = 0` the gradient of `B` is `Q^T G`, and with `A = 0` the gradient of
`A` is `G B^T`, where `G (in, out)` is the gradient of the weight, which is never computed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core import checks, compat, numerics
from lora_jax.layers.lora import Adapter
from lora_jax.model import initialization, sharding
from lora_jax.plan.adapter_plan import AdapterPlan

Adapters = dict[str, Adapter]

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


class GradientSums:
    """Computes the gradients of adapters on the same batches, once for each `sums`.

    Attributes:
        plan: of the adapters.
        batches: the number of batches in a pass.
    """

    def __init__(
        self,
        adapted: Callable[..., jax.Array],
        params: Any,
        leaves: Mapping[str, Any],
        plan: AdapterPlan,
        batches: Iterable[tuple[Any, ...]],
        passes: int,
    ):
        """Checks the batches.

        Args:
            adapted: a scalar function of params, adapters and a batch.
            params: of the plan.
            leaves: the leaves of params by path.
            plan: of the adapters.
            batches: tuples of arguments.
            passes: how often `sums` will be called.
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
        self.plan, self.batches = plan, 0
        self._leaves, self._given = leaves, batches
        self._places = sharding.init_shardings(leaves, plan)
        values, treedef = jax.tree.flatten(params)
        is_array = [_is_traced(value) for value in values]
        self._arrays = [x for x, own in zip(values, is_array, strict=True) if own]

        def add(total: Adapters, arrays: Any, adapters: Adapters, batch: Any) -> Adapters:
            left = iter(arrays)
            pairs = zip(values, is_array, strict=True)
            params = treedef.unflatten([next(left) if own else x for x, own in pairs])
            grads = jax.grad(lambda own: adapted(params, own, *batch))(adapters)
            return jax.tree.map(jnp.add, total, grads)

        self.add = jax.jit(add)

    def sums(self, name: str, factors: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The sum over the batches of the gradients of the other factor.

        Args:
            name: of the given factors, `"A"` or `"B"`. The other factors are zero.
            factors: by path.

        Returns:
            The gradient of the other factor by path, at least float32.
        """
        adapters: Adapters = {}
        for path, target in self.plan.targets.items():
            dtype = self.dtype(path)
            shapes = target.adapter_shapes
            adapter = {own: jnp.zeros(shapes[own], dtype) for own in "AB"}
            adapter[name] = factors[path].astype(dtype)
            if self._places is not None:
                adapter = initialization.put(adapter, self._places[path])
            adapters[path] = adapter
        total, count = jax.tree.map(jnp.zeros_like, adapters), 0
        for batch in self._given:
            if not isinstance(batch, tuple):
                raise TypeError(
                    "each batch must be a tuple of the arguments after params, got "
                    f"{type(batch).__name__}: write (batch,) if there is one argument."
                )
            total, count = self.add(total, self._arrays, adapters, batch), count + 1
        if not count:
            raise ValueError("batches are empty: at least one batch is needed.")
        if self.batches not in (0, count):
            raise ValueError(
                f"each pass must read the same batches, and after {self.batches} in the "
                f"first pass a later one had {count}."
            )
        self.batches = count
        other = {"A": "B", "B": "A"}[name]
        return {path: own[other] for path, own in total.items()}

    def dtype(self, path: str) -> Any:
        """The dtype of the factors at a path."""
        return numerics.accumulation_dtype(self._leaves[self.plan.leaf(path)].dtype)


def _is_traced(value: Any) -> bool:
    """Whether a leaf of params is an argument of a compiled program, and no constant."""
    is_array = isinstance(value, np.ndarray) and checks.has_jax_dtype(value)
    return is_array or isinstance(value, jax.Array)


@functools.partial(jax.jit, static_argnums=0)
def on_automatic_axes(function: Callable[..., Any], *values: jax.Array) -> Any:
    """Calls a function of arrays as one program, with all mesh axes automatic."""
    return compat.automatically(function, compat.mesh_of(jax.typeof(values[0])), *values)


def check_finite(path: str, values: jax.Array, what: str) -> None:
    """Raises FloatingPointError if a number is infinite or NaN."""
    if not bool(jnp.isfinite(values).all()):
        raise FloatingPointError(
            f"at {path!r}: {what} has an infinity or a NaN: compute them in float32, or "
            "leave out the batch that causes it."
        )
