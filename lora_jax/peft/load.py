"""Loads adapters that Hugging Face PEFT saved."""

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax._core import checks, tree_paths
from lora_jax._core.immutable import FrozenDict
from lora_jax._core.tables import format_html, format_table
from lora_jax._io import tensor_files
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.layers.lora import Adapter
from lora_jax.peft.adapters import make_adapters, make_plan, to_jax
from lora_jax.peft.formats.checkpoint import (
    Checkpoint,
    FileDtype,
    check_dtype,
)
from lora_jax.peft.formats.opening import open_adapter
from lora_jax.peft.layout import Layout, Site
from lora_jax.peft.leaves import Places, Problems, make_places
from lora_jax.peft.locate import find_sites
from lora_jax.peft.missing import (
    ON_TIED,
    OnTied,
    check_module,
    find_missing,
    tied_adapters,
)
from lora_jax.peft.names import NamesArgument
from lora_jax.peft.replaced import Replaced, put_changes, put_full
from lora_jax.peft.rules import Rules
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.target import VALUE

__all__ = ["Loaded", "NameTable", "load", "match_names"]

_LOG = logging.getLogger("lora_jax.peft")


class Loaded(NamedTuple):
    """The content of a file of adapters, for some params."""

    adapters: dict[str, Adapter]
    """Like the adapters of `init_adapters`."""
    plan: AdapterPlan
    """Like the plan of `plan_adapters`."""
    replaced: dict[str, jax.Array]
    """Path to value, for the leaves that the checkpoint replaces."""


class Row(NamedTuple):
    """A module and its weight."""

    site: Site
    shape: tuple[int, ...]
    """Of the weight."""


class NameTable(FrozenDict[str, str | tuple[str, str]]):
    """From the names of modules to the paths of their weights. `print` shows a table.

    Where more than the shape showed the axes of a weight, the value is a pair of the path
    and the letters of the axes, with `{layers}` for the axis of layers.
    """

    rows: tuple[Row, ...] = ()

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "NameTable":
        """Makes a table of sites, which have `given` if more than the shape showed axes."""
        by_name = {row.site.name: row for row in rows}
        table = cls(
            {
                name: (site.target, site.letters) if site.given else site.target
                for name, (site, _) in by_name.items()
            }
        )
        table.rows = tuple(by_name.values())
        return table

    def __str__(self) -> str:
        return "\n".join(format_table(_cells(self.rows)))

    def _repr_html_(self) -> str:
        return format_html(_cells(self.rows))


def _cells(rows: Iterable[Row]) -> Iterator[tuple[str, ...]]:
    yield "module", "path", "shape", "axes"
    for site, shape in rows:
        pairs = sorted(zip(site.stack, site.indices, strict=True))
        index = f"[{', '.join(str(index) for _, index in pairs)}]" if pairs else ""
        yield site.name, site.target + index, str(shape), site.letters


class Placement(NamedTuple):
    """The site of each adapter of a checkpoint in some params."""

    checkpoint: Checkpoint
    places: Places
    sites: Mapping[str, Site]
    """By the names of the modules in the checkpoint."""
    problems: Problems
    on_tied: OnTied = "error"
    tied: frozenset[str] = frozenset()
    """The leaves that are or may be an embedding and a head, if adapters act on both."""

    def table(self) -> NameTable:
        """The modules of the checkpoint and their weights."""
        rows = []
        for site in self.sites.values():
            given = site.given or site.path in self.places.known.axes
            given |= site.stack != tuple(sorted(site.stack))
            shape = self.places.shape(site.path, site.part)
            rows.append(Row(site._replace(given=given), shape))
        return NameTable.of(rows)


def find_places(
    checkpoint: Checkpoint, places: Places, *, on_tied: OnTied = "error"
) -> Placement:
    """Finds the site of each adapter of a checkpoint.

    Raises:
        ValueError: if `on_tied` is not one of its values.
    """
    checks.check_choice("on_tied", on_tied, ON_TIED)
    on_tied = "allow" if checkpoint.on_both else on_tied
    problems, config, modules = Problems(), checkpoint.config, {}
    rules, separate = Rules(config), on_tied == "error"
    for name, module in checkpoint.entries.modules.items():
        with problems.collecting():
            check_module(module, rules)
            modules[name] = module
    sites = find_sites(places, modules, config, problems, splits_ties=separate)
    wrong, tied = {}, frozenset[str]()
    if separate or checkpoint.on_both:
        wrong = tied_adapters(places, sites, modules, config)
    if not separate:
        tied = frozenset(sites[name].path for name in wrong)
        return Placement(checkpoint, places, sites, problems, on_tied, tied)
    problems.lines += wrong.values()
    sites = {name: site for name, site in sites.items() if name not in wrong}
    return Placement(checkpoint, places, sites, problems)


