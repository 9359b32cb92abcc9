"""`lora-jax merge`: writes the files of a model with adapters merged in."""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core import checks
from lora_jax._io import replacement, tensor_files, tensor_streams
from lora_jax.checkpoint import OLD_RECORD
from lora_jax.cli import (
    _adapters,
    _base,
    _blocks,
    _fold,
    _loading,
    _output,
    _tasks,
    _terminal,
    _ties,
)
from lora_jax.cli._base import Base
from lora_jax.cli._blocks import Update
from lora_jax.cli._fold import Loss
from lora_jax.cli._loading import Loaded
from lora_jax.cli._tasks import Task

# The number of bytes that one step copies.
_PIECE = 8 * 2**20
# Files with these endings have weights too, which would not be merged: not copied.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ot"),
    *(".onnx", ".onnx_data", ".npz", ".index.json"),
)
# Beside a merged model, these adapters would be loaded once more.
_ADAPTERS = ("adapter_config.json", OLD_RECORD)
_DTYPE_FIELDS = ("torch_dtype", "dtype")
_WORST = 5


class Others(NamedTuple):
    """The files of a model's directory without its weights, by their paths in it."""

    copied: list[pathlib.Path]
    left_out: list[pathlib.Path]


@dataclasses.dataclass(frozen=True)
class Job:
    """The inputs of a merge, and the arrays of its result."""

    base: Base
    loaded: Loaded
    others: Others
    dtype: str | None
    """The value of `--dtype`."""

    @functools.cached_property
    def entries(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shape and dtype of each array of the result."""
        entries = {}
        for name, span in self.base.spans.items():
            wide = checks.is_floating(span.dtype) and jnp.dtype(span.dtype).itemsize >= 2
            dtype = self.dtype if self.dtype and wide else span.dtype
            entries[name] = tensor_files.abstract(span.shape, dtype)
        return entries

    @functools.cached_property
    def updates(self) -> dict[str, list[Update]]:
        """The adapters of each array by its name."""
        return _ties.find_updates(self.base, self.loaded)

    def changes(self, name: str) -> bool:
        """Whether an array is not copied byte for byte."""
        if name in self.updates or name in self.loaded.replaced:
            return True
        return self.entries[name].dtype != self.base.spans[name].dtype


def merge(options: argparse.Namespace) -> int:
    """Runs the command."""
    source, out = pathlib.Path(options.base), pathlib.Path(options.out)
    directory = pathlib.Path(options.adapter)
    base = _base.open_base(source)
    others = _find_others(base, directory)
    keep = _check_out(base, others, directory, out, options.overwrite)
    contents = _adapters.read_contents(directory, options.allow_field, dtype=None)
    base = _ties.untie(base, contents)
    matching = _loading.read_matching(options)
    loaded = _loading.load_for(contents, base, matching)
    _loading.check_weights(base, loaded.plan)
    note = _ties.check_merge(base, contents, loaded)
    job = Job(base, loaded, others, options.dtype)
    _output.check_space(out.resolve().parent, _size(job))
    if not options.quiet:
        _terminal.say(*describe(job))
    with _terminal.show_progress(_bytes(base.spans), quiet=options.quiet) as progress:
        losses = _write(job, out, keep, progress)
    more = _loading.report_omissions(contents, loaded)
    _terminal.say(*report(job, losses, out), *more, *([note] if note else []))
    return 0


def _check_out(
    base: Base,
    others: Others,
    directory: pathlib.Path,
    out: pathlib.Path,
    overwrite: bool,
) -> list[pathlib.Path]:
    def own(place: pathlib.Path) -> set[pathlib.Path]:
        """The files of the model that is in OUT, and the files to write."""
        if base.is_file:
            return {pathlib.Path()} if place.is_file() else set()
        model = _base.find_files(place)
        return {*model, *map(pathlib.Path, base.shards), *others.copied} if model else model

    if base.is_file and (out.suffix != ".safetensors" or out.is_dir()):
        raise ValueError(
            f"BASE {base.path} is one file, so OUT must be one too, with a name that ends "
            f"in .safetensors, got {out}."
        )
    inputs = {"BASE": base.path, "ADAPTER": directory}
    return _output.check_place(out, inputs, overwrite=overwrite, own=own)


def describe(job: Job) -> list[str]:
    """A table of the modules and the arrays that they are merged into."""
    loaded, modules = job.loaded, dict[str, list[str]]()
    for module, path in loaded.modules.items():
        modules.setdefault(path, []).append(module)
    rows = []
    updates = ((name, own) for name, each in job.updates.items() for own in each)
    for name, (path, target, _) in updates:
        own = modules.get(path, [path])
        more = f" and {len(own) - 1} more" if len(own) > 1 else ""
        numbers = str(target.rank), f"{target.scale:g}"
        shape = _terminal.format_shape(target.alone.shape)
        axes = loaded.axes.get(path, target.alone.axes)
        tensor = name + target.part
        rows.append((own[0] + more, tensor, shape, axes, target.method, *numbers))
    for path, array in loaded.replaced.items():
        shape = _terminal.format_shape(array.shape)
        rows.append(("", path, shape, "", "replaced", "", ""))
    header = ("module", "tensor", "shape", "axes", "method", "rank", "scale")
    return _terminal.format_table(header, rows, ("rank", "scale"))


def _write(
    job: Job, out: pathlib.Path, keep: list[pathlib.Path], progress: _terminal.Progress
) -> dict[str, Loss]:
    """Writes all files, and returns the loss of each merged array."""
    base, losses = job.base, {}
    if base.is_file:
        (file,) = base.shards.values()
        return _write_shard(job, file, out.resolve(), progress)
    with _output.new_directory(out, keep) as new:
        for name, file in base.shards.items():
            losses |= _write_shard(job, file, new / name, progress)
        if base.index is not None:
            index = _base.new_index(base, job.entries)
            replacement.write_text(new / _base.INDEX, json.dumps(index, indent=2) + "\n")
        for path in job.others.copied:
            _copy_other(job, path, new / path)
    return losses


def _write_shard(
    job: Job,
    file: tensor_files.TensorFile,
    path: pathlib.Path,
    progress: _terminal.Progress,
) -> dict[str, Loss]:
    spans = {name: span for name, span in job.base.spans.items() if span.file is file}
    if not any(map(job.changes, spans)) and spans.keys() == set(file):
        with tensor_streams.open_copy(path) as new:
            copies = (
                Task("", b - a, functools.partial(new.copy, file, a, b, a))
                for a, b in _pieces(file.size, _PIECE)
            )
            _tasks.run_tasks(copies, lambda task, _: progress(task.size))
        return {}
    # Wider dtypes first, as in safetensors, so that all arrays are aligned.
    order = sorted(spans, key=lambda name: -jnp.dtype(job.entries[name].dtype).itemsize)
    entries = {name: job.entries[name] for name in order}
    losses: dict[str, Loss] = {}

    def done(task: Task, loss: Loss | None) -> None:
        if loss is not None:
            losses[task.name] = losses.get(task.name, Loss()) + loss
        progress(task.size)

    with tensor_streams.open_writer(path, entries, file.metadata) as writer:
        tasks = (task for name in order for task in _cut(job, name, spans[name], writer))
        _tasks.run_tasks(tasks, done)
    return losses


def _cut(
    job: Job, name: str, span: tensor_streams.Span, writer: tensor_streams.TensorWriter
) -> Iterator[Task]:
    """The tasks that write the new values of an array. A merge returns its loss."""
    dtype = np.dtype(job.entries[name].dtype)
    old = job.loaded.replaced.get(name)
    whole = None if old is None else np.asarray(old)
    width, row = span.dtype.itemsize, math.prod(span.shape[1:])

    def fold(block: _blocks.Block) -> Loss:
        start, stop = block.start, block.stop
        rows = span.read_rows(start, stop) if whole is None else whole[start:stop]
        values, loss = _fold.fold_rows(name, rows, block.updates, dtype)
        writer.write(name, values, start * row)
        return loss

    def replace(values: np.ndarray) -> None:
        _fold.check_finite(name, values)
        writer.write(name, _fold.round_to(name, values, dtype))

    def cast(start: int, stop: int) -> None:
        values = span.read_flat(start, stop)
        writer.write(name, _fold.round_to(name, values, dtype), start)

    if name in job.updates:
        for block in _blocks.cut_rows(job.updates[name], _fold.BLOCK):
            size = row * (block.stop - block.start)
            run = functools.partial(fold, block)
            yield Task(name, size * width, run, alone=size > _fold.BLOCK)
    elif whole is not None:
        yield Task(name, span.nbytes, functools.partial(replace, whole), alone=True)
    elif dtype != span.dtype:
        for a, b in _pieces(span.size, _fold.BLOCK):
            yield Task(name, (b - a) * width, functools.partial(cast, a, b))
    else:
        for a, b in _pieces(span.nbytes, _PIECE):
            yield Task(name, b - a, functools.partial(writer.copy_from, name, span, a, b))


def _pieces(size: int, most: int) -> Iterator[tuple[int, int]]:
    """Where the pieces of something start and stop, which have a size at most."""
    return ((start, min(start + most, size)) for start in range(0, size, most))


def _find_others(base: Base, directory: pathlib.Path) -> Others:
    """Finds the other files of the directory, without hidden files and the adapters."""
    others = Others([], [])
    if base.is_file:
        return others
    own = {*base.shards, _base.INDEX}
    root, inner = base.path.resolve(), _output.resolve(directory)
    for path in sorted(base.path.rglob("*")):
        name = path.relative_to(base.path)
        hidden = any(part.startswith(".") for part in name.parts)
        adapters = inner != root and inner in (root / name).parents
        if hidden or adapters or str(name) in own or not path.is_file():
            continue
        weights = path.name.lower().endswith(_WEIGHTS) or path.name in _ADAPTERS
        (others.left_out if weights else others.copied).append(name)
    return others


def _copy_other(job: Job, name: pathlib.Path, path: pathlib.Path) -> None:
    """Copies a file; a `config.json` gets what changes in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source, own = job.base.path / name, name == pathlib.Path(_base.CONFIG)
    unties = own and job.base.copies
    if unties or (job.dtype and name.name == _base.CONFIG):
        fields = job.base.settings if own else tensor_files.read_json(source)
        if job.dtype:
            strings = (n for n in _DTYPE_FIELDS if isinstance(fields.get(n), str))
            fields = fields | dict.fromkeys(strings, job.dtype)
        if unties:
            fields = _ties.untied_settings(fields)
        replacement.write_text(path, json.dumps(fields, indent=2) + "\n")
    elif own and job.base.config is not None:
        replacement.write_bytes(path, job.base.config)
    else:
        tensor_streams.copy_file(source, path)


def _bytes(entries: Mapping[str, Any]) -> int:
    return sum(map(tensor_streams.count_bytes, entries.values()))


def _size(job: Job) -> int:
    """The size of the result in bytes, with headers and an index of the old sizes."""
    copied = _bytes({name: job.base.spans[name] for name in job.base.copies})
    data = _bytes(job.entries) - _bytes(job.base.spans) + copied
    files = [file.path for file in job.base.shards.values()]
    files += [job.base.path / path for path in job.others.copied]
    return data + sum(path.stat().st_size for path in files) + _PIECE


def report(job: Job, losses: Mapping[str, Loss], out: pathlib.Path) -> list[str]:
    """The lines about the result, and about what the rounding lost."""
    others = job.others
    replaced = set(job.loaded.replaced) - set(losses)
    cast = sum(map(job.changes, job.entries)) - len(losses) - len(replaced)
    copied = len(job.entries) - len(losses) - len(replaced) - cast
    lines = [
        f"{out}: {_terminal.format_size(_bytes(job.entries))} in {len(job.entries)} "
        f"tensors, {len(losses)} merged, {len(replaced)} replaced, {cast} cast, "
        f"{copied} copied."
    ]
    if others.left_out:
        names = ", ".join(map(str, others.left_out[:_WORST]))
        more = " ..." if len(others.left_out) > _WORST else ""
        lines.append(f"not copied, because it would not be merged: {names}{more}")
    if losses:
        lines += ["", *_loss_table(job, losses)]
    return lines


def _loss_table(job: Job, losses: Mapping[str, Loss]) -> list[str]:
    """A table of the tensors that lost most, and of all tensors together."""
    lost = [name for name, loss in losses.items() if loss.vanished]
    lost.sort(key=lambda name: (-losses[name].fraction, -losses[name].largest))
    rows = [_loss_row(n, losses[n], job.entries[n].dtype) for n in lost[:_WORST]]
    if len(lost) > _WORST:
        rows.append((f"and {len(lost) - _WORST} more", "", "", ""))
    rows.append(_loss_row(f"all {len(losses)} merged", sum(losses.values(), Loss()), ""))
    header = ("lost to rounding", "dtype", "updates vanished", "largest relative change")
    return _terminal.format_table(header, rows, header[2:])


def _loss_row(name: str, loss: Loss, dtype: object) -> tuple[str, ...]:
    vanished = f"{100 * loss.fraction:.3f} %"
    return name, str(dtype), vanished, _terminal.format_number(loss.largest)
