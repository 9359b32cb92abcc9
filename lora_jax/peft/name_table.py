"""The argument `names`, from modules to paths and back; and the table of both."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from lora_jax._core.immutable import FrozenDict
from lora_jax._core.tables import format_table
from lora_jax.peft.layout import Index, Layout, Reading, Site, part_axes, part_shape
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
from lora_jax.plan import parts
from lora_jax.plan.target import Target

__all__ = ["NameTable"]

GivenPath: TypeAlias = str | tuple[str, str]
"""The path of a weight, or a pair of the path and the letters of the axes."""
NamesArgument: TypeAlias = (
    Mapping[str, GivenPath] | Callable[[str], GivenPath | None] | None
)
SaveNames: TypeAlias = Mapping[str, GivenPath] | Callable[[str], str] | None
_FIELD = re.compile(r"\{(\w+)\}")


class Naming:
    """The argument `names` of `save`, which gives the modules of a path.

    Args:
        names: the argument.
    """

    def __init__(self, names: SaveNames) -> None:
        self._names = names
        self._by_mask: dict[str, list[_Entry]] = {}
        self._places: dict[str, int] = {}
        given = names if isinstance(names, Mapping) else {}
        for place, (name, value) in enumerate(given.items()):
            path, axes = (value, "") if isinstance(value, str) else value
            parse_given(name, value)
            path, part, use = parts.split(path)
            entry = _Entry(name, path, axes, part, use)
            self._by_mask.setdefault(mask_numbers(path), []).append(entry)
            self._places.setdefault(mask_numbers(name), place)

    def of(self, path: str, use: str = "") -> Iterator[tuple[str, str, str]]:
        """The names or templates of a path, each with letters of axes and a part, if given.

        Args:
            path: of the leaf.
            use: of a target. A name that is given for this use goes before others.
        """
        if self._names is None:
            return
        if not isinstance(self._names, Mapping):
            name = self._names(f"{path}@{use}" if use else path)
            if not isinstance(name, str):
                raise TypeError(f"names must return the name of a module, got {name!r}.")
            yield name, "", ""
            return
        found = [each for each in self._matching(path) if each[0].use in ("", use)]
        for entry, numbers in found:
            if entry.use != use and any(each.use == use for each, _ in found):
                continue
            fields = template_fields(entry.path)
            pairs = tuple(zip(fields, numbers, strict=True))
            yield _filled_name(entry.name, entry.path, pairs), entry.axes, entry.part

    def _matching(self, path: str) -> Iterator[tuple["_Entry", Index]]:
        """The entries for a path, each with the numbers of its template."""
        for entry in self._by_mask.get(mask_numbers(path), ()):
            numbers = numbers_in(entry.path, path)
            if numbers is not None:
                yield entry, numbers

    def has(self, path: str) -> bool:
        """Whether a path has a name, or matches a template that has one."""
        return any(self._matching(path))

    def axes(self, path: str) -> str | None:
        """The letters that the caller gave the axes of a leaf, without names of fields."""
        given = (entry.axes for entry, _ in self._matching(path) if entry.axes)
        return next((parse_axes(axes)[0] for axes in given), None)

    def position(self, name: str) -> int:
        """The position of a module in the caller's order; 0 if there is no order."""
        return self._places.get(mask_numbers(name), 0)


class _Entry(NamedTuple):
    """An entry of `names`: a name, and the leaf, axes, part and use that it is given."""

    name: str
    path: str
    axes: str
    part: str
    use: str


def _filled_name(name: str, path: str, numbers: Numbers) -> str:
    """Fills a name with the numbers of the path: by the names of fields, or in order."""
    named = {field: number for field, number in numbers if f"{{{field}}}" in path}
    for field, number in named.items():
        name = name.replace(f"{{{field}}}", str(number))
    rest = [number for field, number in numbers if field not in named]
    return fill_numbers(name, rest)


def sites_of(
    path: str, names: SaveNames | Naming, target: Target, layout: Layout = "jax"
) -> list[Site]:
    """The modules of the leaf of a target, or of more of the leaf than the target.

    Args:
        path: of the leaf.
        names: the argument of `save`.
        target: of the plan.
        layout: of the weight.

    Raises:
        ValueError: if there is no name, or there are fewer names than indexes.
    """
    shape, axes, use = target.shape, target.axes, target.use
    return find_modules(path, names, shape, axes, layout, use, partial=target.part != "")


