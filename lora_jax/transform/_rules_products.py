"""Products that contract a weight: `dot_general` and `ragged_dot`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import _compat, _numerics
from lora_jax.transform._context import Context
from lora_jax.transform._factored import Factored, NotFactorableError, Term, place
from lora_jax.transform._parameters import parameter
from lora_jax.transform._products import Name, Named, Product, add_terms

_ROLES = {"contracted": "contracted", "batch": "batch", "left": "kept", "right": "kept"}


def dot_general(context: Context, equation: Any, x: Any, y: Any) -> jax.Array:
    """`x @ W`, `W @ x`, and every other product of two arrays."""
    if isinstance(x, Factored) and isinstance(y, Factored):
        x, y = _merge_smaller(context, equation, x, y)
    (x_contracted, y_contracted), (x_batch, y_batch) = parameter(
        equation, "dimension_numbers"
    )
    x_names = [("left", i) for i in range(x.ndim)]
    y_names = [("right", i) for i in range(y.ndim)]
    for i, j in zip(x_contracted, y_contracted, strict=True):
        x_names[i] = y_names[j] = ("contracted", i)
    for i, j in zip(x_batch, y_batch, strict=True):
        x_names[i] = y_names[j] = ("batch", i)
    out = [x_names[i] for i in x_batch]
    out += [n for n in x_names if n[0] == "left"] + [n for n in y_names if n[0] == "right"]
    precision = equation.params["precision"]
    if isinstance(x, Factored):
        f, names, other, other_names = x, x_names, y, y_names
        precision = precision[::-1] if isinstance(precision, tuple) else precision
    else:
        f, names, other, other_names = y, y_names, x, x_names

    context.see(f, equation, [_ROLES[kind] for kind, _ in names])
    if not jnp.issubdtype(other.dtype, jnp.floating):
        raise NotFactorableError(f"the other operand is {other.dtype}")
    # From here on a name is a tuple of such names: see `_products`.
    wrapped, other_wrapped = ([(name,) for name in own] for own in (names, other_names))
    contracted = [name for name in wrapped if name[0][0] == "contracted"]
    before, after = _columns(f, wrapped, contracted)
    for column in before:
        other = _scale(other, column, other_wrapped)
    base = _compat.bind(equation, [other, f.base] if f is y else [f.base, other])
    if context.probing:
        return base
    product = Product(
        x_names=tuple(other_wrapped),
        weight_names=tuple(wrapped),
        out_names=tuple((name,) for name in out),
        column_names=tuple(column.names for column in after),
        precision=precision,
    )
    columns = [column.array for column in after]
    return add_terms(context, f, product, other, base, columns)


def _merge_smaller(
    context: Context, equation: Any, x: Factored, y: Factored
) -> tuple[Any, Any]:
    """Of two weights that are multiplied, the larger stays factored."""
    reason = "it is multiplied with another adapted weight"
    if x.base.size <= y.base.size:
        return context.merge(x, equation, reason), y
    return x, context.merge(y, equation, reason)


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


def _scale(x: jax.Array, column: Named, names: Sequence[Name]) -> jax.Array:
    """`x` times a column, multiplied wide."""
    wide = _numerics.accumulation_dtype(x.dtype, column.array.dtype)
    by = place(column.array.astype(wide), column.names, names)
    return (x.astype(wide) * by).astype(x.dtype)


def ragged_dot(
    context: Context, equation: Any, x: Any, f: Any, sizes: Any, *rest: Any
) -> jax.Array:
    """`(rows, in), (groups, in, out), (groups,) -> (rows, out)`: experts."""
    if not isinstance(f, Factored) or isinstance(x, Factored) or rest:
        raise NotFactorableError("the weight is not that of the groups")
    if not _is_grouped_matmul(equation, f):
        raise NotFactorableError("it is not (rows, in), (groups, in, out) -> (rows, out)")
    context.see(f, equation, ["batch", "contracted", "kept"])
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise NotFactorableError(f"the other operand is {x.dtype}")
    after = []
    for column in f.columns:
        if {1, 2} <= f.owned(column):
            raise NotFactorableError("DoRA scales contracted and kept axes of it")
        rows = _rows_of_groups(f, column, sizes, x.shape[0])
        if 1 in f.owned(column):
            x = _times(x, rows)
        else:
            after.append(rows)
    out = _compat.bind(equation, [x, f.base, sizes])
    if context.probing:
        return out
    wide = _numerics.accumulation_dtype(out.dtype)
    total = out.astype(wide)
    for term in f.terms:
        total = total + _ragged_update(context, equation, x, f, term, sizes).astype(wide)
    out = total.astype(out.dtype)
    for rows in after:
        out = _times(out, rows)
    return out


def _is_grouped_matmul(equation: Any, f: Factored) -> bool:
    numbers = parameter(equation, "ragged_dot_dimension_numbers")
    (x_in, f_in), (x_batch, f_batch) = numbers.dot_dimension_numbers
    axes = x_in, f_in, x_batch, f_batch
    return (
        f.ndim == 3
        and tuple(map(tuple, axes)) == ((1,), (1,), (), ())
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
    )


def _rows_of_groups(f: Factored, column: jax.Array, sizes: Any, n: int) -> jax.Array:
    """`(groups or 1, in or 1, out or 1)` -> `(rows or 1, in or out)`."""
    flat = lax.squeeze(column, [2 if 1 in f.owned(column) else 1])
    if flat.shape[0] == 1:
        return flat
    return jnp.repeat(flat, sizes, axis=0, total_repeat_length=n)


def _times(x: jax.Array, rows: jax.Array) -> jax.Array:
    wide = _numerics.accumulation_dtype(x.dtype, rows.dtype)
    return (x.astype(wide) * rows.astype(wide)).astype(x.dtype)


def _ragged_update(
    context: Context, equation: Any, x: jax.Array, f: Factored, term: Term, sizes: Any
) -> jax.Array:
    """`scale * (x @ first) @ second`: `(rows, rank)`, then `(rows, out)`."""
    first, second = (term.a, term.b) if 2 in f.owned(term.b) else (term.b, term.a)
    if 2 in f.owned(first) or 1 in f.owned(second):
        raise NotFactorableError("its factors mix inputs with outputs")
    dtype = _numerics.promote(x.dtype, f.dtype)
    down = jnp.moveaxis(lax.squeeze(first.leading(), [3]), 0, -1)  # (groups or 1, in, rank)
    up = jnp.moveaxis(lax.squeeze(second.leading(), [2]), 0, 1)  # (groups or 1, rank, out)
    rate = term.label.dropout if context.key is not None else 0.0
    key = context.make_key(x) if rate else None
    options = {
        name: equation.params.get(name) for name in ("precision", "preferred_element_type")
    }

    def multiply(v, weight):
        if weight.shape[0] == 1:
            return jnp.matmul(v, weight[0], **options)
        return lax.ragged_dot(v, weight, sizes, **options)

    @jax.checkpoint  # draws the mask again
    def project(x, down, key):
        dropped = _numerics.drop(x, rate, key) if rate else x
        return multiply(dropped.astype(dtype), down.astype(dtype))

    scale = term.label.scale / (1.0 - rate)
    scaled = _numerics.multiply(project(x, down, key), scale)
    return multiply(scaled.astype(dtype), up.astype(dtype))


RULES = {
    "dot_general": dot_general,
    "ragged_dot": ragged_dot,
    "ragged_dot_general": ragged_dot,
}
