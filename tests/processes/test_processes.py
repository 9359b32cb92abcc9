"""Two processes of two devices each, against one process with four devices."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import lora_jax
from lora_jax import peft, quant
from tests import reference
from tests.processes import program
from tests.support import assert_close

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 300  # seconds, for a machine that does much else
# Adam divides by small moments, and sums over devices may be in another order.
ULPS = 64


def start(task, folder):
    """Runs a task of the program in two processes; their exit codes and their output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    settings = {"XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "tests.processes.program", task]
    logs = [folder / f"{task}-{index}.txt" for index in range(2)]
    started, end, late = [], time.monotonic() + LIMIT, []
    for index, log in enumerate(logs):
        with log.open("w") as output:
            started.append(
                subprocess.Popen(
                    [*command, str(index), "2", str(port), str(folder)],
                    cwd=ROOT,
                    env=os.environ | settings,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    for index, process in enumerate(started):
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            late.append(index)
            process.kill()
            process.wait()
    text = "\n".join(f"{log.name}:\n{log.read_text()}" for log in logs)
    assert not late, f"processes {late} did not end within {LIMIT} seconds\n{text}"
    return [process.returncode for process in started], text


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with what one process wrote in "1", and what two processes wrote in "2"."""
    folder = tmp_path_factory.mktemp("runs")
    program.everything(folder)
    codes, text = start("everything", folder)
    assert codes == [0, 0], text
    return folder


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("method", program.METHODS)
def test_adapters_of_two_processes_are_those_of_one(runs, method):
    (one, plan), (two, other) = (
        lora_jax.load_adapters(runs / count / method / "own") for count in "12"
    )
    assert plan == other
    jax.tree.map(lambda got, want: assert_close(got, want, ULPS), two, one)
    run = program.Run(method, program.mesh_of(2, 2))
    loaded = peft.load(runs / "2" / method / "peft", run.params, names=program.NAMES)
    program.assert_same(loaded.adapters, {path: two[path] for path in plan.targets})
    if method == "nf4":
        one, two = (
            quant.load_quantized(runs / count / method / "base.safetensors")
            for count in "12"
        )
        program.assert_same(two, one)


@pytest.mark.parametrize("method", program.METHODS)
def test_two_processes_merge_as_numpy_does(runs, method):
    """In float64, from the file of the adapters and, for NF4, that of the base."""
    folder, weights = runs / "2" / method, program.drawn()
    adapters, plan = lora_jax.load_adapters(folder / "own")
    if method == "nf4":
        base = quant.load_quantized(folder / "base.safetensors")
        weights |= {path: quant.dequantize(base[path]) for path in plan.targets}
    merge = reference.dora_weight if method == "dora" else reference.lora_weight
    merged = np.load(folder / "merged.npz")
    program.assert_same(merged["norm/scale"], adapters["norm/scale"]["value"])
    for path, target in plan.targets.items():
        weight, adapter = map(reference.f64, (weights[path], adapters[path]))
        want = merge(weight, adapter, target.scale)
        assert np.abs(want - weight).max() > 1e-3
        assert_close(merged[path], want, 4)


@pytest.mark.skipif(not program.HAS_ORBAX, reason="needs orbax, which comes with flax")
def test_training_goes_on_in_another_number_of_processes_and_on_another_mesh(runs):
    own = [runs / count / program.RESUMED for count in "12"]
    program.resume(own[1] / "state", own[0])  # two processes have resumed from one
    for folder in own:
        straight, _ = lora_jax.load_adapters(folder / "own")
        resumed = np.load(folder / "resumed.npz")
        want = program.whole(straight)
        assert sorted(resumed) == sorted(want)
        for name, array in want.items():
            assert_close(resumed[name], array, ULPS)


def test_a_save_that_fails_is_an_error_in_all_processes(tmp_path):
    codes, text = start("mistakes", tmp_path)
    assert codes == [0, 0], text


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_dies_while_both_save_leaves_the_old_adapters(tmp_path, index):
    codes, text = start(f"kill-{index}", tmp_path)
    assert codes[index] == -9, text
    assert codes[1 - index] != 0, text
    run, old = program.filled(1.0)
    adapters, _ = lora_jax.load_adapters(tmp_path / "own")
    program.assert_same(adapters, old)
    loaded = peft.load(tmp_path / "peft", run.params, names=program.NAMES)
    program.assert_same(loaded.adapters, {path: old[path] for path in run.plan.targets})
