"""Where arrays belong that a checkpoint holds whole: saved modules and biases."""

import contextlib
import itertools
from collections.abc import Mapping
from typing import NamedTuple

from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.keys import Dims
from lora_jax.peft.layout import (
    KERNEL,
    SWAPPED,
    Index,
    has_room,
    readings,
    shared_ways,
    size_of,
)
from lora_jax.peft.leaves import Places, Problems
from lora_jax.peft.names import (
    BIAS,
    HEADS,
    Numbers,
    is_embedding,
    lacking_fields,
    last_word,
    name_indices,
    split_path,
)


class Way(NamedTuple):
    """One way in which an array of a checkpoint may lie in a leaf."""

    form: str
    """The letters of a matrix's axes, without those of a stack; `KERNEL` for a kernel of a
    convolution that is turned round; empty if the array lies as in torch."""
    stack: tuple[int, ...] = ()
    """The axis of each number in the module's name that is an index of the leaf."""


class Spot(NamedTuple):
    """Where an array of a checkpoint belongs."""

    name: str
    """Of the parameter: `"score.weight"`."""
    path: str
    numbers: Numbers
    ways: tuple[Way, ...]
    turned: tuple[Way, ...] = ()
    """Further ways, if the leaf lies the other way round."""

    @property
    def indices(self) -> Index:
        """The numbers in the name that are indexes of the leaf."""
        return tuple(number for _, number in self.numbers)


def find_spots(
    places: Places,
    shapes: Mapping[str, tuple[int, ...]],
    problems: Problems | None = None,
) -> dict[str, Spot]:
    """Where arrays of a checkpoint belong, each with the one way in which it lies there.

    Args:
        places: where to look.
        shapes: of the arrays, by the names of the parameters.
        problems: what takes note of arrays that have no place, or more than one.

    Raises:
        CheckpointError: of these, if there is nothing that takes note of them.
    """
    collecting = problems.collecting if problems else contextlib.nullcontext
    by_path: dict[str, list[Spot]] = {}
    for name, shape in shapes.items():
        with collecting():
            spot = find_spot(places, name, shape)
            by_path.setdefault(spot.path, []).append(spot)
    settled: dict[str, Spot] = {}
    for spots in by_path.values():
        with collecting():
            way = _one_way(places, spots)
            settled |= {spot.name: spot._replace(ways=(way,)) for spot in spots}
    return {name: settled[name] for name in shapes if name in settled}


def find_spot(places: Places, name: str, shape: tuple[int, ...]) -> Spot:
    """Where an array of a checkpoint belongs.

    Args:
        places: where to look.
        name: of the parameter: `"score.weight"`.
        shape: of the array.

    Raises:
        CheckpointError: if there is no such leaf, or more than one.
    """
    module, _, last = name.rpartition(".")
    for key in (name, module):
        given = places.given(key)
        if given is not None:
            path = given.path
            if key == module and last == BIAS:
                path = sibling_bias(places, name, path)
            either = dict.fromkeys([given.numbers, lacking_fields(module, path), ()])
            spots = [
                _ways(places, name, path, numbers, shape, given.axes or "")
                for numbers in either
            ]
            fitting = [spot for spot in spots if spot.ways]
            if not fitting:
                raise _misfit(places, name, path, shape)
            return fitting[0]
    words = split_path(name)
    found = places.search(words.words, (words.leaf,))
    fitting = []
    for path, indices in found:
        numbers = name_indices(module, path, indices)
        spot = _ways(places, name, path, numbers, shape)
        fitting += [spot] if spot.ways else []
    if len(fitting) > 1:
        raise CheckpointError(
            f"{name!r} may be any of {', '.join(repr(each.path) for each in fitting[:8])}: "
            f"give names={{{name!r}: path}}."
        )
    if not fitting:
        error = places.not_found(name, found, f"a leaf of the shape {shape}")
        if not found and last_word(module) in HEADS:
            error = CheckpointError(
                f"{error} If the model has one leaf for its embedding and its output head "
                "(tied), the head was trained apart from it: give params with a leaf for "
                "each, and a function that uses both."
            )
        raise error
    return fitting[0]


def bias_spot(
    places: Places, module: str, path: str, numbers: Numbers, shape: tuple[int, ...]
) -> Spot:
    """Where the bias of a module's adapter belongs, in the bias of its layer.

    Raises:
        CheckpointError: if it does not fit.
    """
    spot = _ways(places, f"{module}.bias", path, numbers, shape)
    if not spot.ways:
        raise CheckpointError(
            f"{module!r} has a bias of {size_of(shape)} entries, and {path!r} has the "
            f"shape {places.shape(path)}: it is no bias of that layer."
        )
    return spot._replace(ways=(_one_way(places, [spot]),))


def _misfit(
    places: Places, name: str, path: str, shape: tuple[int, ...]
) -> CheckpointError:
    return CheckpointError(
        f"{name!r} has the shape {shape}, and {path!r} has {places.shape(path)}"
        f"{places.axes_of(path)}: was the model resized (its vocabulary, its classes) "
        "before it was trained? Give params of that size."
    )


