"""What a command makes appears when it is complete, and not at all if it fails."""

import contextlib
import ctypes
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator

from lora_jax import _files
from lora_jax.cli import _terminal

_LISTED = 5


def check_place(
    out: pathlib.Path,
    inputs: dict[str, pathlib.Path],
    *,
    overwrite: bool,
    own: Callable[[pathlib.Path], set[pathlib.Path]],
) -> None:
    """Raises unless something may be written to a path.

    Args:
        out: where to write.
        inputs: what is read, by what it is called; none of it may be touched.
        overwrite: whether what is there may be replaced.
        own: the files that may be replaced, of those that are there: paths in the
            directory, or the one path `.` of a file.

    Raises:
        FileExistsError: if there is something that must not be replaced.
        FileNotFoundError: if there is no directory to write in.
        ValueError: if the path is one of the inputs, or inside of it.
    """
    place = out.resolve()
    for what, path in inputs.items():
        given = path.resolve()
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
    if place.exists():
        _check_own(out, place, own(place))


def _check_own(out: pathlib.Path, place: pathlib.Path, own: set[pathlib.Path]) -> None:
    """Raises unless all that is at a place may be replaced."""
    if not own:
        raise FileExistsError(
            f"{out} is not what this command writes, so --overwrite does not replace it: "
            "remove it yourself, or give another name."
        )
    others = {
        path.relative_to(place).parts[0]
        for path in place.rglob("*")
        if not (path.is_dir() and not path.is_symlink() and any(path.iterdir()))
        and path.relative_to(place) not in own
    }
    if others:
        names = ", ".join(sorted(others)[:_LISTED])
        more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
        raise FileExistsError(
            f"{out} has files in it that are not of the model, and --overwrite would lose "
            f"them: {names}{more}. Move them away, or give another name."
        )


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
    if it cannot be replaced; if that fails too, it is kept, and the error says where.
    """
    place = out.resolve()
    temporary = _beside(place)
    try:
        (temporary / "new").mkdir()
        yield temporary / "new"
        with _uninterrupted():
            _files.synchronize_directory(temporary / "new")
            _swap(temporary / "new", place, temporary / "old")
            _files.synchronize_directory(place.parent)
    finally:
        with _uninterrupted():
            if place.exists() or not (temporary / "old").exists():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                shutil.rmtree(temporary / "new", ignore_errors=True)


def _beside(place: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(tempfile.mkdtemp(".tmp", f".{place.name}.", place.parent))


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
