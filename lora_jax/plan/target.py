"""One leaf of a plan: how it is adapted or trained, and how a function uses it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax

from lora_jax._core import checks
from lora_jax.plan import parts

__all__ = ["Target", "TrainedLeaf", "Use"]

METHODS = ("lora", "dora")
ROLES = ("contracted", "kept", "batch", "indexed", "moved", "stacked", "stopped", "")
NOT_FOLLOWED = "its axes cannot be followed through it"
VALUE = "value"
"""The entry of a trained leaf in adapters."""
_LARGEST_SIZE = 2**63 - 1


class Use(NamedTuple):
    """One use of a weight in a function."""

    primitive: str
    """The name of JAX's primitive, such as `dot_general`."""
    roles: tuple[str, ...]
    """The role of each axis of the weight: `contracted`, `kept`, `batch`, `indexed`,
    `moved` (indexed, and a later product shows its role), `stacked` (scanned over),
    `stopped` (its gradient is stopped), or an empty string if it is not known."""
    where: str = ""
    """The line of the source, if it is known."""
    merged: str = ""
    """Why this use needs the merged weight; empty if it does not."""
    linear: bool = False
    """Whether it is a matrix product, and not a convolution or look-up."""
    window: tuple[int, ...] = ()
    """The axes of a convolution's kernel that are positions, in the order of the positions
    of the input; empty if they are not known."""

    @property
    def is_followed(self) -> bool:
        """Whether the axes of the weight could be followed through the use."""
        return not self.merged.startswith(NOT_FOLLOWED)

    def has_usual_kernel(self, shape: Sequence[int]) -> bool:
        """Whether the axes of a kernel are positions and then inputs, or inputs first.

        Outputs are behind or in front of both: `HWIO` or `OIHW`. `shape` is of the weight.
        """
        if not self.window:
            return True
        inputs, outputs = (
            [a for a, own in enumerate(self.roles) if own == role and a not in self.window]
            for role in ("contracted", "kept")
        )
        if outputs[:1] > [max(self.window)]:
            order = [*self.window, *inputs, *outputs]
        else:
            order = [*outputs, *inputs, *self.window]
        order = [axis for axis in order if shape[axis] > 1]
        return order == sorted(order)

    def kind(self, batch_axes: Sequence[int]) -> str:
        """The kind of use: `"product"`, `"lookup"` of rows, or empty for any other.

        A use that indexes `batch_axes` of the weight takes a layer of a stack.
        """
        if {"contracted", "kept"} <= {*self.roles}:
            return parts.PRODUCT
        roles = [role for i, role in enumerate(self.roles) if i not in batch_axes]
        return parts.LOOKUP if "indexed" in roles else ""

    def __str__(self) -> str:
        roles = ", ".join(role or "unknown" for role in self.roles)
        where = f" at {self.where}" if self.where else ""
        merged = f"; merged: {self.merged}" if self.merged else ""
        return f"{self.primitive}{where} ({roles}){merged}"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Target:
    """One adapted weight, or a part of one: its method, rank, scale, dropout and axes.

    `A` and `B` adapt the weight as a matrix, or as a stack of matrices, of shape
    `(*batch, in, out)`. The input axes are folded into one axis, and so are the output
    axes, in the order given here. The adapter of a part has the sizes of the part.

    Args:
        shape: of the whole weight.
        method: `"lora"` or `"dora"`.
        rank: of the adapter.
        scale: multiplies `A @ B`.
        dropout: the probability that an entry of the adapter's input is dropped.
        in_axes: the axes of the weight that are contracted with an input.
        out_axes: the axes of the weight that become axes of the output.
        batch_axes: the axes that stack matrices.
        part: the part of the weight that is adapted, as a NumPy index in brackets:
            `"[4:]"` for all but the first four entries of the first axis, `"[0]"`,
            `"[:,64:]"`, `"[[0,1,3]]"`. An integer drops its axis. Empty for the whole
            weight.
        use: the uses of the weight that are adapted: `"lookup"` for those that look up
            rows, `"product"` for those that multiply, or empty for all.

    Raises:
        TypeError: if a number has the wrong type.
        ValueError: if the method is unknown, a number is out of its range, the axes do not
            list each axis of the shape once, with an input and an output, `part` is not an
            index of the shape, or the method is DoRA and the part has only some of the
            inputs.
    """

    shape: tuple[int, ...]
    method: str
    rank: int
    scale: float
    dropout: float
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...] = ()
    part: str = ""
    use: str = ""

    def __post_init__(self) -> None:
        for name in ("shape", "in_axes", "out_axes", "batch_axes"):
            object.__setattr__(self, name, _sizes(name, getattr(self, name)))
        checks.check_choice("method", self.method, METHODS)
        checks.check_rank(self.rank)
        checks.check_number("scale", self.scale)
        checks.check_rate("dropout", self.dropout)
        axes = (*self.batch_axes, *self.in_axes, *self.out_axes)
        complete = sorted(axes) == list(range(len(self.shape)))
        if not (complete and self.in_axes and self.out_axes):
            raise ValueError(
                f"each axis of the shape {self.shape} must be in one of in_axes, out_axes "
                f"and batch_axes, and the first two must not be empty, got {self.in_axes}, "
                f"{self.out_axes} and {self.batch_axes}."
            )
        checks.check_choice("use", self.use, ("", *parts.USES))
        object.__setattr__(self, "part", parts.canonical(self.part, self.shape))
        if self.method == "dora" and self.part:
            own = parts.entries(self.part, self.shape)
            if any(parts.count(own[axis]) < self.shape[axis] for axis in self.in_axes):
                raise ValueError(
                    f"DoRA scales whole columns, and the part {self.part} has only some of "
                    "the inputs: take all of the inputs, or use LoRA."
                )

    @property
    def suffix(self) -> str:
        """The part and the use, as they follow the path of the weight in a plan."""
        return self.part + (f"@{self.use}" if self.use else "")

    @property
    def alone(self) -> "Target":
        """The target of the part, seen as a separate weight of the part's shape."""
        if not self.suffix:
            return self
        own = parts.entries(self.part, self.shape)
        left = [axis for axis, entry in enumerate(own) if not isinstance(entry, int)]
        at = {axis: place for place, axis in enumerate(left)}
        groups = {
            name: tuple(at[axis] for axis in getattr(self, name) if axis in at)
            for name in ("in_axes", "out_axes", "batch_axes")
        }
        shape = tuple(parts.count(own[axis]) for axis in left)
        return dataclasses.replace(self, shape=shape, part="", use="", **groups)

    @property
    def axes(self) -> str:
        """One letter for each axis of the weight: `i`, `o` or `b`."""
        groups = {"i": self.in_axes, "o": self.out_axes, "b": self.batch_axes}
        letters = {axis: letter for letter, axes in groups.items() for axis in axes}
        return "".join(letters[axis] for axis in range(len(self.shape)))

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """`(*batch, in, out)`, with the input axes and the output axes folded."""
        own = parts.entries(self.part, self.shape)
        batch = (own[axis] for axis in self.batch_axes)
        stack = (parts.count(entry) for entry in batch if not isinstance(entry, int))
        n_in, n_out = (
            math.prod(parts.count(own[axis]) for axis in axes)
            for axes in (self.in_axes, self.out_axes)
        )
        return (*stack, n_in, n_out)

    @property
    def adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each entry of the adapter by its name."""
        *batch, n_in, n_out = self.matrix_shape
        shapes = {"A": (*batch, n_in, self.rank), "B": (*batch, self.rank, n_out)}
        return shapes | ({"m": (*batch, n_out)} if self.method == "dora" else {})

    @property
    def parameters(self) -> int:
        """The number of parameters of the adapter."""
        return sum(map(math.prod, self.adapter_shapes.values()))

    @property
    def alpha(self) -> float:
        """The alpha of the adapter: `scale * rank`."""
        return self.scale * self.rank


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TrainedLeaf:
    """One leaf that is trained without an adapter: a bias, a norm or a head.

    Its entry in adapters is `{path: {"value": array}}`.

    Args:
        shape: of the leaf.

    Raises:
        TypeError, ValueError: if the shape is not a tuple of sizes.
    """

    shape: tuple[int, ...]
    suffix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _sizes("shape", self.shape))

    @property
    def adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of the leaf's only entry in adapters, by its name."""
        return {VALUE: self.shape}

    @property
    def parameters(self) -> int:
        """The number of parameters of the leaf."""
        return math.prod(self.shape)


def _sizes(name: str, values: Any) -> tuple[int, ...]:
    """Checks sizes or axes of a weight, and returns them as Python integers."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise TypeError(
            f"{name} must be a tuple of integers, got {values!r:.60} "
            f"({type(values).__name__})."
        )
    sizes = tuple(checks.as_index(f"each of {name}", value) for value in values)
    if sizes and not 0 <= min(sizes) <= max(sizes) <= _LARGEST_SIZE:
        raise ValueError(f"{name} must be integers from 0 to 2**63 - 1, got {sizes}.")
    return sizes
