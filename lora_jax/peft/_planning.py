"""The plan of a checkpoint on some params, and what of both does not agree."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from lora_jax import _checks, _selection
from lora_jax._frozen import FrozenDict
from lora_jax.config import LoraConfig
from lora_jax.peft import _names, _wholes
from lora_jax.peft._checkpoint import chooses_by_name
from lora_jax.peft._places import Places
from lora_jax.peft._sites import Site
from lora_jax.peft.config import PeftConfig
from lora_jax.peft.matching import matched
from lora_jax.plan import AdapterPlan, Target, Use

_WHERE = "the PEFT checkpoint"
_PRIMITIVES = {"embedding": "gather", "convolution": "conv_general_dilated"}
_NOT_ADAPTED = "the PEFT checkpoint has no adapter for it"


class Placed(NamedTuple):
    """The adapter of one weight, and what the plan says of it."""

    arrays: Mapping[str, np.ndarray]
    target: Target
    use: Use | None


def use_of(kind: str, axes: str) -> Use | None:
    """What a module of some kind does with its weight, so that it is saved as that."""
    if kind not in _PRIMITIVES:
        return None
    first = "indexed" if kind == "embedding" else "contracted"
    roles = {"i": first, "o": "kept", "b": "stacked"}
    return Use(_PRIMITIVES[kind], tuple(roles[letter] for letter in axes), _WHERE)


def missing(config: PeftConfig, places: Places, sites: Iterable[Site]) -> list[str]:
    """The weights that the config targets and the checkpoint lacks."""
    if not chooses_by_name(config):
        return []
    by_path: dict[str, list[Site]] = {}
    for site in sites:
        by_path.setdefault(site.path, []).append(site)
    lacking = []
    for path in places.leaves:
        shape, words = places.shape(path), _names.split_path(path)
        if path in by_path:
            names = _other_indices(shape, by_path[path])
        elif words.leaf == _names.WEIGHT and len(shape) > 1:
            names = [".".join(words.words)]
        else:
            continue
        lacking += [
            f"the config targets {name!r}, which is {path!r} {shape}, and there is no "
            "adapter for it: is the file whole?"
            for name in names
            if matched(config, name)
        ]
    return lacking


def _other_indices(shape: tuple[int, ...], sites: list[Site]) -> list[str]:
    """What the modules are called that a stack has beside those of some sites."""
    first = sites[0]
    if not first.indices:
        return []
    words = [site.name.split(".") for site in sites]
    numbers = [place for place, word in enumerate(words[0]) if word.isdecimal()]
    varied = [p for p in numbers if len({own[p] for own in words if p < len(own)}) > 1]
    if len(varied) < len(first.indices):  # there is one module: by the numbers themselves
        varied = [p for p in numbers if int(words[0][p]) in first.indices]
    if len(varied) != len(first.indices):
        return []
    stack = _wholes.stack_axes(first.axes, first.indices)
    present = {site.indices for site in sites}
    names = []
    for index in np.ndindex(*(shape[axis] for axis in stack)):
        if index not in present:
            other = dict(zip(varied, map(str, index), strict=True))
            names.append(".".join(other.get(p, word) for p, word in enumerate(words[0])))
    return names


def biased(places: Places, sites: Iterable[Site]) -> list[str]:
    """The layers with a bias, which an adapter would not multiply here."""
    biases = {site.name: _wholes.find_bias(places, site.path) for site in sites}
    return [
        f"the adapter of {name!r} multiplies the bias {bias!r} too, and DoRA here does "
        "not: merge it where it was trained"
        for name, bias in biases.items()
        if bias
    ]


def make_plan(
    config: PeftConfig, places: Places, placed: Mapping[str, Placed]
) -> AdapterPlan:
    targets = {path: own.target for path, own in placed.items()}
    leaves = {path: leaf for path, leaf in places.leaves.items() if _checks.is_array(leaf)}
    return AdapterPlan(
        config=_lora_config(config, targets),
        targets=FrozenDict(targets),
        skipped=FrozenDict({p: _NOT_ADAPTED for p in places.leaves if p not in targets}),
        uses=FrozenDict({p: (own.use,) for p, own in placed.items() if own.use}),
        total=_selection.count(leaves.values()),
    )


def _lora_config(config: PeftConfig, targets: Mapping[str, Target]) -> LoraConfig:
    """The config of which the plan could have been made."""
    alphas = {
        path: target.scale * (math.sqrt(target.rank) if config.use_rslora else target.rank)
        for path, target in targets.items()
    }
    return LoraConfig(
        rank=config.r,
        alpha=config.lora_alpha or 1.0,  # if 0, no module has it
        targets=tuple(targets) or "all-linear",
        rank_pattern={p: t.rank for p, t in targets.items() if t.rank != config.r},
        alpha_pattern={
            p: a for p, a in alphas.items() if not math.isclose(a, config.lora_alpha)
        },
        axes={path: target.axes for path, target in targets.items()},
        rank_stabilized=config.use_rslora,
        use_dora=config.use_dora,
        dropout=config.lora_dropout,
    )
