"""Times of many adapters on one model: another adapter for each row of a batch.

The model is a pre-LN transformer, a loop over its layers, in which every matrix has an
adapter. A stack has 1, 2, 8 or 64 slots, and row `b` of the batch has the adapter of slot
`b % slots`. Training is the loss and its gradient with respect to all adapters; decoding
is the forward pass of one token for each row.

    python benchmarks/bench_rows.py --threads 1
    python benchmarks/bench_rows.py --peft PYTHON    # that has torch and peft

The baseline is the model with one adapter for all rows, by `adapt`. The contestants, for
each number of slots: a Python loop that calls the same program for one adapter after the
other; each row times all adapters, with a one-hot mask; tokens sorted by slot, and
`jax.lax.ragged_dot`; and `adapt_rows`. With `--peft`, the same model in torch with peft's
`adapter_names` has tables of its own.

Columns: medians over rounds of the ratio of elapsed and of processor time to that of the
baseline in the same round; best over best; floating-point operations, as XLA counts them,
and temporary memory, over those of the baseline; and the number of programs compiled for
two batches whose rows belong to different slots. XLA counts one iteration of a loop, and
so one slot of those whose DoRA norms are computed.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import _timing
import _transformer
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import lora_jax

ONE, ONE_DORA = "adapt, one adapter", "adapt, one DoRA adapter"
LOOP, ONE_HOT, RAGGED, ROWS = WAYS = ("loop", "one-hot", "ragged_dot", "adapt_rows")
ROWS_DORA = "adapt_rows, DoRA"
PHASES = ("training", "decoding")
COLUMNS = ("wall", "cpu", "best", "flops", "temp", "programs")
TORCH_COLUMNS = ("wall", "cpu", "best")
TORCH = pathlib.Path(__file__).with_name("_rows_torch.py")

Dense = Callable[[jax.Array, int, str], jax.Array]


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model, adapters in the slots of a stack, and an input.

    Attributes:
        frozen: the model, of params and input.
        plan: of each adapter.
        stack_plan: of the stack.
        arguments: params, stack, slots, input and target.
        heads: of the model.
    """

    frozen: Callable[..., jax.Array]
    plan: lora_jax.AdapterPlan
    stack_plan: lora_jax.AdapterPlan
    arguments: tuple[Any, ...]
    heads: int


def set_up(options: argparse.Namespace, phase: str, method: str, slots: int) -> Setup:
    """Makes a model with adapters as they are in training."""
    frozen = functools.partial(_transformer.plain_loop, heads=options.heads)
    params = _transformer.make_params(
        options.layers, options.width, options.dtype, stacked=False
    )
    normal = np.random.default_rng(1).standard_normal
    length = options.length if phase == "training" else 1
    shape = options.batch, length, options.width
    x, target = (jnp.asarray(normal(shape), options.dtype) for _ in range(2))
    config = lora_jax.LoraConfig(
        options.rank, _transformer.ALPHA, use_dora=method == "dora"
    )
    plan = lora_jax.plan_adapters(config, params, frozen, x)
    tenants = []
    for slot in range(slots):
        adapters = lora_jax.init_adapters(jax.random.key(slot), params, plan)
        for adapter in adapters.values():  # else no gradient would reach A
            adapter["B"] = jnp.asarray(0.01 * normal(adapter["B"].shape), "float32")
        tenants.append(adapters)
    stack, stack_plan = lora_jax.stack_adapters(tenants, plan)
    rows = assign(options.batch, slots)
    return Setup(frozen, plan, stack_plan, (params, stack, rows, x, target), options.heads)


def assign(rows: int, slots: int, first: int = 0) -> np.ndarray:
    """The slot of each row: one after the other from `first` on, counted round."""
    return (first + np.arange(rows, dtype=np.int32)) % slots


def by_hand(
    setup: Setup,
    dense: Callable[..., jax.Array],
    params: Any,
    stack: Any,
    slots: Any,
    x: Any,
) -> jax.Array:
    """The model with `dense(x, weight, adapter, scales, slots)` for every product."""
    for i, layer in enumerate(params["layers"]):

        def product(x: jax.Array, name: str, i: int = i, layer: Any = layer) -> jax.Array:
            path = f"layers/{i}/{name}"
            return dense(x, layer[name], stack.adapters[path], stack.scales[path], slots)

        x = _transformer.block(x, layer, product, setup.heads)
    return _transformer.norm(x, params["norm"])


