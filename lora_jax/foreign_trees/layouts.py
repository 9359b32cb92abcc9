"""Where other libraries keep their adapters in a tree, and what the axes of these are."""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from lora_jax._core import checks, numerics, tree_paths
from lora_jax.layers.lora import Adapter
from lora_jax.plan.target import Target

RANK = -1
"""The rank, among the axes of a weight."""

Labels: TypeAlias = tuple[tuple[int, ...], ...]
"""For each axis of a factor, the axes of the weight that are folded into it, or `RANK`."""

_FACTOR = re.compile(r"(?:.*[/_])?lora[/_][ab]", re.IGNORECASE)
_BESIDE = re.compile(r"(?P<weight>.*[^/])_lora_(?P<factor>[ab])")
_IN_FEED_FORWARD = re.compile(
    r"(?P<weight>(?:.*/)?(?:gating_einsum|linear))_lora_(?P<factor>[ab])"
)
_IN_MODULE = re.compile(r"(?P<module>(?:.*/)?)lora_(?P<factor>[ab])")
# gemma's wrapper of a module has the name of the weight if the module has several.
_IN_CHILD = re.compile(
    r"(?P<module>(?:.*?/)??)(?:_LoRAEinsum_(?P<weight>\w+)/)?lora/(?P<factor>[ab])"
)


class Reading(NamedTuple):
    """One way to read the axes of a weight and of its factors."""

    letters: str
    """Of the axes of the weight in the plan."""
    a: Labels
    b: Labels


class Group(NamedTuple):
    """An adapter in a tree, and the weights that it may belong to."""

    name: str
    weights: tuple[str, ...]
    """The paths of floating-point leaves with two axes or more."""
    arrays: dict[str, Any]
    """`"A"` and `"B"` in the layout of the library; in a lone half, one of them."""
    leaves: tuple[str, ...]
    """The paths of the leaves that are the adapter."""
    has_scale: bool = True
    """Whether the library multiplies this adapter by a scale."""
    letters: str | None = None
    """Of the axes of the weight, if the layout knows them."""


class Place(NamedTuple):
    """What the path of a factor says. All paths are without NNX's `/value`."""

    adapter: str
    """A name that both factors of the adapter have."""
    factor: str
    weights: list[str]
    """The paths that the weight may have."""
    has_scale: bool = True


class Layout(NamedTuple):
    """The tree of a library."""

    locate: Callable[[str, list[str]], Place | None]
    """The place of a factor, from its path and the paths of all weights."""
    readings: Callable[[str, bool], Iterator[Reading]]
    """The readings of letters, for adapters with or without a scale."""
    names: str
    scale: str
    """Where the library has the scale; empty if it multiplies by none."""


def looks_like_factor(path: str) -> bool:
    """Whether the leaf at a path is named as a factor of some library."""
    return _FACTOR.fullmatch(tree_paths.without_box(path)) is not None


def is_weight(leaf: Any) -> bool:
    """Whether a leaf can have an adapter: floating point, with two axes or more."""
    return checks.is_array(leaf) and checks.is_floating(leaf.dtype) and len(leaf.shape) > 1


def find_groups(layout: Layout, leaves: Mapping[str, Any]) -> list[Group]:
    """The adapters of a tree, whole or not."""
    weights = {
        tree_paths.without_box(path): path
        for path, leaf in leaves.items()
        if is_weight(leaf) and not looks_like_factor(path)
    }
    groups: dict[str, Group] = {}
    for path in filter(looks_like_factor, leaves):
        place = layout.locate(tree_paths.without_box(path), [*weights])
        if place is None:
            continue
        known = tuple(weights[name] for name in place.weights if name in weights)
        new = Group(place.adapter, known, {}, (), place.has_scale)
        group = groups.get(place.adapter, new)
        arrays = group.arrays | {place.factor.upper(): leaves[path]}
        groups[place.adapter] = group._replace(arrays=arrays, leaves=(*group.leaves, path))
    return [*groups.values()]


