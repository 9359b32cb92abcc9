"""Weight-decomposed low-rank adaptation (DoRA) of one weight.

A DoRA adapter has LoRA's `A (*batch, in, rank)` and `B (*batch, rank, out)` and a
*magnitude* `m (*batch, out)`. With `V = W + scale * A @ B` and `n` the norms of the
columns of `V`:

    y = (m / n) * (x @ V) + bias

This is the formula of peft. Without dropout and bias it is also that of Megatron and
torchtune. With `norm_axis="in"` the magnitude is `(*batch, in)`, `n` are the norms of the
*rows* of `V`, and `y = (x * m / n) @ V + bias` (Raschka's article).

Dtypes are as in `layers.lora`. Norms and magnitudes are at least float32. The factor
`m / n` of a column of norm zero is 1.

**Accuracy of the norm.** The norm is computed without an `(in, out)` array, from `|W|^2`,
`A^T W` and `A^T A`. Its relative error is at most `4 eps k^2`, for 16-bit weights too. Here
`eps = 1.2e-7` and `k^2 = (|W_j|^2 + |s |A| |B_j||^2) / n_j^2`, with `|A|` and `|B_j|` entry
by entry. This is a few rounding units, unless the update nearly cancels a column.

If the norm of any column is below 1/16 of the norm of its terms, or its square is outside
the range of float32 (a norm below about 1e-13 or above 1e18), all norms are computed
directly, from blocks of at most 128 rows of `V`. The error is then `4 eps k` for all
columns whose norms and products of `A` and `B` are normal numbers. This branch is skipped
at run time if it is not needed, except under `jax.vmap`. Columns of at most 128 entries are
always computed directly, which takes no more work.

References:
    Liu et al., 2024, equation 5, https://arxiv.org/abs/2402.09353. The paper multiplies
    from the left; its columns are the weights of an output, as ours are.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lora_jax._core import checks, numerics, quantized
from lora_jax.layers import adapter_checks
from lora_jax.layers.initializers import Init
from lora_jax.layers.lora import Adapter, init_lora_adapter
from lora_jax.lowrank import dora_products, weight_norms
from lora_jax.lowrank.low_rank import LowRank

__all__ = [
    "dora_column_norm",
    "dora_linear",
    "init_dora_adapter",
    "init_dora_magnitude",
    "merge_dora_weight",
    "unmerge_dora_weight",
]

NormAxis: TypeAlias = Literal["out", "in"]

_LOSES_BIAS = dict.fromkeys(
    adapter_checks.BIASES,
    "a DoRA adapter has no biases; merge this one into the bias of the layer with "
    "merge_lora_layer before the adapter becomes a DoRA adapter.",
)


def init_dora_adapter(
    key: jax.Array,
    weight: quantized.Weight,
    rank: int,
    init_std: float = 0.01,
    dtype: DTypeLike | None = None,
    *,
    init: Init = "gaussian",
    norm_axis: NormAxis = "out",
) -> Adapter:
    """Initializes a DoRA adapter: `A` random, `B` zero, `m` the norms of `W`.

    A new adapter changes the layer only by the rounding of `m / n`, one unit in the last
    place.

    Args:
        key: a `jax.random` key.
        weight: `(*batch, in, out)`, floating point. The magnitude is computed from its
            values, so an abstract weight works only inside `jax.eval_shape`.
        rank: of the adapter, at least 1.
        init_std: see `lora_jax.init_lora_adapter`.
        dtype: of `A` and `B`, and not of the magnitude; see `lora_jax.init_lora_adapter`.
        init: see `lora_jax.init_lora_adapter`. If a pair makes `A @ B` other than zero, set
            `m` with `init_dora_magnitude`, which takes `alpha`.
        norm_axis: `"out"` for one magnitude for each output, `"in"` for each input.

    Returns:
        `{"A": (*batch, in, rank), "B": (*batch, rank, out), "m": (*batch, out)}`. With
        `norm_axis="in"`, `m` is `(*batch, in)`. Its dtype is that of the weight, but at
        least float32.

    Raises:
        TypeError, ValueError: as `lora_jax.init_lora_adapter`, and ValueError if
            `norm_axis` is unknown.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> weight = jnp.ones((64, 32), "bfloat16")
        >>> adapter = lora_jax.init_dora_adapter(jax.random.key(0), weight, rank=4)
        >>> adapter["m"].shape, adapter["m"].dtype.name, float(adapter["m"][0])
        ((32,), 'float32', 8.0)
    """
    checks.check_weight("weight", weight)
    adapter = init_lora_adapter(key, weight, rank, init_std, dtype, init=init)
    return adapter | {"m": dora_column_norm(weight, norm_axis=norm_axis)}


def init_dora_magnitude(
    weight: quantized.Weight,
    adapter: Mapping[str, jax.Array],
    alpha: float | jax.Array = 1.0,
    *,
    rank_stabilized: bool = False,
    norm_axis: NormAxis = "out",
) -> jax.Array:
    """Computes the magnitude for which a DoRA layer computes `x @ (W + delta)`.

    Use it for factors that are not zero: for a trained LoRA adapter that becomes a DoRA
    adapter, or after an initializer that sets both factors.

    Args:
        weight: `(*batch, in, out)`, floating point.
        adapter: `A` and `B`. An `m` in it is ignored.
        alpha: see `lora_jax.lora_delta`.
        rank_stabilized: see `lora_jax.lora_delta`.
        norm_axis: see `init_dora_adapter`.

    Returns:
        `m`, `(*batch, out)` or `(*batch, in)`, in the dtype of the weight, but at least
        float32.

    Raises:
        KeyError, TypeError, ValueError: as `dora_column_norm`.
    """
    return dora_column_norm(
        weight, adapter, alpha, rank_stabilized=rank_stabilized, norm_axis=norm_axis
    )


def dora_column_norm(
    weight: quantized.Weight,
    adapter: Mapping[str, jax.Array] | None = None,
    alpha: float | jax.Array = 1.0,
    *,
    rank_stabilized: bool = False,
    norm_axis: NormAxis = "out",
) -> jax.Array:
    """Computes the L2 norms of the columns of `W`, or of `W + scale * A @ B`.

    If a layer runs several times with the same adapter (gradient accumulation,
    rematerialized blocks, evaluation), compute the norms once and pass them to
    `dora_linear` as `column_norm`. The squared norms of `W` alone are the
    `weight_norm_squared` of `dora_linear`.

    Args:
        weight: `(*batch, in, out)`, floating point.
        adapter: `A` and `B`, or None for the norms of the weight; an `m` is ignored.
        alpha: see `lora_jax.lora_delta`.
        rank_stabilized: see `lora_jax.lora_delta`.
        norm_axis: `"out"` for the norms of columns, `"in"` for the norms of rows.

    Returns:
        `(*batch, out)`, or `(*batch, in)`, in the dtype of the weight, but at least
        float32. The docstring of the module gives the accuracy. Differentiable; the
        gradient of a zero norm is zero.

    Raises:
        KeyError, TypeError, ValueError: as `lora_jax.merge_lora_weight`, and ValueError if
            `norm_axis` is unknown.

    References:
        Liu et al., 2024, equation 5, https://arxiv.org/abs/2402.09353: the denominator.
    """
    axis = _axis(norm_axis)
    if adapter is None:
        checks.check_weight("weight", weight)
        return LowRank(weight, {}, 1.0, axis).norms()
    given: Any = ("weight", weight, adapter, alpha, rank_stabilized, axis)
    return adapter_checks.checked(*given, optional=("m",), refused=_LOSES_BIAS).norms()


def dora_linear(
    x: jax.Array,
    frozen_weight: quantized.Weight,
    adapter: Mapping[str, jax.Array],
    alpha: float | jax.Array = 1.0,
    *,
    bias: jax.Array | None = None,
    rank_stabilized: bool = False,
    scale_bias: bool = False,
    detach_norm: bool = True,
    norm_axis: NormAxis = "out",
    weight_norm_squared: jax.Array | None = None,
    column_norm: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    dropout_mode: Literal["peft", "torchtune", "megatron"] = "peft",
) -> jax.Array:
    """Applies a frozen linear layer with its DoRA adapter, without computing `A @ B`.

    Args:
        x: see `lora_jax.lora_linear`.
        frozen_weight: see `lora_jax.lora_linear`. It has no gradient.
        adapter: `A`, `B` and `m`.
        alpha: see `lora_jax.lora_linear`.
        bias: see `lora_jax.lora_linear`.
        rank_stabilized: see `lora_jax.lora_delta`.
        scale_bias: multiply the bias by `m / n` as well, as torchtune does.
        detach_norm: treat the norm as a constant in the backward pass, as section 4.3 of
            the paper, peft, torchtune and Megatron do. If false, the gradient is exact.
        norm_axis: `"out"` for one magnitude for each output, `"in"` for each input.
        weight_norm_squared: `dora_column_norm(frozen_weight) ** 2`, which saves a pass over
            the weight. It is not checked against the values of the weight: compute it
            again when the weight changes.
        column_norm: `dora_column_norm(frozen_weight, adapter, alpha)`, which saves the
            whole computation of the norm. It must belong to these factors. With
            `detach_norm=False`, the gradient continues through it.
        dropout_rate: see `lora_jax.lora_linear`.
        dropout_key: see `lora_jax.lora_linear`.
        dropout_mode: which products have dropout. `D` is the update, `k = m / n`, and
            `x1`, `x2` are `x` with two independent masks:

            - `"peft"`: `x @ W + (k - 1) * (x1 @ W) + k * (x1 @ D)`
            - `"torchtune"`: `k * (x @ W + x1 @ D)`
            - `"megatron"`: `x @ W + (k - 1) * (x2 @ W) + k * (x1 @ D)`

            `"peft"` and `"megatron"` need a second product with the frozen weight.

    Returns:
        `(*batch, *tokens, out)`, in the dtype of `x @ frozen_weight`; computed in at least
        float32 and rounded once.

    Raises:
        KeyError, TypeError: as `lora_jax.lora_linear`.
        ValueError: as `lora_jax.lora_linear`, and if an option is unknown, both norms are
            given, or `scale_bias` is true with `norm_axis="in"`.

    References:
        Liu et al., 2024, equations 5 and 11, https://arxiv.org/abs/2402.09353.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> weight, x = jnp.ones((64, 32)), jnp.ones((2, 5, 64))
        >>> adapter = lora_jax.init_dora_adapter(jax.random.key(0), weight, rank=4)
        >>> lora_jax.dora_linear(x, weight, adapter, alpha=8.0).shape
        (2, 5, 32)
    """
    given = frozen_weight, adapter, alpha, rank_stabilized, norm_axis
    value = _checked("frozen_weight", *given)
    checks.check_input(x, frozen_weight)
    checks.check_choice("dropout_mode", dropout_mode, ("peft", "torchtune", "megatron"))
    checks.check_flags(scale_bias=scale_bias, detach_norm=detach_norm)
    checks.check_dropout(dropout_rate, dropout_key)
    norms = {"weight_norm_squared": weight_norm_squared, "column_norm": column_norm}
    norms = {name: value for name, value in norms.items() if value is not None}
    _check_norms(frozen_weight.shape, norm_axis, norms)
    if bias is not None:
        checks.check_bias("bias", bias, frozen_weight.shape)
    if scale_bias and norm_axis == "in":
        raise ValueError(
            "scale_bias=True needs norm_axis='out': with 'in' each input has a magnitude, "
            "and the bias has none."
        )

    x, weight, scale = jnp.asarray(x), value.weight, value.scale
    dtype = numerics.promote(x.dtype, weight.dtype)
    squares = weight_norm_squared
    norm = value.frozen_norms(squares) if column_norm is None else column_norm
    if detach_norm:
        norm = lax.stop_gradient(norm)
    factor = weight_norms.factor(adapter["m"], norm)
    dropout = dora_products.Dropout(dropout_rate, dropout_key, dropout_mode)
    ways = {"in": dora_products.scale_inputs, "out": dora_products.scale_outputs}
    y = ways[norm_axis](x, weight, adapter, scale, factor, dropout, dtype)
    if bias is not None:
        shift = numerics.as_row(bias, y)
        y = y + (shift * numerics.as_row(factor, y) if scale_bias else shift)
    return y.astype(dtype).reshape(*x.shape[:-1], weight.shape[-1])


def merge_dora_weight(
    frozen_weight: quantized.Weight,
    adapter: Mapping[str, jax.Array],
    alpha: float | jax.Array = 1.0,
    *,
    rank_stabilized: bool = False,
    norm_axis: NormAxis = "out",
) -> jax.Array:
    """Merges a DoRA adapter into its weight: `(m / n) * (W + scale * A @ B)`.

    The layer's bias does not change (with `scale_bias`, it becomes `(m / n) * bias`).

    Args:
        frozen_weight: `(*batch, in, out)`, floating point.
        adapter: `A`, `B` and `m`.
        alpha: see `lora_jax.lora_delta`.
        rank_stabilized: see `lora_jax.lora_delta`.
        norm_axis: see `dora_linear`.

    Returns:
        `(*batch, in, out)`, in the dtype of `frozen_weight`. The sum is computed in the
        widest dtype of the arguments, at least float32, and rounded once.

    Raises:
        KeyError, TypeError, ValueError: as `dora_linear`.

    References:
        Liu et al., 2024, equation 5, https://arxiv.org/abs/2402.09353.
    """
    given = frozen_weight, adapter, alpha, rank_stabilized, norm_axis
    return _checked("frozen_weight", *given).merge()


def unmerge_dora_weight(
    merged_weight: quantized.Weight,
    adapter: Mapping[str, jax.Array],
    column_norm: jax.Array,
    alpha: float | jax.Array = 1.0,
    *,
    rank_stabilized: bool = False,
    norm_axis: NormAxis = "out",
) -> jax.Array:
    """Removes a DoRA adapter from a merged weight: undoes `merge_dora_weight`.

    The rounding of the merge is not undone, and its error is multiplied by `n / m`. For
    16-bit weights the error of each entry that is not subnormal is at most
    `eps * ((n / m) * |merged W| + |W|)`, with the `jnp.finfo(dtype).eps` of their dtype.
    The sums of wider weights run in their own dtype, and the error of each entry is at most
    `4 eps * ((n / m) * |merged W| + |W| + |scale| |A| |B|)`.

    Args:
        merged_weight: `(*batch, in, out)`, floating point.
        adapter: the adapter that was merged.
        column_norm: `dora_column_norm(weight, adapter, alpha)` from before the merge.
        alpha: as in the merge.
        rank_stabilized: as in the merge.
        norm_axis: as in the merge.

    Returns:
        `(*batch, in, out)`, in the dtype of `merged_weight`. A column whose magnitude is
        zero was lost in the merge, and is NaN here.

    Raises:
        KeyError, TypeError, ValueError: as `merge_dora_weight`; ValueError if
            `column_norm` does not fit.
    """
    given = merged_weight, adapter, alpha, rank_stabilized, norm_axis
    value = _checked("merged_weight", *given)
    _check_norms(merged_weight.shape, norm_axis, {"column_norm": column_norm})
    return value.unmerge(column_norm)


def _axis(norm_axis: NormAxis) -> int:
    """The axis of a weight that its norms are taken over, after a check."""
    checks.check_choice("norm_axis", norm_axis, ("out", "in"))
    return -2 if norm_axis == "out" else -1


def _checked(
    name: str,
    weight: Any,
    adapter: Mapping[str, jax.Array],
    alpha: float | jax.Array,
    rank_stabilized: bool,
    norm_axis: NormAxis,
) -> LowRank:
    """The value of a weight with its DoRA adapter, after all checks."""
    given: Any = (name, weight, adapter, alpha, rank_stabilized, _axis(norm_axis))
    entries: Any = {"required": ("A", "B", "m"), "refused": _LOSES_BIAS}
    value = adapter_checks.checked(*given, **entries)
    kept = _kept(weight.shape, norm_axis)
    what = f"one magnitude for each {norm_axis}put, since norm_axis={norm_axis!r}"
    checks.check_vector("adapter['m']", adapter["m"], kept, what)
    return value


def _kept(weight_shape: tuple[int, ...], norm_axis: NormAxis) -> tuple[int, ...]:
    """The shape of a magnitude: `(*batch, out)` or `(*batch, in)`."""
    *batch, n_in, n_out = weight_shape
    return (*batch, n_out if norm_axis == "out" else n_in)


def _check_norms(
    weight_shape: tuple[int, ...], norm_axis: NormAxis, norms: Mapping[str, Any]
) -> None:
    if len(norms) > 1:
        raise ValueError(
            f"{' and '.join(norms)} are both given, but column_norm makes the other one "
            "useless: give one of them."
        )
    what = f"one for each {norm_axis}put of a weight of shape {tuple(weight_shape)}"
    for name, value in norms.items():
        checks.check_vector(name, value, _kept(weight_shape, norm_axis), what)
