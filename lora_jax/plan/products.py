"""Equations that state which product a function computes, such as `"...k,kn->...n"`.

They are for functions that `adapt` does not look into: functions with a custom derivative,
and kernels. The docstring of `LoraConfig` has the syntax.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

Shape: TypeAlias = tuple[int, ...]
Names: TypeAlias = tuple[str, ...]

_OTHER = "_"
_MORE = "..."
_FORM = (
    "expected one part for each operand, separated by commas, then '->' and one part for "
    "each result. A part has one letter for each axis, or is '_' for an operand or result "
    "that takes no part in the product"
)


class StatementError(ValueError):
    """The shapes of a call do not fit the equation that is stated for the function."""


class Fitted(NamedTuple):
    """An equation, fitted to the shapes of a call."""

    operands: tuple[Names | None, ...]
    """The names of the axes of each operand; None for one that takes no part."""
    output: Names
    """The names of the axes of the product."""
    position: int
    """The position of the product among the results."""


@dataclasses.dataclass(frozen=True)
class Equation:
    """The product that a function computes: its text, and a part for each array."""

    text: str
    operands: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def parts(self) -> list[str]:
        """The parts of the operands that take part."""
        return [part for part in self.operands if part != _OTHER]

    @property
    def is_rounding(self) -> bool:
        """Whether the result is the one operand, rounded or transposed."""
        return len(self.parts) == 1

    @property
    def is_grouped(self) -> bool:
        """Whether it is a product of groups of rows, as `jax.lax.ragged_dot` is."""
        return len(self.parts) == 3

    def roles(self, fitted: Fitted, operand: int) -> list[str]:
        """The role of each axis of an operand: `"contracted"`, `"kept"` or `"batch"`."""
        rest = (*fitted.operands[:operand], *fitted.operands[operand + 1 :])
        others = {name for names in rest for name in names or ()}
        groups = min(self.parts, key=len) if self.is_grouped else ""

        def role(name: str) -> str:
            if name not in others:
                return "kept"
            return "batch" if name in (*fitted.output, groups) else "contracted"

        return list(map(role, fitted.operands[operand] or ()))

    def fit(self, name: str, operands: Sequence[Shape], outputs: Sequence[Shape]) -> Fitted:
        """Fits the equation to the shapes of a call of the function `name`.

        Values that the function closes over may be in front of the operands.

        Raises:
            StatementError: if the shapes do not fit.
        """
        closed_over = len(operands) - len(self.operands)
        parts = (*[_OTHER] * closed_over, *self.operands, *self.outputs)
        shapes = (*operands, *outputs)
        if closed_over < 0 or len(outputs) != len(self.outputs):
            raise self._error(name, operands, outputs, f"E{_FORM[1:]}.")
        sizes: dict[str, int] = {}
        fitted: list[Names | None] = []
        for part, shape in zip(parts, shapes, strict=True):
            names = None if part == _OTHER else _names(part, len(shape))
            fitted.append(names)
            if names is None and part != _OTHER:
                more = "Axes in front, such as those of jax.vmap, are '...'."
                why = f"{part!r} stands for {len(shape)} axes. {more}"
                raise self._error(name, operands, outputs, why)
            for axis, size in zip(names or (), shape, strict=names is not None):
                if sizes.setdefault(axis, size) != size:
                    why = f"The axis {axis!r} has the sizes {sizes[axis]} and {size}."
                    raise self._error(name, operands, outputs, why)
        results = enumerate(fitted[len(operands) :])
        position, output = next((i, names) for i, names in results if names is not None)
        named = {name for names in fitted[: len(operands)] for name in names or ()}
        odd = {name for name in named ^ {*output} if name.startswith(_MORE)}
        if odd:
            why = "The axes '...' of the operands are not those of the result."
            raise self._error(name, operands, outputs, why)
        return Fitted(tuple(fitted[: len(operands)]), output, position)

    def _error(
        self, name: str, operands: Sequence[Shape], outputs: Sequence[Shape], why: str
    ) -> StatementError:
        given, made = (", ".join(map(str, shapes)) for shapes in (operands, outputs))
        return StatementError(
            f"products states that {name!r} is {self.text!r}, which does not fit its call "
            f"with operands of shape {given} and results of shape {made}. {why}"
        )


def _names(part: str, ndim: int) -> Names | None:
    """The names of the axes of an array; None if it has another number of axes."""
    letters = part.removeprefix(_MORE)
    more = ndim - len(letters)
    if more < 0 or (more and letters == part):
        return None
    return (*(f"{_MORE}{i}" for i in range(more, 0, -1)), *letters)


def parse_equations(text: Any) -> tuple[Equation, ...]:
    """Reads equations that are separated by semicolons."""
    if not isinstance(text, str):
        raise TypeError(
            "what a function multiplies must be a text such as '...k,kn->...n', got "
            f"{text!r} ({type(text).__name__})."
        )
    return tuple(_parse(part.strip()) for part in text.split(";"))


def fit(
    text: str, name: str, operands: Sequence[Shape], outputs: Sequence[Shape]
) -> tuple[Equation, Fitted]:
    """The first equation in a text that fits a call, and its `fit`.

    Raises:
        StatementError: if none fits.
    """
    errors = []
    for equation in parse_equations(text):
        try:
            return equation, equation.fit(name, operands, outputs)
        except StatementError as error:
            errors.append(str(error))
    raise StatementError("\n".join(errors))


def _parse(text: str) -> Equation:
    left, arrow, right = text.replace(" ", "").partition("->")
    equation = Equation(text, tuple(left.split(",")), tuple(right.split(",")))
    for why in _faults(equation) if arrow else (_FORM,):
        raise ValueError(f"{text!r} states no product: {why}.")
    return equation


def _faults(equation: Equation) -> Iterator[str]:
    """The faults of an equation. Only the first one is reported."""
    parts = equation.parts
    outputs = [part for part in equation.outputs if part != _OTHER]
    for part in (*parts, *outputs):
        letters = part.removeprefix(_MORE)
        if part != _MORE and not letters.isalpha():
            yield f"{part!r} is no part; {_FORM}"
        if len(set(letters)) < len(letters):
            yield f"{part!r} has a letter twice"
    if len(outputs) != 1 or not 1 <= len(parts) <= 3:
        yield "it must have one result and two operands, or one, or three with group sizes"
        return
    (output,) = outputs
    letters = "".join(part.removeprefix(_MORE) for part in (*parts, output))
    alone = sorted(letter for letter in {*letters} if letters.count(letter) == 1)
    if alone:
        yield f"the letter {alone[0]!r} is in one operand or result only"
    if any(_MORE in part for part in parts) != (_MORE in output):
        yield "'...' must be in an operand and in the result"
    if len(parts) == 3 and not _is_grouped(parts, output):
        yield "with three operands it must be as 'mk,gkn,g->mn', g being the group sizes"


def _is_grouped(parts: Sequence[str], output: str) -> bool:
    sizes, x, weight = sorted(parts, key=len)
    if (len(sizes), len(x), len(weight)) != (1, 2, 3):
        return False
    kept = [letter for letter in weight if letter not in (x[1], sizes)]
    return len(kept) == 1 and output == x[0] + kept[0]


def suggest(
    operands: Sequence[Shape], outputs: Sequence[Shape], weights: Sequence[int]
) -> str | None:
    """An equation that fits a call. `weights` are the operands that may be the weight."""
    all_operands = range(len(operands))
    pairs = [(w, i) for w in weights for i in all_operands if i != w]
    tried = [({w: own, i: x}, out) for x, own, out in _SUGGESTED for w, i in pairs]
    tried += [
        ({w: "gkn", i: "mk", j: "g"}, "mn")
        for w, i in pairs
        for j in all_operands
        if j not in (w, i)
    ]
    letters = [(w, "abcdefgh"[: len(operands[w])]) for w in weights]
    tried += [({w: own}, own) for w, own in letters]
    for parts, out in tried:
        left = ",".join(parts.get(i, _OTHER) for i in all_operands)
        text = f"{left}->{','.join([out, *[_OTHER] * (len(outputs) - 1)])}"
        try:
            fit(text, "", operands, outputs)
        except ValueError:
            continue
        return text
    return None


_SUGGESTED = (
    ("...k", "kn", "...n"),
    ("...k", "nk", "...n"),
    ("...d", "dhk", "...hk"),
    ("...hk", "hkd", "...d"),
)
