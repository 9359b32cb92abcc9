"""Adapters of many tenants in one pytree: a slot for each."""

import dataclasses
import functools

import jax

__all__ = ["AdapterStack"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["adapters", "scales", "magnitudes"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class AdapterStack:
    """Adapters of several tenants, with the slots as the first axis of each array.

    A pytree of floating-point arrays. `jax.grad` with respect to a stack is a stack: the
    gradients of `scales` and `magnitudes` are zeros, because they are not trained.

    Attributes:
        adapters: for each path of the plan, `{"A": (slots, *batch, in, rank), "B": (slots,
            *batch, rank, out)}`, for DoRA also `"m": (slots, *batch, out)`. Factors of a
            lower rank are padded with zeros.
        scales: for each path, `(slots,)` float32, which multiplies `A @ B`; 0 in a slot
            without an adapter for this path.
        magnitudes: for each path with DoRA, `(slots,)` float32: 1 in a slot that uses its
            `"m"`, and 0 in a slot whose columns keep the length of those of `W + A @ B`.
    """

    adapters: dict[str, dict[str, jax.Array]]
    scales: dict[str, jax.Array]
    magnitudes: dict[str, jax.Array]
