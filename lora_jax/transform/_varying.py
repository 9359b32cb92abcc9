"""Over which mesh axes the values of a `shard_map` vary, where JAX does not say it.

With `check_vma=False`, and in `jax.pmap`, the types of values do not have these axes. So
they are followed through the program: a result varies where one of its operands does. A
sum or a gather over an axis gives all of its devices the same value.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

from lora_jax._core import compat
from lora_jax.transform._rules_loops import scan_counts

Axes: TypeAlias = frozenset[str]

_NONE: Axes = frozenset()
_SAME = frozenset({"all_gather", "pmax", "pmin", "psum"})


def follow(jaxpr: Any, arguments: Sequence[Axes]) -> dict[int, list[Axes]]:
    """The mesh axes of each operand of each equation, by the `id` of the equation.

    They are those of all calls of the equation.
    """
    found: dict[int, list[Axes]] = {}
    _follow(found, jaxpr, arguments)
    return found


def _follow(found: dict[int, list[Axes]], jaxpr: Any, own: Sequence[Axes]) -> list[Axes]:
    """The mesh axes of the results of a jaxpr."""
    jaxpr, _ = compat.open_jaxpr(jaxpr)
    known = dict(zip(jaxpr.invars, own, strict=True))

    def read(atom: Any) -> Axes:
        return _NONE if isinstance(atom, compat.Literal) else known.get(atom, _NONE)

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        before = found.get(id(equation), operands)
        found[id(equation)] = [a | b for a, b in zip(before, operands, strict=True)]
        known.update(
            zip(equation.outvars, _results(found, equation, operands), strict=True)
        )
    return [read(atom) for atom in jaxpr.outvars]


def _results(
    found: dict[int, list[Axes]], equation: Any, operands: list[Axes]
) -> list[Axes]:
    name, of = equation.primitive.name, equation.params
    if name == "scan":
        body, _ = compat.open_jaxpr(of["jaxpr"])
        first, n = scan_counts(equation, body)
        fixed, rest = operands[:first], operands[first + n :]

        def step(carry: list[Axes]) -> list[Axes]:
            return _follow(found, body, [*fixed, *carry, *rest])

        return _loop(step, operands[first : first + n])
    if name == "while":
        first = of["cond_nconsts"]
        n = first + of["body_nconsts"]

        def turn(carry: list[Axes]) -> list[Axes]:
            (stop,) = _follow(found, of["cond_jaxpr"], [*operands[:first], *carry])
            out = _follow(found, of["body_jaxpr"], [*operands[first:n], *carry])
            return [stop | own for own in out]

        return _loop(turn, operands[n:])
    if name == "cond":
        chosen = [_follow(found, branch, operands[1:]) for branch in of["branches"]]
        return [operands[0].union(*own) for own in zip(*chosen, strict=True)]
    if (inner := compat.body_of(equation)) is not None:
        return _follow(found, inner[0], operands)
    axes = _NONE.union(*operands)
    names = jax.tree.leaves((of.get("axes"), of.get("axis_name")))
    names = {own for own in names if isinstance(own, str)}
    same = name in _SAME and of.get("axis_index_groups") is None
    return [axes - names if same else axes | names] * len(equation.outvars)


def _loop(step: Callable[[list[Axes]], list[Axes]], carry: list[Axes]) -> list[Axes]:
    """The results of a loop, of which the first ones are the carry."""
    while True:
        out = step(carry)
        new = [a | b for a, b in zip(carry, out[: len(carry)], strict=True)]
        if new == carry:
            return [*carry, *out[len(carry) :]]
        carry = new
