"""What a function, or a plan, says of the axes of the leaves of some params."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex

from lora_jax._core import checks, tree_paths
from lora_jax.plan import axis_roles, plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan, Use
from lora_jax.transform import discovery

_STACKED = ("batch", "stacked")


class Known(NamedTuple):
    """What is known of the leaves, by path; all of it empty if there is nothing."""

    axes: Mapping[str, str] = {}
    """A letter for each axis: `i`, `o` or `b` as in `LoraConfig.axes`; `-` if it is `i` or
    `o`; `?` if it may be any."""
    uses: Mapping[str, tuple[Use, ...]] = {}
    source: str = ""
    """What says so, for messages: the function, or the plan."""

    def looked_up(self, path: str) -> bool | None:
        """Whether rows of a leaf are looked up; None if its uses are not known."""
        uses, axes = self.uses.get(path), self.axes.get(path, "")
        if not uses:
            return None
        return any(axes[a] == "i" for use in uses if _is_look_up(use) for a in _inputs(use))

    def tie(self, path: str) -> tuple[Use, Use] | None:
        """Two uses that have in and out the other way round, as a tied head does."""
        uses = self.uses.get(path, ())
        for use in uses:
            for other in uses:
                if _inputs(use) & _outputs(other) and _outputs(use) & _inputs(other):
                    return use, other
        return None


def find_known(
    params: chex.ArrayTree,
    fn: Callable[..., Any] | None,
    args: tuple[Any, ...],
    plan: AdapterPlan | None,
) -> Known:
    """What the arguments of `load` say of the axes.

    Args:
        params: of the model.
        fn: is traced as `fn(params, *args)`; None if there is none.
        args: of `fn`.
        plan: of the params; None if there is none.

    Raises:
        KeyError, TypeError, ValueError: if an argument is none that it may be.
    """
    if fn is None and args:
        raise TypeError(
            "there are arguments and no function: the order is load(directory, params, fn, "
            "*args), where fn(params, *args) applies the model."
        )
    if fn is not None and not callable(fn):
        raise TypeError(
            f"fn must be a function, got {type(fn).__name__}: the order is load(directory, "
            "params, fn, *args), and all else is given by name."
        )
    if plan is not None and not isinstance(plan, AdapterPlan):
        raise TypeError(f"plan must be an AdapterPlan, got {type(plan).__name__}.")
    if fn is not None and plan is not None:
        raise TypeError("both fn and plan say what the axes are: give one of them.")
    leaves = tree_paths.leaf_paths(params)
    if plan is not None:
        plan_checks.check_params(leaves, plan)
        targets = {path: target.axes for path, target in plan.targets.items()}
        return Known(_letters(leaves, plan.uses) | targets, plan.uses, "the plan")
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
    known = [use for use in uses if not use.merged]
    try:
        found = axis_roles.resolve_axes(shape, known)
    except axis_roles.UnsuitableError:
        return "".join(map(_letter, roles))
    groups = zip("iob", found, strict=True)
    letters = {axis: letter for letter, axes in groups for axis in axes}
    return "".join(
        letters[axis] if roles[axis] or n == 1 else "?" for axis, n in enumerate(shape)
    )


def _letter(roles: set[str]) -> str:
    """The letter of an axis of a weight that is in no matrix product."""
    if not roles:
        return "?"
    if roles <= set(_STACKED):
        return "b"
    return "?" if roles & set(_STACKED) else "-"


def _is_look_up(use: Use) -> bool:
    return "indexed" in use.roles and "contracted" not in use.roles


def _inputs(use: Use) -> set[int]:
    role = "indexed" if _is_look_up(use) else "contracted"
    return {axis for axis, own in enumerate(use.roles) if own == role}


def _outputs(use: Use) -> set[int]:
    if _is_look_up(use):
        return {
            axis for axis, own in enumerate(use.roles) if own not in ("indexed", *_STACKED)
        }
    return {axis for axis, own in enumerate(use.roles) if own == "kept"}


def agrees(axes: str, pattern: str) -> bool:
    """Whether the letters of axes are those that are known, as far as they are."""
    return len(axes) == len(pattern) and all(
        known in ("?", own) or (known == "-" and own in "io")
        for own, known in zip(axes, pattern, strict=True)
    )
