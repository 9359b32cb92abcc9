"""Primitives that move axes about: every rule does to factors what it does to the weight.

An axis that a factor does not own has size 1 there: it starts at 0, has a size of 1, and is
otherwise left alone. `(rank, *axes)` factors are seen as `(*axes)`: see `Factored.map`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.transform import _deferred
from lora_jax.transform._context import Context
from lora_jax.transform._factored import (
    Factored,
    NotFactorableError,
    Term,
    base_of,
    full,
)
from lora_jax.transform._joining import joined_in_batch
from lora_jax.transform._parameters import parameter


def transpose(context: Context, equation: Any, f: Factored) -> Factored:
    """`(*axes)` -> `(*axes in another order)`."""
    order = parameter(equation, "permutation")
    return f.map(_deferred.bind(equation, [f.base]), lambda p: lax.transpose(p, order))


def squeeze(context: Context, equation: Any, f: Factored) -> Factored:
    """Drops axes of size 1, which no factor owns."""
    axes = parameter(equation, "dimensions")
    return f.map(_deferred.bind(equation, [f.base]), lambda p: lax.squeeze(p, axes))


def broadcast_in_dim(
    context: Context, equation: Any, f: Factored, *sizes: jax.Array
) -> Factored:
    """New axes, and axes of size 1 made longer, stay unowned."""
    if sizes:
        raise NotFactorableError("its shape is an array")
    shape = parameter(equation, "shape")
    positions = parameter(equation, "broadcast_dimensions")

    def broadcast(p):
        new = [1] * len(shape)
        for size, position in zip(p.shape, positions, strict=True):
            new[position] = size
        return lax.broadcast_in_dim(p, new, positions)

    return f.map(_deferred.bind(equation, [f.base]), broadcast)


def reshape(context: Context, equation: Any, f: Factored, *sizes: jax.Array) -> Factored:
    """Splits axes, and joins those that are owned alike, or owned by none."""
    new = parameter(equation, "new_sizes")
    if sizes or parameter(equation, "dimensions") is not None or 0 in f.shape:
        raise NotFactorableError("it is no plain reshape")
    groups = _reshaped_together(f.shape, new)
    varied = frozenset() if context.probing else _varied(f)

    def reshaped(p):
        shape = [1] * len(new)
        for old_axes, new_axes in groups:
            owned = [p.shape[axis] == f.shape[axis] for axis in old_axes]
            if not any(owned):
                continue
            for axis in old_axes:
                if p.shape[axis] != f.shape[axis] and axis in varied:
                    raise NotFactorableError(
                        f"{f.shape} -> {tuple(new)} joins an input axis to an output axis"
                    )
                p = full(f, p, axis)
            for axis in new_axes:
                shape[axis] = new[axis]
        return lax.reshape(p, shape)

    return f.map(_deferred.bind(equation, [f.base]), reshaped)


def _varied(f: Factored) -> frozenset[int]:
    """The axes that some factor owns. Any factor may own the others as well."""
    return frozenset().union(*(f.owned(p) for t in f.terms for p in (t.a, t.b)))


def _reshaped_together(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Pairs of axes of the two shapes that hold the same entries; not those of size 1."""
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


def slice_(context: Context, equation: Any, f: Factored) -> Factored:
    """A part of each axis; one entry of an axis is an index of it."""
    start, limit = (
        parameter(equation, "start_indices"),
        parameter(equation, "limit_indices"),
    )
    strides = parameter(equation, "strides") or (1,) * f.ndim
    base = _deferred.bind(equation, [f.base])
    _see_indexed(context, equation, f, base.shape)

    def cut(p):
        own = [p.shape[axis] == f.shape[axis] for axis in range(f.ndim)]
        return lax.slice(
            p,
            [i if owned else 0 for i, owned in zip(start, own, strict=True)],
            [i if owned else 1 for i, owned in zip(limit, own, strict=True)],
            [i if owned else 1 for i, owned in zip(strides, own, strict=True)],
        )

    return f.map(base, cut)


def dynamic_slice(context: Context, equation: Any, f: Factored, *starts: Any) -> Factored:
    """As `slice`, from positions that are arrays."""
    if not isinstance(f, Factored) or any(isinstance(i, Factored) for i in starts):
        raise NotFactorableError("the weight is an index of it")
    sizes = parameter(equation, "slice_sizes")
    _see_indexed(context, equation, f, sizes, dynamic=True)

    def cut(p):
        own = [p.shape[axis] == f.shape[axis] for axis in range(f.ndim)]
        zero = jnp.zeros_like(starts[0])
        at = [
            i if owned else zero.astype(jnp.asarray(i).dtype)
            for i, owned in zip(starts, own, strict=True)
        ]
        shape = [size if owned else 1 for size, owned in zip(sizes, own, strict=True)]
        return lax.dynamic_slice(p, at, shape)

    return f.map(_deferred.bind(equation, [f.base, *starts]), cut)


def _see_indexed(
    context: Context,
    equation: Any,
    f: Factored,
    sizes: Sequence[int],
    *,
    dynamic: bool = False,
) -> None:
    """Records the axes of which one entry is taken, or a run that starts anywhere."""
    indexed = [
        size != whole and (size == 1 or dynamic)
        for size, whole in zip(sizes, f.shape, strict=True)
    ]
    if any(indexed):
        roles = ["indexed" if i else "" for i in indexed]
        context.see(f, equation, roles, moved=True)


def rev(context: Context, equation: Any, f: Factored) -> Factored:
    """Axes backwards; an axis of size 1 is the same both ways."""
    axes = parameter(equation, "dimensions")
    return f.map(_deferred.bind(equation, [f.base]), lambda p: lax.rev(p, axes))


