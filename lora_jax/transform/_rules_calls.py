"""Rules for calls of a jaxpr: `jit`, `checkpoint`, `compute_on`, custom derivatives."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax

from lora_jax._core import compat
from lora_jax.plan.axis_roles import Sighting
from lora_jax.plan.products import suggest
from lora_jax.transform import _norms
from lora_jax.transform._context import Context
from lora_jax.transform._deferred import Deferred
from lora_jax.transform._factored import Factored, Term, base_of, is_factored, with_base
from lora_jax.transform._interpreter import evaluate, evaluate_closed
from lora_jax.transform._parameters import NotFactorableError, parameter, refuse

# A jitted function with fewer equations is evaluated in place.
_SMALL = 24


class _Call:
    """A jitted function, traced once for all calls with values of the same structure.

    Inside the function, weights are identified by numbers instead of paths. So calls with
    different weights share one trace.
    """

    def __init__(self, context: Context, jaxpr: Any, name: str, operands: Sequence[Any]):
        self.context = context
        self.jaxpr = jaxpr  # kept alive, since its id is part of the cache key
        self.weights: Mapping[Any, str | int] = {}
        self.sightings: list[Sighting] = []
        self.was_traced = False

        def call(key, slots, values):
            self.was_traced = True
            context.enter(operands, values)
            inside = context.renamed(self.weights), context.using_slots(slots)
            with inside[0] as self.sightings, inside[1], context.using_key(key):
                return evaluate(context, jaxpr, [], values)

        call.__name__ = call.__qualname__ = name
        self.function = jax.jit(call)

    def __call__(
        self, key: jax.Array | None, values: Sequence[Any], weights: Mapping[int, str | int]
    ) -> list[Any]:
        """Calls the function for `weights`, by number, and records their uses."""
        self.weights, self.was_traced = weights, False
        out = self.function(key, self.context.slots, values)
        for sighting in self.sightings:
            sighting = sighting._replace(name=weights[int(sighting.name)])
            if self.was_traced:  # tracing reported the merges already
                self.context.sightings.append(sighting)
            else:
                self.context.record(sighting)
        return out


def jit(context: Context, equation: Any, *values: Any) -> list[Any]:
    """Evaluates a small jitted function in place; a larger one stays jitted.

    Its shardings become constraints. Donations are dropped, since the operands belong to
    the adapted function.
    """
    if (axis := _norms.norm_axis(equation)) is not None:
        return _norms.adapted(equation, axis, *values)
    jaxpr, constants = compat.open_jaxpr(parameter(equation, "jaxpr"))
    operands = _constrained(values, equation.params.get("in_shardings"))
    name = str(equation.params.get("name") or "call")
    if constants or len(jaxpr.eqns) < _SMALL:
        with jax.named_scope(name):
            out = evaluate(context, jaxpr, constants, operands)
    else:
        out = _call_once_traced(context, jaxpr, name, operands)
    return _constrained(out, equation.params.get("out_shardings"))


def _constrained(values: Sequence[Any], shardings: Sequence[Any] | None) -> list[Any]:
    """The values with the shardings of a `jit`; a factored value's frozen weight alone."""
    if shardings is None:
        return list(values)
    out = []
    for value, sharding in zip(values, shardings, strict=True):
        # Quantized weights keep their sharding.
        dense = not isinstance(base_of(value), Deferred)
        if isinstance(sharding, jax.sharding.Sharding) and dense:
            base = lax.with_sharding_constraint(base_of(value), sharding)
            value = with_base(value, base)
        out.append(value)
    return out


def _call_once_traced(
    context: Context, jaxpr: Any, name: str, values: Sequence[Any]
) -> list[Any]:
    """Calls a jitted function with the trace that equal calls share, such as layers."""
    numbers: dict[str | int, int] = {}
    for value in filter(is_factored, values):
        for weight in value.names:
            numbers.setdefault(weight, len(numbers))
    weights = {number: weight for weight, number in numbers.items()}
    operands = [_renamed(value, numbers) for value in values]
    key = context.make_key()
    constant = tuple(map(context.is_constant, values))
    known = id(jaxpr), jax.tree.structure((key, operands)), constant
    known += (id(context.followed(jaxpr)),)
    if known not in context.calls:
        context.calls[known] = _Call(context, jaxpr, name, values)
    out = context.calls[known](key, operands, weights)
    return [_renamed(value, weights) for value in out]


