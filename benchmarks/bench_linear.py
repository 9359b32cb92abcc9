"""Times of the forward and backward pass of one adapted linear layer.

Every contestant is one compiled function of the input, the frozen weight, the adapter and
a cotangent; it returns the output and the gradients of the input and of the adapter. The
baseline is the frozen layer: its output and input gradient, without a weight gradient.

    python benchmarks/bench_linear.py --threads 1 --tokens 512 --rank 16

`--forward` leaves the gradients out. `--format` adds the same weight in a quantized format,
whose layers are run by `adapt`. `--hlo` writes the compiled programs and says whether they
add `(x @ A) @ B` to `x @ W` in the kernel of a product or in a pass over memory.

Columns: medians over rounds of the ratio of elapsed and of processor time to the
baseline's in the same round; best over best; floating-point operations over the
baseline's, as XLA counts them in the compiled program; temporary memory of the compiled
program; and what the backward pass keeps besides the arguments, were it compiled apart
from the forward pass.
"""

import argparse
import dataclasses
import functools
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import _programs
import _timing
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

import lora_jax
from lora_jax import quant

Arrays = Mapping[str, jax.Array]
Layer = Callable[[jax.Array, jax.Array, Arrays, Arrays], jax.Array]
"""Of the input, the frozen weight, the adapter and `extras` (see `make_arguments`)."""

