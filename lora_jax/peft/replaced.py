"""The leaves that a checkpoint replaces, and how it changes them.

Full arrays and rows of embeddings replace leaves. The bias of an adapter, and a base that
an initialization changed, do so too.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax._core import checks, placement, tree_paths
from lora_jax._core.quantized import is_quantized
from lora_jax._io import processes, tensor_files
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.layers.decompose import init_olora_adapter, init_pissa_adapter
from lora_jax.peft.formats.checkpoint import Checkpoint
from lora_jax.peft.formats.config import PeftConfig
from lora_jax.peft.formats.keys import WEIGHT, Module
from lora_jax.peft.layout import (
    SWAPPED,
    Index,
    Site,
    common_dtype,
    first_axes,
    from_matrix,
    from_torch,
    same_bits,
    to_matrix,
)
from lora_jax.peft.leaves import Places, Problems
from lora_jax.peft.locate import check_whole, find_bias, find_full, find_rows
from lora_jax.peft.missing import OnTied, shared_leaves, tied_arrays
from lora_jax.peft.words import EMBEDDINGS, HEADS, last_word, split_path
from lora_jax.plan.parts import LOOKUP

__all__ = ["replace_leaves"]

# Singular vectors are not unique where two singular values differ by less than this.
_SMALLEST_GAP = 1e-4


class Replaced:
    """Collects the leaves that a checkpoint replaces, whole or index by index."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._arrays: dict[str, np.ndarray] = {}
        # The axes of the stack, and the indexes that are set.
        self._open: dict[str, tuple[Index, set[Index]]] = {}
        self._owners: dict[tuple[str, Index], str] = {}

    def put(self, site: Site, array: np.ndarray) -> None:
        """Puts an array of a checkpoint, in PyTorch's layout, at its site.

        Raises if another array of the checkpoint is there and differs.
        """
        shape = site.own_shape(self.places.shape(site.path))
        own = from_torch(array, shape, site.own_axes)
        other = self._owners.setdefault((site.path, site.indices), site.name)
        if other == site.name:
            self.set(site, own)
            return
        values = site.view(self._arrays[site.path])
        if not same_bits(own.astype(values.dtype), values):
            raise CheckpointError(
                f"{other!r} and {site.name!r} differ, and both are {site.path!r}: the leaf "
                "has room for one. If the embedding and the output head were one array "
                "before the training, they are two now: give params with a leaf for each, "
                "and a function that uses both."
            )

    def set(self, site: Site, array: np.ndarray) -> None:
        """Puts an array that has the layout of the leaf."""
        path = site.path
        if not site.indices:
            self._arrays[path] = array
            return
        if path not in self._arrays:
            self._arrays[path] = np.zeros(self.places.shape(path), array.dtype)
            self._open[path] = site.stack, set()
        wide = common_dtype(self._arrays[path].dtype, array.dtype)
        self._arrays[path] = self._arrays[path].astype(wide, copy=False)
        first_axes(self._arrays[path], site.stack)[site.indices] = array
        if path in self._open:
            self._open[path][1].add(site.indices)

    def current(self, site: Site, why: str) -> np.ndarray:
        """The values that `set` would replace: values set before, or values of the params.

        If the params have no values, the error says why they are needed.
        """
        path = site.path
        complete = path not in self._open or site.indices in self._open[path][1]
        if path in self._arrays and complete:
            return site.view(self._arrays[path])
        return site.view(self._values(path, why))

    def _values(self, path: str, why: str) -> np.ndarray:
        """The values of a leaf that the checkpoint changes in part."""
        leaf = self.places.leaves[path]
        if isinstance(leaf, jax.ShapeDtypeStruct | Tracer):
            raise CheckpointError(
                f"{why}, so the values of {path!r} are needed, got a "
                f"{type(leaf).__name__}: give params with arrays."
            )
        if is_quantized(leaf):
            raise CheckpointError(
                f"{why}, and {path!r} is quantized, {leaf!r}: give params with the dense "
                "weight there, lora_jax.quant.dequantize(weight)."
            )
        return processes.to_host(leaf)

    def finish(self, where: str) -> dict[str, jax.Array]:
        """All leaves. Indexes that are not set have the values of the params."""
        for path, (stack, indexes) in self._open.items():
            shape = self.places.shape(path)
            absent = set(np.ndindex(*(shape[axis] for axis in stack))) - indexes
            if absent:
                own = self._values(path, "some layers lack it")
                for index in absent:
                    values = first_axes(own, stack)[index]
                    first_axes(self._arrays[path], stack)[index] = values
        return {
            path: tensor_files.to_jax(where, path, array)
            for path, array in self._arrays.items()
        }


