"""What each field of an `adapter_config.json` takes, and what its patterns match."""

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax._core import checks
from lora_jax._core.immutable import FrozenDict

# Nothing in a model is longer or numbered higher, and float32 holds nothing larger.
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

# Whether making an adapter so changes the base weights.
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
_OF_THE_START = (
    "it says how the base weights were changed when the adapter was made. If the base "
    "you have is the changed one, or the adapter was converted when it was saved, set the "
    "field to its default in the file: "
)
# Fields of other methods: the default, and what to do with an adapter that has another.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "alora_invocation_tokens": (
        None,
        "the adapter acts only on the tokens after these, and cannot be merged: use it in "
        "PEFT.",
    ),
    "arrow_config": (None, "it routes between adapters: load each of those by itself."),
    "corda_config": (None, _OF_THE_START + "null."),
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
    "loftq_config": ({}, _OF_THE_START + "{}."),
    "lora_ga_config": (None, _OF_THE_START + "null."),
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
# Fields whose value does not matter: how A was initialized, and details of what is off.
IGNORED = {
    "eva_config": None,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}
# A regular expression that is a name: its characters, those with a backslash as they are.
_CHARACTER = re.compile(r"\\[^\w]|[\w.-]")
_NAME = re.compile(rf"(?:{_CHARACTER.pattern})+")
# Where PEFT computes; it does not write it to the file.
_NOT_WRITTEN = ("runtime_config",)


def pattern_regex(key: str) -> str:
    """What has to match a module's name for a key of `rank_pattern` to hold there."""
    return rf"(.*\.)?({key})$"


def layer_regex(pattern: str | None = None) -> str:
    """What has to match a module's name, with the number of its layer as `idx`.

    Args:
        pattern: regular expression of what the list of layers is called; None for the
            first number in the name that has two names before it.
    """
    if pattern is None:
        return r".*?\.[^.]*\.(?P<idx>\d+)\."
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def saved_regex(module: str) -> str:
    """What matches the names of a module of `modules_to_save` and of those inside it."""
    return rf"(^|.*\.){module}($|\..*)"


class Patterns:
    """Regular expressions for parts of names, most of which are names themselves.

    A name is looked up, where a regular expression has to be tried: of thousands that are
    names only a few are compared with each name.

    Args:
        patterns: the regular expressions, in order.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = tuple(patterns)
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

        Args:
            parts: those of the name that a pattern may match.
            matches: whether a pattern that is no name matches.
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


def _masked(text: str, dots: tuple[int, ...]) -> str:
    for place in dots:
        text = f"{text[:place]}\0{text[place + 1 :]}"
    return text


def pattern_key(
    patterns: Iterable[str], module: str, index: Patterns | None = None
) -> str | None:
    """The first key of `rank_pattern` or `alpha_pattern` that holds for a module.

    Args:
        patterns: the keys.
        module: the name of the module.
        index: of the keys, for many modules.
    """
    index = index or Patterns(patterns)
    starts = (0, *(match.end() for match in re.finditer(r"\.", module)))
    key = index.first(
        (module[start:] for start in starts),
        lambda pattern: re.match(pattern_regex(pattern), module) is not None,
    )
    # A name with signs of a regular expression in it names itself all the same.
    return module if key is None and module in patterns else key


def is_saved(modules: Patterns, name: str) -> bool:
    """Whether a module is one of `modules_to_save`, or inside of one."""
    dots = [match.start() for match in re.finditer(r"\.", name)]
    starts, ends = (0, *(dot + 1 for dot in dots)), (*dots, len(name))
    parts = (name[start:end] for start in starts for end in ends if start < end)
    matches = lambda own: re.match(saved_regex(own), name) is not None  # noqa: E731
    return modules.first(parts, matches) is not None


def saved_in(saved: Iterable[str], modules: Iterable[str]) -> dict[str, bool]:
    """Which of `modules_to_save` are there, or a module inside of them."""
    modules = list(modules)
    parts = {
        part
        for module in modules
        for start in (0, *(match.end() for match in re.finditer(r"\.", module)))
        for part in itertools.accumulate(module[start:].split("."), "{}.{}".format)
    }
    return {
        name: name in parts or any(re.match(saved_regex(name), own) for own in modules)
        for name in saved
    }


def shown(value: Any) -> str:
    """A value as a message has it: in at most 80 characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an int of many digits
        return "a value too large to show"
    return text if len(text) <= 80 else text[:77] + "..."


def wrong(name: str, expected: str, value: Any) -> TypeError:
    """The error of a value of the wrong type."""
    return TypeError(
        f"{name} must be {expected}, got {shown(value)} ({type(value).__name__})."
    )


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, "true or false", value)
    return value


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(
        value, int | float | np.integer | np.floating
    ):
        raise wrong(name, "a number", value)
    value = int(value) if isinstance(value, int | np.integer) else float(value)
    if not abs(value) <= _LARGEST_NUMBER:
        raise ValueError(f"{name} must be finite in float32, got {shown(value)}.")
    return value


