"""Checks the value of each field of an `adapter_config.json`."""

import difflib
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

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


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(name, "true or false", value)
    return value


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


def _text(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise wrong_type(name, "a string or null", value)
    return value


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    checks.check_choice(name, value, choices)
    return value


def _task(name: str, value: Any) -> str | None:
    return None if value is None else _choice(name, value, _TASKS)


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
    if isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise wrong_type(name, "true, false or the name of an initialization", value)
    checks.check_choice(f"{name}, where not true or false,", init_word(value), tuple(INITS))
    return value


def _items(name: str, value: Any, check: Callable[[str, Any], Any]) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list | set | frozenset):
        raise wrong_type(name, "a list", value)
    return tuple(check(f"an item of {name}", item) for item in value)


_rows = functools.partial(_items, check=_integer)


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    if not value:
        raise ValueError(f"{name} must be a name, got an empty string.")
    return value


def _name_list(name: str, value: Any) -> tuple[str, ...] | None:
    return None if value is None else _items(name, value, _name)


def _names_or_regex(name: str, value: Any) -> str | tuple[str, ...] | None:
    if isinstance(value, str):
        _check_regex(name, value, value)
        return value
    names = _name_list(name, value)
    return None if names is None else tuple(sorted(set(names)))


def _saved(name: str, value: Any) -> tuple[str, ...] | None:
    names = _name_list(name, value)
    for module in names or ():
        _check_regex(name, module, saved_regex(module))
    return names


def _layers(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, int | np.integer):
        return (_integer(name, value),)
    return _rows(name, value)


def _layer_patterns(name: str, value: Any) -> tuple[str, ...] | None:
    if isinstance(value, str):
        value = (value,) if value else ()
    patterns = _name_list(name, value)
    for pattern in patterns or ():
        _check_regex(name, pattern, layer_regex(pattern))
    return patterns


def _values(
    name: str, value: Any, check: Callable[[str, Any], Any]
) -> FrozenDict[str, Any]:
    if not isinstance(value, Mapping):
        raise wrong_type(name, "a JSON object", value)
    for key in value:
        if not isinstance(key, str):
            raise wrong_type(f"a key of {name}", "a string", key)
    return FrozenDict({k: check(f"{name}[{shorten(k)}]", v) for k, v in value.items()})


def _pattern_values(name: str, value: Any, check: Callable[[str, Any], Any]) -> FrozenDict:
    if value is None:
        return FrozenDict()
    patterns = _values(name, value, check)
    for key in patterns:
        _check_regex(name, key, pattern_regex(key))
    return patterns


def _tokens(name: str, value: Any) -> tuple[int, ...] | FrozenDict | None:
    if isinstance(value, Mapping):
        return _sorted(_values(name, value, _rows))
    return None if value is None else _rows(name, value)


def _scalar(name: str, value: Any) -> str | bool | int | float | None:
    if value is None or isinstance(value, str | bool):
        return value
    return _number(name, value)


def _auto_mapping(name: str, value: Any) -> FrozenDict[str, Any] | None:
    return None if value is None else _sorted(_values(name, value, _scalar))


def _sorted(values: FrozenDict[str, Any]) -> FrozenDict[str, Any]:
    return FrozenDict(sorted(values.items()))


# For each field the function from its name and a value to the checked value.
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "peft_type": check_peft_type,
    "r": functools.partial(_integer, least=1),
    "lora_alpha": _number,
    "target_modules": _names_or_regex,
    "exclude_modules": _names_or_regex,
    "lora_dropout": _rate,
    "fan_in_fan_out": _flag,
    "bias": functools.partial(_choice, choices=("none", "all", "lora_only")),
    "use_rslora": _flag,
    "modules_to_save": _saved,
    "init_lora_weights": _init,
    "layers_to_transform": _layers,
    "layers_pattern": _layer_patterns,
    "rank_pattern": functools.partial(
        _pattern_values, check=functools.partial(_integer, least=1)
    ),
    "alpha_pattern": functools.partial(_pattern_values, check=_number),
    "trainable_token_indices": _tokens,
    "use_dora": _flag,
    "lora_bias": _flag,
    "target_parameters": _name_list,
    "task_type": _task,
    "base_model_name_or_path": _text,
    "revision": _text,
    "peft_version": _text,
    "inference_mode": _flag,
    "auto_mapping": _auto_mapping,
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
    """Checks the names of fields that the caller allows.

    Raises:
        TypeError: if a name is not a string.
        ValueError: if a name is of a field that is read.
    """
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
