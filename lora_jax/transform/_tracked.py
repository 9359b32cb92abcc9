"""Tracked values: where the axes of weights are in the values of a program.

A `Tracked` value stands for an array of the program, and maps axes of weights to axes of
this array. `Uses` records what products and look-ups do with them. No array is computed.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax._core import compat
from lora_jax._core.source_lines import use_at
from lora_jax.plan.adapter_plan import Use
from lora_jax.transform._moves import Move
from lora_jax.transform._parameters import parameter

_PRODUCTS = ("dot_general", "ragged_dot_general")


@dataclasses.dataclass(eq=False)
class Found:
    """A recorded use of a weight. `roles` are as in `Use`, by axis of the weight.

    `groups` are the feature groups of a convolution.
    """

    weight: str
    primitive: str
    where: str
    merged: str
    roles: dict[int, str]
    window: tuple[int, ...] = ()
    groups: int = 1

    def use(self, ndim: int) -> Use:
        """The record as a `Use` of a weight with `ndim` axes."""
        roles = tuple(self.roles.get(axis, "") for axis in range(ndim))
        # A call contracts axes only if it is stated to be a product.
        stated = self.primitive in compat.NAMED_CALLS and "contracted" in roles
        linear = (stated or self.primitive in _PRODUCTS) and not self.merged
        return Use(self.primitive, roles, self.where, self.merged, linear, self.window)


@dataclasses.dataclass(eq=False)
class LookUp:
    """An indexing of axes of a weight: of rows or columns, or a reordering.

    The result may be rows of a table, which are activations, or a part of a weight, which a
    product multiplies by. The next use of the result shows which.

    Attributes:
        number: how many look-ups came before it.
        found: the recorded use of each weight in the value.
        rows: whether the indexed axes are the leading ones.
        moved: the axes of weights whose roles a later product has shown.
        used: whether the result became an activation.
    """

    number: int
    found: list[Found]
    rows: bool
    moved: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    used: bool = False


@dataclasses.dataclass(frozen=True)
class WeightAxis:
    """One axis of a weight, and where it is in a value.

    Attributes:
        weight: the path of the weight.
        axis: the number of the axis in the weight.
        along: the axes of the value that it has become; none of them has size 1.
        look_ups: the look-ups that indexed it.
        merged: why the weight was merged by an earlier use; empty if it was not.
    """

    weight: str
    axis: int
    along: frozenset[int]
    look_ups: tuple[LookUp, ...] = ()
    merged: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """The weight and the number of the axis."""
        return self.weight, self.axis

    def is_like(self, other: "WeightAxis") -> bool:
        """Whether `other` differs at most in its look-ups, and has the same number."""
        alike = dataclasses.replace(other, look_ups=self.look_ups) == self
        return alike and len(other.look_ups) == len(self.look_ups)


@dataclasses.dataclass(frozen=True)
class Dense:
    """A value that is not a weight. If constant, it depends on no argument but weights."""

    is_constant: bool = False


@dataclasses.dataclass(frozen=True)
class Tracked:
    """A value that is a weight, a part of one, or several weights.

    Attributes:
        shape: of the value.
        axes: the axes of the weights.
        gathered: as in `Factored`: how rows of a table were looked up.
        is_constant: whether it depends on no argument but weights.
    """

    shape: tuple[int, ...]
    axes: tuple[WeightAxis, ...]
    gathered: str = ""
    is_constant: bool = False

    @property
    def ndim(self) -> int:
        """The number of axes of the value."""
        return len(self.shape)

    @property
    def weights(self) -> tuple[str, ...]:
        """The paths of the weights in the value, each once."""
        return tuple(dict.fromkeys(own.weight for own in self.axes))

    def replace(self, **changes: Any) -> "Tracked":
        """The value with other fields; it is no longer known to be constant."""
        return dataclasses.replace(self, is_constant=False, **changes)

    def moved(self, axes: Sequence[Sequence[int]], shape: Sequence[int]) -> "Tracked":
        """The value after a move, which maps each of its axes to axes of a new shape."""

        def became(own: WeightAxis) -> WeightAxis:
            new = {j for i in own.along for j in axes[i] if shape[j] != 1}
            return dataclasses.replace(own, along=frozenset(new))

        return self.replace(shape=tuple(shape), axes=tuple(map(became, self.axes)))

    def longer(self, shape: Sequence[int]) -> "Tracked":
        """The value after a padding or join that makes some axes longer.

        If look-ups took one entry of exactly one axis of a weight, axes that grow from size
        1 become that axis.
        """
        gone = [own for own in self.axes if own.look_ups and not own.along]
        pairs = enumerate(zip(self.shape, shape, strict=True))
        new = {axis for axis, (old, size) in pairs if old == 1 and size != 1}

        def became(own: WeightAxis) -> WeightAxis:
            return dataclasses.replace(own, along=own.along | new) if gone == [own] else own

        return self.replace(shape=tuple(shape), axes=tuple(map(became, self.axes)))

    def roles(self, of_value: Sequence[str]) -> dict[str, dict[int, str]]:
        """The known roles of the axes of each weight.

        An axis of size 1 cannot be followed. If all other axes are where they were, it is
        assumed to be where it was too, unless a look-up took one entry of it.

        Args:
            of_value: the role of each axis of the value; empty if none is known.
        """
        found: dict[str, dict[int, str]] = {weight: {} for weight in self.weights}
        if not of_value:
            return found
        for own in self.axes:
            known = [of_value[axis] for axis in sorted(own.along) if of_value[axis]]
            if known:
                found[own.weight][own.axis] = known[0]
        in_place = all(own.along <= {own.axis} for own in self.axes)
        if in_place and len(self.axes) == self.ndim and len(found) == 1:
            (of_weight,) = found.values()
            looked_up = {own.axis for own in self.axes if own.look_ups}
            for axis, size in enumerate(self.shape):
                if size == 1 and of_value[axis] and axis not in looked_up:
                    of_weight[axis] = of_value[axis]
        return found

    def looked_up(self) -> dict[tuple[str, int], list[WeightAxis]]:
        """The axes of the value that are indexed axes of weights; the latest first."""
        indexed = {own.key for own in self.axes if own.look_ups}
        found: dict[tuple[str, int], list[WeightAxis]] = {}
        for own in self.axes:
            if own.key in indexed:
                found.setdefault(own.key, []).append(own)

        def last(item: tuple[Any, list[WeightAxis]]) -> int:
            return max(each.number for own in item[1] for each in own.look_ups)

        return dict(sorted(found.items(), key=lambda item: -last(item)))

    def is_multiplied(self, roles: Sequence[str]) -> bool:
        """Whether a product with these roles contracts and keeps axes without look-ups."""
        rest = {roles[i] for own in self.axes if not own.look_ups for i in own.along}
        return {"contracted", "kept"} <= rest


def is_tracked(value: object) -> bool:
    """Whether a value of the program is a weight."""
    return isinstance(value, Tracked)


def weight_of(path: str, shape: tuple[int, ...]) -> Tracked:
    """The tracked value of a weight that is an argument of the function."""
    alongs = [frozenset({axis} if size != 1 else ()) for axis, size in enumerate(shape)]
    axes = tuple(WeightAxis(path, axis, along) for axis, along in enumerate(alongs))
    return Tracked(shape, axes, is_constant=True)


def window_of(equation: Any) -> list[str]:
    """For each axis of a kernel that is a position, that axis of the input; else empty."""
    numbers = parameter(equation, "dimension_numbers")
    (_, _, *inputs), (_, _, *kernel) = numbers.lhs_spec, numbers.rhs_spec
    own = dict(zip(kernel, map(str, inputs), strict=True))
    return [own.get(axis, "") for axis in range(len(numbers.rhs_spec))]


def _role_of_looked_up(own: set[str], rest: set[str]) -> str:
    """The role of an axis that was indexed before a product.

    `own` are the roles of the axes that it became, none if one entry was taken, and `rest`
    those of the other axes of the weight.
    """
    if {"contracted", "kept"} <= rest:  # the others are a matrix: experts, layers
        order = ("batch", "kept", "contracted")
    elif "contracted" in rest:  # the indices choose columns to compute
        return "contracted" if own == {"contracted"} else "kept"
    else:
        order = ("contracted", "batch", "kept")
    return next((role for role in order if role in own), "")


class Uses:
    """The uses of weights that the finder has recorded so far.

    Attributes:
        found: every use, in the order of the program.
        look_ups: the look-ups, in the same order.
        callers: the equations whose bodies are being followed, the outermost first.
    """

    def __init__(self):
        self.found: list[Found] = []
        self.look_ups: list[LookUp] = []
        self.callers: list[Any] = []

    def see(
        self, value: Tracked, equation: Any, roles: Sequence[str] = (), merged: str = ""
    ) -> list[Found]:
        """Records a use; `roles` has one role for each axis of the value, or is empty."""
        before = next((own.merged for own in value.axes if own.merged), "")
        by_weight = value.roles(roles).items()
        found = self._add(equation, merged or before, by_weight)
        if roles and found and found[0].primitive == "conv_general_dilated":
            windows = value.roles(window_of(equation))
            for use in found:
                own = windows[use.weight]
                use.window = tuple(sorted(own, key=lambda axis: int(own[axis])))
                use.groups = parameter(equation, "feature_group_count")
        return found

    def see_merged(
        self,
        value: Tracked,
        equation: Any,
        reason: str,
        roles: Mapping[str, Sequence[dict[int, str]]],
    ) -> None:
        """Records the uses of an operand in the body of a call that gets merged weights.

        `roles` has, for each weight, the roles of its axes in each use in the body.
        """
        uses = ((name, own) for name in value.weights for own in roles.get(name, ({},)))
        self._add(equation, reason, uses)

    def _add(
        self, equation: Any, merged: str, uses: Iterable[tuple[str, dict[int, str]]]
    ) -> list[Found]:
        at = use_at(equation, self.callers)
        new = [Found(name, *at, merged, {**own}) for name, own in uses]
        self.found += new
        return new

    def look_up(self, value: Tracked, equation: Any, move: Move) -> Tracked:
        """Records a look-up of indexed axes; returns the value with the look-up."""
        found, indexed = self.see(value, equation, move.roles), move.indexed
        _see_entries(value, found)
        rows = not any(i > j for i, j in zip(indexed[1:], indexed[:-1], strict=True))
        new = LookUp(len(self.look_ups), found, rows)
        self.look_ups.append(new)

        def noted(own: WeightAxis) -> WeightAxis:
            if not any(indexed[axis] for axis in own.along):
                return own
            return dataclasses.replace(own, look_ups=(*own.look_ups, new))

        return dataclasses.replace(value, axes=tuple(map(noted, value.axes)))

    def see_product(
        self, value: Tracked, equation: Any, roles: Sequence[str], other: Any = None
    ) -> None:
        """Records a product of a weight with the value `other`.

        The product shows the roles of axes that were indexed before. Rows of a table that
        are multiplied by a constant, or entry by entry, are the activation of the product.
        """
        looked_up = value.looked_up()
        rows = any(each.rows for own in value.axes for each in own.look_ups)
        constant = other is not None and other.is_constant
        by_constant = rows and constant and not value.is_multiplied(roles)
        # Without a contraction the product is entry by entry, as in a norm of rows.
        if looked_up and (by_constant or "contracted" not in roles):
            self.use_rows(value)
            return
        told: dict[str, set[str]] = {}
        by_weight = value.roles(roles)
        found = self.see(value, equation, roles)
        for (weight, axis), parts in looked_up.items():
            rest = {r for i, r in by_weight[weight].items() if (weight, i) not in looked_up}
            rest |= told.get(weight, set())
            own = {roles[i] for part in parts for i in part.along}
            role = _role_of_looked_up(own, rest)
            if not role:
                continue
            told.setdefault(weight, set()).add(role)
            for part in parts:
                for each in part.look_ups:
                    each.moved.add((weight, axis))
            for use in found:
                if use.weight == weight:
                    use.roles[axis] = role

    def see_stacked(self, value: Tracked, equation: Any) -> None:
        """Records that a weight is scanned over its first axis.

        The role of an axis that was indexed is left open: a later product shows whether it
        is a batch axis or the tokens.
        """
        indexed = any(own.look_ups and 0 in own.along for own in value.axes)
        roles = ["" if indexed else "stacked"] + [""] * (value.ndim - 1)
        self.see(value, equation, roles)

    def use_rows(self, value: Tracked) -> None:
        """Marks the look-ups of a value: their results are used as activations."""
        for own in value.axes:
            for each in own.look_ups:
                each.used = True

    def settle(self) -> None:
        """Gives the role `"moved"` to axes that were only indexed for products.

        Called once, after the program has been followed.
        """
        tables = {
            use.weight
            for each in self.look_ups
            if each.rows and each.used
            for use in each.found
        }
        for each in self.look_ups:
            if each.used and each.rows:
                continue
            for use in each.found:
                moved = {axis for weight, axis in each.moved if weight == use.weight}
                if not each.rows and use.weight in tables:
                    moved = set(use.roles)
                for axis in moved:
                    if use.roles.get(axis) == "indexed":
                        use.roles[axis] = "moved"


def _see_entries(value: Tracked, found: Sequence[Found]) -> None:
    """Gives the role `"batch"` to axes of which one entry was taken before this look-up.

    Each entry of such an axis is a table. The table must have an axis without look-ups.
    """
    looked_up = value.looked_up()
    for use in found:
        gone = {
            axis
            for (weight, axis), parts in looked_up.items()
            if weight == use.weight and not any(part.along for part in parts)
        }
        own = {axis.axis for axis in value.axes if axis.weight == use.weight}
        if gone and own - gone - set(use.roles):
            use.roles |= dict.fromkeys(gone, "batch")
