"""Adapters and their plan in a directory.

The directory has two files. `adapters-<16 hexadecimal digits>.safetensors` has the arrays;
the digits are the first of its SHA-256. `adapters.json` is the record: it has the plan, and
the name and the SHA-256 of the other file.

Two files cannot be replaced at once, so they are written in this order: the arrays under
their new name, then the record, whose replacement is the moment from which the new adapters
count, and then files of arrays that it does not name are deleted. A process that stops in
between leaves the old adapters or the new ones. Nothing is pickled.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jax.typing import DTypeLike

from lora_jax._core import checks
from lora_jax._io import tensor_files
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.layers.lora import Adapter
from lora_jax.plan import plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan, Target

__all__ = ["CheckpointError", "load_adapters", "save_adapters"]

_RECORD = "adapters.json"
_PEFT = "adapter_config.json"
_TENSORS = re.compile(r"adapters-[0-9a-f]{16}\.safetensors")
_FORMAT = "lora_jax adapters"
_VERSION = 1
_DTYPES = "dtypes"  # in the metadata of the arrays, where they were cast for the file
_FIELDS = ("format", "version", "plan", "tensors", "sha256", "digest")


def save_adapters(
    directory: str | os.PathLike[str],
    adapters: Mapping[str, Adapter],
    plan: AdapterPlan,
    *,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes adapters and their plan to a directory, which has them whole or not at all.

    Adapters that are there already are replaced, and stay in force until the new ones are
    complete. Other files are left alone. One process may save to a directory at a time.

    Args:
        directory: is made if there is none, with those above it.
        adapters: the adapters of the plan, of any floating-point dtypes; each is kept bit
            for bit. Sharded arrays are written whole.
        plan: what `plan_adapters` returned.
        dtype: of the arrays in the file, for small files: 16 bits round them. The file says
            which dtypes they had, and `load_adapters` gives these back. None to keep every
            bit.

    Raises:
        KeyError: if the paths or entries of the adapters are not the plan's.
        ModuleNotFoundError: if the package safetensors is not installed.
        OSError: if the directory cannot be made or written to, or is a file.
        TypeError: if an array has no values, because it is one of `jax.jit` or a
            `jax.ShapeDtypeStruct`, or no floating-point dtype; or the `init` of the plan's
            config is a function.
        ValueError: if a shape is not the plan's, an array is spread over several
            processes, or `dtype` does not hold a value.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, lora_jax
        >>> params = {"query": jnp.ones((64, 32))}
        >>> plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=4), params)
        >>> adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     lora_jax.save_adapters(directory, adapters, plan)
        ...     loaded, loaded_plan = lora_jax.load_adapters(directory)
        >>> loaded_plan == plan, jax.tree.map(jnp.array_equal, loaded, adapters)
        (True, {'query': {'A': Array(True, dtype=bool), 'B': Array(True, dtype=bool)}})
    """
    folder = _folder(directory)
    plan_checks.check_adapters(adapters, plan)
    dtype = None if dtype is None else checks.check_factor_dtype(dtype)
    fields = json.loads(plan.to_json())
    arrays, metadata = _arrays(adapters, plan), {"format": _FORMAT}
    if dtype is not None:
        dtypes = {
            n: array.dtype.name for n, array in arrays.items() if array.dtype != dtype
        }
        metadata |= {_DTYPES: json.dumps(dtypes)} if dtypes else {}
        arrays = {
            name: tensor_files.cast(name, array, dtype) for name, array in arrays.items()
        }
    data = tensor_files.tensor_bytes(arrays, metadata)
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"adapters-{sha256[:16]}.safetensors"
    record = {
        "format": _FORMAT,
        "version": _VERSION,
        "plan": fields,
        "tensors": name,
        "sha256": sha256,
    }
    record["digest"] = _digest(record)

    folder.mkdir(parents=True, exist_ok=True)
    tensor_files.write_bytes(folder / name, data)
    tensor_files.write_text(folder / _RECORD, json.dumps(record, indent=2))
    for file in folder.iterdir():
        if _TENSORS.fullmatch(file.name) and file.name != name:
            file.unlink(missing_ok=True)
    names = f"{_TENSORS.pattern}|{re.escape(_RECORD)}"
    for file in tensor_files.temporary_paths(folder, names):
        file.unlink(missing_ok=True)


