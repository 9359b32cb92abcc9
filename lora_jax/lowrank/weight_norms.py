"""Norms of the columns of `W + scale * A @ B`, without computing this matrix.

For the columns, `|W + s A B|^2 = |W|^2 + 2 s (A^T W) . B + s^2 B . (A^T A) B`, where `.`
multiplies entry by entry and sums over the rank. This needs one product with `W` that has
`rank` rows. The norms of rows, one for each input, are computed in the same way from `W^T`,
`B^T` and `A^T`. Below, squares are summed over the *summed* axis of the weight. The other
axis is the *kept* axis. `left` is the factor with the summed axis, and
`right (*batch, rank, kept)` the other factor.

The factored sum is wrong if the update nearly cancels a column, or if a square is outside
the range of its dtype. The columns are then computed directly, block by block, with their
entries scaled by powers of two. Each weight has this branch, and models with many unscanned
layers compile it many times, so it has few operations. *Wide* means at least float32.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lora_jax._core import compat, numerics
from lora_jax.lowrank.norm_matrix import HIGHEST, Axis, Matrix, contract_axes, folded, wide

# The factored square is used if it is above this fraction of the sum of its terms. It has
# then lost at most 8 of its 24 bits.
_TRUSTED = 2.0**-8

# The largest number of rows or columns of the weight in one block of `_direct`.
_BLOCK = 128


def factor(magnitude: jax.Array, column_norm: jax.Array) -> jax.Array:
    """DoRA's factor `m / n`, wide; 1 with a zero gradient if `n` is zero."""
    dtype = numerics.accumulation_dtype(magnitude.dtype, column_norm.dtype)
    magnitude, norm = jnp.asarray(magnitude, dtype), jnp.asarray(column_norm, dtype)
    # A norm is not negative, so -1 marks the zeros, and only one array is kept.
    safe = lax.select(norm == 0, lax.full_like(norm, -1), norm)
    return lax.select(safe < 0, lax.full_like(safe, 1), magnitude / safe)


def weight_norm(
    weight: jax.Array, axis: Axis, update: jax.Array | None = None
) -> jax.Array:
    """`|W|` over `axis`, or `|W + update|`, wide; differentiable. Of any shape."""
    matrix = Matrix(weight if update is None else (weight, update))
    return _norm(matrix, lax.stop_gradient(matrix.squares(axis)), axis).value


def norm(matrix: Matrix, squares: jax.Array | None, axis: int) -> jax.Array:
    """The norms of a matrix over `axis`, `(*batch, kept)`, wide; differentiable.

    Args:
        matrix: without `columns`.
        squares: `|W|^2` over `axis`, `(*batch, kept)`, a constant; or None to compute it.
        axis: the summed axis, -2 for the norms of columns, -1 for those of rows.
    """
    if squares is None:
        squares = matrix.squares(axis)
    squares = jnp.asarray(squares, numerics.accumulation_dtype(matrix.weight.dtype))
    return _norm(matrix, lax.stop_gradient(squares), axis).value


def constant_norm(matrix: Matrix, axis: int) -> jax.Array:
    """The norms of a matrix over `axis`, `(*batch, kept)`, without a gradient."""
    matrix = lax.stop_gradient(matrix)
    return _norms(matrix, matrix._replace(columns=None).squares(axis), axis).value


class _Norm(NamedTuple):
    """Norms, and the powers of two that columns are divided by before they are squared.

    Attributes:
        value: the norms, `(*batch, kept)`.
        unit: the powers of two, `(*batch, kept)`; 1 where the factored squares are used.
    """

    value: jax.Array
    unit: jax.Array


def _norms(matrix: Matrix, base: jax.Array, axis: Axis) -> _Norm:
    """The norms over `axis`. `base` is `|W|^2` over `axis`, without `columns`."""
    # For short columns `_direct` takes no more work, and has no branch.
    if matrix.summed_entries(axis) <= _BLOCK:
        return _direct(matrix, axis)
    matrix = matrix.with_scale_in_right()
    if matrix.columns is not None:
        base = base * jnp.square(matrix.columns)
    squares = _factored_squares(matrix, base, axis)
    return _correction(squares, matrix, axis=axis)


