"""Parts of a weight: `"[4:]"` of its first axis, `"[:, 64:128]"` of its second.

A part is written as a NumPy index is: for each axis an integer, which drops the axis, a
slice, or a list of integers. It follows the path of the weight, in patterns and in the
paths of a plan: `"layers/up[4:]"`. Behind it may be which use of the weight is meant,
`"embedding@lookup"`. Both together are the *suffix* of a target.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._core import tree_paths

Entry: TypeAlias = int | range | tuple[int, ...]
"""What a part has of one axis: one index, a run of them, or a list."""

LOOKUP, PRODUCT = "lookup", "product"
USES = (LOOKUP, PRODUCT)

_ITEM = re.compile(r"\s*((-?\d+)?\s*:\s*(-?\d+)?(\s*:\s*(-?\d+)?)?|-?\d+)\s*")
_LIST = re.compile(r"\s*\[\s*(-?\d+\s*(,\s*-?\d+\s*)*)\]\s*")


class Reading(NamedTuple):
    """A pattern, taken apart.

    Attributes:
        base: the pattern of the paths of leaves.
        part: the text of an index, in its brackets; empty for the whole weight.
        use: `"lookup"`, `"product"`, or empty for both.
    """

    base: str
    part: str = ""
    use: str = ""


def split(pattern: str) -> Reading:
    """Takes the suffix off a path or a pattern.

    Brackets that hold no index belong to the pattern, and all of a regular expression.
    """
    base, at, use = pattern.rpartition("@")
    if not at or use not in USES:
        base, use = pattern, ""
    start = None if base.startswith("re:") else _start_of_index(base)
    if start is None or start == 0:
        return Reading(base, "", use)
    return Reading(base[:start], base[start:], use)


def _start_of_index(text: str) -> int | None:
    """Where the index at the end of a text begins, if there is one."""
    if not text.endswith("]"):
        return None
    depth = 0
    for i in range(len(text) - 1, -1, -1):
        depth += (text[i] == "]") - (text[i] == "[")
        if depth == 0:
            return i if _items(text[i:]) is not None else None
    return None


def _items(part: str) -> list[str] | None:
    """The items of an index in brackets; None if it is no index."""
    inner, items = part[1:-1], []
    while True:
        match = _LIST.match(inner) or _ITEM.match(inner)
        if match is None:
            return None
        items.append(match.group().strip())
        inner = inner[match.end() :]
        if not inner:
            return items
        if not inner.startswith(","):
            return None
        inner = inner[1:]


def read(name: str, pattern: str, paths: Iterable[str]) -> Reading:
    """What a pattern means for some paths.

    Brackets with numbers are both an index and a set of characters (`"w[12]"`). The paths
    tell which.

    Args:
        name: of the argument that has the pattern, for the error.
        pattern: as text.
        paths: of the leaves of the params.

    Raises:
        ValueError: if both match something.
    """
    reading, paths = split(pattern), list(paths)
    if reading == Reading(pattern):
        return reading
    plain = tree_paths.first_path(pattern, paths)
    if plain is None:
        return reading
    part = tree_paths.first_path(reading.base, paths)
    if part is not None:
        raise ValueError(
            f"the pattern {pattern!r} of {name} can be read in two ways: it matches the "
            f"path {plain!r}, and the part {pattern[len(reading.base) :]!r} of {part!r}. "
            "Write the first as a regular expression, 're:...', or give the part a base "
            "that matches it alone."
        )
    return Reading(pattern)


@functools.lru_cache(maxsize=4096)
def entries(part: str, shape: tuple[int, ...]) -> tuple[Entry, ...]:
    """What a part has of each axis of a weight.

    Args:
        part: the text of an index, in its brackets; empty for the whole weight.
        shape: of the weight.

    Raises:
        ValueError: if it is no index, has more axes than the weight, an index is out of
            bounds, or something is taken in another order than the weight has it.
    """
    items = _items(part) if part else []
    if items is None or (part and not part.startswith("[")):
        raise ValueError(
            f"the part must be an index such as '[4:]', '[0]' or '[:, [0, 3]]', got "
            f"{part!r}."
        )
    if len(items) > len(shape):
        raise ValueError(
            f"the part {part} has {len(items)} axes, and the weight is {shape}."
        )
    items += [":"] * (len(shape) - len(items))
    own = tuple(_entry(item, size, part) for item, size in zip(items, shape, strict=True))
    if sum(isinstance(entry, tuple) for entry in own) > 1:
        raise ValueError(f"the part {part} has more than one list: use slices, or targets.")
    return own


def _entry(item: str, size: int, part: str) -> Entry:
    if item.startswith("["):
        given = [int(number) for number in item[1:-1].split(",")]
        return _run([_index(i, size, part) for i in given], size, part)
    if ":" not in item:
        return _index(int(item), size, part)
    bounds = [int(text) if text.strip() else None for text in item.split(":")]
    if len(bounds) == 3 and bounds[2] is not None and bounds[2] <= 0:
        raise ValueError(f"the part {part} must have steps of at least 1.")
    run = range(size)[slice(*bounds)]
    if not run:
        raise ValueError(f"the part {part} has nothing of an axis of size {size}.")
    return run if len(run) > 1 else range(run[0], run[0] + 1)


def _index(index: int, size: int, part: str) -> int:
    if not -size <= index < size:
        raise ValueError(
            f"the part {part} has the index {index} of an axis of size {size}."
        )
    return index % size


def _run(indices: Sequence[int], size: int, part: str) -> Entry:
    """Indices as a slice, if they are a run without gaps, else as they are."""
    if list(indices) != sorted(set(indices)):
        raise ValueError(f"the part {part} must list each index once, in ascending order.")
    if indices[-1] - indices[0] + 1 == len(indices):
        return range(size)[indices[0] : indices[-1] + 1]
    return tuple(indices)


def as_text(own: Sequence[Entry], shape: Sequence[int]) -> str:
    """The index with these entries, as it is written: empty if it has everything."""
    items = [_text(entry, size) for entry, size in zip(own, shape, strict=True)]
    while items and items[-1] == ":":
        items.pop()
    return f"[{','.join(items)}]" if items else ""


def _text(entry: Entry, size: int) -> str:
    if isinstance(entry, int):
        return str(entry)
    if isinstance(entry, tuple):
        return f"[{','.join(map(str, entry))}]"
    start = str(entry[0]) if entry[0] else ""
    stop = str(entry[-1] + 1) if entry[-1] + entry.step < size else ""
    return f"{start}:{stop}" + (f":{entry.step}" if entry.step != 1 else "")


def canonical(part: str, shape: Sequence[int]) -> str:
    """The same part in the one way of writing it."""
    return as_text(entries(part, tuple(shape)), shape)


def _grouped(indices: Sequence[int], size: int) -> Entry:
    """The entry of some indices of an axis, in ascending order: a slice if it can be."""
    steps = {b - a for a, b in itertools.pairwise(indices)} or {1}
    if len(steps) > 1:
        return tuple(indices)
    return range(size)[indices[0] : indices[-1] + 1 : steps.pop()]


def count(entry: Entry) -> int:
    """How many indices an entry has of its axis."""
    return 1 if isinstance(entry, int) else len(entry)


def indices_of(entry: Entry) -> tuple[int, ...]:
    """The indices that an entry has of its axis."""
    return (entry,) if isinstance(entry, int) else tuple(entry)


def cut_axes(part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that a part has some of."""
    own = entries(part, shape)
    return tuple(axis for axis, entry in enumerate(own) if count(entry) < shape[axis])


