"""Merges the adapters of a plan into the weights, and removes them again.

The functions of one weight take the weight in its own layout, with its adapter and its
target. Outside a trace they are compiled, once for each kind of target, so that no array
wider than the weight is kept. Their results have the sharding of the weight.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._core import checks, compat, numerics, placement, quantized, tree_paths
from lora_jax.layers.lora import Adapter, Adapters
from lora_jax.lowrank.low_rank import LowRank
from lora_jax.plan import layout, parts, plan_checks, trained_leaves
from lora_jax.plan.adapter_plan import AdapterPlan, Target
from lora_jax.plan.target import VALUE

__all__ = ["merge_adapters", "unmerge_adapters"]

_LOG = logging.getLogger("lora_jax")

F = TypeVar("F", bound=Callable[..., Any])
Fold: TypeAlias = Callable[..., jax.Array]


def merge_adapters(
    params: tree_paths.Tree,
    adapters: Adapters,
    plan: AdapterPlan,
    *,
    donate: bool = False,
    requantize: bool = False,
) -> tree_paths.Tree:
    """Merges adapters into the weights that they adapt.

    On a mesh no weight is gathered: devices exchange parts of adapters and norms only. One
    case is an exception: in a trace on automatic mesh axes, an adapter of some entries of a
    batch axis that the mesh splits.

    Merged quantized weights are dense. With `requantize` they are quantized again, which
    often loses more than the adapters changed; `merge_losses` measures the loss.

    Args:
        params: the params of the plan.
        adapters: the adapters of the plan.
        plan: what `plan_adapters` returned.
        donate: reuse the memory of each old weight for the merged one. The old weights are
            deleted, even if an error is raised. Has no effect on NumPy arrays, nor inside
            `jax.jit`, which has its own donation.
        requantize: quantize merged weights again, in the format and with the settings of
            the old ones. Outside a trace, the loss of each weight is logged at the level
            INFO to the logger `"lora_jax"`.

    Returns:
        A tree like `params`. Adapted weights are new arrays with the dtype and the sharding
        of the old ones, computed in at least float32 and rounded once. Trained leaves are
        copies of their values, with the dtype and the sharding of the old leaves. All other
        leaves are the same objects as in `params`.

    Raises:
        FloatingPointError: if a merged weight has an infinity or a NaN. This is checked
            only outside a trace.
        KeyError: if params lack a weight of the plan, or the paths or entries of the
            adapters are not those of the plan.
        TypeError: if an array is not floating point.
        ValueError: if a shape is not that of the plan, an adapter has biases, a weight to
            donate is at two paths, or an adapter is for one kind of use of a weight that
            the function uses in two ways.
    """
    leaves, treedef = plan_checks.checked_leaves(params, adapters, plan)
    plan_checks.check_all_uses(plan)
    checks.check_flags(donate=donate, requantize=requantize)
    if donate:
        tree_paths.check_none_is_shared(leaves, plan.by_leaf(), "merge with donate=False")
    merged = fold_all(merge, leaves, adapters, {}, plan, donate)
    if requantize:
        merged = requantize_all(leaves, merged)
    merged |= copy_trained(leaves, adapters, plan)
    return treedef.unflatten((leaves | merged).values())


def unmerge_adapters(
    params: tree_paths.Tree,
    adapters: Adapters,
    plan: AdapterPlan,
    *,
    column_norms: Mapping[str, jax.Array] | None = None,
    originals: Mapping[str, jax.Array] | None = None,
) -> tree_paths.Tree:
    """Removes adapters from merged weights: undoes `merge_adapters`.

    The rounding of the merge is not undone; `lora_jax.unmerge_lora_weight` and
    `lora_jax.unmerge_dora_weight` give error bounds.

    Args:
        params: what `merge_adapters` returned.
        adapters: the adapters that were merged.
        plan: the plan of the merge.
        column_norms: what `adapted_column_norms` returned before the merge; needed if the
            method is DoRA.
        originals: a dict from the paths of the trained leaves to their values before the
            merge; needed if the plan trains leaves.

    Returns:
        A tree like `params`, with the weights from before the merge. All other leaves are
        the same objects as in `params`.

    Raises:
        FloatingPointError: as `merge_adapters`; also for a DoRA column whose magnitude is
            zero, which was lost in the merge.
        KeyError, TypeError, ValueError: as `merge_adapters`, and ValueError if
            `column_norms` or `originals` are missing, or given and not needed.
    """
    leaves, treedef = plan_checks.checked_leaves(params, adapters, plan)
    plan_checks.check_all_uses(plan)
    norms = plan_checks.checked_norms(column_norms, plan)
    trained = trained_leaves.restore(originals, plan)
    restored = fold_all(unmerge, leaves, adapters, norms, plan, False)
    restored |= trained
    return treedef.unflatten((leaves | restored).values())


class Finite(NamedTuple):
    """Scalar flags: whether all entries of a result and of its arguments are finite."""

    result: Any
    weight: Any
    adapter: Any


def automatic(keeps: bool) -> Callable[[F], F]:
    """On a mesh with explicit axes, runs a function with automatic axes.

    Otherwise folds of axes, and products with differently sharded factors, would need the
    sharding of each intermediate array. If `keeps`, the function keeps the shape of the
    weight, its first argument, and the result has the sharding of the weight. Otherwise the
    result is replicated.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapped(weight, *rest):
            weight = jnp.asarray(quantized.as_dense(weight))
            spec = compat.explicit_spec(weight)
            if not any(spec):
                return function(weight, *rest)
            out: Any = PartitionSpec(*spec) if keeps else PartitionSpec()
            with compat.on_mesh_of(weight):
                inner: Any = jax.sharding.auto_axes(function, out_sharding=out)
                return inner(weight, *rest)

        return cast(F, wrapped)

    return decorate


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Own:
    """A target, and how its weight may be used.

    Attributes:
        target: of the plan.
        in_place: whether the weight is neither sliced nor folded, because a mesh splits an
            axis so that the slice or the fold would move the weight. The update of a part
            is then padded with zeros to the shape of the weight.
        split: how many parts the first axis is split into; None if that is not known.
    """

    target: Target
    in_place: bool
    split: int | None

    def take(self, weight: Any) -> jax.Array:
        """The adapted part; in place, the whole weight."""
        return weight if self.in_place else parts.take(weight, self.target.part)

    def put(self, weight: jax.Array, result: jax.Array) -> jax.Array:
        """The weight with its adapted part replaced by what is in the result."""
        part, shape = self.target.part, self.target.shape
        if part and self.in_place:
            return jnp.where(parts.mask(part, shape), result, weight)
        return parts.put(weight, part, result)

    def adapter(
        self, adapter: Mapping[str, jax.Array]
    ) -> tuple[Mapping[str, jax.Array], Target]:
        """The adapter of what `take` returns, and its target."""
        if self.in_place and self.target.part:
            return layout.of_whole(adapter, self.target)
        return adapter, self.target.alone

    def value(self, weight: jax.Array, adapter: Mapping[str, jax.Array]) -> LowRank:
        """What `take` returns and its update."""
        return layout.low_rank(self.take(weight), *self.adapter(adapter))


