"""The input, output and batch axes of weights, found from their uses."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from lora_jax.plan.target import Target, Use

Axes: TypeAlias = frozenset[int]


class UnsuitableError(ValueError):
    """A weight cannot have an adapter. The message is the reason, without the path."""


class AmbiguousError(UnsuitableError):
    """The axes of a weight cannot be inferred, so the user has to give them."""


class MergedError(UnsuitableError):
    """Every use of a weight needs it merged.

    Attributes:
        letters: of its axes, from its uses; `"..."` if the uses do not show them.
    """

    def __init__(self, message: str, letters: str):
        super().__init__(message)
        self.letters = letters


class Resolved(NamedTuple):
    """The axes of a weight, each group in ascending order."""

    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...]


class Side(NamedTuple):
    """An axis in a use of a weight, which is an input or output axis in the plan."""

    letter: str
    """The letter in the plan, `i` or `o`."""
    role: str
    """What the use does with the axis; see `lora_jax.Use`."""
    size: int


class Sighting(NamedTuple):
    """A use of an adapted weight.

    Attributes:
        name: of the weight.
        shape: of the value.
        primitive: the name of the primitive.
        where: the line of the user's code; recorded for merges and for uses that disagree
            with the plan.
        merged: why the weight was merged there; empty if it was not.
        axes: the letters of the weight's axes in this use; empty if the use does not show
            them.
        moved: whether the value is only moved: a part of it is taken, or a loop runs over
            it.
    """

    name: str | int
    shape: tuple[int, ...]
    primitive: str
    where: str
    merged: str = ""
    axes: str = ""
    moved: bool = False


class _Split(NamedTuple):
    """The input and output axes that one use shows."""

    use: Use
    ins: Axes
    outs: Axes


def resolve_axes(shape: tuple[int, ...], uses: Sequence[Use]) -> Resolved:
    """Finds the axes of a weight from its uses that stay low-rank.

    The first use that contracts some axes and keeps others, or looks up rows, decides which
    axes are inputs and which are outputs. The other uses must split the axes in the same
    way, but may exchange inputs and outputs, as a tied output head does. An axis whose role
    no use shows (of size 1, or sliced away) has the role of its neighbor on the right.

    Raises:
        AmbiguousError: if uses contradict each other.
        UnsuitableError: if no use is a low-rank one, or the weight is a vector.
    """
    batch = _batch_axes(shape, uses)
    splits = [split for use in uses if (split := _split(use, batch)) is not None]
    if not splits:
        raise UnsuitableError(
            f"none of its uses contracts some axes and keeps others: {listed(uses)}"
        )
    sides = _sides(shape, splits)
    sides |= dict.fromkeys(batch, "b")
    letters = "".join(_known(sides, axis, len(shape)) for axis in range(len(shape)))
    return from_letters(letters, shape)


def from_letters(letters: str, shape: tuple[int, ...]) -> Resolved:
    """The axes from letters such as `"bio"`; UnsuitableError if the weight is a vector."""
    ins, outs, batch = (
        tuple(axis for axis, letter in enumerate(letters) if letter == which)
        for which in "iob"
    )
    sizes = [math.prod(shape[axis] for axis in axes) for axes in (ins, outs)]
    if min(sizes) == 1:
        raise UnsuitableError(
            f"it is a vector: as a matrix it is ({sizes[0]}, {sizes[1]}), of rank 1"
        )
    return Resolved(ins, outs, batch)


def letters_of(shape: tuple[int, ...], uses: Sequence[Use]) -> str | None:
    """The letters of a weight's axes, such as `"bio"`, or None if its uses do not show."""
    try:
        axes = resolve_axes(shape, uses)
    except UnsuitableError:
        return None
    return "".join("iob"[[i in own for own in axes].index(True)] for i in range(len(shape)))


def letters_of_merged(
    shape: tuple[int, ...], uses: Sequence[Use], low_rank: Sequence[Use]
) -> str | None:
    """The letters of the axes of a weight if every product with it needs it merged.

    They are `"..."` if the uses do not show them, and None for other weights.
    """
    if not low_rank:
        return letters_of(shape, uses) or "..."
    if any(map(multiplies, low_rank)) or not any(map(multiplies, uses)):
        return None
    # Taking an entry of a stack is not a use, but is recorded as a look-up in a table.
    known, letters = (letters_of(shape, own) for own in (low_rank, uses))
    is_stack = letters is not None and "b" in letters and letters != known
    return letters if known is None or is_stack else None


