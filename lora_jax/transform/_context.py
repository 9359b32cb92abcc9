"""What the evaluation of one program carries with it: keys, uses, and merges."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax

from lora_jax._core import compat
from lora_jax.plan import axis_roles
from lora_jax.plan.adapter_plan import Target
from lora_jax.plan.axis_roles import Side
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


@dataclasses.dataclass
class LookUp:
    """A use that takes some entries of axes of a weight: a row, a column, other orders.

    Whether that is a look-up in a table, whose rows are activations, or a weight that a
    product then multiplies with, is known when what it gave is used.

    Attributes:
        sightings: its sightings, by their numbers.
        rows: whether the axes that it indexes come before all others.
        moved: the axes of weights of which a product said what they are.
        used: whether its result became an activation.
    """

    sightings: range
    rows: bool
    moved: set[tuple[str | int, int | None]] = dataclasses.field(default_factory=set)
    used: bool = False


def _roles_by_weight(
    value: Factored, roles: Sequence[str]
) -> dict[str | int, dict[int, str]]:
    """For each weight in a value, the role of each of its axes that is known.

    Terms that stand for axes know where those are now. An axis of size 1 cannot be told
    from none; it is where it was, if all others are, unless it is one entry of a longer.
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
        looked_up = {term.label.axis for term in value.terms if term.label.lookups}
        for axis, size in enumerate(value.shape):
            if size == 1 and roles[axis] and axis not in looked_up:
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


def _looked_up(value: Factored) -> dict[tuple[str | int, int | None], list[Term]]:
    """The terms of each axis of a weight that was indexed; the last one first."""
    found: dict[tuple[str | int, int | None], list[Term]] = {}
    indexed = {
        (weight, term.label.axis)
        for term in value.terms
        if term.label.lookups
        for weight in term.label.names
    }
    for term in value.terms:
        for weight in term.label.names:
            if (weight, term.label.axis) in indexed:
                found.setdefault((weight, term.label.axis), []).append(term)

    def last(terms: list[Term]) -> int:
        return max(n for term in terms for n in term.label.lookups)

    return dict(sorted(found.items(), key=lambda item: -last(item[1])))


def is_weight(value: Factored, roles: Sequence[str]) -> bool:
    """Whether a product contracts and keeps axes of a value that were never indexed."""
    rest = {
        roles[axis]
        for term in value.terms
        if not term.label.lookups
        for axis in value.owned(term.a)
    }
    return {"contracted", "kept"} <= rest


def _role_of_looked_up(own: set[str], rest: set[str]) -> str:
    """What an axis is that was indexed on its way to a product.

    Args:
        own: the roles of the axes that it became; none if one entry was taken.
        rest: the roles of the other axes of the weight.
    """
    if {"contracted", "kept"} <= rest:  # a matrix without it: experts, layers
        order = ("batch", "kept", "contracted")
    elif "contracted" in rest:  # a column for each index: what is computed of them
        return "contracted" if own == {"contracted"} else "kept"
    else:
        order = ("contracted", "batch", "kept")
    return next((role for role in order if role in own), "")


