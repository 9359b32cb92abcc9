"""`lora-jax merge`: a model's files with adapters folded in."""

import argparse
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core import checks
from lora_jax._io import tensor_files, tensor_streams
from lora_jax.checkpoint import OLD_RECORD
from lora_jax.cli import _adapters, _base, _fold, _loading, _output, _terminal
from lora_jax.cli._base import Base
from lora_jax.cli._fold import Loss
from lora_jax.cli._loading import Loaded

# How many bytes are copied at once.
_PIECE = 8 * 2**20
# Of other files, what has weights too: copied, they would be the ones without the adapters.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ot"),
    *(".onnx", ".onnx_data", ".npz", ".index.json"),
)
# Beside a merged model these would be loaded once more.
_ADAPTERS = ("adapter_config.json", OLD_RECORD)
_CONFIG = "config.json"
_DTYPE_FIELDS = ("torch_dtype", "dtype")
_WORST = 5


class Job(NamedTuple):
    """What is to be done."""

    base: Base
    loaded: Loaded
    entries: dict[str, jax.ShapeDtypeStruct]
    """The shape and dtype of each array of the result."""

    def changes(self, name: str) -> bool:
        """Whether an array is not copied byte by byte."""
        if name in self.loaded.plan.targets or name in self.loaded.replaced:
            return True
        return self.entries[name].dtype != self.base.entries[name].dtype


class Others(NamedTuple):
    """The files of a model's directory that are not its weights, by their paths in it."""

    copied: list[pathlib.Path]
    left_out: list[pathlib.Path]


def merge(options: argparse.Namespace) -> int:
    """Runs the command."""
    source, out = pathlib.Path(options.base), pathlib.Path(options.out)
    directory = pathlib.Path(options.adapter)
    base = _base.open_base(source)
    others = _find_others(base, directory)
    keep = _check_out(base, others, directory, out, options.overwrite)
    contents = _adapters.read_contents(directory, options.allow_field)
    note = _loading.check_ties(base, contents.changed, contents.embeddings)
    loaded = _loading.load_for(contents, directory, base, _loading.read_way(options))
    _loading.check_fit(base, loaded)
    if contents.format == "lora_jax":  # whose own names may be others
        note = _loading.check_ties(base, loaded.plan.targets)
    job = Job(base, loaded, new_entries(base, options.dtype))
    _output.check_space(out.resolve().parent, _size(job, others))
    if not options.quiet:
        _terminal.say(*describe(loaded))
    with _terminal.show_progress(_bytes(base.entries), quiet=options.quiet) as progress:
        losses = _write(job, others, out, keep, options.dtype, progress)
    more = _loading.report_omissions(contents, loaded)
    _terminal.say(*report(job, losses, others, out), *more)
    if note:
        _terminal.say(f"note: {note}")
    return 0


def _check_out(
    base: Base,
    others: Others,
    directory: pathlib.Path,
    out: pathlib.Path,
    overwrite: bool,
) -> list[pathlib.Path]:
    def own(place: pathlib.Path) -> set[pathlib.Path]:
        """The files of the model that is there, and those that will be written."""
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


