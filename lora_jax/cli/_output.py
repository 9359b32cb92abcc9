"""Writes the output of a command completely, or not at all if the command fails."""

import contextlib
import ctypes
import errno
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator

from lora_jax._io import replacement
from lora_jax.cli import _terminal


def check_place(
    out: pathlib.Path,
    inputs: dict[str, pathlib.Path],
    *,
    overwrite: bool,
    own: Callable[[pathlib.Path], set[pathlib.Path]],
) -> list[pathlib.Path]:
    """Checks that a command may write to a path.

    Args:
        out: the path.
        inputs: the paths that are read, by their names in messages.
        overwrite: whether existing files may be replaced.
        own: returns the existing files that may be replaced, as paths inside of `out`; for
            a file, the path `.`.

    Returns:
        The existing files to keep, as paths inside of `out`.
    """
    place = resolve(out)
    for what, path in inputs.items():
        given = resolve(path)
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
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return []
    if not overwrite:
        raise FileExistsError(
            f"{out} exists: give another name, or --overwrite to replace it."
        )
    files = own(place)
    if not files:
        raise FileExistsError(
            f"{out} is not what this command writes, so --overwrite does not replace it: "
            "remove it yourself, or give another name."
        )
    return sorted({path.relative_to(place) for path in place.rglob("*")} - files)


def resolve(path: pathlib.Path) -> pathlib.Path:
    """The absolute path without links; OSError if links form a loop."""
    try:
        return path.resolve()
    except RuntimeError:  # before Python 3.13
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None


def check_space(folder: pathlib.Path, needed: int) -> None:
    """Raises OSError if the disk of a folder has fewer free bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{_terminal.format_size(needed)} are needed in {folder}, and "
            f"{_terminal.format_size(free)} are free."
        )


@contextlib.contextmanager
def new_directory(
    out: pathlib.Path, keep: Iterable[pathlib.Path] = ()
) -> Iterator[pathlib.Path]:
    """Yields a temporary directory, and renames it to `out` if there was no error.

    The old directory stays in its place until then. If it cannot be replaced, it is put
    back; if that fails too, it is kept, and the error says where.

    Args:
        out: the final path.
        keep: existing files that the new directory will have too, as paths inside of `out`.
            They are hard links, so nothing is lost if the machine stops.
    """
    place = out.resolve()
    temporary = pathlib.Path(tempfile.mkdtemp(".tmp", f".{place.name}.", place.parent))
    try:
        (temporary / "new").mkdir()
        for path in keep:
            _link(place / path, temporary / "new" / path)
        yield temporary / "new"
        with _uninterrupted():
            replacement.synchronize_directory(temporary / "new")
            _swap(temporary / "new", place, temporary / "old")
            replacement.synchronize_directory(place.parent)
    finally:
        with _uninterrupted():
            if place.exists() or not (temporary / "old").exists():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                shutil.rmtree(temporary / "new", ignore_errors=True)


def _link(source: pathlib.Path, path: pathlib.Path) -> None:
    """Makes a hard link to a file, or a directory with the same permissions."""
    if source.is_dir() and not source.is_symlink():
        path.mkdir(parents=True, exist_ok=True)
        shutil.copystat(source, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, path, follow_symlinks=False)
    except OSError as error:
        raise OSError(
            f"{source} is not a file of the model, and cannot be kept beside the new one: "
            f"{error}. Move it away, or give another OUT."
        ) from error


def _swap(new: pathlib.Path, place: pathlib.Path, old: pathlib.Path) -> None:
    """Renames `new` to `place`. What was in `place` gets the name of `new` or `old`."""
    if not place.exists():
        os.replace(new, place)
        return
    if _exchange(new, place):
        return
    os.replace(place, old)
    try:
        os.replace(new, place)
    except BaseException as error:
        try:
            os.replace(old, place)
        except OSError:
            raise OSError(
                f"{place} could not be replaced ({error}), and what was there could not be "
                f"put back: it is kept in {old}. Move it back yourself."
            ) from error
        raise


def _exchange(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Exchanges the names of two directories in one step. False if it is not possible."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # of a C library before 2018
        return False
    current, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE in fcntl.h and stdio.h
    return rename(current, os.fsencode(a), current, os.fsencode(b), exchange) == 0


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C and terminations until the end of the block."""
    received: list[int] = []
    kept = {}
    if threading.current_thread() is threading.main_thread():
        for number in signals():
            kept[number] = signal.signal(number, lambda n, frame: received.append(n))
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if received:
            signal.raise_signal(received[0])


def signals() -> list[signal.Signals]:
    """The signals of this system that ask a process to end."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
