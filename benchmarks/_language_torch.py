"""Contestants of `bench_language_model.py` on torch: transformers' Llama, with peft."""

from typing import Any

import peft  # pyright: ignore[reportMissingImports]
import safetensors.torch
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from _field_case import Contestant
from _language_case import LEARNING_RATE, NAMES, Kind, LanguageCase
from torch.nn import functional  # pyright: ignore[reportMissingImports]


def make(kind: Kind, case: LanguageCase) -> Contestant:
    """Makes a contestant."""
    if case.threads:
        torch.set_num_threads(case.threads)
    arrays = safetensors.torch.load_file(case.file)
    tokens, targets = arrays.pop("batch.tokens").long(), arrays.pop("batch.targets").long()
    factors = {name: arrays.pop(f"A.{name}") for name in NAMES}
    model = make_llama(case, arrays)
    model.requires_grad_(kind.trains == "full")
    llama = model
    if kind.trains in ("lora", "dora"):
        config = peft.LoraConfig(
            r=case.rank,
            lora_alpha=2 * case.rank,
            target_modules=[name.rpartition(".")[2] for name in NAMES.values()],
            use_dora=kind.trains == "dora",
        )
        peft.get_peft_model(model, config)  # changes the model in place
        with torch.no_grad():
            for own, name in NAMES.items():
                for i, factor in enumerate(factors[own]):
                    module: Any = model.get_submodule(f"layers.{i}.{name}.lora_A.default")
                    module.weight.copy_(factor.T)
        llama = model.train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = (
        torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0) if trained else None
    )

    def step() -> float:
        with torch.set_grad_enabled(bool(trained)):
            features = llama(tokens, use_cache=False).last_hidden_state[:, -3:-1]
            logits = features @ llama.embed_tokens.weight.T
            loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    def costs() -> dict[str, float]:
        frozen = [value for value in model.parameters() if not value.requires_grad]
        return {
            "trained": sum(value.numel() for value in trained),
            "frozen_bytes": sum(value.nbytes for value in frozen),
        }

    return Contestant(step, costs)


def make_llama(case: LanguageCase, state: dict[str, torch.Tensor]) -> Any:
    """The model with these weights."""
    embed, up = state["model.embed_tokens.weight"], "model.layers.0.mlp.up_proj.weight"
    depth = sum(name.endswith(".mlp.up_proj.weight") for name in state)
    config = transformers.LlamaConfig(
        vocab_size=embed.shape[0],
        hidden_size=embed.shape[1],
        intermediate_size=state[up].shape[0],
        num_hidden_layers=depth,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_heads,
        rms_norm_eps=case.epsilon,
        rope_parameters={"rope_theta": case.rope_base, "rope_type": "default"},
        tie_word_embeddings=True,
    )
    model = transformers.LlamaModel(config)
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items()})
    return model
