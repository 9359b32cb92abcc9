"""Another adapter for each row of a batch.

`adapt_rows` runs the program under `jax.vmap` over the slots of a stack of adapters. Only
factors and columns differ between slots, so every primitive that moves weights acts on them
as for one adapter. A product collects the factors of all slots, and each row of the
activation uses those of its slot. The result no longer differs between slots.

A product has one of two forms:

- *gathered*: the factors of each row's slot are gathered, and the rows are a batch axis of
  both products. The backward pass gathers them again.
- *dense*: the factors of all slots are multiplied, as one factor with a slot axis beside
  its rank, and between the two products all slots but the row's own are set to zero. It
  costs the products of all slots, but no copy of factors. Used where the rows are in an
  order that only the data know, for convolutions and for groups of experts, and if there
  are few tokens; see `is_dense`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import compat, numerics
from lora_jax._core.source_lines import called_at
from lora_jax.lowrank import contraction
from lora_jax.lowrank.contraction import Name, Named, Names, take
from lora_jax.transform._context import Context
from lora_jax.transform._factored import RANK, SLOT, Factor, Term, from_leading, place
from lora_jax.transform._parameters import parameter
from lora_jax.transform._row_places import Lost, Rows, Taken, has_rows


def of_all(x: jax.Array) -> jax.Array:
    """`(*axes)`, another array in each slot -> `(slots, *axes)`, the same in each slot."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return lax.all_gather(x, compat.SLOTS)

    @jax.custom_batching.custom_vmap  # in a `shard_map`, `all_gather` is for the mesh only
    def collect(slot: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (lax.axis_size(compat.SLOTS), *x.shape))

    @collect.def_vmap
    def _(
        size: int, mapped: Sequence[bool], slot: jax.Array, x: jax.Array
    ) -> tuple[jax.Array, bool]:
        if not mapped[0]:  # another `jax.vmap`, within that over the slots
            return jnp.moveaxis(collect(slot, x), 1, 0), True
        return (x if mapped[1] else jnp.broadcast_to(x, (size, *x.shape))), False

    return collect(lax.axis_index(compat.SLOTS), x)


def for_each(
    function: Callable[[Any], jax.Array], values: Any, slots: jax.Array
) -> jax.Array:
    """Calls a function for one slot after the other; the results differ between slots.

    If there are fewer rows than slots, only for the slots of the rows. Other slots, which
    no row uses, then have ones.
    """
    values = jax.tree.map(of_all, values)
    total = len(jax.tree.leaves(values)[0])
    if len(slots) < total:
        numbers = Own(slots, total).numbers
        values = jax.tree.map(lambda own: take(own, numbers), values)
        found = lax.map(function, values)
        ones = jnp.ones((total, *found.shape[1:]), found.dtype)
        results = ones.at[numbers].set(found, mode="drop")
    else:
        results = lax.map(function, values)
    return results[lax.axis_index(compat.SLOTS)]


class Own(NamedTuple):
    """The slot of each entry along some axes.

    Attributes:
        ids: the slots, `(*axes)`: -1 for the base alone.
        total: the number of slots.
    """

    ids: jax.Array
    total: int

    @property
    def numbers(self) -> jax.Array:
        """The slots for `contraction.take`; `total` for no slot."""
        return jnp.where(self.ids < 0, self.total, self.ids)

    def scales(self, of_slots: jax.Array) -> jax.Array:
        """`(slots,)` -> `(*axes)`: 0 for the base alone, NaN for a slot out of range."""
        wrong = (self.ids < -1) | (self.ids >= self.total)
        return jnp.where(wrong, jnp.nan, take(of_slots, self.numbers))

    def mask(self, of_slots: jax.Array) -> jax.Array:
        """`(slots,)` -> `(*axes, slots)`: the scale of the own slot, 0 for all others."""
        scales, shape = self.scales(of_slots), (*self.ids.shape, self.total)
        slots = lax.broadcasted_iota(self.ids.dtype, shape, self.ids.ndim)
        mine = (self.ids[..., None] == slots) | jnp.isnan(scales)[..., None]
        return jnp.where(mine, scales[..., None], 0.0)

    def columns(self, of_slots: jax.Array) -> jax.Array:
        """`(slots, *shape)` -> `(*axes, *shape)`: 1 for the base alone."""
        return take(of_slots, self.numbers, 1.0)


