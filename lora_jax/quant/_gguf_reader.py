"""Opens GGUF files with the package `gguf`, faster and with clear errors."""

import contextlib
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax._io.tensor_files import CheckpointError, check_is_file

# Of the files that `llama-gguf-split` writes.
_PART = re.compile(r"(.*)-\d{5}-of-\d{5}\.gguf")
_COUNT = "split.count"
_DAMAGE = (ArithmeticError, LookupError, RecursionError, TypeError, ValueError)


class Opened(NamedTuple):
    """The content of a GGUF file, or of the files that a model was split into."""

    fields: Mapping[str, Any]
    tensors: Sequence[Any]


def as_path(path: Any) -> pathlib.Path:
    """The path of a file; TypeError for other values."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a path, got {type(path).__name__}.")
    return pathlib.Path(path)


def open_gguf(path: pathlib.Path) -> Opened:
    """Opens a file. If it is a part of a model, all parts beside it."""
    first = _read(path)
    with as_checkpoint_error(path):
        field = first.fields.get(_COUNT)
        count = int(field.contents()) if field else 1
    if count < 2:
        return Opened(first.fields, first.tensors)
    name = _PART.fullmatch(path.name)
    paths = [
        path.with_name(f"{name[1] if name else ''}-{i + 1:05}-of-{count:05}.gguf")
        for i in range(count)
    ]
    if path not in paths:
        raise CheckpointError(
            f"{path} is one of {count} files of a model, which are found by their names, "
            f"NAME-00001-of-{count:05}.gguf: give them these names again."
        )
    parts = [first if each == path else _read(each) for each in paths]
    tensors = [tensor for part in parts for tensor in part.tensors]
    with as_checkpoint_error(path):
        _check_distinct(tensors)
    return Opened(parts[0].fields, tensors)


def _check_distinct(tensors: Sequence[Any]) -> None:
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("two of its tensors have one name")


def _read(path: pathlib.Path) -> Any:
    """A `gguf.GGUFReader` of one file."""
    check_is_file(path)
    try:
        import gguf
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "GGUF files are read with the package gguf, which is not installed: "
            'pip install "lora_jax[gguf]".'
        ) from None

    class Reader(gguf.GGUFReader):
        """Names the tensor in errors, and does not read behind the end of the file.

        A tokenizer has some 100,000 strings and numbers, and the package makes arrays of
        each. Here they are slices of the file, in a tenth of the time.
        """

        def _get(self, offset: int, dtype: Any, count: Any = 1, *order: Any, **kw: Any):
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"it has {len(self.data)} bytes, and needs {end}")
            return super()._get(offset, dtype, count, *order, **kw)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            kinds = gguf.GGUFValueType
            if self.byte_order == "S":
                raise ValueError("it has the byte order of another machine")
            if raw_type != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind = kinds(self._get(orig_offs, np.uint32)[0])
            count, place = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
            if kind in self.gguf_scalar_to_np:
                array = self._get(place, self.gguf_scalar_to_np[kind], count)
                return 12 + array.nbytes, [array], [0], [raw_type, kind]
            if kind != kinds.STRING:  # arrays of arrays
                return super()._get_field_parts(orig_offs, raw_type)
            data, parts = self.data.data, []
            for _ in range(count):
                start = place + 8
                place = start + int.from_bytes(data[place:start], sys.byteorder)
                if place > len(data):
                    raise ValueError(f"it has {len(data)} bytes, and needs {place}")
                parts.append(data[start:place])
            return place - orig_offs, parts, range(count), [raw_type, kind]

        def _build_tensors(self, start_offs: int, fields: Sequence[Any]) -> None:
            found: list[Any] = []
            for field in fields:
                try:
                    super()._build_tensors(start_offs, [field])
                except _DAMAGE as error:
                    raise ValueError(f"tensor {field.name!r}: {error}") from None
                found += self.tensors
            self.tensors = found

    with as_checkpoint_error(path):
        reader = Reader(path)
        _check_distinct(reader.tensors)
    return reader


@contextlib.contextmanager
def as_checkpoint_error(path: pathlib.Path) -> Iterator[None]:
    """Turns the errors of the package gguf into one that names the file."""
    try:
        yield
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} cannot be read as GGUF ({error}): is it another kind of file, or was "
            "its download cut off?"
        ) from None
