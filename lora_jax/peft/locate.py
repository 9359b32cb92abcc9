"""Finds the weight of each module of a checkpoint, and the leaf of each full array.

Full (not low-rank) arrays are saved modules, biases and rows of embeddings.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.claims import (
    Claim,
    Reader,
    fitting,
    given_claim,
    only,
    open_site,
    settle_adapters,
    settle_arrays,
)
from lora_jax.peft.formats.config import PeftConfig
from lora_jax.peft.formats.keys import (
    BIAS,
    WEIGHT,
    Module,
    Parameters,
    is_embedding,
    is_flat,
    nesting,
)
from lora_jax.peft.layout import (
    SWAPPED,
    Index,
    Reading,
    Site,
    first_part,
    has_room,
    known_readings,
    readings,
    stacked_readings,
    torch_forms,
)
from lora_jax.peft.leaves import Places, Problems, agrees
from lora_jax.peft.names import NOT_GIVEN, Given
from lora_jax.peft.words import HEADS, Found, Numbers, last_word, split_name, split_path
from lora_jax.plan.parts import LOOKUP

_FUSED = "in_proj_weight"  # of torch.nn.MultiheadAttention
_WEIGHTS = (WEIGHT, "")


def find_sites(
    places: Places,
    modules: Mapping[str, Module],
    config: PeftConfig,
    problems: Problems,
    *,
    splits_ties: bool = True,
) -> dict[str, Site]:
    """Finds the site of each adapter of a checkpoint, by the names of the modules.

    `problems` collects the modules without a site, with several, or with one that another
    module has. If `splits_ties` is true, a module is one use of a tied leaf, if that can be
    told.
    """
    claims = []
    for claim in _find_claims(places, modules, config, problems):
        site = claim.site
        if splits_ties and not site.use:
            use = places.known.side(site.path, modules[site.module].kind)
            claim = claim._replace(site=site._replace(use=use))
        claims.append(claim)
    return settle_adapters(places, claims, modules, problems)


def _find_claims(
    places: Places, modules: Mapping[str, Module], config: PeftConfig, problems: Problems
) -> Iterator[Claim]:
    owners: dict[str, list[Module]] = {}
    for name, module in modules.items():
        owner = nesting(name)[0] if module.kind == "experts" else name
        owners.setdefault(owner, []).append(module)
    parameters = Parameters(config.target_parameters or ())
    for owner, own in owners.items():
        claims: list[Claim] = []
        with problems.collecting():
            if own[0].kind == "experts":
                claims = _find_parameters(places, parameters.of(owner), own, config)
            else:
                claims = [_find_module(places, own[0], config.fan_in_fan_out)]
        yield from claims


def _find_module(places: Places, module: Module, fan_in_fan_out: bool) -> Claim:
    name = module.model_name
    given = places.given(name)
    if given is not None:
        return _find_given(places, module, given, name, fan_in_fan_out)
    words = split_name(name)
    near = places.search(words, _WEIGHTS, flat=is_flat(name))
    read = _reader(places, module, name, fan_in_fan_out)
    claims = fitting(near, read)
    claims = claims or fitting(places.search((*words, _FUSED), ("",)), read)
    if not claims and last_word(name) in HEADS and module.kind == "linear":
        tied = (path for path in places.leaves if places.known.side(path, "linear"))
        claims = fitting([Found(path, ()) for path in tied], read)
    if not claims:
        raise _not_found(places, module, near)
    return only(module.name, claims)


def _reader(
    places: Places,
    module: Module,
    name: str,
    fan_in_fan_out: bool = False,
    given: Given = NOT_GIVEN,
) -> Reader:
    """What reads a leaf as the weight of a module, or of a parameter; see `fitting`.

    `given` has the axes and the part of the leaf, if the caller gave them.
    """
    kind, dims = module.kind, module.dims

    def read(path: str, numbers: Numbers) -> Claim:
        shape, count = places.shape(path, given.part), len(numbers)
        use = given.use or places.known.side(path, kind)
        known = given.axes or places.letters(path, given.part, use)
        if kind == "convolution":
            places.known.check_kernel(path, places.shape(path))
        turned: tuple[Reading, ...] = ()
        by_shape = not (known and set(known) <= set("iob"))
        if by_shape:
            own = {"fan_in_fan_out": fan_in_fan_out, "count": count}
            found = readings(shape, kind, dims, places.layout, **own)
            if places.given_layout is None:
                turned = readings(shape, kind, dims, "turned", count=count)
        else:
            found = known_readings(shape, known, kind, dims, count)
            if not (found or given.axes or given.part) and places.known.tie(path):
                swapped = known.translate(SWAPPED)
                found = known_readings(shape, swapped, kind, dims, count)
        batch = [axis for axis, letter in enumerate(known) if letter == "b"]
        order = {f: axis for f, axis in zip(given.fields, batch, strict=False) if f}
        stack = tuple(order.get(field, -1) for field, _ in numbers)

        def allowed(reading: Reading) -> bool:
            return (
                has_room(shape, reading.stack, [number for _, number in numbers])
                and (not order or reading.stack == stack)
                and (not (by_shape and known) or agrees(reading.axes, known))
            )

        found, turned = (tuple(filter(allowed, each)) for each in (found, turned))
        site = open_site(module.name, name, path, numbers, given)
        return Claim(site, found, turned if found else (), by_shape)

    return read


def _find_given(
    places: Places, module: Module, given: Given, name: str, fan_in_fan_out: bool = False
) -> Claim:
    """The claim to the leaf that the caller gave."""
    read = _reader(places, module, name, fan_in_fan_out, given)
    claim = given_claim(given, module.model_name, read)
    if claim is None:
        indices = tuple(number for _, number in given.numbers)
        axes = f", with the axes {given.axes!r}" if given.axes is not None else ""
        if given.part:
            shape = places.shape(given.path, given.part)
            axes += f", and {given.path + given.part!r} has the shape {shape}"
        raise _not_found(places, module, [Found(given.path, indices)], axes)
    if given.use and (given.use == LOOKUP) != (module.kind == "embedding"):
        raise CheckpointError(
            f"names has the use {given.use!r} of {given.path!r} for {module.name!r}, which "
            f"is of the kind {module.kind!r}: an embedding is a look-up, and any other "
            "module a product."
        )
    return claim


def _find_parameters(
    places: Places, names: list[str], modules: list[Module], config: PeftConfig
) -> list[Claim]:
    """The leaves of the adapters that belong to parameters of one module.

    A checkpoint does not name the parameter of an adapter: shapes have to show it.
    """
    options = []
    for module in modules:
        own = [name for name in names if config.rank_of(name) == module.rank]
        options.append(_parameter_claims(places, module, own))
        if not options[-1]:
            words = [split_path(name).words for name in names]
            near = [each for own in words for each in places.search(own, _WEIGHTS)]
            raise _not_found(places, module, near)
    ways = [
        way
        for way in itertools.product(*options)
        if len({(claim.site.path, claim.site.indices) for claim in way}) == len(way)
    ]
    if len(ways) != 1:
        listed = ", ".join(repr(module.name) for module in modules)
        raise CheckpointError(
            f"the shapes show {'no way' if not ways else 'more than one way'} "
            f"to assign the adapters {listed} to the parameters {', '.join(names)}: give "
            "names={adapter: (path, axes)}, with axes such as 'bio'."
        )
    return list(ways[0])


def _parameter_claims(places: Places, module: Module, names: list[str]) -> list[Claim]:
    """The leaves that may be the parameter of an adapter."""
    given = places.given(module.name)
    if given is not None:
        last = split_path(given.path).words[-1]
        own = [name for name in names if name.endswith(f".{last}")]
        return [_find_given(places, module, given, (own or [module.name])[0])]
    claims = []
    for name in names:
        given = places.given(name)
        if given is None:
            found = places.search(split_path(name).words, _WEIGHTS)
            claims += fitting(found, _reader(places, module, name))
        else:
            with contextlib.suppress(CheckpointError):  # the leaf of another adapter
                claims.append(_find_given(places, module, given, name))
    return claims


def _not_found(
    places: Places, module: Module, near: Iterable[Found], axes: str = ""
) -> CheckpointError:
    """The error for a module without a leaf that fits."""
    dims = module.dims
    kernel = f" and a kernel {dims.kernel}" if dims.kernel else ""
    experts = f" for each of {dims.experts} experts" if dims.experts else ""
    entries = dims.n_in * dims.n_out * math.prod(dims.kernel) * max(dims.experts, 1)
    near = [*near]
    parts_of = (path + first_part(places.shape(path), entries) for path, _ in near)
    return places.not_found(
        module.name,
        near,
        f"a weight of the kind {module.kind!r} with {dims.n_in} in and {dims.n_out} out"
        f"{kernel}{experts}{axes}",
        part=next(parts_of, "path[0]"),
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
            claim = _find_array(places, name, shape)
            by_path.setdefault(claim.site.path, []).append(claim)
    found: dict[str, Site] = {}
    for claims in by_path.values():
        with problems.collecting():
            found |= {site.name: site for site in settle_arrays(places, claims)}
    return {name: found[name] for name in shapes if name in found}


def _find_array(places: Places, name: str, shape: tuple[int, ...]) -> Claim:
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
        read = functools.partial(_read_array, places, name, shape, axes=given.axes or "")
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
    claims = fitting(near, functools.partial(_read_array, places, name, shape))
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


def _read_array(
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
    if len(shape) > 2:
        places.known.check_kernel(path, own)
    known = known if len(known) == len(own) else ""
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
        if len(shape) == 2 and places.known.looked_up(path):
            letters = letters.translate(SWAPPED)  # the rows are the outputs of a head
            if shape[0] == shape[1]:  # or else the sizes show what the other axis is
                letters = {"o?": "oi", "?o": "io"}.get(letters, letters)
        embedding = is_embedding(name.rpartition(".")[0], path)
        found, settled = torch_forms(rest, shape, letters, embedding=embedding)
        settled |= places.given_layout is not None or places.lies_in_out(path)
        return found[:1] if settled else found

    found = stacked_readings(own, len(numbers), lambda *at: forms(*at)[:1])
    turned = stacked_readings(own, len(numbers), lambda *at: forms(*at)[1:])
    stacks = {each.stack for each in found}
    turned = tuple(each for each in turned if each.stack in stacks)
    site = open_site(name.rpartition(".")[0], name, path, numbers)
    return Claim(site, found, turned)


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
    claim = _find_array(places, f"{module}.weight", shape)
    return settle_arrays(places, [claim])[0], shape[0]


def find_bias(places: Places, site: Site, size: int) -> Site:
    """Finds the bias of an adapted layer, for the bias of its adapter: `lora_bias`."""
    check_whole(site, "its adapter has a bias of its own")
    path = _sibling_bias(places, site.module, site.path)
    numbers = tuple(zip(site.fields, site.indices, strict=True))
    claim = _read_array(places, f"{site.module}.bias", (size,), path, numbers)
    if not claim.readings:
        raise CheckpointError(
            f"{site.module!r} has a bias of {size} entries, and {path!r} has the shape "
            f"{places.shape(path)}: it is not the bias of that layer."
        )
    return settle_arrays(places, [claim])[0]
