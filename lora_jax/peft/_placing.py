"""Puts the adapters of a PEFT checkpoint where they belong in some params."""

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import chex
import jax
import numpy as np

from lora_jax import _checks, _files, _paths
from lora_jax._files import CheckpointError
from lora_jax.lora import Adapter
from lora_jax.peft import _arrays, _bases, _names, _replaced, _wholes
from lora_jax.peft._checkpoint import (
    Checkpoint,
    FileDtype,
    Widened,
    check_dtype,
    check_module,
)
from lora_jax.peft._completeness import biased, missing
from lora_jax.peft._entries import Module, without_wrapper
from lora_jax.peft._fitting import LAYOUTS, Layout
from lora_jax.peft._places import NamesArgument, Places, Problems
from lora_jax.peft._planning import Placed, make_plan, use_of
from lora_jax.peft._replaced import Replaced
from lora_jax.peft._sites import Site, find_sites
from lora_jax.peft._table import NameTable, Row
from lora_jax.peft.config import PeftConfig
from lora_jax.plan import AdapterPlan, Target

_LOG = logging.getLogger("lora_jax.peft")


class Loaded(NamedTuple):
    """What a PEFT checkpoint comes to on some params."""

    adapters: dict[str, Adapter]
    """As those of `init_adapters`."""
    plan: AdapterPlan
    """As that of `plan_adapters`."""
    replaced: dict[str, jax.Array]
    """Path to value, for the leaves that the checkpoint holds whole."""


def find_places(
    checkpoint: Checkpoint, params: chex.ArrayTree, names: NamesArgument, layout: Layout
) -> tuple[Places, dict[str, Site], Problems]:
    """Finds the weight of each module of a checkpoint.

    Raises:
        TypeError, ValueError: if `names` or `layout` is none that it may be.
    """
    _checks.check_choice("layout", layout, LAYOUTS)
    if names is not None and not callable(names) and not isinstance(names, Mapping):
        raise TypeError(
            "names must be a dict from the names of modules to paths, or a function, got "
            f"{type(names).__name__}."
        )
    places, problems = Places(_paths.leaf_paths(params), names, layout), Problems()
    config, modules = checkpoint.config, {}
    for name, module in checkpoint.entries.modules.items():
        with problems.collecting():
            check_module(config, module)
            modules[name] = module
    return places, find_sites(places, modules, config, problems), problems


def table(places: Places, sites: Mapping[str, Site]) -> NameTable:
    """The modules of a checkpoint and their weights."""
    rows = {
        site.name: Row(
            module=site.name,
            path=site.path,
            indices=site.indices,
            shape=places.shape(site.path),
            axes=site.axes,
            given=places.gives_axes(site.name) or places.gives_axes(site.module),
        )
        for site in sites.values()
    }
    return NameTable.of(rows)


def put(
    checkpoint: Checkpoint,
    params: chex.ArrayTree,
    names: NamesArgument,
    layout: Layout,
    strict: bool,
    *,
    dtype: FileDtype = None,
    scales_bias: bool = False,
) -> Loaded:
    """Makes of a checkpoint the adapters and the plan of some params.

    Args:
        checkpoint: what was read.
        params: as in `lora_jax.peft.load`, as are the next three.
        names: of modules.
        layout: of the params.
        strict: whether what does not fit is an error.
        dtype: of the adapters; as in `lora_jax.peft.load`.
        scales_bias: whether the adapters multiply the biases of their layers too.

    Raises:
        CheckpointError: as `lora_jax.peft.load`.
    """
    dtype = check_dtype(dtype)
    if dtype != "file":
        checkpoint = checkpoint._replace(arrays=Widened(checkpoint, dtype))
    places, sites, problems = find_places(checkpoint, params, names, layout)
    _LOG.info("%s\n%s", checkpoint.where, table(places, sites))
    replaced = Replaced(places)
    _put_wholes(checkpoint, places, replaced, problems)
    problems.lines[:0] = places.unused_names()
    problems.lines += missing(checkpoint.config, checkpoint.entries, places, sites.values())
    if scales_bias:
        problems.lines += biased(places, sites.values())
    problems.settle(checkpoint.where, strict)
    if layout == "jax" and _may_lie_as_torch(places, sites.values()):
        _LOG.warning(
            "%s: all weights are square and called weight, as in PyTorch, where they lie "
            "(out, in), and they are taken as (in, out): if that is wrong, give "
            "layout='torch'.",
            checkpoint.where,
        )
    try:
        placed = _put_adapters(checkpoint, places, sites, replaced)
        whole = replaced.finish(checkpoint.where)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.where}: {error}") from None
    if not placed and not whole:
        raise CheckpointError(f"{checkpoint.where}: nothing of it fits the params.")
    adapters = {
        path: {
            name: _to_jax(checkpoint.where, f"{path}:{name}", array, dtype)
            for name, array in own.arrays.items()
        }
        for path, own in placed.items()
    }
    return Loaded(adapters, make_plan(checkpoint.config, places, placed), whole)


def _to_jax(where: str, name: str, array: np.ndarray, dtype: FileDtype) -> jax.Array:
    if dtype not in (None, "file"):
        try:
            array = _files.cast(repr(name), array, dtype)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from None
    return _files.to_jax(where, name, array)


