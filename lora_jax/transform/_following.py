"""Follows the rows of a batch through a program: which axis of each value holds them.

No equation runs. What is followed is association, not independence: an entry belongs to a
row if it stands where the entries of that row are, even if other rows contribute to it.
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import core

from lora_jax._core import compat
from lora_jax._core.source_lines import called_at
from lora_jax.transform import _row_axes, _row_bodies
from lora_jax.transform._moves import MOVES
from lora_jax.transform._parameters import NotFactorableError, parameter
from lora_jax.transform._row_bodies import Cut
from lora_jax.transform._row_places import (
    Atom,
    Lost,
    NotFollowedError,
    Place,
    Rows,
    Step,
    Taken,
    Takes,
    held,
    placed,
    whole,
)


class _Analysis:
    """What the analyses of a program and of all bodies in it share."""

    def __init__(self):
        self.known: dict[Any, Followed] = {}
        self.numbers = itertools.count()
        self.callers: list[Any] = []

    def follow(
        self,
        jaxpr: Any,
        places: Sequence[Place],
        n_rows: int,
        split: tuple[str, ...] = (),
        counts: tuple[int | None, ...] = (),
    ) -> "Followed":
        body, constants = compat.open_jaxpr(jaxpr)
        if n_rows == 1:  # all values belong to the same row
            places = [place if isinstance(place, Lost) else None for place in places]
        key = id(body), tuple(places), n_rows, split, counts
        if key not in self.known:
            self.known[key] = Followed(n_rows, body, split, self)
            self.known[key].run(places, _Counts(body, counts, constants))
        return self.known[key]


@dataclasses.dataclass(eq=False)
class Followed:
    """The places of all values of a jaxpr, given those of its inputs.

    Attributes:
        n_rows: the number of rows.
        jaxpr: the open jaxpr.
        split: the mesh axes that split the rows, inside a `shard_map`.
        places: by variable.
        outputs: of the results.
        scanned: by `id` of a `scan` over rows, how it divides their numbers.
        specs: by `id` of a `shard_map`, the mesh axes that split the rows, or `()`.
    """

    n_rows: int
    jaxpr: Any
    split: tuple[str, ...]
    _analysis: _Analysis = dataclasses.field(repr=False)
    places: dict[Any, Place] = dataclasses.field(default_factory=dict)
    outputs: list[Place] = dataclasses.field(default_factory=list)
    scanned: dict[int, Cut] = dataclasses.field(default_factory=dict)
    specs: dict[int, tuple[str, ...]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(tuple)
    )

    def place(self, atom: Any) -> Place:
        """The place of a variable or literal."""
        return None if isinstance(atom, compat.Literal) else self.places.get(atom)

    def inside(self, equation: Any, body: Any) -> "Followed":
        """The analysis of a body of an equation, a jaxpr among its parameters."""
        body, _ = compat.open_jaxpr(body)
        known = self._bodies.get((id(equation), id(body)))
        return known or self.enter(equation, body, [None] * len(body.invars))

    def run(self, places: Sequence[Place], counts: "_Counts") -> None:
        """Follows the rows through all equations."""
        self._bodies: dict[tuple[int, int], Followed] = {}
        self._counts = counts
        self.places.update(zip(self.jaxpr.invars, places, strict=True))
        for equation in self.jaxpr.eqns:
            self._counts.see(equation)
            out = self._apply(equation, list(map(self.place, equation.invars)))
            self.places.update(zip(equation.outvars, out, strict=True))
        self.outputs = list(map(self.place, self.jaxpr.outvars))

    def enter(
        self,
        equation: Any,
        body: Any,
        places: Sequence[Place],
        n_rows: int | None = None,
        split: tuple[str, ...] | None = None,
        fixed: Sequence[Any] = (),
    ) -> "Followed":
        """Follows the rows through a body of an equation.

        `fixed` are the operands that are the first arguments of the body, always.
        """
        body, _ = compat.open_jaxpr(body)
        split = self.split if split is None else split
        counts = tuple(map(self._counts.of, fixed))
        counts = () if set(counts) == {None} else counts
        self._analysis.callers.append(equation)
        try:
            inside = self._analysis.follow(
                body, places, n_rows or self.n_rows, split, counts
            )
        finally:
            self._analysis.callers.pop()
        self._bodies[id(equation), id(body)] = inside
        return inside

    def new_number(self) -> int:
        """A number for rows that are taken."""
        return next(self._analysis.numbers)

    def lost(self, equation: Any, reason: str) -> Lost:
        """The place of a result whose rows are not followed."""
        name = equation.primitive.name
        callers = self._analysis.callers
        return Lost(f"`{name}` {reason}", called_at(equation, callers))

    def _apply(self, equation: Any, places: list[Place]) -> Sequence[Place]:
        name, results = equation.primitive.name, equation.outvars
        across = self.n_rows == 1 and self.split and name in _row_bodies.EXCHANGES
        if not results or not (across or any(place is not None for place in places)):
            return [None] * len(results)
        try:
            if name in _row_bodies.RULES:
                return _row_bodies.RULES[name](self, equation, places)
            return self.moved(equation, places)
        except (NotFollowedError, NotFactorableError) as error:
            return [self.lost(equation, str(error))] * len(results)

    def moved(self, equation: Any, places: Sequence[Place]) -> list[Place]:
        """The places of the results of a primitive of the table of axes.

        Rows win over rows that are taken, and those over rows that are lost: an entry of
        the result belongs to the row that can be told.
        """
        name = equation.primitive.name
        if name not in _row_axes.RULES:
            reason = f"there is no rule that follows rows through `{name}`"
            where = called_at(equation, self._analysis.callers)
            return [Lost(reason, where)] * len(equation.outvars)
        out = list(self._rows(equation, places))
        for other in (self._taken, self._lost):
            if None in out:
                found = other(equation, places)
                out = [old or new for old, new in zip(out, found, strict=True)]
        return out

    def _rows(self, equation: Any, places: Sequence[Place]) -> Sequence[Place]:
        operands = [place.axes if isinstance(place, Rows) else None for place in places]
        return self._by_rule(equation, operands, self.n_rows)

    def _taken(self, equation: Any, places: Sequence[Place]) -> Sequence[Place]:
        """Entries that are taken are followed as rows that are numbered by their order."""
        numbers = {place.number for place in places if isinstance(place, Taken)}
        if len(numbers) > 1:
            raise NotFollowedError("joins values with rows in different orders")
        operands, n = [], 0
        for atom, place in zip(equation.invars, places, strict=True):
            operands.append(None)
            if isinstance(place, Taken):
                n = atom.aval.shape[place.axis]
                operands[-1] = whole(atom.aval.shape, {place.axis: (Atom(n, 1),)})
        out = []
        for place in self._by_rule(equation, operands, n):
            if isinstance(place, Rows):
                (axis, atoms), *more = held(place.axes).items()
                if more or len(atoms) > 1:
                    reason = "splits or repeats rows in an order that the data determine"
                    raise NotFollowedError(reason)
                place = Taken(min(numbers), axis)
            out.append(place)
        return out

    def _lost(self, equation: Any, places: Sequence[Place]) -> Sequence[Place]:
        first = next((place for place in places if isinstance(place, Lost)), None)
        return [first] * len(equation.outvars)

    def _by_rule(
        self, equation: Any, operands: list[Any], n_rows: int
    ) -> Sequence[Rows | Taken | None]:
        results = equation.outvars
        if all(axes is None for axes in operands):
            return [None] * len(results)
        step = Step(equation, self._counts.components(equation))
        found = _row_axes.RULES[equation.primitive.name](step, *operands)
        if isinstance(found, Takes):
            return [Taken(self.new_number(), found.axis)] * len(results)
        found = found if isinstance(found, list) else [found] * len(results)
        placed_axes = (
            placed(atom.aval.shape, rows, n_rows)
            for atom, rows in zip(results, found, strict=True)
        )
        return [None if axes is None else Rows(axes) for axes in placed_axes]


def follow(jaxpr: Any, places: Sequence[Place], n_rows: int) -> Followed:
    """The places of all values of a jaxpr, open or closed, given those of its inputs.

    Bodies of calls and loops are analyzed once for equal places of their inputs.
    """
    return _Analysis().follow(jaxpr, places, n_rows)


class _Counts:
    """The values of a jaxpr whose entries equal their index along an axis."""

    def __init__(self, jaxpr: Any, counts: Sequence[int | None], constants: Sequence[Any]):
        known = zip(jaxpr.invars, counts, strict=False)
        self._axes = {variable: axis for variable, axis in known if axis is not None}
        self._components: dict[Any, dict[int, int]] = {}
        # Whether an index is negative, by which its sum with the size is chosen.
        self._negative: set[Any] = set()
        for variable, value in zip(jaxpr.constvars, constants, strict=False):
            if _is_vector(value) and value.dtype == bool and not np.asarray(value).any():
                self._negative.add(variable)
            elif _is_vector(value) and np.array_equal(value, np.arange(len(value))):
                self._axes[variable] = 0

    def of(self, atom: Any) -> int | None:
        """The axis along which the entries of a value count from 0."""
        return None if isinstance(atom, compat.Literal) else self._axes.get(atom)

    def components(self, equation: Any) -> dict[int, int]:
        """For each component of the indices that counts, its axis."""
        if len(equation.invars) < 2 or isinstance(equation.invars[1], compat.Literal):
            return {}
        return self._components.get(equation.invars[1], {})

    def see(self, equation: Any) -> None:
        """Records the result of an equation, if it counts."""
        name, (out, *_) = equation.primitive.name, [*equation.outvars, None]
        atoms = equation.invars
        axis = self.of(atoms[0]) if atoms else None
        if name == "iota":
            axis = parameter(equation, "dimension")
        elif name == "select_n":
            known = isinstance(atoms[0], compat.Literal) or atoms[0] not in self._negative
            axis = None if known else self.of(atoms[1])
        elif name == "concatenate":
            self._concatenate(equation)
            return
        elif axis is None:
            return
        elif name == "lt" and isinstance(atoms[1], compat.Literal) and atoms[1].val == 0:
            self._negative.add(out)
            return
        elif name in ("broadcast_in_dim", "reshape", "squeeze", "transpose"):
            axis = _moved_axis(equation, axis)
        elif name not in ("convert_element_type", "copy", "device_put"):
            return
        if axis is not None and out is not None:
            self._axes[out] = axis
            if axis < len(out.aval.shape) - 1 and out.aval.shape[-1] == 1:
                self._components[out] = {0: axis}

    def _concatenate(self, equation: Any) -> None:
        shapes = [atom.aval.shape for atom in equation.invars]
        if parameter(equation, "dimension") != len(shapes[0]) - 1:
            return
        starts = itertools.accumulate((shape[-1] for shape in shapes), initial=0)
        self._components[equation.outvars[0]] = {
            start: axis
            for start, atom in zip(starts, equation.invars, strict=False)
            if atom.aval.shape[-1] == 1 and (axis := self.of(atom)) is not None
        }


def _is_vector(constant: Any) -> bool:
    """Whether a constant is a vector of integers or booleans that can be read."""
    is_here = getattr(constant, "is_fully_addressable", True)
    if isinstance(constant, core.Tracer) or not is_here or np.ndim(constant) != 1:
        return False
    return constant.dtype == bool or np.issubdtype(constant.dtype, np.integer)


def _moved_axis(equation: Any, axis: int) -> int | None:
    """Where an axis goes if it stays one axis."""
    try:
        goes = MOVES[equation.primitive.name].moves(equation)[0].axes[axis]
    except NotFactorableError:
        return None
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return goes[0] if len(goes) == 1 and after[goes[0]] == before[axis] else None
