"""Compares names of modules with paths of leaves.

The words of a name and of a path are compared from the last one:
`model.layers.0.self_attn.q_proj` with `decoder/layers_0/self_attn/q_proj/kernel`. Both must
contain the same numbers. Only the number of a module in a stacked array is not in the path.
Some trainers join the words of a name by underscores, `lora_unet_mid_block_conv_in`. Such a
flat name is compared with paths that are split at underscores too.
"""

import difflib
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

from lora_jax.peft.formats.keys import (
    BIAS,
    ENCODERS,
    FLAT,
    MODELS,
    PIPELINE,
    WEIGHT,
    is_flat,
)

# Names of embeddings of tokens and of output heads.
EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared"}
)
HEADS = frozenset({"lm_head", "embed_out"})
# The names of weights and biases in different frameworks.
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
# Words that tell towers and blocks apart, and parts of words. The first part that is found
# decides.
_SIDES = (
    {"encoder": ("encoder",), "decoder": ("decoder",)},
    {
        "vision": ("vision_model", "vision_tower", "visual", "vision", "image_encoder"),
        "text": ("text_model", "language_model", "text", *ENCODERS),
    },
    {model: (model,) for model in ("unet", *ENCODERS)},
)
_PARTS = {
    "cross": ("cross", "encoder_attn", "encdec", "attn2"),
    "mlp": ("mlp", "ffn", "feed_forward", "feedforward", "densereludense"),
    "self": ("attn", "attention"),
}
PathIndex: TypeAlias = dict[
    tuple[str, tuple[str, ...], tuple[str, ...]], list[tuple[str, tuple[str, ...]]]
]
"""Paths and their words, by the word of the leaf, the numbers, and each end of words."""
Numbers: TypeAlias = tuple[tuple[str, int], ...]
"""Numbers of a module's name, each with its field."""


def last_word(name: str) -> str:
    """The last word of a module's name that is not a number."""
    words = [word for word in split_path(name).words if not word.isdecimal()]
    return words[-1] if words else ""


class Words(NamedTuple):
    """The words of a path, and whether the leaf is `WEIGHT`, `BIAS` or neither (empty)."""

    words: tuple[str, ...]
    leaf: str = ""


class Found(NamedTuple):
    """A path that matches a name."""

    path: str
    indices: tuple[int, ...]
    """The numbers of the name that are not in the path: indexes on stacked axes."""


@functools.lru_cache(maxsize=2**17)
def split_path(path: str, *, numbers_apart: bool = True, flat: bool = False) -> Words:
    """Splits the path of a leaf into words, without the word of the leaf.

    `layers_0` is two words if `numbers_apart` is true, and so is `to_q` if `flat` is true.
    """
    words = path.replace(".", "/").split("/")
    while len(words) > 1 and words[-1] in _BOXES:
        words = words[:-1]
    if len(words) > 1 and words[0] == _COLLECTION:
        words = words[1:]
    leaf = ""
    if len(words) > 1 and words[-1] in _LEAVES:
        words, leaf = words[:-1], _LEAVES[words[-1]]
    if flat:
        pieces = ([word] if word in PIPELINE else word.split("_") for word in words)
        words = [piece for own in pieces for piece in own if piece]
    return Words(tuple(_numbers_apart(words) if numbers_apart else words), leaf)


def leaf_word(path: str) -> str:
    """The last word of the path of a leaf."""
    words = path.replace(".", "/").split("/")
    return next((word for word in reversed(words) if word not in _BOXES), "")


def nearest_names(targets: str | tuple[str, ...], names: Iterable[str]) -> str:
    """The end of the message about targets that match no module of some names."""
    names = list(names)
    words = re.findall(r"\w{2,}", targets) if isinstance(targets, str) else targets
    ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
    near = []
    for word in words[:3]:
        near += difflib.get_close_matches(word, names if "." in word else ends, n=1)
    if near:
        return f"; the nearest names are {', '.join(map(repr, dict.fromkeys(near)))}"
    return f"; the first names are {', '.join(map(repr, names[:3]))}"


