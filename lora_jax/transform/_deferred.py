"""Quantized frozen weights, which are dequantized at each use.

In the program a quantized weight is a `Deferred` array: its stored arrays, and a record of
the primitives that move, cast or join it, which have not run yet. A use, such as a product,
runs them. It does so inside `jax.checkpoint`: the backward pass dequantizes again, and no
dense copy is kept in between.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import compat, placement, quantized
from lora_jax.transform._moves import MOVES, named

# Primitives that are recorded, and run when the weight is used.
_PUT_OFF = named(lambda row: row.is_deferred)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One output of a recorded equation. Compared by identity."""

    equation: Any
    output: int

    @property
    def entrywise(self) -> bool:
        """Whether the step has one operand and acts on each entry of it alone."""
        return MOVES[self.equation.primitive.name].is_entrywise


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["operands"], meta_fields=["step"]
)
@dataclasses.dataclass(frozen=True)
class Deferred:
    """An array that is not computed yet.

    Attributes:
        operands: the operands of the step, any of which may be deferred. Without a step,
            one quantized weight.
        step: computes the array from the operands; None to dequantize the weight.
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
        """The shape of the array."""
        return self._abstract.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the array."""
        return self._abstract.dtype

    @property
    def ndim(self) -> int:
        """The number of axes of the array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries of the array."""
        return self._abstract.size

    @property
    def batch_ndim(self) -> int:
        """How many leading axes the array shares with all of its stored arrays."""
        if self.step is None or self.step.entrywise:
            return self.operands[0].batch_ndim
        return 0


def form(value: Any) -> Any:
    """The dense array, with its gradient stopped; other values unchanged."""
    if not isinstance(value, Deferred):
        return value
    if value.step is None:
        return placement.as_dense(value.operands[0])
    equation = value.step.equation
    with compat.at_equation(equation):
        out = compat.bind(equation, [form(operand) for operand in value.operands])
    return out[value.step.output] if isinstance(out, list | tuple) else out


def bind(equation: Any, values: Sequence[Any]) -> Any:
    """Applies an equation's primitive to values, any of which may be deferred.

    If the primitive only moves, casts or joins a deferred value, the result is deferred.
    """
    if compat.explicit_mesh(equation) is None:
        return _bind(equation, values)
    return _in_its_types(equation, values)


def _in_its_types(equation: Any, values: Sequence[Any]) -> Any:
    """`bind` on the explicit mesh of the equation, even inside automatic axes."""
    automatic = compat.is_automatic()
    with compat.on_mesh_of_equation(equation):
        # A value without a mesh in the program may have one here.
        own = [
            compat.retyped(value, atom.aval.sharding)
            if compat.mesh_of(atom.aval).axis_names
            else compat.as_current(value, compat.explicit_mesh(equation))
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
    """Applies an equation's primitive, with deferred values computed for it alone."""
    if not any(isinstance(value, Deferred) for value in values):
        return compat.bind(equation, values)

    def used(values):
        product = _product_of_row(equation, values)
        if product is not None:
            return product
        return compat.bind(equation, [form(value) for value in values])

    # jax.checkpoint refuses or repeats effects, and old versions of JAX cannot compile
    # pmap inside it.
    if equation.effects or equation.primitive.name == "xla_pmap":
        return used(values)
    return jax.checkpoint(used)(list(values))  # the backward pass computes them again


def _product_of_row(equation: Any, values: Sequence[Any]) -> jax.Array | None:
    """The product of one row and a quantized matrix on one CPU, if its format has it."""
    if equation.primitive.name != "dot_general" or jax.default_backend() != "cpu":
        return None
    axes, _ = equation.params["dimension_numbers"]
    (x, _), (weight, axis) = sorted(
        zip(values, map(tuple, axes), strict=True), key=lambda v: isinstance(v[0], Deferred)
    )
    if len(axis) != 1 or isinstance(x, Deferred) or compat.may_be_sharded(x):
        return None
    (axis,) = axis
    while weight.step is not None and weight.step.equation.primitive.name == "transpose":
        axis = weight.step.equation.params["permutation"][axis]
        (weight,) = weight.operands
    out = equation.outvars[0].aval
    is_row = weight.ndim == 2 and axis == 1 and x.size == weight.shape[1]
    if not is_row or weight.step is not None or out.dtype != x.dtype:
        return None
    product = weight.operands[0].multiply_row(x.reshape(-1))
    return None if product is None else product.reshape(out.shape)


def _entries(equation: Any, value: Any, *starts: Any) -> Deferred | None:
    """Entries of a stack, taken from the stored arrays; None for any other equation."""
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


Part: TypeAlias = Callable[[jax.Array], jax.Array]


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
