"""What the caller says about names: from modules to paths, and from paths to modules."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from lora_jax._core.immutable import FrozenDict
from lora_jax._core.tables import format_table
from lora_jax.peft.layout import Layout, Reading
from lora_jax.peft.names import (
    Numbers,
    fill_numbers,
    is_template,
    lacking_fields,
    mask_numbers,
    name_fields,
    numbers_in,
    split_name,
    split_path,
    template_fields,
    template_parts,
)

__all__ = ["NameTable"]

GivenPath: TypeAlias = str | tuple[str, str]
"""The path of a weight, or that and the letters of its axes."""
NamesArgument: TypeAlias = (
    Mapping[str, GivenPath] | Callable[[str], GivenPath | None] | None
)
SaveNames: TypeAlias = Mapping[str, GivenPath] | Callable[[str], str] | None
_FIELD = re.compile(r"\{(\w+)\}")


class Named(NamedTuple):
    """A module that a weight, or one index of a stack of weights, belongs to."""

    name: str
    indices: tuple[int, ...]
    order: tuple[int, ...] = ()
    """Which of the batch axes each index is of; empty for the first ones, in order."""

    @property
    def stack(self) -> tuple[int, ...]:
        """Which of the batch axes each index is of."""
        return self.order or tuple(range(len(self.indices)))


class Naming:
    """What the caller says about the names of modules, to look paths up in.

    Args:
        names: as `save` takes it.
    """

    def __init__(self, names: SaveNames) -> None:
        self._names = names
        self._by_mask: dict[str, list[tuple[str, str, str]]] = {}
        self._places: dict[str, int] = {}
        given = names if isinstance(names, Mapping) else {}
        for place, (name, value) in enumerate(given.items()):
            path, axes = (value, "") if isinstance(value, str) else value
            self._by_mask.setdefault(mask_numbers(path), []).append((name, path, axes))
            self._places.setdefault(mask_numbers(name), place)

    def of(self, path: str) -> Iterator[tuple[str, str]]:
        """The names or templates for a path, each with the letters of axes, if given."""
        if self._names is None:
            return
        if not isinstance(self._names, Mapping):
            name = self._names(path)
            if not isinstance(name, str):
                raise TypeError(f"names must return the name of a module, got {name!r}.")
            yield name, ""
            return
        for name, own, axes in self._by_mask.get(mask_numbers(path), ()):
            numbers = numbers_in(own, path)
            if numbers is None:
                continue
            fields = template_fields(own)
            if len(fields) > len(template_fields(name)):
                raise ValueError(
                    f"names has {own!r} for {name!r}, which has not as many numbers {{}}."
                )
            pairs = tuple(zip(fields, numbers, strict=True))
            yield _filled_name(name, own, pairs), axes

    def has(self, path: str) -> bool:
        """Whether there is a name for a path, or for a template that it matches."""
        own = self._by_mask.get(mask_numbers(path), ())
        return any(numbers_in(each, path) is not None for _, each, _ in own)

    def axes(self, path: str) -> str | None:
        """The letters that the axes of a leaf are given, without names of fields."""
        own = self._by_mask.get(mask_numbers(path), ())
        for _, each, axes in own:
            if axes and numbers_in(each, path) is not None:
                return parse_axes(axes)[0]
        return None

    def position(self, name: str) -> int:
        """Where in the order of the caller a module comes; 0 if there is no order."""
        return self._places.get(mask_numbers(name), 0)


def _filled_name(name: str, path: str, numbers: Numbers) -> str:
    """A name with the numbers that the path has: by the names of fields, or in order."""
    named = {field: number for field, number in numbers if f"{{{field}}}" in path}
    for field, number in named.items():
        name = name.replace(f"{{{field}}}", str(number))
    rest = [number for field, number in numbers if field not in named]
    return fill_numbers(name, rest)


def names_of(
    path: str,
    names: SaveNames | Naming,
    sizes: tuple[int, ...],
    layout: Layout = "jax",
) -> list[Named]:
    """The modules of a leaf.

    Args:
        path: of a weight.
        names: what the caller gave.
        sizes: of the batch axes of the weight.
        layout: of the weight.

    Returns:
        One module for the leaf; or one for each index in some of its batch axes.

    Raises:
        ValueError: if there is no name, or there are not as many as indexes.
    """
    naming = names if isinstance(names, Naming) else Naming(names)
    found = [*naming.of(path)]
    given = [name for name, _ in found] or _derived(path, sizes, layout)
    if not given:
        raise ValueError(
            f"the weight is a stack of {' x '.join(map(str, sizes))}, and its path does "
            "not say what the module of each is called: give names={'name.{}.of': "
            f"{path!r}}}, with {{}} for each number."
        )
    fields = parse_axes(found[0][1])[1] if found else ()
    templates = [name for name in given if is_template(name)]
    if len(given) == 1 and templates:
        return [*_fill_template(path, templates[0], sizes, fields)]
    if templates:
        raise ValueError(
            f"names has {len(given)} names for {path!r}, {given[0]!r} and others: give one "
            "template, or a name for each index."
        )
    numbered = _numbered(path, given, sizes, fields)
    if numbered:
        return numbered
    if len(given) == 1:
        return [Named(given[0], ())]
    raise ValueError(
        f"names must have one module for each index of {path!r}, a stack of "
        f"{' x '.join(map(str, sizes)) or 'none'}, got {', '.join(given[:5])}."
    )


def _derived(path: str, sizes: tuple[int, ...], layout: Layout) -> list[str]:
    """The name that a path is without the word of its leaf, if it is no stack.

    `layers_0` becomes `layers.0`, but in trees of torch, and in paths with numbers that
    are words, `h/0/ln_1/scale`: there `ln_1` is a name.
    """
    if sizes:
        return []
    as_they_are = split_path(path, numbers_apart=False).words
    if layout == "torch" or any(map(str.isdecimal, as_they_are)):
        return [".".join(as_they_are)]
    return [".".join(split_path(path).words)]


def _fill_template(
    path: str, template: str, sizes: tuple[int, ...], fields: tuple[str, ...]
) -> Iterator[Named]:
    """The names of a template, one for each index of some axes of a stack."""
    own = template_fields(template)
    if len(own) > len(sizes):
        raise ValueError(
            f"the template {template!r} has {len(own)} numbers, and {path!r} has "
            f"{len(sizes)} stacked axes."
        )
    order = _order(own, fields)
    parts = template_parts(template)
    for indices in np.ndindex(*(sizes[each] for each in order)):
        words = (f"{part}{number}" for part, number in zip(parts, indices, strict=False))
        yield Named("".join(words) + parts[-1], indices, _unless_first(order))


def _order(own: tuple[str, ...], fields: tuple[str, ...]) -> tuple[int, ...]:
    """Which of the batch axes each number of a name is of.

    Args:
        own: what the numbers are called.
        fields: what the caller calls the batch axes; empty texts for those without.

    Raises:
        ValueError: if some of the numbers are named, and not all.
    """
    if not any(fields):
        return tuple(range(len(own)))
    if not set(own) <= set(fields):
        raise ValueError(
            f"the axes name the indexes {', '.join(filter(None, fields))}, and the numbers "
            f"of the module are called {', '.join(own)}: name the axis of each."
        )
    return tuple(fields.index(field) for field in own)


def _unless_first(order: tuple[int, ...]) -> tuple[int, ...]:
    return () if order == tuple(range(len(order))) else order


def _numbered(
    path: str, names: list[str], sizes: tuple[int, ...], fields: tuple[str, ...]
) -> list[Named]:
    """Names of single modules, with numbers in them as indexes; none if those do not fit.

    The numbers are those that the path lacks, which `load` takes, or else those in which
    the names differ.
    """
    lacking = [lacking_fields(name, path) for name in names]
    own = tuple(field for field, _ in lacking[0])
    order = _order(own, fields) if own else ()
    by_path = [tuple(number for _, number in each) for each in lacking]
    for indices in (by_path, _differing(names)):
        found = dict(zip(indices, names, strict=True))
        count = len(indices[0])
        ordered = order if count == len(order) else tuple(range(count))
        if not count or count > len(sizes) or len({*map(len, indices)}) > 1:
            continue
        if sorted(indices) == [*np.ndindex(*(sizes[each] for each in ordered))]:
            first = _unless_first(ordered)
            return [Named(found[index], index, first) for index in sorted(found)]
    return []


def _differing(names: list[str]) -> list[tuple[int, ...]]:
    """The numbers in which some names differ; nothing if words do."""
    words = [split_name(name) for name in names]
    columns = [column for column in zip(*words, strict=False) if len(set(column)) > 1]
    if any(not word.isdecimal() for column in columns for word in column):
        return [() for _ in names]
    return [tuple(int(column[i]) for column in columns) for i in range(len(names))]


class Given(NamedTuple):
    """What the caller says of a module."""

    path: str
    numbers: Numbers = ()
    """Of the module's name, those that the path did not take."""
    axes: str | None = None
    """The letters of the axes of the weight, if they are given."""
    fields: tuple[str, ...] = ()
    """For each batch axis the name of the field that is its index, or an empty text."""


