"""Files of arrays (safetensors) and of settings (JSON).

Files are not trusted: reading gives the content of a file, or raises a `CheckpointError`
that names the file. Nothing is unpickled.
"""

import codecs
import io
import json
import math
import os
import pathlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# Settings take kilobytes. A much larger file is something else, and is not read.
_LARGEST_JSON = 64 * 2**20
_DEEPEST = 100

# safetensors' names of dtypes. 8-bit floats are left out: safetensors writes them from
# NumPy but does not read them back, and no adapter has them.
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}


class CheckpointError(ValueError):
    """A file is damaged, incomplete or of another kind.

    The message names the file and the entry.
    """


class TensorFile(Mapping[str, jax.ShapeDtypeStruct]):
    """The shapes and dtypes of a safetensors file's arrays by name; `read` gives values.

    The file is opened once and its header is read once. All values come from this file,
    also if another file takes its name in the meantime.

    Args:
        path: of the file.

    Raises:
        CheckpointError: if it is not a complete safetensors file.
        FileNotFoundError: if it does not exist.
        ModuleNotFoundError: if the package safetensors is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        check_is_file(self.path)
        self._file = self._open()
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()  # of the position in the file
        length = int.from_bytes(self._file.read(8), "little")
        header: dict[str, Any] = json.loads(self._file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self._entries = {name: self._entry(name, header[name]) for name in sorted(header)}
        self.starts = {
            name: 8 + length + header[name]["data_offsets"][0] for name in self._entries
        }
        """The offset of each array's values, in bytes from the beginning of the file."""
        self.size = os.fstat(self._file.fileno()).st_size
        """The size of the file in bytes."""

    def __getitem__(self, name: str) -> jax.ShapeDtypeStruct:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, name: str) -> np.ndarray:
        """Reads one array, and no other into memory.

        Raises:
            CheckpointError: if the file has become shorter since it was opened.
        """
        entry = self._entries[name]
        size = math.prod(entry.shape)
        return self.read_flat(name, 0, size).reshape(entry.shape)

    def read_flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """Reads the entries of an array from `start` to `stop`, in the order of the file.

        Raises:
            CheckpointError: as `read`.
        """
        array = np.empty(stop - start, self._entries[name].dtype)
        place = self.starts[name] + start * array.itemsize
        self.read_into(array.view(np.uint8).data, place)
        return array

    def read_into(self, buffer: memoryview, place: int) -> None:
        """Fills a buffer with the bytes of the file from a place on.

        Raises:
            CheckpointError: as `read`.
        """
        with self._lock:
            self._file.seek(place)
            while buffer and (count := self._file.readinto(buffer)):
                buffer = buffer[count:]
        if buffer:
            raise CheckpointError(
                f"{self.path} ends too early: did another program change it meanwhile?"
            )

    def is_same(self, other: "TensorFile") -> bool:
        """Whether another `TensorFile` has opened the same file."""
        files = (self._file, other._file)
        return os.path.samestat(*(os.fstat(file.fileno()) for file in files))

    def _entry(self, name: str, fields: dict[str, Any]) -> jax.ShapeDtypeStruct:
        dtype = fields["dtype"]
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{self.path}: the entry {name!r} has the dtype {dtype}, and only "
                f"{', '.join(DTYPES)} are read."
            )
        return abstract(tuple(fields["shape"]), DTYPES[dtype])

    def _open(self) -> io.FileIO:
        """Opens the file, after the package safetensors has checked its header."""
        library = load_safetensors()
        while True:
            file = self.path.open("rb", buffering=0)
            try:
                library.safe_open(str(self.path), framework="numpy")
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return file
            except library.SafetensorError as error:
                file.close()
                raise CheckpointError(
                    f"{self.path} cannot be read as safetensors ({error}): is it another "
                    "kind of file, or was its download or its writing cut off?"
                ) from None
            except BaseException:
                file.close()
                raise
            file.close()  # it was replaced before it was checked


def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A shape and a dtype, which may have 64 bits even if JAX is not set to 64 bits."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def load_safetensors() -> ModuleType:
    """Imports the package safetensors, which is an optional dependency."""
    try:
        import safetensors
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "adapters are read and written with the package safetensors, which is not "
            'installed: pip install "lora_jax[checkpoints]".'
        ) from None
    return safetensors


