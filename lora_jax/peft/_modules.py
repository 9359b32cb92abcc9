"""From the paths of weights to the names of modules: what `_names` does, backwards."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

from lora_jax.peft import _names
from lora_jax.peft._fitting import Layout

Given: TypeAlias = str | tuple[str, str]
SaveNames: TypeAlias = Mapping[str, Given] | Callable[[str], str] | None


class Named(NamedTuple):
    """A module that a weight, or one index of a stack of weights, belongs to."""

    name: str
    indices: tuple[int, ...]


def names_of(
    path: str, names: SaveNames, sizes: tuple[int, ...], layout: Layout = "jax"
) -> list[Named]:
    """The modules of a leaf.

    Args:
        path: of a weight.
        names: what the caller gave.
        sizes: of the batch axes of the weight.
        layout: of the weight.

    Returns:
        One module for the leaf; or one for each index in its first batch axes.

    Raises:
        ValueError: if there is no name, or there are not as many as indexes.
    """
    given = [*_given(path, names)] or _derived(path, sizes, layout)
    if not given:
        raise ValueError(
            f"the weight is a stack of {' x '.join(map(str, sizes))}, and its path does "
            "not say what the module of each is called: give names={'name.{}.of': "
            f"{path!r}}}, with {{}} for each number."
        )
    templates = [name for name in given if "{}" in name]
    if len(given) == 1 and templates:
        return [*_filled(path, templates[0], sizes)]
    if templates:
        raise ValueError(
            f"names has {len(given)} names for {path!r}, {given[0]!r} and others: give one "
            "template, or a name for each index."
        )
    numbered = _numbered(path, given, sizes)
    if numbered:
        return numbered
    if len(given) == 1:
        return [Named(given[0], ())]
    raise ValueError(
        f"names must have one module for each index of {path!r}, a stack of "
        f"{' x '.join(map(str, sizes)) or 'none'}, got {', '.join(given[:5])}."
    )


def _given(path: str, names: SaveNames) -> Iterator[str]:
    """What `names` has for a path: names or templates."""
    if names is None:
        return
    if not isinstance(names, Mapping):
        name = names(path)
        if not isinstance(name, str):
            raise TypeError(f"names must return the name of a module, got {name!r}.")
        yield name
        return
    for name, value in names.items():
        own = value if isinstance(value, str) else value[0]
        numbers = _names.numbers_in(own, path)
        if numbers is None:
            continue
        if len(numbers) > name.count("{}"):
            raise ValueError(
                f"names has {own!r} for {name!r}, which has not as many numbers {{}}."
            )
        yield _names.fill(name, numbers)


def is_given(path: str, names: SaveNames) -> bool:
    """Whether `names` says what the module of a leaf is called."""
    return any(True for _ in _given(path, names))


def position(name: str, names: SaveNames) -> int:
    """Where in `names` a module comes; 0 if there is no order."""
    given = list(names) if isinstance(names, Mapping) else []
    return next((i for i, key in enumerate(given) if _is_of(name, key)), 0)


def _is_of(name: str, key: str) -> bool:
    return name == key or _names.numbers_in(key, name) is not None


def given_axes(path: str, names: SaveNames) -> str | None:
    """The letters that `names` gives the axes of a leaf."""
    values = names.values() if isinstance(names, Mapping) else ()
    return next((v[1] for v in values if not isinstance(v, str) and v[0] == path), None)


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


def _filled(path: str, template: str, sizes: tuple[int, ...]) -> Iterator[Named]:
    """The names of a template, one for each index of the first axes of a stack."""
    count = template.count("{}")
    if count > len(sizes):
        raise ValueError(
            f"the template {template!r} has {count} numbers, and {path!r} has "
            f"{len(sizes)} stacked axes."
        )
    for indices in np.ndindex(*sizes[:count]):
        yield Named(template.format(*indices), indices)


def _numbered(path: str, names: list[str], sizes: tuple[int, ...]) -> list[Named]:
    """Names of single modules, with numbers in them as indexes; none if those do not fit.

    The numbers are those that the path lacks, which `load` takes, or else those in which
    the names differ.
    """
    for indices in ([_names.lacking(name, path) for name in names], _differing(names)):
        found = dict(zip(indices, names, strict=True))
        count = len(indices[0])
        if count and sorted(indices) == [*np.ndindex(*sizes[:count])]:
            return [Named(found[index], index) for index in sorted(found)]
    return []


def _differing(names: list[str]) -> list[tuple[int, ...]]:
    """The numbers in which some names differ; nothing if words do."""
    words = [_names.split_name(name) for name in names]
    columns = [column for column in zip(*words, strict=False) if len(set(column)) > 1]
    if any(not word.isdecimal() for column in columns for word in column):
        return [() for _ in names]
    return [tuple(int(column[i]) for column in columns) for i in range(len(names))]
