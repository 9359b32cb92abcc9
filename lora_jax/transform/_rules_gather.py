"""The rule for gathers: rows of an embedding table, and entries of a batch axis."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.transform import _deferred
from lora_jax.transform._context import Context
from lora_jax.transform._factored import Factored, Term
from lora_jax.transform._moves import MOVES
from lora_jax.transform._parameters import check_weight_is, parameter
from lora_jax.transform._slots import Own, of_all, of_result


def gather(context: Context, equation: Any, f: Any, indices: Any) -> Factored:
    """Slices of the weight, and the same slices of each factor.

    Rows of a table are activations, unlike entries of a batch axis. They are merged at
    their first use, unless that is a product.
    """
    row = MOVES["gather"]
    check_weight_is(row.operand, (f, indices), Factored, row.otherwise)
    (own,) = row.moves(equation)
    # If the adapter is for one kind of use, the next use of the rows decides the kind.
    context.see(f, equation, own.roles, moved=f.has_uses)
    base = _deferred.bind(equation, [f.base, indices])
    taken = frozenset(axis for axis, is_taken in enumerate(own.indexed) if is_taken)
    fills = parameter(equation, "mode") == lax.GatherScatterMode.FILL_OR_DROP
    found = _found(equation, f, indices, base.ndim, taken) if fills else None
    # DoRA may scale filled entries only if they are 0.
    stays = equation.params.get("fill_value") == 0

    rows = any(f.owned(term.a) & taken != f.owned(term.b) & taken for term in f.terms)
    kind = kind_of_rows(taken, is_constant=context.is_constant(indices)) if rows else ""
    own = of_result(context, equation, 1) if f.by_slot and kind else None

    def part(p, fill):
        if own is None:
            return _gather(equation, f, p, indices, base.ndim, fill)
        return _gather_own(equation, f, p, indices, own, fill)

    def factor(p, owns):  # zero in filled slices
        out = part(p, 0.0)
        return out if found is None or owns else out * found.astype(out.dtype)

    def column(p):  # one in filled slices
        out = part(p, 1.0)
        return out if found is None or stays else jnp.where(found, out, 1)

    def slices(term):  # one zero factor is enough
        owns = any(taken <= f.owned(p) for p in (term.a, term.b))
        a = term.a.map(lambda p: factor(p, owns))
        by_slot = term.label.by_slot and own is None
        label = dataclasses.replace(term.label, by_slot=by_slot)
        return Term(a, term.b.map(lambda p: factor(p, True)), label)

    terms, columns = tuple(map(slices, f.terms)), tuple(map(column, f.columns))
    return f.replace(base=base, terms=terms, columns=columns, gathered=f.gathered or kind)


def kind_of_rows(
    taken: frozenset[int], *, is_constant: bool
) -> Literal["", "data", "constants"]:
    """How rows of a table are looked up; see `Factored.gathered`.

    Empty for constant indices of axes other than the first: they reorder columns.
    """
    if not is_constant:
        return "data"
    return "constants" if taken == frozenset(range(len(taken))) else ""


def _found(
    equation: Any, f: Factored, indices: jax.Array, ndim: int, indexed: frozenset[int]
) -> jax.Array:
    """Which slices are within bounds; the axes of a slice have size 1."""
    sizes = [size if axis in indexed else 1 for axis, size in enumerate(f.shape)]
    return _gather(equation, f, jnp.ones(sizes, "int8"), indices, ndim, 0) > 0


def _gather(
    equation: Any,
    f: Factored,
    p: jax.Array,
    indices: jax.Array,
    ndim: int,
    fill: int | float,
    slots: jax.Array | None = None,
) -> jax.Array:
    """The slices of a factor or column; axes that it does not own have size 1.

    With `slots`, each slice is from the factor of its slot.
    """
    numbers = parameter(equation, "dimension_numbers")
    sizes, collapsed = parameter(equation, "slice_sizes"), numbers.collapsed_slice_dims
    offsets = numbers.offset_dims
    own = [p.shape[axis] == f.shape[axis] for axis in range(f.ndim)]
    shape = [size if owned else 1 for size, owned in zip(sizes, own, strict=True)]
    indexed = enumerate(numbers.start_index_map)
    places = [i for i, axis in indexed if own[axis] and sizes[axis] != f.shape[axis]]
    if not places:
        return _place(p, shape, collapsed, offsets, ndim)
    if len(places) != len(numbers.start_index_map):
        indices = jnp.take(indices, np.array(places), axis=-1)
    starts = tuple(numbers.start_index_map[i] for i in places)
    if slots is not None:
        p, shape = of_all(p), [1, *shape]
        indices = jnp.concatenate([slots[..., None].astype(indices.dtype), indices], -1)
        collapsed, starts = ((0, *(i + 1 for i in own)) for own in (collapsed, starts))
    part = lax.GatherDimensionNumbers(
        offset_dims=offsets, collapsed_slice_dims=collapsed, start_index_map=starts
    )
    return lax.gather(
        p, indices, part, shape, mode=parameter(equation, "mode"), fill_value=fill
    )


def _gather_own(
    equation: Any, f: Factored, p: jax.Array, indices: jax.Array, own: Own, fill: float
) -> jax.Array:
    """As `_gather`, from the factor of each slice's slot; `own` has the result's axes.

    The result is `fill` for the base alone, and NaN for a slot out of range.
    """
    numbers, ndim = parameter(equation, "dimension_numbers"), own.ids.ndim
    wrong = (own.ids < -1) | (own.ids >= own.total)
    valid = (own.ids >= 0) & ~wrong
    chosen = jnp.where(valid, own.ids, 0)
    sizes = parameter(equation, "slice_sizes")
    taken = [i for i in numbers.start_index_map if sizes[i] != f.shape[i]]
    if any(p.shape[axis] == f.shape[axis] for axis in taken):
        slots = jnp.broadcast_to(
            lax.squeeze(chosen, numbers.offset_dims), indices.shape[:-1]
        )
        out = _gather(equation, f, p, indices, ndim, fill, slots)
    else:
        each = of_all(_gather(equation, f, p, indices, ndim, fill))
        out = jnp.take(each, chosen.reshape(-1), axis=0)
        # Of `(*rows, *axes)`, one of the two has size 1 along each axis of the result.
        out = out.reshape(*chosen.shape, *each.shape[1:])
        order = [axis for i in range(ndim) for axis in (i, ndim + i)]
        shape = map(operator.mul, chosen.shape, each.shape[1:])
        out = lax.transpose(out, order).reshape([*shape])
    return jnp.where(valid, out, jnp.where(wrong, jnp.nan, fill).astype(p.dtype))


def _place(
    p: jax.Array,
    shape: Sequence[int],
    collapsed: Sequence[int],
    offsets: Sequence[int],
    ndim: int,
) -> jax.Array:
    """The slice of a factor that owns no indexed axis: the same for every index."""
    p = lax.slice(p, [0] * p.ndim, shape)
    p = lax.squeeze(p, collapsed)
    new = [1] * ndim
    for size, axis in zip(p.shape, offsets, strict=True):
        new[axis] = size
    return lax.broadcast_in_dim(p, new, offsets)


RULES = {"gather": gather}
