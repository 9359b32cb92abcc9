"""Frozen weights that are stored in few bits, and formed where they are used.

In the program a quantized weight is a `Deferred` array: its stored arrays, and the
primitives that move it about, cast it or join it with others, none of which runs. A use,
such as a product, forms it; inside `jax.checkpoint`, so that the backward pass forms it
again, and nothing dense is kept in between.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import compat, placement, quantized
from lora_jax.transform._moves import MOVES, named

# What is put off until the weight is used.
_PUT_OFF = named(lambda row: row.is_deferred)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """An output of an equation that is put off. Equal to itself only."""

    equation: Any
    output: int

    @property
    def entrywise(self) -> bool:
        """Whether an entry of the result is this step of an entry of its one operand."""
        return MOVES[self.equation.primitive.name].is_entrywise


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["operands"], meta_fields=["step"]
)
@dataclasses.dataclass(frozen=True)
class Deferred:
    """An array that has yet to be formed.

    Attributes:
        operands: of the step: arrays or deferred ones. Without a step a quantized weight.
        step: that makes the array of the operands.
    """

    operands: tuple[Any, ...]
    step: Step | None = None

    @functools.cached_property
    def _abstract(self) -> jax.ShapeDtypeStruct:
        if self.step is None:
            return quantized.as_abstract(self.operands[0])
        return jax.eval_shape(form, self)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array."""
        return self._abstract.shape

    @property
    def dtype(self) -> jnp.dtype:
        """That of the array."""
        return self._abstract.dtype

    @property
    def ndim(self) -> int:
        """That of the array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """That of the array."""
        return self._abstract.size

    @property
    def batch_ndim(self) -> int:
        """How many leading axes of the array are leading axes of all that is stored."""
        if self.step is None or self.step.entrywise:
            return self.operands[0].batch_ndim
        return 0


def form(value: Any) -> Any:
    """The dense array, without a gradient; any other value as it is."""
    if not isinstance(value, Deferred):
        return value
    if value.step is None:
        return placement.as_dense(value.operands[0])
    equation = value.step.equation
    with compat.at_equation(equation):
        out = compat.bind(equation, [form(operand) for operand in value.operands])
    return out[value.step.output] if isinstance(out, list | tuple) else out


def bind(equation: Any, values: Sequence[Any]) -> Any:
    """What the equation's primitive gives for other values, any of which may be deferred.

    The result is deferred, too, if the primitive is one that only moves it about.
    """
    if compat.explicit_mesh(equation) is None:
        return _bind(equation, values)
    return _in_its_types(equation, values)


def _in_its_types(equation: Any, values: Sequence[Any]) -> Any:
    """`bind` on the mesh of the equation, also where its axes are automatic here."""
    automatic = compat.is_automatic()
    with compat.on_mesh_of_equation(equation):
        # A value that the program has on no mesh may be on this one here.
        own = [
            compat.retyped(value, atom.aval.sharding)
            if compat.mesh_of(atom.aval).axis_names
            else compat.as_current(value)
            for value, atom in zip(values, equation.invars, strict=True)
        ]
        out = _bind(equation, own)
    if not automatic:
        return out
    return jax.tree.map(compat.as_current, out, is_leaf=lambda x: isinstance(x, Deferred))


def _bind(equation: Any, values: Sequence[Any]) -> Any:
    if not any(isinstance(value, Deferred) for value in values):
        return compat.bind(equation, values)
    if equation.primitive.name not in _PUT_OFF:
        return use(equation, values)
    if (entries := _entries(equation, *values)) is not None:
        return entries
    out = [Deferred(tuple(values), Step(equation, i)) for i in range(len(equation.outvars))]
    return out if equation.primitive.multiple_results else out[0]


def use(equation: Any, values: Sequence[Any]) -> Any:
    """What the equation's primitive gives, with deferred values formed for it alone."""
    if not any(isinstance(value, Deferred) for value in values):
        return compat.bind(equation, values)

    def used(values):
        return compat.bind(equation, [form(value) for value in values])

    # jax.checkpoint refuses or repeats what has effects, and old versions of JAX cannot
    # compile pmap inside it.
    if equation.effects or equation.primitive.name == "xla_pmap":
        return used(values)
    return jax.checkpoint(used)(list(values))  # forms them again in the backward pass


def _entries(equation: Any, value: Any, *starts: Any) -> Deferred | None:
    """Some entries of a stack, taken from what is stored; None if it is anything else."""
    if not isinstance(value, Deferred):
        return None
    if value.step is not None:
        of = value.operands[0] if value.step.entrywise else None
        entries = _entries(equation, of, *starts)
        return None if entries is None else Deferred((entries,), value.step)
    n, shape = value.batch_ndim, value.shape
    take = _TAKE.get(equation.primitive.name)
    part = None if take is None else take(equation.params, n, shape, starts)
    return None if part is None else Deferred((jax.tree.map(part, value.operands[0]),))


Part = Callable[[jax.Array], jax.Array]


def _slice(params: Any, n: int, shape: Sequence[int], starts: Any) -> Part | None:
    start, limit = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * len(shape)
    whole = [0] * (len(shape) - n), list(shape[n:]), [1] * (len(shape) - n)
    if [list(x[n:]) for x in (start, limit, strides)] != [list(x) for x in whole]:
        return None
    return lambda array: lax.slice(
        array,
        [*start[:n], *[0] * (array.ndim - n)],
        [*limit[:n], *array.shape[n:]],
        [*strides[:n], *[1] * (array.ndim - n)],
    )


def _dynamic_slice(params: Any, n: int, shape: Sequence[int], starts: Any) -> Part | None:
    sizes = params["slice_sizes"]
    if tuple(sizes[n:]) != tuple(shape[n:]):
        return None

    def part(array):
        zeros = [jnp.zeros_like(starts[0])] * (array.ndim - n)
        return lax.dynamic_slice(
            array, [*starts[:n], *zeros], [*sizes[:n], *array.shape[n:]]
        )

    return part


def _squeeze(params: Any, n: int, shape: Sequence[int], starts: Any) -> Part | None:
    axes = params["dimensions"]
    return (lambda array: lax.squeeze(array, axes)) if max(axes, default=0) < n else None


_TAKE = {"slice": _slice, "dynamic_slice": _dynamic_slice, "squeeze": _squeeze}
