"""Checks the value of each field of an `adapter_config.json`."""

import difflib
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from lora_jax._core import checks
from lora_jax._core.immutable import FrozenDict

# Larger numbers make no sense for a model, and float32 holds no larger ones.
_LARGEST_INTEGER = 2**31 - 1
_LARGEST_NUMBER = float(np.finfo(np.float32).max)
_TASKS = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
Check: TypeAlias = Callable[[str, Any], Any]
"""From the name of a field and a value to the checked value."""
# Whether the initialization changes the base weights.
INITS = {
    "gaussian": False,
    "orthogonal": False,
    "eva": False,
    "mica": False,
    "pissa": True,
    "olora": True,
    "corda": True,
    "loftq": True,
    "lora_ga": True,
}
_INITS_IN_ANY_CASE = ("gaussian", "mica", "olora")
_IN_PEFT = "merge the adapter into the model in PEFT, and use the merged model."
_CHANGED_BASE = (
    "it says how the base weights were changed when the adapter was made. If your base is "
    "the changed one, or the adapter was converted when it was saved, set the field to its "
    "default in the file: "
)
# Fields of other methods: the default, and what to do with an adapter that has another.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "alora_invocation_tokens": (
        None,
        "the adapter acts only on the tokens after these, and cannot be merged: use it in "
        "PEFT.",
    ),
    "arrow_config": (None, "it routes between adapters: load each of those by itself."),
    "corda_config": (None, _CHANGED_BASE + "null."),
    "ensure_weight_tying": (
        False,
        "it shares the adapters of tied weights: " + _IN_PEFT,
    ),
    "kasa_config": (None, _IN_PEFT),
    "layer_replication": (
        None,
        "it repeats layers of the model: build the model with these layers, and set the "
        "field to null in the file.",
    ),
    "loftq_config": ({}, _CHANGED_BASE + "{}."),
    "lora_ga_config": (None, _CHANGED_BASE + "null."),
    "megatron_config": (
        None,
        "it is for the parallel layers of Megatron: set it to null in the file if the "
        "adapter is of ordinary layers.",
    ),
    "monteclora_config": (None, _IN_PEFT),
    "use_bdlora": (None, _IN_PEFT),
    "use_qalora": (False, _IN_PEFT),
    "velora_config": (None, _IN_PEFT),
}
# Fields whose value does not matter: initializations of A, and details of unused methods.
IGNORED = {
    "eva_config": None,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}
# PEFT does not write this field, which says where PEFT computes.
_NOT_WRITTEN = ("runtime_config",)


def pattern_regex(key: str) -> str:
    """The regular expression of names that a key of `rank_pattern` applies to."""
    return rf"(.*\.)?({key})$"


def layer_regex(pattern: str | None = None) -> str:
    """The regular expression of a name with the number of its layer as `idx`.

    Args:
        pattern: regular expression of what the list of layers is called; None for the
            first number in the name that has two names before it.
    """
    if pattern is None:
        return r".*?\.[^.]*\.(?P<idx>\d+)\."
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def saved_regex(module: str) -> str:
    """The regular expression of a module of `modules_to_save` and of modules inside it."""
    return rf"(^|.*\.){module}($|\..*)"


