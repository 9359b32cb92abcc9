"""Evaluates a jaxpr in which some values are factored."""

from collections.abc import Sequence
from typing import Any

from lora_jax import _compat
from lora_jax.transform import _deferred
from lora_jax.transform._context import Context, Frame
from lora_jax.transform._deferred import Deferred
from lora_jax.transform._factored import Factored, NotFactorableError, is_factored, merge

# Rows of a table stay factored through these, so that a product with them is factored
# (a softmax over sampled classes); everything else gets them merged.
_KEEP_GATHERED = frozenset(
    {
        "broadcast_in_dim",
        "closed_call",
        "convert_element_type",
        "dot_general",
        "jit",
        "reshape",
        "slice",
        "squeeze",
        "stop_gradient",
        "transpose",
    }
)

# A vector of a weight, which is merged as well, stays factored through these: where its
# gradient is stopped, that of its factors may not be.
_KEEP_VECTOR = frozenset(
    {
        "convert_element_type",
        "dynamic_slice",
        "gather",
        "reshape",
        "slice",
        "squeeze",
        "stop_gradient",
        "transpose",
    }
)

# In the body of a call the axes of a weight are followed through these too.
_ENTRYWISE = frozenset(
    {
        "abs",
        "add",
        "ceil",
        "clamp",
        "convert_element_type",
        "div",
        "exp",
        "exp2",
        "floor",
        "integer_pow",
        "logistic",
        "max",
        "min",
        "mul",
        "pow",
        "round",
        "rsqrt",
        "select_n",
        "sign",
        "sqrt",
        "square",
        "sub",
        "tanh",
    }
)


def evaluate(
    context: Context, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]
) -> list[Any]:
    """The outputs of a jaxpr, any of which may be factored."""
    frame, outer = Frame(), context.frame
    frame.values.update(zip(jaxpr.constvars, constants, strict=True))
    frame.values.update(zip(jaxpr.invars, arguments, strict=True))
    context.frame = frame
    try:
        for equation in jaxpr.eqns:
            values = [frame.read(atom) for atom in equation.invars]
            with _compat.at_equation(equation):
                out = _apply(context, equation, values)
            # A rule may return its only result alone, also where JAX has it in a list.
            outputs = out if isinstance(out, list | tuple) else [out]
            frame.values.update(zip(equation.outvars, outputs, strict=True))
    finally:
        context.frame = outer
    return [frame.read(atom) for atom in jaxpr.outvars]


def evaluate_closed(context: Context, jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
    """`evaluate` for a jaxpr that has its constants with it."""
    inner, constants = _compat.open_jaxpr(jaxpr)
    return evaluate(context, inner, constants, arguments)


def _apply(context: Context, equation: Any, values: list[Any]) -> Any:
    """What the equation gives: by its rule, or with its operands merged."""
    frame = context.frame
    if not any(map(is_factored, values)):
        if equation.primitive.name == "broadcast_in_dim":
            frame.broadcasts[equation.outvars[0]] = equation
        return _compat.bind(equation, values)
    values = _merge_gathered(context, equation, values)
    if not any(map(is_factored, values)):
        return _compat.bind(equation, values)
    rule = context.rules.get(equation.primitive.name)
    reason = "there is no low-rank rule for it"
    if rule is not None:
        context.callers.append(equation)
        try:
            return _settled(context, equation, rule(context, equation, *values))
        except NotFactorableError as error:
            reason = str(error)
        finally:
            context.callers.pop()
    if context.probing:
        return _probe_inside(context, equation, values, reason)
    dense = [
        value.base if isinstance(value, Factored) and not value.terms else value
        for value in values
    ]
    return _deferred.use(equation, context.merge_all(dense, equation, reason))


def _probe_inside(context: Context, equation: Any, values: list[Any], reason: str) -> Any:
    """Records a use that is merged, with the roles that the body of a call says.

    A custom derivative, for one, is about the dense weight, but the function that it is
    of says what the axes are. The rule of the derivative is not looked at.
    """
    roles: dict[Any, list[Any]] = {}
    if (body := _compat.body_of(equation)) is not None:
        if context.reading:
            return evaluate(context, *body, values)
        with context.aside() as inside:
            evaluate(context, *body, values)
        for sighting in inside:
            if sighting.roles:
                roles.setdefault(sighting.name, []).append(sighting.roles)
    weights = [value for value in values if isinstance(value, Factored)]
    for value in weights:
        context.see_merged(value, equation, reason, roles)
    dense = [merge(value) if isinstance(value, Factored) else value for value in values]
    out = _deferred.use(equation, dense)
    if not context.reading or equation.primitive.name not in _ENTRYWISE:
        return out
    # Merged or not, the axes are what they were: of a weight that is quantized, say.
    (base,) = out if isinstance(out, list | tuple) else [out]
    same = [value for value in weights if value.shape == base.shape]
    terms = tuple(term for value in same for term in value.terms)
    return Factored(base, terms) if terms else base


def _merge_gathered(context: Context, equation: Any, values: list[Any]) -> list[Any]:
    """Merges rows of tables, once for all their uses, where they do not stay factored."""
    frame = context.frame
    name = equation.primitive.name
    products = name == "dot_general" and all(map(is_factored, values))
    keep_gathered = name in _KEEP_GATHERED and not products
    for atom, value in zip(equation.invars, values, strict=True):
        if not isinstance(value, Factored):
            continue
        rows = value.gathered and not keep_gathered
        if rows or (name not in _KEEP_VECTOR and context.is_vector(value)):
            frame.values[atom] = merge(value)
    return [frame.read(atom) for atom in equation.invars]


def _settled(context: Context, equation: Any, out: Any) -> Any:
    """Outputs of a rule, of which those stay factored that are of use so.

    Those that are vectors by now are merged: they cost no more than a factor. A weight
    without an adapter that is dense by now is an array.
    """
    moved = equation.primitive.name in _KEEP_VECTOR
    if context.probing:
        return out
    if not isinstance(out, list | tuple):
        return _settled(context, equation, [out])[0]
    settled = []
    for value in out:
        if isinstance(value, Factored) and not value.terms:
            value = value if isinstance(value.base, Deferred) else merge(value)
        elif isinstance(value, Factored) and context.is_vector(value):
            context.see(value, equation)
            value = value if moved else merge(value)
        settled.append(value)
    return settled
