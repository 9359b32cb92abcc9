"""What the evaluation of one program carries with it: keys, uses, and merges."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax

from lora_jax import _axes, _compat
from lora_jax._axes import Side
from lora_jax.plan import Target
from lora_jax.transform._factored import Factored, Label, Term, merge

Rule = Callable[..., Any]

OnStopGradient: TypeAlias = Literal["error", "base", "all"]


class Merge(NamedTuple):
    """A use of an adapted weight that could not stay low-rank.

    Attributes:
        path: of the weight.
        shape: of the value that was merged; the weight's, or that of a part of it.
        primitive: the JAX primitive that it reached.
        reason: why that has no low-rank form.
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


class Sighting(NamedTuple):
    """A use of a weight, as a rule saw it.

    Attributes:
        name: of the weight.
        shape: of the value.
        primitive: its name.
        roles: `{axis of the weight: what the use does with it}`.
        where: the line of the user's code, where it is of interest.
        merged: why the weight was merged there; empty if it was not.
        axes: the letters of the axes of the weight as the use has them, where adapters
            are run and the use says so; else empty.
        moved: whether it is no use yet: a part is taken, or a loop runs over it.
    """

    name: str | int
    shape: tuple[int, ...]
    primitive: str
    roles: Mapping[int, str]
    where: str
    merged: str = ""
    axes: str = ""
    moved: bool = False


def _roles_by_weight(
    value: Factored, roles: Sequence[str]
) -> dict[str | int, dict[int, str]]:
    """For each weight in a value, the role of each of its axes that is known.

    Terms that stand for axes know where those are now. An axis of size 1 cannot be told
    from none; it is where it was, if all others are.
    """
    found: dict[str | int, dict[int, str]] = {}
    in_place = len(value.terms) == value.ndim
    for term in value.terms:
        axes = sorted(value.owned(term.a)) if roles else ()
        in_place = in_place and set(axes) <= {term.label.axis}
        own = [roles[axis] for axis in axes if roles[axis]]
        for weight in term.label.names:
            known = found.setdefault(weight, {})
            if own and term.label.axis is not None:
                known[term.label.axis] = own[0]
    if in_place and roles and len(found) == 1:
        (known,) = found.values()
        for axis, size in enumerate(value.shape):
            if size == 1 and roles[axis]:
                known[axis] = roles[axis]
    return found


def _sides(value: Factored, term: Term, roles: Sequence[str], swapped: bool) -> list[Side]:
    """The axes of a value that only one factor of a term owns, with their roles."""
    a, b = value.owned(term.a), value.owned(term.b)
    ins, outs = (b - a, a - b) if swapped else (a - b, b - a)
    groups = (("i", ins), ("o", outs))
    return [
        Side(letter, roles[axis], value.shape[axis])
        for letter, axes in groups
        for axis in sorted(axes)
    ]


@dataclasses.dataclass
class Frame:
    """One jaxpr that is being evaluated: its values and the origin of its broadcasts."""

    values: dict[Any, Any] = dataclasses.field(default_factory=dict)
    broadcasts: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def read(self, atom: Any) -> Any:
        """The value of a variable or a literal."""
        return atom.val if isinstance(atom, _compat.Literal) else self.values[atom]


