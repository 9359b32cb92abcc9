"""Full (not low-rank) arrays of a checkpoint: their sites, and the leaves they replace.

These are saved modules, biases and rows of embeddings. The bias of an adapter, and a base
that an initialization changed, replace leaves too.
"""

import contextlib
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from lora_jax._io import processes, tensor_files
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.config import PeftConfig
from lora_jax.peft.layout import (
    SWAPPED,
    Index,
    Reading,
    Site,
    first_axes,
    from_torch,
    has_room,
    same_bits,
    shared_readings,
    stacked_readings,
    to_matrix,
    torch_forms,
)
from lora_jax.peft.leaves import Places, Problems
from lora_jax.peft.locate import Claim, fitting, given_claim, only
from lora_jax.peft.names import (
    BIAS,
    HEADS,
    WEIGHT,
    Numbers,
    is_embedding,
    last_word,
    split_name,
    split_path,
)


def find_full(
    places: Places,
    shapes: Mapping[str, tuple[int, ...]],
    problems: Problems | None = None,
) -> dict[str, Site]:
    """Finds the site of each full array.

    Args:
        places: the leaves to search.
        shapes: of the arrays, by the names of the parameters: `"score.weight"`.
        problems: collects the arrays without a site, or with several.

    Raises:
        CheckpointError: for such an array, if nothing collects it.
    """
    collecting = problems.collecting if problems else contextlib.nullcontext
    by_path: dict[str, list[Claim]] = {}
    for name, shape in shapes.items():
        with collecting():
            claim = _find_claim(places, name, shape)
            by_path.setdefault(claim.path, []).append(claim)
    found: dict[str, Site] = {}
    for claims in by_path.values():
        with collecting():
            reading = _one_reading(places, claims)
            found |= {claim.name: claim.site(reading) for claim in claims}
    return {name: found[name] for name in shapes if name in found}


def _find_claim(places: Places, name: str, shape: tuple[int, ...]) -> Claim:
    module, _, last = name.rpartition(".")
    for key in (name, module):
        given = places.given(key)
        if given is not None:
            if given.part:
                site = Site(module, name, given.path, "", part=given.part)
                check_whole(site, f"the file has all of {name!r}")
            if key == module and last == BIAS:
                given = given._replace(path=sibling_bias(places, name, given.path))
            read = functools.partial(_read, places, name, shape, axes=given.axes or "")
            claim = given_claim(given, module, read, ())
            if claim is None:
                raise CheckpointError(
                    f"{name!r} has the shape {shape}, and {given.path!r} has "
                    f"{places.shape(given.path)}{places.axes_of(given.path)}: was the "
                    "model resized (its vocabulary, its classes) before it was trained? "
                    "Give params of that size."
                )
            return claim
    words = split_path(name)
    found = places.search(words.words, (words.leaf,))
    claims = fitting(module, found, functools.partial(_read, places, name, shape))

    def not_found() -> CheckpointError:
        error = places.not_found(name, found, f"a leaf of the shape {shape}")
        if not found and last_word(module) in HEADS:
            error = CheckpointError(
                f"{error} If the model has one leaf for its embedding and its output head "
                "(tied), the head was trained apart from it: give params with a leaf for "
                "each, and a function that uses both."
            )
        return error

    return only(name, claims, not_found)


def _read(
    places: Places,
    name: str,
    shape: tuple[int, ...],
    path: str,
    numbers: Numbers,
    axes: str = "",
) -> Claim:
    """Reads a leaf as an array of a checkpoint; without readings if it does not fit.

    Args:
        places: the leaves.
        name: of the parameter.
        shape: of the array.
        path: of the leaf.
        numbers: of the name, that are indexes of the leaf.
        axes: the letters of the leaf's axes, if the caller gave them.
    """
    own, known = places.shape(path), axes or places.known.axes.get(path, "")
    if len(known) != len(own):
        known = ""
    stacked = "b" if known.count("b") >= len(numbers) else "b?"
    indices = [number for _, number in numbers]

    def forms(stack: Index, rest: tuple[int, ...]) -> list[str]:
        if not has_room(own, stack, indices) or any(
            known[axis] not in stacked for axis in stack if known
        ):
            return []
        if places.given_layout == "torch" and not known and len(shape) > 1:
            return [""] if shape == rest else []
        letters = "".join(x for axis, x in enumerate(known) if axis not in stack)
        if len(shape) == 2 and set(letters) <= set("io") and places.known.looked_up(path):
            letters = letters.translate(SWAPPED)  # the rows are the outputs of a head
        embedding = is_embedding(name.rpartition(".")[0], path)
        found, settled = torch_forms(rest, shape, letters, embedding=embedding)
        settled |= places.given_layout is not None or places.lies_in_out(path)
        return found[:1] if settled else found

    count = len(numbers)
    found = stacked_readings(own, count, lambda *at: forms(*at)[:1])
    turned = stacked_readings(own, count, lambda *at: forms(*at)[1:])
    stacks = {each.stack for each in found}
    turned = tuple(each for each in turned if each.stack in stacks)
    return Claim(name.rpartition(".")[0], name, path, numbers, found, turned)


