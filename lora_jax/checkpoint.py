"""Saves and loads adapters with their plan.

`lora_jax_adapters.safetensors` has the arrays. Its metadata has the plan, the dtypes that
the arrays had before they were saved, and a SHA-256 digest of everything. One rename
replaces the file: a process that stops leaves the old adapters or the new ones. Nothing is
pickled.

Version 1 of the format had two files: `adapters.json`, and the file of arrays that it
named. They are loaded if there is no file of version 2. The next save removes them. The
file of version 2 records the `adapters.json` that it replaced: another one was written
later, by an older lora_jax, and loading is an error.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from lora_jax._core import checks
from lora_jax._io import processes, record_files, replacement, tensor_files
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.layers.lora import Adapter, Adapters
from lora_jax.model import sharding
from lora_jax.plan import plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.target import Target, TrainedLeaf

__all__ = ["CheckpointError", "load_adapters", "save_adapters"]

FILE = "lora_jax_adapters.safetensors"
OLD_RECORD = "adapters.json"
"""The file of version 1 that names the file of arrays."""

Shardings: TypeAlias = (
    Mapping[str, Mapping[str, Sharding]]
    | Callable[[AdapterPlan], Mapping[str, Mapping[str, Sharding]]]
)

_PEFT = "adapter_config.json"
_KIND = record_files.Kind("lora_jax adapters", version=2, writer="save_adapters", oldest=2)
_OLD_KIND = _KIND._replace(version=1, oldest=1)
_OLD_TENSORS = re.compile(r"adapters-[0-9a-f]{16}\.safetensors")
_OLD_FIELDS = ("format", "version", "plan", "tensors", "sha256", "digest")


class _Saved(NamedTuple):
    """The contents of a checkpoint of either version."""

    path: pathlib.Path
    """The file of arrays, for messages."""
    where: pathlib.Path
    """The file that has the plan, for messages."""
    plan: Any
    dtypes: Any
    """The dtypes before the save, of arrays that the file has in another dtype."""
    arrays: dict[str, np.ndarray]


def save_adapters(
    directory: str | os.PathLike[str],
    adapters: Adapters,
    plan: AdapterPlan,
    *,
    dtype: DTypeLike | None = None,
) -> None:
    """Saves adapters and their plan to a directory, completely or not at all.

    A save replaces adapters that are already in the directory, in one step. Other files are
    left alone. Only one process may save to a directory at a time.

    If arrays lie on devices of several processes, all processes must call this. The arrays
    are gathered to all devices, one after the other, and process 0 writes the file. All
    processes return when it is complete, and all raise an error if it was not written. Only
    process 0 has to reach the directory.

    Args:
        directory: is created, with its parents, if it does not exist.
        adapters: the adapters of the plan, of any floating-point dtypes; each is kept bit
            for bit. Sharded arrays are gathered.
        plan: what `plan_adapters` returned.
        dtype: of the arrays in the file: 16 bits give smaller files, and round the arrays.
            `load_adapters` returns the dtypes that the arrays had before. None keeps every
            bit.

    Raises:
        KeyError: if the paths or entries of the adapters are not the plan's.
        ModuleNotFoundError: if the package safetensors is not installed.
        OSError: if the directory cannot be created or written to, or is a file.
        TypeError: if an array has no values (a tracer or a `jax.ShapeDtypeStruct`), or its
            dtype is not floating point; or if the `init` of the plan's config is a
            function.
        TimeoutError: if arrays lie on devices of several processes, and not all of the
            processes call this.
        ValueError: if a shape is not the plan's, `dtype` does not hold a value, or an array
            lies on devices of some processes, but neither of one nor of all.

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
    processes.write_once(
        "save_adapters", adapters, lambda held: _write(folder, held, plan, dtype)
    )


