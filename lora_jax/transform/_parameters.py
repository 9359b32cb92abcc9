"""Reads the parameters of equations, which differ between versions of JAX."""

from collections.abc import Callable, Sequence
from typing import Any

_NOT_LINEAR = frozenset(
    {
        *("abs", "and", "argmax", "argmin", "ceil", "clamp", "cos"),
        *("cumlogsumexp", "cummax", "cummin", "cumprod", "erf", "erf_inv", "exp"),
        *("exp2", "expm1", "floor", "integer_pow", "is_finite", "log", "log1p"),
        *("logistic", "max", "min", "pow", "reduce_max", "reduce_min", "reduce_prod"),
        *("rem", "round", "rsqrt", "sign", "sin", "sort", "sqrt"),
        *("square", "tan", "tanh"),
    }
)


class NotFactorableError(Exception):
    """What a rule raises if the value cannot stay factored: the weight is merged there."""


def parameter(equation: Any, *names: str) -> Any:
    """The first of these parameters that the equation has.

    Raises:
        NotFactorableError: if it has none: a version of JAX that the rule does not know.
    """
    for name in names:
        if name in equation.params:
            return equation.params[name]
    raise NotFactorableError(
        f"in this version of JAX it has no parameter {' or '.join(map(repr, names))}"
    )


def check_weight_is(
    position: int, values: Sequence[Any], kind: type[Any], otherwise: str
) -> None:
    """Raises unless the operand at that position, and no other, is of a kind: a weight."""
    if [i for i, value in enumerate(values) if isinstance(value, kind)] != [position]:
        raise NotFactorableError(otherwise)


def refuse(reason: str) -> Callable[..., Any]:
    """The rule of a primitive that has no low-rank form, for that reason."""

    def rule(context: Any, equation: Any, *values: Any) -> Any:
        raise NotFactorableError(reason)

    return rule


def no_rule(equation: Any) -> str:
    """Why a weight is merged for a primitive without a rule."""
    reason = "there is no low-rank rule for it"
    if equation.primitive.name in _NOT_LINEAR:
        return f"{reason}, since it is not linear"
    return reason
