"""The rule for DoRA's norms in an adapted function.

`adapt` may be applied to an adapted function. To the outer `adapt`, the weight of an inner
norm is a factored value. Its terms and the inner adapter are one sum of terms, so the norm
is computed without a merge. The norms are calls of the functions in `_CALLS`, which the
outer `adapt` recognizes by name.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import compat, numerics, quantized
from lora_jax.lowrank import weight_norms
from lora_jax.lowrank.norm_matrix import Matrix
from lora_jax.plan import layout, stacks
from lora_jax.plan.adapter_plan import Target
from lora_jax.transform._deferred import Deferred, form
from lora_jax.transform._factored import Factored, Term, is_factored
from lora_jax.transform._parameters import NotFactorableError


def constant_norm(
    weight: Any, adapter: Mapping[str, jax.Array], target: Target
) -> jax.Array:
    """The column norms of `W + scale * A @ B`, `(*batch, out)`, with stopped gradients.

    The weight may be quantized, or lie in the memory of the host.
    """
    factors = {name: lax.stop_gradient(adapter[name]) for name in ("A", "B")}
    by_entry = quantized.is_quantized(weight) or compat.is_on_host(weight)
    form_norm = _by_entry if by_entry else _of_dense
    return form_norm(weight, factors, target)


def _of_dense(weight: Any, adapter: dict[str, jax.Array], target: Target) -> jax.Array:
    """The norms of one weight, whose axes are not folded: a mesh may split each of them."""
    matrix, axis = layout.low_rank(jnp.asarray(weight), adapter, target).matrix()
    return _CALLS[axis](matrix)


# Traced once for all weights of one shape. The gradient of the weight is stopped inside. If
# it were stopped outside, an outer `adapt` would see a `stop_gradient` of the weight.
@jax.jit
def lora_jax_column_norms(matrix: Matrix) -> jax.Array:
    """The column norms of a matrix, with stopped gradients."""
    return weight_norms.constant_norm(matrix, axis=-2)


@jax.jit
def lora_jax_row_norms(matrix: Matrix) -> jax.Array:
    """The row norms of a matrix, with stopped gradients."""
    return weight_norms.constant_norm(matrix, axis=-1)


_CALLS: dict[int, Any] = {-2: lora_jax_column_norms, -1: lora_jax_row_norms}
# By the names of these functions in a jaxpr.
_AXES = {call.__name__: axis for axis, call in _CALLS.items()}


@jax.jit
def _by_entry(weight: Any, adapter: dict[str, jax.Array], target: Target) -> jax.Array:
    """The norms of a weight, computed for one entry of a stack at a time."""
    return stacks.map_entries(_of_dense, weight, adapter, target)


def norm_axis(equation: Any) -> int | None:
    """The axis that the norms are taken over, if the equation is a call in `_CALLS`."""
    return _AXES.get(str(equation.params.get("name")))


def adapted(equation: Any, axis: int, *values: Any) -> list[jax.Array]:
    """The rule for a call in `_CALLS` whose weight is factored."""
    check_can_form(equation, axis, list(map(is_factored, values)))
    matrix = Matrix(*values)
    if matrix.weight.by_slot:
        raise NotFactorableError("it is the norm of a weight of an inner DoRA adapter")
    return [_norm(_with_terms(matrix.weight, matrix, axis), axis)]


def check_can_form(equation: Any, axis: int, weights: Sequence[bool]) -> None:
    """Raises if `adapted` cannot compute the norms, given which operands are weights."""
    if [i for i, is_weight in enumerate(weights) if is_weight] != [0]:
        raise NotFactorableError("a factor of a DoRA adapter is an adapted weight")
    matrix = Matrix(*(atom.aval for atom in equation.invars))
    if not _is_matrix(matrix, axis, equation.outvars[0].aval.shape):
        raise NotFactorableError("the norms of its DoRA adapter are under `jax.vmap`")


def _is_matrix(matrix: Matrix, axis: int, out: tuple[int, ...]) -> bool:
    """Whether the arrays have the shapes of a `Matrix`. Under `jax.vmap` they do not."""
    weight, left, right = matrix.weight, matrix.left, matrix.right
    *batch, rank, n_kept = right.shape
    n_summed = left.shape[axis]
    of_left = (n_summed, rank) if axis == -2 else (rank, n_summed)
    known = () if matrix.columns is None else (tuple(matrix.columns.shape),)
    start = len(batch)
    ends = (n_summed, n_kept) if axis == -2 else (n_kept, n_summed)
    sizes = weight.shape[start:]
    return (
        tuple(left.shape) == (*batch, *of_left)
        and tuple(weight.shape[:start]) == (*batch,)
        and any(
            (math.prod(sizes[:i]), math.prod(sizes[i:])) == ends
            for i in range(1, len(sizes))
        )
        and {tuple(out), *known} == {(*batch, n_kept)}
    )


def _with_terms(f: Factored, matrix: Matrix, axis: int) -> Matrix:
    """The matrix, with the terms and columns of its factored weight `f` included."""
    weight = jax.ShapeDtypeStruct(f.shape, f.dtype)  # the base may be quantized
    summed, kept = matrix._replace(weight=weight).axes(axis)
    n_batch = min(*summed, *kept)
    at = n_batch if axis == -1 else n_batch + 1  # the rank axis of `left`
    gain = matrix.columns
    for column in f.columns:
        if f.owned(column) & {*summed}:
            raise NotFactorableError("another DoRA adapter scales the summed axis")
        column = _whole(f, column[None], summed, kept)[0]
        gain = column if gain is None else gain * column
    lefts, rights = [], []
    own = numerics.multiply(matrix.right, matrix.scale)
    for term in f.terms:
        left, right = _term_sides(f, term, summed, kept, matrix.left.dtype)
        lefts.append(jnp.moveaxis(left, 0, at))
        right = jnp.moveaxis(right, 0, -2)  # (*batch, rank, kept)
        rights.append(right if gain is None else right * gain[..., None, :])
    left = jnp.concatenate([*lefts, matrix.left], axis=at)
    right = jnp.concatenate([*rights, own], axis=-2)
    return Matrix(f.base, left, right, jnp.ones_like(matrix.scale), gain)


def _term_sides(
    f: Factored, term: Term, summed: tuple[int, ...], kept: tuple[int, ...], dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """`(rank, *batch, summed)` and `(rank, *batch, kept)`, the second times the scale."""
    for a, b in ((term.a, term.b), (term.b, term.a)):
        if not f.owned(a) & {*kept} and not f.owned(b) & {*summed}:
            left = _whole(f, a.leading().astype(dtype), kept, summed)
            right = _whole(f, b.leading().astype(dtype), summed, kept)
            return left, right * term.label.scale
    raise NotFactorableError("its adapters have different inputs and outputs")


def _whole(
    f: Factored, x: jax.Array, gone: tuple[int, ...], end: tuple[int, ...]
) -> jax.Array:
    """`(rank, *axes)` to `(rank, *batch, end)`: the axes of the other end are gone."""
    batch = [f.shape[i] for i in range(f.ndim) if i not in gone and i not in end]
    shape = x.shape[0], *batch, *(f.shape[i] for i in end)
    x = jnp.broadcast_to(lax.squeeze(x, [1 + i for i in gone]), shape)
    return x.reshape(*shape[: 1 + len(batch)], math.prod(shape[1 + len(batch) :]))


def _norm(matrix: Matrix, axis: int) -> jax.Array:
    """The norms of a matrix; a quantized stack is processed one entry at a time."""
    weight = matrix.weight
    if isinstance(weight, Deferred) and weight.batch_ndim:
        alone, scale = matrix._replace(scale=None), matrix.scale
        return lax.map(lambda entry: _norm(entry._replace(scale=scale), axis), alone)
    # The call stays in the program, for an `adapt` around this one.
    return _CALLS[axis](matrix._replace(weight=form(weight)))
