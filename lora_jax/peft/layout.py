"""Where and how a leaf holds the array of a module: `Site`, axes, and transposed arrays."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from lora_jax.peft.keys import Dims, Kind
from lora_jax.plan import parts
from lora_jax.plan.parts import Entry

Layout = Literal["jax", "torch"]
LAYOUTS = ("jax", "torch")
# Axes with a module for each index: layers, and layers with experts.
_MOST_STACKED = 2
Index: TypeAlias = tuple[int, ...]
SWAPPED = str.maketrans("io", "oi")


class Reading(NamedTuple):
    """One way to see a leaf as the array of a module."""

    axes: str
    """The letters of the leaf's axes, as in `LoraConfig.axes`. Empty for an array that the
    leaf holds as PyTorch does."""
    stack: Index = ()
    """The axis of each number in the module's name that is an index of the leaf."""

    def fields(self, names: Iterable[str]) -> str:
        """The letters, with `{name}` for the axis of each index if there are several `b`.

        Args:
            names: of the fields, in the order of `stack`.
        """
        if self.axes.count("b") < 2:
            return self.axes
        fields = dict(zip(self.stack, names, strict=True))
        return "".join(
            f"{{{fields[axis]}}}" if axis in fields else letter
            for axis, letter in enumerate(self.axes)
        )


class Site(NamedTuple):
    """Where the array of a module is: a leaf, or an index on some axes of a leaf.

    `load` finds sites and `save` writes from them. Their axes are those of the part.
    """

    module: str
    """The name in the checkpoint, which may contain `base_layer`."""
    name: str
    """The name in the model, as `names` has it: of the module, or of a parameter."""
    path: str
    """Of the leaf."""
    axes: str
    """As in `Reading`."""
    indices: Index = ()
    """The index on each axis of `stack`; empty for all of the leaf."""
    stack: Index = ()
    """The axes that `indices` are on."""
    fields: tuple[str, ...] = ()
    """The name of the number that each index is in the module's name."""
    part: str = ""
    """The part of the leaf that holds the module, or a stack of modules; as in `Target`."""
    use: str = ""
    """The use of the leaf that the module is, `"lookup"` or `"product"`; empty for all."""

    @property
    def suffix(self) -> str:
        """What follows the path of the leaf in `names`, and in the path of a target."""
        return self.part + (f"@{self.use}" if self.use else "")

    def region(self, shape: tuple[int, ...], stack: Iterable[Entry] = ()) -> list[Entry]:
        """What the module has of each axis of a leaf of some shape.

        Args:
            shape: of the leaf.
            stack: what several modules have of each axis of the stack, in place of the
                index of this one.
        """
        own = list(parts.entries(self.part, shape))
        left = [axis for axis, entry in enumerate(own) if not isinstance(entry, int)]
        for place, entry in zip(self.stack, stack or self.indices, strict=True):
            indices = parts.indices_of(own[left[place]])
            chosen = tuple(indices[i] for i in parts.indices_of(entry))
            own[left[place]] = chosen[0] if isinstance(entry, int) else as_entry(chosen)
        return own

    @property
    def own_axes(self) -> str:
        """The letters of the axes of the module's own array, without those of `stack`."""
        return "".join(x for axis, x in enumerate(self.axes) if axis not in self.stack)

    def own_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the module's own array, in a leaf of some shape."""
        sizes = enumerate(part_shape(self.part, shape))
        return tuple(n for axis, n in sizes if axis not in self.stack)

    def view(self, leaf: np.ndarray) -> np.ndarray:
        """The module's own array, as a view of the leaf."""
        return first_axes(parts.take(leaf, self.part), self.stack)[self.indices]


@functools.lru_cache(maxsize=4096)
def readings(
    shape: tuple[int, ...],
    kind: Kind,
    dims: Dims,
    layout: Layout,
    *,
    fan_in_fan_out: bool = False,
    count: int = 0,
) -> tuple[Reading, ...]:
    """All ways to see a leaf as the weight of a module, by its shape.

    Args:
        shape: of the leaf.
        kind: of the module.
        dims: the sizes of the module's weight.
        layout: `"jax"` or `"torch"`.
        fan_in_fan_out: decides whether a square weight of PyTorch is `(in, out)`.
        count: the number of indexes in the module's name; as in `stacked_readings`.
    """
    if count > _MOST_STACKED:
        return ()
    return stacked_readings(
        shape, count, lambda _, own: _unstacked(own, kind, dims, layout, fan_in_fan_out)
    )


