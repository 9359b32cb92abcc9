"""Finds where a config, the entries of its file and the params do not agree.

PEFT's embedding and output head are two modules. An adapter or an array of one of them
changes that module alone, but a leaf that is both (tied) would change for both.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Literal, TypeAlias

import numpy as np

from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.formats.checkpoint import Checkpoint
from lora_jax.peft.formats.config import PeftConfig, saved_in
from lora_jax.peft.formats.keys import BIAS, WEIGHT, Kind, Module, Parameters, is_embedding
from lora_jax.peft.layout import Site
from lora_jax.peft.leaves import Places
from lora_jax.peft.rules import Rules
from lora_jax.peft.words import EMBEDDINGS, HEADS, Words, last_word, split_name, split_path

OnTied: TypeAlias = Literal["error", "allow"]
ON_TIED = ("error", "allow")
# Further words for the leaves of output heads.
_HEAD = re.compile(r"head|logits|^output$|unembed|embed_out", re.IGNORECASE)
# Words for embeddings of tokens that have an adapter.
_TOKENS = re.compile(r"embed|token|tok_|word|wte|shared", re.IGNORECASE)
# Embeddings of other things are never tied to a head.
_NO_TOKEN = re.compile(r"pos|wpe|type|segment|rel|time|patch", re.IGNORECASE)
_WITH_A_HEAD = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def check_module(module: Module, rules: Rules) -> None:
    """Raises if PEFT would not load the adapter of a module with a config, or change it."""
    config, name = rules.config, module.model_name
    inside = module.name.rpartition(".base_layer.")[0]  # of torch.nn.MultiheadAttention
    targeted = rules.choose_by_name and module.kind != "experts"
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
            f"the alpha of {name!r} is 0 in the config: the adapter would change nothing"
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


def find_missing(
    checkpoint: Checkpoint, places: Places, sites: Collection[Site]
) -> Iterator[str]:
    """Lists the adapters and the full arrays that the config names and the file lacks."""
    config, entries = checkpoint.config, checkpoint.entries
    rules, ends = Rules(config), {_numberless(site.name) for site in sites}
    for name, path in _unadapted(places, sites):
        if name not in entries.modules and _is_targeted(rules, name, ends):
            yield (
                f"the config targets {name!r}, which is {path!r} {places.shape(path)}, and "
                "there is no adapter for it: is the file whole?"
            )
    modules = [name.rpartition(".")[0] for name in entries.wholes]
    saved = saved_in(config.modules_to_save or (), modules)
    for name, present in saved.items():
        # A config may list the names that heads have in several models.
        if not present and (not any(saved.values()) or _has_module(places, name)):
            yield f"the config's modules_to_save has {name!r}, and the file lacks it"
    if config.trainable_token_indices and not entries.tokens:
        yield "the config has trainable_token_indices, and the file has no rows of tokens"
    yield from Parameters(config.target_parameters or ()).missing(entries)
    biased = any(name.endswith(f".{BIAS}") for name in entries.wholes)
    layers = [site.name for site in sites if places.bias_of(site.path)]
    if config.bias != "none" and not biased and layers:
        yield (
            f"the config has bias={config.bias!r}, and the file lacks the bias of "
            f"{layers[0]!r}"
        )


def _unadapted(places: Places, sites: Collection[Site]) -> Iterator[tuple[str, str]]:
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
            own, shape = by_part.get((path, part)), places.shape(path)
            other = places.shape(sibling.path)
            if own is None and (shape != other if part else path in places.claimed):
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

    `ends` are the names with adapters, without their numbers.
    """
    if rules.parameters.match(name):
        return True
    if rules.choose_by_name:
        return rules.matched(name)
    # "all-linear" selects classes: a module with an adapter in one layer has it in all.
    return _numberless(name) in ends and rules.verdict(name, (name,)) == "matched"


def _has_module(places: Places, name: str) -> bool:
    """Whether params have a module of a name."""
    words = split_name(name)
    paths = (split_path(path).words for path in places.leaves)
    return any(
        own[start : start + len(words)] == words
        for own in paths
        for start in range(len(own))
    )


def shared_leaves(
    sites: Iterable[Site], full: Iterable[Site], rows: Mapping[str, str]
) -> dict[str, str]:
    """The errors of modules that change the leaf of another module, by the modules.

    `sites` are of adapters, `full` of full arrays. `rows` has the paths of leaves with rows
    replaced, by modules.
    """
    pairs: dict[str, tuple[str, str, str]] = {}
    owners = {(site.path, site.indices): site.module for site in full}
    for module, path in rows.items():
        other = owners.setdefault((path, ()), module)
        if other != module:
            pairs[module] = other, module, path
    for site in sites:
        other = owners.get((site.path, site.indices), site.name)
        other = owners.get((site.path, ()), other) if site.part else other
        own = site.name, site.name.rpartition(".")[0]
        if other not in own and site.path not in rows.values():
            pairs[site.module] = other, site.name, site.path
    return {
        module: f"the file changes {one!r} and {other!r}, and both are {path!r}: the leaf "
        "has room for one. Give params with a leaf for each, and a function that uses both"
        for module, (one, other, path) in pairs.items()
    }


