"""Which weights have their axes compared with the uses of a function."""

import pytest

from lora_jax.plan import plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.config import LoraConfig
from lora_jax.plan.target import Target, Use

ROLES = {"c": "contracted", "k": "kept", "b": "batch"}


@pytest.mark.parametrize(
    ("shape", "roles", "want"),
    [
        ((5, 4, 6), "bck", False),
        ((5, 4, 6), "kck", False),
        ((5, 4, 6), "bkc", True),
        ((5, 4, 6), "b.k", False),
        ((5, 4, 6), "bcc", True),
        ((5, 1, 6), "bkk", False),
        ((5, 2, 6), "bkk", True),
    ],
)
def test_a_use_that_contradicts_a_plan(shape, roles, want):
    target = Target(shape, "lora", 1, 1.0, 0.0, (1,), (2,), (0,))
    use = Use("dot_general", tuple(ROLES.get(role, "") for role in roles))
    plan = AdapterPlan(LoraConfig(rank=1), {"w": target}, uses={"w": (use,)})
    assert ("w" not in plan_checks.to_be_compared(plan)) == want