def check_is_file(path: pathlib.Path) -> None:
    """Raises unless the file exists; the message lists the other files there."""
    if path.is_file():
        return
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        raise IsADirectoryError(f"{path} is a directory: give a file, {_some(names)}.")
    folder = path.parent
    if folder.is_file():
        raise NotADirectoryError(
            f"{folder} is a file: give the directory that has {path.name} in it."
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no directory {folder} to read {path.name} in.")
    names = sorted(entry.name for entry in folder.iterdir())
    raise FileNotFoundError(f"there is no file {path}; {folder} has {_some(names)}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "none"


def widen(array: np.ndarray) -> np.ndarray:
    """A floating-point array in at least float32."""
    narrow = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
    return array.astype(np.float32) if narrow else array


def cast(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """Casts a floating-point array to another dtype, if its values are in range.

    Args:
        name: of the array, for error messages.
        array: to cast; integers are returned unchanged.
        dtype: floating point; None returns the array unchanged.

    Raises:
        ValueError: if a finite value would become infinite, or all values would become 0.
    """
    if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        new = array.astype(dtype, copy=False)
    lost = np.isfinite(array) & ~np.isfinite(new)
    if lost.any():
        largest = np.abs(array[lost].astype(np.float64)).max()
        raise ValueError(
            f"{name} has values up to {largest:.3g}, and {jnp.dtype(dtype).name} holds "
            f"none above {float(jnp.finfo(dtype).max):.3g}: choose a wider dtype."
        )
    if array.any() and not new.any():
        largest = np.abs(array.astype(np.float64)).max()
        raise ValueError(
            f"{name} has values up to {largest:.3g}, which are all 0 in "
            f"{jnp.dtype(dtype).name}: choose a wider dtype."
        )
    return new


def to_jax(
    path: str | pathlib.Path, name: str, array: np.ndarray, sharding: Any = None
) -> jax.Array:
    """Converts an array from a file to a JAX array of the same dtype.

    With a sharding, each device gets its part of the array and no more.

    Raises:
        CheckpointError: if JAX would convert it to a narrower dtype.
    """
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise CheckpointError(
            f"{path}: the entry {name!r} is {array.dtype}, which JAX would narrow to "
            f"{jax.dtypes.canonicalize_dtype(array.dtype)}: allow 64 bits with "
            "jax.config.update('jax_enable_x64', True), or write the file in 32."
        )
    if sharding is None:
        return jnp.asarray(array)  # where JAX puts new arrays: on the mesh, if any
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def to_numpy(name: str, value: Any) -> np.ndarray:
    """The values of an array to write, contiguous.

    Raises:
        TypeError: if it has no values, or a dtype that safetensors does not support.
    """
    if isinstance(value, Tracer | jax.ShapeDtypeStruct):
        raise TypeError(
            f"{name} has no values to write, it is a {type(value).__name__}: save outside "
            "of jax.jit, and arrays."
        )
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{name} is a jax.random key: save its jax.random.key_data.")
    array = np.ascontiguousarray(value).reshape(np.shape(value))
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.name not in DTYPES.values():
        raise TypeError(
            f"{name} is {array.dtype}, and only {', '.join(DTYPES.values())} are written: "
            "cast it, for example to float32."
        )
    return array


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a file that contains one JSON object.

    Raises:
        CheckpointError: if it contains anything else.
        FileNotFoundError: if it does not exist.
    """
    return parse_json(path, read_settings(path))


def read_settings(path: pathlib.Path) -> bytes:
    """Reads the bytes of a file of settings.

    Raises:
        CheckpointError: if the file is too large for settings.
        FileNotFoundError: if it does not exist.
    """
    check_is_file(path)
    size = path.stat().st_size
    if size > _LARGEST_JSON:
        raise CheckpointError(
            f"{path} has {size:,} bytes, and settings have at most {_LARGEST_JSON:,}: "
            "is it another kind of file?"
        )
    return path.read_bytes()


def parse_json(path: pathlib.Path, data: bytes) -> dict[str, Any]:
    """Parses one JSON object in UTF-8, with unique keys and finite numbers.

    Args:
        path: of the file, for error messages.
        data: the content of the file.

    Raises:
        CheckpointError: if the data are anything else.
    """
    try:
        value = json.loads(
            data.removeprefix(codecs.BOM_UTF8).decode(),
            parse_constant=_refuse,
            parse_float=_finite,
            object_pairs_hook=_distinct,
        )
        _check_depth(value)
        if b"\\u" in data:  # half of a surrogate pair is not valid text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, no JSON object.")
    return value


def _check_depth(value: Any) -> None:
    """Raises ValueError if a value is nested too deeply to be written again."""
    level = [value]
    for _ in range(_DEEPEST):
        nested = [each for each in level if isinstance(each, dict | list)]
        level = [
            inner
            for each in nested
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    if level:
        raise ValueError(f"it is nested more than {_DEEPEST} deep")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not np.isfinite(value):
        raise ValueError(f"{text:.40} is larger than any number here")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.60} comes twice, so its value is not known")
    return found


def checked(path: pathlib.Path, read: Callable[[], Any]) -> Any:
    """Returns what `read` returns, and turns errors of checks into `CheckpointError`."""
    try:
        return read()
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        text = error.args[0] if error.args else repr(error)
        raise CheckpointError(f"{path}: {text}") from None
