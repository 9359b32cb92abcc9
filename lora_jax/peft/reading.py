"""Reads adapters that Hugging Face PEFT saved."""

import os
from collections.abc import Mapping
from typing import Any

import chex
import jax

from lora_jax import _checks, _paths
from lora_jax.peft import _placing
from lora_jax.peft._checkpoint import FileDtype, open_checkpoint
from lora_jax.peft._fitting import Layout
from lora_jax.peft._places import NamesArgument
from lora_jax.peft._placing import Loaded
from lora_jax.peft._table import NameTable

__all__ = ["Loaded", "NameTable", "load", "match_names", "replace_leaves"]


def load(
    directory: str | os.PathLike[str],
    params: chex.ArrayTree,
    *,
    names: NamesArgument = None,
    layout: Layout = "jax",
    strict: bool = True,
    dtype: FileDtype = None,
) -> Loaded:
    """Reads an adapter that PEFT saved, for some params.

    PEFT names modules, `model.layers.0.self_attn.q_proj`, and a tree has paths. The weight
    of a module is the leaf whose path has the longest common end with its name, and the
    numbers in both have to be the same. Where layers or experts are stacked in one array,
    each module is one index of it: smaller ranks are filled up with zeros, and `B` takes
    up other scales. Heads may be axes of their own, `(d, heads, k)`. The table of names and
    paths goes to the logger `lora_jax.peft` at the level INFO before anything is read, and
    `match_names` returns it.

    Args:
        directory: with `adapter_config.json` and `adapter_model.safetensors`.
        params: a pytree of arrays; `jax.ShapeDtypeStruct`s where no values are needed.
        names: the paths that are not to be searched for: a dict from the names of modules
            to paths, or a function. A name may be a template, `"model.layers.{}.mlp.up"`,
            whose numbers fill the `{}` of the path and then are indexes. In place of a
            path, `(path, axes)` gives the letters of its axes, as `LoraConfig.axes` does.
        layout: how the weights lie: `"jax"`, matrices `(in, out)` and kernels
            `(*kernel, in, out)`; or `"torch"`, `(out, in)` and `(out, in, *kernel)`, where
            matrices that lie `(in, out)` are recognized, square ones by the checkpoint's
            `fan_in_fan_out`.
        strict: whether entries without a place, and weights without entries, are errors.
            Otherwise they are left out, and named in a warning.
        dtype: of the adapters, magnitudes too. None for float32, or float64 where the file
            has that: training goes on in it, and in 16 bits small steps would be lost.
            `"file"` for the dtypes that the file has.

    Returns:
        The adapters; their plan; and `replaced`, what the checkpoint holds whole (saved
        modules, biases, embeddings with trained rows, bases that PiSSA or OLoRA left) by
        path, in the layout of the params. `replace_leaves` puts that into the params,
        before they are used or merged. Leaves of `replaced` have the dtype of the adapters
        too, but at least float32, unless `dtype` is `"file"`; those that only change a leaf
        of the params (rows, a base, the bias of `lora_bias`) have its dtype.

    Raises:
        CheckpointError: if a file is not whole or no PEFT adapter; if it uses what is not
            supported; if an entry has no place in the params, or more than one; if the
            config targets a weight that the file lacks; if values are needed and there
            are shapes only; if `dtype` does not hold a value; if one of the two files is
            that of another adapter. The message names the file and the entry.
        FileNotFoundError: if there is no such file.
        ModuleNotFoundError: if the package safetensors is not installed.
        TypeError, ValueError: if an argument is none that it may be.

    References:
        The format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
    """
    _checks.check_flags(strict=strict)
    checkpoint = open_checkpoint(directory)
    return _placing.put(checkpoint, params, names, layout, strict, dtype=dtype)


def match_names(
    directory: str | os.PathLike[str],
    params: chex.ArrayTree,
    *,
    names: NamesArgument = None,
    layout: Layout = "jax",
) -> NameTable:
    """Finds the path of each module of a PEFT adapter, and reads no values.

    Args:
        directory: as in `load`.
        params: as in `load`; `jax.ShapeDtypeStruct`s will do.
        names: as in `load`.
        layout: as in `load`.

    Returns:
        An immutable dict from the names of modules to paths, which `load` and `save` take
        as `names`. `print` shows a table with the shapes and axes of the weights.

    Raises:
        CheckpointError, FileNotFoundError, ModuleNotFoundError, TypeError, ValueError: as
            `load`.
    """
    checkpoint = open_checkpoint(directory)
    places, sites, problems = _placing.find_places(checkpoint, params, names, layout)
    for name in (*checkpoint.entries.wholes, *checkpoint.entries.tokens):
        for key in (name, name.rpartition(".")[0]):
            places.given(key)
    problems.lines += places.unused_names()
    problems.settle(checkpoint.where, True)
    return _placing.table(places, sites)


def replace_leaves(params: chex.ArrayTree, replaced: Mapping[str, jax.Array]) -> Any:
    """Puts leaves that a checkpoint holds whole into params.

    Args:
        params: a pytree.
        replaced: path to array, as `load` returns it.

    Returns:
        A tree like `params`. The leaves of `replaced` have the dtypes of those whose place
        they take; all others are those of `params`.

    Raises:
        KeyError: if params have no leaf at a path.
        ValueError: if a shape is another.
    """
    leaves, treedef = _paths.flatten(params)
    for path, array in replaced.items():
        if path not in leaves:
            hint = _paths.nearest_hint(path, leaves)
            raise KeyError(f"params have no leaf at {path!r}{hint}.")
        with _checks.at_path(path):
            leaves[path] = _like(leaves[path], array)
    return treedef.unflatten(leaves.values())


def _like(leaf: Any, array: jax.Array) -> jax.Array:
    if not _checks.is_array(leaf) or tuple(leaf.shape) != array.shape:
        raise ValueError(
            f"the leaf must be an array of the shape {array.shape}, got "
            f"{getattr(leaf, 'shape', type(leaf).__name__)}."
        )
    return array.astype(leaf.dtype)
