"""Adapters, by the names of the arrays of a model's files."""

import argparse
import contextlib
import difflib
import pathlib
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax._core import tree_paths
from lora_jax._io import tensor_files
from lora_jax._io.tensor_streams import Span
from lora_jax.checkpoint import load_adapters
from lora_jax.cli import _base, _messages
from lora_jax.cli._adapters import Contents
from lora_jax.layers.lora import Adapter
from lora_jax.peft.checkpoint import Checkpoint, FileDtype, new_checkpoint
from lora_jax.peft.keys import without_wrapper
from lora_jax.peft.layout import Layout
from lora_jax.peft.leaves import Places
from lora_jax.peft.load import Placement, assemble, find_places
from lora_jax.peft.names import EMBEDDINGS, HEADS
from lora_jax.peft.save import make_files
from lora_jax.plan import plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan

Names = dict[str, Any] | None

_LEAVES = frozenset({"weight", "kernel", "embedding", "value"})
_TIED = "tie_word_embeddings"
_NOTE = (
    f"config.json says {_TIED}: true, although the files have an embedding and a head: "
    "set it to false in OUT, or what loads the model may take one for the other."
)
_LANGUAGE_MODEL = re.compile(r"ForCausalLM|LMHead|ForConditionalGeneration|ForMaskedLM")


class Loaded(NamedTuple):
    """Adapters, and arrays that stand for those of the model."""

    adapters: Mapping[str, Adapter]
    plan: AdapterPlan
    replaced: Mapping[str, jax.Array]
    modules: Mapping[str, str] = {}
    """The path of each module's weight, for adapters that PEFT wrote."""
    axes: Mapping[str, str] = {}
    """By path, the letters of axes, `{layers}` for one that is the index of layers."""
    left_out: Sequence[str] = ()
    """What does not fit, a line each."""


class Way(NamedTuple):
    """How adapters are put into a model: what the options say."""

    names: Names
    layout: Layout
    strict: bool
    prefix: str


class InMemory:
    """Arrays in memory, to be read like those of a file."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays

    def read(self, name: str, /) -> np.ndarray:
        """The array of a name."""
        return self._arrays[name]

    __getitem__ = read


class LazyArray:
    """An array in a file, which is read when its values are asked for."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.shape, self.dtype, self.ndim = span.shape, span.dtype, len(span.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """What NumPy asks for the values with."""
        values = self._span.read()
        return values if dtype is None else values.astype(dtype)


def read_names(path: str | None) -> Names:
    """Reads a file of `--names`: from names of modules to paths of weights.

    Raises:
        CheckpointError: if it is no JSON object of texts, or pairs of texts.
    """
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


def read_way(options: argparse.Namespace) -> Way:
    """Reads the options that say how adapters are put into a model."""
    layout = options.layout or "torch"
    return Way(read_names(options.names), layout, options.strict, options.prefix or "")


def leaves_of(base: _base.Base, prefix: str = "") -> dict[str, Any]:
    """The arrays of a model by name, as `LazyArray`s.

    Args:
        base: the model.
        prefix: what the names start with, whole words of them.

    Raises:
        CheckpointError: if no name does.
    """
    leaves = {name: LazyArray(span) for name, span in base.spans().items()}
    if not prefix:
        return leaves
    words = re.compile(rf"{re.escape(prefix.rstrip('./'))}(?:[./]|$)")
    found = {name: leaf for name, leaf in leaves.items() if words.match(name)}
    if not found:
        ends = ((name, end.start()) for name in leaves for end in re.finditer("[./]", name))
        starts = {name[:end]: None for name, end in ends}
        near = difflib.get_close_matches(prefix, starts, n=3) or list(starts)[:3]
        raise tensor_files.CheckpointError(
            f"no tensor of {base.path} has a name that starts with --prefix {prefix}; the "
            f"nearest are {', '.join(near) or 'none'}."
        )
    return found


def load_for(
    contents: Contents,
    directory: pathlib.Path,
    base: _base.Base,
    way: Way,
    dtype: FileDtype = None,
) -> Loaded:
    """Loads adapters for a model's files.

    Args:
        contents: of the directory.
        directory: of adapters in either format.
        base: the model.
        way: the names, the layout, and what else the options say.
        dtype: of adapters that PEFT wrote, as `lora_jax.peft.load` takes it.

    Returns:
        The adapters; paths are names of arrays of the model.

    Raises:
        CheckpointError: if they do not fit the model.
    """
    leaves = leaves_of(base, way.prefix)
    if contents.checkpoint is not None:
        return _load_peft(contents.checkpoint, directory, base, leaves, way, dtype)
    adapters, plan = load_adapters(directory)
    targets = plan.targets.items()
    there = way.names is None and plan.targets.keys() <= leaves.keys()
    if there and (way.strict or all(leaves[n].shape == t.shape for n, t in targets)):
        return Loaded(adapters, plan, {})
    # By way of PEFT's names and layout, which is how such models are written.
    checkpoint = as_checkpoint(directory, adapters, plan, way.names)
    by_name = way._replace(names=None)
    return _load_peft(checkpoint, directory, base, leaves, by_name, dtype)


def as_checkpoint(
    directory: pathlib.Path,
    adapters: Mapping[str, Adapter],
    plan: AdapterPlan,
    names: Names,
) -> Checkpoint:
    """What PEFT would have of the adapters in a directory, in memory."""
    config, tensors = make_files(adapters, plan, names)
    return new_checkpoint(str(directory), config, InMemory(tensors), tensors)


def _load_peft(
    checkpoint: Checkpoint,
    directory: pathlib.Path,
    base: _base.Base,
    leaves: Mapping[str, LazyArray],
    way: Way,
    dtype: FileDtype,
) -> Loaded:
    places = Places(leaves, way.names, way.layout)
    # `check_ties` has asked the model's own settings.
    placement = find_places(checkpoint, places, on_tied="allow")
    _check_any(placement, directory, base, way)
    rows = placement.table().rows
    with leaving_out():
        loaded = assemble(placement, way.strict, dtype=dtype, on_tied="allow")
    modules = {row.module: row.path for row in rows}
    axes = {row.path: row.letters for row in rows}
    return Loaded(*loaded, modules, axes, placement.problems.lines)


@contextlib.contextmanager
def leaving_out() -> Iterator[None]:
    """Keeps quiet about what does not fit, for those who list it themselves."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(?s).*\nIt was left out\.$")
        yield


