"""Initializers of the factors `A` and `B`.

An *initializer* is a function `(key, shape, dtype) -> array`, as in
`jax.nn.initializers`. `shape` is `(*batch, in, rank)` for `A` and `(*batch, rank, out)`
for `B`. So the last two axes are fan-in and fan-out, and entries of the leading axes are
drawn independently.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike

from lora_jax._core import checks, numerics

__all__ = [
    "Init",
    "Initializer",
    "gaussian",
    "init_factors",
    "kaiming_uniform",
    "orthogonal_pair",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
]

Initializer: TypeAlias = Callable[[jax.Array, tuple[int, ...], DTypeLike], jax.Array]
"""`(key, shape, dtype) -> array` of that shape and dtype."""

Init: TypeAlias = str | Initializer | tuple[str | Initializer, str | Initializer]
"""The type of `init` arguments: the initializer of `A`, or a pair for `A` and `B`."""

_DEFAULT_STD = 0.01


def gaussian(std: float = _DEFAULT_STD) -> Initializer:
    """Returns an initializer that draws from a normal distribution.

    Args:
        std: standard deviation. peft's `"gaussian"` uses `1 / rank`.

    Returns:
        An initializer.

    Raises:
        TypeError: if `std` is not a number.
        ValueError: if `std` is negative or not finite.
    """
    checks.check_number("std", std)
    if std < 0:
        raise ValueError(f"std must not be negative, got {std}.")

    def initializer(key, shape, dtype=jnp.float32):
        dtype = numerics.promote(dtype)
        return _draw("normal", key, shape, dtype, jnp.array(std, dtype))

    return initializer


def kaiming_uniform(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Draws from `U(-1 / sqrt(fan_in), 1 / sqrt(fan_in))`.

    The default of peft, torchtune and `torch.nn.Linear`: He's uniform distribution for a
    leaky rectifier of slope `a = sqrt(5)`.

    Args:
        key: a `jax.random` key.
        shape: `(*batch, fan_in, fan_out)`.
        dtype: of the result.

    Returns:
        `shape`, in `dtype`.

    References:
        He et al., 2015, equation 15, https://arxiv.org/abs/1502.01852: the bound is
        `sqrt(6 / ((1 + a^2) fan_in))`.
    """
    return _draw("uniform", key, shape, dtype, _bound(1 / 3, shape[-2], dtype))


