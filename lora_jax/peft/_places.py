"""The leaves of some params, and what the caller says of the names of modules."""

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from lora_jax._core import checks, tree_paths
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft import _names
from lora_jax.peft._fitting import LAYOUTS, Layout
from lora_jax.peft._names import Found, Numbers
from lora_jax.peft._uses import Known

GivenPath: TypeAlias = str | tuple[str, str]
"""The path of a weight, or that and the letters of its axes."""
NamesArgument: TypeAlias = (
    Mapping[str, GivenPath] | Callable[[str], GivenPath | None] | None
)

# Problems after these are counted, and not shown.
_SHOWN = 10
_FIELD = re.compile(r"\{(\w+)\}")
# Leaves that are called so lie (in, out) in all frameworks that call them so.
_IN_OUT = ("kernel", "w", "embedding", "embeddings")


class Given(NamedTuple):
    """What the caller says of a module."""

    path: str
    numbers: Numbers = ()
    """Of the module's name, those that the path did not take."""
    axes: str | None = None
    """The letters of the axes of the weight, if they are given."""
    fields: tuple[str, ...] = ()
    """For each batch axis the name of the field that is its index, or an empty text."""


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
        extra = len(self.lines) - _SHOWN
        more = [f"and {extra} more"] if extra > 0 else []
        text = "\n  ".join([f"{where} does not fit:", *self.lines[:_SHOWN], *more])
        if strict:
            raise CheckpointError(text)
        warnings.warn(f"{text}\nIt was left out.", stacklevel=4)


class Places:
    """The leaves of some params, to look for places in.

    Args:
        leaves: by path.
        names: what the caller gave.
        layout: of the leaves; None if the caller did not say.
        known: of the axes of the leaves.
        tied: whether one leaf is the embedding and the output head; None if the caller
            did not say.

    Raises:
        TypeError, ValueError: if an argument is none that it may be.
    """

    def __init__(
        self,
        leaves: Mapping[str, Any],
        names: NamesArgument = None,
        layout: Layout | None = None,
        known: Known = Known(),  # noqa: B008
        tied: bool | None = None,
    ) -> None:
        if layout is not None:
            checks.check_choice("layout", layout, LAYOUTS)
        if tied is not None:
            checks.check_flags(tied=tied)
        if names is not None and not callable(names) and not isinstance(names, Mapping):
            raise TypeError(
                "names must be a dict from the names of modules to paths, or a function, "
                f"got {type(names).__name__}."
            )
        self.leaves = leaves
        self.given_layout = layout
        self.layout: Layout = layout or "jax"
        self.known, self.tied = known, tied
        self._names, self._used = names, set[str]()
        self._templates = _by_mask(names if isinstance(names, Mapping) else ())
        self._index = _names.index_paths(leaves)
        self._hints = 0
        self.shown: set[str] = set()
        """The families of leaves whose shapes show that they lie (in, out)."""
        self.claimed: set[str] = set()
        """The leaves that are the weights of modules, whether or not it is clear how."""
        self.unplaced: list[str] = []
        """The names for which there is no place."""

    @functools.cached_property
    def biases(self) -> dict[tuple[str, ...], str]:
        """The paths of biases by their words, without that of the leaf."""
        words = {path: _names.split_path(path) for path in self.leaves}
        found: dict[tuple[str, ...], str] = {}
        for path, own in words.items():
            if own.leaf == _names.BIAS:
                found.setdefault(own.words, path)
        return found

    @functools.cached_property
    def _masks(self) -> dict[str, list[str]]:
        return _by_mask(self.leaves, all_of_them=True)

    def given(self, name: str) -> Given | None:
        """What the caller says about a module.

        Raises:
            CheckpointError: if the path is not there.
        """
        found = self._find_given(name)
        if found is None:
            return None
        key, given = found
        self._used.add(key)
        if given.path not in self.leaves:
            hint = self.hint(given.path)
            raise CheckpointError(
                f"names has {given.path!r} for the module {name!r}, and params have no "
                f"such leaf{hint}."
            )
        return given

    def _find_given(self, name: str) -> tuple[str, Given] | None:
        """The key of `names` for a module, and what it has."""
        names = self._names
        if names is None:
            return None
        if not isinstance(names, Mapping):
            value = names(name)
            return None if value is None else (name, _parse(name, value))
        if name in names:
            return name, _parse(name, names[name])
        for template in self._templates.get(_names.mask(name), ()):
            numbers = _names.numbers_in(template, name)
            if numbers is not None:
                given = _parse(template, names[template])
                fields = zip(_names.template_fields(template), numbers, strict=True)
                path, left = _names.fill_fields(given.path, tuple(fields))
                return template, given._replace(path=path, numbers=left)
        return None

    def gives_axes(self, name: str) -> bool:
        """Whether the caller says what the axes of a module's weight are."""
        found = self._find_given(name)
        return found is not None and found[1].axes is not None

    def unused_names(self) -> list[str]:
        """What is in `names`, and neither in the checkpoint nor in the params."""
        given = self._names if isinstance(self._names, Mapping) else {}
        paths = {name: _parse(name, value).path for name, value in given.items()}
        taken = {path for name, path in paths.items() if name in self._used}
        lines = []
        for name, path in paths.items():
            if name in self._used:
                continue
            there = self._has(path)
            if there and path not in taken:
                continue  # for another checkpoint, which adapts that weight
            hint = "" if there else self.hint(path)
            leaf = "" if there else f", nor such a leaf in the params{hint}"
            turned = " They go from modules to paths." if self._has(name) else ""
            lines.append(
                f"names has {path!r} for {name!r}, and there is no such module in the "
                f"checkpoint{leaf}.{turned}"
            )
        return lines

    def lies_in_out(self, path: str) -> bool:
        """Whether the names or the shapes of leaves show that one lies `(in, out)`."""
        return _names.leaf_word(path) in _IN_OUT or self.family(path) in self.shown

    def family(self, path: str) -> str:
        """Leaves of one family lie alike: those called weight, or all others."""
        word = _names.leaf_word(path)
        return word if word == _names.WEIGHT else ""

    def hint(self, path: str) -> str:
        """The end of a message about a path; empty for messages that are not shown."""
        self._hints += 1
        return tree_paths.nearest_hint(path, self.leaves) if self._hints <= _SHOWN else ""

    def _has(self, path: str) -> bool:
        """Whether params have a leaf at a path, or at one of a template."""
        if not _names.is_template(path):
            return path in self.leaves
        leaves = self._masks.get(_names.mask(path), ())
        return any(_names.numbers_in(path, leaf) is not None for leaf in leaves)

    def search(self, words: tuple[str, ...], leaves: tuple[str, ...]) -> list[Found]:
        """The leaves whose paths have the longest common end with a name."""
        return _names.search(words, leaves, self._index)

    def shape(self, path: str) -> tuple[int, ...]:
        """The shape of a leaf; `()` of one that is no array."""
        return tuple(getattr(self.leaves[path], "shape", ()))

    def not_found(self, name: str, near: Iterable[Found], fits: str) -> CheckpointError:
        """The error about a name for which there is no place."""
        self.unplaced.append(name)
        listed = [f"{path!r} {self.shape(path)}{self.axes_of(path)}" for path, _ in near]
        if listed:
            hint = f"by its name it is {' or '.join(listed[:_SHOWN])}"
        else:
            hint = self.hint(name.replace(".", "/")).removeprefix("; ")
        for path, indices in near:
            shape = self.shape(path)
            if len(indices) > len(shape) or any(
                sum(own < n for n in shape) < 1 for own in indices
            ):
                index = ", ".join(map(str, indices))
                hint += f", a stack without the index [{index}]"
        other = "torch" if self.layout == "jax" else "jax"
        return CheckpointError(
            f"no leaf of the params fits {name!r}, which needs {fits} in "
            f"layout={self.layout!r}; {hint}. Give names={{{name!r}: path}}, or the "
            f"function (fn, *args), or layout={other!r} if weights lie the other way, or "
            "the right params."
        )

    def axes_of(self, path: str) -> str:
        """What is known of the axes of a leaf, for messages."""
        known = self.known.axes.get(path)
        return f" with the axes {known!r} in {self.known.source}" if known else ""


