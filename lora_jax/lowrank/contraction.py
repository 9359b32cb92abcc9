"""Products with low-rank factors, over named axes.

Two axes with the same name are multiplied entry by entry, and summed over unless the result
keeps the name. A name is a tuple: adjacent axes that are folded into one axis have the
names of all of them.

`x` is `(*batch, *tokens, in)`. `batch` are the leading axes of a weight `(*batch, in, out)`
(stacked layers, experts), and `tokens` are all axes between those and the last one. `rows`
are the tokens, or the one axis that they are folded into. A dtype is *wide* if it is at
least float32.
"""

import functools
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from lora_jax._core import compat, numerics, quantized

Name: TypeAlias = tuple[Hashable, ...]
Names: TypeAlias = tuple[Name, ...]

RANK: Name = ("rank",)
"""The name of the rank axis of a factor."""
SLOT: Name = ("slot",)
"""The name of the axis of a factor that has an entry for each slot of a stack."""
_IN: Name = ("in",)
_OUT: Name = ("out",)


class Named(NamedTuple):
    """An array and the names of its axes.

    Attributes:
        array: the entries, in any shape of the same size as `shape`.
        names: the names of the axes.
        shape: the sizes of the named axes. The array is reshaped to it when it is used.
    """

    array: jax.Array
    names: Names
    shape: tuple[int, ...]


def named(array: jax.Array, names: Names) -> Named:
    """The array with a name for each of its axes."""
    return Named(array, names, array.shape)


def fold(x: Named, shared: Collection[Name]) -> Named:
    """Folds adjacent axes of an activation that are not in `shared` into one, on one CPU.

    With one row axis the products of the backward pass contract one axis. With several,
    XLA on the CPU first copies `x` and its cotangent into another layout, which doubles
    the time of a training step. On other devices and on a mesh the axes are not folded: a
    mesh that shards two of them could not shard the folded axis, and would gather `x`.
    """
    if jax.default_backend() != "cpu" or compat.may_be_sharded(x.array):
        return x
    names: list[Name] = []
    shape: list[int] = []
    for name, size in zip(x.names, x.shape, strict=True):
        if names and name not in shared and names[-1][-1:] not in shared:
            names[-1], shape[-1] = names[-1] + name, shape[-1] * size
        else:
            names.append(name)
            shape.append(size)
    return Named(x.array, tuple(names), tuple(shape))


def fold_rows(x: jax.Array, batch_ndim: int) -> jax.Array:
    """`(*batch, *tokens, width)` to `(*batch, *rows, width)`; without tokens, one row."""
    return x.reshape(_rows(x, batch_ndim).shape)


class _Static(NamedTuple):
    """The static part of one product.

    Attributes:
        shapes: the shapes that the two operands are reshaped to.
        order: the order that the axes of the second operand are transposed to, or None.
        dtype: the dtype that both operands are cast to.
        options: the options of the `lax.dot_general`.
    """

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    order: tuple[int, ...] | None
    dtype: Any
    options: "Dot"


