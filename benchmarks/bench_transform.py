"""Times of a training step: a model run by `adapt`, and the same model by hand.

The model is a pre-LN transformer in which every matrix has an adapter. It is written
once plainly, and once with `lora_linear` or `dora_linear` in place of every product;
in a Python loop over the layers, and under `jax.lax.scan` over stacked layers. A step is
the loss and its gradient with respect to the adapters; for the frozen model, with
respect to the input.

    python benchmarks/bench_transform.py --layers 12 --threads 1

Columns of the steps: medians over rounds of the ratio of elapsed and of processor time
to that of the step by hand in the same round; best over best; floating-point operations,
as XLA counts them in the compiled program, and temporary memory, over those of the step
by hand. Columns of tracing: medians of ratios of processor time to that of the plain
model: of tracing the model; of the same when JAX has traced nothing before; of tracing
and lowering it; of tracing the step.
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import _timing
import _transformer
import jax
import jax.numpy as jnp
import numpy as np
from _timing import flops

import lora_jax

Model = Callable[[Any, Any, jax.Array], jax.Array]
"""Of the frozen params, the adapters and the input, `(batch, length, width)`."""

LINEARS = {"lora": lora_jax.lora_linear, "dora": lora_jax.dora_linear}
LAYOUTS = ("loop", "scan")
FROZEN, BY_HAND, ADAPT, MERGED = CONTESTANTS = ("frozen", "by hand", "adapt", "merged")
COLUMNS = ("wall", "cpu", "best", "flops", "temp")
TRACING_COLUMNS = ("trace", "first", "lower", "step")


class Setup(NamedTuple):
    """One method in one layout: the model, its plan, and the arguments of a step.

    Attributes:
        plain: the frozen model, of params and input.
        by_hand: the adapted model.
        plan: of the adapters.
        arguments: params, adapters, input and target.
    """

    plain: Callable[..., jax.Array]
    by_hand: Model
    plan: lora_jax.AdapterPlan
    arguments: tuple[Any, ...]


def set_up(options: argparse.Namespace, method: str, layout: str, layers: int) -> Setup:
    """Makes a model of some layers, with adapters as they are in training."""
    loop = layout == "loop"
    frozen = functools.partial(
        _transformer.plain_loop if loop else _transformer.plain_scan, heads=options.heads
    )
    adapted_model = _transformer.loop_by_hand if loop else _transformer.scan_by_hand
    by_hand = functools.partial(adapted_model, LINEARS[method], heads=options.heads)
    params = _transformer.make_params(
        layers, options.width, options.dtype, stacked=not loop
    )
    normal = np.random.default_rng(1).standard_normal
    shape = options.batch, options.length, options.width
    x, target = (jnp.asarray(normal(shape), options.dtype) for _ in range(2))
    config = lora_jax.LoraConfig(
        options.rank, _transformer.ALPHA, use_dora=method == "dora"
    )
    plan = lora_jax.plan_adapters(config, params, frozen, x)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    for adapter in adapters.values():  # else no gradient would reach A
        adapter["B"] = jnp.asarray(0.01 * normal(adapter["B"].shape), "float32")
    return Setup(frozen, by_hand, plan, (params, adapters, x, target))


def make_model(setup: Setup, contestant: str) -> Model:
    """A new function for a contestant, so that JAX has not traced it before."""

    def model(params, x):
        return setup.plain(params, x)

    if contestant == FROZEN:
        return lambda params, adapters, x: model(params, x)
    if contestant == BY_HAND:
        return lambda params, adapters, x: setup.by_hand(params, adapters, x)
    if contestant == ADAPT:
        return lora_jax.adapt(model, setup.plan)

    def merge_and_apply(params, adapters, x):
        return model(lora_jax.merge_adapters(params, adapters, setup.plan), x)

    return merge_and_apply


def make_step(setup: Setup, contestant: str) -> Callable[..., Any]:
    """Loss and gradient of a contestant, as a function of `setup.arguments`."""
    model = make_model(setup, contestant)

    def loss(params, adapters, x, target):
        error = (model(params, adapters, x) - target).astype("float32")
        return jnp.mean(error * error)

    return jax.value_and_grad(loss, argnums=2 if contestant == FROZEN else 1)


def compile_step(setup: Setup, contestant: str) -> Any:
    """A step, compiled."""
    return jax.jit(make_step(setup, contestant)).lower(*setup.arguments).compile()


def looped_flops(once: float, twice: float, layers: int) -> float:
    """Operations of a scan over some layers, with every iteration counted.

    Args:
        once: what XLA counts for a model of `layers` layers.
        twice: what it counts for a model of twice as many.
        layers: their number.

    Returns:
        `layers * (p + b)`, where XLA counts `layers * p + b`: `p` operations a layer
        outside of the loops and `b` in one iteration. What depends on no number of layers
        (the loss) is taken as a part of `b`.
    """
    per_layer = (twice - once) / layers
    return layers * per_layer + layers * (once - layers * per_layer)


def measure_steps(
    options: argparse.Namespace, method: str, layout: str
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Times and costs of the steps: of the one by hand, and one row a contestant."""
    setup = set_up(options, method, layout, options.layers)
    compiled = {name: compile_step(setup, name) for name in CONTESTANTS}
    calls = {
        name: functools.partial(program, *setup.arguments)
        for name, program in compiled.items()
    }
    times = _timing.interleave(calls, options.rounds)
    ratios = _timing.ratios(times, BY_HAND)
    counts = {name: flops(program) for name, program in compiled.items()}
    if layout == "scan":
        double = set_up(options, method, layout, 2 * options.layers)
        for name, once in counts.items():
            twice = flops(compile_step(double, name))
            counts[name] = looped_flops(once, twice, options.layers)
    temp = {
        name: program.memory_analysis().temp_size_in_bytes
        for name, program in compiled.items()
    }
    rows = {
        name: {
            **dataclasses.asdict(ratios[name]),
            "flops": counts[name] / counts[BY_HAND],
            "temp": temp[name] / temp[BY_HAND],
        }
        for name in CONTESTANTS
    }
    baseline = {
        "wall_ms": 1e3 * statistics.median(times[BY_HAND].wall),
        "cpu_ms": 1e3 * statistics.median(times[BY_HAND].cpu),
        "gflop": counts[BY_HAND] / 1e9,
        "temp_mib": temp[BY_HAND] / 2**20,
    }
    return baseline, rows


