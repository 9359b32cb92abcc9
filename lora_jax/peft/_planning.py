"""The plan of a checkpoint on some params, and what of both does not agree."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lora_jax._core import checks
from lora_jax.peft._places import Places
from lora_jax.peft.config import PeftConfig
from lora_jax.plan import selection
from lora_jax.plan.adapter_plan import FROM_CHECKPOINT, AdapterPlan, Target, Use
from lora_jax.plan.config import LoraConfig

_GIVEN = "the PEFT checkpoint, with the axes that names gives"
_PRIMITIVES = {"embedding": "gather", "convolution": "conv_general_dilated"}
_NOT_ADAPTED = "the PEFT checkpoint has no adapter for it"


class Placed(NamedTuple):
    """The adapter of one weight, and what the plan says of it."""

    arrays: Mapping[str, np.ndarray]
    target: Target
    use: Use


def use_of(kind: str, axes: str, given: bool) -> Use:
    """What a module of some kind does with its weight, so that it is saved as that.

    `given` is whether the caller gave the axes.
    """
    first = "indexed" if kind == "embedding" else "contracted"
    roles = {"i": first, "o": "kept", "b": "stacked"}
    own = tuple(roles[letter] for letter in axes)
    primitive, where = _PRIMITIVES.get(kind, "dot_general"), FROM_CHECKPOINT
    linear = kind not in _PRIMITIVES
    return Use(primitive, own, _GIVEN if given else where, linear=linear)


def make_plan(
    config: PeftConfig, places: Places, placed: Mapping[str, Placed]
) -> AdapterPlan:
    targets = {path: own.target for path, own in placed.items()}
    leaves = {path: leaf for path, leaf in places.leaves.items() if checks.is_array(leaf)}
    return AdapterPlan(
        config=_lora_config(config, targets),
        targets=targets,
        skipped={p: _NOT_ADAPTED for p in places.leaves if p not in targets},
        uses={
            **places.known.uses,
            **{path: (own.use,) for path, own in placed.items() if own.use},
        },
        total=selection.count(leaves.values()),
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
