"""Adapters and their plan, from the arrays of a checkpoint; and arrays as PEFT has them.

PEFT has PyTorch's layout: `lora_A (r, in)`, `lora_B (out, r)`. All conversions use NumPy.
They reorder values and scale them; they compute nothing else.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from lora_jax._core import checks, tree_paths
from lora_jax._io import tensor_files
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.layers.lora import Adapter
from lora_jax.peft.formats.checkpoint import Checkpoint, FileDtype
from lora_jax.peft.formats.config import PeftConfig, as_lora_config
from lora_jax.peft.formats.keys import Kind
from lora_jax.peft.layout import (
    SWAPPED,
    Index,
    Site,
    boxes,
    common_dtype,
)
from lora_jax.peft.leaves import Places
from lora_jax.plan import parts
from lora_jax.plan.adapter_plan import (
    FROM_CHECKPOINT,
    AdapterPlan,
    Target,
    TrainedLeaf,
    Use,
)
from lora_jax.plan.parts import Entry

Arrays: TypeAlias = Mapping[str, np.ndarray]
_GIVEN = "the PEFT checkpoint, with the axes that names gives"
_PRIMITIVES = {"embedding": "gather", "convolution": "conv_general_dilated"}
_NOT_ADAPTED = "the PEFT checkpoint has no adapter for it"


class Placed(NamedTuple):
    """The adapter of one weight, and its target and use in the plan."""

    arrays: Mapping[str, np.ndarray]
    target: Target
    use: Use


def make_adapters(
    checkpoint: Checkpoint, places: Places, sites: Iterable[Site]
) -> dict[str, Placed]:
    """The adapters by path, in the order of the leaves."""
    by_path: dict[str, list[Site]] = {}
    for site in sites:
        by_path.setdefault(site.path, []).append(site)
    placed = {}
    for path in filter(by_path.__contains__, places.leaves):
        groups: dict[tuple[str, int, float], dict[Index, _Module]] = {}
        for site in by_path[path]:
            own = _read_module(checkpoint, site)
            alike = groups.setdefault((site.target, own.rank, own.scale), {})
            alike[site.indices] = own
        pieces = (
            (target, [parts.indices_of(entry)[0] for entry in box], box, alike)
            for (target, *_), alike in groups.items()
            for box in boxes(alike)
        )
        for *_, box, alike in sorted(pieces, key=lambda piece: piece[:2]):
            own = _adapter(checkpoint.config, places, box, alike)
            placed[path + own.target.suffix] = own
    return placed


class _Module(NamedTuple):
    """A module with its site, kind, factors as in `from_peft`, and scale."""

    site: Site
    kind: Kind
    arrays: Arrays
    scale: float

    @property
    def rank(self) -> int:
        return self.arrays["A"].shape[-1]


def _read_module(checkpoint: Checkpoint, site: Site) -> _Module:
    """Reads the adapter of a module, without the bias of its B."""
    module, read = checkpoint.entries.modules[site.module], checkpoint.arrays.read
    arrays = {name: read(key) for name, key in module.keys.items() if name != "B_bias"}
    own = from_peft(module.kind, site.own_axes, module.experts, arrays)
    return _Module(site, module.kind, own, checkpoint.config.scale_of(site.name))


def _adapter(
    config: PeftConfig,
    places: Places,
    box: tuple[Entry, ...],
    modules: Mapping[Index, _Module],
) -> Placed:
    """The adapter of a weight, or of a part of one: a module, or a stack of them.

    `box` has the indices of the part on each axis of the stack. `modules` have one rank and
    one scale.
    """
    own = [modules[index] for index in itertools.product(*map(parts.indices_of, box))]
    site, kind, arrays, scale = own[0]
    shape, axes = places.shape(site.path), places.leaf_axes(site)
    groups = {
        letter: tuple(axis for axis, own in enumerate(axes) if own == letter)
        for letter in "iob"
    }
    if box:
        sizes = tuple(map(parts.count, box))
        batch = (axis for axis, letter in enumerate(site.axes) if letter == "b")
        inner = (axis for axis in batch if axis not in site.stack)
        arrays = stack_modules([each.arrays for each in own], sizes, (*site.stack, *inner))
    target = Target(
        shape=shape,
        method="dora" if config.use_dora else "lora",
        rank=own[0].rank,
        scale=scale,
        dropout=config.lora_dropout,
        in_axes=groups["i"],
        out_axes=groups["o"],
        batch_axes=groups["b"],
        part=parts.as_text(site.region(shape, box), shape),
        use=site.use,
    )
    return Placed(arrays, target, _use_of(kind, axes, site.given))


def from_peft(kind: Kind, axes: str, experts: int, arrays: Arrays) -> dict[str, np.ndarray]:
    """Converts the adapter of one module from PEFT's layout.

    `axes` are the letters of the module's own weight, without those of a stack. `experts`
    is the number of experts in the factors.

    Returns:
        `A (in, r)`, `B (r, out)` and `m (out,)`, or `(experts, in, r)` and so on.
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
    """Undoes `from_peft` for a module whose own weight has a shape."""
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
    modules: Sequence[Arrays], sizes: tuple[int, ...], batch: tuple[int, ...]
) -> Arrays:
    """Stacks the adapters of several modules, whose weights are stacked.

    `sizes` are of the axes of the stack. `batch` has the axis of the weight that each first
    axis of the stacked arrays is; they are sorted as the axes of the weight.
    """
    stacked, order = {}, [*map(int, np.argsort(batch))]
    for name in modules[0]:
        own = [arrays[name] for arrays in modules]
        dtype = common_dtype(*{array.dtype for array in own})
        array = np.stack([array.astype(dtype, copy=False) for array in own])
        array = array.reshape(*sizes, *own[0].shape)
        stacked[name] = array.transpose(*order, *range(len(order), array.ndim))
    return stacked


