"""Kills of processes while they write files, and readers beside writers.

`python -m tests.kills` kills each writer 200 times at random moments, then reads beside it.
`--steps` kills each writer once before every step that changes a directory. Whatever moment
it is, the files have to be the old ones or the new ones, whole. The processes are forks, so
those here must not have used a device: each writer has a process of its own.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

import lora_jax
import lora_jax.cli
from lora_jax import peft, quant

WIDTH, RANK = 96, 4
# What JAX's threads might do in a fork is not done: nothing is computed before it.
warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)

STEPS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "open")


class Writer(NamedTuple):
    """Something that writes files, of which each version has one number in all arrays."""

    write: Callable[[pathlib.Path, int], None]
    read: Callable[[pathlib.Path], set[float]]
    """The numbers in what is there: one, if it is whole."""
    prepare: Callable[[pathlib.Path], None] = lambda folder: None
    own: str = "out"
    """What the writer may change in the directory."""
    fresh: bool = False
    """Whether it writes to a place where there is nothing."""
    versions: int | None = None
    """How many versions there are, if they come again; None if each is newer."""


def adapters_of(number):
    """Adapters and a plan that tell a number: `A` is 1, and `scale * B` is the number."""
    scale = 2.0 ** (number % 5)
    config = lora_jax.LoraConfig(rank=RANK, alpha=RANK * scale, targets="*/kernel")
    shape = jax.ShapeDtypeStruct((WIDTH, WIDTH), "float32")
    params = {f"layers/{i}/q_proj/kernel": shape for i in range(6)}
    plan = lora_jax.plan_adapters(config, params)
    adapters = {
        path: {
            "A": np.ones(target.adapter_shapes["A"], "float32"),
            "B": np.full(target.adapter_shapes["B"], number / scale, "float32"),
        }
        for path, target in plan.targets.items()
    }
    return adapters, plan


PLANS = {number: adapters_of(number)[1] for number in range(5)}


def numbers_of(adapters, plan):
    found = set()
    for path, target in plan.targets.items():
        a, b = (np.asarray(adapters[path][name]) for name in "AB")
        assert (a == 1).all(), path
        found |= {float(x) * target.scale for x in np.unique(b)}
    return found


def write_own(folder, number):
    adapters, _ = adapters_of(number)
    lora_jax.save_adapters(folder / "out", adapters, PLANS[number % 5])


def read_own(folder):
    return numbers_of(*lora_jax.load_adapters(folder / "out"))


def write_peft(folder, number):
    adapters, _ = adapters_of(number)
    peft.save(folder / "out", adapters, PLANS[number % 5])


def read_peft(folder):
    params = {
        path: jax.ShapeDtypeStruct(target.shape, "float32")
        for path, target in PLANS[0].targets.items()
    }
    loaded = peft.load(folder / "out", params)
    return numbers_of(loaded.adapters, loaded.plan)


def write_quantized(folder, number):
    arrays = {str(i): np.full((WIDTH, WIDTH), number, "float32") for i in range(6)}
    quant.save_quantized(folder / "out", arrays)


def read_quantized(folder):
    tree = quant.load_quantized(folder / "out")
    assert len(tree) == 6
    return {float(x) for array in tree.values() for x in np.unique(array)}


VERSIONS = 3
FILES = ("model-1.safetensors", "model-2.safetensors")


def make_base(folder):
    """A model of zeros in two files, and adapters in both formats for each version."""
    (folder / "base").mkdir()
    names = [f"layers.{i}.q_proj.weight" for i in range(6)]
    parts = dict(zip(FILES, (names[:3], names[3:]), strict=True))
    for file, own in parts.items():
        arrays = {name: np.zeros((WIDTH, WIDTH), "float32") for name in own}
        save_file(arrays, folder / "base" / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "base" / "config.json").write_text("{}")
    for number in range(VERSIONS):
        adapters, _ = adapters_of(number)
        peft.save(folder / f"peft-{number}", adapters, PLANS[number])
        lora_jax.save_adapters(folder / f"own-{number}", adapters, PLANS[number])


def command(*arguments):
    assert lora_jax.cli.main([str(argument) for argument in arguments]) == 0


def merge(folder, number, *options):
    adapter = folder / f"peft-{number}"
    command("merge", folder / "base", adapter, folder / "out", "--quiet", *options)


def read_merged(folder):
    assert (folder / "out" / "config.json").read_text() == "{}"
    arrays = [
        array for file in FILES for array in load_file(folder / "out" / file).values()
    ]
    assert len(arrays) == 6
    return {float(x) / RANK for array in arrays for x in np.unique(array)}


def convert(folder, number):
    command("convert", folder / f"own-{number}", folder / "out", "--to", "peft")


WRITERS = {
    "save_adapters": Writer(write_own, read_own),
    "peft.save": Writer(write_peft, read_peft),
    "save_quantized": Writer(write_quantized, read_quantized),
    "merge": Writer(merge, read_merged, make_base, fresh=True, versions=VERSIONS),
    "merge --overwrite": Writer(
        lambda folder, number: merge(folder, number, "--overwrite"),
        read_merged,
        make_base,
        versions=VERSIONS,
    ),
    "convert": Writer(convert, read_peft, make_base, fresh=True, versions=VERSIONS),
}


def check(writer, folder, allowed, foreign):
    """What is wrong with the files, in words; nothing if they are whole."""
    try:
        found = writer.read(folder)
    except Exception as error:
        absent = writer.fresh and not (folder / writer.own).exists()
        return "" if absent else f"{type(error).__name__}: {error}"
    if len(found) != 1 or not found <= allowed:
        return f"holds {sorted(found)}, and one of {sorted(allowed)} was written"
    if contents(folder, writer) != foreign:
        return "other files were changed"
    return ""


def contents(folder, writer):
    """All files but those that the writer may change, and what they hold."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not is_own(file.relative_to(folder).parts[0], writer)
    }


