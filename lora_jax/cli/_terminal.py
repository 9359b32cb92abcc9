"""What the commands print, and how far they are.

Names in files are not trusted: a terminal shows them, and does not act on them.
"""

import contextlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from lora_jax._core import tables

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def printable(text: str) -> str:
    """The text without what a terminal would act on, such as escape sequences."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode()


def say(*lines: str) -> None:
    """Prints lines, each of which stays one."""
    if lines:
        print_text("\n".join(map(printable, lines)))


def print_text(text: str) -> None:
    """Prints a text; nothing where the output is closed, or nobody reads it any more.

    What a command does, and its exit code, do not depend on that.
    """
    if sys.stdout is None:
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def format_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[str] = ()
) -> list[str]:
    """Rows of cells as lines of columns.

    Args:
        header: the names of the columns.
        rows: the cells.
        right: the names of the columns that are aligned on the right.
    """
    lines = [[printable(cell) for cell in row] for row in (header, *rows)]
    own = set(right)
    return tables.format_table(lines, [i for i, n in enumerate(header) if n in own])


def format_size(count: float) -> str:
    """A number of bytes in a unit that suits it."""
    power = 0
    while count >= 1024 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.0f} {_UNITS[0]}" if power == 0 else f"{count:.1f} {_UNITS[power]}"


def format_number(value: float) -> str:
    """A number with four digits."""
    return f"{value:.4g}"


def format_shape(shape: Iterable[int]) -> str:
    """A shape, as `64 x 32`; a scalar has none."""
    return " x ".join(map(str, shape)) or "scalar"


def as_json(value: Any) -> Any:
    """A value with what JSON does not have, infinities and NaN, as texts."""
    if isinstance(value, dict):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class Progress(Protocol):
    """Shows how far a long job is."""

    def update(self, n: float, /) -> Any:
        """Notes that `n` bytes more are done."""


class _Silent:
    def update(self, n: float, /) -> None:
        pass


class _Plain:
    """A line for each tenth of the job."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._tenths = max(total, 1), 0.0, 0

    def update(self, n: float, /) -> None:
        self._done += n
        tenths = int(10 * self._done / self._total)
        if tenths > self._tenths:
            self._tenths = tenths
            print(f"{10 * tenths} %", file=sys.stderr, flush=True)


@contextlib.contextmanager
def show_progress(total: int, *, quiet: bool) -> Iterator[Progress]:
    """A bar on the terminal, or some lines where tqdm is missing; nothing elsewhere.

    Args:
        total: how many bytes there are to do.
        quiet: show nothing.

    Yields:
        What to tell of each step.
    """
    if quiet or not sys.stderr.isatty():
        yield _Silent()
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield _Plain(total)
        return
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        yield bar
