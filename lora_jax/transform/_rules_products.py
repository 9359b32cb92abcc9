"""Rules for the products that contract a weight: `dot_general` and `ragged_dot`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import compat, numerics
from lora_jax.lowrank.contraction import Name, Named, Names
from lora_jax.transform import _deferred
from lora_jax.transform._context import Context
from lora_jax.transform._dense import merge
from lora_jax.transform._factored import Factored, Term, place, times
from lora_jax.transform._parameters import NotFactorableError, parameter
from lora_jax.transform._products import Product, add_terms, dtype_of_factors, project
from lora_jax.transform._slots import Own, masked, of_all, own_along, row_axes, widened


def dot_general(context: Context, equation: Any, x: Any, y: Any) -> jax.Array:
    """`x @ W`, `W @ x`, and every other product of two arrays."""
    axes = _Axes(equation)
    if isinstance(x, Factored) and isinstance(y, Factored):
        return _product_of_weights(context, equation, x, y, axes)
    if isinstance(x, Factored):
        return multiply(context, equation, x, axes.x, y, axes.y, axes.out, flipped=True)
    return multiply(context, equation, y, axes.y, x, axes.x, axes.out)


class _Axes:
    """The names of the axes of a product's operands and result."""

    def __init__(self, equation: Any):
        numbers = parameter(equation, "dimension_numbers")
        (x_contracted, y_contracted), (x_batch, y_batch) = numbers
        x, y = (
            [(side, i) for i in range(len(atom.aval.shape))]
            for side, atom in zip(("left", "right"), equation.invars, strict=True)
        )
        for i, j in zip(x_contracted, y_contracted, strict=True):
            x[i] = y[j] = ("contracted", i)
        for i, j in zip(x_batch, y_batch, strict=True):
            x[i] = y[j] = ("batch", i)
        out = [x[i] for i in x_batch]
        out += [name for name in (*x, *y) if name[0] in ("left", "right")]
        # A name is a tuple of names of axes: see `_products`.
        self.x, self.y, self.out = (tuple((name,) for name in own) for own in (x, y, out))


