"""The weight that each module of a checkpoint belongs to."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.config import PeftConfig
from lora_jax.peft.given import Given
from lora_jax.peft.keys import Dims, Kind, Module, Parameters, nesting, without_wrapper
from lora_jax.peft.layout import (
    SWAPPED,
    Reading,
    has_room,
    known_readings,
    readings,
    shared_ways,
    turned_readings,
)
from lora_jax.peft.leaves import Places, Problems, agrees
from lora_jax.peft.names import (
    WEIGHT,
    Found,
    Numbers,
    lacking_fields,
    name_indices,
    split_name,
    split_path,
)

_FUSED = "in_proj_weight"  # of torch.nn.MultiheadAttention
_WEIGHTS = (WEIGHT, "")
_LISTED = 8


class Site(NamedTuple):
    """The place of a module's adapter."""

    module: str
    """In the checkpoint."""
    name: str
    """What `names` calls it: the module in the model, or the parameter."""
    path: str
    """Of the weight."""
    axes: str
    """The letters of the weight's axes, as in `LoraConfig.axes`."""
    indices: tuple[int, ...] = ()
    """Which of the matrices that are stacked in the weight, if each has a module."""
    stack: tuple[int, ...] = ()
    """The axis of each of these indices."""
    fields: tuple[str, ...] = ()
    """What the number in the name that is each of these indices is called."""

    @property
    def reading(self) -> Reading:
        """How the weight is seen."""
        return Reading(self.axes, self.stack)

    @property
    def own_axes(self) -> str:
        """The letters of the axes of the module's own weight, without those of a stack."""
        return "".join(x for axis, x in enumerate(self.axes) if axis not in self.stack)


class Claim(NamedTuple):
    """A leaf that may be the weight of a module."""

    module: Module
    name: str
    path: str
    numbers: Numbers
    readings: tuple[Reading, ...]
    turned: tuple[Reading, ...] = ()
    """Further readings, if the weight lies the other way round."""
    by_shape: bool = False
    """Whether only the shape says how the weight is seen."""

    @property
    def indices(self) -> tuple[int, ...]:
        """The numbers in the module's name that are indexes of the leaf."""
        return tuple(number for _, number in self.numbers)


def find_sites(
    places: Places,
    modules: Mapping[str, Module],
    config: PeftConfig,
    problems: Problems,
) -> dict[str, Site]:
    """Finds the place of each module.

    Args:
        places: where to look.
        modules: the adapters of a checkpoint.
        config: of the checkpoint.
        problems: what takes note of the modules that have no place, or more than one, or
            that of another.

    Returns:
        The sites by the names of the modules.
    """
    owners: dict[str, list[Module]] = {}
    for name, module in modules.items():
        owner = nesting(name)[0] if module.kind == "experts" else name
        owners.setdefault(owner, []).append(module)
    parameters = Parameters(config.target_parameters or ())
    by_path: dict[str, list[Claim]] = {}
    for owner, own in owners.items():
        with problems.collecting():
            if own[0].kind == "experts":
                claims = find_parameters(places, parameters.of(owner), own, config)
            else:
                claims = [_claim(places, own[0], config.fan_in_fan_out)]
            for claim in claims:
                by_path.setdefault(claim.path, []).append(claim)
    by_path = {path: _one_view(claims, problems) for path, claims in by_path.items()}
    places.claimed |= by_path.keys()
    places.shown |= {
        places.family(path) for path, claims in by_path.items() if _shows_layout(claims)
    }
    sites: dict[str, Site] = {}
    for claims in by_path.values():
        with problems.collecting():
            for site in _settle(places, claims):
                sites[site.module] = site
    return {name: sites[name] for name in modules if name in sites}


def _one_view(claims: list[Claim], problems: Problems) -> list[Claim]:
    """The claims to a leaf that see it as the first does, each another part of it."""
    first, taken = claims[0], dict[tuple[int, ...], Claim]()
    for claim in claims:
        with problems.collecting():
            _check_both(first, claim)
            other = taken.setdefault(claim.indices, claim)
            if other is not claim:
                raise CheckpointError(
                    f"{other.module.name!r} and {claim.module.name!r} both go to "
                    f"{claim.path!r}: give names={{module: path}}."
                )
    return [*taken.values()]


def _check_both(one: Claim, other: Claim) -> None:
    """Raises if two modules see one weight in two ways."""
    kinds = one.module.kind, other.module.kind
    embeddings = [kind == "embedding" for kind in kinds]
    turned = one.module.dims[:2] == other.module.dims[1::-1]
    if any(embeddings) and not all(embeddings) and turned:
        raise CheckpointError(
            f"{one.module.name!r} and {other.module.name!r} have an adapter each, and both "
            f"are {one.path!r}, which is tied: an adapter of that leaf would act on both. "
            "Give params in which the embedding and the output head are two leaves, and a "
            "function that uses both."
        )
    if kinds[0] != kinds[1] or len(one.numbers) != len(other.numbers):
        raise CheckpointError(
            f"{one.module.name!r} and {other.module.name!r} both go to {one.path!r}, the "
            f"first as {kinds[0]!r} with the axes {one.readings[0].axes!r}, the other as "
            f"{kinds[1]!r} with {other.readings[0].axes!r}: give names={{module: path}}."
        )


