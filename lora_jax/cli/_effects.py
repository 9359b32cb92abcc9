"""What two directories of adapters do, however each is written.

An adapter has many forms: other factors `A` and `B`, a scale or a `B` that takes it up,
zeros for a larger rank, layers one by one or stacked. Its update `scale * A @ B` is one.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax._io.tensor_files import CheckpointError
from lora_jax.cli import _adapters, _loading
from lora_jax.cli._adapters import Contents, Whole
from lora_jax.peft.checkpoint import Checkpoint
from lora_jax.peft.keys import Parameters
from lora_jax.peft.leaves import Known, Places
from lora_jax.peft.load import Loaded, assemble, find_places
from lora_jax.peft.names import mask_numbers
from lora_jax.plan.adapter_plan import AdapterPlan

# What the norms themselves are rounded to, in float64.
_ROUNDING = 1e-14

Arrays = Mapping[str, np.ndarray]


class Effect(NamedTuple):
    """What an adapter does, or an array that stands for one of the model.

    Args:
        arrays: float64. An adapter has `A (*batch, in, rank)` and `B (*batch, rank, out)`,
            with the scale in it; an array that stands for itself is `whole`.
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
        """Whether there is only an update, and it is zero."""
        return self.arrays.keys() == {"A", "B"} and self.norm == 0


class Apart(NamedTuple):
    """How far two effects are apart: the name, both norms, and what differs most."""

    name: str
    norms: tuple[float, float]
    what: str
    relative: float
    """The norm of the difference over the larger norm of both."""


def compare(
    a: Contents, b: Contents, paths: tuple[pathlib.Path, pathlib.Path], names: Any
) -> list[Apart]:
    """Compares what adapters do, module by module.

    Args:
        a: the contents of a directory.
        b: the contents of another, in either format.
        paths: of both.
        names: of `--names`; None if the names of modules and the paths of weights tell.

    Raises:
        CheckpointError, ValueError: if modules and paths do not tell which are the same.
    """
    if are_alike(a, b):
        effects = _own_effects(a), _own_effects(b)
    elif a.plan is None or (b.plan and len(a.adapters) > len(b.adapters)):
        effects = _like(a, paths[0], b, names), _own_effects(b)
    else:
        effects = _own_effects(a), _like(b, paths[1], a, names)
    nothing = Effect({"A": np.zeros((1, 1)), "B": np.zeros((1, 1))})
    return [
        _apart(name, *(each.get(name, nothing) for each in effects))
        for name in dict.fromkeys([*effects[0], *effects[1]])
    ]


def are_alike(a: Contents, b: Contents) -> bool:
    """Whether what has one name is the same, so that no names have to be matched."""
    if a.plan is None or b.plan is None:
        return a.format == b.format
    return a.adapters.keys() == b.adapters.keys()


def update_norm(a: np.ndarray, b: np.ndarray, scale: float) -> float:
    """The Frobenius norm of `scale * A @ B`, without the product.

    With `A = Q R` and `B^T = P S` it is that of `R S^T`, `(rank, rank)`: the root of
    `trace((A^T A)(B B^T))`, without the squares that cost half of the digits.

    Args:
        a: `(*batch, in, rank)`, float64.
        b: `(*batch, rank, out)`, float64.
        scale: what multiplies the product.
    """
    r: Any = np.linalg.qr(a, mode="r")
    s: Any = np.linalg.qr(b.swapaxes(-1, -2), mode="r")
    return abs(scale) * float(np.linalg.norm(np.ravel(r @ s.swapaxes(-1, -2))))


def _own_effects(contents: Contents) -> dict[str, Effect]:
    """What adapters do, by the names that they have."""
    adapters = {
        name: _effect(adapter.read(), adapter.scale)
        for name, adapter in contents.adapters.items()
    }
    return adapters | _whole_effects(contents.wholes)


def _effect(arrays: Mapping[str, Any], scale: float) -> Effect:
    wide = {name: np.asarray(values).astype(np.float64) for name, values in arrays.items()}
    scaled = {n: scale * wide[n] for n in ("B", "B_bias") if n in wide}
    return Effect(wide | scaled)


def _whole_effects(wholes: Mapping[str, Whole]) -> dict[str, Effect]:
    return {n: Effect({"whole": w.read().astype(np.float64)}) for n, w in wholes.items()}


def _like(
    contents: Contents, directory: pathlib.Path, other: Contents, names: Any
) -> dict[str, Effect]:
    """What adapters do, by the paths of another plan, whose weights may be stacks.

    What has no place there comes by its own name.
    """
    plan, checkpoint = other.plan, contents.checkpoint
    assert plan is not None
    if checkpoint is None:
        assert contents.plan is not None
        arrays: Any = {name: each.read() for name, each in contents.adapters.items()}
        own = _names_of(contents.plan, names)
        checkpoint = _loading.as_checkpoint(directory, arrays, contents.plan, own)
    loaded, left = _put(checkpoint, plan, _names_of(plan, names))
    scales = {path: target.scale for path, target in loaded.plan.targets.items()}
    effects = {p: _effect(arrays, scales[p]) for p, arrays in loaded.adapters.items()}
    config, modules = checkpoint.config, checkpoint.entries.modules
    parameters = Parameters(config.target_parameters or ())
    for name in left:
        own = _adapters.of_module(checkpoint.arrays, modules[name], config, parameters)
        effects[name] = _effect(own.read(), own.scale)
    return effects | _whole_effects(contents.wholes)


def _put(checkpoint: Checkpoint, plan: AdapterPlan, names: Any) -> tuple[Loaded, list[str]]:
    """The adapters of a checkpoint on the weights of a plan, and those without a place."""
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
            f"no path of the plan is that of a module, for example {next(iter(leaves))!r} "
            f"and {left[0]!r}: if names do not tell, give --names."
        )
    with _loading.leaving_out():
        return assemble(placement, False, dtype="file", on_tied="allow"), left


def _names_of(plan: AdapterPlan, names: Any) -> Any:
    """Those of `--names` whose paths are of a plan; None if there are none."""
    masks = set(map(mask_numbers, plan.targets))
    own = {
        name: value
        for name, value in (names or {}).items()
        if mask_numbers(value if isinstance(value, str) else value[0]) in masks
    }
    return own or None


def _apart(name: str, one: Effect, other: Effect) -> Apart:
    """How far two effects are apart, in that in which they are most."""
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
    """The norm of a difference over the larger of two; infinite if there is none."""
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
