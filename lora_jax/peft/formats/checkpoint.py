"""Reads and writes the two files of a PEFT adapter.

Two files with fixed names cannot be replaced at once. Both are first written under
temporary names. Then the old config is renamed, the arrays get their name, and the config
gets its name. So a config is never beside the arrays of another save. A program that stops
in between leaves the config of the arrays under a temporary name. A reader finds it by its
digest, which is in the metadata of the arrays.
"""

import hashlib
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from jax.typing import DTypeLike

from lora_jax._core import checks
from lora_jax._io import replacement, tensor_files, tensor_streams
from lora_jax._io.tensor_files import CheckpointError, TensorFile
from lora_jax.peft.formats.config import PeftConfig
from lora_jax.peft.formats.fields import is_off, shorten
from lora_jax.peft.formats.keys import Entries, as_experts, sort_entries

_LOG = logging.getLogger("lora_jax.peft")
CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
MLX_TENSORS = "adapters.safetensors"
_PICKLE = "adapter_model.bin"
_OWN = ("lora_jax_adapters.safetensors", "adapters.json")  # of lora_jax.checkpoint
_DIGEST = "adapter_config_sha256"
# Fields of the config that do not change the meaning of the arrays. They may be edited.
_NOT_DIGESTED = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "model",  # of mlx-lm
    "peft_version",
    "revision",
    "task_type",
)
_ASIDE = f"{CONFIG}.old"
_TEMPORARY = "|".join(re.escape(name) for name in (CONFIG, _ASIDE, TENSORS))
# How often files are read again if another process replaces them meanwhile.
_TRIES = 50
_IDLE = 3  # tries in a row without a process that saves
_PAUSE = 0.002  # seconds
# None for at least float32; "file" for the dtype of each array in the file.
FileDtype: TypeAlias = DTypeLike | Literal["file"] | None


class Readable(Protocol):
    """A source of arrays by name."""

    def read(self, name: str, /) -> np.ndarray:
        """The array of a name."""
        ...


def check_dtype(dtype: FileDtype) -> FileDtype:
    """Checks the dtype of the adapters that the caller wants."""
    if dtype is None or (isinstance(dtype, str) and dtype == "file"):
        return dtype
    return checks.check_factor_dtype(dtype)


class Checkpoint(NamedTuple):
    """The config and the arrays of a PEFT adapter."""

    where: str
    """The file of the arrays, for messages."""
    config: PeftConfig
    arrays: Readable
    entries: Entries
    ignored: Mapping[str, Any] = {}
    """The fields of the config that are in use and that the caller allowed to ignore."""
    dialect: str = "peft"
    """The format of the files; as `dialect` in `lora_jax.peft.save`."""
    settings: Mapping[str, Any] = {}
    """What a file of another dialect says about itself."""

    @property
    def on_both(self) -> bool:
        """Whether the adapter of a tied embedding acts on the output head too."""
        return self.dialect == "mlx"


class InMemory(dict[str, np.ndarray]):
    """Arrays in memory, with the interface of an open file."""

    read = dict.__getitem__


def is_checkpoint(folder: pathlib.Path) -> bool:
    """Whether a directory has the config of a PEFT adapter."""
    return bool(_configs(folder))


def read_files(
    directory: str | os.PathLike[str], allowed: Collection[str]
) -> tuple[str, PeftConfig, dict[str, Any], TensorFile]:
    """The name of the file of arrays, the config, its fields, and the arrays."""
    folder = pathlib.Path(directory)
    if not is_checkpoint(folder) and any((folder / name).is_file() for name in _OWN):
        raise CheckpointError(
            f"{folder} has adapters that lora_jax.save_adapters wrote: read them with "
            "lora_jax.load_adapters."
        )
    where, fields, file = _open_files(folder)
    config = tensor_files.checked(
        where, lambda: PeftConfig.from_dict(fields, "the config", allowed)
    )
    return str(file.path), config, fields, file


def log_ignored(
    where: str | pathlib.Path, fields: Mapping[str, Any], allowed: Collection[str]
) -> dict[str, Any]:
    """The fields that are in use and that the caller allows to ignore; logs them."""
    ignored = {n: v for n, v in fields.items() if n in allowed and not is_off(n, v)}
    if ignored:
        shown = ", ".join(f"{name}={shorten(v)}" for name, v in ignored.items())
        _LOG.info("%s: ignored, as the caller allows: %s", where, shown)
    return ignored


def new_checkpoint(
    where: str, config: PeftConfig, arrays: Readable, entries: Mapping[str, Any]
) -> Checkpoint:
    """Makes a checkpoint of arrays. `entries` has an object with the shape of each."""
    own = sort_entries(where, {name: tuple(each.shape) for name, each in entries.items()})
    if not any(own):
        raise CheckpointError(f"{where} has no entries: the adapter would change nothing.")
    parameters = config.target_parameters or ()
    modules = as_experts(where, own.modules, parameters, config.rank_of)
    return Checkpoint(where, config, arrays, own._replace(modules=modules))


def _open_files(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any], TensorFile]:
    """The path and the fields of a config, and the file of arrays saved with it."""
    old, idle = None, 0
    for left in reversed(range(_TRIES)):
        try:
            configs = _read_configs(folder)
            file = _open_arrays(folder)
        except FileNotFoundError:
            idle = 0 if _is_being_saved(folder) else idle + 1
            if not left or idle == _IDLE:
                raise
            time.sleep(_PAUSE)
            continue
        for where, fields in configs.items():
            if belong_together(where, fields, file):
                return where, fields, file
        # Both are read again if another process saved between the two. If the file of
        # arrays did not change, a config with its own name is the config of these arrays.
        if folder / CONFIG in configs and old is not None and file.is_same(old):
            break
        if folder / CONFIG not in configs:
            time.sleep(_PAUSE)
        old = file
    raise of_another_config(folder / TENSORS)


