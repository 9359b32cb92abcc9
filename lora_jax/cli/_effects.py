"""Compares the effects of adapters that are stored differently.

One adapter can be stored in many ways: with other factors `A` and `B`, with the scale in
`B`, with zeros for a larger rank, with layers separate or stacked, for a weight or for its
parts. All have the same update `scale * A @ B`.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import numpy as np

from lora_jax import plots
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.cli import _adapters, _loading, _ties
from lora_jax.cli._adapters import Contents
from lora_jax.peft.formats.checkpoint import Checkpoint
from lora_jax.peft.leaves import Known, Places, Problems
from lora_jax.peft.load import Loaded, assemble, find_places
from lora_jax.peft.locate import find_full
from lora_jax.peft.words import mask_numbers
from lora_jax.plan import layout, parts
from lora_jax.plan.adapter_plan import AdapterPlan, Target

# The rounding of a norm in float64.
_ROUNDING = 1e-14

Effect: TypeAlias = dict[str, np.ndarray]
"""The float64 arrays of an adapter, `A (*batch, in, rank)` and `B (*batch, rank, out)` with
the scale in `B`; or of a full array that replaces one of the model, `whole`."""


class _Side(NamedTuple):
    """Adapters with the paths of a plan."""

    adapters: Mapping[str, Mapping[str, Any]]
    plan: AdapterPlan
    others: dict[str, Effect]
    """The effects of full arrays, and of adapters without a path, by name."""


class Apart(NamedTuple):
    """The difference of two effects: the name, both norms, and what differs most."""

    name: str
    norms: tuple[float, float]
    what: str
    relative: float
    """The norm of the difference, relative to the larger norm of both."""


def compare(a: Contents, b: Contents, names: Any) -> list[Apart]:
    """Compares the effects of adapters, module by module or weight by weight.

    Args:
        a: the adapters of a directory, in either format.
        b: the adapters of another directory.
        names: of `--names`; None to match modules and paths by their words.

    Raises:
        CheckpointError, ValueError: if modules and paths cannot be matched.
    """
    if are_alike(a, b):
        effects = tuple(_effects_of(c.adapters) | _whole_effects(c) for c in (a, b))
    else:
        sides = _sides(a, b, names)
        plans = [side.plan for side in sides]
        uses = {own.leaf(p) for own in plans for p, t in own.targets.items() if t.use}
        effects = tuple(_by_leaf(side, uses) for side in sides)
    nothing = {"A": np.zeros((1, 1)), "B": np.zeros((1, 1))}
    return [
        _apart(name, *(each.get(name, nothing) for each in effects))
        for name in dict.fromkeys([*effects[0], *effects[1]])
    ]


def are_alike(a: Contents, b: Contents) -> bool:
    """Whether both have the same names of adapters."""
    if a.plan is None or b.plan is None:
        return a.plan is b.plan
    return a.adapters.keys() == b.adapters.keys()


def update_norm(a: np.ndarray, b: np.ndarray, scale: float) -> float:
    """The Frobenius norm of `scale * A @ B`, without forming the product.

    The singular values of the update keep all digits; `trace((A^T A)(B B^T))` would lose
    half of them by squaring.

    Args:
        a: `(*batch, in, rank)`, float64.
        b: `(*batch, rank, out)`, float64.
        scale: what multiplies the product.
    """
    return float(np.linalg.norm(plots.singular_values(a, b, scale)))


def _sides(a: Contents, b: Contents, names: Any) -> tuple[_Side, _Side]:
    """Both adapters with paths that can be compared."""
    leaves = [{*map(own.plan.leaf, own.plan.entries)} for own in (a, b) if own.plan]
    if len(leaves) == 2 and (leaves[0] <= leaves[1] or leaves[1] <= leaves[0]):
        return _own_side(a), _own_side(b)
    if a.plan is None or (b.plan and len(a.adapters) > len(b.adapters)):
        return _like(a, b, names), _own_side(b)
    return _own_side(a), _like(b, a, names)


def _own_side(contents: Contents) -> _Side:
    assert contents.own is not None
    return _Side(*contents.own, _whole_effects(contents))


def _by_leaf(side: _Side, uses: Collection[str]) -> dict[str, Effect]:
    """The effects of all targets of a weight together, by the path of the weight.

    Look-ups and products of the weights in `uses` are separate.
    """
    found: dict[str, Effect] = {}
    for path, target in side.plan.targets.items():
        leaf = side.plan.leaf(path)
        adapter = side.adapters[path]
        if target.part:  # the magnitude of a column outside of the part is not known
            adapter, _ = layout.of_whole(adapter, target, magnitude=np.nan)
        effect = _effect(_turned(adapter, target), target.scale)
        for use in parts.USES if leaf in uses else ("",):
            if not use or target.use in ("", use):
                name = f"{leaf}@{use}" if use else leaf
                found[name] = _sum(found[name], effect) if name in found else effect
    return found | side.others


def _turned(adapter: Mapping[str, Any], target: Target) -> Mapping[str, Any]:
    """The adapter of LoRA with the factor of the first axes as `A`.

    For one use of a weight its first axis is the input, for another the output.
    """
    if "m" in adapter or target.in_axes < target.out_axes:
        return adapter
    a, b = (np.asarray(adapter[name]).swapaxes(-1, -2) for name in "AB")
    return {"A": b, "B": a}


def _sum(one: Effect, other: Effect) -> Effect:
    """The effect of two adapters of a weight that change no entry together."""
    joined = _concatenated(one, other)
    magnitudes = [each["m"] for each in (one, other) if "m" in each]
    if magnitudes:
        first, last = magnitudes[0], magnitudes[-1]
        joined["m"] = np.where(np.isnan(first), last, first)
    return joined


def _concatenated(one: Effect, other: Effect, sign: int = 1) -> Effect:
    """The factors of the sum of two updates, or of their difference."""
    return {
        "A": np.concatenate([one["A"], other["A"]], -1),
        "B": np.concatenate([one["B"], sign * other["B"]], -2),
    }


def _effects_of(adapters: Mapping[str, _adapters.Adapter]) -> dict[str, Effect]:
    return {name: _effect(own.read(), own.scale) for name, own in adapters.items()}


def _effect(arrays: Mapping[str, Any], scale: float) -> Effect:
    wide = {name: np.asarray(values).astype(np.float64) for name, values in arrays.items()}
    return wide | {n: scale * wide[n] for n in ("B", "B_bias") if n in wide}


def _whole_effects(contents: Contents) -> dict[str, Effect]:
    return {name: _full(whole) for name, whole in contents.wholes.items()}


def _full(array: Any) -> Effect:
    return {"whole": np.asarray(array, np.float64)}


def _like(contents: Contents, other: Contents, names: Any) -> _Side:
    """Adapters with the paths of another plan, whose weights may be stacks.

    An adapter or a full array without a path there keeps its own name.
    """
    plan, checkpoint = other.plan, contents.checkpoint
    assert plan is not None
    wholes: Mapping[str, Any] = contents.wholes
    if checkpoint is None:
        assert contents.plan is not None
        own = _names_of(contents.plan, names)
        checkpoint = _loading.as_checkpoint(contents, own)
        read = checkpoint.arrays.read
        wholes = {name: read(key) for name, key in checkpoint.entries.wholes.items()}
    loaded, left, full = _put(checkpoint, plan, _names_of(plan, names))
    others = _effects_of(_adapters.read_modules(checkpoint, left))
    others |= {p: _full(array) for p, array in loaded.replaced.items()}
    others |= {n: _full(array) for n, array in wholes.items() if n not in full}
    return _Side(loaded.adapters, loaded.plan, others)


def _put(
    checkpoint: Checkpoint, plan: AdapterPlan, names: Any
) -> tuple[Loaded, list[str], Collection[str]]:
    """The arrays of a checkpoint for the weights and trained leaves of a plan.

    Returns:
        Them, the modules without a weight, and the full arrays with a trained leaf.
    """
    leaves = {
        plan.leaf(path): jax.ShapeDtypeStruct(entry.shape, np.float32)
        for path, entry in plan.entries.items()
    }
    axes, heads = {}, {}  # an embedding of two uses is two leaves for PEFT's modules
    for path, target in plan.targets.items():
        leaf = plan.leaf(path)
        head = _ties.head_of(leaf)
        is_head = target.use == parts.PRODUCT
        axes[head if is_head else leaf] = target.axes
        heads |= {head: leaf} if target.use else {}
    leaves |= {head: leaves[leaf] for head, leaf in heads.items()}
    known = Known(axes, {}, "the plan")
    places = Places(leaves, names, None, known)
    entries, arrays = checkpoint.entries, cast(Any, checkpoint.arrays)
    trained = Places({path: leaves[path] for path in plan.trained}, names, None, known)
    shapes = {name: tuple(arrays[key].shape) for name, key in entries.wholes.items()}
    full = find_full(trained, shapes, Problems())
    wholes = {name: key for name, key in entries.wholes.items() if name in full}
    entries = entries._replace(wholes=wholes, tokens={})
    own = checkpoint._replace(entries=entries)
    placement = find_places(own, places, on_tied="allow")
    left = [name for name in entries.modules if name not in placement.sites]
    if left and not placement.sites:
        raise CheckpointError(
            f"no path of the plan matches a module, for example {next(iter(leaves))!r} "
            f"and {left[0]!r}: give --names."
        )
    with _loading.leaving_out():
        loaded = assemble(placement, False, dtype="file")
    adapters, joined = _ties.rejoin(heads, leaves, loaded.adapters, loaded.plan)
    return loaded._replace(adapters=adapters, plan=joined), left, full


def _names_of(plan: AdapterPlan, names: Any) -> Any:
    """The entries of `--names` whose paths are in a plan; None if there are none."""
    masks = {mask_numbers(plan.leaf(path)) for path in plan.entries}
    own = {
        name: value
        for name, value in (names or {}).items()
        if mask_numbers(value if isinstance(value, str) else value[0]) in masks
    }
    return own or None


def _apart(name: str, one: Effect, other: Effect) -> Apart:
    """The difference of two effects, in the array that differs most."""
    norms = _norm(one), _norm(other)
    if norms == (0, 0) and one.keys() == other.keys() == {"A", "B"}:
        return Apart(name, norms, "update", 0.0)
    words = {"A": "update", "m": "magnitude"}
    relative, what = max(
        (_relative(entry, one, other, norms), words.get(entry, entry))
        for entry in dict.fromkeys([*one, *other])
        if entry != "B"
    )
    return Apart(name, norms, what, relative)


def _norm(effect: Effect) -> float:
    """The Frobenius norm of the update, or of the array."""
    if "A" in effect:
        return update_norm(effect["A"], effect["B"], 1.0)
    return float(np.linalg.norm(effect["whole"].ravel()))


def _relative(entry: str, a: Effect, b: Effect, norms: tuple[float, float]) -> float:
    """The norm of a difference, relative to the larger norm; infinite without a norm."""
    if entry not in a or entry not in b:
        return np.inf
    if entry == "A":
        shapes = [(x["A"].shape[:-1], x["B"].shape[:-2], x["B"].shape[-1]) for x in (a, b)]
        if shapes[0] != shapes[1]:
            return np.inf if all(norms) else float(any(norms))
        return relative(_norm(_concatenated(a, b, -1)), max(norms), _ROUNDING)
    left, right = a[entry], b[entry]
    if entry != "whole":  # a magnitude is (1, out, 1, 1) for convolutions in PEFT
        left, right = left.ravel(), right.ravel()
    if left.shape != right.shape:
        return np.inf
    unknown = np.isnan(left) & np.isnan(right)
    left, right = (np.where(unknown, 0, each) for each in (left, right))
    largest = max(float(np.linalg.norm(each.ravel())) for each in (left, right))
    apart = np.where(left == right, 0, left - right)
    return relative(float(np.linalg.norm(apart.ravel())), largest, _ROUNDING)


def relative(apart: float, largest: float, rounding: float = 0.0) -> float:
    """A difference relative to the largest of what is compared; 0 up to a rounding."""
    if apart <= rounding * largest:
        return 0.0
    found = apart / largest if largest else np.inf
    return float(found) if np.isfinite(found) else np.inf
