"""Finds the leaf of each full (not low-rank) array of a checkpoint.

These are saved modules, biases and rows of embeddings.
"""

import functools
import math
from collections.abc import Mapping

from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.layout import (
    SWAPPED,
    Index,
    Reading,
    Site,
    has_room,
    stacked_readings,
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


def find_rows(places: Places, module: str, width: int) -> tuple[Site, int]:
    """Finds the embedding, or the head, that has rows of a width, and their number."""
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
    return claim.settle(_one_reading(places, [claim])), shape[0]


def find_bias(places: Places, site: Site, size: int) -> Site:
    """Finds the bias of an adapted layer, for the bias of its adapter: `lora_bias`."""
    check_whole(site, "its adapter has a bias of its own")
    path = _sibling_bias(places, site.module, site.path)
    numbers = tuple(zip(site.fields, site.indices, strict=True))
    claim = _read(places, f"{site.module}.bias", (size,), path, numbers)
    if not claim.readings:
        raise CheckpointError(
            f"{site.module!r} has a bias of {size} entries, and {path!r} has the shape "
            f"{places.shape(path)}: it is not the bias of that layer."
        )
    return claim.settle(_one_reading(places, [claim]))
