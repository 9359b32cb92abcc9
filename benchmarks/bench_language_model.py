"""Speed and memory of fine-tuning and of generation with SmolLM2-135M.

The model is that of `docs/examples/smollm.py`, with its weights in the four bits of the
GGUF file, or dense. Each contestant makes the same training step from the same weights,
factors and prompts, in a process of its own: the loss of the answer's two tokens, its
gradient, and AdamW. Adapters are on all seven projections. The frozen steps compute the
loss alone. The processes take turns: in every round each makes its steps, in a shuffled
order, and is judged by the median over rounds of its time over another's in the same round.
There is no table unless all losses agree, before training and after three updates.

    python benchmarks/bench_language_model.py --markdown
    python benchmarks/bench_language_model.py --quick

transformers and PEFT run in an environment that is made under `--envs` the first time, from
`benchmarks/field/requirements-torch.txt`; `--torch PATH` takes a Python that is there, and
`--only` leaves contestants out.

Columns of the first table: tokens a second; medians of the ratio of elapsed and of
processor time to those of `LoRA, dense`; best over best; *peak*, the most memory that the
process has held in the timed steps; *program*, the arguments and temporary memory of the
compiled step; thousands of trained parameters.

The second table is of one process: the time to generate a token with a cache, of one text,
over that with merged weights, and the weights in memory.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import _field_report
import _language_case
import _language_jax
import _timing
import jax
from _field_client import Client, make_environment
from _language_case import BASELINE, CONTESTANTS, LanguageCase

import lora_jax

COLUMNS = ("tokens/s", "wall", "cpu", "best", "peak MiB", "program MiB", "trained k")
DECODE_COLUMNS = ("tokens/s", "wall", "cpu", "best", "weights MiB")
MERGED = "merged"
MIB = 2**20
TOLERANCES = 1e-4, 1e-3  # relative, of the first loss and of the one after three updates
GOALS = (  # own, other, of, limit
    ("LoRA, q4", BASELINE, "time", 1.15),
    ("LoRA, q4", "full fine-tuning", "time", 0.6),
    ("LoRA, q4", "full fine-tuning", "peak", 0.5),
    ("adapted, q4", MERGED, "time", 1.15),
    ("adapted, dense", MERGED, "time", 1.15),
)

Rows = dict[str, dict[str, float]]


def check_losses(losses: Mapping[str, list[float]]) -> None:
    """Raises ValueError unless contestants that compute the same have the same losses."""
    first = next(iter(losses))
    for name, own in losses.items():
        trains = CONTESTANTS[name].trains
        alike = next(n for n in losses if CONTESTANTS[n].trains == trains)
        for place, other, tolerance in (
            (0, first, TOLERANCES[0]),
            (-1, alike, TOLERANCES[1]),
        ):
            want = losses[other][place]
            if not abs(own[place] / want - 1) <= tolerance:  # NaN is a difference too
                raise ValueError(
                    f"the losses differ: {name!r} has {own} and {other!r} {losses[other]}, "
                    f"expected number {place} to agree to a relative {tolerance}."
                )
        if trains != "nothing" and not own[-1] < own[0]:
            raise ValueError(f"the loss of {name!r} does not fall in training: {own}.")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark. Returns the environment, the sizes and the tables."""
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(options, folder)
        training = measure_training(options, case)
        decoding = measure_decoding(options, case)
    names = ("batch", "length", "rank", "rounds", "tokens")
    result = {**_timing.environment(), **{name: getattr(options, name) for name in names}}
    result |= {**training, "decoding": decoding}
    return {**result, "goals": judge(result)}


def make_case(options: argparse.Namespace, folder: str) -> LanguageCase:
    """Writes what the contestants share into a folder."""
    model = _language_jax.smollm_model
    params, config, _ = model.load(options.gguf, "*")
    case = LanguageCase(
        **config._asdict(),
        gguf=str(options.gguf),
        file=str(pathlib.Path(folder, "arrays.safetensors")),
        rank=options.rank,
        threads=options.threads or 0,
    )
    batch = _language_case.make_batch(
        options.batch, options.length, len(params["embed"]), (1, 2)
    )
    plan = _language_jax.make_plan(params, case, "lora", *batch.values())
    factors = lora_jax.init_adapters(jax.random.key(0), params, plan)
    _language_case.write_arrays(case.file, params, factors, batch)
    return case


