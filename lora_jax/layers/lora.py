"""Low-rank adaptation (LoRA) of one weight.

A frozen weight `W (*batch, in, out)` is applied as `x @ W`. Its adapter is a plain dict
with `A (*batch, in, rank)` and `B (*batch, rank, out)`. Some checkpoints also have biases
of the two products, `A_bias (*batch, rank)` and `B_bias (*batch, out)`. With
`scale = alpha / rank`, or `alpha / sqrt(rank)` if `rank_stabilized`:

    y = x @ W + bias + scale * ((x @ A + A_bias) @ B + B_bias)

Dtypes, in every function of this module:

- The result has the dtype of `x @ W`. The result of a merge has the dtype of `W`.
- The factors are cast to the dtype of `x @ W` for the products, which accumulate in at
  least float32. Base, update and bias are added in at least float32 and rounded once.
  A merge casts nothing to a narrower dtype: it adds in the widest dtype of its arguments
  and rounds once.
- In a float16 layer the products with the factors run in float32, because `x @ A` may
  overflow in float16 even if `x @ (A @ B)` does not.
- Gradients of `A` and `B` have the dtypes of `A` and `B`. The products for these gradients
  run in the dtype of `x @ W`. So float32 adapters on bfloat16 weights, the usual case,
  train at the speed of bfloat16 products and keep float32 values.

References:
    Hu et al., 2021, https://arxiv.org/abs/2106.09685. The paper multiplies from the left,
    so its `A` and `B` are our `A.T` and `B.T`. Rank stabilization: Kalajdzievski, 2023,
    https://arxiv.org/abs/2312.03732.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax._core import checks, numerics, quantized, tree_paths
from lora_jax.layers import adapter_checks
from lora_jax.layers.initializers import Init, init_factors
from lora_jax.lowrank import contraction, low_rank

__all__ = [
    "Adapter",
    "init_lora_adapter",
    "lora_delta",
    "lora_linear",
    "merge_lora_weight",
    "tree_lora_delta",
    "unmerge_lora_weight",
]

Adapter: TypeAlias = dict[str, jax.Array]
"""One weight's trainable arrays by name: `A`, `B`, and optionally `A_bias`, `B_bias` and
DoRA's `m`."""

Adapters: TypeAlias = tree_paths.PyTree
"""`{path: adapter}`. Type checkers allow any tree, since optax returns any."""

# Entries that an update of the weight alone would lose.
_LOST = adapter_checks.LOSES_BIAS | adapter_checks.LOSES_MAGNITUDE


def init_lora_adapter(
    key: jax.Array,
    weight: quantized.Weight | jax.ShapeDtypeStruct,
    rank: int,
    init_std: float = 0.01,
    dtype: DTypeLike | None = None,
    *,
    init: Init = "gaussian",
) -> Adapter:
    """Initializes the adapter of one weight: `A` random, `B` zero.

    A new adapter changes nothing, because `A @ B` is zero. The function works inside
    `jax.jit` (also with `out_shardings`) and `jax.eval_shape`.

    Args:
        key: a `jax.random` key.
        weight: `(*batch, in, out)`, floating point. Only its shape and dtype are used, so
            it may be a `jax.ShapeDtypeStruct`.
        rank: of the adapter, at least 1.
        init_std: standard deviation of `init="gaussian"`.
        dtype: of the factors. None means the weight's dtype, but at least float32: 16 bits
            would lose an optimizer's small steps.
        init: initializer of `A`, or a pair for `A` and `B`: see
            `lora_jax.initializers.init_factors`.

    Returns:
        `{"A": (*batch, in, rank), "B": (*batch, rank, out)}`.

    Raises:
        TypeError: if `weight` is not a floating-point array, or another argument has the
            wrong type.
        ValueError: if `weight` is not a matrix or a stack of them, `rank` is below 1, or
            `init` has an unknown name.

    Example:
        >>> import jax, lora_jax
        >>> weight = jax.ShapeDtypeStruct((64, 32), "bfloat16")
        >>> adapter = lora_jax.init_lora_adapter(jax.random.key(0), weight, rank=4)
        >>> adapter["A"].shape, adapter["B"].shape, adapter["A"].dtype.name
        ((64, 4), (4, 32), 'float32')
    """
    checks.check_weight("weight", weight, abstract=True)
    if dtype is None:
        dtype = numerics.accumulation_dtype(weight.dtype)
    a, b = init_factors(key, weight.shape, rank, init, std=init_std, dtype=dtype)
    return {"A": a, "B": b}


