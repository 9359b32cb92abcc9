"""The leaves of params: their paths, shapes, and what a function shows of their axes."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax._core import checks, tree_paths
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.formats.keys import BIAS, WEIGHT, Kind
from lora_jax.peft.layout import (
    LAYOUTS,
    Layout,
    Site,
    part_axes,
    part_shape,
)
from lora_jax.peft.names import Given, Names, NamesArgument, PathMasks
from lora_jax.peft.words import (
    Found,
    PathIndex,
    index_paths,
    leaf_word,
    search_paths,
    split_path,
)
from lora_jax.plan import axis_roles, parts, plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan, Use
from lora_jax.transform import discovery

# Further problems are counted and not shown.
_SHOWN = 10
UNUSUAL_KERNEL = (
    "is the kernel of a convolution, and its axes are neither (*kernel, in, out) nor (out, "
    "in, *kernel): PEFT has these alone. Give params and a function with one of them."
)
_STACKED = ("batch", "stacked")
# Leaves with these names are (in, out) in every framework that has such names.
_IN_OUT = ("kernel", "w", "embedding", "embeddings")


class Known(NamedTuple):
    """The known axes and uses of leaves, by path."""

    axes: Mapping[str, str] = {}
    """A letter for each axis: `i`, `o` or `b` as in `LoraConfig.axes`; `-` if it is `i` or
    `o`; `?` if it may be any."""
    uses: Mapping[str, tuple[Use, ...]] = {}
    source: str = ""
    """Where this is known from, for messages: the function, or the plan."""
    trained: frozenset[str] = frozenset()
    """The leaves that the plan trains."""
    products: Mapping[str, str] = {}
    """The functions that the plan states to be products; as in `LoraConfig`."""

    def looked_up(self, path: str) -> bool | None:
        """Whether rows of a leaf are gathered; None if its uses are not known."""
        uses, axes = self.uses.get(path), self.axes.get(path, "")
        if not uses:
            return None
        return any(axes[i] == "i" for use in uses if gathers(use) for i in _sides(use)[0])

    def tie(self, path: str) -> tuple[Use, Use] | None:
        """Two uses with inputs and outputs swapped, as of a tied head; None if none."""
        return next(self._ties(path), None)

    def _ties(self, path: str) -> Iterator[tuple[Use, Use]]:
        sides = [(use, *_sides(use)) for use in self.uses.get(path, ())]
        for use, inputs, outputs in sides:
            for other, other_inputs, other_outputs in sides:
                if inputs & other_outputs and outputs & other_inputs:
                    yield use, other

    def check_kernel(self, path: str, shape: tuple[int, ...]) -> None:
        """Raises for the kernel of a convolution whose axes have another order."""
        for use in self.uses.get(path, ()):
            if not use.has_usual_kernel(shape):
                raise CheckpointError(f"{path!r} {shape} {UNUSUAL_KERNEL}")

    def letters(self, path: str, use: str) -> str:
        """The letters of a leaf in one of its uses, if it is tied; or else in all uses."""
        letters = self.axes.get(path, "")
        for own in self.uses.get(path, ()) if use and self.tie(path) else ():
            inputs, outputs = _sides(own)
            if own.kind(()) == use and inputs and outputs:
                pairs = enumerate(letters)
                return "".join(
                    "i" if axis in inputs else "o" if axis in outputs else letter
                    for axis, letter in pairs
                )
        return letters

    def side(self, path: str, kind: Kind) -> str:
        """The use of a tied leaf that a module of some kind is: a look-up or a product.

        Empty if the leaf is not tied, or two uses with inputs and outputs swapped are both
        products.
        """
        ties = [*self._ties(path)]
        if not ties or any(one.kind(()) == other.kind(()) for one, other in ties):
            return ""
        return parts.LOOKUP if kind == "embedding" else parts.PRODUCT


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

    def letters(self, path: str, part: str = "", use: str = "") -> str:
        """The known letters of the axes of a leaf, or of a part of it; else empty.

        `use` is of a tied leaf, whose uses have inputs and outputs swapped.
        """
        return part_axes(part, self.shape(path), self.known.letters(path, use))

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


def find_known(
    params: tree_paths.PyTree,
    fn: Callable[..., Any] | None,
    args: tuple[Any, ...],
    plan: AdapterPlan | None,
) -> Known:
    """The axes that the arguments of `load` show."""
    if fn is None and args:
        raise TypeError(
            "got arguments and no function: the order is load(directory, params, fn, "
            "*args), where fn(params, *args) applies the model."
        )
    if fn is not None and not callable(fn):
        raise TypeError(
            f"fn must be a function, got {type(fn).__name__}: the order is load(directory, "
            "params, fn, *args), and all other arguments are keywords."
        )
    if plan is not None and not isinstance(plan, AdapterPlan):
        raise TypeError(f"plan must be an AdapterPlan, got {type(plan).__name__}.")
    if fn is not None and plan is not None:
        raise TypeError("both fn and plan show the axes: give one of them.")
    leaves = tree_paths.leaf_paths(params)
    if plan is not None:
        plan_checks.check_params(leaves, plan)
        targets = {plan.leaf(path): own.axes for path, own in plan.targets.items()}
        letters = _letters(leaves, plan.uses) | targets
        trained, products = frozenset(plan.trained), plan.config.products
        return Known(letters, plan.uses, "the plan", trained, products)
    if fn is None:
        return Known()
    uses = discovery.find_uses(fn, params, args, {})
    return Known(_letters(leaves, uses), uses, "the function")


def _letters(
    leaves: Mapping[str, Any], uses: Mapping[str, tuple[Use, ...]]
) -> dict[str, str]:
    """The letters of the axes of each leaf that has uses."""
    return {
        path: _letters_of(tuple(leaves[path].shape), own)
        for path, own in uses.items()
        if own and path in leaves and checks.is_array(leaves[path])
    }


def _letters_of(shape: tuple[int, ...], uses: Sequence[Use]) -> str:
    roles = [{use.roles[axis] for use in uses} - {""} for axis in range(len(shape))]
    found = axis_roles.letters_of(shape, [use for use in uses if not use.merged])
    if found is None:
        return "".join(map(_letter, roles))
    each = zip(found, roles, shape, strict=True)
    return "".join(letter if own or n == 1 else "?" for letter, own, n in each)


def _letter(roles: set[str]) -> str:
    """The letter of an axis of a leaf that is in no matrix product."""
    if not roles:
        return "?"
    if roles <= set(_STACKED):
        return "b"
    return "?" if roles & set(_STACKED) else "-"


def gathers(use: Use) -> bool:
    """Whether a use looks rows up, and multiplies nothing."""
    return "indexed" in use.roles and "contracted" not in use.roles


def _sides(use: Use) -> tuple[set[int], set[int]]:
    """The axes of inputs and of outputs. Gathered rows are inputs."""
    roles = [*enumerate(use.roles)]
    if gathers(use):
        inputs = {axis for axis, own in roles if own == "indexed"}
        return inputs, {a for a, own in roles if own not in ("indexed", *_STACKED)}
    inputs = {axis for axis, own in roles if own == "contracted"}
    return inputs, {axis for axis, own in roles if own == "kept"}


def agrees(axes: str, pattern: str) -> bool:
    """Whether letters of axes agree with a pattern of known letters."""
    return len(axes) == len(pattern) and all(
        known in ("?", own) or (known == "-" and own in "io")
        for own, known in zip(axes, pattern, strict=True)
    )
