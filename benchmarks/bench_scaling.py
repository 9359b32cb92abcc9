"""Memory and traffic of fine-tuning Llama on many devices, from compiled programs.

The training step of a Llama model is compiled for 8 to 1024 devices and not run: all arrays
are abstract, and the devices are virtual ones of the CPU.

    python benchmarks/bench_scaling.py --markdown

The model is a `lax.scan` over checkpointed layers on a mesh `(data, fsdp, tensor)`: heads,
the hidden axis of the MLP and the vocabulary are split over 8 `tensor` devices, the other
axis of a weight over up to 16 `fsdp` devices, and the examples over the rest, one sequence
of 4096 tokens for each `(data, fsdp)` group. Methods: *frozen* computes the loss and its
gradient with respect to the embedded tokens; *LoRA*, *DoRA* and *NF4* (LoRA on NF4 weights)
train all seven matrices of a layer with Adam, and *ZeRO-1* splits its moments over `data`
and `fsdp`; *full* trains everything. Frozen weights are bfloat16; what is trained is
float32.

Columns, in GiB for each device: the params, what is trained besides them, its gradients,
the optimizer's state and their sum, from `jax.eval_shape` and the shard shapes; and the
bytes that a device sends in one step, if the devices of each collective form a ring: all of
them, those of all-gathers, and those of all-reduces. A collective in a loop counts in every
iteration. One in a branch does not count (the norms of DoRA that are computed again if they
cancel; *branches* in the JSON file). Activations are not counted.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import _programs
import _timing
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import lora_jax

GIB = 2**30
COMPILER: dict[str, Any] = {
    # What is widened to float32 is known of each all-reduce by itself.
    "xla_disable_hlo_passes": "cpu-all-reduce-combiner",
    # The partitioned program is the same, and its machine code is not used.
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if jax.__version_info__ < (0, 11):  # newer ones do not have the option
    COMPILER["xla_cpu_use_fusion_emitters"] = False
DATA_AXES = "data", "fsdp"
METHODS = ("frozen", "LoRA", "LoRA, ZeRO-1", "DoRA", "NF4", "full")
SENT = {"sent": "", "gather": "all-gather", "reduce": "all-reduce"}
"""Columns, and how the names of their collectives start."""
COLUMNS = ("params", "trained", "gradients", "state", "memory", *SENT)


class Sizes(NamedTuple):
    """Sizes of a Llama model."""

    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 128256

    @property
    def head(self) -> int:
        """The size of a head."""
        return self.width // self.heads


MODELS = {
    "toy": Sizes(256, 512, 2, 8, 4, 512),
    "8B": Sizes(4096, 14336, 32, 32, 8),
    "70B": Sizes(8192, 28672, 80, 64, 8),
    "405B": Sizes(16384, 53248, 126, 128, 8),
}


def make_mesh(devices: int, tensor: int, fsdp: int) -> Mesh:
    """The mesh of some devices: `tensor` first, then `fsdp`, and the rest is `data`."""
    tensor = math.gcd(devices, tensor)
    fsdp = math.gcd(devices // tensor, fsdp)
    shape = devices // (tensor * fsdp), fsdp, tensor
    names = (*DATA_AXES, "tensor")
    types = (AxisType.Auto,) * 3
    return jax.make_mesh(shape, names, types, devices=jax.devices()[:devices])


def make_params(sizes: Sizes, mesh: Mesh, dtype: str) -> dict[str, Any]:
    """The abstract weights of a model with their shardings."""
    s = sizes
    queries, keys = (s.width, s.heads, s.head), (s.width, s.kv_heads, s.head)
    column, heads = ("fsdp", "tensor"), ("fsdp", "tensor", None)
    layers = {
        "query": (queries, heads),
        "key": (keys, heads),
        "value": (keys, heads),
        "output": ((s.heads, s.head, s.width), ("tensor", None, "fsdp")),
        "gate": ((s.width, s.hidden), column),
        "up": ((s.width, s.hidden), column),
        "down": ((s.hidden, s.width), ("tensor", "fsdp")),
        "attention_norm": ((s.width,), (None,)),
        "mlp_norm": ((s.width,), (None,)),
    }

    def array(shape, axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    return {
        "embedding": array((s.vocabulary, s.width), column),
        "layers": {
            name: array((s.layers, *shape), (None, *axes))
            for name, (shape, axes) in layers.items()
        },
        "norm": array((s.width,), (None,)),
        "head": array((s.width, s.vocabulary), column),
    }


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Root-mean-square normalization, in float32."""
    wide = x.astype("float32")
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    return (wide * scale.astype("float32")[None, None, :]).astype(x.dtype)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding of `(batch, length, heads, head)`."""
    half = x.shape[-1] // 2
    frequency = 500000.0 ** (-jnp.arange(half, dtype="float32") / half)
    angle = jnp.arange(x.shape[1], dtype="float32")[:, None] * frequency[None, :]
    cos, sin = (f(angle)[None, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention with grouped queries."""
    batch, length, kv_heads, head = key.shape
    query = query.reshape(batch, length, kv_heads, -1, head)
    scores = jnp.einsum("bqkgh,bskh->bkgqs", query, key).astype("float32") / head**0.5
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None, None]
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9)).astype(key.dtype)
    mixed = jnp.einsum("bkgqs,bskh->bqkgh", weights, value)
    return mixed.reshape(batch, length, -1, head)