class RowAxes(NamedTuple):
    """Where the rows are in a product with a weight.

    An axis of the activation that holds rows and other indices is split into one for each.

    Attributes:
        names: of the axes that hold rows.
        own: the slots, with these axes.
        dense: whether the product has the dense form.
        parts: for each axis of the activation that is split, the names and sizes.
    """

    names: Names
    own: Own
    dense: bool
    parts: dict[Name, tuple[tuple[Name, int], ...]]

    def split(self, names: Names, shape: Sequence[int]) -> tuple[Names, tuple[int, ...]]:
        """The names and sizes of axes, those with rows split."""
        found: list[tuple[Name, int]] = []
        for name, size in zip(names, shape, strict=True):
            found += self.parts.get(name, ((name, size),))
        return tuple(name for name, _ in found), tuple(size for _, size in found)

    def column(self, column: Named) -> Named:
        """A column for each row."""
        array = of_all(column.array)
        shared = [name for name in self.names if name in column.names]
        if not shared:
            array = self.own.columns(array)
            return contraction.named(array, (*self.names, *column.names))
        # The rows are along a batch axis of the weight: experts, layers.
        at = 1 + column.names.index(shared[0])
        axis = self.names.index(shared[0])
        array = jax.vmap(
            lambda ids, own: Own(ids, self.own.total).columns(own), (axis, at), axis
        )(self.own.ids, array)
        rest = (name for name in column.names if name != shared[0])
        return contraction.named(array, (*self.names, *rest))


def row_axes(
    context: Context,
    equation: Any,
    position: int,
    x_names: Names,
    weight_names: Names,
    out_names: Names,
) -> RowAxes:
    """Where the rows are in the activation at a position among the operands.

    Raises:
        ValueError: if the rows cannot be followed to it, or the product sums over them.
    """
    place = place_of(context, equation, position)
    ids = _ids(context)
    count = context.n_slots
    if len(ids) == 1:
        return RowAxes((), Own(ids[0], count), False, {})
    if isinstance(place, Taken):
        name = x_names[place.axis]
        _check_kept(context, equation, (name,), out_names)
        own = Own(context.taken[place.number], count)
        return RowAxes((name,), own, True, {})
    parts: dict[Name, tuple[tuple[Name, int], ...]] = {}
    rows: list[tuple[int, Name, int]] = []
    held = tuple(n for n, own in zip(x_names, place.axes, strict=True) if has_rows(own))
    _check_kept(context, equation, held, out_names)
    shape = equation.invars[position].aval.shape
    if {*held} & {*weight_names}:  # the rows are along a batch axis of the weight
        whole = ids_like(context, place, shape)
        whole = whole.reshape(
            [n for n, own in zip(shape, place.axes, strict=True) if has_rows(own)]
        )
        return RowAxes(tuple(held), Own(whole, count), True, {})
    for name, atoms in zip(x_names, place.axes, strict=True):
        if name not in held:
            continue
        own = [name] if len(atoms) == 1 else [((*name, i),) for i in range(len(atoms))]
        named = list(zip(own, atoms, strict=True))
        if len(atoms) > 1:
            parts[name] = tuple((part, atom.size) for part, atom in named)
        rows += [(atom.stride, part, atom.size) for part, atom in named if atom.stride]
    rows.sort(key=lambda row: -row[0])
    ids = ids.reshape([size for *_, size in rows])
    tokens = math.prod(
        n for n, name in zip(shape, x_names, strict=True) if name in out_names
    )
    dense = is_dense(count, context.n_rows, tokens)
    return RowAxes(tuple(name for _, name, _ in rows), Own(ids, count), dense, parts)


