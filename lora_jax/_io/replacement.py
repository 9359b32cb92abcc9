"""Replaces files as a whole: a written file gets its name when it is complete."""

import contextlib
import errno
import os
import pathlib
import re
import secrets
import stat
from collections.abc import Iterator


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes a file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path, and renames its file to `path` if there was no error.

    The file is on the disk before it is renamed. So even if the machine stops, either the
    old file or the new one exists.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"there is no directory {path.parent} to write {path.name} in: make it first."
        )
    temporary = temporary_path(path)
    try:
        temporary.touch(exist_ok=False)
        permissions = stat.S_IMODE(temporary.stat().st_mode)  # as the process' umask allows
        yield temporary
        temporary.chmod(permissions)
        synchronize(temporary)
        os.replace(temporary, path)
        synchronize_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: pathlib.Path) -> pathlib.Path:
    """A unique name in the same directory, for a file that will replace `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def temporary_paths(folder: pathlib.Path, names: str) -> list[pathlib.Path]:
    """The temporary files that killed processes left in a directory.

    Args:
        folder: the directory.
        names: a regular expression of the final names of these files.
    """
    pattern = re.compile(rf"\.(?:{names})\.[0-9a-f]{{16}}\.tmp")
    return sorted(file for file in folder.iterdir() if pattern.fullmatch(file.name))


def synchronize(path: pathlib.Path) -> None:
    """Waits until a file is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def synchronize_directory(path: pathlib.Path) -> None:
    try:
        synchronize(path)
    except OSError as error:
        # Some systems, and some network file systems, do not offer it for directories.
        if error.errno not in (errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOTSUP):
            raise
