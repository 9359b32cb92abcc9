"""Cuts a weight into blocks of rows, so that a merge holds only one block in memory.

Rows are along the first axis of the array, because they are contiguous in a file. If the
first axis is an output axis, or the axis of a stack, LoRA and DoRA can merge each block
alone. If it is an input axis, only LoRA can: DoRA's norms are sums over all inputs.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from lora_jax.layers.lora import Adapter
from lora_jax.plan.adapter_plan import Target


class Block(NamedTuple):
    """Some rows of a weight, with their target and their part of the adapter."""

    start: int
    stop: int
    target: Target
    adapter: Adapter


def cut_rows(target: Target, adapter: Adapter, entries: int) -> Iterator[Block]:
    """Cuts a weight into blocks of rows.

    Args:
        target: the weight's entry in the plan.
        adapter: of the weight.
        entries: the largest number of entries of a block, unless one row has more.

    Yields:
        The blocks in order; one block if the rows cannot be merged separately.
    """
    count = target.shape[0]
    step = _step(count, max(1, entries // math.prod(target.shape[1:])))
    axes = _cut_axes(target)
    if axes is None or step >= count:
        yield Block(0, count, target, adapter)
        return
    for start in range(0, count, step):
        stop = min(start + step, count)
        own = dict(adapter)
        for name, (axis, width) in axes.items():
            if name in own:
                own[name] = _cut(own[name], axis, start * width, stop * width)
        shape = (stop - start, *target.shape[1:])
        yield Block(start, stop, dataclasses.replace(target, shape=shape), own)


def _step(count: int, most: int) -> int:
    """The number of rows of a block. If possible, all blocks have the same size.

    Blocks of one size are compiled once.
    """
    divisors = (step for step in range(most, most // 2, -1) if count % step == 0)
    return count if most >= count else next(divisors, most)


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


def _cut(factor: jax.Array, axis: int, start: int, stop: int) -> jax.Array:
    index: list[Any] = [slice(None)] * factor.ndim
    index[axis] = slice(start, stop)
    return factor[tuple(index)]