def xavier_uniform(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Draws from `U(-b, b)` with `b = sqrt(6 / (fan_in + fan_out))`.

    Args:
        key: a `jax.random` key.
        shape: `(*batch, fan_in, fan_out)`.
        dtype: of the result.

    Returns:
        `shape`, in `dtype`.

    References:
        Glorot and Bengio, 2010, equation 16,
        https://proceedings.mlr.press/v9/glorot10a.html.
    """
    return _draw("uniform", key, shape, dtype, _bound(1.0, sum(shape[-2:]) / 2, dtype))


def xavier_normal(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Draws from a normal distribution of variance `2 / (fan_in + fan_out)`.

    Args:
        key: a `jax.random` key.
        shape: `(*batch, fan_in, fan_out)`.
        dtype: of the result.

    Returns:
        `shape`, in `dtype`. Not truncated, unlike
        `jax.nn.initializers.glorot_normal`.

    References:
        Glorot and Bengio, 2010, equation 12,
        https://proceedings.mlr.press/v9/glorot10a.html.
    """
    variance = jnp.array(1.0 / (sum(shape[-2:]) / 2), numerics.promote(dtype))
    return _draw("normal", key, shape, dtype, jnp.sqrt(variance))


def zeros(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Returns zeros. It takes a key as the other initializers do, and ignores it.

    Args:
        key: not used.
        shape: any.
        dtype: of the result.

    Returns:
        `shape`, in `dtype`.
    """
    del key
    return jnp.zeros(shape, dtype)


def orthogonal_pair(
    key: jax.Array,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    dtype: DTypeLike = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Draws `A` and `B` that are both non-zero and whose product is zero.

    `A` and `B` use two orthogonal subspaces of the rank axis, so both factors train from
    the first step on.

    Args:
        key: a `jax.random` key.
        a_shape: `(*batch, in, rank)`, with an even rank.
        b_shape: `(*batch, rank, out)`.
        dtype: of the results. Values are drawn in at least float32 and then rounded.

    Returns:
        `A` and `B`, in `dtype`. `A @ B` is zero up to the rounding of `dtype`.

    Raises:
        ValueError: if the rank is odd, or the shapes do not fit each other.

    References:
        peft's `init_lora_weights="orthogonal"`, with its factor of 1 / 10.
    """
    for name, shape in (("a_shape", a_shape), ("b_shape", b_shape)):
        checks.check_weight_shape(name, shape)
    *batch, rank, n_out = b_shape
    if (*batch, rank) != (*a_shape[:-2], a_shape[-1]):
        raise ValueError(
            "a_shape and b_shape do not fit: expected (*batch, in, rank) and "
            f"(*batch, rank, out), got {a_shape} and {b_shape}."
        )
    n_in, half = a_shape[-2], rank // 2
    if rank % 2:
        raise ValueError(
            f"the orthogonal initializer halves the rank, so it must be even, got {rank}."
        )
    key_q, key_a, key_b = jax.random.split(key, 3)
    wide = numerics.accumulation_dtype(dtype)
    q, _ = jnp.linalg.qr(jax.random.normal(key_q, (*batch, rank, rank), wide))
    a_part = jax.random.normal(key_a, (*batch, n_in, half), wide)
    b_part = jax.random.normal(key_b, (*batch, half, n_out), wide)
    a = a_part @ q[..., 0::2, :] / 10  # (*batch, in, rank)
    b = jnp.swapaxes(q[..., 1::2, :], -1, -2) @ b_part / 10  # (*batch, rank, out)
    return a.astype(dtype), b.astype(dtype)


_BY_NAME: dict[str, Initializer] = {
    "kaiming_uniform": kaiming_uniform,
    "xavier_uniform": xavier_uniform,
    "xavier_normal": xavier_normal,
    "zeros": zeros,
}
_NAMES = ("gaussian", *_BY_NAME, "orthogonal")


def init_factors(
    key: jax.Array,
    shape: tuple[int, ...],
    rank: int,
    init: Init = "kaiming_uniform",
    *,
    std: float = _DEFAULT_STD,
    dtype: DTypeLike = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Initializes the factors of one adapter.

    Args:
        key: a `jax.random` key. `A` and `B` use separate keys that are derived from it.
        shape: `(*batch, in, out)` of the weight.
        rank: of the adapter, at least 1; it may exceed `in` and `out`.
        init: one of

            - the initializer of `A`, as a function or a name; `B` is then zero. The names
              are `"gaussian"` (with `std`), `"kaiming_uniform"`, `"xavier_uniform"`,
              `"xavier_normal"`, `"zeros"`;
            - a pair of initializers, for `A` and for `B`: `("zeros", "gaussian")` means a
              zero `A` and a random `B`;
            - `"orthogonal"`, which initializes both (`orthogonal_pair`).

            `"zeros"` alone makes both factors zero. Such an adapter is a placeholder and
            cannot train, because each factor's gradient is a product with the other.
        std: the standard deviation of `"gaussian"`.
        dtype: of the results. Values are drawn in at least float32 and then rounded.

    Returns:
        `A (*batch, in, rank)` and `B (*batch, rank, out)`, in `dtype`.

    Raises:
        TypeError: if `key` is not a key, `rank` is not an integer, `dtype` is not floating
            point, or `init` is not a name, a function or a pair.
        ValueError: if `rank` is below 1, a name is unknown, `std` is given and not used,
            or a function returns another shape or an integer dtype.
    """
    checks.check_key("key", key)
    checks.check_weight_shape("the weight", shape)
    checks.check_rank(rank)
    checks.check_factor_dtype(dtype)
    *batch, n_in, n_out = shape
    a_shape, b_shape = (*batch, n_in, rank), (*batch, rank, n_out)
    wide = numerics.accumulation_dtype(dtype)
    key_a, key_b = jax.random.split(key)
    if std != _DEFAULT_STD and "gaussian" not in _pair(init):
        raise ValueError(
            f"the standard deviation {std} is used by init='gaussian' only, and init is "
            f"{init!r}: leave it out, or give init=lora_jax.initializers.gaussian({std})."
        )
    if _is_orthogonal(init):
        a, b = orthogonal_pair(key, a_shape, b_shape, wide)
    else:
        init_a, init_b = _pair(init)
        a = _make(init_a, std, key_a, a_shape, wide)
        b = _make(init_b, std, key_b, b_shape, wide)
    return a.astype(dtype), b.astype(dtype)


def check_init(init: Init) -> None:
    """Raises the errors of `init_factors` unless `init` is valid."""
    for one in () if _is_orthogonal(init) else _pair(init):
        _initializer(one, _DEFAULT_STD)


def _is_orthogonal(init: Init) -> bool:
    return isinstance(init, str) and init == "orthogonal"


def _pair(init: Init) -> tuple[Any, Any]:
    """The initializers of `A` and `B`."""
    return init if isinstance(init, tuple) and len(init) == 2 else (init, "zeros")


def _bound(scale: float, fan: float, dtype: DTypeLike) -> jax.Array:
    """The bound of the uniform distribution of variance `scale / fan`."""
    return jnp.sqrt(3 * jnp.array(scale / fan, numerics.promote(dtype)))


def _draw(
    distribution: Literal["normal", "uniform"],
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    by: jax.Array,
) -> jax.Array:
    """Draws numbers of variance 1, or between -1 and 1, and multiplies them by `by`.

    Outside a trace, the size is rounded up to a power of two, and the extra numbers are cut
    off. So the slow compilation is needed for a few sizes, and not for every shape. The
    n-th number does not depend on the size.
    """
    dtype = numerics.promote(dtype)
    draw = {"normal": jax.random.normal, "uniform": _uniform}[distribution]
    size = int(math.prod(shape))
    if isinstance(key, Tracer) or size == 0 or not drawn_by_place(key):
        return draw(key, tuple(shape), dtype) * by
    rounded = 1 << (size - 1).bit_length()
    return _cut(draw(key, (rounded,), dtype), by, tuple(shape))


def is_own(init: Init) -> bool:
    """Whether all of `init` is from this module, and so depends on key and shape alone."""
    both = init if isinstance(init, tuple) else (init,)
    return all(isinstance(i, str) or i.__module__ == __name__ for i in both)


def drawn_by_place(key: jax.Array) -> bool:
    """Whether each number depends only on the key and on its own index."""
    is_threefry = str(jax.random.key_impl(key)) == "threefry2x32"
    return is_threefry and bool(jax.config.jax_threefry_partitionable)  # pyright: ignore


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -1)


@functools.partial(jax.jit, static_argnums=2)
def _cut(numbers: jax.Array, by: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return numbers[: math.prod(shape)].reshape(shape) * by


def _make(
    init: Init, std: float, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.Array:
    value = _initializer(init, std)(key, shape, dtype)
    if callable(value):
        raise TypeError(
            f"the initializer {init!r} returned a function: it makes initializers, as "
            "those of jax.nn.initializers do, so call it first."
        )
    if not checks.is_array(value) or value.shape != shape:
        raise ValueError(
            f"the initializer {init!r} must return an array of the shape {shape} that it "
            f"was given, got {getattr(value, 'shape', type(value).__name__)}."
        )
    checks.check_array(f"what the initializer {init!r} returned", value)
    return value


def _initializer(init: Init, std: float) -> Initializer:
    if isinstance(init, str):
        checks.check_choice("init", init, _NAMES)
        if init == "orthogonal":
            raise ValueError(
                "'orthogonal' makes A and B together: give init='orthogonal', not a pair."
            )
        return gaussian(std) if init == "gaussian" else _BY_NAME[init]
    if not callable(init):
        raise TypeError(
            f"init must be a name ({', '.join(map(repr, _NAMES))}), a function "
            "(key, shape, dtype), or a tuple of two of those, for A and B, got "
            f"{init!r} ({type(init).__name__})."
        )
    return init
