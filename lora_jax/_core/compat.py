"""What differs between the versions of JAX, and what is not public in all of them.

Each guard compares a version, so that raising the floor in `pyproject.toml` shows which
of them to delete. A guard on something that changed in a patch release asks JAX instead,
and names the version in a comment. `jax.extend` is imported here and nowhere else.
"""

import contextlib
import json
import os
import pathlib
import sysconfig
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

import jax
from jax.experimental import compute_on as _compute_on
from jax.extend import core, source_info_util
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

T = TypeVar("T")

Literal = core.Literal
Equation = core.JaxprEqn

# Files whose lines are of no interest to the user.
_HIDDEN = tuple(
    f"{folder}{os.sep}"
    for folder in (pathlib.Path(__file__).parents[1], pathlib.Path(jax.__file__).parent)
)
_PYTHON = sysconfig.get_path("stdlib") + os.sep
# Packages of layers and checks, which a model is written with.
_LAYERS = (
    *("beartype", "chex", "einops", "equinox", "flax", "haiku", "jaxlib", "jaxtyping"),
    *("keras", "numpy", "optax", "typeguard"),
)


def explicit_spec(x: jax.Array) -> tuple[Any, ...]:
    """The mesh axes of each axis of `x` that are part of its type.

    None for each axis, unless the mesh has explicit axes and shards that axis with them.
    """
    return tuple(jax.typeof(x).sharding.spec)


def explicit_sharding(x: jax.Array) -> PartitionSpec | None:
    """How `x` is sharded along explicit axes, as an `out_sharding`; None if it is not."""
    spec = explicit_spec(x)
    return PartitionSpec(*spec) if any(spec) else None


def mesh_of(kind: Any) -> AbstractMesh:
    """The mesh in the type of an array; one without axes if there is none."""
    mesh = getattr(getattr(kind, "sharding", None), "mesh", None)
    return AbstractMesh((), ()) if mesh is None else mesh


def has_explicit_axes(mesh: Any, without: Collection[str] = ()) -> bool:
    """Whether a mesh has explicit axes, other than those."""
    kinds = zip(mesh.axis_names, mesh.axis_types or (), strict=True)
    explicit = [name for name, kind in kinds if kind == AxisType.Explicit]
    return not set(explicit) <= set(without)


def on_mesh(mesh: AbstractMesh) -> Any:
    """A context in which a mesh is the one of the program."""
    if jax.__version_info__ < (0, 8, 0):  # had no public name
        from jax._src.mesh import use_abstract_mesh

        return use_abstract_mesh(mesh)
    return jax.sharding.use_abstract_mesh(mesh)


def on_mesh_of(x: jax.Array) -> Any:
    """A context in which the mesh in the type of `x` is the one of the program."""
    return on_mesh(mesh_of(jax.typeof(x)))


def is_automatic() -> bool:
    """Whether the program is on a mesh here, and none of its axes are explicit."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.axis_names) and not has_explicit_axes(mesh)


def as_current(x: Any) -> Any:
    """An array on the mesh of the program here, in its kinds of axes."""
    mesh = jax.sharding.get_abstract_mesh()
    own = mesh_of(jax.typeof(x)) if isinstance(x, jax.Array) else mesh
    if mesh == own or not mesh.axis_names or not own.axis_names:
        return x
    return replicated(x, mesh)


def automatically(function: Callable[..., T], mesh: AbstractMesh, *values: Any) -> T:
    """`function(*values)` on a mesh, with the explicit axes of that automatic."""
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
    """A context in which the mesh is the one that the equation was traced on."""
    return equation.ctx.manager


def automatic_mesh(mesh: AbstractMesh) -> AbstractMesh:
    """The mesh with its explicit axes automatic."""
    kinds = zip(mesh.axis_names, mesh.axis_types or (), strict=True)
    explicit = [name for name, kind in kinds if kind == AxisType.Explicit]
    return mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto))


def as_automatic(x: Any, mesh: AbstractMesh) -> Any:
    """An array on a mesh without explicit axes. It stays where it lies.

    One of another mesh stays as it is, unless that has explicit axes, or no axes.
    """
    if not isinstance(x, jax.Array):
        return x
    own = mesh_of(jax.typeof(x))
    is_other = own.axis_names and not has_explicit_axes(own)
    return x if is_other else replicated(x, automatic_mesh(mesh))


def replicated(x: Any, mesh: AbstractMesh) -> Any:
    """An array of that mesh in its type, with no explicit axis along any of its own."""
    return retyped(x, NamedSharding(mesh, PartitionSpec(*[None] * x.ndim)))


def retyped(x: Any, sharding: NamedSharding) -> Any:
    """An array with a sharding in its type, on this or another kind of mesh axes."""
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


def pads_sharded_axes() -> bool:
    """Whether XLA keeps the order of entries of a sharded axis that a program pads."""
    return jax.__version_info__ >= (0, 9, 0)  # that of 0.7.0 does not


def varying_axes(x: jax.Array) -> tuple[str, ...]:
    """The mesh axes along which `x` differs inside `jax.shard_map`, as far as is known."""
    aval: Any = jax.typeof(x)
    if jax.__version_info__ < (0, 10, 0):
        return tuple(sorted(aval.vma))
    return tuple(sorted(aval.manual_axis_type.varying))


def compute_on(function: Callable[..., Any], equation: Any) -> Callable[..., Any]:
    """The function, computed where an equation of `jax.experimental.compute_on` is."""
    parameters = dict(equation.params)
    del parameters["jaxpr"]
    options = parameters.pop("compiler_options_json", None)
    if options is not None:
        parameters["compiler_options"] = json.loads(options)
    # JAX < (0, 11, 1): a context manager has the name
    at: Any = getattr(_compute_on, "compute_on2", _compute_on.compute_on)
    return at(function, **parameters)


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """A jaxpr, closed or not, as one with its constants."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, list(getattr(jaxpr, "consts", ()))


