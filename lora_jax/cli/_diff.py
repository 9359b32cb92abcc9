"""`lora-jax diff`: what two directories of adapters, or two models, do not share."""

import argparse
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.cli import _adapters, _base, _effects, _loading, _messages, _terminal
from lora_jax.cli._adapters import Contents

# How many entries of an array are compared at once.
_PIECE = 2**20
_WIDEST = 60  # characters of a setting
_UNORDERED = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
_UNCOMPARED = ("peft_version", "inference_mode")
_SCALE = "scale of "
# Settings that change what an adapter does, and no array of it.
_ACTING = ("lora_dropout", "dropout", "trainable_token_indices")
# What rounding to float32 leaves of the difference of two updates, over their norm.
_ROUNDING = 1e-6
DIFFERENT = 3


class Entry(NamedTuple):
    """An array to compare."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[np.ndarray]]
    """Its entries in order, flat, some at a time."""


class Side(NamedTuple):
    """One of the two that are compared."""

    settings: dict[str, Any]
    entries: dict[str, Entry]


class _Effects(NamedTuple):
    """What is said of two adapters that are not written alike."""

    same: bool = False
    """Whether they do the same all the same."""
    by_plan: bool = False
    """Whether names and paths were matched, so that they do not have to be the same."""
    rows: Sequence[tuple[str, ...]] = ()
    lines: tuple[str, ...] = ()


class Distance(NamedTuple):
    """How far two arrays are apart."""

    absolute: float
    """The largest difference."""
    relative: float
    """That over the largest entry of both."""
    equal: bool


def diff(options: argparse.Namespace) -> int:
    """Runs the command."""
    paths = pathlib.Path(options.a), pathlib.Path(options.b)
    contents = _read_both(*paths, options)
    if contents is None:
        sides = [_model_side(path) for path in paths]
    else:
        shared = contents[0].format != contents[1].format
        sides = [_adapter_side(each, shared) for each in contents]
    a, b = sides
    tolerance, given = options.tolerance or 0.0, _loading.read_names(options.names)
    names = [name for name in a.entries if name in b.entries]
    rows, equal = [], 0
    for name in names:
        cells = _compare(a.entries[name], b.entries[name], tolerance)
        equal += cells is None
        if cells is not None:
            rows.append((name, *cells))
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
        acting = [line for line in settings if line[0] in _ACTING]
        found = _compare_effects(contents, paths, given, options.tolerance, bool(acting))
    if found.by_plan:
        settings = [line for line in settings if not line[0].startswith(_SCALE)]
    right = ("largest difference", "relative", "norm in A", "norm in B")
    entry = ("entry", "shape", "dtype", "largest difference", "relative")
    for header, lines in (
        (("setting", "A", "B"), settings),
        (("where", "entry"), [] if found.same or found.by_plan else only),
        (entry, [] if found.same else rows),
        (("effect", "norm in A", "norm in B", "what differs", "relative"), found.rows),
    ):
        if lines:
            _terminal.say(*_terminal.format_table(header, lines, right), "")
    _terminal.say(
        f"{len(settings)} settings differ; of the entries {equal} are equal, {len(rows)} "
        f"differ, {len(only)} are in one only.",
        *found.lines,
    )
    return DIFFERENT if differ and not found.same else 0


def _compare_effects(
    contents: tuple[Contents, Contents],
    paths: tuple[pathlib.Path, pathlib.Path],
    names: _loading.Names,
    tolerance: float | None,
    acting: bool,
) -> _Effects:
    """What adapters do that are not written alike.

    Args:
        contents: of both directories.
        paths: of both.
        names: of `--names`.
        tolerance: as the option; None for what rounding to float32 leaves.
        acting: whether settings differ that the arrays do not say.
    """
    try:
        found = _effects.compare(*contents, paths, names)
    except (KeyError, TypeError, ValueError) as error:
        first, *others = _messages.translate(str(error.args[0])).splitlines()
        why = " ".join([first, *(line.strip() for line in others[:1])])
        return _Effects(lines=(f"What they do was not compared: {why}",))
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
        line = f"What they do differs: {len(rows)} {count}."
        return _Effects(by_plan=by_plan, rows=rows, lines=(line,))
    largest = _terminal.format_number(max((e.relative for e in found), default=0.0))
    same = f"{count} none differs by more than {limit:g} of its norm (largest: {largest})"
    if acting:
        line = f"{same[0].upper()}{same[1:]}; the settings do."
        return _Effects(by_plan=by_plan, lines=(line,))
    return _Effects(True, by_plan, lines=(f"They do the same: {same}.",))


def _read_both(
    a: pathlib.Path, b: pathlib.Path, options: argparse.Namespace
) -> tuple[Contents, Contents] | None:
    """Two directories of adapters; None for two models."""
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
    return path.is_file() or any(
        (path / name).is_file() for name in (_base.WHOLE, _base.INDEX)
    )


def _model_side(path: pathlib.Path) -> Side:
    base = _base.open_base(path)
    return Side({}, {name: _of_span(span) for name, span in base.spans().items()})


def _of_span(span: Any) -> Entry:
    size = math.prod(span.shape)

    def pieces() -> Iterator[np.ndarray]:
        for start in range(0, size, _PIECE):
            yield span.read_flat(start, min(start + _PIECE, size))

    return Entry(span.shape, span.dtype, pieces)


def _adapter_side(contents: Contents, shared: bool) -> Side:
    """What is compared of adapters.

    Args:
        contents: of a directory.
        shared: compare only the settings that both formats have.
    """
    settings = dict(contents.shared) if shared else _unordered(contents.settings)
    entries = {}
    for path, adapter in contents.adapters.items():
        name = path.removesuffix(".weight")
        settings[f"{_SCALE}{name}"] = adapter.scale
        for entry, values in adapter.read().items():
            entries[f"{name} {entry}"] = _of_array(values)
    for name, whole in contents.wholes.items():
        entries[name] = _of_array(whole.read())
    return Side(settings, entries)


def _unordered(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, with lists whose order means nothing sorted."""
    return {
        name: sorted(value) if name in _UNORDERED and isinstance(value, list) else value
        for name, value in settings.items()
        if name not in _UNCOMPARED
    }


