"""`lora-jax merge` writes the model that the adapters make, and touches nothing else."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax import checkpoint
from lora_jax._io import tensor_files, tensor_streams
from lora_jax.cli import _fold
from tests import support
from tests.cli import models
from tests.cli.merging import assert_equal, assert_merged, refuse, run, to_own

GOLDEN = pathlib.Path(__file__).parent.parent / "golden/checkpoints/llama_lora_patterns"


def test_a_merge_is_that_of_peft(tmp_path, capsys):
    assert run(GOLDEN / "base", GOLDEN / "adapter", tmp_path / "out") == 0
    base = load_file(GOLDEN / "base" / "model.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(GOLDEN / "expected.safetensors")
    modules = json.loads((GOLDEN / "modules.json").read_text())
    assert set(got) == set(base)
    for name, values in got.items():
        if name.removesuffix(".weight") in modules:
            want = expected[f"merged/{name}"]
            assert not np.array_equal(want, base[name])
            support.assert_close(values, want, 4)
        else:
            np.testing.assert_array_equal(values, base[name])
    printed = capsys.readouterr().out
    assert all(module in printed for module in modules)
    assert "21 tensors, 12 merged, 0 replaced, 0 cast, 9 copied" in printed
    source = (GOLDEN / "base" / "config.json").read_bytes()
    assert (tmp_path / "out" / "config.json").read_bytes() == source


@pytest.mark.parametrize(
    ("dtype", "shards"), [("float32", 1), ("bfloat16", 3), ("float16", 2)]
)
def test_every_entry_of_every_shard(tmp_path, adapter, factors, dtype, shards, capsys):
    tensors = models.make_tensors(dtype)
    base = models.write_base(tmp_path / "base", tensors, shards)
    out = tmp_path / "out"
    assert run(base, adapter, out, "--quiet") == 0
    assert_merged(models.read_model(out), tensors, factors)
    assert "module" not in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {path.name for path in base.iterdir()}
    for file in base.glob("*.safetensors"):
        assert list(load_file(file)) == list(load_file(out / file.name))
        assert tensor_files.TensorFile(out / file.name).metadata == {"format": "pt"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_dtype_casts_what_is_floating_point(tmp_path, adapter, factors, source, dtype):
    tensors = models.make_tensors(source)
    base = models.write_base(tmp_path / "base", tensors, 2, torch_dtype=source)
    out = tmp_path / "out"
    assert run(base, adapter, out, f"--dtype={dtype}") == 0
    got = models.read_model(out)
    assert_merged(got, tensors, factors, dtype)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in got.values())
    assert index["metadata"]["kept"] == "yes"
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype
    for file in out.glob("*.safetensors"):
        for span in tensor_streams.find_spans(tensor_files.TensorFile(file)).values():
            assert span.start % span.dtype.itemsize == 0


def test_one_file_becomes_one_file(tmp_path, adapter, factors):
    tensors = models.make_tensors()
    save_file(tensors, tmp_path / "base.safetensors")
    before = (tmp_path / "base.safetensors").read_bytes()
    out = tmp_path / "out.safetensors"
    assert run(tmp_path / "base.safetensors", adapter, out) == 0
    assert_merged(load_file(out), tensors, factors)
    assert (tmp_path / "base.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("use_dora", [False, True])
def test_rows_merge_as_the_whole_does(tmp_path, monkeypatch, use_dora):
    tensors = models.make_tensors()
    name = "model.layers.0.mlp.up_proj"
    factors = models.make_factors(modules={name: models.LINEARS[name]})
    base = models.write_base(tmp_path / "base", tensors)
    magnitude = {f"{name}.lora_magnitude_vector": np.full(models.INNER, 2, "float32")}
    extra = magnitude if use_dora else {}
    adapter = models.write_adapter(tmp_path / "a", factors, extra, use_dora=use_dora)
    assert run(base, adapter, tmp_path / "whole") == 0
    monkeypatch.setattr(_fold, "BLOCK", 8 * models.WIDTH)
    assert run(base, adapter, tmp_path / "rows") == 0
    whole, rows = (models.read_model(tmp_path / name) for name in ("whole", "rows"))
    for each, values in whole.items():
        np.testing.assert_allclose(rows[each], values, rtol=1e-5, atol=1e-6)
    if use_dora:
        norms = np.linalg.norm(rows[f"{name}.weight"], axis=1)
        np.testing.assert_allclose(norms, 2, rtol=1e-5)


def test_whole_arrays_take_the_place_of_the_models(tmp_path, factors, capsys):
    tensors = models.make_tensors("bfloat16")
    base = models.write_base(tmp_path / "base", tensors)
    head = models.draw((models.ENTRIES, models.WIDTH), 9)
    rows = models.draw((2, models.WIDTH), 10)
    tokens = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    adapter = models.write_adapter(
        tmp_path / "adapter",
        factors,
        {"lm_head.weight": head, tokens: rows},
        modules_to_save=["lm_head"],
        trainable_token_indices={"embed_tokens": [3, 1]},
    )
    assert run(base, adapter, tmp_path / "out") == 0
    tensors["lm_head.weight"] = head.astype("bfloat16")
    tensors["model.embed_tokens.weight"][[3, 1]] = rows.astype("bfloat16")
    assert_merged(models.read_model(tmp_path / "out"), tensors, factors)
    assert "3 merged, 2 replaced" in capsys.readouterr().out


def test_a_base_that_pissa_changed(tmp_path):
    tensors, factors = models.make_tensors(), {}
    for name in models.LINEARS:
        weight = tensors[f"{name}.weight"].astype(np.float64)
        u, s, vh = np.linalg.svd(weight, full_matrices=False)
        root = np.sqrt(s[:3] / 2)  # the scale is 2
        a, b = root[:, None] * vh[:3], u[:, :3] * root
        factors[name] = a.astype("float32"), (3 * b).astype("float32")
    base = models.write_base(tmp_path / "base", tensors)
    adapter = models.write_adapter(tmp_path / "a", factors, init_lora_weights="pissa")
    assert run(base, adapter, tmp_path / "out") == 0
    got = models.read_model(tmp_path / "out")
    for name, (a, b) in factors.items():  # the base lost a third of what B has
        want = tensors[f"{name}.weight"] + 2 / 3 * 2 * b.astype(np.float64) @ a
        support.assert_close(got[f"{name}.weight"], want, 64)


# Targets of this library, and the axes of the weights.
PARTS = {
    "last layers": (("layers/up[2:]",), {"layers/up": "bio"}),
    "layers apart": (("layers/up[0]", "layers/up[[1, 3]]"), {"layers/up": "boi"}),
    "outputs of layers": (("layers/up[1:, :, 4:]",), {"layers/up": "bio"}),
    "query and value": (("qkv[:8]", "qkv[16:]"), {"qkv": "oi"}),
    "query and value, flat": (("flat[:, :8]", "flat[:, 16:]"), {"flat": "io"}),
    "each": (("qkv[8:]", "layers/up[::2]", "flat"), {"layers/up": "bio", "qkv": "oi"}),
}
STACKS = {"layers/up": (4, 8, 12), "qkv": (24, 8), "flat": (8, 24)}


@pytest.mark.mostly_slow(6)
@pytest.mark.parametrize(
    ("method", "dtype"), [("lora", "float32"), ("lora", "bfloat16"), ("dora", "float32")]
)
@pytest.mark.parametrize("name", PARTS)
def test_parts_merge_as_in_a_program(tmp_path, monkeypatch, capsys, name, method, dtype):
    targets, axes = PARTS[name]
    shapes = enumerate(STACKS.items())
    tensors = {path: models.draw(shape, i, dtype) for i, (path, shape) in shapes}
    base = models.write_base(tmp_path / "base", tensors)
    params = {path: support.asarray(tensor) for path, tensor in tensors.items()}
    adapters, plan = models.write_own(
        tmp_path / "own", params, targets=targets, axes=axes, use_dora=method == "dora"
    )
    want = lora_jax.merge_adapters(params, adapters, plan)
    assert run(base, tmp_path / "own", tmp_path / "out") == 0
    assert_equal(models.read_model(tmp_path / "out"), want)
    printed = capsys.readouterr().out
    assert all(path in printed for path in plan.targets)
    losses = lora_jax.merge_losses(params, adapters, plan)
    sizes = {p: np.prod(target.matrix_shape) for p, target in plan.targets.items()}
    lost = sum(float(losses[path].vanished) * size for path, size in sizes.items())
    everything = printed.splitlines()[-1].split()
    assert everything[3] == f"{100 * lost / sum(sizes.values()):.3f}"
    monkeypatch.setattr(_fold, "BLOCK", 100)
    assert run(base, tmp_path / "own", tmp_path / "rows") == 0
    got = models.read_model(tmp_path / "rows")  # products of other sizes, summed otherwise
    for path, values in want.items():
        support.assert_close(got[path], values, 4)


def test_what_is_beside_a_part_is_only_rounded(tmp_path, capsys):
    tensors = {"layers/up": np.ones((4, 8, 12), "float32")}
    params = {"layers/up": support.asarray(tensors["layers/up"])}
    tensors["layers/up"][0, 0, 0] = np.inf
    base = models.write_base(tmp_path / "base", tensors)
    options = {"targets": "layers/up[2:]", "axes": {"layers/up": "bio"}}
    models.write_own(tmp_path / "own", params, **options)
    assert run(base, tmp_path / "own", tmp_path / "out", "--dtype=float16") == 0
    got = models.read_model(tmp_path / "out")["layers/up"]
    np.testing.assert_array_equal(got[:2], tensors["layers/up"][:2].astype("float16"))
    assert (got[2:] != 1).any()
    tensors["layers/up"][0, 0, 0] = 1e5
    models.save_file(tensors, base / "model.safetensors")
    line = refuse(capsys, base, tmp_path / "own", tmp_path / "no", "--dtype=float16")
    assert "'layers/up': there are values beyond the range of float16" in line
    tensors["layers/up"][3, 0, 0] = np.nan
    models.save_file(tensors, base / "model.safetensors")
    line = refuse(capsys, base, tmp_path / "own", tmp_path / "no")
    assert "'layers/up[2:]': the weight had an infinity or a NaN" in line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trained_leaves_take_the_place_of_the_models(tmp_path, capsys, dtype):
    tensors = models.make_tensors(dtype)
    base = models.write_base(tmp_path / "base", tensors)
    name = "model.layers.0.mlp.up_proj.weight"
    params = {n: support.asarray(tensors[n]) for n in (name, "model.norm.weight")}
    adapters, plan = models.write_own(
        tmp_path / "own", params, targets=name, train="model.norm.weight", axes={name: "oi"}
    )
    assert run(base, tmp_path / "own", tmp_path / "out") == 0
    want = lora_jax.merge_adapters(params, adapters, plan)
    assert_equal(models.read_model(tmp_path / "out"), tensors | want)
    assert "1 merged, 1 replaced" in capsys.readouterr().out


def test_own_adapters_merge_as_those_of_peft(tmp_path, adapter, factors):
    tensors = models.make_tensors()
    base = models.write_base(tmp_path / "base", tensors)
    own = to_own(adapter, base, tmp_path / "own")
    assert run(base, own, tmp_path / "out") == 0
    assert_merged(models.read_model(tmp_path / "out"), tensors, factors)


def test_own_adapters_of_a_model_of_jax(tmp_path, capsys):
    tensors = models.make_tensors()
    base = models.write_base(tmp_path / "base", tensors)
    shapes = enumerate(models.LINEARS.values())
    params = {f"body_{i}": np.zeros(shape[::-1], "float32") for i, shape in shapes}
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=3, alpha=6), params)
    names = dict(zip(models.LINEARS, params, strict=True))
    factors = models.make_factors()
    adapters = {names[n]: {"A": a.T, "B": b.T} for n, (a, b) in factors.items()}
    own, out = tmp_path / "own", tmp_path / "out"
    checkpoint.save_adapters(own, adapters, plan)
    refuse(capsys, base, own, out)
    (tmp_path / "names.json").write_text(json.dumps(names))
    assert run(base, own, out, f"--names={tmp_path / 'names.json'}") == 0
    assert_merged(models.read_model(out), tensors, factors)


def test_names_and_layout_of_other_models(tmp_path, factors, capsys):
    shapes = enumerate(models.LINEARS.values())
    tensors = {f"body/{i}/kernel": models.draw(shape[::-1], i) for i, shape in shapes}
    save_file(tensors, tmp_path / "base.safetensors")
    adapter = models.write_adapter(tmp_path / "adapter", factors)
    out = tmp_path / "out.safetensors"
    refuse(capsys, tmp_path / "base.safetensors", adapter, out, "--layout=jax")
    names = dict(zip(models.LINEARS, tensors, strict=True))
    (tmp_path / "names.json").write_text(json.dumps(names))
    options = "--layout=jax", f"--names={tmp_path / 'names.json'}"
    assert run(tmp_path / "base.safetensors", adapter, out, *options) == 0
    got = load_file(out)
    for name, (a, b) in factors.items():
        want = tensors[names[name]].astype(np.float64) + 2 * (b @ a).T.astype(np.float64)
        support.assert_close(got[names[name]], want, 4)


def test_the_report_says_what_rounding_lost(tmp_path, capsys):
    ones = np.ones((4, 4), "float32")
    tensors = {"a.weight": 1024 * ones, "b.weight": ones}
    base = models.write_base(tmp_path / "base", tensors)
    factors = {name: (np.ones((1, 4), "float32"),) * 2 for name in "ab"}
    factors = {name: (a, b.T) for name, (a, b) in factors.items()}
    adapter = models.write_adapter(tmp_path / "adapter", factors, lora_alpha=1)
    assert run(base, adapter, tmp_path / "exact") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["all", "2", "merged", "0.000", "%", "0"]
    assert run(base, adapter, tmp_path / "out", "--dtype=bfloat16") == 0
    *_, worst, everything = capsys.readouterr().out.splitlines()
    lost = f"{1 / 1024:.4g}"
    assert worst.split() == ["a.weight", "bfloat16", "100.000", "%", lost]
    assert everything.split() == ["all", "2", "merged", "50.000", "%", lost]


def test_other_weights_and_adapters_are_not_copied(tmp_path, factors, capsys):
    base = models.write_base(tmp_path / "base", models.make_tensors())
    adapter = models.write_adapter(base / "adapter", factors)
    (base / "original").mkdir()
    for name in ("pytorch_model.bin", "original/consolidated.pth", ".git", "adapters.json"):
        (base / name).write_text("x")
    (base / "original" / "params.json").write_text("{}")
    assert run(base, adapter, tmp_path / "out") == 0
    files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert [str(path.relative_to(tmp_path / "out")) for path in files] == [
        *("config.json", "model.safetensors", "original/params.json", "tokenizer.json")
    ]
    assert "adapters.json, original/consolidated.pth" in capsys.readouterr().out


def test_untouched_infinities_stay(tmp_path, adapter):
    tensors = models.make_tensors()
    tensors["model.norm.weight"][2] = -np.inf
    base = models.write_base(tmp_path / "base", tensors)
    assert run(base, adapter, tmp_path / "out", "--dtype=float16") == 0
    assert models.read_model(tmp_path / "out")["model.norm.weight"][2] == -np.inf


def test_float64_needs_64_bits(tmp_path, capsys):
    tensors = models.make_tensors("float64")
    name = "model.layers.0.mlp.up_proj"
    factors = models.make_factors(modules={name: models.LINEARS[name]})
    adapter = models.write_adapter(tmp_path / "adapter", factors)
    base = models.write_base(tmp_path / "base", tensors)
    line = refuse(capsys, base, adapter, tmp_path / "out")
    assert "set the environment variable JAX_ENABLE_X64=1" in line
    with support.x64():
        assert run(base, adapter, tmp_path / "out") == 0
    assert_merged(models.read_model(tmp_path / "out"), tensors, factors)
