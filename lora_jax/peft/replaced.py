"""Leaves that a checkpoint replaces: whole, layer by layer, some rows, or a changed base.

PEFT saves the adapter and not the base that its initialization changed: a reader changes
the base in the same way again. That is exact where the initialization has one outcome.
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._io import tensor_files
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.layers.decompose import init_olora_adapter, init_pissa_adapter
from lora_jax.peft.checkpoint import Checkpoint
from lora_jax.peft.config import PeftConfig
from lora_jax.peft.full import Spot, bias_spot, find_spots, sibling_bias
from lora_jax.peft.keys import Module, without_wrapper
from lora_jax.peft.layout import (
    Index,
    common_dtype,
    first_axes,
    from_matrix,
    from_torch,
    same_bits,
    size_of,
    to_matrix,
    to_torch,
)
from lora_jax.peft.leaves import Places, Problems, leaf_values
from lora_jax.peft.locate import Site
from lora_jax.peft.names import WEIGHT, split_name
from lora_jax.peft.tied import OnTied, shared_leaves, tied_leaves, without_twins

# Singular values that are nearer to each other than this have no directions of their own.
_SMALLEST_GAP = 1e-4


class Replaced:
    """Leaves that are collected, some of them one layer after the other."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._arrays: dict[str, np.ndarray] = {}
        # The axes of the stack, and which indexes were put.
        self._open: dict[str, tuple[Index, set[Index]]] = {}
        self._owners: dict[tuple[str, Index], str] = {}

    def put(self, spot: Spot, array: np.ndarray) -> None:
        """Puts an array of a checkpoint, in torch's layout, where it belongs.

        Raises:
            CheckpointError: if another array of the checkpoint is there, which differs.
        """
        ((form, stack),) = spot.ways
        shape = self._places.shape(spot.path)
        rest = tuple(n for axis, n in enumerate(shape) if axis not in stack)
        own = from_torch(array, rest, form)
        other = self._owners.setdefault((spot.path, spot.indices), spot.name)
        if other == spot.name:
            self.set(spot.path, spot.indices, own, stack)
            return
        values = first_axes(self._arrays[spot.path], stack)[spot.indices]
        if not same_bits(own.astype(values.dtype), values):
            raise CheckpointError(
                f"{other!r} and {spot.name!r} differ, and both are {spot.path!r}: the leaf "
                "has room for one. If the embedding and the output head were one array "
                "before the training, they are two now: give params with a leaf for each, "
                "and a function that uses both."
            )

    def set(self, path: str, index: Index, array: np.ndarray, stack: Index = ()) -> None:
        """Puts an array that lies as the leaf does.

        Args:
            path: of the leaf.
            index: which one of a stack; empty for all of the leaf.
            array: to put there.
            stack: the axes that `index` is of.
        """
        if not index:
            self._arrays[path] = array
            return
        if path not in self._arrays:
            self._arrays[path] = np.zeros(self._places.shape(path), array.dtype)
            self._open[path] = stack, set()
        whole = self._arrays[path]
        wide = common_dtype(whole.dtype, array.dtype)
        self._arrays[path] = whole = whole.astype(wide, copy=False)
        first_axes(whole, stack)[index] = array
        if path in self._open:
            self._open[path][1].add(index)

    def current(self, path: str, index: Index, why: str, stack: Index = ()) -> np.ndarray:
        """The values that `set` would replace: put before, or those of the params.

        Raises:
            CheckpointError: if the params have no values; it says why they are needed.
        """
        complete = path not in self._open or index in self._open[path][1]
        if path in self._arrays and complete:
            return first_axes(self._arrays[path], stack)[index]
        return first_axes(leaf_values(path, self._places.leaves[path], why), stack)[index]

    def finish(self, where: str) -> dict[str, jax.Array]:
        """All leaves; layers that were not put are those of the params.

        Args:
            where: the name of the file, for messages.
        """
        for path, (stack, indexes) in self._open.items():
            shape = self._places.shape(path)
            absent = set(np.ndindex(*(shape[axis] for axis in stack))) - indexes
            if absent:
                own = leaf_values(path, self._places.leaves[path], "some layers lack it")
                for index in absent:
                    first_axes(self._arrays[path], stack)[index] = first_axes(own, stack)[
                        index
                    ]
        return {
            path: tensor_files.to_jax(where, path, array)
            for path, array in self._arrays.items()
        }


