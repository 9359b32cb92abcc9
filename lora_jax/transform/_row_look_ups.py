"""On which axes of gathers and scatters the rows of a batch are."""

from collections.abc import Sequence
from typing import Any

from lora_jax.transform._parameters import parameter
from lora_jax.transform._row_places import (
    Axes,
    Held,
    NotFollowedError,
    Step,
    Takes,
    held,
    join,
)


def gather(step: Step, x: Axes | None, indices: Axes | None) -> Held | Takes:
    """Rows of the operand, of the indices, or of both if they go to the same axes."""
    numbers = parameter(step.equation, "dimension_numbers")
    sizes, shape = parameter(step.equation, "slice_sizes"), step.shape
    n_indices = step.equation.invars[1].aval.shape
    batch, offsets = numbers.operand_batching_dims, numbers.offset_dims
    loops = [axis for axis in range(len(step.out)) if axis not in offsets]
    gone = (*numbers.collapsed_slice_dims, *batch)
    inside = [axis for axis in range(len(shape)) if axis not in gone]
    to = dict(zip(inside, offsets, strict=True))
    to = {axis: goes for axis, goes in to.items() if sizes[axis] == shape[axis]}
    of_batch = zip(batch, numbers.start_indices_batching_dims, strict=True)
    to |= {axis: loops[i] for axis, i in of_batch}
    for component, i in step.counts.items():
        axis = numbers.start_index_map[component]
        if sizes[axis] == 1 and shape[axis] == n_indices[i]:
            to[axis] = loops[i]
    rows = held(x)
    if (taken := rows.keys() - to.keys()) and _takes_entries(step, numbers, sizes, rows):
        return Takes(loops[0])
    if taken:
        raise NotFollowedError("looks up rows at indices that only the data know")
    if len(n_indices) - 1 in held(indices):
        raise NotFollowedError("has an index with rows along its components")
    return join(
        {to[axis]: atoms for axis, atoms in rows.items()},
        {loops[axis]: atoms for axis, atoms in held(indices).items()},
    )


def _takes_entries(step: Step, numbers: Any, sizes: Sequence[int], rows: Held) -> bool:
    """Whether a gather takes entries along the only axis that holds rows."""
    others = [axis for axis in range(len(sizes)) if axis not in rows]
    n_indices = step.equation.invars[1].aval.shape
    return (
        len(rows) == 1
        and tuple(numbers.start_index_map) == tuple(numbers.collapsed_slice_dims)
        and set(numbers.start_index_map) == rows.keys()
        and all(sizes[axis] == step.shape[axis] for axis in others)
        and len(n_indices) == 2
        and n_indices[0] > 1
    )


def scatter(step: Step, x: Axes | None, indices: Axes | None, updates: Axes | None) -> Held:
    """Rows of the operand, or those of updates that do not go elsewhere."""
    numbers = parameter(step.equation, "dimension_numbers")
    windows, batch = numbers.update_window_dims, numbers.operand_batching_dims
    n_updates = step.equation.invars[2].aval.shape
    loops = [axis for axis in range(len(n_updates)) if axis not in windows]
    gone = (*numbers.inserted_window_dims, *batch)
    inside = [axis for axis in range(len(step.shape)) if axis not in gone]
    to = dict(zip(windows, inside, strict=True))
    of_batch = zip(batch, numbers.scatter_indices_batching_dims, strict=True)
    to |= {loops[i]: axis for axis, i in of_batch}
    for component, i in step.counts.items():
        axis = numbers.scatter_dims_to_operand_dims[component]
        if axis in numbers.inserted_window_dims and step.shape[axis] == n_updates[loops[i]]:
            to[loops[i]] = axis
    if len(loops) in held(indices):
        raise NotFollowedError("has an index with rows along its components")
    rows = join(held(updates), {loops[i]: atoms for i, atoms in held(indices).items()})
    if rows.keys() <= to.keys():
        return join(held(x), {to[axis]: atoms for axis, atoms in rows.items()})
    if not held(x):
        raise NotFollowedError("puts rows at indices that only the data know")
    return held(x)
