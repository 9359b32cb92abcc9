"""Full (not low-rank) arrays of a checkpoint: their sites, and the leaves they replace.

These are saved modules, biases and rows of embeddings. The bias of an adapter, and a base
that an initialization changed, replace leaves too.
"""

import functools
import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.core import Tracer

from lora_jax._io import processes, tensor_files
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.checkpoint import Checkpoint
from lora_jax.peft.config import PeftConfig
from lora_jax.peft.layout import (
    SWAPPED,
    Index,
    Reading,
    Site,
    common_dtype,
    first_axes,
    from_torch,
    has_room,
    same_bits,
    stacked_readings,
    to_matrix,
    torch_forms,
)
from lora_jax.peft.leaves import (
    Claim,
    Places,
    Problems,
    fitting,
    given_claim,
    only,
    open_site,
    shared_readings,
)
from lora_jax.peft.missing import (
    OnTied,
    shared_leaves,
    tied_arrays,
    without_frozen,
    without_twins,
)
from lora_jax.peft.words import (
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
    places: Places, shapes: Mapping[str, tuple[int, ...]], problems: Problems
) -> dict[str, Site]:
    """Finds the site of each full array, by the names of the parameters: `"score.weight"`.

    `problems` collects the arrays without a site, or with several.
    """
    by_path: dict[str, list[Claim]] = {}
    for name, shape in shapes.items():
        with problems.collecting():
            claim = _find_claim(places, name, shape)
            by_path.setdefault(claim.site.path, []).append(claim)
    found: dict[str, Site] = {}
    for claims in by_path.values():
        with problems.collecting():
            reading = _one_reading(places, claims)
            found |= {claim.site.name: claim.settle(reading) for claim in claims}
    return {name: found[name] for name in shapes if name in found}


def _find_claim(places: Places, name: str, shape: tuple[int, ...]) -> Claim:
    module, _, last = name.rpartition(".")
    for key in (name, module):
        given = places.given(key)
        if given is None:
            continue
        if given.part:
            site = Site(module, name, given.path, "", part=given.part)
            check_whole(site, f"the file has all of {name!r}")
        if key == module and last == BIAS:
            given = given._replace(path=_sibling_bias(places, name, given.path))
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
    near = places.search(words.words, (words.leaf,))
    claims = fitting(near, functools.partial(_read, places, name, shape))
    if claims:
        return only(name, claims)
    error = places.not_found(name, near, f"a leaf of the shape {shape}")
    if not near and last_word(module) in HEADS:
        error = CheckpointError(
            f"{error} If the model has one leaf for its embedding and its output head "
            "(tied), the head was trained apart from it: give params with a leaf for "
            "each, and a function that uses both."
        )
    raise error


def _read(
    places: Places,
    name: str,
    shape: tuple[int, ...],
    path: str,
    numbers: Numbers,
    axes: str = "",
) -> Claim:
    """Reads a leaf as an array of a checkpoint; without readings if it does not fit.

    `name` and `shape` are of the array. `numbers` of the name are indexes of the leaf.
    `axes` are its letters, if the caller gave them.
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
    site = open_site(name.rpartition(".")[0], name, path, numbers)
    return Claim(site, found, turned)


def _one_reading(places: Places, claims: list[Claim]) -> Reading:
    """The one way to see a leaf that fits all of its arrays; else raises."""
    first = claims[0].site
    shape = places.shape(first.path)
    alike = len({len(claim.site.indices) for claim in claims}) == 1
    ways, turned = shared_readings(places, claims) if alike else ([], [])
    if not ways:
        raise CheckpointError(
            f"{', '.join(repr(claim.site.name) for claim in claims[:8])} all match "
            f"{first.path!r} {shape}, and no reading of its axes fits all: give "
            "names={parameter: path}."
        )
    found = [*ways, *turned]
    if len(found) > 1:
        what = [f"the index on the axis {way.stack}" for way in found]
        if len({way.stack for way in found}) == 1:
            sites = [claims[0].settle(way) for way in found]
            what = [repr(s.own_axes) if s.axes else "as in PyTorch" for s in sites]
        raise CheckpointError(
            f"{first.name!r} fits {first.path!r} {shape} in {len(found)} ways, "
            f"{' and '.join(what)}: shapes do not say which. Give the function (fn, *args) "
            "or plan=" + (", or layout='jax' or layout='torch'." if turned else ".")
        )
    return ways[0]


def check_whole(site: Site, why: str) -> None:
    """Raises for a module that is a part of a leaf, if values of the leaf would change."""
    if site.part:
        raise CheckpointError(
            f"{site.name!r} is a part of a leaf, {site.path + site.part!r}, and {why}: a "
            "leaf is replaced as a whole. Give params with a leaf for each module."
        )


def _sibling_bias(places: Places, name: str, path: str) -> str:
    """The path of the bias beside a weight; raises if there is none."""
    bias = places.bias_of(path)
    if bias is None:
        raise CheckpointError(
            f"{name!r} has a bias, and there is none beside {path!r} in the params: add a "
            "bias of zeros to the layer"
        )
    return bias


class Replaced:
    """Collects the leaves that a checkpoint replaces, whole or index by index."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._arrays: dict[str, np.ndarray] = {}
        # The axes of the stack, and the indexes that are set.
        self._open: dict[str, tuple[Index, set[Index]]] = {}
        self._owners: dict[tuple[str, Index], str] = {}

    def put(self, site: Site, array: np.ndarray) -> None:
        """Puts an array of a checkpoint, in PyTorch's layout, at its site.

        Raises if another array of the checkpoint is there and differs.
        """
        shape = site.own_shape(self.places.shape(site.path))
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
            self._arrays[path] = np.zeros(self.places.shape(path), array.dtype)
            self._open[path] = site.stack, set()
        wide = common_dtype(self._arrays[path].dtype, array.dtype)
        self._arrays[path] = self._arrays[path].astype(wide, copy=False)
        first_axes(self._arrays[path], site.stack)[site.indices] = array
        if path in self._open:
            self._open[path][1].add(site.indices)

    def current(self, site: Site, why: str) -> np.ndarray:
        """The values that `set` would replace: values set before, or values of the params.

        If the params have no values, the error says why they are needed.
        """
        path = site.path
        complete = path not in self._open or site.indices in self._open[path][1]
        if path in self._arrays and complete:
            return site.view(self._arrays[path])
        return site.view(self._values(path, why))

    def _values(self, path: str, why: str) -> np.ndarray:
        """The values of a leaf that the checkpoint changes in part."""
        leaf = self.places.leaves[path]
        if isinstance(leaf, jax.ShapeDtypeStruct | Tracer):
            raise CheckpointError(
                f"{why}, so the values of {path!r} are needed, got a "
                f"{type(leaf).__name__}: give params with arrays."
            )
        return processes.to_host(leaf)

    def finish(self, where: str) -> dict[str, jax.Array]:
        """All leaves. Indexes that are not set have the values of the params."""
        for path, (stack, indexes) in self._open.items():
            shape = self.places.shape(path)
            absent = set(np.ndindex(*(shape[axis] for axis in stack))) - indexes
            if absent:
                own = self._values(path, "some layers lack it")
                for index in absent:
                    values = first_axes(own, stack)[index]
                    first_axes(self._arrays[path], stack)[index] = values
        return {
            path: tensor_files.to_jax(where, path, array)
            for path, array in self._arrays.items()
        }


