"""Primitives that keep the form of a sum, entry by entry."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax import _compat, _numerics
from lora_jax.transform import _deferred
from lora_jax.transform._context import Context
from lora_jax.transform._deferred import Deferred
from lora_jax.transform._factored import (
    Factored,
    NotFactorableError,
    Term,
    base_of,
    is_factored,
    place,
    squeeze,
    times,
    with_base,
)
from lora_jax.transform._parameters import parameter


def on_base(context: Context, equation: Any, f: Factored) -> Factored:
    """What concerns the frozen weight alone: where it lies, and in how many bits.

    The factors are cast when they are multiplied.
    """
    return f.replace(base=_deferred.bind(equation, [f.base]))


def convert(context: Context, equation: Any, f: Factored) -> Factored:
    """A cast to another floating-point dtype of at least 16 bits."""
    dtype = jnp.dtype(parameter(equation, "new_dtype"))
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise NotFactorableError(f"a sum cast to {dtype} is no sum of casts")
    return on_base(context, equation, f)


def stop_gradient(context: Context, equation: Any, f: Factored) -> Factored:
    """Stops the frozen weight alone or, if the user said so, its adapter as well."""
    if context.probing:
        context.see(f, equation, ["stopped"] * f.ndim)
    elif f.terms:
        context.check_may_stop(f, equation)
    if context.on_stop_gradient != "all":
        return on_base(context, equation, f)
    return on_all(context, equation, f)


def on_all(context: Context, equation: Any, f: Factored) -> Factored:
    """What has to hold of the factors as it does of the weight."""
    bind = functools.partial(_compat.bind_one, equation)
    base = f.base
    base = _deferred.bind(equation, [base]) if isinstance(base, Deferred) else bind(base)
    return f.map(base, bind)


def optimization_barrier(context: Context, equation: Any, *values: Any) -> list[Any]:
    """Holds factors back as it does the weight."""
    leaves, tree = jax.tree.flatten(values)
    return list(jax.tree.unflatten(tree, _deferred.bind(equation, leaves)))


def device_put(context: Context, equation: Any, *values: Any) -> list[Any]:
    """Moves the frozen weight, not its factors."""
    moved = _deferred.bind(equation, [base_of(value) for value in values])
    return list(map(with_base, values, moved))


def neg(context: Context, equation: Any, f: Factored) -> Factored:
    """The sign goes to the base and to one factor of each term."""
    return f.replace(
        base=_deferred.bind(equation, [f.base]), terms=tuple(map(_negative, f.terms))
    )


def _negative(term: Term) -> Term:
    return Term(term.a.map(lax.neg), term.b, term.label)


def mul(context: Context, equation: Any, x: Any, y: Any) -> Factored:
    """Times a scalar, or something that varies along the axes of one factor only."""
    if isinstance(x, Factored) and isinstance(y, Factored):
        raise NotFactorableError("it is a product of adapted weights, entry by entry")
    f, other, position = (x, y, 1) if isinstance(x, Factored) else (y, x, 0)
    compact = _before_broadcast(context, equation, position, other)
    base = _deferred.bind(equation, [base_of(x), base_of(y)])
    return _scaled(context, f, base, compact)


def div(context: Context, equation: Any, x: Any, y: Any) -> Factored:
    """By a scalar, or something that varies along the axes of one factor only."""
    if isinstance(y, Factored):
        raise NotFactorableError("it divides by the weight")
    compact = _before_broadcast(context, equation, 1, y)
    wide = compact.astype(_numerics.accumulation_dtype(compact.dtype))
    return _scaled(context, x, _deferred.bind(equation, [x.base, y]), 1 / wide)


def _before_broadcast(
    context: Context, equation: Any, position: int, value: Any
) -> jax.Array:
    """An operand with 1 for the axes along which it does not vary."""
    if np.ndim(value) == 0 or 1 in value.shape:
        return jnp.asarray(value)
    frame, atom, steps = context.frame, equation.invars[position], []
    while not isinstance(atom, _compat.Literal) and atom in frame.broadcasts:
        steps.append(frame.broadcasts[atom])
        atom = steps[-1].invars[0]
    if not steps:
        raise NotFactorableError("the other operand varies along all axes of the weight")
    value = jnp.asarray(frame.read(atom))
    for step in reversed(steps):
        shape = [1] * len(step.params["shape"])
        positions = step.params["broadcast_dimensions"]
        for size, axis in zip(value.shape, positions, strict=True):
            shape[axis] = size
        value = lax.broadcast_in_dim(value, shape, positions)
    return value


def _scaled(context: Context, f: Factored, base: jax.Array, by: jax.Array) -> Factored:
    """The terms times `by`, `()` or `(*axes)`, in a factor that varies where `by` does."""
    if base.shape != f.shape:
        raise NotFactorableError("it broadcasts the weight")
    if context.probing:
        return f.replace(base=base)
    along = frozenset(axis for axis, size in enumerate(by.shape) if size != 1)

    def scaled(term):
        if along <= f.owned(term.a):
            return Term(term.a.map(lambda p: times(p, by)), term.b, term.label)
        if along <= f.owned(term.b):
            return Term(term.a, term.b.map(lambda p: times(p, by)), term.label)
        raise NotFactorableError("the other operand varies along inputs and outputs")

    return f.replace(base=base, terms=tuple(map(scaled, f.terms)))


def add(context: Context, equation: Any, x: Any, y: Any) -> Factored:
    """Plus or minus a dense array, or another adapted weight: all the terms of both."""
    base = _deferred.bind(equation, [base_of(x), base_of(y)])
    if context.probing:
        _see_added(context, equation, x, y)
    negative = equation.primitive.name == "sub"
    terms = []
    for value in (x, y):
        if not isinstance(value, Factored):
            continue
        if value.columns:
            raise NotFactorableError("DoRA scales the weight, not the sum")
        if value.shape != base.shape:
            raise NotFactorableError("it broadcasts the weight")
        terms += map(_negative, value.terms) if negative and value is y else value.terms
    return Factored(base, tuple(terms))


def _see_added(context: Context, equation: Any, x: Any, y: Any) -> None:
    """Records that a weight is added to a dense array, as biases and positions are."""
    for value, other in ((x, y), (y, x)):
        if isinstance(value, Factored) and np.ndim(other) and not is_factored(other):
            context.see(value, equation)


def reduce_sum(context: Context, equation: Any, f: Factored) -> jax.Array:
    """Sums of the weight: dense, and as small as the frozen program's."""
    if f.columns:
        raise NotFactorableError("DoRA scales what is summed")
    context.check_no_dropout(f)
    axes = parameter(equation, "axes")
    context.see(f, equation)
    base = _deferred.bind(equation, [f.base])
    dtype = _numerics.accumulation_dtype(base.dtype)
    kept = [axis for axis in range(f.ndim) if axis not in axes]
    out = base.astype(dtype)
    for term in f.terms:
        update = _summed(f, term, axes, kept, dtype)
        out = out + _numerics.multiply(update, term.label.scale)
    return out.astype(base.dtype)


