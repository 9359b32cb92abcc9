"""Products of an activation with a factored weight: with one factor, then with the other.

Axes go by names. A weight's axes and those of the activation that they are multiplied with
have the same name; a name that the result has as well is a batch axis, one that it lacks is
contracted. The `(in, out)`-sized product of the factors never exists.

A run of token axes is folded to one where that is of use (see `_numerics.fold`), so a name
is a tuple: of one axis, or of those of a run.

The two products keep their arguments for the backward pass, and nothing that is made of
them (see `_numerics.keep_arguments`): an activation is folded, and a factor squeezed, cast
and transposed, inside.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import numerics
from lora_jax.transform._context import Context
from lora_jax.transform._factored import RANK, Factor, Factored, Term, place

Name = tuple[Hashable, ...]
Names = tuple[Name, ...]
_RANK: Name = ("rank",)

# What an axis counts as in choosing the order of the products, if its size is symbolic.
_SYMBOLIC_SIZE = 1024


class Product(NamedTuple):
    """A product of an activation with a factored weight. Static.

    Attributes:
        x_names: of the axes of the activation.
        weight_names: of the axes of the weight.
        out_names: of the axes of the result.
        column_names: of the axes of each column that scales the result.
        precision: as `lax.dot_general` takes it, the activation's side first.
    """

    x_names: Names
    weight_names: Names
    out_names: Names
    column_names: tuple[Names, ...]
    precision: Any


class Named(NamedTuple):
    """An array and the names of its axes.

    Attributes:
        array: with as many entries as `shape`, in their order.
        names: of the axes.
        shape: of the axes, which the array has yet to be reshaped to.
    """

    array: jax.Array
    names: Names
    shape: tuple[int, ...]


def add_terms(
    context: Context,
    f: Factored,
    product: Product,
    x: jax.Array,
    base: jax.Array,
    columns: Sequence[jax.Array],
) -> jax.Array:
    """`base`, the product with the frozen weight, plus those with the terms, scaled.

    Returns:
        As `base`. Formed in at least float32 and rounded once.
    """
    keys = [context.dropout(term.label, x)[1] for term in f.terms]
    # The names of the weights are no part of the program.
    terms = tuple(term.named(()) for term in f.terms)
    static = product, f.shape, f.dtype
    return _add_terms(x, base, terms, keys, list(columns), static)


@functools.partial(jax.jit, static_argnums=5, inline=True)  # traced once for all like it
def _add_terms(
    x: jax.Array,
    base: jax.Array,
    terms: tuple[Term, ...],
    keys: Sequence[jax.Array | None],
    columns: Sequence[jax.Array],
    static: tuple[Product, tuple[int, ...], Any],
) -> jax.Array:
    product, shape, dtype = static
    f = Factored(jax.ShapeDtypeStruct(shape, dtype), terms)  # pyright: ignore
    rows, out_names = _fold(product, x)
    sizes = dict(zip(product.out_names, base.shape, strict=True))
    folded = [math.prod(sizes[(name,)] for name in run) for run in out_names]
    wide = numerics.accumulation_dtype(base.dtype)
    out = base.astype(wide).reshape(folded)
    for term, key in zip(terms, keys, strict=True):
        update = _update(f, term, key, rows, product._replace(out_names=out_names))
        out = out + place(update.array, update.names, out_names).astype(wide)
    for column, names in zip(columns, product.column_names, strict=True):
        out = out * place(column.astype(wide), names, out_names)
    return out.astype(base.dtype).reshape(base.shape)


def project(
    context: Context,
    term: Term,
    x: jax.Array,
    factor: jax.Array,
    dtype: Any,
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """`scale * multiply(x, factor)` in `factor_dtype(dtype)`, with entries of `x` dropped.

    The first of the two products with the factors of a term, where that is not a
    `lax.dot_general`.
    """
    rate, key = context.dropout(term.label, x)
    dtype = numerics.factor_dtype(dtype)

    @jax.checkpoint  # draws the mask again
    def project(x, factor, key):
        dropped = numerics.drop(x, rate, key) if rate else x
        return multiply(dropped.astype(dtype), factor.astype(dtype))

    scale = term.label.scale / (1.0 - rate)
    return numerics.multiply(project(x, factor, key), scale).astype(dtype)


def precision_for(precision: Any, x: jax.Array, dtype: Any) -> Any:
    """The precision of products that the equation has in another dtype than `dtype`.

    An algorithm is one for certain dtypes.
    """
    known = isinstance(precision, lax.Precision | tuple)
    return precision if known or x.dtype == dtype else None


def _fold(product: Product, x: jax.Array) -> tuple[Named, Names]:
    """The activation with each run of axes that the weight lacks as one axis.

    Returns:
        The activation, and the names of the axes of a result that has the same runs.
    """
    weight_names = product.weight_names
    if jax.default_backend() != "cpu":
        return Named(x, product.x_names, x.shape), product.out_names
    names: list[Name] = []
    shape: list[int] = []
    for name, size in zip(product.x_names, x.shape, strict=True):
        if names and name not in weight_names and names[-1][-1:] not in weight_names:
            names[-1], shape[-1] = names[-1] + name, shape[-1] * size
        else:
            names.append(name)
            shape.append(size)
    runs = {run[:1]: run for run in names}
    inner = {(name,) for run in names for name in run[1:]}
    out_names = [runs.get(name, name) for name in product.out_names if name not in inner]
    return Named(x, tuple(names), tuple(shape)), tuple(out_names)


def _update(
    f: Factored, term: Term, key: jax.Array | None, x: Named, product: Product
) -> Named:
    """`scale * (x * first factor) * second factor`, wide."""
    dtype = numerics.factor_dtype(numerics.promote(x.array.dtype, f.dtype))
    product = product._replace(precision=precision_for(product.precision, x.array, dtype))
    a, b = (_owned(f, p, product.weight_names) for p in (term.a, term.b))
    x = _sum_unowned(x, product, {*a.names, *b.names})
    first, second = (a, b) if _a_is_first(x, a, b, product.out_names) else (b, a)
    first = first._replace(names=(_RANK, *(name for name in first.names if name != _RANK)))
    keep = {_RANK, *product.out_names, *second.names}
    options, names = _options(x, first, keep, product.precision)
    static = _Static(x.shape, first.gone, first.rank_axis, dtype, options)
    scale = term.label.scale
    if key is None:
        array = _multiply(x.array, first.array, static)
    else:
        array = _multiply_dropped(x.array, first.array, key, term.label.dropout, static)
        scale = scale / (1.0 - term.label.dropout)
    array = numerics.multiply(array, scale).astype(dtype)
    down = Named(array, names, array.shape)
    options, names = _options(down, second, {*product.out_names}, product.precision)
    static = _Static(down.shape, second.gone, None, dtype, options)
    array = _multiply(array, second.array, static)
    return Named(array, names, array.shape)


class _Owned(NamedTuple):
    """A factor that has yet to lose the axes it does not own.

    Attributes:
        array: with all axes.
        names: of those that stay, in their order; of a first factor the rank axis first.
        sizes: of all axes by their names.
        gone: those that go.
        rank_axis: the place of the rank axis among those that stay.
    """

    array: jax.Array
    names: Names
    sizes: dict[Name, int]
    gone: tuple[int, ...]
    rank_axis: int


def _owned(f: Factored, p: Factor, weight_names: Names) -> _Owned:
    owned = f.owned(p)
    names = [_RANK if axis == RANK else weight_names[axis] for axis in p.axes]
    kept = {_RANK, *(weight_names[axis] for axis in owned)}
    gone = tuple(axis for axis, name in enumerate(names) if name not in kept)
    left = tuple(name for name in names if name in kept)
    sizes = dict(zip(names, p.array.shape, strict=True))
    return _Owned(p.array, left, sizes, gone, left.index(_RANK))


def _sum_unowned(x: Named, product: Product, owned: set[Name]) -> Named:
    """The activation, summed over contracted axes that no factor varies along."""
    gone = [
        axis
        for axis, name in enumerate(x.names)
        if name not in owned and name not in product.out_names
    ]
    if not gone:
        return x
    array = jnp.sum(x.array.reshape(x.shape), axis=gone)
    names = tuple(name for axis, name in enumerate(x.names) if axis not in gone)
    return Named(array, names, array.shape)


def _a_is_first(x: Named, a: _Owned, b: _Owned, out_names: Names) -> bool:
    """Whether the activation meets `a` first: the order with fewer multiplications."""
    sizes = dict(zip(x.names, x.shape, strict=True))
    for factor in (a, b):
        sizes |= {name: factor.sizes[name] for name in factor.names}
    for name, size in sizes.items():
        sizes[name] = size if isinstance(size, int) else _SYMBOLIC_SIZE

    def cost(first: _Owned, second: _Owned) -> int:
        step_1 = {*x.names, *first.names}
        step_2 = step_1 & {_RANK, *out_names, *second.names} | {*second.names}
        return sum(math.prod(sizes[name] for name in step) for step in (step_1, step_2))

    return cost(a, b) <= cost(b, a)


class _Static(NamedTuple):
    """The static part of one product with a factor.

    Attributes:
        x_shape: what the activation is reshaped to.
        gone: axes of the factor that it does not own.
        rank_axis: where the rank axis is then, if it is to come first.
        dtype: that the product runs in.
        options: of the product.
    """

    x_shape: tuple[int, ...]
    gone: tuple[int, ...]
    rank_axis: int | None
    dtype: Any
    options: numerics.Dot


@functools.partial(numerics.keep_arguments, static=2)
def _multiply(x: jax.Array, factor: jax.Array, static: _Static) -> jax.Array:
    """One product, wide. The barrier is that of `_numerics.project_down`."""
    rows = x.reshape(static.x_shape).astype(static.dtype)
    factor = lax.squeeze(factor, static.gone).astype(static.dtype)
    if static.rank_axis is not None:
        factor = lax.optimization_barrier(jnp.moveaxis(factor, static.rank_axis, 0))
    return numerics.dot(rows, factor, static.options)


def _multiply_dropped(
    x: jax.Array, factor: jax.Array, key: jax.Array, rate: float, static: _Static
) -> jax.Array:
    """`_multiply` of `drop(x)`; the mask is not kept."""

    # A function of its own each time: JAX would use its trace on other meshes, too.
    @jax.checkpoint  # draws the mask again
    def multiply(x, factor, key):
        return _multiply(numerics.drop(x, rate, key), factor, static)

    return multiply(x, factor, key)


def _options(
    x: Named, factor: _Owned, keep: set[Name], precision: Any
) -> tuple[numerics.Dot, Names]:
    """The options of a product, and the names of the axes of its result.

    Names that both have are batch axes if they are in `keep`, else contracted.
    """
    shared = [name for name in x.names if name in factor.names]
    batch = [name for name in shared if name in keep]
    contracted = [name for name in shared if name not in keep]

    def axes(of: Names, names: Sequence[Name]) -> tuple[int, ...]:
        return tuple(of.index(name) for name in names)

    dimensions = (
        (axes(x.names, contracted), axes(factor.names, contracted)),
        (axes(x.names, batch), axes(factor.names, batch)),
    )
    rest = [name for name in (*x.names, *factor.names) if name not in shared]
    return numerics.Dot(dimensions, precision), (*batch, *rest)