def load_adapters(
    directory: str | os.PathLike[str],
    *,
    strict: bool = True,
    dtype: DTypeLike | Literal["file"] | None = None,
    shardings: Shardings | None = None,
) -> tuple[dict[str, Adapter], AdapterPlan]:
    """Loads adapters and their plan from a directory.

    Args:
        directory: what `save_adapters` saved to.
        strict: whether arrays that do not fit the plan are an error. If False, adapters
            with a missing array or a wrong shape or dtype are left out, also from the plan,
            and unknown arrays are ignored; one warning lists them. Other programs may write
            such files: see the guide to checkpoints.
        dtype: of the adapters. None: the dtypes before the save. Adapters that were 16-bit
            are 16-bit again; to continue training, load them in float32. `"file"`: the
            dtypes of the file, which differ if it was saved with `dtype`.
        shardings: where the arrays are created, by path and entry, as `adapter_shardings`
            returns it; or a function of the plan that returns it, since the plan is in the
            file: `functools.partial(adapter_shardings, params)`. Each device gets its part
            of an array and no more. The number of processes may differ from the one that
            saved; each process reads the file. None: on the default device of each process.

    Returns:
        The adapters, as JAX arrays with the bits that were saved, and their plan.

    Raises:
        CheckpointError: if a file was changed, a newer version of lora_jax wrote it, an
            older version wrote its two files later, the arrays do not fit the plan, no
            adapter is left with `strict=False`, an array is float64 and JAX is not set to
            64 bits, or `dtype` does not hold a value.
        KeyError: if the shardings lack a path or an entry of the plan, or have others.
        OSError: if there are no such files, or they cannot be read.
        ModuleNotFoundError: if the package safetensors is not installed.
        TypeError: if `directory` is not a path, `strict` is not a bool, or a sharding is
            something else.
        ValueError: if a sharding does not divide the shape of its array.

    Example:
        See `save_adapters`.
    """
    checks.check_flags(strict=strict)
    folder = _folder(directory)
    if not is_checkpoint(folder) and (folder / _PEFT).is_file():
        raise CheckpointError(
            f"{folder} has an adapter that PEFT wrote: read it with lora_jax.peft.load."
        )
    as_stored = isinstance(dtype, str) and dtype == "file"
    given = None if dtype is None or as_stored else checks.check_factor_dtype(dtype)
    saved = _read(folder)
    path = saved.path
    plan = tensor_files.checked(
        saved.where, lambda: AdapterPlan.from_json(json.dumps(saved.plan))
    )
    dtypes = tensor_files.checked(path, lambda: _checked_dtypes(saved.dtypes))
    misfits = _misfits(saved.arrays, plan)
    if misfits and strict:
        raise CheckpointError(
            f"{path} does not have the arrays of the plan in {saved.where.name}: "
            f"{_listed(misfits, 10)}. To load the adapters that fit, use strict=False."
        )
    if misfits:
        plan = _fitting(plan, saved, misfits)
        warnings.warn(
            f"left out of {path}: {_listed(misfits, len(misfits))}.", stacklevel=2
        )

    places = shardings(plan) if callable(shardings) else shardings
    if places is not None:
        sharding.check_shardings(places, plan)

    def read(name: str, each: str, entry: str) -> jax.Array:
        to = given if as_stored else given or dtypes.get(name)
        array = tensor_files.checked(
            path, lambda: tensor_files.cast(repr(name), saved.arrays[name], to)
        )
        place = None if places is None else places[each][entry]
        return tensor_files.to_jax(path, name, array, place)

    adapters = {
        each: {entry: read(name, each, entry) for name, entry in _names(each, leaf).items()}
        for each, leaf in plan.entries.items()
    }
    tensor_files.checked(path, lambda: plan_checks.check_adapters(adapters, plan))
    return adapters, plan


def is_checkpoint(directory: pathlib.Path) -> bool:
    """Whether a directory has adapters that `save_adapters` wrote."""
    return any((directory / name).is_file() for name in (FILE, OLD_RECORD))


def _folder(directory: Any) -> pathlib.Path:
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(
            f"directory must be a path, got {type(directory).__name__}: the order is "
            "save_adapters(directory, adapters, plan)."
        )
    folder = pathlib.Path(directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"{folder} is a file: give a directory, which has {FILE} in it."
        )
    return folder


def _names(path: str, leaf: Target | TrainedLeaf) -> dict[str, str]:
    """The entries of an adapter, by their names in the file."""
    return {f"{path}:{entry}": entry for entry in leaf.adapter_shapes}


def _write(folder: pathlib.Path, adapters: Adapters, plan: AdapterPlan, dtype: Any) -> None:
    """Writes the file of version 2, and removes older and temporary files."""
    record = {"plan": json.loads(plan.to_json()), "dtypes": {}, "replaced": None}
    arrays = {
        name: tensor_files.to_numpy(name, adapters[path][entry])
        for path, leaf in plan.entries.items()
        for name, entry in _names(path, leaf).items()
    }
    if dtype is not None:
        record["dtypes"] = {
            name: array.dtype.name for name, array in arrays.items() if array.dtype != dtype
        }
        arrays = {
            name: tensor_files.cast(name, array, dtype) for name, array in arrays.items()
        }

    folder.mkdir(parents=True, exist_ok=True)
    replaced = _old_digest(folder)
    record_files.write(folder / FILE, _KIND, {**record, "replaced": replaced}, arrays)
    if replaced is not None:
        (folder / OLD_RECORD).unlink(missing_ok=True)
        # An older lora_jax may save the same adapters again.
        record_files.write(folder / FILE, _KIND, record, arrays)
    for file in folder.iterdir():
        if _OLD_TENSORS.fullmatch(file.name):
            file.unlink(missing_ok=True)
    names = f"{_OLD_TENSORS.pattern}|{re.escape(OLD_RECORD)}|{re.escape(FILE)}"
    for file in replacement.temporary_paths(folder, names):
        file.unlink(missing_ok=True)


def _checked_dtypes(dtypes: Any) -> dict[str, np.dtype]:
    return {name: checks.check_factor_dtype(dtype) for name, dtype in dtypes.items()}