def _summed(f: Factored, term: Term, axes: Any, kept: list[int], dtype: Any) -> jax.Array:
    """`sum_r a[r] * b[r]` summed over `axes`, with 1 for axes that neither owns."""
    a, a_axes = squeeze(f, term.a, dtype)  # (rank, *owned by a)
    b, b_axes = squeeze(f, term.b, dtype)  # (rank, *owned by b)

    def alone(p, own, others):  # sums the axes that only this factor owns
        gone = [axis for axis in own if axis in axes and axis not in others]
        left = [axis for axis in own if axis not in gone]
        return jnp.sum(p, axis=[1 + own.index(axis) for axis in gone]), left

    (a, a_axes), (b, b_axes) = alone(a, a_axes, b_axes), alone(b, b_axes, a_axes)
    both = [axis for axis in a_axes if axis in b_axes]
    batch, summed = ([i for i in both if (i in axes) == s] for s in (False, True))
    contracting = (
        (0, *(1 + a_axes.index(i) for i in summed)),
        (0, *(1 + b_axes.index(i) for i in summed)),
    )
    batching = [1 + a_axes.index(i) for i in batch], [1 + b_axes.index(i) for i in batch]
    out = lax.dot_general(a, b, (contracting, batching), precision=lax.Precision.HIGHEST)
    names = [*batch, *(i for i in (*a_axes, *b_axes) if i not in both)]
    unowned = f.owned(term.a) | f.owned(term.b)
    times = math.prod(f.shape[axis] for axis in axes if axis not in unowned)
    return place(out, names, kept) * times


RULES = {
    "convert_element_type": convert,
    "copy": on_base,
    "name": on_base,
    "reduce_precision": on_base,
    "reshard": on_base,
    "sharding_constraint": on_base,
    "layout_constraint": on_base,
    "stop_gradient": stop_gradient,
    "pvary": on_all,
    "pcast": on_all,
    "optimization_barrier": optimization_barrier,
    "device_put": device_put,
    "neg": neg,
    "mul": mul,
    "div": div,
    "add": add,
    "add_any": add,
    "sub": add,
    "reduce_sum": reduce_sum,
}