def by_mask(texts: Iterable[str], *, all_of_them: bool = False) -> dict[str, list[str]]:
    """Templates, or all of some texts, by their masks."""
    found: dict[str, list[str]] = {}
    for text in texts:
        if isinstance(text, str) and (all_of_them or is_template(text)):
            found.setdefault(mask_numbers(text), []).append(text)
    return found


def parse_given(name: str, value: Any) -> Given:
    """What the caller gave for a module: a path, and perhaps the letters of its axes."""
    path, axes = (
        value if isinstance(value, tuple | list) and len(value) == 2 else (value, None)
    )
    if not isinstance(path, str) or not isinstance(axes, str | None):
        raise TypeError(
            f"names must have a path for {name!r}, or a path and the letters of its axes, "
            f"got {value!r}."
        )
    _check_fields(name, path)
    if axes is None:
        return Given(path)
    letters, fields = parse_axes(axes)
    if not {"i", "o"} <= set(letters) <= {"i", "o", "b"}:
        raise ValueError(
            f"the axes of {path!r} must be letters i, o and b, with at least one i and one "
            f"o, and a field such as {{layer}} for a b that is its index, got {axes!r}."
        )
    unknown = sorted({field for field in fields if field} - {*_fields_of(name)})
    if unknown:
        raise ValueError(
            f"the axes {axes!r} of {path!r} have the field {unknown[0]!r}, and the numbers "
            f"of {name!r} are called {', '.join(map(repr, _fields_of(name))) or 'nothing'}."
        )
    return Given(path, (), letters, fields)