def _read(folder: pathlib.Path) -> _Saved:
    """Reads the file of version 2, or the two files of version 1.

    If another process saves at the same time, it removes the two files. Then this looks for
    all files again.
    """
    seen = None
    while not (folder / FILE).is_file() and (folder / OLD_RECORD).is_file():
        record = None
        try:
            record = _read_old_record(folder / OLD_RECORD)
            return _read_old_arrays(folder, record)
        except FileNotFoundError:
            if record is not None and record == seen:
                raise CheckpointError(
                    f"{folder / OLD_RECORD} names {record['tensors']}, which is not beside "
                    "it: both files are needed."
                ) from None
            seen = record
    file = record_files.RecordFile(folder / FILE, _KIND)
    arrays, record = file.read(), file.record
    _check_fields(file.path, record, ("plan", "dtypes", "replaced"))
    found = _old_digest(folder)
    if found is not None and found != record["replaced"]:
        raise CheckpointError(
            f"{folder} has adapters of two versions: an older lora_jax saved {OLD_RECORD} "
            f"beside {FILE}, and after it. Remove {FILE} to load the later adapters, or "
            f"{OLD_RECORD} to load the others."
        )
    return _Saved(file.path, file.path, record["plan"], record["dtypes"], arrays)


def _old_digest(folder: pathlib.Path) -> str | None:
    """The SHA-256 of the `adapters.json` in a folder.

    None if there is no such file, or another program wrote it.
    """
    try:
        data = (folder / OLD_RECORD).read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        return None
    return hashlib.sha256(data).hexdigest() if _KIND.format.encode() in data else None


def _read_old_record(path: pathlib.Path) -> dict[str, Any]:
    """Reads a record of version 1, and checks its digest."""
    record = tensor_files.read_json(path)
    record_files.check_kind(path, _OLD_KIND, record.get("format"), record.get("version"))
    rest = {name: value for name, value in record.items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(rest, separators=(",", ":")).encode()).hexdigest()
    if record.get("digest") != digest:
        raise CheckpointError(
            f"{path} is not as it was written, its digest differs: was it edited, or "
            "damaged? Save the adapters again, or copy them again."
        )
    _check_fields(path, record, _OLD_FIELDS)
    if not _OLD_TENSORS.fullmatch(str(record["tensors"])):
        raise CheckpointError(
            f"{path}: expected the tensors in a file {_OLD_TENSORS.pattern!r} beside it, "
            f"got {record['tensors']!r}."
        )
    return record


def _read_old_arrays(folder: pathlib.Path, record: Mapping[str, Any]) -> _Saved:
    path = folder / record["tensors"]
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != record["sha256"]:
        raise CheckpointError(
            f"{path} is not as it was written: its SHA-256 is {found}, and {OLD_RECORD} "
            f"has {record['sha256']}. Was it edited, or damaged? Save the adapters again, "
            "or copy them again."
        )
    file = tensor_files.TensorFile(path)
    dtypes = tensor_files.parse_json(path, file.metadata.get("dtypes", "{}").encode())
    arrays = {name: file.read(name) for name in file}
    return _Saved(path, folder / OLD_RECORD, record["plan"], dtypes, arrays)


def _check_fields(path: pathlib.Path, record: Any, fields: tuple[str, ...]) -> None:
    if set(record) != set(fields):
        raise CheckpointError(
            f"{path}: expected the fields {', '.join(fields)}, got {', '.join(record)}."
        )


def _misfits(arrays: Mapping[str, np.ndarray], plan: AdapterPlan) -> dict[str, str]:
    """Describes what is wrong with the arrays of a file, by their names."""
    wrong = {}
    expected: dict[str, tuple[int, ...]] = {}
    for path, leaf in plan.entries.items():
        shapes = leaf.adapter_shapes
        expected |= {n: shapes[entry] for n, entry in _names(path, leaf).items()}
    for name, shape in expected.items():
        if name not in arrays:
            wrong[name] = "is missing"
        elif arrays[name].shape != shape:
            wrong[name] = f"has the shape {arrays[name].shape} instead of {shape}"
        elif not checks.is_floating(arrays[name].dtype):
            wrong[name] = f"is {arrays[name].dtype}, not floating point"
    unexpected = dict.fromkeys(arrays.keys() - expected.keys(), "is of no adapter")
    return wrong | dict(sorted(unexpected.items()))


def _fitting(plan: AdapterPlan, saved: _Saved, misfits: Mapping[str, str]) -> AdapterPlan:
    """The plan without the adapters that do not fit."""
    skipped = dict(plan.skipped)
    for path, leaf in plan.entries.items():
        bad = [name for name in _names(path, leaf) if name in misfits]
        if bad:
            skipped[path] = f"{bad[0]!r} in {saved.path.name} {misfits[bad[0]]}"
    targets, trained = (
        {path: leaf for path, leaf in own.items() if path not in skipped}
        for own in (plan.targets, plan.trained)
    )
    if not targets and not trained:
        raise CheckpointError(
            f"no adapter in {saved.path} fits the plan in {saved.where.name}: "
            f"{_listed(misfits, 10)}."
        )
    return dataclasses.replace(plan, targets=targets, trained=trained, skipped=skipped)


def _listed(misfits: Mapping[str, str], most: int) -> str:
    lines = [f"{name!r} {what}" for name, what in misfits.items()]
    more = f" and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more
