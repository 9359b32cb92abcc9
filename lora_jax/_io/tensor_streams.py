"""Safetensors files piece by piece, so that memory holds no more than a piece.

A reader gives some rows of an array; a writer takes the arrays one after the other, each
in as many pieces as the caller likes. The header comes first in a file, and it names the
places of all arrays, so a writer is told all shapes and dtypes before the first value.
"""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._io import tensor_files

_METADATA = "__metadata__"
_ALIGNMENT = 8  # bytes: the header is filled up with spaces to a multiple
_CODES = {jnp.dtype(name): code for code, name in tensor_files.DTYPES.items()}


class Span(NamedTuple):
    """Where the values of an array lie in a file."""

    path: pathlib.Path
    start: int
    """In bytes from the beginning of the file."""
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """How many bytes the array has."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The whole array."""
        return self.read_flat(0, math.prod(self.shape)).reshape(self.shape)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """The rows from `start` to `stop`, along the first axis."""
        row = math.prod(self.shape[1:])
        values = self.read_flat(start * row, stop * row)
        return values.reshape(stop - start, *self.shape[1:])

    def read_flat(self, start: int, stop: int) -> np.ndarray:
        """The entries from `start` to `stop`, in the order they are stored in."""
        size = self.dtype.itemsize
        raw = np.fromfile(
            self.path, np.uint8, (stop - start) * size, offset=self.start + start * size
        )
        if raw.size != (stop - start) * size:
            raise tensor_files.CheckpointError(
                f"{self.path} ends too early: did another program change it meanwhile?"
            )
        return raw.view(self.dtype)


def find_spans(file: tensor_files.TensorFile) -> dict[str, Span]:
    """Finds where the arrays of a file lie.

    Args:
        file: which has been checked when it was opened.

    Returns:
        The place of each array by its name, in the order of their places.
    """
    ordered = sorted(file, key=lambda name: (file.starts[name], file[name].size != 0))
    return {
        name: Span(
            file.path, file.starts[name], file[name].shape, np.dtype(file[name].dtype)
        )
        for name in ordered
    }


class TensorWriter:
    """Takes the values of a file's arrays in order. `open_writer` makes one.

    Args:
        file: to write to.
        entries: name to shape and dtype, in the order the values will come in.
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
        """Appends values to an array; those of the one before must be complete.

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
        """Raises ValueError unless all values have come."""
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
    """Opens a file to write arrays to, which has its name when it is complete.

    Args:
        path: of the file.
        entries: name to shape and dtype, in the order the values will come in.
        metadata: texts by name, for the header.

    Yields:
        The writer.

    Raises:
        ValueError: if an array did not get all of its values.
    """
    with tensor_files.replacing(path) as temporary, temporary.open("wb") as file:
        writer = TensorWriter(file, entries, metadata)
        yield writer
        writer.finish()


def write_tensors(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes arrays to a safetensors file, which replaces an old one when it is whole."""
    with tensor_files.replacing(path) as temporary:
        write_arrays(temporary, tensors, metadata)


def write_arrays(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes arrays to a safetensors file at once; memory holds no copy of them.

    Args:
        path: of the file, which has the name from the beginning.
        tensors: contiguous arrays by name.
        metadata: texts by name, for the header.

    Raises:
        ModuleNotFoundError: if the package safetensors is not installed.
        OSError: if the file cannot be written.
    """
    tensor_files.load_safetensors()
    # Wider entries first, as safetensors has them, so that all lie on multiples of theirs.
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
    """The bytes in front of the values: their number, and names, dtypes and places.

    Raises:
        TypeError: if safetensors has no name for a dtype.
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
    """Copies a file, which has its name when it is complete.

    Args:
        source: the file.
        path: of the copy.
        piece: how many bytes are read at once.

    Yields:
        How many bytes have been copied, after each piece.
    """
    buffer = memoryview(bytearray(piece))
    with (
        tensor_files.replacing(path) as temporary,
        source.open("rb", buffering=0) as old,
        temporary.open("wb", buffering=0) as new,
    ):
        while count := old.readinto(buffer):
            _write_all(new.fileno(), buffer[:count])
            yield count


def _write_all(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]
