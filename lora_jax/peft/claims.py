"""Claims of the modules of a checkpoint to leaves, and the one reading that fits all."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeAlias

from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.formats.keys import Module
from lora_jax.peft.layout import Index, Reading, Site, has_room
from lora_jax.peft.leaves import Places, Problems
from lora_jax.peft.names import NOT_GIVEN, Given
from lora_jax.peft.words import Found, Numbers, lacking_fields
from lora_jax.plan import parts
from lora_jax.plan.parts import LOOKUP, PRODUCT

_Key: TypeAlias = tuple[str, str, str]  # a path, a part and a use


class Claim(NamedTuple):
    """A leaf that may hold the array of a module, and the ways to see the leaf."""

    site: Site
    """Without the letters of the axes, and without the stack."""
    readings: tuple[Reading, ...]
    turned: tuple[Reading, ...] = ()
    """Further ways, if the leaf is transposed."""
    by_shape: bool = False
    """Whether only the shape shows the way."""

    def settle(self, reading: Reading) -> Site:
        """The site, if a reading of the leaf is right."""
        return self.site._replace(axes=reading.axes, stack=reading.stack)


Reader: TypeAlias = Callable[[str, Numbers], Claim]
"""From a path, and the numbers of a module's name that are indexes, to a claim."""


def open_site(
    module: str, name: str, path: str, numbers: Numbers, given: Given = NOT_GIVEN
) -> Site:
    """The site of a module in a leaf, whose axes are not known yet.

    Its fields are named as in the module's name, so that a `NameTable` can be `names`.
    """
    indices, own = tuple(number for _, number in numbers), lacking_fields(name, path)
    same = indices == tuple(number for _, number in own)
    return Site(
        module,
        name,
        path,
        indices=indices,
        fields=tuple(field for field, _ in (own if same else numbers)),
        part=given.part,
        use=given.use,
        given=given.axes is not None,
    )


def fitting(found: Iterable[Found], read: Reader) -> list[Claim]:
    """The claims of a module to some leaves, without the leaves that do not fit."""
    claims = (
        read(path, tuple((f"index{i}", number) for i, number in enumerate(indices)))
        for path, indices in found
    )
    return [claim for claim in claims if claim.readings]


def given_claim(given: Given, name: str, read: Reader, *more: Numbers) -> Claim | None:
    """The claim to the leaf that the caller gave; None if the leaf does not fit.

    Further numbers of the module's name may be indexes of the leaf, and so may `more`.
    """
    numbers = given.numbers, lacking_fields(name, given.path), *more
    claims = (read(given.path, each) for each in dict.fromkeys(numbers))
    return next((claim for claim in claims if claim.readings), None)


def only(name: str, claims: list[Claim]) -> Claim:
    """The one leaf that fits; raises if there are several."""
    if len(claims) > 1:
        raise CheckpointError(
            f"{name!r} may be any of "
            f"{', '.join(repr(claim.site.path) for claim in claims[:8])}: give "
            f"names={{{name!r}: path}}."
        )
    return claims[0]


def shared_readings(
    places: Places, claims: list[Claim]
) -> tuple[list[Reading], list[Reading]]:
    """The ways to see a leaf that fit all of its modules, and those if it is transposed."""
    first, indices = claims[0].site, [claim.site.indices for claim in claims]
    shape, most = (
        places.shape(first.path, first.part),
        [*map(max, zip(*indices, strict=True))],
    )
    ways = []
    for options in ([c.readings for c in claims], [c.turned for c in claims]):
        fit = (each for each in options[0] if has_room(shape, each.stack, most))
        distinct = dict.fromkeys(options)
        ways.append([each for each in fit if all(each in other for other in distinct)])
    return ways[0], ways[1]


def settle_adapters(
    places: Places,
    claims: Iterable[Claim],
    modules: Mapping[str, Module],
    problems: Problems,
) -> dict[str, Site]:
    """The sites of adapters, by the names of the modules.

    `problems` collects the modules whose claims contradict each other.
    """
    by_leaf: dict[_Key, list[Claim]] = {}
    for claim in claims:
        key = (claim.site.path, claim.site.part, claim.site.use)
        by_leaf.setdefault(key, []).append(claim)
    by_leaf = {leaf: _alike(own, modules, problems) for leaf, own in by_leaf.items()}
    places.claimed |= {path for path, *_ in by_leaf}
    _check_apart(places, by_leaf, problems)
    places.shown |= {
        places.family(path)
        for (path, *_), own in by_leaf.items()
        if modules[own[0].site.module].kind != "embedding"
        and all(claim.by_shape and not claim.turned for claim in own)
    }
    sites: dict[str, Site] = {}
    for own in by_leaf.values():
        with problems.collecting():
            reading = _one_reading(places, own)
            sites |= {claim.site.module: claim.settle(reading) for claim in own}
    return {name: sites[name] for name in modules if name in sites}


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


def settle_arrays(places: Places, claims: list[Claim]) -> list[Site]:
    """The sites of full arrays of one leaf; raises unless one reading fits all."""
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
    return [claim.settle(ways[0]) for claim in claims]