def is_dense(slots: int, rows: int, tokens: int) -> bool:
    """Whether a product has the dense form: for few tokens in all, and few slots for them.

    The gathered form copies the factors of each row. The dense form reads those of each
    slot, and multiplies all tokens by them. The numbers were measured on a CPU.
    """
    return slots * (12 + tokens) < 20 * rows


def own_along(context: Context, equation: Any, position: int, axis: int) -> Own:
    """The slot of each entry along one axis of an operand, `(size,)`.

    Raises:
        ValueError: if the rows are not along this axis, or cannot be followed.
    """
    place, ids = place_of(context, equation, position), _ids(context)
    size = equation.invars[position].aval.shape[axis]
    if len(ids) == 1:
        return Own(jnp.broadcast_to(ids, [size]), context.n_slots)
    whole = ids_like(context, place, equation.invars[position].aval.shape)
    if whole.size != whole.shape[axis]:
        refuse(context, equation, "the rows are not along the axis that it keeps")
    return Own(whole.reshape(-1), context.n_slots)


def of_result(context: Context, equation: Any, position: int) -> Own | None:
    """The slot of each entry of the result, given the operand that may have rows.

    With size 1 along axes without rows. None if the operand is the same for all rows.

    Raises:
        ValueError: if the rows cannot be followed to the operand.
    """
    if context.n_rows > 1 and context.frame.place(equation.invars[position]) is None:
        return None
    place_of(context, equation, position)
    (out,) = equation.outvars
    ids = ids_like(context, context.frame.place(out), out.aval.shape)
    return Own(ids, context.n_slots)


def taken(context: Context, equation: Any, indices: jax.Array) -> jax.Array:
    """The slots of what a `gather` takes along the axis of the rows, `(entries,)`."""
    (axis,) = parameter(equation, "dimension_numbers").start_index_map
    whole = ids_like(
        context, context.frame.place(equation.invars[0]), equation.invars[0].aval.shape
    )
    count = equation.invars[0].aval.shape[axis]
    # A gather clips indices, or fills what is out of range, which then has no own row.
    indices = jnp.clip(indices.reshape(-1), 0, count - 1)
    return whole.reshape(-1)[indices]


def rename_taken(context: Context, equation: Any, body: Any) -> None:
    """Copies the slots of rows that a call has taken to their numbers outside of it."""
    inside = context.frame.followed.inside(equation, body).outputs
    for own, atom in zip(inside, equation.outvars, strict=True):
        if isinstance(own, Taken) and own.number in context.taken:
            outside = context.frame.place(atom)
            context.taken[outside.number] = context.taken[own.number]


def ids_like(context: Context, place: Any, shape: Sequence[int]) -> jax.Array:
    """The slot of each entry of a value, with size 1 along axes without rows."""
    ids = _ids(context)
    if len(ids) == 1:
        return ids.reshape([1] * len(shape))
    if isinstance(place, Taken):
        own = context.taken[place.number]
        return own.reshape([-1 if i == place.axis else 1 for i in range(len(shape))])
    atoms = [atom for axis in place.axes for atom in axis]
    strided = sorted((a for a in atoms if a.stride), key=lambda atom: -atom.stride)
    ids = ids.reshape([atom.size for atom in strided])
    order = [strided.index(atom) for atom in atoms if atom.stride]
    ids = lax.transpose(ids, order)
    wide = ids.reshape([atom.size if atom.stride else 1 for atom in atoms])
    owning = [any(atom.stride for atom in axis) for axis in place.axes]
    full = [
        atom.size if owns else 1
        for axis, owns in zip(place.axes, owning, strict=True)
        for atom in axis
    ]
    whole = jnp.broadcast_to(wide, full)
    return whole.reshape([n if owns else 1 for n, owns in zip(shape, owning, strict=True)])


