"""The products of a DoRA layer, for both norm axes and every dropout mode.

`x` is `(*batch, *tokens, in)` and `factor` is `m / n`, `(*batch, out)` or `(*batch, in)`.
Products run in `dtype`. Results are `(*batch, *rows, out)` in at least float32, without the
bias.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.typing import DTypeLike

from lora_jax._core import numerics
from lora_jax.lowrank import contraction


@dataclasses.dataclass(frozen=True)
class Dropout:
    """The dropout options of `dora_linear`.

    Attributes:
        rate: a Python number; 0 means no dropout.
        key: a `jax.random` key, or None.
        mode: `"peft"`, `"torchtune"` or `"megatron"`.
    """

    rate: float
    key: Any
    mode: str

    @property
    def keeps_base(self) -> bool:
        """Whether the frozen weight multiplies the input without dropout."""
        return not self.rate or self.mode == "torchtune"


def scale_outputs(
    x: jax.Array,
    weight: jax.Array,
    adapter: Mapping[str, jax.Array],
    scale: float | jax.Array,
    factor: jax.Array,
    dropout: Dropout,
    dtype: DTypeLike,
) -> jax.Array:
    """`k * (x @ (W + D))`, where `k` has one factor for each output."""
    base = contraction.frozen_product(x, weight, dtype)
    factor = numerics.as_row(factor, base)
    keep = 1.0 - dropout.rate
    if dropout.keeps_base:
        u = contraction.project_down(x, adapter["A"], dtype, dropout.rate, dropout.key)
        return factor * (
            base + contraction.project_up(u, adapter["B"], scale / keep, dtype)
        )

    # The backward pass draws the masks again.
    @jax.checkpoint
    def dropped(x, weight, a, key):
        for_adapter, for_base = _drop(x, dropout, key)
        u = contraction.project_down(for_adapter, a, dtype)
        return u, contraction.frozen_product(for_base, weight, dtype)

    u, dropped_base = dropped(x, weight, adapter["A"], dropout.key)
    update = contraction.project_up(u, adapter["B"], scale / keep, dtype)
    # base + (k - 1) * dropped_base + k * update, which keeps one array for the gradient of
    # k, not two.
    dropped_base = numerics.multiply(dropped_base, 1.0 / keep)
    return base - dropped_base + factor * (dropped_base + update)


def scale_inputs(
    x: jax.Array,
    weight: jax.Array,
    adapter: Mapping[str, jax.Array],
    scale: float | jax.Array,
    factor: jax.Array,
    dropout: Dropout,
    dtype: DTypeLike,
) -> jax.Array:
    """`(k * x) @ (W + D)`, where `k` has one factor for each input.

    In every mode there is one product with the frozen weight, since the factor multiplies
    the input: `x @ W + ((k - 1) * x2) @ W` is `(x + (k - 1) * x2) @ W`.
    """

    def project(x, weight, a, factor, key):
        batch_ndim = weight.ndim - 2
        wide = numerics.accumulation_dtype(dtype)
        rows = contraction.fold_rows(x, batch_ndim).astype(wide)
        factor = numerics.as_row(factor, rows)
        for_adapter, for_base = (
            contraction.fold_rows(v, batch_ndim).astype(wide)
            for v in _drop(x, dropout, key)
        )
        keep = 1.0 - dropout.rate
        u = contraction.project_down(for_adapter * factor / keep, a, dtype)
        base_input = (
            rows * factor if dropout.keeps_base else rows + for_base * (factor - 1) / keep
        )
        unit = numerics.range_unit(dtype, base_input)
        if unit is None:
            return u, contraction.frozen_product(base_input, weight, dtype)
        return u, contraction.frozen_product(base_input / unit, weight, dtype) * unit

    keep = jax.checkpoint if dropout.rate else contraction.keep_arguments
    u, base = keep(project)(x, weight, adapter["A"], factor, dropout.key)
    return base + contraction.project_up(u, adapter["B"], scale, dtype)


def _drop(x: jax.Array, dropout: Dropout, key: Any) -> tuple[jax.Array, jax.Array]:
    """The inputs of the adapter and of the frozen layer, not divided by `1 - rate`."""
    if not dropout.rate:
        return x, x
    if dropout.mode != "megatron":
        dropped = numerics.drop(x, dropout.rate, key)
        return dropped, dropped
    for_adapter, for_base = (
        numerics.drop(x, dropout.rate, own) for own in jax.random.split(key)
    )
    return for_adapter, for_base