def put_full(
    replaced: Replaced,
    checkpoint: Checkpoint,
    sites: Mapping[str, Site],
    problems: Problems,
    on_tied: OnTied,
) -> set[str]:
    """Puts the full arrays of a checkpoint, and then the rows of embeddings.

    `sites` are of its adapters.

    Returns:
        The modules whose adapters are left out, because another array has their leaf.
    """
    places, rows = replaced.places, dict[str, str]()
    config, read = checkpoint.config, checkpoint.arrays.read
    arrays = {name: read(key) for name, key in checkpoint.entries.wholes.items()}
    tokens = {name: read(key) for name, key in checkpoint.entries.tokens.items()}
    indexes: dict[str, tuple[int, ...]] = {}
    for name in tokens:
        with problems.collecting():
            indexes[name] = _token_indexes(config, name)
    arrays = _without_twins(places, _without_frozen(places, sites, arrays))
    full = find_full(places, {n: array.shape for n, array in arrays.items()}, problems)
    if on_tied == "error":
        twins = checkpoint.entries.wholes.keys() - arrays.keys()
        wrong = tied_arrays(places, full, twins, config)
        problems.lines += wrong.values()
        full = {name: site for name, site in full.items() if name not in wrong}
    for name, site in full.items():
        with problems.collecting():
            replaced.put(site, arrays[name])
    for name, own in indexes.items():
        with problems.collecting():
            rows[name] = _put_rows(replaced, name, tokens[name], own)
    twice = shared_leaves(sites.values(), full.values(), rows)
    problems.lines += twice.values()
    return {*twice}


