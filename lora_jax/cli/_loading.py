"""Puts the adapters of a directory on the arrays of a model."""

import argparse
import contextlib
import difflib
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from lora_jax._core import tree_paths
from lora_jax._io import tensor_files
from lora_jax._io.tensor_streams import Span
from lora_jax.cli import _base, _messages
from lora_jax.cli._adapters import Contents
from lora_jax.layers.lora import Adapter
from lora_jax.peft.formats.checkpoint import Checkpoint, FileDtype, InMemory, new_checkpoint
from lora_jax.peft.formats.keys import without_wrapper
from lora_jax.peft.layout import Layout
from lora_jax.peft.leaves import Places
from lora_jax.peft.load import Placement, assemble, find_places
from lora_jax.peft.save import make_files
from lora_jax.peft.words import HEADS, last_word
from lora_jax.plan import parts, plan_checks, trained_leaves
from lora_jax.plan.adapter_plan import AdapterPlan

Names: TypeAlias = dict[str, Any] | None


class Loaded(NamedTuple):
    """Adapters for a model, and the arrays that replace arrays of the model."""

    adapters: dict[str, Adapter]
    plan: AdapterPlan
    replaced: Mapping[str, jax.Array]
    modules: Mapping[str, str] = {}
    """The path of the weight of each module, for adapters that were matched by name."""
    axes: Mapping[str, str] = {}
    """The letters of the axes by path, with `{layers}` for an index of layers."""
    left_out: Sequence[str] = ()
    """A line for each entry that does not fit."""


class Matching(NamedTuple):
    """The options that say how modules are matched with arrays."""

    names: Names
    layout: Layout
    strict: bool
    prefix: str


def read_names(path: str | None) -> Names:
    """Reads the file of `--names`: a dict from names of modules to paths of weights."""
    if path is None:
        return None
    names = {}
    for module, given in tensor_files.read_json(pathlib.Path(path)).items():
        pair = isinstance(given, list) and len(given) == 2
        if not all(isinstance(each, str) for each in (given if pair else [given])):
            raise tensor_files.CheckpointError(
                f"{path}: {module!r} must have the path of a weight, or a list of that and "
                f"the letters of its axes, got {given!r:.60}."
            )
        names[module] = tuple(given) if pair else given
    return names


def read_matching(options: argparse.Namespace) -> Matching:
    """Reads these options."""
    layout = options.layout or "torch"
    return Matching(read_names(options.names), layout, options.strict, options.prefix or "")


def with_prefix(base: _base.Base, prefix: str) -> Mapping[str, Span]:
    """The arrays of a model whose names start with the words of a prefix."""
    if not prefix:
        return base.spans
    words = re.compile(rf"{re.escape(prefix.rstrip('./'))}(?:[./]|$)")
    found = {name: span for name, span in base.spans.items() if words.match(name)}
    if not found:
        ends = ((n, end.start()) for n in base.spans for end in re.finditer("[./]", n))
        starts = {name[:end]: None for name, end in ends}
        near = difflib.get_close_matches(prefix, starts, n=3) or list(starts)[:3]
        raise tensor_files.CheckpointError(
            f"no tensor of {base.path} has a name that starts with --prefix {prefix}; the "
            f"nearest are {', '.join(near) or 'none'}."
        )
    return found


