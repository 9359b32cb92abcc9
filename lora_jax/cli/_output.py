"""What a command makes appears when it is complete, and not at all if it fails."""

import contextlib
import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

from lora_jax import _files
from lora_jax.cli import _terminal


def check_place(
    out: pathlib.Path,
    inputs: dict[str, pathlib.Path],
    *,
    overwrite: bool,
    is_own: Callable[[pathlib.Path], bool],
) -> None:
    """Raises unless something may be written to a path.

    Args:
        out: where to write.
        inputs: what is read, by what it is called; none of it may be touched.
        overwrite: whether what is there may be replaced.
        is_own: whether what is there is of the kind that is written, and no other
            directory whose content would be lost.

    Raises:
        FileExistsError: if there is something that must not be replaced.
        FileNotFoundError: if there is no directory to write in.
        ValueError: if the path is one of the inputs, or inside of it.
    """
    place = _resolve(out)
    for what, path in inputs.items():
        given = _resolve(path)
        if place == given or given in place.parents:
            raise ValueError(
                f"OUT {out} is {what} {path} or inside of it, which is never changed: "
                "give another directory."
            )
        if place in given.parents and place.exists():
            raise ValueError(
                f"{what} {path} is inside of OUT {out}, and would be lost: give another "
                "directory."
            )
    if not place.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {place.parent} to write to.")
    if place.is_dir() and not any(place.iterdir()):
        return
    if place.exists() and not overwrite:
        raise FileExistsError(
            f"{out} exists: give another name, or --overwrite to replace it."
        )
    if place.exists() and not is_own(place):
        raise FileExistsError(
            f"{out} is not what this command writes, so --overwrite does not replace it: "
            "remove it yourself, or give another name."
        )


def _resolve(path: pathlib.Path) -> pathlib.Path:
    """A path without links; before 3.13, Python has no OSError for links without an end."""
    try:
        return path.resolve()
    except RuntimeError:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None


def check_space(folder: pathlib.Path, needed: int) -> None:
    """Raises OSError if a disk has not as many bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{_terminal.format_size(needed)} are needed in {folder}, and "
            f"{_terminal.format_size(free)} are free."
        )


@contextlib.contextmanager
def new_directory(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary directory, which gets its name at the end if nothing went wrong.

    It is beside its later place. What is there already stays until then, and comes back
    if it cannot be replaced.
    """
    place = out.resolve()
    temporary = _beside(place)
    try:
        (temporary / "new").mkdir()
        yield temporary / "new"
        _files.synchronize_directory(temporary / "new")
        _swap(temporary, place)
        _files.synchronize_directory(place.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(place: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(tempfile.mkdtemp(".tmp", f".{place.name}.", place.parent))


def _swap(temporary: pathlib.Path, place: pathlib.Path) -> None:
    """Puts `new` in its place, and what is there into `old`."""
    old = temporary / "old"
    try:
        if place.exists():
            os.replace(place, old)
        os.replace(temporary / "new", place)
    except BaseException:
        if old.exists() and not place.exists():
            os.replace(old, place)
        raise