def read_groups(
    rules: Layout,
    groups: list[Group],
    letters: Mapping[str, str],
    leaves: Mapping[str, Any],
) -> dict[str, tuple[Group, Reading]]:
    """Finds the weight of each adapter, and the one reading that fits the shapes.

    Raises:
        ValueError: if no reading fits, or several; or if two adapters have one weight.
    """
    read: dict[str, tuple[Group, Reading]] = {}
    wrong, unclear = [], []
    for group in groups:
        shapes = {path: tuple(leaves[path].shape) for path in group.weights}
        found = [
            (path, reading)
            for path, shape in shapes.items()
            for reading in _fitting(rules, group, shape, letters.get(path))
        ]
        factors = " and ".join(f"{k} {tuple(group.arrays[k].shape)}" for k in "AB")
        if len(found) == 1:
            path, reading = found[0]
            if path in read:
                both = tree_paths.listed([*read[path][0].leaves, *group.leaves])
                raise ValueError(f"{path!r} has two adapters: {both}.")
            read[path] = group, reading
        for path, shape in shapes.items() if len(found) != 1 else ():
            line = f"  {path!r} {shape}, {factors}"
            fits = [reading.letters for own, reading in found if own == path]
            if fits:
                ways = " or ".join(map(repr, dict.fromkeys(fits)))
                several = ", in several ways" * (len(set(fits)) < len(fits))
                unclear.append(f"{line}: {ways}{several}")
            elif not found and path in letters:
                want = _expected(rules, group, shape, letters[path])
                wrong.append(f"{line}: axes {letters[path]!r} need {want}")
            elif not found:
                wrong.append(f"{line}: no axes fit")
    if wrong:
        text = "\n".join(["factors do not fit their weights:", *wrong])
        raise ValueError(f"{text}\nCheck the layout and the axes.")
    if unclear:
        text = "\n".join(["shapes do not show the axes of weights:", *unclear])
        raise ValueError(
            f"{text}\nGive the model without adapters and its arguments, as in "
            "import_adapters(params, layout, fn, *args), or axes={path: letters}, with one "
            "letter for each axis: i (input), o (output) or b (batch). If the letters are "
            "known, write the layout as a function that returns the factors."
        )
    return read


def _fitting(
    layout: Layout, group: Group, shape: tuple[int, ...], letters: str | None
) -> list[Reading]:
    """The readings that fit the shapes of an adapter and of its weight.

    Args:
        layout: of the tree.
        group: the adapter, with both factors.
        shape: of the weight.
        letters: of the axes of the weight, or None if they are not known.
    """
    found: dict[Reading, None] = {}
    every = map("".join, itertools.product("iob", repeat=len(shape)))
    for own in [letters] if letters else every:
        if {"i", "o"} <= {*own}:
            for reading in layout.readings(own, group.has_scale):
                sides = zip((reading.a, reading.b), "AB", strict=True)
                ranks = {
                    _rank(side, shape, group.arrays[name].shape) for side, name in sides
                }
                if len(ranks) == 1 and None not in ranks:
                    found[reading] = None
    return [*found]


def _expected(layout: Layout, group: Group, shape: tuple[int, ...], letters: str) -> str:
    """The shapes of factors that fit a weight with known axes."""
    texts = []
    for reading in layout.readings(letters, group.has_scale):
        sides = []
        for labels in (reading.a, reading.b):
            sizes = ("r" if own == (RANK,) else str(_size(own, shape)) for own in labels)
            sides.append(f"({', '.join(sizes)})")
        texts.append("A {} and B {}".format(*sides))
    return ", or ".join(dict.fromkeys(texts)) or "another layout"


def rank_of(reading: Reading, shape: tuple[int, ...]) -> int:
    """The rank, from the shape of `A`."""
    return shape[reading.a.index((RANK,))]


def as_adapter(
    reading: Reading, target: Target, arrays: Mapping[str, jax.Array]
) -> Adapter:
    """An adapter `A (*batch, in, rank)`, `B (*batch, rank, out)` from that of a library.

    Values are moved and repeated. Only axes of `B` that are inputs of the weight are
    summed, in at least float32.
    """
    batch, ins, outs = target.batch_axes, target.in_axes, target.out_axes
    orders = {"A": (*batch, *ins, RANK), "B": (*batch, RANK, *outs)}
    shapes = target.adapter_shapes
    moved = {
        name: _moved(arrays[name], labels, target, orders[name]).reshape(shapes[name])
        for name, labels in (("A", reading.a), ("B", reading.b))
    }
    return {**arrays, **moved}


def _size(axes: tuple[int, ...], shape: tuple[int, ...]) -> int:
    return math.prod(shape[axis] for axis in axes)


def _rank(labels: Labels, shape: tuple[int, ...], own: tuple[int, ...]) -> int | None:
    """The rank of a factor of the shape `own`, or None if the labels do not fit it."""
    if len(own) != len(labels):
        return None
    pairs = zip(labels, own, strict=True)
    if any(axes != (RANK,) and _size(axes, shape) != size for axes, size in pairs):
        return None
    return own[labels.index((RANK,))]


def _moved(
    factor: Any, labels: Labels, target: Target, order: tuple[int, ...]
) -> jax.Array:
    """A factor with its axes unfolded and in an order; missing axes are repeated."""
    factor = jnp.asarray(factor)
    axes = [axis for own in labels for axis in own]
    sizes = {**dict(enumerate(target.shape)), RANK: target.rank}
    factor = factor.reshape([sizes[axis] for axis in axes])
    extra = tuple(place for place, axis in enumerate(axes) if axis not in order)
    if extra:
        wide = numerics.accumulation_dtype(factor.dtype)
        factor = factor.astype(wide).sum(extra)
        axes = [axis for axis in axes if axis in order]
    factor = factor.transpose([axes.index(axis) for axis in order if axis in axes])
    factor = factor.reshape([sizes[axis] if axis in axes else 1 for axis in order])
    return jnp.broadcast_to(factor, [sizes[axis] for axis in order])


