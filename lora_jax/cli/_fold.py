"""Merges one weight into the dtype of the result, and counts what the rounding loses."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.cli import _blocks
from lora_jax.layers.lora import Adapter
from lora_jax.model import merging
from lora_jax.model.adapters import merge_adapters
from lora_jax.plan import layout
from lora_jax.plan.adapter_plan import AdapterPlan, Target
from lora_jax.plan.config import LoraConfig

# The number of entries that are merged at once. A merge holds a few float32 arrays of this
# size, most of which fit into the cache of a processor.
BLOCK = 2**20


class Loss(NamedTuple):
    """What the rounding of a merged weight loses."""

    vanished: int = 0
    """The number of entries that have an update and do not change."""
    entries: int = 0
    largest: float = 0.0
    """The largest `|update| / |weight|` among the vanished entries."""

    def __add__(self, other: "Loss") -> "Loss":  # type: ignore[override]
        """The loss of two parts together."""
        return Loss(
            self.vanished + other.vanished,
            self.entries + other.entries,
            max(self.largest, other.largest),
        )

    @property
    def fraction(self) -> float:
        """The fraction of the entries that vanish."""
        return self.vanished / max(1, self.entries)


def fold_weight(
    name: str,
    read_rows: Callable[[int, int], np.ndarray],
    adapter: Adapter,
    target: Target,
    dtype: np.dtype,
) -> Iterator[tuple[np.ndarray, Loss]]:
    """Merges a weight, one block of rows after the other.

    Args:
        name: of the weight, for error messages.
        read_rows: returns the rows of the weight from one index to another.
        adapter: of the weight.
        target: the weight's entry in the plan.
        dtype: of the result. The sum is computed in at least float32 and rounded once.

    Yields:
        Some rows of the result, and what their rounding lost.

    Raises:
        FloatingPointError: if an entry is infinite or NaN.
    """
    for block in _blocks.cut_rows(target, adapter, BLOCK):
        rows = read_rows(block.start, block.stop)
        yield _fold(name, rows, block.adapter, block.target, dtype)


def _fold(
    name: str, rows: np.ndarray, adapter: Adapter, target: Target, dtype: np.dtype
) -> tuple[np.ndarray, Loss]:
    values = jnp.asarray(rows)
    merged, vanished, largest, finite = _merge_rows(values, adapter, target, dtype)
    if not bool(finite):
        raise _explain(name, values, adapter, target, dtype)
    return np.asarray(merged), Loss(int(vanished), rows.size, float(largest))


def _explain(
    name: str, rows: jax.Array, adapter: Adapter, target: Target, dtype: np.dtype
) -> FloatingPointError:
    """An error that says why a result is not finite."""
    wide, plan = rows.astype(_wide(rows.dtype)), AdapterPlan(LoraConfig(), {name: target})
    try:
        result = merge_adapters({name: wide}, {name: adapter}, plan)[name]
        round_to(name, np.asarray(result), dtype)
    except FloatingPointError as error:
        return error
    return FloatingPointError(f"at {name!r}: the result has an infinity or a NaN in it.")


@functools.partial(jax.jit, static_argnames=("target", "dtype"))
def _merge_rows(
    rows: jax.Array, adapter: Adapter, target: Target, dtype: np.dtype
) -> tuple[jax.Array, ...]:
    """Merges rows and counts the loss in one pass. Compiled once for a kind of target.

    Returns:
        The result, the number of vanished entries, the largest `|update| / |weight|` among
        them, and whether the result is finite.
    """
    value = layout.low_rank(rows.astype(_wide(rows.dtype)), adapter, target)
    merged = value.merge().astype(dtype)
    lost = merging.rounding_loss(value.change(), value.weight, merged)
    finite = jnp.all(jnp.isfinite(merged))
    rows = layout.from_low_rank(merged, target)
    return rows, jnp.sum(lost.vanished), lost.largest, finite


def _wide(dtype: np.dtype) -> np.dtype:
    return np.result_type(dtype, np.float32)


def check_finite(name: str, values: np.ndarray) -> None:
    """Raises FloatingPointError if a value is infinite or NaN."""
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"at {name!r}: the adapter's array for it has an infinity or a NaN in it."
        )


def round_to(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounds values to another floating-point dtype.

    Raises:
        FloatingPointError: if a value is out of range.
    """
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype)
    if not np.array_equal(np.isfinite(rounded), np.isfinite(values)):
        raise FloatingPointError(
            f"at {name!r}: there are values beyond the range of {dtype}: give a wider "
            "--dtype, such as bfloat16 or float32."
        )
    return rounded
