"""`lora-jax merge` refuses what would go wrong, and a failure leaves nothing behind."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lora_jax._io import tensor_files
from lora_jax.cli import _base, _output
from tests.cli import models
from tests.cli.merging import assert_merged, refuse, run, to_own


def test_what_exists_is_replaced_only_if_asked(tmp_path, adapter, factors, capsys):
    tensors = models.make_tensors()
    base = models.write_base(tmp_path / "base", tensors)
    out = models.write_base(tmp_path / "out", {"old": np.zeros(2)})
    assert "exists: give another name, or --overwrite" in refuse(capsys, base, adapter, out)
    assert run(base, adapter, out, "--overwrite") == 0
    assert_merged(models.read_model(out), tensors, factors)
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("dear")
    line = refuse(capsys, base, adapter, tmp_path / "home", "--overwrite")
    assert "is not what this command writes" in line


def contents(folder):
    """The files, links and empty directories of a folder, and what is in the files."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: p.read_bytes() if p.is_file() else None for name, p in paths.items()}


def test_what_is_not_of_the_model_is_not_overwritten(tmp_path, adapter, factors):
    tensors = models.make_tensors()
    base = models.write_base(tmp_path / "base", tensors)
    out = tmp_path / "out"
    (out / ".git" / "refs").mkdir(parents=True)
    (out / ".git" / "HEAD").write_text("main")
    (out / "checkpoint-500" / "deep").mkdir(parents=True)
    (out / "checkpoint-500" / "deep" / "optimizer.pt").write_text("x")
    (out / "notes.txt").write_text("years of work")
    (out / "link").symlink_to("notes.txt")
    (out / "broken").symlink_to("nowhere")
    os.chmod(out / "notes.txt", 0o640)
    kept = contents(out)
    old = models.write_base(tmp_path / "old", {"a": np.zeros(2), "b": np.zeros(2)}, 2)
    shutil.copytree(old, out, dirs_exist_ok=True)
    shutil.rmtree(old)
    for _ in range(2):
        assert run(base, adapter, out, "--overwrite") == 0
        assert contents(out) == contents(out) | kept
        assert (out / "notes.txt").stat().st_mode & 0o777 == 0o640
        assert os.readlink(out / "link") == "notes.txt"
        assert_merged(models.read_model(out), tensors, factors)
        # The two old parts are gone, and nothing else is there.
        assert set(contents(out)) == set(kept) | {path.name for path in base.iterdir()}
        assert len(list(tmp_path.iterdir())) == 3
    # With the same name in the base it is a file that is written, like the tokenizer.
    (base / "notes.txt").write_text("new")
    assert run(base, adapter, out, "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "new"


def test_what_cannot_be_kept_is_not_overwritten(tmp_path, adapter, capsys, monkeypatch):
    base = models.write_base(tmp_path / "base", models.make_tensors())
    out = models.write_base(tmp_path / "out", {"old": np.zeros(2)})
    (out / "notes.txt").write_text("years of work")

    def refused(*arguments, **options):
        raise OSError(1, "Operation not permitted")  # a file system without links

    monkeypatch.setattr(os, "link", refused)
    line = refuse(capsys, base, adapter, out, "--overwrite")
    assert "notes.txt is not a file of the model, and cannot be kept" in line
    assert "Move it away, or give another OUT" in line


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_model_is_replaced_as_well(index, tmp_path, adapter):
    base = models.write_base(tmp_path / "base", models.make_tensors())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors.index.json").write_text(index)
    (tmp_path / "out" / "other.safetensors").write_text("x")
    assert run(base, adapter, tmp_path / "out", "--overwrite") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"other.safetensors"} | {path.name for path in base.iterdir()}


PUT_BACK = r"could not be put\s+back: it is kept in .*/old. Move it back"


