"""Initializes adapters from the inputs of their weights: EVA."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Concatenate, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core import checks, tree_paths
from lora_jax._core.tree_paths import Tree
from lora_jax.from_data import principal_components
from lora_jax.from_data.principal_components import Components
from lora_jax.layers.lora import Adapter
from lora_jax.model import initialization, sharding
from lora_jax.model.column_norms import column_norm
from lora_jax.plan import derived_plans, parts, plan_checks, trained_leaves
from lora_jax.plan.adapter_plan import AdapterPlan, Target
from lora_jax.plan.derived_plans import Size
from lora_jax.transform.adapt import OnMerge

__all__ = ["ExplainedAdapters", "init_adapters_from_inputs"]

_NO_RANK = "EVA gave it the rank 0: its inputs explain less than those of other weights"


class ExplainedAdapters(NamedTuple):
    """The result of `init_adapters_from_inputs`."""

    adapters: dict[str, Adapter]
    """`{path: adapter}`, the adapters of `plan`."""
    plan: AdapterPlan
    """The plan with the redistributed ranks."""
    explained: dict[str, jax.Array]
    """`{path: (*batch, components)}` with the paths of the given plan: the share of the
    variance of the inputs that each component explains, in descending order."""


def init_adapters_from_inputs(
    key: jax.Array,
    params: Tree,
    plan: AdapterPlan,
    fn: Callable[Concatenate[Tree, ...], Any],
    batches: Iterable[tuple[Any, ...]],
    *,
    rho: float = 2.0,
    iterations: int = 1,
    on_merge: OnMerge = "error",
    on_stop_gradient: Literal["error", "base", "all"] = "error",
) -> ExplainedAdapters:
    """Initializes adapters with principal components of the inputs of their weights (EVA).

    The columns of `A` are the first principal components of the inputs of a weight, in all
    products of `fn` with it and over all batches. They are orthonormal. `B` is zero, so the
    model does not change. Ranks are redistributed: the sum of the ranks stays, and they go
    to the components that explain the largest share of the variance of their inputs. Scales
    stay, so alphas change in proportion to the ranks.

    Each matrix of a stack (layers, experts) has its own inputs and its own rank. The
    matrices of one rank become one target, a part of the weight such as `"layers/up[:2]"`.
    A weight that gets no rank has no adapter.

    The components come from a randomized decomposition of the covariance of the inputs,
    which is never computed: only products of it with `rho * rank + 10` columns are. They
    are gradients of a function whose backward pass is replaced, so a product counts if a
    floating-point output of `fn` depends on it in a differentiable way. The loss of the
    training is a good `fn`. Padding counts as any input does, so give batches without it.

    Args:
        key: a `jax.random` key, for the randomized decomposition.
        params: the params of the plan. Weights may be quantized.
        plan: what `plan_adapters` returned; the `init` of its config is not used. Its
            dropout is not applied.
        fn: `fn(params, *batch)`, such as the model or its loss.
        batches: an iterable of tuples, each with the arguments of `fn` after `params`, of
            types that `jax.jit` accepts. It is read `1 + iterations` times. All inputs have
            the same weight.
        rho: the largest rank of a target is `round(rho * rank)`. At 1 all ranks stay.
        iterations: the number of power iterations. With 0, one pass is enough, and
            `batches` may be a generator; then the components are less precise if the
            variances decrease slowly.
        on_merge: as in `adapt`. A merged use has no inputs that count.
        on_stop_gradient: as in `adapt`.

    Returns:
        `adapters`, as from `init_adapters` for the new `plan`, on a mesh with the shardings
        of `adapter_shardings(params, plan)`. For DoRA, `"m"` has the column norms of the
        weights. `plan_adapters` with the config of the new plan makes this plan. If a
        matrix has fewer inputs than it gets ranks, its last components are arbitrary, and
        their share is zero.

    Raises:
        FloatingPointError: if an input has an infinity or a NaN.
        KeyError: if params lack a weight of the plan.
        TypeError: if an argument has the wrong type, a batch is not a tuple, `batches` can
            be read only once and `iterations` is not 0, or `fn` returns no floating-point
            array.
        ValueError: if a number is out of its range, a rank exceeds the inputs of its
            weight, `batches` are empty or change, a weight has no inputs, such as a table
            that is only looked up, or its inputs do not vary; and as `adapt`.

    References:
        Paischer et al., 2024, algorithm 1, https://arxiv.org/abs/2410.07170. As in peft,
        the mean of the inputs is subtracted. peft passes over the data until the components
        change little, truncates them after each batch, and with `rank_stabilized` changes
        the scales. It gives all layers of equal inputs the ranks in another order.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> def model(params, x):
        ...     return jnp.tanh(x @ params["up"]) @ params["down"]
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> params = {
        ...     "up": jax.random.normal(keys[0], (8, 16)),
        ...     "down": jax.random.normal(keys[1], (16, 4)),
        ... }
        >>> x = jax.random.normal(keys[2], (32, 8)).at[:, 2:].multiply(0.01)
        >>> config = lora_jax.LoraConfig(rank=2)
        >>> plan = lora_jax.plan_adapters(config, params, model, x)
        >>> found = lora_jax.init_adapters_from_inputs(
        ...     jax.random.key(1), params, plan, model, [(x,)]
        ... )
        >>> sum(target.rank for target in found.plan.targets.values())
        4
        >>> found.explained["up"].shape
        (4,)
    """
    checks.check_key("key", key)
    leaves = tree_paths.leaf_paths(params)
    plan_checks.check_params(leaves, plan, values=True)
    checks.check_number("rho", rho)
    if not rho >= 1:
        raise ValueError(f"rho must be at least 1, got {rho}.")
    iterations = checks.as_index("iterations", iterations)
    if iterations < 0:
        raise ValueError(f"iterations must not be negative, got {iterations}.")
    counts = {}
    for path, target in plan.targets.items():
        n_in = target.matrix_shape[-2]
        if target.rank > n_in:
            raise ValueError(
                f"at {path!r}: the rank must be at most the number of inputs, {n_in}, got "
                f"{target.rank}: inputs have no more principal components."
            )
        counts[path] = min(round(target.rank * float(rho)), n_in)
    options: Any = {"on_merge": on_merge, "on_stop_gradient": on_stop_gradient}
    sums = principal_components.sums_of_inputs(
        fn, params, leaves, plan, batches, counts, 1 + iterations, options
    )
    found = principal_components.of_inputs(key, leaves, plan, sums, counts, iterations)
    ranks = _ranks(plan, found)
    new, pieces = _redistributed(plan, ranks)
    new = dataclasses.replace(new, layout=sharding.layout_of(leaves, new))
    adapters: dict[str, Adapter] = {}
    for path, target in new.targets.items():
        old, index = pieces[path]
        a = found[old].vectors[..., : target.rank][index]
        dtype = plan.config.dtype or a.dtype
        b = jnp.zeros(target.adapter_shapes["B"], dtype)
        adapters[path] = {"A": a.astype(dtype), "B": b}
        if target.method == "dora":
            weight = leaves[new.leaf(path)]
            adapters[path]["m"] = column_norm(weight, {}, target)
    adapters |= trained_leaves.init_all(leaves, new)
    places = sharding.init_shardings(leaves, new)
    if places is not None:
        adapters = {n: initialization.put(own, places[n]) for n, own in adapters.items()}
    explained = {path: own.explained for path, own in found.items()}
    return ExplainedAdapters(adapters, new, explained)


def _ranks(plan: AdapterPlan, found: Mapping[str, Components]) -> dict[str, np.ndarray]:
    """The rank of each matrix of each target, `(*batch)`.

    The components with the largest shares are chosen, as many as the plan has ranks.
    """
    shares = {path: np.asarray(own.explained) for path, own in found.items()}
    budget = sum(
        own.rank * math.prod(own.matrix_shape[:-2]) for own in plan.targets.values()
    )
    every = np.concatenate([own.ravel() for own in shares.values()])
    chosen = np.zeros(len(every), int)
    chosen[np.argsort(-every, kind="stable")[:budget]] = 1
    ends = np.cumsum([own.size for own in shares.values()])[:-1]
    pieces = zip(shares.items(), np.split(chosen, ends), strict=True)
    return {path: own.reshape(x.shape).sum(-1) for (path, x), own in pieces}


def _redistributed(
    plan: AdapterPlan, ranks: Mapping[str, np.ndarray]
) -> tuple[AdapterPlan, dict[str, tuple[str, Any]]]:
    """The plan with these ranks, and for each new path the old one and an index of `A`."""
    targets, pieces, skipped = {}, {}, dict(plan.skipped)
    for path, target in plan.targets.items():
        leaf = plan.leaf(path)
        for rank, part, index in _pieces(target, ranks[path]):
            if rank:
                own = dataclasses.replace(target, rank=rank, part=part)
                targets[leaf + own.suffix] = own
                pieces[leaf + own.suffix] = path, index
    if targets == dict(plan.targets):
        return plan, pieces
    kept = {path.removesuffix(own.suffix) for path, own in targets.items()}
    skipped |= {leaf: _NO_RANK for leaf in plan.by_leaf() if leaf not in kept}
    new = dataclasses.replace(plan, targets=targets, skipped=skipped)
    sizes = {path: Size(own.rank, own.scale) for path, own in targets.items()}
    return derived_plans.with_sizes(new, sizes, by_path=True), pieces


def _pieces(target: Target, ranks: np.ndarray) -> Iterator[tuple[int, str, Any]]:
    """The parts of a target with one rank each, and their indices in the stack."""
    if len({*ranks.ravel().tolist()}) == 1:
        yield int(ranks.ravel()[0]), target.part, ...
        return
    own = parts.entries(target.part, target.shape)
    axes = [axis for axis in target.batch_axes if not isinstance(own[axis], int)]
    *outer, _ = axes
    has_list = any(isinstance(entry, tuple) for entry in own)
    for lead in itertools.product(*(range(parts.count(own[axis])) for axis in outer)):
        groups: dict[int, list[int]] = {}
        for i, rank in enumerate(ranks[lead].tolist()):
            groups.setdefault(rank, []).append(i)
        for rank, alike in groups.items():
            # An index may have one list.
            for among in [[i] for i in alike] if has_list else [alike]:
                entries = list(own)
                for axis, chosen in zip(axes, (*([i] for i in lead), among), strict=True):
                    indices = parts.indices_of(own[axis])
                    entries[axis] = parts.grouped([indices[i] for i in chosen])
                index = (*(slice(i, i + 1) for i in lead), np.array(among))
                yield rank, parts.as_text(entries, target.shape), index
