"""The two files of a PEFT adapter: always of one save, and read as one."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax import cli, peft
from lora_jax._io import tensor_files
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.formats import checkpoint
from tests.peft.support import CONFIG, TENSORS

PARAMS = {
    f"h/{i}/{name}/kernel": jax.ShapeDtypeStruct((6, 5), "float32")
    for i in range(3)
    for name in ("q", "k")
}


class Killed(BaseException):
    """The process ends."""


def save(folder, number, alpha=8.0, **options):
    """All entries have one number; `scale` is a quarter of alpha."""
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(4, alpha, "*kernel"), PARAMS)
    adapters = {
        path: {n: np.full(s, number, "float32") for n, s in target.adapter_shapes.items()}
        for path, target in plan.targets.items()
    }
    peft.save(folder, adapters, plan, **options)


def numbers(folder):
    """The numbers of entries and the scales that are loaded."""
    adapters, plan, _ = peft.load(folder, PARAMS)
    entries = {float(x) for leaf in jax.tree.leaves(adapters) for x in np.unique(leaf)}
    return entries, {target.scale for target in plan.targets.values()}


OLD, NEW = ({1.0}, {2.0}), ({2.0}, {25.0})


def without_digest(folder):
    """Makes the files those of another program."""
    save_file(load_file(folder / TENSORS), folder / TENSORS, {"format": "pt"})


def killed_at(monkeypatch, folder, step):
    """Saves, and stops before a rename; what the process would clean up stays."""
    calls, real = [], os.replace

    def replace(*arguments):
        calls.append(arguments)
        if len(calls) >= step:
            raise Killed
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr("pathlib.Path.unlink", lambda *args, **options: None)
        with pytest.raises(Killed):
            save(folder, 2.0, 100.0)


@pytest.mark.parametrize("by_another_program", [False, True])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_save_that_was_killed(tmp_path, monkeypatch, step, by_another_program, capsys):
    """Before the config is put aside, before the arrays are replaced, and before it is."""
    save(tmp_path, 1.0)
    if by_another_program:
        without_digest(tmp_path)
    killed_at(monkeypatch, tmp_path, step)
    assert (tmp_path / CONFIG).exists() is (step == 1)
    assert numbers(tmp_path) == (NEW if step == 3 else OLD)
    assert len(peft.match_names(tmp_path, PARAMS)) == 6
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["lora_alpha"] == (
        100 if step == 3 else 8
    )
    # Once more, and then a save that is not.
    killed_at(monkeypatch, tmp_path, 1)
    assert numbers(tmp_path) == (NEW if step == 3 else OLD)
    save(tmp_path, 2.0, 100.0)
    assert numbers(tmp_path) == NEW
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, TENSORS]


def test_a_first_save_that_was_killed(tmp_path, monkeypatch):
    killed_at(monkeypatch, tmp_path, 1)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*adapter_config"):
        peft.load(tmp_path, PARAMS)
    killed_at(monkeypatch, tmp_path, 2)
    assert numbers(tmp_path) == NEW


def test_what_else_has_such_a_name_is_left_alone(tmp_path):
    save(tmp_path, 1.0)
    others = [f".{TENSORS}.tmp", f"{TENSORS}.0123456789abcdef.tmp", ".notes.tmp", "notes"]
    for name in others:
        (tmp_path / name).write_text("the user's")
    (tmp_path / f".{CONFIG}.0123456789abcdef.tmp").write_text("{half of a")
    assert numbers(tmp_path) == OLD
    save(tmp_path, 2.0, 100.0)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {CONFIG, TENSORS, *others}


def test_half_written_configs_are_not_read(tmp_path, monkeypatch):
    save(tmp_path, 1.0)
    (tmp_path / f".{CONFIG}.0123456789abcdef.tmp").write_text("{half of a")
    (tmp_path / f".{CONFIG}.1123456789abcdef.tmp").write_text('{"r": 5}')
    (tmp_path / CONFIG).rename(tmp_path / f".{CONFIG}.2123456789abcdef.tmp")
    assert numbers(tmp_path) == OLD
    (tmp_path / f".{CONFIG}.2123456789abcdef.tmp").unlink()
    with pytest.raises(CheckpointError, match="has the digest of another config"):
        peft.load(tmp_path, PARAMS)


@pytest.mark.parametrize(
    ("alpha", "renamed"), [(8.0, [TENSORS, CONFIG]), (100.0, [".old", TENSORS, CONFIG])]
)
def test_both_are_on_the_disk_before_either_has_its_name(
    alpha, renamed, tmp_path, monkeypatch
):
    """A config that stays the same is never away."""
    save(tmp_path, 1.0)
    events, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append("sync") or sync(file))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(b.name) or replace(a, b))
    save(tmp_path, 3.0, alpha)
    assert [event[:4] for event in (*events[:2], *events[-1:])] == ["sync"] * 3
    assert len(events) == 3 + len(renamed)
    for event, name in zip(events[2:-1], renamed, strict=True):
        assert name in event
    assert numbers(tmp_path) == ({3.0}, {alpha / 4})


def test_files_of_two_adapters_are_refused(tmp_path):
    save(tmp_path / "a", 1.0)
    save(tmp_path / "b", 2.0, 100.0)
    shutil.copy(tmp_path / "b" / TENSORS, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"has the digest of another config .* again"):
        peft.load(tmp_path / "a", PARAMS)
    without_digest(tmp_path / "a")  # as the message says
    assert numbers(tmp_path / "a") == ({2.0}, {2.0})


@pytest.mark.parametrize(
    ("field", "value", "reads"),
    [
        ("base_model_name_or_path", "me/other", True),
        ("task_type", "CAUSAL_LM", True),
        ("inference_mode", False, True),
        ("peft_version", "0.1", True),
        ("lora_alpha", 9, False),
        ("use_rslora", True, False),
        ("rank_pattern", {"q": 4}, False),
        ("alpha_pattern", {"q": 5}, False),
        ("lora_dropout", 0.1, False),
    ],
)
def test_configs_that_were_edited(tmp_path, field, value, reads):
    save(tmp_path, 1.0)
    fields = json.loads((tmp_path / CONFIG).read_text())
    fields[field] = value
    (tmp_path / CONFIG).write_text(json.dumps(dict(reversed(fields.items()))))
    if reads:
        assert numbers(tmp_path) == OLD
        return
    with pytest.raises(CheckpointError, match="or was the config edited"):
        peft.load(tmp_path, PARAMS)


def test_a_save_while_arrays_are_read(tmp_path, monkeypatch):
    """All of them are those of the file that was opened."""
    save(tmp_path, 1.0)
    real, calls = tensor_files.TensorFile.read, []

    def read(self, name):
        calls.append(name)
        if len(calls) == 4:
            save(tmp_path, 2.0, 100.0)
        return real(self, name)

    monkeypatch.setattr(tensor_files.TensorFile, "read", read)
    assert numbers(tmp_path) == OLD
    assert len(calls) == 12
    assert numbers(tmp_path) == NEW


@pytest.mark.parametrize("saves", [1, 2, 5])
def test_saves_while_files_are_opened(tmp_path, monkeypatch, saves):
    """Both are read again if another process saved after the config was read."""
    save(tmp_path, 1.0)
    real, done = checkpoint._read_configs, []

    def slow(folder):
        configs = real(folder)
        if len(done) < saves:
            save(tmp_path, *((1.0, 8.0) if len(done) % 2 else (2.0, 100.0)))
            done.append(configs)
        return configs

    monkeypatch.setattr(checkpoint, "_read_configs", slow)
    assert numbers(tmp_path) == (NEW if saves % 2 else OLD)
    assert len(done) == saves


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_a_directory_in_the_place_of_a_file(tmp_path, file):
    save(tmp_path, 1.0)
    other = {CONFIG: TENSORS, TENSORS: CONFIG}[file]
    before = (tmp_path / other).read_bytes()
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir()
    with pytest.raises(OSError, match=file):
        save(tmp_path, 2.0, 100.0)
    assert (tmp_path / other).read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == [CONFIG, TENSORS]
    with pytest.raises(OSError, match=file):
        peft.load(tmp_path, PARAMS)
