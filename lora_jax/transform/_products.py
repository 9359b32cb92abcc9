"""Products of an activation with a factored weight: with one factor, then with the other.

Axes go by names. A weight's axes and those of the activation that they are multiplied with
have the same name; a name that the result has as well is a batch axis, one that it lacks is
contracted. The `(in, out)`-sized product of the factors never exists.

A run of token axes is folded to one where that is of use (see `_numerics.fold`), so a name
is a tuple: of one axis, or of those of a run.
"""

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax import _compat, _numerics
from lora_jax.transform._context import Context
from lora_jax.transform._factored import Factored, Term, place

Name = tuple[Hashable, ...]
RANK: Name = ("rank",)

# What an axis counts as in choosing the order of the products, if its size is symbolic.
_SYMBOLIC_SIZE = 1024


class Named(NamedTuple):
    """An array and the names of its axes.

    Attributes:
        array: with as many entries as `shape`, in their order.
        names: of the axes.
        shape: of the axes. That of the array, but for an activation that is still to be
            folded: it is reshaped where nothing made of it is kept.
    """

    array: jax.Array
    names: tuple[Name, ...]
    shape: tuple[int, ...]


class Product(NamedTuple):
    """A product of an activation with a factored weight.

    Attributes:
        x: the activation.
        weight_names: of the axes of the weight.
        out_names: of the axes of the result.
        precision: as `lax.dot_general` takes it, the activation's side first.
    """

    x: Named
    weight_names: tuple[Name, ...]
    out_names: tuple[Name, ...]
    precision: Any


def add_terms(
    context: Context, f: Factored, product: Product, base: jax.Array
) -> jax.Array:
    """`base`, the product with the frozen weight, plus those with the terms.

    Returns:
        As `base`. The sum is formed in at least float32 and rounded once.
    """
    dtype = _numerics.promote(product.x.array.dtype, f.dtype)
    wide = _numerics.accumulation_dtype(base.dtype)
    sizes = dict(zip(product.out_names, base.shape, strict=True))
    folded = _fold(product)
    out = base.astype(wide)
    for term in f.terms:
        update = _update(context, f, term, folded, dtype)
        known = {(name,) for run in update.names for name in run}
        shape = [sizes[name] if name in known else 1 for name in product.out_names]
        array = place(update.array, update.names, folded.out_names)
        array = array.reshape(shape).astype(wide)
        out = out + _compat.reshard_like(array, out)
    return out.astype(base.dtype)


def _fold(product: Product) -> Product:
    """The product with each run of axes that the weight lacks as one axis."""
    x, weight_names, out_names, _ = product
    if jax.default_backend() != "cpu" or any(_compat.explicit_spec(x.array)):
        return product
    names, shape = [], []
    for name, size in zip(x.names, x.shape, strict=True):
        if names and name not in weight_names and names[-1][-1:] not in weight_names:
            names[-1], shape[-1] = names[-1] + name, shape[-1] * size
        else:
            names.append(name)
            shape.append(size)
    runs = {run[:1]: run for run in names}
    inner = {(name,) for run in names for name in run[1:]}
    folded_out = tuple(runs.get(name, name) for name in out_names if name not in inner)
    x = Named(x.array, tuple(names), tuple(shape))
    return product._replace(x=x, out_names=folded_out)


def _update(
    context: Context, f: Factored, term: Term, product: Product, dtype: Any
) -> Named:
    """`scale * (x * first factor) * second factor`, wide."""
    a, b = (_owned(f, p, product.weight_names) for p in (term.a, term.b))
    x = _sum_unowned(product, {*a.names, *b.names})
    first, second = (a, b) if _a_is_first(x, a, b, product.out_names) else (b, a)
    keep = {RANK, *product.out_names, *second.names}
    down = _first_product(context, term, x, first, keep, dtype, product.precision)
    scaled = _numerics.multiply(down.array, term.label.scale).astype(dtype)
    up = down._replace(array=scaled)
    options, names = _options(up, second, {*product.out_names}, product.precision)
    array = _numerics.dot(scaled, second.array.astype(dtype), options)
    return Named(array, names, array.shape)


def _owned(f: Factored, p: jax.Array, names: Sequence[Name]) -> Named:
    """A factor as `(rank, *owned)`."""
    owned = f.owned(p)
    array = lax.squeeze(p, [1 + axis for axis in range(f.ndim) if axis not in owned])
    return Named(array, (RANK, *(names[axis] for axis in sorted(owned))), array.shape)


