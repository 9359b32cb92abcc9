"""Tables and the plot of the study of initializers, from its record."""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import dora_norm_axis_report as pairs
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

import minilm

JOB = ("seed", "rate", "arm")  # what identifies a run
LABELS = {
    "default": "LoRA with AdamW",
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "lora_one": "LoRA-One",
    "lora_ga": "LoRA-GA",
    "eva": "EVA",
    "rank_stabilized": "rank stabilization",
    "lora_plus": "LoRA+",
    "riemannian": "Riemannian",
    "lora_rite": "LoRA-RITE",
}


def values(
    record: Mapping[str, Any], metric: str, arm: str, rate: float | None
) -> np.ndarray:
    """Returns a metric of the runs of an arm: `(seeds,)`, in the order of the seeds."""
    runs = sorted(record["runs"], key=lambda run: run["seed"])
    return np.array([r[metric] for r in runs if (r["arm"], r["rate"]) == (arm, rate)])


def complete_arms(record: Mapping[str, Any]) -> list[str]:
    """Returns the arms with all their runs, in the order of `LABELS`.

    Raises:
        ValueError: if there are fewer than two seeds, or plain LoRA is not complete.
    """
    seeds, rates = (record["settings"][name] for name in ("seeds", "rates"))
    counts = {arm: sum(run["arm"] == arm for run in record["runs"]) for arm in LABELS}
    arms = [arm for arm, count in counts.items() if count == seeds * len(rates)]
    if seeds < 2 or "default" not in arms:
        raise ValueError(
            f"expected two seeds or more, and {seeds * len(rates)} runs of 'default', got "
            f"{seeds} seeds and {counts} runs: let the study go on."
        )
    return arms


def best_rate(record: Mapping[str, Any], arm: str) -> float:
    """Returns the rate with the lowest mean loss on the validation sentences."""
    rates = record["settings"]["rates"]
    return min(rates, key=lambda r: np.mean(values(record, "validation_loss", arm, r)))


def tables(record: Mapping[str, Any]) -> str:
    """Returns the tables of the study, in Markdown."""
    return "\n\n".join([table_of_arms(record), table_of_rates(record)])


def table_of_arms(record: Mapping[str, Any]) -> str:
    """Returns a table of each arm at its best rate, and its differences to plain LoRA."""
    lines = [
        "| arm | best rate | test accuracy, % | test loss | training loss "
        "| accuracy less LoRA's, points | test loss less LoRA's |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    reference = "default", best_rate(record, "default")
    for arm in ("probe", *complete_arms(record)):
        rate = None if arm == "probe" else best_rate(record, arm)
        cells = ["linear probe" if rate is None else LABELS[arm]]
        cells.append("" if rate is None else f"{rate:g}")
        for metric, unit, digits in METRICS:
            cells.append(_mean(unit * values(record, metric, arm, rate), digits))
        for metric, unit, digits in METRICS[:2]:
            difference = values(record, metric, arm, rate)
            difference = difference - values(record, metric, *reference)
            text = _mean(unit * difference, digits, "+z")
            cells.append("" if arm == "default" else text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


METRICS = (
    ("test_accuracy", 100.0, 1),
    ("test_loss", 1.0, 3),
    ("train_loss", 1.0, 3),
)


def table_of_rates(record: Mapping[str, Any]) -> str:
    """Returns a table of the test loss of each arm at each rate."""
    rates = record["settings"]["rates"]
    lines = ["| arm | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
    lines.append("| --- |" + " ---: |" * len(rates))
    for arm in complete_arms(record):
        cells = [_mean(values(record, "test_loss", arm, rate), 3) for rate in rates]
        lines.append(f"| {LABELS[arm]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float] | np.ndarray, digits: int, sign: str = "") -> str:
    """Writes a mean and its standard error."""
    result = pairs.paired(values)
    text = f"{result.mean:{sign}.{digits}f} ({result.error:.{digits}f})"
    return text.replace("-", pairs.MINUS)


def plot(record: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws the test loss by learning rate, and the arms at their best rates."""
    figure = minilm.optional_import("matplotlib.figure").Figure((11, 4.2), dpi=100)
    left, right = figure.subplots(1, 2)
    arms, rates = complete_arms(record), record["settings"]["rates"]
    probe = np.mean(values(record, "test_loss", "probe", None))
    for row, arm in enumerate(arms):
        style = {"color": f"C{row}", "marker": "o^s"[row % 3], "ms": 4}
        means = [np.mean(values(record, "test_loss", arm, rate)) for rate in rates]
        left.plot(rates, means, label=LABELS[arm], **style)
        losses = values(record, "test_loss", arm, best_rate(record, arm))
        right.plot(losses, [-row] * len(losses), ".", color="gray", alpha=0.6)
        result = pairs.paired(losses)
        right.errorbar(result.mean, -row, xerr=result.error, capsize=3, **style)
    for draw in (left.axhline, right.axvline):
        draw(probe, color="black", lw=1, ls="--", label="linear probe")
    left.set(xscale="log", xlabel="learning rate", ylabel="test loss, mean over seeds")
    left.set_xticks(rates, [f"{rate:g}" for rate in rates])
    left.minorticks_off()
    left.set_ylim(top=min(left.get_ylim()[1], 1.2 * probe))  # some arms diverge
    left.legend(fontsize=7)
    right.set_yticks([-row for row in range(len(arms))], [LABELS[arm] for arm in arms])
    right.set(xlabel="test loss at the best rate: seeds, mean, standard error")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