def find_modules(
    path: str,
    names: SaveNames | Naming,
    shape: tuple[int, ...],
    axes: str,
    layout: Layout = "jax",
    use: str = "",
    *,
    partial: bool = False,
) -> list[Site]:
    """The modules of a leaf, with their sites.

    Args:
        path: of a weight.
        names: the argument of `save`.
        shape: of the weight.
        axes: the letters of its axes. The `b` may be indexes of modules.
        layout: of the weight.
        use: of the weight that is adapted; as in `Target`.
        partial: whether names of some of the indexes will do.

    Returns:
        One module for the leaf, or for each part that has a name; or one for each index on
        some of the batch axes.

    Raises:
        ValueError: if there is no name, or there are fewer names than indexes.
    """
    naming = names if isinstance(names, Naming) else Naming(names)
    by_part: dict[str, list[tuple[str, str]]] = {}
    for name, letters, part in naming.of(path, use):
        own = by_part.setdefault(parts.canonical(part, shape), [])
        own.append((name, letters))
    for one, other in itertools.combinations(by_part, 2):
        if parts.overlap(one, other, shape):
            raise ValueError(
                f"names has the parts {one or 'all'} and {other or 'all'} of {path!r}, "
                "which have entries in common."
            )
    sites = []
    for part, found in (by_part or {"": []}).items():
        own_shape, own_axes = part_shape(part, shape), part_axes(part, shape, axes)
        own = _part_modules(path, found, own_shape, own_axes, layout, partial)
        sites += [site._replace(part=part, use=use) for site in own]
    return sites


def _part_modules(
    path: str,
    found: list[tuple[str, str]],
    shape: tuple[int, ...],
    axes: str,
    layout: Layout,
    partial: bool,
) -> list[Site]:
    """The modules of a leaf, or of one part of it, without the part in their sites.

    Args:
        path: of the leaf.
        found: the names of the modules, each with the letters of axes or an empty text.
        shape: of the part, and so are `axes`.
        axes: as in `find_modules`, and so are `layout` and `partial`.
        layout: of the weight.
        partial: whether names of some of the indexes will do.
    """
    batch = tuple(axis for axis, letter in enumerate(axes) if letter == "b")
    sizes = tuple(shape[axis] for axis in batch)
    given = [name for name, _ in found] or _derived(path, sizes, layout)
    shown = " x ".join(map(str, sizes)) or "none"
    if not given:
        raise ValueError(
            f"the weight is a stack of {shown}, and its path does not contain the names "
            f"of the modules: give names={{'name.{{}}.of': {path!r}}}, with {{}} for each "
            "number."
        )
    fields = parse_axes(found[0][1])[1] if found else ()
    templates = [name for name in given if is_template(name)]
    if len(given) == 1 and templates:
        modules, order = _fill_template(path, templates[0], sizes, fields)
    elif templates:
        raise ValueError(
            f"names has {len(given)} names for {path!r}, {given[0]!r} and others: give one "
            "template, or a name for each index."
        )
    else:
        modules, order = _numbered(path, given, sizes, fields, partial)
        if not modules and len(given) == 1:
            modules = {(): given[0]}
    if not modules:
        raise ValueError(
            f"names must have one module for each index of {path!r}, a stack of "
            f"{shown}, got {', '.join(given[:5])}." + _parts_hint(path, given, shape)
        )
    stack = tuple(batch[each] for each in order)
    return [
        Site(name, name, path, axes, index, stack if index else ())
        for index, name in modules.items()
    ]


def _parts_hint(path: str, names: list[str], shape: tuple[int, ...]) -> str:
    """The end of an error about modules that may be parts of a fused weight."""
    axis = next((axis for axis, n in enumerate(shape) if n == len(names)), None)
    if axis is None:
        return ""
    index = ":," * axis
    written = (f"{name!r}: '{path}[{index}{i}]'" for i, name in enumerate(names))
    return f" If they are parts of a fused weight, give names={{{', '.join(written)}}}."


def _derived(path: str, sizes: tuple[int, ...], layout: Layout) -> list[str]:
    """The name that a path gives, without the word of its leaf; empty for a stack.

    `layers_0` becomes `layers.0`. Trees of PyTorch keep such words, and so do paths in
    which numbers are words: `ln_1` is a name in `h/0/ln_1/scale`.
    """
    if sizes:
        return []
    as_they_are = split_path(path, numbers_apart=False).words
    if layout == "torch" or any(map(str.isdecimal, as_they_are)):
        return [".".join(as_they_are)]
    return [".".join(split_path(path).words)]


def _fill_template(
    path: str, template: str, sizes: tuple[int, ...], fields: tuple[str, ...]
) -> tuple[dict[Index, str], Index]:
    """The names of a template by index, and the batch axis of each number."""
    own = template_fields(template)
    if len(own) > len(sizes):
        raise ValueError(
            f"the template {template!r} has {len(own)} numbers, and {path!r} has "
            f"{len(sizes)} stacked axes."
        )
    order = _order(own, fields)
    indexes = np.ndindex(*(sizes[each] for each in order))
    return {
        index: "".join(_filled(template_parts(template), index)) for index in indexes
    }, order


def _filled(parts: list[str], index: Index) -> Iterator[str]:
    for part, number in itertools.zip_longest(parts, index, fillvalue=""):
        yield f"{part}{number}"