def body_of(equation: Any) -> tuple[Any, list[Any]] | None:
    """The jaxpr that an equation calls on its operands, and its constants.

    For reading only: what the equation does besides (a derivative, a partition) is not in
    it. None if there is none, as for a callback, or it is one on references, as a kernel's.
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
    """The shape of an array; of anything else, such as a reference, its type."""
    aval = atom.aval
    return type(aval) if hasattr(aval, "inner_aval") else getattr(aval, "shape", None)


def bind(equation: Any, values: Sequence[Any]) -> Any:
    """Evaluates the equation's primitive on other values.

    A list if the primitive has several results, else the one result.
    """
    parameters = equation.primitive.get_bind_params(equation.params)
    if isinstance(parameters, tuple):  # JAX < (0, 9, 2): functions apart
        functions, parameters = parameters
        values = (*functions, *values)
    out = equation.primitive.bind(*values, **parameters)
    # In JAX >= 0.9.2 some primitives return a tree of their results.
    return list(out) if equation.primitive.multiple_results else out


def bind_one(equation: Any, value: Any) -> Any:
    """Evaluates a primitive of one operand and one result on another value."""
    out = bind(equation, [value])
    # In some versions of JAX the one result of some of them comes in a list.
    return out[0] if equation.primitive.multiple_results else out


@contextlib.contextmanager
def at_equation(equation: Any) -> Iterator[None]:
    """Traces as the equation was: its scope's name, its source line, its mesh."""
    source = equation.source_info
    names = source_info_util.current_name_stack() + source.name_stack
    at_source = source_info_util.user_context(source.traceback, name_stack=names)
    with at_source, equation.ctx.manager:
        yield


def source_lines(equation: Any) -> list[str]:
    """Where an equation was asked for, each line as `file:line (function)`.

    The innermost line of the user. In front of it, if the model is in an installed
    package, the line of the model: the innermost that is not in a library of layers. Empty
    where JAX has kept none: it forgets what is around the function that is traced.
    """
    trace = equation.source_info.traceback
    if trace is None:
        return []
    model = layer = ""
    for frame, line in reversed(list(traceback.walk_tb(trace.as_python_traceback()))):
        file, package = frame.f_code.co_filename, _package(frame.f_code.co_filename)
        if package == "":
            continue
        text = f"{_short(file)}:{line} ({frame.f_code.co_name})"
        if package is None:
            return [model, text] if model else [text]
        layer = layer or text
        model = model or ("" if package in _LAYERS else text)
    return [model or layer] if layer else []


def called_at(equation: Any, callers: Sequence[Any]) -> str:
    """The lines of an equation, and those that called the function it is in.

    JAX traces a function of its own once for all its callers, and keeps the line of the
    first: then only the second of these lines is right.

    Args:
        equation: of any jaxpr.
        callers: the equations whose jaxprs that is in, the outermost first.
    """
    lines = [line for own in (equation, *callers[:1]) for line in source_lines(own)]
    return ", called at ".join(dict.fromkeys(lines))


def _package(file: str) -> str | None:
    """The installed package of a file; "" for JAX, Python and lora_jax, None for others."""
    if file.startswith(_HIDDEN):
        return ""
    parts = pathlib.PurePath(file).parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts:
            return parts[parts.index(folder) + 1]
    return "" if file.startswith((_PYTHON, "<frozen ")) else None


def _short(file: str) -> str:
    """A file by its path from here or in its package, or else by its last two names."""
    path, here = pathlib.Path(file), pathlib.Path.cwd()
    package = _package(file)
    if package is None and path.is_relative_to(here):
        return str(path.relative_to(here))
    start = path.parts.index(package) if package else -2
    return "/".join(path.parts[start:])
