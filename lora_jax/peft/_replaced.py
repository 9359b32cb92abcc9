"""Leaves that a checkpoint replaces, collected: whole, layer by layer, or in part."""

import jax
import numpy as np

from lora_jax._io import tensor_files
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft import _arrays, _names, _wholes
from lora_jax.peft._places import Places
from lora_jax.peft._sites import Site
from lora_jax.peft._wholes import Index, Spot


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
        own = _wholes.formed(array, rest, form)
        other = self._owners.setdefault((spot.path, spot.indices), spot.name)
        if other == spot.name:
            self.set(spot.path, spot.indices, own, stack)
            return
        values = _wholes.first_axes(self._arrays[spot.path], stack)[spot.indices]
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
        wide = _arrays.common_dtype(whole.dtype, array.dtype)
        self._arrays[path] = whole = whole.astype(wide, copy=False)
        _wholes.first_axes(whole, stack)[index] = array
        if path in self._open:
            self._open[path][1].add(index)

    def current(self, path: str, index: Index, why: str, stack: Index = ()) -> np.ndarray:
        """The values that `set` would replace: put before, or those of the params.

        Raises:
            CheckpointError: if the params have no values; it says why they are needed.
        """
        complete = path not in self._open or index in self._open[path][1]
        if path in self._arrays and complete:
            return _wholes.first_axes(self._arrays[path], stack)[index]
        return _wholes.first_axes(
            _wholes.values(path, self._places.leaves[path], why), stack
        )[index]

    def finish(self, where: str) -> dict[str, jax.Array]:
        """All leaves; layers that were not put are those of the params.

        Args:
            where: the name of the file, for messages.
        """
        for path, (stack, indexes) in self._open.items():
            shape = self._places.shape(path)
            absent = set(np.ndindex(*(shape[axis] for axis in stack))) - indexes
            if absent:
                own = _wholes.values(path, self._places.leaves[path], "some layers lack it")
                for index in absent:
                    _wholes.first_axes(self._arrays[path], stack)[index] = (
                        _wholes.first_axes(own, stack)[index]
                    )
        return {
            path: tensor_files.to_jax(where, path, array)
            for path, array in self._arrays.items()
        }


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal bit for bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    first, second = (np.ascontiguousarray(each).reshape(-1) for each in (one, other))
    return np.array_equal(first.view(np.uint8), second.view(np.uint8))


def add_bias(
    replaced: Replaced, places: Places, site: Site, bias: np.ndarray, scale: float
) -> None:
    """Adds the bias of an adapter's B to that of its layer: `lora_bias`."""
    path = _wholes.sibling_bias(places, site.module, site.path)
    why = f"{site.module!r} has a bias of its own, which shifts that of the layer"
    numbers = tuple(zip(site.fields, site.indices, strict=True))
    spot = _wholes.bias_spot(places, site.module, path, numbers, bias.shape)
    ((_, stack),) = spot.ways
    shape = places.shape(path)
    shape = tuple(n for axis, n in enumerate(shape) if axis not in stack)
    old = replaced.current(path, site.indices, why, stack)
    wide = _arrays.common_dtype(old.dtype, bias.dtype, np.dtype(np.float32))
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
    spot = _wholes.find_spots(places, {name: shape})[name]
    ((form, _),) = spot.ways
    old = replaced.current(spot.path, (), f"only rows of {module!r} are replaced")
    if len(rows) != len(indexes) or max(indexes, default=0) >= shape[0]:
        raise CheckpointError(
            f"{module!r} has {len(rows)} rows, the config has the indices "
            f"{list(indexes)[:8]}, and {spot.path!r} has {shape[0]} rows."
        )
    matrix = np.array(_wholes.to_torch(old, form)).reshape(shape)
    matrix[list(indexes)] = rows.astype(old.dtype)
    new = _wholes.formed(matrix, old.shape, form)
    replaced.set(spot.path, (), np.ascontiguousarray(new))
    return spot.path


def _check_rows(
    places: Places, module: str, rows: np.ndarray, shape: tuple[int, ...]
) -> None:
    """Raises unless the leaf that the caller gave has rows of that size."""
    given = places.given(module)
    if given is not None and _wholes.size_of(places.shape(given.path)) != (
        _wholes.size_of(shape)
    ):
        raise CheckpointError(
            f"{module!r} has rows of {rows.shape[1]} entries, and {given.path!r} has the "
            f"shape {places.shape(given.path)}: it has no such rows."
        )


def _rows_shape(places: Places, module: str, rows: np.ndarray) -> tuple[int, ...]:
    """The shape of the matrix that rows are of; how many it has, only params know."""
    found = places.search(_names.split_name(module), (_names.WEIGHT,))
    given = places.given(module)
    paths = [given.path] if given else [each.path for each in found]
    width = max(rows.shape[-1], 1)
    sizes = {_wholes.size_of(places.shape(path)) // width for path in paths}
    return (sizes.pop() if len(sizes) == 1 else 0, *rows.shape[1:])
