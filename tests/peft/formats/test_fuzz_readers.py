"""Damaged files end in an error of the file, or are read as what they say."""

import json
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import peft
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.formats import fields
from tests.peft.formats import test_dialects
from tests.peft.support import CONFIG, GOLDEN, LLAMA, TENSORS, draw, linear, write

BASE = {
    name: jax.ShapeDtypeStruct(value.shape, "float32")
    for name, value in load_file(LLAMA / "base" / "model.safetensors").items()
}
TRIES = 250
FLAT = "kohya.safetensors"


def damaged(data, rng, end):
    """Some bytes of a file, mutated in its first `end` bytes or cut off."""
    data = bytearray(data)
    kind = rng.randrange(5)
    at = rng.randrange(min(end, len(data)))
    if kind == 0:
        return data[: rng.choice([at, rng.randrange(len(data))])]
    if kind == 1:
        data[at] = rng.randrange(256)
    elif kind == 2:  # what stays well-formed more often
        data[at] = rng.choice(b'0123456789[]{}",:abn.- ')
    elif kind == 3:
        del data[at : at + rng.randrange(1, 9)]
    else:
        other = rng.randrange(min(end, len(data)))
        data[at : at + 4], data[other : other + 4] = (
            data[other : other + 4],
            data[at : at + 4],
        )
    return data


def check(folder, params, file, rng, tries, **options):
    data = (folder / file).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    end = header if file.endswith(".safetensors") else len(data)
    place = folder / file if file == FLAT else folder
    outcomes = {"read": 0, "refused": 0}
    for _ in range(tries):
        (folder / file).write_bytes(damaged(data, rng, end))
        try:
            loaded = peft.load(place, params, **options)
        except CheckpointError as error:
            outcomes["refused"] += str(folder) in str(error)
            continue
        outcomes["read"] += 1
        for path, target in loaded.plan.targets.items():
            shapes = {n: x.shape for n, x in loaded.adapters[path].items()}
            assert shapes == target.adapter_shapes
            assert np.isfinite(target.scale)
        for path, array in loaded.replaced.items():
            assert array.shape == params[path].shape
    assert sum(outcomes.values()) == tries  # each error names the file
    return outcomes


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_a_damaged_llama(file, tmp_path):
    folder = shutil.copytree(LLAMA / "adapter", tmp_path / "adapter")
    outcomes = check(folder, BASE, file, random.Random(0), TRIES, layout="torch")
    assert outcomes["refused"] > TRIES / 3
    assert outcomes["read"] > 0


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_a_damaged_checkpoint_of_many_kinds(file, tmp_path):
    entries = {
        "tok.lora_embedding_A": draw(2, 9),
        "tok.lora_embedding_B": draw(5, 2),
        "conv.lora_A.weight": draw(2, 3, 3, 2),
        "conv.lora_B.weight": draw(4, 2, 1, 1),
        "moe.lora_A.weight": draw(6, 5),
        "moe.lora_B.weight": draw(7, 6),
        "score.weight": draw(3, 5),
        "emb.token_adapter.trainable_tokens_delta": draw(2, 5),
    }
    for i in range(2):
        entries |= linear(f"h.{i}.q", 5, 7, 2, seed=i)
    folder = write(
        tmp_path,
        entries,
        r=2,
        lora_alpha=3,
        alpha_pattern={"h.1.q": 5},
        target_modules=["q", "tok", "conv"],
        target_parameters=["moe.w"],
        modules_to_save=["score"],
        trainable_token_indices=[1, 4],
    )
    shapes = {
        "tok/embedding": (9, 5),
        "conv/kernel": (3, 2, 3, 4),
        "moe/w": (3, 5, 7),
        "score/kernel": (5, 3),
        "emb/embedding": (9, 5),
        "h/q/kernel": (2, 5, 7),
    }
    params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    assert len(peft.load(folder, params).adapters) == 5
    outcomes = check(folder, params, file, random.Random(1), TRIES)
    assert outcomes["refused"] > TRIES / 3
    assert outcomes["read"] > 0


@pytest.mark.parametrize(
    "file", [FLAT, "pytorch_lora_weights.safetensors", "adapters.safetensors", CONFIG]
)
def test_damaged_files_of_other_trainers(file, tmp_path):
    params = test_dialects.params()
    if file == FLAT:
        test_dialects.write_kohya(tmp_path / file, dora=True)
    elif file.startswith("pytorch"):
        own, ends = test_dialects.metadata(), test_dialects.DIFFUSERS
        test_dialects.write(tmp_path / file, ends, metadata=own, alphas=False)
    else:
        test_dialects.write_mlx(tmp_path)
        params = test_dialects.mlx_params()
    outcomes = check(tmp_path, params, file, random.Random(3), 200)
    assert outcomes["refused"] > 200 / 4
    assert outcomes["read"] > 0


def test_a_damaged_file_of_torchtune(tmp_path):
    tensors = load_file(GOLDEN / "torchtune" / "llama_dora_to_peft.safetensors")
    params = {k[8:]: v for k, v in tensors.items() if k.startswith("hf_base/")}
    path, rng, refused = tmp_path / "adapter.safetensors", random.Random(2), 0
    save_file({k[5:]: v for k, v in tensors.items() if k.startswith("tune/")}, path)
    data = path.read_bytes()
    options = {"alpha": 8, "num_heads": 4, "num_kv_heads": 2, "layout": "torch"}
    for _ in range(100):
        path.write_bytes(damaged(data, rng, 4000))
        try:
            peft.load_torchtune(path, params, **options)
        except CheckpointError as error:
            refused += "adapter.safetensors" in str(error)
    assert 50 < refused <= 100


