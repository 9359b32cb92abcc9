"""Runs one contestant of `bench_language_model.py`, as it is told.

    python _language_worker.py CONTESTANT CASE

answers requests as `_field_worker.py` does:

    {"command": "prepare"} -> {"losses": [...], "versions": {...}}, of the first steps
    {"command": "step", "steps": 1} -> {"wall": ..., "cpu": ...}, in seconds
    {"command": "memory"} -> the costs of the contestant, and "peak_bytes" of this process
        since the first steps ended
"""

import importlib
import pathlib
import sys

import _field_worker
from _language_case import CHECKED_STEPS, CONTESTANTS, LanguageCase


def peak_bytes() -> int:
    """The most memory that this process has held since `forget_peak`, in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    """Makes the memory that this process holds now the most that it has held."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


class Worker:
    """One contestant."""

    def __init__(self, name: str, case: LanguageCase):
        kind = CONTESTANTS[name]
        module = importlib.import_module(f"_language_{kind.framework}")
        self._contestant = module.make(kind, case)

    def prepare(self):
        """Runs the first steps."""
        losses = [self._contestant.step() for _ in range(CHECKED_STEPS)]
        forget_peak()
        return {"losses": losses, "versions": dict(_field_worker.versions())}

    def step(self, steps: int):
        """Times some steps together."""
        return _field_worker.time_steps(self._contestant.step, steps)

    def memory(self):
        """What a step needs."""
        return {**self._contestant.costs(), "peak_bytes": peak_bytes()}


def main(arguments: list[str]) -> None:
    """Serves on the streams of this process."""
    name, case = arguments
    answers = _field_worker.take_over_output()
    worker = Worker(name, LanguageCase.from_json(case))
    commands = {"prepare": worker.prepare, "step": worker.step, "memory": worker.memory}
    _field_worker.serve(commands, sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
