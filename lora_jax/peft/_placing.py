"""Puts the adapters of a PEFT checkpoint where they belong in some params."""

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from lora_jax._core import checks
from lora_jax._io import tensor_files
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.layers.lora import Adapter
from lora_jax.peft import _arrays, _bases, _names, _replaced, _ties, _wholes
from lora_jax.peft._checkpoint import (
    Checkpoint,
    FileDtype,
    Widened,
    check_dtype,
    module_check,
)
from lora_jax.peft._completeness import biased, missing
from lora_jax.peft._entries import Module, without_wrapper
from lora_jax.peft._places import Places, Problems
from lora_jax.peft._planning import Placed, make_plan, use_of
from lora_jax.peft._replaced import Replaced
from lora_jax.peft._sites import Site, find_sites
from lora_jax.peft._table import NameTable, Row
from lora_jax.peft._ties import OnTied
from lora_jax.peft.config import PeftConfig
from lora_jax.plan.adapter_plan import AdapterPlan, Target

_LOG = logging.getLogger("lora_jax.peft")


class Loaded(NamedTuple):
    """What a PEFT checkpoint comes to on some params."""

    adapters: dict[str, Adapter]
    """As those of `init_adapters`."""
    plan: AdapterPlan
    """As that of `plan_adapters`."""
    replaced: dict[str, jax.Array]
    """Path to value, for the leaves that the checkpoint holds whole."""


class Placement(NamedTuple):
    """Where what a checkpoint has belongs in some params."""

    checkpoint: Checkpoint
    places: Places
    sites: Mapping[str, Site]
    """By the names of the modules in the checkpoint."""
    problems: Problems

    def table(self) -> NameTable:
        """The modules of the checkpoint and their weights."""
        rows = {}
        for site in self.sites.values():
            given = site.path in self.places.known.axes
            given |= any(map(self.places.gives_axes, {site.name, site.module}))
            # As names of modules have them, so that the table can be given as `names`.
            numbers = _names.lacking_fields(site.name, site.path)
            same = tuple(number for _, number in numbers) == site.indices
            rows[site.name] = Row(
                module=site.name,
                path=site.path,
                indices=site.indices,
                shape=self.places.shape(site.path),
                axes=site.axes,
                given=given or site.stack != tuple(sorted(site.stack)),
                stack=site.stack,
                fields=tuple(field for field, _ in numbers) if same else site.fields,
            )
        return NameTable.of(rows)


def find_places(
    checkpoint: Checkpoint, places: Places, *, on_tied: OnTied = "error"
) -> Placement:
    """Finds the weight of each module of a checkpoint.

    Args:
        checkpoint: what was read.
        places: of the params.
        on_tied: as in `lora_jax.peft.load`.

    Raises:
        ValueError: if `on_tied` is none that it may be.
    """
    checks.check_choice("on_tied", on_tied, _ties.ON_TIED)
    problems, config, modules = Problems(), checkpoint.config, {}
    check = module_check(config)
    for name, module in checkpoint.entries.modules.items():
        with problems.collecting():
            check(module)
            modules[name] = module
    sites = find_sites(places, modules, config, problems)
    if on_tied == "error":
        kinds = {name: module.kind for name, module in modules.items()}
        wrong = _ties.of_adapters(places, sites.values(), kinds, config)
        problems.lines += wrong.values()
        sites = {name: site for name, site in sites.items() if name not in wrong}
    return Placement(checkpoint, places, sites, problems)