def stacked_readings(
    shape: tuple[int, ...],
    count: int,
    letters_of: Callable[[Index, tuple[int, ...]], Iterable[str]],
) -> tuple[Reading, ...]:
    """All ways to see a leaf as a stack of arrays.

    Args:
        shape: of the leaf.
        count: the number of axes of the stack.
        letters_of: from these axes, and the shape of one array, to the letters of the
            array's axes; empty letters for an array in PyTorch's layout.

    Returns:
        The ways that differ in more than an axis of size 1. An index may be on any axis;
        several are on the first axes, in any order, if that fits.
    """
    found: dict[object, Reading] = {}
    for stack in itertools.permutations(range(len(shape)), count):
        rest = tuple(n for axis, n in enumerate(shape) if axis not in stack)
        for letters in letters_of(stack, rest):
            own = iter(letters)
            full = ("b" if a in stack else next(own, "") for a in range(len(shape)))
            axes = "".join(full) if letters else ""
            found.setdefault(_essence(shape, axes, stack), Reading(axes, stack))
    first = [each for each in found.values() if max(each.stack, default=0) < count]
    return tuple(first if count > 1 and first else found.values())


def _essence(shape: tuple[int, ...], axes: str, stack: tuple[int, ...]) -> object:
    """A key that is equal for readings that see the same matrices."""
    own = ((a, letter) for a, letter in enumerate(axes) if a not in stack)
    letters = tuple((a, letter) for a, letter in own if shape[a] > 1)
    return letters, tuple(axis if shape[axis] > 1 else None for axis in stack)


@functools.lru_cache(maxsize=4096)
def known_readings(
    shape: tuple[int, ...], axes: str, kind: Kind, dims: Dims, count: int
) -> tuple[Reading, ...]:
    """All ways to see a leaf as the weight of a module, if its axes are known.

    Args:
        shape: of the leaf.
        axes: one letter for each axis, as in `LoraConfig.axes`.
        kind: of the module.
        dims: the sizes of the module's weight.
        count: the number of indexes in the module's name.
    """
    batch = [axis for axis, letter in enumerate(axes) if letter == "b"]
    found: dict[object, Reading] = {}
    if len(axes) != len(shape):
        return ()
    for stack in itertools.permutations(batch, count):
        if _sizes_fit(shape, axes, dims, stack) and _kernel_fits(
            shape, axes, kind, dims, stack
        ):
            found.setdefault(_essence(shape, axes, stack), Reading(axes, stack))
    return tuple(found.values())


def _sizes_fit(
    shape: tuple[int, ...], axes: str, dims: Dims, stack: tuple[int, ...]
) -> bool:
    sizes: dict[str, list[int]] = {letter: [] for letter in "iob"}
    for axis, (letter, size) in enumerate(zip(axes, shape, strict=True)):
        if axis not in stack:
            sizes[letter].append(size)
    experts = sizes["b"]
    return (
        math.prod(sizes["i"]) == dims.n_in * math.prod(dims.kernel)
        and math.prod(sizes["o"]) == dims.n_out
        and (experts == [dims.experts] or (not experts and dims.experts < 2))
    )


def _kernel_fits(
    shape: tuple[int, ...], axes: str, kind: Kind, dims: Dims, stack: tuple[int, ...]
) -> bool:
    """Whether the axes of a convolution's kernel have the order of a supported layout."""
    if kind != "convolution":
        return True
    own = [(n, axes[a]) for a, n in enumerate(shape) if a not in stack]
    inner = tuple(n for n, letter in own if letter == "i")
    if own[-1][1] == "o":
        return inner == (*dims.kernel, dims.n_in)
    return own[0][1] == "o" and inner == (dims.n_in, *dims.kernel)


