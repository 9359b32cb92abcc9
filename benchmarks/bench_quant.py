"""Times of dequantization, and of a training step on quantized frozen weights.

The first tables time dequantization alone, for each size of a square weight and each
dtype of the result. The second tables time a training step of an adapted transformer with
quantized frozen weights, a `jax.lax.scan` over stacked layers. The baseline is the same
step on the dequantized weights.

    python benchmarks/bench_quant.py --threads 1
    python benchmarks/bench_quant.py --width 4096 --heads 32 --dtype bfloat16   # a GPU

Columns of the first: medians over rounds of the ratio of elapsed and of processor time to
those of a copy of the result in the same round; best over best; *bound*, the ratio that
reading the stored bytes and writing the result would have at the speed of that copy; and
the stored bytes of one entry.

Columns of the second: the same three ratios, to the step on dense weights; temporary
memory and the bytes of all arguments, in MiB. Row *frozen* is the dense model without
adapters, with the gradient of its input.
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import _timing
import _transformer
import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax import quant

MIB = 2**20
COPY, DENSE, FROZEN = "copy", "dense", "frozen"
# Of weights with one axis of layers in front, or none.
FORMATS: dict[str, Callable[..., quant.QuantizedTensor]] = {
    "nf4": quant.quantize_nf4,
    "nf4, bitsandbytes": functools.partial(quant.quantize_nf4, codec="bitsandbytes"),
    "int8": quant.quantize_int8,
    "fp8": quant.quantize_fp8,
}
STEP_FORMATS = ("nf4", "int8", "fp8")
FORMING_COLUMNS = ("wall", "cpu", "best", "bound", "bytes")
STEP_COLUMNS = ("wall", "cpu", "best", "temp MiB", "arg MiB")

Rows = dict[str, dict[str, float]]


@jax.jit
def copy(array: jax.Array) -> jax.Array:
    """A new array of the same values."""
    return jnp.copy(array)


def measure_forming(options: argparse.Namespace, size: int, dtype: str) -> dict[str, Any]:
    """Times of dequantizing a `(size, size)` weight of some dtype, one row a format."""
    values = np.random.default_rng(0).standard_normal((size, size), np.float32)
    weight = jnp.asarray(values, dtype)
    stored = {name: quantize(weight) for name, quantize in FORMATS.items()}
    form = jax.jit(quant.dequantize)
    calls: dict[str, Callable[[], Any]] = {COPY: functools.partial(copy, weight)}
    calls |= {name: functools.partial(form, q) for name, q in stored.items()}
    times = _timing.interleave(calls, options.rounds, repeat=options.repeat)
    ratios = _timing.ratios(times, COPY)
    item = weight.dtype.itemsize
    bytes_of = {COPY: float(item)}
    bytes_of |= {name: q.nbytes / q.size for name, q in stored.items()}
    rows = {
        name: {
            **dataclasses.asdict(ratios[name]),
            "bound": (bytes_of[name] + item) / (2 * item),
            "bytes": bytes_of[name],
        }
        for name in calls
    }
    seconds = statistics.median(times[COPY].wall)
    baseline = {"wall_ms": 1e3 * seconds, "gb_s": 2 * weight.nbytes / seconds / 1e9}
    return {
        "of": "forming",
        "title": f"{size} x {size}, {dtype}",
        "baseline": baseline,
        "rows": rows,
    }


@dataclasses.dataclass(frozen=True)
class Setup:
    """The model with one kind of frozen weights.

    Attributes:
        step: a jitted function, `(adapters, params, x, target)` -> loss and gradients of
            the adapters. Of the frozen model it is the gradient of the input.
        arguments: of the step.
    """

    step: Any
    arguments: tuple[Any, ...]


def quantize_layers(params: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The params with their matrices in a format."""
    quantize = FORMATS[name]
    layers = {
        key: quantize(value, batch_axes=1) if key in _transformer.KERNELS else value
        for key, value in params["layers"].items()
    }
    return {**params, "layers": layers}


def dequantize_layers(params: Mapping[str, Any]) -> Any:
    """The params with arrays in the place of quantized weights."""
    return jax.tree.map(
        lambda leaf: quant.dequantize(leaf) if quant.is_quantized(leaf) else leaf,
        params,
        is_leaf=quant.is_quantized,
    )