class Model(NamedTuple):
    """A Llama model on a mesh. It multiplies in the dtype of its activations."""

    mesh: Mesh
    dtype: str

    def split(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Splits the examples over the data axes, and the last axes as given."""
        spec = (DATA_AXES, *(None,) * (x.ndim - 1 - len(axes)), *axes)
        sharding = NamedSharding(self.mesh, PartitionSpec(*spec))
        return lax.with_sharding_constraint(x, sharding)

    def layer(self, x: jax.Array, weights: Mapping[str, jax.Array]) -> jax.Array:
        """One layer of the transformer."""
        w = {name: weight.astype(x.dtype) for name, weight in weights.items()}
        hidden = norm(x, w["attention_norm"])
        query, key, value = (
            jnp.einsum("bsd,dhk->bshk", hidden, w[n]) for n in ("query", "key", "value")
        )
        mixed = attend(rotate(query), rotate(key), value)
        x = self.split(x + jnp.einsum("bshk,hkd->bsd", mixed, w["output"]))
        hidden = norm(x, w["mlp_norm"])
        hidden = jax.nn.silu(hidden @ w["gate"]) * (hidden @ w["up"])
        return self.split(x + hidden @ w["down"])

    def embed(self, params: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
        """The embedded tokens. Each device gathers its columns of the table."""
        columns = NamedSharding(self.mesh, PartitionSpec(None, "tensor"))
        table = params["embedding"].astype(self.dtype)
        return self.split(lax.with_sharding_constraint(table, columns)[tokens])

    def loss(
        self, params: Mapping[str, Any], embedded: jax.Array, tokens: jax.Array
    ) -> jax.Array:
        """The loss of the next tokens."""
        body = jax.checkpoint(lambda x, weights: (self.layer(x, weights), None))
        x, _ = lax.scan(body, embedded, params["layers"])
        head = params["head"].astype(x.dtype)
        logits = self.split(norm(x, params["norm"]) @ head, "tensor").astype("float32")
        wanted = jax.nn.one_hot(jnp.roll(tokens, -1, axis=1), head.shape[1])
        right = jnp.sum(wanted * logits, axis=-1)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - right)

    def __call__(self, params: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
        """The loss of some params."""
        return self.loss(params, self.embed(params, tokens), tokens)


class Step(NamedTuple):
    """A training step and its abstract arguments.

    Attributes:
        step: of `trained`, `state`, `params` and tokens.
        trained: what has gradients; nothing for the frozen model.
        state: of the optimizer.
        params: what is frozen.
        tokens: the input.
    """

    step: Callable[..., Any]
    trained: Any
    state: Any
    params: Any
    tokens: jax.ShapeDtypeStruct


def set_up(
    sizes: Sizes, mesh: Mesh, method: str, *, length: int, rank: int, dtype: str
) -> Step:
    """A method on a model, with one sequence for each group of devices that share it."""
    model, optimizer = Model(mesh, dtype), optax.adam(1e-4)
    batch = mesh.shape["data"] * mesh.shape["fsdp"]
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXES))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=sharding)
    params = make_params(sizes, mesh, "float32" if method == "full" else dtype)
    if method == "frozen":

        def frozen(trained, state, params, tokens):
            embedded = model.embed(params, tokens)
            return jax.value_and_grad(model.loss, argnums=1)(params, embedded, tokens)

        return Step(frozen, {}, {}, params, tokens)
    if method == "full":
        trained, frozen_params = params, {}

        def loss(trained, params, tokens):
            return model(trained, tokens)

        places = optax.tree_utils.tree_map_params(
            optimizer,
            lambda _, leaf: leaf.sharding,
            jax.eval_shape(optimizer.init, params),
            params,
            transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
        )
    else:
        config = lora_jax.LoraConfig(
            rank, 2.0 * rank, exclude="head", use_dora=method == "DoRA"
        )
        plan = lora_jax.plan_adapters(config, params, model, tokens)
        shardings = lora_jax.adapter_shardings(params, plan, data_axes=DATA_AXES)
        new = jax.eval_shape(lora_jax.init_adapters, jax.random.key(0), params, plan)
        trained = jax.tree.map(_place, new, shardings)
        split = DATA_AXES if "ZeRO-1" in method else ()
        places = lora_jax.optimizer_shardings(optimizer, trained, shardings, split)
        frozen_params = params
        if method == "NF4":
            frozen_params = lora_jax.quantize_params(params, plan)
        adapted = lora_jax.adapt(model, plan)

        def loss(trained, params, tokens):
            return adapted(params, trained, tokens)

    def update(trained, state, params, tokens):
        value, gradient = jax.value_and_grad(loss)(trained, params, tokens)
        updates, state = optimizer.update(gradient, state, trained)
        return value, optax.apply_updates(trained, updates), state

    state = jax.tree.map(_place, jax.eval_shape(optimizer.init, trained), places)
    return Step(update, trained, state, frozen_params, tokens)


def _place(array: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def device_bytes(tree: Any) -> int:
    """The bytes of abstract arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def compile_step(step: Step) -> str:
    """XLA's text of the step, with the shardings of its arguments kept."""
    places = jax.tree.map(lambda leaf: leaf.sharding, (step.trained, step.state))
    trains = bool(step.trained)
    options = {"out_shardings": (None, *places), "donate_argnums": (0, 1)} if trains else {}
    compiled = jax.jit(step.step, **options).lower(*step[1:]).compile(COMPILER)
    text = compiled.as_text()
    assert text is not None
    return text


def measure_step(step: Step, *, full: bool) -> dict[str, float]:
    """The columns of one step, in GiB."""
    found = _programs.collectives(compile_step(step))
    trained = device_bytes(step.trained)
    memory = {
        "params": trained if full else device_bytes(step.params),
        "trained": 0 if full else trained,
        "gradients": trained,
        "state": device_bytes(step.state),
    }
    sent = {
        column: sum(c.moved for c in found if c.kind.startswith(kind) and not c.branch)
        for column, kind in SENT.items()
    }
    branches = sum(c.moved for c in found if c.branch)
    row = {**memory, "memory": sum(memory.values()), **sent, "branches": branches}
    return {column: number / GIB for column, number in row.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compiles every step. Returns the sizes and one row for each."""
    sizes = {name: getattr(options, name) for name in ("length", "rank", "dtype")}
    rows, seconds = {}, {}
    for name in options.model:
        for devices in options.devices:
            mesh = make_mesh(devices, options.tensor, options.fsdp)
            for method in options.method:
                key, start = f"{name}, {devices}, {method}", time.monotonic()
                step = set_up(MODELS[name], mesh, method, **sizes)
                rows[key] = measure_step(step, full=method == "full")
                seconds[key] = time.monotonic() - start
                print(f"{key}: {seconds[key]:.0f} s", file=sys.stderr, flush=True)
    return {**_timing.environment(), **sizes, "rows": rows, "seconds": seconds}


def format_result(result: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The result as text: what was compiled, and a table."""
    r = result
    head = f"length {r['length']}, rank {r['rank']}, {r['dtype']}; jax {r['jax']}.\n"
    table = _timing.format_table("GiB a device", COLUMNS, r["rows"], markdown=markdown)
    return f"{head}\n{table}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    models = [name for name in MODELS if name != "toy"]
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=models)
    parser.add_argument("--devices", nargs="+", type=int, default=(8, 64, 1024))
    parser.add_argument("--tensor", type=int, default=8, help="devices, at most")
    parser.add_argument("--fsdp", type=int, default=16, help="devices, at most")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    _timing.add_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    options = parse(arguments)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(options.devices))
    _timing.run(options, measure, format_result)


if __name__ == "__main__":
    main()
