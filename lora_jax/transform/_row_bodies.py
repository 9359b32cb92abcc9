"""Follows the rows of a batch through equations that have bodies, and between devices.

A rule gets the analysis of the jaxpr, an equation and the places of its operands, and
returns the places of the results.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lora_jax._core import compat
from lora_jax.transform._parameters import parameter
from lora_jax.transform._row_places import (
    Atom,
    Lost,
    NotFollowedError,
    Place,
    Rows,
    Taken,
    held,
    merged,
    whole,
)
from lora_jax.transform._rules_loops import scan_counts


class Cut(NamedTuple):
    """How a loop over rows divides their numbers: `(outer, length, inner)`."""

    outer: int
    length: int
    inner: int


def _either(first: Place, second: Place, reason: str) -> Place:
    """The place of a value that is one or the other."""
    if first is None or second is None or first == second:
        return first or second
    if isinstance(first, Lost) or isinstance(second, Lost):
        return first if isinstance(first, Lost) else second
    raise NotFollowedError(reason)


def _joined(
    followed: Any, equation: Any, first: Any, second: Any, reason: str
) -> list[Place]:
    return _attempt(followed, equation, lambda a, b: _either(a, b, reason), first, second)


def _attempt(
    followed: Any, equation: Any, rule: Callable[..., Place], *values: Sequence[Any]
) -> list[Place]:
    """The places by a rule; those that it cannot follow are lost."""
    out = []
    for own in zip(*values, strict=True):
        try:
            out.append(rule(*own))
        except NotFollowedError as error:
            out.append(followed.lost(equation, str(error)))
    return out


def _from_outside(
    followed: Any, equation: Any, inputs: Sequence[Place], outputs: Sequence[Place]
) -> list[Place]:
    """The outputs of a body that may run several times, or not at all."""
    known = {place.number for place in inputs if isinstance(place, Taken)}
    return [
        followed.lost(equation, "returns rows in an order that its body determines")
        if isinstance(place, Taken) and place.number not in known
        else place
        for place in outputs
    ]


def _each(followed: Any, equation: Any, places: list[Place]) -> list[Place]:
    return places


def _call(followed: Any, equation: Any, places: Sequence[Place]) -> list[Place]:
    """The outputs of a body; rows that are taken inside get numbers of their own."""
    body = compat.body_of(equation)
    if body is None:
        raise NotFollowedError("has no body in which rows could be followed")
    known = {place.number for place in places if isinstance(place, Taken)}
    numbers = {number: number for number in known}
    out = followed.enter(equation, body[0], places, fixed=equation.invars).outputs
    return [
        place._replace(number=numbers.setdefault(place.number, followed.new_number()))
        if isinstance(place, Taken)
        else place
        for place in out
    ]


def _linear_solve(followed: Any, equation: Any, places: Sequence[Place]) -> list[Place]:
    """Follows rows through the solver and the products, each with operands of its own."""
    lengths, solvers = (parameter(equation, name) for name in ("const_lengths", "jaxprs"))
    right, start, outputs = places[sum(lengths) :], 0, []
    for name in lengths._fields:
        stop, jaxpr = start + getattr(lengths, name), getattr(solvers, name)
        if jaxpr is not None:
            inside = followed.enter(equation, jaxpr, [*places[start:stop], *right])
            outputs = inside.outputs if name == "solve" else outputs
        start = stop
    return _from_outside(followed, equation, places, outputs)


def _cond(followed: Any, equation: Any, places: Sequence[Place]) -> list[Place]:
    index, *operands = places
    out: list[Place] = [None] * len(equation.outvars)
    for branch in parameter(equation, "branches"):
        inside = followed.enter(equation, branch, operands, fixed=equation.invars[1:])
        found = inside.outputs
        found = _from_outside(followed, equation, operands, found)
        reason = "has branches that return rows along different axes"
        out = _joined(followed, equation, out, found, reason)
    return [place or (index if isinstance(index, Lost) else None) for place in out]


_CARRY = "changes the axes of its carry that hold rows"


def _while(followed: Any, equation: Any, places: Sequence[Place]) -> list[Place]:
    n_condition, n_body = (
        parameter(equation, name) for name in ("cond_nconsts", "body_nconsts")
    )
    for_condition, rest = places[:n_condition], places[n_condition:]
    fixed, carry, before = rest[:n_body], rest[n_body:], None
    body = parameter(equation, "body_jaxpr")
    constants = equation.invars[n_condition:][:n_body]
    while carry != before:
        before = carry
        inside = followed.enter(equation, body, [*fixed, *carry], fixed=constants)
        found = _from_outside(followed, equation, rest, inside.outputs)
        carry = _joined(followed, equation, carry, found, _CARRY)
    followed.enter(equation, parameter(equation, "cond_jaxpr"), [*for_condition, *carry])
    return list(carry)


def _scan(followed: Any, equation: Any, places: Sequence[Place]) -> list[Place]:
    """A scan along an axis without rows, or over groups of rows."""
    body, _ = compat.open_jaxpr(parameter(equation, "jaxpr"))
    n_fixed, n_carry = scan_counts(equation, body)
    n_before, length = n_fixed + n_carry, parameter(equation, "length")
    cuts = (_cut(followed, place, length) for place in places[n_before:])
    cut = next((cut for cut in cuts if cut), None)
    n_rows = followed.n_rows
    outer = list(places[:n_before])
    if cut:
        followed.scanned[id(equation)], n_rows = cut, followed.n_rows // length
        outer = _without_rows(followed, equation, outer)
    fixed, carry, before, found = outer[:n_fixed], outer[n_fixed:], None, []
    xs = _attempt(
        followed, equation, lambda x: _entry(followed, x, length, cut), places[n_before:]
    )
    while carry != before:
        before = carry
        inside = followed.enter(
            equation, body, [*fixed, *carry, *xs], n_rows, fixed=equation.invars[:n_fixed]
        )
        found = _from_outside(followed, equation, [*outer, *xs], inside.outputs)
        if cut:
            found[:n_carry] = _without_rows(followed, equation, found[:n_carry])
        carry = _joined(followed, equation, carry, found[:n_carry], _CARRY)
    results = zip(equation.outvars[n_carry:], found[n_carry:], strict=True)
    ys = [_stacked(atom.aval.shape, place, cut, length) for atom, place in results]
    return [*carry, *ys]


def _without_rows(followed: Any, equation: Any, places: Sequence[Place]) -> list[Place]:
    """The places of constants and carries of a loop over rows."""
    reason = "runs over groups of rows, and all of them use a value with rows"
    return [
        followed.lost(equation, reason) if isinstance(place, Rows | Taken) else place
        for place in places
    ]


def _cut(followed: Any, place: Place, length: int) -> Cut | None:
    """How a scan over a value cuts the rows; None if it does not, or mixes them."""
    if not isinstance(place, Rows) or len(place.axes[0]) != 1:
        return None
    ((_, inner),) = place.axes[0]
    return Cut(followed.n_rows // (length * inner), length, inner) if inner else None


def _entry(followed: Any, place: Place, length: int, cut: Cut | None) -> Place:
    """The place of one entry along the first axis."""
    if isinstance(place, Taken):
        if place.axis == 0 or cut:
            raise NotFollowedError("runs over rows in an order that the data determine")
        return place._replace(axis=place.axis - 1)
    if not isinstance(place, Rows):
        return place
    if _cut(followed, place, length) != cut or (cut is None and held(place.axes[:1])):
        raise NotFollowedError("runs over a part of an axis that holds rows")
    return _renumbered(place.axes[1:], cut, lambda stride, cut: stride // cut.length)


def _renumbered(axes: Any, cut: Cut | None, change: Callable[[int, Cut], int]) -> Rows:
    """Strides of the rows outside the ones of an entry are changed."""
    if cut is None:
        return Rows(axes)

    def renumber(atom: Atom) -> Atom:
        if atom.stride is None or atom.stride < cut.inner:
            return atom
        return Atom(atom.size, change(atom.stride, cut))

    return Rows(tuple(merged(map(renumber, atoms)) for atoms in axes))


def _stacked(shape: Sequence[int], place: Place, cut: Cut | None, length: int) -> Place:
    """The place of the stacked results of a scan."""
    if cut and cut.outer * cut.inner == 1 and not isinstance(place, Lost):
        return Rows(whole(shape, {0: (Atom(length, 1),)}))  # each is of one row
    if isinstance(place, Taken):
        return place._replace(axis=place.axis + 1)
    if not isinstance(place, Rows):
        return place
    first = merged([(length, cut.inner if cut else None)])
    rows = _renumbered(place.axes, cut, lambda stride, cut: stride * cut.length)
    return Rows((first, *rows.axes))


def _shard_map(followed: Any, equation: Any, places: Sequence[Place]) -> list[Place]:
    """The rows may be split along the first atom of one axis."""
    sizes = dict(parameter(equation, "mesh").shape)
    in_specs, out_specs = (
        [_Spec(spec, sizes) for spec in parameter(equation, f"{way}_specs")]
        for way in ("in", "out")
    )
    split = next(filter(None, map(_split_by, places, in_specs)), ())
    parts = math.prod(sizes[name] for name in split)
    if followed.n_rows % parts:
        raise NotFollowedError("does not split the rows into consecutive groups")
    inside = _attempt(
        followed, equation, lambda p, s: _shard(followed, p, s, split), places, in_specs
    )
    jaxpr, n_rows = parameter(equation, "jaxpr"), followed.n_rows // parts
    body = followed.enter(equation, jaxpr, inside, n_rows, (*followed.split, *split))
    followed.specs[id(equation)] = split
    outputs = _from_outside(followed, equation, inside, body.outputs)
    shapes = [atom.aval.shape for atom in equation.outvars]

    def unshard(shape, place, spec):
        return _unshard(shape, place, spec, split, n_rows)

    return _attempt(followed, equation, unshard, shapes, outputs, out_specs)


class _Spec:
    """The mesh axes that split each axis of a value."""

    def __init__(self, spec: Sequence[Any], sizes: dict[str, int]):
        entries = [axes if isinstance(axes, tuple) else (axes,) for axes in spec]
        self._names = [
            tuple(name for name in entry if sizes.get(name, 1) > 1) for entry in entries
        ]
        self._sizes = sizes

    def names(self, axis: int) -> tuple[str, ...]:
        """The mesh axes that split an axis; without those of size 1."""
        return self._names[axis] if axis < len(self._names) else ()

    def parts(self, axis: int) -> int:
        """Into how many parts an axis is split."""
        return math.prod(self._sizes[name] for name in self.names(axis))


def _split_by(place: Place, spec: _Spec) -> tuple[str, ...]:
    """The mesh axes that split the rows of a value."""
    rows = held(place.axes) if isinstance(place, Rows) else {}
    names = (spec.names(axis) for axis, (first, *_) in rows.items() if first.stride)
    return next(filter(None, names), ())


def _shard(followed: Any, place: Place, spec: _Spec, split: tuple[str, ...]) -> Place:
    """The place of each shard of a value."""
    if isinstance(place, Taken) and (split or spec.names(place.axis)):
        raise NotFollowedError("splits rows in an order that the data determine")
    if not isinstance(place, Rows):
        return place
    axes, found = [], ()
    for axis, atoms in enumerate(place.axes):
        if (parts := spec.parts(axis)) > 1:
            first, *minor = atoms
            is_outer = first.stride is None or first.stride * first.size == followed.n_rows
            if first.size % parts or not is_outer:
                raise NotFollowedError("does not split the rows into consecutive groups")
            found = found if first.stride is None else spec.names(axis)
            atoms = merged([(first.size // parts, first.stride), *minor])
        axes.append(atoms)
    if found != split:
        raise NotFollowedError("splits the rows of some values, and not those of others")
    return Rows(tuple(axes))


def _unshard(
    shape: Sequence[int], place: Place, spec: _Spec, split: tuple[str, ...], n_rows: int
) -> Place:
    """The place of a result, given that of its shards, each of `n_rows` rows."""
    if isinstance(place, Taken) and spec.names(place.axis):
        raise NotFollowedError("joins rows in an order that the data determine")
    all_axes = range(len(shape))
    at = next((axis for axis in all_axes if split and spec.names(axis) == split), None)
    if isinstance(place, Rows):
        axes = place.axes
    elif place is None and n_rows == 1 and at is not None:
        local = [size // spec.parts(axis) for axis, size in enumerate(shape)]
        axes = whole(local, {})
    else:
        return place
    used = [name for axis in all_axes for name in spec.names(axis) if name in split]
    if split and (at is None or len(used) != len(split)):
        raise NotFollowedError("does not join the rows that it has split")
    return Rows(
        tuple(
            merged([(spec.parts(axis), n_rows if axis == at else None), *atoms])
            for axis, atoms in enumerate(axes)
        )
    )


_SUMS = frozenset(
    {
        *("pmax", "pmin", "psum", "psum2", "psum_invariant", "unreduced_pmax"),
        *("unreduced_pmin", "unreduced_psum"),
    }
)
EXCHANGES = frozenset(
    {
        *("all_gather", "all_gather_invariant", "all_gather_reduced", "all_to_all"),
        *("pbroadcast", "pbroadcast_dynamic", "ppermute", "ragged_all_to_all"),
        *("reduce_scatter", "unreduced_reduce_scatter"),
    }
)


def _collective(followed: Any, equation: Any, places: Sequence[Place]) -> list[Place]:
    """Sums over all mesh axes that split the rows mix them; other exchanges lose them."""
    is_sum = equation.primitive.name in _SUMS
    names = parameter(equation, "axes", "axis_name")
    over = set(followed.split) & set(names if isinstance(names, tuple) else (names,))
    if over and not (is_sum and over == set(followed.split)):
        raise NotFollowedError("exchanges rows between devices")
    if not is_sum:
        return followed.moved(equation, places)
    return [place if isinstance(place, Lost) or not over else None for place in places]


_CALLED = (
    *("call_hi_primitive", "checkpoint", "closed_call", "composite", "compute_on"),
    *("core_call", "custom_jvp_call", "custom_vjp_call", "custom_vmap_call", "eval_jaxpr"),
    *("jit", "pjit", "remat2"),
)
_MOVED_TOGETHER = ("device_put", "optimization_barrier", "pcast", "pvary")
RULES: dict[str, Callable[[Any, Any, list[Place]], Sequence[Place]]] = {
    **dict.fromkeys(_CALLED, _call),
    **dict.fromkeys(_MOVED_TOGETHER, _each),
    **dict.fromkeys(_SUMS | EXCHANGES, _collective),
    "cond": _cond,
    "custom_linear_solve": _linear_solve,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
