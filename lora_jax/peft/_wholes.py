"""Leaves that a checkpoint holds whole: saved modules, biases, rows of embeddings."""

import re
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.core import Tracer

from lora_jax import _files
from lora_jax._files import CheckpointError
from lora_jax.peft import _arrays, _names
from lora_jax.peft._entries import Dims
from lora_jax.peft._fitting import Layout, fitting_axes
from lora_jax.peft._names import Found
from lora_jax.peft._places import Places
from lora_jax.peft._sites import Site

# What modules are called whose weights are (entries, width) in every framework.
_EMBEDDING = re.compile(r"emb|^(wte|wpe|shared)$", re.IGNORECASE)

Index: TypeAlias = tuple[int, ...]

_CONVOLUTION = re.compile(r"conv", re.IGNORECASE)


def values(path: str, leaf: Any, why: str) -> np.ndarray:
    """The values of a leaf that an entry of the checkpoint only changes.

    Raises:
        CheckpointError: if it is a mere shape.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct | Tracer):
        raise CheckpointError(
            f"{why}, so the values of {path!r} are needed, got a "
            f"{type(leaf).__name__}: give params with arrays."
        )
    return np.asarray(leaf)


def is_embedding(name: str, path: str = "") -> bool:
    """Whether a module is an embedding, by what it or its leaf is called."""
    last = [word for word in name.split(".") if not word.isdecimal()][-1:]
    words = path.replace(".", "/").split("/")[-2:]
    if "kernel" in words:  # of a matrix, such as an output head that is called embed_out
        return False
    return any(map(_EMBEDDING.search, last)) or "embedding" in words


def is_convolution(name: str) -> bool:
    """Whether a module is a convolution, by what it is called."""
    last = [word for word in name.split(".") if not word.isdecimal()][-1:]
    return any(map(_CONVOLUTION.search, last))


def place(places: Places, name: str, shape: tuple[int, ...]) -> Found:
    """Where an array of a checkpoint belongs.

    Args:
        places: where to look.
        name: of the parameter: `"score.weight"`.
        shape: of the array.

    Raises:
        CheckpointError: if there is no such leaf, or more than one.
    """
    module, _, last = name.rpartition(".")
    for key in (name, module):
        given = places.given(key)
        if given is not None:
            path = given[0].path
            if key == module and last == _names.BIAS:
                path = sibling_bias(places, name, path)
            return Found(path, given[0].indices)
    words = _names.split_path(name)
    found = places.search(words.words, (words.leaf,))
    fitting = [each for each in found if _fits(places, each, name, shape)]
    if len(fitting) > 1:
        raise CheckpointError(
            f"{name!r} may be any of {', '.join(repr(each.path) for each in fitting)}: "
            f"give names={{{name!r}: path}}."
        )
    if not fitting:
        raise places.not_found(name, found, f"a leaf of the shape {shape}")
    return fitting[0]


def _fits(places: Places, found: Found, name: str, shape: tuple[int, ...]) -> bool:
    if not places.holds(found):
        return False
    own = places.shape(found.path)[len(found.indices) :]
    array = np.broadcast_to(np.zeros(()), shape)
    embedding = is_embedding(name.rpartition(".")[0], found.path)
    return turned(array, own, places.layout, embedding) is not None


def find_bias(places: Places, path: str) -> str | None:
    """The path of the bias beside a weight, if there is one."""
    own = _names.split_path(path).words
    for other in places.leaves:
        words = _names.split_path(other)
        if words.leaf == _names.BIAS and words.words == own:
            return other
    return None


def sibling_bias(places: Places, name: str, path: str) -> str:
    """The path of the bias beside a weight.

    Raises:
        CheckpointError: if there is none.
    """
    bias = find_bias(places, path)
    if bias is None:
        raise CheckpointError(
            f"{name!r} has a bias, and there is none beside {path!r} in the params: add "
            "one of zeros to the layer"
        )
    return bias


def turned(
    array: np.ndarray, shape: tuple[int, ...], layout: Layout, embedding: bool
) -> np.ndarray | None:
    """An array of torch in the shape of a leaf; None if it does not fit.

    Args:
        array: `(out, in)`, `(entries, width)`, `(out, in, *kernel)` or a vector.
        shape: of the leaf.
        layout: of the leaf.
        embedding: whether it is that of an embedding.
    """
    if array.ndim == 2:
        across = _lies_across(array.shape, shape, layout, embedding)
        if across is None:
            return None
        return (array.T if across else array).reshape(shape)
    if layout == "jax" and array.ndim > 2:
        array = np.moveaxis(array, (0, 1), (-1, -2))
    fits = array.shape == shape or (array.ndim == 1 and array.size == _size(shape))
    return array.reshape(shape) if fits else None


def _lies_across(
    matrix: tuple[int, ...], shape: tuple[int, ...], layout: Layout, embedding: bool
) -> bool | None:
    """Whether a leaf has a matrix of torch the other way round; None if it has another."""
    if layout == "torch":
        return False if matrix == shape else None
    rows, columns = matrix
    straight, across = Dims(rows, columns), Dims(columns, rows)
    as_is = fitting_axes(shape, "embedding", straight, "jax") is not None
    transposed = fitting_axes(shape, "linear", across, "jax") is not None
    if as_is and (embedding or not transposed):
        return False
    return True if transposed else None


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def stack_axes(axes: str, index: Index) -> Index:
    """The axes of a weight that some indexes of modules are of: the first batch axes."""
    stacked = [axis for axis, letter in enumerate(axes) if letter == "b"]
    return tuple(stacked[: len(index)])


def layer(weight: np.ndarray, axes: str, index: Index) -> np.ndarray:
    """One of the weights that are stacked along the first batch axes."""
    return _first(weight, stack_axes(axes, index))[index]


def to_matrix(weight: np.ndarray, axes: str) -> np.ndarray:
    """A weight without batch axes as `(in, out)`."""
    inner = [axis for axis, letter in enumerate(axes) if letter == "i"]
    outer = [axis for axis, letter in enumerate(axes) if letter == "o"]
    n_in = _size(tuple(weight.shape[axis] for axis in inner))
    return weight.transpose(*inner, *outer).reshape(n_in, -1)


def from_matrix(matrix: np.ndarray, shape: tuple[int, ...], axes: str) -> np.ndarray:
    """Undoes `to_matrix` for a weight of a shape."""
    inner = [axis for axis, letter in enumerate(axes) if letter == "i"]
    outer = [axis for axis, letter in enumerate(axes) if letter == "o"]
    order = (*inner, *outer)
    weight = matrix.reshape([shape[axis] for axis in order])
    return weight.transpose(np.argsort(order))


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
        embedding = is_embedding(name.rpartition(".")[0], found.path)
        own = turned(array, shape, self._places.layout, embedding)
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
        _first(whole, stack)[index] = array
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
            return _first(self._arrays[path], stack)[index]
        return _first(values(path, self._places.leaves[path], why), stack)[index]

    def finish(self, where: str) -> dict[str, jax.Array]:
        """All leaves; layers that were not put are those of the params.

        Args:
            where: the name of the file, for messages.
        """
        for path, (stack, indexes) in self._open.items():
            shape = self._places.shape(path)
            absent = set(np.ndindex(*(shape[axis] for axis in stack))) - indexes
            if absent:
                own = values(path, self._places.leaves[path], "some layers lack it")
                for index in absent:
                    _first(self._arrays[path], stack)[index] = _first(own, stack)[index]
        return {
            path: _files.to_jax(where, path, array) for path, array in self._arrays.items()
        }


def _first(array: np.ndarray, stack: Index) -> np.ndarray:
    """A view of an array with the axes of a stack in front."""
    return np.moveaxis(array, stack, range(len(stack)))


def add_bias(
    replaced: Replaced, places: Places, site: Site, bias: np.ndarray, scale: float
) -> None:
    """Adds the bias of an adapter's B to that of its layer: `lora_bias`."""
    path = sibling_bias(places, site.module, site.path)
    why = f"{site.module!r} has a bias of its own, which shifts that of the layer"
    shape = places.shape(path)[len(site.indices) :]
    if not places.holds(Found(path, site.indices)) or _size(shape) != bias.size:
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
    found = place(places, f"{module}.weight", shape)
    old = replaced.current(found.path, (), f"only rows of {module!r} are replaced")
    if len(rows) != len(indexes) or max(indexes, default=0) >= shape[0]:
        raise CheckpointError(
            f"{module!r} has {len(rows)} rows, the config has the indices "
            f"{list(indexes)[:8]}, and {found.path!r} has {shape[0]} rows."
        )
    embedding = is_embedding(module, found.path)
    across = _lies_across(shape, old.shape, places.layout, embedding)
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
    sizes = {_size(places.shape(path)) // max(rows.shape[-1], 1) for path in paths}
    return (sizes.pop() if len(sizes) == 1 else 0, *rows.shape[1:])