_norm = jax.custom_jvp(_norms, nondiff_argnums=(2,))


@functools.partial(_norm.defjvp, symbolic_zeros=True)
def _norm_jvp(axis: Axis, primals: Any, tangents: Any) -> tuple[_Norm, _Norm]:
    """Differentiates the factored square, whose derivative cancels less than the square."""
    matrix, base = primals
    norm = _norm(matrix, base, axis)
    leaves, tree = jax.tree.flatten(matrix)
    changes = jax.tree.leaves(tangents[0], is_leaf=lambda t: isinstance(t, SymbolicZero))
    moving = [i for i, t in enumerate(changes) if not isinstance(t, SymbolicZero)]
    zeros = jax.tree.map(jnp.zeros_like, norm)
    if not moving:
        return norm, zeros

    def square(*values):
        new = dict(zip(moving, values, strict=True))
        changed = [new.get(i, leaf) for i, leaf in enumerate(leaves)]
        scaled = jax.tree.unflatten(tree, changed).divided_by(norm.unit).balanced()
        return _factored_squares(scaled, scaled.squares(axis), axis).value

    old, change = ([values[i] for i in moving] for values in (leaves, changes))
    _, change = jax.jvp(square, old, change)
    zero = norm.value == 0  # not `> 0`, so that a NaN stays a NaN
    twice = 2 * (jnp.where(zero, jnp.ones_like(zeros.value), norm.value) / norm.unit)
    change = jnp.where(zero, zeros.value, change / twice * norm.unit)
    return norm, zeros._replace(value=change)


class _Squares(NamedTuple):
    """Factored squares of norms, `(*batch, kept)`.

    Attributes:
        value: the squares.
        least: squares below this bound may be wrong. It is the sum of a fraction of the
            summed terms and of what underflow may have lost of them.
    """

    value: jax.Array
    least: jax.Array


def _factored_squares(matrix: Matrix, base: jax.Array, axis: Any) -> _Squares:
    """The factored squares. `base` is `|columns * weight|^2`."""
    _, left, right, scale, columns = matrix
    n = matrix.summed_entries(axis)
    info = jnp.finfo(base.dtype)
    # Each of the n products of a sum may lose a smallest normal number.
    lost = n * float(info.tiny) / float(info.eps)
    if left is None or right is None:
        return _Squares(base, jnp.full_like(base, lost))
    right = numerics.multiply(right, scale)
    own = (left.ndim + axis,)
    gram = contract_axes(left, left, own, own, left.ndim - 2)  # (*batch, rank, rank)
    cross = matrix.product(axis)
    if columns is not None:
        cross = cross * columns[..., None, :]
    square = jnp.matmul(gram, right, precision=HIGHEST)
    value = base + jnp.sum((2 * cross + square) * right, axis=-2)
    # |A_r|^2 B_rj^2, summed: the last term without cancellation within A @ B.
    each = jnp.sum(jnp.square(left), axis=axis)[..., None]  # (*batch, rank, 1)
    lost = right.shape[-2] * lost
    apart = jnp.sum((_TRUSTED * each + lost) * jnp.square(right), axis=-2)
    return _Squares(value, _TRUSTED * base + apart + lost)


def _are_right(squares: _Squares) -> jax.Array:
    """Whether all squares are accurate: none cancels or leaves the range of its dtype."""
    most = float(jnp.finfo(squares.value.dtype).max) / 16
    return jnp.all((squares.value >= squares.least) & (squares.value <= most))


@functools.partial(jax.jit, static_argnames="axis", inline=True)  # one compilation
def _correction(squares: _Squares, matrix: Matrix, axis: Axis) -> _Norm:
    """The roots of the factored squares; if any square is wrong, the direct norms."""
    root = jnp.sqrt(jnp.maximum(squares.value, 0))
    return lax.cond(
        _are_right(squares),
        lambda: _Norm(root, jnp.ones_like(root)),
        lambda: _direct(matrix, axis, root),
    )


