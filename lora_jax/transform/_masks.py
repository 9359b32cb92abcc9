"""Which entries of a weight the adapters of its parts change.

A part of the weight, such as one layer, loses the terms that act only elsewhere.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from lora_jax.transform._factored import Factored


class Masks(NamedTuple):
    """Masks of the entries that the terms and the columns of a value change.

    The masks are `(*axes)`, with size 1 for axes along which they do not vary. A term has
    one for each of its weights.
    """

    terms: tuple[dict[Any, np.ndarray], ...]
    columns: tuple[np.ndarray, ...]


class KnownMasks:
    """The masks of the values of a program, as far as they are known."""

    def __init__(self):
        self._of: dict[int, tuple[Factored, Masks]] = {}

    def keep(self, value: Factored, masks: Masks) -> None:
        """Records the masks of a value."""
        self._of[id(value)] = value, masks

    def copy(self, old: Factored, new: Factored) -> None:
        """Gives a value the masks of another one, if they are known."""
        if id(old) in self._of:
            self.keep(new, self._of[id(old)][1])

    def without_others(
        self, before: Factored, after: Factored, move: Callable[[Any], Any]
    ) -> Factored:
        """A part of a value, without the terms and columns that act only elsewhere.

        `after` is the result of the move for the whole value, `before`. `move` is the move
        of an array with the axes of `before`.
        """
        if id(before) not in self._of:
            return after
        with jax.ensure_compile_time_eval():
            known = jax.tree.map(move, self._of[id(before)][1])
        if any(isinstance(own, Tracer) for own in jax.tree.leaves(known)):
            return after  # the index is traced, so the part is not known
        known = jax.tree.map(np.asarray, known)
        masks = [
            {name: mask for name, mask in own.items() if mask.any()} for own in known.terms
        ]
        terms = tuple(
            term if len(own) == len(term.label.names) else term.named(tuple(own))
            for term, own in zip(after.terms, masks, strict=True)
        )
        in_columns = [own.any() for own in known.columns]
        left = after.replace(
            terms=tuple(itertools.compress(terms, masks)),
            columns=tuple(itertools.compress(after.columns, in_columns)),
            column_uses=tuple(itertools.compress(after.column_uses, in_columns)),
        )
        columns = tuple(itertools.compress(known.columns, in_columns))
        self.keep(left, Masks(tuple(filter(None, masks)), columns))
        return left
