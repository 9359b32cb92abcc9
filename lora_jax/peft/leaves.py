"""The leaves of params, and the ways in which they may hold the array of a module."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from lora_jax._core import checks, tree_paths
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.known import Known, find_known
from lora_jax.peft.layout import (
    LAYOUTS,
    Layout,
    Reading,
    Site,
    has_room,
    part_axes,
    part_shape,
)
from lora_jax.peft.names import NOT_GIVEN, Given, Names, NamesArgument, PathMasks
from lora_jax.peft.words import (
    BIAS,
    WEIGHT,
    Found,
    Numbers,
    PathIndex,
    index_paths,
    lacking_fields,
    leaf_word,
    search_paths,
    split_path,
)
from lora_jax.plan import parts
from lora_jax.plan.adapter_plan import AdapterPlan

# Further problems are counted and not shown.
_SHOWN = 10
# Leaves with these names are (in, out) in every framework that has such names.
_IN_OUT = ("kernel", "w", "embedding", "embeddings")


class Problems:
    """Collects the errors of what does not fit, and raises or warns at the end."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Catches the error that ends the block."""
        try:
            yield
        except CheckpointError as error:
            self.lines.append(str(error))

    def settle(self, where: str, strict: bool) -> None:
        """Raises one error with all problems, or warns of them if `strict` is false."""
        if not self.lines:
            return
        extra = len(self.lines) - _SHOWN
        more = [f"and {extra} more"] if extra > 0 else []
        text = "\n  ".join([f"{where} does not fit:", *self.lines[:_SHOWN], *more])
        if strict:
            raise CheckpointError(text)
        warnings.warn(f"{text}\nIt was left out.", stacklevel=4)


