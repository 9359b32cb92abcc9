"""Times of the readers of adapters for a growing number of modules.

The adapter is that of a mixture of experts: some layers, each with 128 experts of three
matrices, and a small rank, so that names and headers take the time and not values. The
same adapter is there as PEFT writes it, for params with a leaf for each matrix and for
params with stacks, in the format of this library, and as quantized weights.

    python benchmarks/bench_files.py --layers 8 16 32 48

Columns: median over rounds of the ratio of elapsed time to that of
`safetensors.numpy.load_file` of PEFT's file in the same round; microseconds for each
module; and *growth*, the time for a module over that with the smallest number of layers:
1 where time grows with the number of modules, and as much as that where it grows with its
square.
"""

import argparse
import contextlib
import io
import json
import pathlib
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import _timing
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax import cli, peft, quant

EXPERTS = 128
MATRICES = ("gate_proj", "up_proj", "down_proj")
COLUMNS = ("ratio", "us/module", "growth")
_NAME = "model.layers.{}.mlp.experts.{}."
BASELINE = "load_file"
READERS = (
    BASELINE,
    *("peft.load", "peft.load, stacked", "peft.match_names"),
    *("load_adapters", "load_quantized", "lora-jax inspect"),
)


def write_adapter(folder: pathlib.Path, layers: int, experts: int) -> None:
    """Writes the adapter as PEFT does, with random values."""
    folder.mkdir()
    rng, tensors = np.random.default_rng(0), {}
    for layer, expert in np.ndindex(layers, experts):
        for matrix in MATRICES:
            module = "base_model.model." + _NAME.format(layer, expert) + matrix
            for factor, shape in (("A", (2, 8)), ("B", (12, 2))):
                values = rng.normal(size=shape).astype("float32")
                tensors[f"{module}.lora_{factor}.weight"] = values
    config = {"peft_type": "LORA", "r": 2, "target_modules": list(MATRICES)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


def make_calls(
    folder: pathlib.Path, layers: int, experts: int
) -> dict[str, Callable[[], Any]]:
    """Writes the files into a folder, and makes a call for each of `READERS`."""
    own, theirs, weights = folder / "own", folder / "peft", folder / "base.safetensors"
    write_adapter(theirs, layers, experts)

    def matrices(*sizes: int) -> dict[str, Any]:
        shape = jax.ShapeDtypeStruct((*sizes, 8, 12), "float32")
        return {matrix: {"kernel": shape} for matrix in MATRICES}

    each = [{"experts": [matrices() for _ in range(experts)]} for _ in range(layers)]
    params = {"model": {"layers": [{"mlp": layer} for layer in each]}}
    stacked = {"experts": matrices(layers, experts)}
    names = {
        f"{_NAME}{matrix}": (f"experts/{matrix}/kernel", "bbio") for matrix in MATRICES
    }
    loaded = peft.load(theirs, params)
    lora_jax.save_adapters(own, loaded.adapters, loaded.plan)
    weight = quant.quantize_int8(jnp.ones((8, 12)))
    quant.save_quantized(weights, dict.fromkeys(loaded.adapters, weight))

    def inspect() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            cli.main(["inspect", str(theirs)])

    calls = (
        lambda: load_file(theirs / "adapter_model.safetensors"),
        lambda: peft.load(theirs, params).adapters,
        lambda: peft.load(theirs, stacked, names=names).adapters,
        lambda: len(peft.match_names(theirs, params)),
        lambda: lora_jax.load_adapters(own)[0],
        lambda: quant.load_quantized(weights),
        inspect,
    )
    return dict(zip(READERS, calls, strict=True))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark. Returns the environment, the sizes and the rows."""
    rows: dict[str, dict[str, float]] = {}
    first: dict[str, float] = {}
    for layers in options.layers:
        count = layers * options.experts * len(MATRICES)
        with tempfile.TemporaryDirectory() as folder:
            calls = make_calls(pathlib.Path(folder), layers, options.experts)
            times = _timing.interleave(calls, options.rounds, warmup=options.warmup)
        ratios = _timing.ratios(times, BASELINE)
        for name, own in times.items():
            each = statistics.median(own.wall) / count * 1e6
            rows[f"{count}: {name}"] = {
                "ratio": ratios[name].wall,
                "us/module": each,
                "growth": each / first.setdefault(name, each),
            }
    sizes = {"rounds": options.rounds, "experts": options.experts}
    return _timing.environment() | sizes | {"rows": rows}


def format_result(result: dict[str, Any], *, markdown: bool = False) -> str:
    """The result as text: what was run, and a table."""
    head = (
        f"{result['experts']} experts in each layer, rank 2; {_timing.describe(result)}; "
        f"{result['rounds']} rounds.\n"
    )
    corner = f"ratio to {BASELINE}"
    table = _timing.format_table(corner, COLUMNS, result["rows"], markdown=markdown)
    return f"{head}\n{table}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    _timing.add_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    _timing.run(parse(arguments), measure, format_result)


if __name__ == "__main__":
    main()