def add_bias(replaced: Replaced, site: Site, bias: np.ndarray, scale: float) -> None:
    """Adds the bias of an adapter's B to the bias of its layer: `lora_bias`."""
    check_whole(site, "its adapter has a bias of its own")
    places, module = replaced.places, site.module
    path = _sibling_bias(places, module, site.path)
    numbers = tuple(zip(site.fields, site.indices, strict=True))
    claim = _read(places, f"{module}.bias", bias.shape, path, numbers)
    if not claim.readings:
        raise CheckpointError(
            f"{module!r} has a bias of {bias.size} entries, and {path!r} has the shape "
            f"{places.shape(path)}: it is not the bias of that layer."
        )
    own = claim.settle(_one_reading(places, [claim]))
    why = f"{module!r} has a bias of its own, which shifts the bias of the layer"
    old = replaced.current(own, why)
    wide = common_dtype(old.dtype, bias.dtype, np.dtype(np.float32))
    update = wide.type(scale) * bias.astype(wide).reshape(old.shape)
    replaced.set(own, (old.astype(wide) + update).astype(old.dtype))


def put_full(
    replaced: Replaced,
    checkpoint: Checkpoint,
    sites: Mapping[str, Site],
    problems: Problems,
    on_tied: OnTied,
) -> set[str]:
    """Puts the full arrays of a checkpoint, and then the rows of embeddings.

    `sites` are of its adapters.

    Returns:
        The modules whose adapters are left out, because another array has their leaf.
    """
    places = replaced.places
    config, read = checkpoint.config, checkpoint.arrays.read
    arrays = {name: read(key) for name, key in checkpoint.entries.wholes.items()}
    arrays = without_twins(places, without_frozen(places, sites, arrays))
    full = find_full(places, {n: array.shape for n, array in arrays.items()}, problems)
    if on_tied == "error":
        twins = checkpoint.entries.wholes.keys() - arrays.keys()
        wrong = tied_arrays(places, full, twins, config)
        problems.lines += wrong.values()
        full = {name: site for name, site in full.items() if name not in wrong}
    for name, site in full.items():
        with problems.collecting():
            replaced.put(site, arrays[name])
    rows: dict[str, str] = {}
    for name, key in checkpoint.entries.tokens.items():
        with problems.collecting():
            rows[name] = _put_rows(replaced, name, read(key), config)
    twice = shared_leaves(sites.values(), full.values(), rows)
    problems.lines += twice.values()
    return {*twice}


def _put_rows(replaced: Replaced, module: str, rows: np.ndarray, config: PeftConfig) -> str:
    """Puts rows of an embedding, or of a head, and returns the path of the leaf."""
    indexes = _token_indexes(config, module)
    places = replaced.places
    if rows.ndim != 2:
        raise CheckpointError(
            f"{module!r} must have rows of an embedding, (n, width), got {rows.shape}."
        )
    width = rows.shape[1]
    given = places.given(module)
    found = places.search(split_name(module), (WEIGHT,))
    paths = [given.path] if given else [each.path for each in found]
    counts = {math.prod(places.shape(path)) // max(width, 1) for path in paths}
    shape = (counts.pop() if len(counts) == 1 else 0, width)
    if given and math.prod(places.shape(given.path)) != math.prod(shape):
        raise CheckpointError(
            f"{module!r} has rows of {width} entries, and {given.path!r} has the "
            f"shape {places.shape(given.path)}: it has no such rows."
        )
    claim = _find_claim(places, f"{module}.weight", shape)
    site = claim.settle(_one_reading(places, [claim]))
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
