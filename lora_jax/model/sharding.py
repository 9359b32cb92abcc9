"""Where adapters and optimizer states lie on a mesh: as the weights that they adapt.

With `s` the `PartitionSpec` of a weight, without the mesh axes that split examples:

    A = P(*s[batch], fold(s[in]), None)
    B = P(*s[batch], None, fold(s[out]))
    m = P(*s[batch], fold(s[out]))

The rank is never split. So `x @ A` and `(x @ A) @ B` are split as `x` and `x @ W` are, and
no product moves a factor between devices. Axes that split examples, of data parallelism and
FSDP, do not split factors: the frozen weight is gathered along them, and factors are small.
They keep splitting batch axes, since experts may lie on them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._core import checks, numerics, placement, tree_paths
from lora_jax.layers.lora import Adapters
from lora_jax.plan import mesh_layout, parts, plan_checks, trained_leaves
from lora_jax.plan.adapter_plan import AdapterPlan, Target
from lora_jax.plan.adapter_stack import AdapterStack
from lora_jax.plan.mesh_layout import MeshLayout
from lora_jax.plan.target import VALUE, TrainedLeaf

__all__ = ["adapter_shardings", "optimizer_shardings"]

DATA_AXES = ("batch", "data", "dp", "fsdp", "fsdp_transpose", "replica", "replica_dcn")
"""The names of mesh axes that split examples, unless `data_axes` says which do."""

Shardings: TypeAlias = dict[str, dict[str, NamedSharding]]


def adapter_shardings(
    params: tree_paths.PyTree,
    plan: AdapterPlan,
    *,
    data_axes: str | Sequence[str] | None = None,
) -> Shardings:
    """Derives where adapters lie on a mesh from where their weights lie.

    With these shardings the adapted program moves no weight and no factor between devices.
    In addition to what the frozen program moves, it sums the adapters' gradients over the
    axes of `data_axes`, and partial sums of `x @ A`, of size `(tokens, rank)`, where a
    weight's input is split.

    Args:
        params: the params of the plan, on a mesh: arrays, `jax.ShapeDtypeStruct`s with a
            sharding, quantized weights of either. Inside a trace, axes of type `Explicit`
            are known and others are not.
        plan: what `plan_adapters` returned.
        data_axes: the names of the mesh axes that split examples: those of data parallelism
            and FSDP. They split batch axes of adapters only. None means the axes of the
            mesh that are called `"batch"`, `"data"`, `"dp"`, `"fsdp"`, `"fsdp_transpose"`,
            `"replica"` or `"replica_dcn"`.

    Returns:
        `{path: {"A": NamedSharding, "B": NamedSharding}}`, and `"m"` for DoRA, a tree like
        the adapters. The memory kind is the weight's. A trained leaf lies as the frozen
        one. An adapter of a weight that lies on no mesh is replicated over the mesh of the
        others. A mesh axis that splits the second of several folded axes splits the factor
        only if the first is split down to one entry; otherwise the factor is replicated
        along it.

    Raises:
        KeyError, TypeError, ValueError: if the plan was not made for these params.
        TypeError: if `data_axes` are not names, or an array of several devices has no
            `NamedSharding`.
        ValueError: if no weight lies on a mesh, two lie on different meshes, the mesh lacks
            an axis of `data_axes`, or an axis of a weight cannot be split evenly.

    Example:
        >>> import jax, lora_jax
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
        >>> place = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
        >>> params = {"up": jax.ShapeDtypeStruct((8, 16), "float32", sharding=place)}
        >>> plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=2), params)
        >>> shardings = lora_jax.adapter_shardings(params, plan)
        >>> {name: tuple(own.spec) for name, own in shardings["up"].items()}
        {'A': (None, None), 'B': (None, 'tensor')}
    """
    leaves = tree_paths.leaf_paths(params)
    plan_checks.check_params(leaves, plan)
    found = _shardings(leaves, plan)
    if not found:
        raise ValueError(
            "no weight of the plan lies on a mesh: put the params there first, with "
            "jax.device_put(params, shardings) or jit with out_shardings, where each leaf "
            "has a jax.sharding.NamedSharding. Inside a trace, only axes of type Explicit "
            "are known; call adapter_shardings outside of it."
        )
    return _by_rule(found, plan, _checked_axes(found, data_axes))


def optimizer_shardings(
    optimizer: optax.GradientTransformation,
    adapters: Adapters | AdapterStack,
    shardings: Mapping[str, Mapping[str, Any]] | AdapterStack,
    split_over: str | Sequence[str] = (),
) -> Any:
    """Derives where the state of an optimizer lies on a mesh.

    Use it as the `out_shardings` of `jax.jit(optimizer.init)`, and for the state in the
    shardings of a jitted training step.

    Args:
        optimizer: any optax transformation.
        adapters: arrays or `jax.ShapeDtypeStruct`s; also an `AdapterStack`.
        shardings: of the adapters, as from `adapter_shardings`; for a stack, a stack of
            shardings or only those of its adapters.
        split_over: mesh axes over which arrays of the state are split in addition, such as
            `"data"`: each device then updates its part only (ZeRO-1). An array is split
            along its longest axis that these mesh axes divide, and not along the rank. An
            array without such an axis lies as its adapter.

    Returns:
        A tree like `optimizer.init(adapters)`, of `NamedSharding`s. An array of the state
        that has the path and the shape of an adapter's array, such as a moment, lies as
        that one. All others, such as step counts, are replicated.

    Raises:
        KeyError, TypeError, ValueError: if the shardings are not those of the adapters.
        TypeError: if `optimizer` is not an optax transformation.
        ValueError: if the mesh lacks an axis of `split_over`.

    References:
        Rajbhandari et al., 2020, section 5.1 (stage 1), https://arxiv.org/abs/1910.02054.
    """
    if not callable(getattr(optimizer, "init", None)):
        raise TypeError(
            f"optimizer must be an optax transformation, got {type(optimizer).__name__}: "
            "the order is optimizer_shardings(optimizer, adapters, shardings)."
        )
    given = _entries_of(adapters)
    own = _entries_of(shardings)
    if given.keys() != own.keys() or not own:
        odd = sorted(map("/".join, given.keys() ^ own.keys())) or ["none"]
        raise KeyError(
            "shardings must have the paths and entries of the adapters, as "
            "adapter_shardings(params, plan) returns; one of them lacks "
            f"{tree_paths.listed(odd)}."
        )
    for (path, name), sharding in own.items():
        if not isinstance(sharding, NamedSharding):
            raise TypeError(
                f"the sharding of {name} of {path!r} must be a jax.sharding.NamedSharding, "
                f"got {type(sharding).__name__}: the order is optimizer_shardings("
                "optimizer, adapters, shardings)."
            )
    mesh = next(iter(own.values())).mesh
    names = placement.names_of_axes("split_over", split_over, mesh.axis_names)
    state = jax.eval_shape(optimizer.init, adapters)

    def place(path: Any, leaf: Any) -> NamedSharding:
        keys = tuple(str(getattr(key, "key", "")) for key in path[-2:])
        if keys not in given or given[keys].shape != leaf.shape:
            return NamedSharding(mesh, PartitionSpec())
        return _split_further(own[keys], leaf.shape, keys[1], names)

    return jax.tree_util.tree_map_with_path(place, state)


def init_shardings(leaves: Mapping[str, Any], plan: AdapterPlan) -> Shardings | None:
    """The shardings of new adapters, derived from the weights; None without a mesh."""
    found = _shardings(leaves, plan)
    return _by_rule(found, plan, _checked_axes(found, None)) if found else None


def check_shardings(shardings: Any, plan: AdapterPlan) -> None:
    """Raises unless shardings have the paths and entries of a plan, and divide its shapes.

    Raises:
        KeyError: if a path or an entry is missing or unknown.
        TypeError: if a leaf is not a sharding.
        ValueError: if an entry cannot be split so.
    """
    plan_checks.check_paths("shardings", shardings, list(plan.entries))
    for path, entry in plan.entries.items():
        with checks.at_path(path):
            plan_checks.check_paths(
                "the shardings", shardings[path], [*entry.adapter_shapes]
            )
            for name, shape in entry.adapter_shapes.items():
                own = shardings[path][name]
                if not isinstance(own, jax.sharding.Sharding):
                    raise TypeError(
                        f"the sharding of {name} must be a jax.sharding.Sharding, got "
                        f"{own!r:.60} ({type(own).__name__}): adapter_shardings(params, "
                        "plan) returns such a tree."
                    )
                try:
                    own.shard_shape(shape)
                except ValueError as error:
                    raise ValueError(
                        f"{name} of shape {shape} cannot be split as {own}: {error}"
                    ) from None


def layout_of(leaves: Mapping[str, Any], plan: AdapterPlan) -> MeshLayout | None:
    """What a printed plan says of the mesh; None if the weights do not lie on one mesh.

    A plan may be for weights on several meshes, such as those of pipeline stages. Then
    `adapter_shardings` takes the subset of one.
    """
    try:
        found = _shardings(leaves, plan)
        made = _by_rule(found, plan, _checked_axes(found, None)) if found else None
    except (TypeError, ValueError):  # which adapter_shardings and init_adapters raise
        return None
    if made is None:
        return None
    rows = {}
    for path, entry in plan.entries.items():
        leaf, shapes = plan.leaf(path), entry.adapter_shapes
        texts = {
            name: mesh_layout.as_text(placement.axes_of(made[path][name], len(shape)))
            for name, shape in shapes.items()
        }
        ndim = len(entry.shape)
        axes = placement.axes_of(found[leaf], ndim) if leaf in found else [()] * ndim
        size = _bytes_of_entry(leaves[leaf], entry, plan, made[path])
        pair = texts.get("A", ""), texts.get("B", "")
        rows[path] = mesh_layout.Row(mesh_layout.as_text(axes), *pair, size)
    mesh = next(iter(found.values())).mesh
    frozen = sum(map(placement.bytes_on_each_device, leaves.values()))
    return MeshLayout(dict(mesh.shape), frozen, rows)


def bytes_of_adapters(leaves: Mapping[str, Any], plan: AdapterPlan) -> int:
    """The bytes of new adapters and trained leaves on each device."""
    made = init_shardings(leaves, plan) or {}
    return sum(
        _bytes_of_entry(leaves[plan.leaf(path)], entry, plan, made.get(path))
        for path, entry in plan.entries.items()
    )


def _shardings(leaves: Mapping[str, Any], plan: AdapterPlan) -> dict[str, NamedSharding]:
    """The shardings of the leaves that a plan adapts or trains, if they lie on a mesh."""
    found: dict[str, NamedSharding] = {}
    for path in dict.fromkeys(map(plan.leaf, plan.entries)):
        with checks.at_path(path):
            sharding = placement.sharding_of(leaves[path])
        if sharding is None:
            continue
        first = next(iter(found), path)
        if found and not placement.same_mesh(found[first].mesh, sharding.mesh):
            raise ValueError(
                f"the weights of a plan must lie on one mesh: {first!r} lies on "
                f"{found[first].mesh} and {path!r} on {sharding.mesh}. Put all params on "
                "the same mesh with jax.device_put, or give the subsets of the plan with "
                "the weights of each mesh: plan.subset(patterns)."
            )
        found[path] = sharding
    return found


def _by_rule(
    found: Mapping[str, NamedSharding], plan: AdapterPlan, data: frozenset[str]
) -> Shardings:
    any_mesh = NamedSharding(next(iter(found.values())).mesh, PartitionSpec())
    made: Shardings = {}
    for path, entry in plan.entries.items():
        own = found.get(plan.leaf(path), any_mesh)
        with checks.at_path(path):
            specs = _specs(entry, own, data)
        made[path] = {name: own.update(spec=spec) for name, spec in specs.items()}
    return made


def _specs(
    entry: Target | TrainedLeaf, sharding: NamedSharding, data: frozenset[str]
) -> dict[str, PartitionSpec]:
    """The specs of the arrays of one adapter or trained leaf."""
    axes = placement.axes_of(sharding, len(entry.shape))
    sizes = sharding.mesh.shape
    placement.check_divides(entry.shape, sharding)
    if isinstance(entry, TrainedLeaf):
        return {VALUE: placement.as_spec(axes)}
    own = parts.entries(entry.part, entry.shape)
    cut = parts.cut_axes(entry.part, entry.shape)

    def of(axis: int) -> tuple[str, ...]:
        return () if axis in cut else axes[axis]

    def fold(group: Iterable[int]) -> tuple[str, ...]:
        """The mesh axes of several folded axes, row by row."""
        folded: tuple[str, ...] = ()
        for axis in group:
            names = tuple(name for name in of(axis) if name not in data)
            folded += names
            if parts.count(own[axis]) > math.prod(sizes[name] for name in names):
                break
        return folded

    batch = [of(axis) for axis in entry.batch_axes if not isinstance(own[axis], int)]
    n_in, n_out = fold(entry.in_axes), fold(entry.out_axes)
    specs = {"A": [*batch, n_in, ()], "B": [*batch, (), n_out]}
    if entry.method == "dora":
        specs["m"] = [*batch, n_out]
    return {name: placement.as_spec(spec) for name, spec in specs.items()}


def _bytes_of_entry(
    weight: Any, entry: Target | TrainedLeaf, plan: AdapterPlan, shardings: Any
) -> int:
    """The bytes of one new adapter or trained leaf on each device."""
    wide = numerics.accumulation_dtype(weight.dtype)
    dtypes = {"m": wide, VALUE: trained_leaves.dtype_of(weight, plan)}
    return sum(
        placement.bytes_on_each_device(
            jax.ShapeDtypeStruct(
                shape,
                dtypes.get(name, plan.config.dtype or wide),
                sharding=shardings and shardings[name],
            )
        )
        for name, shape in entry.adapter_shapes.items()
    )


def _checked_axes(
    found: Mapping[str, NamedSharding], data_axes: str | Sequence[str] | None
) -> frozenset[str]:
    """The mesh axes that split examples."""
    names = next(iter(found.values())).mesh.axis_names
    if data_axes is None:
        return frozenset(DATA_AXES)
    return frozenset(placement.names_of_axes("data_axes", data_axes, names))


def _entries_of(tree: Any) -> dict[tuple[str, ...], Any]:
    """The leaves of adapters, by path and name."""
    if isinstance(tree, AdapterStack):
        tree = tree.adapters
    if not isinstance(tree, Mapping) or not all(
        isinstance(x, Mapping) for x in tree.values()
    ):
        raise TypeError(
            "adapters and shardings must be {path: {name: ...}}, as init_adapters and "
            f"adapter_shardings return, got {tree!r:.60}."
        )
    return {(path, name): x for path, own in tree.items() for name, x in own.items()}


def _split_further(
    sharding: NamedSharding, shape: tuple[int, ...], name: str, names: tuple[str, ...]
) -> NamedSharding:
    """A sharding that is also split over the named mesh axes, where they divide an axis."""
    spec = list(placement.axes_of(sharding, len(shape)))
    used = {axis for own in spec for axis in own}
    extra = tuple(axis for axis in names if axis not in used)
    rank = {"A": len(shape) - 1, "B": len(shape) - 2}.get(name)
    sizes = sharding.mesh.shape
    for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]):
        split = (*spec[axis], *extra)
        if (
            axis != rank
            and extra
            and shape[axis] % math.prod(sizes[name] for name in split) == 0
        ):
            spec[axis] = split
            return sharding.update(spec=placement.as_spec(spec))
    return sharding
