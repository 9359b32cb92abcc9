"""Where and how a leaf holds the array of a module: `Site`, axes, and transposed arrays."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from lora_jax.peft.formats.keys import Dims, Kind
from lora_jax.plan import parts
from lora_jax.plan.parts import Entry

Layout: TypeAlias = Literal["jax", "torch"]
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

        `names` are of the fields, in the order of `stack`.
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
    axes: str = ""
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
    given: bool = False
    """Whether the caller gave the axes."""

    @property
    def target(self) -> str:
        """The path with part and use, as in `names` and in a plan."""
        return self.path + self.part + (f"@{self.use}" if self.use else "")

    @property
    def letters(self) -> str:
        """The letters of the axes, with fields if several axes have an index."""
        return Reading(self.axes, self.stack).fields(self.fields)

    def region(self, shape: tuple[int, ...], stack: Iterable[Entry] = ()) -> list[Entry]:
        """What the module has of each axis of a leaf of some shape.

        `stack` is what several modules have of each axis of the stack, in place of the
        index of this one.
        """
        own = list(parts.entries(self.part, shape))
        left = [axis for axis, entry in enumerate(own) if not isinstance(entry, int)]
        for place, entry in zip(self.stack, stack or self.indices, strict=True):
            indices = parts.indices_of(own[left[place]])
            chosen = tuple(indices[i] for i in parts.indices_of(entry))
            own[left[place]] = (
                chosen[0] if isinstance(entry, int) else parts.grouped(chosen)
            )
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
    layout: Layout | Literal["turned"],
    *,
    fan_in_fan_out: bool = False,
    count: int = 0,
) -> tuple[Reading, ...]:
    """All ways to see a leaf as the weight of a module, by its shape.

    `count` is the number of indexes in the module's name. `fan_in_fan_out` decides whether
    a square weight of PyTorch is `(in, out)`. `"turned"` has outputs in front.
    """
    if count > _MOST_STACKED:
        return ()

    def letters_of(_: Index, own: tuple[int, ...]) -> list[str]:
        straight, turned = (_first_fit(own, kind, dims, t) for t in (False, True))
        if layout == "jax":
            return straight
        if layout == "turned" or kind == "convolution":
            return turned
        if kind == "experts":
            return straight + turned
        turned = turned if own == (dims.n_out, dims.n_in) else []
        return (straight if fan_in_fan_out or not turned else turned) or turned

    return stacked_readings(shape, count, letters_of)


@functools.lru_cache(maxsize=4096)
def known_readings(
    shape: tuple[int, ...], axes: str, kind: Kind, dims: Dims, count: int
) -> tuple[Reading, ...]:
    """All ways to see a leaf with known axes as the weight of a module."""

    def letters_of(stack: Index, own: tuple[int, ...]) -> list[str]:
        letters = "".join(x for axis, x in enumerate(axes) if axis not in stack)
        batch = all(axes[axis] == "b" for axis in stack)
        return [letters] if batch and _fits(own, letters, kind, dims) else []

    if len(axes) != len(shape):
        return ()
    return stacked_readings(shape, count, letters_of, anywhere=True)


def stacked_readings(
    shape: tuple[int, ...],
    count: int,
    letters_of: Callable[[Index, tuple[int, ...]], Iterable[str]],
    *,
    anywhere: bool = False,
) -> tuple[Reading, ...]:
    """All ways to see a leaf as a stack of arrays along `count` axes.

    `letters_of` takes these axes and the shape of one array, and returns the letters that
    the axes of the array may have; empty letters for an array in PyTorch's layout. Ways
    that differ in an axis of size 1 only are one way. One index may be on any axis. Several
    are on the first axes, in any order, if that fits and `anywhere` is false.
    """
    found: dict[object, Reading] = {}
    for stack in itertools.permutations(range(len(shape)), count):
        rest = tuple(n for axis, n in enumerate(shape) if axis not in stack)
        for letters in letters_of(stack, rest):
            own = iter(letters)
            full = ("b" if a in stack else next(own, "") for a in range(len(shape)))
            reading = Reading("".join(full) if letters else "", stack)
            found.setdefault(_essence(shape, reading), reading)
    first = [each for each in found.values() if max(each.stack, default=0) < count]
    return tuple(first if count > 1 and first and not anywhere else found.values())


def _essence(shape: tuple[int, ...], reading: Reading) -> object:
    """A key that is equal for readings that see the same matrices."""
    axes, stack = reading
    own = ((a, letter) for a, letter in enumerate(axes) if a not in stack)
    letters = tuple((a, letter) for a, letter in own if shape[a] > 1)
    return letters, tuple(axis if shape[axis] > 1 else None for axis in stack)


def _first_fit(
    shape: tuple[int, ...], kind: Kind, dims: Dims, turned: bool = False
) -> list[str]:
    """The letters that the axes of one module's weight have in JAX, if they fit.

    Inputs and then outputs: `(in, out)`, `(d, heads, k)`, `(*kernel, in, out)`,
    `(experts, in, out)`. A single expert may have no axis. If `turned` is true, outputs are
    in front, as in PyTorch.
    """
    inner = len(shape) - 1
    options = ["i" * n + "o" * (inner + 1 - n) for n in range(1, inner + 1)]
    if kind == "convolution":
        options = ["o" + "i" * inner] if turned else options[-1:]
    elif kind == "experts":
        options = ["b" * (inner - 1) + ("oi" if turned else "io")]
    elif turned:
        options = [x.translate(SWAPPED) for x in options if kind == "linear"]
    return [x for x in options if _fits(shape, x, kind, dims)][:1]


def _fits(shape: tuple[int, ...], axes: str, kind: Kind, dims: Dims) -> bool:
    """Whether axes with some letters have the sizes of a module's weight."""
    if len(axes) != len(shape):
        return False
    pairs = [*zip(axes, shape, strict=True)]
    inner, outer, experts = ([n for x, n in pairs if x == own] for own in "iob")
    if kind == "convolution":  # the order of the axes of the kernel counts
        last = axes[-1:] == "o"
        kernel = [*dims.kernel, dims.n_in] if last else [dims.n_in, *dims.kernel]
        if inner != kernel or not (last or axes[:1] == "o"):
            return False
    return (
        math.prod(inner) == dims.n_in * math.prod(dims.kernel)
        and math.prod(outer) == dims.n_out
        and (experts == [dims.experts] or (not experts and dims.experts < 2))
    )