def _one_reading(places: Places, claims: list[Claim]) -> Reading:
    """The one way to see a leaf that fits all of its arrays.

    Raises:
        CheckpointError: if there is none, or several.
    """
    first, shape = claims[0], places.shape(claims[0].path)
    ways: list[Reading] = []
    turned: list[Reading] = []
    if len({len(claim.numbers) for claim in claims}) == 1:
        indices = [claim.indices for claim in claims]
        ways = shared_readings(shape, [claim.readings for claim in claims], indices)
        turned = shared_readings(shape, [claim.turned for claim in claims], indices)
    if not ways:
        raise CheckpointError(
            f"{', '.join(repr(claim.name) for claim in claims[:8])} all match "
            f"{first.path!r} {shape}, and no reading of its axes fits all: give "
            "names={parameter: path}."
        )
    found = [*ways, *turned]
    if len(found) > 1:
        what = [f"the index on the axis {way.stack}" for way in found]
        if len({way.stack for way in found}) == 1:
            sites = [first.site(way) for way in found]
            what = [repr(s.own_axes) if s.axes else "as in PyTorch" for s in sites]
        raise CheckpointError(
            f"{first.name!r} fits {first.path!r} {shape} in {len(found)} ways, "
            f"{' and '.join(what)}: shapes do not say which. Give the function (fn, *args) "
            "or plan=" + (", or layout='jax' or layout='torch'." if turned else ".")
        )
    return ways[0]


def check_whole(site: Site, why: str) -> None:
    """Raises for a module that is a part of a leaf, if values of the leaf would change.

    Raises:
        CheckpointError: with the reason `why`.
    """
    if site.part:
        raise CheckpointError(
            f"{site.name!r} is a part of a leaf, {site.path + site.part!r}, and {why}: a "
            "leaf is replaced as a whole. Give params with a leaf for each module."
        )


def sibling_bias(places: Places, name: str, path: str) -> str:
    """The path of the bias beside a weight.

    Raises:
        CheckpointError: if there is none.
    """
    bias = places.bias_of(path)
    if bias is None:
        raise CheckpointError(
            f"{name!r} has a bias, and there is none beside {path!r} in the params: add a "
            "bias of zeros to the layer"
        )
    return bias


def common_dtype(*dtypes: np.dtype) -> np.dtype:
    """The dtype that holds the values of all dtypes.

    NumPy does not have it for float16 and bfloat16.
    """
    if len({dtype for dtype in dtypes if dtype.itemsize == 2}) > 1:
        dtypes = (*(d for d in dtypes if d.itemsize != 2), np.dtype(np.float32))
    return np.result_type(*dtypes)


def leaf_values(path: str, leaf: Any, why: str) -> np.ndarray:
    """The values of a leaf that the checkpoint changes in part.

    Raises:
        CheckpointError: if the leaf is a shape without values.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct | Tracer):
        raise CheckpointError(
            f"{why}, so the values of {path!r} are needed, got a "
            f"{type(leaf).__name__}: give params with arrays."
        )
    return processes.to_host(leaf)


class Replaced:
    """Collects the leaves that a checkpoint replaces, whole or index by index.

    Args:
        places: the leaves of the params.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._arrays: dict[str, np.ndarray] = {}
        # The axes of the stack, and the indexes that are set.
        self._open: dict[str, tuple[Index, set[Index]]] = {}
        self._owners: dict[tuple[str, Index], str] = {}

    def put(self, site: Site, array: np.ndarray) -> None:
        """Puts an array of a checkpoint, in PyTorch's layout, at its site.

        Raises:
            CheckpointError: if another array of the checkpoint is there and differs.
        """
        shape = site.own_shape(self._places.shape(site.path))
        own = from_torch(array, shape, site.own_axes)
        other = self._owners.setdefault((site.path, site.indices), site.name)
        if other == site.name:
            self.set(site, own)
            return
        values = site.view(self._arrays[site.path])
        if not same_bits(own.astype(values.dtype), values):
            raise CheckpointError(
                f"{other!r} and {site.name!r} differ, and both are {site.path!r}: the leaf "
                "has room for one. If the embedding and the output head were one array "
                "before the training, they are two now: give params with a leaf for each, "
                "and a function that uses both."
            )

    def set(self, site: Site, array: np.ndarray) -> None:
        """Puts an array that has the layout of the leaf."""
        path = site.path
        if not site.indices:
            self._arrays[path] = array
            return
        if path not in self._arrays:
            self._arrays[path] = np.zeros(self._places.shape(path), array.dtype)
            self._open[path] = site.stack, set()
        wide = common_dtype(self._arrays[path].dtype, array.dtype)
        self._arrays[path] = self._arrays[path].astype(wide, copy=False)
        first_axes(self._arrays[path], site.stack)[site.indices] = array
        if path in self._open:
            self._open[path][1].add(site.indices)

    def current(self, site: Site, why: str) -> np.ndarray:
        """The values that `set` would replace: values set before, or values of the params.

        Raises:
            CheckpointError: if the params have no values; it says why they are needed.
        """
        path = site.path
        complete = path not in self._open or site.indices in self._open[path][1]
        if path in self._arrays and complete:
            return site.view(self._arrays[path])
        return site.view(leaf_values(path, self._places.leaves[path], why))

    def finish(self, where: str) -> dict[str, jax.Array]:
        """All leaves. Indexes that are not set have the values of the params.

        Args:
            where: the name of the file, for messages.
        """
        for path, (stack, indexes) in self._open.items():
            shape = self._places.shape(path)
            absent = set(np.ndindex(*(shape[axis] for axis in stack))) - indexes
            if absent:
                own = leaf_values(path, self._places.leaves[path], "some layers lack it")
                for index in absent:
                    values = first_axes(own, stack)[index]
                    first_axes(self._arrays[path], stack)[index] = values
        return {
            path: tensor_files.to_jax(where, path, array)
            for path, array in self._arrays.items()
        }


