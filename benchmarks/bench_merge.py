"""Memory and time of `lora-jax merge` on a sharded model; a copy is the baseline.

The model is made up in a temporary directory: layers of seven matrices, and an embedding,
in bfloat16. An adapter touches all matrices of the layers, or about a tenth of the model's
bytes: one matrix in every other layer, so that each shard has some. Each merge is a process
of its own, as a user starts it; a copy is `shutil.copyfile` of each file with an fsync,
which merging does too.

    python benchmarks/bench_merge.py --mib 2048 --shard-mib 256

Columns: median over rounds of the ratio of elapsed time to that of the copy in the same
round (*wall*); the same without the start of the process (*net*); that of the shortest
times of all rounds, which other work on the machine disturbs least (*best net*); and that
of the shortest processor times (*best cpu*). The start is the time to import JAX and to
merge a model of no size. Then MiB of the model per second; the peak of resident memory in
MiB; and that minus the peak of the start, which the size of shards and tensors must not
move: `LIMIT_MIB` is the most it may be.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import _timing
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._io import tensor_streams

MIB = 2**20
LIMIT_MIB = 256
COPY = "copy"
# The adapter of each merge, and its options.
MERGES = {
    "LoRA, a tenth": ("lora-tenth",),
    "DoRA, a tenth": ("dora-tenth",),
    "LoRA, all": ("lora-all",),
    "DoRA, all": ("dora-all",),
    "LoRA, all, float32": ("lora-all", "--dtype=float32"),
}
CONTESTANTS = (COPY, *MERGES)
MODELS = ("tiny", "model")
COLUMNS = ("wall", "net", "best net", "best cpu", "MiB/s", "peak MiB", "over start")
_VOCABULARY = 32000
_TINY_WIDTH = 64

# The peak is read in the process itself: to the usage of a child that its parent is told
# of, Linux adds what the parent had when it started the child.
_PROGRAM = """
import json, pathlib, re, resource, sys, time
from lora_jax.cli import main

def state():
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1])
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"wall": time.perf_counter(), "cpu": time.process_time(), "peak": peak}

report, *merges = sys.argv[1:]
states = []
for merge in merges:
    if main(json.loads(merge)):
        sys.exit(1)
    states.append(state())
pathlib.Path(report).write_text(json.dumps(states))
"""


def make_shapes(width: int, layers: int, entries: int) -> dict[str, tuple[int, ...]]:
    """The matrices of a model, `(out, in)`, and its embedding."""
    inner = 11 * width // 4
    linears = {
        **{f"self_attn.{name}_proj": (width, width) for name in "qkvo"},
        **{f"mlp.{name}_proj": (inner, width) for name in ("gate", "up")},
        "mlp.down_proj": (width, inner),
    }
    return {"model.embed_tokens.weight": (entries, width)} | {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(layers)
        for name, shape in linears.items()
    }


def split(shapes: Mapping[str, tuple[int, ...]], most: int) -> Iterator[list[str]]:
    """The names of the tensors of each shard, which have some bytes at most."""
    shard, size = [], 0
    for name, shape in shapes.items():
        own = 2 * math.prod(shape)
        if shard and size + own > most:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += own
    yield shard


def write_model(
    folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], shard_bytes: int
) -> None:
    """Writes a model of random values, which repeat after a while."""
    folder.mkdir()
    values = np.random.default_rng(0).normal(0, 0.02, MIB).astype(jnp.bfloat16)
    weight_map = {}
    for i, names in enumerate(split(shapes, shard_bytes)):
        file = f"model-{i:05}.safetensors"
        entries = {name: jax.ShapeDtypeStruct(shapes[name], jnp.bfloat16) for name in names}
        with tensor_streams.open_writer(folder / file, entries, {}) as writer:
            for name in names:
                left = math.prod(shapes[name])
                while left:
                    writer.write(name, values[:left])
                    left -= min(left, MIB)
        weight_map |= dict.fromkeys(names, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def write_adapters(
    folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], rank: int
) -> dict[str, float]:
    """Writes the PEFT adapters of `MERGES`. Returns their shares of the model's bytes."""
    matrices = [name for name in shapes if "layers" in name]
    few = [n for n in matrices if "down_proj" in n and int(n.split(".")[2]) % 2 == 0]
    total, shares = sum(map(math.prod, shapes.values())), {}
    for which, names in (("all", matrices), ("tenth", few)):
        own = {name: shapes[name] for name in names}
        shares[which] = sum(map(math.prod, own.values())) / total
        for method in ("lora", "dora"):
            _write_adapter(folder / f"{method}-{which}", own, rank, method == "dora")
    return shares