def _sum_unowned(product: Product, owned: set[Name]) -> Named:
    """The activation, summed over contracted axes that no factor varies along."""
    x = product.x
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


def _a_is_first(x: Named, a: Named, b: Named, out_names: Sequence[Name]) -> bool:
    """Whether the activation meets `a` first: the order with fewer multiplications."""
    sizes = {
        name: size if isinstance(size, int) else _SYMBOLIC_SIZE
        for named in (x, a, b)
        for name, size in zip(named.names, named.shape, strict=True)
    }

    def cost(first: Named, second: Named) -> int:
        step_1 = {*x.names, *first.names}
        step_2 = step_1 & {RANK, *out_names, *second.names} | {*second.names}
        return sum(math.prod(sizes[name] for name in step) for step in (step_1, step_2))

    return cost(a, b) <= cost(b, a)


class _First(NamedTuple):
    """The static part of a first product: folded shape, dropout rate, dtype, options."""

    shape: tuple[int, ...]
    rate: float
    dtype: Any
    options: _numerics.Dot


def _first_product(
    context: Context,
    term: Term,
    x: Named,
    factor: Named,
    keep: set[Name],
    dtype: Any,
    precision: Any,
) -> Named:
    """`drop(x) * factor`, wide."""
    options, names = _options(x, factor, keep, precision)
    rate = term.label.dropout if context.key is not None else 0.0
    static = _First(x.shape, rate, dtype, options)
    if rate:
        key = context.make_key(x.array)
        array = _project_dropped(x.array, factor.array, key, static)
        array = _numerics.multiply(array, 1.0 / (1.0 - rate))
    else:
        array = _project(x.array, factor.array, static)
    return Named(array, names, array.shape)


@functools.partial(jax.jit, static_argnums=2, inline=True)
@functools.partial(_numerics.keep_arguments, static=2)
def _project(x: jax.Array, factor: jax.Array, static: _First) -> jax.Array:
    """The product with `(rank, *axes)`; the barrier is that of `_numerics.project_down`."""
    rows = x.reshape(static.shape).astype(static.dtype)
    barred = lax.optimization_barrier(factor.astype(static.dtype))
    return _numerics.dot(rows, barred, static.options)


@functools.partial(jax.jit, static_argnums=3, inline=True)
@functools.partial(jax.checkpoint, static_argnums=3)  # draws the mask again
def _project_dropped(
    x: jax.Array, factor: jax.Array, key: jax.Array, static: _First
) -> jax.Array:
    """`_project` of `drop(x)`; the mask is not kept."""
    return _project(_numerics.drop(x, static.rate, key), factor, static)


def _options(
    x: Named, y: Named, keep: set[Name], precision: Any
) -> tuple[_numerics.Dot, tuple[Name, ...]]:
    """The options of a product, and the names of the axes of its result.

    Names that both have are batch axes if they are in `keep`, else contracted.
    """
    shared = [name for name in x.names if name in y.names]
    batch = [name for name in shared if name in keep]
    contracted = [name for name in shared if name not in keep]

    def axes(of: Named, names: Sequence[Name]) -> tuple[int, ...]:
        return tuple(of.names.index(name) for name in names)

    dimensions = (
        (axes(x, contracted), axes(y, contracted)),
        (axes(x, batch), axes(y, batch)),
    )
    rest = [name for name in (*x.names, *y.names) if name not in shared]
    names = (*batch, *rest)
    return _numerics.Dot(dimensions, precision, _out_sharding(x, y, names)), names


def _out_sharding(x: Named, y: Named, names: Sequence[Name]) -> PartitionSpec | None:
    """On a mesh with explicit axes, each axis sharded as in the operand it comes from."""
    specs = [_compat.explicit_spec(named.array) for named in (x, y)]
    if not any(map(any, specs)):
        return None
    of: dict[Name, Any] = {}
    for named, spec in zip((x, y), specs, strict=True):
        for name, axes in zip(named.names, spec, strict=True):
            of[name] = of.get(name) or axes
    used: set[Any] = set()
    out = []
    for name in names:
        axes = of[name] if isinstance(of[name], tuple) else (of[name],)
        free = not used.intersection(axes)
        used.update(axis for axis in axes if axis is not None)
        out.append(of[name] if free else None)
    return PartitionSpec(*out)
