"""Names of modules compared with the paths of weights.

The names of a checkpoint and the paths of a tree are compared word by word from their
ends, `model.layers.0.self_attn.q_proj` with `decoder/layers_0/self_attn/q_proj/kernel`.
The numbers in both have to be the same, but for those of modules whose weights are stacked
in one array.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

# What modules are called whose weights are (entries, width) in every framework.
_EMBEDDING = re.compile(r"emb|^(wte|wpe|shared)$", re.IGNORECASE)
_CONVOLUTION = re.compile(r"conv", re.IGNORECASE)
# What embeddings of tokens and output heads are called.
EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared"}
)
HEADS = frozenset({"lm_head", "embed_out"})
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
_FIELD = re.compile(r"\{([A-Za-z_]\w*)?\}")
_MASKED = re.compile(r"\d+|\{(?:[A-Za-z_]\w*)?\}")
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
PathIndex: TypeAlias = dict[tuple[str, tuple[str, ...], tuple[str, ...]], list[str]]
"""Paths by what the leaf is called, the numbers in them, and each end of their words."""
Numbers: TypeAlias = tuple[tuple[str, int], ...]
"""Numbers of a module's name, each with the name of its field."""


def last_word(name: str) -> str:
    """What a module or the module of a leaf is called."""
    words = [word for word in split_path(name).words if not word.isdecimal()]
    return words[-1] if words else ""


def is_embedding(name: str, path: str = "") -> bool:
    """Whether a module is an embedding, by what it or its leaf is called."""
    last = [word for word in name.split(".") if not word.isdecimal()][-1:]
    words = path.replace(".", "/").split("/")[-2:]
    if "kernel" in words:  # of a matrix, such as an output head that is called embed_out
        return False
    return any(map(_EMBEDDING.search, last)) or "embedding" in words


def is_convolution(name: str) -> bool:
    """Whether a module is a convolution, by what it is called."""
    last = [word for word in name.split(".") if not word.isdecimal()][-1:]
    return any(map(_CONVOLUTION.search, last))


class Words(NamedTuple):
    """A name as words, with numbers apart, and what the leaf is."""

    words: tuple[str, ...]
    leaf: str = ""


class Found(NamedTuple):
    """A path for a name."""

    path: str
    indices: tuple[int, ...]
    """Where in the stacked axes of the leaf, if there are any."""


@functools.lru_cache(maxsize=2**17)
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


@functools.lru_cache(maxsize=2**17)
def split_name(name: str) -> tuple[str, ...]:
    """The words of the name of a module."""
    return tuple(_numbers_apart(name.split(".")))


def _numbers_apart(words: Iterable[str]) -> Iterator[str]:
    for word in words:
        match = _NUMBERED.fullmatch(word)
        yield from (match.groups() if match and "_" in word else (word,))


def index_paths(paths: Iterable[str]) -> PathIndex:
    """Paths of leaves by the ends of their words, for `search`."""
    index: PathIndex = {}
    for path in paths:
        own, leaf = split_path(path)
        numbers = tuple(_numbers(own))
        for start in range(len(own)):
            index.setdefault((leaf, numbers, own[start:]), []).append(path)
    return index


def search_paths(
    words: tuple[str, ...], leaves: tuple[str, ...], index: PathIndex
) -> list[Found]:
    """The leaves whose paths have the longest common end with a name.

    Args:
        words: of the name.
        leaves: what the leaf may be: `WEIGHT`, `BIAS`, or empty for what ends in no word
            that is known.
        index: of the paths to search.

    Returns:
        Of several with one such end, one that is the whole path.
    """
    found: dict[Found, tuple[int, bool]] = {}
    for rest, numbers in _without_indexes(words):
        for path, same in _longest(rest, leaves, index).items():
            each = Found(path, numbers)
            found[each] = max(same, found.get(each, same))
    most = max(found.values(), default=None)
    return [each for each, same in found.items() if same == most]