def parse_axes(axes: str) -> tuple[str, tuple[str, ...]]:
    """The letters of axes, and for each `b` the field that it was given as, if any."""
    letters = _FIELD.sub("b", axes)
    fields = (match[1] or "" for match in re.finditer(r"\{(\w+)\}|b", axes))
    return letters, tuple(fields)


def _fields_of(name: str) -> tuple[str, ...]:
    if is_template(name):
        return template_fields(name)
    return name_fields(name)


def _check_fields(name: str, path: str) -> None:
    """Raises unless a path takes only what the name of a module has."""
    fields = template_fields(name)
    named = [match[1] for match in _FIELD.finditer(path)]
    if path.count("{}") > len(fields) - len(named) or not set(named) <= set(fields):
        raise ValueError(
            f"names has {path!r} for {name!r}, which has not as many numbers {{}}."
        )
    own = [match[1] for match in _FIELD.finditer(name)]
    if len(set(own)) < len(own):
        raise ValueError(f"names has {name!r}, in which two numbers have one field.")


class Row(NamedTuple):
    """A module and its weight."""

    module: str
    path: str
    indices: tuple[int, ...]
    shape: tuple[int, ...]
    axes: str
    given: bool = False
    """Whether more than the shape said what the axes are."""
    stack: tuple[int, ...] = ()
    """The axis of each index."""
    fields: tuple[str, ...] = ()
    """What the number in the name that is each index is called."""

    @property
    def letters(self) -> str:
        """The axes, with the names of the numbers that are indexes of several."""
        return Reading(self.axes, self.stack).fields(self.fields)


class NameTable(FrozenDict[str, str | tuple[str, str]]):
    """From the names of modules to the paths of their weights. `print` shows a table.

    Where more than the shapes of weights says what their axes are, a value is the pair of
    a path and the letters of its axes, `{layers}` for the axis that is the index of layers.
    """

    rows: tuple[Row, ...] = ()

    @classmethod
    def of(cls, rows: Mapping[str, Row]) -> "NameTable":
        """A table of some rows."""
        table = cls(
            {
                name: (row.path, row.letters) if row.given else row.path
                for name, row in rows.items()
            }
        )
        table.rows = tuple(rows.values())
        return table

    def __str__(self) -> str:
        return "\n".join(format_table(_cells(self.rows)))


def _cells(rows: tuple[Row, ...]) -> Iterator[tuple[str, ...]]:
    yield "module", "path", "shape", "axes"
    for row in rows:
        pairs = sorted(zip(row.stack, row.indices, strict=True))
        index = f"[{', '.join(str(index) for _, index in pairs)}]" if pairs else ""
        yield row.module, row.path + index, str(row.shape), row.letters
