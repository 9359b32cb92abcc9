"""Files that are written are old or new and whole, whenever the process is killed."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("writer", "steps"),
    [
        ("save_adapters", 10),
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