def _may_lie_as_torch(places: Places, sites: Iterable[Site]) -> bool:
    """Whether neither shapes nor names show that weights lie as JAX has them."""
    shapes = [places.shape(site.path)[len(site.indices) :] for site in sites]
    leaves = {_names.leaf_word(site.path) for site in sites}
    square = all(len(shape) == 2 and shape[0] == shape[1] for shape in shapes)
    return bool(shapes) and square and leaves == {_names.WEIGHT}


def _put_wholes(
    checkpoint: Checkpoint,
    places: Places,
    replaced: Replaced,
    problems: Problems,
) -> None:
    """Collects what the checkpoint holds whole, then what changes such leaves."""
    config, read = checkpoint.config, checkpoint.arrays.read
    for name, key in checkpoint.entries.wholes.items():
        with problems.collecting():
            array = read(key)
            replaced.put(name, _wholes.place(places, name, array.shape), array)
    for name, key in checkpoint.entries.tokens.items():
        with problems.collecting():
            indexes = _token_indexes(config, name)
            _replaced.put_rows(replaced, places, name, read(key), indexes)


def _token_indexes(config: PeftConfig, module: str) -> tuple[int, ...]:
    """Which rows of an embedding the checkpoint has."""
    given = config.trainable_token_indices
    if isinstance(given, tuple):
        return given
    for name, indexes in (given or {}).items():
        if module == name or module.endswith(f".{name}"):
            return indexes
    raise CheckpointError(
        f"{module!r} has rows of trained tokens, and the config's trainable_token_indices "
        f"has none for it, got {given!r}"
    )


def _put_adapters(
    checkpoint: Checkpoint,
    places: Places,
    sites: Mapping[str, Site],
    replaced: Replaced,
) -> dict[str, Placed]:
    """The adapters by path, in the order of the leaves."""
    by_path: dict[str, list[Site]] = {}
    for site in sites.values():
        by_path.setdefault(site.path, []).append(site)
    config, modules = checkpoint.config, checkpoint.entries.modules
    placed = {}
    for path in places.leaves:
        if path not in by_path:
            continue
        matrices = {}
        for site in by_path[path]:
            module = modules[site.module]
            scale = config.scale_of(_configured(module, site))
            arrays = {
                name: checkpoint.arrays.read(key) for name, key in module.keys.items()
            }
            bias = arrays.pop("B_bias", None)
            if bias is not None:
                _replaced.add_bias(replaced, places, site, bias, scale)
            axes = own_axes(site)
            own = _arrays.from_peft(module.kind, axes, module.experts, arrays)
            matrices[site.indices] = own, scale
        _bases.change(config, places, by_path[path], modules, replaced)
        kind = modules[by_path[path][0].module].kind
        placed[path] = _placed(config, places, by_path[path][0], kind, matrices)
    return placed


def _configured(module: Module, site: Site) -> str:
    """What the patterns of the config are about: a module, or a parameter of one."""
    return site.name if module.kind == "experts" else without_wrapper(module.name)


def own_axes(site: Site) -> str:
    """The letters of the axes of a module's own weight, without those of the stack."""
    return site.axes.replace("b", "", len(site.indices))


def _placed(
    config: PeftConfig,
    places: Places,
    site: Site,
    kind: str,
    matrices: Mapping[tuple[int, ...], tuple[_arrays.Arrays, float]],
) -> Placed:
    """The adapter of a weight, of one module or of a stack of them."""
    shape = places.shape(site.path)
    groups = {
        letter: tuple(axis for axis, own in enumerate(site.axes) if own == letter)
        for letter in "iob"
    }
    if site.indices:
        sizes = tuple(shape[axis] for axis in groups["b"][: len(site.indices)])
        arrays, scale = _arrays.stack(matrices, sizes)
        if "m" in arrays:
            _fill_magnitudes(arrays, places, site, set(matrices), sizes)
    else:
        ((arrays, scale),) = matrices.values()
    target = Target(
        shape=shape,
        method="dora" if config.use_dora else "lora",
        rank=arrays["A"].shape[-1],
        scale=scale,
        dropout=config.lora_dropout,
        in_axes=groups["i"],
        out_axes=groups["o"],
        batch_axes=groups["b"],
    )
    given = places.gives_axes(site.name) or places.gives_axes(site.module)
    return Placed(arrays, target, use_of(kind, site.axes, given))


def _fill_magnitudes(
    arrays: dict[str, np.ndarray],
    places: Places,
    site: Site,
    present: Iterable[tuple[int, ...]],
    sizes: tuple[int, ...],
) -> None:
    """Gives the layers without a module the magnitude that changes nothing."""
    absent = set(np.ndindex(sizes)) - set(present)
    if not absent:
        return
    leaf = places.leaves[site.path]
    weight = _wholes.values(site.path, leaf, "some layers of the stack have no magnitude")
    inner = tuple(axis for axis, own in enumerate(own_axes(site)) if own == "i")
    for index in absent:
        layer = _wholes.layer(weight, site.axes, index).astype(np.float64)
        norm = np.sqrt(np.square(layer).sum(inner))
        arrays["m"][index] = norm.reshape(arrays["m"][index].shape)
