"""Rules for the primitives that move, pad or join axes.

Each rule applies the primitive to the frozen weight, the factors and the columns. An axis
that a factor does not own has size 1: slices of it start at 0. Rules see `(rank, *axes)`
factors as `(*axes)`; see `Factored.map`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.transform import _deferred
from lora_jax.transform._context import Context
from lora_jax.transform._factored import Factored, Term, base_of, full
from lora_jax.transform._joining import joined_in_batch
from lora_jax.transform._moves import MOVES, Move
from lora_jax.transform._parameters import NotFactorableError, check_weight_is, parameter


def move(context: Context, equation: Any, *values: Any) -> Any:
    """Applies a primitive in the table of moves to a weight and its factors."""
    name = equation.primitive.name
    row = MOVES[name]
    check_weight_is(row.operand, values, Factored, row.otherwise)
    f, *others = values
    moves = row.moves(equation)
    bases = _deferred.bind(equation, [f.base, *others])
    several = equation.primitive.multiple_results
    out = []
    for own, base in zip(moves, bases if several else [bases], strict=True):
        # All entries of an axis are one use; each piece of a split is a use.
        if any(own.indexed) and (name == "split" or not out):
            context.see(f, equation, own.roles, moved=True)
        _check_joins(f, own, base.shape)
        moved = functools.partial(_moved, own, others)
        out.append(context.masks.without_others(f, f.map(base, moved), moved))
    return out if several else out[0]


def _moved(move: Move, others: Sequence[Any], p: jax.Array) -> jax.Array:
    return move.of(p, *others)


def _check_joins(f: Factored, move: Move, shape: tuple[int, ...]) -> None:
    """Raises if a factor owns some of the axes that are joined, but not all of them.

    Axes that no factor owns do not count.
    """
    factors = [factor for term in f.terms for factor in (term.a, term.b)]
    varied = frozenset().union(*map(f.owned, factors))
    for new in range(len(shape)):
        joined = frozenset(axis for axis in range(f.ndim) if new in move.axes[axis])
        for p in (*factors, *f.columns):
            if joined & f.owned(p) and (joined & varied) - f.owned(p):
                raise NotFactorableError(
                    f"{f.shape} -> {shape} joins an input axis to an output axis"
                )


def pad(context: Context, equation: Any, f: Any, fill: Any) -> Factored:
    """Pads axes at their ends: factors with zeros, the weight with the fill value."""
    row = MOVES["pad"]
    check_weight_is(row.operand, (f, fill), Factored, row.otherwise)
    if f.columns:
        raise NotFactorableError("DoRA would scale the fill value with the weight")
    row.moves(equation)  # raises for paddings without a low-rank form
    widths = parameter(equation, "padding_config")
    terms = f.terms
    for axis, (low, high, _) in enumerate(widths):
        if low or high:
            terms = tuple(_padded(f, term, axis, low, high) for term in terms)
    return f.replace(base=_deferred.bind(equation, [f.base, fill]), terms=terms)


def _padded(f: Factored, term: Term, axis: int, low: int, high: int) -> Term:
    """The term, padded with zeros along an axis in a factor that owns it, or in `a`."""
    owners = axis in f.owned(term.a), axis in f.owned(term.b)
    pads = owners if any(owners) else (True, False)

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
    """Joins weights along an axis, such as fused query, key and value."""
    base = _deferred.bind(equation, [base_of(value) for value in values])
    return _joined(values, parameter(equation, "dimension"), base)


def stack(context: Context, equation: Any, *values: Any) -> Factored:
    """Joins weights along a new axis."""
    axis = parameter(equation, "axis")
    base = _deferred.bind(equation, [base_of(value) for value in values])
    longer = [
        v.map(_longer(v, axis), lambda p: lax.expand_dims(p, [axis]))
        if isinstance(v, Factored)
        else lax.expand_dims(v, [axis])
        for v in values
    ]
    return _joined(longer, axis, base)


def _longer(value: Factored, axis: int) -> Any:
    """The value with a new axis; its base is only a shape."""
    shape = (*value.shape[:axis], 1, *value.shape[axis:])
    return jax.ShapeDtypeStruct(shape, value.dtype)


def _joined(values: Sequence[Any], axis: int, base: jax.Array) -> Factored:
    """The factored value of weights joined along `axis`.

    Along a batch axis the terms become one term, both factors of which own the axis.
    Otherwise each term is padded with zeros, and each column with ones.
    """
    if (stacked := joined_in_batch(values, axis, base)) is not None:
        return stacked
    total, start = base.shape[axis], 0
    shared = _shared_columns(values, axis)
    terms, columns = [], []
    for value in values:
        size = value.shape[axis]
        low, high = start, total - start - size
        start += size
        if isinstance(value, Factored):
            terms += [_padded(value, t, axis, low, high) for t in value.terms]
            columns += [
                _pad_axis(full(value, column, axis), axis, low, high, 1.0)
                for column in value.columns
            ]
    return Factored(base, tuple(terms), tuple(columns) if shared is None else shared)


def _shared_columns(values: Sequence[Any], axis: int) -> tuple[jax.Array, ...] | None:
    """The columns, if all weights share them and they have size 1 along `axis`."""
    columns = [v.columns if isinstance(v, Factored) else () for v in values]
    alike = all([*map(id, own)] == [*map(id, columns[0])] for own in columns)
    return columns[0] if alike and all(c.shape[axis] == 1 for c in columns[0]) else None


_OF_ONE = (
    *("transpose", "squeeze", "broadcast_in_dim", "reshape", "slice", "dynamic_slice"),
    *("rev", "split", "unstack", "tile"),
)
RULES = {
    **dict.fromkeys(_OF_ONE, move),
    "pad": pad,
    "concatenate": concatenate,
    "stack": stack,
}
