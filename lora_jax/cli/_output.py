"""What a command makes appears when it is complete, and not at all if it fails."""

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

from lora_jax._io import tensor_files
from lora_jax.cli import _terminal


def check_place(
    out: pathlib.Path,
    inputs: dict[str, pathlib.Path],
    *,
    overwrite: bool,
    own: Callable[[pathlib.Path], set[pathlib.Path]],
) -> list[pathlib.Path]:
    """Raises unless something may be written to a path.

    Args:
        out: where to write.
        inputs: what is read, by what it is called; none of it may be touched.
        overwrite: whether what is there may be replaced.
        own: the files that may be replaced, of those that are there: paths in the
            directory, or the one path `.` of a file.

    Returns:
        What is there already and is to be kept, by its paths in the directory.

    Raises:
        FileExistsError: if there is something that must not be replaced.
        FileNotFoundError: if there is no directory to write in.
        ValueError: if the path is one of the inputs, or inside of it.
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
    if place.is_dir() and not any(place.iterdir()):
        return []
    if place.exists() and not overwrite:
        raise FileExistsError(
            f"{out} exists: give another name, or --overwrite to replace it."
        )
    if not place.exists():
        return []
    files = own(place)
    if not files:
        raise FileExistsError(
            f"{out} is not what this command writes, so --overwrite does not replace it: "
            "remove it yourself, or give another name."
        )
    return sorted({path.relative_to(place) for path in place.rglob("*")} - files)


def resolve(path: pathlib.Path) -> pathlib.Path:
    """A path without links.

    Raises:
        OSError: if links lead to each other. Python has another error before 3.13.
    """
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
def new_directory(
    out: pathlib.Path, keep: Iterable[pathlib.Path] = ()
) -> Iterator[pathlib.Path]:
    """Gives a temporary directory, which gets its name at the end if nothing went wrong.

    It is beside its later place. What is there already stays until then, and comes back
    if it cannot be replaced; if that fails too, it is kept, and the error says where.

    Args:
        out: the later place.
        keep: what is there already and will be in the new directory as well, by its paths.
            Both have the same files until the old one goes, so nothing is lost whenever
            the machine stops.
    """
    place = out.resolve()
    temporary = _beside(place)
    try:
        (temporary / "new").mkdir()
        for path in keep:
            _link(place / path, temporary / "new" / path)
        yield temporary / "new"
        with _uninterrupted():
            tensor_files.synchronize_directory(temporary / "new")
            _swap(temporary / "new", place, temporary / "old")
            tensor_files.synchronize_directory(place.parent)
    finally:
        with _uninterrupted():
            if place.exists() or not (temporary / "old").exists():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                shutil.rmtree(temporary / "new", ignore_errors=True)


def _beside(place: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(tempfile.mkdtemp(".tmp", f".{place.name}.", place.parent))


def _link(source: pathlib.Path, path: pathlib.Path) -> None:
    """Gives a file a second name, or makes a directory like another."""
    if source.is_dir() and not source.is_symlink():
        path.mkdir(parents=True, exist_ok=True)
        shutil.copystat(source, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, path, follow_symlinks=False)
    except OSError as error:
        raise OSError(
            f"{source} is not of the model, and cannot be kept beside the new one: "
            f"{error}. Move it away, or give another OUT."
        ) from error


def _swap(new: pathlib.Path, place: pathlib.Path, old: pathlib.Path) -> None:
    """Puts `new` in its place; what is there goes to where `new` was, or to `old`."""
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
    """Exchanges the names of two directories at one moment, where the system can."""
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
    """Puts off Ctrl-C and terminations until the block is done."""
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
    """The signals that ask a process to end, of those that the system has."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