def own(weight: Any, target: Target) -> Own:
    """Tells how a weight may be used, from its sharding.

    In a trace on automatic mesh axes the sharding is not known. There no axis is sliced but
    batch axes, and no weight is folded.
    """
    cut = parts.cut_axes(target.part, target.shape)
    split = placement.parts(weight)
    known = placement.is_known(weight)
    folded = [
        axis
        for side in (target.in_axes, target.out_axes)
        for axis in [axis for axis in side if target.shape[axis] > 1][1:]
    ]
    moved = [
        split[axis] > 1 or not (known or axis in target.batch_axes)
        for axis in (*cut, *folded)
    ]
    first = split[0] if known and 0 not in cut else None
    return Own(target, any(moved), first)


@automatic(keeps=True)
def merge(
    weight: jax.Array, adapter: Mapping[str, jax.Array], norm: None, own: Own
) -> jax.Array:
    """The weight with its adapter merged. `norm` is unused; only `unmerge` needs it."""
    del norm
    return own.put(weight, own.value(weight, adapter).merge())


@automatic(keeps=True)
def unmerge(
    weight: jax.Array,
    adapter: Mapping[str, jax.Array],
    norm: jax.Array | None,
    own: Own,
) -> jax.Array:
    """The weight from before its adapter was merged."""
    if norm is not None:
        norm = own.adapter({"m": norm})[0]["m"]
    return own.put(weight, own.value(weight, adapter).unmerge(norm))


def fold_all(
    fold: Fold,
    leaves: Mapping[str, Any],
    adapters: Mapping[str, Adapter],
    norms: Mapping[str, jax.Array],
    plan: AdapterPlan,
    donate: bool,
) -> dict[str, jax.Array]:
    """Runs `merge` or `unmerge` on each weight of a plan.

    Returns:
        The new weights by their paths.

    Raises:
        FloatingPointError: if a result has an infinity or a NaN, outside a trace.
    """
    results, finite = {}, {}
    for path, target in plan.targets.items():
        with checks.at_path(path):
            leaf = plan.leaf(path)
            weight = results.get(leaf, leaves[leaf])
            donates = donate or leaf in results  # an intermediate result of another part
            results[leaf], finite[path] = _run(
                fold, weight, adapters[path], norms.get(path), target, donates
            )
    lines = []
    for path, flags in finite.items():
        if flags is not None and not _is_traced(flags) and not bool(flags.result):
            result = results[plan.leaf(path)]
            lines.append(f"  {path!r}: {_blame(flags, result, adapters[path])}")
    if lines:
        raise FloatingPointError("\n".join(["the result is not finite:", *lines]))
    return results


