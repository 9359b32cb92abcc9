"""`lora-jax diff`: compares two directories of adapters, or two models."""

import argparse
import contextlib
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from lora_jax._io import tensor_files
from lora_jax._io.tensor_streams import Span
from lora_jax.cli import _adapters, _base, _effects, _loading, _messages, _terminal
from lora_jax.cli._adapters import Contents
from lora_jax.peft.formats.opening import find_dialect

# The number of entries of an array that are compared at once.
_PIECE = 2**20
_WIDEST = 60  # characters of a setting
_UNORDERED = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
_UNCOMPARED = ("peft_version", "inference_mode")
_SCALE = "scale of "
# Settings that change what an adapter computes, and that no array shows.
_ACTING = ("lora_dropout", "dropout", "trainable_token_indices")
# The default tolerance of effects: updates are rounded to float32.
_ROUNDING = 1e-6
_RIGHT = ("largest difference", "relative", "norm in A", "norm in B")
DIFFERENT = 3

Entry: TypeAlias = Span | np.ndarray
"""An array to compare: in a file, or in memory."""


class Side(NamedTuple):
    """One of the two that are compared."""

    settings: dict[str, Any]
    entries: Mapping[str, Entry]


class _Effects(NamedTuple):
    """The result of comparing the effects of two adapters that are stored differently."""

    same: bool = False
    by_plan: bool = False
    """Whether modules and paths were matched by their words."""
    rows: Sequence[tuple[str, ...]] = ()
    lines: tuple[str, ...] = ()


class Distance(NamedTuple):
    """The distance between two arrays."""

    absolute: float
    """The largest difference."""
    relative: float
    """The largest difference, relative to the largest entry of both."""
    equal: bool


def diff(options: argparse.Namespace) -> int:
    """Runs the command."""
    paths = pathlib.Path(options.a), pathlib.Path(options.b)
    contents = _read_both(*paths, options)
    if contents is None:
        a, b = (Side({}, _base.open_base(path).spans) for path in paths)
    else:
        shared = contents[0].format != contents[1].format
        a, b = (_adapter_side(each, shared) for each in contents)
    tolerance, names = options.tolerance, _loading.read_names(options.names)
    both = [name for name in a.entries if name in b.entries]
    cells = {n: _compare(a.entries[n], b.entries[n], tolerance or 0.0) for n in both}
    rows = [(name, *row) for name, row in cells.items() if row is not None]
    settings = _differing(a.settings, b.settings)
    only = [
        (f"only in {path}", name)
        for path, own, other in ((paths[0], a, b), (paths[1], b, a))
        for name in own.entries
        if name not in other.entries
    ]
    found = _Effects()
    differ = bool(settings or rows or only)
    if contents is not None and differ:
        acting = any(line[0] in _ACTING for line in settings)
        found = _compare_effects(contents, names, tolerance, acting)
    if found.by_plan:
        settings = [line for line in settings if not line[0].startswith(_SCALE)]
    entry = ("entry", "shape", "dtype", "largest difference", "relative")
    for header, lines in (
        (("setting", "A", "B"), settings),
        (("where", "entry"), [] if found.same or found.by_plan else only),
        (entry, [] if found.same else rows),
        (("effect", "norm in A", "norm in B", "what differs", "relative"), found.rows),
    ):
        if lines:
            _terminal.say(*_terminal.format_table(header, lines, _RIGHT), "")
    _terminal.say(
        f"{len(settings)} settings differ; of the entries {len(both) - len(rows)} are "
        f"equal, {len(rows)} differ, {len(only)} are in one only.",
        *found.lines,
    )
    return DIFFERENT if differ and not found.same else 0


def _compare_effects(
    contents: tuple[Contents, Contents],
    names: _loading.Names,
    tolerance: float | None,
    acting: bool,
) -> _Effects:
    """Compares the effects of adapters that are stored differently.

    `acting` says whether settings differ that no array shows.
    """
    try:
        found = _effects.compare(*contents, names)
    except (KeyError, TypeError, ValueError) as error:
        first, *others = _messages.translate(str(error.args[0])).splitlines()
        why = " ".join([first, *(line.strip() for line in others[:1])])
        return _Effects(lines=(f"The effects were not compared: {why}",))
    by_plan = not _effects.are_alike(*contents)
    limit = _ROUNDING if tolerance is None else tolerance
    rows = [
        (
            each.name.removesuffix(".weight"),
            *map(_terminal.format_number, each.norms),
            each.what,
            _terminal.format_number(each.relative),
        )
        for each in found
        if not each.relative <= limit
    ]
    count = f"of {len(found)} updates and arrays"
    if rows:
        line = f"The effects differ: {len(rows)} {count}."
        return _Effects(by_plan=by_plan, rows=rows, lines=(line,))
    largest = _terminal.format_number(max((e.relative for e in found), default=0.0))
    same = f"{count}, none differs by more than {limit:g} of its norm (largest: {largest})"
    if acting:
        line = f"{same[0].upper()}{same[1:]}, but the settings differ."
        return _Effects(by_plan=by_plan, lines=(line,))
    return _Effects(True, by_plan, lines=(f"The effects are the same: {same}.",))


