"""The state of one evaluation of a program: dropout keys, recorded uses and merges."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias

import jax

from lora_jax._core import compat
from lora_jax._core.source_lines import called_at, use_at
from lora_jax.plan import axis_roles
from lora_jax.plan.adapter_plan import Target
from lora_jax.plan.axis_roles import Side, Sighting
from lora_jax.plan.parts import LOOKUP
from lora_jax.transform._dense import merge
from lora_jax.transform._factored import Factored, Label, Term
from lora_jax.transform._masks import KnownMasks
from lora_jax.transform._statistics import Statistic

Rule: TypeAlias = Callable[..., Any]

OnStopGradient: TypeAlias = Literal["error", "base", "all"]


class Merge(NamedTuple):
    """A use of an adapted weight that could not stay low-rank.

    Attributes:
        path: of the weight.
        shape: of the merged value, which is the weight or a part of it.
        primitive: the JAX primitive that used the value.
        reason: why this use has no low-rank form.
        where: the line of the user's code, `file:line (function)`.
    """

    path: str
    shape: tuple[int, ...]
    primitive: str
    reason: str
    where: str

    def __str__(self) -> str:
        """One line: what was merged, why, and where."""
        where = f"; at {self.where}" if self.where else ""
        return (
            f"{self.path!r} (here of shape {self.shape}) reaches `{self.primitive}`: "
            f"{self.reason}{where}"
        )


def _axes_as_used(
    value: Factored, roles: Sequence[str], targets: Mapping[Any, Target]
) -> dict[Any, str]:
    """The letters of each weight's axes, given the roles of the value's axes."""
    if "indexed" in roles and "contracted" not in roles:
        roles = [role or "kept" for role in roles]
    if value.gathered:  # each row may have an example of its own
        roles = ["kept" if role == "batch" else role for role in roles]
    ndim = sum(size != 1 for size in value.shape)
    found = {}
    for term in value.terms:
        swapped = term.label.swapped or (False,) * len(term.label.names)
        for name, own in zip(term.label.names, swapped, strict=True):
            if name in targets:
                sides = _sides(value, term, roles, own)
                letters = axis_roles.as_used(targets[name], sides, ndim)
                found |= {} if letters is None else {name: letters}
    return found


def _sides(value: Factored, term: Term, roles: Sequence[str], swapped: bool) -> list[Side]:
    """The axes that exactly one factor of a term owns, with their roles."""
    a, b = value.owned(term.a), value.owned(term.b)
    ins, outs = (b - a, a - b) if swapped else (a - b, b - a)
    groups = (("i", ins), ("o", outs))
    return [
        Side(letter, roles[axis], value.shape[axis])
        for letter, axes in groups
        for axis in sorted(axes)
    ]


@contextlib.contextmanager
def changed(state: Any, **fields: Any) -> Iterator[None]:
    """Changes fields of the state of an evaluation until the block ends."""
    saved = {name: getattr(state, name) for name in fields}
    vars(state).update(fields)
    try:
        yield
    finally:
        vars(state).update(saved)


@dataclasses.dataclass
class Frame:
    """A jaxpr under evaluation.

    Attributes:
        values: of its variables.
        broadcasts: the equations that made broadcasts.
        followed: in `adapt_rows`, where the rows of the batch are; see `_following`.
    """

    values: dict[Any, Any] = dataclasses.field(default_factory=dict)
    broadcasts: dict[Any, Any] = dataclasses.field(default_factory=dict)
    followed: Any = None

    def place(self, atom: Any) -> Any:
        """Where the rows of the batch are in a value."""
        return self.followed.place(atom)

    def read(self, atom: Any) -> Any:
        """The value of a variable or a literal."""
        return atom.val if isinstance(atom, compat.Literal) else self.values[atom]


@dataclasses.dataclass
class Context:
    """The state of one evaluation.

    Attributes:
        rules: the rule for factored operands, by the primitive's name.
        on_merge: called with each `Merge` before the merge; may raise.
        on_stop_gradient: what a `stop_gradient` of an adapted weight does; see `adapt`.
        key: for dropout, a value of the current trace; None for no dropout.
        sightings: every use so far.
        frame: the jaxpr under evaluation.
        callers: the equations whose rules are running, the outermost first.
        calls: traced calls of jitted functions, by their cache keys; see `_rules_calls`.
        targets: of the plan, by path; only those whose axes are compared with the uses.
        closed_over_is_constant: whether arrays that the function closes over count as
            constants. They do if the function has arguments besides the params.
        products: the equations of stated functions; see `LoraConfig`.
        slots: in `adapt_rows`, the slot of each row, `(rows,)`; see `_slots`.
        n_slots: the number of slots.
        statistic: what the gradients of first factors are; see `_statistics`.
        taken: the slots of values whose rows are in an order that only the data know.
        masks: where the terms of adapted parts act.
        varying: in a `shard_map` whose types do not say it, over which mesh axes the
            operands of each equation vary; see `_varying`.
    """

    rules: Mapping[str, Rule]
    on_merge: Callable[[Merge], None]
    on_stop_gradient: OnStopGradient = "error"
    key: jax.Array | None = None
    sightings: list[Sighting] = dataclasses.field(default_factory=list)
    frame: Frame = dataclasses.field(default_factory=Frame)
    callers: list[Any] = dataclasses.field(default_factory=list)
    calls: dict[Any, Any] = dataclasses.field(default_factory=dict)
    targets: Mapping[str, Target] = dataclasses.field(default_factory=dict)
    closed_over_is_constant: bool = False
    products: Mapping[str, str] = dataclasses.field(default_factory=dict)
    slots: Any = None
    n_slots: int = 0
    statistic: Statistic = ""
    taken: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
    masks: KnownMasks = dataclasses.field(default_factory=KnownMasks)
    varying: Mapping[int, Sequence[frozenset[str]]] = dataclasses.field(
        default_factory=dict
    )
    _constants: dict[int, Any] = dataclasses.field(default_factory=dict)
    _names: tuple[Mapping[Any, str | int], ...] = ()
    _keys_made: int = 0

    def see(
        self,
        value: Factored,
        equation: Any,
        roles: Sequence[str] = (),
        merged: str = "",
        *,
        moved: bool = False,
    ) -> None:
        """Records a use; `roles` has one role for each axis of the value, or is empty."""
        primitive, where = "output", "the end of the function"
        if equation is not None:
            primitive = equation.primitive.name
            where = called_at(equation, self.callers) if merged else ""
        found = ((name, self.targets.get(self._path(name))) for name in value.names)
        targets = {name: target for name, target in found if target is not None}
        as_used = _axes_as_used(value, roles, targets) if roles and targets else {}
        for weight in value.names:
            shape, letters = tuple(value.shape), as_used.get(weight, "")
            if letters and letters != targets[weight].axes:
                # The part may have been taken along any axis.
                letters = "" if moved and "indexed" in roles else letters
                where = where or called_at(equation, self.callers)
            self.record(Sighting(weight, shape, primitive, where, merged, letters, moved))

    @property
    def n_rows(self) -> int:
        """The number of rows of the batch, in the current body."""
        return len(self.slots)

    def followed(self, jaxpr: Any) -> Any:
        """Where the rows are in a jaxpr that the rule of the current equation evaluates."""
        if self.frame.followed is None or not self.callers:
            return self.frame.followed
        return self.frame.followed.inside(self.callers[-1], jaxpr)

    def is_weight(self, value: Any) -> bool:
        """Whether a value of the program is a weight."""
        return isinstance(value, Factored)

    def add_constants(self, values: Iterable[Any]) -> None:
        """Marks values as constants: they depend on no argument except the weights."""
        self._constants.update((id(value), value) for value in values)

    def is_constant(self, value: Any) -> bool:
        """Whether a value, not a literal, is known to be a constant."""
        return id(value) in self._constants

    def enter(self, outside: Sequence[Any], inside: Sequence[Any]) -> None:
        """Notes which copies of operands, as the arguments of a body, are constants."""
        pairs = zip(outside, inside, strict=True)
        self.add_constants(value for own, value in pairs if self.is_constant(own))

    def is_constant_atom(self, atom: Any, value: Any) -> bool:
        """Whether an operand of an equation is a literal or a known constant."""
        return isinstance(atom, compat.Literal) or self.is_constant(value)

    def record(self, sighting: Sighting) -> None:
        """Records a sighting, and calls `on_merge` if it is a merge."""
        self.sightings.append(sighting)
        name, shape, primitive, where, merged, *_ = sighting
        if merged:
            self.on_merge(Merge(self._path(name), shape, primitive, merged, where))

    def merge(self, value: Factored, equation: Any, reason: str) -> jax.Array:
        """The dense value. The merge is reported, except for table rows and vectors."""
        if value.gathered or self.is_vector(value):
            if value.has_uses:
                value = value.for_use(LOOKUP)
                self.see(value, equation)
            return merge(value)
        if value.has_uses:
            self.refuse_use(value, equation)
        self.see(value, equation, merged=reason)
        self.check_no_dropout(value)
        return merge(value)

    def refuse_use(self, value: Factored, equation: Any) -> NoReturn:
        """Raises if an adapter is for one kind of use and this use is of neither kind."""
        name, where = use_at(equation, self.callers)
        raise ValueError(
            f"the adapter {self._path(value.names[0])!r} is for one kind of use of its "
            f"weight, and `{name}` at {where} is neither a look-up of rows nor a product. "
            "Adapt the weight for all uses, without the '@lookup' or '@product'."
        )

    def check_may_stop(self, value: Factored, equation: Any) -> None:
        """Raises for a `stop_gradient` of an adapted weight, unless the user allowed it."""
        if self.on_stop_gradient != "error":
            return
        names = ", ".join(repr(self._path(name)) for name in value.names)
        where = called_at(equation, self.callers)
        raise ValueError(
            f"the function stops the gradient of the adapted weight {names} (here of shape "
            f"{tuple(value.shape)}) with `stop_gradient`, at {where}: the "
            "adapter would get no gradient through this use. If only the base weight is "
            "frozen there, set on_stop_gradient='base': the adapter is trained. If this "
            "use must not train the adapter either (a target network, a "
            "straight-through estimator), set on_stop_gradient='all'."
        )

    def is_vector(self, value: Factored) -> bool:
        """Whether a merged value is no larger than one of its factors.

        With dropout the answer is no: the product that uses the value needs the factors.
        The same holds if they differ between slots.
        """
        needed = self.drops(value) or value.by_slot
        return bool(value.terms) and value.is_thin() and not needed

    def drops(self, value: Factored) -> bool:
        """Whether products with the value have dropout on the other operand."""
        return self.key is not None and any(t.label.dropout for t in value.terms)

    def check_no_dropout(self, value: Factored) -> None:
        """Raises if the value has dropout, for a use without an input to drop."""
        if self.drops(value):
            raise ValueError(
                f"the adapter of {self._path(value.names[0])!r} has dropout, but the "
                "function merges or sums the weight, which has no input to drop: plan it "
                "with dropout=0.0, or leave the weight out with LoraConfig(exclude=...)."
            )

    def _path(self, name: str | int) -> str:
        """The user's path of a weight, given its name in the current call."""
        for names in reversed(self._names):
            name = names[name]
        return str(name)

    def merge_all(self, values: Sequence[Any], equation: Any, reason: str) -> list[Any]:
        """The values, with every factored one merged."""
        return [
            self.merge(v, equation, reason) if isinstance(v, Factored) else v
            for v in values
        ]

    def make_key(self, x: jax.Array | None = None) -> jax.Array | None:
        """A new dropout key for each call; None if there is no dropout.

        Inside `jax.shard_map`, devices with different parts of `x` get different keys.
        """
        if self.key is None:
            return None
        self._keys_made += 1
        key = jax.random.fold_in(compat.as_current(self.key), self._keys_made)
        for axis in () if x is None else self._varying_axes(x):
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        return key

    def _varying_axes(self, x: jax.Array) -> list[str]:
        """The mesh axes over which `x`, an input of the current equation, varies."""
        found = {*compat.varying_axes(x)}
        equation = self.callers[-1]
        for atom, axes in zip(
            equation.invars, self.varying.get(id(equation), ()), strict=False
        ):
            if not self.is_weight(self.frame.read(atom)):
                found |= axes
        return sorted(found)

    def dropout(self, label: Label, x: jax.Array) -> tuple[float, jax.Array | None]:
        """The dropout rate of `x` in a product with a term, and the key.

        Without dropout they are 0 and None.
        """
        rate = label.dropout if self.key is not None else 0.0
        return rate, self.make_key(x) if rate else None

    def inside(self, equation: Any) -> contextlib.AbstractContextManager[None]:
        """While the rule of an equation runs."""
        return changed(self, callers=[*self.callers, equation])

    def using_key(self, key: jax.Array | None) -> contextlib.AbstractContextManager[None]:
        """Derives dropout keys from `key`, a value of the trace that starts here."""
        return changed(self, key=key, _keys_made=0)

    def using_slots(self, slots: Any) -> contextlib.AbstractContextManager[None]:
        """Uses the slots of the rows that a body has, a value of the current trace."""
        return changed(self, slots=slots)

    def quietly(self) -> contextlib.AbstractContextManager[None]:
        """Discards the uses and merges of an evaluation that is only done for shapes."""
        own = {"sightings": list(self.sightings), "_keys_made": self._keys_made}
        return changed(self, on_merge=lambda merge: None, **own)

    @contextlib.contextmanager
    def renamed(self, names: Mapping[Any, str | int]) -> Iterator[list[Sighting]]:
        """Renames the weights in a call, and collects the uses under the new names."""
        with changed(self, sightings=[], _names=(*self._names, names)):
            yield self.sightings