class Widened:
    """Reads arrays in at least float32, so that nothing is computed or trained in less.

    Full arrays have `dtype`, if that is at least float32.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: Any) -> None:
        self._arrays, self._where = checkpoint.arrays, checkpoint.where
        self._wholes = frozenset(checkpoint.entries.wholes.values())
        self._dtype = dtype if dtype is not None and dtype.itemsize >= 4 else None

    def read(self, name: str, /) -> np.ndarray:
        """The array of a name."""
        array = tensor_files.widen(self._arrays.read(name))
        try:
            dtype = self._dtype if name in self._wholes else None
            return tensor_files.cast(repr(name), array, dtype)
        except ValueError as error:
            raise CheckpointError(f"{self._where}: {error}") from None


def assemble(placement: Placement, strict: bool, *, dtype: FileDtype = None) -> Loaded:
    """Makes adapters, a plan and replaced leaves from a checkpoint.

    If `strict` is true, what does not fit is an error.

    Raises:
        CheckpointError: as `lora_jax.peft.load`.
    """
    checkpoint, places, sites, problems, on_tied, tied = placement
    where, config = checkpoint.where, checkpoint.config
    if dtype != "file":
        checkpoint = checkpoint._replace(arrays=Widened(checkpoint, dtype))
    _LOG.info("%s\n%s", where, placement.table())
    replaced = Replaced(places)
    twice = put_full(replaced, checkpoint, sites, problems, on_tied)
    sites = [site for name, site in sites.items() if name not in twice]
    problems.lines[:0] = places.unused_names()
    problems.lines += find_missing(checkpoint, places, sites)
    problems.settle(where, strict)
    try:
        put_changes(replaced, checkpoint, sites)
        placed = make_adapters(checkpoint, places, sites)
        whole = replaced.finish(where)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if not placed and not whole:
        why = problems.lines[0] if problems.lines else "it contains nothing for them."
        raise CheckpointError(f"{where}: nothing of it fits the params: {why}")
    trained = places.known.trained - {site.path for site in sites}
    values = {path: {VALUE: whole.pop(path)} for path in [*whole] if path in trained}
    plan = make_plan(config, places, placed, values, tied)
    return Loaded(to_jax(where, placed, dtype) | values, plan, whole)


def load(
    directory: str | os.PathLike[str],
    params: tree_paths.PyTree,
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
    """Loads an adapter that PEFT, mlx-lm, kohya's trainers or diffusers saved, for params.

    PEFT has names of modules, such as `model.layers.0.self_attn.q_proj`, and a tree has
    paths. The weight of a module is the leaf whose path has the longest common end with the
    name. Both must contain the same numbers. Where layers or experts are stacked in one
    array, each module is one index of the array. Modules of one rank and one scale share a
    target: the whole array, or a part of it that has their layers, `"layers/up[4:]"`. Heads
    may have their own axis, `(d, heads, k)`. The table of names and paths goes to the
    logger `lora_jax.peft` at the level INFO, and `match_names` returns it.

    The function shows the role of each axis of a weight, as in `plan_adapters`. Without a
    function the shapes have to show the roles. A shape that fits two readings raises an
    error, which prints both.

    Args:
        directory: with `adapter_config.json` and `adapter_model.safetensors` of PEFT, or
            `adapters.safetensors` of mlx-lm; or one safetensors file of kohya's trainers or
            of diffusers. The names of the entries show which one it is. Names of kohya are
            `lora_unet_mid_block_attentions_0_proj_in`: paths are then split at underscores
            too.
        params: a pytree of arrays; `jax.ShapeDtypeStruct`s where no values are needed.
        fn: traced as `fn(params, *args)`; nothing is computed. Give keyword arguments of
            the function with `functools.partial`.
        args: further arguments of `fn`, which may be `jax.ShapeDtypeStruct`s.
        plan: the plan that `plan_adapters` returned for these params, in place of `fn`.
            Full leaves that it trains become trained leaves of the plan that is returned,
            with their values in `adapters`. Its stated `products` go into that plan, too.
        names: the paths of modules that are not found by their names: a dict from names to
            paths, or a function. A name may be a template, `"model.layers.{}.mlp.up"`. Its
            numbers fill the `{}` of the path, and the other numbers are indexes of the
            weight. In place of a path, `(path, axes)` gives the letters of the axes, as in
            `LoraConfig.axes`. A path may end in an index if the module is a part of a fused
            weight, `"layers/qkv[:,0]"`, or in a use, `"embed/embedding@product"`; then the
            letters are those of the part. Numbers may have names, which show the axis of
            each index:
            `"layers.{layer}.experts.{expert}.up": ("experts/up", "{expert}{layer}io")`.
        layout: of weights that the function does not use. `"jax"`: matrices `(in, out)` and
            kernels `(*kernel, in, out)`. `"torch"`: `(out, in)` and `(out, in, *kernel)`;
            matrices `(in, out)` are recognized by their shape, and square ones by the
            checkpoint's `fan_in_fan_out`. None: `"jax"`, and an error for square weights
            that may have either layout.
        on_tied: what to do if the file has an adapter or a trained array of the embedding
            or the output head, and one leaf is both (tied) or may be both. `"error"`: if
            the function looks rows of the leaf up and multiplies by it, an adapter becomes
            a target of one of both, `"table@lookup"` or `"table@product"`, and so it does
            if `names` has such a path. All else is an error. `"allow"`: adapters and arrays
            act on both. So do adapters of mlx-lm, where the embedding of a tied model is
            the head too.
        strict: whether entries without a leaf, and target weights without entries, raise an
            error. Otherwise they are left out, with a warning.
        dtype: of the adapters, including magnitudes. None for float32, or float64 where the
            file has float64: training continues in this dtype, and 16 bits would lose small
            steps. `"file"` for the dtypes of the file.
        allow_fields: names of fields of the config to ignore, although they are not
            supported or not known. Such fields go to the logger `lora_jax.peft` at the
            level INFO if they are in use.

    Returns:
        The adapters; their plan; and `replaced`, the full (not low-rank) leaves by path, in
        the layout of the params: saved modules, biases, embeddings with trained rows, bases
        that PiSSA or OLoRA changed. `replace_leaves` puts them into the params, before
        these are used or merged. Leaves of `replaced` have the dtype of the adapters, but
        at least float32, unless `dtype` is `"file"`. Leaves that the checkpoint changes in
        part (rows, a base, the bias of `lora_bias`) keep the dtype of the params.

    Raises:
        CheckpointError: if a file is incomplete or not of LoRA; if the adapter needs what
            is not supported; if an entry matches no leaf or several, or two entries
            that differ match one; if shapes do not show the axes of a weight; if the config
            targets a weight that the file lacks; if values are needed and there are only
            shapes; if a value is out of the range of `dtype`; if the two files are from two
            adapters. The message names the file and the entry.
        FileNotFoundError: if there is no such file.
        KeyError: if the plan is for other params.
        ModuleNotFoundError: if the package safetensors is not installed.
        TypeError, ValueError: if an argument is not valid.

    References:
        The formats: https://huggingface.co/docs/peft/developer_guides/checkpoint,
        `networks/lora.py` in https://github.com/kohya-ss/sd-scripts, `mlx_lm/tuner` in
        https://github.com/ml-explore/mlx-lm, and `load_lora_adapter` of diffusers.
    """
    checks.check_flags(strict=strict)
    dtype = check_dtype(dtype)
    places = make_places(params, fn, args, plan, names, layout)
    checkpoint = open_adapter(directory, allow_fields)
    placement = find_places(checkpoint, places, on_tied=on_tied)
    return assemble(placement, strict, dtype=dtype)


def match_names(
    directory: str | os.PathLike[str],
    params: tree_paths.PyTree,
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
        as `names`. `print` shows a table with the shapes and axes of the weights. Where
        several numbers of a name are indexes, the axes name them: `{experts}{layers}io`.

    Raises:
        CheckpointError, FileNotFoundError, KeyError, ModuleNotFoundError: as `load`.
        TypeError, ValueError: as `load`.
    """
    checkpoint = open_adapter(directory, allow_fields)
    places = make_places(params, fn, args, plan, names, layout)
    placement = find_places(checkpoint, places, on_tied=on_tied)
    for name in (*checkpoint.entries.wholes, *checkpoint.entries.tokens):
        for key in (name, name.rpartition(".")[0]):
            places.given(key)
    placement.problems.lines += places.unused_names()
    placement.problems.settle(checkpoint.where, True)
    return placement.table()