def _unstacked(
    shape: tuple[int, ...], kind: Kind, dims: Dims, layout: Layout, fan_in_fan_out: bool
) -> list[str]:
    """The letters that the axes of one module's weight may have."""
    if kind == "convolution":
        return _only(_convolution(shape, dims, layout))
    if kind == "experts":
        return _experts(shape, dims, layout)
    if kind == "embedding" or layout == "jax":
        return _only(_in_out(shape, dims))
    straight, turned = _in_out(shape, dims), _out_in(shape, dims)
    if straight and turned:
        return [straight if fan_in_fan_out else turned]
    return _only(straight or turned)


def turned_readings(
    shape: tuple[int, ...], kind: Kind, dims: Dims, count: int
) -> tuple[Reading, ...]:
    """The readings of a leaf that has not the layout `"jax"` but is turned."""
    if kind == "linear":
        other = Dims(dims.n_out, dims.n_in)
        found = readings(shape, "linear", other, "jax", count=count)
        return tuple(each._replace(axes=each.axes.translate(SWAPPED)) for each in found)
    if kind == "convolution":
        return readings(shape, kind, dims, "torch", count=count)
    if kind == "experts":
        found = readings(shape, kind, dims, "torch", count=count)
        return tuple(each for each in found if each.axes.find("o") < each.axes.find("i"))
    return ()


def _only(letters: str | None) -> list[str]:
    return [] if letters is None else [letters]


def _in_out(shape: tuple[int, ...], dims: Dims) -> str | None:
    """Inputs and then outputs: `(in, out)`, `(d, heads, k)`, `(heads, k, d)`."""
    for split in range(1, len(shape)):
        if math.prod(shape[:split]) == dims.n_in and math.prod(shape[split:]) == dims.n_out:
            return "i" * split + "o" * (len(shape) - split)
    return None


def _out_in(shape: tuple[int, ...], dims: Dims) -> str | None:
    return "oi" if shape == (dims.n_out, dims.n_in) else None


def _convolution(shape: tuple[int, ...], dims: Dims, layout: Layout) -> str | None:
    """`(*kernel, in, out)` in JAX, `(out, in, *kernel)` in PyTorch."""
    inner = "i" * (len(dims.kernel) + 1)
    if layout == "jax":
        return inner + "o" if shape == (*dims.kernel, dims.n_in, dims.n_out) else None
    return "o" + inner if shape == (dims.n_out, dims.n_in, *dims.kernel) else None


def _experts(shape: tuple[int, ...], dims: Dims, layout: Layout) -> list[str]:
    """`(experts, in, out)`, or also `(experts, out, in)` in PyTorch.

    A single expert may have no axis. In PyTorch a flag of the module decides, and a
    checkpoint does not contain this flag.
    """
    if dims.experts == 1 and len(shape) == 2:
        return [letters[1:] for letters in _experts((1, *shape), dims, layout)]
    found = []
    if shape == (dims.experts, dims.n_in, dims.n_out):
        found.append("bio")
    if layout == "torch" and shape == (dims.experts, dims.n_out, dims.n_in):
        found.append("boi")
    return found


def from_torch(array: np.ndarray, shape: tuple[int, ...], axes: str) -> np.ndarray:
    """Turns an array of PyTorch into the layout of a leaf.

    Args:
        array: `(out, in)`, `(entries, width)`, `(out, in, *kernel)` or a vector.
        shape: of the leaf, without the axes of a stack.
        axes: the letters of these axes; empty if the leaf has PyTorch's layout.
    """
    if not axes:
        return array.reshape(shape)
    if array.ndim > 2:  # (*kernel, in, out)
        return np.moveaxis(array, (0, 1), (-1, -2))
    return from_matrix(array.T, shape, axes)


def size_of(shape: tuple[int, ...]) -> int:
    """The number of entries of an array."""
    return int(np.prod(shape, dtype=np.int64))


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


