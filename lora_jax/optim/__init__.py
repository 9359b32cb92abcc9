"""Optimizers for adapters, as optax transformations."""

from lora_jax.optim.freezing import trainable_and_frozen
from lora_jax.optim.invariant_steps import lora_rite, scale_by_lora_rite
from lora_jax.optim.labels import adapter_labels, weight_decay_mask
from lora_jax.optim.optimizers import lora_fa, lora_plus
from lora_jax.optim.preconditioning import scale_by_riemannian
from lora_jax.optim.slots import per_slot

__all__ = [
    "adapter_labels",
    "lora_fa",
    "lora_plus",
    "lora_rite",
    "per_slot",
    "scale_by_lora_rite",
    "scale_by_riemannian",
    "trainable_and_frozen",
    "weight_decay_mask",
]


def __dir__() -> list[str]:
    return __all__
