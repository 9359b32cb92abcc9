"""The files of a model: one safetensors file, or several with an index."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from lora_jax._core import tree_paths
from lora_jax._io import tensor_files, tensor_streams
from lora_jax._io.tensor_streams import Span

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_WEIGHT_MAP = "weight_map"


@dataclasses.dataclass(frozen=True)
class Base:
    """The open files of a model.

    Args:
        path: of the directory, or of the single file.
        shards: the files by name.
        index: the content of the index; None without an index.
        copies: from the names of further arrays to those of the arrays that they are.
    """

    path: pathlib.Path
    shards: dict[str, tensor_files.TensorFile]
    index: dict[str, Any] | None = None
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def with_copies(self, copies: Mapping[str, str]) -> "Base":
        """The model with further arrays, which are copies of its own."""
        new = dataclasses.replace(self, copies=copies)
        new.__dict__["config"] = self.config  # which is read once
        return new

    @property
    def is_file(self) -> bool:
        """Whether the model is a single file, not a directory."""
        return self.path.is_file()

    @functools.cached_property
    def spans(self) -> dict[str, Span]:
        """The arrays of all files by name, and the copies."""
        files = map(tensor_streams.find_spans, self.shards.values())
        found = {name: span for spans in files for name, span in spans.items()}
        return found | {name: found[source] for name, source in self.copies.items()}

    @property
    def _config(self) -> pathlib.Path:
        return (self.path.parent if self.is_file else self.path) / CONFIG

    @functools.cached_property
    def config(self) -> bytes | None:
        """The content of `config.json` beside the weights; None if there is none."""
        return tensor_files.read_settings(self._config) if self._config.is_file() else None

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The fields of `config.json` beside the weights; empty if there is none."""
        config = self.config
        return {} if config is None else tensor_files.parse_json(self._config, config)


def open_base(path: pathlib.Path) -> Base:
    """Opens the files of a model. Reads names, shapes and dtypes, but no values.

    The path is a directory with `model.safetensors`, or with shards and
    `model.safetensors.index.json`; or it is one safetensors file.
    """
    if path.is_file():
        return Base(path, {path.name: tensor_files.TensorFile(path)})
    if not path.is_dir():
        raise FileNotFoundError(f"there is no directory or file {path}.")
    whole, index = ((path / name).is_file() for name in (WHOLE, INDEX))
    if whole and index:
        raise tensor_files.CheckpointError(
            f"{path} has both {WHOLE} and {INDEX}: remove the one that is out of date, or "
            "give the file itself."
        )
    if index:
        return _open_shards(path)
    if not whole:
        names = tree_paths.listed(sorted(entry.name for entry in path.iterdir()))
        raise tensor_files.CheckpointError(
            f"{path} has neither {WHOLE} nor {INDEX}, but {names or 'nothing'}: save the "
            "model as safetensors first, or give the file itself."
        )
    return Base(path, {WHOLE: tensor_files.TensorFile(path / WHOLE)})


def find_files(path: pathlib.Path) -> set[pathlib.Path]:
    """The names of the weight files and the index of the model in a directory.

    The index may be damaged.
    """
    found = {pathlib.Path(name) for name in (WHOLE, INDEX) if (path / name).is_file()}
    if pathlib.Path(INDEX) in found:
        with contextlib.suppress(tensor_files.CheckpointError, OSError):
            weight_map = tensor_files.read_json(path / INDEX).get(_WEIGHT_MAP)
            shards = weight_map.values() if isinstance(weight_map, dict) else ()
            found |= {pathlib.Path(name) for name in shards if isinstance(name, str)}
    return found


def _open_shards(path: pathlib.Path) -> Base:
    where = path / INDEX
    index = tensor_files.read_json(where)
    weight_map = index.get(_WEIGHT_MAP)
    if not isinstance(weight_map, dict) or not weight_map:
        raise tensor_files.CheckpointError(f"{where} has no {_WEIGHT_MAP!r} with names.")
    for name in weight_map.values():
        beside = isinstance(name, str) and pathlib.PurePath(name).name == name
        if not beside or not name.endswith(".safetensors"):
            raise tensor_files.CheckpointError(
                f"{where}: {name!r:.80} is not the name of a file in the same directory "
                "that ends in .safetensors."
            )
    names = sorted(set(weight_map.values()))
    base = Base(path, {name: tensor_files.TensorFile(path / name) for name in names}, index)
    _check_shards(where, weight_map, base)
    return base


def _check_shards(where: pathlib.Path, weight_map: dict[str, str], base: Base) -> None:
    """Raises unless each array is in the shard that the index names, and in no other."""
    actual = {(name, shard) for shard, file in base.shards.items() for name in file}
    missing = [pair for pair in weight_map.items() if pair not in actual]
    if missing:
        name, shard = missing[0]
        raise tensor_files.CheckpointError(
            f"{where} says that {name!r} is in {shard}, but it is not."
        )
    extra = sorted(name for name, shard in actual if weight_map.get(name) != shard)
    if extra:
        raise tensor_files.CheckpointError(
            f"{where} lacks arrays of the files that it names: {tree_paths.listed(extra)}."
        )


def new_index(base: Base, entries: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The index of a model with the same shards, the copies, and arrays of other sizes."""
    index = base.index or {}
    old, shards = index.get("metadata"), index[_WEIGHT_MAP]
    total = sum(map(tensor_streams.count_bytes, entries.values()))
    metadata = {**(old if isinstance(old, dict) else {}), "total_size": total}
    shards = {**shards, **{name: shards[own] for name, own in base.copies.items()}}
    return {**index, _WEIGHT_MAP: shards, "metadata": metadata}