def multiply(
    context: Context,
    equation: Any,
    f: Factored,
    f_names: Names,
    x: jax.Array,
    x_names: Names,
    out_names: Names,
    *,
    flipped: bool = False,
    position: int | None = None,
    roles: Sequence[str] | None = None,
    form_base: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """The product of an activation with a factored weight.

    `flipped` means that the weight is the first operand. If the equation is not a product
    of two operands, `position` is that of the activation, `form_base` computes the product
    with the frozen weight, and `roles` replaces the roles of the weight's axes that follow
    from the names.
    """
    context.see(f, equation, _roles(f_names) if roles is None else roles)
    contracted = [name for name in f_names if name not in out_names]
    before, after = _columns(f, f_names, contracted)
    check_multiplies(x.dtype, integers=not before and not context.drops(f))
    rows, whole = None, x.shape
    if f.by_slot:
        at = int(flipped) if position is None else position
        rows = row_axes(context, equation, at, x_names, f_names, out_names)
        before, after = ([rows.column(own) for own in side] for side in (before, after))
        x_names, x_shape = rows.split(x_names, x.shape)
    else:
        x_shape = x.shape
    for column in before:
        unit, by = numerics.range_unit(x.dtype, x, column.array), column.array
        if unit is not None:
            by = by / unit
            after.append(Named(unit, (), ()))
        by = place(by, column.names, x_names)
        x = times(x.reshape(x_shape), by).reshape(whole)
    if form_base is not None:
        base, precision = form_base(x), None
    else:
        base = _deferred.bind(equation, [f.base, x] if flipped else [x, f.base])
        precision = parameter(equation, "precision")
    if not f.terms:
        return base
    if flipped and isinstance(precision, tuple):
        precision = precision[::-1]
    out_shape = base.shape
    if rows is not None:
        out_names, out_shape = rows.split(out_names, out_shape)
    product = Product(
        x_names,
        f_names,
        out_names,
        tuple(column.names for column in after),
        precision,
        x_shape,
        out_shape,
        () if rows is None else rows.names,
        rows is not None and rows.dense,
        context.statistic,
    )
    columns = [column.array for column in after]
    return add_terms(context, f, product, x, base, columns, rows)


def check_multiplies(dtype: Any, *, integers: bool = True) -> None:
    """Raises unless an operand of this dtype can be multiplied by factors.

    Integers can, except with DoRA or dropout, which `integers=False` stands for.
    """
    if not jnp.issubdtype(dtype, jnp.inexact if not integers else jnp.number):
        raise NotFactorableError(f"the other operand is {dtype}")


def _product_of_weights(
    context: Context, equation: Any, x: Factored, y: Factored, axes: _Axes
) -> jax.Array:
    """A product of two adapted weights, the smaller of which is merged.

    The merge costs a small part (rank over width) of the product, so it is not reported.
    """
    smaller = min(x, y, key=lambda f: f.base.size)
    context.see(smaller, equation)
    context.check_no_dropout(smaller)
    dense = merge(smaller)
    # This use does not show which axes of the merged weight are its inputs.
    flipped = smaller is not x  # both may be one value
    own = (x, axes.x, dense, axes.y) if flipped else (y, axes.y, dense, axes.x)
    return multiply(context, equation, *own, axes.out, flipped=flipped, roles=())


def roles(equation: Any, weights: Sequence[bool]) -> list[Sequence[str]]:
    """For both operands, the role of each axis if that operand is the weight."""
    axes = _Axes(equation)
    return [_roles(axes.x), _roles(axes.y)]


def _roles(names: Names) -> list[str]:
    """The roles of axes with these names."""
    kinds = [name[0][0] for name in names]  # pyright: ignore
    return [kind if kind in ("contracted", "batch") else "kept" for kind in kinds]


def _columns(
    f: Factored, names: Sequence[Name], contracted: Sequence[Name]
) -> tuple[list[Named], list[Named]]:
    """The columns that scale the other operand, and those that scale the result."""
    before, after = [], []
    for column in f.columns:
        owned = sorted(f.owned(column))
        gone = [axis for axis in range(f.ndim) if axis not in owned]
        array = lax.squeeze(column, gone)
        named = Named(array, tuple(names[axis] for axis in owned), array.shape)
        inside = [name in contracted for name in named.names]
        if any(inside) and not all(inside):
            raise NotFactorableError("DoRA scales contracted and kept axes of it")
        (before if any(inside) else after).append(named)
    return before, after


def ragged_dot(
    context: Context, equation: Any, x: Any, f: Any, sizes: Any, *rest: Any
) -> jax.Array:
    """The rule for `(rows, in), (groups, in, out), (groups,) -> (rows, out)`: experts."""
    values = x, f, sizes, *rest
    _, own, *_ = roles_of_groups(equation, [isinstance(v, Factored) for v in values])
    context.see(f, equation, own)
    return grouped_product(
        context,
        equation,
        f,
        x,
        sizes,
        lambda x: _deferred.bind(equation, [x, f.base, sizes]),
        position=0,
    )


def grouped_product(
    context: Context,
    equation: Any,
    f: Factored,
    x: jax.Array,
    sizes: jax.Array,
    form_base: Callable[[jax.Array], jax.Array],
    *,
    position: int,
) -> jax.Array:
    """`(rows, in), (groups, in, out), (groups,) -> (rows, out)`, with the weight `f`.

    `form_base` computes the product of an activation with the frozen weight. `position` is
    that of the activation among the operands of the equation.
    """
    own = own_along(context, equation, position, 0) if f.by_slot else None
    scaled = any(1 in f.owned(column) for column in f.columns)
    check_multiplies(x.dtype, integers=not scaled and not context.drops(f))
    after = []
    for column in f.columns:
        if {1, 2} <= f.owned(column):
            raise NotFactorableError("DoRA scales contracted and kept axes of it")
        rows = _rows_of_groups(f, column, sizes, x.shape[0], own)
        if 1 in f.owned(column):
            unit = numerics.range_unit(x.dtype, x, rows)
            if unit is not None:
                rows = rows / unit
                after.append(unit)
            x = times(x, rows)
        else:
            after.append(rows)
    updates = (
        _ragged_update(context, equation, x, f, term, sizes, own) for term in f.terms
    )
    return numerics.sum_and_round(form_base(x), updates, after)


def roles_of_groups(equation: Any, weights: Sequence[bool]) -> list[Sequence[str]]:
    """For each operand, the role of each axis, given which operands are weights.

    Raises:
        NotFactorableError: if there is no low-rank rule for it.
    """
    if list(weights) != [False, True, False]:
        raise NotFactorableError("the weight is not the operand with the groups")
    if not _is_grouped_matmul(equation):
        raise NotFactorableError("it is not (rows, in), (groups, in, out) -> (rows, out)")
    return [(), ("batch", "contracted", "kept"), ()]


def _is_grouped_matmul(equation: Any) -> bool:
    numbers = parameter(equation, "ragged_dot_dimension_numbers")
    (x_in, f_in), (x_batch, f_batch) = numbers.dot_dimension_numbers
    axes = x_in, f_in, x_batch, f_batch
    return (
        len(equation.invars[1].aval.shape) == 3
        and tuple(map(tuple, axes)) == ((1,), (1,), (), ())
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
    )


def _rows_of_groups(
    f: Factored, column: jax.Array, sizes: Any, n: int, own: Own | None
) -> jax.Array:
    """`(groups or 1, in or 1, out or 1)` -> `(rows or 1, in or out)`."""
    flat = lax.squeeze(column, [2 if 1 in f.owned(column) else 1])
    if flat.shape[0] == 1:
        return flat if own is None else own.columns(of_all(flat[0]))
    # Not jnp.repeat: a mesh would gather the groups of all rows.
    ends = jnp.cumsum(sizes)
    groups = jnp.sum(jnp.arange(n, dtype=ends.dtype)[:, None] >= ends[None], axis=1)
    if own is None:
        return jnp.take(flat, groups, axis=0, mode="clip")
    groups = jnp.minimum(groups, flat.shape[0] - 1)
    return of_all(flat).at[own.numbers, groups].get(mode="fill", fill_value=1.0)


def _ragged_update(
    context: Context,
    equation: Any,
    x: jax.Array,
    f: Factored,
    term: Term,
    sizes: Any,
    own: Own | None,
) -> jax.Array:
    """`scale * (x @ first) @ second`: `(rows, rank)`, then `(rows, out)`."""
    term, mask = (term, None) if own is None else widened(term, own)
    first, second = (term.a, term.b) if 2 in f.owned(term.b) else (term.b, term.a)
    if 2 in f.owned(first) or 1 in f.owned(second):
        raise NotFactorableError("its factors mix inputs with outputs")
    dtype = dtype_of_factors(x, f, context.statistic)
    down = jnp.moveaxis(lax.squeeze(first.leading(), [3]), 0, -1)  # (groups or 1, in, rank)
    up = jnp.moveaxis(lax.squeeze(second.leading(), [2]), 0, 1)  # (groups or 1, rank, out)
    options = {
        name: equation.params.get(name) for name in ("precision", "preferred_element_type")
    }
    if dtype != x.dtype:
        options["preferred_element_type"] = None

    def multiply(v, weight):
        if weight.shape[0] == f.shape[0]:
            product = functools.partial(lax.ragged_dot, **options)
            if own is None:
                return product(v, weight, sizes)
            return compat.outside_of_vmap(product, v, weight, sizes)
        # One factor for all groups. The product of a row in no group is zero.
        rows = jnp.arange(v.shape[0])[:, None] < jnp.sum(sizes)
        return jnp.matmul(jnp.where(rows, v, jnp.zeros_like(v)), weight[0], **options)

    projected = masked(project(context, term, x, down, dtype, multiply, -1), mask)
    return multiply(projected, up.astype(dtype))


RULES = {"dot_general": dot_general, "ragged_dot_general": ragged_dot}