def _write_adapter(
    folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], rank: int, dora: bool
) -> None:
    folder.mkdir(parents=True)
    rng, tensors = np.random.default_rng(1), {}
    for name, (n_out, n_in) in shapes.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        for factor, shape in (("A", (rank, n_in)), ("B", (n_out, rank))):
            values = rng.normal(0, 0.02, shape).astype("float32")
            tensors[f"{prefix}.lora_{factor}.weight"] = values
        if dora:  # near the norms of the rows
            values = 0.02 * math.sqrt(n_in) * rng.normal(1, 0.01, n_out)
            tensors[f"{prefix}.lora_magnitude_vector"] = values.astype("float32")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "use_dora": dora,
        "target_modules": [name.removesuffix(".weight") for name in shapes],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensor_streams.write_tensors(folder / "adapter_model.safetensors", tensors, {})


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the files of a directory to the disk."""
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as copied:
            os.fsync(copied.fileno())


class Merges:
    """Runs merges.

    Attributes:
        walls: elapsed times of the whole processes in seconds, by contestant.
        starts: elapsed times of their starts.
        peaks: memory in MiB, of the merge and of the start.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self.walls: dict[str, list[float]] = {name: [] for name in MERGES}
        self.starts: dict[str, list[float]] = {name: [] for name in MERGES}
        self.peaks: dict[str, list[tuple[float, float]]] = {name: [] for name in MERGES}

    def run(self, name: str) -> dict[str, float]:
        """Starts a process and merges. Returns the times without the start, in seconds."""
        (adapter, *options), report = MERGES[name], self._folder / "report"
        outs = [self._folder / f"out-{model}" for model in MODELS]
        merges = []
        for model, out in zip(MODELS, outs, strict=True):
            paths = (self._folder / model / each for each in ("base", adapter))
            merges.append(["merge", *map(str, paths), str(out), "--quiet", *options])
        command = [sys.executable, "-c", _PROGRAM, str(report), *map(json.dumps, merges)]
        root = str(pathlib.Path(__file__).parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
        begin = time.perf_counter()
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        self.walls[name].append(time.perf_counter() - begin)
        start, end = json.loads(report.read_text())
        spent = {each: end[each] - start[each] for each in ("wall", "cpu")}
        self.starts[name].append(self.walls[name][-1] - spent["wall"])
        self.peaks[name].append((end["peak"] / 1024, start["peak"] / 1024))
        for out in outs:
            shutil.rmtree(out)
        return spent

    def copy(self) -> dict[str, float]:
        """Copies the model, and removes the copy. Returns the times in seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        copy(self._folder / "model" / "base", self._folder / "out")
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        shutil.rmtree(self._folder / "out")
        return {"wall": wall, "cpu": cpu}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark. Returns the environment, the sizes and a row a contestant."""
    layer = sum(2 * math.prod(s) for s in make_shapes(options.width, 1, 0).values())
    layers = max(1, options.mib * MIB // layer)
    entries = min(_VOCABULARY, 16 * options.width)
    shapes = make_shapes(options.width, layers, entries)
    tiny = make_shapes(_TINY_WIDTH, 1, 16)
    shards = list(split(shapes, options.shard_mib * MIB))
    sizes = {name: 2 * math.prod(shape) / MIB for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = pathlib.Path(temporary)
        shares = write_adapters(folder / "model", shapes, options.rank)
        write_adapters(folder / "tiny", tiny, options.rank)
        for name, own in (("model", shapes), ("tiny", tiny)):
            write_model(folder / name / "base", own, options.shard_mib * MIB)
        merges = Merges(folder)
        calls = {name: functools.partial(merges.run, name) for name in MERGES}
        calls |= {COPY: merges.copy}
        times = _timing.take_turns(calls, options.rounds, warmup=options.warmup)
    total = sum(sizes.values())
    return {
        **_timing.environment(),
        "mib": total,
        "largest_shard": max(sum(sizes[name] for name in names) for names in shards),
        "largest_tensor": max(sizes.values()),
        "shards": len(shards),
        "layers": layers,
        "width": options.width,
        "rank": options.rank,
        "rounds": options.rounds,
        "shares": shares,
        "copy_s": min(times[COPY].wall),
        "start_s": min(map(min, merges.starts.values())),
        "limit_mib": LIMIT_MIB,
        "rows": make_rows(times, merges, total),
    }


def make_rows(
    times: Mapping[str, _timing.Times], merges: Merges, total: float
) -> dict[str, dict[str, float]]:
    """The columns of each contestant. A copy has no start and no peak.

    Args:
        times: of the contestants, without the start.
        merges: what is known of those that merge.
        total: the size of the model in MiB.
    """
    ratios, base, rows = _timing.ratios(times, COPY), times[COPY], {}
    for name in CONTESTANTS:
        own = times[name]
        walls = merges.walls.get(name, own.wall)[-len(own.wall) :]
        peak, start = map(max, zip(*merges.peaks.get(name, [(math.nan,) * 2]), strict=True))
        pairs = zip(walls, base.wall, strict=True)
        rows[name] = {
            "wall": statistics.median(wall / copied for wall, copied in pairs),
            "net": ratios[name].wall,
            "best net": ratios[name].best,
            "best cpu": min(own.cpu) / min(base.cpu),
            "MiB/s": total / statistics.median(own.wall),
            "peak MiB": peak,
            "over start": peak - start,
        }
    return rows


def format_result(result: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The result as text: what was run, and a table."""
    r = result
    head = (
        f"{r['mib']:.0f} MiB in {r['shards']} shards, the largest {r['largest_shard']:.0f} "
        f"MiB, the largest tensor {r['largest_tensor']:.0f} MiB, {r['layers']} layers of "
        f"width {r['width']}, rank {r['rank']}, bfloat16; {r['device']} ({r['platform']}), "
        f"{r['threads']} threads, jax {r['jax']}; {r['rounds']} rounds. The shortest "
        f"{COPY} took {r['copy_s']:.2f} s, the shortest start {r['start_s']:.2f} s. "
        f"Adapters touch {r['shares']['tenth']:.1%} or {r['shares']['all']:.1%} of the "
        f"bytes. Over start may be {r['limit_mib']} MiB.\n"
    )
    table = _timing.format_table("ratio to " + COPY, COLUMNS, r["rows"], markdown=markdown)
    return f"{head}\n{table.replace(' nan', '    ')}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, default=2048, help="size of the layers")
    parser.add_argument("--shard-mib", type=int, default=256)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--folder", help="where to make the temporary directory")
    _timing.add_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    _timing.run(parse(arguments), measure, format_result)


if __name__ == "__main__":
    main()
