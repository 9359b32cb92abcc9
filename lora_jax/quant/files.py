"""Saves and loads quantized weights in one safetensors file.

The file has the arrays of each weight under `<path>:<name>`, and plain arrays under their
path. Its metadata have a record that describes each entry, and a SHA-256 of everything.
Nothing is pickled, and files are not trusted.
"""

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax._core import checks
from lora_jax._io import processes, record_files, tensor_files
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.quant import tensors

__all__ = ["load_quantized", "save_quantized"]

_KIND = record_files.Kind("lora_jax quantized", version=1, writer="save_quantized")


def save_quantized(file: str | os.PathLike[str], tree: Any) -> None:
    """Saves quantized weights and arrays to a file, atomically.

    As in `save_adapters`, all processes must call this if arrays lie on devices of several
    processes. Each array is gathered to all devices, one after the other, and the host of
    process 0 holds all of them.

    Args:
        file: its name should end in `.safetensors`. An existing file is replaced when the
            new one is complete.
        tree: any pytree of arrays and quantized tensors of registered formats, for example
            a dict with paths as keys.

    Raises:
        ModuleNotFoundError: if the package safetensors is not installed.
        OSError: if the file cannot be written.
        TypeError: if a leaf is neither an array nor a quantized tensor, has a format that
            is not registered, or has no values, as inside `jax.jit`.
        ValueError: if two arrays would have the same name.

    Example:
        >>> import tempfile, pathlib, jax.numpy as jnp, lora_jax.quant
        >>> params = {"query": lora_jax.quant.quantize_int8(jnp.ones((64, 32)))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "base.safetensors")
        ...     lora_jax.quant.save_quantized(file, params)
        ...     lora_jax.quant.load_quantized(file)
        {'query': Int8Tensor(shape=(64, 32), dtype=float32, block_size=None)}
    """
    path = _path(file)
    processes.write_once("save_quantized", tree, functools.partial(_write, path))


def load_quantized(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads quantized weights and arrays that `save_quantized` saved.

    Args:
        file: the path of the file.

    Returns:
        A dict from paths to quantized tensors and arrays, with the same bits and classes.

    Raises:
        CheckpointError: if the file was changed or is of another kind, a newer version
            wrote it, it has a format that is not registered, or an array has 64 bits and
            JAX is not set to 64 bits.
        FileNotFoundError: if the file does not exist.
        ModuleNotFoundError: if the package safetensors is not installed.
        TypeError: if `file` is not a path.

    Example:
        See `save_quantized`.
    """
    path = _path(file)
    source = record_files.RecordFile(path, _KIND)
    record = source.record
    if not all(map(_is_entry, record.values())):
        raise CheckpointError(
            f"{path}: its record should have a format, settings and the names of arrays "
            "for each path, and does not."
        )
    expected = {part for name, entry in record.items() for part in _names(name, entry)}
    if expected != set(source.arrays):
        raise CheckpointError(
            f"{path} does not have the arrays of its record: missing are "
            f"{_listed(expected - set(source.arrays))}, "
            f"unexpected {_listed(set(source.arrays) - expected)}."
        )
    arrays = source.read(functools.partial(tensor_files.to_jax, path))
    return {name: _rebuilt(path, name, entry, arrays) for name, entry in record.items()}


def _path(file: Any) -> pathlib.Path:
    if not isinstance(file, str | os.PathLike):
        raise TypeError(
            f"file must be a path, got {type(file).__name__}: the order is "
            "save_quantized(file, tree)."
        )
    return pathlib.Path(file)


def _write(path: pathlib.Path, tree: Any) -> None:
    arrays: dict[str, np.ndarray] = {}
    record: dict[str, Any] = {}
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=tensors.is_quantized)[0]
    for key, value in leaves:
        name = jax.tree_util.keystr(key, simple=True, separator="/")
        entry, parts = _parts(name, value)
        clash = [part for part in parts if part in arrays]
        if clash or name in record:
            raise ValueError(
                f"two arrays would have the name {(clash or [name])[0]!r}: rename a key."
            )
        record[name] = entry
        arrays |= {
            part: tensor_files.to_numpy(part, array) for part, array in parts.items()
        }
    record_files.write(path, _KIND, record, arrays)


def _parts(name: str, value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entry of a leaf in the record, and its arrays by their names in the file."""
    if not tensors.is_quantized(value):
        if not checks.is_array(value):
            raise TypeError(
                f"at {name!r}: expected an array or a quantized tensor, got "
                f"{type(value).__name__}."
            )
        return {"format": None}, {name: value}
    format_name = tensors.name_of(type(value))
    if format_name is None:
        raise TypeError(
            f"at {name!r}: {type(value).__name__} has no name in files: give it one with "
            "register_format."
        )
    arrays = value.to_arrays()
    settings = {"settings": value.settings(), "arrays": sorted(arrays)}
    named = {f"{name}:{part}": array for part, array in arrays.items()}
    return {"format": format_name, **settings}, named


def _names(name: str, entry: Mapping[str, Any]) -> list[str]:
    """The names in the file of the arrays of an entry."""
    if entry["format"] is None:
        return [name]
    return [f"{name}:{part}" for part in entry["arrays"]]


def _is_entry(entry: Any) -> bool:
    if entry == {"format": None}:
        return True
    return (
        isinstance(entry, dict)
        and set(entry) == {"format", "settings", "arrays"}
        and isinstance(entry["format"], str)
        and isinstance(entry["settings"], dict)
        and isinstance(entry["arrays"], list)
        and all(isinstance(part, str) for part in entry["arrays"])
    )


def _rebuilt(
    path: pathlib.Path, name: str, entry: Mapping[str, Any], arrays: Mapping[str, jax.Array]
) -> Any:
    if entry["format"] is None:
        return arrays[name]
    cls = tensors.format_of(entry["format"])
    if cls is None:
        raise CheckpointError(
            f"{path}: at {name!r} is a tensor of the format {entry['format']!r:.60}, and "
            f"known are {', '.join(tensors.format_names())}: import what defines it, which "
            "calls register_format."
        )
    own = {part: arrays[f"{name}:{part}"] for part in entry["arrays"]}

    def build() -> tensors.QuantizedTensor:
        with checks.at_path(name):
            return cls.from_arrays(own, entry["settings"])

    return tensor_files.checked(path, build)


def _listed(names: set[str]) -> str:
    some = sorted(names)[:5]
    return ", ".join(map(repr, some)) + (", ..." if len(names) > 5 else "") or "none"
