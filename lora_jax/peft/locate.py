"""Finds the weight of each module of a checkpoint."""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.config import PeftConfig
from lora_jax.peft.keys import Module, Parameters, nesting
from lora_jax.peft.known import agrees
from lora_jax.peft.layout import (
    SWAPPED,
    Index,
    Reading,
    Site,
    has_room,
    known_readings,
    readings,
)
from lora_jax.peft.leaves import (
    Claim,
    Places,
    Problems,
    Reader,
    fitting,
    given_claim,
    only,
    open_site,
    shared_readings,
)
from lora_jax.peft.names import NOT_GIVEN, Given
from lora_jax.peft.words import (
    HEADS,
    WEIGHT,
    Found,
    Numbers,
    is_flat,
    last_word,
    split_name,
    split_path,
)
from lora_jax.plan import parts
from lora_jax.plan.parts import LOOKUP, PRODUCT

_FUSED = "in_proj_weight"  # of torch.nn.MultiheadAttention
_WEIGHTS = (WEIGHT, "")
_Key: TypeAlias = tuple[str, str, str]  # a path, a part and a use


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
    by_leaf: dict[_Key, list[Claim]] = {}
    for claim in _find_claims(places, modules, config, problems):
        site = claim.site
        if splits_ties and not site.use:
            use = places.known.side(site.path, modules[site.module].kind)
            site = site._replace(use=use)
        key = (site.path, site.part, site.use)
        by_leaf.setdefault(key, []).append(claim._replace(site=site))
    by_leaf = {leaf: _alike(claims, modules, problems) for leaf, claims in by_leaf.items()}
    places.claimed |= {path for path, *_ in by_leaf}
    _check_apart(places, by_leaf, problems)
    places.shown |= {
        places.family(path)
        for (path, *_), claims in by_leaf.items()
        if modules[claims[0].site.module].kind != "embedding"
        and all(claim.by_shape and not claim.turned for claim in claims)
    }
    sites: dict[str, Site] = {}
    for claims in by_leaf.values():
        with problems.collecting():
            reading = _one_reading(places, claims)
            sites |= {claim.site.module: claim.settle(reading) for claim in claims}
    return {name: sites[name] for name in modules if name in sites}


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


def _check_apart(
    places: Places, by_leaf: dict[_Key, list[Claim]], problems: Problems
) -> None:
    """Leaves out modules of parts that have entries in common with parts before."""
    taken: dict[str, list[_Key]] = {}
    for key, claims in [*by_leaf.items()]:
        path, part, use = key
        for before in taken.setdefault(path, []):
            both = not (use and before[2]) or use == before[2]
            if both and parts.overlap(part, before[1], places.shape(path)):
                one, other = by_leaf[before][0].site.module, claims[0].site.module
                problems.lines.append(
                    f"{one!r} and {other!r} both match entries of {path!r}, "
                    f"{path + before[1]!r} and {path + part!r}: give names={{module: "
                    "path}, with parts of the path that have nothing in common."
                )
                del by_leaf[key]
                break
        else:
            taken[path].append(key)


def _alike(
    claims: list[Claim], modules: Mapping[str, Module], problems: Problems
) -> list[Claim]:
    """The claims that see a leaf as the first claim does, one for each index."""
    first, taken = claims[0], dict[Index, Claim]()
    for claim in claims:  # one index has one module: not several parts, or several uses
        with problems.collecting():
            _check_alike(first, claim, modules)
            other = taken.setdefault(claim.site.indices, claim)
            if other is not claim:
                raise CheckpointError(
                    f"{other.site.module!r} and {claim.site.module!r} both match "
                    f"{claim.site.path!r}: give names={{module: path}}."
                )
    return [*taken.values()]


