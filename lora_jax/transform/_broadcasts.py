"""Operands as they were before the program broadcast them."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._core import compat
from lora_jax.plan.parts import LOOKUP
from lora_jax.transform._context import Context, Frame
from lora_jax.transform._dense import merge
from lora_jax.transform._factored import Factored
from lora_jax.transform._moves import MOVES
from lora_jax.transform._parameters import NotFactorableError


def before_broadcast(
    context: Context, equation: Any, position: int, value: Any
) -> jax.Array:
    """An operand with size 1 along the axes that it was broadcast to."""
    steps = broadcasts_before(context.frame, equation, position)
    if not steps:
        return jnp.asarray(value)
    source = context.frame.read(steps[-1].invars[0])
    is_vector = isinstance(source, Factored)
    value = merge(source.for_use(LOOKUP)) if is_vector else jnp.asarray(source)
    value = compat.as_current(value)
    for step in reversed(steps):
        (move,) = MOVES["broadcast_in_dim"].moves(step)
        value = move.of(value)
    return value


def broadcasts_before(frame: Frame, equation: Any, position: int) -> list[Any]:
    """The equations that broadcast an operand to its shape, the last one first.

    Empty if the operand is a scalar or has an axis of size 1.

    Raises:
        NotFactorableError: if no equation broadcast it: it varies along all its axes.
    """
    atom, steps = equation.invars[position], []
    if not atom.aval.shape or 1 in atom.aval.shape:
        return []
    while not isinstance(atom, compat.Literal) and atom in frame.broadcasts:
        steps.append(frame.broadcasts[atom])
        atom = steps[-1].invars[0]
    if not steps:
        raise NotFactorableError("the other operand varies along all axes of the weight")
    return steps