@dataclasses.dataclass
class Context:
    """The state of one evaluation.

    Attributes:
        rules: what to do with a factored operand, by the primitive's name.
        on_merge: called with each `Merge` before it is done; may raise.
        on_stop_gradient: what a `stop_gradient` of an adapted weight does; see `adapt`.
        key: for dropout, a value of the trace that is under way; None for none.
        probing: whether axes are being found: then values are abstract, and nothing but
            shapes matters.
        reading: whether that is in the body of a call that merges its weights.
        sightings: every use so far.
        frame: the jaxpr that is being evaluated.
        callers: the equations whose rules are under way, the outermost first.
        calls: of jitted functions, by what they are traced for; see `_rules_calls`.
        targets: of the plan whose adapters are run, by path.
    """

    rules: Mapping[str, Rule]
    on_merge: Callable[[Merge], None]
    on_stop_gradient: OnStopGradient = "error"
    key: jax.Array | None = None
    probing: bool = False
    reading: bool = False
    sightings: list[Sighting] = dataclasses.field(default_factory=list)
    frame: Frame = dataclasses.field(default_factory=Frame)
    callers: list[Any] = dataclasses.field(default_factory=list)
    calls: dict[Any, Any] = dataclasses.field(default_factory=dict)
    targets: Mapping[str, Target] = dataclasses.field(default_factory=dict)
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
        """Records a use; `roles` has a word for each axis of the value, or is empty."""
        primitive, where = "output", "the end of the function"
        if equation is not None:
            primitive = equation.primitive.name
            interesting = merged or self.probing
            where = self._where(equation) if interesting else ""
        found = _roles_by_weight(value, roles)
        as_used = self._axes_as_used(value, roles) if roles and self.targets else {}
        for weight, axes in found.items():
            shape, letters = tuple(value.shape), as_used.get(weight, "")
            if letters and letters != self._target(weight).axes:
                # A part of a weight may be one of any axis.
                letters = "" if moved and "indexed" in roles else letters
                where = where or self._where(equation)
            self.record(
                Sighting(weight, shape, primitive, axes, where, merged, letters, moved)
            )

    def _target(self, name: str | int) -> Target:
        return self.targets[self._path(name)]

    def _axes_as_used(self, value: Factored, roles: Sequence[str]) -> dict[Any, str]:
        """The letters of the axes of each weight in a value, as a use of it has them."""
        if "indexed" in roles and "contracted" not in roles:
            roles = [role or "kept" for role in roles]
        ndim = sum(size != 1 for size in value.shape)
        found = {}
        for term in value.terms:
            swapped = term.label.swapped or (False,) * len(term.label.names)
            for name, own in zip(term.label.names, swapped, strict=True):
                sides = _sides(value, term, roles, own)
                letters = _axes.as_used(self._target(name), sides, ndim)
                if letters is not None:
                    found[name] = letters
        return found

    def see_merged(
        self,
        value: Factored,
        equation: Any,
        reason: str,
        roles: Mapping[str | int, Sequence[Mapping[int, str]]],
    ) -> None:
        """Records, while axes are being found, uses in the body of a call that is merged.

        Args:
            value: an operand of the call.
            equation: the call.
            reason: why it is merged.
            roles: of the axes, for each use in the body, by weight.
        """
        where, primitive = self._where(equation), equation.primitive.name
        for weight in value.names:
            for axes in roles.get(weight, ({},)):
                self.record(
                    Sighting(weight, tuple(value.shape), primitive, axes, where, reason)
                )

    def record(self, sighting: Sighting) -> None:
        """Keeps a sighting, and reports it if it is of a merge."""
        self.sightings.append(sighting)
        if sighting.merged and not self.probing:
            self.on_merge(
                Merge(
                    self._path(sighting.name),
                    sighting.shape,
                    sighting.primitive,
                    sighting.merged,
                    sighting.where,
                )
            )

    def merge(self, value: Factored, equation: Any, reason: str) -> jax.Array:
        """The dense value, with a report, unless it is rows of a table, or a vector."""
        if value.gathered or self.is_vector(value):
            return merge(value)
        self.see(value, equation, merged=reason)
        self.check_no_dropout(value)
        return merge(value)

    def check_may_stop(self, value: Factored, equation: Any) -> None:
        """Raises for a `stop_gradient` of adapted weights, unless the user allowed it."""
        if self.on_stop_gradient != "error":
            return
        names = ", ".join(repr(self._path(name)) for name in value.names)
        raise ValueError(
            f"the function stops the gradient of the adapted weight {names} (here of shape "
            f"{tuple(value.shape)}) with `stop_gradient`, at {self._where(equation)}: the "
            "adapter would get no gradient through this use. If only the base weight is "
            "frozen there, set on_stop_gradient='base': the adapter is trained. If nothing "
            "is trained through this use (a target network), set on_stop_gradient='all'."
        )

    def is_vector(self, value: Factored) -> bool:
        """Whether merging a value costs no more than one of its factors.

        With dropout it stays factored all the same, for the product that it is used in.
        """
        thin = bool(value.terms) and not self.probing and value.is_thin()
        return thin and not self.drops(value)

    def drops(self, value: Factored) -> bool:
        """Whether products with the value drop entries of the other operand."""
        return self.key is not None and any(t.label.dropout for t in value.terms)

    def check_no_dropout(self, value: Factored) -> None:
        """Raises for a use that has no input to drop entries of."""
        if self.drops(value):
            raise ValueError(
                f"the adapter of {self._path(value.names[0])!r} has dropout, which a "
                "weight that is merged or summed for a use cannot have: plan it with "
                "dropout=0.0, or leave the weight out with LoraConfig(exclude=...)."
            )

    def _where(self, equation: Any) -> str:
        """The line of the model, and those that called the function it is in.

        JAX traces a function of its own once for all its callers, and keeps the line of
        the first: then only the second of these lines is right.
        """
        lines = _compat.source_lines(equation)
        if self.callers:
            lines += _compat.source_lines(self.callers[0])
        return ", called at ".join(dict.fromkeys(lines))

    def _path(self, name: str | int) -> str:
        """The path of a weight, by what it goes by in here."""
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
        """A new dropout key in each call, or None where there is no dropout.

        Inside `jax.shard_map` the mask of `x` differs between devices where `x` does.
        """
        if self.key is None:
            return None
        self._keys_made += 1
        key = jax.random.fold_in(self.key, self._keys_made)
        for axis in () if x is None else _compat.varying_axes(x):
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        return key

    def dropout(self, label: Label, x: jax.Array) -> tuple[float, jax.Array | None]:
        """The rate at which a product with a term drops entries of `x`, and its key.

        They are 0 and None where nothing is dropped.
        """
        rate = label.dropout if self.key is not None else 0.0
        return rate, self.make_key(x) if rate else None

    @contextlib.contextmanager
    def using_key(self, key: jax.Array | None) -> Iterator[None]:
        """Makes keys from `key`, a value of the trace that starts here."""
        saved = self.key, self._keys_made
        self.key, self._keys_made = key, 0
        try:
            yield
        finally:
            self.key, self._keys_made = saved

    @contextlib.contextmanager
    def aside(self) -> Iterator[list[Sighting]]:
        """Collects what is seen in the body of a call, and records nothing of it."""
        saved = self.sightings, self.reading
        self.sightings, self.reading = [], True
        try:
            yield self.sightings
        finally:
            self.sightings, self.reading = saved

    @contextlib.contextmanager
    def renamed(self, names: Mapping[Any, str | int]) -> Iterator[list[Sighting]]:
        """Collects what is seen of weights that go by other names in here."""
        saved = self.sightings, self._names
        self.sightings, self._names = [], (*self._names, names)
        try:
            yield self.sightings
        finally:
            self.sightings, self._names = saved
