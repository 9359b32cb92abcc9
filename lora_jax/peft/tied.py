"""Adapters and arrays of one side of a tied leaf: an embedding that is the output head.

PEFT has a module for each side. An adapter or an array of one of them changes that module
alone, but a leaf that is both would change for both.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Literal

import jax
import numpy as np
from jax.core import Tracer

from lora_jax._io import processes
from lora_jax.peft.config import PeftConfig
from lora_jax.peft.keys import Kind
from lora_jax.peft.layout import SWAPPED, Site, from_torch, same_bits
from lora_jax.peft.leaves import Places
from lora_jax.peft.names import (
    EMBEDDINGS,
    HEADS,
    WEIGHT,
    is_embedding,
    last_word,
    split_path,
)
from lora_jax.plan.parts import LOOKUP

OnTied = Literal["error", "allow"]
ON_TIED = ("error", "allow")
# Further words for the leaves of output heads.
_HEAD = re.compile(r"head|logits|^output$|unembed|embed_out", re.IGNORECASE)
# Words for embeddings of tokens that have an adapter.
_TOKENS = re.compile(r"embed|token|tok_|word|wte|shared", re.IGNORECASE)
# Embeddings of other things are never tied to a head.
_NO_TOKEN = re.compile(r"pos|wpe|type|segment|rel|time|patch", re.IGNORECASE)
_WITH_A_HEAD = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def tied_adapters(
    places: Places, sites: Iterable[Site], kinds: Mapping[str, Kind], config: PeftConfig
) -> dict[str, str]:
    """The errors of adapters of one side of a tied leaf, by the modules."""
    lines: dict[str, str] = {}
    for site in sites:
        kind = kinds[site.module]
        if kind in ("embedding", "linear") and not site.use:
            own = _side(site.name, site.path, config)
            last = last_word(site.name)
            if kind == "embedding" and _TOKENS.search(last) and not _NO_TOKEN.search(last):
                own = own or "embedding"
            wrong = _tied(places, site.name, site.path, own, kind == "embedding", config)
            lines.update((site.module, line) for line in wrong)
    return lines


def tied_arrays(
    places: Places, sites: Mapping[str, Site], twins: Collection[str], config: PeftConfig
) -> dict[str, str]:
    """The errors of full arrays of one side of a tied leaf, by the names of parameters.

    Args:
        places: the leaves.
        sites: of the arrays, by their names.
        twins: arrays of the other side that are equal to one of these.
        config: of the checkpoint.
    """
    owners: dict[str, list[Site]] = {}
    for site in sites.values():
        owners.setdefault(site.path, []).append(site)
    lines: dict[str, str] = {}
    for path, own in owners.items():
        module = own[0].module
        if len(own) > 1 or len(places.shape(path)) < 2:
            continue  # both sides are there, and equal
        side = _side(module, path, config)
        if not (twins and side):
            wrong = _tied(places, module, path, side, is_embedding(module, path), config)
            lines.update((own[0].name, line) for line in wrong)
    return lines


def without_frozen(
    places: Places, sites: Mapping[str, Site], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Leaves out tied weights with adapters of one use, which are saved and not changed.

    PEFT saves embeddings with adapters whole. An array that differs from the leaf is kept,
    and so are all arrays if the params have no values.
    """
    frozen = set()
    for site in sites.values():
        name, leaf = f"{site.name}.{WEIGHT}", places.leaves[site.path]
        has_values = isinstance(leaf, jax.Array | np.ndarray)
        if not site.use or name not in arrays or not has_values or isinstance(leaf, Tracer):
            continue
        values, array = processes.to_host(leaf), arrays[name]
        if array.ndim == 2 and array.size == values.size:
            axes = site.own_axes.translate(SWAPPED if site.use == LOOKUP else {})
            with np.errstate(over="ignore"):
                array = from_torch(array, values.shape, axes).astype(values.dtype)
            if same_bits(array, values):
                frozen.add(name)
    return {name: array for name, array in arrays.items() if name not in frozen}


def without_twins(
    places: Places, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Leaves out the head or the embedding of a tied model that was saved with both.

    The two arrays are equal bit for bit, and the params have a leaf for one of them. An
    array that equals no other is kept.
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
