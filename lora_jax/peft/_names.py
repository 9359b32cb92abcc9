"""From the names of modules to the paths of weights.

The names of a checkpoint and the paths of a tree are compared word by word from their
ends, `model.layers.0.self_attn.q_proj` with `decoder/layers_0/self_attn/q_proj/kernel`.
The numbers in both have to be the same, but for those of modules whose weights are stacked
in one array.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

WEIGHT = "weight"
BIAS = "bias"

# What the leaves of layers are called.
_LEAVES = {
    "weight": WEIGHT,
    "kernel": WEIGHT,
    "embedding": WEIGHT,
    "embeddings": WEIGHT,
    "scale": WEIGHT,
    "w": WEIGHT,
    "bias": BIAS,
    "b": BIAS,
}
_BOXES = ("value", "raw_value")
_COLLECTION = "params"
_NUMBERED = re.compile(r"(.*[^_\d])_?(\d+)")
# Words that say which of two things a name is of, and parts of words that do; of these the
# first counts.
_SIDES = (
    {"encoder": ("encoder",), "decoder": ("decoder",)},
    {
        "vision": ("vision_model", "vision_tower", "visual", "vision", "image_encoder"),
        "text": ("text_model", "language_model", "text", "text_encoder"),
    },
)
_PARTS = {
    "cross": ("cross", "encoder_attn", "encdec", "attn2"),
    "mlp": ("mlp", "ffn", "feed_forward", "feedforward", "densereludense"),
    "self": ("attn", "attention"),
}


class Words(NamedTuple):
    """A name as words, with numbers apart, and what the leaf is."""

    words: tuple[str, ...]
    leaf: str = ""


Index: TypeAlias = dict[str, list[tuple[str, Words]]]
"""Paths and their words, by the last of those."""


class Found(NamedTuple):
    """A path for a name."""

    path: str
    indices: tuple[int, ...]
    """Where in the stacked axes of the leaf, if there are any."""


def split_path(path: str, *, numbers_apart: bool = True) -> Words:
    """The words of the path of a leaf, without what the leaf itself is called.

    Args:
        path: with `/` or `.` between the words.
        numbers_apart: whether `layers_0` is two words.
    """
    words = path.replace(".", "/").split("/")
    while len(words) > 1 and words[-1] in _BOXES:
        words = words[:-1]
    if len(words) > 1 and words[0] == _COLLECTION:
        words = words[1:]
    leaf = ""
    if len(words) > 1 and words[-1] in _LEAVES:
        words, leaf = words[:-1], _LEAVES[words[-1]]
    return Words(tuple(_numbers_apart(words) if numbers_apart else words), leaf)


def leaf_word(path: str) -> str:
    """What the leaf at a path is called."""
    words = path.replace(".", "/").split("/")
    return next((word for word in reversed(words) if word not in _BOXES), "")


def split_name(name: str) -> tuple[str, ...]:
    """The words of the name of a module."""
    return tuple(_numbers_apart(name.split(".")))


def _numbers_apart(words: Iterable[str]) -> Iterator[str]:
    for word in words:
        match = _NUMBERED.fullmatch(word)
        yield from (match.groups() if match and "_" in word else (word,))


def index_paths(paths: Iterable[str]) -> Index:
    """Paths of leaves, by their last words, for `candidates`."""
    index: Index = {}
    for path in paths:
        words = split_path(path)
        index.setdefault(words.words[-1], []).append((path, words))
    return index


def candidates(
    words: tuple[str, ...], leaves: tuple[str, ...], index: Index
) -> dict[Found, tuple[int, bool]]:
    """The leaves that a name may be that of.

    Args:
        words: of the name.
        leaves: what the leaf may be: `WEIGHT`, `BIAS`, or empty for what ends in no word
            that is known.
        index: of the paths to search.

    Returns:
        Each with the number of words at the end that are the same, and whether these are
        all of the path.
    """
    found: dict[Found, tuple[int, bool]] = {}
    for rest, numbers in _without_indexes(words):
        for path, own in index.get(rest[-1], ()) if rest else ():
            if own.leaf not in leaves or _numbers(own.words) != _numbers(rest):
                continue
            same = _common(rest, own.words)
            if not _opposite(rest[:-same], own.words[:-same]):
                found[Found(path, numbers)] = same, same == len(own.words)
    return found


def best(found: Mapping[Found, tuple[int, bool]]) -> list[Found]:
    """Those with the longest common end; of these, one that is the whole path."""
    most = max(found.values(), default=None)
    return [each for each, same in found.items() if same == most]


def _without_indexes(
    words: tuple[str, ...],
) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """The words without up to two of their numbers, and those numbers."""
    numbers = [position for position, word in enumerate(words) if word.isdecimal()]
    for count in range(min(len(numbers), 2) + 1):
        for removed in itertools.combinations(numbers, count):
            rest = tuple(word for p, word in enumerate(words) if p not in removed)
            yield rest, tuple(int(words[p]) for p in removed)


def _numbers(words: Iterable[str]) -> list[str]:
    return [word for word in words if word.isdecimal()]


def _common(words: tuple[str, ...], others: tuple[str, ...]) -> int:
    """How many words at the end are the same."""
    pairs = zip(reversed(words), reversed(others), strict=False)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return sum(1 for _ in same)


def _opposite(words: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Whether what is in front of the common end says that these are two things."""
    pairs = [(_parts(words), _parts(others))]
    for group in _SIDES:
        pairs.append((_sides(words, group), _sides(others, group)))
    return any(own and other and own != other for own, other in pairs)


def _sides(words: tuple[str, ...], group: Mapping[str, tuple[str, ...]]) -> set[str]:
    return {side for side, names in group.items() if set(names) & set(words)}


def _parts(words: tuple[str, ...]) -> set[str]:
    """The parts of a layer that some words name."""
    found = set()
    for word in words:
        named = (p for p, ends in _PARTS.items() if any(e in word.lower() for e in ends))
        found |= {next(named, "")} - {""}
    return found


def lacking(name: str, path: str) -> tuple[int, ...]:
    """The numbers of a module's name that a path lacks: which of a stack it is."""
    numbers = _numbers(split_name(name))
    for number in _numbers(split_path(path).words):
        if number in numbers:
            numbers.remove(number)
    return tuple(map(int, numbers))


def numbers_in(template: str, name: str) -> tuple[int, ...] | None:
    """The numbers in a name where a template has `{}`; None if it is another name."""
    parts = [re.escape(part) for part in template.split("{}")]
    match = re.fullmatch(r"(\d+)".join(parts), name)
    return match and tuple(map(int, match.groups()))


def fill(template: str, numbers: Iterable[int]) -> str:
    """A template with numbers in place of its first `{}`."""
    for number in numbers:
        template = template.replace("{}", str(number), 1)
    return template
