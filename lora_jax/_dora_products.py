"""The products of a DoRA layer, for both norm axes and every way to drop its input.

`rows` is the input `(*batch, rows, in)` and `factor` is `m / n`, `(*batch, out)` or
`(*batch, in)`; results are wide `(*batch, rows, out)`, without bias.
"""

import dataclasses
from collections.abc import Mapping

import jax

from lora_jax import _numerics


@dataclasses.dataclass(frozen=True)
class Dropout:
    """What `dora_linear` was told of dropout.

    Attributes:
        rate: a Python number; 0 is no dropout.
        key: a `jax.random` key, or None.
        mode: `"peft"`, `"torchtune"` or `"megatron"`.
        lead: the axes of the input before its tokens were folded.
    """

    rate: float
    key: jax.Array | None
    mode: str
    lead: tuple[int, ...]

    @property
    def keeps_base(self) -> bool:
        """Whether the frozen layer and its factor see the input undropped."""
        return not self.rate or self.mode == "torchtune"


def scale_outputs(
    rows: jax.Array,
    weight: jax.Array,
    adapter: Mapping[str, jax.Array],
    scale: float | jax.Array,
    factor: jax.Array,
    dropout: Dropout,
) -> jax.Array:
    """`k * (x @ (W + D))`, `k` one factor for each output."""
    base = _numerics.matmul(rows, weight)
    factor = _numerics.as_row(factor, base.dtype)
    if not dropout.rate:
        u = _numerics.project_down(rows, adapter["A"])
        return factor * (base + _up(u, adapter, scale, rows))

    # Under jax.checkpoint the masks are drawn again in the backward pass and not kept.
    @jax.checkpoint
    def dropped(rows, weight, a, key):
        for_adapter, for_base = _drop(rows, dropout, key)
        u = _numerics.project_down(for_adapter, a)
        return u, None if dropout.keeps_base else _numerics.matmul(for_base, weight)

    u, dropped_base = dropped(rows, weight, adapter["A"], dropout.key)
    update = _up(u, adapter, scale / (1.0 - dropout.rate), rows)
    if dropped_base is None:
        return factor * (base + update)
    # base + (k - 1) * dropped_base + k * update, with one array kept for the gradient of
    # k instead of two.
    dropped_base = _numerics.multiply(dropped_base, 1.0 / (1.0 - dropout.rate))
    return base - dropped_base + factor * (dropped_base + update)


def scale_inputs(
    rows: jax.Array,
    weight: jax.Array,
    adapter: Mapping[str, jax.Array],
    scale: float | jax.Array,
    factor: jax.Array,
    dropout: Dropout,
) -> jax.Array:
    """`(k * x) @ (W + D)`, `k` one factor for each input.

    The frozen layer sees one input in every mode, since the factor is on that side:
    `x @ W + ((k - 1) * x2) @ W` is `(x + (k - 1) * x2) @ W`.
    """

    def project(rows, weight, a, factor, key):
        wide = rows.astype(_numerics.accumulation_dtype(rows.dtype))
        factor = _numerics.as_row(factor, wide.dtype)
        for_adapter, for_base = _drop(wide, dropout, key)
        keep = 1.0 / (1.0 - dropout.rate)
        scaled = _numerics.multiply(for_adapter * factor, keep)
        u = _numerics.project_down(scaled.astype(rows.dtype), a)
        if dropout.keeps_base:
            base_input = wide * factor
        else:
            base_input = wide + _numerics.multiply(for_base, keep) * (factor - 1.0)
        return u, _numerics.matmul(base_input.astype(rows.dtype), weight)

    if dropout.rate:
        project = jax.checkpoint(project)
    u, base = project(rows, weight, adapter["A"], factor, dropout.key)
    return base + _up(u, adapter, scale, rows)


def _drop(
    x: jax.Array, dropout: Dropout, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """What the adapter and the frozen layer see of `x`, not divided by `1 - rate`."""
    if key is None or not dropout.rate:
        return x, x
    if dropout.mode != "megatron":
        dropped = _numerics.drop(x, dropout.rate, key, dropout.lead)
        return dropped, dropped
    key_adapter, key_base = jax.random.split(key)
    return (
        _numerics.drop(x, dropout.rate, key_adapter, dropout.lead),
        _numerics.drop(x, dropout.rate, key_base, dropout.lead),
    )


def _up(
    u: jax.Array,
    adapter: Mapping[str, jax.Array],
    scale: float | jax.Array,
    rows: jax.Array,
) -> jax.Array:
    """`scale * u @ B`: wide `(*batch, rows, out)`."""
    return _numerics.project_up(_numerics.multiply(u, scale), adapter["B"], rows.dtype)
