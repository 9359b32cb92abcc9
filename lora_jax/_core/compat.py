"""Differences between versions of JAX, and names that are not public in all of them.

Each guard compares a version. So when `pyproject.toml` requires a newer JAX, it is clear
which guards to delete. If something changed in a patch release, the guard tests for the
feature instead, and a comment has the version. Only this module imports `jax.extend`.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

import jax
from jax.experimental import compute_on as _compute_on
from jax.extend import core, source_info_util
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

T = TypeVar("T")

Literal = core.Literal
Equation = core.JaxprEqn


def explicit_spec(x: jax.Array) -> tuple[Any, ...]:
    """The explicit mesh axes of each axis of `x`.

    An entry is None if no explicit mesh axis shards that axis.
    """
    return tuple(jax.typeof(x).sharding.spec)


def explicit_names(arrays: Sequence[jax.Array]) -> frozenset[str]:
    """The explicit mesh axes that split at least one of the arrays."""
    entries = [axes for x in arrays for axes in explicit_spec(x) if axes is not None]
    return frozenset(
        name for axes in entries for name in (axes if isinstance(axes, tuple) else (axes,))
    )


def only(axes: Any, names: Collection[str]) -> Any:
    """An entry of a `PartitionSpec`, with the mesh axes that are in `names` alone."""
    if not isinstance(axes, tuple):
        return axes if axes in names else None
    return tuple(name for name in axes if name in names) or None


def explicit_sharding(x: jax.Array) -> PartitionSpec | None:
    """The sharding of `x` along explicit axes, as an `out_sharding`; None without one."""
    spec = explicit_spec(x)
    return PartitionSpec(*spec) if any(spec) else None


def mesh_of(kind: Any) -> AbstractMesh:
    """The mesh in the type of an array; an empty mesh if there is none."""
    mesh = getattr(getattr(kind, "sharding", None), "mesh", None)
    return AbstractMesh((), ()) if mesh is None else mesh


def has_explicit_axes(mesh: Any, without: Collection[str] = ()) -> bool:
    """Whether a mesh has explicit axes, not counting those in `without`."""
    kinds = zip(mesh.axis_names, mesh.axis_types or (), strict=True)
    explicit = [name for name, kind in kinds if kind == AxisType.Explicit]
    return not set(explicit) <= set(without)


def may_be_sharded(x: jax.Array) -> bool:
    """Whether `x` is on a mesh of several devices, and not inside of a `jax.shard_map`."""
    mesh = mesh_of(jax.typeof(x))
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind != AxisType.Manual for size, kind in kinds)


def on_mesh(mesh: AbstractMesh) -> Any:
    """A context in which `mesh` is the current mesh."""
    if jax.__version_info__ < (0, 8, 0):  # had no public name
        from jax._src.mesh import use_abstract_mesh

        return use_abstract_mesh(mesh)
    return jax.sharding.use_abstract_mesh(mesh)


def on_mesh_of(x: jax.Array) -> Any:
    """A context in which the mesh in the type of `x` is the current mesh."""
    return on_mesh(mesh_of(jax.typeof(x)))


def is_automatic() -> bool:
    """Whether there is a current mesh and none of its axes are explicit."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.axis_names) and not has_explicit_axes(mesh)