def part_shape(part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a part of a leaf, without the axes that it has one index of."""
    own = parts.entries(part, shape)
    return tuple(parts.count(entry) for entry in own if not isinstance(entry, int))


def part_axes(part: str, shape: tuple[int, ...], axes: str) -> str:
    """The letters of the axes that `part_shape` keeps, from those of the leaf."""
    own = parts.entries(part, shape)
    if len(axes) != len(own):
        return axes
    pairs = zip(axes, own, strict=True)
    return "".join(letter for letter, entry in pairs if not isinstance(entry, int))


def as_entry(indices: Sequence[int]) -> Entry:
    """Some indices of an axis, in ascending order: as a slice if they are evenly spaced."""
    steps = {b - a for a, b in itertools.pairwise(indices)} or {1}
    return (
        tuple(indices)
        if len(steps) > 1
        else range(indices[0], indices[-1] + 1, steps.pop())
    )


def boxes(indices: Iterable[Index]) -> list[tuple[Entry, ...]]:
    """Divides indices of a stack into parts, each with some entry of each axis.

    A part has one list at most: the others are slices.
    """
    rests: dict[int, list[Index]] = {}
    for first, *rest in filter(None, sorted(indices)):
        rests.setdefault(first, []).append(tuple(rest))
    alike: dict[tuple[Index, ...], list[int]] = {}
    for first, rest in rests.items():
        alike.setdefault(tuple(rest), []).append(first)
    found: list[tuple[Entry, ...]] = []
    for rest, first in alike.items():
        inner = boxes(rest)
        entry = as_entry(first)
        if isinstance(entry, tuple) and any(isinstance(e, tuple) for b in inner for e in b):
            found += [(range(i, i + 1), *box) for i in first for box in inner]
        else:
            found += [(entry, *box) for box in inner]
    return found or [()]


def first_axes(array: np.ndarray, stack: Index) -> np.ndarray:
    """A view of an array with the axes of a stack in front."""
    return np.moveaxis(array, stack, range(len(stack)))


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal bit for bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    first, second = (np.ascontiguousarray(each).reshape(-1) for each in (one, other))
    return np.array_equal(first.view(np.uint8), second.view(np.uint8))


def torch_forms(
    shape: tuple[int, ...], array: tuple[int, ...], known: str, *, embedding: bool
) -> tuple[list[str], bool]:
    """The letters that the axes of a leaf may have, which holds an array of PyTorch.

    Args:
        shape: of the leaf, without the axes of a stack.
        array: the shape of the array: `(out, in)`, `(out, in, *kernel)` or a vector.
        known: the known letters of the leaf; empty if none are known.
        embedding: whether the array is an embedding, by its name.

    Returns:
        The letters, the most likely first; empty letters for a leaf in PyTorch's layout.
        And whether more than the sizes shows that the first are right.
    """
    if len(array) < 2:
        fits = math.prod(shape) == math.prod(array) and (array or not shape)
        return [""] if fits else [], True
    if len(array) > 2:
        moved = (*array[2:], array[1], array[0])
        forms = ["i" * (len(shape) - 1) + "o"] if moved == shape else []
        forms += [""] if array == shape else []
        return forms[::-1] if known.startswith("o") else forms, bool(known)
    if known and set(known) <= set("io"):
        pairs = [*zip(shape, known, strict=True)]
        sizes = tuple(math.prod(n for n, own in pairs if own == x) for x in "oi")
        return [known] if sizes == array else [], True
    rows, columns = array
    straight = readings(shape, "embedding", Dims(rows, columns), "jax")
    across = readings(shape, "linear", Dims(columns, rows), "jax")
    forms = [each.axes for each in across]
    as_is = [each.axes.translate(SWAPPED) for each in straight]
    return as_is + forms if embedding else forms + as_is, embedding


def shared_readings(
    shape: tuple[int, ...], options: list[tuple[Reading, ...]], indices: list[Index]
) -> list[Reading]:
    """The ways to see a leaf that fit all of its modules.

    Args:
        shape: of the leaf.
        options: of each module, the ways to see the leaf.
        indices: of each module, its index; all of one length.
    """
    most = [max(column) for column in zip(*indices, strict=True)]
    distinct = dict.fromkeys(options)
    fitting = (each for each in options[0] if has_room(shape, each.stack, most))
    return [each for each in fitting if all(each in other for other in distinct)]


def has_room(shape: tuple[int, ...], stack: Index, indices: Iterable[int]) -> bool:
    """Whether the axes of a stack are long enough for indexes."""
    return all(n < shape[axis] for n, axis in zip(indices, stack, strict=True))