def measure_training(options: argparse.Namespace, case: LanguageCase) -> dict[str, Any]:
    """Times and memory of a step of each contestant."""
    pythons, workers = {"jax": sys.executable, "torch": options.torch}, {}
    if "torch" in {CONTESTANTS[name].framework for name in options.only}:
        pythons["torch"] = options.torch or make_environment("torch", options.envs)
    try:
        losses, versions = {}, {}
        for name in options.only:
            python = pythons[CONTESTANTS[name].framework]
            worker = Client(python, name, case, "_language_worker.py")
            workers[name] = worker
            answer = worker.ask("prepare")
            losses[name] = answer["losses"]
            versions = {**answer["versions"], **versions}
            print(f"{name}: losses {losses[name]}", file=sys.stderr, flush=True)
        check_losses(losses)
        step = {"command": "step", "steps": options.steps}
        calls = {n: functools.partial(w.ask, **step) for n, w in workers.items()}
        times = _timing.take_turns(calls, options.rounds)
        costs = {name: worker.ask("memory") for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    ratios = _timing.ratios(times, BASELINE)
    tokens = options.batch * options.length * options.steps
    rows: Rows = {}
    for name, own in costs.items():
        rows[name] = {
            "tokens/s": tokens / statistics.median(times[name].wall),
            **dataclasses.asdict(ratios[name]),
            "peak MiB": own["peak_bytes"] / MIB,
            "trained k": own["trained"] / 1e3,
        }
        if "temp_bytes" in own:
            program = own["temp_bytes"] + own["argument_bytes"]
            rows[name]["program MiB"] = program / MIB
    seconds = {name: {"wall": t.wall, "cpu": t.cpu} for name, t in times.items()}
    return {"rows": rows, "losses": losses, "versions": versions, "times": seconds}


def measure_decoding(options: argparse.Namespace, case: LanguageCase) -> Rows:
    """Times of one token, and the memory of the weights."""
    programs = _language_jax.decoding(case, options.tokens)
    calls = {name: call for name, (call, _) in programs.items()}
    times = _timing.interleave(calls, 5 * options.rounds)
    ratios = _timing.ratios(times, MERGED)
    return {
        name: {
            "tokens/s": 1 / statistics.median(times[name].wall),
            **dataclasses.asdict(ratios[name]),
            "weights MiB": weights,
        }
        for name, (_, weights) in programs.items()
    }


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The goals with what was measured; None where a contestant is missing."""
    rows: Rows = {**result["rows"], **result["decoding"]}
    records = []
    for own, other, of, limit in GOALS:
        found, met = None, None
        if {own, other} <= set(rows):
            column = "peak MiB" if of == "peak" else "cpu"
            found = rows[own][column] / rows[other][column]
            if of == "time" and other == "full fine-tuning":
                pairs = zip(*(result["times"][n]["cpu"] for n in (own, other)), strict=True)
                found = statistics.median(a / b for a, b in pairs)
            met = found <= limit
        title = f"{own} / {other}, {of}"
        records.append({"title": title, "found": found, "limit": limit, "met": met})
    return records


def format_result(result: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The result as text: what was run, and the tables."""
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    sizes = ", ".join(f"{n} {result[n]}" for n in ("batch", "length", "rank", "tokens"))
    head = f"{sizes}; {_timing.describe(result)}; {versions}; {result['rounds']} rounds."
    met = {True: "yes", False: "no", None: "not judged"}
    goals = {
        goal["title"]: [_number(goal["found"]), _number(goal["limit"]), met[goal["met"]]]
        for goal in result["goals"]
    }
    tables = (
        (f"ratio to {BASELINE}", COLUMNS, _cells(result["rows"], COLUMNS)),
        ("a token", DECODE_COLUMNS, _cells(result["decoding"], DECODE_COLUMNS)),
        ("ratio", ("found", "goal", "met"), goals),
    )
    texts = [_field_report.format_cells(*table, markdown=markdown) for table in tables]
    return "\n\n".join([head, *texts])


def _cells(rows: Rows, columns: tuple[str, ...]) -> dict[str, list[str]]:
    def cell(column: str, value: float | None) -> str:
        if value is None or column in ("wall", "cpu", "best"):
            return _number(value)
        return f"{value:,.{0 if value >= 100 else 1}f}"

    return {n: [cell(c, row.get(c)) for c in columns] for n, row in rows.items()}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="few rounds of this library alone")
    add("--gguf", type=pathlib.Path, help="the model; by default that of the example")
    add("--batch", type=int, default=8)
    add("--length", type=int, default=56, help="of a prompt in tokens")
    add("--tokens", type=int, default=96, help="of the cache in generation")
    add("--rank", type=int, default=8)
    add("--rounds", type=int, help="default: 10, or 2 with --quick")
    add("--steps", type=int, default=1, help="of a contestant in a round")
    add("--only", nargs="+", metavar="NAME", choices=tuple(CONTESTANTS))
    add("--torch", metavar="PATH", help="a Python that has torch, transformers and peft")
    cache = pathlib.Path.home() / ".cache" / "lora_jax" / "bench_field"
    add("--envs", type=pathlib.Path, default=cache, metavar="DIR")
    _timing.add_options(parser)
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (2 if options.quick else 10)
    own = [name for name, kind in CONTESTANTS.items() if kind.framework == "jax"]
    chosen = options.only or (own if options.quick else CONTESTANTS)
    if BASELINE not in chosen:
        parser.error(f"--only lacks {BASELINE!r}, which the ratios refer to")
    options.only = [name for name in CONTESTANTS if name in chosen]
    if options.gguf is None:
        import minilm  # pyright: ignore[reportMissingImports]
        import smollm_text  # pyright: ignore[reportMissingImports]

        options.gguf = smollm_text.fetch(minilm.default_cache())
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    _timing.run(parse(arguments), measure, format_result)


if __name__ == "__main__":
    main()
