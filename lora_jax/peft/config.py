"""The settings of a PEFT adapter, field for field what its `adapter_config.json` says.

What a file holds is not trusted: whatever it is, the outcome is a `PeftConfig`, or a
`ValueError` or `TypeError` that names the field.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

from lora_jax._core import checks
from lora_jax._core.immutable import FrozenDict
from lora_jax.peft.fields import (
    CHECKS,
    IGNORED,
    INITS,
    UNSUPPORTED,
    check_is_off,
    check_peft_type,
    init_word,
    shorten,
    wrong_type,
)
from lora_jax.peft.patterns import Patterns, pattern_key

__all__ = ["PeftConfig"]

# Whose fields `to_json` writes.
_PEFT_VERSION = "0.21.2"


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What an `adapter_config.json` of PEFT says of a LoRA or DoRA adapter.

    Immutable and hashable. Names and defaults are PEFT's; lists are tuples. A module is
    named as in PyTorch: `"model.layers.0.self_attn.q_proj"`.

    Args:
        r: the rank, at least 1.
        lora_alpha: a finite number. The update is multiplied by `lora_alpha / r`.
        target_modules: names of modules, or the ends of names after a dot; or one regular
            expression that has to match a whole name; or `"all-linear"`. Several names
            are kept sorted, without repetitions, as are `exclude_modules`.
        exclude_modules: names, ends of names or one regular expression of modules that
            have no adapter.
        lora_dropout: of an adapter's input in training, in [0, 1).
        fan_in_fan_out: the weights are stored `(in, out)`.
        bias: which biases of the model were trained too.
        use_rslora: multiply by `lora_alpha / sqrt(r)` instead.
        modules_to_save: names of modules that were trained as they are.
        init_lora_weights: how the adapter was initialized.
        layers_to_transform: numbers of the layers that have adapters, or one number.
        layers_pattern: regular expressions, or one, of what the list of layers is called.
        rank_pattern: regular expression of the end of a name to rank. The first that
            matches counts.
        alpha_pattern: regular expression of the end of a name to alpha, likewise.
        trainable_token_indices: rows of the input embedding that were trained, or a dict
            from the names of embeddings to such rows.
        use_dora: the method is DoRA.
        lora_bias: the product with `B` has a bias.
        target_parameters: names of parameters (stacks of experts) with adapters.
        task_type: one of PEFT's names of tasks, such as `"CAUSAL_LM"`.
        base_model_name_or_path: the model that the adapter is for.
        revision: of that model.
        peft_type: `"LORA"`.
        peft_version: that wrote the file; not compared.
        inference_mode: whether the adapter is frozen; not compared.
        auto_mapping: the names of the model's class and library.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if a value is out of its range or no regular expression, or fields
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
            fields: the JSON object. What it lacks has its default, as in older files.
            where: what the messages of errors call the file.
            allow_fields: the names of fields that are ignored, whatever they say.

        Raises:
            TypeError, ValueError: if a value is none that its field takes, or a field of
                another method or an unknown one is in use, and not allowed.
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
        """Whether making the adapter changed the base weights as well.

        Then the adapter belongs to the changed weights, unless it was converted.
        """
        init = self.init_lora_weights
        return isinstance(init, str) and INITS[init_word(init)]

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        key = pattern_key(self.rank_pattern, module, self._ranks)
        return self.r if key is None else self.rank_pattern[key]

    def alpha_of(self, module: str) -> float:
        """The alpha of a module's adapter."""
        key = pattern_key(self.alpha_pattern, module, self._alphas)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    @functools.cached_property
    def _ranks(self) -> Patterns:
        return Patterns(self.rank_pattern)

    @functools.cached_property
    def _alphas(self) -> Patterns:
        return Patterns(self.alpha_pattern)

    def scale_of(self, module: str) -> float:
        """What multiplies a module's update: `alpha / rank`, or `alpha / sqrt(rank)`."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def to_json(self) -> str:
        """Writes the config as PEFT writes that of a trained adapter.

        Returns:
            A JSON object with all fields of PEFT, sorted. `inference_mode` is true. The
            keys of `rank_pattern` and `alpha_pattern` alone keep their order, because the
            first that matches counts.
        """
        own = {name: getattr(self, name) for name in CHECKS}
        own["inference_mode"] = True
        own["peft_version"] = self.peft_version or _PEFT_VERSION
        off = {name: default for name, (default, _) in UNSUPPORTED.items()}
        fields = off | IGNORED | own
        return json.dumps(dict(sorted(fields.items())), indent=2, default=dict)


def _check_together(config: PeftConfig) -> None:
    """Raises for what PEFT refuses too."""
    targets, patterns = config.target_modules, config.layers_pattern
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(targets, str) and getattr(config, name) is not None:
            raise ValueError(
                f"{name} chooses among target_modules that are a list of names, got "
                f"target_modules={shorten(targets)}: write the layers into the "
                "regular expression, or list the names."
            )
    if patterns and config.layers_to_transform is None:
        raise ValueError(
            "layers_pattern says what the layers are called, and layers_to_transform has "
            f"to say which of them, got layers_pattern={shorten(patterns)} alone."
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
                f"{name} must be off with target_parameters, whose adapters have none, got "
                f"{name}={getattr(config, name)}."
            )
