"""What adapters cost on a mesh: collectives, bytes and operations of one device.

The model is the transformer of `_transformer.py`, with FSDP and tensor parallelism. Its
forward pass and its step (the gradient of the adapters and of the input) are compiled for
eight CPU devices and read; nothing is run. The frozen program has the gradient of the
input alone. The contestants differ in where the adapters lie, and in the program:

- *rule*: `adapter_shardings`; a factor is split as the weight is, but not over the axes
  that split the examples.
- *replicated*: every device has every factor whole.
- *inherited*: `A` is split as the inputs of the weight are, and `B` as its outputs.
- *qwix*: its program, `x @ W + scale * (x @ A) @ B`, and its shardings, which are the
  inherited ones (qwix 0.1.8, `qwix/_src/providers/lora.py`, `a_sharding_transpose`).
- *nnx.LoRA*: the same program, and replicated factors, as without `a_metadata` and
  `b_metadata` (Flax 0.12.8, `flax/nnx/nn/lora.py`).
"""

import argparse
import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import _programs
import _timing
import _transformer
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
"""The mesh axes that split the examples."""
PLACES = ("rule", "replicated", "inherited")
CONTESTANTS = {
    **{f"adapt, {place}": ("adapt", place) for place in PLACES},
    "qwix": ("textbook", "inherited"),
    "nnx.LoRA": ("textbook", "replicated"),
}
FROZEN = "frozen"
KINDS = {"gathers": "all-gather", "sums": "all-reduce"}
DEVICES = "xla_force_host_platform_device_count"
COLUMNS = (*KINDS, "others", "moved KiB", "MFLOP", "adapters KiB")


def make_mesh() -> Mesh:
    """Two devices along each axis."""
    return jax.make_mesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)


def spec_of(name: str) -> P:
    """How a matrix of a layer is split; norms are not."""
    rows = name in ("output", "down")
    return P("tensor", "fsdp") if rows else P("fsdp", "tensor")


def make_params(options: argparse.Namespace, mesh: Mesh) -> Any:
    """The shapes of the weights, with their shardings."""
    make = functools.partial(
        _transformer.make_params, options.layers, options.width, options.dtype
    )
    params = jax.eval_shape(lambda: make(stacked=False))

    def place(path, leaf):
        spec = P() if leaf.ndim == 1 else spec_of(path[-1].key)
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree_util.tree_map_with_path(place, params)


def make_adapters(params: Any, plan: lora_jax.AdapterPlan, mesh: Mesh, place: str) -> Any:
    """The shapes of the adapters, with the shardings of a contestant."""
    by_rule = lora_jax.adapter_shardings(params, plan, data_axes=BATCH)

    def sharding(path, name):
        if place == "rule":
            return by_rule[path][name]
        n_in, n_out = spec_of(path.rpartition("/")[2])
        inherited = P(n_in, None) if name == "A" else P(None, n_out)
        return NamedSharding(mesh, inherited if place == "inherited" else P())

    return {
        path: {
            name: jax.ShapeDtypeStruct(shape, "float32", sharding=sharding(path, name))
            for name, shape in target.adapter_shapes.items()
        }
        for path, target in plan.targets.items()
    }


def textbook(
    x: jax.Array, weight: jax.Array, adapter: Mapping[str, jax.Array], alpha: float
) -> jax.Array:
    """The LoRA layer as qwix and Flax write it."""
    scale = alpha / adapter["A"].shape[-1]
    return x @ weight + scale * (x @ adapter["A"] @ adapter["B"])


def make_model(program: str, plan: lora_jax.AdapterPlan, heads: int) -> Callable[..., Any]:
    """The adapted model, `model(params, adapters, x)`."""
    if program == "textbook":
        return functools.partial(_transformer.loop_by_hand, textbook, heads=heads)
    return lora_jax.adapt(functools.partial(_transformer.plain_loop, heads=heads), plan)


def loss_of(output: jax.Array) -> jax.Array:
    """A loss with another cotangent for each entry."""
    return jnp.sum(jnp.sin(output.astype("float32")))


def compiled(function: Callable[..., Any], *args: Any, out: Any = None) -> Any:
    """A compiled program, whose results lie on the shardings `out`."""
    return jax.jit(function, out_shardings=out).lower(*args).compile()


def shard_bytes(tree: Any) -> int:
    """The bytes of a tree on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def measure_program(program: Any, adapters: Any) -> dict[str, float]:
    """The columns of one compiled program."""
    found = _programs.collectives(program.as_text())
    counts = {
        column: sum(one.times for one in found if one.kind == kind)
        for column, kind in KINDS.items()
    }
    return {
        **counts,
        "others": sum(one.times for one in found) - sum(counts.values()),
        "moved KiB": sum(one.moved for one in found) / 2**10,
        "MFLOP": _timing.flops(program) / 1e6,
        "adapters KiB": shard_bytes(adapters) / 2**10,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compiles every program. Returns the sizes, and a table for each of the two passes."""
    mesh = make_mesh()
    params = make_params(options, mesh)
    frozen = functools.partial(_transformer.plain_loop, heads=options.heads)
    x = jax.ShapeDtypeStruct(
        (options.batch, options.length, options.width),
        options.dtype,
        sharding=NamedSharding(mesh, P(BATCH)),
    )
    config = lora_jax.LoraConfig(rank=options.rank, alpha=_transformer.ALPHA)
    plan = lora_jax.plan_adapters(config, params, frozen, x)

    def frozen_loss(x, params):
        return loss_of(frozen(params, x))

    forward = {FROZEN: measure_program(compiled(frozen_loss, x, params), {})}
    step = compiled(jax.grad(frozen_loss), x, params, out=x.sharding)
    steps = {FROZEN: measure_program(step, {})}
    for name, (program, place) in CONTESTANTS.items():
        model = make_model(program, plan, options.heads)
        adapters = make_adapters(params, plan, mesh, place)

        def loss(adapters, x, params, model=model):
            return loss_of(model(params, adapters, x))

        arguments = adapters, x, params
        forward[name] = measure_program(compiled(loss, *arguments), adapters)
        out = jax.tree.map(lambda leaf: leaf.sharding, (adapters, x))
        step = compiled(jax.grad(loss, argnums=(0, 1)), *arguments, out=out)
        steps[name] = measure_program(step, adapters)
    return {
        **_timing.environment(),
        **{name: getattr(options, name) for name in _transformer.SIZES},
        "mesh": dict(mesh.shape),
        "tables": {"forward": forward, "step": steps},
    }


def format_result(result: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The result as text: what was compiled, and the tables."""
    mesh = ", ".join(f"{name} {size}" for name, size in result["mesh"].items())
    sizes = _transformer.describe_sizes(result)
    head = f"{sizes}; mesh {mesh}; {result['platform']} devices, jax {result['jax']}."
    tables = [
        _timing.format_table(f"{name}, per device", COLUMNS, rows, markdown=markdown)
        for name, rows in result["tables"].items()
    ]
    return "\n\n".join([head, *tables])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    _transformer.add_sizes(parser, layers=2)
    _timing.add_options(parser)
    options = parser.parse_args(arguments)
    _transformer.check_sizes(parser, options)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark from the command line, on eight CPU devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    if DEVICES not in flags:  # read when JAX makes its first array
        os.environ["XLA_FLAGS"] = f"{flags} --{DEVICES}=8"
    _timing.run(parse(arguments), measure, format_result)


if __name__ == "__main__":
    main()
