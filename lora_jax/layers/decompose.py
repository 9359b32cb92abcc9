"""Initializers that move a part of a weight into its adapter, and the inverse conversion.

PiSSA and OLoRA split a weight into a *base* and an adapter that is not zero,
`W = W_base + scale * A @ B`. The adapter starts with the largest part of the weight. LoftQ,
and PiSSA with a quantized base (QPiSSA), do this approximately.

**Such an adapter belongs to its base.** On the original weight, the part in the adapter
would count twice, and the arrays do not show this. So save the base as well. Or keep the
initial adapter, and convert with `to_plain_adapter`. The result is an ordinary adapter of
twice the rank for the original weight.

Weights are dense, `(*batch, in, out)`, and `scale` is `alpha / rank`, or
`alpha / sqrt(rank)` if `rank_stabilized`. Decompositions and sums run in float32, or in
float64 if the weight or the factors are float64. The base is computed from the stored
factors and rounded once to the dtype of the weight. So `W_base + scale * A @ B` differs
from `W` by at most half a unit in the last place of `W_base`, 1 part in 512 for bfloat16.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike

from lora_jax._core import checks, numerics, quantized
from lora_jax.layers import adapter_checks, decompositions
from lora_jax.layers.lora import Adapter, init_lora_adapter
from lora_jax.lowrank.low_rank import LowRank

__all__ = [
    "DecomposedWeight",
    "init_loftq_adapter",
    "init_olora_adapter",
    "init_orthogonal_adapter",
    "init_pissa_adapter",
    "to_plain_adapter",
]

Quantize: TypeAlias = Callable[[jax.Array], Any]


class DecomposedWeight(NamedTuple):
    """A weight split into a base and an adapter that belongs to it."""

    weight: quantized.Weight
    """The base. Use and save it in place of the original weight."""
    adapter: Adapter
    """`{"A": (*batch, in, rank), "B": (*batch, rank, out)}`."""


_NO_BIASES = dict.fromkeys(
    adapter_checks.BIASES,
    "it shifts the layer's bias, so add it to that bias with lora_bias_delta, and leave it "
    "out.",
)


def init_pissa_adapter(
    weight: jax.Array,
    rank: int,
    alpha: float | jax.Array = 1.0,
    *,
    dtype: DTypeLike | None = None,
    rank_stabilized: bool = False,
    key: jax.Array | None = None,
    iterations: int | None = None,
    quantize: Quantize | None = None,
) -> DecomposedWeight:
    """Moves the largest singular values of a weight into an adapter (PiSSA).

    `scale * A @ B` is the best approximation of `W` of its rank. `A` and `B` each contain
    the square roots of the singular values. A term whose singular value is zero cannot
    train. For DoRA add `"m"` with `lora_jax.init_dora_magnitude(base, adapter, alpha)`.

    With `quantize` the base is quantized (QPiSSA), and `W_base + scale * A @ B` is only
    *near* `W`. It is nearer than `quantize(W)` if the base, which lacks the largest terms,
    has smaller entries. LoftQ initializes its adapter with the quantization error instead.

    Args:
        weight: `(*batch, in, out)`, floating point.
        rank: of the adapter, from 1 to `min(in, out)`.
        alpha: see `lora_jax.lora_delta`; not 0, but it may be negative.
        dtype: of the factors. None means the dtype of the weight, but at least float32.
        rank_stabilized: see `lora_jax.lora_delta`.
        key: a `jax.random` key, for the randomized SVD.
        iterations: the number of steps of subspace iteration in the randomized SVD, at
            least 1. Each step takes a few products with `rank + 10` columns. Because of the
            10 extra columns, few steps suffice: torch's `svd_lowrank`, as peft calls it,
            has no extra columns and needs 4 or 16 steps. Without `key` and `iterations` the
            SVD is exact.
        quantize: a function that quantizes the base; see `init_loftq_adapter`.

    Returns:
        `weight`, the base `W - scale * A @ B`, `(*batch, in, out)` in the dtype of the
        weight, or the result of `quantize` for this base; and `adapter`.

    Raises:
        TypeError: if `weight` is not a dense floating-point array, `quantize` does not
            return an array or a quantized tensor of the right dtype, or another argument
            has the wrong type.
        ValueError: if the rank is out of its range, `alpha` is 0, only one of `key` and
            `iterations` is given, or `quantize` changes the shape.

    References:
        Meng et al., 2024, equations 2 to 4, https://arxiv.org/abs/2404.02948. The factors
        are divided by the scale, as in peft, so that `W_base + scale * A @ B` is `W`.
        QPiSSA is in the same paper. The randomized SVD: Halko et al., 2011,
        https://arxiv.org/abs/0909.4061.
    """
    wide, scale, dtype = _checked(weight, rank, alpha, rank_stabilized, dtype)
    _check_nonzero(alpha)
    if quantize is not None:
        check_quantize(quantize)
    if (key is None) != (iterations is None):
        raise ValueError(
            "key and iterations go together: give both for a randomized SVD, or neither "
            f"for an exact one, got key={key!r} and iterations={iterations!r}."
        )
    if key is None or iterations is None:
        svd = decompositions.exact(wide, rank)
    else:
        checks.check_key("key", key)
        svd = decompositions.randomized(key, wide, rank, _steps(iterations))
    adapter = _rounded(decompositions.factors(svd, scale), dtype)
    base = LowRank(weight, adapter, scale).unmerge()
    return DecomposedWeight(base if quantize is None else stored(quantize, base), adapter)


def init_olora_adapter(
    weight: jax.Array,
    rank: int,
    alpha: float | jax.Array = 1.0,
    *,
    dtype: DTypeLike | None = None,
    rank_stabilized: bool = False,
) -> DecomposedWeight:
    """Moves the first part of a QR decomposition into an adapter (OLoRA).

    With `W^T = Q R`, the rows of `B` are the first `rank` columns of `Q`, which are
    orthonormal, and `A` is the transpose of the first rows of `R`. As in peft, the factors
    are **not** divided by the scale. The adapter then contains `scale * A @ B`, which is
    `R_r^T Q_r^T` only at a scale of 1.

    Args:
        weight: `(*batch, in, out)`, floating point.
        rank: of the adapter, from 1 to `min(in, out)`.
        alpha: see `lora_jax.lora_delta`.
        dtype: see `init_pissa_adapter`.
        rank_stabilized: see `lora_jax.lora_delta`.

    Returns:
        As `init_pissa_adapter`.

    Raises:
        TypeError: as `init_pissa_adapter`.
        ValueError: if the rank is out of its range.

    References:
        Büyükakyüz, 2024, https://arxiv.org/abs/2406.01775, section 3. The paper's `W` is
        our `W^T`.
    """
    wide, scale, dtype = _checked(weight, rank, alpha, rank_stabilized, dtype)
    adapter = _rounded(decompositions.qr_factors(wide, rank), dtype)
    return DecomposedWeight(LowRank(weight, adapter, scale).unmerge(), adapter)


def init_orthogonal_adapter(
    key: jax.Array,
    weight: quantized.Weight | jax.ShapeDtypeStruct,
    rank: int,
    *,
    dtype: DTypeLike | None = None,
) -> Adapter:
    """Initializes two non-zero factors whose product is zero.

    The same as `init_lora_adapter(key, weight, rank, dtype=dtype, init="orthogonal")`. The
    adapter belongs to the original weight and needs no conversion.

    Args:
        key: a `jax.random` key.
        weight: `(*batch, in, out)`, floating point. Only its shape and dtype are used.
        rank: of the adapter, even; it may exceed `in` and `out`.
        dtype: see `init_pissa_adapter`.

    Returns:
        `{"A": (*batch, in, rank), "B": (*batch, rank, out)}`. `A @ B` is zero up to the
        rounding of `dtype`.

    Raises:
        TypeError: as `init_pissa_adapter`, and if `key` is not a `jax.random` key.
        ValueError: if the rank is odd or below 1.

    References:
        See `lora_jax.initializers.orthogonal_pair`.
    """
    return init_lora_adapter(key, weight, rank, dtype=dtype, init="orthogonal")


def init_loftq_adapter(
    weight: jax.Array,
    rank: int,
    alpha: float | jax.Array = 1.0,
    *,
    quantize: Quantize,
    dtype: DTypeLike | None = None,
    rank_stabilized: bool = False,
    iterations: int = 1,
) -> DecomposedWeight:
    """Initializes an adapter with the quantization error of a weight (LoftQ).

    Two steps alternate. The first sets `W_base = quantize(W - scale * A @ B)`, initially
    with `A @ B = 0`. The second sets `scale * A @ B` to the best approximation of
    `W - W_base` of the given rank. So `W_base + scale * A @ B` is nearer to `W` than
    `quantize(W)`, but is not `W`. If `quantize` loses nothing, both factors are zero and
    cannot train.

    Args:
        weight: `(*batch, in, out)`, floating point.
        rank: of the adapter, from 1 to `min(in, out)`.
        alpha: see `lora_jax.lora_delta`; not 0, but it may be negative.
        quantize: a function that takes a weight `(*batch, in, out)` and returns a
            `lora_jax.quant.QuantizedTensor` of the same shape and dtype, such as
            `lora_jax.quant.quantize_nf4`. It may also return the dequantized array in any
            floating-point dtype, which is then rounded to the dtype of the weight.
        dtype: see `init_pissa_adapter`.
        rank_stabilized: see `lora_jax.lora_delta`.
        iterations: the number of times the two steps alternate, at least 1.

    Returns:
        `weight`, the base, `(*batch, in, out)` in the dtype of the weight: the last result
        of `quantize`, a quantized tensor or an array. `adapter` corrects the errors of this
        base. Do not quantize it again: NF4 with nested scales, for example, would give
        another base.

    Raises:
        TypeError: as `init_pissa_adapter`.
        ValueError: if the rank is out of its range, `alpha` is 0, `iterations` is below 1,
            or `quantize` changes the shape.

    References:
        Li et al., 2023, algorithm 1, https://arxiv.org/abs/2310.08659. The paper has no
        scale. Here the factors are divided by it. In peft they are not, which is correct
        only at a scale of 1.
    """
    wide, scale, dtype = _checked(weight, rank, alpha, rank_stabilized, dtype)
    _check_nonzero(alpha)
    check_quantize(quantize)
    base, adapter = weight, {}
    for step in range(_steps(iterations)):
        rest = LowRank(wide, adapter, scale).unmerge() if step else wide
        base = stored(quantize, rest.astype(weight.dtype))
        lost = wide - quantized.as_dense(base).astype(wide.dtype)
        svd = decompositions.exact(lost, rank)
        adapter = _rounded(decompositions.factors(svd, scale), dtype)
    return DecomposedWeight(base, adapter)


def to_plain_adapter(
    adapter: Mapping[str, jax.Array], initial: Mapping[str, jax.Array]
) -> Adapter:
    """Converts an adapter of a decomposed weight into one of the original weight.

    `A` becomes `[A, A0]` and `B` becomes `[B; -B0]`. At the **same scale**, `W` with the
    new adapter equals `W_base` with the old one, up to the rounding of the sums and of
    `W_base`. The rank doubles, so multiply `alpha` by 2, or by `sqrt(2)` if
    `rank_stabilized`. If the base is quantized, the new adapter adds the trained change to
    the original weight.

    Args:
        adapter: the trained adapter: `A`, `B`, and `m` for DoRA.
        initial: the adapter before training, with the same entries and shapes.

    Returns:
        `{"A": (*batch, in, 2 * rank), "B": (*batch, 2 * rank, out)}` in the wider dtype of
        the two adapters, and the `m` of `adapter`.

    Raises:
        KeyError: if `A` or `B` is missing, or a name is unknown.
        TypeError: if an entry is not a floating-point array.
        ValueError: if an adapter has biases, or the two differ in entries or shapes.

    Example:
        >>> import jax, lora_jax
        >>> from lora_jax.layers.decompose import init_pissa_adapter, to_plain_adapter
        >>> weight = jax.random.normal(jax.random.key(0), (64, 32))
        >>> base, initial = init_pissa_adapter(weight, rank=4, alpha=8.0)
        >>> trained = initial | {"B": initial["B"] * 1.5}
        >>> plain = to_plain_adapter(trained, initial)
        >>> update = lora_jax.lora_delta(plain, alpha=16.0)
        >>> update.shape, plain["A"].shape
        ((64, 32), (64, 8))
    """
    adapter_checks.check_adapter(adapter, None, optional=("m",), refused=_NO_BIASES)
    with checks.at_path("initial"):
        adapter_checks.check_adapter(initial, None, optional=("m",), refused=_NO_BIASES)
    shapes, first = ({n: v.shape for n, v in x.items()} for x in (adapter, initial))
    if shapes != first:
        raise ValueError(
            "the initial adapter must have the entries and shapes of the trained one, "
            f"{shapes}, got {first}: do they belong to the same weight and the same run?"
        )
    plain = dict(adapter)
    for name, axis, sign in (("A", -1, 1.0), ("B", -2, -1.0)):
        dtype = numerics.promote(adapter[name].dtype, initial[name].dtype)
        parts = [jnp.asarray(x[name], dtype) for x in (adapter, initial)]
        plain[name] = jnp.concatenate([parts[0], sign * parts[1]], axis=axis)
    return plain


def check_quantize(quantize: Any) -> None:
    """Raises unless `quantize` is a function."""
    if not callable(quantize):
        raise TypeError(
            "quantize must be a function from a weight to a quantized tensor, such as "
            "lora_jax.quant.quantize_nf4, or to the array that its codes stand for, got "
            f"{quantize!r} ({type(quantize).__name__})."
        )


def check_dense(weight: Any) -> None:
    """Raises if a weight is quantized."""
    if quantized.is_quantized(weight):
        raise TypeError(
            f"the weight is quantized, {weight!r}, and lacks the precision that a "
            "decomposition needs: decompose the dense weight and quantize the base, as "
            "methods that take quantize do; or dequantize it on purpose, with "
            "lora_jax.quant.dequantize."
        )


def stored(quantize: Quantize, base: jax.Array) -> quantized.Weight:
    """The result of `quantize`: a quantized tensor, or an array in the dtype of the base.

    Raises:
        TypeError: if the result is neither, or a quantized tensor of another dtype.
        ValueError: if the result has another shape.
    """
    value = quantize(base)
    what = "what quantize returned"
    if not checks.is_array(value):
        raise TypeError(
            f"{what} must be a quantized tensor or an array, got {type(value).__name__}: "
            "return what a function of lora_jax.quant returns, or dequantize it."
        )
    checks.check_array(what, value)
    if tuple(value.shape) != base.shape:
        raise ValueError(
            f"{what} must have the shape {base.shape} of the weight that it was given, "
            f"got {tuple(value.shape)}."
        )
    if not quantized.is_quantized(value):
        return jnp.asarray(value).astype(base.dtype)
    if value.dtype != base.dtype:
        raise TypeError(
            f"{what} must have the dtype {base.dtype} of the weight that it was given, got "
            f"{value.dtype}, which would change the dtypes of the model: do not cast in "
            "quantize. To change the dtype, cast the params first."
        )
    return value


def _rounded(factors: tuple[jax.Array, jax.Array], dtype: DTypeLike) -> Adapter:
    return {name: x.astype(dtype) for name, x in zip("AB", factors, strict=True)}


def _checked(
    weight: Any,
    rank: int,
    alpha: float | jax.Array,
    rank_stabilized: bool,
    dtype: DTypeLike | None,
) -> tuple[jax.Array, float | jax.Array, DTypeLike]:
    """The weight in the dtype of the decomposition, the scale, the factors' dtype."""
    check_dense(weight)
    checks.check_weight("weight", weight)
    decompositions.check_rank(rank, weight.shape)
    checks.check_number("alpha", alpha)
    checks.check_flags(rank_stabilized=rank_stabilized)
    own = numerics.accumulation_dtype(weight.dtype)
    dtype = checks.check_factor_dtype(own if dtype is None else dtype)
    wide = jnp.asarray(weight, numerics.accumulation_dtype(weight.dtype, dtype))
    scale = numerics.adapter_scale(alpha, rank, rank_stabilized, wide.dtype)
    return wide, scale, dtype


def _check_nonzero(alpha: float | jax.Array) -> None:
    if not isinstance(alpha, Tracer) and alpha == 0:
        raise ValueError(
            "alpha must not be 0: the factors are divided by the scale, so that "
            "scale * A @ B is the part of the weight that the base lacks."
        )


def _steps(iterations: Any) -> int:
    steps = checks.as_index("iterations", iterations, "a positive integer")
    if steps < 1:
        raise ValueError(f"iterations must be at least 1, got {steps}.")
    return steps