def _axes(letters: str, name: str) -> tuple[int, ...]:
    return tuple(axis for axis, letter in enumerate(letters) if letter == name)


def _singly(axes: tuple[int, ...]) -> Labels:
    return tuple((axis,) for axis in axes)


def _readings_of_matrices(letters: str, has_scale: bool) -> Iterator[Reading]:
    """A (*batch, in, r) and B (*batch, r, out), as in this library."""
    ins, outs, batch = (_axes(letters, name) for name in "iob")
    front = _singly(batch)
    yield Reading(letters, (*front, ins, (RANK,)), (*front, (RANK,), outs))


def _readings_of_products(letters: str, has_scale: bool) -> Iterator[Reading]:
    """Those of `dot_general`, and those of an einsum or a convolution.

    `dot_general` has A (*batch, in, r) and B (*batch, r, out), with the axes folded (qwix)
    or not (gemma). In an einsum, A has the input and batch axes in the order of the weight,
    then the rank; B has the rank, then the output axes, and no batch axes. `scan` and
    `vmap` put further batch axes at the same place of the weight and of both factors.
    """
    ins, outs, batch = (_axes(letters, name) for name in "iob")
    rank = ((RANK,),)
    for count in range(len(batch) + 1):
        for stack in itertools.combinations(batch, count):
            inner = tuple(axis for axis in batch if axis not in stack)
            front = _singly(inner)
            for a, b in (
                ((*front, ins, *rank), (*front, *rank, outs)),
                ((*front, *_singly(ins), *rank), (*front, *rank, *_singly(outs))),
                ((*_singly(tuple(sorted(inner + ins))), *rank), (*rank, *_singly(outs))),
            ):
                if max(stack, default=0) < min(len(a), len(b)) + count:
                    yield Reading(letters, _with_stack(a, stack), _with_stack(b, stack))


def _with_stack(labels: Labels, stack: tuple[int, ...]) -> Labels:
    own = [*labels]
    for axis in stack:
        own.insert(axis, (axis,))
    return tuple(own)


def _readings_of_openpi(letters: str, has_scale: bool) -> Iterator[Reading]:
    """The rank is one input axis of the weight in `B`, and one output axis in `A`.

    Both factors have all other axes. The outputs among these are batch axes, therefore. The
    inputs among these are summed in `x @ A`, so they are summed in `B` as well.
    """
    ndim = len(letters)
    if not has_scale:  # a feed-forward module multiplies matrices, and stacks of them
        if letters[-2:] == "io" and "i" not in letters[:-2]:
            yield from _readings_of_matrices("b" * (ndim - 2) + "io", has_scale)
        return
    for lost in itertools.product(_axes(letters, "i"), _axes(letters, "o")):
        own = [*letters.replace("o", "b")]
        own[lost[1]] = "o"
        a, b = (
            tuple((RANK,) if axis == place else (axis,) for axis in range(ndim))
            for place in reversed(lost)
        )
        yield Reading("".join(own), a, b)


def _locate_beside(path: str, weights: list[str]) -> Place | None:
    found = _BESIDE.fullmatch(path)
    return found and Place(found["weight"], found["factor"], [found["weight"]])


def _locate_openpi(path: str, weights: list[str]) -> Place | None:
    if found := _IN_MODULE.fullmatch(path):
        weight = found["module"] + "w"
        return Place(weight, found["factor"], [weight])
    found = _IN_FEED_FORWARD.fullmatch(path)
    return found and Place(found["weight"], found["factor"], [found["weight"]], False)


def _locate_gemma(path: str, weights: list[str]) -> Place | None:
    found = _IN_CHILD.fullmatch(path)
    if found is None:
        return None
    module = found["module"]
    name = module + (found["weight"] or "*")
    inside = [own for own in weights if own.startswith(module)]
    inside = [own for own in inside if "/" not in own.removeprefix(module)]
    return Place(name, found["factor"], [name] if name in inside else inside)


LAYOUTS = {
    "qwix": Layout(
        _locate_beside,
        _readings_of_products,
        "'<weight>_lora_a' and '<weight>_lora_b' beside '<weight>'",
        "qwix multiplies by alpha / rank of its LoraRule or LoraProvider",
    ),
    "openpi": Layout(
        _locate_openpi,
        _readings_of_openpi,
        "'lora_a' and 'lora_b' beside 'w', and '<weight>_lora_a' and '<weight>_lora_b' "
        "beside 'gating_einsum' and 'linear'",
        "openpi multiplies by scaling_value of its LoRAConfig, alpha / rank or, with "
        "rslora=True, alpha / sqrt(rank); it is 1 for gemma_2b_lora and gemma_300m_lora",
    ),
    "gemma": Layout(
        _locate_gemma, _readings_of_products, "'lora/a' and 'lora/b' beside the weight", ""
    ),
}
OF_FUNCTION = Layout(
    lambda path, weights: None,
    _readings_of_matrices,
    "the leaves that the function returns",
    "the function does not return it",
)