def _integer(name: str, value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise wrong(name, "an integer", value)
    if not least <= value <= _LARGEST_INTEGER:
        raise ValueError(
            f"{name} must be an integer from {least} to {_LARGEST_INTEGER}, got "
            f"{shown(value)}."
        )
    return int(value)


def _rank(name: str, value: Any) -> int:
    return _integer(name, value, least=1)


def _rate(name: str, value: Any) -> float:
    value = _number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {shown(value)}.")
    return value


def _text(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise wrong(name, "a string or null", value)
    return value


def _choice(name: str, value: Any, choices: Iterable[str]) -> str:
    if not isinstance(value, str):
        raise wrong(name, "a string", value)
    checks.check_choice(name, value, tuple(choices))
    return value


def _bias(name: str, value: Any) -> str:
    return _choice(name, value, ("none", "all", "lora_only"))


def _task(name: str, value: Any) -> str | None:
    return None if value is None else _choice(name, value, _TASKS)


def peft_type(name: str, value: Any) -> str:
    """The value of the field `peft_type`, checked."""
    if value != "LORA":
        raise ValueError(
            f"{name} must be 'LORA', got {shown(value)}: adapters of other methods cannot "
            f"be read; {_IN_PEFT}"
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
        raise wrong(name, "true, false or the name of an initialization", value)
    checks.check_choice(f"{name}, where not true or false,", init_word(value), tuple(INITS))
    return value


def _items(name: str, value: Any, check: Callable[[str, Any], Any]) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list | set | frozenset):
        raise wrong(name, "a list", value)
    return tuple(check(f"an item of {name}", item) for item in value)


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, "a string", value)
    if not value:
        raise ValueError(f"{name} must be the name of something, got an empty string.")
    return value


def _names(name: str, value: Any) -> tuple[str, ...] | None:
    return None if value is None else _items(name, value, _name)


def _names_or_regex(name: str, value: Any) -> str | tuple[str, ...] | None:
    if isinstance(value, str):
        _check_regex(name, value, value)
        return value
    names = _names(name, value)
    return None if names is None else tuple(sorted(set(names)))


def _saved(name: str, value: Any) -> tuple[str, ...] | None:
    names = _names(name, value)
    for module in names or ():
        _check_regex(name, module, saved_regex(module))
    return names


def _layers(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, int | np.integer):
        return (_integer(name, value),)
    return _items(name, value, _integer)


def _layer_patterns(name: str, value: Any) -> tuple[str, ...] | None:
    if isinstance(value, str):
        value = (value,) if value else ()
    patterns = _names(name, value)
    for pattern in patterns or ():
        _check_regex(name, pattern, layer_regex(pattern))
    return patterns


def _values(
    name: str, value: Any, check: Callable[[str, Any], Any]
) -> FrozenDict[str, Any]:
    if not isinstance(value, Mapping):
        raise wrong(name, "a JSON object", value)
    for key in value:
        if not isinstance(key, str):
            raise wrong(f"a key of {name}", "a string", key)
    return FrozenDict({k: check(f"{name}[{shown(k)}]", v) for k, v in value.items()})


def _patterns(name: str, value: Any, check: Callable[[str, Any], Any]) -> FrozenDict:
    if value is None:
        return FrozenDict()
    patterns = _values(name, value, check)
    for key in patterns:
        _check_regex(name, key, pattern_regex(key))
    return patterns


def _ranks(name: str, value: Any) -> FrozenDict[str, int]:
    return _patterns(name, value, _rank)


def _alphas(name: str, value: Any) -> FrozenDict[str, float]:
    return _patterns(name, value, _number)


def _rows(name: str, value: Any) -> tuple[int, ...]:
    return _items(name, value, _integer)


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


# What each field takes, as a function from its name and a value to what is kept of it.
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "peft_type": peft_type,
    "r": _rank,
    "lora_alpha": _number,
    "target_modules": _names_or_regex,
    "exclude_modules": _names_or_regex,
    "lora_dropout": _rate,
    "fan_in_fan_out": _flag,
    "bias": _bias,
    "use_rslora": _flag,
    "modules_to_save": _saved,
    "init_lora_weights": _init,
    "layers_to_transform": _layers,
    "layers_pattern": _layer_patterns,
    "rank_pattern": _ranks,
    "alpha_pattern": _alphas,
    "trainable_token_indices": _tokens,
    "use_dora": _flag,
    "lora_bias": _flag,
    "target_parameters": _names,
    "task_type": _task,
    "base_model_name_or_path": _text,
    "revision": _text,
    "peft_version": _text,
    "inference_mode": _flag,
    "auto_mapping": _auto_mapping,
}


def _check_regex(name: str, pattern: str, regex: str) -> None:
    """Raises unless `regex`, which is made of `pattern`, is a regular expression."""
    try:
        re.compile(regex)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        # A warning is an exception only where the caller has made it one.
        raise ValueError(
            f"{name} has {shown(pattern)}, which is no regular expression: {error}."
        ) from None


def check_allowed(allow_fields: Any) -> tuple[str, ...]:
    """The names of fields that a caller allows, checked.

    Raises:
        TypeError: if they are no names.
        ValueError: if one is that of a field that is read.
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
    """Whether a field changes no adapter, or has a place in a `PeftConfig`."""
    if name in CHECKS or name in IGNORED or name in _NOT_WRITTEN:
        return True
    if value is None or value is False:
        return True
    if name in UNSUPPORTED:
        return value == UNSUPPORTED[name][0]
    return isinstance(value, str | list | tuple | dict) and not value


def check_is_off(name: Any, value: Any) -> None:
    """Raises if a field that has no place in a `PeftConfig` would change the adapter."""
    if is_off(name, value):
        return
    if name in UNSUPPORTED:
        _, advice = UNSUPPORTED[name]
        raise ValueError(f"{name} is {shown(value)}, which is not supported: {advice}")
    near = difflib.get_close_matches(str(name), CHECKS, n=1)
    raise ValueError(
        f"there is no field {shown(name)}, which is {shown(value)}"
        + (f"; did you mean {near[0]!r}?" if near else ".")
        + " If a newer version of PEFT wrote it, and the adapter does not need it, "
        f"ignore it with allow_fields=({shown(name)},)."
    )
