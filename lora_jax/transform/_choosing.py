"""Gives weights that a program chooses between the same terms and columns.

A missing term has factors of zeros, and a missing column has ones.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.transform._factored import Factored, Term, base_of
from lora_jax.transform._parameters import NotFactorableError


class Form(NamedTuple):
    """The terms and columns that several weights are given. Only shapes and dtypes matter.

    Attributes:
        terms: each term that any of the weights has.
        columns: those of the weight with the most columns.
        column_uses: the kind of use of each column, as `Factored.column_uses`.
    """

    terms: tuple[Term, ...]
    columns: tuple[Any, ...]
    column_uses: tuple[str, ...]


def common_form(values: Sequence[Any]) -> Form:
    """The common form of weights, some of which may be dense.

    Raises:
        NotFactorableError: if DoRA scales different axes of the weights, or scales them for
            different kinds of use.
    """
    terms: list[Term] = []
    columns: list[Any] = []
    uses: tuple[str, ...] = ()
    for value in values:
        if not isinstance(value, Factored):
            continue
        _, missing = _matched(terms, value.terms)
        terms += missing
        for known, column in zip(columns, value.columns, strict=False):
            if known.shape != column.shape or known.dtype != column.dtype:
                raise NotFactorableError("DoRA scales different axes of the weights")
        own = value.column_uses or ("",) * len(value.columns)
        if any(a != b for a, b in zip(uses, own, strict=False)):
            raise NotFactorableError("DoRA scales the weights for different uses")
        uses += own[len(uses) :]
        columns += value.columns[len(columns) :]
    return Form(tuple(terms), tuple(columns), uses if any(uses) else ())


def in_form(value: Any, form: Form) -> Factored:
    """The weight with the terms and columns of a form."""
    own = value if isinstance(value, Factored) else Factored(value, ())
    found, _ = _matched(form.terms, own.terms)
    terms = [
        _zeros(template) if term is None else term
        for template, term in zip(form.terms, found, strict=True)
    ]
    more = form.columns[len(own.columns) :]
    ones = [jnp.ones(column.shape, column.dtype) for column in more]
    columns = (*own.columns, *ones)
    return Factored(base_of(value), tuple(terms), columns, column_uses=form.column_uses)


def _matched(
    templates: Sequence[Term], terms: Sequence[Term]
) -> tuple[list[Term | None], list[Term]]:
    """For each template a term of the same kind, or None; and the other terms."""
    left = list(terms)
    found: list[Term | None] = []
    for template in templates:
        match = next((t for t in left if _kind(t) == _kind(template)), None)
        found.append(match)
        if match is not None:
            left = [term for term in left if term is not match]
    return found, left


def _kind(term: Term) -> Any:
    """A key that is equal for two terms that can replace each other."""
    sides = term.a, term.b
    kinds = ((p.stored.shape, p.stored.dtype, p.axes, p.scale is None) for p in sides)
    return term.label, *kinds


def _zeros(template: Term) -> Term:
    return jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), template)
