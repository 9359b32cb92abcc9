"""The axes and uses of leaves that a function or a plan shows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax._core import checks, tree_paths
from lora_jax.peft.keys import Kind
from lora_jax.plan import axis_roles, parts, plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan, Use
from lora_jax.transform import discovery

_STACKED = ("batch", "stacked")


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
        gathers = [use for use in uses if _gathers(use)]
        return any(axes[axis] == "i" for use in gathers for axis in _sides(use)[0])

    def tie(self, path: str) -> tuple[Use, Use] | None:
        """Two uses with inputs and outputs swapped, as of a tied head; None if none."""
        return next(self._ties(path), None)

    def _ties(self, path: str) -> Iterator[tuple[Use, Use]]:
        sides = [(use, *_sides(use)) for use in self.uses.get(path, ())]
        for use, inputs, outputs in sides:
            for other, other_inputs, other_outputs in sides:
                if inputs & other_outputs and outputs & other_inputs:
                    yield use, other

    def side(self, path: str, kind: Kind) -> str:
        """The use of a tied leaf that a module of some kind is: a look-up or a product.

        Empty if the leaf is not tied, or two uses with inputs and outputs swapped are both
        products.
        """
        ties = [*self._ties(path)]
        if not ties or any(one.kind(()) == other.kind(()) for one, other in ties):
            return ""
        return parts.LOOKUP if kind == "embedding" else parts.PRODUCT


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


def _gathers(use: Use) -> bool:
    return "indexed" in use.roles and "contracted" not in use.roles


def _sides(use: Use) -> tuple[set[int], set[int]]:
    """The axes of inputs and of outputs. Gathered rows are inputs."""
    roles = [*enumerate(use.roles)]
    if _gathers(use):
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