def of_another_config(file: pathlib.Path) -> CheckpointError:
    """The error for arrays that do not belong to the config beside them."""
    return CheckpointError(
        f"{file} has the digest of another config than {file.with_name(CONFIG)}: is "
        "one of them from another adapter, or was the config edited? Copy both files "
        "again. If the config is right, write the arrays without the digest: "
        "safetensors.numpy.save_file(safetensors.numpy.load_file(path), path)."
    )


def _configs(folder: pathlib.Path) -> list[pathlib.Path]:
    """The config, or the temporary files that a process left when it stopped."""
    path = folder / CONFIG
    if path.is_file():
        return [path]
    if not (folder / TENSORS).is_file():
        return []
    return replacement.temporary_paths(folder, f"{re.escape(CONFIG)}|{re.escape(_ASIDE)}")


def _read_configs(folder: pathlib.Path) -> dict[pathlib.Path, dict[str, Any]]:
    """The fields of each such config."""
    found = {}
    for path in _configs(folder):
        try:
            found[path] = tensor_files.read_json(path)
        except CheckpointError:
            if path.name == CONFIG:
                raise
    if not found:
        tensor_files.check_is_file(folder / CONFIG)
        raise FileNotFoundError(f"there was no file {folder / CONFIG}.")
    return found


def _open_arrays(folder: pathlib.Path) -> TensorFile:
    path = folder / TENSORS
    if not path.is_file() and (folder / _PICKLE).is_file():
        raise CheckpointError(
            f"{folder / _PICKLE} is a pickle, which runs code when it is read, and is not "
            "read here: load it with PEFT and save it with safe_serialization=True."
        )
    return TensorFile(path)


def _is_being_saved(folder: pathlib.Path) -> bool:
    return folder.is_dir() and bool(replacement.temporary_paths(folder, _TEMPORARY))


def belong_together(
    where: pathlib.Path, fields: Mapping[str, Any], file: TensorFile
) -> bool:
    """Whether a config at a path is that of a file of arrays."""
    digest = file.metadata.get(_DIGEST)
    if digest is None:  # another program wrote the arrays, beside the renamed config
        return where.name == CONFIG or where.name.startswith(f".{_ASIDE}")
    return digest == _digest(fields)


def _digest(fields: Mapping[str, Any]) -> str:
    """The SHA-256 of the fields of a config that change the meaning of the arrays."""
    own = {name: fields[name] for name in sorted(fields) if name not in _NOT_DIGESTED}
    return hashlib.sha256(json.dumps(own, separators=(",", ":")).encode()).hexdigest()


def write_checkpoint(
    folder: pathlib.Path, text: str, tensors: Mapping[str, np.ndarray], name: str = TENSORS
) -> None:
    """Writes the two files of an adapter. They replace old files when they are complete.

    `text` is the config, and `name` is of the file of arrays.

    Raises:
        FileExistsError: if the config of an adapter in the other format would be lost.
    """
    other = MLX_TENSORS if name == TENSORS else TENSORS
    if (folder / other).exists() and (folder / CONFIG).exists():
        raise FileExistsError(
            f"{folder} has an adapter in another format, {other}, whose {CONFIG} would be "
            "replaced: give another directory."
        )
    metadata = {"format": "pt", _DIGEST: _digest(json.loads(text))}
    new = {each: replacement.temporary_path(folder / each) for each in (CONFIG, name)}
    try:
        new[CONFIG].write_text(text, encoding="utf-8")
        tensor_streams.write_arrays(new[name], tensors, metadata)
        for path in new.values():
            replacement.synchronize(path)
    except BaseException:
        for path in new.values():
            path.unlink(missing_ok=True)
        raise
    _put_in_place(folder / name, new[CONFIG], new[name])
    for path in replacement.temporary_paths(folder, f"{_TEMPORARY}|{re.escape(name)}"):
        path.unlink(missing_ok=True)
    replacement.synchronize_directory(folder)


def _put_in_place(file: pathlib.Path, config: pathlib.Path, tensors: pathlib.Path) -> None:
    """Gives both files their names, or leaves the old files. `file` is of the arrays."""
    place = file.with_name(CONFIG)
    aside = replacement.temporary_path(file.with_name(_ASIDE))
    try:
        if place.exists() and place.read_bytes() != config.read_bytes():
            os.replace(place, aside)
        os.replace(tensors, file)
        os.replace(config, place)
    except BaseException:
        # A config that cannot be renamed stays: it is complete, and its digest finds it.
        if tensors.exists():
            if aside.exists():
                os.replace(aside, place)
            tensors.unlink()
            config.unlink()
        else:
            if config.exists():
                os.replace(config, place)
            aside.unlink(missing_ok=True)
        raise


def check_dtypes(where: str, arrays: Mapping[str, Any]) -> None:
    """Raises unless all arrays are floating point and have at least 16 bits."""
    for name, array in arrays.items():
        dtype = getattr(array, "dtype", None)
        if dtype is None or not checks.is_floating(dtype) or dtype.itemsize < 2:
            raise CheckpointError(
                f"{where}: the entry {name!r} is {dtype or type(array).__name__}, and must "
                "be an array, floating point of at least 16 bits."
            )
