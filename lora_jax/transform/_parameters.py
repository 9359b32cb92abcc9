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
    """Raised by a rule if a value cannot stay factored; the weight is then merged."""


def parameter(equation: Any, *names: str) -> Any:
    """The first of the named parameters that the equation has.

    Raises:
        NotFactorableError: if it has none, as in a version of JAX that renamed them.
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
    """Raises unless the operand at `position`, and no other, is of the weights' class."""
    if [i for i, value in enumerate(values) if isinstance(value, kind)] != [position]:
        raise NotFactorableError(otherwise)


def refuse(reason: str) -> Callable[..., Any]:
    """A rule that always raises `NotFactorableError` with `reason`."""

    def rule(context: Any, equation: Any, *values: Any) -> Any:
        raise NotFactorableError(reason)

    return rule


def no_rule(equation: Any) -> str:
    """The reason for the merge at a primitive without a rule."""
    reason = "there is no low-rank rule for it"
    if equation.primitive.name in _NOT_LINEAR:
        return f"{reason}, since it is not linear"
    return reason
