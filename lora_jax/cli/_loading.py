"""Adapters, by the names of the arrays of a model's files."""

import pathlib
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import _files, _plan_checks
from lora_jax._tensor_stream import Span
from lora_jax.checkpoint import load_adapters
from lora_jax.cli import _base
from lora_jax.cli._adapters import Contents
from lora_jax.lora import Adapter
from lora_jax.peft import _placing
from lora_jax.peft._checkpoint import (
    Checkpoint,
    FileDtype,
    open_checkpoint,
    write_checkpoint,
)
from lora_jax.peft._fitting import Layout
from lora_jax.peft._places import Places
from lora_jax.peft._wholes import EMBEDDINGS, HEADS
from lora_jax.peft.writing import make_files
from lora_jax.plan import AdapterPlan

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
    for module, given in _files.read_json(pathlib.Path(path)).items():
        pair = isinstance(given, list) and len(given) == 2
        if not all(isinstance(each, str) for each in (given if pair else [given])):
            raise _files.CheckpointError(
                f"{path}: {module!r} must have the path of a weight, or a list of that and "
                f"the letters of its axes, got {given!r:.60}."
            )
        names[module] = tuple(given) if pair else given
    return names


def leaves_of(base: _base.Base) -> dict[str, Any]:
    """The arrays of a model by name, as `LazyArray`s."""
    return {name: LazyArray(span) for name, span in base.spans().items()}


def load_for(
    contents: Contents,
    directory: pathlib.Path,
    base: _base.Base,
    names: Names,
    layout: Layout,
    dtype: FileDtype = None,
) -> Loaded:
    """Loads adapters for a model's files.

    Args:
        contents: of the directory.
        directory: of adapters in either format.
        base: the model.
        names: from modules to paths, where the names alone do not tell.
        layout: how the weights of the model lie: `"torch"` or `"jax"`.
        dtype: of adapters that PEFT wrote, as `lora_jax.peft.load` takes it.

    Returns:
        The adapters; paths are names of arrays of the model.

    Raises:
        CheckpointError: if they do not fit the model.
    """
    if contents.checkpoint is not None:
        return _load_peft(contents.checkpoint, base, names, layout, dtype)
    adapters, plan = load_adapters(directory)
    if names is None and set(plan.targets) <= set(base.entries):
        return Loaded(adapters, plan, {})
    # By way of PEFT's names and layout, which is how such models are written.
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write_checkpoint(folder, *make_files(adapters, plan, names))
        return _load_peft(open_checkpoint(folder), base, None, layout, dtype)


def _load_peft(
    checkpoint: Checkpoint,
    base: _base.Base,
    names: Names,
    layout: Layout,
    dtype: FileDtype,
) -> Loaded:
    places = Places(leaves_of(base), names, layout)
    # `check_ties` has asked the model's own settings.
    placement = _placing.find_places(checkpoint, places, on_tied="allow")
    rows = placement.table().rows
    loaded = _placing.put(placement, True, dtype=dtype, on_tied="allow")
    modules = {row.module: row.path for row in rows}
    return Loaded(*loaded, modules, {row.path: row.letters for row in rows})


def check_fit(base: _base.Base, loaded: Loaded) -> None:
    """Raises unless the adapters fit the arrays of a model.

    Raises:
        CheckpointError: if an array is in none of the files.
        TypeError: if a weight is no floating-point array.
        ValueError: if a shape is another one.
    """
    _base.check_has(base, [*loaded.plan.targets, *loaded.replaced])
    _plan_checks.check_params(base.entries, loaded.plan)
    _plan_checks.check_adapters(loaded.adapters, loaded.plan)
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
        raise _files.CheckpointError(
            f"the adapter changes {touched[0]!r}, and the model has no lm_head.weight: if "
            "its embedding and its output head are one array, merging would change both. "
            f"No config.json beside the weights says it: write {_TIED} into one, false if "
            "the model has no such head."
        )
    if tied is None and not _is_language_model(base.settings):
        return ""
    raise _files.CheckpointError(
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