def cut(part: str, cuts: Iterable[str], shape: tuple[int, ...]) -> list[str]:
    """A part in pieces, each of which is inside or outside of every one of other parts."""
    others = [entries(other, shape) for other in cuts]
    choices = []
    for axis, entry in enumerate(entries(part, shape)):
        if isinstance(entry, int):
            choices.append([entry])
            continue
        inside = [{*indices_of(other[axis])} for other in others]
        groups: dict[tuple[bool, ...], list[int]] = {}
        for index in entry:
            groups.setdefault(tuple(index in own for own in inside), []).append(index)
        choices.append(
            [entry]
            if len(groups) == 1
            else [_grouped(own, shape[axis]) for own in groups.values()]
        )
    return [as_text(own, shape) for own in itertools.product(*choices)]


def joined(alike: Sequence[str], shape: tuple[int, ...]) -> list[str]:
    """Parts without a common entry, joined where they differ along one axis only."""
    whole = [entries(part, shape) for part in alike]
    differ = [axis for axis, own in enumerate(zip(*whole, strict=True)) if len({*own}) > 1]
    if len(differ) != 1:
        return list(alike)
    (axis,) = differ
    indices = sorted(i for own in whole for i in indices_of(own[axis]))
    entry = _grouped(indices, shape[axis])
    return [as_text((*whole[0][:axis], entry, *whole[0][axis + 1 :]), shape)]


def mask(part: str, shape: tuple[int, ...]) -> np.ndarray:
    """Which entries of a weight a part has; of size 1 along axes that it has whole."""
    own = entries(part, shape)
    inside = np.ones((1,) * len(shape), bool)
    for axis in cut_axes(part, shape):
        line = np.zeros([shape[i] if i == axis else 1 for i in range(len(shape))], bool)
        line.reshape(-1)[list(indices_of(own[axis]))] = True
        inside = inside & line
    return inside