def put_leaves(
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
    arrays = without_twins(places, arrays)
    shapes = {name: array.shape for name, array in arrays.items()}
    spots = find_spots(places, shapes, problems)
    if on_tied == "error":
        twins = checkpoint.entries.wholes.keys() - arrays.keys()
        wrong = tied_leaves(places, spots, twins, config)
        problems.lines += wrong.values()
        spots = {name: spot for name, spot in spots.items() if name not in wrong}
    for name, spot in spots.items():
        with problems.collecting():
            replaced.put(spot, arrays[name])
    rows: dict[str, str] = {}
    for name, key in checkpoint.entries.tokens.items():
        with problems.collecting():
            indexes = _token_indexes(config, name)
            rows[name] = put_rows(replaced, places, name, read(key), indexes)
    twice = dict(shared_leaves(sites.values(), spots, rows))
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


def add_bias(
    replaced: Replaced, places: Places, site: Site, bias: np.ndarray, scale: float
) -> None:
    """Adds the bias of an adapter's B to that of its layer: `lora_bias`."""
    path = sibling_bias(places, site.module, site.path)
    why = f"{site.module!r} has a bias of its own, which shifts that of the layer"
    numbers = tuple(zip(site.fields, site.indices, strict=True))
    spot = bias_spot(places, site.module, path, numbers, bias.shape)
    ((_, stack),) = spot.ways
    shape = places.shape(path)
    shape = tuple(n for axis, n in enumerate(shape) if axis not in stack)
    old = replaced.current(path, site.indices, why, stack)
    wide = common_dtype(old.dtype, bias.dtype, np.dtype(np.float32))
    update = wide.type(scale) * bias.astype(wide).reshape(shape)
    replaced.set(path, site.indices, (old.astype(wide) + update).astype(old.dtype), stack)


def put_rows(
    replaced: Replaced,
    places: Places,
    module: str,
    rows: np.ndarray,
    indexes: tuple[int, ...],
) -> str:
    """Puts rows of an embedding, or of a head: `trainable_token_indices`.

    Returns:
        The path of the leaf.
    """
    if rows.ndim != 2:
        raise CheckpointError(
            f"{module!r} must have rows of an embedding, (n, width), got {rows.shape}."
        )
    shape = _rows_shape(places, module, rows)
    name = f"{module}.weight"
    _check_rows(places, module, rows, shape)
    spot = find_spots(places, {name: shape})[name]
    ((form, _),) = spot.ways
    old = replaced.current(spot.path, (), f"only rows of {module!r} are replaced")
    if len(rows) != len(indexes) or max(indexes, default=0) >= shape[0]:
        raise CheckpointError(
            f"{module!r} has {len(rows)} rows, the config has the indices "
            f"{list(indexes)[:8]}, and {spot.path!r} has {shape[0]} rows."
        )
    matrix = np.array(to_torch(old, form)).reshape(shape)
    matrix[list(indexes)] = rows.astype(old.dtype)
    new = from_torch(matrix, old.shape, form)
    replaced.set(spot.path, (), np.ascontiguousarray(new))
    return spot.path


def _check_rows(
    places: Places, module: str, rows: np.ndarray, shape: tuple[int, ...]
) -> None:
    """Raises unless the leaf that the caller gave has rows of that size."""
    given = places.given(module)
    if given is not None and size_of(places.shape(given.path)) != (size_of(shape)):
        raise CheckpointError(
            f"{module!r} has rows of {rows.shape[1]} entries, and {given.path!r} has the "
            f"shape {places.shape(given.path)}: it has no such rows."
        )


def _rows_shape(places: Places, module: str, rows: np.ndarray) -> tuple[int, ...]:
    """The shape of the matrix that rows are of; how many it has, only params know."""
    found = places.search(split_name(module), (WEIGHT,))
    given = places.given(module)
    paths = [given.path] if given else [each.path for each in found]
    width = max(rows.shape[-1], 1)
    sizes = {size_of(places.shape(path)) // width for path in paths}
    return (sizes.pop() if len(sizes) == 1 else 0, *rows.shape[1:])


def change_bases(
    config: PeftConfig,
    places: Places,
    sites: Iterable[Site],
    modules: Mapping[str, Module],
    replaced: Replaced,
) -> None:
    """Puts the bases that belong to some adapters, if they are not those of the params.

    Raises:
        CheckpointError: if the initialization cannot be repeated.
    """
    if not config.changes_base:
        return
    for site in sites:
        name = without_wrapper(site.module)
        if config.init_lora_weights != "pissa" and not _is_olora(config):
            raise _not_repeatable(config, name, "it has not one outcome")
        if modules[site.module].kind != "linear":
            raise _not_repeatable(config, name, f"it is no matrix, {site.axes!r}")
        why = f"init_lora_weights={config.init_lora_weights!r} changed the base of {name!r}"
        weight = replaced.current(site.path, site.indices, why, site.stack)
        axes = site.axes.replace("b", "")
        base = _base(config, name, to_matrix(weight, axes))
        own = from_matrix(base, weight.shape, axes).astype(weight.dtype)
        replaced.set(site.path, site.indices, own, site.stack)


def _is_olora(config: PeftConfig) -> bool:
    return str(config.init_lora_weights).lower() == "olora"


def _base(config: PeftConfig, name: str, matrix: np.ndarray) -> np.ndarray:
    """The base `(in, out)` that is left of a weight."""
    rank, alpha = config.rank_of(name), config.alpha_of(name)
    init = init_pissa_adapter
    if _is_olora(config):
        init = init_olora_adapter
    else:
        wide = matrix.astype(np.promote_types(matrix.dtype, np.float32))
        values = np.linalg.svd(wide, compute_uv=False)
        if rank < len(values) and values[rank - 1] - values[rank] < (
            _SMALLEST_GAP * values[rank - 1]
        ):
            raise _not_repeatable(config, name, "two singular values are nearly equal")
    base, _ = init(jnp.asarray(matrix), rank, alpha, rank_stabilized=config.use_rslora)
    return np.asarray(base)


def _not_repeatable(config: PeftConfig, name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"init_lora_weights={config.init_lora_weights!r} changed the base weight of "
        f"{name!r} before training, and cannot be repeated here: {why}. Save the adapter "
        "for the original base with PEFT's save_pretrained(..., "
        "path_initial_model_for_weight_conversion=<the adapter as it was initialized>)."
    )