@dataclasses.dataclass
class Frame:
    """One jaxpr that is being evaluated: its values and the origin of its broadcasts."""

    values: dict[Any, Any] = dataclasses.field(default_factory=dict)
    broadcasts: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def read(self, atom: Any) -> Any:
        """The value of a variable or a literal."""
        return atom.val if isinstance(atom, compat.Literal) else self.values[atom]


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
        targets: of the plan whose adapters are run, by path, as far as their axes are to be
            compared with the uses.
        lookups: when axes are being found, of every weight so far.
        closed_over_is_constant: whether what the function closes over is no data: it has
            other arguments.
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
    lookups: list[LookUp] = dataclasses.field(default_factory=list)
    closed_over_is_constant: bool = False
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
        """Records a use; `roles` has a word for each axis of the value, or is empty."""
        primitive, where = "output", "the end of the function"
        if equation is not None:
            primitive = equation.primitive.name
            interesting = merged or self.probing
            where = self._where(equation) if interesting else ""
        found: dict[str | int, dict[int, str]] = {name: {} for name in value.names}
        if self.probing:
            found = _roles_by_weight(value, roles)
            before = [term.label.merged for term in value.terms if term.label.merged]
            merged = merged or (before[0] if before else "")
        as_used = self._axes_as_used(value, roles) if roles and self.targets else {}
        for weight, axes in found.items():
            shape, letters = tuple(value.shape), as_used.get(weight, "")
            if letters and letters != self.targets[self._path(weight)].axes:
                # A part of a weight may be one of any axis.
                letters = "" if moved and "indexed" in roles else letters
                where = where or self._where(equation)
            self.record(
                Sighting(weight, shape, primitive, axes, where, merged, letters, moved)
            )

    def _axes_as_used(self, value: Factored, roles: Sequence[str]) -> dict[Any, str]:
        """The letters of the axes of each weight in a value, as a use of it has them."""
        if "indexed" in roles and "contracted" not in roles:
            roles = [role or "kept" for role in roles]
        ndim = sum(size != 1 for size in value.shape)
        found = {}
        for term in value.terms:
            swapped = term.label.swapped or (False,) * len(term.label.names)
            for name, own in zip(term.label.names, swapped, strict=True):
                target = self.targets.get(self._path(name))
                if target is None:
                    continue
                sides = _sides(value, term, roles, own)
                letters = axis_roles.as_used(target, sides, ndim)
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

    def add_constants(self, values: Iterable[Any]) -> None:
        """Notes that values depend on no argument of the function, except its weights."""
        self._constants.update((id(value), value) for value in values)

    def is_constant(self, value: Any) -> bool:
        """Whether a value, that is no literal, is known to depend on no argument."""
        return id(value) in self._constants

    def is_constant_atom(self, atom: Any, value: Any) -> bool:
        """The same of an operand of an equation, which may be a literal."""
        return isinstance(atom, compat.Literal) or self.is_constant(value)

    def look_up(
        self,
        value: Factored,
        equation: Any,
        indexed: Sequence[bool],
        *,
        moved: bool = False,
    ) -> Factored:
        """Records that a use takes some entries of these axes; returns the value.

        Its terms know of it when axes are being found.
        """
        start = len(self.sightings)
        roles = ["indexed" if i else "" for i in indexed]
        self.see(value, equation, roles, moved=moved)
        if not self.probing:
            return value
        seen = range(start, len(self.sightings))
        self._see_entries(value, seen)
        rows = not any(i > j for i, j in zip(indexed[1:], indexed[:-1], strict=True))
        number = (len(self.lookups),)
        self.lookups.append(LookUp(seen, rows))

        def noted(term: Term) -> Term:
            if not any(indexed[axis] for axis in value.owned(term.a)):
                return term
            label = dataclasses.replace(term.label, lookups=term.label.lookups + number)
            return dataclasses.replace(term, label=label)

        return value.replace(terms=tuple(map(noted, value.terms)))

    def _see_entries(self, value: Factored, seen: range) -> None:
        """Says of axes of which one entry was taken, before rows of it are, what they are.

        An entry of each is a table; there have to be axes besides those of the look-ups.
        """
        looked_up = _looked_up(value)
        for n in seen:
            sighting = self.sightings[n]
            gone = {
                axis
                for (weight, axis), terms in looked_up.items()
                if weight == sighting.name and not any(value.owned(t.a) for t in terms)
            }
            own = {t.label.axis for t in value.terms if sighting.name in t.label.names}
            if gone and own - gone - set(sighting.roles):
                roles = {**sighting.roles, **dict.fromkeys(gone, "batch")}
                self.sightings[n] = sighting._replace(roles=roles)

    def see_product(
        self, value: Factored, equation: Any, roles: Sequence[str], other: Any = None
    ) -> None:
        """Records a product with a weight, `other` being what it is multiplied with.

        It says what the axes are that were indexed on the way. Rows of a table that are
        multiplied with a constant, or entry by entry, are the activation of that product.
        """
        looked_up = _looked_up(value) if self.probing else {}
        found = _roles_by_weight(value, roles)
        rows = any(self.lookups[n].rows for t in value.terms for n in t.label.lookups)
        by_constant = rows and self.is_constant(other) and not is_weight(value, roles)
        # Without a contraction it is entry by entry, as in a norm of rows.
        if looked_up and (by_constant or "contracted" not in roles):
            self.use_rows(value)
            return
        start, told = len(self.sightings), {}
        self.see(value, equation, roles)
        for (weight, axis), terms in looked_up.items():
            rest = {r for a, r in found[weight].items() if (weight, a) not in looked_up}
            rest |= told.get(weight, set())
            own = {roles[i] for term in terms for i in value.owned(term.a)}
            role = _role_of_looked_up(own, rest)
            if not role:
                continue
            told.setdefault(weight, set()).add(role)
            for term in terms:
                for n in term.label.lookups:
                    self.lookups[n].moved.add((weight, axis))
            for n in range(start, len(self.sightings)):
                if self.sightings[n].name == weight:
                    known = {**self.sightings[n].roles, axis: role}
                    self.sightings[n] = self.sightings[n]._replace(roles=known)

    def see_stacked(self, value: Factored, equation: Any) -> None:
        """Records that a weight is scanned over its first axis, unless that was indexed.

        Then it is a batch axis if a product of what is left says so, and else tokens.
        """
        indexed = any(t.label.lookups and 0 in value.owned(t.a) for t in value.terms)
        roles = ["" if indexed else "stacked"] + [""] * (value.ndim - 1)
        self.see(value, equation, roles, moved=True)

    def use_rows(self, value: Factored) -> None:
        """Notes that what was looked up is an activation from here on."""
        for term in value.terms:
            for n in term.label.lookups:
                self.lookups[n].used = True

    def settle_look_ups(self) -> None:
        """Says of every axis that was indexed for a product alone that it was moved."""
        tables = {
            self.sightings[n].name
            for lookup in self.lookups
            if lookup.rows and lookup.used
            for n in lookup.sightings
        }
        for lookup in self.lookups:
            if lookup.used and lookup.rows:
                continue
            for n in lookup.sightings:
                sighting = self.sightings[n]
                moved = {a for name, a in lookup.moved if name == sighting.name}
                if not lookup.rows and sighting.name in tables:
                    moved = {a for a, role in sighting.roles.items() if role == "indexed"}
                roles = {
                    axis: "moved" if axis in moved and role == "indexed" else role
                    for axis, role in sighting.roles.items()
                }
                self.sightings[n] = sighting._replace(roles=roles)

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
        self.use_rows(value)
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
            "frozen there, set on_stop_gradient='base': the adapter is trained. If the "
            "adapter is not to be trained by this use either (a target network, a "
            "straight-through estimator), set on_stop_gradient='all'."
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
        lines = compat.source_lines(equation)
        if self.callers:
            lines += compat.source_lines(self.callers[0])
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
        key = jax.random.fold_in(compat.as_current(self.key), self._keys_made)
        for axis in () if x is None else compat.varying_axes(x):
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
    def quietly(self) -> Iterator[None]:
        """Evaluates something for its shapes: what is seen there does not count."""
        saved = self.sightings, self.lookups, self.on_merge, self._keys_made
        self.sightings, self.lookups = list(self.sightings), list(self.lookups)
        self.on_merge = lambda merge: None
        try:
            yield
        finally:
            self.sightings, self.lookups, self.on_merge, self._keys_made = saved

    @contextlib.contextmanager
    def renamed(self, names: Mapping[Any, str | int]) -> Iterator[list[Sighting]]:
        """Collects what is seen of weights that go by other names in here."""
        saved = self.sightings, self._names
        self.sightings, self._names = [], (*self._names, names)
        try:
            yield self.sightings
        finally:
            self.sightings, self._names = saved
