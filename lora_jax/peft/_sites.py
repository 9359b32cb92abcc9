"""Where in the params the adapter of each module of a checkpoint belongs."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from lora_jax._files import CheckpointError
from lora_jax.peft import _names
from lora_jax.peft._entries import (
    Dims,
    Kind,
    Module,
    nesting,
    parameter_names,
    without_wrapper,
)
from lora_jax.peft._fitting import axes_fit, fitting_axes
from lora_jax.peft._names import Found
from lora_jax.peft._places import Places, Problems
from lora_jax.peft.config import PeftConfig

_FUSED = "in_proj_weight"  # of torch.nn.MultiheadAttention
_WEIGHTS = (_names.WEIGHT, "")


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
    sites: dict[str, Site] = {}
    taken: dict[tuple[str, tuple[int, ...]], Site] = {}
    for owner, own in owners.items():
        with problems.collecting():
            if own[0].kind == "experts":
                found = find_parameters(places, owner, own, config)
            else:
                found = [_site(places, own[0], config.fan_in_fan_out)]
            for site in found:
                first = taken.setdefault((site.path, ()), site)
                other = taken.setdefault((site.path, site.indices), site)
                _check_both(first, site, modules)
                if other.module != site.module:
                    raise CheckpointError(
                        f"{other.module!r} and {site.module!r} both go to "
                        f"{site.path!r}: give names={{module: path}}."
                    )
            sites |= {site.module: site for site in found}
    return sites


def _check_both(site: Site, other: Site, modules: Mapping[str, Module]) -> None:
    """Raises if two modules see one weight in two ways."""
    views = [
        (modules[each.module].kind, each.axes, len(each.indices)) for each in (site, other)
    ]
    if views[0] != views[1]:
        raise CheckpointError(
            f"{site.module!r} and {other.module!r} both go to {site.path!r}, the first as "
            f"{views[0][0]!r} with the axes {site.axes!r}, the other as {views[1][0]!r} "
            f"with {other.axes!r}: give names={{module: path}}."
        )


def _site(places: Places, module: Module, fan_in_fan_out: bool) -> Site:
    name = without_wrapper(module.name)
    given = places.given(name)
    if given is not None:
        return _given_site(places, module, *given, fan_in_fan_out)
    words = _names.split_name(name)
    near = places.search(words, _WEIGHTS)
    sites = [*_fitting(places, module, near, fan_in_fan_out)]
    if not sites:
        fused = places.search((*words, _FUSED), ("",))
        sites = [*_fitting(places, module, fused, fan_in_fan_out)]
    return only(places, module, sites, near)


def _fitting(
    places: Places,
    module: Module,
    found: Iterable[Found],
    fan_in_fan_out: bool = False,
    name: str = "",
) -> Iterator[Site]:
    """The places whose weights have the sizes of a module."""
    name = name or without_wrapper(module.name)
    for path, index in found:
        axes = fitting_axes(
            places.shape(path),
            module.kind,
            module.dims,
            places.layout,
            fan_in_fan_out=fan_in_fan_out,
            stacked=len(index),
        )
        if axes is not None and _in_stack(places.shape(path), axes, index):
            yield Site(module.name, name, path, axes, index)


def _in_stack(shape: tuple[int, ...], axes: str, index: tuple[int, ...]) -> bool:
    """Whether the stacked axes of a weight are as long as the indexes need."""
    sizes = [size for size, letter in zip(shape, axes, strict=True) if letter == "b"]
    return all(own < size for own, size in zip(index, sizes, strict=False))


def _given_site(
    places: Places,
    module: Module,
    found: Found,
    axes: str | None,
    fan_in_fan_out: bool = False,
    name: str = "",
) -> Site:
    """The place that the caller gave; the numbers in the name may be indexes there."""
    name = name or without_wrapper(module.name)
    numbers = _names.lacking(module.name, found.path)
    either = dict.fromkeys([found, found._replace(indices=numbers)])
    if axes is None:
        sites = [*_fitting(places, module, either, fan_in_fan_out, name)]
        return only(places, module, sites[:1], [found])
    shape = places.shape(found.path)
    for path, index in either:
        fits = axes_fit(shape, axes, module.dims, len(index))
        if fits and _in_stack(shape, axes, index):
            return Site(module.name, name, path, axes, index)
    needed = _needed(module.kind, module.dims)
    raise places.not_found(module.name, [found], f"{needed}, with the axes {axes!r}")


def find_parameters(
    places: Places, owner: str, modules: list[Module], config: PeftConfig
) -> list[Site]:
    """Finds the places of the adapters of a module's parameters.

    A checkpoint says how deep each lies, and not of which parameter it is: shapes do.

    Args:
        places: where to look.
        owner: the name of the module.
        modules: the adapters of its parameters.
        config: of the checkpoint.

    Returns:
        Their sites.

    Raises:
        CheckpointError: if shapes leave it open.
    """
    names = parameter_names(owner, config.target_parameters or ())
    options = [
        _parameter_sites(
            places, module, [n for n in names if config.rank_of(n) == module.rank]
        )
        for module in modules
    ]
    for module, sites in zip(modules, options, strict=True):
        if not sites:
            near = [each for name in names for each in _search_parameter(places, name)]
            needed = _needed(module.kind, module.dims)
            raise places.not_found(module.name, near, needed)
    ways = [
        way
        for way in itertools.product(*options)
        if len({(site.path, site.indices) for site in way}) == len(way)
    ]
    if len(ways) != 1:
        listed = ", ".join(repr(module.name) for module in modules)
        raise CheckpointError(
            f"the shapes leave {'no way' if not ways else 'it open how'} "
            f"to assign the adapters {listed} to the parameters {', '.join(names)}: give "
            "names={adapter: (path, axes)}, with axes such as 'bio'."
        )
    return list(ways[0])


def _parameter_sites(places: Places, module: Module, names: list[str]) -> list[Site]:
    """The places that shapes allow for an adapter of one of some parameters."""
    given = places.given(module.name)
    if given is not None:
        last = _names.split_path(given[0].path).words[-1]
        own = [name for name in names if name.endswith(f".{last}")]
        return [_given_site(places, module, *given, name=(own or [module.name])[0])]
    sites = []
    for name in names:
        given = places.given(name)
        if given is None:
            found = _search_parameter(places, name)
            sites += _fitting(places, module, found, name=name)
        else:
            with contextlib.suppress(CheckpointError):  # then it is that of another module
                sites.append(_given_site(places, module, *given, name=name))
    return sites


def _search_parameter(places: Places, name: str) -> list[Found]:
    return places.search(_names.split_path(name).words, _WEIGHTS)


def only(places: Places, module: Module, sites: list[Site], near: Iterable[Found]) -> Site:
    """The one site that fits, or the error that says why there is none."""
    if len(sites) > 1:
        raise CheckpointError(
            f"{module.name!r} may be any of "
            f"{', '.join(repr(site.path) for site in sites)}: give "
            f"names={{{module.name!r}: path}}."
        )
    if not sites:
        raise places.not_found(module.name, near, _needed(module.kind, module.dims))
    return sites[0]


def _needed(kind: Kind, dims: Dims) -> str:
    """What a module needs of its weight, in words."""
    sizes = f"{dims.n_in} in and {dims.n_out} out"
    extra = f" and a kernel {dims.kernel}" if dims.kernel else ""
    experts = f" for each of {dims.experts} experts" if dims.experts else ""
    return f"a weight of the kind {kind!r} with {sizes}{extra}{experts}"
