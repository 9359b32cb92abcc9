"""Draws the pictures of this folder from the adapters of the language-model example.

python docs/examples/smollm.py --out run
python docs/pictures/draw.py run/adapters
"""

import pathlib
import sys

import lora_jax

FOLDER = pathlib.Path(__file__).parent


def main(directory: str) -> None:
    """Draws the norms and the spectra of the updates of some adapters."""
    adapters, plan = lora_jax.load_adapters(directory)
    lora_jax.plot_plan(plan, adapters).savefig(FOLDER / "norms.png", dpi=80)
    lora_jax.plot_spectra(adapters, plan).savefig(FOLDER / "spectra.png", dpi=80)


if __name__ == "__main__":
    main(sys.argv[1])
