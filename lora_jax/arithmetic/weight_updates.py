"""Arithmetic of the adapters of one weight: sums, lower ranks, and differences of weights.

`combinations` computes with `A` and `B`. Here the weight has its own layout, which a target
describes, and an adapter may have DoRA. With `k = m / n`, DoRA changes the weight by
`W (k - 1) + s A B k`, where `k` multiplies columns. So a sum of such changes is again one
of DoRA: with `c = 1 + sum w_i (k_i - 1)`, the merged weight is
`(W + sum w_i s_i A_i B_i k_i / c) c`. Only the norms `n` need the weight.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding

from lora_jax._core import checks, compat, numerics, placement, quantized
from lora_jax.layers import combinations
from lora_jax.layers.combinations import Cut, Method, Term, Update
from lora_jax.layers.lora import Adapter, Adapters
from lora_jax.lowrank import weight_norms
from lora_jax.model.column_norms import column_norm
from lora_jax.plan import layout, parts
from lora_jax.plan.target import Target

T = TypeVar("T")

Norms: TypeAlias = Callable[[Adapter, float], jax.Array]
"""From `A`, `B` and a scale to the column norms of `W + scale * A @ B`, `(*batch, out)`."""


class Weighted(NamedTuple):
    """An adapter of one weight in a sum."""

    adapter: Mapping[str, jax.Array]
    scale: float
    weight: float


def _norms_of(weight: Any, target: Target) -> Norms:
    """The column norms of a weight with any adapter."""

    def norms(factors: Adapter, scale: float) -> jax.Array:
        rank = factors["A"].shape[-1]
        own = dataclasses.replace(target, rank=rank, scale=scale)
        return column_norm(weight, factors, own)

    return norms


def combine_weight(
    given: Sequence[Weighted],
    method: Method,
    cut: Cut,
    key: jax.Array | None = None,
    target: Target | None = None,
    weight: Any = None,
) -> tuple[Adapter, Update]:
    """Combines the adapters of one weight.

    Args:
        given: at least one adapter.
        method: how to combine them.
        cut: the rank, as in `combinations.combine`.
        key: a `jax.random` key, for the methods that need one.
        target: of the weight, or of a part of it, if the result is to have DoRA; None for
            LoRA.
        weight: for DoRA, the weight in its own layout, dense or quantized.

    Returns:
        The adapter, and its scale and energy.
    """

    def combined(given: Sequence[Weighted], weight: Any) -> tuple[Adapter, Update]:
        if target is not None:
            return _combine_dora(given, method, cut, key, _norms_of(weight, target))
        terms = [Term(g.adapter["A"], g.adapter["B"], g.scale, g.weight) for g in given]
        update = combinations.combine(terms, method, cut, key)
        return {"A": update.a, "B": update.b}, update

    return automatically(combined, given, weight)


def resize_weight(
    adapter: Mapping[str, jax.Array],
    scale: float,
    cut: Cut,
    target: Target | None = None,
    weight: Any = None,
) -> tuple[Adapter, Update]:
    """Reduces the rank of the adapter of one weight.

    Args:
        adapter: `A` and `B`, and `m` for DoRA.
        scale: multiplies `A @ B`.
        cut: the rank of the result.
        target: for DoRA, as in `combine_weight`.
        weight: for DoRA, as in `combine_weight`.

    Returns:
        The adapter, with the same scale, and its energy.
    """

    def resized(adapter: Adapter, weight: Any) -> tuple[Adapter, Update]:
        a, b, factor, norms = adapter["A"], adapter["B"], None, None
        if target is not None:
            norms = _norms_of(weight, target)
            factor = _column_factor(adapter, scale, norms)
            b = _times_columns(b, factor)
        update = combinations.resize(a, b, scale, cut)
        if update.a is a:
            return dict(adapter), update
        if norms is None:
            return {"A": update.a, "B": update.b}, update
        dtype = numerics.promote(a.dtype, adapter["B"].dtype)
        return _with_magnitude(update, factor, norms, dtype), update

    return automatically(resized, dict(adapter), weight)


def extract_weight(base: Any, tuned: Any, target: Target, cut: Cut, dtype: Any) -> Update:
    """Approximates the difference of two weights by an update of low rank.

    Args:
        base: in its own layout, dense or quantized.
        tuned: of the same shape.
        target: of the weight, or of a part of it. The update has its scale.
        cut: the rank of the update.
        dtype: of the factors.
    """
    if target.method == "dora":
        raise ValueError(
            "a difference does not show magnitudes: make the plan with use_dora=False."
        )
    if not target.scale:
        raise ValueError("the scale is 0, so no adapter has an effect: change the plan.")

    def extracted(*weights: Any) -> Update:
        old, new = (
            layout.to_matrix(parts.take(dense, target.part), target.alone)
            for dense in map(quantized.as_dense, weights)
        )
        return combinations.extract(old, new, target.scale, cut, dtype)

    return automatically(extracted, *placement.on_device((base, tuned)))


def _combine_dora(
    given: Sequence[Weighted], method: Method, cut: Cut, key: Any, norms: Norms
) -> tuple[Adapter, Update]:
    """The DoRA adapter of a sum of adapters, some of which have DoRA."""
    active = [own for own in given if own.weight]
    if method.name == "exact" and len(active) == 1:
        (own,) = active
        if own.weight == 1.0 and "m" in own.adapter:
            adapter = dict(own.adapter)
            return adapter, Update(adapter["A"], adapter["B"], own.scale, 1.0)
    terms, columns = [], None
    for own in given:
        b = own.adapter["B"]
        if own.weight and "m" in own.adapter:
            factor = _column_factor(own.adapter, own.scale, norms)
            change = own.weight * (factor - 1.0)
            columns = change if columns is None else columns + change
            b = _times_columns(b, factor)
        terms.append(Term(own.adapter["A"], b, own.scale, own.weight))
    update = combinations.combine(terms, method, cut, key)
    dtype = numerics.promote(*(g.adapter[name].dtype for g in given for name in "AB"))
    columns = None if columns is None else 1.0 + columns
    return _with_magnitude(update, columns, norms, dtype), update


def _column_factor(
    adapter: Mapping[str, jax.Array], scale: float, norms: Norms
) -> jax.Array:
    """`m / n`, `(*batch, out)`."""
    factors = {name: adapter[name] for name in "AB"}
    return weight_norms.factor(adapter["m"], norms(factors, scale))


def _times_columns(b: jax.Array, columns: jax.Array) -> jax.Array:
    """`B` with its columns multiplied by `(*batch, out)`, in the wider dtype."""
    wide = numerics.accumulation_dtype(b.dtype, columns.dtype)
    return b.astype(wide) * columns.astype(wide)[..., None, :]


def _with_magnitude(
    update: Update, columns: jax.Array | None, norms: Norms, dtype: Any
) -> Adapter:
    """The DoRA adapter of the weight `W c + scale * A @ B`; None means that `c` is 1.

    A column that has an update and whose `c` is 0 has no such adapter, and becomes NaN.
    """
    b = update.b
    if columns is not None:
        b = jnp.where(b == 0, 0, _times_columns(b, 1.0 / columns))
    factors = {"A": update.a.astype(dtype), "B": b.astype(dtype)}
    norm = norms(factors, update.scale)
    return factors | {"m": norm if columns is None else columns.astype(norm.dtype) * norm}


def static_number(name: str, value: Any) -> float:
    """Checks a number that is not traced, and returns it as a Python number."""
    checks.check_number(name, value)
    if isinstance(value, Tracer):
        raise TypeError(f"{name} must be a number, got {value}: a plan is static.")
    return float(value)


def checked_cut(rank: Any, energy: Any) -> Cut:
    """Checks a rank and an energy, either of which may be None."""
    if rank is not None:
        checks.check_rank(rank)
    return Cut(
        rank and int(rank), None if energy is None else checked_share("energy", energy)
    )


def checked_share(name: str, value: Any) -> float:
    """Checks a number above 0 and at most 1, and returns it."""
    share = static_number(name, value)
    if not 0.0 < share <= 1.0:
        raise ValueError(f"{name} must be above 0 and at most 1, got {share}.")
    return share


def check_finite(adapters: Adapters) -> None:
    """Raises FloatingPointError if an adapter has an infinity or NaN, outside a trace."""
    for path, adapter in adapters.items():
        for name, array in adapter.items():
            if not isinstance(array, Tracer) and not numerics.are_finite(array):
                cause = "an argument had one, or a value is beyond the range of its dtype"
                if "m" in adapter:
                    cause += ", or the columns of the frozen weight cancel in the sum"
                raise FloatingPointError(
                    f"at {path!r}: {name} has an infinity or a NaN: {cause}."
                )


def automatically(function: Callable[..., T], *values: Any) -> T:
    """Calls `function(*values)` with the explicit mesh axes of arrays made automatic.

    Decompositions and folds would need shardings of their intermediate values.
    """
    kinds = [jax.typeof(x) for x in jax.tree.leaves(values) if isinstance(x, jax.Array)]
    meshes = filter(compat.has_explicit_axes, map(compat.mesh_of, kinds))
    mesh = next(meshes, jax.sharding.AbstractMesh((), ()))
    return compat.automatically(function, mesh, *values)


def laid_like(adapter: Mapping[str, jax.Array], like: Mapping[str, jax.Array]) -> Adapter:
    """An adapter with the shardings of another; a rank is never split."""
    laid = {}
    for name, array in adapter.items():
        place = getattr(like.get(name), "sharding", None)
        on_mesh = isinstance(place, NamedSharding) and not isinstance(array, Tracer)
        laid[name] = placement.put(array, place) if on_mesh else array
    return laid
