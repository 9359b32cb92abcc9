"""The fields of an `adapter_config.json`, and its patterns of names.

Files are not trusted. Whatever a file contains, reading it returns a `PeftConfig`, or
raises a `ValueError` or `TypeError` that names the field.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

from lora_jax._core import checks
from lora_jax._core.immutable import FrozenDict
from lora_jax.peft.formats.fields import (
    CHECKS,
    IGNORED,
    INITS,
    UNSUPPORTED,
    check_is_off,
    check_peft_type,
    init_word,
    layer_regex,
    pattern_regex,
    saved_regex,
    shorten,
    wrong_type,
)
from lora_jax.peft.formats.keys import name_ends
from lora_jax.plan.config import LoraConfig

__all__ = ["PeftConfig"]

# `to_json` writes the fields of this version.
_PEFT_VERSION = "0.21.2"
# A regular expression that is a name: its characters, escaped ones with a backslash.
_CHARACTER = re.compile(r"\\[^\w]|[\w.-]")
_NAME = re.compile(rf"(?:{_CHARACTER.pattern})+")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The fields of PEFT's `adapter_config.json` for a LoRA or DoRA adapter.

    Immutable and hashable. Names and defaults are PEFT's; lists are tuples. A module is
    named as in PyTorch: `"model.layers.0.self_attn.q_proj"`.

    Args:
        r: the rank, at least 1.
        lora_alpha: a finite number. The update is multiplied by `lora_alpha / r`.
        target_modules: names of modules, or the ends of names after a dot; or one regular
            expression that has to match a whole name; or `"all-linear"`. A list of names
            is sorted, and repetitions are removed.
        exclude_modules: the modules that have no adapter: names, ends of names or one
            regular expression, as in `target_modules`.
        lora_dropout: the dropout rate of an adapter's input in training, in [0, 1).
        fan_in_fan_out: the weights are stored `(in, out)`.
        bias: the biases of the model that were trained too.
        use_rslora: multiply by `lora_alpha / sqrt(r)` instead.
        modules_to_save: names of modules that were trained without an adapter.
        init_lora_weights: how the adapter was initialized.
        layers_to_transform: numbers of the layers that have adapters, or one number.
        layers_pattern: regular expressions, or one, of the name of the list of layers.
        rank_pattern: from regular expressions of the end of a name to ranks. The first
            match wins.
        alpha_pattern: from regular expressions of the end of a name to alphas. The first
            match wins.
        trainable_token_indices: rows of the input embedding that were trained, or a dict
            from the names of embeddings to such rows.
        use_dora: the method is DoRA.
        lora_bias: the product with `B` has a bias.
        target_parameters: names of parameters (stacks of experts) with adapters.
        task_type: one of PEFT's names of tasks, such as `"CAUSAL_LM"`.
        base_model_name_or_path: the model that the adapter is for.
        revision: of that model.
        peft_type: `"LORA"`.
        peft_version: the version that wrote the file; not compared.
        inference_mode: whether the adapter is frozen; not compared.
        auto_mapping: the names of the model's class and library.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if a value is out of its range or not a regular expression, or fields
            contradict each other.

    References:
        `LoraConfig` of PEFT, https://huggingface.co/docs/peft/package_reference/lora.
    """

    r: int = 8
    _: dataclasses.KW_ONLY
    lora_alpha: int | float = 8
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: tuple[str, ...] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] = FrozenDict()
    alpha_pattern: Mapping[str, float] = FrozenDict()
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    use_dora: bool = False
    lora_bias: bool = False
    target_parameters: tuple[str, ...] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    peft_type: Literal["LORA"] = "LORA"
    peft_version: str | None = dataclasses.field(default=None, compare=False)
    inference_mode: bool = dataclasses.field(default=False, compare=False)
    auto_mapping: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        _check_together(self)

    @classmethod
    def from_dict(
        cls, fields: Mapping[str, Any], where: str, allow_fields: Collection[str] = ()
    ) -> "PeftConfig":
        """Reads the fields of an `adapter_config.json`.

        Args:
            fields: the JSON object. Missing fields have their defaults, as in older files.
            where: the name of the file in error messages.
            allow_fields: the names of fields to ignore, whatever their values.

        Raises:
            TypeError, ValueError: if a field does not take its value, or if an unknown
                field or a field of another method is in use, and not allowed.
        """
        with checks.at_path(where):
            if not isinstance(fields, Mapping):
                raise wrong_type("the content", "a JSON object", fields)
            # First, because other methods have other fields.
            check_peft_type("peft_type", fields.get("peft_type", "LORA"))
            for name, value in fields.items():
                if name not in allow_fields:
                    check_is_off(name, value)
            return cls(**{name: fields[name] for name in CHECKS if name in fields})

    @property
    def changes_base(self) -> bool:
        """Whether the initialization of the adapter changed the base weights too.

        Then the adapter is for the changed weights, unless it was converted.
        """
        init = self.init_lora_weights
        return isinstance(init, str) and INITS[init_word(init)]

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        key = self._ranks.key_of(module)
        return self.r if key is None else self.rank_pattern[key]

    def alpha_of(self, module: str) -> float:
        """The alpha of a module's adapter."""
        key = self._alphas.key_of(module)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    @functools.cached_property
    def _ranks(self) -> "Patterns":
        return Patterns(self.rank_pattern)

    @functools.cached_property
    def _alphas(self) -> "Patterns":
        return Patterns(self.alpha_pattern)

    def scale_of(self, module: str) -> float:
        """The factor of a module's update: `alpha / rank`, or `alpha / sqrt(rank)`."""
        return self.scale(self.rank_of(module), self.alpha_of(module))

    def scale(self, rank: int, alpha: float) -> float:
        """The factor of an update of some rank and alpha."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def has_layer_of(self, module: str) -> bool:
        """Whether `layers_to_transform` has the layer of a module, or is not given."""
        if not self.layers_to_transform:
            return True
        regexes = map(layer_regex, self.layers_pattern or (None,))
        found = next(filter(None, (re.match(regex, module) for regex in regexes)), None)
        return found is not None and int(found["idx"]) in self.layers_to_transform

    def to_json(self) -> str:
        """Writes the config as PEFT does for a trained adapter.

        Returns:
            A JSON object with all fields of PEFT, sorted. `inference_mode` is true. Only
            the keys of `rank_pattern` and `alpha_pattern` keep their order, because the
            first match wins.
        """
        own = {name: getattr(self, name) for name in CHECKS}
        own["inference_mode"] = True
        own["peft_version"] = self.peft_version or _PEFT_VERSION
        off = {name: default for name, (default, _) in UNSUPPORTED.items()}
        fields = off | IGNORED | own
        return json.dumps(dict(sorted(fields.items())), indent=2, default=dict)


def most_common(values: Mapping[str, Any], default: Any) -> Any:
    """The most common value, or the default if there is none."""
    counted = collections.Counter(values.values()).most_common(1)
    return counted[0][0] if counted else default


def pattern_of(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A regular expression for each module whose value is not the default.

    PEFT matches the end of a name. `^` excludes longer names with the same end.
    """
    ends = collections.Counter(end for name in values for end in name_ends(name))
    return {
        ("^" if ends[name] > 1 else "") + re.escape(name): value
        for name, value in values.items()
        if value != default
    }


