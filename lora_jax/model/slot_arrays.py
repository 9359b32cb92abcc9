"""The arrays of a stack: each has the slots as its first axis."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import PartitionSpec

from lora_jax._core import checks, numerics, placement

RANK_AXIS = {"A": -1, "B": -2}


@dataclasses.dataclass(frozen=True)
class Slot:
    """A slot of a stack, and whether there is such a slot; None if that is known."""

    index: Any
    inside: jax.Array | None


def find_slot(slot: Any, slots: int) -> Slot:
    """Checks a slot, which may be traced."""
    if isinstance(slot, Tracer):
        if not jnp.issubdtype(slot.dtype, jnp.integer):
            raise TypeError(f"slot must be an integer, got an array of {slot.dtype}.")
        if slot.shape:
            raise ValueError(
                f"slot must be one integer, got an array of shape {slot.shape}: for "
                "several slots use jax.vmap or jax.lax.scan."
            )
        # Of 32 bits or more, since `slots` may be too large for fewer.
        index = slot.astype(jnp.int64 if slot.dtype.itemsize == 8 else jnp.int32)
        return Slot(jnp.clip(index, 0, slots - 1), (index >= 0) & (index < slots))
    index = checks.as_index("slot", slot)
    if not 0 <= index < slots:
        hint = (
            " -1 stands for the base alone, which has no adapters." if index == -1 else ""
        )
        raise IndexError(
            f"slot must be from 0 to {slots - 1}, since the stack has {slots} slots, got "
            f"{index}.{hint}"
        )
    return Slot(jnp.asarray(index, jnp.int32), None)


def stack_arrays(
    arrays: Sequence[Any], name: str, shape: tuple[int, ...], slots: int, mesh: Any
) -> jax.Array:
    """The arrays of the first slots in one; None is an empty slot, and so are the rest.

    If none of them lies on a mesh, the result is replicated over the given one.
    """
    arrays = placement.on_device(list(arrays))
    given = [x for x in arrays if x is not None]
    dtype = numerics.promote(*(x.dtype for x in given))
    place = next(filter(None, map(placement.sharding_on_mesh, given)), mesh)
    stacked = jnp.stack(
        [placement.laid(filled_slot(x, name, shape, dtype), place) for x in arrays]
    )
    empty = slots - len(arrays)
    if empty:
        sizes = [(0, empty, 0), *[(0, 0, 0)] * len(shape)]
        stacked = lax.pad(stacked, jnp.asarray(_fill(name), dtype), sizes)
    if place is None:
        return stacked
    return placement.laid(stacked, place.update(spec=PartitionSpec(None, *place.spec)))


def filled_slot(array: Any, name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An array padded to the shape of a slot; without an array, that of an empty slot."""
    if array is None:
        return jnp.full(shape, _fill(name), dtype)
    if numerics.promote(array.dtype, dtype) != dtype:
        raise TypeError(
            f"{name} has the dtype {array.dtype}, and the stack, of {dtype}, would round "
            f"it: cast the adapters to {dtype}, or make the stack with wider adapters."
        )
    array = jnp.asarray(placement.on_device(array)).astype(dtype)
    sizes = [(0, n - own, 0) for n, own in zip(shape, array.shape, strict=True)]
    return lax.pad(array, jnp.zeros((), dtype), sizes) if array.shape != shape else array


def _fill(name: str) -> float:
    """What arrays of empty slots have: a magnitude of 1 has a finite quotient."""
    return float(name == "m")


def vector_of_slots(values: Sequence[float], like: jax.Array) -> jax.Array:
    """A number for each slot of a stack, replicated over its mesh. Empty slots have 0."""
    vector = np.zeros(len(like), numerics.accumulation_dtype(like.dtype))
    vector[: len(values)] = values
    place = placement.sharding_on_mesh(like)
    return placement.laid(
        jnp.asarray(vector), place and place.update(spec=PartitionSpec(None))
    )


def write_slot(stacked: jax.Array, value: jax.Array, place: Slot) -> jax.Array:
    """A stack with a value in one slot, unchanged if there is no such slot."""
    here = placement.on_device(stacked)
    own = placement.sharding_on_mesh(here)
    if own is not None:
        value = placement.laid(value, own.update(spec=PartitionSpec(*own.spec[1:])))
    elif not isinstance(here, Tracer) and placement.sharding_on_mesh(value) is not None:
        value = placement.put(value, here.sharding)
    if place.inside is not None:
        old = lax.dynamic_index_in_dim(here, place.index, 0, keepdims=False)
        value = jnp.where(place.inside, value, old)
    new = placement.laid(lax.dynamic_update_index_in_dim(here, value, place.index, 0), own)
    return new if here is stacked else jax.device_put(new, stacked.sharding)


def read_slot(stacked: jax.Array, place: Slot) -> jax.Array:
    """The value of one slot; NaN if there is no such slot."""
    stacked = placement.on_device(stacked)
    value = lax.dynamic_index_in_dim(stacked, place.index, 0, keepdims=False)
    return or_nan(value, place)


def or_nan(value: jax.Array, place: Slot) -> jax.Array:
    """A value, or NaN if there is no such slot."""
    if place.inside is None:
        return value
    return jnp.where(place.inside, value, jnp.full_like(value, jnp.nan))


def cut_rank(array: jax.Array, name: str, start: int, stop: int | None) -> jax.Array:
    """Some entries of the rank axis of an array of one slot; `m` has none."""
    if name not in RANK_AXIS:
        return array
    axis = array.ndim + RANK_AXIS[name]
    stop = array.shape[axis] if stop is None else stop
    return lax.slice_in_dim(array, start, stop, axis=axis)
