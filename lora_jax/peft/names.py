"""The argument `names`: from modules to paths for `load`, and back for `save`."""

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from lora_jax._core import tree_paths
from lora_jax.peft.layout import Index, Layout, Site, part_axes, part_shape
from lora_jax.peft.words import (
    Numbers,
    fill_fields,
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


NOT_GIVEN = Given("", "")


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
    """The argument `names` of `load`, from modules to weights, and of `save`, back."""

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


def find_modules(
    path: str,
    names: Names,
    shape: tuple[int, ...],
    axes: str,
    layout: Layout = "jax",
    use: str = "",
    *,
    partial: bool = False,
) -> list[Site]:
    """The modules of a leaf that `save` writes, with their sites.

    There is one for the leaf, or for each part that has a name; or one for each index on
    some of the batch axes.

    Args:
        path: of a weight.
        names: the argument of `save`.
        shape: of the weight.
        axes: the letters of its axes. The `b` may be indexes of modules.
        layout: of the weight.
        use: of the weight that is adapted; as in `Target`.
        partial: whether names of some of the indexes will do.
    """
    by_part: dict[str, list[Given]] = {}
    for given in names.of(path, use):
        by_part.setdefault(parts.canonical(given.part, shape), []).append(given)
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
    found: list[Given],
    shape: tuple[int, ...],
    axes: str,
    layout: Layout,
    partial: bool,
) -> list[Site]:
    """The modules of a leaf, or of one part of it, without the part in their sites."""
    batch = tuple(axis for axis, letter in enumerate(axes) if letter == "b")
    sizes = tuple(shape[axis] for axis in batch)
    shown = " x ".join(map(str, sizes)) or "none"
    names = [each.name for each in found]
    if not names and sizes:
        raise ValueError(
            f"the weight is a stack of {shown}, and its path does not contain the names "
            f"of the modules: give names={{'name.{{}}.of': {path!r}}}, with {{}} for each "
            "number."
        )
    names = names or [_derived(path, layout)]
    fields = found[0].fields if found else ()
    if not any(map(is_template, names)):
        modules, order = _numbered(path, names, sizes, fields, partial)
        if not modules and len(names) == 1:
            modules = {(): names[0]}
    elif len(names) == 1:
        modules, order = _fill_template(path, names[0], sizes, fields)
    else:
        raise ValueError(
            f"names has {len(names)} names for {path!r}, {names[0]!r} and others: give one "
            "template, or a name for each index."
        )
    if not modules:
        raise ValueError(
            f"names must have one module for each index of {path!r}, a stack of "
            f"{shown}, got {', '.join(names[:5])}." + _parts_hint(path, names, shape)
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


def _derived(path: str, layout: Layout) -> str:
    """The name that a path gives, without the word of its leaf.

    `layers_0` becomes `layers.0`. Trees of PyTorch keep such words, and so do paths in
    which numbers are words: `ln_1` is a name in `h/0/ln_1/scale`.
    """
    words = split_path(path, numbers_apart=False).words
    kept = layout == "torch" or any(map(str.isdecimal, words))
    return ".".join(words if kept else split_path(path).words)


def _fill_template(
    path: str, template: str, sizes: tuple[int, ...], fields: tuple[str, ...]
) -> tuple[dict[Index, str], Index]:
    """The names of a template by index, and the batch axis of each number."""
    own, texts = template_fields(template), template_parts(template)
    if len(own) > len(sizes):
        raise ValueError(
            f"the template {template!r} has {len(own)} numbers, and {path!r} has "
            f"{len(sizes)} stacked axes."
        )
    order = _order(own, fields)
    names = {}
    for index in np.ndindex(*(sizes[each] for each in order)):
        pairs = itertools.zip_longest(texts, index, fillvalue="")
        names[index] = "".join(f"{text}{number}" for text, number in pairs)
    return names, order


def _order(own: tuple[str, ...], fields: tuple[str, ...]) -> Index:
    """The batch axis that each number of a name is an index on.

    `own` are the fields of the numbers. `fields` are those that the caller gave the batch
    axes, or empty texts.
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
    partial: bool,
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


def _differing(names: list[str]) -> list[Index]:
    """The numbers in which some names differ; empty if words differ."""
    words = [split_name(name) for name in names]
    columns = [column for column in zip(*words, strict=False) if len(set(column)) > 1]
    if any(not word.isdecimal() for column in columns for word in column):
        return [() for _ in names]
    return [tuple(int(column[i]) for column in columns) for i in range(len(names))]