def one_hot(x: Any, weight: Any, adapter: Any, scales: Any, slots: Any) -> jax.Array:
    """Multiplies rows by the factors of all slots, and keeps the products of their own."""
    mask = jax.nn.one_hot(slots, len(scales), dtype="float32") * scales[None, :]
    narrow = jnp.einsum("bld,sdr->blsr", x.astype("float32"), adapter["A"])
    narrow *= mask[:, None, :, None]
    return x @ weight + jnp.einsum("blsr,sro->blo", narrow, adapter["B"]).astype(x.dtype)


def ragged(x: Any, weight: Any, adapter: Any, scales: Any, slots: Any) -> jax.Array:
    """Sorts tokens by their slots, and multiplies each group by its factors."""
    order = jnp.argsort(slots)
    sizes = jnp.bincount(slots, length=len(scales)).astype(jnp.int32) * x.shape[1]
    sorted_rows = x[order].astype("float32").reshape(-1, x.shape[-1])
    narrow = lax.ragged_dot(sorted_rows, adapter["A"], sizes)
    update = lax.ragged_dot(narrow, adapter["B"], sizes).reshape(*x.shape[:2], -1)
    update = update[jnp.argsort(order)] * scales[slots][:, None, None]
    return x @ weight + update.astype(x.dtype)


def make_model(setup: Setup, way: str) -> Callable[..., jax.Array]:
    """The model with many adapters, `(params, stack, slots, x)`, or with one."""
    if way == ROWS:
        return lora_jax.adapt_rows(setup.frozen, setup.stack_plan)
    if way in (ONE_HOT, RAGGED):
        dense = {ONE_HOT: one_hot, RAGGED: ragged}[way]
        return functools.partial(by_hand, setup, dense)
    adapted = lora_jax.adapt(setup.frozen, setup.plan)
    return lambda params, adapters, slots, x: adapted(params, adapters, x)