def place_of(context: Context, equation: Any, position: int) -> Any:
    """Where the rows are in an operand.

    Raises:
        ValueError: if they cannot be followed to it.
    """
    place = context.frame.place(equation.invars[position])
    known = isinstance(place, Rows) or (
        isinstance(place, Taken) and place.number in context.taken
    )
    if context.n_rows == 1 or known:
        return place
    reason = "its other operand is the same for all rows, or mixes them"
    if isinstance(place, Lost):
        reason = f"the rows of its other operand are lost: {place.reason}, at {place.where}"
    elif isinstance(place, Taken):
        reason = "the rows of its other operand were reordered inside of a loop or a call"
    refuse(context, equation, reason)


def refuse(context: Context, equation: Any, reason: str) -> NoReturn:
    """Raises an error: an adapted weight is used without rows."""
    where = called_at(equation, context.callers)
    raise ValueError(
        f"`{equation.primitive.name}` at {where} uses an adapted weight, and {reason}. "
        "`adapt_rows` must know which row each entry belongs to. State in in_axes which "
        "axis of each argument has the rows, leave the weight out, or call `adapt` for "
        "each adapter."
    )


def _check_kept(context: Context, equation: Any, names: Names, out_names: Names) -> None:
    if not set(names) <= set(out_names):
        refuse(context, equation, "it sums over the rows")


def _ids(context: Context) -> jax.Array:
    return compat.as_current(context.slots)


def collect(term: Term, own: Own, *, dense: bool) -> tuple[Term, jax.Array]:
    """A term with the factors of all slots, for either form of a product.

    Returns:
        The term, with the slots as the first axis of its factors. And the scale of each
        row, `(*axes of own)`; for the dense form `(*axes of own, slots)`, 0 for slots that
        are not the own one.
    """
    scale: Any = 1.0
    for factor in (term.a, term.b):
        scale = scale if factor.scale is None else scale * factor.scale
    scales = of_all(jnp.asarray(scale, numerics.accumulation_dtype(term.b.stored.dtype)))

    def collected(factor: Factor) -> Factor:
        return Factor(of_all(factor.stored), (SLOT, *factor.axes), factor.ndim)

    term = term.map(collected)
    if not dense:
        return term, own.scales(scales)
    # 0 * NaN is NaN: without this, one slot that diverged would reach the rows of others.
    finite = [_is_finite(factor.stored) for factor in (term.a, term.b)]
    scales = jnp.where(finite[0] & finite[1], scales, jnp.nan)

    def cleaned(factor: Factor) -> Factor:
        shape = [-1] + [1] * (factor.stored.ndim - 1)
        known = (finite[0] & finite[1]).reshape(shape)
        zeros = jnp.zeros_like(factor.stored)
        return dataclasses.replace(factor, stored=jnp.where(known, factor.stored, zeros))

    return term.map(cleaned), own.mask(scales)


def _is_finite(x: jax.Array) -> jax.Array:
    """`(slots, *axes)` -> `(slots,)`."""
    return jnp.all(jnp.isfinite(x), axis=range(1, x.ndim))


def widened(term: Term, own: Own) -> tuple[Term, jax.Array]:
    """A term whose rank has the ranks of all slots, slot after slot, for the dense form.

    Returns:
        The term, and the scale of each entry along the rank, `(*axes of own, rank)`: 0 for
        the ranks of other slots.
    """
    rank = term.a.rank
    term, mask = collect(term, own, dense=True)

    def wide(factor: Factor) -> Factor:
        order = (SLOT, RANK, *range(factor.ndim))
        array = place(factor.stored, factor.axes, order)
        return from_leading(array.reshape(-1, *array.shape[2:]))

    return term.map(wide), jnp.repeat(mask, rank, axis=-1)


def masked(x: jax.Array, scales: jax.Array | None) -> jax.Array:
    """`x * scales`; 0 where the scale is 0, whatever `x` is there."""
    if scales is None:
        return x
    return jnp.where(scales == 0, jnp.zeros_like(x), x * scales.astype(x.dtype))
