"""What `bench_field.py` computes of times and costs, prints and draws."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import _timing
from _field_case import CONTESTANTS, FROZEN

COLUMNS = ("wall", "cpu", "best", "own", "temp MiB", "state MiB", "trained k")
GOAL_COLUMNS = ("wall", "cpu", "memory", "goal", "met")
LORA, DORA = "adapt LoRA", "adapt DoRA"
SIZES = ("layers", "width", "heads", "batch", "length", "rank", "dtype", "steps")

Times = Mapping[str, _timing.Times]
Costs = Mapping[str, Mapping[str, float]]


class Goal(NamedTuple):
    """An upper bound of the ratio of two contestants.

    Attributes:
        own: the contestant whose time is the numerator.
        other: the one whose time is the denominator.
        limit: what the ratio may be.
        of: `"time"`, or `"memory"` for the temporary memory.
        one_thread: whether it is set for one thread of a CPU only.
    """

    own: str
    other: str
    limit: float
    of: str = "time"
    one_thread: bool = False


GOALS = (
    Goal(LORA, FROZEN, 1.20),
    Goal(LORA, "nnx.LoRA", 0.75),
    Goal(LORA, "qwix LoRA, linen", 0.75),
    Goal(LORA, "full fine-tuning", 0.85),
    Goal(LORA, "by hand LoRA", 1.03),
    Goal(DORA, LORA, 1.15),
    Goal(LORA, "torch peft LoRA", 1.15, one_thread=True),
    Goal(DORA, "torch peft DoRA", 1.00, one_thread=True),
    Goal(LORA, "textbook LoRA", 1.00, of="memory"),
)


def measure_of(platform: str) -> str:
    """Which time counts: on a CPU that of the process, without that of other processes."""
    return "cpu" if platform == "cpu" else "wall"


def make_rows(
    times: Times, costs: Costs, measure: str
) -> dict[str, dict[str, float | None]]:
    """A row of numbers for each contestant; None where there is none."""
    ratios = _timing.ratios(times, FROZEN)
    rows = {}
    for name in times:
        own = costs[name]
        baseline = CONTESTANTS[name].baseline
        row: dict[str, float | None] = dict(dataclasses.asdict(ratios[name]))
        row["own"] = None
        if baseline in times:
            row["own"] = getattr(_timing.ratios(times, baseline)[name], measure)
        row["temp MiB"] = _mib(own.get("temp_bytes"))
        row["state MiB"] = _mib(own["state_bytes"])
        row["trained k"] = own["trained"] / 1e3
        rows[name] = row
    return rows


def _mib(number: float | None) -> float | None:
    return None if number is None else number / 2**20


def judge(
    times: Times, costs: Costs, measure: str, *, one_thread: bool
) -> list[dict[str, Any]]:
    """The goals with what was measured.

    Args:
        times: of the contestants that ran.
        costs: of the same.
        measure: `"wall"` or `"cpu"`: the ratio of which times decides.
        one_thread: whether one thread of a CPU was used.

    Returns:
        One record a goal. `"met"` is None where a contestant is missing, or the goal is for
        another number of threads.
    """
    records = []
    for goal in GOALS:
        record: dict[str, Any] = {**goal._asdict(), "wall": None, "cpu": None}
        record |= {"memory": None, "met": None}
        if {goal.own, goal.other} <= set(times):
            ratios = _timing.ratios(times, goal.other)[goal.own]
            record |= {"wall": ratios.wall, "cpu": ratios.cpu}
            temp = [costs[name].get("temp_bytes") for name in (goal.own, goal.other)]
            if temp[0] and temp[1]:
                record["memory"] = temp[0] / temp[1]
            deciding = record["memory" if goal.of == "memory" else measure]
            if deciding is not None and (one_thread or not goal.one_thread):
                record["met"] = deciding <= goal.limit
        records.append(record)
    return records


def baseline_of(times: Times) -> dict[str, float]:
    """Absolute times of the frozen step."""
    return {
        "wall_ms": 1e3 * statistics.median(times[FROZEN].wall),
        "cpu_ms": 1e3 * statistics.median(times[FROZEN].cpu),
    }


def format_result(result: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The result as text: what was run, who did not, and the tables."""
    sizes = ", ".join(f"{name} {result[name]}" for name in SIZES)
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    head = [
        f"{sizes}; {result['device']} ({result['platform']}), {result['threads']} threads; "
        f"{versions}; {result['rounds']} rounds; {FROZEN}: "
        f"{result['baseline']['wall_ms']:.0f} ms wall, "
        f"{result['baseline']['cpu_ms']:.0f} ms cpu."
    ]
    head += [f"Left out: {name}: {why}" for name, why in result["left_out"].items()]
    rows = {
        name: [_number(row[column]) for column in COLUMNS]
        for name, row in result["rows"].items()
    }
    table = format_cells(f"ratio to {FROZEN}", COLUMNS, rows, markdown=markdown)
    goals = {_title(goal): _goal_cells(goal) for goal in result["goals"]}
    return "\n\n".join(
        [
            "\n".join(head),
            table,
            f"Times are judged by {result['measure']}.",
            format_cells("ratio", GOAL_COLUMNS, goals, markdown=markdown),
        ]
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _title(goal: Mapping[str, Any]) -> str:
    return f"{goal['own']} / {goal['other']}" + (
        ", memory" if goal["of"] == "memory" else ""
    )


def _goal_cells(goal: Mapping[str, Any]) -> list[str]:
    met = {True: "yes", False: "no", None: "not judged"}[goal["met"]]
    return [*(_number(goal[column]) for column in ("wall", "cpu", "memory", "limit")), met]


def format_cells(
    corner: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[str]],
    *,
    markdown: bool = False,
) -> str:
    """A table of text, as `_timing.format_table` makes of numbers."""
    lines = [[corner, *columns], *([name, *cells] for name, cells in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [line[0].ljust(widths[0])]
        + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    body = [padded[0], rule, *padded[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)


def plot(result: Mapping[str, Any], path: str) -> None:
    """Draws the ratios to the frozen step as bars; this library's are of another color."""
    from matplotlib.figure import Figure  # of the extra `examples`

    names, measure = list(result["rows"])[::-1], result["measure"]
    values = [result["rows"][name][measure] for name in names]
    colors = ["tab:blue" if name.startswith("adapt ") else "0.65" for name in names]
    figure = Figure((8, 1 + 0.28 * len(names)), dpi=150, layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, values, color=colors)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.1)
    axes.set_xlabel(f"time of a training step over that of the frozen step ({measure})")
    axes.set_title(
        f"{result['layers']} layers of width {result['width']}, rank {result['rank']}, "
        f"{result['dtype']}, {result['device']}, {result['threads']} threads",
        fontsize=8,
    )
    figure.savefig(path)