def _ways(
    places: Places,
    name: str,
    path: str,
    numbers: Numbers,
    shape: tuple[int, ...],
    axes: str = "",
) -> Spot:
    """The ways in which an array lies in a leaf; none if it does not fit."""
    own, known = places.shape(path), axes or places.known.axes.get(path, "")
    if len(known) != len(own):
        known = ""
    stacked = "b" if known.count("b") >= len(numbers) else "b?"
    ways: dict[object, Way] = {}
    turned: dict[object, Way] = {}
    indices = [number for _, number in numbers]
    for stack in itertools.permutations(range(len(own)), len(numbers)):
        if not has_room(own, stack, indices) or any(
            known[axis] not in stacked for axis in stack if known
        ):
            continue
        rest = tuple(n for axis, n in enumerate(own) if axis not in stack)
        letters = "".join(x for axis, x in enumerate(known) if axis not in stack)
        key = tuple(axis if own[axis] > 1 else None for axis in stack)
        forms = _forms(places, name, path, rest, shape, letters)
        for found, form in zip((ways, turned), forms, strict=False):
            found.setdefault(key, Way(form, stack))
    count = len(numbers)
    first = {key: way for key, way in ways.items() if max(way.stack, default=0) < count}
    if count > 1 and first:  # several indexes are of the first axes, if that fits
        ways = first
        turned = {key: way for key, way in turned.items() if key in first}
    return Spot(name, path, numbers, tuple(ways.values()), tuple(turned.values()))


def _forms(
    places: Places,
    name: str,
    path: str,
    rest: tuple[int, ...],
    shape: tuple[int, ...],
    known: str,
) -> list[str]:
    """The form of an array in a leaf, and that which it may have as well; or none."""
    if len(shape) < 2:
        return [""] if size_of(rest) == size_of(shape) and (shape or not rest) else []
    if places.given_layout == "torch" and not known:
        return [""] if shape == rest else []
    if len(shape) > 2:
        moved = (*shape[2:], shape[1], shape[0])
        forms = [KERNEL] if moved == rest else []
        forms += [""] if shape == rest else []
        if known.startswith("o"):
            forms.reverse()
        settled = bool(known)
    else:
        forms, settled = _matrix_forms(places, name, path, rest, shape, known)
    open_ = places.given_layout is None and not settled
    return forms if open_ and not places.lies_in_out(path) else forms[:1]


def _matrix_forms(
    places: Places,
    name: str,
    path: str,
    rest: tuple[int, ...],
    shape: tuple[int, ...],
    known: str,
) -> tuple[list[str], bool]:
    """The letters of a matrix `(out, in)` in a leaf, and whether more than sizes say so."""
    if known and set(known) <= set("io"):
        letters = known
        if places.known.looked_up(path):  # of rows, which are the outputs of a head
            letters = known.translate(SWAPPED)
        return ([letters] if _sizes(rest, letters) == shape else []), True
    rows, columns = shape
    straight = readings(rest, "embedding", Dims(rows, columns), "jax")
    across = readings(rest, "linear", Dims(columns, rows), "jax")
    as_is = [each.axes.translate(SWAPPED) for each in straight]
    transposed = [each.axes for each in across]
    if is_embedding(name.rpartition(".")[0], path):
        return as_is + transposed, True
    return transposed + as_is, False


def _sizes(shape: tuple[int, ...], letters: str) -> tuple[int, int]:
    """How many outputs and inputs a weight has."""
    outs, ins = (
        size_of(tuple(n for n, own in zip(shape, letters, strict=True) if own == letter))
        for letter in "oi"
    )
    return outs, ins


def _one_way(places: Places, spots: list[Spot]) -> Way:
    """The one way in which the arrays of a leaf lie."""
    first, shape = spots[0], places.shape(spots[0].path)
    ways, turned = [], []
    if len({len(spot.numbers) for spot in spots}) == 1:
        indices = [spot.indices for spot in spots]
        ways = shared_ways(shape, [spot.ways for spot in spots], indices)
        turned = shared_ways(shape, [spot.turned for spot in spots], indices)
    if not ways:
        raise CheckpointError(
            f"{', '.join(repr(spot.name) for spot in spots[:8])} all go to {first.path!r} "
            f"{shape}, and no way to see it fits all: give names={{parameter: path}}."
        )
    found = [*ways, *turned]
    if len(found) > 1:
        stacks_, forms = {way.stack for way in found}, [way.form for way in found]
        what = [f"the index on the axis {way.stack}" for way in found]
        if len(stacks_) == 1:
            what = [repr(form) if form else "as it is in torch" for form in forms]
        raise CheckpointError(
            f"{first.name!r} fits {first.path!r} {shape} in {len(found)} ways, "
            f"{' and '.join(what)}: shapes do not say which. Give the function (fn, *args) "
            "or plan=" + (", or layout='jax' or layout='torch'." if turned else ".")
        )
    return ways[0]


def find_bias(places: Places, path: str) -> str | None:
    """The path of the bias beside a weight, if there is one."""
    return places.biases.get(split_path(path).words)


def sibling_bias(places: Places, name: str, path: str) -> str:
    """The path of the bias beside a weight.

    Raises:
        CheckpointError: if there is none.
    """
    bias = find_bias(places, path)
    if bias is None:
        raise CheckpointError(
            f"{name!r} has a bias, and there is none beside {path!r} in the params: add "
            "one of zeros to the layer"
        )
    return bias