def split(context: Context, equation: Any, f: Factored) -> list[Factored]:
    """Pieces of one axis."""
    sizes, axis = parameter(equation, "sizes"), parameter(equation, "axis")
    bases = _deferred.bind(equation, [f.base])
    pieces, start = [], 0
    for base, size in zip(bases, map(int, sizes), strict=True):
        _see_indexed(context, equation, f, base.shape)
        pieces.append(f.map(base, lambda p, at=(start, size): _piece(f, p, axis, *at)))
        start += size
    return pieces


def _piece(f: Factored, p: jax.Array, axis: int, start: int, size: int) -> jax.Array:
    if p.shape[axis] != f.shape[axis]:
        return p
    return lax.slice_in_dim(p, start, start + size, axis=axis)


def unstack(context: Context, equation: Any, f: Factored) -> list[Factored]:
    """The entries of one axis."""
    axis = parameter(equation, "axis")
    sizes = [1 if i == axis else size for i, size in enumerate(f.shape)]
    _see_indexed(context, equation, f, sizes)
    return [
        f.map(base, lambda p, i=i: lax.squeeze(_piece(f, p, axis, i, 1), [axis]))
        for i, base in enumerate(_deferred.bind(equation, [f.base]))
    ]


def tile(context: Context, equation: Any, f: Factored) -> Factored:
    """Axes repeated; an axis that a factor does not own repeats as it is."""
    repeats = parameter(equation, "reps")

    def tiled(p):
        times = [
            n if p.shape[axis] == f.shape[axis] else 1 for axis, n in enumerate(repeats)
        ]
        return jnp.tile(p, times)

    return f.map(_deferred.bind(equation, [f.base]), tiled)


def pad(context: Context, equation: Any, f: Any, fill: Any) -> Factored:
    """Axes made longer at their ends: factors by 0, the weight by the fill value."""
    widths = parameter(equation, "padding_config")
    if not isinstance(f, Factored) or isinstance(fill, Factored):
        raise NotFactorableError("the weight is the value to pad with")
    if f.columns:
        raise NotFactorableError("the fill value would be scaled as DoRA scales the weight")
    if any(inside or min(low, high) < 0 for low, high, inside in widths):
        raise NotFactorableError("it pads between entries, or cuts them off")
    terms = f.terms
    for axis, (low, high, _) in enumerate(widths):
        if low or high:
            terms = tuple(_padded(context, f, term, axis, low, high) for term in terms)
    return f.replace(base=_deferred.bind(equation, [f.base, fill]), terms=terms)


def _padded(
    context: Context, f: Factored, term: Term, axis: int, low: int, high: int
) -> Term:
    """The term with zeros around an axis, in a factor that owns it; in `a` if none does."""
    owners = axis in f.owned(term.a), axis in f.owned(term.b)
    pads = owners if any(owners) or context.probing else (True, False)

    def pad_factor(p):
        return _pad_axis(full(f, p, axis), axis, low, high, 0.0)

    a, b = (
        p.map(pad_factor) if owned else p
        for p, owned in zip((term.a, term.b), pads, strict=True)
    )
    return Term(a, b, term.label)


def _pad_axis(p: jax.Array, axis: int, low: int, high: int, value: float) -> jax.Array:
    widths = [(low, high, 0) if i == axis else (0, 0, 0) for i in range(p.ndim)]
    return lax.pad(p, jnp.asarray(value, p.dtype), widths)


def concatenate(context: Context, equation: Any, *values: Any) -> Factored:
    """Weights side by side, such as fused query, key and value."""
    base = _deferred.bind(equation, [base_of(value) for value in values])
    return _joined(context, values, parameter(equation, "dimension"), base)


def stack(context: Context, equation: Any, *values: Any) -> Factored:
    """Weights along a new axis."""
    axis = parameter(equation, "axis")
    base = _deferred.bind(equation, [base_of(value) for value in values])
    longer = [
        v.map(_longer(v, axis), lambda p: lax.expand_dims(p, [axis]))
        if isinstance(v, Factored)
        else lax.expand_dims(v, [axis])
        for v in values
    ]
    return _joined(context, longer, axis, base)


def _longer(value: Factored, axis: int) -> Any:
    """The shape of a weight with a new axis, for a sum of which the base is known."""
    shape = (*value.shape[:axis], 1, *value.shape[axis:])
    return jax.ShapeDtypeStruct(shape, value.dtype)


def _joined(
    context: Context, values: Sequence[Any], axis: int, base: jax.Array
) -> Factored:
    """The factored value of weights joined along `axis`.

    Where it is a batch axis, their terms become one, of which both factors own it.
    Otherwise each term keeps to its part: it is padded with zeros, and columns with ones.
    """
    if not context.probing and (stacked := joined_in_batch(values, axis, base)) is not None:
        return stacked
    total, start = base.shape[axis], 0
    terms, columns = [], []
    for value in values:
        size = value.shape[axis]
        low, high = start, total - start - size
        start += size
        if isinstance(value, Factored):
            terms += [_padded(context, value, t, axis, low, high) for t in value.terms]
            columns += [
                _pad_axis(full(value, column, axis), axis, low, high, 1.0)
                for column in value.columns
            ]
    return Factored(base, tuple(terms), tuple(columns))


RULES = {
    "transpose": transpose,
    "squeeze": squeeze,
    "broadcast_in_dim": broadcast_in_dim,
    "reshape": reshape,
    "slice": slice_,
    "dynamic_slice": dynamic_slice,
    "rev": rev,
    "split": split,
    "unstack": unstack,
    "tile": tile,
    "pad": pad,
    "concatenate": concatenate,
    "stack": stack,
}
