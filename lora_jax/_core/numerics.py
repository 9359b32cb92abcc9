"""Products, scales and dropout that LoRA and DoRA share.

Shapes: `batch` stands for the leading axes of a weight `(*batch, in, out)` (stacked layers,
experts). `tokens` stands for all axes of an input between the batch axes and the last axis.
`rows` stands for the token axes, or for the one axis that they are folded into. A dtype is
*wide* if it is at least float32.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from lora_jax._core import compat, quantized


def promote(*dtypes: DTypeLike) -> jnp.dtype:
    """The dtype that `dtypes` promote to, also if JAX is set to strict promotion.

    If JAX has no float64, float64 counts as float32.
    """
    dtypes = tuple(map(jax.dtypes.canonicalize_dtype, dtypes))
    with jax.numpy_dtype_promotion("standard"):
        return jnp.dtype(functools.reduce(jnp.promote_types, dtypes))


def accumulation_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """The dtype of sums: float32, or a wider dtype among `dtypes`."""
    return promote(jnp.float32, *dtypes)


def factor_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of products with the factors, if products with the weight use `dtype`.

    float32 for float16: `x @ A` may overflow in float16 even if `x @ (A @ B)` does not.
    """
    return jnp.dtype(jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype)


def range_unit(dtype: DTypeLike, *arrays: jax.Array) -> jax.Array | None:
    """A power of two that a product is divided by to stay in the range of `dtype`.

    A scalar, which is 1 if the product is in range. None if `dtype` has the range of
    float32.
    """
    if jnp.dtype(dtype) != jnp.float16:
        return None
    sizes = [jnp.max(jnp.abs(x.astype(jnp.float32)), initial=0.0) for x in arrays]
    over = lax.stop_gradient(functools.reduce(jnp.multiply, sizes)) / 2.0**15
    unit = lax.reduce_precision(2 * over, exponent_bits=8, mantissa_bits=0)
    return jnp.where(over > 1, unit, jnp.ones_like(unit))


def adapter_scale(
    alpha: float | jax.Array, rank: int, rank_stabilized: bool, dtype: DTypeLike
) -> float | jax.Array:
    """The scale of `A @ B`: `alpha / rank`, or `alpha / sqrt(rank)`.

    If `alpha` is a number, so is the scale: a constant of the compiled program. If `alpha`
    is an array, traced or not, the scale is a wide array, at least as wide as `dtype`.
    """
    divisor = math.sqrt(rank) if rank_stabilized else float(rank)
    if isinstance(alpha, jax.Array):
        wide = accumulation_dtype(dtype)
        if jnp.issubdtype(alpha.dtype, jnp.floating):
            wide = promote(wide, alpha.dtype)
        return alpha.astype(wide) / divisor
    return float(alpha) / divisor


def multiply(x: jax.Array, scale: float | jax.Array) -> jax.Array:
    """`x` times a scalar of any dtype, in the dtype of `x`."""
    return x * (scale.astype(x.dtype) if isinstance(scale, jax.Array) else scale)


def sum_and_round(
    base: jax.Array, updates: Iterable[jax.Array], columns: Iterable[jax.Array] = ()
) -> jax.Array:
    """`columns * (base + updates)`, rounded once to the dtype of `base`.

    Args:
        base: an array.
        updates: are added to it. The sum has the widest dtype of all of them, at least
            float32.
        columns: multiply the sum.
    """
    base, updates = jnp.asarray(base), list(updates)
    wide = accumulation_dtype(base.dtype, *(update.dtype for update in updates))
    out = base.astype(wide)
    for update in updates:
        out = out + update.astype(wide)
    for column in columns:
        out = out * column.astype(wide)
    return out.astype(base.dtype)


def fold(x: jax.Array, batch_ndim: int) -> jax.Array:
    """`(*batch, *tokens, width)` -> `(*batch, rows, width)` on a CPU.

    With one row axis the products of the backward pass contract one axis. With several,
    XLA on the CPU first copies `x` and its cotangent into another layout, which doubles
    the time of a training step. On other devices the token axes are not folded: a mesh
    that shards two of them could not shard the folded axis, and would gather `x`.
    """
    batch, tokens = x.shape[:batch_ndim], x.shape[batch_ndim:-1]
    if len(tokens) == 1 or (tokens and not _folds(x, batch_ndim)):
        return x
    return x.reshape(*batch, math.prod(tokens), x.shape[-1])


def _folds(x: jax.Array, batch_ndim: int) -> bool:
    sharded = any(compat.explicit_spec(x)[batch_ndim:-1])
    return jax.default_backend() == "cpu" and not sharded


def keep_arguments(
    function: Callable[..., Any], static: int | None = None, *, frozen: Any = None
) -> Any:
    """Keeps only the arguments of a function for its backward pass.

    Otherwise a folded, cast or transposed copy of an argument would be kept as well. That
    has no effect in one compiled layer, but a `lax.scan` over layers would keep a copy of
    all frozen weights. If `frozen`, the weight among the arguments, is quantized, its dense
    form must not be kept either: a barrier prevents the compiler from forming it once for
    both passes.
    """
    numbers = () if static is None else (static,)
    barrier = quantized.is_quantized(frozen)
    return jax.checkpoint(function, prevent_cse=barrier, static_argnums=numbers)