class Places:
    """Searches the leaves of params by names of modules.

    `names` and `layout` are as in `lora_jax.peft.load`. `known` has the axes of the leaves.
    """

    def __init__(
        self,
        leaves: Mapping[str, Any],
        names: NamesArgument = None,
        layout: Layout | None = None,
        known: Known = Known(),  # noqa: B008
    ) -> None:
        if layout is not None:
            checks.check_choice("layout", layout, LAYOUTS)
        self.leaves = leaves
        self.given_layout = layout
        self.layout: Layout = layout or "jax"
        self.known = known
        self._names, self._used = Names(names), set[str]()
        self._index = index_paths(leaves)
        self._hints = 0
        self.shown: set[str] = set()
        """The families of leaves whose shapes show that they are (in, out)."""
        self.claimed: set[str] = set()
        """The leaves that are weights of modules, even if their axes are not clear."""
        self.unplaced: list[str] = []
        """The names of modules without a leaf."""

    @functools.cached_property
    def _biases(self) -> dict[tuple[str, ...], str]:
        """The paths of biases by their words, without the word of the leaf."""
        words = {path: split_path(path) for path in reversed([*self.leaves])}
        return {own.words: path for path, own in words.items() if own.leaf == BIAS}

    def bias_of(self, path: str) -> str | None:
        """The path of the bias beside a weight, if there is one."""
        return self._biases.get(split_path(path).words)

    def given(self, name: str) -> Given | None:
        """The leaf that the caller gave a module; raises if the params lack it."""
        given = self._names.find(name)
        if given is None:
            return None
        self._used.add(given.name)
        text = given.text
        if text in self.leaves:
            return given._replace(path=text, part="", use="")
        if given.path in self.leaves:
            try:
                part = parts.canonical(given.part, self.shape(given.path))
            except ValueError as error:
                raise CheckpointError(
                    f"names has {text!r} for the module {name!r}: {error}"
                ) from None
            return given._replace(part=part)
        raise CheckpointError(
            f"names has {text!r} for the module {name!r}, and params have no such leaf"
            f"{self.hint(text)}."
        )

    def unused_names(self) -> list[str]:
        """The errors of entries of `names` that match nothing."""
        entries, masks = self._names.entries, PathMasks(self.leaves)
        taken = {entry.text for entry in entries if entry.name in self._used}

        def has(path: str) -> bool:
            return path in self.leaves or masks.match(parts.split(path).base)

        lines = []
        for entry in entries:
            name, path = entry.name, entry.text
            there = has(path)
            if name in self._used or (there and path not in taken):
                continue  # another checkpoint may adapt that weight
            hint = "" if there else self.hint(path)
            leaf = "" if there else f", nor such a leaf in the params{hint}"
            turned = " They go from modules to paths." if has(name) else ""
            lines.append(
                f"names has {path!r} for {name!r}, and there is no such module in the "
                f"checkpoint{leaf}.{turned}"
            )
        return lines

    def lies_in_out(self, path: str) -> bool:
        """Whether the names or the shapes of leaves show that a leaf is `(in, out)`."""
        return leaf_word(path) in _IN_OUT or self.family(path) in self.shown

    def family(self, path: str) -> str:
        """The leaves that have the same layout: the leaves called weight, or all others."""
        word = leaf_word(path)
        return word if word == WEIGHT else ""

    def hint(self, path: str) -> str:
        """The nearest path, for messages; empty for messages that are not shown."""
        self._hints += 1
        return tree_paths.nearest_hint(path, self.leaves) if self._hints <= _SHOWN else ""

    @functools.cached_property
    def _flat_index(self) -> PathIndex:
        return index_paths(self.leaves, flat=True)

    def search(
        self, words: tuple[str, ...], leaves: tuple[str, ...], *, flat: bool = False
    ) -> list[Found]:
        """The leaves whose paths have the longest common end with a name.

        `flat` is whether the words of the name were joined by underscores.
        """
        return search_paths(words, leaves, self._flat_index if flat else self._index)

    def shape(self, path: str, part: str = "") -> tuple[int, ...]:
        """The shape of a leaf, or of a part of it; `()` if it is not an array."""
        shape = tuple(getattr(self.leaves[path], "shape", ()))
        return part_shape(part, shape) if part else shape

    def letters(self, path: str, part: str = "") -> str:
        """The known letters of the axes of a leaf, or of a part of it; else empty."""
        return part_axes(part, self.shape(path), self.known.axes.get(path, ""))

    def leaf_axes(self, site: Site) -> str:
        """The letters of the axes of a leaf with a module in it.

        An axis that a part has one index of is `b`, unless the function shows more.
        """
        own, known = iter(site.axes), self.known.axes.get(site.path, "")
        entries = parts.entries(site.part, self.shape(site.path))
        dropped = (x if x in ("i", "o") else "b" for x in known or "b" * len(entries))
        return "".join(
            letter if isinstance(entry, int) else next(own)
            for entry, letter in zip(entries, dropped, strict=True)
        )

    def not_found(
        self, name: str, near: Iterable[Found], fits: str, part: str = ""
    ) -> CheckpointError:
        """The error for a module without a leaf that fits.

        `near` are leaves with similar paths, `fits` says what the leaf must have, and
        `part` is the path of a part of a leaf, as an example.
        """
        self.unplaced.append(name)
        listed = [f"{path!r} {self.shape(path)}{self.axes_of(path)}" for path, _ in near]
        if listed:
            hint = f"by its name it is {' or '.join(listed[:_SHOWN])}"
        else:
            hint = self.hint(name.replace(".", "/")).removeprefix("; ")
        for path, indices in near:
            shape = self.shape(path)
            if len(indices) > len(shape) or max(indices, default=-1) >= max(
                shape, default=0
            ):
                index = ", ".join(map(str, indices))
                hint += f", a stack without the index [{index}]"
        other = "torch" if self.layout == "jax" else "jax"
        fused = f" A part of a fused weight has an index: names={{{name!r}: {part!r}}}."
        return CheckpointError(
            f"no leaf of the params fits {name!r}, which needs {fits} in "
            f"layout={self.layout!r}; {hint}. Give names={{{name!r}: path}}, or the "
            f"function (fn, *args), or layout={other!r} if weights have that layout, or "
            f"the right params." + (fused if part else "")
        )

    def axes_of(self, path: str) -> str:
        """The known axes of a leaf, for messages."""
        known = self.known.axes.get(path)
        return f" with the axes {known!r} in {self.known.source}" if known else ""


