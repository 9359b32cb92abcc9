"""Contestants of `bench_field.py` on torch: the same model, and peft on it."""

import functools
from collections.abc import Mapping
from typing import Any

import peft  # pyright: ignore[reportMissingImports]
import safetensors.torch
import torch  # pyright: ignore[reportMissingImports]
from _field_case import (
    KERNELS,
    LEARNING_RATE,
    NORM_EPSILON,
    Case,
    Contestant,
    factor_name,
    kernel_name,
)
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    """A layer."""

    def __init__(self, case: Case):
        super().__init__()
        self.heads = case.heads
        self.attention_norm = nn.LayerNorm(case.width, NORM_EPSILON, bias=False)
        self.mlp_norm = nn.LayerNorm(case.width, NORM_EPSILON, bias=False)

        def linear(name):
            return nn.Linear(*case.shapes[name], bias=False)

        self.query, self.key, self.value = linear("query"), linear("key"), linear("value")
        self.output, self.up, self.down = linear("output"), linear("up"), linear("down")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the layer to `(batch, length, width)`."""
        hidden = self.attention_norm(x)
        query, key, value = (
            project(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.output(mixed.transpose(1, 2).flatten(-2))
        hidden = functional.gelu(self.up(self.mlp_norm(x)), approximate="tanh")
        return x + self.down(hidden)


class Transformer(nn.Module):
    """The model."""

    def __init__(self, case: Case):
        super().__init__()
        self.layers = nn.ModuleList(Block(case) for _ in range(case.layers))
        self.norm = nn.LayerNorm(case.width, NORM_EPSILON, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the model to `(batch, length, width)`."""
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def device() -> dict[str, Any]:
    """What torch runs on; the driver asks JAX for the name."""
    return {"torch_device": DEVICE, "torch_threads": torch.get_num_threads()}


@functools.cache
def load(file: str) -> Mapping[str, torch.Tensor]:
    """The arrays of a case; a weight is `(out, in)`, as torch has it."""
    arrays = safetensors.torch.load_file(file, device=DEVICE)
    return {
        name: array if name in ("x", "target") else array.T.contiguous()
        for name, array in arrays.items()
    }


def make(name: str, case: Case) -> Contestant:
    """Makes a contestant."""
    if case.threads:
        torch.set_num_threads(case.threads)
    model = make_model(case, trained=name == "torch full fine-tuning")
    if name.startswith("torch peft"):
        model = add_adapters(model, case, use_dora=name.endswith("DoRA"))
    return training(model, case)


def make_model(case: Case, *, trained: bool) -> Transformer:
    """The model with the weights of the case, which models that are not trained share."""
    arrays, ones = load(case.file), torch.ones(case.width, device=DEVICE)
    with torch.device("meta"):
        model = Transformer(case)
    state = dict.fromkeys(model.state_dict(), ones.to(getattr(torch, case.dtype)))
    for i in range(case.layers):
        for name in KERNELS:
            state[f"layers.{i}.{name}.weight"] = arrays[kernel_name(i, name)]
    if trained:
        state = {name: value.clone() for name, value in state.items()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(trained)


def add_adapters(model: Transformer, case: Case, *, use_dora: bool) -> nn.Module:
    """The model with adapters of peft, which start as those of the case."""
    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=case.rank,
        target_modules=list(KERNELS),
        use_dora=use_dora,
    )
    adapted = peft.get_peft_model(model, config)  # changes the model in place
    for i in range(case.layers):
        for name in KERNELS:
            factor: Any = model.get_submodule(f"layers.{i}.{name}.lora_A.default").weight
            with torch.no_grad():
                factor.copy_(load(case.file)[factor_name(i, name)])
    return adapted.train()


def training(model: nn.Module, case: Case) -> Contestant:
    """A step: of training, or of the gradient of the input if nothing is to be trained."""
    arrays = load(case.file)
    x, target = arrays["x"].clone(), arrays["target"]
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(
        trained or [x.requires_grad_()], LEARNING_RATE, weight_decay=0.0
    )

    def step():
        optimizer.zero_grad()
        error = (model(x) - target).float()
        loss = (error * error).mean()
        loss.backward()
        if trained:
            optimizer.step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    def costs():
        state = [value for s in optimizer.state.values() for value in s.values()]
        counts: dict[str, float] = {
            "trained": sum(value.numel() for value in trained),
            "state_bytes": sum(value.nbytes for value in state),
        }
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            counts["temp_bytes"] = torch.cuda.max_memory_allocated() - before
        return counts

    return Contestant(step, costs)
