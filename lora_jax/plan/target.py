"""One leaf of a plan: how it is adapted or trained, and how a function uses it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from lora_jax._core import checks

__all__ = ["Target", "TrainedLeaf", "Use"]

METHODS = ("lora", "dora")
ROLES = ("contracted", "kept", "batch", "indexed", "stacked", "")
NOT_FOLLOWED = "its axes cannot be followed through it"
VALUE = "value"
"""The entry of a trained leaf in adapters."""
_LARGEST_SIZE = 2**63 - 1


class Use(NamedTuple):
    """One use of a weight in a function."""

    primitive: str
    """The name of JAX's primitive, such as `dot_general`."""
    roles: tuple[str, ...]
    """What the use does with each axis of the weight: `contracted`, `kept`, `batch`,
    `indexed`, `moved` (indexed, and a later product shows its role), `stacked` (scanned
    over), `stopped` (its gradient is stopped), or an empty string if it is not known."""
    where: str = ""
    """The line of the source, if it is known."""
    merged: str = ""
    """Why this use needs the merged weight; empty if it does not."""
    linear: bool = False
    """Whether it is a matrix product, and not a convolution or look-up."""

    @property
    def is_followed(self) -> bool:
        """Whether the axes of the weight could be followed through the use."""
        return not self.merged.startswith(NOT_FOLLOWED)

    def __str__(self) -> str:
        roles = ", ".join(role or "unknown" for role in self.roles)
        where = f" at {self.where}" if self.where else ""
        merged = f"; merged: {self.merged}" if self.merged else ""
        return f"{self.primitive}{where} ({roles}){merged}"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Target:
    """One adapted weight: its method, numbers and axes.

    `A` and `B` adapt the weight as a matrix, or as a stack of matrices, of shape
    `(*batch, in, out)`. The input axes are folded into one axis, and so are the output
    axes, in the order given here.

    Args:
        shape: of the weight.
        method: `"lora"` or `"dora"`.
        rank: of the adapter.
        scale: multiplies `A @ B`.
        dropout: the probability that an entry of the adapter's input is dropped.
        in_axes: the axes of the weight that are contracted with an input.
        out_axes: the axes of the weight that an output has.
        batch_axes: the axes that stack matrices.

    Raises:
        TypeError: if a number has the wrong type.
        ValueError: if the method is unknown, a number is out of its range, or the axes do
            not list each axis of the shape once, with an input and an output.
    """

    shape: tuple[int, ...]
    method: str
    rank: int
    scale: float
    dropout: float
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...] = ()

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

    @property
    def axes(self) -> str:
        """One letter for each axis of the weight: `i`, `o` or `b`."""
        groups = {"i": self.in_axes, "o": self.out_axes, "b": self.batch_axes}
        letters = {axis: letter for letter, axes in groups.items() for axis in axes}
        return "".join(letters[axis] for axis in range(len(self.shape)))

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """`(*batch, in, out)`, with the input axes and the output axes folded."""
        batch, n_in, n_out = (
            tuple(self.shape[axis] for axis in axes)
            for axes in (self.batch_axes, self.in_axes, self.out_axes)
        )
        return (*batch, math.prod(n_in), math.prod(n_out))

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
    """One leaf that is trained itself: a bias, a norm, a head.

    Its entry in adapters is `{path: {"value": array}}`.

    Args:
        shape: of the leaf.

    Raises:
        TypeError, ValueError: if the shape is not a tuple of sizes.
    """

    shape: tuple[int, ...]

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
