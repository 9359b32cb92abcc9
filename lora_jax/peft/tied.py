"""One leaf that is an embedding and an output head, and what changes one of both only.

PEFT has a module for each of the two. An adapter of one of them, or an array that stands
for one, changes that module alone; in params with one leaf it would change both.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Literal

import numpy as np

from lora_jax.peft.config import PeftConfig
from lora_jax.peft.full import Spot
from lora_jax.peft.keys import Kind
from lora_jax.peft.layout import same_bits
from lora_jax.peft.leaves import Places
from lora_jax.peft.locate import Site
from lora_jax.peft.names import EMBEDDINGS, HEADS, is_embedding, last_word, split_path

OnTied = Literal["error", "allow"]
ON_TIED = ("error", "allow")
# What leaves of an output head are called besides these.
_HEAD = re.compile(r"head|logits|^output$|unembed|embed_out", re.IGNORECASE)
# What embeddings of tokens with an adapter are called.
_TOKENS = re.compile(r"embed|token|tok_|word|wte|shared", re.IGNORECASE)
# Embeddings of what is no token are never tied to a head.
_NO_TOKEN = re.compile(r"pos|wpe|type|segment|rel|time|patch", re.IGNORECASE)
_WITH_A_HEAD = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def tied_adapters(
    places: Places, sites: Iterable[Site], kinds: Mapping[str, Kind], config: PeftConfig
) -> dict[str, str]:
    """What is wrong with adapters of one side of a tied leaf, by the modules."""
    lines: dict[str, str] = {}
    for site in sites:
        kind = kinds[site.module]
        if kind in ("embedding", "linear"):
            own = side_of(site.name, site.path, config)
            last = last_word(site.name)
            if kind == "embedding" and _TOKENS.search(last) and not _NO_TOKEN.search(last):
                own = own or "embedding"
            wrong = _wrong(places, site.name, site.path, own, kind == "embedding", config)
            lines.update((site.module, line) for line in wrong)
    return lines


def tied_leaves(
    places: Places, spots: Mapping[str, Spot], twins: Collection[str], config: PeftConfig
) -> dict[str, str]:
    """The same for arrays that are held whole, by the names of parameters.

    Args:
        places: the leaves.
        spots: of the arrays, by their names.
        twins: arrays of the other side that are equal to one of these.
        config: of the checkpoint.
    """
    owners: dict[str, list[str]] = {}
    for name, spot in spots.items():
        owners.setdefault(spot.path, []).append(name)
    lines: dict[str, str] = {}
    for path, names in owners.items():
        module = names[0].rpartition(".")[0]
        if len(names) > 1 or len(places.shape(path)) < 2:
            continue  # both sides are there, and equal
        own = side_of(module, path, config)
        if not (twins and own):
            embedding = is_embedding(module, path)
            wrong = _wrong(places, module, path, own, embedding, config)
            lines.update((names[0], line) for line in wrong)
    return lines


def shared_leaves(
    sites: Iterable[Site], spots: Mapping[str, Spot], rows: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Leaves that an adapter and an array of another module both go to.

    Args:
        sites: of the adapters.
        spots: of the arrays that are held whole.
        rows: the paths of leaves that have rows replaced, by the modules.

    Yields:
        The module that comes second, as the checkpoint has it, and what is wrong.
    """
    owners = {
        (spot.path, spot.indices): name.rpartition(".")[0] for name, spot in spots.items()
    }
    for module, path in rows.items():
        other = owners.setdefault((path, ()), module)
        if other != module:
            yield module, _both(other, module, path)
    for site in sites:
        other = owners.get((site.path, site.indices), site.name)
        if other not in (site.name, site.name.rpartition(".")[0]) and (
            site.path not in rows.values()
        ):
            yield site.module, _both(other, site.name, site.path)


