"""Joins weights along a batch axis into one value with one term.

An example is a list of layers that is stacked for `lax.scan`. With one padded term for each
layer, the cost of every layer would grow with the number of layers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import numerics
from lora_jax.transform._factored import (
    RANK,
    Factor,
    Factored,
    Label,
    Term,
    from_leading,
    full,
)


class _Piece(NamedTuple):
    """All terms of one weight, combined into one.

    Attributes:
        a: `(rank, *axes)`, multiplied by the scales if they differ.
        b: `(rank, *axes)`.
        axes: the axes that `a` owns and the axes that `b` owns, without the joined axis.
        scale: the scale of the combined term.
        dropout: the dropout rate of the combined term.
    """

    a: jax.Array
    b: jax.Array
    axes: tuple[frozenset[int], frozenset[int]]
    scale: float
    dropout: float


def joined_in_batch(values: Sequence[Any], axis: int, base: jax.Array) -> Factored | None:
    """Weights joined along `axis`, with one term, both factors of which own the axis.

    Dense weights get a term of zeros. None if the terms do not fit into one.
    """
    pieces = [_piece(v, axis) for v in values if isinstance(v, Factored)]
    known = [piece for piece in pieces if piece is not None]
    if len(known) != len(pieces):
        return None
    first = known[0]
    turned = [piece.axes != first.axes for piece in known]
    known = [_swapped(p) if t else p for p, t in zip(known, turned, strict=True)]
    alike = {(piece.axes, piece.dropout) for piece in known}
    if len(alike) != 1:
        return None
    scale = _common([piece.scale for piece in known])
    left = iter(known)
    parts = [next(left) if isinstance(v, Factored) else None for v in values]
    a, b = (
        _join([_side(p, side, scale) for p in parts], values, axis) for side in ("a", "b")
    )
    swapped = _names_swapped([v for v in values if isinstance(v, Factored)], turned)
    flags = tuple(swapped.values()) if any(swapped.values()) else ()
    by_slot = any(v.by_slot for v in values if isinstance(v, Factored))
    label = Label(tuple(swapped), scale, first.dropout, flags, by_slot=by_slot)
    term = Term(from_leading(a), from_leading(b), label)
    return Factored(base, (term,), _columns(values, axis))


def sum_of_parts(terms: Sequence[Term]) -> Term:
    """Adds terms for disjoint parts of a stack into one term.

    Outside of its part, both factors of a term are zero. Smaller ranks are padded with
    zeros.
    """
    scale = _common([term.label.scale for term in terms])
    rank = max(term.a.rank for term in terms)
    names = tuple(name for term in terms for name in term.label.names)
    a = _sum([term.a for term in terms], [1.0] * len(terms), rank)
    b = _sum([term.b for term in terms], [t.label.scale / scale for t in terms], rank)
    first = terms[0].label
    label = dataclasses.replace(first, names=names, scale=scale, swapped=())
    return Term(a, b, label)


def _common(scales: Sequence[float]) -> float:
    """The scale of a term that is made of some: theirs, or 1 if they differ or are 0."""
    first, *rest = {*scales}
    return 1.0 if rest else first or 1.0


def _sum(factors: Sequence[Factor], by: Sequence[float], rank: int) -> Factor:
    """The sum of factors, each multiplied by a number and padded to `rank`."""
    dtype = numerics.promote(*(factor.array.dtype for factor in factors))
    if any(number != 1.0 for number in by):
        dtype = numerics.accumulation_dtype(dtype)
    total: Any = None
    for factor, number in zip(factors, by, strict=True):
        missing = [
            (0, rank - factor.rank if axis == RANK else 0, 0) for axis in factor.axes
        ]
        array = _scaled(factor.array.astype(dtype), number)
        array = lax.pad(array, jnp.zeros((), dtype), missing)
        total = array if total is None else total + array
    return dataclasses.replace(factors[0], stored=total, scale=None)


def _names_swapped(
    values: Sequence[Factored], turned: Sequence[bool]
) -> dict[str | int, bool]:
    """For each weight, whether its factors are exchanged, now or by an earlier join."""
    swapped: dict[str | int, bool] = {}
    for value, now in zip(values, turned, strict=True):
        for label in (term.label for term in value.terms):
            before = label.swapped or (False,) * len(label.names)
            for name, own in zip(label.names, before, strict=True):
                swapped.setdefault(name, own != now)
    return swapped


def _piece(value: Factored, axis: int) -> _Piece | None:
    """The terms of a weight, combined into one; None if they do not fit."""
    owned = {(value.owned(term.a), value.owned(term.b)) for term in value.terms}
    dropouts = {term.label.dropout for term in value.terms}
    if len(owned) != 1 or len(dropouts) != 1 or value.gathered:
        return None
    ((of_a, of_b),) = owned
    if (axis in of_a) != (axis in of_b):
        return None
    scale = _common([term.label.scale for term in value.terms])
    a = [_scaled(t.a.leading(), t.label.scale / scale) for t in value.terms]
    b = [term.b.leading() for term in value.terms]
    dtype = numerics.promote(*(factor.dtype for factor in (*a, *b)))
    a, b = (jnp.concatenate([p.astype(dtype) for p in side]) for side in (a, b))
    axes = of_a - {axis}, of_b - {axis}
    return _Piece(a, b, axes, scale, dropouts.pop())


def _scaled(array: jax.Array, by: float) -> jax.Array:
    return array if by == 1.0 else numerics.multiply(array, by)


def _swapped(piece: _Piece) -> _Piece:
    """The same term with its factors exchanged."""
    return piece._replace(a=piece.b, b=piece.a, axes=piece.axes[::-1])


def _side(piece: _Piece | None, side: str, scale: float) -> jax.Array | None:
    """One factor of a piece, rescaled for a term with the given scale."""
    if piece is None:
        return None
    array = getattr(piece, side)
    return _scaled(array, piece.scale / scale) if side == "a" else array


def _join(
    factors: Sequence[jax.Array | None], values: Sequence[Any], axis: int
) -> jax.Array:
    """Joins `(rank, *axes)` factors. Smaller ranks are padded with zeros."""
    known = [factor for factor in factors if factor is not None]
    rank = max(factor.shape[0] for factor in known)
    dtype = numerics.promote(*(factor.dtype for factor in known))
    others = [max(f.shape[i] for f in known) for i in range(known[0].ndim)]
    parts = []
    for factor, value in zip(factors, values, strict=True):
        shape = (rank, *others[1 : 1 + axis], value.shape[axis], *others[2 + axis :])
        if factor is None:
            parts.append(jnp.zeros(shape, dtype))
            continue
        whole = jnp.broadcast_to(factor.astype(dtype), (factor.shape[0], *shape[1:]))
        missing = [(0, rank - factor.shape[0], 0), *[(0, 0, 0)] * (whole.ndim - 1)]
        parts.append(lax.pad(whole, jnp.zeros((), dtype), missing))
    return lax.concatenate(parts, 1 + axis)


def _columns(values: Sequence[Any], axis: int) -> tuple[jax.Array, ...]:
    """The product of each weight's columns, joined; ones for weights without columns."""
    columns = [list(v.columns) if isinstance(v, Factored) else [] for v in values]
    known = [column for own in columns for column in own]
    if not known:
        return ()
    dtype = numerics.promote(*(column.dtype for column in known))
    others = [max(c.shape[i] for c in known) for i in range(known[0].ndim)]
    parts = []
    for own, value in zip(columns, values, strict=True):
        shape = (*others[:axis], value.shape[axis], *others[axis + 1 :])
        part = jnp.ones(shape, dtype)
        for column in own:
            part = part * full(value, column, axis).astype(dtype)
        parts.append(part)
    return (lax.concatenate(parts, axis),)