def _longest(
    words: tuple[str, ...], leaves: tuple[str, ...], index: PathIndex
) -> dict[str, tuple[int, bool]]:
    """The paths with the longest common end, its length, and whether it is all of them."""
    numbers = tuple(_numbers(words))
    for start in range(len(words)):
        found = {}
        for leaf in leaves:
            for path in index.get((leaf, numbers, words[start:]), ()):
                own = split_path(path).words
                same = _common(words, own)
                if not _opposite(words[:-same], own[:-same]):
                    found[path] = same, same == len(own)
        if found:
            return found
    return {}


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


def lacking_fields(name: str, path: str) -> Numbers:
    """The numbers of a module's name that a path lacks, with their fields."""
    words = split_name(name)
    values = [int(word) for word in words if word.isdecimal()]
    left = [*zip(name_fields(name), values, strict=True)]
    for number in map(int, _numbers(split_path(path).words)):
        first = next((each for each in left if each[1] == number), None)
        if first is not None:
            left.remove(first)
    return tuple(left)


def name_indices(name: str, path: str, indices: tuple[int, ...]) -> Numbers:
    """The numbers of a name that are indexes of the leaf at a path, with their fields."""
    numbers = lacking_fields(name, path)
    if tuple(number for _, number in numbers) == indices:
        return numbers
    return tuple((f"index{i}", number) for i, number in enumerate(indices))


def name_fields(name: str) -> tuple[str, ...]:
    """What the numbers in a name are called: each by the word in front of it."""
    found, word = [], ""
    for each in split_name(name):
        if each.isdecimal():
            found.append(word)
        else:
            word = each
    return _distinct(found)


def template_fields(template: str) -> tuple[str, ...]:
    """What the fields of a template are called: `{layer}`, or `{}` by the word before."""
    found = []
    for match in _FIELD.finditer(template):
        words = re.split(r"[./]", template[: match.start()].rstrip("./_"))
        found.append(match[1] or _FIELD.sub("", words[-1]))
    return _distinct(found)


def _distinct(fields: list[str]) -> tuple[str, ...]:
    """Names of fields, those that come again with how often."""
    return tuple(
        f"{field}{count + 1}" if (count := fields[:place].count(field)) else field
        for place, field in enumerate(fields)
    )


def is_template(text: str) -> bool:
    """Whether a text has fields, `{}` or `{layer}`."""
    return _FIELD.search(text) is not None


def mask_numbers(text: str) -> str:
    """A name or a template with `{}` for each number and each field."""
    return _MASKED.sub("{}", text)


def numbers_in(template: str, name: str) -> tuple[int, ...] | None:
    """The numbers in a name where a template has fields; None if it is another name."""
    if not is_template(template):
        return () if template == name else None
    match = _template_regex(template).fullmatch(name)
    return match and tuple(map(int, match.groups()))


@functools.lru_cache(maxsize=4096)
def _template_regex(template: str) -> re.Pattern[str]:
    """What matches the names of a template."""
    return re.compile(r"(\d+)".join(map(re.escape, template_parts(template))))


def template_parts(template: str) -> list[str]:
    """What is in a template before, between and after its fields."""
    return _FIELD.split(template)[::2]


def fill_numbers(template: str, numbers: Iterable[int]) -> str:
    """A template with numbers in place of its first `{}`."""
    for number in numbers:
        template = template.replace("{}", str(number), 1)
    return template


def fill_fields(template: str, numbers: Numbers) -> tuple[str, Numbers]:
    """Fills a path: fields by their names, then `{}` in order.

    Returns:
        The path, and the numbers that it did not take.
    """
    left = dict(numbers)
    named = [match[1] for match in _FIELD.finditer(template) if match[1]]
    for field in named:
        if field in left:
            template = template.replace(f"{{{field}}}", str(left[field]))
    left = {field: number for field, number in left.items() if field not in named}
    count = template.count("{}")
    template = fill_numbers(template, list(left.values())[:count])
    return template, tuple(left.items())[count:]