def _without_frozen(
    places: Places, sites: Mapping[str, Site], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Leaves out tied weights with adapters of one use, which are saved and not changed.

    PEFT saves embeddings with adapters whole. An array that differs from the leaf is kept,
    and so are all arrays if the params have no values.
    """
    frozen = set()
    for site in sites.values():
        name, leaf = f"{site.name}.{WEIGHT}", places.leaves[site.path]
        has_values = isinstance(leaf, jax.Array | np.ndarray)
        if not site.use or name not in arrays or not has_values or isinstance(leaf, Tracer):
            continue
        values, array = processes.to_host(leaf), arrays[name]
        if array.ndim == 2 and array.size == values.size:
            axes = site.own_axes.translate(SWAPPED if site.use == LOOKUP else {})
            with np.errstate(over="ignore"):
                array = from_torch(array, values.shape, axes).astype(values.dtype)
            if same_bits(array, values):
                frozen.add(name)
    return {name: array for name, array in arrays.items() if name not in frozen}


def _without_twins(
    places: Places, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Leaves out the head or the embedding of a tied model that was saved with both.

    The two arrays are equal bit for bit, and the params have a leaf for one of them. An
    array that equals no other is kept.
    """

    def has_place(name: str) -> bool:
        words, leaf = split_path(name)
        keys = name, name.rpartition(".")[0]
        return any(map(places.given, keys)) or bool(places.search(words, (leaf,)))

    ends = {n: array for n, array in arrays.items() if last_word(n) in EMBEDDINGS | HEADS}
    placed = {name: array for name, array in ends.items() if has_place(name)}
    twins = {
        name
        for name, array in ends.items()
        if name not in placed and any(same_bits(array, own) for own in placed.values())
    }
    return {name: array for name, array in arrays.items() if name not in twins}


def _put_rows(
    replaced: Replaced, module: str, rows: np.ndarray, indexes: tuple[int, ...]
) -> str:
    """Puts rows of an embedding, or of a head, and returns the path of the leaf."""
    if rows.ndim != 2:
        raise CheckpointError(
            f"{module!r} must have rows of an embedding, (n, width), got {rows.shape}."
        )
    site, count = find_rows(replaced.places, module, rows.shape[1])
    old = replaced.current(site, f"only rows of {module!r} are replaced")
    if len(rows) != len(indexes) or max(indexes, default=0) >= count:
        raise CheckpointError(
            f"{module!r} has {len(rows)} rows, the config has the indices "
            f"{list(indexes)[:8]}, and {site.path!r} has {count} rows."
        )
    axes = site.own_axes
    matrix = np.array(to_matrix(old, axes).T if axes else old).reshape(count, -1)
    matrix[list(indexes)] = _as_leaf(f"{module!r}", rows, site.path, old.dtype)
    replaced.set(site, np.ascontiguousarray(from_torch(matrix, old.shape, axes)))
    return site.path


def _token_indexes(config: PeftConfig, module: str) -> tuple[int, ...]:
    """The indexes of the rows of an embedding that the checkpoint has."""
    given = config.trainable_token_indices
    if isinstance(given, tuple):
        return given
    for name, indexes in (given or {}).items():
        if module == name or module.endswith(f".{name}"):
            return indexes
    raise CheckpointError(
        f"{module!r} has rows of trained tokens, and the config's trainable_token_indices "
        f"does not list its rows: {given!r}"
    )


def put_changes(replaced: Replaced, checkpoint: Checkpoint, sites: Iterable[Site]) -> None:
    """Puts the biases and the base weights that adapters changed.

    `sites` are of the adapters. Raises if a change cannot be repeated.
    """
    config, read = checkpoint.config, checkpoint.arrays.read
    modules, bias = checkpoint.entries.modules, "B_bias"
    biases = {name: read(m.keys[bias]) for name, m in modules.items() if bias in m.keys}
    for site in sites:
        scale = config.scale_of(site.name)
        if site.module in biases:
            _add_bias(replaced, site, biases[site.module], scale)
        if config.changes_base:
            _change_base(replaced, site, modules[site.module], config, scale)


def _add_bias(replaced: Replaced, site: Site, bias: np.ndarray, scale: float) -> None:
    """Adds the bias of an adapter's B to the bias of its layer: `lora_bias`."""
    own = find_bias(replaced.places, site, bias.size)
    why = f"{site.module!r} has a bias of its own, which shifts the bias of the layer"
    old = replaced.current(own, why)
    wide = common_dtype(old.dtype, bias.dtype, np.dtype(np.float32))
    update = wide.type(scale) * bias.astype(wide).reshape(old.shape)
    total = old.astype(wide) + update
    replaced.set(own, _as_leaf(f"the bias of {site.module!r}", total, own.path, old.dtype))


def _as_leaf(what: str, array: np.ndarray, path: str, dtype: np.dtype) -> np.ndarray:
    """Values that become a part of a leaf, in its dtype; raises if that holds no such."""
    try:
        _check_holds(array.dtype, dtype)
        return tensor_files.cast(what, array, dtype)
    except ValueError as error:
        raise CheckpointError(f"{path!r} is {dtype} in the params: {error}") from None


def _change_base(
    replaced: Replaced, site: Site, module: Module, config: PeftConfig, scale: float
) -> None:
    """Puts the base weight that PiSSA or OLoRA left, which PEFT does not save.

    Raises if the initialization cannot be repeated exactly.
    """
    name = site.name
    olora = str(config.init_lora_weights).lower() == "olora"
    check_whole(site, "the initialization changed its base")
    if config.init_lora_weights != "pissa" and not olora:
        raise _not_repeatable(config, name, "its result is not unique")
    if module.kind != "linear":
        raise _not_repeatable(config, name, f"it is not a matrix, {site.axes!r}")
    why = f"init_lora_weights={config.init_lora_weights!r} changed the base of {name!r}"
    weight = replaced.current(site, why)
    matrix = to_matrix(weight, site.own_axes)
    rank = module.rank
    if not olora:
        wide = matrix.astype(np.promote_types(matrix.dtype, np.float32))
        values = np.linalg.svd(wide, compute_uv=False)
        if rank < len(values) and values[rank - 1] - values[rank] < (
            _SMALLEST_GAP * values[rank - 1]
        ):
            raise _not_repeatable(config, name, "two singular values are nearly equal")
    init = init_olora_adapter if olora else init_pissa_adapter
    base, _ = init(jnp.asarray(matrix), rank, scale * rank)
    own = from_matrix(np.asarray(base), weight.shape, site.own_axes)
    replaced.set(site, _as_leaf(f"the base of {name!r}", own, site.path, weight.dtype))


def _not_repeatable(config: PeftConfig, name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"init_lora_weights={config.init_lora_weights!r} changed the base weight of "
        f"{name!r} before training, and cannot be repeated here: {why}. Save the adapter "
        "for the original base with PEFT's save_pretrained(..., "
        "path_initial_model_for_weight_conversion=<the adapter as it was initialized>)."
    )


def replace_leaves(
    params: tree_paths.Tree, replaced: Mapping[str, jax.Array]
) -> tree_paths.Tree:
    """Replaces leaves of params by the full leaves of a checkpoint.

    Args:
        params: a pytree.
        replaced: path to array, as `load` returns it.

    Returns:
        A tree like `params`. New leaves have the dtypes and shardings of the old leaves.

    Raises:
        KeyError: if params have no leaf at a path.
        ValueError: if a shape differs, or the dtype of a leaf does not hold a value.
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
    _check_holds(array.dtype, leaf.dtype)
    cast = jnp.asarray(array).astype(leaf.dtype)
    lost = jnp.isfinite(array) & ~jnp.isfinite(cast)
    if not isinstance(lost, Tracer) and lost.any():
        raise ValueError(
            f"the leaf is {leaf.dtype}, which does not hold all values: the largest is "
            f"{float(jnp.abs(array).max()):.3g}. Give params in a wider dtype."
        )
    return placement.like(leaf, cast)


def _check_holds(array: Any, leaf: Any) -> None:
    """Raises for values of floating point in a leaf of another kind."""
    if not jnp.issubdtype(array, jnp.inexact):
        return
    if not jnp.issubdtype(leaf, jnp.inexact) or leaf.itemsize < 2:
        raise ValueError(
            f"the leaf is {leaf}, whose values mean nothing without their scales: give "
            "params with a dense weight in at least 16 bits."
        )
    if np.dtype(array).kind == "c" != np.dtype(leaf).kind:
        raise ValueError(f"the leaf is {leaf}, got complex values: give a complex leaf.")
