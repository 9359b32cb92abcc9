"""Selects the modules of a model, or the weights of params, that a PEFT config adapts.

The rules are those of PEFT 0.21. Regular expressions of the config run unchanged, and `re`
cannot stop one that backtracks for very long. So a config from an untrusted source can keep
the program busy.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from lora_jax._core import tree_paths
from lora_jax.peft.formats.config import (
    Patterns,
    PeftConfig,
    as_lora_config,
    is_saved,
)
from lora_jax.peft.formats.fields import shorten
from lora_jax.peft.formats.keys import BIAS, is_embedding, name_ends
from lora_jax.peft.layout import Index, boxes
from lora_jax.peft.words import nearest_names, split_path
from lora_jax.plan import parts
from lora_jax.plan.config import ALL_LINEAR, LoraConfig

__all__ = ["ModuleMatch", "match_modules", "to_lora_config"]

# The classes that "all-linear" selects, and the heads that it leaves out.
_LINEAR = ("Linear", "Conv1D")
_LOGITS = "lm_head"
_HEADS = ("score", "classifier")
Targets: TypeAlias = str | tuple[str, ...]
Verdict: TypeAlias = Literal["matched", "excluded", "unmatched", "other layer"]
# Leaves that are vectors, also where layers are stacked and they have two axes.
_NORM = re.compile(r"norm|^ln(_|$)", re.IGNORECASE)
# Lists of layers, as PEFT has them for `layers_to_transform`.
_LISTS = ("layers", "layer", "blocks", "block", "h")
# Fields that train more than the weights of modules, and their values if they do not.
_BEYOND_WEIGHTS = (
    *("bias", "lora_bias", "modules_to_save"),
    *("target_parameters", "trainable_token_indices"),
)
_UNUSED = ("none", False, None, (), {})
_INITIALIZERS = {
    True: "kaiming_uniform",
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
}


class ModuleMatch(NamedTuple):
    """The rank, alpha and scale of the adapter of one module."""

    rank: int
    alpha: float
    scale: float
    """The factor of the update: `alpha / rank`, or `alpha / sqrt(rank)`."""


def match_modules(
    config: PeftConfig | Mapping[str, Any],
    modules: Mapping[str, str],
    *,
    output_embedding: str | None = None,
) -> dict[str, ModuleMatch]:
    """Selects the modules that a PEFT config adapts, by the rules of PEFT.

    A module is adapted if `target_modules` contains its name or the end of its name after a
    dot, or is a regular expression that matches all of it. Modules that `exclude_modules`
    or `modules_to_save` match are not adapted. `layers_to_transform` leaves out modules of
    other layers that match by the end of their names. In `rank_pattern` and
    `alpha_pattern`, the first key that matches the end of a name wins.

    Args:
        config: of the adapter, or the content of its `adapter_config.json`.
        modules: the names of the model's modules in PyTorch, such as
            `"model.layers.0.mlp.up_proj"`, and the names of their classes, such as
            `"Linear"`, in the order of the model. Only `"all-linear"` uses the classes: it
            selects every `Linear` and `Conv1D`.
        output_embedding: name, or end of the name, of the module that computes the logits.
            `"all-linear"` leaves it out. None is `"lm_head"`; for the task `SEQ_CLS`, in a
            model without `lm_head`, None is the module `score` or `classifier`.

    Returns:
        The rank, alpha and scale of each adapted module, in the order of `modules`; empty
        where only `target_parameters` are adapted.

    Raises:
        KeyError: if `"all-linear"` finds no module `output_embedding`.
        TypeError: if `modules` is not a dict of strings, or a field of the config has the
            wrong type.
        ValueError: if the config is not valid, has no target modules, or matches no
            module. The message says why, or gives the nearest names.

    References:
        `target_modules` of PEFT's `LoraConfig`,
        https://huggingface.co/docs/peft/package_reference/lora.

    Example:
        >>> import lora_jax
        >>> modules = {
        ...     "layers.0.q_proj": "Linear", "layers.0.norm": "RMSNorm",
        ...     "layers.1.q_proj": "Linear", "lm_head": "Linear",
        ... }
        >>> config = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear",
        ...           "rank_pattern": {"layers.1.q_proj": 4}}
        >>> for name, match in lora_jax.peft.match_modules(config, modules).items():
        ...     print(name, match)
        layers.0.q_proj ModuleMatch(rank=8, alpha=16, scale=2.0)
        layers.1.q_proj ModuleMatch(rank=4, alpha=16, scale=4.0)
    """
    if not isinstance(config, PeftConfig):
        config = PeftConfig.from_dict(config, "config")
    expected = "modules must be a dict from names of modules to names of their classes"
    if not isinstance(modules, Mapping):
        raise TypeError(f"{expected}, got {type(modules).__name__}.")
    for name, kind in modules.items():
        if not isinstance(name, str) or not isinstance(kind, str):
            raise TypeError(f"{expected}, got the entry {name!r}: {kind!r}.")
    if config.target_parameters and not config.target_modules:
        return {}
    targets = _targets(config)
    if _is_all_linear(targets):
        targets = _all_linear(config, modules, output_embedding)
    rules, own = Rules(config), _Targets(targets)
    verdicts: dict[str, Verdict] = {n: rules.verdict(n, own) for n in modules if n}
    if "matched" not in verdicts.values():
        raise ValueError(_why_none(config, targets, verdicts))
    return {
        name: ModuleMatch(
            config.rank_of(name), config.alpha_of(name), config.scale_of(name)
        )
        for name, found in verdicts.items()
        if found == "matched"
    }


class _Targets:
    """Names, ends of names, or a regular expression for whole names."""

    def __init__(self, targets: Targets) -> None:
        self._regex = re.compile(targets) if isinstance(targets, str) else None
        self._names = frozenset(() if isinstance(targets, str) else targets)

    def match(self, name: str) -> bool:
        """Whether a name, or its end after a dot, is a target."""
        if self._regex is not None:
            return self._regex.fullmatch(name) is not None
        return any(end in self._names for end in name_ends(name))

    def pass_over_layers(self, name: str) -> bool:
        """Whether `layers_to_transform` does not apply: to whole names, and to regexes."""
        return self._regex is not None or name in self._names


class Rules:
    """Applies the rules of PEFT for one config to many modules."""

    def __init__(self, config: PeftConfig) -> None:
        self.config = config
        self._excluded = _Targets(config.exclude_modules or ())
        self._saved = Patterns(config.modules_to_save or ())
        self.parameters = _Targets(config.target_parameters or ())
        named = config.target_modules
        self.choose_by_name = bool(named) and not _is_all_linear(named)
        """Whether the name of a module decides if it has an adapter."""

    def matched(self, name: str) -> bool:
        """Whether a module has an adapter, by its name alone.

        Raises if the config targets `"all-linear"`, or has no targets.
        """
        if self.config.target_parameters and not self.config.target_modules:
            return False
        return self.verdict(name, self._targets) == "matched"

    @functools.cached_property
    def _targets(self) -> _Targets:
        targets = _targets(self.config)
        if _is_all_linear(targets):
            raise ValueError(
                f"target_modules={targets!r} selects modules by their classes, not "
                "by one name: use match_modules."
            )
        return _Targets(targets)

    def verdict(self, name: str, targets: _Targets | Targets) -> Verdict:
        """The result of the rules for one module, for targets other than "all-linear"."""
        targets = targets if isinstance(targets, _Targets) else _Targets(targets)
        if self._excluded.match(name) or is_saved(self._saved, name):
            return "excluded"
        if not targets.match(name):
            return "unmatched"
        if not targets.pass_over_layers(name) and not self.config.has_layer_of(name):
            return "other layer"
        return "matched"


def _targets(config: PeftConfig) -> Targets:
    if not config.target_modules:
        raise ValueError(
            f"target_modules is {config.target_modules!r}: PEFT would take names from a "
            "table of model types, which is not available here. Name the modules, for "
            "example target_modules=['q_proj', 'v_proj'], or give 'all-linear'."
        )
    return config.target_modules


def _is_all_linear(targets: Targets | None) -> bool:
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def _all_linear(
    config: PeftConfig, modules: Mapping[str, str], output_embedding: str | None
) -> tuple[str, ...]:
    """The names that "all-linear" selects in a model."""
    head = _LOGITS if output_embedding is None else output_embedding
    left_out = set(filter(_Targets((head,)).match, modules))
    if not left_out and output_embedding is not None:
        raise KeyError(
            f"there is no module {output_embedding!r} to leave out"
            f"{nearest_names((output_embedding,), modules)}."
        )
    if not left_out and config.task_type == "SEQ_CLS":
        left_out = {next((head for head in _HEADS if head in modules), "")}
    return tuple(
        name for name, kind in modules.items() if kind in _LINEAR and name not in left_out
    )


def _why_none(config: PeftConfig, targets: Targets, verdicts: Mapping[str, Verdict]) -> str:
    """The error message for a model without an adapted module."""
    if not verdicts:
        return "modules is empty: give the names of the model's modules and their classes."
    shown = shorten(config.target_modules)
    if not targets:
        kinds = " or ".join(_LINEAR)
        return f"target_modules={shown} matches no module: no {kinds} besides a head."
    own = _Targets(targets)
    excluded = [n for n, found in verdicts.items() if found == "excluded" and own.match(n)]
    elsewhere = [name for name, found in verdicts.items() if found == "other layer"]
    if elsewhere:
        return (
            f"target_modules={shown} matches {len(elsewhere)} modules, such as "
            f"{elsewhere[0]!r}, but none in layers_to_transform="
            f"{shorten(config.layers_to_transform)} with layers_pattern="
            f"{shorten(config.layers_pattern)}: correct these."
        )
    if excluded:
        return (
            f"all {len(excluded)} modules that target_modules={shown} matches, such as "
            f"{excluded[0]!r}, are left out by exclude_modules="
            f"{shorten(config.exclude_modules)} or modules_to_save="
            f"{shorten(config.modules_to_save)}: shorten these."
        )
    return f"target_modules={shown} matches no module{nearest_names(targets, verdicts)}."


def to_lora_config(
    config: PeftConfig | Mapping[str, Any], params: tree_paths.PyTree, *, prefix: str = ""
) -> LoraConfig:
    """Converts a PEFT config to a `LoraConfig` that adapts the same weights of params.

    The name of a module is made from the words of the path of its weight. For the weight
    `decoder/layers_0/q_proj/kernel`, PEFT's rules are applied to `decoder.layers.0.q_proj`.
    `"all-linear"` selects every matrix except the output head and embeddings, which are
    recognized by their names.

    A weight with three axes or more below a list without a number, `layers/q_proj/kernel`,
    is a stack of layers along its first axis. The lists are the `layers_pattern` of the
    config, or `layers`, `layer`, `blocks`, `block` and `h`. If the config adapts some of
    the layers, or gives them different ranks, the targets are parts: `...kernel[4:]`.

    Args:
        config: a config of PEFT, or the dict of an `adapter_config.json`.
        params: a pytree of arrays or `jax.ShapeDtypeStruct`s.
        prefix: the text that PEFT's names have in front of the words of the paths, such as
            `"model."`. `layers_to_transform` needs it, and regular expressions may.

    Returns:
        The config for `plan_adapters`, with the paths of the weights as its targets.

    Raises:
        TypeError, ValueError: if the config is not supported; if it adapts no weight of
            the params; if a key of `rank_pattern` or `alpha_pattern` matches none of the
            adapted weights; if the config trains more than adapters; if a `LoraConfig` does
            not support its `init_lora_weights`.

    Example:
        >>> import jax
        >>> from lora_jax import peft
        >>> matrix = jax.ShapeDtypeStruct((64, 64), "float32")
        >>> params = {"layers_0": {"q_proj": {"kernel": matrix}, "up": {"kernel": matrix}}}
        >>> config = peft.to_lora_config({"r": 4, "target_modules": ["q_proj"]}, params)
        >>> config.rank, config.alpha, config.targets
        (4, 8.0, ('layers_0/q_proj/kernel',))
    """
    own = config
    if not isinstance(own, PeftConfig):
        own = PeftConfig.from_dict(own, "the config")
    _check_is_about_weights(own)
    found = _modules_of(params, own.layers_pattern or _LISTS)
    modules = {prefix + name: leaf for name, leaf in found}
    kinds = {
        name: "Embedding" if is_embedding(name, path) else "Linear"
        for name, (path, *_) in modules.items()
    }
    found = _matched(own, kinds, prefix)
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = Patterns(getattr(own, field))
        first = {patterns.key_of(name) for name in found}
        for key in getattr(own, field):  # one that is never the first may match as well
            alone = Patterns([key])
            if key not in first and not any(map(alone.key_of, found)):
                raise ValueError(
                    f"{field} has {key!r}, which matches none of the {len(found)} modules: "
                    f"{', '.join(list(found)[:3])}, ..."
                )
    by_path: dict[tuple[str, tuple[int, ...]], dict[ModuleMatch, list[Index]]] = {}
    for name, match in found.items():
        path, shape, index = modules[name]
        by_path.setdefault((path, shape), {}).setdefault(match, []).append(index)
    targets = {
        path + parts.as_text([*box, *map(range, shape[len(box) :])], shape): match
        for (path, shape), alike in by_path.items()
        for match, indices in alike.items()
        for box in boxes(indices)
    }
    numbers = {path: (match.rank, match.alpha) for path, match in targets.items()}
    return as_lora_config(own, numbers, init=_INITIALIZERS[own.init_lora_weights])


def _matched(
    config: PeftConfig, kinds: Mapping[str, str], prefix: str
) -> dict[str, ModuleMatch]:
    """The result of `match_modules`. If a prefix would help, the error says so."""
    try:
        return match_modules(config, kinds)
    except ValueError as error:
        if prefix or not config.layers_to_transform:
            raise
        try:
            match_modules(config, {f"model.{name}": kind for name, kind in kinds.items()})
        except ValueError:
            raise error from None
        raise ValueError(
            f"{error} In PEFT's names another word comes before the list of layers: give "
            "prefix='model.'."
        ) from None


def _modules_of(
    params: tree_paths.PyTree, lists: Iterable[str]
) -> Iterator[tuple[str, tuple[str, tuple[int, ...], Index]]]:
    """The modules of leaves that may be weights, each with path, shape and index.

    A stack below one of the lists of layers is a module for each layer.
    """
    for path, leaf in tree_paths.leaf_paths(params).items():
        words, kind = split_path(path)
        named = [word for word in words if not word.isdecimal()]
        shape = tuple(getattr(leaf, "shape", ()))
        if len(shape) < 2 or kind == BIAS or any(map(_NORM.search, named[-1:])):
            continue
        ends = [
            i
            for i, word in enumerate(words, 1)
            if any(re.fullmatch(x, word) for x in lists)
        ]
        if not ends or len(shape) < 3 or len(named) < len(words):
            yield ".".join(words), (path, shape, ())
            continue
        for index in range(shape[0]):
            own = (*words[: ends[0]], str(index), *words[ends[0] :])
            yield ".".join(own), (path, shape, (index,))


def _check_is_about_weights(config: PeftConfig) -> None:
    """Raises if the config trains more than a plan can."""
    used = [name for name in _BEYOND_WEIGHTS if getattr(config, name) not in _UNUSED]
    if used:
        raise ValueError(
            f"the config's {used[0]} is {getattr(config, used[0])!r}, and a LoraConfig "
            "only has adapters of the weights of modules: set it to its default, and train "
            "those leaves beside the adapters, or give the paths of experts as targets."
        )
    if config.init_lora_weights not in _INITIALIZERS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} is not an initializer of a "
            f"LoraConfig, which has {', '.join(map(repr, _INITIALIZERS))}: for those "
            "that change the base see lora_jax.decompose_params."
        )
