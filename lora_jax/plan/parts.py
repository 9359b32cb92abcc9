"""Parts of a weight: `"[4:]"` of its first axis, `"[:, 64:128]"` of its second.

A part is written as a NumPy index. Each axis has an integer, which removes the axis, a
slice, or a list of integers. In patterns and in the paths of a plan the part follows the
path of the weight: `"layers/up[4:]"`. The kind of use may follow the part or the path:
`"embedding@lookup"`. Part and use together are the *suffix* of a target.
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
"""The indices of one axis in a part: one index, a range, or a list."""

LOOKUP, PRODUCT = "lookup", "product"
USES = (LOOKUP, PRODUCT)

_LIST = r"\[\s*-?\d+\s*(?:,\s*-?\d+\s*)*\]"
_SLICE = r"(?:-?\d+)?\s*:\s*(?:-?\d+)?(?:\s*:\s*(?:-?\d+)?)?"
_ITEM = rf"\s*(?:{_LIST}|{_SLICE}|-?\d+)\s*"
_INDEX = re.compile(rf"\[{_ITEM}(?:,{_ITEM})*\]\Z")


class Reading(NamedTuple):
    """A pattern, split into base, part and use."""

    base: str
    """The pattern for paths of leaves."""
    part: str = ""
    """The index as text, with its brackets; empty for the whole weight."""
    use: str = ""
    """`"lookup"`, `"product"`, or empty for both."""


def split(pattern: str) -> Reading:
    """Splits a path or a pattern into base, part and use.

    Brackets that are not an index belong to the base. In a regular expression all brackets
    belong to the base.
    """
    base, at, use = pattern.rpartition("@")
    if not at or use not in USES:
        base, use = pattern, ""
    index = None if base.startswith("re:") else _INDEX.search(base)
    if index is None or index.start() == 0:
        return Reading(base, "", use)
    return Reading(base[: index.start()], index.group(), use)


def read(name: str, pattern: str, paths: Iterable[str]) -> Reading:
    """Splits a pattern of the argument `name`, unless the whole pattern matches a path.

    Brackets with numbers may be an index or, in a glob, a set of characters: `"w[12]"`.

    Raises:
        ValueError: if both readings match a path.
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
    """The indices of each axis of a weight of some shape in a part.

    Raises:
        ValueError: if `part` is not an index, has more axes than the weight, has an index
            out of bounds, is empty, or has indices that are not in ascending order.
    """
    if part and not _INDEX.match(part):
        raise ValueError(
            f"the part must be an index such as '[4:]', '[0]' or '[:, [0, 3]]', got "
            f"{part!r}."
        )
    items = [item.strip() for item in re.findall(_ITEM, part[1:-1])]
    if len(items) > len(shape):
        axes = f"{len(items)} axes, and the weight is {shape}"
        raise ValueError(f"the part {part} has {axes}.")
    items += [":"] * (len(shape) - len(items))
    if sum(item.startswith("[") for item in items) > 1:  # NumPy would pair their indices
        raise ValueError(
            f"the part {part} has more than one list: use slices, or several targets."
        )
    return tuple(_entry(item, size, part) for item, size in zip(items, shape, strict=True))


def _entry(item: str, size: int, part: str) -> Entry:
    if item.startswith("["):
        indices = [_index(int(own), size, part) for own in item[1:-1].split(",")]
        if indices != sorted(set(indices)):
            raise ValueError(
                f"the part {part} must list each index once, in ascending order."
            )
        return grouped(indices)
    if ":" not in item:
        return _index(int(item), size, part)
    bounds = [int(text) if text.strip() else None for text in item.split(":")]
    if len(bounds) == 3 and bounds[2] is not None and bounds[2] <= 0:
        raise ValueError(f"the part {part} must have steps of at least 1.")
    run = range(size)[slice(*bounds)]
    if not run:
        raise ValueError(f"the part {part} has nothing of an axis of size {size}.")
    return run if len(run) > 1 else range(run[0], run[0] + 1)


def _index(i: int, size: int, part: str) -> int:
    if not -size <= i < size:
        raise ValueError(f"the part {part} has the index {i} of an axis of size {size}.")
    return i % size


def as_text(own: Sequence[Entry], shape: Sequence[int]) -> str:
    """The index with these entries as text; empty for the whole weight."""
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
    """The canonical text of a part: equal parts have equal texts."""
    return as_text(entries(part, tuple(shape)), shape)


def grouped(indices: Sequence[int]) -> Entry:
    """Ascending indices as a range if the steps are equal, otherwise as a tuple."""
    steps = {b - a for a, b in itertools.pairwise(indices)} or {1}
    if len(steps) > 1:
        return tuple(indices)
    return range(indices[0], indices[-1] + 1, steps.pop())


def count(entry: Entry) -> int:
    """The number of indices of an entry."""
    return 1 if isinstance(entry, int) else len(entry)


