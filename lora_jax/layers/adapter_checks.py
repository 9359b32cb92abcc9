"""Checks of adapters: which entries they have, and that their shapes fit."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.typing import DTypeLike

from lora_jax._core import checks, numerics, quantized
from lora_jax.lowrank.low_rank import LowRank

# Names of the entries of an adapter in other packages, for error messages.
_OTHER_NAMES = {
    "a": "A",
    "lora_a": "A",
    "lora_embedding_a": "A",
    "b": "B",
    "lora_b": "B",
    "lora_embedding_b": "B",
    "magnitude": "m",
    "lora_magnitude_vector": "m",
    "weight_magnitude": "m",
    "bias": "B_bias",
}

# `LOSES_...` are the entries that a function would lose, with what to do instead.
TORCH_NAMES = ("lora_A", "lora_a", "lora_B", "lora_b")
BIASES: tuple[str, ...] = ("A_bias", "B_bias")
LOSES_BIAS = dict.fromkeys(
    BIASES,
    "it shifts the layer's bias, so use merge_lora_layer or unmerge_lora_layer, or "
    "lora_bias_delta for the shift alone.",
)
LOSES_MAGNITUDE = {
    "m": "it is the magnitude of a DoRA adapter, so use dora_linear, merge_dora_weight or "
    "unmerge_dora_weight, or leave it out on purpose: "
    "{name: adapter[name] for name in 'AB'}."
}
# The entries of a LoRA adapter for a function that applies its biases.
WITH_BIASES: Any = {"optional": BIASES, "refused": LOSES_MAGNITUDE}


def check_adapter(
    adapter: Any,
    weight_shape: tuple[int, ...] | None,
    *,
    required: Sequence[str] = ("A", "B"),
    optional: Sequence[str] = (),
    refused: Mapping[str, str] | None = None,
) -> None:
    """Raises unless `adapter` has the entries that a function needs, and no others.

    Args:
        adapter: of the user.
        weight_shape: `(*batch, in, out)`. If it is None, `A` and `B` must fit each other.
        required: names of entries that the adapter must have.
        optional: names of entries that it may have.
        refused: names of entries that the function would lose, with what to do instead.
    """
    _check_names(adapter, required, optional, refused or {})
    for name, value in adapter.items():
        checks.check_array(f"adapter[{name!r}]", value)
    a, b = adapter["A"], adapter["B"]
    if weight_shape is None:
        _check_factors_together(a, b)
        weight_shape = (*a.shape[:-1], b.shape[-1])
    _check_factors(a, b, weight_shape)
    batch, widths = weight_shape[:-2], {"A_bias": a.shape[-1], "B_bias": b.shape[-1]}
    for name, width in widths.items():
        if name in adapter:
            what = f"for A {a.shape} and B {b.shape}"
            checks.check_vector(f"adapter[{name!r}]", adapter[name], (*batch, width), what)


def checked_scale(
    adapter: Mapping[str, jax.Array],
    alpha: Any,
    rank_stabilized: Any,
    *dtypes: DTypeLike,
) -> float | jax.Array:
    """The scale of a checked adapter; raises unless `alpha` and the flag are valid.

    See `numerics.adapter_scale`. A scale that is an array is at least as wide as `dtypes`.
    """
    checks.check_number("alpha", alpha)
    checks.check_flags(rank_stabilized=rank_stabilized)
    rank, dtype = adapter["A"].shape[-1], numerics.accumulation_dtype(*dtypes)
    return numerics.adapter_scale(alpha, rank, rank_stabilized, dtype)


def checked(
    name: str,
    weight: Any,
    adapter: Mapping[str, jax.Array],
    alpha: Any,
    rank_stabilized: Any,
    axis: int = -2,
    *,
    required: Sequence[str] = ("A", "B"),
    optional: Sequence[str] = (),
    refused: Mapping[str, str] | None = None,
) -> LowRank:
    """A weight with its adapter, after all checks. `name` is the weight's in messages."""
    checks.check_weight(name, weight)
    entries: Any = {"required": required, "optional": optional, "refused": refused}
    check_adapter(adapter, weight.shape, **entries)
    dtypes = weight.dtype, *(entry.dtype for entry in adapter.values())
    scale = checked_scale(adapter, alpha, rank_stabilized, *dtypes)
    return LowRank(quantized.as_frozen(weight), adapter, scale, axis)


def _check_names(
    adapter: Any,
    required: Sequence[str],
    optional: Sequence[str],
    refused: Mapping[str, str],
) -> None:
    if not isinstance(adapter, Mapping):
        raise TypeError(
            f"adapter must be a dict of arrays with the entries "
            f"{', '.join(required)}, got {type(adapter).__name__}."
        )
    for name, advice in refused.items():
        if name in adapter:
            raise ValueError(f"the adapter's entry {name!r} would be lost here: {advice}")
    allowed = (*required, *optional)
    missing = [name for name in required if name not in adapter]
    unknown = [name for name in adapter if name not in allowed]
    if missing or unknown:
        hints = [
            f"{name!r} is called {_OTHER_NAMES[str(name).lower()]!r} here"
            for name in unknown
            if str(name).lower() in _OTHER_NAMES
        ]
        raise KeyError(
            f"the adapter must have the entries {', '.join(required)}"
            + (f" and may have {', '.join(optional)}" if optional else "")
            + f", got {', '.join(map(str, adapter)) or 'none'}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unknown: {', '.join(map(str, unknown))}" if unknown else "")
            + "".join(f"; {hint}" for hint in hints)
            + "."
        )


def _check_factors_together(a: jax.Array, b: jax.Array) -> None:
    are_matrices = min(a.ndim, b.ndim) >= 2
    if not (are_matrices and (*a.shape[:-2], a.shape[-1]) == b.shape[:-1]):
        swapped = a.ndim == b.ndim and a.ndim >= 2 and a.shape[-2] == b.shape[-1]
        raise ValueError(
            f"A and B do not fit each other: expected A (*batch, in, rank) and B "
            f"(*batch, rank, out), got A {a.shape} and B {b.shape}."
            + (" They look swapped or transposed." if swapped else "")
        )


def _check_factors(a: jax.Array, b: jax.Array, weight_shape: tuple[int, ...]) -> None:
    *batch, n_in, n_out = weight_shape
    rank = a.shape[-1] if a.ndim else 0
    if a.shape == (*batch, n_in, rank) and b.shape == (*batch, rank, n_out) and rank:
        return
    hint = ""
    if a.ndim == b.ndim == len(weight_shape):
        ends = (a.shape[-2:], b.shape[-2:])
        r = a.shape[-2]
        if ends == ((r, n_out), (n_in, r)):
            hint = " A and B look swapped."
        elif ends == ((r, n_in), (n_out, r)):
            hint = " They look transposed, as PyTorch stores them: pass A.T and B.T."
    lead = "".join(f"{n}, " for n in batch)
    raise ValueError(
        f"the factors do not fit a weight of shape {tuple(weight_shape)}: expected A "
        f"({lead}{n_in}, rank) and B ({lead}rank, {n_out}) with rank >= 1, got A "
        f"{a.shape} and B {b.shape}.{hint}"
    )
