"""The steps of the finder: what each primitive does with the axes of a weight.

Moves of axes are read from the table in `_moves`. The files `_rules_*.py` say which axes a
product or sum contracts, and which operands have no low-rank form.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lora_jax._core import compat
from lora_jax.transform import (
    _norms,
    _rules_arithmetic,
    _rules_calls,
    _rules_convolution,
    _rules_gather,
    _rules_loops,
    _rules_products,
    _rules_spmd,
)
from lora_jax.transform._broadcasts import broadcasts_before
from lora_jax.transform._finder import Finder, Step, dense
from lora_jax.transform._moves import MOVES, Move
from lora_jax.transform._parameters import check_weight_is, parameter
from lora_jax.transform._stated import step, unless_stated
from lora_jax.transform._tracked import Dense, Tracked, WeightAxis, is_tracked


def _unknown(value: Any) -> Any:
    """The result of a call, which is not known to be constant."""
    return dataclasses.replace(value, is_constant=False)


def _as_constant(operand: Any, value: Tracked) -> Tracked:
    """The argument of a body, constant if the operand of the call is."""
    return dataclasses.replace(value, is_constant=operand.is_constant)


def _move(finder: Finder, equation: Any, *values: Any) -> list[Any]:
    """Moves the axes of one weight, or takes entries of them."""
    name = equation.primitive.name
    row = MOVES[name]
    check_weight_is(row.operand, values, Tracked, row.otherwise)
    value, moves = values[row.operand], row.moves(equation)
    shapes = [atom.aval.shape for atom in equation.outvars]
    if name == "split":  # each piece is a look-up of its own
        seen = [_looked_up(finder, equation, value, own) for own in moves]
    else:
        seen = [_looked_up(finder, equation, value, moves[0])] * len(moves)
    return [
        own.moved(move.axes, shape)
        for own, move, shape in zip(seen, moves, shapes, strict=True)
    ]


def _looked_up(finder: Finder, equation: Any, value: Tracked, move: Move) -> Tracked:
    if not any(move.indexed):
        return value
    return finder.uses.look_up(value, equation, move)


def _gather(finder: Finder, equation: Any, *values: Any) -> list[Any]:
    """Takes slices at indices: rows of a table, or entries of a batch axis."""
    row = MOVES["gather"]
    check_weight_is(row.operand, values, Tracked, row.otherwise)
    value, indices = values
    (own,) = row.moves(equation)
    taken = frozenset(axis for axis, is_taken in enumerate(own.indexed) if is_taken)
    kind = ""
    if any(part.along & taken for part in value.axes):
        kind = _rules_gather.kind_of_rows(taken, is_constant=indices.is_constant)
    value = finder.uses.look_up(value, equation, own)
    out = value.moved(own.axes, equation.outvars[0].aval.shape)
    return [out.replace(gathered=value.gathered or kind)]


def _stop_gradient(finder: Finder, equation: Any, value: Tracked) -> list[Any]:
    finder.uses.see(value, equation, ["stopped"] * value.ndim)
    return _move(finder, equation, value)


def _pad(finder: Finder, equation: Any, *values: Any) -> list[Any]:
    row = MOVES["pad"]
    check_weight_is(row.operand, values, Tracked, row.otherwise)
    row.moves(equation)  # raises for paddings without a low-rank form
    return [values[0].longer(equation.outvars[0].aval.shape)]


def _join(finder: Finder, equation: Any, *values: Any) -> list[Any]:
    """Joins weights along an axis, which may be new."""
    (atom,) = equation.outvars
    (own,) = MOVES[equation.primitive.name].moves(equation)
    # Along a new axis each weight has size 1 before the join.
    joined = parameter(equation, "dimension", "axis")
    axes = []
    for value in filter(is_tracked, values):
        shape = list(atom.aval.shape)
        shape[joined] = 1 if value.ndim < len(shape) else value.shape[joined]
        axes += value.moved(own.axes, shape).longer(atom.aval.shape).axes
    return [Tracked(atom.aval.shape, tuple(axes))]


def _sum(finder: Finder, equation: Any, *values: Any) -> list[Any]:
    """A value with the axes of all weights, which are added or chosen between."""
    axes = [own for value in values if isinstance(value, Tracked) for own in value.axes]
    return [Tracked(equation.outvars[0].aval.shape, tuple(axes))]


def _add(finder: Finder, equation: Any, x: Any, y: Any) -> list[Any]:
    """Adds or subtracts another weight, or a dense array such as a bias."""
    for value, other, atom in zip((x, y), (y, x), equation.invars[::-1], strict=True):
        if is_tracked(value) and atom.aval.shape and not is_tracked(other):
            finder.uses.see(value, equation)
    for value in filter(is_tracked, (x, y)):
        _rules_arithmetic.check_is_whole(equation, value)
    return _sum(finder, equation, x, y)


def _mul(finder: Finder, equation: Any, x: Any, y: Any) -> list[Any]:
    x, y = _rules_arithmetic.factors_of_product(finder, equation, x, y)
    return _scaled(finder, equation, *((x, 1) if is_tracked(x) else (y, 0)))


def _div(finder: Finder, equation: Any, x: Any, y: Any) -> list[Any]:
    _rules_arithmetic.merge_divisor(finder, equation, x, y)
    return _scaled(finder, equation, x, 1)


def _scaled(finder: Finder, equation: Any, value: Tracked, by: int) -> list[Any]:
    """Multiplies or divides a weight by the operand at position `by`."""
    broadcasts_before(finder.frame, equation, by)
    _rules_arithmetic.check_is_whole(equation, value)
    return [value.replace()]


def _select(finder: Finder, equation: Any, which: Any, *cases: Any) -> list[Any]:
    _rules_arithmetic.check_choice(finder, equation, which)
    return _sum(finder, equation, *cases)


def _reduce_sum(finder: Finder, equation: Any, value: Tracked) -> list[Any]:
    finder.uses.see(value, equation)
    return dense(equation)


def _product(finder: Finder, equation: Any, *values: Any) -> list[Any]:
    """Records a product that contracts a weight, with the roles of the axes."""
    tracked = list(map(is_tracked, values))
    roles = _ROLES[equation.primitive.name](equation, tracked)
    if sum(tracked) > 1:
        _product_of_weights(finder, equation, values, roles)
        return dense(equation)
    own = tracked.index(True)
    finder.uses.see_product(values[own], equation, roles[own], values[1 - own])
    _rules_products.check_multiplies(equation.invars[1 - own].aval.dtype)
    return dense(equation)


def _product_of_weights(
    finder: Finder, equation: Any, values: Sequence[Any], roles: Sequence[Sequence[str]]
) -> None:
    """Records a product of two weights: a use of each, unless it is the activation."""
    pairs = list(zip(values, roles, strict=True))
    for (value, own), (other, others) in (pairs, pairs[::-1]):
        if _is_activation(value, own, other, others):
            finder.uses.use_rows(value)
        else:
            finder.uses.see_product(value, equation, own)


def _is_activation(
    value: Tracked, roles: Sequence[str], other: Tracked, others: Sequence[str]
) -> bool:
    """Whether `value` is rows of a table that are multiplied by the weight `other`."""
    if not value.gathered or not other.gathered:
        return bool(value.gathered)
    if value.is_multiplied(roles) != other.is_multiplied(others):
        return other.is_multiplied(others)
    return value.gathered == "data" or other.gathered == "constants"


def _as_they_are(finder: Finder, equation: Any, *values: Any) -> list[Any]:
    return list(values)


def _copies(finder: Finder, equation: Any, *values: Any) -> list[Any]:
    return list(map(_unknown, values))


def _jit(finder: Finder, equation: Any, *values: Any) -> list[Any]:
    if (axis := _norms.norm_axis(equation)) is None:
        return finder.follow(parameter(equation, "jaxpr"), values)
    _norms.check_can_form(equation, axis, [*map(is_tracked, values)])
    return dense(equation)  # not a use of the weight


def _closed_call(finder: Finder, equation: Any, *values: Any) -> list[Any]:
    return finder.follow(parameter(equation, "call_jaxpr"), values)


def _checkpoint(finder: Finder, equation: Any, *values: Any) -> list[Any]:
    jaxpr, _ = _rules_calls.of_checkpoint(equation)
    return list(map(_unknown, finder.follow(jaxpr, values)))


def _compute_on(finder: Finder, equation: Any, *values: Any) -> list[Any]:
    out = finder.follow(parameter(equation, "jaxpr"), values)
    return finder.merge_all(out, equation, "compute_on returns it")


def _scan(finder: Finder, equation: Any, *values: Any) -> list[Any]:
    """Follows a scan over stacked weights; a carry that the body changes is merged."""
    body, _ = compat.open_jaxpr(parameter(equation, "jaxpr"))
    n_constants, n_carry = _rules_loops.scan_counts(equation, body)
    carry = values[n_constants : n_constants + n_carry]
    entries = []
    for value, atom in zip(
        values[n_constants + n_carry :], body.invars[n_constants + n_carry :], strict=True
    ):
        if isinstance(value, Tracked):
            finder.uses.see_stacked(value, equation)
            axes = ((), *((axis,) for axis in range(value.ndim - 1)))
            entries.append(_as_constant(value, value.moved(axes, atom.aval.shape)))
        else:
            entries.append(value)
    kept = _rules_loops.invariant(finder, body, carry, n_constants)
    _rules_loops.carried(finder, equation, carry, kept, _rules_loops.CHANGED)
    inside = [Dense() if value is None else value for value in kept]
    out = finder.follow(body, [*values[:n_constants], *inside, *entries])
    _rules_loops.carried(finder, equation, out[:n_carry], kept, _rules_loops.MADE)
    return [*inside, *map(_stacked, out[n_carry:], equation.outvars[n_carry:])]


def _stacked(value: Any, atom: Any) -> Any:
    """A stacked output of a scan: the stacked axis is the first."""
    if not isinstance(value, Tracked):
        return Dense()
    return value.moved([(axis + 1,) for axis in range(value.ndim)], atom.aval.shape)


def _while(finder: Finder, equation: Any, *values: Any) -> list[Any]:
    n_condition = parameter(equation, "cond_nconsts")
    n_body = parameter(equation, "body_nconsts")
    condition = parameter(equation, "cond_jaxpr")
    body, _ = compat.open_jaxpr(parameter(equation, "body_jaxpr"))
    for_condition, rest = values[:n_condition], values[n_condition:]
    for_body, carry = rest[:n_body], rest[n_body:]
    kept = _rules_loops.invariant(finder, body, carry, n_body)
    _rules_loops.carried(finder, equation, carry, kept, _rules_loops.CHANGED)
    inside = [Dense() if value is None else value for value in kept]
    finder.follow(condition, [*for_condition, *inside])
    out = finder.follow(body, [*for_body, *inside])
    _rules_loops.carried(finder, equation, out, kept, _rules_loops.MADE)
    return inside


def _cond(finder: Finder, equation: Any, *values: Any) -> list[Any]:
    """Follows each branch. An output may be any of the weights that the branches return."""
    _rules_loops.check_branches(finder, equation, values[0])
    branches = parameter(equation, "branches")
    outputs = [finder.follow(jaxpr, values[1:]) for jaxpr in branches]
    return [_chosen(finder, equation, found) for found in zip(*outputs, strict=True)]


def _chosen(finder: Finder, equation: Any, found: Sequence[Any]) -> Any:
    """Combines what the branches return for one output."""
    weights = [value for value in found if isinstance(value, Tracked)]
    if not weights:
        return Dense()
    if any(value.gathered for value in weights):
        finder.merge_all(weights, equation, _rules_loops.CHOSEN)
        return Dense()
    # Axes that differ only in their look-ups become one axis with all of the look-ups.
    alike: list[list[WeightAxis]] = []
    for value in weights:
        left = list(alike)
        for own in value.axes:
            group = next((group for group in left if group[0].is_like(own)), None)
            if group is None:
                alike.append([own])
            else:
                left = [other for other in left if other is not group]
                group.append(own)
    return Tracked(weights[0].shape, tuple(map(_with_all_look_ups, alike)))


def _with_all_look_ups(alike: Sequence[WeightAxis]) -> WeightAxis:
    look_ups = dict.fromkeys(each for own in alike for each in own.look_ups)
    return dataclasses.replace(alike[0], look_ups=tuple(look_ups))


def _shard_map(finder: Finder, equation: Any, *values: Any) -> list[Any]:
    """Follows the body with values of the shapes of the shards."""
    body, _ = compat.open_jaxpr(parameter(equation, "jaxpr"))
    shards = [
        _as_constant(
            value, value.moved([(axis,) for axis in range(value.ndim)], atom.aval.shape)
        )
        if isinstance(value, Tracked)
        else value
        for value, atom in zip(values, body.invars, strict=True)
    ]
    finder.merge_all(finder.follow(body, shards), equation, "shard_map returns it")
    return dense(equation)


def _all_gather(finder: Finder, equation: Any, value: Tracked) -> list[Any]:
    _rules_spmd.check_tiled(equation)
    axes = [(axis,) for axis in range(value.ndim)]
    return [value.moved(axes, equation.outvars[0].aval.shape)]


_ROLES: dict[str, Callable[..., Any]] = {
    "dot_general": _rules_products.roles,
    "ragged_dot_general": _rules_products.roles_of_groups,
    "conv_general_dilated": _rules_convolution.roles,
}
STEPS: dict[str, Step] = {
    **dict.fromkeys(MOVES, _move),
    **dict.fromkeys(_ROLES, _product),
    **dict.fromkeys(("concatenate", "stack"), _join),
    **dict.fromkeys(("add", "add_any", "sub"), _add),
    "device_put": _copies,
    "optimization_barrier": _as_they_are,
    **dict.fromkeys(("checkpoint", "remat2", "call_hi_primitive"), _checkpoint),
    **dict.fromkeys(("all_gather", "all_gather_invariant"), _all_gather),
    **_rules_calls.REFUSED,
    **_rules_arithmetic.REFUSED,
    "closed_call": _closed_call,
    "complex": _sum,
    "compute_on": _compute_on,
    "cond": _cond,
    "div": _div,
    "gather": _gather,
    "jit": _jit,
    "mul": _mul,
    "pad": _pad,
    "reduce_sum": _reduce_sum,
    "scan": _scan,
    "select_n": _select,
    "shard_map": _shard_map,
    "stop_gradient": _stop_gradient,
    "while": _while,
}
STEPS |= {name: unless_stated(STEPS[name], step) for name in compat.NAMED_CALLS}
