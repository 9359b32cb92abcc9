"""Statistics, tables and the plot of the study of DoRA's norm axis, from its record."""

import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

import minilm

JOB = ("data", "seed", "rate", "arm")  # what identifies a run
DATA = ("products", "movies")
LABELS = {"dora_out": "DoRA, per output", "dora_in": "DoRA, per input", "lora": "LoRA"}
PAIRS = {
    ("dora_in", "dora_out"): "per input - per output",
    ("dora_out", "lora"): "per output - LoRA",
    ("dora_in", "lora"): "per input - LoRA",
}
UNITS = {"test_accuracy": 100.0, "training_loss": 1.0}  # accuracy in points
MINUS = "\N{MINUS SIGN}"


class Paired(NamedTuple):
    """Of the differences of pairs: mean, its standard error, half the 95 % interval."""

    mean: float
    error: float
    half_width: float


def t_quantile(freedom: int) -> float:
    """Returns the 97.5 % quantile of Student's t.

    With `x = tan(angle) * sqrt(freedom)` the density is `cos(angle) ** (freedom - 1)`, up
    to a factor, on a finite interval.
    """
    angles = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    shares = np.cumsum((density[1:] + density[:-1]) / 2)
    angle = np.interp(0.95 * shares[-1], shares, angles[1:])
    return float(np.tan(angle) * math.sqrt(freedom))


def paired(differences: Sequence[float] | np.ndarray) -> Paired:
    """Returns the statistics of at least two differences."""
    error = float(np.std(differences, ddof=1) / math.sqrt(len(differences)))
    half_width = t_quantile(len(differences) - 1) * error
    return Paired(float(np.mean(differences)), error, half_width)


def values(
    record: dict[str, Any], metric: str, data: str, rate: float | None, arm: str
) -> np.ndarray:
    """Returns a metric of the runs of an arm: `(seeds,)`, in the order of the seeds."""
    runs = sorted(record["runs"], key=lambda run: run["seed"])
    found = [r for r in runs if (r["data"], r["rate"], r["arm"]) == (data, rate, arm)]
    return UNITS[metric] * np.array([run[metric] for run in found])


def complete_rates(record: dict[str, Any]) -> list[float]:
    """Returns the learning rates with all their runs, from low to high.

    Raises:
        ValueError: if there are fewer than two seeds, or no such rate.
    """
    settings = record["settings"]
    expected = settings["seeds"] * len(DATA) * len(LABELS)
    counts = {r: sum(x["rate"] == r for x in record["runs"]) for r in settings["rates"]}
    rates = sorted(rate for rate, count in counts.items() if count == expected)
    if settings["seeds"] < 2 or not rates:
        raise ValueError(
            f"expected two seeds or more, and {expected} runs of a learning rate, got "
            f"{settings['seeds']} seeds and {counts} runs: let the study go on."
        )
    return rates


def differences(
    record: dict[str, Any],
    metric: str,
    data: Sequence[str],
    rates: Sequence[float],
    pair: tuple[str, str],
) -> np.ndarray:
    """Returns first less second arm, means over the rates: `(data * seeds,)`."""
    first, second = (
        [np.mean([values(record, metric, d, r, arm) for r in rates], axis=0) for d in data]
        for arm in pair
    )
    return np.concatenate(first) - np.concatenate(second)


def groups(record: dict[str, Any]) -> Iterator[tuple[str, str, list[str], list[float]]]:
    """Yields what differences are of: two titles, the data sets, the learning rates."""
    rates = complete_rates(record)
    for title, data in [*((name, [name]) for name in DATA), ("both", list(DATA))]:
        yield from ((title, f"{rate:g}", data, [rate]) for rate in rates)
        if len(rates) > 1:
            yield title, "mean", data, rates


def tables(record: dict[str, Any]) -> str:
    """Returns the tables of the study, in Markdown; the last is of incomplete rates."""
    parts = [table_of_arms(record), table_of_differences(record), table_of_rest(record)]
    return "\n\n".join(filter(None, parts))


def table_of_arms(record: dict[str, Any]) -> str:
    """Returns a table of the means and deviations over the seeds."""
    lines = ["| data | learning rate | arm | test accuracy, % | training loss |"]
    lines += ["| --- | ---: | --- | ---: | ---: |"]
    for data in DATA:
        rows = [(None, "probe")]
        rows += [(rate, arm) for rate in complete_rates(record) for arm in LABELS]
        for rate, arm in rows:
            accuracy = values(record, "test_accuracy", data, rate, arm)
            loss = values(record, "training_loss", data, rate, arm)
            title = "" if rate is None else f"{rate:g}"
            name = LABELS.get(arm, "linear probe")
            cells = f"{_spread(accuracy, 1)} | {_spread(loss, 3)}"
            lines.append(f"| {data} | {title} | {name} | {cells} |")
    return "\n".join(lines)


