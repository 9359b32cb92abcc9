"""The rule for convolutions: convolve to `rank` features, then multiply to the outputs."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import numerics
from lora_jax.lowrank import contraction
from lora_jax.transform import _deferred
from lora_jax.transform._context import Context
from lora_jax.transform._dense import merge
from lora_jax.transform._factored import Factored, Term, place
from lora_jax.transform._parameters import NotFactorableError, parameter
from lora_jax.transform._products import dtype_of_factors, project
from lora_jax.transform._slots import Own, masked, of_all, own_along, widened


def conv_general_dilated(context: Context, equation: Any, x: Any, f: Any) -> jax.Array:
    """A convolution of any layout, stride and dilation, with feature groups."""
    _, own = roles(equation, [isinstance(value, Factored) for value in (x, f)])
    context.see(f, equation, own)
    numbers = parameter(equation, "dimension_numbers")
    out_axis, feature_axis = numbers.rhs_spec[0], numbers.out_spec[1]
    if any(f.owned(column) - {out_axis} for column in f.columns):
        raise NotFactorableError("DoRA scales axes other than its output features")
    own = own_along(context, equation, 0, numbers.lhs_spec[0]) if f.by_slot else None
    if own is None and _is_cheaper_merged(equation, f) and not context.drops(f):
        return _deferred.bind(equation, [x, merge(f)])
    base = _deferred.bind(equation, [x, f.base])
    updates = (_update(context, equation, x, f, term, own) for term in f.terms)
    batch_axis = numbers.out_spec[0]
    names = [batch_axis, feature_axis]
    columns = (
        place(column.reshape(-1), names[1:], range(base.ndim))
        if own is None
        else place(own.columns(of_all(column.reshape(-1))), names, range(base.ndim))
        for column in f.columns
    )
    return numerics.sum_and_round(base, updates, columns)


def roles(equation: Any, weights: Sequence[bool]) -> list[Sequence[str]]:
    """For each operand, the role of each axis, given which operand is the weight.

    Raises:
        NotFactorableError: if there is no low-rank rule for it.
    """
    if list(weights) != [False, True]:
        raise NotFactorableError("the weight is not its kernel")
    if parameter(equation, "batch_group_count") != 1:
        raise NotFactorableError("it has batch groups")
    spec = parameter(equation, "dimension_numbers").rhs_spec
    axes = range(len(spec))
    return [(), ["kept" if axis == spec[0] else "contracted" for axis in axes]]


def _is_cheaper_merged(equation: Any, f: Factored) -> bool:
    """Whether `rank` features in each group are more than the convolution's features."""
    groups = parameter(equation, "feature_group_count")
    out_axis = parameter(equation, "dimension_numbers").rhs_spec[0]
    ranks = sum(term.a.rank for term in f.terms)
    return groups > 1 and groups * ranks >= f.shape[out_axis]


def _update(
    context: Context, equation: Any, x: jax.Array, f: Factored, term: Term, own: Own | None
) -> jax.Array:
    """`scale * (x conv kernel) @ mix`, with the axes of the result.

    `kernel` has `rank` output features, and `mix` maps them to the output features.
    """
    numbers = parameter(equation, "dimension_numbers")
    groups = parameter(equation, "feature_group_count")
    out_axis, feature_axis = numbers.rhs_spec[0], numbers.out_spec[1]
    term, mask = (term, None) if own is None else widened(term, own)
    kernel, mix = _sides(f, term, out_axis)
    rank = kernel.shape[0]
    dtype = dtype_of_factors(x, f, context.statistic)
    # (rank, *axes with 1 for the features) -> (*axes with rank for the features)
    kernel = jnp.moveaxis(lax.squeeze(kernel, [1 + out_axis]), 0, out_axis)
    # Each group has its own features of x, and all groups share one kernel.
    kernel = jnp.concatenate([kernel] * groups, axis=out_axis)
    mix = mix.reshape(rank, groups, -1)  # (rank, groups, features of a group)
    convolve = functools.partial(_convolve, equation)
    down = project(context, term, x, kernel, dtype, convolve, feature_axis)
    rows = jnp.moveaxis(down, feature_axis, -1)  # (..., groups * rank)
    rows = rows.reshape(*rows.shape[:-1], groups, rank)
    if mask is not None:  # (examples, rank)
        batch_axis = numbers.out_spec[0]
        names = [batch_axis - (batch_axis > feature_axis), rows.ndim - 1]
        rows = masked(rows, place(mask, names, range(rows.ndim)))
    dimensions = (((rows.ndim - 1,), (0,)), ((rows.ndim - 2,), (1,)))
    options = contraction.Dot(dimensions, equation.params.get("precision"))
    up = contraction.dot(rows, mix.astype(dtype), options)  # (groups, ..., features)
    up = jnp.moveaxis(up, 0, -2)
    up = up.reshape(*up.shape[:-2], -1)
    return jnp.moveaxis(up, -1, feature_axis)


def _sides(f: Factored, term: Term, out_axis: int) -> tuple[jax.Array, jax.Array]:
    """The factor with positions and input features, broadcast, and the output factor."""
    pair = (term.a, term.b) if out_axis in f.owned(term.b) else (term.b, term.a)
    if out_axis in f.owned(pair[0]) or f.owned(pair[1]) - {out_axis}:
        raise NotFactorableError("its factors are not (positions, in) and (out)")
    kernel, mix = (factor.leading() for factor in pair)
    shape = [1 if axis == out_axis else size for axis, size in enumerate(f.shape)]
    whole = jnp.broadcast_to(kernel, (kernel.shape[0], *shape))
    out_shape = [size if axis == out_axis else 1 for axis, size in enumerate(f.shape)]
    return whole, jnp.broadcast_to(mix, (mix.shape[0], *out_shape))


def _convolve(equation: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of the equation, with another number of output features."""
    names = (
        "window_strides",
        "padding",
        "lhs_dilation",
        "rhs_dilation",
        "dimension_numbers",
        "feature_group_count",
        "precision",
        "preferred_element_type",
    )
    options = {name: parameter(equation, name) for name in names}
    if x.dtype != equation.invars[0].aval.dtype:
        options["preferred_element_type"] = None
    return lax.conv_general_dilated(x, kernel, **options)


RULES = {"conv_general_dilated": conv_general_dilated}