def shorten(value: Any) -> str:
    """The representation of a value in at most 80 characters, for messages."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an int of many digits
        return "a value too large to show"
    return text if len(text) <= 80 else text[:77] + "..."


def wrong_type(name: str, expected: str, value: Any) -> TypeError:
    """The error for a value of the wrong type."""
    return TypeError(
        f"{name} must be {expected}, got {shorten(value)} ({type(value).__name__})."
    )


def _typed(name: str, value: Any, kind: Any, expected: str) -> Any:
    if not isinstance(value, kind):
        raise wrong_type(name, expected, value)
    return value


_flag = functools.partial(_typed, kind=bool, expected="true or false")
_text = functools.partial(_typed, kind=str | None, expected="a string or null")


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(
        value, int | float | np.integer | np.floating
    ):
        raise wrong_type(name, "a number", value)
    value = int(value) if isinstance(value, int | np.integer) else float(value)
    if not abs(value) <= _LARGEST_NUMBER:
        raise ValueError(f"{name} must be finite in float32, got {shorten(value)}.")
    return value


def _integer(name: str, value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise wrong_type(name, "an integer", value)
    if not least <= value <= _LARGEST_INTEGER:
        raise ValueError(
            f"{name} must be an integer from {least} to {_LARGEST_INTEGER}, got "
            f"{shorten(value)}."
        )
    return int(value)


def _rate(name: str, value: Any) -> float:
    value = _number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {shorten(value)}.")
    return value


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    checks.check_choice(name, _typed(name, value, str, "a string"), choices)
    return value


def check_peft_type(name: str, value: Any) -> str:
    """Checks the value of the field `peft_type`."""
    if value != "LORA":
        raise ValueError(
            f"{name} must be 'LORA', got {shorten(value)}: adapters of other methods "
            f"cannot be read; {_IN_PEFT}"
        )
    return value


def init_word(init: str) -> str:
    """The entry of `INITS` for a value of `init_lora_weights`, or the value."""
    if re.fullmatch("pissa_niter_[0-9]+", init):
        return "pissa"
    return init.lower() if init.lower() in _INITS_IN_ANY_CASE else init


def _init(name: str, value: Any) -> bool | str:
    _typed(name, value, bool | str, "true, false or the name of an initialization")
    if isinstance(value, str):
        what = f"{name}, where not true or false,"
        checks.check_choice(what, init_word(value), tuple(INITS))
    return value


def _optional(check: Check) -> Check:
    """The check of a field that may be null."""
    return lambda name, value: None if value is None else check(name, value)


def _items(name: str, value: Any, check: Check) -> tuple[Any, ...]:
    _typed(name, value, tuple | list | set | frozenset, "a list")
    return tuple(check(f"an item of {name}", item) for item in value)


def _name(name: str, value: Any) -> str:
    if not _typed(name, value, str, "a string"):
        raise ValueError(f"{name} must be a name, got an empty string.")
    return value


_rows = functools.partial(_items, check=_integer)
_names = _optional(functools.partial(_items, check=_name))


def _names_or_regex(name: str, value: Any) -> str | tuple[str, ...] | None:
    if isinstance(value, str):
        _check_regex(name, value, value)
        return value
    names = _names(name, value)
    return None if names is None else tuple(sorted(set(names)))


def _regexes(name: str, value: Any, regex: Callable[[str], str]) -> tuple[str, ...] | None:
    names = _names(name, value)
    for each in names or ():
        _check_regex(name, each, regex(each))
    return names


def _layers(name: str, value: Any) -> tuple[int, ...]:
    one = isinstance(value, int | np.integer)
    return (_integer(name, value),) if one else _rows(name, value)


def _layer_patterns(name: str, value: Any) -> tuple[str, ...] | None:
    if isinstance(value, str):
        value = (value,) if value else ()
    return _regexes(name, value, layer_regex)


def _values(name: str, value: Any, check: Check) -> FrozenDict[str, Any]:
    for key in _typed(name, value, Mapping, "a JSON object"):
        _typed(f"a key of {name}", key, str, "a string")
    return FrozenDict({k: check(f"{name}[{shorten(k)}]", v) for k, v in value.items()})


def _pattern_values(name: str, value: Any, check: Check) -> FrozenDict:
    patterns = FrozenDict() if value is None else _values(name, value, check)
    for key in patterns:
        _check_regex(name, key, pattern_regex(key))
    return patterns


def _sorted_values(name: str, value: Any, check: Check) -> FrozenDict[str, Any]:
    return FrozenDict(sorted(_values(name, value, check).items()))


def _tokens(name: str, value: Any) -> tuple[int, ...] | FrozenDict:
    mapping = isinstance(value, Mapping)
    return _sorted_values(name, value, _rows) if mapping else _rows(name, value)


def _scalar(name: str, value: Any) -> str | bool | int | float | None:
    return value if isinstance(value, str | bool | None) else _number(name, value)


_rank = functools.partial(_integer, least=1)
CHECKS: dict[str, Check] = {
    "peft_type": check_peft_type,
    "r": _rank,
    "lora_alpha": _number,
    "target_modules": _names_or_regex,
    "exclude_modules": _names_or_regex,
    "lora_dropout": _rate,
    "fan_in_fan_out": _flag,
    "bias": functools.partial(_choice, choices=("none", "all", "lora_only")),
    "use_rslora": _flag,
    "modules_to_save": functools.partial(_regexes, regex=saved_regex),
    "init_lora_weights": _init,
    "layers_to_transform": _optional(_layers),
    "layers_pattern": _layer_patterns,
    "rank_pattern": functools.partial(_pattern_values, check=_rank),
    "alpha_pattern": functools.partial(_pattern_values, check=_number),
    "trainable_token_indices": _optional(_tokens),
    "use_dora": _flag,
    "lora_bias": _flag,
    "target_parameters": _names,
    "task_type": _optional(functools.partial(_choice, choices=_TASKS)),
    "base_model_name_or_path": _text,
    "revision": _text,
    "peft_version": _text,
    "inference_mode": _flag,
    "auto_mapping": _optional(functools.partial(_sorted_values, check=_scalar)),
}


def _check_regex(name: str, pattern: str, regex: str) -> None:
    """Raises unless `regex`, which contains `pattern`, is a regular expression."""
    try:
        re.compile(regex)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        # A warning is an exception only where the caller has made it one.
        raise ValueError(
            f"{name} has {shorten(pattern)}, which is not a regular expression: {error}."
        ) from None


def check_allowed(allow_fields: Any) -> tuple[str, ...]:
    """Checks the names of fields that the caller allows."""
    names = _items("allow_fields", allow_fields, _name)
    for name in names:
        if name in CHECKS:
            raise ValueError(
                f"allow_fields has {name!r}, which is read and never ignored: name fields "
                "that are not supported."
            )
    return names


def is_off(name: Any, value: Any) -> bool:
    """Whether a field changes no adapter, or is a field of `PeftConfig`."""
    if name in CHECKS or name in IGNORED or name in _NOT_WRITTEN:
        return True
    if value is None or value is False:
        return True
    if name in UNSUPPORTED:
        return value == UNSUPPORTED[name][0]
    return isinstance(value, str | list | tuple | dict) and not value


def check_is_off(name: Any, value: Any) -> None:
    """Raises if a field that `PeftConfig` does not have would change the adapter."""
    if is_off(name, value):
        return
    if name in UNSUPPORTED:
        _, advice = UNSUPPORTED[name]
        raise ValueError(f"{name} is {shorten(value)}, which is not supported: {advice}")
    near = difflib.get_close_matches(str(name), CHECKS, n=1)
    raise ValueError(
        f"there is no field {shorten(name)}, which is {shorten(value)}"
        + (f"; did you mean {near[0]!r}?" if near else ".")
        + " If a newer version of PEFT wrote it, and the adapter does not need it, "
        f"ignore it with allow_fields=({shorten(name)},)."
    )