def _read_both(
    a: pathlib.Path, b: pathlib.Path, options: argparse.Namespace
) -> tuple[Contents, Contents] | None:
    """The adapters of two directories; None for two models."""
    kinds = [_is_model(path) for path in (a, b)]
    if kinds[0] != kinds[1]:
        model, adapter = (a, b) if kinds[0] else (b, a)
        raise ValueError(
            f"{model} is a model and {adapter} is not: give two models, or two directories "
            "of adapters."
        )
    if kinds[0]:
        if options.names or options.allow_field:
            raise ValueError("--names and --allow-field are for adapters, not for models.")
        return None
    left, right = (_adapters.read_contents(path, options.allow_field) for path in (a, b))
    _terminal.say(*left.ignored, *right.ignored)
    return left, right


def _is_model(path: pathlib.Path) -> bool:
    if path.is_file():
        with contextlib.suppress(tensor_files.CheckpointError):
            return find_dialect(path) is None
    files = path, path / _base.WHOLE, path / _base.INDEX
    return any(file.is_file() for file in files)


def _adapter_side(contents: Contents, shared: bool) -> Side:
    """The arrays and settings of adapters; if `shared`, only those of both formats."""
    settings = dict(contents.shared) if shared else _unordered(contents.settings)
    entries: dict[str, Entry] = {}
    for path, adapter in contents.adapters.items():
        name = path.removesuffix(".weight")
        settings[f"{_SCALE}{name}"] = adapter.scale
        entries |= {f"{name} {entry}": value for entry, value in adapter.read().items()}
    return Side(settings, entries | contents.wholes)


def _unordered(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings to compare. Lists are sorted if their order has no meaning."""
    return {
        name: sorted(value) if name in _UNORDERED and isinstance(value, list) else value
        for name, value in settings.items()
        if name not in _UNCOMPARED
    }


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The settings that differ."""
    return [
        (name, _shown(a, name), _shown(b, name))
        for name in dict.fromkeys([*a, *b])
        if (name in a) != (name in b) or a.get(name) != b.get(name)
    ]


def _shown(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return "none"
    text = str(settings[name])
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 4]} ..."


def _compare(a: Entry, b: Entry, tolerance: float) -> tuple[str, ...] | None:
    """The cells of a row about two arrays that differ; None if they are equal."""
    dtype = a.dtype.name if a.dtype == b.dtype else f"{a.dtype.name}, {b.dtype.name}"
    if a.shape != b.shape:
        shapes = ", ".join(_terminal.format_shape(each.shape) for each in (a, b))
        return shapes, dtype, "", ""
    apart = measure(a, b)
    if apart.equal and (a.dtype == b.dtype or tolerance):
        return None
    if not apart.equal and apart.relative <= tolerance:
        return None
    shape = _terminal.format_shape(a.shape)
    numbers = map(_terminal.format_number, (apart.absolute, apart.relative))
    return shape, dtype, *numbers


def measure(a: Entry, b: Entry) -> Distance:
    """The distance between two arrays of one shape, computed in float64.

    Entries that are NaN in both are equal. The distance of a NaN to a number is infinite.
    """
    absolute, largest, equal = 0.0, 0.0, True
    for left, right in zip(_pieces(a), _pieces(b), strict=True):
        unequal = (left != right) & ~((left != left) & (right != right))  # NaN is not NaN
        sizes = [np.abs(each.astype(np.float64)) for each in (left, right)]
        finite = [size[np.isfinite(size)].max(initial=0) for size in sizes]
        largest = max(largest, *finite)
        if not unequal.any():
            continue
        equal = False
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(left.astype(np.float64) - right.astype(np.float64))[unequal]
        absolute = max(absolute, float(np.where(np.isnan(apart), np.inf, apart).max()))
    return Distance(absolute, _effects.relative(absolute, largest), equal)


def _pieces(array: Entry) -> Iterator[np.ndarray]:
    """The entries of an array in order, some at a time."""
    for start in range(0, array.size, _PIECE):
        stop = min(start + _PIECE, array.size)
        if isinstance(array, Span):
            yield array.read_flat(start, stop)
        else:
            yield array.reshape(-1)[start:stop]


def check_tolerance(text: str) -> float:
    """Reads the argument of `--tolerance`, a number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value
