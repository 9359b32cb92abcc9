"""Dense values of factored weights: merges, and sums over axes."""

import math
from collections.abc import Collection, Iterable

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import compat, numerics
from lora_jax.lowrank import contraction
from lora_jax.lowrank.contraction import Name, Named
from lora_jax.transform._deferred import form
from lora_jax.transform._factored import Factored, Term, owned, place


def merge(value: Factored) -> jax.Array:
    """The dense weight, computed in at least float32 and rounded once."""
    base = form(value.base)
    if not value.terms and not value.columns:
        return base
    if value.by_slot:
        raise ValueError(
            "this use of an adapted weight needs the merged weight, and with `adapt_rows` "
            f"each row would have its own ({value.names[0]!r} here has the shape "
            f"{value.shape})."
        )
    kind = jax.typeof(base)
    mesh = compat.mesh_of(kind)
    out = compat.automatically(_merge, mesh, value.replace(base=base))
    return out if compat.is_automatic() else compat.retyped(out, kind.sharding)


def _merge(value: Factored) -> jax.Array:
    dtype = numerics.accumulation_dtype(
        value.dtype, *(p.array.dtype for term in value.terms for p in (term.a, term.b))
    )
    updates = sums_of_terms(value, (), dtype)
    out = numerics.sum_and_round(jnp.asarray(value.base), updates, value.columns)
    return jnp.broadcast_to(out, value.shape)


def sums_of_terms(
    value: Factored, axes: Collection[int], dtype: jnp.dtype
) -> Iterable[jax.Array]:
    """The terms of a value, summed over `axes`, with size 1 for axes that none owns."""
    for term in value.terms:
        yield numerics.multiply(_sum(value, term, axes, dtype), term.label.scale)


def _sum(value: Factored, term: Term, axes: Collection[int], dtype: jnp.dtype) -> jax.Array:
    """`sum_r a[r] * b[r]` without the scale, summed over `axes`."""
    names = tuple((axis,) for axis in range(value.ndim))
    kept = tuple(name for name in names if name[0] not in axes)
    a, b = (owned(value, factor, names) for factor in (term.a, term.b))
    sides = (_alone(a, b, kept, dtype), _alone(b, a, kept, dtype)) if axes else (a, b)
    out = contraction.contract(*sides, kept, dtype, lax.Precision.HIGHEST)
    out = place(out.array, out.names, kept)
    unowned = {(axis,) for axis in axes} - {*a.names, *b.names}
    return out * math.prod(value.shape[axis] for (axis,) in unowned) if unowned else out


def _alone(p: Named, other: Named, kept: Collection[Name], dtype: jnp.dtype) -> Named:
    """A factor, summed over the axes that the other one lacks and the result too."""
    shared = {contraction.RANK, *kept, *other.names}
    gone = [i for i, name in enumerate(p.names) if name not in shared]
    left = tuple(name for name in p.names if name in shared)
    array = p.array.reshape(p.shape).astype(dtype)
    return contraction.named(jnp.sum(array, axis=gone), left)
