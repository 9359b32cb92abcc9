"""What a checkpoint should have and lacks: by its config, and by the params."""

from collections.abc import Iterable, Iterator

import numpy as np

from lora_jax.peft import _fields, _names, _wholes
from lora_jax.peft._checkpoint import chooses_by_name
from lora_jax.peft._entries import Entries, Parameters, nesting
from lora_jax.peft._names import Words
from lora_jax.peft._places import Places
from lora_jax.peft._sites import Site
from lora_jax.peft.config import PeftConfig
from lora_jax.peft.matching import Rules


def missing(
    config: PeftConfig, entries: Entries, places: Places, sites: Iterable[Site]
) -> list[str]:
    """The weights that the config adapts, and the arrays it saves, that are not there."""
    sites = list(sites)
    rules, ends = Rules(config), {_numberless(site.name) for site in sites}
    adapters = [
        f"the config targets {name!r}, which is {path!r} {places.shape(path)}, and there "
        "is no adapter for it: is the file whole?"
        for name, path in _unadapted(places, sites)
        if name not in entries.modules and _is_targeted(rules, name, ends)
    ]
    return [*adapters, *_missing_wholes(config, entries, places, sites)]


def _unadapted(places: Places, sites: list[Site]) -> Iterator[tuple[str, str]]:
    """The names of modules without adapters, and the paths of their weights."""
    by_path: dict[str, list[Site]] = {}
    for site in sites:
        by_path.setdefault(site.path, []).append(site)
    families = {_family(_names.split_path(site.path)): site for site in sites}
    for path in places.leaves:
        shape, words = places.shape(path), _names.split_path(path)
        if path in by_path:
            yield from ((name, path) for name in _other_indices(shape, by_path[path]))
            continue
        if path in places.claimed:
            continue
        sibling = families.get(_family(words))
        if sibling is not None:
            yield from ((name, path) for name in _like_sibling(words, sibling, shape))
        elif words.leaf == _names.WEIGHT and len(shape) > 1:
            yield ".".join(words.words), path


def _family(words: Words) -> tuple[str, ...]:
    """What the paths of the same weight in all layers have in common."""
    return (*("{}" if word.isdecimal() else word for word in words.words), words.leaf)


def _like_sibling(words: Words, sibling: Site, shape: tuple[int, ...]) -> list[str]:
    """The modules of a weight, by that of the same weight in another layer."""
    own = [word for word in words.words if word.isdecimal()]
    theirs = [w for w in _names.split_path(sibling.path).words if w.isdecimal()]
    parts = sibling.name.split(".")
    places = [place for place, word in enumerate(parts) if word.isdecimal()]
    places = [p for p in places if int(parts[p]) not in sibling.indices] or places
    if [parts[place] for place in places] != theirs:
        return []
    for place, number in zip(places, own, strict=True):
        parts[place] = number
    name = ".".join(parts)
    other = sibling._replace(name=name)
    return [name, *_other_indices(shape, [other])] if sibling.indices else [name]


def _other_indices(shape: tuple[int, ...], sites: list[Site]) -> list[str]:
    """What the modules are called that a stack has beside those of some sites."""
    first = sites[0]
    if not first.indices:
        return []
    words = [site.name.split(".") for site in sites]
    numbers = [place for place, word in enumerate(words[0]) if word.isdecimal()]
    varied = [p for p in numbers if len({own[p] for own in words if p < len(own)}) > 1]
    if len(varied) < len(first.indices):  # there is one module: by the numbers themselves
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
    # "all-linear" goes by classes: what has an adapter in one layer has it in all of them.
    return _numberless(name) in ends and rules.verdict(name, (name,)) == "matched"


def _numberless(name: str) -> str:
    return ".".join("{}" if word.isdecimal() else word for word in name.split("."))


def _missing_wholes(
    config: PeftConfig, entries: Entries, places: Places, sites: list[Site]
) -> Iterator[str]:
    """What the config says is there whole, and is not."""
    modules = [name.rpartition(".")[0] for name in entries.wholes]
    saved = _fields.saved_in(config.modules_to_save or (), modules)
    for name, present in saved.items():
        # A config may list the names that heads have in several models.
        if not present and (not any(saved.values()) or _has(places, name)):
            yield f"the config's modules_to_save has {name!r}, and the file lacks it"
    if config.trainable_token_indices and not entries.tokens:
        yield "the config has trainable_token_indices, and the file has no rows of tokens"
    yield from _missing_parameters(config, entries)
    biased = any(name.endswith(f".{_names.BIAS}") for name in entries.wholes)
    layers = [site.name for site in sites if _wholes.find_bias(places, site.path)]
    if config.bias != "none" and not biased and layers:
        yield (
            f"the config has bias={config.bias!r}, and the file lacks that of {layers[0]!r}"
        )


def _missing_parameters(config: PeftConfig, entries: Entries) -> Iterator[str]:
    parameters = config.target_parameters or ()
    owners: dict[str, int] = {}
    for module in entries.modules.values():
        if module.kind == "experts":
            owner = nesting(module.name)[0]
            owners[owner] = owners.get(owner, 0) + 1
    if parameters and not owners:
        yield f"the config targets the parameter {parameters[0]!r}, and the file has none"
    named = Parameters(parameters)
    for owner, count in owners.items():
        names = named.of(owner)
        if count != len(names):
            yield (
                f"the config targets {len(names)} parameters of {owner!r}, "
                f"{', '.join(names)}, and the file has {count}"
            )


def _has(places: Places, name: str) -> bool:
    """Whether params have a module of a name."""
    words = _names.split_name(name)
    paths = (_names.split_path(path).words for path in places.leaves)
    return any(
        own[start : start + len(words)] == words
        for own in paths
        for start in range(len(own))
    )


def biased(places: Places, sites: Iterable[Site]) -> list[str]:
    """The layers with a bias, which an adapter would not multiply here."""
    biases = {site.name: _wholes.find_bias(places, site.path) for site in sites}
    return [
        f"the adapter of {name!r} multiplies the bias {bias!r} too, and DoRA here does "
        "not: merge it where it was trained"
        for name, bias in biases.items()
        if bias
    ]