@pytest.mark.parametrize(
    ("failures", "message"),
    [({0}, "Input/output"), ({1}, "Input/output"), ({1, 2}, PUT_BACK), ((), None)],
)
def test_a_swap_that_fails_loses_nothing(failures, message, tmp_path, monkeypatch):
    """Some of the renames fail: the first, the second, or that one and putting back."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("the old model")
    replace, calls = os.replace, []

    def failing(a, b):
        calls.append(a)
        if len(calls) - 1 in failures:
            raise OSError(5, "Input/output error")
        return replace(a, b)

    monkeypatch.setattr(os, "replace", failing)
    monkeypatch.setattr(_output, "_exchange", lambda a, b: False)
    fails = pytest.raises(OSError, match=message) if message else contextlib.nullcontext()
    with fails, _output.new_directory(out) as new:
        (new / "model.safetensors").write_text("the new model")
    (file,) = tmp_path.rglob("model.safetensors")
    assert file.read_text() == ("the old model" if message else "the new model")
    assert (file.parent == out) == (message != PUT_BACK)
    assert message or list(tmp_path.iterdir()) == [out]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two names")
def test_two_directories_are_exchanged_at_one_moment(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    monkeypatch.setattr(os, "replace", None)  # never without a directory of that name
    with _output.new_directory(out) as new:
        (new / "new").touch()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_second_interrupt_does_not_stop_the_cleaning(tmp_path, monkeypatch):
    remove = shutil.rmtree

    def slow(*arguments, **options):
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        remove(*arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", slow)

    def interrupted():
        with _output.new_directory(tmp_path / "out") as new:
            (new / "model.safetensors").write_text("large")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_the_base_is_never_written_to(tmp_path, adapter, capsys):
    base = models.write_base(tmp_path / "base", models.make_tensors())
    (tmp_path / "link").symlink_to(base)
    for out in (base, base / "merged", tmp_path / "link", adapter):
        line = refuse(capsys, base, adapter, out, "--overwrite")
        assert "or inside of it, which is never changed" in line
    outer = models.write_base(tmp_path / "outer", {"a": np.zeros(2)})
    shutil.copytree(base, outer / "base")
    line = refuse(capsys, outer / "base", adapter, outer, "--overwrite")
    assert "is inside of OUT" in line
    line = refuse(capsys, base, adapter, tmp_path / "missing" / "out")
    assert "there is no directory" in line


def test_what_is_not_finite_is_refused(tmp_path, factors, capsys):
    base = models.write_base(tmp_path / "base", models.make_tensors())
    a, b = factors["model.layers.0.mlp.up_proj"]
    b[3, 1] = np.nan
    bad = models.write_adapter(tmp_path / "bad", factors)
    line = refuse(capsys, base, bad, tmp_path / "out")
    assert "'model.layers.0.mlp.up_proj.weight': the adapter had an infinity or a" in line
    b[3, 1] = 3e4
    a[1] = 10
    large = models.write_adapter(tmp_path / "large", factors)
    line = refuse(capsys, base, large, tmp_path / "out", "--dtype=float16")
    assert "at 'model.layers.0.mlp.up_proj.weight': there are values beyond" in line
    extra = {"lm_head.weight": np.full((models.ENTRIES, models.WIDTH), np.inf, "float32")}
    whole = models.write_adapter(
        tmp_path / "whole", models.make_factors(), extra, modules_to_save=["lm_head"]
    )
    line = refuse(capsys, base, whole, tmp_path / "out")
    assert "at 'lm_head.weight': the adapter's array for it has an infinity" in line


def test_an_adapter_of_another_model(tmp_path, adapter, capsys):
    tensors = models.make_tensors()
    base = models.write_base(tmp_path / "base", tensors)
    other = models.make_factors(modules={"model.layers.7.mlp.up_proj": (5, 4)})
    other = models.write_adapter(tmp_path / "other", other)
    line = refuse(capsys, base, other, tmp_path / "out")
    assert "model.layers.7.mlp.up_proj" in line
    own = to_own(adapter, base, tmp_path / "own")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    less = models.write_base(tmp_path / "less", tensors)
    line = refuse(capsys, less, own, tmp_path / "out")
    assert "model.layers.0.mlp.up_proj" in line


def test_quantized_weights_are_refused(tmp_path, adapter, capsys):
    tensors = models.make_tensors()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype("int8")
    base = models.write_base(tmp_path / "base", tensors)
    line = refuse(capsys, base, adapter, tmp_path / "out")
    assert f"at {name!r}: the weight must be floating point, got dtype int8" in line


def test_a_full_disk_is_seen_before(tmp_path, adapter, capsys, monkeypatch):
    base = models.write_base(tmp_path / "base", models.make_tensors())
    usage = shutil.disk_usage(tmp_path)._replace(free=1024)
    monkeypatch.setattr(_output.shutil, "disk_usage", lambda path: usage)
    line = refuse(capsys, base, adapter, tmp_path / "out")
    assert "are needed in" in line
    assert "1.0 KiB are free" in line


@pytest.mark.parametrize("after", [0, 5, 10, 15, 18, 19, 20, 21, 22])
def test_an_interruption_at_any_time_leaves_nothing(
    tmp_path, adapter, capsys, monkeypatch, after
):
    base = models.write_base(tmp_path / "base", models.make_tensors("bfloat16"), 3)
    out = models.write_base(tmp_path / "out", {"old": np.zeros(2)})
    old = {path.name for path in out.iterdir()}
    calls = []

    def counted(function):
        def run(*arguments):
            calls.append(function.__name__)
            if len(calls) == after + 1:
                raise KeyboardInterrupt
            return function(*arguments)

        return run

    monkeypatch.setattr(_output, "_exchange", lambda a, b: False)
    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    code = run(base, adapter, out, "--overwrite", "--quiet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]
    # Three parts, the index and two others, each fsync, replace, fsync; then the directory,
    # two replaces that swap it, and the directory above it.
    assert code == (0 if after >= 22 else 130)
    new = {path.name for path in base.iterdir()}
    assert {path.name for path in out.iterdir()} == (old if after < 21 else new)
    if code:
        assert capsys.readouterr().err == "lora-jax: error: interrupted\n"


def test_a_terminated_process_leaves_nothing(tmp_path, adapter):
    tensors = models.make_tensors()
    base = models.write_base(tmp_path / "base", tensors, 2)
    # It stops before the index is written, and waits there to be terminated.
    slow = (
        "import sys, time\n"
        "from lora_jax import cli\n"
        "from lora_jax._io import replacement\n"
        "def wait(*_): print('here', flush=True); time.sleep(60)\n"
        "replacement.write_text = wait\n"
        "sys.argv[1:] = ['merge', *sys.argv[1:]]\n"
        "sys.exit(cli.main())\n"
    )
    command = [sys.executable, "-c", slow, str(base), str(adapter), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while "here" not in process.stdout.readline():
        assert process.poll() is None
    assert len(list(tmp_path.iterdir())) == 3
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.stdout.close()
    assert process.returncode == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_parts_that_are_not_those_of_the_index(tmp_path, adapter, capsys):
    base = models.write_base(tmp_path / "base", models.make_tensors(), 2)
    index = base / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    parts = fields["weight_map"]

    def refused(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))
        return refuse(capsys, base, adapter, tmp_path / "out")

    outside = {**parts, "lm_head.weight": "../secret.safetensors"}
    assert "'../secret.safetensors' is not the name of a file" in refused(outside)
    assert "there is no file" in refused({**parts, "lm_head.weight": "gone.safetensors"})
    extra = {**parts, "imagined": parts["lm_head.weight"]}
    assert "says that 'imagined' is in" in refused(extra)
    less = {name: part for name, part in parts.items() if name != "lm_head.weight"}
    assert "lacks arrays of the files that it names: 'lm_head.weight'" in refused(less)
    assert "has no 'weight_map'" in refused([])
    shutil.copy(base / parts["lm_head.weight"], base / "model.safetensors")
    assert "has both model.safetensors and" in refused(parts)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("null", "has no 'weight_map'"),
        ("[]", "has no 'weight_map'"),
        ('{"x": null}', "None is not the name of a file"),
        ('{"x": ["a"]}', "is not the name of a file"),
        ('{"x": {}}', "is not the name of a file"),
        ('{"x": ""}', "'' is not the name of a file"),
        ('{"x": "."}', "'.' is not the name of a file"),
        ('{"x": ".."}', "'..' is not the name of a file"),
        ('{"x": "/etc/passwd"}', "is not the name of a file"),
        ('{"x": "config.json"}', "is not the name of a file"),
        ('{"x": "model.safetensors.index.json"}', "is not the name of a file"),
        ('{"x": "a/../b.safetensors"}', "is not the name of a file"),
        ('{"x": "a\\u0000.safetensors"}', "there is no file"),
        ('{"x": "loop.safetensors"}', "there is no file"),
        ('{"x": "folder.safetensors"}', "is a directory: give a file"),
        ('{"x": "a.safetensors", "x": "b.safetensors"}', "the key 'x' comes twice"),
        ('{"\\ud800": "a.safetensors"}', "cannot be read as JSON"),
        ("[" * 900 + "]" * 900, "nested more than 100 deep"),
        ('{}, "metadata": {"total_size": 1e999}', "is larger than any number"),
        ('{}, "metadata": {"total_size": NaN}', "NaN is no JSON"),
    ],
)
def test_an_index_that_is_none(tmp_path, adapter, capsys, value, message):
    base = models.write_base(tmp_path / "base", models.make_tensors(), 2)
    (base / "loop.safetensors").symlink_to("loop.safetensors")
    (base / "folder.safetensors").mkdir()
    index = base / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {value}}}')
    with pytest.raises((tensor_files.CheckpointError, OSError), match=re.escape(message)):
        _base.open_base(base)
    assert message in refuse(capsys, base, adapter, tmp_path / "out")


def test_links_without_an_end(tmp_path, adapter, capsys):
    base = models.write_base(tmp_path / "base", models.make_tensors())
    loop, out = tmp_path / "loop", tmp_path / "out"
    loop.symlink_to(loop)
    for arguments in (
        (loop, adapter, out),
        (base, loop, out),
        (base, adapter, loop),
        (base, adapter, loop / "inside"),
        (base, adapter, out, "--names", loop),
    ):
        line = refuse(capsys, *arguments)
        assert str(loop) in line
        assert "--debug" not in line


def test_what_is_no_model(tmp_path, adapter, capsys):
    out = tmp_path / "out"
    assert "there is no directory or file" in refuse(capsys, tmp_path / "no", adapter, out)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "pytorch_model.bin").write_text("x")
    line = refuse(capsys, tmp_path / "empty", adapter, out)
    assert "has neither model.safetensors nor" in line
    assert "'pytorch_model.bin'" in line
    base = models.write_base(tmp_path / "base", models.make_tensors())
    line = refuse(capsys, base / "model.safetensors", adapter, out)
    assert "is one file, so OUT must be one too" in line