ALPHA = 16.0
DROPOUT_RATE = 0.1
BASELINE = "frozen"
COLUMNS = ("wall", "cpu", "best", "flops", "temp MiB", "kept MiB")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A layer, and the names of what it trains."""

    layer: Layer
    trains: str = ""


def frozen(x, weight, adapter, extras):
    """The layer without its adapter."""
    return x @ weight


def textbook_lora(x, weight, adapter, extras):
    """LoRA as it is usually written."""
    a, b, s = _factors(adapter, x.dtype)
    return x @ weight + s * (x @ a) @ b


def merged_lora(x, weight, adapter, extras):
    """LoRA by way of the adapted weight."""
    return x @ _adapted(weight, adapter)


def peft_dora(x, weight, adapter, extras):
    """DoRA as peft has it: a detached norm of the adapted weight, in its dtype."""
    norm = lax.stop_gradient(jnp.linalg.norm(_adapted(weight, adapter), axis=0))
    return _textbook_dora(x, weight, adapter, norm)


def full_gradient_dora(x, weight, adapter, extras):
    """The same with the gradient through the norm."""
    norm = jnp.linalg.norm(_adapted(weight, adapter), axis=0)
    return _textbook_dora(x, weight, adapter, norm)


def merged_dora(x, weight, adapter, extras):
    """DoRA by way of the adapted weight: equation 5 of its paper."""
    adapted = _adapted(weight, adapter)
    factor = adapter["m"].astype(x.dtype) / jnp.linalg.norm(adapted, axis=0)
    return x @ (adapted * factor[None, :])


def _factors(adapter, dtype):
    a, b = adapter["A"].astype(dtype), adapter["B"].astype(dtype)
    return a, b, ALPHA / a.shape[1]


def _adapted(weight, adapter):
    a, b, s = _factors(adapter, weight.dtype)
    return weight + s * a @ b


def _textbook_dora(x, weight, adapter, norm):
    a, b, s = _factors(adapter, x.dtype)
    factor = adapter["m"].astype(x.dtype) / norm
    factor = factor.reshape((1,) * (x.ndim - 1) + factor.shape)
    base = x @ weight
    return base + (factor - 1) * base + factor * (s * (x @ a) @ b)


def ours(linear: Callable[..., jax.Array], *names: str, **options: Any) -> Layer:
    """A public function of the library, with the extras `names` and fixed options."""

    def layer(x, weight, adapter, extras):
        given = {name: extras[name] for name in names}
        return linear(x, weight, adapter, ALPHA, **given, **options)

    return layer


LORA, DORA = lora_jax.lora_linear, lora_jax.dora_linear
CONTESTANTS = {
    BASELINE: Contestant(frozen),
    "LoRA, x@W + s*(x@A)@B": Contestant(textbook_lora, "AB"),
    "LoRA, x@(W + s*A@B)": Contestant(merged_lora, "AB"),
    "lora_linear": Contestant(ours(LORA), "AB"),
    f"lora_linear, dropout {DROPOUT_RATE}": Contestant(
        ours(LORA, "dropout_key", dropout_rate=DROPOUT_RATE), "AB"
    ),
    "DoRA, peft form": Contestant(peft_dora, "ABm"),
    "DoRA, peft form, full gradient": Contestant(full_gradient_dora, "ABm"),
    "DoRA, x@(m*V/norm)": Contestant(merged_dora, "ABm"),
    "dora_linear": Contestant(ours(DORA), "ABm"),
    "dora_linear, weight_norm_squared": Contestant(
        ours(DORA, "weight_norm_squared"), "ABm"
    ),
    "dora_linear, column_norm": Contestant(ours(DORA, "column_norm"), "ABm"),
    "dora_linear, detach_norm=False": Contestant(ours(DORA, detach_norm=False), "ABm"),
}


FORMATS: dict[str, Callable[..., quant.QuantizedTensor]] = {
    "nf4": quant.quantize_nf4,
    "int8": quant.quantize_int8,
}


def quantized(name: str) -> dict[str, Contestant]:
    """The frozen layer, LoRA and DoRA on the weight of `extras` in a format."""

    def model(params, x):
        return x @ params["w"]

    def frozen(x, weight, adapter, extras):
        return x @ quant.dequantize(extras[name])

    def adapted(x, weight, adapter, extras):
        params = {"w": extras[name]}
        config = lora_jax.LoraConfig(adapter["A"].shape[1], ALPHA, use_dora="m" in adapter)
        plan = lora_jax.plan_adapters(config, params, model, x)
        return lora_jax.adapt(model, plan)(params, {"w": adapter}, x)

    return {
        f"frozen, {name}": Contestant(frozen),
        f"adapt LoRA, {name}": Contestant(adapted, "AB"),
        f"adapt DoRA, {name}": Contestant(adapted, "ABm"),
    }


def contestants_of(options: argparse.Namespace) -> dict[str, Contestant]:
    """Those that the options ask for, in their order."""
    own = CONTESTANTS
    for name in options.format:
        own = own | quantized(name)
    return {name: own[name] for name in options.only or own}


def flop_bound(n_in: int, n_out: int, rank: int, *, forward: bool = False) -> float:
    """The least operations of a LoRA layer over the frozen layer's.

    Counts the products only: six with one side of size `rank` (`u = x A`, `u B`,
    `v = c B^T`, `u^T c`, `v A^T`, `x^T v`) over the frozen layer's two (`x W`, `c W^T`),
    `T` tokens and two operations a term each:

        1 + (6 T rank (in + out)) / (4 T in out) = 1 + 3 rank (in + out) / (2 in out)

    The forward pass has the first two, over `x W`. The bound leaves out additions and
    memory traffic, which cost time as well.
    """
    return 1 + (1 if forward else 1.5) * rank * (n_in + n_out) / (n_in * n_out)


def kept_bytes(function: Callable[[Any, Any], Any], trained: Any, constant: Any) -> int:
    """Bytes that the backward pass of `function(trained, constant)` keeps.

    The function is differentiated with respect to `trained`. An array that is kept twice
    counts once; the arrays of `trained` and `constant` themselves do not count.
    """

    def pull_back(trained, constant):
        return jax.vjp(lambda trained: function(trained, constant), trained)[1]

    jaxpr = jax.make_jaxpr(pull_back)(trained, constant).jaxpr
    kept = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    arrays: list[Any] = [var.aval for var in kept.difference(jaxpr.invars)]
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)


def make_arguments(options: argparse.Namespace) -> tuple[Any, ...]:
    """`x`, `weight`, a DoRA `adapter`, `extras` by keyword, and the cotangent."""
    lead = (options.tokens,)
    if options.batch:
        lead = (options.batch, options.tokens // options.batch)
    n_in, n_out, rank, dtype = options.n_in, options.n_out, options.rank, options.dtype
    normal = np.random.default_rng(0).standard_normal
    weight = jnp.asarray(normal((n_in, n_out)) / math.sqrt(n_in), dtype)
    adapter = {
        "A": jnp.asarray(0.01 * normal((n_in, rank)), "float32"),
        "B": jnp.asarray(0.01 * normal((rank, n_out)), "float32"),
        "m": lora_jax.dora_column_norm(weight),
    }
    extras = {
        "weight_norm_squared": adapter["m"] ** 2,
        "column_norm": lora_jax.dora_column_norm(weight, adapter, ALPHA),
        "dropout_key": jax.random.key(0),
        **{name: FORMATS[name](weight) for name in options.format},
    }
    x = jnp.asarray(normal((*lead, n_in)), dtype)
    cotangent = jnp.asarray(normal((*lead, n_out)), dtype)
    return x, weight, adapter, extras, cotangent


def make_step(layer: Layer, *, forward: bool = False) -> Callable[..., Any]:
    """Output and gradients of a layer, as a function of everything that they depend on."""
    if forward:
        return lambda x, weight, adapter, extras, _: layer(x, weight, adapter, extras)

    def step(x, weight, adapter, extras, cotangent):
        def apply(x, adapter):
            return layer(x, weight, adapter, extras)

        y, pull_back = jax.vjp(apply, x, adapter)
        return y, pull_back(cotangent)

    return step


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark. Returns the environment, the sizes and one row a contestant."""
    x, weight, dora_adapter, extras, cotangent = make_arguments(options)
    compiled, calls, kept, left_out = {}, {}, {}, []
    end = time.monotonic() + options.seconds
    for name, contestant in contestants_of(options).items():
        if compiled and time.monotonic() > end:
            left_out.append(name)
            continue
        adapter = {factor: dora_adapter[factor] for factor in contestant.trains}
        arguments = x, weight, adapter, extras, cotangent
        step = make_step(contestant.layer, forward=options.forward)
        compiled[name] = jax.jit(step).lower(*arguments).compile()
        calls[name] = functools.partial(compiled[name], *arguments)

        def apply(trained, constant, layer=contestant.layer):
            return layer(trained[0], constant[0], trained[1], constant[1])

        kept[name] = kept_bytes(apply, (x, adapter), (weight, extras))
    times = _timing.interleave(calls, options.rounds, repeat=options.repeat)
    ratios = _timing.ratios(times, BASELINE)
    rows = {
        name: {
            **dataclasses.asdict(ratios[name]),
            "flops": _timing.flops(compiled[name]) / _timing.flops(compiled[BASELINE]),
            "temp MiB": compiled[name].memory_analysis().temp_size_in_bytes / 2**20,
            "kept MiB": kept[name] / 2**20,
        }
        for name in compiled
    }
    return {
        **_timing.environment(),
        "dtype": options.dtype,
        "x": list(x.shape),
        "weight": list(weight.shape),
        "rank": options.rank,
        "forward": options.forward,
        "rounds": options.rounds,
        "repeat": options.repeat,
        "frozen_wall_ms": 1e3 * statistics.median(times[BASELINE].wall),
        "frozen_cpu_ms": 1e3 * statistics.median(times[BASELINE].cpu),
        "flop_bound": flop_bound(
            options.n_in, options.n_out, options.rank, forward=options.forward
        ),
        "rows": rows,
        "left_out": left_out,
        "sums": write_programs(options, compiled) if options.hlo else {},
    }


