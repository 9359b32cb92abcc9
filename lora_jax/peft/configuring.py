"""What a config of PEFT means for some params."""

import re
from collections.abc import Mapping
from typing import Any

import chex

from lora_jax._core import tree_paths
from lora_jax.peft import _fields, _names, _wholes
from lora_jax.peft.config import PeftConfig
from lora_jax.peft.matching import match_modules
from lora_jax.plan.config import LoraConfig

__all__ = ["to_lora_config"]

# What is a vector, also where layers are stacked and it has two axes.
_NORM = re.compile(r"norm|^ln(_|$)", re.IGNORECASE)

_INITS = {True: "kaiming_uniform", "gaussian": "gaussian", "orthogonal": "orthogonal"}


def to_lora_config(
    config: PeftConfig | Mapping[str, Any], params: chex.ArrayTree, *, prefix: str = ""
) -> LoraConfig:
    """Makes of a config of PEFT the one that adapts the same weights of some params.

    The words of a weight's path stand for the name of its module: PEFT's rules are applied
    to `decoder.layers.0.q_proj` for `decoder/layers_0/q_proj/kernel`. For `"all-linear"`
    every matrix counts whose module is not called as embeddings are, but the output head.

    Args:
        config: what PEFT trains with, or the dict of an `adapter_config.json`.
        params: a pytree of arrays or `jax.ShapeDtypeStruct`s.
        prefix: what PEFT's names of modules have in front of the words of the paths, such
            as `"model."`. `layers_to_transform` needs one, and regular expressions may.

    Returns:
        The config, with the paths of the weights as its targets, for `plan_adapters`.

    Raises:
        TypeError, ValueError: if the config is none that is supported; if it adapts no
            weight of the params; if a key of `rank_pattern` or `alpha_pattern` is for
            none, such as one of a layer where layers are stacked; if it trains more than
            adapters, or its `init_lora_weights` needs more than a name here.

    Example:
        >>> import jax
        >>> from lora_jax import peft
        >>> matrix = jax.ShapeDtypeStruct((64, 64), "float32")
        >>> params = {"layers_0": {"q_proj": {"kernel": matrix}, "up": {"kernel": matrix}}}
        >>> config = peft.to_lora_config({"r": 4, "target_modules": ["q_proj"]}, params)
        >>> config.rank, config.alpha, config.targets
        (4, 8.0, ('layers_0/q_proj/kernel',))
    """
    own = (
        config
        if isinstance(config, PeftConfig)
        else PeftConfig.from_dict(config, "the config")
    )
    _check_is_about_weights(own)
    paths = {prefix + ".".join(words): p for p, words in _weights(params).items()}
    kinds = {name: _class(name, path) for name, path in paths.items()}
    found = match_modules(own, kinds)
    for field in ("rank_pattern", "alpha_pattern"):
        _check_all_match(field, getattr(own, field), found)
    return LoraConfig(
        rank=own.r,
        alpha=own.lora_alpha,
        targets=tuple(paths[name] for name in found),
        rank_pattern={paths[n]: m.rank for n, m in found.items() if m.rank != own.r},
        alpha_pattern={
            paths[n]: m.alpha for n, m in found.items() if m.alpha != own.lora_alpha
        },
        rank_stabilized=own.use_rslora,
        use_dora=own.use_dora,
        dropout=own.lora_dropout,
        init=_INITS[own.init_lora_weights],
    )


def _weights(params: chex.ArrayTree) -> dict[str, tuple[str, ...]]:
    """The words of the paths of what may be the weights of modules."""
    found = {}
    for path, leaf in tree_paths.leaf_paths(params).items():
        words = _names.split_path(path)
        named = [word for word in words.words if not word.isdecimal()]
        vector = words.leaf == _names.BIAS or any(map(_NORM.search, named[-1:]))
        if len(getattr(leaf, "shape", ())) >= 2 and not vector:
            found[path] = words.words
    return found


def _class(name: str, path: str) -> str:
    return "Embedding" if _wholes.is_embedding(name, path) else "Linear"


def _check_is_about_weights(config: PeftConfig) -> None:
    """Raises if the config trains what a plan has no place for."""
    others = {
        "bias": config.bias != "none",
        "lora_bias": config.lora_bias,
        "modules_to_save": config.modules_to_save,
        "target_parameters": config.target_parameters,
        "trainable_token_indices": config.trainable_token_indices,
    }
    used = [name for name, value in others.items() if value]
    if used:
        raise ValueError(
            f"the config's {used[0]} is {getattr(config, used[0])!r}, and a LoraConfig is "
            "about adapters of the weights of modules: set it to its default, and train "
            "those leaves beside the adapters, or give the paths of experts as targets."
        )
    if config.init_lora_weights not in _INITS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} is no initializer of a "
            f"LoraConfig, which has {', '.join(map(repr, _INITS))}: for those that change "
            "the base see lora_jax.decompose_params."
        )


def _check_all_match(
    field: str, patterns: Mapping[str, Any], names: Mapping[str, Any]
) -> None:
    """Raises if a key of a pattern is for none of the adapted modules."""
    for key in patterns:
        if not any(_fields.pattern_key({key: None}, name) for name in names):
            raise ValueError(
                f"{field} has {key!r}, which is for none of the {len(names)} modules: "
                f"{', '.join(list(names)[:3])}, ... Where layers are stacked, all of them "
                "have one rank and one alpha."
            )