def table_of_differences(record: dict[str, Any]) -> str:
    """Returns a table of the differences between arms."""
    lines = ["| data | learning rate | difference | accuracy, points | loss |"]
    lines += ["| --- | ---: | --- | ---: | ---: |"]
    for title, rate, data, rates in groups(record):
        for pair, name in PAIRS.items():
            cells = " | ".join(
                _interval(paired(differences(record, metric, data, rates, pair)), digits)
                for metric, digits in (("test_accuracy", 2), ("training_loss", 4))
            )
            lines.append(f"| {title} | {rate} | {name} | {cells} |")
    return "\n".join(lines)


def table_of_rest(record: dict[str, Any]) -> str:
    """Returns a table of the runs of learning rates that lack some: nothing if none do."""
    complete, rows = complete_rates(record), {}
    for run in record["runs"]:
        if run["rate"] is not None and run["rate"] not in complete:
            cell = f"{100 * run['test_accuracy']:.1f}, {run['training_loss']:.3f}"
            rows.setdefault((run["rate"], run["seed"], run["data"]), {})[run["arm"]] = cell
    if not rows:
        return ""
    lines = ["| learning rate | seed | data | " + " | ".join(LABELS.values()) + " |"]
    lines += ["| ---: | ---: | --- | ---: | ---: | ---: |"]
    for (rate, seed, data), cells in rows.items():
        texts = " | ".join(cells.get(arm, "") for arm in LABELS)
        lines.append(f"| {rate:g} | {seed} | {data} | {texts} |")
    return "\n".join(lines)


def _spread(values: np.ndarray, digits: int) -> str:
    """Writes a mean and a standard deviation."""
    deviation = np.std(values, ddof=1)
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def _interval(result: Paired, digits: int) -> str:
    """Writes a mean, its standard error and the interval."""
    low, high = result.mean - result.half_width, result.mean + result.half_width
    text = (
        f"{result.mean:+z.{digits}f} ({result.error:.{digits}f}) "
        f"[{low:+z.{digits}f}, {high:+z.{digits}f}]"
    )
    return text.replace("-", MINUS)


def plot(record: dict[str, Any], path: pathlib.Path) -> None:
    """Draws accuracy by learning rate, and the differences between the norm axes."""
    figure = minilm.optional_import("matplotlib.figure").Figure((11, 3.6), dpi=100)
    *panels, right = figure.subplots(1, 3)
    rates = complete_rates(record)
    places = np.arange(len(rates))
    for axes, data in zip(panels, DATA, strict=True):
        for index, (arm, label) in enumerate(LABELS.items()):
            shift, color = 0.2 * (index - 1), f"C{index}"
            seeds = np.array([values(record, "test_accuracy", data, r, arm) for r in rates])
            rows = np.broadcast_to(places[:, None] + shift, seeds.shape)
            axes.plot(rows.ravel(), seeds.ravel(), ".", color=color, alpha=0.4)
            axes.plot(places + shift, seeds.mean(1), "_", color=color, ms=16, label=label)
        probe = np.mean(values(record, "test_accuracy", data, None, "probe"))
        axes.axhline(probe, color="gray", ls="--", label="linear probe, mean")
        axes.set(title=data, ylabel="test accuracy, %", xlabel="learning rate")
        axes.set_xticks(places, [f"{rate:g}" for rate in rates])
    low, high = (f(axes.get_ylim()[i] for axes in panels) for i, f in ((0, min), (1, max)))
    for axes in panels:
        axes.set_ylim(low, high)
    panels[0].legend(fontsize=7)
    _draw_differences(right, record)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_differences(axes: Any, record: dict[str, Any]) -> None:
    """Draws per input less per output, with 95 % intervals, one row for each group."""
    pair, titles = ("dora_in", "dora_out"), []
    for row, (title, rate, data, rates) in enumerate(groups(record)):
        result = paired(differences(record, "test_accuracy", data, rates, pair))
        axes.errorbar(result.mean, -row, xerr=result.half_width, fmt="ok", capsize=3)
        titles.append(f"{title}, {rate}")
    axes.axvline(0, color="gray", lw=1)
    axes.set_yticks(-np.arange(len(titles)), titles, fontsize=7)
    axes.set(title="per input - per output", xlabel="difference in accuracy, points")
