"""The rules for all primitives, by name.

What is not here is merged where it is used. A primitive that a new JAX brings thus costs
speed until it has a rule, never correctness.
"""

from lora_jax.transform import (
    _rules_arithmetic,
    _rules_calls,
    _rules_convolution,
    _rules_gather,
    _rules_loops,
    _rules_products,
    _rules_spmd,
    _rules_structure,
)
from lora_jax.transform._context import Rule

RULES: dict[str, Rule] = {
    **_rules_structure.RULES,
    **_rules_arithmetic.RULES,
    **_rules_products.RULES,
    **_rules_convolution.RULES,
    **_rules_gather.RULES,
    **_rules_calls.RULES,
    **_rules_loops.RULES,
    **_rules_spmd.RULES,
}
