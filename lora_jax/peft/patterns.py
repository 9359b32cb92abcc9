"""The patterns of a PEFT config, compared with the names of modules."""

import itertools
import re
from collections.abc import Callable, Iterable

# A regular expression that is a name: its characters, those with a backslash as they are.
_CHARACTER = re.compile(r"\\[^\w]|[\w.-]")
_NAME = re.compile(rf"(?:{_CHARACTER.pattern})+")


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
