"""Time to trace and compile a training step of unrolled layers: `adapt` and by hand.

Without a scan over layers, the program of a model contains each layer, so the time to
compile it grows with the number of weights. DoRA by hand follows its paper: it forms
`W + scale * A @ B` and takes its norm.

    python benchmarks/bench_compile.py --layers 12 --width 32

Columns: the ratio of processor time to the model by hand with the same method, as the
median over rounds; and the ratio of the lines of the lowered program.
"""

import argparse
from collections.abc import Callable
from typing import Any

import _timing
import jax
import jax.numpy as jnp
import numpy as np

import lora_jax

RANK, SCALE = 8, 2.0
COLUMNS = ("cpu", "lines")
METHODS = ("lora", "dora")
CONTESTANTS = ("by hand", "adapt")


def make_params(layers: int, width: int) -> dict[str, Any]:
    """Weights of some layers, each with four matrices."""
    rng = np.random.default_rng(0)
    shapes = {"q": (width, width), "o": (width, width)}
    shapes |= {"up": (width, 2 * width), "down": (2 * width, width)}

    def make_layer() -> dict[str, jax.Array]:
        values = {name: rng.normal(0, 0.1, shape) for name, shape in shapes.items()}
        return {name: jnp.asarray(value, "float32") for name, value in values.items()}

    return {"layers": [make_layer() for _ in range(layers)]}


def apply(params: Any, x: jax.Array, linear: Callable[..., jax.Array]) -> jax.Array:
    """The model, with a function for its products: of the input, the weight, its path."""
    for i, layer in enumerate(params["layers"]):

        def of(x, name, layer=layer, i=i):
            return linear(x, layer[name], f"layers/{i}/{name}")

        x = x + of(jnp.tanh(of(x, "q")), "o")
        x = x + of(jax.nn.silu(of(x, "up")), "down")
    return x


def plain(params: Any, x: jax.Array) -> jax.Array:
    """The frozen model."""
    return apply(params, x, lambda x, weight, path: x @ weight)


def by_hand(params: Any, adapters: Any, x: jax.Array) -> jax.Array:
    """The model with adapters in its products, as the papers have them."""

    def linear(x, weight, path):
        adapter = adapters[path]
        y = x @ weight + SCALE * (x @ adapter["A"]) @ adapter["B"]
        if "m" not in adapter:
            return y
        whole = weight + SCALE * adapter["A"] @ adapter["B"]
        norm = jax.lax.stop_gradient(jnp.linalg.norm(whole, axis=0))
        return y * (adapter["m"] / norm)[None]

    return apply(params, x, linear)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compiles every contestant in every round, and gives the ratios."""
    params = make_params(options.layers, options.width)
    x = jnp.ones((8, options.width))
    rows = {}
    for method in METHODS:
        dora = method == "dora"
        config = lora_jax.LoraConfig(RANK, SCALE * RANK, use_dora=dora)
        plan = lora_jax.plan_adapters(config, params, plain, x)
        adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
        models = {"by hand": by_hand, "adapt": lora_jax.adapt(plain, plan)}

        def lower(model, adapters=adapters):
            def loss(adapters, params, x):
                return jnp.mean(jnp.square(model(params, adapters, x)))

            return jax.jit(jax.value_and_grad(loss)).lower(adapters, params, x)

        def compile_anew(model, lower=lower):
            jax.clear_caches()
            lower(model).compile()

        calls = {n: lambda m=m, f=compile_anew: f(m) for n, m in models.items()}
        times = _timing.interleave(calls, options.rounds, warmup=1)
        lines = {n: len(lower(m).as_text().splitlines()) for n, m in models.items()}
        for name, ratio in _timing.ratios(times, "by hand").items():
            share = lines[name] / lines["by hand"]
            rows[f"{method}, {name}"] = {"cpu": ratio.cpu, "lines": share}
    return {**_timing.environment(), "options": vars(options), "rows": rows}


def format_result(result: dict[str, Any], *, markdown: bool = False) -> str:
    """The result as text."""
    o = result["options"]
    title = f"{_timing.describe(result)}; {o['layers']} layers of width {o['width']}"
    table = _timing.format_table(
        "trace and compile", COLUMNS, result["rows"], markdown=markdown
    )
    return f"{title}\n\n{table}\n"


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    _timing.add_options(parser)
    _timing.run(parser.parse_args(argv), measure, format_result)


if __name__ == "__main__":
    main()