def tied_adapters(
    places: Places,
    sites: Mapping[str, Site],
    modules: Mapping[str, Module],
    config: PeftConfig,
) -> dict[str, str]:
    """The errors of adapters of one side of a tied leaf, by the modules."""
    lines: dict[str, str] = {}
    for module, site in sites.items():
        kind, name = modules[module].kind, site.name
        if kind in ("embedding", "linear") and not site.use:
            own = _side(name, site.path, config)
            if _TOKENS.search(last_word(name)) and may_be_tied(name, kind):
                own = own or "embedding"
            wrong = _tied(places, name, site.path, own, kind == "embedding", config)
            lines.update((module, line) for line in wrong)
    return lines


def tied_arrays(
    places: Places, sites: Mapping[str, Site], twins: Collection[str], config: PeftConfig
) -> dict[str, str]:
    """The errors of full arrays of one side of a tied leaf, by the names of parameters.

    `twins` are arrays of the other side that are equal to one of these.
    """
    owners: dict[str, list[Site]] = {}
    for site in sites.values():
        owners.setdefault(site.path, []).append(site)
    lines: dict[str, str] = {}
    for path, (site, *more) in owners.items():
        if more or len(places.shape(path)) < 2:
            continue  # both sides are there, and equal
        module = site.module
        side = _side(module, path, config)
        if not (twins and side):
            wrong = _tied(places, module, path, side, is_embedding(module, path), config)
            lines.update((site.name, line) for line in wrong)
    return lines


def may_be_tied(module: str, kind: Kind) -> bool:
    """Whether an adapter may be of an embedding of tokens, by its kind and name."""
    return kind == "embedding" and not _NO_TOKEN.search(last_word(module))


def _side(module: str, path: str, config: PeftConfig) -> str:
    """The side of a tie that a module may be, by its name; empty if none."""
    last = last_word(module)
    if last in HEADS:
        return "output head"
    if last in EMBEDDINGS:
        return "embedding"
    tokens = is_embedding(module, path) and not _NO_TOKEN.search(last)
    return "embedding" if tokens and config.task_type in _WITH_A_HEAD else ""


def _tied(
    places: Places,
    module: str,
    path: str,
    side: str,
    embedding: bool,
    config: PeftConfig,
) -> Iterator[str]:
    """The error of what a checkpoint has for a module, if its leaf is or may be tied.

    `side` is the side of a tie that the module may be. `embedding` is whether the
    checkpoint uses it as an embedding.
    """
    tie = places.known.tie(path)
    apart = (
        "Give params in which the embedding and the output head are two leaves, and a "
        "function that uses both; or give on_tied='allow' if "
    )
    advice = f"Give the function (fn, *args), which shows the use of each. {apart}"
    if tie is not None:
        yield (
            f"{module!r} is one of two modules that share {path!r}, which "
            f"{places.known.source} uses in two ways, {tie[0]} and {tie[1]}: what the file "
            f"has would act on both. {apart}it is to act on both"
        )
        return
    if not side or places.known.uses:
        return
    other = "output head" if side == "embedding" else "embedding"
    lies_as = "embedding" if is_embedding("", path) else ""
    lies_as = "output head" if _HEAD.search(last_word(path)) else lies_as
    if lies_as == other or (side == "embedding") != embedding:
        yield (
            f"{module!r} is an {side}, and {path!r} an {other}: if one leaf is both, what "
            f"the file has would act on both. {advice}that is right"
        )
    elif side == "output head" and config.task_type not in _WITH_A_HEAD:
        return
    elif not any(_may_be(places, leaf, path, other) for leaf in places.leaves):
        yield (
            f"{module!r} is {path!r}, and no leaf of the params is an {other}: if this one "
            f"is used as that too (tied), what the file has would act on both. {advice}it "
            "is not, or is to act on both"
        )


def _may_be(places: Places, leaf: str, path: str, side: str) -> bool:
    """Whether a leaf may be the head, or the embedding, beside the leaf at `path`."""
    shape, sizes = places.shape(leaf), set(places.shape(path))
    if leaf == path or len(shape) < 2:
        return False
    embedding = is_embedding(".".join(split_path(leaf).words), leaf)
    fits = sizes <= set(shape)
    if side == "output head":
        return bool(_HEAD.search(last_word(leaf))) or (fits and not embedding)
    return embedding and fits