def contract(
    x: Named,
    y: Named,
    keep: Collection[Name],
    dtype: DTypeLike,
    precision: Any = None,
    *,
    order: Names | None = None,
    rate: float = 0.0,
    key: Any = None,
    slots: jax.Array | None = None,
) -> Named:
    """The product of two arrays, summed over their common names that are not in `keep`.

    Only the two arrays are kept for the backward pass.

    Args:
        x: an activation, or a factor.
        y: a factor.
        keep: the names of the axes that are not summed over.
        dtype: both operands are cast to it, and the products of the backward pass run in
            it.
        precision: as in `lax.dot_general`, with that of `x` first.
        order: the order of the axes of `y`, if it is the first of two factors: the rank
            axis before the summed axes. The gradient of `A` is then computed as
            `v.T @ x`, with the shape `(rank, in)`. XLA on the CPU is 3 to 4 times as fast
            with it as with `x.T @ v`, the gradient of a plain `x @ A`. Without a barrier
            XLA would undo the transpose. On other devices the barrier costs at most a copy
            of `A`.
        rate: the dropout rate of `x`. The result is not divided by `1 - rate`.
        key: the dropout key, if `rate` is not 0.
        slots: the number of a slot for each index of the first axes of `y`. The array of
            `y` then has the slots as its first axis instead of these axes; see `take`.

    Returns:
        The wide product. Its axes are the common axes that are kept, then the other axes of
        `x`, then those of `y`.
    """
    y_names = y.names if order is None else order
    shared = [name for name in x.names if name in y_names]
    batch = [name for name in shared if name in keep]
    summed = [name for name in shared if name not in keep]

    def axes(names: Sequence[Name]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(map(x.names.index, names)), tuple(map(y_names.index, names))

    options = Dot((axes(summed), axes(batch)), precision)
    moved = None if order is None else tuple(map(y.names.index, order))
    static = _Static((x.shape, y.shape), moved, jnp.dtype(dtype), options)

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return _product(static, x, y, slots)

    rest = [name for name in (*x.names, *y_names) if name not in shared]
    return named(dropped(product, x.array, y.array, rate, key), (*batch, *rest))


def keep_arguments(
    function: Callable[..., Any], static: int | None = None, *, frozen: Any = None
) -> Any:
    """Keeps only the arguments of a function for its backward pass.

    Otherwise a folded, cast or transposed copy of an argument would be kept as well. That
    has no effect in one compiled layer, but a `lax.scan` over layers would keep a copy of
    all frozen weights. If `frozen`, the weight among the arguments, is quantized, its dense
    form must not be kept either: a barrier prevents the compiler from dequantizing it once
    for both passes.
    """
    numbers = () if static is None else (static,)
    barrier = quantized.is_quantized(frozen)
    return jax.checkpoint(function, prevent_cse=barrier, static_argnums=numbers)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # compiled once
@functools.partial(keep_arguments, static=0)
def _product(
    static: _Static, x: jax.Array, y: jax.Array, slots: jax.Array | None
) -> jax.Array:
    y = y if slots is None else take(y, slots)
    x, y = (
        v.reshape(shape).astype(static.dtype)
        for v, shape in zip((x, y), static.shapes, strict=True)
    )
    if static.order is not None:
        y = lax.optimization_barrier(jnp.transpose(y, static.order))
    return dot(x, y, static.options)


@functools.partial(jax.jit, static_argnums=2, inline=True)  # compiled once
def frozen_product(x: jax.Array, weight: Any, dtype: DTypeLike) -> jax.Array:
    """`x @ W` with a frozen weight: only `x` has a gradient.

    `(*batch, *tokens, in), (*batch, in, out)` to wide `(*batch, *rows, out)`, multiplied in
    `dtype`. A quantized weight is dequantized again in the backward pass.
    """
    return keep_arguments(_frozen_product, 2, frozen=weight)(x, weight, dtype)


def _frozen_product(x: jax.Array, weight: Any, dtype: DTypeLike) -> jax.Array:
    weight = lax.stop_gradient(quantized.as_dense(weight)).astype(dtype)
    rows = fold_rows(x.astype(dtype), weight.ndim - 2)
    batch = tuple(range(weight.ndim - 2))
    return dot(rows, weight, Dot((((rows.ndim - 1,), (weight.ndim - 2,)), (batch, batch))))


def project_down(
    x: jax.Array, a: jax.Array, dtype: DTypeLike, rate: float = 0.0, key: Any = None
) -> jax.Array:
    """`drop(x) @ A`, the first product of an adapter.

    `(*batch, *tokens, in), (*batch, in, rank)` to wide `(*batch, *rows, rank)`, multiplied
    in `factor_dtype(dtype)`; see `contract`.
    """
    batch, dtype = _batch(a.ndim - 2), numerics.factor_dtype(dtype)
    rows, factor = _rows(x, len(batch)), named(jnp.asarray(a), (*batch, _IN, RANK))
    order = (*batch, RANK, _IN)
    return contract(rows, factor, batch, dtype, order=order, rate=rate, key=key).array


def project_up(
    u: jax.Array, b: jax.Array, scale: float | jax.Array, dtype: DTypeLike
) -> jax.Array:
    """`scale * u @ B`, the second product of an adapter.

    `(*batch, *rows, rank), (*batch, rank, out)` to wide `(*batch, *rows, out)`, multiplied
    in `factor_dtype(dtype)`.
    """
    batch = _batch(b.ndim - 2)
    down = named(u, (*batch, *_tokens(u.ndim - 1 - len(batch)), RANK))
    factor = named(jnp.asarray(b), (*batch, RANK, _OUT))
    return up(down, factor, batch, scale, dtype).array


def up(
    down: Named,
    factor: Named,
    keep: Collection[Name],
    scale: float | jax.Array,
    dtype: DTypeLike,
    precision: Any = None,
    slots: jax.Array | None = None,
) -> Named:
    """`scale * down @ factor`, multiplied in `factor_dtype(dtype)`; see `contract`."""
    dtype = numerics.factor_dtype(dtype)
    scaled = numerics.multiply(down.array, scale).astype(dtype)
    return contract(
        down._replace(array=scaled), factor, keep, dtype, precision, slots=slots
    )


def take(stack: jax.Array, slots: jax.Array, fill: float = 0.0) -> jax.Array:
    """`(slots, *axes)`, `(*rows)` -> `(*rows, *axes)`, the entry of each row's slot.

    A slot behind the last one gives the value `fill`.
    """
    return stack.at[slots].get(mode="fill", fill_value=fill)


def dropped(
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    factor: jax.Array,
    rate: float,
    key: Any,
) -> jax.Array:
    """`multiply(drop(x), factor)`; the backward pass draws the mask again."""
    if not rate:
        return multiply(x, factor)

    # Defined anew in each call: JAX would reuse the trace of one function on other meshes.
    @jax.checkpoint
    def product(x, factor, key):
        return multiply(numerics.drop(x, rate, key), factor)

    return product(x, factor, key)


def _batch(n: int) -> Names:
    return tuple((("batch", i),) for i in range(n))


def _tokens(n: int) -> Names:
    return tuple((("token", i),) for i in range(n))


def _rows(x: jax.Array, batch_ndim: int) -> Named:
    """`(*batch, *tokens, in)` with its tokens folded; without tokens, one row."""
    batch, n = _batch(batch_ndim), x.ndim - 1 - batch_ndim
    shape = x.shape if n else (*x.shape[:-1], 1, x.shape[-1])
    names = (*batch, *_tokens(max(n, 1)), _IN)
    return fold(Named(x, names, shape), {*batch, _IN})


class Dot(NamedTuple):
    """The options of a `lax.dot_general`.

    Attributes:
        dimensions: its `dimension_numbers`.
        precision: for both operands.
    """

    dimensions: lax.DotDimensionNumbers
    precision: Any = None

    def __call__(self, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
        """The product, in `dtype` or by default in the dtype of `x` and `y`."""
        return lax.dot_general(
            x, y, self.dimensions, self.precision, preferred_element_type=dtype
        )


def dot(x: jax.Array, y: jax.Array, options: Dot) -> jax.Array:
    """The wide product of two arrays of the same dtype.

    The products of the backward pass run in the dtype of `x` and `y`.
    """
    dtype = numerics.accumulation_dtype(x.dtype)
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
