"""Files are old or new and whole, whenever the process is killed or the disk is full."""

import contextlib
import json
import os
import pathlib
import resource
import subprocess
import sys

import pytest

from tests import kills

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("writer", "steps"),
    [
        ("save_adapters", 8),
        ("peft.save", 8),
        ("save_quantized", 3),
        pytest.param("convert", 8, marks=pytest.mark.slow),
        pytest.param("merge", 10, marks=pytest.mark.slow),
    ],
)
def test_files_are_whole_after_a_kill_and_beside_a_writer(writer, steps):
    """Kills before each step that changes a directory, some at random, and a reader."""
    options = ("--steps", "--kills", "6", "--seconds", "0.5")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", writer, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["faults"] == []
    assert done.returncode == 0, done.stderr
    # Something was killed, and something read.
    assert outcome["steps"] >= steps
    assert outcome.get("reads", 1) >= 1


@contextlib.contextmanager
def largest_file(size):
    """No file of this process may become larger, as on a disk with no more space."""
    old, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (old, most))


def everything(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes() if file.is_file() else None
        for file in folder.rglob("*")
    }


@pytest.mark.parametrize("size", [0, 300, 2_000, 9_000])
@pytest.mark.parametrize("name", kills.WRITERS)
def test_a_full_disk(name, size, tmp_path, capsys):
    """An error of the system; the old files stay, and no other ones are left."""
    writer = kills.WRITERS[name]
    writer.prepare(tmp_path)
    (tmp_path / "notes.txt").write_text("the user's")
    if not writer.fresh:
        writer.write(tmp_path, 0)
    before = everything(tmp_path)
    command = "merge" in name or name == "convert"
    with (
        largest_file(size),
        contextlib.nullcontext()
        if command
        else pytest.raises(OSError, match="File too large"),
        pytest.raises(AssertionError) if command else contextlib.nullcontext(),
    ):
        writer.write(tmp_path, 1)
    if command:
        assert "File too large" in capsys.readouterr().err
    assert everything(tmp_path) == before
    if not writer.fresh:
        assert writer.read(tmp_path) == {0}
    writer.write(tmp_path, 1)
    assert writer.read(tmp_path) == {1}


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("name", ["save_adapters", "peft.save", "save_quantized"])
def test_a_step_that_fails(name, call, error, tmp_path, monkeypatch):
    """Whichever step it is, there are the old files or the new ones, and no others."""
    writer = kills.WRITERS[name]
    outcomes = []
    for number in range(1, 20):
        folder = tmp_path / str(number)
        folder.mkdir()
        writer.write(folder, 0)
        calls, real = [], getattr(os, call)

        def step(*arguments, calls=calls, real=real, number=number):
            calls.append(arguments)
            if len(calls) == number:
                raise error
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, step)
            with contextlib.suppress(type(error)):
                writer.write(folder, 1)
        (found,) = writer.read(folder)
        outcomes.append(found)
        left = [file.name for file in folder.rglob(".*.tmp")]
        assert not left
        if len(calls) < number:
            break
    assert outcomes == sorted(outcomes)
    assert 0 in outcomes
    assert outcomes[-1] == 1
