"""Compares the effects of adapters that are stored differently.

One adapter can be stored in many ways: with other factors `A` and `B`, with the scale in
`B`, with zeros for a larger rank, with layers separate or stacked. All have the same update
`scale * A @ B`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax._io.tensor_files import CheckpointError
from lora_jax.cli import _adapters, _loading
from lora_jax.cli._adapters import Contents
from lora_jax.peft.checkpoint import Checkpoint
from lora_jax.peft.leaves import Known, Places
from lora_jax.peft.load import Loaded, assemble, find_places
from lora_jax.peft.names import mask_numbers
from lora_jax.plan.adapter_plan import AdapterPlan

# The rounding of a norm in float64.
_ROUNDING = 1e-14

Arrays = Mapping[str, np.ndarray]


class Effect(NamedTuple):
    """The effect of an adapter, or of a full array that replaces one of the model.

    Args:
        arrays: float64. An adapter has `A (*batch, in, rank)` and `B (*batch, rank, out)`,
            with the scale in `B`. A full array is `whole`.
    """

    arrays: dict[str, np.ndarray]

    @property
    def norm(self) -> float:
        """The Frobenius norm of the update, or of the array."""
        if "A" in self.arrays:
            return update_norm(self.arrays["A"], self.arrays["B"], 1.0)
        return float(np.linalg.norm(self.arrays["whole"].ravel()))

    @property
    def is_nothing(self) -> bool:
        """Whether the effect is only an update, and the update is zero."""
        return self.arrays.keys() == {"A", "B"} and self.norm == 0


class Apart(NamedTuple):
    """The difference of two effects: the name, both norms, and what differs most."""

    name: str
    norms: tuple[float, float]
    what: str
    relative: float
    """The norm of the difference, relative to the larger norm of both."""


def compare(a: Contents, b: Contents, names: Any) -> list[Apart]:
    """Compares the effects of adapters, module by module.

    Args:
        a: the adapters of a directory.
        b: the adapters of another directory, in either format.
        names: of `--names`; None to match modules and paths by their words.

    Raises:
        CheckpointError, ValueError: if modules and paths cannot be matched.
    """
    if are_alike(a, b):
        effects = _own_effects(a), _own_effects(b)
    elif a.plan is None or (b.plan and len(a.adapters) > len(b.adapters)):
        effects = _like(a, b, names), _own_effects(b)
    else:
        effects = _own_effects(a), _like(b, a, names)
    nothing = Effect({"A": np.zeros((1, 1)), "B": np.zeros((1, 1))})
    return [
        _apart(name, *(each.get(name, nothing) for each in effects))
        for name in dict.fromkeys([*effects[0], *effects[1]])
    ]


def are_alike(a: Contents, b: Contents) -> bool:
    """Whether both have the same names, so that no names have to be matched."""
    if a.plan is None or b.plan is None:
        return a.format == b.format
    return a.adapters.keys() == b.adapters.keys()


def update_norm(a: np.ndarray, b: np.ndarray, scale: float) -> float:
    """The Frobenius norm of `scale * A @ B`, without forming the product.

    With `A = Q R` and `B^T = P S`, it is the norm of `R S^T`, `(rank, rank)`. This keeps
    all digits; `trace((A^T A)(B B^T))` would lose half of them by squaring.

    Args:
        a: `(*batch, in, rank)`, float64.
        b: `(*batch, rank, out)`, float64.
        scale: what multiplies the product.
    """
    r: Any = np.linalg.qr(a, mode="r")
    s: Any = np.linalg.qr(b.swapaxes(-1, -2), mode="r")
    return abs(scale) * float(np.linalg.norm(np.ravel(r @ s.swapaxes(-1, -2))))


def _own_effects(contents: Contents) -> dict[str, Effect]:
    """The effects of adapters by their own names."""
    return _effects_of(contents.adapters) | _whole_effects(contents)


def _effects_of(adapters: Mapping[str, _adapters.Adapter]) -> dict[str, Effect]:
    return {name: _effect(own.read(), own.scale) for name, own in adapters.items()}


def _effect(arrays: Mapping[str, Any], scale: float) -> Effect:
    wide = {name: np.asarray(values).astype(np.float64) for name, values in arrays.items()}
    scaled = {n: scale * wide[n] for n in ("B", "B_bias") if n in wide}
    return Effect(wide | scaled)


def _whole_effects(contents: Contents) -> dict[str, Effect]:
    return {
        name: Effect({"whole": np.asarray(span, np.float64)})
        for name, span in contents.wholes.items()
    }


def _like(contents: Contents, other: Contents, names: Any) -> dict[str, Effect]:
    """The effects of adapters by the paths of another plan, whose weights may be stacks.

    An adapter without a path there keeps its own name.
    """
    plan, checkpoint = other.plan, contents.checkpoint
    assert plan is not None
    if checkpoint is None:
        assert contents.plan is not None
        own = _names_of(contents.plan, names)
        checkpoint = _loading.as_checkpoint(contents, own)
    loaded, left = _put(checkpoint, plan, _names_of(plan, names))
    scales = {path: target.scale for path, target in loaded.plan.targets.items()}
    effects = {p: _effect(arrays, scales[p]) for p, arrays in loaded.adapters.items()}
    effects |= _effects_of(_adapters.read_modules(checkpoint, left))
    return effects | _whole_effects(contents)


def _put(checkpoint: Checkpoint, plan: AdapterPlan, names: Any) -> tuple[Loaded, list[str]]:
    """The adapters of a checkpoint for the weights of a plan, and the unmatched modules."""
    leaves = {
        path: jax.ShapeDtypeStruct(target.shape, np.float32)
        for path, target in plan.targets.items()
    }
    axes = {path: target.axes for path, target in plan.targets.items()}
    places = Places(leaves, names, None, Known(axes, {}, "the plan"))
    entries = checkpoint.entries._replace(wholes={}, tokens={})
    own = checkpoint._replace(entries=entries)
    placement = find_places(own, places, on_tied="allow")
    left = [name for name in entries.modules if name not in placement.sites]
    if left and not placement.sites:
        raise CheckpointError(
            f"no path of the plan matches a module, for example {next(iter(leaves))!r} "
            f"and {left[0]!r}: give --names."
        )
    with _loading.leaving_out():
        return assemble(placement, False, dtype="file", on_tied="allow"), left


def _names_of(plan: AdapterPlan, names: Any) -> Any:
    """The entries of `--names` whose paths are in a plan; None if there are none."""
    masks = set(map(mask_numbers, plan.targets))
    own = {
        name: value
        for name, value in (names or {}).items()
        if mask_numbers(value if isinstance(value, str) else value[0]) in masks
    }
    return own or None


def _apart(name: str, one: Effect, other: Effect) -> Apart:
    """The difference of two effects, in the array that differs most."""
    norms = one.norm, other.norm
    if one.is_nothing and other.is_nothing:
        return Apart(name, norms, "update", 0.0)
    left, right = one.arrays, other.arrays
    found = []
    for entry in dict.fromkeys([*left, *right]):
        if entry == "B":
            continue
        what = "update" if entry == "A" else {"m": "magnitude"}.get(entry, entry)
        found.append((_relative(entry, left, right, norms), what))
    relative, what = max(found)
    return Apart(name, norms, what, relative)


def _relative(entry: str, a: Arrays, b: Arrays, norms: tuple[float, float]) -> float:
    """The norm of a difference, relative to the larger norm; infinite without a norm."""
    if entry not in a or entry not in b:
        return np.inf
    if entry == "A":
        shapes = [(x["A"].shape[:-1], x["B"].shape[:-2], x["B"].shape[-1]) for x in (a, b)]
        if shapes[0] != shapes[1]:
            return np.inf if all(norms) else float(any(norms))
        both = np.concatenate([a["A"], b["A"]], -1), np.concatenate([a["B"], -b["B"]], -2)
        return _over(update_norm(*both, 1.0), max(norms))
    left, right = a[entry], b[entry]
    if entry != "whole":  # a magnitude is (1, out, 1, 1) for convolutions in PEFT
        left, right = left.ravel(), right.ravel()
    if left.shape != right.shape:
        return np.inf
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    largest = max(float(np.linalg.norm(each.ravel())) for each in (left, right))
    return _over(float(np.linalg.norm(np.where(same, 0, left - right).ravel())), largest)


def _over(apart: float, largest: float) -> float:
    if apart <= _ROUNDING * largest:
        return 0.0
    found = apart / largest if largest else np.inf
    return float(found) if np.isfinite(found) else np.inf