def _direct(matrix: Matrix, axis: Any, like: jax.Array | None = None) -> _Norm:
    """The norms of the columns, computed from one block of the summed axis at a time.

    A loop over blocks needs `like`, an array with the sharding of the result.

    A block is every `count`-th row (or column), not a range of rows. So no data move
    between devices if the weight is sharded along that axis. The size of a block divides
    the size of the axis, so an axis of prime size has blocks of one row.
    """
    _, left, right, scale, columns = matrix
    n = matrix.summed_entries(axis)
    size = max(d for d in range(1, _BLOCK + 1) if n % d == 0)
    count = n // size if left is not None else 1
    summed, kept = matrix.axes(axis)
    if count > 1:  # the summed axes become one, of which blocks are cut
        ends = (n,), [matrix.shape[i] for i in kept]
        shape = [*matrix.shape[: min(*summed, *kept)]]
        shape += [size for end in (ends if axis == -2 else ends[::-1]) for size in end]
        matrix = matrix._replace(
            weight=jax.tree.map(lambda x: x.reshape(shape), matrix.weight)
        )
        summed, kept = matrix.axes(axis)

    def cut(x, position, i):  # (..., n, ...) -> (..., size, ...)
        if count == 1:
            return x
        blocks = x.reshape(*x.shape[:position], size, count, *x.shape[position + 1 :])
        return lax.dynamic_index_in_dim(blocks, i, position + 1, keepdims=False)

    def form(i):
        block = wide(jax.tree.map(lambda x: cut(x, summed[0], i), matrix.weight))
        if columns is not None:
            block = block * matrix.on_weight(columns, axis)
        if left is None or right is None:
            return block
        a, b = cut(left, left.ndim + axis, i), right
        if axis == -1:
            a, b = jnp.swapaxes(b, -1, -2), a
        # Each end is unfolded, as in the weight: a mesh may split any of its axes.
        lead, middle = b.ndim - 2, max(summed[0], kept[0])
        a = a.reshape(*block.shape[:middle], a.shape[-1])
        b = b.reshape(*b.shape[:-1], *block.shape[middle:])
        update = contract_axes(a, b, (a.ndim - 1,), (lead,), lead)
        return block + numerics.multiply(update, scale)

    def sums(i):
        return tuple(folded(x, len(kept)) for x in _sums(form(i), summed))

    if count == 1 or like is None:
        total = sums(0)
    else:
        # Not jnp.zeros: on a mesh the initial sums need the sharding of the result.
        start = (jnp.zeros_like(like),) * 3
        add = lambda i, total: tuple(map(jnp.add, total, sums(i)))  # noqa: E731
        total = lax.fori_loop(0, count, add, start)
    return _safe_root(total, n)


def _sums(block: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """The sums of squares over `axes` for small, ordinary and large entries.

    These are Blue's accumulators. Before squaring, entries are multiplied by a power of two
    that brings the squares of small or large entries into the range of the dtype.
    """
    step = _step(block.dtype)
    scaled = [jnp.square(x) for x in (block * step, block, block * (1 / step))]
    if compat.may_be_sharded(block):  # a mesh gathers the parts of several sums at once
        return tuple(jnp.sum(x, axes) for x in scaled)
    zeros = (jnp.zeros((), block.dtype),) * 3

    def add(x, y):
        return tuple(map(jnp.add, x, y))

    return tuple(lax.reduce(tuple(scaled), zeros, add, axes))


def _safe_root(sums: tuple[jax.Array, ...], n: int) -> _Norm:
    """The norms of columns of `n` entries, from the sum that is within range."""
    small, ordinary, large = sums
    info, step = jnp.finfo(ordinary.dtype), _step(ordinary.dtype)
    ones = lax.full_like(ordinary, 1)
    is_large = ordinary > float(info.max) / 16
    is_small = ordinary < n * float(info.tiny) / float(info.eps)
    total = lax.select(is_large, large, lax.select(is_small, small, ordinary))
    unit = lax.select(is_small, lax.full_like(ones, 1 / step), ones)
    unit = lax.select(is_large, lax.full_like(ones, step), unit)
    return _Norm(jnp.sqrt(total) * unit, unit)


def _step(dtype: Any) -> float:
    """The square root of the range of a dtype, a power of two."""
    return 2.0 ** (jnp.finfo(dtype).maxexp // 2)