def put(
    placement: Placement,
    strict: bool,
    *,
    dtype: FileDtype = None,
    scales_bias: bool = False,
    on_tied: OnTied = "error",
) -> Loaded:
    """Makes of a checkpoint the adapters and the plan of some params.

    Args:
        placement: where its adapters belong.
        strict: whether what does not fit is an error.
        dtype: of the adapters; as in `lora_jax.peft.load`.
        scales_bias: whether the adapters multiply the biases of their layers too.
        on_tied: as in `lora_jax.peft.load`.

    Raises:
        CheckpointError: as `lora_jax.peft.load`.
    """
    checkpoint, places, sites, problems = placement
    dtype = check_dtype(dtype)
    if dtype != "file":
        checkpoint = checkpoint._replace(arrays=Widened(checkpoint, dtype))
    _LOG.info("%s\n%s", checkpoint.where, placement.table())
    replaced = Replaced(places)
    twice = _put_wholes(checkpoint, places, sites, replaced, problems, on_tied)
    sites = {name: site for name, site in sites.items() if name not in twice}
    problems.lines[:0] = places.unused_names()
    problems.lines += missing(checkpoint.config, checkpoint.entries, places, sites.values())
    if scales_bias:
        problems.lines += biased(places, sites.values())
    problems.settle(checkpoint.where, strict)
    try:
        placed = _put_adapters(checkpoint, places, sites, replaced)
        whole = replaced.finish(checkpoint.where)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.where}: {error}") from None
    if not placed and not whole:
        why = problems.lines[0] if problems.lines else "it has nothing to put there."
        raise CheckpointError(f"{checkpoint.where}: nothing of it fits the params: {why}")
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
            array = tensor_files.cast(repr(name), array, dtype)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from None
    return tensor_files.to_jax(where, name, array)


def _put_wholes(
    checkpoint: Checkpoint,
    places: Places,
    sites: Mapping[str, Site],
    replaced: Replaced,
    problems: Problems,
    on_tied: OnTied,
) -> set[str]:
    """Collects what the checkpoint holds whole, then what changes such leaves.

    Returns:
        The modules whose adapters have to be left out, because their leaves are taken.
    """
    config, read = checkpoint.config, checkpoint.arrays.read
    arrays = {name: read(key) for name, key in checkpoint.entries.wholes.items()}
    arrays = _ties.without_twins(places, arrays)
    shapes = {name: array.shape for name, array in arrays.items()}
    spots = _wholes.find_spots(places, shapes, problems)
    if on_tied == "error":
        twins = checkpoint.entries.wholes.keys() - arrays.keys()
        wrong = _ties.of_wholes(places, spots, twins, config)
        problems.lines += wrong.values()
        spots = {name: spot for name, spot in spots.items() if name not in wrong}
    for name, spot in spots.items():
        with problems.collecting():
            replaced.put(spot, arrays[name])
    rows: dict[str, str] = {}
    for name, key in checkpoint.entries.tokens.items():
        with problems.collecting():
            indexes = _token_indexes(config, name)
            rows[name] = _replaced.put_rows(replaced, places, name, read(key), indexes)
    twice = dict(_ties.of_two(sites.values(), spots, rows))
    problems.lines += twice.values()
    return set(twice)


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
            own = _arrays.from_peft(module.kind, site.own_axes, module.experts, arrays)
            matrices[site.indices] = own, scale
        _bases.change(config, places, by_path[path], modules, replaced)
        kind = modules[by_path[path][0].module].kind
        placed[path] = _placed(config, places, by_path[path][0], kind, matrices)
    return placed


def _configured(module: Module, site: Site) -> str:
    """What the patterns of the config are about: a module, or a parameter of one."""
    return site.name if module.kind == "experts" else without_wrapper(module.name)


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
        sizes = tuple(shape[axis] for axis in site.stack)
        arrays, scale = _arrays.stack(matrices, sizes)
        if "m" in arrays:
            _fill_magnitudes(arrays, places, site, set(matrices), sizes)
        inner = (axis for axis in groups["b"] if axis not in site.stack)
        arrays = _arrays.in_order(arrays, (*site.stack, *inner))
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
    inner = tuple(axis for axis, own in enumerate(site.own_axes) if own == "i")
    for index in absent:
        layer = _wholes.layer(weight, site.stack, index).astype(np.float64)
        norm = np.sqrt(np.square(layer).sum(inner))
        arrays["m"][index] = norm.reshape(arrays["m"][index].shape)
