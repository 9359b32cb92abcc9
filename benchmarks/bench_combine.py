"""Times of combinations of adapters of one weight, over those of a dense SVD.

The weight is square, and all adapters have one rank. The baseline forms the weighted sum of
the dense updates and truncates its singular value decomposition, as `add_weighted_adapter`
of peft does. The contestants are methods of `combine_adapters`.

    python benchmarks/bench_combine.py --threads 1
    python benchmarks/bench_combine.py --width 4096 --rounds 3

Columns: medians over rounds of the ratio of the baseline's time to that of the contestant
in the same round, elapsed and of the processor, so that 50 is fifty times as fast; the
shortest time of each in milliseconds; and the distance of its update from that of the same
method in float64, over the norm of the sum, in rounding units of float32. It is measured
for the methods that give the sum or its best approximation.
"""

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any

import _timing
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.layers import combinations
from lora_jax.layers.combinations import Cut, Method, Term, Update

BASELINE = "dense SVD"
COLUMNS = ("wall", "cpu", "ms", "error")
CONTESTANTS = {
    "svd": Method("svd"),
    "exact": Method("exact"),
    "linear": Method("linear"),
    "ties": Method("ties", 0.5),
    "knots": Method("knots", 0.5),
    "tsv": Method("tsv"),
    "ties_svd": Method("ties_svd", 0.5),
}


@functools.partial(jax.jit, static_argnums=2)
def dense_svd(factors: Any, weights: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The sum of the updates, formed and then truncated."""
    total = sum(w * (a @ b) for w, (a, b) in zip(weights, factors, strict=True))
    u, s, vh = jnp.linalg.svd(total, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root[None], root[:, None] * vh[:rank]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all contestants, and returns what `format_result` prints."""
    rng = np.random.default_rng(0)
    width, rank = options.width, options.rank
    weights = rng.uniform(0.5, 1.5, options.adapters) * rng.choice(
        [-1, 1], options.adapters
    )
    host = [
        (rng.normal(size=(width, rank)), rng.normal(size=(rank, width))) for _ in weights
    ]
    factors = [(jnp.asarray(a, "float32"), jnp.asarray(b, "float32")) for a, b in host]
    terms = [
        Term(a, b, 1.0, float(weight))
        for (a, b), weight in zip(factors, weights, strict=True)
    ]

    def combine(method: Method) -> Update:
        cut = Cut(rank) if method.name in combinations.TRUNCATE else Cut()
        return combinations.combine(terms, method, cut)

    calls: dict[str, Callable[[], Any]] = {
        BASELINE: lambda: dense_svd(factors, jnp.asarray(weights, "float32"), rank)
    }
    chosen = options.only or [*CONTESTANTS]
    calls |= {name: functools.partial(combine, CONTESTANTS[name]) for name in chosen}
    total = sum(w * (a @ b) for w, (a, b) in zip(weights, host, strict=True))
    u, s, vh = np.linalg.svd(total, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    wants = {BASELINE: best, "svd": best, "exact": total}
    errors = {}
    for name, call in calls.items():
        a, b, *_ = call()
        if name in wants:
            got = np.asarray(a, "float64") @ np.asarray(b, "float64")
            unit = np.linalg.norm(total) * np.finfo("float32").eps
            errors[name] = float(np.linalg.norm(got - wants[name]) / unit)
    times = _timing.interleave(calls, options.rounds, warmup=1)
    rows = {}
    for name, own in times.items():
        over = _timing.ratios({BASELINE: times[BASELINE], name: own}, name)[BASELINE]
        rows[name] = {"wall": over.wall, "cpu": over.cpu, "ms": 1e3 * min(own.wall)}
        rows[name]["error"] = errors.get(name, float("nan"))
    sizes = {"width": width, "rank": rank, "adapters": options.adapters}
    return {**_timing.environment(), **sizes, "rounds": options.rounds, "rows": rows}


def format_result(result: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The result as text: what was run, and a table."""
    r = result
    sizes = f"{r['adapters']} adapters of rank {r['rank']}, width {r['width']}, float32"
    table = _timing.format_table(
        f"times as fast as {BASELINE}", COLUMNS, r["rows"], markdown=markdown
    )
    return f"{sizes}; {_timing.describe(r)}; {r['rounds']} rounds.\n\n{table}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=tuple(CONTESTANTS), metavar="NAME")
    _timing.add_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    _timing.run(parse(arguments), measure, format_result)


if __name__ == "__main__":
    main()
