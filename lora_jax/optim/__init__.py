"""Optimizers for adapters, as optax transformations."""

from lora_jax.optim.freezing import trainable_and_frozen as trainable_and_frozen
from lora_jax.optim.labels import adapter_labels as adapter_labels
from lora_jax.optim.labels import weight_decay_mask as weight_decay_mask
from lora_jax.optim.optimizers import lora_fa as lora_fa
from lora_jax.optim.optimizers import lora_plus as lora_plus
from lora_jax.optim.preconditioning import scale_by_riemannian as scale_by_riemannian
