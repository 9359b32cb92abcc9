"""Reads adapters that Hugging Face PEFT saved."""

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import chex
import jax

from lora_jax._core import checks, tree_paths
from lora_jax.peft import _placing
from lora_jax.peft._checkpoint import FileDtype, open_checkpoint
from lora_jax.peft._fitting import Layout
from lora_jax.peft._places import NamesArgument, Places
from lora_jax.peft._placing import Loaded
from lora_jax.peft._table import NameTable
from lora_jax.peft._ties import OnTied
from lora_jax.peft._uses import find_known
from lora_jax.plan.adapter_plan import AdapterPlan

__all__ = ["Loaded", "NameTable", "load", "match_names", "replace_leaves"]


def load(
    directory: str | os.PathLike[str],
    params: chex.ArrayTree,
    fn: Callable[..., Any] | None = None,
    *args: Any,
    plan: AdapterPlan | None = None,
    names: NamesArgument = None,
    layout: Layout | None = None,
    on_tied: OnTied = "error",
    strict: bool = True,
    dtype: FileDtype = None,
    allow_fields: Collection[str] = (),
) -> Loaded:
    """Reads an adapter that PEFT saved, for some params.

    PEFT names modules, `model.layers.0.self_attn.q_proj`, and a tree has paths. The weight
    of a module is the leaf whose path has the longest common end with its name, and the
    numbers in both have to be the same. Where layers or experts are stacked in one array,
    each module is one index of it: smaller ranks are filled up with zeros, and `B` takes
    up other scales. Heads may be axes of their own, `(d, heads, k)`. The table of names and
    paths goes to the logger `lora_jax.peft` at the level INFO before anything is read, and
    `match_names` returns it.

    The function shows what each axis of a weight is, as it does in `plan_adapters`. Without
    it the shapes have to show that: a weight whose shape can be read in two ways is an
    error, which prints both.

    Args:
        directory: with `adapter_config.json` and `adapter_model.safetensors`.
        params: a pytree of arrays; `jax.ShapeDtypeStruct`s where no values are needed.
        fn: is traced as `fn(params, *args)`, which computes nothing. Give keyword
            arguments of the function with `functools.partial`.
        args: further arguments of `fn`, which may be `jax.ShapeDtypeStruct`s.
        plan: of these params, in place of the function: what `plan_adapters` returned.
        names: the paths that are not to be searched for: a dict from the names of modules
            to paths, or a function. A name may be a template,
            `"model.layers.{}.mlp.up"`, whose numbers fill the `{}` of the path and then
            are indexes of the weight. In place of a path, `(path, axes)` gives the letters
            of its axes, as `LoraConfig.axes` does. Numbers may have names, which also say
            which axis is the index of what: `"layers.{layer}.experts.{expert}.up":
            ("experts/up", "{expert}{layer}io")`.
        layout: how weights lie that the function does not use: `"jax"`, matrices `(in,
            out)` and kernels `(*kernel, in, out)`; or `"torch"`, `(out, in)` and `(out, in,
            *kernel)`, where matrices that lie `(in, out)` are recognized, square ones by
            the checkpoint's `fan_in_fan_out`. None is `"jax"`, but for square weights that
            may lie either way: those are an error.
        on_tied: what to do if the file has an adapter, or a trained array, of the
            embedding or of the output head, and one leaf is both (tied), or may be: raise
            an error (`"error"`), or let it act on both (`"allow"`). The function shows
            which leaves are tied.
        strict: whether entries without a place, and weights without entries, are errors.
            Otherwise they are left out, and named in a warning.
        dtype: of the adapters, magnitudes too. None for float32, or float64 where the file
            has that: training goes on in it, and in 16 bits small steps would be lost.
            `"file"` for the dtypes that the file has.
        allow_fields: names of fields of the config that are not supported, or not known
            because a newer version of PEFT wrote them, and are ignored nevertheless. Those
            that are in use go to the logger `lora_jax.peft` at the level INFO.

    Returns:
        The adapters; their plan; and `replaced`, what the checkpoint holds whole (saved
        modules, biases, embeddings with trained rows, bases that PiSSA or OLoRA left) by
        path, in the layout of the params. `replace_leaves` puts that into the params,
        before they are used or merged. Leaves of `replaced` have the dtype of the adapters
        too, but at least float32, unless `dtype` is `"file"`; those that only change a leaf
        of the params (rows, a base, the bias of `lora_bias`) have its dtype.

    Raises:
        CheckpointError: if a file is not whole or no PEFT adapter; if it uses what is not
            supported; if an entry has no place in the params, or more than one, or two
            entries that differ have one; if shapes do not show how a weight lies; if the
            config targets a weight that the file lacks; if values are needed and there
            are shapes only; if `dtype` does not hold a value; if one of the two files is
            that of another adapter. The message names the file and the entry.
        FileNotFoundError: if there is no such file.
        KeyError: if the plan is of other params.
        ModuleNotFoundError: if the package safetensors is not installed.
        TypeError, ValueError: if an argument is none that it may be.

    References:
        The format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
    """
    checks.check_flags(strict=strict)
    places = _places(params, fn, args, plan, names, layout)
    checkpoint = open_checkpoint(directory, allow_fields)
    placement = _placing.find_places(checkpoint, places, on_tied=on_tied)
    return _placing.put(placement, strict, dtype=dtype, on_tied=on_tied)


