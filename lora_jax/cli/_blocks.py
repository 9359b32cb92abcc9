"""Cuts a weight into blocks of rows, so that a merge holds only one block in memory.

Rows are along the first axis of the array, because they are contiguous in a file. If the
first axis is an output axis, or the axis of a stack, LoRA and DoRA can merge each block
alone. If it is an input axis, only LoRA can: DoRA's norms are sums over all inputs.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.plan import parts
from lora_jax.plan.adapter_plan import Target


class Update(NamedTuple):
    """The adapter of a weight, or of a part of it."""

    path: str
    """Its path in the plan, for error messages."""
    target: Target
    adapter: Mapping[str, jax.Array | np.ndarray]


class Block(NamedTuple):
    """Some rows of a weight, with the updates of these rows."""

    start: int
    stop: int
    updates: tuple[Update, ...]


def cut_rows(updates: Sequence[Update], entries: int) -> Iterator[Block]:
    """Cuts a weight with some updates into blocks of rows.

    A block has at most as many entries as given, but at least one row. There is one block
    if the rows cannot be merged separately.
    """
    count, *row = updates[0].target.shape
    step = _step(count, max(1, entries // math.prod(row)))
    if not all(_can_be_cut(update.target) for update in updates):
        step = count
    for start in range(0, count, step):
        stop = min(start + step, count)
        own = (_cut_update(update, start, stop) for update in updates)
        yield Block(start, stop, tuple(filter(None, own)))


def _step(count: int, most: int) -> int:
    """The number of rows of a block. If possible, all blocks have the same size.

    Blocks of one size are compiled once.
    """
    divisors = (step for step in range(most, most // 2, -1) if count % step == 0)
    return count if most >= count else next(divisors, most)


def _can_be_cut(target: Target) -> bool:
    first = parts.entries(target.part, target.shape)[0]
    return isinstance(first, int) or _cut_axes(target.alone) is not None


def _cut_update(update: Update, start: int, stop: int) -> Update | None:
    """The update of some rows; None if it changes none of them."""
    if (start, stop) == (0, update.target.shape[0]):
        return update
    target, cuts = _cut_target(update.target, start, stop)
    if target is None:
        return None
    adapter = dict(update.adapter)
    for name, (axis, first, last) in cuts.items():
        if name in adapter:
            adapter[name] = _cut(np.asarray(adapter[name]), axis, first, last)
    return Update(update.path, target, adapter)


# The layers of a model have the same targets.
@functools.lru_cache(maxsize=4096)
def _cut_target(
    target: Target, start: int, stop: int
) -> tuple[Target | None, dict[str, tuple[int, int, int]]]:
    """The target of some rows or None, and for each cut factor its axis and ends."""
    first, *others = parts.entries(target.part, target.shape)
    low, high = (bisect.bisect_left(parts.indices_of(first), i) for i in (start, stop))
    if low == high:
        return None, {}
    cuts = {}
    if isinstance(first, int):
        entry: parts.Entry = first - start
    else:
        own = first[low:high]
        if isinstance(own, range):
            entry = range(own.start - start, own.stop - start, own.step)
        else:
            entry = tuple(index - start for index in own)
        for name, (axis, width) in (_cut_axes(target.alone) or {}).items():
            cuts[name] = axis, low * width, high * width
    shape = (stop - start, *target.shape[1:])
    part = parts.as_text((entry, *others), shape)
    return dataclasses.replace(target, shape=shape, part=part), cuts


def _cut_axes(target: Target) -> dict[str, tuple[int, int]] | None:
    """For each factor: the axis that is cut, and the number of its entries in a row."""
    if target.batch_axes and target.axes[0] == "b":
        axis = target.batch_axes.index(0)
        return {"A": (axis, 1), "B": (axis, 1), "m": (axis, 1)}
    if target.out_axes[0] == 0:
        width = math.prod(target.shape[axis] for axis in target.out_axes[1:])
        return {"B": (-1, width), "m": (-1, width)}
    if target.in_axes[0] == 0 and target.method == "lora":
        width = math.prod(target.shape[axis] for axis in target.in_axes[1:])
        return {"A": (-2, width)}
    return None


def _cut(factor: np.ndarray, axis: int, start: int, stop: int) -> np.ndarray:
    index: list[Any] = [slice(None)] * factor.ndim
    index[axis] = slice(start, stop)
    return factor[tuple(index)]