def make_places(
    params: tree_paths.PyTree,
    fn: Callable[..., Any] | None,
    args: tuple[Any, ...],
    plan: AdapterPlan | None,
    names: NamesArgument,
    layout: Layout | None,
) -> Places:
    """The places that the arguments of `load` describe; see `find_known`."""
    known = find_known(params, fn, args, plan)
    return Places(tree_paths.leaf_paths(params), names, layout, known)


class Claim(NamedTuple):
    """A leaf that may hold the array of a module, and the ways to see the leaf."""

    site: Site
    """Without the letters of the axes, and without the stack."""
    readings: tuple[Reading, ...]
    turned: tuple[Reading, ...] = ()
    """Further ways, if the leaf is transposed."""
    by_shape: bool = False
    """Whether only the shape shows the way."""

    def settle(self, reading: Reading) -> Site:
        """The site, if a reading of the leaf is right."""
        return self.site._replace(axes=reading.axes, stack=reading.stack)


Reader: TypeAlias = Callable[[str, Numbers], Claim]
"""From a path, and the numbers of a module's name that are indexes, to a claim."""


def open_site(
    module: str, name: str, path: str, numbers: Numbers, given: Given = NOT_GIVEN
) -> Site:
    """The site of a module in a leaf, whose axes are not known yet.

    Its fields are named as in the module's name, so that a `NameTable` can be `names`.
    """
    indices, own = tuple(number for _, number in numbers), lacking_fields(name, path)
    same = indices == tuple(number for _, number in own)
    return Site(
        module,
        name,
        path,
        indices=indices,
        fields=tuple(field for field, _ in (own if same else numbers)),
        part=given.part,
        use=given.use,
        given=given.axes is not None,
    )


def fitting(found: Iterable[Found], read: Reader) -> list[Claim]:
    """The claims of a module to some leaves, without the leaves that do not fit."""
    claims = (
        read(path, tuple((f"index{i}", number) for i, number in enumerate(indices)))
        for path, indices in found
    )
    return [claim for claim in claims if claim.readings]


def given_claim(given: Given, name: str, read: Reader, *more: Numbers) -> Claim | None:
    """The claim to the leaf that the caller gave; None if the leaf does not fit.

    Further numbers of the module's name may be indexes of the leaf, and so may `more`.
    """
    numbers = given.numbers, lacking_fields(name, given.path), *more
    claims = (read(given.path, each) for each in dict.fromkeys(numbers))
    return next((claim for claim in claims if claim.readings), None)


def only(name: str, claims: list[Claim]) -> Claim:
    """The one leaf that fits; raises if there are several."""
    if len(claims) > 1:
        raise CheckpointError(
            f"{name!r} may be any of "
            f"{', '.join(repr(claim.site.path) for claim in claims[:8])}: give "
            f"names={{{name!r}: path}}."
        )
    return claims[0]


def shared_readings(
    places: Places, claims: list[Claim]
) -> tuple[list[Reading], list[Reading]]:
    """The ways to see a leaf that fit all of its modules, and those if it is transposed."""
    first, indices = claims[0].site, [claim.site.indices for claim in claims]
    shape, most = (
        places.shape(first.path, first.part),
        [*map(max, zip(*indices, strict=True))],
    )
    ways = []
    for options in ([c.readings for c in claims], [c.turned for c in claims]):
        fit = (each for each in options[0] if has_room(shape, each.stack, most))
        distinct = dict.fromkeys(options)
        ways.append([each for each in fit if all(each in other for other in distinct)])
    return ways[0], ways[1]
