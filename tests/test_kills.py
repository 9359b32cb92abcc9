"""Files are old or new and whole, whenever the process is killed or the disk is full."""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import pytest

import lora_jax
from tests import kills
from tests.support import assert_same_bits

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize(
    ("writer", "steps"),
    [
        ("save_adapters", 7),
        ("peft.save", 10),
        ("save_quantized", 4),
        pytest.param("convert", 9, marks=pytest.mark.slow),
        pytest.param("merge", 21, marks=pytest.mark.slow),
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
    # Files that are opened to write, directories, renames and deletions.
    assert outcome["steps"] == steps
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


class Killed(BaseException):
    """The process ends: nothing it would still do is done."""


CALLS = [
    *((os, name) for name in ("open", "fsync", "replace", "unlink")),
    *((pathlib.Path, name) for name in ("touch", "open", "chmod")),
]


def fails_at(monkeypatch, number, error):
    """Lets one call of the system fail, by its number; if killed, all that follow too."""
    calls = []

    def wrap(name, real):
        def call(*arguments, **options):
            calls.append(name)
            if len(calls) == number or (error is Killed and len(calls) > number):
                raise error
            return real(*arguments, **options)

        return call

    for owner, name in CALLS:
        monkeypatch.setattr(owner, name, wrap(name, getattr(owner, name)))
    return calls


TWO_FILES = ROOT / "tests" / "checkpoint_two_files"


def read_one_or_two_files(folder):
    """The number, which is 0 if there are the adapters of `TWO_FILES`."""
    adapters, plan = lora_jax.load_adapters(folder / "out")
    if "head" not in adapters:
        return kills.numbers_of(adapters, plan)
    assert_same_bits(adapters, lora_jax.load_adapters(TWO_FILES)[0])
    return {0}


@pytest.mark.parametrize("error", [Killed, OSError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("save_adapters", (8, 12)),
        ("two files", (8, 24)),
        ("peft.save", (10, 15)),
        ("save_quantized", (7, 11)),
    ],
)
def test_failing_at_any_step(name, steps, error, tmp_path, monkeypatch):
    """There are the old files or the new ones, and the next save leaves no others."""
    writer = kills.WRITERS.get(name) or kills.WRITERS["save_adapters"]
    (tmp_path / "0").mkdir()
    writer.write(tmp_path / "0", 0)
    names = everything(tmp_path / "0").keys()
    if name == "two files":  # of the version before
        writer = writer._replace(read=read_one_or_two_files)
        shutil.rmtree(tmp_path / "0" / "out")
        shutil.copytree(TWO_FILES, tmp_path / "0" / "out")
    outcomes = []
    for number in range(1, 100):
        folder = shutil.copytree(tmp_path / "0", tmp_path / str(number))
        with monkeypatch.context() as patch:
            calls = fails_at(patch, number, error)
            with contextlib.suppress(error):
                writer.write(folder, 1)
        (found,) = writer.read(folder)
        outcomes.append(found)
        left = list(folder.rglob(".*.tmp"))
        assert error is Killed or calls[-1] == "unlink" or not left
        writer.write(folder, 2)
        assert writer.read(folder) == {2}
        # A killed save_quantized leaves its temporary file: the folder is the user's.
        is_left = error is Killed and name == "save_quantized"
        assert is_left or everything(folder).keys() == names
        if len(calls) < number:
            break
    assert outcomes == sorted(outcomes)
    # Old up to the rename, new after it, and one save of which no call fails.
    assert (outcomes.count(0), len(outcomes)) == steps