def requantize_all(
    leaves: Mapping[str, Any], merged: Mapping[str, jax.Array]
) -> dict[str, Any]:
    """Quantizes merged weights like the leaves at their paths, and logs the losses."""
    stored = {}
    for path, weight in merged.items():
        old = leaves[path]
        stored[path] = weight
        if quantized.is_quantized(old):
            with checks.at_path(path):
                stored[path] = old.quantize_like(weight)
            if _LOG.isEnabledFor(logging.INFO) and not _is_traced(old, weight):
                lost = float(_requantization_loss(old, weight, stored[path]))
                _LOG.info("quantized again: %s, |lost| / |update| = %.3g", path, lost)
    return stored


@jax.jit
def _requantization_loss(old: Any, merged: jax.Array, stored: Any) -> jax.Array:
    """`|lost| / |update|`; infinite if the update is zero."""
    wide = numerics.accumulation_dtype(merged.dtype)
    dense = [x.astype(wide).ravel() for x in map(quantized.as_dense, (old, stored))]
    merged = merged.astype(wide).ravel()
    update, lost = (jnp.linalg.norm(merged - x) for x in dense)
    return lost / update


def copy_trained(
    leaves: Mapping[str, Any], adapters: Adapters, plan: AdapterPlan
) -> Adapter:
    """Copies of the trained leaves by path, for the params.

    Raises:
        FloatingPointError: outside a trace, if one has an infinity or a NaN.
    """
    merged = {}
    for path in plan.trained:
        copy = jnp.copy(placement.on_device(adapters[path][VALUE]))
        copy = copy.astype(jax.dtypes.canonicalize_dtype(leaves[path].dtype))
        if not isinstance(copy, Tracer) and not numerics.are_finite(copy):
            raise FloatingPointError(
                f"at {path!r}: the trained leaf has an infinity or a NaN in {copy.dtype}: "
                "take adapters from before the training diverged, or params whose dtype "
                "has the range of the trained values."
            )
        merged[path] = placement.like(leaves[path], copy)
    return merged


def _blame(flags: Finite, result: jax.Array, adapter: Adapter) -> str:
    """The reason why a result is infinite or NaN."""
    before = [name for name in ("weight", "adapter") if not bool(getattr(flags, name))]
    if before:
        return f"the {' and the '.join(before)} had an infinity or a NaN already"
    lost = ", or a magnitude of 0 cannot be undone" if "m" in adapter else ""
    return f"the sum is beyond the range of {result.dtype}{lost}"


def _is_traced(*trees: Any) -> bool:
    """Whether any leaf of the trees is a value inside a trace."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def _run(
    fold: Fold,
    weight: jax.Array,
    adapter: Mapping[str, jax.Array],
    norm: jax.Array | None,
    target: Target,
    donate: bool,
) -> tuple[jax.Array, Finite | None]:
    """Runs `fold`, compiled unless inside a trace.

    Returns:
        The result, with the sharding of the weight, and flags for finite values; inside a
        trace None in place of the flags.
    """
    if _is_traced(weight, adapter, norm, jnp.zeros(())):  # of constants too, in a program
        return fold(weight, dict(adapter), norm, own(weight, target)), None
    given = getattr(jax.tree.leaves(weight)[0], "sharding", None)
    if isinstance(given, NamedSharding):
        given = placement.sharding_of(weight)
    here, adapter, norm = placement.on_device((weight, dict(adapter), norm))
    sharding = placement.sharding_of(here) if isinstance(given, NamedSharding) else None
    how = own(weight, target)
    is_copy = isinstance(weight, jax.Array) and here is not weight
    donated = is_copy or (donate and isinstance(weight, jax.Array))
    result, finite = _compiled_fold(fold, sharding, donated)(here, adapter, norm, how)
    if given is not None and given.memory_kind != result.sharding.memory_kind:
        result = jax.device_put(result, given)
    if is_copy and donate:
        weight.delete()
    return result, finite


@functools.lru_cache(maxsize=64)
def _compiled_fold(fold: Fold, sharding: NamedSharding | None, donate: bool) -> Any:
    def folded(weight, adapter, norm, how):
        result = fold(weight, adapter, norm, how)
        return result, Finite(*map(numerics.are_finite, (result, weight, adapter)))

    donated = (0,) if donate else ()
    return jax.jit(folded, donate_argnums=donated, out_shardings=(sharding, None))