# Inlined into a program that is being traced; otherwise compiled once.
_compiled = functools.partial(jax.jit, static_argnums=2, inline=True)


def as_row(vector: jax.Array, like: jax.Array) -> jax.Array:
    """`(*batch, width)` -> `(*batch, 1, ..., width)`, with the ndim and dtype of `like`."""
    vector = jnp.asarray(vector).astype(like.dtype)
    missing = like.ndim - vector.ndim
    return lax.expand_dims(vector, range(vector.ndim - 1, vector.ndim - 1 + missing))


@_compiled
def frozen_product(x: jax.Array, weight: Any, dtype: DTypeLike) -> jax.Array:
    """`(*batch, *tokens, in), (*batch, in, out)` -> wide `(*batch, *rows, out)`.

    `x @ W`, multiplied in `dtype`, with a gradient of `x` only. A quantized weight is
    formed again in the backward pass.
    """
    return keep_arguments(_frozen_product, 2, frozen=weight)(x, weight, dtype)


def _frozen_product(x: jax.Array, weight: Any, dtype: DTypeLike) -> jax.Array:
    weight = lax.stop_gradient(quantized.as_dense(weight)).astype(dtype)
    rows = fold(x.astype(dtype), weight.ndim - 2)
    return contract(rows, weight, weight.ndim - 2)


@_compiled
@functools.partial(keep_arguments, static=2)
def project_down(x: jax.Array, a: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`(*batch, *tokens, in), (*batch, in, rank)` -> wide `(*batch, *rows, rank)`.

    `x @ A`, multiplied in `factor_dtype(dtype)`. The gradient of `A` is computed as
    `v.T @ x`, with the shape `(rank, in)`. XLA on the CPU is 3 to 4 times as fast with it
    as with `x.T @ v`, the gradient of a plain `x @ A`. Without the barrier XLA would undo
    the transpose. On other devices the barrier costs at most a copy of `A`.
    """
    dtype = factor_dtype(dtype)
    rows = fold(x.astype(dtype), a.ndim - 2)
    transposed = lax.optimization_barrier(jnp.swapaxes(a.astype(dtype), -1, -2))
    return contract(rows, transposed, a.ndim - 1)


def project_up(u: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`(*batch, *rows, rank), (*batch, rank, out)` -> wide `(*batch, *rows, out)`.

    `u @ B`, multiplied in `factor_dtype(dtype)`.
    """
    dtype = factor_dtype(dtype)
    return contract(u.astype(dtype), b.astype(dtype), b.ndim - 2)


def contract(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """Contracts the last axis of `x` with `axis` of `y`, which have the same dtype.

    The leading `y.ndim - 2` axes of both are batch axes. The result is wide. The products
    of the backward pass run in the dtype of `x` and `y`.
    """
    batch = tuple(range(y.ndim - 2))
    return dot(x, y, Dot((((x.ndim - 1,), (axis,)), (batch, batch))))


class Dot(NamedTuple):
    """The options of a `lax.dot_general`.

    Attributes:
        dimensions: its `dimension_numbers`.
        precision: for both operands.
    """

    dimensions: lax.DotDimensionNumbers
    precision: Any = None

    def __call__(self, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
        """The product, in `dtype`, or in that of `x` and `y`."""
        return lax.dot_general(
            x, y, self.dimensions, self.precision, preferred_element_type=dtype
        )


def dot(x: jax.Array, y: jax.Array, options: Dot) -> jax.Array:
    """The wide product of two arrays of the same dtype.

    The products of the backward pass run in the dtype of `x` and `y`.
    """
    dtype = accumulation_dtype(x.dtype)
    return options(x, y) if x.dtype == dtype else _wide_product(x, y, options, dtype)


# Plain differentiation of a 16-bit product with a float32 result multiplies a float32
# cotangent by a 16-bit operand, which widens that operand: a float32 copy of the frozen
# weight, and a product at float32 speed. This rule keeps the tangents, and so the
# products of the backward pass, in 16 bits.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _wide_product(x: jax.Array, y: jax.Array, options: Dot, dtype: DTypeLike) -> jax.Array:
    return options(x, y, dtype)


@functools.partial(_wide_product.defjvp, symbolic_zeros=True)
def _wide_product_jvp(options, dtype, primals, tangents):
    x, y = primals
    x_dot, y_dot = tangents
    terms = []
    if not isinstance(x_dot, SymbolicZero):
        terms.append(options(x_dot, y).astype(dtype))
    if not isinstance(y_dot, SymbolicZero):
        terms.append(options(x, y_dot).astype(dtype))
    # Not `_wide_product`: policies of jax.checkpoint cannot see the inside of a custom_jvp.
    out = options(x, y, dtype)
    return out, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(out)


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zeroes each entry with probability `rate`; does **not** divide by `1 - rate`.

    Call it inside `jax.checkpoint`. Then the backward pass draws the mask again, and
    neither the mask nor the masked `x` is kept.
    """
    zeros = jnp.zeros_like(x)
    # The second operand is false, and sharded as x is on a mesh with explicit axes.
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape) | (zeros != 0)
    return jnp.where(keep, x, zeros)