def indices_of(entry: Entry) -> tuple[int, ...]:
    """The indices of an entry."""
    return (entry,) if isinstance(entry, int) else tuple(entry)


def cut_axes(part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of which a part has only some indices."""
    own = entries(part, shape)
    return tuple(axis for axis, entry in enumerate(own) if count(entry) < shape[axis])


def cut(part: str, cuts: Iterable[str], shape: tuple[int, ...]) -> list[str]:
    """Cuts a part into pieces, each entirely inside or outside of each part in `cuts`."""
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
        choices.append([grouped(own) for own in groups.values()])
    return [as_text(own, shape) for own in itertools.product(*choices)]


def joined(alike: Sequence[str], shape: tuple[int, ...]) -> list[str]:
    """Joins disjoint parts into one if they differ along one axis only."""
    whole = [entries(part, shape) for part in alike]
    differ = [axis for axis, own in enumerate(zip(*whole, strict=True)) if len({*own}) > 1]
    if len(differ) != 1:
        return list(alike)
    (axis,) = differ
    indices = sorted(i for own in whole for i in indices_of(own[axis]))
    entry = grouped(indices)
    return [as_text((*whole[0][:axis], entry, *whole[0][axis + 1 :]), shape)]


def mask(part: str, shape: tuple[int, ...]) -> np.ndarray:
    """A mask of the entries of a weight in a part; axes that are not cut have size 1."""
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
    """The first pattern that matches a target of a plan, or None.

    A pattern without a suffix matches all targets of a weight. A pattern with a part
    matches all targets inside of this part. `key` is the path of the target with its
    suffix. If the shape of the weight is None, parts are compared as text.
    """
    path = key.removesuffix(suffix)
    for pattern in patterns:
        if tree_paths.matches(pattern, key) or tree_paths.matches(pattern, path):
            return pattern
        base, part, use = split(pattern)
        if tree_paths.matches(base, path):
            own = split(key)
            if use in ("", own.use) and _is_inside(own.part, part, shape):
                return pattern
    return None


def _is_inside(part: str, of: str, shape: Any) -> bool:
    """Whether `part` is inside of the part `of`; without a shape, texts are compared."""
    if shape is None:
        return not of or part == of
    try:
        pairs = zip(entries(part, shape), entries(of, shape), strict=True)
    except ValueError:  # `of` is not a part of this weight
        return False
    return all({*indices_of(own)} <= {*indices_of(outer)} for own, outer in pairs)


def check_matched(
    name: str, patterns: Iterable[str], targets: Mapping[str, Any], what: str
) -> None:
    """Raises unless each pattern matches a target of a plan."""
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
    """Takes a part of an array."""
    if not part:
        return array
    own = entries(part, tuple(array.shape))
    for axis, entry in enumerate(own):
        if isinstance(entry, tuple):
            array = jnp.take(array, np.array(entry), axis=axis, mode="clip")
    return array[tuple(_basic(entry) for entry in own)]


def _basic(entry: Entry) -> Any:
    """The entry as a basic index, after the indices of a list have been taken."""
    if isinstance(entry, tuple):
        return slice(None)
    if isinstance(entry, int):
        return entry
    return slice(entry[0], entry[-1] + 1, entry.step)


def put(array: jax.Array, part: str, values: jax.Array) -> jax.Array:
    """The array with a part replaced by `values`."""
    if not part:
        return values
    own = entries(part, tuple(array.shape))
    sizes = list(map(count, own))
    # An integer would move the axis of a list, so it is written as a slice of one entry.
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
    """Pads an array of the shape of a part to the shape of the whole weight.

    Args:
        array: its axes have the sizes of the part.
        axes: for each axis of the array, its axis of the weight; negative for other axes.
        own: the entries of the part.
        shape: of the weight.
        fill: the value outside of the part.
    """
    for place, axis in enumerate(axes):
        if axis >= 0 and array.shape[place] != shape[axis]:
            array = _spread(array, place, own[axis], shape[axis], fill)
    return array


def _spread(array: jax.Array, axis: int, entry: Entry, size: int, fill: float) -> jax.Array:
    def filled(length: int) -> jax.Array:
        shape = (*array.shape[:axis], length, *array.shape[axis + 1 :])
        return jnp.full(shape, fill, array.dtype)

    if isinstance(entry, tuple):
        index = (*[slice(None)] * axis, np.array(entry))
        return filled(size).at[index].set(array)
    run = range(entry, entry + 1) if isinstance(entry, int) else entry
    if run.step == 1:  # XLA cannot split each gradient of a `pad` among devices
        ends = filled(run[0]), filled(size - run[-1] - 1)
        return lax.concatenate([ends[0], array, ends[1]], axis)
    widths = [(0, 0, 0)] * array.ndim
    widths[axis] = (run[0], size - run[-1] - 1, run.step - 1)
    return lax.pad(array, jnp.asarray(fill, array.dtype), widths)