def _batch_axes(shape: tuple[int, ...], uses: Sequence[Use]) -> Axes:
    batch, is_multiplied = set(), any(map(multiplies, uses))
    for axis in range(len(shape)):
        roles = {use.roles[axis] for use in uses}
        if roles & {"stacked", "batch"}:
            # A stack that is scanned in blocks is kept inside of each block.
            other = "contracted" in roles or ("kept" in roles and "stacked" not in roles)
            if other and shape[axis] > 1:
                raise _ambiguous(f"axis {axis} is a batch axis in some only", uses)
            batch.add(axis)
        elif is_multiplied and "indexed" in roles and not roles & {"contracted", "kept"}:
            batch.add(axis)
    return frozenset(batch)


def multiplies(use: Use) -> bool:
    """Whether a use contracts some axes of the weight and keeps others."""
    return {"contracted", "kept"} <= {*use.roles}


def _split(use: Use, batch: Axes) -> _Split | None:
    """The input and output axes that a use shows, or None."""

    def having(role: str) -> Axes:
        axes = (axis for axis, own in enumerate(use.roles) if own == role)
        return frozenset(axes) - batch

    contracted, kept, indexed = map(having, ("contracted", "kept", "indexed"))
    if contracted and kept:
        return _Split(use, contracted, kept)
    rest = frozenset(range(len(use.roles))) - batch - indexed
    if indexed and rest and not contracted:
        return _Split(use, indexed, rest)
    return None


def _sides(shape: tuple[int, ...], splits: Sequence[_Split]) -> dict[int, str]:
    """The letter of each axis that a split shows."""
    first = splits[0]
    sides = _letters(first.ins, first.outs)
    for split in splits[1:]:
        same = _letters(split.ins, split.outs)
        swapped = _letters(split.outs, split.ins)
        known = [axis for axis in same if axis in sides and shape[axis] > 1]
        fitting = [
            letters
            for letters in (same, swapped)
            if all(letters[axis] == sides[axis] for axis in known)
        ]
        if not fitting:
            raise _ambiguous("they split its axes in two ways", (first.use, split.use))
        sides = fitting[0] | sides
    return sides


def _letters(ins: Axes, outs: Axes) -> dict[int, str]:
    return dict.fromkeys(ins, "i") | dict.fromkeys(outs, "o")


def _known(sides: dict[int, str], axis: int, ndim: int) -> str:
    """The letter of an axis, or of the nearest axis with one, right before left."""
    order = (*range(axis, ndim), *range(axis, -1, -1))
    return next(sides[i] for i in order if i in sides)


def _ambiguous(reason: str, uses: Iterable[Use]) -> AmbiguousError:
    return AmbiguousError(f"its uses contradict each other, {reason}: {listed(uses)}")


def listed(uses: Iterable[Use]) -> str:
    """Uses as text."""
    return " and ".join(map(str, uses))


READ_AS = {"contracted": "i", "indexed": "i", "kept": "o", "batch": "b", "stacked": "b"}
"""The letter of an axis that has a role in a use."""


def as_used(target: Target, sides: Sequence[Side], ndim: int) -> str | None:
    """Infers the letters of a weight's axes from one use of it in a factored program.

    They are those of the plan if the use agrees with it. The result is None if the use does
    not show input and output axes. The batch axes of the plan may be used in any way,
    because an adapter with batch axes has a matrix for each index.

    `sides` are the axes of the value in use that are not batch axes: axes of the weight,
    unless it was reshaped. `ndim` counts the axes of the value that are longer than 1.
    """
    if all(READ_AS.get(side.role) == side.letter for side in sides):
        return target.axes if {side.letter for side in sides} == {"i", "o"} else None
    ins, outs = ({READ_AS.get(s.role) for s in sides if s.letter == own} for own in "io")
    whole = ndim <= sum(size > 1 for size in target.shape)
    if "b" in ins | outs:
        if whole:
            return _with(target, [side for side in sides if READ_AS.get(side.role) == "b"])
        return target.axes if "i" in ins and "o" in outs else None
    known_ins, known_outs = ins & {"i", "o"}, outs & {"i", "o"}
    if known_ins == {"o"} and known_outs == {"i"}:
        return turned(target.axes)
    if "o" not in known_ins | known_outs or "i" not in known_ins | known_outs:
        return None
    if whole:
        others = [s for s in sides if READ_AS.get(s.role, s.letter) != s.letter]
        return _with(target, others)
    return target.axes if "i" in known_ins and "o" in known_outs else None


def turned(letters: str) -> str:
    """Exchanges input and output letters."""
    return letters.translate({ord("i"): "o", ord("o"): "i"})


def _with(target: Target, sides: Iterable[Side]) -> str:
    """The letters of a plan, with other letters for the axes in `sides`."""
    letters, left = list(target.axes), set(range(len(target.axes)))
    for side in sides:
        places = [axis for axis in sorted(left) if target.axes[axis] == side.letter]
        same = [axis for axis in places if target.shape[axis] == side.size]
        if places:
            axis = (same or places)[0]
            letters[axis] = READ_AS[side.role]
            left.remove(axis)
    return "".join(letters)