def set_up(options: argparse.Namespace, method: str, name: str) -> dict[str, Setup]:
    """The model with weights in a format, with the same weights dense, and frozen."""
    frozen = functools.partial(_transformer.plain_scan, heads=options.heads)
    params = _transformer.make_params(
        options.layers, options.width, options.dtype, stacked=True
    )
    stored = quantize_layers(params, name)
    normal = np.random.default_rng(1).standard_normal
    shape = options.batch, options.length, options.width
    x, target = (jnp.asarray(normal(shape), options.dtype) for _ in range(2))
    config = lora_jax.LoraConfig(
        options.rank, _transformer.ALPHA, use_dora=method == "dora"
    )
    plan = lora_jax.plan_adapters(config, stored, frozen, x)
    adapters = lora_jax.init_adapters(jax.random.key(0), stored, plan)
    for adapter in adapters.values():  # else no gradient would reach A
        adapter["B"] = jnp.asarray(0.01 * normal(adapter["B"].shape), "float32")
    adapted = lora_jax.adapt(frozen, plan)

    def loss(adapters, params, x, target):
        model = adapted(params, adapters, x) if adapters else frozen(params, x)
        error = (model - target).astype("float32")
        return jnp.mean(error * error)

    step = jax.jit(jax.value_and_grad(loss))
    dense, rest = dequantize_layers(stored), (x, target)
    return {
        FROZEN: Setup(jax.jit(jax.value_and_grad(loss, argnums=2)), ({}, dense, *rest)),
        DENSE: Setup(step, (adapters, dense, *rest)),
        name: Setup(step, (adapters, stored, *rest)),
    }


def measure_steps(options: argparse.Namespace, method: str, name: str) -> dict[str, Any]:
    """Times and memory of a step, on weights in a format and on dense ones."""
    setups = set_up(options, method, name)
    compiled = {k: s.step.lower(*s.arguments).compile() for k, s in setups.items()}
    calls = {k: functools.partial(compiled[k], *s.arguments) for k, s in setups.items()}
    times = _timing.interleave(calls, options.rounds)
    ratios = _timing.ratios(times, DENSE)
    memory = {k: program.memory_analysis() for k, program in compiled.items()}
    rows = {
        k: {
            **dataclasses.asdict(ratios[k]),
            "temp MiB": memory[k].temp_size_in_bytes / MIB,
            "arg MiB": memory[k].argument_size_in_bytes / MIB,
        }
        for k in setups
    }
    baseline = {
        "wall_ms": 1e3 * statistics.median(times[DENSE].wall),
        "cpu_ms": 1e3 * statistics.median(times[DENSE].cpu),
    }
    return {"of": "step", "title": f"{method}, {name}", "baseline": baseline, "rows": rows}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark. Returns the environment, the sizes and the tables."""
    tables = [
        measure_forming(options, size, dtype)
        for size in options.size
        for dtype in ("float32", "bfloat16")
    ]
    tables += [
        measure_steps(options, method, name)
        for method in options.method
        for name in options.format
    ]
    return _transformer.result_of(options, tables)


def format_result(result: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The result as text: what was run, and the tables."""
    sizes, machine = _transformer.describe_sizes(result), _timing.describe(result)
    head = f"steps: {sizes}; {machine}; {result['rounds']} rounds."
    return "\n\n".join([head, *(_format_table(t, markdown) for t in result["tables"])])


def _format_table(table: Mapping[str, Any], markdown: bool) -> str:
    b = table["baseline"]
    if table["of"] == "forming":
        columns, corner = FORMING_COLUMNS, f"dequantize, ratio to {COPY}"
        base = f"{COPY}: {b['wall_ms']:.2f} ms wall, {b['gb_s']:.2f} GB/s"
    else:
        columns, corner = STEP_COLUMNS, f"step, ratio to {DENSE}"
        base = f"{DENSE}: {b['wall_ms']:.1f} ms wall, {b['cpu_ms']:.1f} ms cpu"
    caption = f"{table['title']}; {base}" + ("\n" if markdown else "")
    text = _timing.format_table(corner, columns, table["rows"], markdown=markdown)
    return f"{caption}\n{text}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, nargs="+", default=(1024, 4096))
    _transformer.add_sizes(parser, layers=4)
    methods = ("lora", "dora")
    parser.add_argument("--method", nargs="+", choices=methods, default=methods)
    parser.add_argument("--format", nargs="+", choices=STEP_FORMATS, default=STEP_FORMATS)
    parser.add_argument("--rounds", type=int, default=20)
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
