"""Shardings of weights, dense and quantized, and of what is derived from them."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax._core import compat, quantized
from lora_jax._core.quantized import is_quantized

T = TypeVar("T")


def keep_sharding(function: Callable[[jax.Array], tuple[Any, T]], weight: jax.Array) -> Any:
    """Applies a function to a weight and shards the result as the weight is sharded.

    The function returns a pair: the weight in another form (an array of the same shape, or
    a quantized tensor, whose arrays are sharded by its `array_specs`), and any other value.
    On a mesh with explicit axes, the axes are automatic inside the function. A weight in
    the memory of the host is moved to its devices, and the result back.
    """
    place = getattr(weight, "sharding", None)
    here = on_device(weight)
    spec = compat.explicit_spec(here)
    if any(spec):
        with compat.on_mesh_of(here):
            whole: Any = jax.sharding.auto_axes(function, out_sharding=PartitionSpec())
            sizes = jax.typeof(here).sharding.mesh.shape
            out: Any = (
                _specs(jax.eval_shape(whole, here)[0], spec, sizes),
                PartitionSpec(),
            )
            inner: Any = jax.sharding.auto_axes(function, out_sharding=out)
            stored, rest = jax.jit(inner)(here)
        if here is weight:
            return stored, rest
    else:
        stored, rest = function(here)
    places = shardings(stored, place)
    if places is None and here is not weight:
        places = place
    return stored if places is None else jax.device_put(stored, places), rest


def automatic(
    function: Callable[[Any], jax.Array], value: Any, *, like: jax.Array, ndim: int
) -> jax.Array:
    """`function(value)`, an array of `ndim` axes, with all mesh axes automatic inside it.

    The leading axes of the result are sharded like the axes of the array `like`.
    """
    spec = compat.explicit_spec(like)
    if not any(spec):
        return function(value)
    mesh = compat.mesh_of(jax.typeof(like))
    dense = compat.automatically(function, mesh, value)
    return compat.retyped(dense, NamedSharding(mesh, PartitionSpec(*_padded(spec, ndim))))


def as_abstract(value: Any) -> Any:
    """The shape, dtype and explicit sharding of a quantized weight.

    Inside `jax.shard_map` also the mesh axes over which it varies. Any other value is
    returned unchanged.
    """
    kind = quantized.as_abstract(value)
    if kind is value:
        return value
    array, n = value.array_with_axes()
    mesh = compat.mesh_of(jax.typeof(array))
    if compat.has_explicit_axes(mesh):
        spec = _padded(compat.explicit_spec(array)[:n], value.ndim)
        kind = kind.update(sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    return compat.varying_as(kind, array)


def varying_with(weight: T, *others: Any) -> T:
    """A weight whose arrays may all vary over the mesh axes over which one of them does.

    So may arrays of `others`: then a weight with their update has the type of this one.
    """
    arrays = [x for x in jax.tree.leaves((weight, others)) if isinstance(x, Tracer)]
    axes = {axis for x in arrays for axis in compat.varying_axes(x)}
    if not axes:
        return weight
    return jax.tree.map(lambda x: compat.as_varying(jnp.asarray(x), axes), weight)


def as_dense(value: Any) -> Any:
    """A quantized weight as a dense array without a gradient.

    Any other value is returned unchanged. On a mesh with explicit axes the type of the
    array has the sharding that `as_abstract` returns.
    """
    sharding = getattr(as_abstract(value), "sharding", None)
    if not is_quantized(value) or sharding is None:
        return quantized.as_dense(value)
    dense = compat.automatically(quantized.as_dense, sharding.mesh, value)
    return compat.retyped(dense, sharding)


def shardings(stored: Any, sharding: Any) -> Any:
    """The sharding of each array of a weight, derived from the dense weight's; or None."""
    if not isinstance(sharding, NamedSharding):
        return None
    place = functools.partial(NamedSharding, memory_kind=sharding.memory_kind)
    specs = _specs(stored, sharding.spec, sharding.mesh.shape)
    return jax.tree.map(
        lambda spec: place(sharding.mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def sharding_of(weight: Any) -> NamedSharding | None:
    """The sharding of a weight; of a quantized one, derived from its arrays.

    Args:
        weight: an array or a `jax.ShapeDtypeStruct`, or a quantized weight of either.

    Returns:
        The sharding; None if the weight lies on no mesh, or that is not known in a trace.

    Raises:
        TypeError: if an array of several devices has another kind of sharding.
    """
    sharding = _sharding(weight)
    if sharding is None or isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return None
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"the weight must have a jax.sharding.NamedSharding, which names the axes of a "
            f"mesh, got {sharding}: put it there with jax.device_put."
        )
    return sharding


def _sharding(weight: Any) -> Any:
    """The sharding of a weight, of any kind; None if there is none, or it is not known."""
    array, ndim = weight, len(weight.shape)
    n = ndim
    if is_quantized(weight):
        array, n = weight.array_with_axes()
    if isinstance(array, Tracer):
        sharding: Any = jax.typeof(array).sharding
        if not any(sharding.spec):
            return None
    else:
        sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return sharding
    own = axes_of(sharding, len(array.shape))[:n]
    return sharding.update(spec=as_spec([*own, *[()] * (ndim - n)]))


def axes_of(sharding: NamedSharding, ndim: int) -> tuple[tuple[str, ...], ...]:
    """The names of the mesh axes that split each axis of an array."""
    return tuple(
        () if not isinstance(own, str | tuple) else (own,) if isinstance(own, str) else own
        for own in _padded(sharding.spec, ndim)
    )


def as_spec(axes: Iterable[tuple[str, ...]]) -> PartitionSpec:
    """The spec of which `axes_of` returns the axes."""
    return PartitionSpec(
        *(own[0] if len(own) == 1 else own or None for own in map(tuple, axes))
    )


def names_of_axes(
    name: str, axes: str | Sequence[str], mesh_axes: Sequence[Any]
) -> tuple[str, ...]:
    """Checks names of mesh axes that a caller gave.

    Raises:
        TypeError: if they are not names.
        ValueError: if the mesh lacks one.
    """
    names = (axes,) if isinstance(axes, str) else axes
    if not isinstance(names, Sequence) or not all(isinstance(own, str) for own in names):
        raise TypeError(
            f"{name} must be names of mesh axes, such as ('data', 'fsdp'), got {axes!r}."
        )
    for own in names:
        if own not in mesh_axes:
            raise ValueError(
                f"{name} has {own!r}, which is no axis of the mesh: its axes are "
                f"{', '.join(map(repr, mesh_axes))}."
            )
    return tuple(names)


def same_mesh(first: Any, second: Any) -> bool:
    """Whether two meshes have the same devices in the same order, with the same names.

    Types of axes may differ.
    """
    names = first.axis_names == second.axis_names and first.shape == second.shape
    both = isinstance(first, Mesh) and isinstance(second, Mesh)
    return names and (not both or bool((first.devices == second.devices).all()))


def bytes_on_each_device(value: Any) -> int:
    """The bytes of an array or a quantized weight on each device; 0 for other values."""
    total = 0
    for array in jax.tree.leaves(value):
        if not hasattr(array, "dtype"):
            continue
        sharding = None if isinstance(array, Tracer) else getattr(array, "sharding", None)
        shape = tuple(array.shape)
        shape = shape if sharding is None else sharding.shard_shape(shape)
        total += math.prod(shape) * array.dtype.itemsize
    return total


def put(value: Any, sharding: Any) -> Any:
    """A value with a sharding, inside a trace or not.

    Raises:
        ValueError: in a trace, if an axis is split by an automatic mesh axis and then by an
            explicit one.
    """
    if not isinstance(value, Tracer):
        return jax.device_put(value, sharding)
    if isinstance(sharding, NamedSharding) and compat.has_explicit_axes(sharding.mesh):
        kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
        both = axes_of(sharding, value.ndim)
        for names in both:
            order = [kinds[own] != AxisType.Explicit for own in names]
            if order != sorted(order):
                raise ValueError(
                    f"inside a trace no axis can be split over {', '.join(names)} in this "
                    "order, in which an automatic mesh axis is in front of an explicit "
                    "one: call the function outside of it."
                )
        explicit, rest = (
            as_spec(
                tuple(own for own in names if (kinds[own] == AxisType.Explicit) == is_it)
                for names in both
            )
            for is_it in (True, False)
        )
        mesh = getattr(sharding.mesh, "abstract_mesh", sharding.mesh)
        value = compat.retyped(value, NamedSharding(mesh, explicit))
        sharding = sharding.update(spec=rest)
        if {*kinds.values()} == {AxisType.Explicit}:
            return value
    return jax.lax.with_sharding_constraint(value, sharding)


def sharding_on_mesh(x: Any) -> NamedSharding | None:
    """The sharding of an array on a mesh; in a trace, that of explicit axes."""
    own: Any = jax.typeof(x).sharding if isinstance(x, Tracer) else None
    if own is not None:
        return own if compat.has_explicit_axes(own.mesh) else None
    own = getattr(x, "sharding", None)
    return own if isinstance(own, NamedSharding) else None


def laid(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """An array with a sharding that `sharding_on_mesh` returned."""
    if sharding is None:
        return x
    if isinstance(sharding.mesh, AbstractMesh):
        return compat.retyped(x, sharding)
    return put(x, sharding)


def like(leaf: Any, value: Any) -> jax.Array:
    """A value with the dtype and the sharding of a leaf."""
    value = jnp.asarray(value).astype(jax.dtypes.canonicalize_dtype(leaf.dtype))
    if not isinstance(leaf, jax.Array):
        return value
    if not (isinstance(leaf, Tracer) or isinstance(value, Tracer)):
        place, memory = leaf.sharding, value.sharding.memory_kind
        moves = isinstance(place, NamedSharding) or place.memory_kind != memory
        return jax.device_put(value, place) if moves else value
    kind = jax.typeof(leaf)
    if compat.has_explicit_axes(compat.mesh_of(kind)):
        return compat.retyped(value, kind.sharding)
    return value


def check_divides(shape: Sequence[int], sharding: NamedSharding) -> None:
    """Raises ValueError unless a sharding splits each axis of a shape evenly.

    An abstract array may have a sharding that does not.
    """
    sizes = sharding.mesh.shape
    for axis, own in enumerate(_padded(sharding.spec, len(shape))):
        if shape[axis] % _count(own, sizes):
            raise ValueError(
                f"the sharding {sharding.spec} splits axis {axis} of the weight, of size "
                f"{shape[axis]}, into {_count(own, sizes)} parts, which does not divide it."
            )


def on_device(tree: Any) -> Any:
    """The arrays of a tree in the memory of their devices; they may be in the host's."""

    def moved(x: Any) -> Any:
        if isinstance(x, Tracer) or not isinstance(x, jax.Array):
            return x
        kind = next(iter(x.sharding.device_set)).default_memory().kind
        if x.sharding.memory_kind in (None, kind):
            return x
        return jax.device_put(x, x.sharding.with_memory_kind(kind))

    return jax.tree.map(moved, tree)


def is_known(weight: Any) -> bool:
    """Whether `parts` knows the sharding of a weight: not in a trace on automatic axes."""
    array = jax.tree.leaves(weight)[0]
    if not isinstance(array, Tracer):
        return True
    mesh = compat.mesh_of(jax.typeof(array))
    return bool(mesh.axis_names) and {*mesh.axis_types} == {AxisType.Explicit}


def parts(weight: Any) -> tuple[int, ...]:
    """How many parts each axis of a weight is split into; 1 if that is not known."""
    sharding = _sharding(weight)
    if not isinstance(sharding, NamedSharding):
        return (1,) * len(weight.shape)
    sizes = sharding.mesh.shape
    return tuple(_count(axes, sizes) for axes in axes_of(sharding, len(weight.shape)))


def axes_of_fold(
    spec: Sequence[Any], n_entries: int, block: int, sizes: Mapping[Any, int]
) -> Any:
    """The mesh axes of a folded axis, which has one entry for each block of a weight.

    They are those of the first folded axis, if each part of it is a whole number of blocks;
    else None. `spec` has the mesh axes of the folded axes, `n_entries` the product of their
    sizes.
    """
    first = spec[0] if spec else None
    return first if n_entries % (block * _count(first, sizes)) == 0 else None


def _count(axes: Any, sizes: Mapping[Any, int]) -> int:
    """The number of parts that mesh axes split an axis into."""
    names = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(sizes[name] for name in names if name is not None)


def _padded(spec: Iterable[Any], ndim: int) -> tuple[Any, ...]:
    axes = tuple(spec)
    return (*axes, *[None] * (ndim - len(axes)))


def _specs(stored: Any, spec: Iterable[Any], sizes: Mapping[Any, int]) -> Any:
    """The mesh axes of each array of a weight, derived from those of the dense weight."""
    if not is_quantized(stored):
        return PartitionSpec(*spec)
    return jax.tree.map(
        _trimmed,
        stored.array_specs(_padded(spec, stored.ndim), sizes),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def _trimmed(spec: PartitionSpec) -> PartitionSpec:
    """The spec without trailing axes that are not split."""
    axes = list(spec)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)