def overlap(first: str, second: str, shape: tuple[int, ...]) -> bool:
    """Whether two parts of a weight have an entry in common."""
    pairs = zip(entries(first, shape), entries(second, shape), strict=True)
    return all({*indices_of(a)} & {*indices_of(b)} for a, b in pairs)


def first_match(patterns: Iterable[str], key: str, suffix: str, shape: Any) -> str | None:
    """The first of some patterns that matches a target of a plan, or None.

    A pattern without a suffix matches all targets of a weight, and one with a part all
    targets inside of that.

    Args:
        patterns: as text.
        key: of the target, the path with the suffix.
        suffix: of the target.
        shape: of the weight; None if it is not known, and parts are compared as text.
    """
    path = key.removesuffix(suffix) if suffix else key
    for pattern in patterns:
        if tree_paths.matches(pattern, key) or tree_paths.matches(pattern, path):
            return pattern
        base, part, use = split(pattern)
        if (part or use) and suffix and tree_paths.matches(base, path):
            own = split(key)
            if use in ("", own.use) and _is_inside(own.part, part, shape):
                return pattern
    return None


def _is_inside(part: str, of: str, shape: Any) -> bool:
    """Whether a part of a weight is one of another part; as text without a shape."""
    if not of or part == of or shape is None:
        return not of or part == of
    try:
        pairs = zip(entries(part, shape), entries(of, shape), strict=True)
    except ValueError:  # of is no part of this weight
        return False
    return all({*indices_of(own)} <= {*indices_of(outer)} for own, outer in pairs)


def check_matched(
    name: str, patterns: Iterable[str], targets: Mapping[str, Any], what: str
) -> None:
    """Raises unless each pattern matches a target of a plan.

    Raises:
        ValueError: the message lists the patterns and the nearest paths.
    """
    lost = [
        pattern
        for pattern in patterns
        if not any(
            first_match([pattern], key, target.suffix, target.shape)
            for key, target in targets.items()
        )
    ]
    tree_paths.check_matched(name, lost, targets, what)


def take(array: Any, part: str) -> Any:
    """The part of an array, as an array."""
    if not part:
        return array
    own = entries(part, tuple(array.shape))
    for axis, entry in enumerate(own):
        if isinstance(entry, tuple):
            array = jnp.take(array, np.array(entry), axis=axis, mode="clip")
    return array[tuple(_basic(entry) for entry in own)]


def _basic(entry: Entry) -> Any:
    """The entry as an index of what a list has been taken of."""
    if isinstance(entry, tuple):
        return slice(None)
    if isinstance(entry, int):
        return entry
    return slice(entry[0], entry[-1] + 1, entry.step)


def put(array: jax.Array, part: str, values: jax.Array) -> jax.Array:
    """The array with other values for a part."""
    if not part:
        return values
    own = entries(part, tuple(array.shape))
    sizes = list(map(count, own))
    # An axis of one index stays, so that a list has its axis where the array has it.
    index = tuple(
        np.array(entry)
        if isinstance(entry, tuple)
        else _basic(range(entry, entry + 1) if isinstance(entry, int) else entry)
        for entry in own
    )
    return array.at[index].set(values.reshape(sizes))


def spread(
    array: jax.Array,
    axes: Sequence[int],
    own: Sequence[Entry],
    shape: Sequence[int],
    fill: float,
) -> jax.Array:
    """An array of a part as one of the whole weight, with `fill` everywhere else.

    Args:
        array: has one index of an axis for each that the part has of it.
        axes: which axis of the weight each of its axes is; a negative number for none.
        own: the entries of the part.
        shape: of the weight.
        fill: what is outside of the part.
    """
    for place, axis in enumerate(axes):
        if axis >= 0 and array.shape[place] != shape[axis]:
            array = _spread(array, place, own[axis], shape[axis], fill)
    return array


def _spread(array: jax.Array, axis: int, entry: Entry, size: int, fill: float) -> jax.Array:
    if isinstance(entry, tuple):
        whole = (*array.shape[:axis], size, *array.shape[axis + 1 :])
        index = (*[slice(None)] * axis, np.array(entry))
        return jnp.full(whole, fill, array.dtype).at[index].set(array)
    run = range(entry, entry + 1) if isinstance(entry, int) else entry
    widths = [(0, 0, 0)] * array.ndim
    widths[axis] = (run[0], size - run[-1] - 1, run.step - 1)
    return lax.pad(array, jnp.asarray(fill, array.dtype), widths)
