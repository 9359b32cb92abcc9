"""A tiny model and PEFT adapters for it, written as the real ones are."""

import json

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

import lora_jax
from tests.support import normal

WIDTH, INNER, ENTRIES = 12, 20, 16
LINEARS = {
    "model.layers.0.self_attn.q_proj": (WIDTH, WIDTH),
    "model.layers.0.mlp.up_proj": (INNER, WIDTH),
    "model.layers.1.mlp.down_proj": (WIDTH, INNER),
}
UNTOUCHED = {
    "model.embed_tokens.weight": (ENTRIES, WIDTH),
    "lm_head.weight": (ENTRIES, WIDTH),
    "model.layers.0.self_attn.k_proj.weight": (WIDTH, WIDTH),
    "model.norm.weight": (WIDTH,),
    "model.rotary.scale": (),
    "model.empty": (0, WIDTH),
}


def draw(shape, seed, dtype="float32"):
    return normal(*shape, seed=seed, dtype=dtype)


def make_tensors(dtype="float32"):
    shapes = {f"{name}.weight": shape for name, shape in LINEARS.items()} | UNTOUCHED
    tensors = {n: draw(shape, i, dtype) for i, (n, shape) in enumerate(shapes.items())}
    return tensors | {"model.position_ids": np.arange(5), "model.used": np.array(True)}


def write_base(folder, tensors, shards=1, **config):
    """Writes a model directory; with several shards, as Hugging Face splits one."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "tokenizer.json").write_text("{}")
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata)
        return folder
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        own, file = names[i::shards], f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in own}, folder / file, metadata)
        weight_map |= dict.fromkeys(own, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size, "kept": "yes"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make_factors(rank=3, seed=100, size=0.3, modules=LINEARS):
    """`{module: (A, B)}` as PEFT has them."""
    factors = {}
    for i, (name, (n_out, n_in)) in enumerate(modules.items()):
        a, b = draw((rank, n_in), seed + 2 * i), draw((n_out, rank), seed + 2 * i + 1)
        factors[name] = size * a, size * b
    return factors


def write_adapter(folder, factors, extra=None, **config):
    """Writes a PEFT adapter; `extra` are further entries by their names."""
    folder.mkdir()
    ranks = {len(a) for a, _ in factors.values()}
    fields = {
        "peft_type": "LORA",
        "r": max(ranks, default=1),
        "lora_alpha": 6,
        "target_modules": sorted({name.rpartition(".")[2] for name in factors}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    entries = dict(extra or {})
    for name, (a, b) in factors.items():
        entries |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    entries = {f"base_model.model.{name}": value for name, value in entries.items()}
    save_file(entries, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def write_own(folder, params, size=0.3, **config):
    """Writes adapters in this library's format, with random values; returns them too."""
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(**{"rank": 3, **config}), params)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    for i, path in enumerate(plan.entries):
        for j, (name, array) in enumerate(adapters[path].items()):
            change = size * draw(array.shape, 10 * i + j)
            adapters[path][name] = array + change.astype(array.dtype)
    lora_jax.save_adapters(folder, adapters, plan)
    return adapters, plan


def merged(tensors, factors, alpha=6):
    """The merged tensors in float64; those without an adapter as they are."""
    wide = dict(tensors)
    for name, (a, b) in factors.items():
        update = alpha / len(a) * b.astype(np.float64) @ a.astype(np.float64)
        wide[f"{name}.weight"] = tensors[f"{name}.weight"].astype(np.float64) + update
    return wide


def read_model(folder):
    """All tensors of a model directory."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors
