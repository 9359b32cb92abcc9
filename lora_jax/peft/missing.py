"""Where a config, the entries of its file and the params do not agree."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.config import PeftConfig
from lora_jax.peft.full import find_bias
from lora_jax.peft.keys import Entries, Module, Parameters, nesting, without_wrapper
from lora_jax.peft.leaves import Places
from lora_jax.peft.locate import Site
from lora_jax.peft.names import BIAS, WEIGHT, Words, split_name, split_path
from lora_jax.peft.patterns import saved_in
from lora_jax.peft.rules import Rules
from lora_jax.plan.config import ALL_LINEAR


def chooses_by_name(config: PeftConfig) -> bool:
    """Whether a module's name decides if it has an adapter."""
    targets = config.target_modules
    whole = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    return bool(targets) and not whole


def module_check(config: PeftConfig) -> Callable[[Module], None]:
    """What raises unless the config of a checkpoint agrees with the adapter of a module.

    Raises:
        CheckpointError: from the result, if PEFT would not load it, or not as it is.
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
        _check_numbers(config, module, name)

    return check


def _check_numbers(config: PeftConfig, module: Module, name: str) -> None:
    """Raises unless the ranks and the entries of a module are those of the config."""
    # That of experts goes by the name of the parameter.
    if module.kind != "experts" and module.rank != config.rank_of(name):
        raise CheckpointError(
            f"the adapter of {name!r} has the rank {module.rank}, and the config says "
            f"{config.rank_of(name)}"
        )
    if config.alpha_of(name) == 0:
        raise CheckpointError(
            f"the alpha of {name!r} is 0 in the config: the adapter would change nothing"
        )
    has, expected = "m" in module.shapes, config.use_dora
    if has != expected:
        raise CheckpointError(
            f"the adapter of {name!r} has {'a' if has else 'no'} magnitude, and the config "
            f"says use_dora={expected}"
        )
    if ("B_bias" in module.shapes) != config.lora_bias:
        has_bias = "B_bias" in module.shapes
        raise CheckpointError(
            f"the adapter of {name!r} has {'a' if has_bias else 'no'} lora_B.bias, and the "
            f"config says lora_bias={config.lora_bias}"
        )


def find_missing(
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
    families = {_family(split_path(site.path)): site for site in sites}
    for path in places.leaves:
        shape, words = places.shape(path), split_path(path)
        if path in by_path:
            yield from ((name, path) for name in _other_indices(shape, by_path[path]))
            continue
        if path in places.claimed:
            continue
        sibling = families.get(_family(words))
        if sibling is not None:
            yield from ((name, path) for name in _like_sibling(words, sibling, shape))
        elif words.leaf == WEIGHT and len(shape) > 1:
            yield ".".join(words.words), path


def _family(words: Words) -> tuple[str, ...]:
    """What the paths of the same weight in all layers have in common."""
    return (*("{}" if word.isdecimal() else word for word in words.words), words.leaf)


def _like_sibling(words: Words, sibling: Site, shape: tuple[int, ...]) -> list[str]:
    """The modules of a weight, by that of the same weight in another layer."""
    own = [word for word in words.words if word.isdecimal()]
    theirs = [w for w in split_path(sibling.path).words if w.isdecimal()]
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
    saved = saved_in(config.modules_to_save or (), modules)
    for name, present in saved.items():
        # A config may list the names that heads have in several models.
        if not present and (not any(saved.values()) or _has(places, name)):
            yield f"the config's modules_to_save has {name!r}, and the file lacks it"
    if config.trainable_token_indices and not entries.tokens:
        yield "the config has trainable_token_indices, and the file has no rows of tokens"
    yield from _missing_parameters(config, entries)
    biased = any(name.endswith(f".{BIAS}") for name in entries.wholes)
    layers = [site.name for site in sites if find_bias(places, site.path)]
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
    words = split_name(name)
    paths = (split_path(path).words for path in places.leaves)
    return any(
        own[start : start + len(words)] == words
        for own in paths
        for start in range(len(own))
    )


def find_biased(places: Places, sites: Iterable[Site]) -> list[str]:
    """The layers with a bias, which an adapter would not multiply here."""
    biases = {site.name: find_bias(places, site.path) for site in sites}
    return [
        f"the adapter of {name!r} multiplies the bias {bias!r} too, and DoRA here does "
        "not: merge it where it was trained"
        for name, bias in biases.items()
        if bias
    ]