VALUES = [
    *("null", "true", "false", "0", "1", "-1", "1.5", "1e308", "1e-320", "9" * 400),
    *('""', '"q"', '"(((("', '"\\u0000"', '"' + "x" * 10_000 + '"'),
    *("[]", "[null]", "[1]", "[-1]", "[1e300]", "[[]]", '["q"]', '["("]', "[4294967296]"),
    *("{}", '{"a": 1}', '{"(": 1}', '{"h.0.q": -1}', '{"h.0.q": null}', '{"h.0.q": 1e308}'),
    *("[" * 90 + "]" * 90, '{"a":' * 90 + "1" + "}" * 90),
]


@pytest.mark.parametrize(
    "field", [*fields.CHECKS, *fields.UNSUPPORTED, *fields.IGNORED, "unknown", ""]
)
def test_any_value_of_any_field(field, tmp_path):
    entries = {"score.weight": draw(3, 5)}
    entries["emb.token_adapter.trainable_tokens_delta"] = draw(2, 5)
    for i in range(2):
        entries |= linear(f"h.{i}.q", 5, 7, 2, seed=i)
    fields = {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q"],
        "modules_to_save": ["score"],
    }
    fields |= {"trainable_token_indices": [1, 4], "peft_type": "LORA"}
    folder = write(tmp_path, entries, **fields)
    shapes = {"score/kernel": (5, 3), "emb/embedding": (9, 5), "h/q/kernel": (2, 5, 7)}
    params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    assert len(peft.load(folder, params).replaced) == 2
    text = json.dumps({name: value for name, value in fields.items() if name != field})
    for value in VALUES:
        (folder / CONFIG).write_text(f"{text[:-1]}, {json.dumps(field)}: {value}}}")
        try:
            loaded = peft.load(folder, params)
        except CheckpointError as error:
            assert str(folder) in str(error)  # noqa: PT017
            continue
        shapes = [own["A"].shape for own in loaded.adapters.values()]
        assert shapes in ([(2, 5, 2)], [(1, 5, 2)] * 2)


MLX_FIELDS = ["fine_tune_type", "lora_parameters", "model", "num_layers", "unknown", ""]
MLX_PARAMETERS = ["rank", "scale", "dropout", "keys", "alpha", "unknown", ""]
DIFFUSERS_FIELDS = [
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("lora_dropout", "target_modules", "modules_to_save", "velora_config", "unknown"),
    *("", "q.r", "q.", ".r"),
]


@pytest.mark.parametrize(
    ("file", "field"),
    [
        *((CONFIG, field) for field in MLX_FIELDS),
        *(("lora_parameters", field) for field in MLX_PARAMETERS),
        *(("metadata", field) for field in DIFFUSERS_FIELDS),
    ],
)
def test_any_value_of_a_setting_of_other_trainers(file, field, tmp_path):
    """`file` is where the setting is: mlx-lm's config or a part of it, or diffusers'."""
    ends = (
        ("lora_A.weight", "lora_B.weight") if file == "metadata" else ("lora_a", "lora_b")
    )
    shapes = ((2, 5), (7, 2)) if file == "metadata" else ((5, 2), (2, 7))
    entries = {f"q.{end}": draw(*own) for end, own in zip(ends, shapes, strict=True)}
    parameters = {"rank": 2, "scale": 3.0, "dropout": 0.5, "keys": ["q"]}
    fields = {"fine_tune_type": "lora", "lora_parameters": parameters}
    path, params = tmp_path / "adapters.safetensors", {"q/kernel": jnp.ones((5, 7))}
    save_file(entries, path)
    read = 0
    for value in VALUES:
        own = {"lora_parameters": parameters, "metadata": {"r": 2}}.get(file, fields)
        own = {name: each for name, each in own.items() if name != field}
        text = f"{{{json.dumps(field)}: {value}"
        text += "".join(f", {json.dumps(n)}: {json.dumps(v)}" for n, v in own.items()) + "}"
        if file == "metadata":
            save_file(entries, path, {"lora_adapter_metadata": text})
        else:
            text = f'{{"lora_parameters": {text}}}' if file != CONFIG else text
            (tmp_path / CONFIG).write_text(text)
        place = path if file == "metadata" else tmp_path
        try:
            loaded = peft.load(place, params)
        except CheckpointError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017
            continue
        read += 1
        assert np.isfinite(loaded.plan.targets["q/kernel"].scale)
    assert read < len(VALUES) or field in (
        "",
        "model",
        "num_layers",
        "unknown",
        "keys",
        "alpha",
    )


def test_what_is_no_file(tmp_path):
    """Directories, links without an end, and names that no system has."""
    params = {"q": jnp.ones((5, 7))}
    for file in (CONFIG, TENSORS):
        folder = write(tmp_path / file, linear("q", 5, 7, 2), r=2, target_modules=["q"])
        (folder / file).unlink()
        (folder / file).mkdir()
        with pytest.raises(OSError, match=file):
            peft.load(folder, params)
        (folder / file).rmdir()
        (folder / file).symlink_to(folder / file)
        with pytest.raises(OSError, match=file):
            peft.load(folder, params)
    for name in ("a\0b", "x" * 300):
        with pytest.raises(OSError, match=re.escape(name)):
            peft.load(tmp_path / name, params)