def write_programs(
    options: argparse.Namespace, compiled: Mapping[str, Any]
) -> dict[str, dict[str, int]]:
    """Writes XLA's text of each program. Returns its `_programs.count_sums`."""
    texts = {name: program.as_text() for name, program in compiled.items()}
    options.hlo.write_text("\n".join(f"// {n}\n{text}" for n, text in texts.items()))
    size = options.tokens * min(options.n_in, options.n_out)
    return {name: _programs.count_sums(text, size) for name, text in texts.items()}


def describe_sums(sums: Mapping[str, Mapping[str, int]]) -> str:
    """`write_programs` in words."""
    head = (
        "Kernels of arrays of the size of the input or output: with a product; of these, "
        "that also add another array; that only add (a pass over memory).\n"
    )
    lines = [f"- {name}: {', '.join(map(str, c.values()))}" for name, c in sums.items()]
    return "\n".join(["", head, *lines])


def format_result(result: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The result as text: what was run, and a table."""
    r = result
    sizes = f"x {r['x']}, weight {r['weight']}, rank {r['rank']}, {r['dtype']}"
    sizes += ", forward pass alone" if r["forward"] else ""
    machine = _timing.describe(r)
    frozen = f"{r['frozen_wall_ms']:.2f} ms wall, {r['frozen_cpu_ms']:.2f} ms cpu"
    bound = f"FLOP bound of LoRA {r['flop_bound']:.3f} (products only, no memory traffic)"
    head = f"{sizes}; {machine}; {r['rounds']} rounds; {BASELINE}: {frozen}. {bound}.\n"
    corner = f"ratio to {BASELINE}"
    table = _timing.format_table(corner, COLUMNS, r["rows"], markdown=markdown)
    if r["left_out"]:
        table += f"\n\nNo time was left for: {'; '.join(r['left_out'])}."
    return f"{head}\n{table}" + (f"\n{describe_sums(r['sums'])}" if r["sums"] else "")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, help="x is (batch, tokens / batch, in)")
    parser.add_argument("--in", type=int, default=1024, dest="n_in")
    parser.add_argument("--out", type=int, default=1024, dest="n_out")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--format", nargs="+", choices=tuple(FORMATS), default=())
    parser.add_argument("--forward", action="store_true", help="without the gradients")
    parser.add_argument("--hlo", type=pathlib.Path, metavar="FILE", help="write programs")
    parser.add_argument("--rounds", type=int, default=40)
    _timing.add_repeat(parser)
    _timing.add_options(parser)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="then compile no other contestant"
    )
    options = parser.parse_args(arguments)
    names = [*CONTESTANTS, *(n for f in options.format for n in quantized(f))]
    if options.only and (
        options.only[0] != BASELINE or not set(options.only) <= set(names)
    ):
        parser.error(f"--only wants {BASELINE!r} and then others of {names}")
    if options.batch and options.tokens % options.batch:
        parser.error(f"--batch {options.batch} does not divide --tokens {options.tokens}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    _timing.run(parse(arguments), measure, format_result)


if __name__ == "__main__":
    main()
