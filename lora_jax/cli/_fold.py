"""Merges one weight into the dtype of the result, and counts what the rounding loses."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.cli._blocks import Update
from lora_jax.model import losses
from lora_jax.model.merging import merge_adapters
from lora_jax.plan import layout, parts
from lora_jax.plan.adapter_plan import AdapterPlan, Target
from lora_jax.plan.config import LoraConfig

# The number of entries that are merged at once. A merge holds a few float32 arrays of this
# size, most of which fit into the cache of a processor.
BLOCK = 2**19


class Loss(NamedTuple):
    """What the rounding of a merged weight, or of its adapted parts, loses."""

    vanished: int = 0
    """The number of entries that have an update and do not change."""
    entries: int = 0
    largest: float = 0.0
    """The largest `|update| / |weight|` among the vanished entries."""

    def __add__(self, other: "Loss") -> "Loss":  # type: ignore[override]
        """The loss of two parts together."""
        largest = max(self.largest, other.largest)
        return Loss(self.vanished + other.vanished, self.entries + other.entries, largest)

    @property
    def fraction(self) -> float:
        """The fraction of the entries that vanish."""
        return self.vanished / max(1, self.entries)


def fold_rows(
    name: str, rows: np.ndarray, updates: Sequence[Update], dtype: np.dtype
) -> tuple[np.ndarray, Loss]:
    """Merges some rows of a weight.

    The sum is computed in at least float32 and rounded once. Entries without an update are
    only rounded.

    Args:
        name: of the weight, for error messages.
        rows: of the weight.
        updates: the adapter of these rows, or those of parts of them.
        dtype: of the result.

    Returns:
        The rows of the result, and what their rounding lost.

    Raises:
        FloatingPointError: if an entry is infinite, NaN, or beyond the range of the dtype.
    """
    values, targets = jnp.asarray(rows), tuple(own.target for own in updates)
    adapters = tuple(dict(own.adapter) for own in updates)
    merged, vanished, largest, good = _merge_rows(values, adapters, targets, dtype)
    if not all(np.all(mask) for mask in good):
        raise _explain(name, values, updates, dtype)
    lost = sum(map(np.count_nonzero, vanished))
    entries = sum(mask.size for mask in vanished)
    return np.asarray(merged), Loss(lost, entries, float(largest))


def _explain(
    name: str, rows: jax.Array, updates: Sequence[Update], dtype: np.dtype
) -> FloatingPointError:
    """An error that says why a result is not finite."""
    try:
        for path, target, adapter in updates:
            part = parts.take(rows, target.part)
            plan = AdapterPlan(LoraConfig(), {path: target.alone})
            wide = {path: part.astype(_wide(rows.dtype))}
            result = merge_adapters(wide, {path: adapter}, plan)[path]
            round_to(path, np.asarray(result), dtype)
        round_to(name, np.asarray(rows), dtype)
    except FloatingPointError as error:
        return error
    return FloatingPointError(f"at {name!r}: the result has an infinity or a NaN in it.")


@functools.partial(jax.jit, static_argnames=("targets", "dtype"))
def _merge_rows(
    rows: jax.Array,
    adapters: Sequence[Mapping[str, jax.Array]],
    targets: tuple[Target, ...],
    dtype: np.dtype,
) -> tuple[Any, ...]:
    """Merges rows and finds what is lost. Compiled once for a kind of targets.

    Returns the merged rows; for each target, which entries vanished; the largest loss; and
    masks that are true unless a merged entry is not finite or another became infinite. XLA
    for the CPU writes masks faster than it counts their entries.
    """
    result, vanished, largest, good = rows.astype(dtype), [], 0.0, []
    for adapter, target in zip(adapters, targets, strict=True):
        part, own = parts.take(rows, target.part), target.alone
        value = layout.low_rank(part.astype(_wide(rows.dtype)), adapter, own)
        merged = value.merge().astype(dtype)
        lost = losses.rounding_loss(value.change(), value.weight, merged)
        vanished.append(lost.vanished)
        largest = jnp.maximum(largest, lost.largest)
        good.append(jnp.isfinite(merged))
        result = parts.put(result, target.part, merged)
    if all(target.part for target in targets):
        good.append(jnp.isfinite(result) == jnp.isfinite(rows))
    return result, vanished, largest, good


def _wide(dtype: np.dtype) -> np.dtype:
    return np.result_type(dtype, np.float32)


def check_finite(name: str, values: np.ndarray) -> None:
    """Raises FloatingPointError if a value is infinite or NaN."""
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"at {name!r}: the adapter's array for it has an infinity or a NaN in it."
        )


def round_to(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounds values to another dtype; FloatingPointError if one is out of range."""
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype)
    if not np.array_equal(np.isfinite(rounded), np.isfinite(values)):
        raise FloatingPointError(
            f"at {name!r}: there are values beyond the range of {dtype}: give a wider "
            "--dtype, such as bfloat16 or float32."
        )
    return rounded
