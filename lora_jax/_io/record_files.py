"""Arrays and a record of what they are, in one safetensors file.

The record is JSON in the metadata of the file, beside a SHA-256 digest of the record and of
all arrays. The file is replaced in one rename.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax._io import tensor_files, tensor_streams
from lora_jax._io.tensor_files import CheckpointError

_FIELDS = ("format", "version", "record", "digest")


class Kind(NamedTuple):
    """A kind of file."""

    format: str
    version: int
    writer: str
    """The function that writes such files, for messages."""
    oldest: int = 1
    """The oldest version that is in a file of this kind."""


class RecordFile:
    """An open file: its record, its arrays, and the values of all of them.

    Raises:
        CheckpointError: if the file is of another kind or version, or has no such record.
    """

    def __init__(self, path: pathlib.Path, kind: Kind) -> None:
        self.path = path
        self.arrays = tensor_files.TensorFile(path)
        metadata = self.arrays.metadata
        check_kind(path, kind, metadata.get("format"), _number(metadata.get("version")))
        if set(metadata) != set(_FIELDS):
            raise CheckpointError(
                f"{path}: expected the metadata {', '.join(_FIELDS)}, got "
                f"{', '.join(sorted(metadata)):.200}."
            )
        self.record = tensor_files.parse_json(path, metadata["record"].encode())

    def read(
        self, convert: Callable[[str, np.ndarray], Any] = lambda name, values: values
    ) -> dict[str, Any]:
        """Reads all arrays, one after the other.

        Args:
            convert: makes the result of each name and its values.

        Raises:
            CheckpointError: if the record or an array is not as it was written.
        """
        digest, arrays = _Digest(self.arrays.metadata["record"]), {}
        for name in sorted(self.arrays):
            values = self.arrays.read(name)
            digest.add(name, values)
            arrays[name] = convert(name, values)
        if digest.text() != self.arrays.metadata["digest"]:
            raise CheckpointError(
                f"{self.path} is not as it was written, its digest is another one: was it "
                "edited, or damaged? Save it anew, or copy it again."
            )
        return arrays


def write(
    path: pathlib.Path,
    kind: Kind,
    record: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Writes a record and arrays to a file, which replaces an old one when it is whole."""
    text = json.dumps(record, separators=(",", ":"), allow_nan=False)
    digest = _Digest(text)
    for name in sorted(arrays):
        digest.add(name, arrays[name])
    values = (kind.format, str(kind.version), text, digest.text())
    tensor_streams.write_tensors(path, arrays, dict(zip(_FIELDS, values, strict=True)))


def check_kind(path: pathlib.Path, kind: Kind, found: Any, version: Any) -> None:
    """Raises CheckpointError unless a file has the format and a version that is read."""
    if found != kind.format:
        raise CheckpointError(
            f"{path} was not written by {kind.writer}: its format should be "
            f"{kind.format!r}, and is {found!r:.60}."
        )
    if type(version) is not int or version < kind.oldest:
        raise CheckpointError(f"{path} has the version {version!r:.60}, which never was.")
    if version > kind.version:
        raise CheckpointError(
            f"{path} has version {version!r:.60} of the format, and this lora_jax reads "
            f"none above {kind.version}: upgrade it, pip install --upgrade lora_jax."
        )


def _number(text: str | None) -> int | str | None:
    """A version as a number; the text itself if it is none."""
    return int(text) if text and re.fullmatch("[1-9][0-9]{0,8}", text) else text


class _Digest:
    """The SHA-256 of a record and of arrays, with their names, dtypes and shapes."""

    def __init__(self, record: str) -> None:
        self._hash = hashlib.sha256(record.encode())

    def add(self, name: str, array: np.ndarray) -> None:
        header = json.dumps([name, array.dtype.name, list(array.shape)])
        self._hash.update(header.encode())
        self._hash.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def text(self) -> str:
        return self._hash.hexdigest()