def _both(one: str, other: str, path: str) -> str:
    return (
        f"the file changes {one!r} and {other!r}, and both are {path!r}: the leaf has room "
        "for one. Give params with a leaf for each, and a function that uses both"
    )


def without_twins(
    places: Places, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Arrays without those of a head or embedding that params have no leaf for.

    A tied model may be saved with both, which are equal bit for bit. Then one of them says
    all; an array that equals no other is kept.
    """

    def has_place(name: str) -> bool:
        words, leaf = split_path(name)
        keys = name, name.rpartition(".")[0]
        return any(map(places.given, keys)) or bool(places.search(words, (leaf,)))

    ends = {n: array for n, array in arrays.items() if last_word(n) in EMBEDDINGS | HEADS}
    placed = {name: array for name, array in ends.items() if has_place(name)}
    twins = {
        name
        for name, array in ends.items()
        if name not in placed and any(same_bits(array, own) for own in placed.values())
    }
    return {name: array for name, array in arrays.items() if name not in twins}


def may_be_tied(module: str, kind: Kind) -> bool:
    """Whether an adapter is that of an embedding of tokens, as far as names say."""
    return kind == "embedding" and not _NO_TOKEN.search(last_word(module))


def side_of(module: str, path: str, config: PeftConfig) -> str:
    """Which side of a tie a module may be, by its name; empty if none."""
    last = last_word(module)
    if last in HEADS:
        return "output head"
    if last in EMBEDDINGS:
        return "embedding"
    tokens = is_embedding(module, path) and not _NO_TOKEN.search(last)
    return "embedding" if tokens and config.task_type in _WITH_A_HEAD else ""


def _wrong(
    places: Places,
    module: str,
    path: str,
    own: str,
    embedding: bool,
    config: PeftConfig,
) -> Iterator[str]:
    """What is wrong with what a checkpoint has for a module, if one leaf is two modules.

    Args:
        places: the leaves.
        module: the name of the module.
        path: of the leaf.
        own: which side of a tie the module may be.
        embedding: whether the checkpoint sees it as an embedding.
        config: of the checkpoint.
    """
    tie = places.known.tie(path)
    advice = (
        "Give params in which the embedding and the output head are two leaves, and a "
        "function that uses both; or give on_tied='allow' if "
    )
    if tie is not None:
        yield (
            f"{module!r} is one of two modules that share {path!r}, which "
            f"{places.known.source} uses in two ways, {tie[0]} and {tie[1]}: what the file "
            f"has would act on both. {advice}it is to act on both"
        )
        return
    if not own or places.known.uses:
        return
    other = "output head" if own == "embedding" else "embedding"
    lies_as = "embedding" if is_embedding("", path) else ""
    lies_as = "output head" if _HEAD.search(last_word(path)) else lies_as
    if lies_as == other or (own == "embedding") != embedding:
        yield (
            f"{module!r} is an {own}, and {path!r} an {other}: if one leaf is both, what "
            f"the file has would act on both. {advice}that is right"
        )
    elif own == "output head" and config.task_type not in _WITH_A_HEAD:
        return
    elif not any(_is_other(places, leaf, path, own) for leaf in places.leaves):
        yield (
            f"{module!r} is {path!r}, and no leaf of the params is an {other}: if this one "
            "is used as that too (tied), what the file has would act on both. Give the "
            f"function (fn, *args), which shows whether it is. {advice}it is not, or is "
            "to act on both"
        )


def _is_other(places: Places, leaf: str, path: str, own: str) -> bool:
    """Whether a leaf may be what would be tied to another: head or embedding."""
    shape, sizes = places.shape(leaf), set(places.shape(path))
    if leaf == path or len(shape) < 2:
        return False
    embedding = is_embedding(".".join(split_path(leaf).words), leaf)
    if own == "embedding":
        return bool(_HEAD.search(last_word(leaf))) or (
            sizes <= set(shape) and not embedding
        )
    return embedding and sizes <= set(shape)