def _order(own: tuple[str, ...], fields: tuple[str, ...]) -> tuple[int, ...]:
    """The batch axis that each number of a name is an index on.

    Args:
        own: the fields of the numbers.
        fields: the field that the caller gave each batch axis, or an empty text.

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


def _numbered(
    path: str,
    names: list[str],
    sizes: tuple[int, ...],
    fields: tuple[str, ...],
    partial: bool = False,
) -> tuple[dict[Index, str], Index]:
    """Names of single modules by the numbers in them, if these are indexes; else empty.

    The numbers are those that the path lacks, as in `load`, or else those in which the
    names differ. The batch axis of each number comes second. Names of some indexes will do
    if `partial` is true.
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
        every = [*np.ndindex(*(sizes[each] for each in ordered))]
        if sorted(indices) == every or (partial and {*indices} <= {*every}):
            return dict(sorted(found.items())), ordered
    return {}, ()


def _differing(names: list[str]) -> list[tuple[int, ...]]:
    """The numbers in which some names differ; empty if words differ."""
    words = [split_name(name) for name in names]
    columns = [column for column in zip(*words, strict=False) if len(set(column)) > 1]
    if any(not word.isdecimal() for column in columns for word in column):
        return [() for _ in names]
    return [tuple(int(column[i]) for column in columns) for i in range(len(names))]


class Given(NamedTuple):
    """The weight that the caller gave a module."""

    path: str
    numbers: Numbers = ()
    """The numbers of the module's name that are not in the path."""
    axes: str | None = None
    """The letters of the axes of the weight or of the part, if they are given."""
    fields: tuple[str, ...] = ()
    """For each batch axis the field of its index, or an empty text."""
    part: str = ""
    """The part of the weight that holds the module; as in `Site`, and so is `use`."""
    use: str = ""


def by_mask(texts: Iterable[str], *, all_of_them: bool = False) -> dict[str, list[str]]:
    """Groups templates, or all texts, by their masks."""
    found: dict[str, list[str]] = {}
    for text in texts:
        if isinstance(text, str) and (all_of_them or is_template(text)):
            found.setdefault(mask_numbers(text), []).append(text)
    return found


def parse_given(name: str, value: Any) -> Given:
    """Parses what the caller gave for a module: a path, or a path and letters of axes."""
    path, axes = (
        value if isinstance(value, tuple | list) and len(value) == 2 else (value, None)
    )
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
    if axes is None:
        return Given(path)
    letters, fields = parse_axes(axes)
    if not {"i", "o"} <= set(letters) <= {"i", "o", "b"}:
        raise ValueError(
            f"the axes of {path!r} must be letters i, o and b, with at least one i and one "
            f"o, or a field such as {{layer}} in place of a b, got {axes!r}."
        )
    unknown = sorted({field for field in fields if field} - {*_fields_of(name)})
    if unknown:
        raise ValueError(
            f"the axes {axes!r} of {path!r} have the field {unknown[0]!r}, and the numbers "
            f"of {name!r} are called {', '.join(map(repr, _fields_of(name))) or 'nothing'}."
        )
    return Given(path, (), letters, fields)


def parse_axes(axes: str) -> tuple[str, tuple[str, ...]]:
    """The letters of axes, and for each `b` its field, or an empty text."""
    letters = _FIELD.sub("b", axes)
    fields = (match[1] or "" for match in re.finditer(r"\{(\w+)\}|b", axes))
    return letters, tuple(fields)


def _fields_of(name: str) -> tuple[str, ...]:
    if is_template(name):
        return template_fields(name)
    return name_fields(name)


def _check_fields(name: str, path: str) -> None:
    """Raises if a path has a field that the name of the module lacks."""
    fields = template_fields(name)
    named = [match[1] for match in _FIELD.finditer(path)]
    if path.count("{}") > len(fields) - len(named) or not set(named) <= set(fields):
        raise ValueError(f"names has {path!r} for {name!r}, which has fewer numbers {{}}.")
    own = [match[1] for match in _FIELD.finditer(name)]
    if len(set(own)) < len(own):
        raise ValueError(f"names has {name!r}, in which two numbers have one field.")


class Row(NamedTuple):
    """A module and its weight."""

    module: str
    """The name of the module in the model."""
    path: str
    indices: Index
    shape: tuple[int, ...]
    axes: str
    given: bool = False
    """Whether more than the shape showed the axes."""
    stack: Index = ()
    """The axis of each index."""
    fields: tuple[str, ...] = ()
    """The field of each index."""

    @property
    def letters(self) -> str:
        """The letters of the axes, with fields if several axes have an index."""
        return Reading(self.axes, self.stack).fields(self.fields)


class NameTable(FrozenDict[str, str | tuple[str, str]]):
    """From the names of modules to the paths of their weights. `print` shows a table.

    Where more than the shape showed the axes of a weight, the value is a pair of the path
    and the letters of the axes, with `{layers}` for the axis of layers.
    """

    rows: tuple[Row, ...] = ()

    @classmethod
    def of(cls, rows: Mapping[str, Row]) -> "NameTable":
        """Makes a table from rows."""
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
