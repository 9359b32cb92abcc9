"""Adapters that fit only a part of a model, or fit in part, or not at all."""

import json

import numpy as np
import pytest

from lora_jax import checkpoint
from lora_jax.cli import main
from tests.cli import models
from tests.cli.merging import assert_merged, refuse, run, to_own

TEXT, VISION = "language_model", "vision_tower.vision_model.encoder"
Q = "layers.0.self_attn.q_proj"


def multimodal(folder, *more):
    """A model of parts that have layers of the same names."""
    parts = (f"{TEXT}.model", VISION, *more)
    shape = (models.WIDTH, models.WIDTH)
    tensors = {f"{p}.{Q}.weight": models.draw(shape, i) for i, p in enumerate(parts)}
    return tensors, models.write_base(folder, tensors)


@pytest.fixture
def text_only():
    shape = (models.WIDTH, models.WIDTH)
    return models.make_factors(modules={f"model.{Q}": shape})


@pytest.mark.parametrize("prefix", [TEXT, f"{TEXT}.", f"{TEXT}.model.{Q}.weight", VISION])
def test_an_adapter_of_a_part(tmp_path, capsys, text_only, prefix):
    tensors, base = multimodal(tmp_path / "base")
    adapter = models.write_adapter(tmp_path / "adapter", text_only)
    line = refuse(capsys, base, adapter, tmp_path / "out")
    assert f"the config targets '{VISION}.{Q}'" in line
    assert "For an adapter of a part of the model there is --prefix" in line
    assert run(base, adapter, tmp_path / "out", f"--prefix={prefix}") == 0
    name = VISION if prefix == VISION else f"{TEXT}.model"
    factors = {f"{name}.{Q}": text_only[f"model.{Q}"]}
    assert_merged(models.read_model(tmp_path / "out"), tensors, factors)
    own = to_own(adapter, base, tmp_path / "own", f"--prefix={prefix}")
    assert list(checkpoint.load_adapters(own)[1].targets) == [f"{name}.{Q}.weight"]
    # Its own paths are names of tensors, of which the prefix leaves others.
    assert run(base, own, tmp_path / "own out") == 0
    assert_merged(models.read_model(tmp_path / "own out"), tensors, factors)


def test_two_parts_that_are_called_alike(tmp_path, capsys, text_only):
    other = f"{TEXT}_teacher.model"
    tensors, base = multimodal(tmp_path / "base", other)
    adapter = models.write_adapter(tmp_path / "adapter", text_only)
    line = refuse(capsys, base, adapter, tmp_path / "out")
    assert f"'model.{Q}' may be any of" in line
    assert f'give --names FILE.json with {{"model.{Q}": path}}, or --prefix' in line
    # A prefix is of whole words.
    assert run(base, adapter, tmp_path / "out", f"--prefix={TEXT}") == 0
    factors = {f"{TEXT}.model.{Q}": text_only[f"model.{Q}"]}
    assert_merged(models.read_model(tmp_path / "out"), tensors, factors)


def test_a_prefix_that_no_tensor_has(tmp_path, capsys, text_only):
    _, base = multimodal(tmp_path / "base")
    adapter = models.write_adapter(tmp_path / "adapter", text_only)
    for prefix in ("langage_model", "language"):
        line = refuse(capsys, base, adapter, tmp_path / "out", f"--prefix={prefix}")
        assert f"no tensor of {base} has a name that starts with --prefix {prefix}" in line
        assert f"the nearest are {TEXT}" in line


@pytest.mark.parametrize("own", [False, True])
def test_what_does_not_fit_is_left_out_if_asked(tmp_path, capsys, factors, own):
    tensors = models.make_tensors()
    base = models.write_base(tmp_path / "base", tensors)
    head = {"lm_head.weight": models.draw((models.ENTRIES + 1, models.WIDTH), 0)}
    adapter = models.write_adapter(tmp_path / "adapter", factors, {} if own else head)
    if own:
        adapter = to_own(adapter, base, tmp_path / "own")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1]
    gone = "model.layers.1.mlp.down_proj.weight"
    del tensors[gone]
    less = models.write_base(tmp_path / "less", tensors)
    capsys.readouterr()
    refuse(capsys, less, adapter, tmp_path / "out", "--strict")
    assert run(less, adapter, tmp_path / "out", "--no-strict") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    report = printed.out.split("left out, because of --no-strict: ")[1].splitlines()
    assert int(report[0]) == len(report) - 1 == (2 if own else 3)
    missing = [name.removesuffix(".weight"), gone.removesuffix(".weight")]
    for each in missing if own else [*missing, "lm_head"]:
        assert any(f"'{each}" in line for line in report[1:]), each
    fitting = {n: pair for n, pair in factors.items() if n not in missing}
    assert_merged(models.read_model(tmp_path / "out"), tensors, fitting)