@functools.lru_cache(maxsize=2**17)
def split_name(name: str) -> tuple[str, ...]:
    """Splits the name of a module into words."""
    match = FLAT.fullmatch(name)
    if match:
        model, rest, own = match.groups("")
        words = (rest or own).split("_")
        return (*filter(None, (MODELS.get(model, model), *words)),)
    return tuple(_numbers_apart(name.split(".")))


def _numbers_apart(words: Iterable[str]) -> Iterator[str]:
    for word in words:
        match = None if word in PIPELINE else _NUMBERED.fullmatch(word)
        yield from (match.groups() if match and "_" in word else (word,))


def index_paths(paths: Iterable[str], *, flat: bool = False) -> PathIndex:
    """Indexes paths of leaves by the ends of their words, for `search_paths`.

    `flat` is for flat names.
    """
    index: PathIndex = {}
    for path in paths:
        own, leaf = split_path(path, flat=flat)
        numbers = tuple(_numbers(own))
        for start in range(len(own)):
            index.setdefault((leaf, numbers, own[start:]), []).append((path, own))
    return index


def search_paths(
    words: tuple[str, ...], leaves: tuple[str, ...], index: PathIndex
) -> list[Found]:
    """The leaves whose paths have the longest common end with the words of a name.

    If the whole path of some is the common end, only these. `leaves` are the kinds to find:
    `WEIGHT`, `BIAS`, or empty for other leaves.
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
    """The paths with the longest common end, its length, and whether it is all words."""
    numbers = tuple(_numbers(words))
    for start in range(len(words)):
        found = {}
        for leaf in leaves:
            for path, own in index.get((leaf, numbers, words[start:]), ()):
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
    """The number of equal words at the end."""
    pairs = zip(reversed(words), reversed(others), strict=False)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return sum(1 for _ in same)


def _opposite(words: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Whether the words before the common end name different towers or blocks."""
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
    for number in map(int, _numbers(split_path(path, flat=is_flat(name)).words)):
        first = next((each for each in left if each[1] == number), None)
        if first is not None:
            left.remove(first)
    return tuple(left)


def name_fields(name: str) -> tuple[str, ...]:
    """The fields of the numbers in a name. A field is the word in front of the number."""
    found, word = [], ""
    for each in split_name(name):
        if each.isdecimal():
            found.append(word)
        else:
            word = each
    return _distinct(found)


def template_fields(template: str) -> tuple[str, ...]:
    """The fields of a template: the name in `{layer}`, or the word in front of `{}`."""
    found = []
    for match in _FIELD.finditer(template):
        words = re.split(r"[./]", template[: match.start()].rstrip("./_"))
        found.append(match[1] or _FIELD.sub("", words[-1]))
    return _distinct(found)


def _distinct(fields: list[str]) -> tuple[str, ...]:
    """Numbers the repetitions in a list of fields."""
    return tuple(
        f"{field}{count + 1}" if (count := fields[:place].count(field)) else field
        for place, field in enumerate(fields)
    )


def is_template(text: str) -> bool:
    """Whether a text contains `{}` or `{layer}`."""
    return _FIELD.search(text) is not None


def mask_numbers(text: str) -> str:
    """Replaces each number and each field of a name or a template by `{}`."""
    return _MASKED.sub("{}", text)


def numbers_in(template: str, name: str) -> tuple[int, ...] | None:
    """The numbers in a name at the fields of a template; None if it does not match."""
    if not is_template(template):
        return () if template == name else None
    match = _template_regex(template).fullmatch(name)
    return match and tuple(map(int, match.groups()))


@functools.lru_cache(maxsize=4096)
def _template_regex(template: str) -> re.Pattern[str]:
    """The regular expression of the names that a template matches."""
    return re.compile(r"(\d+)".join(map(re.escape, template_parts(template))))


def template_parts(template: str) -> list[str]:
    """The parts of a template before, between and after its fields."""
    return _FIELD.split(template)[::2]


def fill_numbers(template: str, numbers: Iterable[int]) -> str:
    """Replaces the first `{}` of a template by numbers."""
    for number in numbers:
        template = template.replace("{}", str(number), 1)
    return template


def fill_fields(template: str, numbers: Numbers) -> tuple[str, Numbers]:
    """Fills the template of a path: fields by their names, then `{}` in order.

    Returns:
        The path, and the numbers that are not in it.
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