def load_adapters(
    directory: str | os.PathLike[str],
    *,
    strict: bool = True,
    dtype: DTypeLike | Literal["file"] | None = None,
) -> tuple[dict[str, Adapter], AdapterPlan]:
    """Reads what `save_adapters` wrote.

    Args:
        directory: that was saved to.
        strict: whether the arrays have to be those of the plan. If not, adapters that lack
            an array, or have one of a wrong shape or dtype, are left out, of the plan too,
            and arrays that no adapter has are; one warning names them all. Another program
            may have written such files: see the guide to checkpoints.
        dtype: of the adapters; None for the dtypes that they had when they were saved.
            Adapters that were in 16 bits then are so again: train on in float32. `"file"`
            for the dtypes that the file has, which are others if it was saved with `dtype`.

    Returns:
        The adapters, as arrays of JAX with the bits that were saved, and their plan.

    Raises:
        CheckpointError: if the files are not as they were written, a newer version wrote
            them, the arrays are not those of the plan, with `strict=False` if none of the
            adapters is left, an array is float64 and JAX is not set to 64 bits, or
            `dtype` does not hold a value.
        OSError: if there are no such files, or they cannot be read.
        ModuleNotFoundError: if the package safetensors is not installed.
        TypeError: if `directory` is no path, or `strict` no bool.

    Example:
        See `save_adapters`.
    """
    checks.check_flags(strict=strict)
    folder = _folder(directory)
    if not (folder / _RECORD).is_file() and (folder / _PEFT).is_file():
        raise CheckpointError(
            f"{folder} has an adapter that PEFT wrote: read it with lora_jax.peft.load."
        )
    as_stored = isinstance(dtype, str) and dtype == "file"
    given = None if dtype is None or as_stored else checks.check_factor_dtype(dtype)
    record, file = _open_files(folder)
    plan = tensor_files.checked(
        folder / _RECORD, lambda: AdapterPlan.from_json(json.dumps(record["plan"]))
    )
    dtypes = {} if as_stored else _saved_dtypes(file)
    misfits = _misfits(file, plan)
    if misfits and strict:
        raise CheckpointError(
            f"{file.path} does not have the arrays of the plan in {_RECORD}: "
            f"{_listed(misfits, 10)}. To load those adapters that fit, use strict=False."
        )
    if misfits:
        plan = _fitting(plan, file.path, misfits)
        warnings.warn(
            f"left out of {file.path}: {_listed(misfits, len(misfits))}.", stacklevel=2
        )
    adapters = {
        path: _adapter(file, path, target, dtypes, given)
        for path, target in plan.targets.items()
    }
    tensor_files.checked(file.path, lambda: plan_checks.check_adapters(adapters, plan))
    return adapters, plan


def _folder(directory: Any) -> pathlib.Path:
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(
            f"directory must be a path, got {type(directory).__name__}: the order is "
            "save_adapters(directory, adapters, plan)."
        )
    folder = pathlib.Path(directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"{folder} is a file: give a directory, which has {_RECORD} in it."
        )
    return folder


def _name(path: str, entry: str) -> str:
    """The name of an array in the file."""
    return f"{path}:{entry}"