def _check_any(
    placement: Placement, directory: pathlib.Path, base: _base.Base, way: Way
) -> None:
    """Raises one sentence if no adapter has a place, in place of one for each.

    Raises:
        CheckpointError: if so.
    """
    modules, places = placement.checkpoint.entries.modules, placement.places
    problems = placement.problems.lines
    if placement.sites or not modules or len(problems) != len(places.unplaced):
        return
    if placement.checkpoint.entries.wholes and not way.strict:
        return  # these may fit
    name = places.unplaced[0]
    if name not in modules or places.given(without_wrapper(name)):
        return
    near = tree_paths.nearest(f"{name}.weight", places.leaves) or list(places.leaves)
    n_in, n_out = modules[name].dims[:2]
    where = (
        f"{base.path} under --prefix {way.prefix.rstrip('.')}"
        if way.prefix
        else str(base.path)
    )
    raise tensor_files.CheckpointError(
        f"nothing of {directory} fits {where}: for example, no tensor fits {name!r}, with "
        f"{n_in} in and {n_out} out, and the nearest name is {near[0]!r} "
        f"{places.shape(near[0])}; is it the adapter of another model, or does it need "
        "--prefix, --names or --layout?"
    )


def report_omissions(contents: Contents, loaded: Loaded) -> list[str]:
    """What to say at the end of all that was left out."""
    lines = [f"  {_messages.translate(line)}" for line in loaded.left_out]
    head = [f"left out, because of --no-strict: {len(lines)}"] if lines else []
    return [*contents.ignored, *head, *lines]


def check_fit(base: _base.Base, loaded: Loaded) -> None:
    """Raises unless the adapters fit the arrays of a model.

    Raises:
        CheckpointError: if an array is in none of the files.
        TypeError: if a weight is no floating-point array.
        ValueError: if a shape is another one.
    """
    _base.check_has(base, [*loaded.plan.targets, *loaded.replaced])
    plan_checks.check_params(base.entries, loaded.plan)
    plan_checks.check_adapters(loaded.adapters, loaded.plan)
    _check_widths(base, loaded.plan)
    for name, array in loaded.replaced.items():
        if array.shape != base.entries[name].shape:
            raise ValueError(
                f"at {name!r}: the adapter has an array of shape {array.shape} for it, and "
                f"the model {base.entries[name].shape}."
            )


def _check_widths(base: _base.Base, plan: AdapterPlan) -> None:
    wide = [name for name in plan.targets if base.entries[name].dtype == np.float64]
    if wide and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise TypeError(
            f"at {wide[0]!r}: the weight is float64, which JAX would narrow: set the "
            "environment variable JAX_ENABLE_X64=1."
        )


def check_ties(
    base: _base.Base, names: Iterable[str], embeddings: Collection[str] = ()
) -> str:
    """Raises if adapters change one of two arrays that a model has as one.

    Args:
        base: the model.
        names: of what the adapters change: modules, or arrays.
        embeddings: those of the names that are embeddings whatever they are called.

    Returns:
        What to say about it at the end; empty if there is nothing to say.

    Raises:
        CheckpointError: if so, or if the model's files do not say.
    """
    touched = [
        name
        for name in names
        if name in embeddings or _last_word(name) in EMBEDDINGS | HEADS
    ]
    tied = _ties(base.settings)
    if not touched or tied is False:
        return ""
    if any(_last_word(name) in HEADS for name in base.entries):
        return _NOTE if tied else ""
    if tied is None and not base.settings.get("architectures"):
        raise tensor_files.CheckpointError(
            f"the adapter changes {touched[0]!r}, and the model has no lm_head.weight: if "
            "its embedding and its output head are one array, merging would change both. "
            f"No config.json beside the weights says it: write {_TIED} into one, false if "
            "the model has no such head."
        )
    if tied is None and not _is_language_model(base.settings):
        return ""
    raise tensor_files.CheckpointError(
        f"the adapter changes {touched[0]!r}, but the embedding and the output head of "
        f"this model are one array ({_TIED}, and no lm_head.weight): merging would change "
        f"both. Save the base with a lm_head.weight of its own and {_TIED}: false in "
        "config.json, and merge into that."
    )


def _last_word(name: str) -> str:
    """What a layer is called: the last word of a name that is no name of a leaf."""
    words = [word for word in re.split(r"[./]", name) if word not in _LEAVES]
    return words[-1] if words else ""


def _ties(settings: dict[str, Any]) -> bool | None:
    """What a model's settings say of ties; None if nothing."""
    inner = settings.get("text_config")
    for fields in (settings, inner if isinstance(inner, dict) else {}):
        if isinstance(fields.get(_TIED), bool):
            return fields[_TIED]
    return None


def _is_language_model(settings: dict[str, Any]) -> bool:
    names = settings.get("architectures")
    names = names if isinstance(names, list) else []
    return any(_LANGUAGE_MODEL.search(str(name)) for name in names)
