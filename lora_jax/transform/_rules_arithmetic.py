"""Rules for elementwise arithmetic, casts, choices, sums and solves of weights."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import compat, numerics
from lora_jax.transform import _deferred
from lora_jax.transform._broadcasts import before_broadcast, broadcasts_before
from lora_jax.transform._choosing import common_form, in_form
from lora_jax.transform._context import Context
from lora_jax.transform._deferred import Deferred
from lora_jax.transform._dense import sums_of_terms
from lora_jax.transform._factored import (
    Factor,
    Factored,
    Term,
    base_of,
    full,
    times,
    with_base,
)
from lora_jax.transform._moves import MOVES, cast
from lora_jax.transform._parameters import (
    NotFactorableError,
    check_weight_is,
    parameter,
    refuse,
)


def on_base(context: Context, equation: Any, f: Factored) -> Factored:
    """Applies the primitive to the frozen weight alone: for casts and placements.

    The factors are cast when they are multiplied.
    """
    out = f.replace(base=_deferred.bind(equation, [f.base]))
    context.masks.copy(f, out)
    return out


def convert(context: Context, equation: Any, f: Factored) -> Factored:
    """A cast to another floating-point dtype of at least 16 bits, or a complex one."""
    cast(equation)  # raises for others
    return on_base(context, equation, f)


def stop_gradient(context: Context, equation: Any, f: Factored) -> Factored:
    """Stops the frozen weight alone or, if the user said so, its adapter as well."""
    if f.terms:
        context.check_may_stop(f, equation)
    if context.on_stop_gradient != "all":
        return on_base(context, equation, f)
    return on_all(context, equation, f)


def on_all(context: Context, equation: Any, f: Factored) -> Factored:
    """Applies the primitive to the frozen weight, the factors and the columns."""
    bind = functools.partial(compat.bind_one, equation)
    base = f.base
    base = _deferred.bind(equation, [base]) if isinstance(base, Deferred) else bind(base)
    return f.map(base, bind)


def complex_(context: Context, equation: Any, x: Any, y: Any) -> Factored:
    """`x + 1j * y`, with the terms of both. One of them may be dense."""
    base = _deferred.bind(equation, [base_of(x), base_of(y)])
    weights = [value for value in (x, y) if isinstance(value, Factored)]
    if any(value.columns for value in weights):
        raise NotFactorableError("DoRA scales the weight, not the sum")
    terms = [*x.terms] if isinstance(x, Factored) else []
    if isinstance(y, Factored):
        unit = jnp.asarray(1j, base.dtype)
        terms += [_times(term, unit) for term in y.terms]
    return Factored(base, tuple(terms))


def _times(term: Term, by: jax.Array) -> Term:
    return Term(term.a.map(lambda p: _in_range(p, by)), term.b, term.label)


def _in_range(p: jax.Array, by: jax.Array) -> jax.Array:
    """A factor times `by`. A float16 factor becomes float32, so that it cannot overflow."""
    return times(p.astype(numerics.factor_dtype(p.dtype)), by)


def part(context: Context, equation: Any, f: Factored) -> Factored:
    """`real` or `imag`. A term of two complex factors becomes two real terms."""
    base = _deferred.bind(equation, [f.base])
    of_real = equation.primitive.name == "real"
    terms = []
    for term in f.terms:
        for take_a, take_b, is_negative in (
            ((jnp.real, jnp.real, False), (jnp.imag, jnp.imag, True))
            if of_real
            else ((jnp.imag, jnp.real, False), (jnp.real, jnp.imag, False))
        ):
            sides = (take_a, term.a), (take_b, term.b)
            if all(take is jnp.real or _is_complex(p) for take, p in sides):
                taken = Term(term.a.map(take_a), term.b.map(take_b), term.label)
                terms.append(_negative(taken) if is_negative else taken)
    if not terms:  # the imaginary part of real factors
        terms = [_times(term, jnp.zeros((), base.dtype)) for term in f.terms]
    return f.replace(base=base, terms=tuple(terms))


def _is_complex(factor: Factor) -> bool:
    return jnp.issubdtype(factor.array.dtype, jnp.complexfloating)


def conj(context: Context, equation: Any, f: Factored) -> Factored:
    """Conjugates both factors."""
    return f.map(_deferred.bind(equation, [f.base]), jnp.conj)


def cumsum(context: Context, equation: Any, f: Factored) -> Factored:
    """Cumulative sums along one axis, of the one factor that owns it."""
    axis = parameter(equation, "axis")
    bind = functools.partial(compat.bind_one, equation)
    return along_axis(equation, f, axis, bind)


def along_axis(
    equation: Any,
    f: Factored,
    axis: int,
    function: Callable[[jax.Array], jax.Array],
    *others: Any,
) -> Factored:
    """Applies a linear map of one axis, which keeps its size, to the factor that owns it.

    `function` applies the map to a factor, whose other axes may have size 1. `others` are
    the operands of the equation before the weight.
    """
    base = _deferred.bind(equation, [*others, f.base])
    if any(axis in f.owned(column) for column in f.columns):
        raise NotFactorableError("it mixes entries along an axis that DoRA scales")

    def mapped(term: Term) -> Term:
        of_a, of_b = (axis in f.owned(p) for p in (term.a, term.b))
        if of_a and of_b:
            raise NotFactorableError("it mixes the entries of a batch axis")
        if of_b:
            return Term(term.a, term.b.map(function), term.label)
        return Term(term.a.map(lambda p: function(full(f, p, axis))), term.b, term.label)

    return f.replace(base=base, terms=tuple(map(mapped, f.terms)))


def triangular_solve(context: Context, equation: Any, a: Any, f: Any) -> Factored:
    """Solves for the columns or rows of the weight, in the factor that owns their axis."""
    row = MOVES["triangular_solve"]
    check_weight_is(row.operand, (a, f), Factored, row.otherwise)
    axis = f.ndim - (2 if parameter(equation, "left_side") else 1)

    def solved(p):
        wide = numerics.accumulation_dtype(a.dtype, p.dtype)
        p = jnp.broadcast_to(p.astype(wide), (*a.shape[:-2], *p.shape[-2:]))
        return compat.bind(equation, [a.astype(wide), p])

    return along_axis(equation, f, axis, solved, a)


def select_n(context: Context, equation: Any, which: Any, *cases: Any) -> Factored:
    """Chooses between weights, or between their rows or columns."""
    check_choice(context, equation, which)
    base = _deferred.bind(equation, [which, *map(base_of, cases)])
    try:
        return _chosen(before_broadcast(context, equation, 0, which), cases, base)
    except NotFactorableError as error:
        raise _entry_by_entry(error) from None


def check_choice(context: Any, equation: Any, which: Any) -> None:
    """Raises if a weight is the condition, or the choice is made entry by entry."""
    if context.is_weight(which):
        raise NotFactorableError("the weight is its condition")
    try:
        broadcasts_before(context.frame, equation, 0)
    except NotFactorableError as error:
        raise _entry_by_entry(error) from None


def _entry_by_entry(error: NotFactorableError) -> NotFactorableError:
    return NotFactorableError(
        f"there is no low-rank rule for a choice entry by entry ({error})"
    )


def _chosen(which: jax.Array, cases: Sequence[Any], base: Any) -> Factored:
    if which.size == 1:
        which = which.reshape(())
        form = common_form(cases)
        values = [in_form(case, form).replace(base=()) for case in cases]
        chosen = jax.tree.map(functools.partial(lax.select_n, which), *values)
        return chosen.replace(base=base)
    terms, columns = [], []
    for i, case in enumerate(cases):
        if not isinstance(case, Factored):
            continue
        here = which.astype("int32") == i
        terms += [_scaled_term(case, term, here) for term in case.terms]
        if case.columns and columns:
            raise NotFactorableError("DoRA scales each of the weights differently")
        columns += [jnp.where(here, c, jnp.ones_like(c)) for c in case.columns]
    return Factored(base, tuple(terms), tuple(columns))


def optimization_barrier(context: Context, equation: Any, *values: Any) -> list[Any]:
    """Applies the barrier to factors and frozen weights together."""
    leaves, tree = jax.tree.flatten(values)
    held = list(jax.tree.unflatten(tree, _deferred.bind(equation, leaves)))
    context.enter(values, held)
    return held


def device_put(context: Context, equation: Any, *values: Any) -> list[Any]:
    """Moves the frozen weight, not its factors."""
    moved = _deferred.bind(equation, [base_of(value) for value in values])
    return list(map(with_base, values, moved))


def neg(context: Context, equation: Any, f: Factored) -> Factored:
    """Negates the frozen weight and one factor of each term."""
    return f.replace(
        base=_deferred.bind(equation, [f.base]), terms=tuple(map(_negative, f.terms))
    )


def _negative(term: Term) -> Term:
    return Term(term.a.map(lax.neg), term.b, term.label)


def mul(context: Context, equation: Any, x: Any, y: Any) -> Factored:
    """Multiplies by a scalar, or by an array along axes of one factor only."""
    x, y = factors_of_product(context, equation, x, y)
    f, other, position = (x, y, 1) if isinstance(x, Factored) else (y, x, 0)
    compact = before_broadcast(context, equation, position, other)
    base = _deferred.bind(equation, [base_of(x), base_of(y)])
    return _scaled(equation, f, base, compact)


def div(context: Context, equation: Any, x: Any, y: Any) -> Factored:
    """Divides by a scalar, or by an array along axes of one factor only."""
    y = merge_divisor(context, equation, x, y)
    compact = before_broadcast(context, equation, 1, y)
    wide = compact.astype(numerics.accumulation_dtype(compact.dtype))
    return _scaled(equation, x, _deferred.bind(equation, [x.base, y]), 1 / wide)


def merge_divisor(context: Any, equation: Any, x: Any, y: Any) -> Any:
    """The divisor; it is merged if it is a weight as well."""
    if not context.is_weight(y):
        return y
    if not context.is_weight(x):
        raise NotFactorableError("it divides by the weight")
    return context.merge(y, equation, "it divides another weight by this one")


def factors_of_product(context: Any, equation: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """The operands of a product; of two weights, the one that is broadcast is merged.

    The finder calls this for params without an adapter too, such as the scale of a matrix.
    """
    if not (context.is_weight(x) and context.is_weight(y)):
        return x, y
    shape, known = equation.outvars[0].aval.shape, context.frame.broadcasts
    broadcast = [
        value.shape != shape or atom in known
        for value, atom in zip((x, y), equation.invars, strict=True)
    ]
    reason = "it multiplies another weight, entry by entry"
    if broadcast == [True, False]:
        return context.merge(x, equation, reason), y
    if broadcast == [False, True]:
        return x, context.merge(y, equation, reason)
    raise NotFactorableError("it is a product of adapted weights, entry by entry")


def check_is_whole(equation: Any, value: Any) -> None:
    """Raises if the equation broadcasts the weight to the shape of the result."""
    if equation.outvars[0].aval.shape != value.shape:
        raise NotFactorableError("it broadcasts the weight")


def _scaled(equation: Any, f: Factored, base: jax.Array, by: jax.Array) -> Factored:
    """The value with `base`, and each term times `by`, `()` or `(*axes)`."""
    check_is_whole(equation, f)
    return f.replace(base=base, terms=tuple(_scaled_term(f, t, by) for t in f.terms))


def _scaled_term(f: Factored, term: Term, by: jax.Array) -> Term:
    along = frozenset(axis for axis, size in enumerate(by.shape) if size != 1)
    of_a, of_b = f.owned(term.a), f.owned(term.b)
    if not along & (of_b - of_a):
        return _times(term, by)
    if not along & (of_a - of_b):
        return Term(term.a, term.b.map(lambda p: _in_range(p, by)), term.label)
    raise NotFactorableError("the other operand varies along inputs and outputs")


def add(context: Context, equation: Any, x: Any, y: Any) -> Factored:
    """Adds or subtracts a dense array or another adapted weight; keeps all terms."""
    base = _deferred.bind(equation, [base_of(x), base_of(y)])
    negative = equation.primitive.name == "sub"
    terms = []
    for value, sign in ((x, 1), (y, -1 if negative else 1)):
        if not isinstance(value, Factored):
            continue
        if value.columns:
            raise NotFactorableError("DoRA scales the weight, not the sum")
        check_is_whole(equation, value)
        terms += value.terms if sign == 1 else map(_negative, value.terms)
    return Factored(base, tuple(terms))


def reduce_sum(context: Context, equation: Any, f: Factored) -> jax.Array:
    """Sums of the weight, as a dense array of the size that the frozen program has."""
    if f.columns:
        raise NotFactorableError("DoRA scales what is summed")
    if f.by_slot:
        raise NotFactorableError("each row has its own adapter, so the sum is not one")
    context.check_no_dropout(f)
    axes = parameter(equation, "axes")
    context.see(f, equation)
    base = _deferred.bind(equation, [f.base])
    dtype = numerics.accumulation_dtype(base.dtype)
    return numerics.sum_and_round(base, sums_of_terms(f, axes, dtype))


REFUSED = {
    # Its solver takes right-hand sides of the weight's shape; factors have other shapes.
    "custom_linear_solve": refuse(
        "there is no low-rank rule for it: its solver is made for right-hand sides of the "
        "shape of the weight; jax.scipy.linalg.cho_solve, lu_solve and solve_triangular "
        "have a rule"
    ),
    # Not implemented: each factor would be transformed along the axes that it owns.
    "fft": refuse(
        "there is no low-rank rule for it: transform the activations, or the product"
    ),
}
RULES = {
    "convert_element_type": convert,
    **dict.fromkeys(("copy", "name", "reduce_precision", "reshard", "mesh_cast"), on_base),
    **dict.fromkeys(("sharding_constraint", "layout_constraint"), on_base),
    "stop_gradient": stop_gradient,
    "pvary": on_all,
    "pcast": on_all,
    "complex": complex_,
    "real": part,
    "imag": part,
    "conj": conj,
    "cumsum": cumsum,
    "triangular_solve": triangular_solve,
    **REFUSED,
    "select_n": select_n,
    "optimization_barrier": optimization_barrier,
    "device_put": device_put,
    "neg": neg,
    "mul": mul,
    "div": div,
    **dict.fromkeys(("add", "add_any", "sub"), add),
    "reduce_sum": reduce_sum,
}
