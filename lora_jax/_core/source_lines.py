"""The lines of the user's code that equations come from."""

import os
import pathlib
import sysconfig
import traceback
from collections.abc import Sequence
from typing import Any

import jax

# Files whose lines do not help the user: those of lora_jax and JAX.
_HIDDEN = tuple(
    f"{folder}{os.sep}"
    for folder in (pathlib.Path(__file__).parents[1], pathlib.Path(jax.__file__).parent)
)
_PYTHON = sysconfig.get_path("stdlib") + os.sep
# Libraries of layers and checks that models use.
_LAYERS = (
    *("beartype", "chex", "einops", "equinox", "flax", "haiku", "jaxlib", "jaxtyping"),
    *("keras", "numpy", "optax", "typeguard"),
)


def source_lines(equation: Any) -> list[str]:
    """The source lines of an equation, each as `file:line (function)`.

    The last one is the innermost line of the user's code. If the model is in an installed
    package, the line of the model is in front of it: the innermost line that is not in a
    library of layers. The list is empty if JAX has no source line: it does not record the
    frames around the traced function.
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
    first: then only the second of these lines is right. `callers` are the equations whose
    jaxprs the equation is in, the outermost first.
    """
    lines = [line for own in (equation, *callers[:1]) for line in source_lines(own)]
    return ", called at ".join(dict.fromkeys(lines))


def use_at(equation: Any, callers: Sequence[Any]) -> tuple[str, str]:
    """The primitive that uses a value, and its lines; without an equation, the end."""
    if equation is None:
        return "output", "the end of the function"
    return equation.primitive.name, called_at(equation, callers)


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
    """A file's path relative to here or to its package, or else its last two names."""
    path, here = pathlib.Path(file), pathlib.Path.cwd()
    package = _package(file)
    if package is None and path.is_relative_to(here):
        return str(path.relative_to(here))
    start = path.parts.index(package) if package else -2
    return "/".join(path.parts[start:])
