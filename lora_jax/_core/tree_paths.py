"""Paths of the leaves of a tree, and patterns that select leaves by path.

A path is `jax.tree_util.keystr(path, simple=True, separator="/")`. A pattern is a glob on
the whole path, where `*` also matches `/`. Or it is a regular expression that has to match
the whole path: an `re.Pattern`, or a string that starts with `re:`. Patterns are stored as
text; an `re.Pattern` is stored with the prefix `re:`.

The leaves of an `nnx.State` have paths that end in `/value` or `/raw_value`; the leaves of
its pure dict do not. A pattern matches both forms: it may match the path without the
ending. If the pattern has the ending itself, after a letter and not after a wildcard, the
pattern without the ending may match as well.
"""

import copy
import difflib
import fnmatch
import functools
import hashlib
import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core import checks, quantized

PyTree: TypeAlias = Any
"""Any pytree: a dict, an `nnx.State`, an Equinox module. Type checkers know no bound."""

Tree = TypeVar("Tree")
"""A pytree whose type the result has too."""

Pattern: TypeAlias = str | re.Pattern[str]
"""A glob, a string `"re:..."`, or a compiled regular expression."""

_REGEX = "re:"
_BOXES = ("/value", "/raw_value")
# Not `*/value`: attention layers have a weight with this name.
_NAME_IN_BOX = re.compile(r"\w/(raw_)?value$")
_WILD = re.compile(r"^re:|[*?\[]")
_GONE = object()
_FLAGS = {re.A: "a", re.I: "i", re.M: "m", re.S: "s", re.X: "x"}


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """Returns the leaves of a tree by path, in order, and the tree's structure.

    A quantized weight is one leaf, at the path that the dense weight would have.

    Raises:
        ValueError: if two leaves have the same path.
    """
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=quantized.is_quantized
    )
    leaves, keys = {}, {}
    for key, leaf in with_paths:
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        if path in leaves:
            both = [jax.tree_util.keystr(k) for k in (keys[path], key)]
            raise ValueError(
                f"two leaves have the path {path!r}: {both[0]} and {both[1]}. Rename a key "
                "with a '/' in it."
            )
        leaves[path], keys[path] = leaf, key
    return leaves, treedef