def _by_mask(texts: Iterable[str], *, all_of_them: bool = False) -> dict[str, list[str]]:
    """Templates, or all of some texts, by their masks."""
    found: dict[str, list[str]] = {}
    for text in texts:
        if isinstance(text, str) and (all_of_them or _names.is_template(text)):
            found.setdefault(_names.mask(text), []).append(text)
    return found


def _parse(name: str, value: Any) -> Given:
    """What the caller gave for a module: a path, and perhaps the letters of its axes."""
    path, axes = (
        value if isinstance(value, tuple | list) and len(value) == 2 else (value, None)
    )
    if not isinstance(path, str) or not isinstance(axes, str | None):
        raise TypeError(
            f"names must have a path for {name!r}, or a path and the letters of its axes, "
            f"got {value!r}."
        )
    _check_fields(name, path)
    if axes is None:
        return Given(path)
    letters, fields = parse_axes(axes)
    if not {"i", "o"} <= set(letters) <= {"i", "o", "b"}:
        raise ValueError(
            f"the axes of {path!r} must be letters i, o and b, with at least one i and one "
            f"o, and a field such as {{layer}} for a b that is its index, got {axes!r}."
        )
    unknown = sorted({field for field in fields if field} - {*_fields_of(name)})
    if unknown:
        raise ValueError(
            f"the axes {axes!r} of {path!r} have the field {unknown[0]!r}, and the numbers "
            f"of {name!r} are called {', '.join(map(repr, _fields_of(name))) or 'nothing'}."
        )
    return Given(path, (), letters, fields)


def parse_axes(axes: str) -> tuple[str, tuple[str, ...]]:
    """The letters of axes, and for each `b` the field that it was given as, if any."""
    letters = _FIELD.sub("b", axes)
    fields = (match[1] or "" for match in re.finditer(r"\{(\w+)\}|b", axes))
    return letters, tuple(fields)


def _fields_of(name: str) -> tuple[str, ...]:
    if _names.is_template(name):
        return _names.template_fields(name)
    return _names.name_fields(name)


def _check_fields(name: str, path: str) -> None:
    """Raises unless a path takes only what the name of a module has."""
    fields = _names.template_fields(name)
    named = [match[1] for match in _FIELD.finditer(path)]
    if path.count("{}") > len(fields) - len(named) or not set(named) <= set(fields):
        raise ValueError(
            f"names has {path!r} for {name!r}, which has not as many numbers {{}}."
        )
    own = [match[1] for match in _FIELD.finditer(name)]
    if len(set(own)) < len(own):
        raise ValueError(f"names has {name!r}, in which two numbers have one field.")
