"""The adapters of a checkpoint for some params, and their plan.

PEFT's factors are those of torch: `lora_A (r, in)`, `lora_B (out, r)`. NumPy throughout:
reading and writing turns axes, and computes nothing.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from lora_jax._core import checks
from lora_jax._io import tensor_files
from lora_jax.peft.checkpoint import Checkpoint
from lora_jax.peft.config import PeftConfig
from lora_jax.peft.keys import Kind, Module, without_wrapper
from lora_jax.peft.layout import common_dtype, take_layer
from lora_jax.peft.leaves import Places, leaf_values
from lora_jax.peft.locate import Site
from lora_jax.peft.replaced import Replaced, add_bias, change_bases
from lora_jax.plan import selection
from lora_jax.plan.adapter_plan import FROM_CHECKPOINT, AdapterPlan, Target, Use
from lora_jax.plan.config import LoraConfig

Arrays = Mapping[str, np.ndarray]
_GIVEN = "the PEFT checkpoint, with the axes that names gives"
_PRIMITIVES = {"embedding": "gather", "convolution": "conv_general_dilated"}
_NOT_ADAPTED = "the PEFT checkpoint has no adapter for it"


class Placed(NamedTuple):
    """The adapter of one weight, and what the plan says of it."""

    arrays: Mapping[str, np.ndarray]
    target: Target
    use: Use


def make_adapters(
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
                add_bias(replaced, places, site, bias, scale)
            own = from_peft(module.kind, site.own_axes, module.experts, arrays)
            matrices[site.indices] = own, scale
        change_bases(config, places, by_path[path], modules, replaced)
        kind = modules[by_path[path][0].module].kind
        placed[path] = _stacked_adapter(config, places, by_path[path][0], kind, matrices)
    return placed


def _configured(module: Module, site: Site) -> str:
    """What the patterns of the config are about: a module, or a parameter of one."""
    return site.name if module.kind == "experts" else without_wrapper(module.name)


def _stacked_adapter(
    config: PeftConfig,
    places: Places,
    site: Site,
    kind: str,
    matrices: Mapping[tuple[int, ...], tuple[Arrays, float]],
) -> Placed:
    """The adapter of a weight, of one module or of a stack of them."""
    shape = places.shape(site.path)
    groups = {
        letter: tuple(axis for axis, own in enumerate(site.axes) if own == letter)
        for letter in "iob"
    }
    if site.indices:
        sizes = tuple(shape[axis] for axis in site.stack)
        arrays, scale = stack_modules(matrices, sizes)
        if "m" in arrays:
            _fill_magnitudes(arrays, places, site, set(matrices), sizes)
        inner = (axis for axis in groups["b"] if axis not in site.stack)
        arrays = order_axes(arrays, (*site.stack, *inner))
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
    weight = leaf_values(site.path, leaf, "some layers of the stack have no magnitude")
    inner = tuple(axis for axis, own in enumerate(site.own_axes) if own == "i")
    for index in absent:
        layer = take_layer(weight, site.stack, index).astype(np.float64)
        norm = np.sqrt(np.square(layer).sum(inner))
        arrays["m"][index] = norm.reshape(arrays["m"][index].shape)


def from_peft(kind: Kind, axes: str, experts: int, arrays: Arrays) -> dict[str, np.ndarray]:
    """The entries of one module.

    Args:
        kind: of the module.
        axes: the letters of the axes of the module's weight, without those of a stack.
        experts: how many the factors are of; 0 for none.
        arrays: `A` and `B`, and `m` if there is one, as in the checkpoint.

    Returns:
        `A (in, r)` and `B (r, out)` and `m (out,)`, or `(experts, in, r)` and so on.
    """
    a, b = arrays["A"], arrays["B"]
    if kind == "experts":  # (experts * r, in) and (out, r * experts)
        rank = a.shape[0] // experts
        a = a.reshape(experts, rank, -1).transpose(0, 2, 1)
        b = b.reshape(-1, rank, experts).transpose(2, 1, 0)
        own = {"A": a, "B": b}
        return own if "b" in axes else {name: value[0] for name, value in own.items()}
    if kind == "convolution":  # (r, in, *kernel) and (out, r, 1, ...)
        if axes.endswith("o"):
            a = np.moveaxis(a, 1, -1)
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[:2])
    magnitude = {"m": arrays["m"].reshape(-1)} if "m" in arrays else {}
    return {"A": a.T, "B": b.T, **magnitude}


def to_peft(
    kind: Kind, axes: str, shape: tuple[int, ...], arrays: Arrays
) -> dict[str, np.ndarray]:
    """Undoes `from_peft`.

    Args:
        kind: of the module.
        axes: the letters of the axes of the module's weight, without those of a stack.
        shape: of that weight.
        arrays: `A` and `B`, and `m` if there is one.

    Returns:
        The entries as PEFT has them.
    """
    a, b = arrays["A"], arrays["B"]
    if kind == "experts":
        if "b" not in axes:
            a, b = a[None], b[None]
        *_, n_in, _ = a.shape
        *_, n_out = b.shape
        a, b = a.transpose(0, 2, 1), b.transpose(2, 1, 0)
        return {"A": a.reshape(-1, n_in), "B": b.reshape(n_out, -1)}
    entries = {"A": a.T, "B": b.T} | ({"m": arrays["m"]} if "m" in arrays else {})
    if kind == "convolution":
        rank = a.shape[-1]
        inner = [n for n, letter in zip(shape, axes, strict=True) if letter == "i"]
        entries["A"] = a.T.reshape(rank, *inner)
        if axes.endswith("o"):
            entries["A"] = np.moveaxis(entries["A"], -1, 1)
        ones = (1,) * (len(inner) - 1)
        entries["B"] = b.T.reshape(-1, rank, *ones)
        if "m" in entries:
            entries["m"] = entries["m"].reshape(1, -1, *ones)
    return entries


def stack_modules(
    matrices: Mapping[tuple[int, ...], tuple[Arrays, float]], sizes: tuple[int, ...]
) -> tuple[dict[str, np.ndarray], float]:
    """Stacks the adapters of several modules, whose weights are stacked.

    A smaller rank is filled up with zeros, and where scales differ, `B` takes up the
    quotient: the update of each is what it was. Where there is no module, the update is 0.

    Args:
        matrices: `A`, `B`, and `m` if there is one, and the scale, by index in the stack.
        sizes: of the axes of the stack.

    Returns:
        The entries with the axes of the stack in front, and their scale.
    """
    scale = next(iter(matrices.values()))[1]
    rank = max(arrays["A"].shape[-1] for arrays, _ in matrices.values())
    dtypes: dict[str, set[np.dtype]] = {}
    for arrays, _ in matrices.values():
        for name, value in arrays.items():
            dtypes.setdefault(name, set()).add(value.dtype)
    stacked: dict[str, np.ndarray] = {}
    for index, (arrays, own) in matrices.items():
        for name, value in fill_up(arrays, rank, own / scale).items():
            value = tensor_files.cast(name, value, arrays[name].dtype)
            if name not in stacked:
                dtype = common_dtype(*dtypes[name])
                stacked[name] = np.zeros((*sizes, *value.shape), dtype)
            stacked[name][index] = value
    return stacked, scale


def order_axes(arrays: Arrays, batch: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The entries of a stack with their first axes in the order of a weight's.

    Args:
        arrays: with the axes of the stack in front.
        batch: which axis of the weight each of these is.
    """
    order = [*map(int, np.argsort(batch))]
    return {
        name: value.transpose(*order, *range(len(order), value.ndim))
        for name, value in arrays.items()
    }