def leaf_paths(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, in the order of `jax.tree.leaves`."""
    return flatten(tree)[0]


def check_none_is_shared(leaves: Mapping[str, Any], paths: Any, way_out: str) -> None:
    """Raises ValueError if an array at one of `paths`, to be donated, is at two paths."""
    owners: dict[int, list[str]] = {}
    for path, leaf in leaves.items():
        if isinstance(leaf, jax.Array | quantized.QuantizedTensor):
            owners.setdefault(id(leaf), []).append(path)
    for path in paths:
        for other in owners.get(id(leaves[path]), ()):
            if other != path:
                raise ValueError(
                    f"the array at {path!r} is also at {other!r}, and donating it would "
                    f"delete both: {way_out}."
                )


def without_leaves(tree: Tree, paths: Collection[str]) -> Tree:
    """A tree without the leaves at some paths.

    Mappings lose the keys whose leaves are all removed, and keep their type. In place of a
    child of another node, such as a list, is None.
    """
    with_paths, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=quantized.is_quantized
    )
    as_path = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return _pruned(tree, {key for key, _ in with_paths if as_path(key) in paths})


def _pruned(node: Any, taken: set[tuple[Any, ...]]) -> Any:
    if not taken:
        return node
    children, treedef = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda value: value is not node
    )
    kept: dict[Any, Any] = {}
    below: dict[Any, set[tuple[Any, ...]]] = {}
    for path in taken:
        below.setdefault(path[:1], set()).add(path[1:])
    for key, child in children:
        inside = below.get(key, set())
        count = len(jax.tree.leaves(child, is_leaf=quantized.is_quantized))
        kept[key] = _GONE if inside and len(inside) == count else _pruned(child, inside)
    if not isinstance(node, Mapping):
        return treedef.unflatten(None if own is _GONE else own for own in kept.values())
    by_name = {key[0].key: own for key, own in kept.items()}
    new = {name: by_name[name] for name in node if by_name[name] is not _GONE}
    if not isinstance(node, dict):
        make: Any = type(node)
        return make(new)
    same = copy.copy(node)  # a defaultdict keeps its default
    same.clear()
    same.update(new)
    return same


def count_entries(leaves: Mapping[str, Any]) -> int:
    """The number of entries of all numeric arrays, without random keys."""
    return sum(
        math.prod(array.shape)
        for array in filter(checks.is_array, leaves.values())
        if checks.has_jax_dtype(array)
        and not jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    )


def fold_in(key: jax.Array, path: str) -> jax.Array:
    """The `jax.random` key of one path, the same in every process."""
    digest = hashlib.sha256(path.encode()).digest()
    for word in np.frombuffer(digest[:8], "<u4"):
        key = jax.random.fold_in(key, word)
    return key


def as_text(name: str, pattern: Any) -> str:
    """Checks a pattern of the argument `name` and returns it as text.

    Raises:
        TypeError: if it has another type.
        ValueError: if it is empty, or not a valid regular expression.
    """
    if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
        return _REGEX + _with_inline_flags(pattern)
    if not isinstance(pattern, str):
        raise TypeError(
            f"a pattern in {name} must be a string or an re.Pattern of text, got "
            f"{pattern!r} ({type(pattern).__name__})."
        )
    if pattern in ("", _REGEX):
        raise ValueError(f"a pattern in {name} is empty: '*' matches every path.")
    if pattern.startswith(_REGEX):
        try:
            re.compile(pattern.removeprefix(_REGEX))
        except re.error as error:
            raise ValueError(
                f"the pattern {pattern!r} in {name} is not a valid regular expression: "
                f"{error}."
            ) from None
    return pattern


def _with_inline_flags(pattern: re.Pattern[str]) -> str:
    """The text of a compiled pattern, with its flags in front."""
    if re.compile(pattern.pattern).flags == pattern.flags:
        return pattern.pattern
    letters = [letter for flag, letter in _FLAGS.items() if pattern.flags & flag]
    return f"(?{''.join(letters)}){pattern.pattern}"


def as_texts(name: str, patterns: Any) -> tuple[str, ...]:
    """Checks one pattern or several and returns them as text.

    Raises:
        TypeError: if it is neither a pattern nor a tuple or list of patterns.
        ValueError: as `as_text`.
    """
    if isinstance(patterns, str | re.Pattern):
        patterns = (patterns,)
    if not isinstance(patterns, tuple | list):
        raise TypeError(
            f"{name} must be a pattern or a tuple of patterns, got "
            f"{patterns!r:.60} ({type(patterns).__name__})."
        )
    return tuple(as_text(name, pattern) for pattern in patterns)


def as_entries(name: str, entries: Any) -> dict[str, Any]:
    """Checks a mapping and returns it with its patterns as text.

    If two patterns have the same text, the first one wins.

    Raises:
        TypeError: if it is not a mapping.
        ValueError: as `as_text`.
    """
    if not isinstance(entries, Mapping):
        raise TypeError(
            f"{name} must be a dict from patterns to values, got {type(entries).__name__}."
        )
    kept: dict[str, Any] = {}
    for pattern, value in entries.items():
        kept.setdefault(as_text(name, pattern), value)
    return kept


def check_matched(
    name: str, patterns: Iterable[str], paths: Iterable[str], what: str, hint: str = ""
) -> None:
    """Raises ValueError unless each pattern matches a path; `hint` ends the message."""
    paths = list(paths)
    lost = unmatched(patterns, paths)
    if lost:
        hints = [f"{pattern!r}{nearest_hint(pattern, paths)}" for pattern in lost]
        raise ValueError(
            f"a pattern of {name} matches no {what}: {'. '.join(hints)}. A pattern is a "
            f"glob on the whole path, or 're:...' for a regular expression.{hint}"
        )


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern, as text, matches a path."""
    if not path.startswith(_start(pattern)):
        return False
    plain = without_box(path)
    return any(_matches(pattern, name) for name in dict.fromkeys((path, plain))) or (
        _NAME_IN_BOX.search(pattern) is not None and _matches(without_box(pattern), plain)
    )


# Plans of thousands of weights may have as many patterns, and compare each with each.
@functools.lru_cache(maxsize=2**16)
def _start(pattern: str) -> str:
    """The text that all paths begin with that a pattern matches."""
    if pattern.startswith(_REGEX):
        return ""
    return re.split(r"[*?[]", without_box(pattern), maxsplit=1)[0]


def _matches(pattern: str, path: str) -> bool:
    if pattern.startswith(_REGEX):
        return re.fullmatch(pattern.removeprefix(_REGEX), path) is not None
    # A path with brackets in it still matches itself.
    return path == pattern or fnmatch.fnmatchcase(path, pattern)


class PatternIndex:
    """Finds the patterns that match a path; those without wildcards by their name.

    So the time for many exact patterns does not grow with the product of patterns and
    paths.
    """

    def __init__(self, patterns: tuple[str, ...]):
        self._patterns = patterns
        self._wild: list[int] = []
        self._exact: dict[str, list[int]] = {}
        for i, pattern in enumerate(patterns):
            if _WILD.search(pattern):
                self._wild.append(i)
            else:
                for name in {pattern, without_box(pattern)}:
                    self._exact.setdefault(name, []).append(i)

    def matching(self, path: str) -> Iterator[int]:
        """The numbers of the patterns that match a path, in their order."""
        exact = (self._exact.get(name, ()) for name in (path, without_box(path)))
        for i in sorted({*self._wild, *itertools.chain.from_iterable(exact)}):
            if matches(self._patterns[i], path):
                yield i


@functools.lru_cache
def _index(patterns: tuple[str, ...]) -> PatternIndex:
    return PatternIndex(patterns)


def without_box(path: str) -> str:
    """A path, or a pattern, without the ending that an `nnx.State` gives it."""
    return next((path.removesuffix(box) for box in _BOXES if path.endswith(box)), path)


def find(path: str, paths: Iterable[str]) -> str:
    """Finds a path with another ending of NNX; the path itself if none or several match."""
    paths = list(paths)
    if path in paths:
        return path
    same = [other for other in paths if without_box(other) == without_box(path)]
    return same[0] if len(same) == 1 else path


def without_numbers(path: str) -> str:
    """A path with `*` in place of each number, so that similar layers have one path."""
    return re.sub(r"\d+", "*", path)


def listed(paths: list[str]) -> str:
    """The first five paths as text, and the number of the others."""
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return ", ".join(map(repr, paths[:5])) + more


def first_match(patterns: Iterable[str], path: str) -> str | None:
    """The first of some patterns that matches a path, or None."""
    patterns = tuple(patterns)
    found = _index(patterns).matching(path)
    return next((patterns[i] for i in found), None)


def first_path(pattern: str, paths: Iterable[str]) -> str | None:
    """The first of some paths that a pattern matches, or None."""
    return next((path for path in paths if matches(pattern, path)), None)


def look_up(values: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern in a mapping that matches a path."""
    pattern = first_match(values, path)
    return default if pattern is None else values[pattern]


def unmatched(patterns: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The patterns that match none of some paths."""
    paths = dict.fromkeys(paths)
    return [
        p
        for p in patterns
        if (p not in paths or p.startswith(_REGEX))
        and not any(matches(p, path) for path in paths)
    ]


def nearest(pattern: str, paths: Iterable[str]) -> list[str]:
    """Up to three paths that are similar to a pattern."""
    paths = list(paths)
    literal = pattern.replace("*", "")
    if pattern.startswith(_REGEX):
        literal = re.sub(r"[\\^$.|?*+()\[\]{}]", "", pattern.removeprefix(_REGEX))
    segments = [segment for segment in literal.split("/") if segment]
    close = difflib.get_close_matches(literal, paths, n=3, cutoff=0.5)
    if segments:
        last = segments[-1].lower()
        close += [path for path in paths if last in path.lower()]
    return list(dict.fromkeys(close))[:3]


def nearest_hint(pattern: str, paths: Iterable[str]) -> str:
    """The end of an error message about a missing pattern or path: the nearest paths."""
    paths = list(paths)
    near = nearest(pattern, paths)
    if near:
        return f"; the nearest paths are {', '.join(map(repr, near))}"
    return f"; the first paths are {', '.join(map(repr, paths[:3])) or 'none'}"