def _renamed(value: Any, names: dict[Any, Any]) -> Any:
    """The value with its weights renamed."""
    if not isinstance(value, Factored):
        return value

    def rename(term: Term) -> Term:
        return term.named(tuple(names[name] for name in term.label.names))

    return value.replace(terms=tuple(map(rename, value.terms)))


def checkpoint(context: Context, equation: Any, *values: Any) -> list[Any]:
    """Evaluates the body inside `jax.checkpoint`, with the same policy."""
    jaxpr, options = of_checkpoint(equation)
    operands = list(values)
    if equation.params.get("differentiated") and options["prevent_cse"]:
        # The function differentiates a checkpoint. JAX has a barrier in the backward pass;
        # without it, the compiler would undo the recomputation.
        operands = lax.optimization_barrier(operands)

    def body(key, inside):
        context.enter(values, inside)
        with context.using_key(key):
            return evaluate_closed(context, jaxpr, inside)

    return jax.checkpoint(body, **options)(context.make_key(), operands)


def of_checkpoint(equation: Any) -> tuple[Any, dict[str, Any]]:
    """The body of a checkpoint, and the options of `jax.checkpoint`."""
    names = "policy", "prevent_cse"
    if "_prim" not in equation.params:
        options = {name: parameter(equation, name) for name in names}
        return parameter(equation, "jaxpr"), options
    call = parameter(equation, "_prim")  # where `jax_remat3` is set
    if type(call).__name__ != "RematTraced":
        raise NotFactorableError(f"there is no low-rank rule for {type(call).__name__}")
    return call.jaxpr, {name: getattr(call, name) for name in names}


def compute_on(context: Context, equation: Any, *values: Any) -> list[Any]:
    """Evaluates the body on the same device type; weights that it returns are merged."""

    def body(key, inside):
        context.enter(values, inside)
        with context.using_key(key):
            out = evaluate_closed(context, parameter(equation, "jaxpr"), inside)
            return tuple(context.merge_all(out, equation, "compute_on returns it"))

    return list(compat.compute_on(body, equation)(context.make_key(), list(values)))


def closed_call(context: Context, equation: Any, *values: Any) -> list[Any]:
    """Evaluates the body in place."""
    return evaluate_closed(context, parameter(equation, "call_jaxpr"), values)


def _refuse_unless_stated(reason: str) -> Callable[..., Any]:
    """A rule that refuses a call, and says how to state what the call multiplies."""

    def rule(context: Any, equation: Any, *values: Any) -> Any:
        name = compat.function_name(equation)
        weights = [i for i, value in enumerate(values) if context.is_weight(value)]
        stated = suggest(*compat.call_shapes(equation), weights)
        raise NotFactorableError(
            reason.format(name=repr(name))
            + f". If {name!r} multiplies or rounds the weight, state that: "
            f"LoraConfig(products={{{name!r}: {stated or '...'!r}}})"
        )

    return rule


_KERNEL = (
    "it is a kernel or a callback, so there is no low-rank rule for it and no body to read "
    "the axes from"
)
_KERNELS = ("pallas_call", "ffi_call")
_CALLBACKS = ("pure_callback", "io_callback", "custom_call")
# The user's derivative rule expects the dense weight.
_DERIVATIVE = "the custom derivative of {name} expects the dense weight"
_DERIVATIVES = ("custom_jvp_call", "custom_vjp_call")
REFUSED = {
    **dict.fromkeys(_CALLBACKS, refuse(_KERNEL)),
    **dict.fromkeys(_KERNELS, _refuse_unless_stated(_KERNEL)),
    **dict.fromkeys(_DERIVATIVES, _refuse_unless_stated(_DERIVATIVE)),
}

RULES = {
    **REFUSED,
    "jit": jit,
    "checkpoint": checkpoint,
    "remat2": checkpoint,
    "call_hi_primitive": checkpoint,
    "closed_call": closed_call,
    "compute_on": compute_on,
}
