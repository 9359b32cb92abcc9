"""Builds the factored value of each adapted weight.

A weight may have several adapters, one for each adapted part. Their terms are padded with
zeros to the shape of the weight.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._core import compat, numerics, quantized
from lora_jax.lowrank import weight_norms
from lora_jax.plan import layout, parts, stacks
from lora_jax.plan.target import Target
from lora_jax.transform import _norms, _slots
from lora_jax.transform._deferred import Deferred
from lora_jax.transform._factored import RANK, Factor, Factored, Label, Term, place, retyped
from lora_jax.transform._joining import sum_of_parts
from lora_jax.transform._masks import Masks


class Update(NamedTuple):
    """One adapter of a weight, with its target and options.

    Attributes:
        path: of the target.
        target: of the plan.
        by_slot: whether all arrays differ between slots.
        adapter: the arrays of the adapter.
        norm: the column norms, if the caller gave them.
        scale: replaces the target's scale, if the caller gave one.
        magnitude: 0 if the columns keep their length, in a slot without DoRA.
        slots: of the rows, which do not differ between slots.
    """

    path: str
    target: Target
    by_slot: bool
    adapter: dict[str, jax.Array]
    norm: jax.Array | None = None
    scale: Any = None
    magnitude: jax.Array | None = None
    slots: Any = None


def factored(kind: Any, weight: Any, updates: Sequence[Update]) -> Factored:
    """The factored value of a weight, with the sharding of `kind`, the weight's type.

    Factors are split over the mesh axes that split the adapters.
    """
    mesh = compat.mesh_of(kind)
    static = [own[:3] for own in updates]
    arrays = [own[3:] for own in updates]

    def make(weight: Any, arrays: Sequence[Any]) -> Factored:
        made = [
            _with_term(weight, Update(*names, *own))
            for names, own in zip(static, arrays, strict=True)
        ]
        terms = [term for own in made for term in own.terms]
        if _are_of_one_stack([target for _, target, _ in static]):
            terms = [sum_of_parts(terms)]
        columns = [column for own in made for column in own.columns]
        uses = [target.use for _, target, _ in static if target.method == "dora"]
        if not any(uses):
            if len({column.shape for column in columns}) == 1:
                columns = [math.prod(columns[1:], start=columns[0])]
            uses = []
        return Factored(
            _base(weight), tuple(terms), tuple(columns), column_uses=tuple(uses)
        )

    value = compat.automatically(make, mesh, weight, arrays)
    names = compat.explicit_names([v for own in updates for v in own.adapter.values()])
    return retyped(value.replace(base=_base(weight)), kind, names)


def masks_of(value: Factored, updates: Sequence[Update]) -> Masks:
    """Where the terms and columns of `value` act, given the updates it was made from."""
    masks = {own.path: parts.mask(own.target.part, own.target.shape) for own in updates}
    alone = len(value.terms) == len(updates)
    terms = [{path: mask} for path, mask in masks.items()] if alone else [masks]
    columns = [masks[own.path] for own in updates if own.target.method == "dora"]
    if len(columns) != len(value.columns):
        columns = [functools.reduce(np.logical_or, columns)]
    return Masks(tuple(terms), tuple(columns))


def _with_term(weight: Any, update: Update) -> Factored:
    """The weight with one update.

    The factors keep their stored dtype and layout. Only a given scale multiplies `B`, and
    if it differs between slots, only when `B` is used.
    """
    path, target, by_slot, adapter, norm, scale, magnitude, slots = update
    stored = adapter["B"]
    if scale is not None:
        b = jnp.asarray(adapter["B"])
        wide = b.astype(numerics.accumulation_dtype(b.dtype))
        factor = jnp.asarray(scale).astype(wide.dtype)
        ones = [1] * (wide.ndim - factor.ndim)
        adapter = {**adapter, "B": wide * factor.reshape(*factor.shape, *ones)}
        target = dataclasses.replace(target, scale=1.0)
    ndim = len(target.shape)
    a = Factor(*layout.unfolded("A", adapter["A"], target), ndim)
    b = Factor(*layout.unfolded("B", stored if by_slot else adapter["B"], target), ndim)
    b = dataclasses.replace(b, scale=scale if by_slot else None)
    label = Label((path,), target.scale, target.dropout, use=target.use, by_slot=by_slot)
    term = Term(a, b, label)
    base = _base(weight)
    if target.method == "lora":
        return Factored(base, (term,))
    if norm is None:
        form = functools.partial(_norm, weight, target=target)
        norm = _slots.for_each(form, adapter, slots) if by_slot else form(adapter)
    column = weight_norms.factor(adapter["m"], jax.lax.stop_gradient(norm))
    if magnitude is not None:
        column = jnp.where(magnitude > 0, column, jnp.ones_like(column))
    column, axes = layout.unfolded("m", column, target, 1.0)
    return Factored(base, (term,), (place(column, axes, range(ndim)),))


def _norm(weight: Any, adapter: dict[str, jax.Array], target: Target) -> jax.Array:
    """The norms of the columns that a target adapts, constants.

    A dense weight is not copied for a part of it. The layers of a part are taken one at a
    time, as a scan takes them, with the norms of all their columns.
    """
    if not target.part or quantized.is_quantized(weight):
        part = stacks.take(weight, target)
        return _norms.constant_norm(part, adapter, target.alone)
    own = parts.entries(target.part, target.shape)
    batch, outs = target.batch_axes, target.out_axes
    cut = [axis for axis in batch if parts.count(own[axis]) < target.shape[axis]]
    order = (*cut, *(axis for axis in batch if axis not in cut))
    sizes = {RANK: target.rank, **dict(enumerate(map(parts.count, own)))}
    layer = ",".join("0" if i in cut else ":" for i in range(len(target.shape)))
    entry = dataclasses.replace(target, part=f"[{layer}]").alone

    def by_layer(name: str, *axes: int) -> jax.Array:
        """A factor with the cut axes as its first axis, for all outputs."""
        have = (*batch, *axes)
        array = jnp.asarray(adapter[name]).reshape([sizes[axis] for axis in have])
        array = place(array, have, (*order, *axes))
        known = [axis if axis in outs else RANK for axis in (*order, *axes)]
        array = parts.spread(array, known, own, target.shape, 0.0)
        return array.reshape(-1, *entry.adapter_shapes[name])

    def norm(at: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        index, a, b = at
        one = jnp.asarray(weight)
        for i, axis in enumerate(cut):
            one = lax.dynamic_index_in_dim(one, index[i], axis)
        return _norms.constant_norm(lax.squeeze(one, cut), {"A": a, "B": b}, entry)

    indices = [*itertools.product(*(parts.indices_of(own[axis]) for axis in cut))]
    factors = by_layer("A", *target.in_axes, RANK), by_layer("B", RANK, *outs)
    if cut:
        norms = lax.map(norm, (jnp.asarray(indices), *factors))
    else:
        norms = norm((jnp.zeros(0), factors[0][0], factors[1][0]))
    shape = [sizes[axis] for axis in order] + [target.shape[axis] for axis in outs]
    norms = place(norms.reshape(shape), (*order, *outs), (*batch, *outs))
    kept = [*(range(sizes[axis]) for axis in batch), *(own[axis] for axis in outs)]
    norms = parts.take(norms, parts.as_text(kept, norms.shape))
    return norms.reshape(adapter["m"].shape)


def _are_of_one_stack(targets: Sequence[Target]) -> bool:
    """Whether the targets are parts along the same batch axes, with one dropout and use."""
    if len({(target.dropout, target.use) for target in targets}) > 1:
        return False
    cut = {parts.cut_axes(target.part, target.shape) for target in targets}
    return len(cut) == 1 and len(targets) > 1 and {*cut.pop()} <= {*targets[0].batch_axes}


def _base(weight: Any) -> jax.Array | Deferred:
    """The frozen weight of the program: an array, or a deferred quantized weight."""
    if not quantized.is_quantized(weight):
        return jnp.asarray(weight)
    return Deferred((jax.tree.map(jnp.asarray, weight),))


def unadapted(value: Any) -> Any:
    """A value without an adapter; a quantized one becomes a `Factored` without terms."""
    return Factored(_base(value), ()) if quantized.is_quantized(value) else value
