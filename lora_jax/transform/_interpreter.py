"""Evaluates a jaxpr with factored values."""

from collections.abc import Sequence
from typing import Any

from lora_jax._core import compat
from lora_jax.plan.parts import LOOKUP, PRODUCT
from lora_jax.transform import _deferred, _slots
from lora_jax.transform._context import Context, Frame, changed
from lora_jax.transform._deferred import Deferred
from lora_jax.transform._dense import merge
from lora_jax.transform._factored import Factored, is_factored
from lora_jax.transform._moves import named
from lora_jax.transform._parameters import NotFactorableError, no_rule, parameter
from lora_jax.transform._row_places import Taken

# Rows of a table stay factored through these primitives; others get the merged rows.
_KEEP_GATHERED = named(lambda row: row.keeps_rows) | {"closed_call", "dot_general", "jit"}

# Rows looked up by constants may be a weight with reordered rows. They stay factored
# through all rules except these. While axes are inferred, all rows do.
_END_GATHERED = frozenset({"add", "add_any", "reduce_sum", "shard_map", "sub"})
# Products of an activation with a kernel. Rows of a table are the activation.
_KERNELS = frozenset({"conv_general_dilated", "ragged_dot_general"})

# Products, and primitives after which the kind of use is still open.
_PRODUCTS = frozenset(
    {"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"}
)
_OPEN = named(lambda row: row.keeps_vectors or row.is_entrywise) | {
    *("broadcast_in_dim", "reshard", "mesh_cast", "sharding_constraint"),
    *("layout_constraint", "jit", "pjit", "closed_call", "core_call", "remat2"),
    *("checkpoint", "scan", "while", "cond", "shard_map", "mul", "div", "pvary"),
    *("pcast", "split", "unstack"),
    *compat.NAMED_CALLS,
}

# Vectors, such as one column of a weight, are merged except for these primitives.
_KEEP_VECTOR = named(lambda row: row.keeps_vectors)


def keeps_rows(name: str, position: int, *, only_rows: bool) -> bool:
    """Whether rows of a table stay factored as an operand of a primitive.

    `only_rows` says that the rows may be a reordered weight, and that all other weights
    among the operands are rows as well.
    """
    anywhere = only_rows and name not in _END_GATHERED
    is_input = position == 0 and name in _KERNELS
    return name in _KEEP_GATHERED or (anywhere and not is_input)


def evaluate(
    context: Context, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]
) -> list[Any]:
    """Evaluates a jaxpr; its arguments and outputs may be factored."""
    frame = Frame(followed=context.followed(jaxpr))
    if context.closed_over_is_constant:
        context.add_constants(constants)
    frame.values.update(zip(jaxpr.constvars, constants, strict=True))
    frame.values.update(zip(jaxpr.invars, arguments, strict=True))
    with changed(context, frame=frame):
        for equation in jaxpr.eqns:
            values = [frame.read(atom) for atom in equation.invars]
            with compat.at_equation(equation):
                out = _apply(context, equation, values)
            # A rule may return a single result without a list.
            outputs = out if isinstance(out, list | tuple) else [out]
            if all(map(context.is_constant_atom, equation.invars, values)):
                context.add_constants(outputs)
            frame.values.update(zip(equation.outvars, outputs, strict=True))
    return [frame.read(atom) for atom in jaxpr.outvars]