def cut_adapter(
    name: str, region: str, target: Target, arrays: Arrays
) -> dict[str, np.ndarray]:
    """The adapter of a part of a target, in the same layout: of a layer of a stack.

    A part of the inputs has rows of `A` and all of `B`, and a part of the outputs columns
    of `B` and all of `A`, so that the update of the part stays the same. `name` is of the
    module that the part `region` is.
    """
    own, whole = (parts.entries(part, target.shape) for part in (region, target.part))
    if own == whole:
        return dict(arrays)
    indices = [[*map(parts.indices_of, pair)] for pair in zip(own, whole, strict=True)]
    if any({*inner} - {*outer} for inner, outer in indices):
        raise ValueError(
            f"the module {name!r} is {region or 'all'} of the weight, and the target is "
            f"{target.part}: PEFT adapts whole modules."
        )
    if "m" in arrays and any(own[axis] != whole[axis] for axis in target.in_axes):
        raise ValueError(
            f"the module {name!r} has only some of the inputs, and a magnitude of the "
            "target scales all of them: PEFT cannot represent it."
        )
    at = [[outer.index(i) for i in inner] for inner, outer in indices]
    batch, inputs, outputs = target.batch_axes, target.in_axes, target.out_axes
    layouts = {
        "A": (*batch, *inputs, -1),
        "B": (*batch, -1, *outputs),
        "m": batch + outputs,
    }
    stack = [parts.count(own[a]) for a in batch if not isinstance(own[a], int)]
    cut = {}
    for entry, array in arrays.items():
        axes, rank = layouts[entry], range(target.rank)
        wide = array.reshape([len(indices[a][1]) if a >= 0 else len(rank) for a in axes])
        wide = wide[np.ix_(*(at[a] if a >= 0 else rank for a in axes))]
        ends = {"A": (-1, len(rank)), "B": (len(rank), -1), "m": (-1,)}[entry]
        cut[entry] = wide.reshape(*stack, *ends)
    return cut


def to_jax(
    where: str, placed: Mapping[str, Placed], dtype: FileDtype
) -> dict[str, Adapter]:
    """The adapters as JAX arrays of a dtype. `where` is the file, for messages."""
    adapters: dict[str, Adapter] = {}
    for path, own in placed.items():
        adapters[path] = {}
        for name, array in own.arrays.items():
            if dtype not in (None, "file"):
                try:
                    array = tensor_files.cast(repr(f"{path}:{name}"), array, dtype)
                except ValueError as error:
                    raise CheckpointError(f"{where}: {error}") from None
            adapters[path][name] = tensor_files.to_jax(where, f"{path}:{name}", array)
    return adapters


def _use_of(kind: str, axes: str, given: bool) -> Use:
    """The use of a weight by a module of some kind, which `save` reads."""
    first = "indexed" if kind == "embedding" else "contracted"
    roles = {"i": first, "o": "kept", "b": "stacked"}
    own = tuple(roles[letter] for letter in axes)
    primitive, where = _PRIMITIVES.get(kind, "dot_general"), FROM_CHECKPOINT
    linear = kind not in _PRIMITIVES
    return Use(primitive, own, _GIVEN if given else where, linear=linear)


def make_plan(
    config: PeftConfig,
    places: Places,
    placed: Mapping[str, Placed],
    trained: Iterable[str] = (),
    tied: Collection[str] = (),
) -> AdapterPlan:
    """The plan of the adapters of a checkpoint, and of its leaves that are trained.

    Adapters of the leaves `tied` act on a look-up and on a product.
    """
    values = {path: TrainedLeaf(places.shape(path)) for path in trained}
    targets = {path: own.target for path, own in placed.items()}
    of_leaf = {path: path.removesuffix(own.suffix) for path, own in targets.items()}
    chosen = {*of_leaf.values(), *values}
    uses = {**places.known.uses}
    for path, own in placed.items():  # of a part, the uses are those of the function
        leaf = of_leaf[path]
        if leaf not in places.known.uses or not (own.target.suffix or leaf in tied):
            turned = _use_of("linear", own.target.axes.translate(SWAPPED), False)
            uses[leaf] = (own.use, turned) if leaf in tied else (own.use,)
    leaves = {path: leaf for path, leaf in places.leaves.items() if checks.is_array(leaf)}
    # The config gives the same plan, but for a leaf with two readings of its axes.
    root = math.sqrt if config.use_rslora else int
    numbers = {p: (own.rank, own.scale * root(own.rank)) for p, own in targets.items()}
    return AdapterPlan(
        config=as_lora_config(
            config,
            numbers,
            alpha=config.lora_alpha or 1.0,  # 0 if all modules have their own
            targets=tuple(targets) or "all-linear",
            axes={of_leaf[path]: target.axes for path, target in targets.items()},
            train=tuple(values),
            products=places.known.products,
        ),
        targets=targets,
        trained=values,
        skipped={p: _NOT_ADAPTED for p in places.leaves if p not in chosen},
        uses=uses,
        total=tree_paths.count_entries(leaves),
    )
