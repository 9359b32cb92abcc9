"""Printed reports and plots of the sentiment example."""

import pathlib
import resource
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import minilm
import numpy as np


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Returns the mean, and the standard deviation if there are several values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "deviation": deviation}


def peak_memory_mib() -> float:
    """Returns the most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes; what getrusage counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def print_split(
    split: dict[str, Any], method: str, base: str, folder: pathlib.Path
) -> None:
    """Prints the results of one split, and where they are saved."""
    epochs = ", ".join(f"{share:.1%}" for share in split["history"]["test_accuracy"])
    same = "bit-identical to" if split["frozen_unchanged"] else "DIFFERENT FROM"
    difference = f"logits within {split['merge_max_difference']:.1e} of the adapted ones"
    dense = "" if base == "full" else f"; merged kernels are dense, the others {base}"
    rows = {
        "sentences to train on, to test on": (
            f"{split['train_sentences']:,}, {split['test_sentences']:,}"
        ),
        "linear probe on the frozen encoder": f"{split['probe_accuracy']:.1%}",
        f"{method} after each epoch": epochs,
        f"{method} merged": f"{split['merged_accuracy']:.1%}, {difference}",
        "stored after the merge": f"{split['merged_megabytes']:.1f} MB{dense}",
        "frozen weights": f"{same} those before training",
        "trained parameters": f"{split['trainable_parameters']:,}, in {folder}",
    }
    for title, value in rows.items():
        print(f"  {title:36}{value}")


def print_summary(summary: dict[str, Any]) -> None:
    """Prints the results of all splits."""
    for title, name in (("probe", "probe"), (summary["method"], "adapter")):
        accuracy = summary[f"{name}_accuracy"]
        if accuracy["deviation"] is not None:
            print(
                f"{title}: {accuracy['mean']:.1%} on average over the splits, "
                f"standard deviation {accuracy['deviation']:.1%}"
            )
    print(f"{summary['seconds']:.0f} s, peak memory {summary['peak_memory_mib']:.0f} MiB")


def plot(summary: dict[str, Any], path: pathlib.Path) -> None:
    """Draws loss and accuracy over the steps, in one color for each split."""
    figure = minilm.optional_import("matplotlib.figure").Figure((9, 3.6), dpi=150)
    left, right = figure.subplots(1, 2)
    for index, split in enumerate(summary["splits"]):
        history, color = split["history"], f"C{index}"
        tests = history["test_accuracy"]
        ends = np.linspace(0, len(history["loss"]), len(tests) + 1)[1:]
        left.plot(*smooth(history["loss"]), color=color, label=f"split {index}")
        right.plot(*smooth(history["accuracy"]), color=color, label="training")
        right.plot(ends, tests, "o", color=color, label="test, after each epoch")
        probe = split["probe_accuracy"]
        right.axhline(probe, color=color, ls="--", label="test, linear probe")
    left.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    right.set(xlabel="step", ylabel="accuracy", ylim=(0.5, 1))
    left.legend()
    right.legend(*(part[:3] for part in right.get_legend_handles_labels()))
    figure.suptitle(f"{summary['method']}, rank {summary['rank']}; means of 10 steps")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def smooth(values: Sequence[float], width: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps at which ten values end, and the means of the ten."""
    width = min(width, len(values))
    means = np.convolve(values, np.full(width, 1 / width), mode="valid")
    return np.arange(width, len(values) + 1), means
