"""What differs between the versions of JAX, and what is not public in all of them.

Each guard compares a version, so that raising the floor in `pyproject.toml` shows which
of them to delete. A guard on something that changed in a patch release asks JAX instead,
and names the version in a comment. `jax.extend` is imported here and nowhere else.
"""

import contextlib
import pathlib
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend import core, source_info_util
from jax.sharding import PartitionSpec

Literal = core.Literal
Equation = core.JaxprEqn

_LIBRARIES = (
    str(pathlib.Path(__file__).parent),
    sysconfig.get_path("stdlib"),
    sysconfig.get_path("purelib"),
    "/site-packages/",
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


def reshard_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x`, sharded as `other` of the same shape, on a mesh with explicit axes."""
    if x.shape != other.shape or explicit_spec(x) == explicit_spec(other):
        return x
    return jax.sharding.reshard(x, jax.typeof(other).sharding)


def on_mesh_of(x: jax.Array) -> Any:
    """A context in which the mesh in the type of `x` is the one of the program."""
    mesh = jax.typeof(x).sharding.mesh
    if jax.__version_info__ < (0, 8, 0):  # had no public name
        from jax._src.mesh import use_abstract_mesh

        return use_abstract_mesh(mesh)
    return jax.sharding.use_abstract_mesh(mesh)


def varying_axes(x: jax.Array) -> tuple[str, ...]:
    """The mesh axes along which `x` differs inside `jax.shard_map`, as far as is known."""
    aval: Any = jax.typeof(x)
    if jax.__version_info__ < (0, 10, 0):
        return tuple(sorted(aval.vma))
    return tuple(sorted(aval.manual_axis_type.varying))


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
    return aval.shape if isinstance(aval, jax.core.ShapedArray) else type(aval)


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


def source_line(equation: Any) -> str:
    """Where the user's code asked for the equation, as `file:line (function)`.

    The innermost line that is not in an installed package; for a model that is all in
    installed packages, the innermost that is not JAX's. Empty where JAX has kept none.
    """
    trace = equation.source_info.traceback
    if trace is None:
        return ""
    for frame, line in reversed(list(traceback.walk_tb(trace.as_python_traceback()))):
        code = frame.f_code
        if not any(library in code.co_filename for library in _LIBRARIES):
            return f"{_short(code.co_filename)}:{line} ({code.co_name})"
    return source_info_util.summarize(equation.source_info)


def _short(file: str) -> str:
    """A file by its path from here, or else by its last two names."""
    path, here = pathlib.Path(file), pathlib.Path.cwd()
    if path.is_relative_to(here):
        return str(path.relative_to(here))
    return "/".join(path.parts[-2:])