def as_current(x: Any, otherwise: AbstractMesh | None = None) -> Any:
    """An array on the current mesh, with the current types of axes.

    Without a current mesh, an array that is on a mesh is put on the mesh `otherwise`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    mesh = mesh if mesh.axis_names or otherwise is None else otherwise
    own = mesh_of(jax.typeof(x)) if isinstance(x, jax.Array) else mesh
    if mesh == own or not mesh.axis_names or not own.axis_names:
        return x
    return replicated(x, mesh)


def automatically(function: Callable[..., T], mesh: AbstractMesh, *values: Any) -> T:
    """Calls `function(*values)` on a mesh whose explicit axes are made automatic."""
    if has_explicit_axes(mesh):
        with on_mesh(automatic_mesh(mesh)):
            return function(*jax.tree.map(lambda x: as_automatic(x, mesh), values))
    if mesh.axis_names and has_explicit_axes(jax.sharding.get_abstract_mesh()):
        with on_mesh(mesh):
            return function(*values)
    return function(*values)


def explicit_mesh(equation: Any) -> AbstractMesh | None:
    """The first mesh with explicit axes in the types of an equation, if there is one."""
    atoms = (*equation.invars, *equation.outvars)
    meshes = (mesh_of(atom.aval) for atom in atoms)
    return next(filter(has_explicit_axes, meshes), None)


def on_mesh_of_equation(equation: Any) -> Any:
    """A context in which the current mesh is the one that the equation was traced on."""
    return equation.ctx.manager


def automatic_mesh(mesh: AbstractMesh) -> AbstractMesh:
    """The mesh with its explicit axes made automatic."""
    kinds = zip(mesh.axis_names, mesh.axis_types or (), strict=True)
    explicit = [name for name, kind in kinds if kind == AxisType.Explicit]
    return mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto))


def as_automatic(x: Any, mesh: AbstractMesh) -> Any:
    """An array on a mesh without explicit axes; its data are not moved.

    An array of another mesh is returned unchanged, unless its mesh has explicit axes, or
    no axes.
    """
    if not isinstance(x, jax.Array):
        return x
    own = mesh_of(jax.typeof(x))
    is_other = own.axis_names and not has_explicit_axes(own)
    return x if is_other else replicated(x, automatic_mesh(mesh))


def replicated(x: Any, mesh: AbstractMesh) -> Any:
    """An array with `mesh` in its type, replicated over the explicit axes."""
    return retyped(x, NamedSharding(mesh, PartitionSpec(*[None] * x.ndim)))


def retyped(x: Any, sharding: NamedSharding) -> Any:
    """An array with `sharding` in its type; the types of the mesh axes may change."""
    if not isinstance(x, jax.Array) or not sharding.mesh.axis_names:
        return x
    kind: Any = jax.typeof(x).sharding
    if kind == sharding:
        return x
    if jax.__version_info__ < (0, 7, 2):  # `reshard` did not change kinds of axes
        from jax._src import pjit

        mesh_cast = getattr(pjit, "mesh_cast", None)
        if mesh_cast is not None and kind.mesh.axis_types != sharding.mesh.axis_types:
            return mesh_cast(x, sharding)
    return jax.sharding.reshard(x, sharding)


def wait_for_processes(name: str, seconds: float) -> None:
    """Waits until all processes have called this with the same name.

    Raises:
        RuntimeError: if some do not within this time.
    """
    from jax._src import distributed  # the public barrier waits without a limit

    client: Any = distributed.global_state.client
    for tries in range(2 if client else 0):
        try:
            return client.wait_at_barrier(name, round(1000 * seconds))
        except RuntimeError as error:
            # Once after a wait that failed, processes do not agree how many there were.
            if tries or "INTERNAL" not in str(error):
                raise


def pads_sharded_axes() -> bool:
    """Whether XLA keeps the order of entries when a program pads a sharded axis."""
    return jax.__version_info__ >= (0, 9, 0)  # JAX 0.7.0 does not


def in_64_bits(enabled: bool) -> Any:
    """A context of this thread, in which JAX has 64-bit types or not."""
    if jax.__version_info__ < (0, 8, 0):
        from jax.experimental import enable_x64  # type: ignore[attr-defined]

        return enable_x64(enabled)
    return jax.enable_x64(enabled)


def varying_axes(x: jax.Array) -> tuple[str, ...]:
    """The mesh axes over which `x` may vary inside `jax.shard_map`."""
    aval: Any = jax.typeof(x)
    if jax.__version_info__ < (0, 10, 0):
        return tuple(sorted(aval.vma))
    return tuple(sorted(aval.manual_axis_type.varying))


def as_varying(x: jax.Array, axes: Collection[str]) -> jax.Array:
    """An array that may vary over these mesh axes as well, inside `jax.shard_map`."""
    missing = tuple(sorted({*axes} - {*varying_axes(x)}))
    if not missing:
        return x
    lax: Any = jax.lax
    if hasattr(lax, "pcast"):  # not in JAX 0.7.0
        return lax.pcast(x, missing, to="varying")
    return lax.pvary(x, missing)


def varying_as(kind: jax.ShapeDtypeStruct, x: jax.Array) -> jax.ShapeDtypeStruct:
    """An abstract array that may vary over the mesh axes over which `x` does."""
    if not varying_axes(x):
        return kind
    aval: Any = jax.typeof(x)
    whole = NamedSharding(aval.sharding.mesh, PartitionSpec())
    kind = kind.update(sharding=getattr(kind, "sharding", None) or whole)
    if jax.__version_info__ < (0, 10, 0):
        return kind.update(vma=aval.vma)
    return kind.update(manual_axis_type=aval.manual_axis_type)


def is_on_host(x: Any) -> bool:
    """Whether an array lies in the memory of the host, by its type."""
    memory: Any = getattr(jax, "memory", None)  # not in JAX 0.7.0
    return memory is not None and jax.typeof(x).memory_space == memory.Space.Host


def to_device(x: Any) -> Any:
    """An array in the memory of its device, inside a trace or not."""
    return jax.device_put(x, jax.memory.Space.Device) if is_on_host(x) else x


def compute_on(function: Callable[..., Any], equation: Any) -> Callable[..., Any]:
    """Runs a function where a `jax.experimental.compute_on` equation runs."""
    parameters = dict(equation.params)
    del parameters["jaxpr"]
    options = parameters.pop("compiler_options_json", None)
    if options is not None:
        parameters["compiler_options"] = json.loads(options)
    # JAX < (0, 11, 1): `compute_on` is a context manager
    at: Any = getattr(_compute_on, "compute_on2", _compute_on.compute_on)
    return at(function, **parameters)


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """A jaxpr, closed or open, as an open jaxpr and its constants."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, list(getattr(jaxpr, "consts", ()))


