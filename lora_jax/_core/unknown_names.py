"""Errors about names that do not exist here, and that say what to write."""

import dataclasses
import difflib
import functools
import sys
from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeVar

from lora_jax._core import equivalents

Class = TypeVar("Class", bound=type)


def explain_fields(cls: Class) -> Class:
    """Makes the constructor of a dataclass say what to write for fields that it lacks."""
    init = cls.__init__
    fields = [field.name for field in dataclasses.fields(cls)]

    @functools.wraps(init)
    def construct(self: Any, *args: Any, **given: Any) -> None:
        lacking = [name for name in given if name not in fields]
        if lacking:
            names = ", ".join(f"`{name}`" for name in lacking)
            hints = "; ".join(_hint(name, fields) for name in lacking)
            raise TypeError(f"{cls.__name__} has no field {names}; {hints}.")
        init(self, *args, **given)

    cls.__init__ = construct
    return cls


def _hint(name: str, fields: Collection[str]) -> str:
    hint = equivalents.describe(equivalents.FIELDS, name)
    if hint is not None:
        return hint
    near = difflib.get_close_matches(name, fields, n=1)
    if near:
        return f"the nearest to `{name}` is `{near[0]}`"
    return f"its fields are {', '.join(fields)}"


def explain_attributes(module: str) -> Callable[[str], NoReturn]:
    """The `__getattr__` of a package, for names of other packages."""

    def explain(name: str) -> NoReturn:
        hint = equivalents.describe(equivalents.NAMES, name)
        raise AttributeError(
            f"module {module!r} has no attribute {name!r}" + (f"; {hint}." if hint else ""),
            name=name,
            obj=sys.modules[module],
        )

    return explain