def evaluate_closed(context: Context, jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
    """Evaluates a closed jaxpr; see `evaluate`."""
    inner, constants = compat.open_jaxpr(jaxpr)
    return evaluate(context, inner, constants, arguments)


def _apply(context: Context, equation: Any, values: list[Any]) -> Any:
    """The results of an equation: from its rule, or with its operands merged."""
    frame = context.frame
    if equation.primitive.name == "broadcast_in_dim":
        frame.broadcasts[equation.outvars[0]] = equation
    if not any(map(is_factored, values)):
        return _without_weights(context, equation, values)
    values = _merge_gathered(context, equation, values)
    if any(isinstance(value, Factored) and value.has_uses for value in values):
        values = _of_use(context, equation, values)
    if not any(map(is_factored, values)):
        return compat.bind(equation, values)
    rule = context.rules.get(equation.primitive.name)
    reason = no_rule(equation)
    if rule is not None:
        try:
            with context.inside(equation):
                out = _with_rows(values, rule(context, equation, *values))
                return _settled(context, equation, out)
        except NotFactorableError as error:
            reason = str(error)
    dense = [
        value.base if isinstance(value, Factored) and not value.terms else value
        for value in values
    ]
    return _deferred.use(equation, context.merge_all(dense, equation, reason))


def _without_weights(context: Context, equation: Any, values: list[Any]) -> Any:
    """The results of an equation without weights.

    If it takes rows in an order that only the data know, their slots are taken as well.
    """
    places = (
        [] if context.frame.followed is None else map(context.frame.place, equation.outvars)
    )
    new = [
        p.number for p in places if isinstance(p, Taken) and p.number not in context.taken
    ]
    if new and equation.primitive.name == "gather":
        context.taken[new[0]] = _slots.taken(context, equation, values[1])
    elif new and equation.primitive.name == "jit":
        body = parameter(equation, "jaxpr")
        with context.inside(equation):
            out = evaluate_closed(context, body, values)
        _slots.rename_taken(context, equation, body)
        return out
    return compat.bind(equation, values)


def _of_use(context: Context, equation: Any, values: list[Any]) -> list[Any]:
    """The values, with only the terms for the equation's kind of use.

    Values for an equation whose kind of use is still open are unchanged.
    """
    name = equation.primitive.name
    if name in _OPEN:
        return values
    chosen = []
    for i, value in enumerate(values):
        if isinstance(value, Factored) and value.has_uses:
            rows = bool(value.gathered or (value.terms and value.is_thin()))
            if name not in _PRODUCTS and not rows:
                context.refuse_use(value, equation)
            value = value.for_use(_use_of_rows(context, equation, values, i, rows))
            if not value.terms and not isinstance(value.base, Deferred):
                value = merge(value)
        chosen.append(value)
    return chosen


def _use_of_rows(
    context: Context, equation: Any, values: list[Any], position: int, rows: bool = True
) -> str:
    """Which use an operand of an equation is, of a weight or of `rows` of one.

    Rows that a weight multiplies are an input. Data multiplies those that are a weight.
    """
    others = enumerate(zip(equation.invars, values, strict=True))
    is_input = rows and all(
        context.is_constant_atom(*other) for j, other in others if j != position
    )
    is_product = equation.primitive.name in _PRODUCTS and not is_input
    return PRODUCT if is_product else LOOKUP


def _merge_gathered(context: Context, equation: Any, values: list[Any]) -> list[Any]:
    """Merges the rows of tables that do not stay factored, once for all their uses."""
    frame = context.frame
    name = equation.primitive.name
    weights = [value for value in values if isinstance(value, Factored)]
    kinds = {value.gathered for value in weights}
    # Parts of one weight with the same DoRA columns keep them when they are joined.
    joined = name == "concatenate" and any(
        value.columns and not context.is_vector(value) for value in weights
    )
    keep_vectors = joined or name in _KEEP_VECTOR
    for i, (atom, value) in enumerate(zip(equation.invars, values, strict=True)):
        if not isinstance(value, Factored):
            continue
        if name == "dot_general" and len(weights) > 1:
            # Rows are the activation in a product with a weight; see `dot_general`.
            ordered = value.gathered == "constants"
            keep = ordered and kinds == {"constants", "data"}
        else:
            only_rows = value.gathered == "constants" and "" not in kinds
            keep = keeps_rows(name, i, only_rows=only_rows)
        rows = value.gathered and not keep
        if rows or (not keep_vectors and context.is_vector(value)):
            if not rows or value.has_uses:
                use = LOOKUP if rows else _use_of_rows(context, equation, values, i)
                value = value.for_use(use)
                context.see(value, equation)
            frame.values[atom] = merge(value)
    return [frame.read(atom) for atom in equation.invars]


def _with_rows(values: Sequence[Any], out: Any) -> Any:
    """Marks the outputs of a rule as table rows if all weights among `values` are rows."""
    kinds = {value.gathered for value in values if isinstance(value, Factored)}
    if "" in kinds:
        return out
    if isinstance(out, list | tuple):
        return [_with_rows(values, value) for value in out]
    if not isinstance(out, Factored) or out.gathered:
        return out
    return out.replace(gathered="data" if "data" in kinds else "constants")


def _settled(context: Context, equation: Any, out: Any) -> Any:
    """The outputs of a rule; those that later rules can use stay factored.

    Vectors are merged, since a merged vector is no larger than a factor. A weight without
    an adapter becomes an array if it is dense.
    """
    moved = equation.primitive.name in _KEEP_VECTOR
    if not isinstance(out, list | tuple):
        return _settled(context, equation, [out])[0]
    settled = []
    for value in out:
        if isinstance(value, Factored) and not value.terms:
            value = value if isinstance(value.base, Deferred) else merge(value)
        elif isinstance(value, Factored) and context.is_vector(value):
            value = value if moved else value.for_use(LOOKUP)
            context.see(value, equation)
            value = value if moved else merge(value)
        settled.append(value)
    return settled
