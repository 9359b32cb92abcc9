"""Reads and writes safetensors files in pieces, so that memory holds only one piece.

A reader returns some rows of an array. A writer takes one array after the other, each in
any number of pieces. The header is at the beginning of a file and has the offsets of all
arrays, so a writer needs all shapes and dtypes before the first value.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._io import replacement, tensor_files

_METADATA = "__metadata__"
_ALIGNMENT = 8  # bytes: the header is padded with spaces to a multiple of it
_CODES = {jnp.dtype(name): code for code, name in tensor_files.DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Span:
    """An array in an open file. Its values are read when they are asked for."""

    file: tensor_files.TensorFile
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def start(self) -> int:
        """Where the values begin, in bytes from the beginning of the file."""
        return self.file.starts[self.name]

    @property
    def ndim(self) -> int:
        """How many axes the array has."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many entries the array has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes the array has."""
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The whole array."""
        return self.file.read(self.name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The whole array, for NumPy."""
        return self.read().astype(dtype or self.dtype, copy=False)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """The rows from `start` to `stop`, along the first axis."""
        row = math.prod(self.shape[1:])
        values = self.read_flat(start * row, stop * row)
        return values.reshape(stop - start, *self.shape[1:])

    def read_flat(self, start: int, stop: int) -> np.ndarray:
        """The entries from `start` to `stop`, in the order of the file."""
        return self.file.read_flat(self.name, start, stop)


def find_spans(file: tensor_files.TensorFile) -> dict[str, Span]:
    """The arrays of a file by name, in the order of the file."""
    ordered = sorted(file, key=lambda name: (file.starts[name], file[name].size != 0))
    return {
        name: Span(file, name, file[name].shape, np.dtype(file[name].dtype))
        for name in ordered
    }


class TensorWriter:
    """Writes the values of a file's arrays in order. `open_writer` creates a writer.

    Args:
        file: to write to.
        entries: a dict from names to shapes and dtypes, in the order of the values.
        metadata: texts by name, for the header.
    """

    def __init__(
        self,
        file: BinaryIO,
        entries: Mapping[str, jax.ShapeDtypeStruct],
        metadata: Mapping[str, str],
    ) -> None:
        self._file = file
        self._left = [(name, count_bytes(entry)) for name, entry in entries.items()]
        self._left.reverse()
        file.write(make_header(entries, metadata))

    def write(self, name: str, values: np.ndarray) -> None:
        """Appends values to an array. All values of the array before must be written.

        Args:
            name: of the array.
            values: contiguous, of the dtype of the array.

        Raises:
            ValueError: if it is not the turn of this array, or it gets too many values.
        """
        self._skip_complete(name)
        if not self._left or self._left[-1][0] != name:
            turn = repr(self._left[-1][0]) if self._left else "no other array"
            raise ValueError(f"values of {name!r} came where {turn} was expected.")
        missing = self._left[-1][1] - values.nbytes
        if missing < 0:
            raise ValueError(f"{name!r} got {-missing} bytes too many.")
        self._file.write(values.reshape(-1).view(np.uint8).data)
        self._left[-1] = name, missing

    def finish(self) -> None:
        """Raises ValueError unless all values were written."""
        self._skip_complete(None)
        if self._left:
            name, missing = self._left[-1]
            raise ValueError(f"{name!r} lacks {missing} bytes.")

    def _skip_complete(self, name: str | None) -> None:
        while self._left and self._left[-1][1] == 0 and self._left[-1][0] != name:
            self._left.pop()


@contextlib.contextmanager
def open_writer(
    path: pathlib.Path,
    entries: Mapping[str, jax.ShapeDtypeStruct],
    metadata: Mapping[str, str],
) -> Iterator[TensorWriter]:
    """Opens a file to write arrays to. The file gets its name when it is complete.

    Args:
        path: of the file.
        entries: a dict from names to shapes and dtypes, in the order of the values.
        metadata: texts by name, for the header.

    Yields:
        The writer.

    Raises:
        ValueError: if an array did not get all of its values.
    """
    with replacement.replacing(path) as temporary, temporary.open("wb") as file:
        writer = TensorWriter(file, entries, metadata)
        yield writer
        writer.finish()


def write_tensors(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes arrays to a safetensors file atomically."""
    with replacement.replacing(path) as temporary:
        write_arrays(temporary, tensors, metadata)


def write_arrays(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes arrays to a safetensors file without copying them in memory.

    Args:
        path: of the file. The file has this name from the beginning.
        tensors: contiguous arrays by name.
        metadata: texts by name, for the header.

    Raises:
        ModuleNotFoundError: if the package safetensors is not installed.
        OSError: if the file cannot be written.
    """
    tensor_files.load_safetensors()
    # Wider dtypes first, as in safetensors, so that all arrays are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries = {n: tensor_files.abstract(tensors[n].shape, tensors[n].dtype) for n in order}
    with path.open("wb") as file:
        writer = TensorWriter(file, entries, metadata)
        for name in order:
            writer.write(name, tensors[name])
        writer.finish()


def make_header(
    entries: Mapping[str, jax.ShapeDtypeStruct], metadata: Mapping[str, str]
) -> bytes:
    """The bytes in front of the values: the header's length and its JSON text.

    Raises:
        TypeError: if safetensors does not support a dtype.
    """
    header: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    place = 0
    for name, entry in entries.items():
        if jnp.dtype(entry.dtype) not in _CODES:
            raise TypeError(f"{name!r} is {entry.dtype}, which safetensors does not have.")
        end = place + count_bytes(entry)
        header[name] = {
            "dtype": _CODES[jnp.dtype(entry.dtype)],
            "shape": list(entry.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def count_bytes(entry: jax.ShapeDtypeStruct) -> int:
    """How many bytes the values of an array have."""
    return math.prod(entry.shape) * jnp.dtype(entry.dtype).itemsize


def copy_file(source: pathlib.Path, path: pathlib.Path, piece: int) -> Iterator[int]:
    """Copies a file. The copy gets its name when it is complete.

    Args:
        source: the file.
        path: of the copy.
        piece: how many bytes are read at once.

    Yields:
        The size of each piece, after it is written.
    """
    buffer = memoryview(bytearray(piece))
    with source.open("rb", buffering=0) as old:
        pieces = iter(lambda: buffer[: old.readinto(buffer)], b"")
        yield from write_pieces(path, pieces)


def write_pieces(path: pathlib.Path, pieces: Iterable[memoryview]) -> Iterator[int]:
    """Writes a file from pieces. The file gets its name when it is complete.

    Yields:
        The size of each piece, after it is written.
    """
    with replacement.replacing(path) as temporary, temporary.open("wb", 0) as new:
        for piece in pieces:
            _write_all(new.fileno(), piece)
            yield len(piece)


def _write_all(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]