def new_entries(base: Base, dtype: str | None) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of the result.

    Args:
        base: the model.
        dtype: of the floating-point arrays of at least 16 bits; None for those they have.
    """
    return {
        name: tensor_files.abstract(entry.shape, dtype)
        if dtype and _is_wide(entry.dtype)
        else entry
        for name, entry in base.entries.items()
    }


def _is_wide(dtype: np.dtype) -> bool:
    """Whether an array is floating point, and no mere code for numbers."""
    return checks.is_floating(dtype) and jnp.dtype(dtype).itemsize >= 2


def describe(loaded: Loaded) -> list[str]:
    """The table of what is merged into which array."""
    modules: dict[str, list[str]] = {}
    for module, path in loaded.modules.items():
        modules.setdefault(path, []).append(module)
    rows = []
    for path, target in loaded.plan.targets.items():
        own = modules.get(path, [path])
        more = f" and {len(own) - 1} more" if len(own) > 1 else ""
        numbers = str(target.rank), f"{target.scale:g}"
        shape = _terminal.format_shape(target.shape)
        axes = loaded.axes.get(path, target.axes)
        rows.append((own[0] + more, path, shape, axes, target.method, *numbers))
    for path, array in loaded.replaced.items():
        shape = _terminal.format_shape(array.shape)
        rows.append(("", path, shape, "", "replaced", "", ""))
    header = ("module", "tensor", "shape", "axes", "method", "rank", "scale")
    return _terminal.format_table(header, rows, ("rank", "scale"))


def _write(
    job: Job,
    others: Others,
    out: pathlib.Path,
    keep: list[pathlib.Path],
    dtype: str | None,
    progress: _terminal.Progress,
) -> dict[str, Loss]:
    """Writes everything, and gives what each merged array lost."""
    if job.base.is_file:
        (file,) = job.base.shards.values()
        return _write_shard(job, file, out.resolve(), progress)
    losses = {}
    with _output.new_directory(out, keep) as new:
        for name, file in job.base.shards.items():
            losses |= _write_shard(job, file, new / name, progress)
        if job.base.index is not None:
            index = _base.new_index(job.base, job.entries)
            tensor_files.write_text(new / _base.INDEX, json.dumps(index, indent=2) + "\n")
        for path in others.copied:
            _copy_other(job.base.path / path, new / path, dtype)
    return losses


def _write_shard(
    job: Job,
    file: tensor_files.TensorFile,
    path: pathlib.Path,
    progress: _terminal.Progress,
) -> dict[str, Loss]:
    if not any(map(job.changes, file)):
        for count in tensor_streams.copy_file(file.path, path, _PIECE):
            progress.update(count)
        return {}
    spans = tensor_streams.find_spans(file)
    # Wider entries first, as safetensors has them, so that all lie on multiples of theirs.
    order = sorted(spans, key=lambda name: -jnp.dtype(job.entries[name].dtype).itemsize)
    entries = {name: job.entries[name] for name in order}
    losses: dict[str, Loss] = {}
    with tensor_streams.open_writer(path, entries, file.metadata) as writer:
        for name in order:
            for values, loss in _pieces(job, name, spans[name]):
                if loss is not None:
                    losses[name] = losses.get(name, Loss()) + loss
                writer.write(name, values)
                progress.update(values.size * spans[name].dtype.itemsize)
    return losses


def _pieces(
    job: Job, name: str, span: tensor_streams.Span
) -> Iterator[tuple[np.ndarray, Loss | None]]:
    """The new values of an array, piece by piece, and what a merge lost."""
    dtype = np.dtype(job.entries[name].dtype)
    if name in job.loaded.plan.targets:
        old = job.loaded.replaced.get(name)
        source = span if old is None else _fold.Array(np.asarray(old))
        adapter = job.loaded.adapters[name]
        yield from _fold.fold_weight(name, source, adapter, job.loaded.plan, dtype)
        return
    size = span.nbytes // span.dtype.itemsize
    if name in job.loaded.replaced:
        values = np.asarray(job.loaded.replaced[name])
        _fold.check_finite(name, values)
        yield _fold.round_to(name, values, dtype), None
        return
    step = _PIECE // span.dtype.itemsize
    for start in range(0, size, step):
        values = span.read_flat(start, min(start + step, size))
        yield values if dtype == span.dtype else _fold.round_to(name, values, dtype), None


def _find_others(base: Base, directory: pathlib.Path) -> Others:
    """What else is in the directory, but for hidden files and the adapters themselves."""
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


def _copy_other(source: pathlib.Path, path: pathlib.Path, dtype: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if dtype and path.name == _CONFIG:
        fields = tensor_files.read_json(source)
        fields |= {
            name: dtype for name in _DTYPE_FIELDS if isinstance(fields.get(name), str)
        }
        tensor_files.write_text(path, json.dumps(fields, indent=2) + "\n")
        return
    for _ in tensor_streams.copy_file(source, path, _PIECE):
        pass


def _bytes(entries: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    return sum(map(tensor_streams.count_bytes, entries.values()))


def _size(job: Job, others: Others) -> int:
    """How many bytes the result has, headers and index about as they were."""
    data = _bytes(job.entries) - _bytes(job.base.entries)
    files = [file.path for file in job.base.shards.values()]
    files += [job.base.path / path for path in others.copied]
    return data + sum(path.stat().st_size for path in files) + _PIECE


def report(
    job: Job, losses: Mapping[str, Loss], others: Others, out: pathlib.Path
) -> list[str]:
    """What was done, and what the dtypes lost."""
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
    """The tensors that lost most, and all together."""
    lost = [name for name, loss in losses.items() if loss.vanished]
    lost.sort(key=lambda name: (-losses[name].fraction, -losses[name].largest))
    rows = [
        _loss_row(name, losses[name], job.entries[name].dtype) for name in lost[:_WORST]
    ]
    if len(lost) > _WORST:
        rows.append((f"and {len(lost) - _WORST} more", "", "", ""))
    rows.append(_loss_row(f"all {len(losses)} merged", sum(losses.values(), Loss()), ""))
    header = ("lost to rounding", "dtype", "updates vanished", "largest relative change")
    return _terminal.format_table(header, rows, header[2:])


def _loss_row(name: str, loss: Loss, dtype: object) -> tuple[str, ...]:
    vanished = f"{100 * loss.fraction:.3f} %"
    return name, str(dtype), vanished, _terminal.format_number(loss.largest)