class Contestant:
    """A step of one phase, and the programs that were compiled for it.

    Args:
        setup: with all arguments.
        phase: training or decoding.
        way: one of `WAYS`, or `ONE` for the first adapter on all rows.
    """

    def __init__(self, setup: Setup, phase: str, way: str):
        self.setup, self.way = setup, way
        model = make_model(setup, way)

        def loss(params, trained, slots, x, target):
            error = (model(params, trained, slots, x) - target).astype("float32")
            return jnp.sum(error * error)

        def decode(params, trained, slots, x, target):
            return model(params, trained, slots, x)

        training = jax.value_and_grad(loss, argnums=1)
        self._step = jax.jit(training if phase == "training" else decode)
        self.compiled: dict[Any, Any] = {}
        self._adapters: dict[int, Any] = {}

    def calls(self, slots: np.ndarray) -> list[tuple[Any, ...]]:
        """The arguments of each call of the program for one batch."""
        params, stack, _, x, target = self.setup.arguments
        if self.way in (ONE_HOT, RAGGED, ROWS):
            return [(params, stack, jnp.asarray(slots), x, target)]
        groups = {0: np.arange(len(slots))}
        if self.way == LOOP:
            groups = {s: np.flatnonzero(slots == s) for s in np.unique(slots).tolist()}
        return [
            (params, self._own(slot), None, x[rows], target[rows])
            for slot, rows in groups.items()
        ]

    def _own(self, slot: int) -> Any:
        if slot not in self._adapters:
            stack, plan = self.setup.arguments[1], self.setup.plan
            self._adapters[slot] = lora_jax.take_adapters(stack, slot, plan=plan)
        return self._adapters[slot]

    def run(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Runs the program for a batch."""
        results = []
        for arguments in calls:
            shapes = arguments[3].shape
            if shapes not in self.compiled:
                self.compiled[shapes] = self._step.lower(*arguments).compile()
            results.append(self.compiled[shapes](*arguments))
        return results

    def costs(self, calls: Sequence[tuple[Any, ...]]) -> dict[str, float]:
        """Operations, and the most temporary memory, of a batch; and compiled programs."""
        programs = [self.compiled[arguments[3].shape] for arguments in calls]
        temporary = [p.memory_analysis().temp_size_in_bytes for p in programs]
        return {
            "flops": sum(map(_timing.flops, programs)),
            "temp": max(temporary),
            "programs": len(self.compiled),
        }


def contestants(options: argparse.Namespace, phase: str) -> dict[str, Contestant]:
    """All contestants of a phase by the names of their rows."""
    found = {ONE: Contestant(set_up(options, phase, "lora", 1), phase, ONE)}
    for slots in options.slots:
        setup = set_up(options, phase, "lora", slots)
        for way in options.way:
            found[f"{way}, {slots}"] = Contestant(setup, phase, way)
    found[ONE_DORA] = Contestant(set_up(options, phase, "dora", 1), phase, ONE)
    for slots in options.slots:
        setup = set_up(options, phase, "dora", slots)
        found[f"{ROWS_DORA}, {slots}"] = Contestant(setup, phase, ROWS)
    return found


def measure_phase(options: argparse.Namespace, phase: str) -> dict[str, Any]:
    """Times and costs of all contestants, over those of one adapter."""
    found = contestants(options, phase)
    runs, costs = {}, {}
    for name, one in found.items():
        slots = one.setup.arguments[2]
        calls = one.calls(slots)
        one.run(calls)
        # Of the slots in the second batch, one has half of the rows.
        skewed = np.where(np.arange(len(slots)) % 2, slots, slots.max())
        one.run(one.calls(skewed))
        runs[name], costs[name] = functools.partial(one.run, calls), one.costs(calls)
    times = _timing.interleave(runs, options.rounds, repeat=options.repeat)
    ratios = _timing.ratios(times, ONE)
    base = costs[ONE]
    rows = {
        name: {
            **dataclasses.asdict(ratios[name]),
            "flops": own["flops"] / base["flops"],
            "temp": own["temp"] / base["temp"] if base["temp"] else float(own["temp"] > 0),
            "programs": own["programs"],
        }
        for name, own in costs.items()
    }
    baseline = {
        "wall_ms": 1e3 * statistics.median(times[ONE].wall) / options.repeat,
        "gflop": base["flops"] / 1e9,
        "temp_mib": base["temp"] / 2**20,
    }
    return {"phase": phase, "baseline": baseline, "rows": rows}


def measure_peft(options: argparse.Namespace, phase: str) -> dict[str, Any]:
    """The same of torch, in its own process."""
    names = (*_transformer.SIZES, "rounds", "slots", "threads")
    case = {name: getattr(options, name) for name in names} | {"phase": phase}
    command = [options.peft, str(TORCH), json.dumps(case)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{' '.join(command[:2])} failed:\n{run.stderr}")
    result = json.loads(run.stdout)
    times = {name: _timing.Times(**own) for name, own in result.pop("times").items()}
    first = next(iter(times))
    rows = {n: dataclasses.asdict(r) for n, r in _timing.ratios(times, first).items()}
    baseline = {"wall_ms": 1e3 * statistics.median(times[first].wall), **result}
    return {"phase": f"{phase}, torch", "baseline": baseline, "rows": rows}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark. Returns the environment, the sizes and the tables."""
    tables = [measure_phase(options, phase) for phase in options.phase]
    if options.peft:
        tables += [measure_peft(options, phase) for phase in options.phase]
    return _transformer.result_of(options, tables)


def format_result(result: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The result as text: what was run, and the tables."""
    sizes, machine = _transformer.describe_sizes(result), _timing.describe(result)
    head = f"{sizes}; {machine}; {result['rounds']} rounds."
    return "\n\n".join([head, *(_format_table(t, markdown) for t in result["tables"])])


def _format_table(table: Mapping[str, Any], markdown: bool) -> str:
    b, first = table["baseline"], next(iter(table["rows"]))
    torch = "gflop" not in b
    columns = TORCH_COLUMNS if torch else COLUMNS
    rest = (
        f"torch {b['torch']}, peft {b['peft']}"
        if torch
        else f"{b['gflop']:.3f} GFLOP, {b['temp_mib']:.2f} MiB"
    )
    caption = f"{table['phase']}; {first}: {b['wall_ms']:.2f} ms, {rest}"
    corner = f"{table['phase']}, ratio to one adapter"
    text = _timing.format_table(corner, columns, table["rows"], markdown=markdown)
    return "\n".join([caption, *([""] if markdown else []), text])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    _transformer.add_sizes(parser, layers=4)
    parser.set_defaults(batch=8)
    parser.add_argument("--slots", type=int, nargs="+", default=(1, 2, 8, 64))
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--way", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--rounds", type=int, default=20)
    text = "a Python with torch and peft, to run peft's adapter_names with"
    parser.add_argument("--peft", metavar="PYTHON", help=text)
    _timing.add_repeat(parser)
    _timing.add_options(parser)
    options = parser.parse_args(arguments)
    _transformer.check_sizes(parser, options)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    _timing.run(parse(arguments), measure, format_result)


if __name__ == "__main__":
    main()
