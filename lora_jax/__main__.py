"""`python -m lora_jax` is the command line `lora-jax`."""

import sys

from lora_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
