"""Prints the output of the commands and their progress.

Names in files are not trusted: a terminal must show them, and not act on them.
"""

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from lora_jax._core import tables

Progress: TypeAlias = Callable[[int], Any]

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def printable(text: str) -> str:
    """A text with escapes in place of the characters that a terminal would act on."""
    escape = functools.partial(str.encode, encoding="unicode_escape")
    return "".join(c if c.isprintable() else escape(c).decode() for c in text)


def say(*lines: str) -> None:
    """Prints lines. A line break inside a line is escaped."""
    if lines:
        print_text("\n".join(map(printable, lines)))


def print_text(text: str) -> None:
    """Prints a text. Prints nothing if the output is closed, which is not an error."""
    if sys.stdout is None:
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def format_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[str] = ()
) -> list[str]:
    """The lines of a table; the columns named in `right` are aligned to the right."""
    lines = [[printable(cell) for cell in row] for row in (header, *rows)]
    own = set(right)
    return tables.format_table(lines, [i for i, n in enumerate(header) if n in own])


def format_size(count: float) -> str:
    """A number of bytes as text, in a suitable unit."""
    power = 0
    while count >= 1024 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.0f} {_UNITS[0]}" if power == 0 else f"{count:.1f} {_UNITS[power]}"


def format_number(value: float) -> str:
    """A number as text, with four digits."""
    return f"{value:.4g}"


def format_shape(shape: Iterable[int]) -> str:
    """A shape as text, such as `64 x 32`."""
    return " x ".join(map(str, shape)) or "scalar"


def as_json(value: Any) -> Any:
    """A value for JSON: infinities and NaN, which JSON does not have, become strings."""
    if isinstance(value, dict):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


@contextlib.contextmanager
def show_progress(total: int, *, quiet: bool) -> Iterator[Progress]:
    """Shows a progress bar on a terminal, or a line for each tenth if tqdm is missing.

    Yields a function to call with the number of bytes of each step, of the total.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda count: None
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield _lines(total)
        return
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        yield bar.update


def _lines(total: int) -> Progress:
    """Prints a line for each tenth of a job."""
    done, tenths = 0, 0

    def update(count: int) -> None:
        nonlocal done, tenths
        done += count
        if 10 * done // max(total, 1) > tenths:
            tenths = 10 * done // max(total, 1)
            print(f"{10 * tenths} %", file=sys.stderr, flush=True)

    return update
