"""Writes blocks.npz: random blocks of each type, and what the package gguf makes of them.

Run once, in a virtual environment of its own:

    pip install gguf==0.19.0 numpy==2.4.6
    python make.py

The first scales of each type are zeros, subnormal, infinite, NaN and the largest numbers.
"""

import pathlib

import gguf
import numpy as np

SCALES = {  # where the float16 numbers of a block are
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "IQ4_NL": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
SPECIAL = [0, -0.0, 2**-24, -3 * 2**-24, 2**-14, 65504, -65504, np.inf, -np.inf, np.nan]


def blocks(name: str, count: int, seed: int) -> np.ndarray:
    """Random blocks, `(count, bytes)`; `count` is at least twice the special scales."""
    rng = np.random.default_rng(seed)
    n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    made = rng.integers(0, 256, (count, n_bytes), dtype=np.uint8)
    for place in SCALES[name]:
        scales = (0.02 * rng.standard_normal(count)).astype(np.float16)
        scales[: len(SPECIAL)] = rng.permutation(SPECIAL).astype(np.float16)
        made[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return made


def main() -> None:
    """Writes `<type>/blocks` and `<type>/values` of each type."""
    arrays = {}
    for seed, name in enumerate(SCALES):
        made = blocks(name, 24, seed)
        with np.errstate(invalid="ignore"):
            values = gguf.dequantize(made, gguf.GGMLQuantizationType[name])
        arrays |= {f"{name}/blocks": made, f"{name}/values": values}
    np.savez_compressed(pathlib.Path(__file__).with_name("blocks.npz"), **arrays)


if __name__ == "__main__":
    main()
