"""Options, printed results and plots of the command lines in this folder."""

import argparse
import math
import pathlib
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import minilm
import numpy as np


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """Returns an argparse type for numbers from low to high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high:
            return value
        what = "a whole number" if kind is int else "a number"
        message = f"expected {what} from {low} to {high}, got {text!r}"
        raise argparse.ArgumentTypeError(message)

    return parse


def file_in(suffix: str) -> Callable[[str], pathlib.Path]:
    """Returns an argparse type for names of files that end in the suffix."""

    def parse(text: str) -> pathlib.Path:
        if pathlib.Path(text).suffix == suffix:
            return pathlib.Path(text)
        message = f"expected the name of a {suffix} file, got {text!r}"
        raise argparse.ArgumentTypeError(message)

    return parse


def folder(text: str) -> pathlib.Path:
    """The argparse type of folders, which need not exist yet."""
    path = pathlib.Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got the file {text!r}")
    return path


def peak_memory_mib() -> float:
    """Returns the most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes; what getrusage counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def smooth(values: Sequence[float], width: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps at which ten values end, and the means of the ten."""
    width = min(width, len(values))
    means = np.convolve(values, np.full(width, 1 / width), mode="valid")
    return np.arange(width, len(values) + 1), means


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Returns the mean, and the standard deviation if there are several values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "deviation": deviation}


SPLIT = """\
  sentences to train on, to test on   {train_sentences:,}, {test_sentences:,}
  linear probe on the frozen encoder  {probe_accuracy:.1%}
  {method} after each epoch               {shares}
  {method} merged                         {merged_accuracy:.1%}, {difference}
  stored after the merge              {merged_megabytes:.1f} MB{dense}
  frozen weights                      {same} those before training
  trained parameters                  {trainable_parameters:,}, in {folder}"""


def print_split(job: dict[str, Any], split: dict[str, Any], folder: pathlib.Path) -> None:
    """Prints the results of one split, and where they are saved."""
    tests, difference = split["history"]["test_accuracy"], split["merge_max_difference"]
    dense = f"; merged kernels are dense, the others {job['base']}"
    words = {
        "shares": ", ".join(f"{share:.1%}" for share in tests),
        "difference": f"logits within {difference:.1e} of the adapted ones",
        "dense": "" if job["base"] == "full" else dense,
        "same": "bit-identical to" if split["frozen_unchanged"] else "DIFFERENT FROM",
    }
    print(SPLIT.format(**job, **split, **words, folder=folder))


def print_summary(summary: dict[str, Any]) -> None:
    """Prints the means over several splits, the time and the memory."""
    for title, name in (("probe", "probe"), (summary["method"], "adapter")):
        accuracy = summary[f"{name}_accuracy"]
        if accuracy["deviation"] is not None:
            print(f"{title}: {accuracy['mean']:.1%} on average over the splits, ", end="")
            print(f"standard deviation {accuracy['deviation']:.1%}")
    print(f"{summary['seconds']:.0f} s, peak memory {summary['peak_memory_mib']:.0f} MiB")


def plot(summary: dict[str, Any], path: pathlib.Path) -> None:
    """Draws loss and accuracy over the steps, in one color for each split."""
    figure = minilm.optional_import("matplotlib.figure").Figure((9, 3.6), dpi=150)
    left, right = figure.subplots(1, 2)
    for index, split in enumerate(summary["splits"]):
        history, color, probe = split["history"], f"C{index}", split["probe_accuracy"]
        tests = history["test_accuracy"]
        ends = np.linspace(0, len(history["loss"]), len(tests) + 1)[1:]
        left.plot(*smooth(history["loss"]), color=color, label=f"split {index}")
        right.plot(*smooth(history["accuracy"]), color=color, label="training")
        right.plot(ends, tests, "o", color=color, label="test, after each epoch")
        right.axhline(probe, color=color, ls="--", label="test, linear probe")
    left.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    right.set(xlabel="step", ylabel="accuracy", ylim=(0.5, 1))
    left.legend()
    right.legend(*(part[:3] for part in right.get_legend_handles_labels()))
    figure.suptitle(f"{summary['method']}, rank {summary['rank']}; means of 10 steps")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
