"""What the contestants of `bench_field.py` have in common: sizes, names, arrays.

Every worker imports this, in whichever environment it runs: it needs NumPy and safetensors.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

KERNELS = ("query", "key", "value", "output", "up", "down")
LEARNING_RATE = 1e-3
NORM_EPSILON = 1e-6
CHECKED_STEPS = 4
"""The loss of the last of them is the one after three updates."""


class Kind(NamedTuple):
    """What a contestant is.

    Attributes:
        module: the module that makes it.
        baseline: the frozen step of the same framework.
        trains: `"nothing"`, `"lora"`, `"dora"` or `"full"`. Contestants that train the same
            have the same losses.
    """

    module: str
    baseline: str
    trains: str

    @property
    def environment(self) -> str:
        """Which environment it runs in."""
        return "torch" if self.module == "_field_torch" else "jax"


FROZEN, FROZEN_LINEN, FROZEN_NNX, FROZEN_TORCH = (
    "frozen",
    "frozen, linen",
    "frozen, nnx",
    "frozen, torch",
)
CONTESTANTS = {
    FROZEN: Kind("_field_plain", FROZEN, "nothing"),
    "adapt LoRA": Kind("_field_plain", FROZEN, "lora"),
    "by hand LoRA": Kind("_field_plain", FROZEN, "lora"),
    "textbook LoRA": Kind("_field_plain", FROZEN, "lora"),
    "merge every step": Kind("_field_plain", FROZEN, "lora"),
    "adapt DoRA": Kind("_field_plain", FROZEN, "dora"),
    "by hand DoRA": Kind("_field_plain", FROZEN, "dora"),
    "full fine-tuning": Kind("_field_plain", FROZEN, "full"),
    FROZEN_LINEN: Kind("_field_linen", FROZEN_LINEN, "nothing"),
    "adapt LoRA, linen": Kind("_field_linen", FROZEN_LINEN, "lora"),
    "qwix LoRA, linen": Kind("_field_qwix", FROZEN_LINEN, "lora"),
    FROZEN_NNX: Kind("_field_nnx", FROZEN_NNX, "nothing"),
    "adapt LoRA, nnx": Kind("_field_nnx", FROZEN_NNX, "lora"),
    "nnx.LoRA": Kind("_field_nnx", FROZEN_NNX, "lora"),
    FROZEN_TORCH: Kind("_field_torch", FROZEN_TORCH, "nothing"),
    "torch peft LoRA": Kind("_field_torch", FROZEN_TORCH, "lora"),
    "torch peft DoRA": Kind("_field_torch", FROZEN_TORCH, "dora"),
    "torch full fine-tuning": Kind("_field_torch", FROZEN_TORCH, "full"),
}


class Contestant(NamedTuple):
    """A training step that can be called again and again.

    Attributes:
        step: runs one, waits for all of it and returns the loss before its update.
        costs: `"trained"` parameters, `"state_bytes"` of the optimizer, and where there is
            a compiler to ask `"temp_bytes"`, `"argument_bytes"` and `"flops"`.
    """

    step: Callable[[], float]
    costs: Callable[[], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of the model and of its input, and the file with the arrays.

    Attributes:
        dtype: of weights and input; adapters are float32. Their `alpha` is the rank, so
            that peers without a scale train the same.
        threads: what a library may start of its own; 0 leaves that to the library.
    """

    layers: int
    width: int
    heads: int
    batch: int
    length: int
    rank: int
    dtype: str
    threads: int
    file: str

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of the weights of a layer, `(in, out)`."""
        shapes = dict.fromkeys(KERNELS, (self.width, self.width))
        hidden = 4 * self.width
        return shapes | {"up": (self.width, hidden), "down": (hidden, self.width)}

    def to_json(self) -> str:
        """As one argument of a command."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Case":
        """The case that `to_json` wrote."""
        return cls(**json.loads(text))


def kernel_name(layer: int, name: str) -> str:
    """Name of a weight in the file."""
    return f"layers.{layer}.{name}"


def factor_name(layer: int, name: str) -> str:
    """Name of the `A` of a weight in the file, `(in, rank)`; every `B` starts as zeros."""
    return f"layers.{layer}.{name}.A"


def write_arrays(case: Case) -> None:
    """Draws weights, factors, input and target, and writes them to the file of the case."""
    draw = np.random.default_rng(0)
    dtype = _dtype(case.dtype)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for i in range(case.layers):
        for name, shape in case.shapes.items():
            normal = draw.standard_normal(shape, "float32") / math.sqrt(shape[0])
            arrays[kernel_name(i, name)] = normal.astype(dtype)
            bound = 1 / math.sqrt(shape[0])
            factor = draw.uniform(-bound, bound, (shape[0], case.rank))
            arrays[factor_name(i, name)] = factor.astype("float32")
    for name in ("x", "target"):
        shape = case.batch, case.length, case.width
        arrays[name] = draw.standard_normal(shape, "float32").astype(dtype)
    pathlib.Path(case.file).parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(arrays, case.file)


def _dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes  # comes with JAX, which the one who writes has

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