def lora_delta(
    adapter: Mapping[str, jax.Array],
    alpha: float | jax.Array = 1.0,
    *,
    rank_stabilized: bool = False,
) -> jax.Array:
    """Computes the low-rank update of the weight, `scale * A @ B`.

    Args:
        adapter: `A` and `B`, in any floating-point dtypes.
        alpha: a finite number or a scalar array; the update is multiplied by
            `alpha / rank`.
        rank_stabilized: multiply by `alpha / sqrt(rank)` instead.

    Returns:
        `(*batch, in, out)`, in the wider of the dtypes of `A` and `B`. Computed in at
        least float32 and rounded once.

    Raises:
        KeyError: if `A` or `B` is missing, or a name is unknown.
        TypeError: if a factor is not floating point or `alpha` is not a real number.
        ValueError: if the factors do not fit each other, `alpha` is not finite, or the
            adapter has biases or a magnitude, which the update of the weight would lose.

    References:
        Hu et al., 2021, equation 3, https://arxiv.org/abs/2106.09685.
    """
    adapter_checks.check_adapter(adapter, None, refused=_LOST)
    dtypes = adapter["A"].dtype, adapter["B"].dtype
    scale = adapter_checks.checked_scale(adapter, alpha, rank_stabilized, *dtypes)
    return low_rank.delta(adapter, scale).astype(numerics.promote(*dtypes))


def lora_linear(
    x: jax.Array,
    frozen_weight: quantized.Weight,
    adapter: Mapping[str, jax.Array],
    alpha: float | jax.Array = 1.0,
    *,
    bias: jax.Array | None = None,
    rank_stabilized: bool = False,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    dropout_position: Literal["pre", "post"] = "pre",
) -> jax.Array:
    """Applies a frozen linear layer with its adapter, without forming `A @ B`.

    Pass `x` with all its leading axes. `jax.vmap` over tokens gives the same values, but
    slower gradients on a CPU.

    Args:
        x: `(*batch, *tokens, in)`, floating point, with any number of token axes.
        frozen_weight: `(*batch, in, out)`, floating point. It has no gradient: its
            cotangent is zero, and no product for it is compiled.
        adapter: `A`, `B`, and optionally `A_bias`, `B_bias`.
        alpha: see `lora_delta`. A traced scalar is allowed, and has a gradient.
        bias: the layer's bias, `(*batch, out)`, or None.
        rank_stabilized: see `lora_delta`.
        dropout_rate: a Python number in [0, 1). At 0 the compiled program has no dropout.
            Entries that are not dropped are divided by `1 - dropout_rate`. The mask is not
            kept: the backward pass draws it again from the key.
        dropout_key: a `jax.random` key, required if the rate is not 0.
        dropout_position: `"pre"` drops entries of the adapter's input, as peft does;
            `"post"` drops entries of its output. The frozen layer's input has no dropout.

    Returns:
        `(*batch, *tokens, out)`, in the dtype of `x @ frozen_weight`.

    Raises:
        KeyError: if `A` or `B` is missing, or a name is unknown.
        TypeError: if an array is not floating point, or an option has the wrong type.
        ValueError: if shapes do not fit, `alpha` is not finite, the rate is outside
            [0, 1) or has no key, or the adapter has a DoRA magnitude.

    References:
        Hu et al., 2021, equation 3, https://arxiv.org/abs/2106.09685.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> weight, x = jnp.ones((64, 32)), jnp.ones((2, 5, 64))
        >>> adapter = lora_jax.init_lora_adapter(jax.random.key(0), weight, rank=4)
        >>> y = lora_jax.lora_linear(x, weight, adapter, alpha=8.0)
        >>> y.shape, bool((y == x @ weight).all())
        ((2, 5, 32), True)
    """
    given: Any = ("frozen_weight", frozen_weight, adapter, alpha, rank_stabilized)
    value = adapter_checks.checked(*given, **adapter_checks.WITH_BIASES)
    checks.check_input(x, frozen_weight)
    checks.check_dropout(dropout_rate, dropout_key)
    checks.check_choice("dropout_position", dropout_position, ("pre", "post"))
    if bias is not None:
        checks.check_bias("bias", bias, frozen_weight.shape)

    x, weight, scale = jnp.asarray(x), value.weight, value.scale
    dtype = numerics.promote(x.dtype, weight.dtype)
    y = contraction.frozen_product(x, weight, dtype)  # (*batch, *rows, out), wide
    rate = dropout_rate if dropout_position == "pre" else 0.0
    u = contraction.project_down(x, adapter["A"], dtype, rate, dropout_key)
    update = _project_up(u, adapter, scale, 1.0 / (1.0 - rate), dtype)
    shape = (*x.shape[:-1], weight.shape[-1])
    if dropout_rate and dropout_position == "post":
        update = _dropped(update, dropout_rate, dropout_key, shape)
    y = y + update
    if bias is not None:
        y = y + numerics.as_row(bias, y)
    return y.astype(dtype).reshape(shape)


