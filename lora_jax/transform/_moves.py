"""A table of the primitives that move, keep or join the axes of a weight.

A row says where each axis of the operand goes. The table is read by the rules for factored
values, by the inference of axes, by deferred quantized weights and by the interpreter.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.transform._parameters import NotFactorableError, parameter


class Move(NamedTuple):
    """Where the axes of an operand go in one result of an equation.

    Attributes:
        axes: for each axis of the operand, the axes of the result that it becomes.
        of: applies the move to an array, given the other operands. Where the array has
            size 1 instead of an axis of the operand, the result has size 1 as well. None if
            the primitive has a rule of its own for factors.
        indexed: for each axis of the operand, whether one entry is taken, or a range with a
            traced start; empty if no axis is indexed.
    """

    axes: tuple[tuple[int, ...], ...]
    of: Any = None
    indexed: tuple[bool, ...] = ()

    @property
    def roles(self) -> list[str]:
        """The role `"indexed"` for each axis of the operand that is indexed."""
        return ["indexed" if is_indexed else "" for is_indexed in self.indexed]


@dataclasses.dataclass(frozen=True)
class Row:
    """The row of one primitive.

    Attributes:
        moves: from an equation, a `Move` for each result. A primitive that joins arrays has
            the same move for each of them.
        operand: the position of the operand that may be the weight.
        otherwise: why the weight is merged at another position.
        is_deferred: whether a quantized weight is dequantized only after the primitive.
        is_entrywise: whether the primitive can be applied to each entry of a stack alone.
        keeps_rows: whether rows of a table stay factored, so that a later product with them
            is factored (a softmax over sampled classes).
        keeps_vectors: whether a vector of a weight stays factored. A `stop_gradient` of
            it, for example, may apply to the frozen weight and not to the factors.
    """

    moves: Callable[[Any], Sequence[Move]]
    operand: int = 0
    otherwise: str = ""
    is_deferred: bool = True
    is_entrywise: bool = False
    keeps_rows: bool = False
    keeps_vectors: bool = False


def _shapes(equation: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return equation.invars[0].aval.shape, equation.outvars[0].aval.shape


def _each(ndim: int) -> tuple[tuple[int, ...], ...]:
    return tuple((axis,) for axis in range(ndim))


def _without(ndim: int, gone: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Where the axes go if the axes `gone` are removed."""
    left = [axis for axis in range(ndim) if axis not in gone]
    return tuple((left.index(a),) if a in left else () for a in range(ndim))


def same(equation: Any) -> list[Move]:
    """Every axis stays where it is."""
    return [Move(_each(len(atom.aval.shape))) for atom in equation.outvars]


def cast(equation: Any) -> list[Move]:
    """A cast to another floating-point dtype of at least 16 bits, or a complex one."""
    dtype = jnp.dtype(parameter(equation, "new_dtype"))
    if not jnp.issubdtype(dtype, jnp.inexact) or dtype.itemsize < 2:
        raise NotFactorableError(f"a cast to {dtype} has no low-rank form")
    return same(equation)


def _transpose(equation: Any) -> list[Move]:
    order = tuple(parameter(equation, "permutation"))
    axes = tuple((order.index(axis),) for axis in range(len(order)))
    return [Move(axes, lambda p: lax.transpose(p, order))]


def _squeeze(equation: Any) -> list[Move]:
    gone = parameter(equation, "dimensions")
    axes = _without(len(equation.invars[0].aval.shape), gone)
    return [Move(axes, lambda p: lax.squeeze(p, gone))]


def _broadcast_in_dim(equation: Any) -> list[Move]:
    """No factor owns the new axes, or the axes of size 1 that become longer."""
    if len(equation.invars) > 1:
        raise NotFactorableError("its shape is traced")
    ndim = len(parameter(equation, "shape"))
    positions = parameter(equation, "broadcast_dimensions")

    def broadcast(p):
        new = [1] * ndim
        for size, position in zip(p.shape, positions, strict=True):
            new[position] = size
        return lax.broadcast_in_dim(p, new, positions)

    return [Move(tuple((position,) for position in positions), broadcast)]


