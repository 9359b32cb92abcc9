"""The command line: `lora-jax`, which is `python -m lora_jax` too."""

from lora_jax.cli._main import main as main
