"""Interleaved timing of several functions in one process, and what reports it.

A shared machine changes speed from second to second. So every round calls every function
once, in an order of its own, and a function is judged by the median over rounds of its
time over the baseline's in the same round.
"""

import argparse
import dataclasses
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Times:
    """What the rounds took, in seconds, one entry a round.

    Attributes:
        wall: elapsed time.
        cpu: time of all threads of this process, `time.process_time`. It leaves out other
            processes' work, and on an accelerator the work of the device too.
    """

    wall: list[float]
    cpu: list[float]


@dataclasses.dataclass(frozen=True)
class Ratios:
    """Times over a baseline's.

    Attributes:
        wall: median over rounds of the ratio of elapsed times.
        cpu: median over rounds of the ratio of processor times.
        best: shortest elapsed time over the baseline's shortest.
    """

    wall: float
    cpu: float
    best: float


def pin(threads: int) -> None:
    """Restricts this process to `threads` processors; call it before JAX runs anything.

    The thread pools that XLA makes at its first use have as many threads as the process
    then has processors.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise OSError("threads cannot be pinned: this system has no os.sched_setaffinity.")
    available = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(available):
        raise ValueError(f"expected 1 to {len(available)} threads, got {threads}.")
    os.sched_setaffinity(0, available[:threads])


def environment() -> dict[str, Any]:
    """What a table of times has to say of the machine."""
    device = jax.devices()[0]
    kind = _processor_name() if device.platform == "cpu" else device.device_kind
    processors = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    return {
        "device": kind,
        "platform": device.platform,
        "threads": processors,
        "jax": jax.__version__,
    }


def describe(result: Mapping[str, Any]) -> str:
    """What `environment` put into a result, in words."""
    r = result
    return f"{r['device']} ({r['platform']}), {r['threads']} threads, jax {r['jax']}"


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warmup: int = 2,
    seed: int = 0,
    repeat: int = 1,
) -> dict[str, Times]:
    """Times each of `calls` once a round, in a shuffled order.

    Args:
        calls: functions of no arguments. Each is timed until its result is ready.
        rounds: number of timed rounds.
        warmup: rounds before them that are not timed.
        seed: of the orders.
        repeat: calls of a function in a round. On an accelerator they are queued, so that
            the time to start a call does not count.

    Returns:
        The times of each, under its name.
    """
    times = {name: Times([], []) for name in calls}
    shuffle = random.Random(seed).shuffle
    order = list(calls)
    for i in range(warmup + rounds):
        shuffle(order)
        for name in order:
            wall, cpu = time.perf_counter(), time.process_time()
            result = None
            for _ in range(repeat):
                result = calls[name]()
            jax.block_until_ready(result)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if i >= warmup:
                times[name].wall.append(wall)
                times[name].cpu.append(cpu)
    return times


def take_turns(
    calls: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int, *, warmup: int = 1
) -> dict[str, Times]:
    """`interleave` for other processes, which say their `"wall"` and `"cpu"` themselves."""
    times = {name: Times([], []) for name in calls}
    shuffle, order = random.Random(0).shuffle, list(calls)
    for i in range(warmup + rounds):
        shuffle(order)
        for name in order:
            seconds = calls[name]()
            if i >= warmup:
                times[name].wall.append(seconds["wall"])
                times[name].cpu.append(seconds["cpu"])
        print(f"round {i + 1} of {warmup + rounds}", file=sys.stderr, flush=True)
    return times


def ratios(times: Mapping[str, Times], baseline: str) -> dict[str, Ratios]:
    """Each of `times` over those of `baseline`, which is among them."""
    base = times[baseline]

    def over_base(own: Times) -> Ratios:
        return Ratios(
            wall=_median_ratio(own.wall, base.wall),
            cpu=_median_ratio(own.cpu, base.cpu),
            best=min(own.wall) / min(base.wall),
        )

    return {name: over_base(own) for name, own in times.items()}


def _median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(
        own / base for own, base in zip(numerators, denominators, strict=True)
    )


def flops(compiled: Any) -> float:
    """Operations of a compiled program; of a loop, XLA counts one iteration."""
    return compiled.cost_analysis()["flops"]


def add_repeat(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--repeat` of `interleave`."""
    text = "calls in a round; take 10 on an accelerator, where they are queued"
    parser.add_argument("--repeat", type=int, default=1, help=text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("--threads", type=int, help="processors to pin this process to")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--markdown", action="store_true")


def run(
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    format_result: Callable[..., str],
) -> None:
    """Runs a benchmark: pins the process, measures, prints and writes the result.

    Args:
        options: those of `add_options`, and what `measure` needs.
        measure: makes of them the result, which JSON can hold.
        format_result: makes of it, and of `markdown`, the text to print.
    """
    if options.threads:
        pin(options.threads)
    result = measure(options)
    print(format_result(result, markdown=options.markdown))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=2)


def format_table(
    corner: str,
    columns: Sequence[str],
    rows: Mapping[str, Mapping[str, float]],
    *,
    markdown: bool = False,
) -> str:
    """A table as text.

    Args:
        corner: the head of the column of names.
        columns: names of the other columns.
        rows: by name, a number for each column.
        markdown: whether it is to be a table of Markdown.
    """
    lines = [[corner, *columns]]
    for name, row in rows.items():
        lines.append([name, *(f"{row[column]:.3f}" for column in columns)])
    width = max(len(line[0]) for line in lines)
    cells = [[name.ljust(width), *(c.rjust(8) for c in rest)] for name, *rest in lines]
    if not markdown:
        return "\n".join("  ".join(line) for line in cells)
    rule = ["-" * width, *["-" * 7 + ":"] * len(columns)]
    body = [cells[0], rule, *cells[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)


def _processor_name() -> str:
    """What Linux calls the processor; elsewhere what Python knows of it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.partition(":")[2] for line in file if line.startswith("model name")
            ]
    except FileNotFoundError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()
