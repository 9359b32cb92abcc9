"""Leaves that a checkpoint holds whole: saved modules, biases, rows of embeddings."""

import re
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.core import Tracer

from lora_jax._files import CheckpointError
from lora_jax.peft import _names
from lora_jax.peft._entries import Dims
from lora_jax.peft._fitting import Layout, fitting_axes
from lora_jax.peft._names import Found
from lora_jax.peft._places import Places

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
        across = lies_across(array.shape, shape, layout, embedding)
        if across is None:
            return None
        return (array.T if across else array).reshape(shape)
    if layout == "jax" and array.ndim > 2:
        array = np.moveaxis(array, (0, 1), (-1, -2))
    fits = array.shape == shape or (array.ndim == 1 and array.size == size_of(shape))
    return array.reshape(shape) if fits else None


def lies_across(
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


def size_of(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def stack_axes(axes: str, index: Index) -> Index:
    """The axes of a weight that some indexes of modules are of: the first batch axes."""
    stacked = [axis for axis, letter in enumerate(axes) if letter == "b"]
    return tuple(stacked[: len(index)])


def layer(weight: np.ndarray, axes: str, index: Index) -> np.ndarray:
    """One of the weights that are stacked along the first batch axes."""
    return first_axes(weight, stack_axes(axes, index))[index]


def to_matrix(weight: np.ndarray, axes: str) -> np.ndarray:
    """A weight without batch axes as `(in, out)`."""
    inner = [axis for axis, letter in enumerate(axes) if letter == "i"]
    outer = [axis for axis, letter in enumerate(axes) if letter == "o"]
    n_in = size_of(tuple(weight.shape[axis] for axis in inner))
    return weight.transpose(*inner, *outer).reshape(n_in, -1)


def from_matrix(matrix: np.ndarray, shape: tuple[int, ...], axes: str) -> np.ndarray:
    """Undoes `to_matrix` for a weight of a shape."""
    inner = [axis for axis, letter in enumerate(axes) if letter == "i"]
    outer = [axis for axis, letter in enumerate(axes) if letter == "o"]
    order = (*inner, *outer)
    weight = matrix.reshape([shape[axis] for axis in order])
    return weight.transpose(np.argsort(order))


def first_axes(array: np.ndarray, stack: Index) -> np.ndarray:
    """A view of an array with the axes of a stack in front."""
    return np.moveaxis(array, stack, range(len(stack)))