def _of_array(values: np.ndarray) -> Entry:
    return Entry(values.shape, values.dtype, lambda: iter([values.ravel()]))


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The settings that are not the same."""
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
    """The cells of a row about two arrays; None if they are equal."""
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
    """How far two arrays of one shape are apart, in float64.

    Entries that are NaN in both are equal; one that is in one only is infinitely far.
    """
    absolute, largest, equal = 0.0, 0.0, True
    for left, right in zip(a.pieces(), b.pieces(), strict=True):
        unequal = ~((left == right) | (_is_nan(left) & _is_nan(right)))
        sizes = [np.abs(each.astype(np.float64)) for each in (left, right)]
        finite = [size[np.isfinite(size)].max(initial=0) for size in sizes]
        largest = max(largest, *finite)
        if not unequal.any():
            continue
        equal = False
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(left.astype(np.float64) - right.astype(np.float64))[unequal]
        absolute = max(absolute, float(np.where(np.isnan(apart), np.inf, apart).max()))
    return Distance(absolute, _over(absolute, largest), equal)


def _over(absolute: float, largest: float) -> float:
    if absolute == 0:
        return 0.0
    return absolute / largest if math.isfinite(absolute) and largest else math.inf


def _is_nan(values: np.ndarray) -> np.ndarray:
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return np.zeros(values.shape, bool)
    return np.isnan(values)


def check_tolerance(text: str) -> float:
    """Reads the argument of `--tolerance`.

    Raises:
        argparse.ArgumentTypeError: if it is no number of at least 0.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value