def is_own(name, writer):
    return name == writer.own or (name.startswith(".") and name.endswith(".tmp"))


def forked(task):
    """The number of a process that does a task and ends."""
    number = os.fork()
    if number:
        return number
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        task()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)


def write(writer, folder, number):
    writer.write(folder, number % writer.versions if writer.versions else number)


def start(writer, folder):
    run(lambda: writer.prepare(folder))
    (folder / "notes.txt").write_text("the user's")
    if not writer.fresh:
        run(lambda: write(writer, folder, 0))
    return contents(folder, writer)


def run(task):
    _, status = os.waitpid(forked(task), 0)
    assert status == 0, status


def kill_at_random(writer, folder, count, seed):
    """What was wrong after each of some kills, and which versions there were."""
    rng, foreign, faults, seen = random.Random(seed), start(writer, folder), [], set()
    took = time.perf_counter()
    run(lambda: [write(writer, folder, 0) for _ in range(1 if writer.fresh else 4)])
    took = (time.perf_counter() - took) / (1 if writer.fresh else 4)
    number = 0
    for kill in range(count):
        if writer.fresh:
            shutil.rmtree(folder / writer.own, ignore_errors=True)
        first = number + 1

        def task(first=first):
            for each in itertools.count(first):
                write(writer, folder, each)
                if writer.fresh:
                    return

        process = forked(task)
        time.sleep(rng.uniform(0, (1.3 if writer.fresh else 3) * took))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        # Whatever number it got to, all arrays have one, and none is older than before.
        newest = range(number, first + 10_000)
        allowed = {
            float(n) for n in (range(writer.versions) if writer.versions else newest)
        }
        fault = check(writer, folder, allowed, foreign)
        if fault:
            faults.append(f"kill {kill}: {fault}")
        elif not writer.fresh or (folder / writer.own).exists():
            (found,) = writer.read(folder)
            number = int(found)
            seen.add(number)
    return faults, seen


def kill_at_each_step(writer, folder):
    """What was wrong after a kill before each step of a write, and how many there are."""
    foreign, faults = start(writer, folder), []
    for step in itertools.count(1):
        if writer.fresh:
            shutil.rmtree(folder / writer.own, ignore_errors=True)

        def task(step=step):
            left = itertools.count(1)
            main = os.getpid()

            def hook(event, arguments):
                if (
                    event not in STEPS
                    or os.getpid() != main
                    or not changes(event, arguments)
                ):
                    return
                if next(left) == step:
                    os.kill(main, signal.SIGKILL)

            def changes(event, arguments):
                if event == "open" and not (
                    isinstance(arguments[2], int) and arguments[2] & 3
                ):
                    return False
                return str(folder) in str(arguments[0])

            sys.addaudithook(hook)
            write(writer, folder, step)

        _, status = os.waitpid(forked(task), 0)
        allowed = {float(n) for n in range(writer.versions or step + 1)}
        fault = check(writer, folder, allowed, foreign)
        if fault:
            faults.append(f"step {step}: {fault}")
        if not os.WIFSIGNALED(status):
            assert status == 0
            (found,) = writer.read(folder)
            last = step % writer.versions if writer.versions else step
            assert found == last, "the last one was not killed"
            return faults, step - 1


def read_beside(writer, folder, seconds):
    """What was wrong with what was read beside a writer, the versions, and the reads."""
    start(writer, folder)

    def task():
        for number in itertools.count(1):
            write(writer, folder, number)

    process, faults, seen, reads = forked(task), [], set(), 0
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            reads += 1
            try:
                found = writer.read(folder)
            except Exception as error:
                faults.append(f"{type(error).__name__}: {error}")
                continue
            if len(found) != 1:
                faults.append(f"holds {sorted(found)}")
            seen |= found
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return faults, seen, reads


def folders() -> Iterator[pathlib.Path]:
    while True:
        with tempfile.TemporaryDirectory() as name:
            yield pathlib.Path(name)


def measure(name, options):
    """Kills one writer and reads beside it; what came of it."""
    writer, places = WRITERS[name], folders()
    outcome = {"writer": name, "faults": []}
    if options.steps:
        faults, outcome["steps"] = kill_at_each_step(writer, next(places))
        outcome["faults"] += faults
    if options.kills:
        faults, seen = kill_at_random(writer, next(places), options.kills, options.seed)
        outcome["faults"] += faults
        outcome |= {"kills": options.kills, "versions": len(seen)}
    if options.seconds and not writer.versions:
        folder = next(places)
        faults, seen, reads = read_beside(writer, folder, options.seconds)
        outcome["faults"] += faults
        outcome |= {"reads": reads, "versions read": len(seen)}
    places.close()
    return outcome


def main(argv=None):
    """Prints one line of JSON for each writer, and returns 1 if files were not whole."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("writers", nargs="*", default=[*WRITERS])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", action="store_true", help="kill before each step too")
    parser.add_argument("--seconds", type=float, default=5.0, help="of reading beside")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if len(options.writers) == 1:
        outcome = measure(options.writers[0], options)
        print(json.dumps(outcome), flush=True)
        return int(bool(outcome["faults"]))
    own = ["--kills", str(options.kills), "--seconds", str(options.seconds)]
    own += ["--seed", str(options.seed)] + ["--steps"] * options.steps
    codes = [
        subprocess.run([sys.executable, "-m", "tests.kills", name, *own]).returncode
        for name in options.writers
    ]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