def merge_lora_weight(
    frozen_weight: quantized.Weight,
    adapter: Mapping[str, jax.Array],
    alpha: float | jax.Array = 1.0,
    *,
    rank_stabilized: bool = False,
) -> jax.Array:
    """Merges an adapter into its weight: `W + scale * A @ B`.

    Args:
        frozen_weight: `(*batch, in, out)`, floating point.
        adapter: `A` and `B` that fit the weight, in any floating-point dtypes.
        alpha: see `lora_delta`.
        rank_stabilized: see `lora_delta`.

    Returns:
        `(*batch, in, out)`, in the dtype of `frozen_weight`. The sum is computed in the
        widest dtype of the arguments, at least float32, and rounded once. A 16-bit weight
        loses updates below half a unit in its last place.

    Raises:
        KeyError, TypeError: as `lora_delta`.
        ValueError: as `lora_delta`; an adapter with biases needs `merge_lora_layer`.

    References:
        Hu et al., 2021, section 4.1, https://arxiv.org/abs/2106.09685.
    """
    value = adapter_checks.checked(
        "frozen_weight", frozen_weight, adapter, alpha, rank_stabilized, refused=_LOST
    )
    return value.merge()


def unmerge_lora_weight(
    merged_weight: quantized.Weight,
    adapter: Mapping[str, jax.Array],
    alpha: float | jax.Array = 1.0,
    *,
    rank_stabilized: bool = False,
) -> jax.Array:
    """Removes an adapter from a merged weight: undoes `merge_lora_weight`.

    The rounding of the merge is not undone. Each entry that is not subnormal is within
    `eps * (|W| + |merged W|)` of the weight before the merge, where `eps` is the
    `jnp.finfo(dtype).eps` of the weight's dtype. If you need the exact weight, keep it.

    Args:
        merged_weight: `(*batch, in, out)`, floating point.
        adapter: the adapter that was merged.
        alpha: as in the merge.
        rank_stabilized: as in the merge.

    Returns:
        `(*batch, in, out)`, in the dtype of `merged_weight`, rounded once.

    Raises:
        KeyError, TypeError, ValueError: as `merge_lora_weight`; an adapter with biases
            needs `unmerge_lora_layer`.
    """
    value = adapter_checks.checked(
        "merged_weight", merged_weight, adapter, alpha, rank_stabilized, refused=_LOST
    )
    return value.unmerge()


def tree_lora_delta(
    adapters: chex.ArrayTree,
    alpha: float | jax.Array = 1.0,
    *,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """Replaces each adapter in a tree by its `lora_delta`.

    Args:
        adapters: any pytree that contains adapter dicts, such as `{path: adapter}`. A dict
            is an adapter if it has an array under `"A"` or `"B"`. (PyTorch packages' names
            of these arrays are an error.)
        alpha: of every adapter; each adapter divides it by its own rank.
        is_leaf: as in `jax.tree.map`, a node for which it returns True is a leaf. A leaf
            that is an adapter is replaced by its delta; other leaves are not changed.

    Returns:
        The tree with `(*batch, in, out)` arrays in place of the adapter dicts, and every
        other leaf unchanged.

    Raises:
        KeyError, TypeError, ValueError: as `lora_delta`, with the path of the adapter.
    """

    def stop(node: Any) -> bool:
        return _looks_like_adapter(node) or (is_leaf is not None and bool(is_leaf(node)))

    def delta(path: tuple[Any, ...], node: Any) -> Any:
        if not _looks_like_adapter(node):
            return node
        with checks.at_path(jax.tree_util.keystr(path, simple=True, separator="/")):
            return lora_delta(node, alpha)

    checks.check_number("alpha", alpha)
    return jax.tree_util.tree_map_with_path(delta, adapters, is_leaf=stop)


def _looks_like_adapter(node: Any) -> bool:
    return isinstance(node, Mapping) and any(
        checks.is_array(node.get(name)) for name in ("A", "B", *adapter_checks.TORCH_NAMES)
    )


def _project_up(
    u: jax.Array,
    adapter: Mapping[str, jax.Array],
    scale: float | jax.Array,
    gain: float,
    dtype: DTypeLike,
) -> jax.Array:
    """`scale * ((gain * u + A_bias) @ B + B_bias)`: wide `(*batch, *rows, out)`."""
    if "A_bias" in adapter:
        u, gain = numerics.multiply(u, gain) + numerics.as_row(adapter["A_bias"], u), 1.0
    update = contraction.project_up(u, adapter["B"], scale * gain, dtype)
    if "B_bias" in adapter:
        shift = numerics.as_row(adapter["B_bias"], update)
        update = update + numerics.multiply(shift, scale)
    return update


def _dropped(
    update: jax.Array, rate: float, key: jax.Array | None, shape: tuple[int, ...]
) -> jax.Array:
    """`drop(update)`, with a mask drawn in `shape` that is not kept."""

    @jax.checkpoint
    def dropped(update, key):
        return numerics.drop(update.reshape(shape), rate, key).reshape(update.shape)

    return numerics.multiply(dropped(update, key), 1.0 / (1.0 - rate))
