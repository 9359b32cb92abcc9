"""Parts and entries of a weight. An *entry* of a stack is one weight, such as a layer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._core import compat, placement, quantized
from lora_jax.plan import parts
from lora_jax.plan.target import Target

Function: TypeAlias = Callable[[jax.Array, dict[str, jax.Array], Target], Any]


def map_entries(
    function: Function,
    weight: Any,
    adapter: Mapping[str, jax.Array],
    target: Target,
    split: int | None = None,
) -> Any:
    """Applies a function to the dense weight, one entry at a time in a quantized stack.

    A stack in the memory of the host is moved to the device one entry at a time, too. If a
    mesh splits the stack, each part of it has one dense entry at a time.

    Args:
        function: takes a dense weight in its own layout, its adapter and the target. Its
            result has the leading batch axes of the weight.
        weight: an array or a quantized weight.
        adapter: some or all entries of the adapter.
        target: of the weight.
        split: how many parts the first axis is split into. By default this is read from
            the weight, which does not show it in a trace on automatic axes.
    """
    adapter = dict(adapter)
    is_stack = quantized.is_quantized(weight) and weight.batch_ndim
    on_host = any(map(compat.is_on_host, jax.tree.leaves(weight)))
    if not (is_stack or on_host) or target.batch_axes[:1] != (0,):
        return function(compat.to_device(quantized.as_dense(weight)), adapter, target)
    entry, n = _entry(target), split or placement.parts(weight)[0]

    def one(of: Any) -> Any:
        return map_entries(function, of[0], of[1], entry)

    def each(*of: Any) -> Any:
        if n == 1:
            return jax.lax.map(one, of)
        cut = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]).swapaxes(0, 1), of)
        out = jax.lax.map(jax.vmap(one), cut)
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), out)

    # JAX maps over a sharded stack on automatic axes only.
    mesh = compat.mesh_of(jax.typeof(jax.tree.leaves(weight)[0]))
    out = compat.automatically(each, mesh, weight, adapter)
    return jax.tree.map(lambda x: compat.replicated(x, mesh), out)


def take(weight: Any, target: Target) -> Any:
    """The part of a weight that a target adapts.

    Entries of a quantized stack stay quantized. Other parts of a quantized weight are
    dense.
    """
    if not target.part:
        return weight
    weight = jax.tree.map(lambda x: _with_whole_axes(x, target), weight)
    if quantized.is_quantized(weight) and weight.batch_ndim:
        (first, *rest) = parts.entries(target.part, target.shape)
        if parts.count(first) < target.shape[0]:
            alone = [first, *map(range, target.shape[1:])]
            cut = parts.as_text(alone, target.shape)
            weight = jax.tree.map(lambda x: parts.take(x, cut), weight)
            gone = isinstance(first, int)
            left = [*rest] if gone else [range(parts.count(first)), *rest]
            shape = target.shape[1:] if gone else (parts.count(first), *target.shape[1:])
            inner = parts.as_text(left, shape)
            return parts.take(quantized.as_dense(weight), inner) if inner else weight
    return parts.take(quantized.as_dense(weight), target.part)


def _with_whole_axes(array: Any, target: Target) -> Any:
    """The array, without explicit mesh axes on the axes that the part cuts."""
    spec = compat.explicit_spec(jnp.asarray(array))
    cut = parts.cut_axes(target.part, target.shape)
    if not any(spec[axis] for axis in cut if axis < len(spec)):
        return array
    kept = [None if axis in cut else own for axis, own in enumerate(spec)]
    return compat.retyped(
        array, NamedSharding(compat.mesh_of(jax.typeof(array)), PartitionSpec(*kept))
    )


def _entry(target: Target) -> Target:
    """The target of one entry of the stack, without the first axis."""

    def behind(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(axis - 1 for axis in axes if axis)

    names = "batch_axes", "in_axes", "out_axes"
    axes = {name: behind(getattr(target, name)) for name in names}
    return dataclasses.replace(target, shape=target.shape[1:], **axes)