def _shapes(path: str, target: Target) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays of an adapter by their names in the file."""
    return {_name(path, entry): shape for entry, shape in target.adapter_shapes.items()}


def _arrays(adapters: Mapping[str, Adapter], plan: AdapterPlan) -> dict[str, np.ndarray]:
    arrays = {}
    for path in plan.targets:
        for entry, value in adapters[path].items():
            name = _name(path, entry)
            arrays[name] = tensor_files.to_numpy(name, value)
    return arrays


def _adapter(
    file: tensor_files.TensorFile,
    path: str,
    target: Target,
    dtypes: Mapping[str, Any],
    dtype: Any,
) -> Adapter:
    adapter = {}
    for entry in target.adapter_shapes:
        name = _name(path, entry)
        try:
            array = tensor_files.cast(
                repr(name), file.read(name), dtype or dtypes.get(name)
            )
        except ValueError as error:
            raise CheckpointError(f"{file.path}: {error}") from None
        adapter[entry] = tensor_files.to_jax(file.path, name, array)
    return adapter


def _saved_dtypes(file: tensor_files.TensorFile) -> dict[str, np.dtype]:
    """The dtypes that the arrays had when they were saved, where the file has others."""

    def read() -> dict[str, np.dtype]:
        names = tensor_files.parse_json(
            file.path, file.metadata.get(_DTYPES, "{}").encode()
        )
        return {name: checks.check_factor_dtype(dtype) for name, dtype in names.items()}

    return tensor_files.checked(file.path, read)


def _digest(record: Mapping[str, Any]) -> str:
    """The SHA-256 of a record without its digest; the order of its fields counts."""
    rest = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, separators=(",", ":")).encode()).hexdigest()


def _read_record(path: pathlib.Path) -> dict[str, Any]:
    """Reads a record that is as it was written."""
    record = tensor_files.read_json(path)
    if record.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} was not written by save_adapters: its format should be {_FORMAT!r}, "
            f"and is {record.get('format')!r:.60}."
        )
    version = record.get("version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path} has the version {version!r:.60}, which never was.")
    if version > _VERSION:
        raise CheckpointError(
            f"{path} has version {version!r:.60} of the format, and this lora_jax reads "
            f"none above {_VERSION}: upgrade it, pip install --upgrade lora_jax."
        )
    try:
        intact = record.get("digest") == _digest(record)
    except RecursionError:
        intact = False
    if not intact:
        raise CheckpointError(
            f"{path} is not as it was written, its digest is another one: was it edited, "
            "or damaged? Save the adapters anew, or copy them again."
        )
    return record


def _check_fields(record: Mapping[str, Any]) -> None:
    if set(record) != set(_FIELDS):
        raise ValueError(
            f"expected the fields {', '.join(_FIELDS)}, got {', '.join(record)}."
        )
    if not _TENSORS.fullmatch(str(record["tensors"])):
        raise ValueError(
            f"expected the tensors in a file {_TENSORS.pattern!r} beside it, got "
            f"{record['tensors']!r}."
        )


def _open_files(folder: pathlib.Path) -> tuple[dict[str, Any], tensor_files.TensorFile]:
    """A record, and the file of arrays that it names.

    Another process that saves meanwhile replaces the record and deletes the old arrays:
    then both are read again.
    """
    old = None
    while True:
        record = _read_record(folder / _RECORD)
        tensor_files.checked(folder / _RECORD, lambda record=record: _check_fields(record))
        try:
            return record, _open_tensors(folder / record["tensors"], record["sha256"])
        except FileNotFoundError:
            if record == old:
                raise CheckpointError(
                    f"{folder / _RECORD} names {record['tensors']}, which is not beside "
                    "it: both files are needed."
                ) from None
            old = record


def _open_tensors(path: pathlib.Path, sha256: str) -> tensor_files.TensorFile:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise CheckpointError(
            f"{path} is not as it was written: its SHA-256 is {found}, and {_RECORD} has "
            f"{sha256}. Was it edited, or damaged? Save the adapters anew, or copy them "
            "again."
        )
    return tensor_files.TensorFile(path)


def _misfits(file: tensor_files.TensorFile, plan: AdapterPlan) -> dict[str, str]:
    """What is wrong with the arrays of a file, by their names."""
    wrong = {}
    expected: dict[str, tuple[int, ...]] = {}
    for path, target in plan.targets.items():
        expected |= _shapes(path, target)
    for name, shape in expected.items():
        if name not in file:
            wrong[name] = "is missing"
        elif file[name].shape != shape:
            wrong[name] = f"has the shape {file[name].shape} instead of {shape}"
        elif not checks.is_floating(file[name].dtype):
            wrong[name] = f"is {file[name].dtype}, not floating point"
    unexpected = dict.fromkeys(file.keys() - expected.keys(), "is of no adapter")
    return wrong | dict(sorted(unexpected.items()))


def _fitting(
    plan: AdapterPlan, path_of_file: pathlib.Path, misfits: Mapping[str, str]
) -> AdapterPlan:
    """The plan without the adapters that do not fit."""
    targets, skipped = {}, dict(plan.skipped)
    for path, target in plan.targets.items():
        bad = [name for name in _shapes(path, target) if name in misfits]
        if bad:
            skipped[path] = f"{bad[0]!r} in {path_of_file.name} {misfits[bad[0]]}"
        else:
            targets[path] = target
    if not targets:
        raise CheckpointError(
            f"no adapter in {path_of_file} fits the plan in {_RECORD}: "
            f"{_listed(misfits, 10)}."
        )
    return dataclasses.replace(plan, targets=targets, skipped=skipped)


def _listed(misfits: Mapping[str, str], most: int) -> str:
    lines = [f"{name!r} {what}" for name, what in misfits.items()]
    more = f" and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more