def _shows_layout(claims: list[Claim]) -> bool:
    """Whether the shape of a leaf shows that it lies as `layout="jax"` says."""
    return claims[0].module.kind != "embedding" and all(
        claim.by_shape and not claim.turned for claim in claims
    )


def _settle(places: Places, claims: list[Claim]) -> Iterator[Site]:
    """The sites of the modules of one leaf, which has to be seen in one way."""
    first = claims[0]
    shape, indices = places.shape(first.path), [claim.indices for claim in claims]
    found = shared_ways(shape, [claim.readings for claim in claims], indices)
    turned = shared_ways(shape, [claim.turned for claim in claims], indices)
    if not found:
        last = max(claims, key=lambda claim: claim.indices)
        raise CheckpointError(
            f"{first.module.name!r} and {last.module.name!r} both are "
            f"{first.path!r} {places.shape(first.path)}, and no way to see it fits both: "
            "give names={module: (path, axes)}."
        )
    if len(found) > 1:
        raise _open_error(places, first, found)
    if turned and not places.lies_in_out(first.path):
        raise _open_layout(places, first, found[0], turned[0])
    ((axes, stack),) = found
    for claim in claims:
        fields = tuple(field for field, _ in claim.numbers)
        name = claim.module.name, claim.name, claim.path
        yield Site(*name, axes, claim.indices, stack, fields)


def _open_error(places: Places, claim: Claim, found: list[Reading]) -> CheckpointError:
    """The error about a weight that may be seen in several ways."""
    fields = [field for field, _ in claim.numbers]
    ways = list(dict.fromkeys(repr(each.fields(fields)) for each in found))
    template = claim.name
    for field, number in claim.numbers:
        template = template.replace(f".{number}.", f".{{{field}}}.", 1)
    # A function shows the axes, and not which number is the index of which.
    open_ = len({each.axes for each in found}) > 1 and not places.known.source
    function = "the function (fn, *args) or plan=, or " if open_ else ""
    return CheckpointError(
        f"{claim.path!r} {places.shape(claim.path)} fits {claim.name!r} with the axes "
        f"{' and '.join(ways)}: shapes do not say which. Give {function}"
        f"names={{{template!r}: ({claim.path!r}, {ways[0]})}} with those that are right."
    )


def _open_layout(
    places: Places, claim: Claim, straight: Reading, turned: Reading
) -> CheckpointError:
    """The error about a square weight that may lie either way."""
    return CheckpointError(
        f"{claim.path!r} {places.shape(claim.path)} fits {claim.name!r} with the axes "
        f"{straight.axes!r} (layout='jax') and {turned.axes!r} (layout='torch', as "
        "PyTorch and Equinox have it): shapes do not say which. Give the function (fn, "
        "*args) or plan=, or layout='jax' or "
        f"layout='torch', or names={{{claim.name!r}: (path, axes)}}."
    )


def _claim(places: Places, module: Module, fan_in_fan_out: bool) -> Claim:
    name = without_wrapper(module.name)
    given = places.given(name)
    if given is not None:
        return _given_claim(places, module, given, fan_in_fan_out)
    words = split_name(name)
    near = places.search(words, _WEIGHTS)
    claims = [*_fitting(places, module, near, fan_in_fan_out)]
    if not claims:
        fused = places.search((*words, _FUSED), ("",))
        claims = [*_fitting(places, module, fused, fan_in_fan_out)]
    return only(places, module, claims, near)


def _fitting(
    places: Places,
    module: Module,
    found: Iterable[Found],
    fan_in_fan_out: bool = False,
    name: str = "",
) -> Iterator[Claim]:
    """The leaves that have the sizes of a module."""
    name = name or without_wrapper(module.name)
    for path, indices in found:
        numbers = name_indices(name, path, indices)
        claim = _read_claim(places, module, name, path, numbers, fan_in_fan_out)
        if claim.readings:
            yield claim


