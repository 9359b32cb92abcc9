"""Where the rows of a batch are in a value.

Atoms say which entries along an axis belong to which row.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias


class Atom(NamedTuple):
    """One factor of the size of an axis.

    Attributes:
        size: the number of entries.
        stride: index `i` along the atom adds `stride * i` to the number of the row. None
            for an atom that does not distinguish rows.
    """

    size: int
    stride: int | None


# For each axis of a value its atoms, major to minor. An axis of size 1 has no atoms.
Axes: TypeAlias = tuple[tuple[Atom, ...], ...]
# For the axes that hold rows their atoms.
Held: TypeAlias = dict[int, tuple[Atom, ...]]


class Rows(NamedTuple):
    """The axes of a value that hold the rows of the batch.

    Attributes:
        axes: for each axis its atoms, major to minor; their sizes multiply to the size of
            the axis. Over all atoms with a stride, every row number occurs exactly once.
            Atoms of size 1 are left out, and neighbors that are one atom are joined, so
            equal places are equal tuples.
    """

    axes: tuple[tuple[Atom, ...], ...]


class Taken(NamedTuple):
    """A value with rows in an order that only the data determine.

    Attributes:
        number: of the gather that took them. Outside of a call, a gather in its body has
            another number, which the result of the call has.
        axis: the axis along which each entry belongs to one row.
    """

    number: int
    axis: int


class Lost(NamedTuple):
    """A value that depends on rows, which cannot be followed any further.

    Attributes:
        reason: what the primitive does.
        where: the source line.
    """

    reason: str
    where: str


# None: the value is the same for all rows, or mixes all of them.
Place: TypeAlias = Rows | Taken | Lost | None


class NotFollowedError(Exception):
    """Raised by a rule if rows cannot be followed; the text is what the primitive does."""


class Takes(NamedTuple):
    """Says that a gather takes rows, in an order that the data determine."""

    axis: int


class Step(NamedTuple):
    """An equation, and what is known about it.

    Attributes:
        equation: the equation.
        counts: for its indices (a gather's or scatter's second operand), which components
            equal the index along an axis: `{component: axis}`.
    """

    equation: Any
    counts: Mapping[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first operand."""
        return self.equation.invars[0].aval.shape

    @property
    def out(self) -> tuple[int, ...]:
        """The shape of the first result."""
        return self.equation.outvars[0].aval.shape


def merged(atoms: Iterable[tuple[int, int | None]]) -> tuple[Atom, ...]:
    """The same atoms in their only normal form: neighbors that are one atom are joined."""
    out: list[Atom] = []
    for size, stride in atoms:
        last = out[-1] if out else None
        if size == 1:
            continue
        if last and (
            last.stride == stride
            if None in (last.stride, stride)
            else last.stride == size * (stride or 0)
        ):
            out[-1] = Atom(last.size * size, stride)
        else:
            out.append(Atom(size, stride))
    return tuple(out)


def has_rows(atoms: Iterable[Atom]) -> bool:
    """Whether some atom distinguishes rows."""
    return any(stride is not None for _, stride in atoms)


def held(axes: Axes | None) -> Held:
    """The axes that hold rows."""
    return {axis: atoms for axis, atoms in enumerate(axes or ()) if has_rows(atoms)}


def placed(shape: Sequence[int], rows: Held, n_rows: int) -> Axes | None:
    """The axes of a value of which `rows` hold rows; None if no axis does.

    Raises:
        NotFollowedError: if an axis has another size, or not every row occurs.
    """
    for axis, atoms in rows.items():
        if axis >= len(shape) or math.prod(size for size, _ in atoms) != shape[axis]:
            raise NotFollowedError("takes a part of an axis that holds rows")
    if not rows:
        return None
    strided = [size for atoms in rows.values() for size, stride in atoms if stride]
    if math.prod(strided) != n_rows:
        raise NotFollowedError("mixes a part of the rows")
    return whole(shape, rows)


def join(*found: Held) -> Held:
    """The axes with rows of a value to which each entry of several values contributes."""
    first, *others = [rows for rows in found if rows] or [{}]
    if any(rows != first for rows in others):
        raise NotFollowedError("joins values that hold the rows along different axes")
    return first


def whole(shape: Sequence[int], rows: Held) -> tuple[tuple[Atom, ...], ...]:
    """The axes of a value, of which `rows` hold rows."""
    return tuple(rows.get(i, merged([(size, None)])) for i, size in enumerate(shape))
