"""The model that adapters belong to: one safetensors file, or several with an index."""

import contextlib
import dataclasses
import functools
import pathlib
from typing import Any

import jax

from lora_jax._core import tree_paths
from lora_jax._io import tensor_files, tensor_streams

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_WEIGHT_MAP = "weight_map"
_LISTED = 5


@dataclasses.dataclass(frozen=True)
class Base:
    """A model's files.

    Args:
        path: of the directory, or of the one file.
        shards: the files by their names.
        index: what the index says; None if there is none.
    """

    path: pathlib.Path
    shards: dict[str, tensor_files.TensorFile]
    index: dict[str, Any] | None = None

    @property
    def is_file(self) -> bool:
        """Whether the model is a file, and no directory."""
        return self.path.is_file()

    @functools.cached_property
    def entries(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shape and dtype of each array of all files."""
        return {name: file[name] for file in self.shards.values() for name in file}

    @property
    def settings(self) -> dict[str, Any]:
        """What `config.json` beside the weights says; nothing if there is none."""
        folder = self.path.parent if self.is_file else self.path
        file = folder / "config.json"
        return tensor_files.read_json(file) if file.is_file() else {}

    def spans(self) -> dict[str, tensor_streams.Span]:
        """Where each array lies."""
        return {
            name: span
            for file in self.shards.values()
            for name, span in tensor_streams.find_spans(file).items()
        }


def open_base(path: pathlib.Path) -> Base:
    """Opens a model's files; of the arrays only names, shapes and dtypes are read.

    Args:
        path: of a directory with `model.safetensors`, or with parts of it and
            `model.safetensors.index.json`; or of one safetensors file.

    Raises:
        CheckpointError: if there is no such file, or the parts are not those of the index.
        FileNotFoundError: if there is nothing at the path, or a part is missing.
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
        return _open_parts(path)
    if not whole:
        names = sorted(entry.name for entry in path.iterdir())
        raise tensor_files.CheckpointError(
            f"{path} has neither {WHOLE} nor {INDEX}, but {_listed(names)}: save the model "
            "as safetensors first, or give the file itself."
        )
    return Base(path, {WHOLE: tensor_files.TensorFile(path / WHOLE)})


def find_files(path: pathlib.Path) -> set[pathlib.Path]:
    """The names of the files in a directory that have a model's weights, or say so.

    Whatever else is in an index, or it is damaged: only files in the same directory.
    """
    found = {pathlib.Path(name) for name in (WHOLE, INDEX) if (path / name).is_file()}
    if pathlib.Path(INDEX) in found:
        with contextlib.suppress(tensor_files.CheckpointError, OSError):
            weight_map = tensor_files.read_json(path / INDEX).get(_WEIGHT_MAP)
            parts = weight_map.values() if isinstance(weight_map, dict) else ()
            found |= {pathlib.Path(part) for part in parts if isinstance(part, str)}
    return found


def _open_parts(path: pathlib.Path) -> Base:
    where = path / INDEX
    index = tensor_files.read_json(where)
    weight_map = index.get(_WEIGHT_MAP)
    if not isinstance(weight_map, dict) or not weight_map:
        raise tensor_files.CheckpointError(
            f"{where} has no {_WEIGHT_MAP!r} with names in it."
        )
    for part in weight_map.values():
        beside = isinstance(part, str) and pathlib.PurePath(part).name == part
        if not beside or not part.endswith(".safetensors"):
            raise tensor_files.CheckpointError(
                f"{where}: {part!r:.80} is no name of a file in the same directory that "
                "ends in .safetensors."
            )
    parts = sorted(set(weight_map.values()))
    base = Base(path, {part: tensor_files.TensorFile(path / part) for part in parts}, index)
    _check_parts(where, weight_map, base)
    return base


def _check_parts(where: pathlib.Path, weight_map: dict[str, str], base: Base) -> None:
    """Raises unless each array is in the part that the index has for it, and no other."""
    actual = {(name, part) for part, file in base.shards.items() for name in file}
    missing = [pair for pair in weight_map.items() if pair not in actual]
    if missing:
        name, part = missing[0]
        raise tensor_files.CheckpointError(
            f"{where} says that {name!r} is in {part}: it is not."
        )
    extra = sorted(name for name, part in actual if weight_map.get(name) != part)
    if extra:
        raise tensor_files.CheckpointError(
            f"{where} does not have what the files it names have: {_listed(extra)}."
        )


def new_index(base: Base, entries: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The index of a model with the same parts, and arrays of other sizes.

    Args:
        base: the old model, which has an index.
        entries: the new shape and dtype of each array.
    """
    index = dict(base.index or {})
    metadata = index.get("metadata")
    total = sum(map(tensor_streams.count_bytes, entries.values()))
    index["metadata"] = {**(metadata if isinstance(metadata, dict) else {})}
    index["metadata"]["total_size"] = total
    return index


def check_has(base: Base, names: list[str]) -> None:
    """Raises unless the model has all of some arrays.

    Raises:
        CheckpointError: if one is in none of the files.
    """
    entries = base.entries
    missing = [name for name in names if name not in entries]
    if missing:
        hint = tree_paths.nearest_hint(missing[0], entries)
        raise tensor_files.CheckpointError(
            f"the adapter is for {_listed(missing)}, which no file of {base.path} has"
            f"{hint}: is it of another model, or does it need --names?"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(map(repr, names[:_LISTED])) or "nothing") + more