def measure_tracing(
    options: argparse.Namespace, method: str, layout: str
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The same of tracing: of the frozen model, and one row a contestant."""
    setup = set_up(options, method, layout, options.layers)

    def trace(name):
        return jax.jit(make_model(setup, name)).trace(*setup.arguments[:3])

    def step(name):
        return jax.jit(make_step(setup, name)).trace(*setup.arguments)

    kinds = {"trace": trace, "lower": lambda name: trace(name).lower(), "step": step}
    times = {}
    for kind, run in kinds.items():
        calls = {name: functools.partial(run, name) for name in CONTESTANTS}
        times[kind] = _timing.interleave(calls, options.traces)
    times["first"] = {name: _timing.Times([], []) for name in CONTESTANTS}
    for _ in range(options.traces):
        for name in CONTESTANTS:
            jax.clear_caches()
            alone = _timing.interleave({name: lambda n=name: trace(n)}, 1, warmup=0)
            times["first"][name].wall.extend(alone[name].wall)
            times["first"][name].cpu.extend(alone[name].cpu)
    ratios = {kind: _timing.ratios(times[kind], FROZEN) for kind in TRACING_COLUMNS}
    rows = {
        name: {kind: ratios[kind][name].cpu for kind in TRACING_COLUMNS}
        for name in CONTESTANTS
    }
    baseline = {
        f"{kind}_ms": 1e3 * statistics.median(times[kind][FROZEN].cpu)
        for kind in TRACING_COLUMNS
    }
    return baseline, rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark. Returns the environment, the sizes and the tables."""
    tables = []
    for method in options.method:
        for layout in options.layout:
            case = {"method": method, "layout": layout}
            for of, run in (("step", measure_steps), ("tracing", measure_tracing)):
                baseline, rows = run(options, method, layout)
                tables.append({**case, "of": of, "baseline": baseline, "rows": rows})
    return _transformer.result_of(options, tables, "traces")


def format_result(result: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The result as text: what was run, and the tables."""
    sizes, machine = _transformer.describe_sizes(result), _timing.describe(result)
    head = f"{sizes}; {machine}; {result['rounds']} rounds, {result['traces']} traces."
    return "\n\n".join([head, *(_format_table(t, markdown) for t in result["tables"])])


def _format_table(table: Mapping[str, Any], markdown: bool) -> str:
    b, title = table["baseline"], f"{table['method']}, {table['layout']}"
    if table["of"] == "step":
        columns, against = COLUMNS, BY_HAND
        base = (
            f"{b['wall_ms']:.1f} ms wall, {b['cpu_ms']:.1f} ms cpu, "
            f"{b['gflop']:.3f} GFLOP, {b['temp_mib']:.2f} MiB"
        )
    else:
        columns, against = TRACING_COLUMNS, FROZEN
        base = ", ".join(f"{kind} {b[f'{kind}_ms']:.1f} ms" for kind in columns)
    caption = f"{title}; {against}: {base}" + ("\n" if markdown else "")
    corner = f"{table['of']}, ratio to {against}"
    text = _timing.format_table(corner, columns, table["rows"], markdown=markdown)
    return f"{caption}\n{text}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    _transformer.add_sizes(parser, layers=12)
    parser.add_argument(
        "--method", nargs="+", choices=tuple(LINEARS), default=tuple(LINEARS)
    )
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--traces", type=int, default=9)
    _timing.add_options(parser)
    options = parser.parse_args(arguments)
    _transformer.check_sizes(parser, options)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    _timing.run(parse(arguments), measure, format_result)


if __name__ == "__main__":
    main()
