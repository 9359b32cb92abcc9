"""`lora-jax convert` changes the format, and nothing else."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import checkpoint
from lora_jax.cli import main
from tests.cli import models
from tests.cli.merging import assert_equal, to_own


@pytest.fixture
def base(tmp_path):
    return models.write_base(tmp_path / "base", models.make_tensors("bfloat16"), 2)


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


def error(capsys, *arguments):
    assert convert(*arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def halved(factors):
    return {n: (a.astype("float16"), b.astype("float16")) for n, (a, b) in factors.items()}


def test_there_and_back(tmp_path, base):
    factors = models.make_factors()
    ranks = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 1.5}}
    name = "model.layers.0.self_attn.q_proj"
    factors |= models.make_factors(2, modules={name: models.LINEARS[name]})
    adapter = models.write_adapter(tmp_path / "adapter", factors, **ranks)
    own, back = to_own(adapter, base, tmp_path / "own"), tmp_path / "back"
    loaded, plan = checkpoint.load_adapters(own)
    for name, (a, b) in factors.items():
        np.testing.assert_array_equal(loaded[f"{name}.weight"]["A"], a.T)
        np.testing.assert_array_equal(loaded[f"{name}.weight"]["B"], b.T)
        alpha = 1.5 if name.endswith("down_proj") else 6
        assert plan.targets[f"{name}.weight"].scale == alpha / len(a)
    assert convert(own, back, "--to=peft", "--layout=torch") == 0
    assert_equal(models.read_model(back), models.read_model(adapter))
    assert main(["diff", str(adapter), str(own)]) == 0


def test_full_arrays_go_there_and_back(tmp_path, base, capsys):
    head = {"lm_head.weight": models.draw((models.ENTRIES, models.WIDTH), 0)}
    factors = halved(models.make_factors())
    saved = {"modules_to_save": ["lm_head"]}
    adapter = models.write_adapter(tmp_path / "adapter", factors, head, **saved)
    own, back = to_own(adapter, base, tmp_path / "own"), tmp_path / "back"
    assert main(["diff", str(adapter), str(own)]) == 0
    for name in ("adapter", "own"):
        source = str(tmp_path / name)
        assert main(["merge", str(base), source, str(tmp_path / f"from {name}")]) == 0
    assert_equal(*(models.read_model(tmp_path / f"from {n}") for n in ("own", "adapter")))
    assert convert(own, back, "--to=peft", "--layout=torch") == 0
    assert "3 adapters and 1 full arrays in the format peft" in capsys.readouterr().out
    assert_equal(models.read_model(back), models.read_model(adapter))


def test_trained_leaves_are_modules_to_save(tmp_path):
    params = {"q": {"kernel": jnp.ones((4, 6))}, "head": {"kernel": jnp.ones((6, 2))}}
    own = tmp_path / "own"
    models.write_own(own, params, targets="q/*", train="head/*")
    assert convert(own, tmp_path / "peft", "--to=peft") == 0
    saved = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert saved["modules_to_save"] == ["head"]
    assert main(["diff", str(own), str(tmp_path / "peft")]) == 0


def test_dtypes_stay_or_are_asked_for(tmp_path, base, capsys):
    factors = halved(models.make_factors())
    adapter = models.write_adapter(tmp_path / "adapter", factors)
    for dtype, expected in ((None, "float16"), ("bfloat16", "bfloat16")):
        options = [f"--dtype={dtype}"] if dtype else []
        own = to_own(adapter, base, tmp_path / f"own {dtype}", *options)
        back = tmp_path / f"back {dtype}"
        # What is trained further is float32, as if PEFT's files were loaded.
        leaves = jax.tree.leaves(checkpoint.load_adapters(own)[0])
        assert {x.dtype for x in leaves} == {jnp.dtype("float32")}
        assert convert(own, back, "--to=peft", "--layout=torch", *options) == 0
        entries = models.read_model(back)
        assert {x.dtype for x in entries.values()} == {jnp.dtype(expected)}
        for name, values in models.read_model(adapter).items():
            np.testing.assert_array_equal(entries[name], values.astype(expected))
    assert "--uniform is for --to peft" in error(
        capsys, adapter, tmp_path / "new", "--to=lora_jax", f"--base={base}", "--uniform"
    )


def test_uniform_files(tmp_path, base, caplog):
    name = "model.layers.0.self_attn.q_proj"
    factors = models.make_factors()
    factors |= models.make_factors(2, modules={name: models.LINEARS[name]})
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 1.5}}
    adapter = models.write_adapter(tmp_path / "adapter", factors, **patterns)
    own, out = to_own(adapter, base, tmp_path / "own"), tmp_path / "out"
    assert convert(own, tmp_path / "plain", "--to=peft", "--layout=torch") == 0
    assert "write a uniform file" in caplog.text
    assert convert(own, out, "--to=peft", "--layout=torch", "--uniform") == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 3
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    entries = models.read_model(out)
    for module, (a, b) in factors.items():
        got = [entries[f"base_model.model.{module}.lora_{n}.weight"] for n in "AB"]
        update = config["lora_alpha"] / 3 * got[1].astype(np.float64) @ got[0]
        alpha = 1.5 if module.endswith("down_proj") else 6
        want = alpha / len(a) * b.astype(np.float64) @ a
        np.testing.assert_allclose(update, want, rtol=1e-6, atol=1e-6)


def test_names_of_modules(tmp_path):
    params = {"body": {"query": np.zeros((6, 5), "float32")}}
    adapters, _ = models.write_own(tmp_path / "own", params)
    (tmp_path / "names.json").write_text(json.dumps({"model.q_proj": "body/query"}))
    names = f"--names={tmp_path / 'names.json'}"
    assert convert(tmp_path / "own", tmp_path / "out", "--to=peft", names) == 0
    entries = models.read_model(tmp_path / "out")
    a = entries["base_model.model.model.q_proj.lora_A.weight"]
    np.testing.assert_array_equal(a, adapters["body/query"]["A"].T)


def test_what_cannot_be_converted(tmp_path, base, capsys):
    adapter = models.write_adapter(tmp_path / "adapter", models.make_factors())
    out = tmp_path / "out"
    assert "in the format peft already" in error(capsys, adapter, out, "--to=peft")
    line = error(capsys, adapter, out, "--to=lora_jax")
    assert "give the model they are for, with --base" in line
    to_own = "--to=lora_jax", f"--base={base}"
    factors, options = models.make_factors(), {"init_lora_weights": "pissa"}
    changed = models.write_adapter(tmp_path / "changed", factors, **options)
    line = error(capsys, changed, out, *to_own)
    assert "has no place for it: 'model.layers." in line
    assert convert(changed, tmp_path / "listed", *to_own, "--no-strict") == 0
    assert "has no place for 'model.layers." in capsys.readouterr().out
    out.mkdir()
    (out / "thesis.txt").write_text("dear")
    assert "exists: give another name" in error(capsys, adapter, out, *to_own)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"model.q_proj": 3}))
    line = error(capsys, adapter, tmp_path / "new", *to_own, f"--names={names}")
    assert "'model.q_proj' must have the path of a weight" in line
    assert {path.name for path in tmp_path.iterdir()} == {
        *("adapter", "base", "changed", "listed", "names.json", "out")
    }


def test_a_base_is_for_one_direction(tmp_path, base, capsys):
    adapter = models.write_adapter(tmp_path / "adapter", models.make_factors())
    own = to_own(adapter, base, tmp_path / "own")
    line = error(capsys, own, tmp_path / "out", "--to=peft", f"--base={base}")
    assert "--base is for --to lora_jax" in line


def inspected(place, capsys):
    """The record of `inspect`, and the sorted norms of its updates."""
    capsys.readouterr()
    assert main(["inspect", str(place), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    return record, sorted(own["update_norm"] for own in record["adapters"].values())


@pytest.mark.parametrize("dialect", ["mlx", "kohya", "diffusers"])
def test_formats_of_other_trainers(dialect, tmp_path, base, capsys):
    adapter = models.write_adapter(tmp_path / "adapter", models.make_factors())
    end = "" if dialect == "mlx" else ".safetensors"
    first, second = tmp_path / f"first{end}", tmp_path / f"second{end}"
    to = f"--to={dialect}"
    assert convert(adapter, first, to) == 0
    assert f"3 adapters in the format {dialect}" in capsys.readouterr().out
    record, norms = inspected(first, capsys)
    assert record["format"] == dialect
    assert (record["rank"], record["alpha"]) == (3, 6)
    assert norms == inspected(adapter, capsys)[1]
    own = to_own(first, base, tmp_path / "own")
    assert main(["diff", str(own), str(adapter)]) == 0
    assert main(["diff", str(first), str(own)]) == 0
    assert convert(own, second, to, "--layout=torch") == 0
    files = (
        load_file(p / "adapters.safetensors" if not end else p) for p in (first, second)
    )
    assert_equal(*files)
    for source, out in ((adapter, "a"), (first, "b")):
        assert main(["merge", str(base), str(source), str(tmp_path / out)]) == 0
    assert_equal(*(models.read_model(tmp_path / out) for out in "ab"))
    assert f"in the format {dialect} already" in error(capsys, first, second, to)
    back = tmp_path / "back"
    if dialect == "kohya":
        assert "has lost its dots, and peft" in error(capsys, first, back, "--to=peft")
    else:
        assert convert(first, back, "--to=peft", "--dtype=float32") == 0
        assert_equal(models.read_model(back), models.read_model(adapter))
        assert main(["diff", str(first), str(back)]) == 0


def test_what_other_trainers_do_not_have(tmp_path, base, capsys):
    factors = models.make_factors()
    name, *_ = factors
    adapter = models.write_adapter(tmp_path / "a", factors, alpha_pattern={name: 2})
    out = tmp_path / "out"
    line = error(capsys, adapter, out, "--to=mlx")
    assert "one scale for all modules" in line
    assert "--uniform" in line
    own = to_own(adapter, base, tmp_path / "own")
    assert convert(own, out, "--to=mlx", "--layout=torch", "--uniform") == 0
    assert main(["diff", str(out), str(adapter)]) == 0
    line = error(capsys, adapter, tmp_path / "b", "--to=mlx", "--uniform")
    assert "--uniform is for adapters on a model: convert to lora_jax" in line
    line = error(capsys, adapter, tmp_path / "b", "--to=kohya")
    assert "a path that ends in .safetensors" in line
    head = {"lm_head.weight": models.draw((models.ENTRIES, models.WIDTH), 0)}
    saved = models.write_adapter(tmp_path / "c", factors, head, modules_to_save=["lm_head"])
    line = error(capsys, saved, tmp_path / "b.safetensors", "--to=kohya")
    assert "'lm_head.weight' was trained: write it with --to peft" in line
    entries = {"model.embed_tokens.lora_a": models.draw((models.ENTRIES, 2), 0)}
    entries["model.embed_tokens.lora_b"] = models.draw((2, models.WIDTH), 1)
    tied = tmp_path / "tied"
    tied.mkdir()
    save_file(entries, tied / "adapters.safetensors")
    parameters = {"lora_parameters": {"rank": 2, "scale": 1.0}}
    (tied / "adapter_config.json").write_text(json.dumps(parameters))
    line = error(capsys, tied, tmp_path / "b", "--to=peft")
    assert "'model.embed_tokens' is an embedding. If a head is tied" in line
    weights = tmp_path / "base" / "model-00001-of-00002.safetensors"
    assert main(["inspect", str(weights)]) == 1
    assert "looks like the weights of a model" in capsys.readouterr().err