def body_of(equation: Any) -> tuple[Any, list[Any]] | None:
    """The jaxpr that an equation calls on its operands, and its constants.

    It is for reading only, because it lacks the rest of the equation (a derivative, a
    partition). None for an equation without a jaxpr, such as a callback, and for a jaxpr on
    references, such as a kernel's.
    """
    of = equation.params
    hi = of.get("_prim")
    found = [of.get(name) for name in ("call_jaxpr", "fun_jaxpr", "jaxpr", "call")]
    found += [
        getattr(hi, "jaxpr", None),
        getattr(getattr(hi, "traced", None), "jaxpr", None),
    ]
    operands = [_shape_of(atom) for atom in equation.invars]
    for candidate in found:
        jaxpr, constants = open_jaxpr(candidate)
        arguments = getattr(jaxpr, "invars", None)
        if arguments is not None and list(map(_shape_of, arguments)) == operands:
            return jaxpr, constants
    return None


def _shape_of(atom: Any) -> Any:
    """The shape of an array, or the type of any other value, such as a reference."""
    aval = atom.aval
    return type(aval) if hasattr(aval, "inner_aval") else getattr(aval, "shape", None)


# Primitives that call a function of the user's, or a kernel, by a name.
NAMED_CALLS = ("jit", "custom_jvp_call", "custom_vjp_call", "pallas_call", "ffi_call")


def function_name(equation: Any) -> str:
    """The name of the function that an equation of `NAMED_CALLS` calls."""
    of = equation.params
    name = of.get("name") or of.get("target_name")
    if name is None:
        jaxpr, _ = open_jaxpr(of.get("call_jaxpr", of.get("jaxpr")))
        name = getattr(getattr(jaxpr, "debug_info", None), "func_name", "")
    return str(name)


def call_shapes(equation: Any) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The shapes of the operands and results of a call; `()` for what is no array."""
    operands, results = (
        [tuple(getattr(atom.aval, "shape", ())) for atom in atoms]
        for atoms in (equation.invars, equation.outvars)
    )
    return operands, results


def outside_of_vmap(function: Callable[..., T], *values: Any) -> T:
    """Calls a function of arrays that are the same in all slots, outside of the `jax.vmap`.

    The rules for `jax.vmap` of some primitives raise errors for such arrays.
    """

    @jax.custom_batching.custom_vmap
    def call(slot: jax.Array, *values: Any) -> T:
        return function(*values)

    @call.def_vmap
    def _(size: int, mapped: Any, slot: jax.Array, *values: Any) -> tuple[T, Any]:
        out = function(*values)
        return out, jax.tree.map(lambda _: False, out)

    # With an argument that is mapped over, so that the rule is used.
    return call(jax.lax.axis_index(SLOTS), *values)


def bind(equation: Any, values: Sequence[Any]) -> Any:
    """Evaluates the equation's primitive on other values.

    Returns a list if the primitive has several results, else the single result.
    """
    if is_mapped_over(SLOTS) and _has_ragged_dot(equation):
        return outside_of_vmap(functools.partial(_bind, equation), *values)
    return _bind(equation, *values)


SLOTS = "slots of lora_jax"
"""The name of the axis of `jax.vmap` in `adapt_rows`."""


def is_mapped_over(name: str) -> bool:
    """Whether the current trace is inside of a `jax.vmap` with this name of its axis."""
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def _has_ragged_dot(equation: Any) -> bool:
    """Whether an equation, or the program that it calls, has a `ragged_dot`."""
    if equation.primitive.name == "ragged_dot_general":
        return True
    bodies = [open_jaxpr(v)[0] for v in jax.tree.leaves(tuple(equation.params.values()))]
    inner = (own for body in bodies for own in getattr(body, "eqns", ()))
    return any(map(_has_ragged_dot, inner))


def _bind(equation: Any, *values: Any) -> Any:
    parameters = equation.primitive.get_bind_params(equation.params)
    if isinstance(parameters, tuple):  # JAX < (0, 9, 2): functions are separate
        functions, parameters = parameters
        values = (*functions, *values)
    out = equation.primitive.bind(*values, **parameters)
    # In JAX >= 0.9.2 some primitives return a tree of their results.
    return list(out) if equation.primitive.multiple_results else out


def bind_one(equation: Any, value: Any) -> Any:
    """Evaluates a primitive of one operand and one result on another value."""
    out = bind(equation, [value])
    # In some versions of JAX, some primitives return their single result in a list.
    return out[0] if equation.primitive.multiple_results else out


@contextlib.contextmanager
def at_equation(equation: Any) -> Iterator[None]:
    """Traces with the equation's name scope, source line and mesh."""
    source = equation.source_info
    names = source_info_util.current_name_stack() + source.name_stack
    at_source = source_info_util.user_context(source.traceback, name_stack=names)
    with at_source, equation.ctx.manager:
        yield