def _read_claim(
    places: Places,
    module: Module,
    name: str,
    path: str,
    numbers: Numbers,
    fan_in_fan_out: bool = False,
    axes: str | None = None,
    fields: tuple[str, ...] = (),
) -> Claim:
    """What a leaf is as the weight of a module; without readings if it does not fit.

    Args:
        places: the leaves.
        module: of the checkpoint.
        name: of the module, or of the parameter.
        path: of the leaf.
        numbers: of the name, that are indexes of the leaf.
        fan_in_fan_out: of the checkpoint.
        axes: the letters of the leaf's axes, if the caller gave them.
        fields: the fields that the caller gave some of the batch axes.
    """
    shape, kind, dims, count = places.shape(path), module.kind, module.dims, len(numbers)
    known = axes or places.known.axes.get(path, "")
    turned: tuple[Reading, ...] = ()
    by_shape = not (known and set(known) <= set("iob"))
    if not by_shape:
        found = known_readings(shape, known, kind, dims, count)
        if not found and axes is None and places.known.tie(path):
            swapped = known.translate(SWAPPED)
            found = known_readings(shape, swapped, kind, dims, count)
    else:
        own = {"fan_in_fan_out": fan_in_fan_out, "count": count}
        found = readings(shape, kind, dims, places.layout, **own)
        if places.given_layout is None:
            turned = turned_readings(shape, kind, dims, count)
        if known:
            found, turned = (
                tuple(each for each in both if agrees(each.axes, known))
                for both in (found, turned)
            )
    indices = [number for _, number in numbers]
    batch = [axis for axis, letter in enumerate(known) if letter == "b"]
    order = {field: a for field, a in zip(fields, batch, strict=False) if field}
    if order:
        stack = tuple(order.get(field, -1) for field, _ in numbers)
        found = tuple(each for each in found if each.stack == stack)
    found, turned = (
        tuple(each for each in both if has_room(shape, each.stack, indices))
        for both in (found, turned)
    )
    return Claim(module, name, path, numbers, found, turned if found else (), by_shape)


def _given_claim(
    places: Places,
    module: Module,
    given: Given,
    fan_in_fan_out: bool = False,
    name: str = "",
) -> Claim:
    """The place that the caller gave; the numbers in the name may be indexes there."""
    name = name or without_wrapper(module.name)
    path = given.path
    either = dict.fromkeys(
        [given.numbers, lacking_fields(without_wrapper(module.name), path)]
    )
    more = fan_in_fan_out, given.axes, given.fields
    for numbers in either:
        claim = _read_claim(places, module, name, path, numbers, *more)
        if claim.readings:
            return claim
    needed = _needed(module.kind, module.dims)
    if given.axes is not None:
        shown = Reading(given.axes).axes
        needed += f", with the axes {shown!r}"
    indices = tuple(number for _, number in given.numbers)
    raise places.not_found(module.name, [Found(path, indices)], needed)


def find_parameters(
    places: Places, names: list[str], modules: list[Module], config: PeftConfig
) -> list[Claim]:
    """Finds the places of the adapters of a module's parameters.

    A checkpoint says how deep each lies, and not of which parameter it is: shapes do.

    Args:
        places: where to look.
        names: of the parameters.
        modules: the adapters of its parameters.
        config: of the checkpoint.

    Returns:
        The leaves that they are.

    Raises:
        CheckpointError: if shapes leave it open.
    """
    options = [
        _parameter_claims(
            places, module, [n for n in names if config.rank_of(n) == module.rank]
        )
        for module in modules
    ]
    for module, claims in zip(modules, options, strict=True):
        if not claims:
            near = [each for name in names for each in _search_parameter(places, name)]
            needed = _needed(module.kind, module.dims)
            raise places.not_found(module.name, near, needed)
    ways = [
        way
        for way in itertools.product(*options)
        if len({(claim.path, claim.indices) for claim in way}) == len(way)
    ]
    if len(ways) != 1:
        listed = ", ".join(repr(module.name) for module in modules)
        raise CheckpointError(
            f"the shapes leave {'no way' if not ways else 'it open how'} "
            f"to assign the adapters {listed} to the parameters {', '.join(names)}: give "
            "names={adapter: (path, axes)}, with axes such as 'bio'."
        )
    return list(ways[0])


def _parameter_claims(places: Places, module: Module, names: list[str]) -> list[Claim]:
    """The places that shapes allow for an adapter of one of some parameters."""
    given = places.given(module.name)
    if given is not None:
        last = split_path(given.path).words[-1]
        own = [name for name in names if name.endswith(f".{last}")]
        return [_given_claim(places, module, given, name=(own or [module.name])[0])]
    claims = []
    for name in names:
        given = places.given(name)
        if given is None:
            found = _search_parameter(places, name)
            claims += _fitting(places, module, found, name=name)
        else:
            with contextlib.suppress(CheckpointError):  # then it is that of another module
                claims.append(_given_claim(places, module, given, name=name))
    return claims


def _search_parameter(places: Places, name: str) -> list[Found]:
    return places.search(split_path(name).words, _WEIGHTS)


def only(
    places: Places, module: Module, claims: list[Claim], near: Iterable[Found]
) -> Claim:
    """The one place that fits, or the error that says why there is none."""
    if len(claims) > 1:
        raise CheckpointError(
            f"{module.name!r} may be any of "
            f"{', '.join(repr(claim.path) for claim in claims[:_LISTED])}: give "
            f"names={{{module.name!r}: path}}."
        )
    if not claims:
        raise places.not_found(module.name, near, _needed(module.kind, module.dims))
    return claims[0]


def _needed(kind: Kind, dims: Dims) -> str:
    """What a module needs of its weight, in words."""
    sizes = f"{dims.n_in} in and {dims.n_out} out"
    extra = f" and a kernel {dims.kernel}" if dims.kernel else ""
    experts = f" for each of {dims.experts} experts" if dims.experts else ""
    return f"a weight of the kind {kind!r} with {sizes}{extra}{experts}"
