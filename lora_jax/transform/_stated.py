"""Rules for functions that `LoraConfig(products=...)` states to be products.

Such a function has a custom derivative, or calls a kernel. It is called with the frozen
weight, and the product of the activation with the low-rank update is added to its result.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import compat, tree_paths
from lora_jax.plan.parts import LOOKUP, PRODUCT
from lora_jax.plan.products import Names, StatementError, fit
from lora_jax.transform import _deferred, _rules_products
from lora_jax.transform._context import Context
from lora_jax.transform._deferred import form
from lora_jax.transform._dense import merge
from lora_jax.transform._factored import base_of, is_factored
from lora_jax.transform._finder import Finder, dense
from lora_jax.transform._parameters import NotFactorableError
from lora_jax.transform._tracked import Tracked

_NO_PART = "products states that the operand with the weight takes no part in the product"


class Call:
    """A call of a function that is stated to be a product.

    Attributes:
        name: of the function.
        equation: the call in the program.
        stated: the stated product.
        fitted: the stated product, fitted to the shapes of this call.
    """

    def __init__(self, products: Mapping[str, str], equation: Any):
        self.name, self.equation = compat.function_name(equation), equation
        text = tree_paths.look_up(products, self.name, None)
        self.stated, self.fitted = fit(text, self.name, *compat.call_shapes(equation))

    def check_weight(self, weight: int) -> None:
        """Checks that the operand at a position may be the weight.

        Raises:
            NotFactorableError: if it may not, or a dtype has no low-rank product.
        """
        if self.stated.is_grouped and len(self.fitted.operands[weight] or ()) != 3:
            raise NotFactorableError("the weight is not the operand with the groups")
        dtype = self.equation.outvars[self.fitted.position].aval.dtype
        if _is_small(dtype) or not jnp.issubdtype(dtype, jnp.inexact):
            raise NotFactorableError(f"it returns {dtype}, and no update can be added")
        for other in self.others(weight)[:1]:
            dtype = self.equation.invars[other].aval.dtype
            if _is_small(dtype):
                raise NotFactorableError(f"the other operand is {dtype}")

    def others(self, weight: int) -> list[int]:
        """The positions of the other operands: the activation first, then group sizes."""
        parts = [i for i, names in enumerate(self.fitted.operands) if names is not None]
        by_size = sorted(parts, key=lambda i: -len(self.fitted.operands[i] or ()))
        return [i for i in by_size if i != weight]

    @property
    def order(self) -> list[int]:
        """The order of the weight's axes in the result of a function that rounds it."""
        (names,) = (own for own in self.fitted.operands if own is not None)
        return [names.index(name) for name in self.fitted.output]


