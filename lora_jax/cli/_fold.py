"""One weight merged into the dtype it is written in, and what that dtype loses."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.cli import _blocks
from lora_jax.layers.lora import Adapter
from lora_jax.model.adapters import merge_adapters, merge_losses
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.config import LoraConfig

# How many entries are merged at once: some arrays of so many float32 are held then, and a
# processor's cache holds most of them.
BLOCK = 2**20
# Hashed at each call, and not asked.
_CONFIG = LoraConfig()
_ANY = "weight"


class Loss(NamedTuple):
    """What the rounding of a merged weight loses."""

    vanished: int = 0
    """How many entries have an update and do not change."""
    entries: int = 0
    largest: float = 0.0
    """The largest `|update| / |weight|` among those."""

    def __add__(self, other: "Loss") -> "Loss":  # type: ignore[override]
        """The loss of two parts together."""
        return Loss(
            self.vanished + other.vanished,
            self.entries + other.entries,
            max(self.largest, other.largest),
        )

    @property
    def fraction(self) -> float:
        """The share of the entries that vanish."""
        return self.vanished / max(1, self.entries)


class Source(Protocol):
    """Something that rows of a weight are read from."""

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """The rows from `start` to `stop`, along the first axis."""
        ...


class Array:
    """Rows of an array in memory."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """The rows from `start` to `stop`, along the first axis."""
        return self._values[start:stop]


def fold_weight(
    name: str, source: Source, adapter: Adapter, plan: AdapterPlan, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, Loss]]:
    """Merges a weight, some rows after the others.

    Args:
        name: of the weight.
        source: of its values.
        adapter: of the weight.
        plan: which has the weight as a target.
        dtype: of the result. The sum is formed in at least float32 and rounded to it.

    Yields:
        Some rows of the result, and what they lost.

    Raises:
        FloatingPointError: if an entry is infinite or no number.
    """
    for block in _blocks.cut_rows(plan.targets[name], adapter, BLOCK):
        rows = source.read_rows(block.start, block.stop)
        own = dataclasses.replace(plan, targets={name: block.target})
        yield _fold(name, rows, block.adapter, own, dtype)


def _fold(
    name: str, rows: np.ndarray, adapter: Adapter, plan: AdapterPlan, dtype: np.dtype
) -> tuple[np.ndarray, Loss]:
    values = jnp.asarray(rows)
    target = plan.targets[name]
    if target.method == "lora":
        # Of one name, so that all weights of a kind have one compiled program.
        own = AdapterPlan(_CONFIG, {_ANY: target})
        merged, vanished, largest, finite = _fold_lora(values, adapter, own, dtype)
        if bool(finite):
            return np.asarray(merged), Loss(int(vanished), rows.size, float(largest))
    # DoRA, and what is not finite, to find out why.
    if holds(dtype, rows.dtype):
        return _fold_exactly(name, values.astype(dtype), adapter, plan)
    wide = values.astype(_wide(rows.dtype))
    result = np.asarray(merge_adapters({name: wide}, {name: adapter}, plan)[name])
    rounded = round_to(name, result, dtype)
    return rounded, _rounding_loss(np.asarray(wide), result, dtype)


def _fold_exactly(
    name: str, rows: jax.Array, adapter: Adapter, plan: AdapterPlan
) -> tuple[np.ndarray, Loss]:
    params, adapters = {name: rows}, {name: adapter}
    merged = merge_adapters(params, adapters, plan)[name]
    loss = merge_losses(params, adapters, plan)[name]
    vanished = round(float(loss.vanished) * rows.size)
    return np.asarray(merged), Loss(vanished, rows.size, float(loss.largest_vanished))


def _wide(dtype: np.dtype) -> np.dtype:
    return np.result_type(dtype, np.float32)


@functools.partial(jax.jit, static_argnames="dtype")
def _fold_lora(
    rows: jax.Array, adapter: Adapter, plan: AdapterPlan, dtype: np.dtype
) -> tuple[jax.Array, ...]:
    """Merges in one pass over the rows, which takes a fifth of the time.

    Returns:
        The result, how many of its entries have an update and do not change, the largest
        `|update| / |weight|` among them, and whether the result is finite.
    """

    def merge(values: jax.Array) -> jax.Array:
        return merge_adapters({_ANY: values}, {_ANY: adapter}, plan)[_ANY]

    wide = rows.astype(_wide(rows.dtype))
    update, merged = merge(jnp.zeros_like(wide)), merge(wide).astype(dtype)
    vanished = (update != 0) & (merged == wide.astype(dtype))
    zero = jnp.zeros_like(wide)
    size = jnp.where(wide == 0, zero + 1, jnp.abs(wide))
    ratios = jnp.where(vanished, jnp.abs(update) / size, zero)
    finite = jnp.all(jnp.isfinite(merged))
    return merged, jnp.sum(vanished), jnp.max(ratios), finite


def _rounding_loss(before: np.ndarray, after: np.ndarray, dtype: np.dtype) -> Loss:
    """What rounding two arrays to a narrower dtype loses of their difference."""
    with np.errstate(over="ignore"):  # the old values need not fit
        same = before.astype(dtype) == after.astype(dtype)
    vanished = (before != after) & same
    lost, of = np.abs(after - before)[vanished], np.abs(before)[vanished]
    ratios = lost / np.where(of == 0, 1, of)
    return Loss(int(vanished.sum()), before.size, float(ratios.max(initial=0)))


def holds(dtype: np.dtype, other: np.dtype) -> bool:
    """Whether a floating-point dtype has all values of another."""
    a, b = jnp.finfo(dtype), jnp.finfo(other)
    return a.nmant >= b.nmant and a.nexp >= b.nexp


def check_finite(name: str, values: np.ndarray) -> None:
    """Raises FloatingPointError if a value is infinite or no number."""
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"at {name!r}: the adapter's array for it has an infinity or a NaN in it."
        )


def round_to(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The values in another floating-point dtype.

    Raises:
        FloatingPointError: if one is beyond its range.
    """
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype)
    if not np.array_equal(np.isfinite(rounded), np.isfinite(values)):
        raise FloatingPointError(
            f"at {name!r}: there are values beyond the range of {dtype}: give a wider "
            "--dtype, such as bfloat16 or float32."
        )
    return rounded
