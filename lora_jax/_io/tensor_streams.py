"""Reads and writes safetensors files in pieces, so that memory holds only some pieces.

A reader returns some rows of an array. A writer takes pieces of arrays in any order, and
from several threads. The header is at the beginning of a file and has the offsets of all
arrays, so a writer needs all shapes and dtypes before the first value.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import shutil
import threading
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._io import replacement, tensor_files

_METADATA = "__metadata__"
_ALIGNMENT = 8  # bytes: the header is padded with spaces to a multiple of it
# The number of bytes that are copied at once. They stay in the cache of a processor core.
_CHUNK = 256 * 2**10
# After this many bytes the system is told to write them to the disk.
_UNWRITTEN = 32 * 2**20
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


class FileWriter:
    """Writes pieces of a file to their places, in any order and from any thread.

    The disk works from the beginning on: the final `fsync` then has little left to do.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lock = threading.Lock()  # of the position in the file
        self._place = self._started = 0

    def write_at(self, place: int, data: bytes | memoryview) -> None:
        """Writes bytes from a place in the file on."""
        with self._lock:
            if place != self._place:
                self._file.seek(place)
            self._file.write(data)
            self._place = place + len(data)
            if self._place - self._started >= _UNWRITTEN:
                self._start_writing()

    def _start_writing(self) -> None:
        """Lets the system write what is complete to the disk, without waiting for it."""
        if hasattr(os, "posix_fadvise"):  # not on Windows and macOS
            size = self._place - self._started
            handle, advice = self._file.fileno(), os.POSIX_FADV_DONTNEED
            os.posix_fadvise(handle, self._started, size, advice)
        self._started = self._place

    def copy(self, file: tensor_files.TensorFile, start: int, stop: int, to: int) -> None:
        """Writes the bytes of another file from `start` to `stop` to the place `to`."""
        buffer = memoryview(bytearray(min(_CHUNK, stop - start)))
        for place in range(start, stop, _CHUNK):
            piece = buffer[: stop - place]
            file.read_into(piece, place)
            self.write_at(to + place - start, piece)


class TensorWriter(FileWriter):
    """Writes the values of a file's arrays. `open_writer` creates a writer.

    Args:
        file: to write to.
        entries: a dict from names to shapes and dtypes, in the order of the file.
        metadata: texts by name, for the header.
    """

    def __init__(
        self,
        file: BinaryIO,
        entries: Mapping[str, jax.ShapeDtypeStruct],
        metadata: Mapping[str, str],
    ) -> None:
        super().__init__(file)
        header = make_header(entries, metadata)
        self.write_at(0, header)
        sizes = map(count_bytes, entries.values())
        ends = itertools.accumulate(sizes, initial=len(header))
        self._spans = dict(zip(entries, itertools.pairwise(ends), strict=True))
        self._written = dict.fromkeys(entries, 0)

    def write(self, name: str, values: np.ndarray, start: int | None = None) -> None:
        """Writes values of an array.

        Args:
            name: of the array.
            values: contiguous, of the dtype of the array.
            start: the entry of the array that the first value is for. None appends the
                values to those that were written.

        Raises:
            ValueError: if the array gets too many values.
        """
        offset = self._written[name] if start is None else start * values.itemsize
        place = self._claim(name, offset, values.nbytes)
        self.write_at(place, values.reshape(-1).view(np.uint8).data)

    def copy_from(self, name: str, span: Span, start: int, stop: int) -> None:
        """Copies bytes of an array: those of a span from `start` to `stop`."""
        place = self._claim(name, start, stop - start)
        self.copy(span.file, span.start + start, span.start + stop, place)

    def finish(self) -> None:
        """Raises ValueError unless all values were written."""
        for name, (start, end) in self._spans.items():
            if missing := end - start - self._written[name]:
                raise ValueError(f"{name!r} lacks {missing} bytes.")

    def _claim(self, name: str, offset: int, size: int) -> int:
        """Counts bytes that an array gets, and returns their place in the file."""
        start, end = self._spans[name]
        with self._lock:
            self._written[name] += size
            excess = max(self._written[name], offset + size) - (end - start)
        if excess > 0:
            raise ValueError(f"{name!r} got {excess} bytes too many.")
        return start + offset


@contextlib.contextmanager
def open_writer(
    path: pathlib.Path,
    entries: Mapping[str, jax.ShapeDtypeStruct],
    metadata: Mapping[str, str],
) -> Iterator[TensorWriter]:
    """Opens a file to write arrays to. The file gets its name when it is complete.

    Args:
        path: of the file.
        entries: a dict from names to shapes and dtypes, in the order of the file.
        metadata: texts by name, for the header.

    Yields:
        The writer.

    Raises:
        ValueError: if an array did not get all of its values.
    """
    with _open_new(path) as file:
        writer = TensorWriter(file, entries, metadata)
        yield writer
        writer.finish()


@contextlib.contextmanager
def open_copy(path: pathlib.Path) -> Iterator[FileWriter]:
    """Opens a file to write a copy to. The file gets its name at the end of the block."""
    with _open_new(path) as file:
        yield FileWriter(file)


@contextlib.contextmanager
def _open_new(path: pathlib.Path) -> Iterator[BinaryIO]:
    with replacement.replacing(path) as temporary, temporary.open("wb") as file:
        yield file


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
        ValueError: if an array has the name of the metadata.
    """
    if _METADATA in entries:
        raise ValueError(f"safetensors has no array of the name {_METADATA!r}: rename it.")
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


def copy_file(source: pathlib.Path, path: pathlib.Path) -> None:
    """Copies a file. The copy gets its name when it is complete."""
    with source.open("rb") as old, _open_new(path) as new:
        shutil.copyfileobj(old, new, _CHUNK)
