"""Finds the weight of each module of a checkpoint."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.config import PeftConfig
from lora_jax.peft.keys import Module, Parameters, nesting, without_wrapper
from lora_jax.peft.layout import (
    SWAPPED,
    Index,
    Reading,
    Site,
    has_room,
    known_readings,
    readings,
)
from lora_jax.peft.leaves import Places, Problems, agrees
from lora_jax.peft.names import NOT_GIVEN, Given
from lora_jax.peft.words import (
    HEADS,
    WEIGHT,
    Found,
    Numbers,
    lacking_fields,
    last_word,
    name_indices,
    split_name,
    split_path,
)
from lora_jax.plan import parts
from lora_jax.plan.parts import LOOKUP, PRODUCT

_FUSED = "in_proj_weight"  # of torch.nn.MultiheadAttention
_WEIGHTS = (WEIGHT, "")
_Key: TypeAlias = tuple[str, str, str]  # a path, a part and a use


class Claim(NamedTuple):
    """A leaf that may hold the array of a module, and the ways to see the leaf."""

    module: str
    """As in `Site`, and so is `name`."""
    name: str
    path: str
    numbers: Numbers
    """The numbers in the name that are indexes of the leaf."""
    readings: tuple[Reading, ...]
    turned: tuple[Reading, ...] = ()
    """Further ways, if the leaf is transposed."""
    by_shape: bool = False
    """Whether only the shape shows the way."""
    part: str = ""
    """As in `Site`, and so are `use` and `given`."""
    use: str = ""
    given: bool = False

    @property
    def key(self) -> str:
        """The path with the part, as `names` has it."""
        return self.path + self.part

    @property
    def indices(self) -> Index:
        """The index on each axis of the stack."""
        return tuple(number for _, number in self.numbers)

    def site(self, reading: Reading) -> Site:
        """The site, if a reading of the leaf is right.

        Its fields are named as in the module's name, so that a `NameTable` can be `names`.
        """
        numbers = lacking_fields(self.name, self.path)
        if tuple(number for _, number in numbers) != self.indices:
            numbers = self.numbers
        fields = tuple(field for field, _ in numbers)
        axes, stack = reading
        return Site(
            self.module,
            self.name,
            self.path,
            axes,
            self.indices,
            stack,
            fields,
            part=self.part,
            use=self.use,
            given=self.given,
        )


def fitting(
    name: str, found: Iterable[Found], read: Callable[[str, Numbers], Claim]
) -> list[Claim]:
    """The claims of a module to some leaves, without the leaves that do not fit.

    `read` makes a claim from a path, and the numbers of the name that are indexes.
    """
    claims = (read(path, name_indices(name, path, indices)) for path, indices in found)
    return [claim for claim in claims if claim.readings]


def given_claim(
    given: Given, module: str, read: Callable[[str, Numbers], Claim], *more: Numbers
) -> Claim | None:
    """The claim to the leaf that the caller gave; None if the leaf does not fit.

    Further numbers of the module's name may be indexes of the leaf, and so may `more`.
    """
    numbers = given.numbers, lacking_fields(module, given.path), *more
    claims = (read(given.path, each) for each in dict.fromkeys(numbers))
    return next((claim for claim in claims if claim.readings), None)


def only(name: str, claims: list[Claim]) -> Claim:
    """The one leaf that fits; raises if there are several."""
    if len(claims) > 1:
        raise CheckpointError(
            f"{name!r} may be any of "
            f"{', '.join(repr(claim.path) for claim in claims[:8])}: give "
            f"names={{{name!r}: path}}."
        )
    return claims[0]


def shared_readings(
    places: Places, claims: list[Claim]
) -> tuple[list[Reading], list[Reading]]:
    """The ways to see a leaf that fit all of its modules, and those if it is transposed."""
    first = claims[0]
    shape = places.shape(first.path, first.part)
    most = [max(column) for column in zip(*(c.indices for c in claims), strict=True)]
    ways = []
    for options in ([c.readings for c in claims], [c.turned for c in claims]):
        fit = (each for each in options[0] if has_room(shape, each.stack, most))
        distinct = dict.fromkeys(options)
        ways.append([each for each in fit if all(each in other for other in distinct)])
    return ways[0], ways[1]


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
        use = claim.use
        if splits_ties and not use:
            use = places.known.side(claim.path, modules[claim.module].kind)
        key = (claim.path, claim.part, use)
        by_leaf.setdefault(key, []).append(claim._replace(use=use))
    by_leaf = {leaf: _alike(claims, modules, problems) for leaf, claims in by_leaf.items()}
    places.claimed |= {path for path, *_ in by_leaf}
    _check_apart(places, by_leaf, problems)
    places.shown |= {
        places.family(path)
        for (path, *_), claims in by_leaf.items()
        if modules[claims[0].module].kind != "embedding"
        and all(claim.by_shape and not claim.turned for claim in claims)
    }
    sites: dict[str, Site] = {}
    for claims in by_leaf.values():
        with problems.collecting():
            reading = _one_reading(places, claims)
            sites |= {claim.module: claim.site(reading) for claim in claims}
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
                other = by_leaf[before][0]
                problems.lines.append(
                    f"{other.module!r} and {claims[0].module!r} both match entries of "
                    f"{path!r}, {other.key!r} and {claims[0].key!r}: give names={{module: "
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
            other = taken.setdefault(claim.indices, claim)
            if other is not claim:
                raise CheckpointError(
                    f"{other.module!r} and {claim.module!r} both match {claim.path!r}: "
                    "give names={module: path}."
                )
    return [*taken.values()]


def _check_alike(one: Claim, other: Claim, modules: Mapping[str, Module]) -> None:
    """Raises if two modules see one leaf in different ways."""
    first, second = modules[one.module], modules[other.module]
    kinds = first.kind, second.kind
    turned = first.dims[:2] == second.dims[1::-1]
    if kinds.count("embedding") == 1 and turned:
        uses = [LOOKUP if kind == "embedding" else PRODUCT for kind in kinds]
        sides = [f"{one.path}@{use}" for use in uses]
        raise CheckpointError(
            f"{one.module!r} and {other.module!r} have an adapter each, and both "
            f"are {one.path!r}, which is tied: an adapter of that leaf would act on both. "
            "Give the function (fn, *args) that looks rows up and multiplies by the leaf, "
            f"or names={{{one.name!r}: {sides[0]!r}, {other.name!r}: {sides[1]!r}}}, "
            "or params in which the embedding and the output head are two leaves."
        )
    if kinds[0] != kinds[1] or len(one.numbers) != len(other.numbers):
        raise CheckpointError(
            f"{one.module!r} and {other.module!r} both match {one.path!r}, the "
            f"first as {kinds[0]!r} with the axes {one.readings[0].axes!r}, the other as "
            f"{kinds[1]!r} with {other.readings[0].axes!r}: give names={{module: path}}."
        )


def _one_reading(places: Places, claims: list[Claim]) -> Reading:
    """The one way to see a leaf that fits all of its modules; else raises."""
    first = claims[0]
    shape = places.shape(first.path, first.part)
    found, turned = shared_readings(places, claims)
    if not found:
        last = max(claims, key=lambda claim: claim.indices)
        raise CheckpointError(
            f"{first.module!r} and {last.module!r} both match {first.key!r} {shape}, and "
            "no reading of its axes fits both: give names={module: (path, axes)}."
        )
    if len(found) > 1:
        raise _several_error(places, first, found)
    if turned and not places.lies_in_out(first.path):
        raise CheckpointError(
            f"{first.key!r} {shape} fits {first.name!r} with the axes "
            f"{found[0].axes!r} (layout='jax') and {turned[0].axes!r} (layout='torch', as "
            "in PyTorch and Equinox): shapes do not say which. Give the function (fn, "
            "*args) or plan=, or layout='jax' or "
            f"layout='torch', or names={{{first.name!r}: (path, axes)}}."
        )
    return found[0]


def _several_error(places: Places, claim: Claim, found: list[Reading]) -> CheckpointError:
    """The error for a leaf whose axes can be read in several ways."""
    fields = [field for field, _ in claim.numbers]
    ways = list(dict.fromkeys(repr(each.fields(fields)) for each in found))
    template = claim.name
    for field, number in claim.numbers:
        template = template.replace(f".{number}.", f".{{{field}}}.", 1)
    # A function shows the axes, but not which number is the index on which axis.
    open_ = len({each.axes for each in found}) > 1 and not places.known.source
    function = "the function (fn, *args) or plan=, or " if open_ else ""
    shape = places.shape(claim.path, claim.part)
    return CheckpointError(
        f"{claim.key!r} {shape} fits {claim.name!r} with the "
        f"axes {' and '.join(ways)}: shapes do not say which. Give {function}"
        f"names={{{template!r}: ({claim.key!r}, {ways[0]})}} with the right axes."
    )


def _find_module(places: Places, module: Module, fan_in_fan_out: bool) -> Claim:
    name = without_wrapper(module.name)
    given = places.given(name)
    if given is not None:
        return _find_given(places, module, given, name, fan_in_fan_out)
    words = split_name(name)
    near = places.search(words, _WEIGHTS)
    read = _reader(places, module, name, fan_in_fan_out)
    claims = fitting(name, near, read)
    claims = claims or fitting(name, places.search((*words, _FUSED), ("",)), read)
    if not claims and last_word(name) in HEADS and module.kind == "linear":
        tied = (path for path in places.leaves if places.known.side(path, "linear"))
        claims = fitting(name, [Found(path, ()) for path in tied], read)
    if not claims:
        raise _not_found(places, module, near)
    return only(module.name, claims)


def _reader(
    places: Places,
    module: Module,
    name: str,
    fan_in_fan_out: bool = False,
    given: Given = NOT_GIVEN,
) -> Callable[[str, Numbers], Claim]:
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
        return Claim(
            module.name,
            name,
            path,
            numbers,
            readings=found,
            turned=turned if found else (),
            by_shape=by_shape,
            part=given.part,
            use=given.use,
            given=given.axes is not None,
        )

    return read


def _find_given(
    places: Places, module: Module, given: Given, name: str, fan_in_fan_out: bool = False
) -> Claim:
    """The claim to the leaf that the caller gave."""
    read = _reader(places, module, name, fan_in_fan_out, given)
    claim = given_claim(given, without_wrapper(module.name), read)
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
        if len({(claim.path, claim.indices) for claim in way}) == len(way)
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
            claims += fitting(name, found, _reader(places, module, name))
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
