"""Reads the parameters of equations, which differ between versions of JAX."""

from typing import Any

from lora_jax.transform._factored import NotFactorableError


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
