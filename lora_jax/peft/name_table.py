"""The argument `names`, from modules to paths and back; and the table of both."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from lora_jax._core import tree_paths
from lora_jax._core.immutable import FrozenDict
from lora_jax._core.tables import format_table
from lora_jax.peft.layout import Site
from lora_jax.peft.names import (
    Numbers,
    fill_fields,
    fill_numbers,
    is_template,
    mask_numbers,
    name_fields,
    numbers_in,
    template_fields,
)
from lora_jax.plan import parts

__all__ = ["NameTable"]

GivenPath: TypeAlias = str | tuple[str, str]
"""The path of a weight, or a pair of the path and the letters of the axes."""
NamesArgument: TypeAlias = (
    Mapping[str, GivenPath] | Callable[[str], GivenPath | None] | None
)
SaveNames: TypeAlias = Mapping[str, GivenPath] | Callable[[str], str] | None
_FIELD = re.compile(r"\{(\w+)\}")


class Given(NamedTuple):
    """A module and the weight that the caller gave it, or templates of both."""

    name: str
    path: str
    """Of the leaf."""
    axes: str | None = None
    """The letters of the axes of the weight or of the part, if they are given."""
    fields: tuple[str, ...] = ()
    """For each batch axis the field of its index, or an empty text."""
    part: str = ""
    """The part of the weight that holds the module; as in `Site`, and so is `use`."""
    use: str = ""
    numbers: Numbers = ()
    """The numbers of the module's name that are not in the path."""

    @property
    def text(self) -> str:
        """The path with part and use, as the caller wrote it."""
        return self.path + self.part + (f"@{self.use}" if self.use else "")


class PathMasks:
    """Finds the paths that a template matches, and paths without fields too."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._by_mask: dict[str, list[str]] = {}
        for path in paths:
            self._by_mask.setdefault(mask_numbers(path), []).append(path)

    def match(self, template: str) -> bool:
        """Whether some path matches."""
        near = self._by_mask.get(mask_numbers(template), ())
        return any(numbers_in(template, path) is not None for path in near)


class Names:
    """The argument `names` of `load`, from modules to weights, and of `save`, back.

    Raises:
        TypeError, ValueError: if it is not valid.
    """

    def __init__(self, names: NamesArgument | SaveNames) -> None:
        if names is not None and not callable(names) and not isinstance(names, Mapping):
            raise TypeError(
                "names must be a dict from the names of modules to paths, or a function, "
                f"got {type(names).__name__}."
            )
        own = isinstance(names, Mapping)
        self._function: Any = None if own else names
        self.entries = [_parse(*item) for item in (names.items() if own else ())]
        self._by_name = {entry.name: entry for entry in self.entries}
        self._templates: dict[str, list[Given]] = {}
        self._by_path: dict[str, list[Given]] = {}
        self._places: dict[str, int] = {}
        for place, entry in enumerate(self.entries):
            mask = mask_numbers(entry.name)
            self._places.setdefault(mask, place)
            self._by_path.setdefault(mask_numbers(entry.path), []).append(entry)
            if is_template(entry.name):
                self._templates.setdefault(mask, []).append(entry)

    def find(self, name: str) -> Given | None:
        """The weight that the caller gave a module; templates of paths are filled."""
        if self._function is not None:
            value = self._function(name)
            return None if value is None else _parse(name, value)
        if name in self._by_name:
            return self._by_name[name]
        for entry in self._templates.get(mask_numbers(name), ()):
            numbers = numbers_in(entry.name, name)
            if numbers is not None:
                fields = zip(template_fields(entry.name), numbers, strict=True)
                path, left = fill_fields(entry.path, tuple(fields))
                return entry._replace(path=path, numbers=left)
        return None

    def of(self, path: str, use: str = "") -> list[Given]:
        """The modules that the caller gave a path, or templates of their names.

        Names that are given for the use of a target go before others.
        """
        if self._function is not None:
            name = self._function(f"{path}@{use}" if use else path)
            if not isinstance(name, str):
                raise TypeError(f"names must return the name of a module, got {name!r}.")
            return [Given(name, path)]
        found = [each for each in self._matching(path) if each.use in ("", use)]
        return [each for each in found if each.use == use] or found

    def _matching(self, path: str) -> Iterator[Given]:
        for entry in self._by_path.get(mask_numbers(path), ()):
            numbers = numbers_in(entry.path, path)
            if numbers is not None:
                pairs = zip(template_fields(entry.path), numbers, strict=True)
                yield entry._replace(name=_filled_name(entry, tuple(pairs)))

    def has(self, path: str) -> bool:
        """Whether a path has a name, or matches a template that has one."""
        return any(self._matching(path))

    def axes(self, path: str) -> str | None:
        """The letters that the caller gave the axes of a leaf, without names of fields."""
        return next((each.axes for each in self._matching(path) if each.axes), None)

    def position(self, name: str) -> int:
        """The position of a module in the caller's order; 0 if there is no order."""
        return self._places.get(mask_numbers(name), 0)

    def check_paths(self, paths: Collection[str]) -> None:
        """Raises unless each entry has one of some paths."""
        masks = PathMasks(paths)
        for entry in self.entries:
            if not masks.match(entry.path):
                raise ValueError(
                    f"names has {entry.path!r} for {entry.name!r}, and neither the plan "
                    "nor `replaced` has that path"
                    f"{tree_paths.nearest_hint(entry.path, paths)}."
                )