def _reshape(equation: Any) -> list[Move]:
    """Splits and joins axes. A factor that owns one of the joined axes then owns all."""
    old, new = equation.invars[0].aval.shape, tuple(parameter(equation, "new_sizes"))
    plain = len(equation.invars) == 1 and parameter(equation, "dimensions") is None
    if not plain or 0 in old:
        raise NotFactorableError("it transposes, has a traced shape, or an axis of size 0")
    groups = _reshaped_together(old, new)

    def reshaped(p):
        whole, shape = list(p.shape), [1] * len(new)
        for old_axes, new_axes in groups:
            if any(p.shape[axis] == old[axis] for axis in old_axes):
                for axis in old_axes:
                    whole[axis] = old[axis]
                for axis in new_axes:
                    shape[axis] = new[axis]
        return lax.reshape(jnp.broadcast_to(p, whole), shape)

    became = {axis: tuple(group[1]) for group in groups for axis in group[0]}
    return [Move(tuple(became.get(axis, ()) for axis in range(len(old))), reshaped)]


def _reshaped_together(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Groups of old and new axes with the same entries, without axes of size 1."""
    left = [axis for axis, size in enumerate(old) if size != 1]
    right = [axis for axis, size in enumerate(new) if size != 1]
    groups = []
    while left:
        group = [left.pop(0)], [right.pop(0)]
        while (sizes := _products(old, new, group))[0] != sizes[1]:
            side, rest = (0, left) if sizes[0] < sizes[1] else (1, right)
            group[side].append(rest.pop(0))
        groups.append(group)
    return groups


def _products(old, new, group) -> tuple[int, int]:
    return math.prod(old[i] for i in group[0]), math.prod(new[i] for i in group[1])


def _indexed(sizes: Sequence[int], whole: Sequence[int]) -> tuple[bool, ...]:
    """The axes of which one entry is taken."""
    return tuple(size == 1 and of != 1 for size, of in zip(sizes, whole, strict=True))


def _slice(equation: Any) -> list[Move]:
    """A range of each axis. A range of one entry counts as an index."""
    old, new = _shapes(equation)
    start = parameter(equation, "start_indices")
    limit = parameter(equation, "limit_indices")
    strides = parameter(equation, "strides") or (1,) * len(old)

    def cut(p):
        own = [size == whole for size, whole in zip(p.shape, old, strict=True)]
        if all(old[axis] == new[axis] for axis in range(len(old)) if own[axis]):
            return p
        return lax.slice(
            p,
            [i if owned else 0 for i, owned in zip(start, own, strict=True)],
            [i if owned else 1 for i, owned in zip(limit, own, strict=True)],
            [i if owned else 1 for i, owned in zip(strides, own, strict=True)],
        )

    return [Move(_each(len(old)), cut, _indexed(new, old))]


def _dynamic_slice(equation: Any) -> list[Move]:
    """As `_slice`, with traced starts."""
    old, sizes = equation.invars[0].aval.shape, parameter(equation, "slice_sizes")

    def cut(p, *starts):
        own = [size == whole for size, whole in zip(p.shape, old, strict=True)]
        zero = jnp.zeros_like(starts[0])
        at = [
            i if owned else zero.astype(jnp.asarray(i).dtype)
            for i, owned in zip(starts, own, strict=True)
        ]
        shape = [size if owned else 1 for size, owned in zip(sizes, own, strict=True)]
        return lax.dynamic_slice(p, at, shape)

    return [Move(_each(len(old)), cut, tuple(map(operator.ne, sizes, old)))]


def _rev(equation: Any) -> list[Move]:
    axes = parameter(equation, "dimensions")
    return [same(equation)[0]._replace(of=lambda p: lax.rev(p, axes))]


def _piece(p: jax.Array, whole: int, axis: int, start: int, size: int) -> jax.Array:
    """A range of an axis of `p`, if `p` owns the axis: has its whole length."""
    if p.shape[axis] != whole:
        return p
    return lax.slice_in_dim(p, start, start + size, axis=axis)


def _split(equation: Any) -> list[Move]:
    """Pieces of one axis."""
    old, axis = equation.invars[0].aval.shape, parameter(equation, "axis")
    moves, start = [], 0
    for size in map(int, parameter(equation, "sizes")):
        new = [size if i == axis else n for i, n in enumerate(old)]

        def piece(p, start=start, size=size):
            return _piece(p, old[axis], axis, start, size)

        moves.append(Move(_each(len(old)), piece, _indexed(new, old)))
        start += size
    return moves


def _unstack(equation: Any) -> list[Move]:
    """The entries of one axis."""
    old, axis = equation.invars[0].aval.shape, parameter(equation, "axis")
    new = [1 if i == axis else size for i, size in enumerate(old)]

    def entry(i: int) -> Move:
        def of(p):
            return lax.squeeze(_piece(p, old[axis], axis, i, 1), [axis])

        return Move(_without(len(old), [axis]), of, _indexed(new, old))

    return list(map(entry, range(len(equation.outvars))))


def _tile(equation: Any) -> list[Move]:
    """Repeats axes. A factor is repeated only along axes that it owns."""
    old, repeats = equation.invars[0].aval.shape, parameter(equation, "reps")

    def tiled(p):
        own = zip(p.shape, old, repeats, strict=True)
        return jnp.tile(p, [n if size == whole else 1 for size, whole, n in own])

    return [same(equation)[0]._replace(of=tiled)]


def _pad(equation: Any) -> list[Move]:
    """Pads axes at their ends."""
    widths = parameter(equation, "padding_config")
    if any(inside or min(low, high) < 0 for low, high, inside in widths):
        raise NotFactorableError("it pads between entries, or removes entries")
    return same(equation)[:1]


def _gather(equation: Any) -> list[Move]:
    """Slices at indices. An indexed axis becomes the axes of the indices."""
    numbers = parameter(equation, "dimension_numbers")
    if numbers.operand_batching_dims:
        raise NotFactorableError("it has different indices for each entry of a batch axis")
    old, new = _shapes(equation)
    sizes, ndim = parameter(equation, "slice_sizes"), len(old)
    # A slice as long as its axis starts at 0, whatever its index is.
    indexed = [i in numbers.start_index_map and sizes[i] != old[i] for i in range(ndim)]
    fills = parameter(equation, "mode") == lax.GatherScatterMode.FILL_OR_DROP
    if fills and sum(indexed) != len(numbers.start_index_map):
        raise NotFactorableError("an index out of range would fill an axis taken whole")
    offsets = numbers.offset_dims
    of_indices = tuple(axis for axis in range(len(new)) if axis not in offsets)
    inside = _without(ndim, numbers.collapsed_slice_dims)
    axes = tuple(
        (*(of_indices if indexed[axis] else ()), *(offsets[i] for i in inside[axis]))
        for axis in range(ndim)
    )
    return [Move(axes, indexed=tuple(indexed))]


def _stack(equation: Any) -> list[Move]:
    """A new axis, along which arrays are joined."""
    new = parameter(equation, "axis")
    old, _ = _shapes(equation)
    return [Move(tuple((axis + (axis >= new),) for axis in range(len(old))))]


_ENTRYWISE = Row(same, is_entrywise=True)
_SAME = Row(same)
_LINEAR = Row(same, is_deferred=False)

# By the name of the primitive.
MOVES: dict[str, Row] = {
    "transpose": Row(_transpose, keeps_rows=True, keeps_vectors=True),
    "squeeze": Row(_squeeze, keeps_rows=True, keeps_vectors=True),
    "broadcast_in_dim": Row(_broadcast_in_dim, keeps_rows=True),
    "reshape": Row(_reshape, keeps_rows=True, keeps_vectors=True),
    "slice": Row(_slice, keeps_rows=True, keeps_vectors=True),
    "dynamic_slice": Row(
        _dynamic_slice, otherwise="the weight is its index", keeps_vectors=True
    ),
    "gather": Row(
        _gather, otherwise="the weight is its index", is_deferred=False, keeps_vectors=True
    ),
    "rev": Row(_rev),
    "split": Row(_split),
    "unstack": Row(_unstack),
    "tile": Row(_tile),
    "pad": Row(_pad, otherwise="the weight is the padding value"),
    "stack": Row(_stack),
    "convert_element_type": Row(
        cast, is_entrywise=True, keeps_rows=True, keeps_vectors=True
    ),
    "stop_gradient": Row(same, is_entrywise=True, keeps_rows=True, keeps_vectors=True),
    "triangular_solve": Row(
        same, operand=1, otherwise="the weight is its matrix", is_deferred=False
    ),
    **dict.fromkeys(("copy", "name", "reduce_precision", "neg", "conj"), _ENTRYWISE),
    **dict.fromkeys(("real", "imag"), _ENTRYWISE),
    **dict.fromkeys(("reshard", "mesh_cast", "sharding_constraint"), _SAME),
    **dict.fromkeys(("layout_constraint", "concatenate", "complex", "select_n"), _SAME),
    **dict.fromkeys(("mul", "div", "add", "add_any", "sub"), _SAME),
    **dict.fromkeys(("pvary", "pcast", "cumsum"), _LINEAR),
}


def named(test: Callable[[Row], bool]) -> frozenset[str]:
    """The names of the primitives whose rows pass `test`."""
    return frozenset(name for name, row in MOVES.items() if test(row))
