"""The leaves of some params, and what the caller says of the names of modules."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from lora_jax import _paths
from lora_jax._files import CheckpointError
from lora_jax.peft import _names
from lora_jax.peft._fitting import Layout
from lora_jax.peft._names import Found

Given: TypeAlias = str | tuple[str, str]
"""The path of a weight, or that and the letters of its axes."""
NamesArgument: TypeAlias = Mapping[str, Given] | Callable[[str], Given | None] | None


class Problems:
    """What does not fit, all of it, to be raised or reported at the end."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Takes note of the error that ends the block."""
        try:
            yield
        except CheckpointError as error:
            self.lines.append(str(error))

    def settle(self, where: str, strict: bool) -> None:
        """Raises or warns, if there are any.

        Raises:
            CheckpointError: with all of them, if it is strict.
        """
        if not self.lines:
            return
        more = [f"and {len(self.lines) - 10} more"] if len(self.lines) > 10 else []
        text = "\n  ".join([f"{where} does not fit:", *self.lines[:10], *more])
        if strict:
            raise CheckpointError(text)
        warnings.warn(f"{text}\nIt was left out.", stacklevel=4)


class Places:
    """The leaves of some params, to look for places in.

    Args:
        leaves: by path.
        names: what the caller gave.
        layout: of the leaves.
    """

    def __init__(
        self, leaves: Mapping[str, Any], names: NamesArgument, layout: Layout
    ) -> None:
        self.leaves = leaves
        self.layout: Layout = layout
        self._names, self._used = names, set[str]()
        self._index = _names.index_paths(leaves)

    def given(self, name: str) -> tuple[Found, str | None] | None:
        """What the caller says about a module: its path, and the letters of its axes.

        Raises:
            CheckpointError: if the path is not there.
        """
        found = _given(self._names, name)
        if found is None:
            return None
        key, path, axes, index = found
        self._used.add(key)
        if path not in self.leaves:
            hint = _paths.nearest_hint(path, self.leaves)
            raise CheckpointError(
                f"names has {path!r} for the module {name!r}, and params have no such "
                f"leaf{hint}."
            )
        return Found(path, index), axes

    def gives_axes(self, name: str) -> bool:
        """Whether the caller says what the axes of a module's weight are."""
        found = _given(self._names, name)
        return found is not None and found[2] is not None

    def unused_names(self) -> list[str]:
        """What is in `names`, and neither in the checkpoint nor in the params."""
        given = self._names if isinstance(self._names, Mapping) else {}
        paths = {name: _pair(name, value)[0] for name, value in given.items()}
        taken = {path for name, path in paths.items() if name in self._used}
        lines = []
        for name, path in paths.items():
            there = self._has(path)
            if name in self._used or (there and path not in taken):
                continue  # or for another checkpoint, which adapts that weight
            hint = "" if there else _paths.nearest_hint(path, self.leaves)
            leaf = "" if there else f", nor such a leaf in the params{hint}"
            turned = " They go from modules to paths." if self._has(name) else ""
            lines.append(
                f"names has {path!r} for {name!r}, and there is no such module in the "
                f"checkpoint{leaf}.{turned}"
            )
        return lines

    def _has(self, path: str) -> bool:
        """Whether params have a leaf at a path, or at one of a template."""
        if "{}" not in path:
            return path in self.leaves
        return any(_names.numbers_in(path, leaf) is not None for leaf in self.leaves)

    def search(self, words: tuple[str, ...], leaves: tuple[str, ...]) -> list[Found]:
        """The leaves whose paths have the longest common end with a name."""
        return _names.best(_names.candidates(words, leaves, self._index))

    def holds(self, found: Found) -> bool:
        """Whether the first axes of a leaf are as long as the indexes need."""
        shape, index = self.shape(found.path), found.indices
        pairs = zip(index, shape, strict=False)
        return len(index) <= len(shape) and all(own < n for own, n in pairs)

    def shape(self, path: str) -> tuple[int, ...]:
        """The shape of a leaf; `()` of one that is no array."""
        return tuple(getattr(self.leaves[path], "shape", ()))

    def not_found(self, name: str, near: Iterable[Found], fits: str) -> CheckpointError:
        """The error about a name for which there is no place."""
        listed = [f"{path!r} {self.shape(path)}" for path, _ in near]
        if listed:
            hint = f"by its name it is {' or '.join(listed)}"
        else:
            hint = _paths.nearest_hint(name.replace(".", "/"), self.leaves).removeprefix(
                "; "
            )
        for found in near:
            if not self.holds(found):
                index = ", ".join(map(str, found.indices))
                hint += f", a stack without the index [{index}]"
        other = "torch" if self.layout == "jax" else "jax"
        return CheckpointError(
            f"no leaf of the params fits {name!r}, which needs {fits} in "
            f"layout={self.layout!r}; {hint}. Give names={{{name!r}: path}}, or "
            f"layout={other!r} if weights lie the other way, or the right params."
        )


def _given(
    names: NamesArgument, name: str
) -> tuple[str, str, str | None, tuple[int, ...]] | None:
    """The key of `names` for a module, path, axes, and what numbers a template leaves."""
    if names is None:
        return None
    if not isinstance(names, Mapping):
        value = names(name)
        return None if value is None else (name, *_pair(name, value), ())
    if name in names:
        return name, *_pair(name, names[name]), ()
    for template, value in names.items():
        numbers = _names.numbers_in(template, name) if "{}" in template else None
        if numbers is not None:
            path, axes = _pair(template, value)
            count = path.count("{}")
            return template, _names.fill(path, numbers[:count]), axes, numbers[count:]
    return None


def _pair(name: str, value: Any) -> tuple[str, str | None]:
    """A path and the letters of its axes, if the caller gave any."""
    path, axes = (
        value if isinstance(value, tuple | list) and len(value) == 2 else (value, None)
    )
    if not isinstance(path, str) or not isinstance(axes, str | None):
        raise TypeError(
            f"names must have a path for {name!r}, or a path and the letters of its axes, "
            f"got {value!r}."
        )
    if path.count("{}") > name.count("{}"):
        raise ValueError(
            f"names has {path!r} for {name!r}, which has not as many numbers {{}}."
        )
    if axes is not None and not {"i", "o"} <= set(axes) <= {"i", "o", "b"}:
        raise ValueError(
            f"the axes of {path!r} must be letters i, o and b, with at least one i and one "
            f"o, got {axes!r}."
        )
    return path, axes
