"""What differs between the versions of JAX, and what is not public in all of them.

Each guard compares a version, so that raising the floor in `pyproject.toml` shows which
of them to delete. A guard on something that changed in a patch release asks JAX instead,
and names the version in a comment. `jax.extend` is imported here and nowhere else.
"""

import contextlib
import os
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

# Files whose lines are of no interest to the user.
_HIDDEN = tuple(
    str(pathlib.Path(file).parent) + os.sep for file in (__file__, jax.__file__)
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


def _package(file: str) -> str | None:
    """The installed package of a file; "" for JAX, Python and lora_jax, None for others."""
    if file.startswith(_HIDDEN):
        return ""
    parts = pathlib.PurePath(file).parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts:
            return parts[parts.index(folder) + 1]
    return "" if file.startswith((_PYTHON, "<")) else None


def _short(file: str) -> str:
    """A file by its path from here or in its package, or else by its last two names."""
    path, here = pathlib.Path(file), pathlib.Path.cwd()
    package = _package(file)
    if package is None and path.is_relative_to(here):
        return str(path.relative_to(here))
    start = path.parts.index(package) if package else -2
    return "/".join(path.parts[start:])