def from_torch(array: np.ndarray, shape: tuple[int, ...], axes: str) -> np.ndarray:
    """Turns an array of PyTorch into the layout of a leaf.

    `shape` and `axes` are of the leaf, without the axes of a stack. `axes` are empty if the
    leaf has PyTorch's layout.
    """
    if not axes:
        return array.reshape(shape)
    if array.ndim > 2:  # (*kernel, in, out)
        return np.moveaxis(array, (0, 1), (-1, -2))
    return from_matrix(array.T, shape, axes)


def to_matrix(weight: np.ndarray, axes: str) -> np.ndarray:
    """A weight without batch axes as `(in, out)`."""
    n_in = math.prod(
        n for n, letter in zip(weight.shape, axes, strict=True) if letter == "i"
    )
    return weight.transpose(_inputs_first(axes)).reshape(n_in, -1)


def from_matrix(matrix: np.ndarray, shape: tuple[int, ...], axes: str) -> np.ndarray:
    """Undoes `to_matrix` for a weight of a shape."""
    order = _inputs_first(axes)
    weight = matrix.reshape([shape[axis] for axis in order])
    return weight.transpose(np.argsort(order))


def _inputs_first(axes: str) -> list[int]:
    return sorted(range(len(axes)), key=axes.__getitem__)


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


def first_part(shape: tuple[int, ...], entries: int) -> str:
    """The first of the equal parts of a leaf that have a number of entries, as a guess."""
    count, rest = divmod(math.prod(shape), entries)
    if rest == 0 and count > 1:
        fused = sorted(axis for axis, n in enumerate(shape) if n % count == 0)
        for axis in sorted(fused, key=lambda axis: shape[axis] != count):
            size = shape[axis] // count
            return f"[{':,' * axis}{'0' if size == 1 else f':{size}'}]"
    return "[0]"


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
        entry = parts.grouped(first)
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
    forms = _first_fit(shape, "linear", Dims(columns, rows))
    as_is = _first_fit(shape, "linear", Dims(columns, rows), True)
    return as_is + forms if embedding else forms + as_is, embedding


def has_room(shape: tuple[int, ...], stack: Index, indices: Iterable[int]) -> bool:
    """Whether the axes of a stack are long enough for indexes."""
    return all(n < shape[axis] for n, axis in zip(indices, stack, strict=True))


def common_dtype(*dtypes: np.dtype) -> np.dtype:
    """The dtype that holds the values of all dtypes.

    NumPy does not have it for float16 and bfloat16.
    """
    if len({dtype for dtype in dtypes if dtype.itemsize == 2}) > 1:
        dtypes = (*(d for d in dtypes if d.itemsize != 2), np.dtype(np.float32))
    return np.result_type(*dtypes)
