"""Memory and time of `lora-jax merge` on a sharded model; a copy is the baseline.

The model is made up in a temporary directory: layers of seven matrices, all of them
adapted, and an embedding, in bfloat16. Each merge is a process of its own, as a user
starts it; a copy is `shutil.copyfile` of each file with an fsync, which merging does too.

    python benchmarks/bench_merge.py --mib 2048 --shard-mib 256

Columns: median over rounds of the ratio of elapsed time to that of the copy in the same
round; the same without what merging a model of no size takes (starting Python and JAX, and
compiling); MiB of the model per second; the peak of resident memory in MiB; and that minus
the peak for the model of no size, which the size of shards and tensors must not move:
`LIMIT_MIB` is the most it may be.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import _timing
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._io import tensor_streams

MIB = 2**20
LIMIT_MIB = 256
COPY, MERGE, CAST, TINY = CONTESTANTS = ("copy", "merge", "merge, float32", "merge, tiny")
COLUMNS = ("wall", "net", "MiB/s", "peak MiB", "over tiny")
_VOCABULARY = 32000
_TINY_WIDTH = 64

# The peak is read in the process itself: to the usage of a child that its parent is told
# of, Linux adds what the parent had when it started the child.
_PROGRAM = """
import pathlib, re, resource, sys
from lora_jax.cli import main
code = main(sys.argv[2:])
status = pathlib.Path("/proc/self/status")
if status.exists():
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1])
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
pathlib.Path(sys.argv[1]).write_text(str(peak))
sys.exit(code)
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


def write_adapter(
    folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], rank: int
) -> None:
    """Writes a PEFT adapter for all matrices but the embedding."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    tensors, targets = {}, set()
    for name, (n_out, n_in) in shapes.items():
        if "layers" not in name:
            continue
        module = name.removesuffix(".weight")
        targets.add(module.rpartition(".")[2])
        for factor, shape in (("A", (rank, n_in)), ("B", (n_out, rank))):
            values = rng.normal(0, 0.02, shape).astype("float32")
            tensors[f"base_model.model.{module}.lora_{factor}.weight"] = values
    config = {"peft_type": "LORA", "r": rank, "target_modules": sorted(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    entries = {n: jax.ShapeDtypeStruct(t.shape, t.dtype) for n, t in tensors.items()}
    path = folder / "adapter_model.safetensors"
    with tensor_streams.open_writer(path, entries, {}) as writer:
        for name, values in tensors.items():
            writer.write(name, values)


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the files of a directory to the disk."""
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as copied:
            os.fsync(copied.fileno())


class Merges:
    """Runs merges, and keeps their peaks of memory in MiB by contestant."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self.peaks: dict[str, list[float]] = {}

    def run(self, name: str, source: str, *options: str) -> None:
        """Merges `<source>` and `<source>-adapter` of the folder into a new directory."""
        out, report = self._folder / "out", self._folder / "peak"
        paths = (self._folder / source, self._folder / f"{source}-adapter", out)
        arguments = [str(report), "merge", *map(str, paths), "--quiet", *options]
        command = [sys.executable, "-c", _PROGRAM, *arguments]
        root = str(pathlib.Path(__file__).parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        self.peaks.setdefault(name, []).append(int(report.read_text()) / 1024)
        shutil.rmtree(out)

    def copy(self) -> None:
        """Copies the model, and removes the copy."""
        copy(self._folder / "base", self._folder / "out")
        shutil.rmtree(self._folder / "out")


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
        for name, own in (("base", shapes), ("tiny", tiny)):
            write_model(folder / name, own, options.shard_mib * MIB)
            write_adapter(folder / f"{name}-adapter", own, options.rank)
        merges = Merges(folder)
        calls = {
            COPY: merges.copy,
            MERGE: lambda: merges.run(MERGE, "base"),
            CAST: lambda: merges.run(CAST, "base", "--dtype=float32"),
            TINY: lambda: merges.run(TINY, "tiny"),
        }
        times = _timing.interleave(calls, options.rounds, warmup=options.warmup)
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
        "copy_s": statistics.median(times[COPY].wall),
        "limit_mib": LIMIT_MIB,
        "rows": make_rows(times, merges.peaks, total),
    }


def make_rows(
    times: Mapping[str, _timing.Times], peaks: Mapping[str, list[float]], total: float
) -> dict[str, dict[str, float]]:
    """The columns of each contestant. A copy has no peak; a tiny model no speed.

    Args:
        times: of the contestants.
        peaks: of those that merge.
        total: the size of the model in MiB.
    """
    ratios = _timing.ratios(times, COPY)
    rows = {}
    for name, own in times.items():
        started = [0.0] * len(own.wall) if name == COPY else times[TINY].wall
        net = [
            (wall - start) / base
            for wall, start, base in zip(own.wall, started, times[COPY].wall, strict=True)
        ]
        peak = max(peaks.get(name, [math.nan]))
        rows[name] = {
            "wall": ratios[name].wall,
            "net": statistics.median(net),
            "MiB/s": math.nan if name == TINY else total / statistics.median(own.wall),
            "peak MiB": peak,
            "over tiny": peak - max(peaks[TINY]),
        }
    return rows


def format_result(result: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The result as text: what was run, and a table."""
    r = result
    head = (
        f"{r['mib']:.0f} MiB in {r['shards']} shards, the largest {r['largest_shard']:.0f} "
        f"MiB, the largest tensor {r['largest_tensor']:.0f} MiB, {r['layers']} layers of "
        f"width {r['width']}, rank {r['rank']}, bfloat16; {r['device']} ({r['platform']}), "
        f"{r['threads']} threads, jax {r['jax']}; {r['rounds']} rounds; {COPY}: "
        f"{r['copy_s']:.2f} s. Over tiny may be {r['limit_mib']} MiB.\n"
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