def _check_alike(one: Claim, other: Claim, modules: Mapping[str, Module]) -> None:
    """Raises if two modules see one leaf in different ways."""
    names, path = (one.site.module, other.site.module), one.site.path
    first, second = (modules[name] for name in names)
    kinds = first.kind, second.kind
    turned = first.dims[:2] == second.dims[1::-1]
    if kinds.count("embedding") == 1 and turned:
        uses = [LOOKUP if kind == "embedding" else PRODUCT for kind in kinds]
        sides = [f"{path}@{use}" for use in uses]
        raise CheckpointError(
            f"{names[0]!r} and {names[1]!r} have an adapter each, and both are {path!r}, "
            "which is tied: an adapter of that leaf would act on both. Give the function "
            "(fn, *args) that looks rows up and multiplies by the leaf, or "
            f"names={{{one.site.name!r}: {sides[0]!r}, {other.site.name!r}: "
            f"{sides[1]!r}}}, or params in which the embedding and the output head are two "
            "leaves."
        )
    if kinds[0] != kinds[1] or len(one.site.indices) != len(other.site.indices):
        raise CheckpointError(
            f"{names[0]!r} and {names[1]!r} both match {path!r}, the first as "
            f"{kinds[0]!r} with the axes {one.readings[0].axes!r}, the other as "
            f"{kinds[1]!r} with {other.readings[0].axes!r}: give names={{module: path}}."
        )


def _one_reading(places: Places, claims: list[Claim]) -> Reading:
    """The one way to see a leaf that fits all of its modules; else raises."""
    first = claims[0].site
    leaf = f"{first.path + first.part!r} {places.shape(first.path, first.part)}"
    found, turned = shared_readings(places, claims)
    if not found:
        last = max((claim.site for claim in claims), key=lambda site: site.indices)
        raise CheckpointError(
            f"{first.module!r} and {last.module!r} both match {leaf}, and "
            "no reading of its axes fits both: give names={module: (path, axes)}."
        )
    if len(found) > 1:
        ways = list(dict.fromkeys(repr(each.fields(first.fields)) for each in found))
        template = first.name
        for field, number in zip(first.fields, first.indices, strict=True):
            template = template.replace(f".{number}.", f".{{{field}}}.", 1)
        # A function shows the axes, but not which number is the index on which axis.
        open_ = len({each.axes for each in found}) > 1 and not places.known.source
        function = "the function (fn, *args) or plan=, or " if open_ else ""
        raise CheckpointError(
            f"{leaf} fits {first.name!r} with the axes {' and '.join(ways)}: shapes do not "
            f"say which. Give {function}names={{{template!r}: "
            f"({first.path + first.part!r}, {ways[0]})}} with the right axes."
        )
    if turned and not places.lies_in_out(first.path):
        raise CheckpointError(
            f"{leaf} fits {first.name!r} with the axes {found[0].axes!r} (layout='jax') "
            f"and {turned[0].axes!r} (layout='torch', as in PyTorch and Equinox): shapes "
            "do not say which. Give the function (fn, *args) or plan=, or layout='jax' or "
            f"layout='torch', or names={{{first.name!r}: (path, axes)}}."
        )
    return found[0]


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
        known = given.axes or places.letters(path, given.part)
        turned: tuple[Reading, ...] = ()
        by_shape = not (known and set(known) <= set("iob"))
        if by_shape:
            own = {"fan_in_fan_out": fan_in_fan_out, "count": count}
            found = readings(shape, kind, dims, places.layout, **own)
            if places.given_layout is None:
                turned = readings(shape, kind, dims, "turned", count=count)
        else:
            found = known_readings(shape, known, kind, dims, count)
            whole = given.axes is None and not given.part
            if not found and whole and places.known.tie(path):
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
    parts_of = (path + _first_part(places.shape(path), entries) for path, _ in near)
    return places.not_found(
        module.name,
        near,
        f"a weight of the kind {module.kind!r} with {dims.n_in} in and {dims.n_out} out"
        f"{kernel}{experts}{axes}",
        part=next(parts_of, "path[0]"),
    )


def _first_part(shape: tuple[int, ...], entries: int) -> str:
    """The first of the equal parts of a leaf that have a number of entries, as a guess."""
    count, rest = divmod(math.prod(shape), entries)
    if rest == 0 and count > 1:
        fused = sorted(axis for axis, n in enumerate(shape) if n % count == 0)
        for axis in sorted(fused, key=lambda axis: shape[axis] != count):
            size = shape[axis] // count
            return f"[{':,' * axis}{'0' if size == 1 else f':{size}'}]"
    return "[0]"