def load_for(
    contents: Contents, base: _base.Base, matching: Matching, dtype: FileDtype = None
) -> Loaded:
    """Puts adapters on the arrays of a model.

    `dtype` is that of adapters in PEFT's format, as in `lora_jax.peft.load`.

    Raises:
        CheckpointError: if the adapters do not fit the model.
    """
    leaves, checkpoint = with_prefix(base, matching.prefix), contents.checkpoint
    if checkpoint is None:
        assert contents.own is not None
        plan = contents.own[1]
        own = {plan.leaf(path): entry.shape for path, entry in plan.entries.items()}
        there = matching.names is None and own.keys() <= leaves.keys()
        if there and (matching.strict or all(leaves[n].shape == own[n] for n in own)):
            return Loaded(*contents.own, trained_leaves.split(*contents.own)[2])
        checkpoint = as_checkpoint(contents, matching.names)
        matching = matching._replace(names=None)
    matching = matching._replace(names=_of_two(matching.names, base.copies))
    placement = find_places(
        checkpoint,
        Places(leaves, matching.names, matching.layout),
        on_tied="allow",  # the settings of the model have been read
    )
    _check_any(placement, contents.directory, base, matching)
    sites = placement.sites.values()
    with leaving_out():
        loaded = assemble(placement, matching.strict, dtype=dtype)
    modules = {site.name: site.target for site in sites}
    axes = {site.target: site.letters for site in sites}
    return Loaded(*loaded, modules, axes, placement.problems.lines)


def _of_two(names: Names, copies: Mapping[str, str]) -> Names:
    """The names of a tied model, for its embedding and the copy that is its head.

    `copies` is as in `Base`. A product with the embedding, and a head, is the copy.
    """
    heads, found = {embedding: head for head, embedding in copies.items()}, {}
    for module, given in (names or {}).items():
        path, *axes = (given,) if isinstance(given, str) else given
        base, part, use = parts.split(path)
        is_head = last_word(module) in HEADS and not use
        if base in heads and (use == parts.PRODUCT or is_head):
            path = heads[base] + part
        found[module] = (path, *axes) if axes else path
    return found or names


def as_checkpoint(contents: Contents, names: Names) -> Checkpoint:
    """Adapters of this library as PEFT's modules, which have the names of such models."""
    assert contents.own is not None
    adapters, plan, trained = trained_leaves.split(*contents.own)
    config, tensors = make_files(adapters, plan, names, replaced=trained)
    return new_checkpoint(str(contents.directory), config, InMemory(tensors), tensors)


@contextlib.contextmanager
def leaving_out() -> Iterator[None]:
    """Suppresses the warning about entries that do not fit: the command lists them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(?s).*\nIt was left out\.$")
        yield


def _check_any(
    placement: Placement, directory: pathlib.Path, base: _base.Base, matching: Matching
) -> None:
    """Raises one sentence if nothing fits, instead of a line for each adapter."""
    modules, places = placement.checkpoint.entries.modules, placement.places
    problems = placement.problems.lines
    if placement.sites or not modules or len(problems) != len(places.unplaced):
        return
    if placement.checkpoint.entries.wholes and not matching.strict:
        return  # full arrays may fit
    name = places.unplaced[0]
    if name not in modules or places.given(without_wrapper(name)):
        return
    near = tree_paths.nearest(f"{name}.weight", places.leaves) or list(places.leaves)
    n_in, n_out = modules[name].dims[:2]
    prefix = matching.prefix.rstrip(".")
    where = f"{base.path} under --prefix {prefix}" if prefix else str(base.path)
    raise tensor_files.CheckpointError(
        f"nothing of {directory} fits {where}: for example, no tensor fits {name!r}, with "
        f"{n_in} in and {n_out} out, and the nearest name is {near[0]!r} "
        f"{places.shape(near[0])}; is it the adapter of another model, or does it need "
        "--prefix, --names or --layout?"
    )


def report_omissions(contents: Contents, loaded: Loaded) -> list[str]:
    """The lines of the report about what was ignored or left out."""
    lines = [f"  {_messages.translate(line)}" for line in loaded.left_out]
    head = [f"left out, because of --no-strict: {len(lines)}"] if lines else []
    return [*contents.ignored, *head, *lines]


def check_weights(base: _base.Base, plan: AdapterPlan) -> None:
    """Raises unless the weights of a plan can be merged."""
    plan_checks.check_params(base.spans, plan)
    wide = [name for name in plan.by_leaf() if base.spans[name].dtype == np.float64]
    if wide and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise TypeError(
            f"at {wide[0]!r}: the weight is float64, which JAX would narrow: set the "
            "environment variable JAX_ENABLE_X64=1."
        )