def _is_small(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 2


def unless_stated(rule: Callable[..., Any], stated: Callable[..., Any]) -> Any:
    """A rule or step for calls: `stated` for functions that are stated to be products."""

    @functools.wraps(rule)
    def choose(state: Any, equation: Any, *values: Any) -> Any:
        name = compat.function_name(equation)
        is_stated = tree_paths.first_match(state.products, name) is not None
        return (stated if is_stated else rule)(state, equation, *values)

    return choose


def rule(context: Context, equation: Any, *values: Any) -> list[Any]:
    """Calls a stated function, and adds the low-rank update to its result."""
    call = Call(context.products, equation)
    operands, i = _with_one_weight(context, call, values)
    if i is None:
        return _deferred.use(equation, list(map(base_of, operands)))
    call.check_weight(i)
    k = call.fitted.position
    results: list[Any] = []

    def frozen(operands: Sequence[Any]) -> jax.Array:
        out = _deferred.bind(equation, [base_of(value) for value in operands])
        results.extend(out if isinstance(out, list | tuple) else [out])
        return results[k]

    product = _apply(context, equation, call, i, operands, frozen)
    return [*results[:k], product, *results[k + 1 :]]


def _with_one_weight(
    context: Context, call: Call, values: Sequence[Any]
) -> tuple[list[Any], int | None]:
    """The operands, with all adapted weights merged except the largest, and its position.

    Merges of smaller weights and of table rows are not reported, as for other products.
    """
    operands: list[Any] = list(values)
    for i, names in enumerate(call.fitted.operands):
        if is_factored(operands[i]) and operands[i].gathered:
            operands[i] = merge(operands[i].for_use(LOOKUP))
        if names is None and is_factored(operands[i]) and operands[i].terms:
            operands[i] = context.merge(operands[i], call.equation, _NO_PART)
        if is_factored(operands[i]) and not call.stated.is_rounding:
            operands[i] = operands[i].for_use(PRODUCT)
    weights = [i for i, v in enumerate(operands) if is_factored(v) and v.terms]
    if not weights:
        return operands, None
    *smaller, largest = sorted(weights, key=lambda i: operands[i].base.size)
    for i in smaller:
        context.see(operands[i], call.equation)
        context.check_no_dropout(operands[i])
        operands[i] = merge(operands[i])
    return operands, largest


def _apply(
    context: Context,
    equation: Any,
    call: Call,
    i: int,
    values: list[Any],
    frozen: Callable[[Sequence[Any]], jax.Array],
) -> Any:
    """The product with the weight at position `i`; `frozen` computes that of its base."""
    f = values[i]
    if call.stated.is_rounding:
        order = call.order
        return f.map(frozen(values), lambda p: lax.transpose(p, order))
    j, *rest = call.others(i)
    x = form(base_of(values[j]))

    def base(x: jax.Array) -> jax.Array:
        return frozen([x if n == j else value for n, value in enumerate(values)])

    roles = call.stated.roles(call.fitted, i)
    if call.stated.is_grouped:
        context.see(f, equation, roles)
        order = [roles.index(role) for role in ("batch", "contracted", "kept")]
        shape = jax.ShapeDtypeStruct([f.shape[axis] for axis in order], f.dtype)
        turned = f.map(shape, lambda p: lax.transpose(p, order))
        (sizes,) = (values[n] for n in rest)
        return _rules_products.grouped_product(
            context, equation, turned, x, sizes, base, position=j
        )
    of_f, of_x = (call.fitted.operands[n] or () for n in (i, j))
    ordered = _as_dot_general(of_x, of_f, call.fitted.output)
    order = [call.fitted.output.index(name) for name in ordered]
    f_names, x_names, out_names = (
        tuple((name,) for name in names) for names in (of_f, of_x, ordered)
    )
    out = _rules_products.multiply(
        context,
        equation,
        f,
        f_names,
        x,
        x_names,
        out_names,
        position=j,
        roles=roles,
        form_base=lambda x: lax.transpose(base(x), order),
    )
    return lax.transpose(out, [ordered.index(name) for name in call.fitted.output])


def _as_dot_general(x: Names, weight: Names, out: Names) -> Names:
    """The axes of a product in the order of `lax.dot_general`."""
    batch = tuple(name for name in out if name in x and name in weight)
    rest = tuple(name for name in (*x, *weight) if name in out and name not in batch)
    return (*batch, *rest)


def step(finder: Finder, equation: Any, *values: Any) -> list[Any]:
    """Records the stated roles of the axes of weights."""
    call = Call(finder.products, equation)
    out, k = dense(equation), call.fitted.position
    for i, value in enumerate(values):
        if not isinstance(value, Tracked):
            continue
        if value.gathered:
            finder.uses.use_rows(value)
            continue
        if call.fitted.operands[i] is None:
            finder.merge(value, equation, _NO_PART)
            continue
        call.check_weight(i)
        if call.stated.is_rounding:
            order, shape = call.order, equation.outvars[k].aval.shape
            out[k] = value.moved([(order.index(n),) for n in range(value.ndim)], shape)
            continue
        roles = call.stated.roles(call.fitted, i)
        _check_body(finder, equation, call, list(values), value, roles)
        finder.uses.see_product(value, equation, roles, values[call.others(i)[0]])
    return out


def _check_body(
    finder: Finder,
    equation: Any,
    call: Call,
    values: list[Any],
    value: Tracked,
    roles: Sequence[str],
) -> None:
    """Raises if the products in the body of the function contradict the statement."""
    seen: dict[str, list[dict[int, str]]] = {}
    if (body := compat.body_of(equation)) is not None:
        finder.read_aside(body[0], values, seen)
    for weight, stated in value.roles(roles).items():
        used = [own for own in seen.get(weight, ()) if {*_SIDES} <= {*own.values()}]
        if used and all(_contradicts(stated, own) for own in used):
            listed = ", ".join(used[0].get(axis, "unknown") for axis in sorted(stated))
            said = ", ".join(stated[axis] for axis in sorted(stated))
            raise StatementError(
                f"products states that {call.name!r} is {call.stated.text!r}, so that the "
                f"axes of {weight!r} are {said}. In the function they are {listed}."
            )


_SIDES = ("contracted", "kept")


def _contradicts(stated: Mapping[int, str], used: Mapping[int, str]) -> bool:
    pairs = ((role, used.get(axis)) for axis, role in stated.items())
    return any({*pair} == {*_SIDES} for pair in pairs)
