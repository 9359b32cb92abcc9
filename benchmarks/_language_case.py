"""What the contestants of `bench_language_model.py` share: names, sizes, files, prompts.

Every worker imports this, in whichever environment it runs: it needs NumPy and safetensors.
"""

import dataclasses
import json
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

CHECKED_STEPS = 4
"""The loss of the last of them is the one after three updates."""
LEARNING_RATE = 1e-4
NAMES = {  # of the projections here, and in Hugging Face's model
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


class Kind(NamedTuple):
    """What a contestant is.

    Attributes:
        framework: `"jax"` or `"torch"`.
        base: how the frozen weights are stored: `"q4"` or `"dense"`.
        trains: `"nothing"`, `"lora"`, `"dora"` or `"full"`. Contestants that train the same
            have the same losses.
    """

    framework: str
    base: str
    trains: str


BASELINE = "LoRA, dense"
CONTESTANTS = {
    "frozen, q4": Kind("jax", "q4", "nothing"),
    "frozen, dense": Kind("jax", "dense", "nothing"),
    "LoRA, q4": Kind("jax", "q4", "lora"),
    BASELINE: Kind("jax", "dense", "lora"),
    "DoRA, q4": Kind("jax", "q4", "dora"),
    "DoRA, dense": Kind("jax", "dense", "dora"),
    "full fine-tuning": Kind("jax", "dense", "full"),
    "frozen, torch": Kind("torch", "dense", "nothing"),
    "LoRA, torch peft": Kind("torch", "dense", "lora"),
    "DoRA, torch peft": Kind("torch", "dense", "dora"),
    "full fine-tuning, torch": Kind("torch", "dense", "full"),
}


@dataclasses.dataclass(frozen=True)
class LanguageCase:
    """The model, and the files with its weights and with the arrays of a step.

    Attributes:
        gguf: the model's file.
        file: of the dense weights by their names in Hugging Face's model, the factors `A`
            by the names here, and the batch.
        heads, key_heads, rope_base, epsilon: of the model's config.
        rank: of the adapters. Their `alpha` is twice the rank.
        threads: what a library may start of its own; 0 leaves that to the library.
    """

    gguf: str
    file: str
    heads: int
    key_heads: int
    rope_base: float
    epsilon: float
    rank: int
    threads: int

    def to_json(self) -> str:
        """As one argument of a command."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "LanguageCase":
        """The case that `to_json` wrote."""
        return cls(**json.loads(text))


def write_arrays(
    file: str, params: Any, factors: dict[str, Any], batch: dict[str, Any]
) -> None:
    """Writes dense params of the model of the example, factors `A`, and a batch."""
    arrays = {"model.embed_tokens.weight": params["embed"]}
    arrays["model.norm.weight"] = params["norm"]
    for own, name in (NAMES | NORMS).items():
        for i, weight in enumerate(params["layers"][own]):
            arrays[f"model.layers.{i}.{name}.weight"] = weight
    arrays |= {f"A.{own}": factors[f"layers/{own}"]["A"] for own in NAMES}
    arrays |= {f"batch.{name}": value for name, value in batch.items()}
    arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    safetensors.numpy.save_file(arrays, file)


def make_batch(
    batch: int, length: int, vocabulary: int, answers: tuple[int, int]
) -> dict[str, np.ndarray[Any, Any]]:
    """Random prompts with an answer of one token and the token of the end behind it.

    Args:
        batch: how many prompts.
        length: of each with the answer and the end, in tokens.
        vocabulary: the number of tokens.
        answers: the two tokens that can be answers. The end is the last token.
    """
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, vocabulary, (batch, length)).astype(np.int32)
    targets = np.array([(answers[i % 2], vocabulary - 1) for i in range(batch)], np.int32)
    tokens[:, -2:] = targets
    return {"tokens": tokens, "targets": targets}
