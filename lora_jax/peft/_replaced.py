"""Leaves that a checkpoint replaces, collected: whole, layer by layer, or in part."""

import jax
import numpy as np

from lora_jax import _files
from lora_jax._files import CheckpointError
from lora_jax.peft import _arrays, _names, _wholes
from lora_jax.peft._names import Found
from lora_jax.peft._places import Places
from lora_jax.peft._sites import Site
from lora_jax.peft._wholes import Index


class Replaced:
    """Leaves that are collected, some of them one layer after the other."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._arrays: dict[str, np.ndarray] = {}
        # The axes of the stack, and which indexes were put.
        self._open: dict[str, tuple[Index, set[Index]]] = {}

    def put(self, name: str, found: Found, array: np.ndarray) -> None:
        """Puts an array of a checkpoint, in torch's layout, where it belongs.

        Raises:
            CheckpointError: if its shape does not fit.
        """
        shape = self._places.shape(found.path)[len(found.indices) :]
        embedding = _wholes.is_embedding(name.rpartition(".")[0], found.path)
        own = _wholes.turned(array, shape, self._places.layout, embedding)
        if own is None or not self._places.holds(found):
            raise CheckpointError(
                f"{name!r} has the shape {array.shape}, and "
                f"{found.path!r} has {shape}: was the model resized (its vocabulary, its "
                "classes) before it was trained? Give params of that size."
            )
        self.set(found.path, found.indices, own)

    def set(
        self, path: str, index: Index, array: np.ndarray, stack: Index | None = None
    ) -> None:
        """Puts an array that lies as the leaf does.

        Args:
            path: of the leaf.
            index: which one of a stack; empty for all of the leaf.
            array: to put there.
            stack: the axes that `index` is of; None for the first.
        """
        if not index:
            self._arrays[path] = array
            return
        stack = tuple(range(len(index))) if stack is None else stack
        if path not in self._arrays:
            self._arrays[path] = np.zeros(self._places.shape(path), array.dtype)
            self._open[path] = stack, set()
        whole = self._arrays[path]
        wide = _arrays.common_dtype(whole.dtype, array.dtype)
        self._arrays[path] = whole = whole.astype(wide)
        _wholes.first_axes(whole, stack)[index] = array
        if path in self._open:
            self._open[path][1].add(index)

    def current(
        self, path: str, index: Index, why: str, stack: Index | None = None
    ) -> np.ndarray:
        """The values that `set` would replace: put before, or those of the params.

        Raises:
            CheckpointError: if the params have no values; it says why they are needed.
        """
        stack = tuple(range(len(index))) if stack is None else stack
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
            path: _files.to_jax(where, path, array) for path, array in self._arrays.items()
        }


def add_bias(
    replaced: Replaced, places: Places, site: Site, bias: np.ndarray, scale: float
) -> None:
    """Adds the bias of an adapter's B to that of its layer: `lora_bias`."""
    path = _wholes.sibling_bias(places, site.module, site.path)
    why = f"{site.module!r} has a bias of its own, which shifts that of the layer"
    shape = places.shape(path)[len(site.indices) :]
    if not places.holds(Found(path, site.indices)) or _wholes.size_of(shape) != bias.size:
        raise CheckpointError(
            f"{site.module!r} has a bias of {bias.size} entries, and {path!r} has the "
            f"shape {places.shape(path)}: it is no bias of that layer."
        )
    old = replaced.current(path, site.indices, why)
    wide = _arrays.common_dtype(old.dtype, bias.dtype, np.dtype(np.float32))
    update = wide.type(scale) * bias.astype(wide).reshape(shape)
    replaced.set(path, site.indices, (old.astype(wide) + update).astype(old.dtype))


def put_rows(
    replaced: Replaced,
    places: Places,
    module: str,
    rows: np.ndarray,
    indexes: tuple[int, ...],
) -> None:
    """Puts rows of an embedding, or of a head: `trainable_token_indices`."""
    if rows.ndim != 2:
        raise CheckpointError(
            f"{module!r} must have rows of an embedding, (n, width), got {rows.shape}."
        )
    shape = _rows_shape(places, module, rows)
    found = _wholes.place(places, f"{module}.weight", shape)
    old = replaced.current(found.path, (), f"only rows of {module!r} are replaced")
    if len(rows) != len(indexes) or max(indexes, default=0) >= shape[0]:
        raise CheckpointError(
            f"{module!r} has {len(rows)} rows, the config has the indices "
            f"{list(indexes)[:8]}, and {found.path!r} has {shape[0]} rows."
        )
    embedding = _wholes.is_embedding(module, found.path)
    across = _wholes.lies_across(shape, old.shape, places.layout, embedding)
    if across is None:
        raise CheckpointError(
            f"{module!r} has rows of {rows.shape[1]} entries, and {found.path!r} has the "
            f"shape {old.shape}: it has no such rows."
        )
    new = np.array(old, order="C")
    matrix = new.reshape(shape[::-1]).T if across else new.reshape(shape)  # of torch
    matrix[list(indexes)] = rows.astype(old.dtype)
    replaced.set(found.path, (), new)


def _rows_shape(places: Places, module: str, rows: np.ndarray) -> tuple[int, ...]:
    """The shape of the matrix that rows are of; how many it has, only params know."""
    found = places.search(_names.split_name(module), (_names.WEIGHT,))
    given = places.given(module)
    paths = [given[0].path] if given else [each.path for each in found]
    sizes = {
        _wholes.size_of(places.shape(path)) // max(rows.shape[-1], 1) for path in paths
    }
    return (sizes.pop() if len(sizes) == 1 else 0, *rows.shape[1:])