def add_bias(
    replaced: Replaced, places: Places, site: Site, bias: np.ndarray, scale: float
) -> None:
    """Adds the bias of an adapter's B to the bias of its layer: `lora_bias`.

    Raises:
        CheckpointError: if the layer has no such bias.
    """
    check_whole(site, "its adapter has a bias of its own")
    path = sibling_bias(places, site.module, site.path)
    numbers = tuple(zip(site.fields, site.indices, strict=True))
    claim = _read(places, f"{site.module}.bias", bias.shape, path, numbers)
    if not claim.readings:
        raise CheckpointError(
            f"{site.module!r} has a bias of {bias.size} entries, and {path!r} has the "
            f"shape {places.shape(path)}: it is not the bias of that layer."
        )
    own = claim.site(_one_reading(places, [claim]))
    why = f"{site.module!r} has a bias of its own, which shifts the bias of the layer"
    old = replaced.current(own, why)
    wide = common_dtype(old.dtype, bias.dtype, np.dtype(np.float32))
    update = wide.type(scale) * bias.astype(wide).reshape(old.shape)
    replaced.set(own, (old.astype(wide) + update).astype(old.dtype))


def put_rows(
    replaced: Replaced, places: Places, module: str, rows: np.ndarray, config: PeftConfig
) -> str:
    """Puts rows of an embedding, or of a head: `trainable_token_indices`.

    Returns:
        The path of the leaf.

    Raises:
        CheckpointError: if they do not fit.
    """
    indexes = _token_indexes(config, module)
    if rows.ndim != 2:
        raise CheckpointError(
            f"{module!r} must have rows of an embedding, (n, width), got {rows.shape}."
        )
    width, given = rows.shape[1], places.given(module)
    found = places.search(split_name(module), (WEIGHT,))
    paths = [given.path] if given else [each.path for each in found]
    counts = {math.prod(places.shape(path)) // max(width, 1) for path in paths}
    shape = (counts.pop() if len(counts) == 1 else 0, width)
    if given and math.prod(places.shape(given.path)) != math.prod(shape):
        raise CheckpointError(
            f"{module!r} has rows of {width} entries, and {given.path!r} has the "
            f"shape {places.shape(given.path)}: it has no such rows."
        )
    name = f"{module}.weight"
    site = find_full(places, {name: shape})[name]
    old = replaced.current(site, f"only rows of {module!r} are replaced")
    if len(rows) != len(indexes) or max(indexes, default=0) >= shape[0]:
        raise CheckpointError(
            f"{module!r} has {len(rows)} rows, the config has the indices "
            f"{list(indexes)[:8]}, and {site.path!r} has {shape[0]} rows."
        )
    axes = site.own_axes
    matrix = np.array(to_matrix(old, axes).T if axes else old).reshape(shape)
    matrix[list(indexes)] = rows.astype(old.dtype)
    replaced.set(site, np.ascontiguousarray(from_torch(matrix, old.shape, axes)))
    return site.path


def _token_indexes(config: PeftConfig, module: str) -> tuple[int, ...]:
    """The indexes of the rows of an embedding that the checkpoint has."""
    given = config.trainable_token_indices
    if isinstance(given, tuple):
        return given
    for name, indexes in (given or {}).items():
        if module == name or module.endswith(f".{name}"):
            return indexes
    raise CheckpointError(
        f"{module!r} has rows of trained tokens, and the config's trainable_token_indices "
        f"does not list its rows: {given!r}"
    )
