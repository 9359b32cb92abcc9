"""The rule for gathers: rows of an embedding table, and entries of a batch axis."""

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


def gather(context: Context, equation: Any, f: Any, indices: Any) -> Factored:
    """Slices of the weight, and the same slices of each factor.

    Rows of a table are activations, unlike entries of a batch axis. They are merged at
    their first use, unless that is a product.
    """
    row = MOVES["gather"]
    check_weight_is(row.operand, (f, indices), Factored, row.otherwise)
    (own,) = row.moves(equation)
    # If the adapter is for one kind of use, the next use of the rows decides the kind.
    context.see_indexed(f, equation, own.indexed, moved=f.has_uses)
    base = _deferred.bind(equation, [f.base, indices])
    taken = frozenset(axis for axis, is_taken in enumerate(own.indexed) if is_taken)
    fills = parameter(equation, "mode") == lax.GatherScatterMode.FILL_OR_DROP
    found = _found(equation, f, indices, base.ndim, taken) if fills else None
    # DoRA may scale filled entries only if they are 0.
    stays = equation.params.get("fill_value") == 0

    def factor(p, owns):  # zero in filled slices
        out = _gather(equation, f, p, indices, base.ndim, 0.0)
        return out if found is None or owns else out * found.astype(out.dtype)

    def column(p):  # one in filled slices
        out = _gather(equation, f, p, indices, base.ndim, 1.0)
        owns = stays or taken <= f.owned(p)
        return out if found is None or owns else jnp.where(found, out, 1)

    def slices(term):  # one zero factor is enough
        owns = any(taken <= f.owned(p) for p in (term.a, term.b))
        a = term.a.map(lambda p: factor(p, owns))
        return Term(a, term.b.map(lambda p: factor(p, True)), term.label)

    terms, columns = tuple(map(slices, f.terms)), tuple(map(column, f.columns))
    rows = any(f.owned(term.a) & taken != f.owned(term.b) & taken for term in f.terms)
    kind = kind_of_rows(taken, is_constant=context.is_constant(indices)) if rows else ""
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
) -> jax.Array:
    """The slices of a factor or column; axes that it does not own have size 1."""
    numbers = parameter(equation, "dimension_numbers")
    sizes, collapsed = parameter(equation, "slice_sizes"), numbers.collapsed_slice_dims
    offsets = numbers.offset_dims
    own = [p.shape[axis] == f.shape[axis] for axis in range(f.ndim)]
    shape = [size if owned else 1 for size, owned in zip(sizes, own, strict=True)]
    starts = enumerate(numbers.start_index_map)
    places = [i for i, axis in starts if own[axis] and sizes[axis] != f.shape[axis]]
    if not places:
        return _place(p, shape, collapsed, offsets, ndim)
    part = lax.GatherDimensionNumbers(
        offset_dims=offsets,
        collapsed_slice_dims=collapsed,
        start_index_map=tuple(numbers.start_index_map[i] for i in places),
    )
    if len(places) != len(numbers.start_index_map):
        indices = jnp.take(indices, np.array(places), axis=-1)
    return lax.gather(
        p, indices, part, shape, mode=parameter(equation, "mode"), fill_value=fill
    )


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
