"""From the paths of weights to the names of modules: what `_names` does, backwards."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

from lora_jax.peft import _names
from lora_jax.peft._fitting import Layout
from lora_jax.peft._places import GivenPath, parse_axes

SaveNames: TypeAlias = Mapping[str, GivenPath] | Callable[[str], str] | None


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
            self._by_mask.setdefault(_names.mask(path), []).append((name, path, axes))
            self._places.setdefault(_names.mask(name), place)

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
        for name, own, axes in self._by_mask.get(_names.mask(path), ()):
            numbers = _names.numbers_in(own, path)
            if numbers is None:
                continue
            fields = _names.template_fields(own)
            if len(fields) > len(_names.template_fields(name)):
                raise ValueError(
                    f"names has {own!r} for {name!r}, which has not as many numbers {{}}."
                )
            pairs = tuple(zip(fields, numbers, strict=True))
            yield _filled_name(name, own, pairs), axes

    def has(self, path: str) -> bool:
        """Whether there is a name for a path, or for a template that it matches."""
        own = self._by_mask.get(_names.mask(path), ())
        return any(_names.numbers_in(each, path) is not None for _, each, _ in own)

    def axes(self, path: str) -> str | None:
        """The letters that the axes of a leaf are given, without names of fields."""
        own = self._by_mask.get(_names.mask(path), ())
        for _, each, axes in own:
            if axes and _names.numbers_in(each, path) is not None:
                return parse_axes(axes)[0]
        return None

    def position(self, name: str) -> int:
        """Where in the order of the caller a module comes; 0 if there is no order."""
        return self._places.get(_names.mask(name), 0)


def _filled_name(name: str, path: str, numbers: _names.Numbers) -> str:
    """A name with the numbers that the path has: by the names of fields, or in order."""
    named = {field: number for field, number in numbers if f"{{{field}}}" in path}
    for field, number in named.items():
        name = name.replace(f"{{{field}}}", str(number))
    rest = [number for field, number in numbers if field not in named]
    return _names.fill(name, rest)


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
    templates = [name for name in given if _names.is_template(name)]
    if len(given) == 1 and templates:
        return [*_filled(path, templates[0], sizes, fields)]
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
    as_they_are = _names.split_path(path, numbers_apart=False).words
    if layout == "torch" or any(map(str.isdecimal, as_they_are)):
        return [".".join(as_they_are)]
    return [".".join(_names.split_path(path).words)]


def _filled(
    path: str, template: str, sizes: tuple[int, ...], fields: tuple[str, ...]
) -> Iterator[Named]:
    """The names of a template, one for each index of some axes of a stack."""
    own = _names.template_fields(template)
    if len(own) > len(sizes):
        raise ValueError(
            f"the template {template!r} has {len(own)} numbers, and {path!r} has "
            f"{len(sizes)} stacked axes."
        )
    order = _order(own, fields)
    parts = _names.template_parts(template)
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
    lacking = [_names.lacking_fields(name, path) for name in names]
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
    words = [_names.split_name(name) for name in names]
    columns = [column for column in zip(*words, strict=False) if len(set(column)) > 1]
    if any(not word.isdecimal() for column in columns for word in column):
        return [() for _ in names]
    return [tuple(int(column[i]) for column in columns) for i in range(len(names))]
