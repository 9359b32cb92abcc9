"""Writes digits.npz: 900 images of handwritten digits, and what they show.

Run once, in a virtual environment of its own:

    pip install scikit-learn==1.9.1
    python make.py
"""

import pathlib

import numpy as np
from sklearn.datasets import load_digits

COUNT = 900


def main() -> None:
    """Takes the first images of scikit-learn's copy, whose pixels are 0 to 16."""
    digits = load_digits()
    target = pathlib.Path(__file__).with_name("digits.npz")
    np.savez_compressed(
        target,
        images=digits.images[:COUNT].astype(np.uint8),
        labels=digits.target[:COUNT].astype(np.uint8),
    )


if __name__ == "__main__":
    main()
