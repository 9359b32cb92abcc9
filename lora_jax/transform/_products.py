"""Products of an activation with a factored weight: with one factor, then with the other.

Axes have names. If the activation and the weight share a name, the axis is a batch axis if
the result has the name too, and is contracted otherwise. The `(in, out)` product of the
factors is never computed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import numerics
from lora_jax.lowrank import contraction
from lora_jax.lowrank.contraction import RANK, SLOT, Name, Named, Names, named
from lora_jax.transform._context import Context
from lora_jax.transform._factored import Factored, Term, owned, place
from lora_jax.transform._slots import RowAxes, collect, masked
from lora_jax.transform._statistics import Statistic, observed

# The assumed size of a symbolic axis when the order of the products is chosen.
_SYMBOLIC_SIZE = 1024


class Product(NamedTuple):
    """A product of an activation with a factored weight. Static.

    Attributes:
        x_names: the names of the axes of the activation.
        weight_names: the names of the axes of the weight.
        out_names: the names of the axes of the result.
        column_names: for each column that scales the result, the names of its axes.
        precision: as in `lax.dot_general`, with the activation as the first operand.
        x_shape: the sizes of the named axes of the activation, which is reshaped to it.
        out_shape: the same of the result.
        row_names: the names of the axes whose indices have factors of their own.
        dense: whether the factors of all slots are multiplied; see `_slots`.
        statistic: what the gradient of the first factor is; see `_statistics`.
    """

    x_names: Names
    weight_names: Names
    out_names: Names
    column_names: tuple[Names, ...]
    precision: Any
    x_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    row_names: Names = ()
    dense: bool = False
    statistic: Statistic = ""


def add_terms(
    context: Context,
    f: Factored,
    product: Product,
    x: jax.Array,
    base: jax.Array,
    columns: Sequence[jax.Array],
    rows: RowAxes | None = None,
) -> jax.Array:
    """Adds the products with the terms to `base`, the product with the frozen weight.

    The result is `columns * (base + updates)`, rounded once to the dtype of `base`. `rows`
    says where the rows of the batch are, if the factors differ between slots.
    """
    keys = [context.dropout(term.label, x)[1] for term in f.terms]
    # The names of the weights are removed, so that layers share one trace.
    terms = tuple(term.named(()) for term in f.terms)
    own: Any = None
    if rows is not None:
        collected = [collect(term, rows.own, dense=rows.dense) for term in terms]
        terms = tuple(term for term, _ in collected)
        own = rows.own.numbers, [scales for _, scales in collected]
    static = product, f.shape, f.dtype
    return _add_terms(x, base, terms, keys, list(columns), own, static)


@functools.partial(jax.jit, static_argnums=6, inline=True)  # traced once for equal shapes
def _add_terms(
    x: jax.Array,
    base: jax.Array,
    terms: tuple[Term, ...],
    keys: Sequence[jax.Array | None],
    columns: Sequence[jax.Array],
    own: tuple[jax.Array, Sequence[jax.Array]] | None,
    static: tuple[Product, tuple[int, ...], Any],
) -> jax.Array:
    product, shape, dtype = static
    f = Factored(jax.ShapeDtypeStruct(shape, dtype), terms)  # pyright: ignore
    rows, out_names = _fold(product, x)
    sizes = dict(zip(product.out_names, product.out_shape, strict=True))
    numbers, scales = (None, [None] * len(terms)) if own is None else own
    folded = [math.prod(sizes[(name,)] for name in run) for run in out_names]

    def placed(update: Named) -> jax.Array:
        return place(update.array, update.names, out_names)

    product = product._replace(out_names=out_names)
    updates = (
        placed(_update(f, term, key, rows, product, numbers, scale))
        for term, key, scale in zip(terms, keys, scales, strict=True)
    )
    scaled = (
        place(column, names, out_names)
        for column, names in zip(columns, product.column_names, strict=True)
    )
    out = numerics.sum_and_round(base.reshape(folded), updates, scaled)
    return out.reshape(base.shape)


def project(
    context: Context,
    term: Term,
    x: jax.Array,
    factor: jax.Array,
    dtype: Any,
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    rank_axis: int,
) -> jax.Array:
    """The first of the two products of a term, if it is not a `lax.dot_general`.

    Returns:
        `scale * multiply(x, factor)` in `factor_dtype(dtype)`, with dropout on `x`. Its
        axis `rank_axis` has the rank.
    """
    rate, key = context.dropout(term.label, x)
    dtype = numerics.factor_dtype(dtype)

    @jax.checkpoint
    def product(x, factor):
        return multiply(x.astype(dtype), factor.astype(dtype))

    if context.statistic:
        by = functools.partial(product, factor=factor)
        return observed(by, x.astype(dtype), context.statistic, rank_axis)
    out = contraction.dropped(product, x, factor, rate, key)
    scale = term.label.scale / (1.0 - rate)
    return numerics.multiply(out, scale).astype(dtype)


def precision_for(precision: Any, x: jax.Array, dtype: Any) -> Any:
    """The precision for a product that runs in `dtype`.

    An algorithm of the equation is dropped if the dtype differs from that of `x`, since an
    algorithm supports certain dtypes only.
    """
    known = isinstance(precision, lax.Precision | tuple)
    return precision if known or x.dtype == dtype else None


def _fold(product: Product, x: jax.Array) -> tuple[Named, Names]:
    """Folds adjacent axes that the weight lacks into one; see `contraction.fold`.

    Returns the folded activation, and the names of the axes of the folded result.
    """
    unfolded = Named(x, product.x_names, product.x_shape)
    rows = contraction.fold(unfolded, {*product.weight_names, *product.row_names})
    runs = {run[:1]: run for run in rows.names}
    inner = {(name,) for run in rows.names for name in run[1:]}
    out_names = [runs.get(name, name) for name in product.out_names if name not in inner]
    return rows, tuple(out_names)


def _update(
    f: Factored,
    term: Term,
    key: jax.Array | None,
    x: Named,
    product: Product,
    slots: jax.Array | None,
    scales: jax.Array | None,
) -> Named:
    """`scale * (x @ first factor) @ second factor`, in at least float32.

    `slots` and `scales` are those of the rows. In the dense form `scales` has a slot axis.
    """
    dtype = dtype_of_factors(x.array, f, product.statistic)
    precision = precision_for(product.precision, x.array, dtype)
    a, b = (owned(f, p, product.weight_names) for p in (term.a, term.b))
    own: Names = product.row_names
    if product.dense:
        own, slots = (*own, SLOT), None
    elif slots is not None:
        a, b = (_of_rows(p, own, slots.shape) for p in (a, b))
    x = _sum_unowned(x, product, {*a.names, *b.names})
    first, second = (a, b) if _a_is_first(x, a, b, product.out_names) else (b, a)
    keep = {RANK, *product.out_names, *second.names}
    rate = 0.0 if key is None else term.label.dropout
    order = (*product.row_names, RANK) if slots is not None else (RANK,)
    order += tuple(name for name in first.names if name not in order)
    if product.statistic:
        down = _observed(x, first, keep, dtype, order, product.statistic)
    else:
        down = contraction.contract(
            x, first, keep, dtype, precision, order=order, rate=rate, key=key, slots=slots
        )
    scale = term.label.scale / (1.0 - rate)
    if scales is not None:
        by = place(scales, own, down.names)
        down = down._replace(array=masked(down.array, by))
    return contraction.up(down, second, product.out_names, scale, dtype, precision, slots)


def _observed(
    x: Named, factor: Named, keep: set[Name], dtype: Any, order: Names, statistic: Statistic
) -> Named:
    """The product with the first factor, with a statistic of `x` as its gradient."""
    x = x._replace(array=x.array.astype(dtype))

    def contract(array: jax.Array) -> Named:
        of = x._replace(array=array)
        return contraction.contract(of, factor, keep, dtype, "highest", order=order)

    out = contract(x.array)  # only its names are used
    array = observed(
        lambda array: contract(array).array, x.array, statistic, out.names.index(RANK)
    )
    return out._replace(array=array)


def dtype_of_factors(x: jax.Array, f: Factored, statistic: Statistic) -> Any:
    """The dtype of the products with the factors; at least float32 for a statistic."""
    dtype = numerics.factor_dtype(numerics.promote(x.dtype, f.dtype))
    return numerics.accumulation_dtype(dtype) if statistic else dtype


def _of_rows(factor: Named, names: Names, sizes: tuple[int, ...]) -> Named:
    """A factor of all slots, with the axes of the rows in place of that of the slots."""
    _, *own = factor.names
    return Named(factor.array, (*names, *own), (*sizes, *factor.shape[1:]))


def _sum_unowned(x: Named, product: Product, known: set[Name]) -> Named:
    """The activation, summed over the contracted axes that neither factor owns."""
    known = known | {*product.out_names}
    gone = [axis for axis, name in enumerate(x.names) if name not in known]
    if not gone:
        return x
    array = jnp.sum(x.array.reshape(x.shape), axis=gone)
    return named(array, tuple(name for name in x.names if name in known))


def _a_is_first(x: Named, a: Named, b: Named, out_names: Names) -> bool:
    """Whether it takes fewer multiplications to multiply by `a` first."""
    sizes = {
        name: size
        for operand in (x, a, b)
        for name, size in zip(operand.names, operand.shape, strict=True)
    }
    for name, size in sizes.items():
        sizes[name] = size if isinstance(size, int) else _SYMBOLIC_SIZE

    def cost(first: Named, second: Named) -> int:
        step_1 = {*x.names, *first.names}
        step_2 = step_1 & {RANK, *out_names, *second.names} | {*second.names}
        return sum(math.prod(sizes[name] for name in step) for step in (step_1, step_2))

    return cost(a, b) <= cost(b, a)
