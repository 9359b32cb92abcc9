"""Times of a training step of an adapted transformer, in this library and in others.

The model is a pre-LN transformer whose six matrices a layer all have an adapter. Each
contestant trains it from the same weights, factors and data with Adam; the frozen steps
compute the loss and its gradient with respect to the input. Frameworks that do not share an
environment run in processes of their own, which take turns: in every round each contestant
makes its steps, in a shuffled order, and is judged by the median over rounds of its time
over another's in the same round.

    python benchmarks/bench_field.py --threads 1 --plot field.png

Environments are made under `--envs` the first time, from `benchmarks/field/requirements-*`;
`--python jax=PATH torch=PATH` takes interpreters that are there. A contestant whose package
is missing is left out, and the output says so. There is no table unless all losses agree,
before training and after three updates.

Columns: medians of the ratio of elapsed and of processor time to those of `frozen`; best
over best; the ratio to the frozen step of the same framework; temporary memory of the
compiled step (of torch only on a GPU); the optimizer's state; thousands of trained
parameters.
"""

import argparse
import contextlib
import functools
import importlib
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import _field_report as report
import _timing
from _field_case import CONTESTANTS, FROZEN, Case, write_arrays
from _field_checks import TOLERANCES, check_losses
from _field_client import ENVIRONMENTS, Client, WorkerError, make_environment

PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        **{"layers": 4, "width": 512, "heads": 8, "batch": 4, "length": 256},
        **{"rank": 16, "dtype": "float32"},
    },
    "large": {
        **{"layers": 16, "width": 4096, "heads": 32, "batch": 2, "length": 1024},
        **{"rank": 16, "dtype": "bfloat16"},
    },
}


@contextlib.contextmanager
def start_workers(
    options: argparse.Namespace, case: Case
) -> Iterator[tuple[dict[str, Client], dict[str, str]]]:
    """Starts the environments that the wanted contestants need.

    Yields:
        The worker of each environment, and why an environment has none.
    """
    wanted = {CONTESTANTS[name].environment for name in options.only}
    workers, failures = {}, {}
    with contextlib.ExitStack() as stack:
        for environment in ENVIRONMENTS:
            if environment not in wanted:
                continue
            try:
                python = options.python.get(environment)
                python = python or make_environment(environment, options.envs)
                worker = Client(python, environment, case)
                stack.callback(worker.close)
                worker.ask("list")
                workers[environment] = worker
            except WorkerError as error:
                failures[environment] = str(error)
        yield workers, failures


def find_contestants(
    only: Sequence[str], workers: Mapping[str, Client], failures: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Which of the wanted contestants run, and why the others do not.

    Raises:
        WorkerError: if the baseline of all ratios is not among them.
    """
    answers = {name: worker.ask("list") for name, worker in workers.items()}
    ready, left_out = [], {}
    for name in only:
        environment = CONTESTANTS[name].environment
        if environment in failures:
            left_out[name] = failures[environment]
        elif name in answers[environment]["missing"]:
            left_out[name] = answers[environment]["missing"][name]
        else:
            ready.append(name)
    if FROZEN not in ready:
        why = left_out.get(FROZEN, "it was not asked for")
        raise WorkerError(f"{FROZEN!r}, which all ratios refer to, cannot run: {why}")
    return ready, left_out


def interleave(
    names: Sequence[str],
    workers: Mapping[str, Client],
    rounds: int,
    steps: int,
    *,
    warmup: int = 1,
) -> dict[str, _timing.Times]:
    """Times each contestant once a round, in a shuffled order, over all processes."""

    def timed(name: str) -> Any:
        ask = workers[CONTESTANTS[name].environment].ask
        return functools.partial(ask, "step", name=name, steps=steps)

    return _timing.take_turns({name: timed(name) for name in names}, rounds, warmup=warmup)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark. Returns the environment, the sizes and the tables."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {name: getattr(options, name) for name in PRESETS["small"]}
        file = str(pathlib.Path(folder) / "case.safetensors")
        case = Case(**sizes, threads=options.threads, file=file)
        write_arrays(case)
        with start_workers(options, case) as (workers, failures):
            result = _measure(options, workers, failures)
    result = {**sizes, "rounds": options.rounds, "steps": options.steps, **result}
    if options.plot:
        report.plot(result, options.plot)
    return result


def _measure(
    options: argparse.Namespace,
    workers: Mapping[str, Client],
    failures: Mapping[str, str],
) -> dict[str, Any]:
    names, left_out = find_contestants(options.only, workers, failures)
    worker_of = {name: workers[CONTESTANTS[name].environment] for name in names}
    losses = {}
    for name in names:
        losses[name] = worker_of[name].ask("prepare", name=name)["losses"]
        print(f"{name}: losses {losses[name]}", file=sys.stderr, flush=True)
    check_losses(losses, options.dtype)
    times = interleave(names, workers, options.rounds, options.steps)
    costs = {name: worker_of[name].ask("memory", name=name) for name in names}
    answers = [worker.ask("list") for worker in workers.values()]
    about = {key: value for answer in answers[::-1] for key, value in answer.items()}
    versions = {k: v for answer in answers[::-1] for k, v in answer["versions"].items()}
    decides = report.measure_of(about["platform"])
    one_thread = about["platform"] == "cpu" and about["threads"] == 1
    return {
        **{key: about[key] for key in ("device", "platform", "threads")},
        "versions": versions,
        "measure": decides,
        "left_out": left_out,
        "baseline": report.baseline_of(times),
        "rows": report.make_rows(times, costs, decides),
        "goals": report.judge(times, costs, decides, one_thread=one_thread),
        "losses": losses,
        "costs": costs,
        "times": {n: {"wall": t.wall, "cpu": t.cpu} for n, t in times.items()},
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="small")
    for name, value in PRESETS["small"].items():
        choices = tuple(TOLERANCES) if name == "dtype" else None
        parser.add_argument(f"--{name}", type=type(value), choices=choices)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=1, help="of a contestant in a round")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=tuple(CONTESTANTS), help="contestants"
    )
    cache = pathlib.Path.home() / ".cache" / "lora_jax" / "bench_field"
    parser.add_argument("--envs", type=pathlib.Path, default=cache, metavar="DIR")
    parser.add_argument("--python", nargs="+", default=[], metavar="ENVIRONMENT=PATH")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the ratios there too")
    _timing.add_options(parser)
    parser.set_defaults(threads=1)
    options = parser.parse_args(arguments)
    for name, value in PRESETS[options.preset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.width % options.heads:
        parser.error(f"--heads {options.heads} does not divide --width {options.width}")
    options.python = dict(item.partition("=")[::2] for item in options.python)
    if not set(options.python) <= set(ENVIRONMENTS) or not all(options.python.values()):
        parser.error(f"--python wants NAME=PATH with a name of {', '.join(ENVIRONMENTS)}")
    # The order of the table, and no contestant twice.
    options.only = [n for n in CONTESTANTS if n in (options.only or CONTESTANTS)]
    if options.plot:
        importlib.import_module("matplotlib.figure")  # before the hours, not after
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    _timing.run(parse(arguments), measure, report.format_result)


if __name__ == "__main__":
    main()