def _check_together(config: PeftConfig) -> None:
    """Raises for fields that contradict each other, as PEFT does."""
    targets, patterns = config.target_modules, config.layers_pattern
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(targets, str) and getattr(config, name) is not None:
            raise ValueError(
                f"{name} needs target_modules to be a list of names, got "
                f"target_modules={shorten(targets)}: write the layers into the "
                "regular expression, or list the names."
            )
    if patterns and config.layers_to_transform is None:
        raise ValueError(
            "layers_pattern is the name of the list of layers, and layers_to_transform has "
            f"to select layers of it, got layers_pattern={shorten(patterns)} alone."
        )
    if config.lora_bias and (config.use_dora or isinstance(config.init_lora_weights, str)):
        raise ValueError(
            "lora_bias needs use_dora=False and an init_lora_weights of true or false, got "
            f"use_dora={config.use_dora} and init_lora_weights="
            f"{config.init_lora_weights!r}."
        )
    for name in ("use_dora", "lora_bias", "fan_in_fan_out", "lora_dropout"):
        if config.target_parameters and getattr(config, name):
            raise ValueError(
                f"{name} must be off with target_parameters, which do not support it, got "
                f"{name}={getattr(config, name)}."
            )


class Patterns:
    """Finds the first of many regular expressions that matches a part of a name.

    Most of the regular expressions are names. These are looked up in a dict, so that a name
    is compared with few of thousands.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = tuple(patterns)
        self._all = frozenset(self._patterns)
        # By length and by the places of dots that match any character: text to position.
        self._names: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._others: list[int] = []
        for position, pattern in enumerate(self._patterns):
            if not _NAME.fullmatch(pattern):
                self._others.append(position)
                continue
            characters = _CHARACTER.findall(pattern)
            text = "".join(each[-1] for each in characters)
            dots = tuple(place for place, each in enumerate(characters) if each == ".")
            own = self._names.setdefault(len(text), {}).setdefault(dots, {})
            own.setdefault(_masked(text, dots), position)

    def first(self, parts: Iterable[str], matches: Callable[[str], bool]) -> str | None:
        """The first pattern that a part of a name matches.

        `matches` says whether a pattern that is not a name matches the name.
        """
        found = [
            position
            for part in parts
            for dots, own in self._names.get(len(part), {}).items()
            if (position := own.get(_masked(part, dots))) is not None
        ]
        first = min(found, default=len(self._patterns))
        for position in self._others:
            if position > first:
                break
            if matches(self._patterns[position]):
                first = position
                break
        return self._patterns[first] if first < len(self._patterns) else None

    def key_of(self, module: str) -> str | None:
        """The first key of `rank_pattern` or `alpha_pattern` that matches a module."""
        key = self.first(
            name_ends(module), lambda own: re.match(pattern_regex(own), module) is not None
        )
        # A name that contains special characters of regular expressions matches itself too.
        return module if key is None and module in self._all else key


def _masked(text: str, dots: tuple[int, ...]) -> str:
    for place in dots:
        text = f"{text[:place]}\0{text[place + 1 :]}"
    return text


def _parts(name: str) -> Iterator[str]:
    """All runs of the words of a name."""
    for end in name_ends(name):
        yield from itertools.accumulate(end.split("."), "{}.{}".format)


def is_saved(modules: Patterns, name: str) -> bool:
    """Whether a module is one of `modules_to_save`, or inside one."""
    matches = lambda own: re.match(saved_regex(own), name) is not None  # noqa: E731
    return modules.first(_parts(name), matches) is not None


def saved_in(saved: Iterable[str], modules: Iterable[str]) -> dict[str, bool]:
    """Whether each of `modules_to_save`, or a module inside it, is in a list of modules."""
    modules = list(modules)
    parts = {part for module in modules for part in _parts(module)}
    return {
        name: name in parts or any(re.match(saved_regex(name), own) for own in modules)
        for name in saved
    }


def as_lora_config(
    config: PeftConfig, numbers: Mapping[str, tuple[int, float]], **more: Any
) -> LoraConfig:
    """A `LoraConfig` with the settings of a PEFT config.

    Args:
        config: of PEFT.
        numbers: the targets, with the rank and the alpha of each.
        more: further fields, and fields with other values.
    """
    rank, alpha = config.r, config.lora_alpha
    settings: dict[str, Any] = {
        "rank": rank,
        "alpha": alpha,
        "targets": tuple(numbers),
        "rank_pattern": {p: own for p, (own, _) in numbers.items() if own != rank},
        "alpha_pattern": {
            p: own for p, (_, own) in numbers.items() if not math.isclose(own, alpha)
        },
        "rank_stabilized": config.use_rslora,
        "use_dora": config.use_dora,
        "dropout": config.lora_dropout,
    }
    return LoraConfig(**settings | more)