def match_names(
    directory: str | os.PathLike[str],
    params: chex.ArrayTree,
    fn: Callable[..., Any] | None = None,
    *args: Any,
    plan: AdapterPlan | None = None,
    names: NamesArgument = None,
    layout: Layout | None = None,
    on_tied: OnTied = "error",
    allow_fields: Collection[str] = (),
) -> NameTable:
    """Finds the path of each module of a PEFT adapter, and reads no values.

    Args:
        directory: as in `load`.
        params: as in `load`; `jax.ShapeDtypeStruct`s will do.
        fn: as in `load`.
        args: as in `load`.
        plan: as in `load`.
        names: as in `load`.
        layout: as in `load`.
        on_tied: as in `load`.
        allow_fields: as in `load`.

    Returns:
        An immutable dict from the names of modules to paths, which `load` and `save` take
        as `names`. `print` shows a table with the shapes and axes of the weights; where
        several numbers of a name are indexes, the axes say which is the index of what:
        `{experts}{layers}io`.

    Raises:
        CheckpointError, FileNotFoundError, KeyError, ModuleNotFoundError, TypeError,
            ValueError: as `load`.
    """
    checkpoint = open_checkpoint(directory, allow_fields)
    places = _places(params, fn, args, plan, names, layout)
    placement = _placing.find_places(checkpoint, places, on_tied=on_tied)
    for name in (*checkpoint.entries.wholes, *checkpoint.entries.tokens):
        for key in (name, name.rpartition(".")[0]):
            places.given(key)
    placement.problems.lines += places.unused_names()
    placement.problems.settle(checkpoint.where, True)
    return placement.table()


def _places(
    params: chex.ArrayTree,
    fn: Callable[..., Any] | None,
    args: tuple[Any, ...],
    plan: AdapterPlan | None,
    names: NamesArgument,
    layout: Layout | None,
) -> Places:
    known = find_known(params, fn, args, plan)
    return Places(tree_paths.leaf_paths(params), names, layout, known)


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
    leaves, treedef = tree_paths.flatten(params)
    for path, array in replaced.items():
        if path not in leaves:
            hint = tree_paths.nearest_hint(path, leaves)
            raise KeyError(f"params have no leaf at {path!r}{hint}.")
        with checks.at_path(path):
            leaves[path] = _like(leaves[path], array)
    return treedef.unflatten(leaves.values())


def _like(leaf: Any, array: jax.Array) -> jax.Array:
    if not checks.is_array(leaf) or tuple(leaf.shape) != array.shape:
        raise ValueError(
            f"the leaf must be an array of the shape {array.shape}, got "
            f"{getattr(leaf, 'shape', type(leaf).__name__)}."
        )
    return array.astype(leaf.dtype)
