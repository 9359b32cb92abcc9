"""Draws the pictures of this folder from a run of the language-model example.

python docs/examples/smollm.py --out run --json run/summary.json
python docs/pictures/draw.py run
"""

import json
import pathlib
import sys

import lora_jax

FOLDER = pathlib.Path(__file__).parent
sys.path.append(str(FOLDER.parent / "examples"))


def main(run: pathlib.Path) -> None:
    """Draws the norms and the spectra of the updates, and the loss."""
    import smollm

    adapters, plan = lora_jax.load_adapters(run / "adapters")
    lora_jax.plot_plan(plan, adapters).savefig(FOLDER / "norms.png", dpi=80)
    lora_jax.plot_spectra(adapters, plan).savefig(FOLDER / "spectra.png", dpi=80)
    smollm.plot(json.loads((run / "summary.json").read_text()), FOLDER / "loss.png")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
