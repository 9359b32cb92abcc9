"""Finds where a config, the entries of its file and the params do not agree."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.config import PeftConfig, saved_in
from lora_jax.peft.keys import Entries, Module, missing_parameters, without_wrapper
from lora_jax.peft.layout import Site
from lora_jax.peft.leaves import Places
from lora_jax.peft.names import (
    BIAS,
    WEIGHT,
    Words,
    split_name,
    split_path,
)
from lora_jax.peft.rules import Rules, chooses_by_name


def module_check(config: PeftConfig) -> Callable[[Module], None]:
    """Returns a function that raises unless a config agrees with the adapter of a module.

    Raises:
        CheckpointError: from the result, if PEFT would not load the adapter, or change it.
    """
    rules = Rules(config)

    def check(module: Module) -> None:
        name = without_wrapper(module.name)
        inside = module.name.rpartition(".base_layer.")[0]  # of torch.nn.MultiheadAttention
        targeted = chooses_by_name(config) and module.kind != "experts"
        if targeted and not any(rules.matched(each) for each in (name, inside) if each):
            raise CheckpointError(
                f"the module {name!r} has an adapter, but the config's target_modules, "
                "exclude_modules and layers_to_transform do not choose it"
            )
        # The rank of experts has the name of the parameter.
        if module.kind != "experts" and module.rank != config.rank_of(name):
            raise CheckpointError(
                f"the adapter of {name!r} has the rank {module.rank}, and the config says "
                f"{config.rank_of(name)}"
            )
        if config.alpha_of(name) == 0:
            raise CheckpointError(
                f"the alpha of {name!r} is 0 in the config: the adapter would change "
                "nothing"
            )
        for entry, field, what in (
            ("m", "use_dora", "magnitude"),
            ("B_bias", "lora_bias", "lora_B.bias"),
        ):
            has, expected = entry in module.shapes, getattr(config, field)
            if has != expected:
                raise CheckpointError(
                    f"the adapter of {name!r} has {'a' if has else 'no'} {what}, and the "
                    f"config says {field}={expected}"
                )

    return check


def find_missing(
    config: PeftConfig, entries: Entries, places: Places, sites: Iterable[Site]
) -> list[str]:
    """Lists the adapters and the full arrays that the config names and the file lacks."""
    sites = list(sites)
    rules, ends = Rules(config), {_numberless(site.name) for site in sites}
    adapters = [
        f"the config targets {name!r}, which is {path!r} {places.shape(path)}, and there "
        "is no adapter for it: is the file whole?"
        for name, path in _unadapted(places, sites)
        if name not in entries.modules and _is_targeted(rules, name, ends)
    ]
    return [*adapters, *_missing_full(config, entries, places, sites)]


def _unadapted(places: Places, sites: list[Site]) -> Iterator[tuple[str, str]]:
    """The names of modules without adapters, and the paths of their weights."""
    by_part: dict[tuple[str, str], list[Site]] = {}
    siblings: dict[tuple[str, ...], dict[str, Site]] = {}
    for site in sites:
        by_part.setdefault((site.path, site.part), []).append(site)
        siblings.setdefault(_family(split_path(site.path)), {})[site.part] = site
    adapted = {path for path, _ in by_part}
    for path in places.leaves:
        words = split_path(path)
        family = siblings.get(_family(words), {})
        for part, sibling in family.items():
            own = by_part.get((path, part))
            if own is None and path in places.claimed and not part:
                continue
            if own is None and part and places.shape(path) != places.shape(sibling.path):
                continue
            shape = places.shape(path, part)
            names = (
                _other_indices(shape, own) if own else _like_sibling(words, sibling, shape)
            )
            yield from ((name, path) for name in names)
        if family or path in adapted or path in places.claimed:
            continue
        if words.leaf == WEIGHT and len(places.shape(path)) > 1:
            yield ".".join(words.words), path


def _masked(words: Iterable[str]) -> Iterator[str]:
    return ("{}" if word.isdecimal() else word for word in words)


def _numberless(name: str) -> str:
    return ".".join(_masked(name.split(".")))


def _family(words: Words) -> tuple[str, ...]:
    """What the paths of the same weight in all layers have in common."""
    return (*_masked(words.words), words.leaf)


def _like_sibling(words: Words, sibling: Site, shape: tuple[int, ...]) -> list[str]:
    """The modules of a weight, named like the module of the weight in another layer."""
    own = [word for word in words.words if word.isdecimal()]
    theirs = [w for w in split_path(sibling.path).words if w.isdecimal()]
    parts = sibling.name.split(".")
    places = [place for place, word in enumerate(parts) if word.isdecimal()]
    places = [p for p in places if int(parts[p]) not in sibling.indices] or places
    if [parts[place] for place in places] != theirs:
        return []
    for place, number in zip(places, own, strict=True):
        parts[place] = number
    other = sibling._replace(name=".".join(parts))
    return [other.name, *_other_indices(shape, [other])]


def _other_indices(shape: tuple[int, ...], sites: list[Site]) -> list[str]:
    """The names of the modules that a stack has beside those of some sites."""
    first = sites[0]
    if not first.indices:
        return []
    words = [site.name.split(".") for site in sites]
    numbers = [place for place, word in enumerate(words[0]) if word.isdecimal()]
    varied = [p for p in numbers if len({own[p] for own in words if p < len(own)}) > 1]
    if len(varied) < len(first.indices):  # one module: the numbers themselves have to do
        varied = [p for p in numbers if int(words[0][p]) in first.indices]
    if len(varied) != len(first.indices):
        return []
    present = {site.indices for site in sites}
    names = []
    for index in np.ndindex(*(shape[axis] for axis in first.stack)):
        if index not in present:
            other = dict(zip(varied, map(str, index), strict=True))
            names.append(".".join(other.get(p, word) for p, word in enumerate(words[0])))
    return names


def _is_targeted(rules: Rules, name: str, ends: set[str]) -> bool:
    """Whether PEFT would have given a module, or a parameter of one, an adapter.

    Args:
        rules: of the config.
        name: of the module, or of the parameter.
        ends: the names with adapters, without their numbers.
    """
    if rules.targets_parameter(name):
        return True
    if chooses_by_name(rules.config):
        return rules.matched(name)
    # "all-linear" selects classes: a module with an adapter in one layer has it in all.
    return _numberless(name) in ends and rules.verdict(name, (name,)) == "matched"


def _missing_full(
    config: PeftConfig, entries: Entries, places: Places, sites: list[Site]
) -> Iterator[str]:
    """Lists what else the config names and the file lacks."""
    modules = [name.rpartition(".")[0] for name in entries.wholes]
    saved = saved_in(config.modules_to_save or (), modules)
    for name, present in saved.items():
        # A config may list the names that heads have in several models.
        if not present and (not any(saved.values()) or _has_module(places, name)):
            yield f"the config's modules_to_save has {name!r}, and the file lacks it"
    if config.trainable_token_indices and not entries.tokens:
        yield "the config has trainable_token_indices, and the file has no rows of tokens"
    yield from missing_parameters(config.target_parameters or (), entries)
    biased = any(name.endswith(f".{BIAS}") for name in entries.wholes)
    layers = [site.name for site in sites if places.bias_of(site.path)]
    if config.bias != "none" and not biased and layers:
        yield (
            f"the config has bias={config.bias!r}, and the file lacks the bias of "
            f"{layers[0]!r}"
        )


def _has_module(places: Places, name: str) -> bool:
    """Whether params have a module of a name."""
    words = split_name(name)
    paths = (split_path(path).words for path in places.leaves)
    return any(
        own[start : start + len(words)] == words
        for own in paths
        for start in range(len(own))
    )


def find_biased(places: Places, sites: Iterable[Site]) -> list[str]:
    """Lists the layers with a bias, which DoRA multiplies in torchtune and not here."""
    biases = {site.name: places.bias_of(site.path) for site in sites}
    return [
        f"the adapter of {name!r} multiplies the bias {bias!r} too, and DoRA here does "
        "not: merge it where it was trained"
        for name, bias in biases.items()
        if bias
    ]


def shared_leaves(
    sites: Iterable[Site], full: Iterable[Site], rows: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Finds the leaves that two modules of a checkpoint change.

    Args:
        sites: of the adapters.
        full: the sites of full arrays.
        rows: from modules to the paths of leaves that have rows replaced.

    Yields:
        The second module, as the checkpoint has it, and the error.
    """
    owners = {(site.path, site.indices): site.module for site in full}
    for module, path in rows.items():
        other = owners.setdefault((path, ()), module)
        if other != module:
            yield module, _both(other, module, path)
    for site in sites:
        other = owners.get((site.path, site.indices), site.name)
        other = owners.get((site.path, ()), other) if site.part else other
        if other not in (site.name, site.name.rpartition(".")[0]) and (
            site.path not in rows.values()
        ):
            yield site.module, _both(other, site.name, site.path)


def _both(one: str, other: str, path: str) -> str:
    return (
        f"the file changes {one!r} and {other!r}, and both are {path!r}: the leaf has room "
        "for one. Give params with a leaf for each, and a function that uses both"
    )
