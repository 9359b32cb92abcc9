"""Rules for `scan`, `while` and `cond`, which are rebuilt with JAX's public functions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from lora_jax._core import compat
from lora_jax.transform._choosing import Form, common_form, in_form
from lora_jax.transform._context import Context
from lora_jax.transform._deferred import Deferred, form
from lora_jax.transform._factored import RANK, Factor, Factored, base_of, place, with_base
from lora_jax.transform._interpreter import evaluate, evaluate_closed
from lora_jax.transform._parameters import NotFactorableError, parameter

# Why weights are merged.
CHANGED = "it is carried by a loop that changes it"
MADE = "the body of the loop makes it a carry"
CHOSEN = "a branch returns it"


def scan(context: Context, equation: Any, *values: Any) -> list[Any]:
    """Rebuilds a scan; the factors of a stacked weight are sliced with the weight.

    A carry that the body returns unchanged is treated as a constant. Other carries are
    merged, before the loop and after each step.
    """
    body, constants = compat.open_jaxpr(parameter(equation, "jaxpr"))
    n_constants, n_carry = scan_counts(equation, body)
    length = parameter(equation, "length")
    fixed, carry = values[:n_constants], values[n_constants : n_constants + n_carry]
    stacks = [_Stack(context, equation, v) for v in values[n_constants + n_carry :]]
    kept = invariant(context, body, carry, n_constants)
    start = carried(context, equation, carry, kept, CHANGED)
    key = context.make_key()
    keys = None if key is None else jax.random.split(key, length)

    slots = context.slots
    if slots is not None and (cut := context.frame.followed.scanned.get(id(equation))):
        outer, _, inner = cut
        by_step = slots.reshape(outer, length, inner).swapaxes(0, 1).reshape(length, -1)
    else:
        by_step = None

    def step(carry, x):
        key, own, slices = x
        own = slots if own is None else own
        with context.using_slots(own), context.using_key(key):
            entries = [stack.entry(s) for stack, s in zip(stacks, slices, strict=True)]
            context.enter(values[n_constants + n_carry :], entries)
            arguments = [*fixed, *_with_kept(carry, kept), *entries]
            out = evaluate(context, body, constants, arguments)
            carry = carried(context, equation, out[:n_carry], kept, MADE)
        return carry, [_formed(y) for y in out[n_carry:]]

    options = {name: parameter(equation, name) for name in ("reverse", "unroll")}
    if equation.params.get("_split_transpose"):
        options["_split_transpose"] = True
    xs = keys, by_step, [stack.sliced for stack in stacks]
    end, ys = lax.scan(step, start, xs, length=length, **options)
    return [*_with_kept(end, kept), *map(_stacked, ys)]


def scan_counts(equation: Any, body: Any) -> tuple[int, int]:
    """The number of constants and the number of carries among the operands of a scan.

    They are counted by numbers of axes, since the parameters differ between versions of
    JAX. An operand that is scanned over has one axis more than the body's argument, and a
    stacked result has one axis more than the body's output.
    """

    def rank(atom):
        return len(atom.aval.shape)

    n_scanned = sum(
        rank(outer) > rank(inner)
        for outer, inner in zip(equation.invars, body.invars, strict=True)
    )
    n_carry = sum(
        rank(outer) == rank(inner)
        for outer, inner in zip(equation.outvars, body.outvars, strict=True)
    )
    return len(equation.invars) - n_scanned - n_carry, n_carry


class _Stack:
    """An operand that a scan runs over: an array, or a factored weight with its factors."""

    def __init__(self, context: Context, equation: Any, value: Any):
        self.sliced, self.shared, self.tree = value, None, None
        if not isinstance(value, Factored):
            return
        roles = ["stacked"] + [""] * (value.ndim - 1)
        context.see(value, equation, roles, moved=True)
        self.length = value.shape[0]
        if isinstance(value.base, Deferred) and not value.base.batch_ndim:
            value = value.replace(base=form(value.base))
        leaves, self.tree = jax.tree.flatten(_with_factors(value, self._stack_first))
        scanned = [leaf.ndim > 0 and leaf.shape[0] == self.length for leaf in leaves]
        self.sliced = [leaf if s else None for leaf, s in zip(leaves, scanned, strict=True)]
        # Factors that do not vary along the stack are shared by all entries.
        self.shared = [
            None if s else lax.squeeze(leaf, [0]) if leaf.ndim else leaf
            for leaf, s in zip(leaves, scanned, strict=True)
        ]

    def _stack_first(self, factor: Factor) -> Factor:
        """The factor with the stack as its first stored axis, so that a scan slices it."""
        others = tuple(axis for axis in factor.axes if axis != 0)
        stored = place(factor.stored, factor.axes, (0, *others))
        return dataclasses.replace(factor, stored=stored, axes=(0, *others))

    def entry(self, sliced: Any) -> Any:
        """The value that the body gets, from one entry of `sliced`."""
        if self.tree is None or self.shared is None:
            return sliced
        leaves = [
            own if shared is None else shared
            for own, shared in zip(sliced, self.shared, strict=True)
        ]
        return _with_factors(jax.tree.unflatten(self.tree, leaves), _entry)


def _with_factors(value: Factored, function: Callable[[Factor], Factor]) -> Factored:
    return value.replace(terms=tuple(term.map(function) for term in value.terms))


def _entry(factor: Factor) -> Factor:
    """The factor of one entry, without the stacked axis."""
    axes = tuple(axis if axis == RANK else axis - 1 for axis in factor.axes[1:])
    return dataclasses.replace(factor, axes=axes, ndim=factor.ndim - 1)


def _formed(value: Any) -> Any:
    """The value with a dense frozen weight, which an output of a scan can stack."""
    return with_base(value, form(base_of(value)))


def _stacked(value: Any) -> Any:
    """A stacked output of a scan, whose factors have the stack as their first axis."""
    if not isinstance(value, Factored):
        return value

    def back(factor: Factor) -> Factor:
        axes = tuple(axis if axis == RANK else axis + 1 for axis in factor.axes)
        return dataclasses.replace(factor, axes=(0, *axes), ndim=factor.ndim + 1)

    return _with_factors(value, back)


def invariant(context: Any, body: Any, carry: Sequence[Any], offset: int) -> list[Any]:
    """The carried weights that the body returns unchanged; None for other carries."""
    return [
        value
        if context.is_weight(value) and body.outvars[i] is body.invars[offset + i]
        else None
        for i, value in enumerate(carry)
    ]


def carried(
    context: Any, equation: Any, carry: Sequence[Any], kept: Sequence[Any], reason: str
) -> list[Any]:
    """The carry of the new loop: None for the kept weights; other weights are merged."""
    changing = [
        None if constant is not None else value
        for value, constant in zip(carry, kept, strict=True)
    ]
    return context.merge_all(changing, equation, reason)


def _with_kept(carry: Sequence[Any], kept: Sequence[Any]) -> list[Any]:
    return [
        value if constant is None else constant
        for value, constant in zip(carry, kept, strict=True)
    ]


def while_(context: Context, equation: Any, *values: Any) -> list[Any]:
    """Rebuilds a while loop; carries are treated as in `scan`."""
    n_condition = parameter(equation, "cond_nconsts")
    n_body = parameter(equation, "body_nconsts")
    condition_jaxpr = parameter(equation, "cond_jaxpr")
    body, constants = compat.open_jaxpr(parameter(equation, "body_jaxpr"))
    for_condition, rest = values[:n_condition], values[n_condition:]
    for_body, carry = rest[:n_body], rest[n_body:]
    kept = invariant(context, body, carry, n_body)
    start = carried(context, equation, carry, kept, CHANGED)

    def condition(state):
        _, carry = state
        arguments = [*for_condition, *_with_kept(carry, kept)]
        return evaluate_closed(context, condition_jaxpr, arguments)[0]

    def step(state):
        key, carry = state
        next_key, own_key = (None, None) if key is None else jax.random.split(key)
        with context.using_key(own_key):
            arguments = [*for_body, *_with_kept(carry, kept)]
            out = evaluate(context, body, constants, arguments)
            return next_key, carried(context, equation, out, kept, MADE)

    _, end = lax.while_loop(condition, step, (context.make_key(), start))
    return _with_kept(end, kept)


def cond(context: Context, equation: Any, index: Any, *values: Any) -> list[Any]:
    """Rebuilds a `cond` or `switch`; a chosen weight has the terms of all branches."""
    check_branches(context, equation, index)
    jaxprs, key = parameter(equation, "branches"), context.make_key()
    forms = _forms(context, jaxprs, key, list(values))

    def branch(jaxpr: Any) -> Callable[..., Any]:
        def run(key, inside):
            context.enter(values, inside)
            with context.using_key(key):
                out = evaluate_closed(context, jaxpr, inside)
                return [
                    context.merge_all([value], equation, CHOSEN)[0]
                    if form is None
                    else in_form(_formed(value), form)
                    for value, form in zip(out, forms, strict=True)
                ]

        return run

    return lax.switch(index, list(map(branch, jaxprs)), key, list(values))


def check_branches(context: Any, equation: Any, index: Any) -> None:
    """Raises unless a number chooses the branch, and it is not a weight."""
    if equation.params.get("branches_platforms") is not None:
        raise NotFactorableError("its branches are for different platforms")
    if context.is_weight(index):
        raise NotFactorableError("the weight chooses the branch")


def _forms(
    context: Context, jaxprs: Sequence[Any], key: Any, values: list[Any]
) -> list[Form | None]:
    """The common form of each output that is a weight in some branch; None for others."""
    n_outputs = len(compat.open_jaxpr(jaxprs[0])[0].outvars)
    if not any(_may_return_weight(context, jaxpr, values) for jaxpr in jaxprs):
        return [None] * n_outputs

    def outputs(jaxpr):
        def run(key, inside):
            context.enter(values, inside)
            with context.using_key(key):
                return [_formed(v) for v in evaluate_closed(context, jaxpr, inside)]

        with context.quietly():
            return jax.eval_shape(run, key, values)

    def form(*found: Any) -> Form | None:
        weights = [value for value in found if isinstance(value, Factored)]
        kept = weights and not any(
            value.gathered or context.is_vector(value) for value in weights
        )
        try:
            return common_form(found) if kept else None
        except NotFactorableError:
            return None

    return list(map(form, *map(outputs, jaxprs)))


def _may_return_weight(context: Context, jaxpr: Any, values: Sequence[Any]) -> bool:
    """Whether a weight may reach an output of a branch, according to the rules."""
    inner, _ = compat.open_jaxpr(jaxpr)
    reached = {
        variable
        for variable, value in zip(inner.invars, values, strict=True)
        if isinstance(value, Factored) and value.terms
    }

    def is_reached(atom: Any) -> bool:
        return not isinstance(atom, compat.Literal) and atom in reached

    for equation in inner.eqns:
        name = equation.primitive.name
        moved = name in context.rules and name not in _PRODUCTS
        if moved and any(map(is_reached, equation.invars)):
            reached.update(equation.outvars)
    return any(map(is_reached, inner.outvars))


# Primitives whose results are activations.
_PRODUCTS = frozenset(
    {"conv_general_dilated", "dot_general", "ragged_dot_general", "reduce_sum"}
)
RULES = {"scan": scan, "while": while_, "cond": cond}
