"""Runs contestants of `bench_field.py` in one environment, as it is told.

    python _field_worker.py ENVIRONMENT CASE

reads a JSON object a line from standard input and answers each with one on standard output:

    {"command": "list"}                 -> {"ready": [...], "missing": {NAME: REASON}, ...}
    {"command": "prepare", "name": ...} -> {"losses": [...]}, of the first steps
    {"command": "step", "name": ..., "steps": 1} -> {"wall": ..., "cpu": ...}, in seconds
    {"command": "memory", "name": ...}  -> the costs of a `_field_case.Contestant`

or, where that failed, with `{"error": ...}`.
"""

import contextlib
import importlib
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any, TextIO

from _field_case import CHECKED_STEPS, CONTESTANTS, Case, Contestant

PACKAGES = ("jax", "flax", "qwix", "torch", "peft", "transformers")


class Worker:
    """The contestants of one environment."""

    def __init__(self, environment: str, case: Case):
        names = [n for n, kind in CONTESTANTS.items() if kind.environment == environment]
        self._case = case
        self._modules: dict[str, Any] = {}
        self._missing: dict[str, str] = {}
        self._contestants: dict[str, Contestant] = {}
        for name in names:
            try:
                module = importlib.import_module(CONTESTANTS[name].module)
                self._modules[name] = module
            except ImportError as error:
                self._missing[name] = str(error)

    def list(self) -> dict[str, Any]:
        """What runs here, and why the rest does not."""
        device = next((m.device() for m in self._modules.values()), {})
        return {
            "ready": list(self._modules),
            "missing": self._missing,
            "versions": dict(versions()),
            **device,
        }

    def prepare(self, name: str) -> dict[str, Any]:
        """Makes and compiles a contestant, and runs its first steps."""
        contestant = self._modules[name].make(name, self._case)
        self._contestants[name] = contestant
        return {"losses": [contestant.step() for _ in range(CHECKED_STEPS)]}

    def step(self, name: str, steps: int) -> dict[str, float]:
        """Times some steps together."""
        return time_steps(self._contestants[name].step, steps)

    def memory(self, name: str) -> dict[str, float]:
        """What a step needs."""
        return self._contestants[name].costs()


def time_steps(step: Callable[[], float], steps: int) -> dict[str, float]:
    """The seconds that some steps take together."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def versions() -> Iterator[tuple[str, str]]:
    """The versions of Python and of packages."""
    yield "python", platform.python_version()
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield package, metadata.version(package)


def serve(commands: Mapping[str, Callable[..., Any]], source: TextIO, sink: TextIO) -> None:
    """Answers every line of `source` with one in `sink`.

    Args:
        commands: by name, called with the rest of the object as keyword arguments.
        source: one JSON object a line; its end is the end.
        sink: where the answers go.
    """
    for line in source:
        request = json.loads(line)
        try:
            answer = commands[request.pop("command")](**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=sink, flush=True)


def take_over_output() -> TextIO:
    """The standard output, for answers: what libraries print is not taken for one."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def main(arguments: list[str]) -> None:
    """Serves on the streams of this process."""
    environment, case = arguments
    answers = take_over_output()
    worker = Worker(environment, Case.from_json(case))
    commands = {
        "list": worker.list,
        "prepare": worker.prepare,
        "step": worker.step,
        "memory": worker.memory,
    }
    serve(commands, sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