def _filled_name(entry: Given, numbers: Numbers) -> str:
    """Fills a name with the numbers of the path: by the names of fields, or in order."""
    name = entry.name
    named = {field: number for field, number in numbers if f"{{{field}}}" in entry.path}
    for field, number in named.items():
        name = name.replace(f"{{{field}}}", str(number))
    return fill_numbers(name, [n for field, n in numbers if field not in named])


def _parse(name: str, value: Any) -> Given:
    """Parses what the caller gave for a module: a path, or a path and letters of axes."""
    pair = isinstance(value, tuple | list) and len(value) == 2
    path, axes = value if pair else (value, None)
    if not isinstance(path, str) or not isinstance(axes, str | None):
        raise TypeError(
            f"names must have a path for {name!r}, or a path and the letters of its axes, "
            f"got {value!r}."
        )
    _check_fields(name, path)
    if "{" in path.rpartition("[")[-1] and "[" in path:
        raise ValueError(
            f"names has {path!r} for {name!r}: in an index, ':' stands for all layers of a "
            "stack, 'layers/qkv[:,0]', and the number of the module selects one."
        )
    base, part, use = parts.split(path)
    if axes is None:
        return Given(name, base, part=part, use=use)
    letters = _FIELD.sub("b", axes)
    fields = tuple(match[1] or "" for match in re.finditer(r"\{(\w+)\}|b", axes))
    if not {"i", "o"} <= set(letters) <= {"i", "o", "b"}:
        raise ValueError(
            f"the axes of {path!r} must be letters i, o and b, with at least one i and one "
            f"o, or a field such as {{layer}} in place of a b, got {axes!r}."
        )
    own = template_fields(name) if is_template(name) else name_fields(name)
    unknown = sorted({*fields} - {*own, ""})
    if unknown:
        raise ValueError(
            f"the axes {axes!r} of {path!r} have the field {unknown[0]!r}, and the numbers "
            f"of {name!r} are called {', '.join(map(repr, own)) or 'nothing'}."
        )
    return Given(name, base, letters, fields, part, use)


def _check_fields(name: str, path: str) -> None:
    """Raises if a path has a field that the name of the module lacks."""
    fields = template_fields(name)
    own, named = _FIELD.findall(name), _FIELD.findall(path)
    if path.count("{}") > len(fields) - len(named) or not set(named) <= set(fields):
        raise ValueError(f"names has {path!r} for {name!r}, which has fewer numbers {{}}.")
    if len(set(own)) < len(own):
        raise ValueError(f"names has {name!r}, in which two numbers have one field.")


class Row(NamedTuple):
    """A module and its weight."""

    site: Site
    shape: tuple[int, ...]
    """Of the weight."""
    given: bool = False
    """Whether more than the shape showed the axes."""


class NameTable(FrozenDict[str, str | tuple[str, str]]):
    """From the names of modules to the paths of their weights. `print` shows a table.

    Where more than the shape showed the axes of a weight, the value is a pair of the path
    and the letters of the axes, with `{layers}` for the axis of layers.
    """

    rows: tuple[Row, ...] = ()

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "NameTable":
        """Makes a table from rows."""
        by_name = {row.site.name: row for row in rows}
        table = cls(
            {
                name: (site.target, site.letters) if given else site.target
                for name, (site, _, given) in by_name.items()
            }
        )
        table.rows = tuple(by_name.values())
        return table

    def __str__(self) -> str:
        return "\n".join(format_table(_cells(self.rows)))


def _cells(rows: tuple[Row, ...]) -> Iterator[tuple[str, ...]]:
    yield "module", "path", "shape", "axes"
    for site, shape, _ in rows:
        pairs = sorted(zip(site.stack, site.indices, strict=True))
        index = f"[{', '.join(str(index) for _, index in pairs)}]" if pairs else ""
        yield site.name, site.target + index, str(shape), site.letters
