"""The rules for all primitives, by name.

A primitive without a rule gets the merged weight. So a new primitive of JAX may cost speed
until it has a rule, but results stay correct.
"""

import functools
from typing import Any

import jax

from lora_jax._core import compat
from lora_jax.transform import (
    _rules_arithmetic,
    _rules_calls,
    _rules_convolution,
    _rules_gather,
    _rules_loops,
    _rules_products,
    _rules_spmd,
    _rules_structure,
    _stated,
)
from lora_jax.transform._context import Context, Rule
from lora_jax.transform._deferred import Deferred
from lora_jax.transform._factored import mesh_axes, retyped


def _on_any_mesh(rule: Rule) -> Rule:
    """Extends a rule to meshes with explicit axes.

    The rule runs with automatic axes, so that it need not give shardings for factors. Its
    results then get the shardings of the program; see `retyped` for factors and columns.
    """

    @functools.wraps(rule)
    def run(context: Context, equation: Any, *values: Any) -> Any:
        mesh = compat.explicit_mesh(equation)
        if mesh is None:
            return rule(context, equation, *values)
        with compat.on_mesh(compat.automatic_mesh(mesh)):
            out = rule(context, equation, *_as_automatic(values, mesh))
        outputs = out if isinstance(out, list | tuple) else [out]
        kinds = [atom.aval for atom in equation.outvars]
        names = mesh_axes(values, mesh)
        return [retyped(v, kind, names) for v, kind in zip(outputs, kinds, strict=True)]

    return run


def _as_automatic(values: Any, mesh: Any) -> Any:
    return jax.tree.map(
        lambda x: compat.as_automatic(x, mesh),
        values,
        is_leaf=lambda x: isinstance(x, Deferred),
    )


_CALLS = {
    **_rules_calls.RULES,
    **_rules_loops.RULES,
    **_rules_spmd.RULES,
    "optimization_barrier": _rules_arithmetic.optimization_barrier,
}
_OTHERS = {
    **_rules_structure.RULES,
    **_rules_arithmetic.RULES,
    **_rules_products.RULES,
    **_rules_convolution.RULES,
    **_rules_gather.RULES,
}
# Rules of calls are not wrapped: the equations in their bodies have their own meshes.
RULES: dict[str, Rule] = {name: _on_any_mesh(rule) for name, rule in _OTHERS.items()}
RULES |= _CALLS
_STATED = _on_any_mesh(_stated.rule)
RULES |= {name: _stated.unless_stated(RULES[name], _STATED) for name in compat.NAMED_CALLS}