def fill_up(arrays: Arrays, rank: int, factor: float) -> dict[str, np.ndarray]:
    """An adapter at a larger rank, with a factor in its `B`.

    Args:
        arrays: the entries.
        rank: at least that of the adapter; the rest is zeros.
        factor: of the update. Where it is not 1, `B` is float64, not rounded yet.
    """
    filled = dict(arrays)
    missing = rank - arrays["A"].shape[-1]
    a, b = arrays["A"], arrays["B"]
    if missing:
        filled["A"] = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)])
        filled["B"] = np.pad(b, [(0, 0)] * (b.ndim - 2) + [(0, missing), (0, 0)])
    if not math.isclose(factor, 1, rel_tol=1e-12):
        filled["B"] = filled["B"].astype(np.float64) * factor
    return filled


def use_of(kind: str, axes: str, given: bool) -> Use:
    """What a module of some kind does with its weight, so that it is saved as that.

    `given` is whether the caller gave the axes.
    """
    first = "indexed" if kind == "embedding" else "contracted"
    roles = {"i": first, "o": "kept", "b": "stacked"}
    own = tuple(roles[letter] for letter in axes)
    primitive, where = _PRIMITIVES.get(kind, "dot_general"), FROM_CHECKPOINT
    linear = kind not in _PRIMITIVES
    return Use(primitive, own, _GIVEN if given else where, linear=linear)


def make_plan(
    config: PeftConfig, places: Places, placed: Mapping[str, Placed]
) -> AdapterPlan:
    """The plan of the adapters of a checkpoint."""
    targets = {path: own.target for path, own in placed.items()}
    leaves = {path: leaf for path, leaf in places.leaves.items() if checks.is_array(leaf)}
    return AdapterPlan(
        config=_lora_config(config, targets),
        targets=targets,
        skipped={p: _NOT_ADAPTED for p in places.leaves if p not in targets},
        uses={
            **places.known.uses,
            **{path: (own.use,) for path, own in placed.items() if own.use},
        },
        total=selection.count(leaves.values()),
    )


def _lora_config(config: PeftConfig, targets: Mapping[str, Target]) -> LoraConfig:
    """The config of which the plan could have been made."""
    alphas = {
        path: target.scale * (math.sqrt(target.rank) if config.use_rslora else target.rank)
        for path, target in targets.items()
    }
    return LoraConfig(
        rank=config.r,
        alpha=config.lora_alpha or 1.0,  # if 0, no module has it
        targets=tuple(targets) or "all-linear",
        rank_pattern={p: t.rank for p, t in targets.items() if t.rank != config.r},
        alpha_pattern={
            p: a for p, a in alphas.items() if not math.isclose(a, config.lora_alpha)
        },
        axes={path: target.axes for path, target in targets.items()},
        rank_stabilized=config.use_rslora,
        use_dora=config.use_dora,
        dropout=config.lora_dropout,
    )