def test_a_conversion_leaves_out_what_has_no_place(tmp_path, capsys, factors):
    base = models.write_base(tmp_path / "base", models.make_tensors())
    factors["model.layers.7.mlp.up_proj"] = factors["model.layers.0.mlp.up_proj"]
    head = {"lm_head.weight": models.draw((models.ENTRIES, models.WIDTH), 0)}
    saved = {"modules_to_save": ["lm_head"]}
    adapter = models.write_adapter(tmp_path / "adapter", factors, head, **saved)
    to_own(adapter, base, tmp_path / "own", "--no-strict")
    text = capsys.readouterr().out
    assert "3 adapters and 1 full arrays in the format lora_jax" in text
    assert "left out, because of --no-strict: 1" in text
    assert "'model.layers.7.mlp.up_proj'" in text
    plan = checkpoint.load_adapters(tmp_path / "own")[1]
    assert set(plan.targets) == {f"{name}.weight" for name in models.LINEARS}
    assert set(plan.trained) == {"lm_head.weight"}
    back = ["convert", str(tmp_path / "own"), str(tmp_path / "back"), "--to=peft"]
    for option in ("--no-strict", "--prefix=model"):
        assert main([*back, option]) == 1
        assert "is for --to lora_jax" in capsys.readouterr().err


def test_nothing_fits(tmp_path, capsys):
    base = models.write_base(tmp_path / "base", models.make_tensors())
    modules = {f"model.layers.{i}.mlp.up_proj": (50, 40) for i in range(5)}
    factors = models.make_factors(modules=modules)
    adapter = models.write_adapter(tmp_path / "adapter", factors)
    shapes = {f"{name}.weight": np.zeros(s, "float32") for name, s in modules.items()}
    other = models.write_base(tmp_path / "other", shapes)
    own = to_own(adapter, other, tmp_path / "own")
    for each, options in ((adapter, ()), (own, ()), (adapter, ["--no-strict"])):
        line = refuse(capsys, base, each, tmp_path / "out", *options)
        assert f"error: nothing of {each} fits {base}: for example, no tensor fits" in line
        assert "'model.layers.0.mlp.up_proj', with 40 in and 50 out" in line
        assert "the nearest name is 'model.layers.0.mlp.up_proj.weight' (20, 12)" in line
        assert "or does it need --prefix, --names or --layout?" in line
        assert "layers.1" not in line
    # What the user gave is not called the adapter of another model.
    names = tmp_path / "names.json"
    names.write_text('{"model.layers.0.mlp.up_proj": "model.norm.weight"}')
    line = refuse(capsys, base, adapter, tmp_path / "out", f"--names={names}")
    assert "by its name it is 'model.norm.weight' (12,)" in line


def test_saved_arrays_may_fit_alone(tmp_path, capsys):
    tensors = models.make_tensors()
    base = models.write_base(tmp_path / "base", tensors)
    factors = models.make_factors(modules={"model.other": (50, 40)})
    head = {"lm_head.weight": models.draw((models.ENTRIES, models.WIDTH), 9)}
    saved = {"modules_to_save": ["lm_head"]}
    adapter = models.write_adapter(tmp_path / "adapter", factors, head, **saved)
    refuse(capsys, base, adapter, tmp_path / "out")
    assert run(base, adapter, tmp_path / "out", "--no-strict") == 0
    assert "left out, because of --no-strict: 1\n" in capsys.readouterr().out
    assert_merged(models.read_model(tmp_path / "out"), tensors | head, {})


def test_unknown_fields_are_allowed_one_by_one(tmp_path, capsys, factors):
    tensors = models.make_tensors()
    base = models.write_base(tmp_path / "base", tensors)
    more = {"use_new": {"depth": 2}, "use_newer": True, "velora_config": {"a": 1}}
    adapter = models.write_adapter(tmp_path / "adapter", factors, **more)
    plain = models.write_adapter(tmp_path / "plain", factors)
    options: list[str] = []
    for name in more:
        line = refuse(capsys, base, adapter, tmp_path / "out", *options)
        assert name in line
        if name != "velora_config":
            assert f"ignore it with --allow-field {name}." in line
        options += ["--allow-field", name]
    own = ["--to=lora_jax", f"--base={base}"]
    for command in (
        ["merge", base, adapter, tmp_path / "out"],
        ["convert", adapter, tmp_path / "own", *own],
        ["inspect", adapter],
        ["diff", adapter, plain],
    ):
        assert main([*map(str, command), *options]) == 0, command
        text = capsys.readouterr().out
        for name, value in more.items():
            assert f"ignored, as --allow-field says: {name} {json.dumps(value)}" in text
    assert_merged(models.read_model(tmp_path / "out"), tensors, factors)
    # One that is read is not ignored.
    line = refuse(capsys, base, adapter, tmp_path / "new", "--allow-field=lora_alpha")
    assert "--allow-field has 'lora_alpha', which is read and never ignored" in line
