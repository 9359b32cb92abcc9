"""Selects the weights that a config adapts, with a reason for each other leaf."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._core import checks, quantized, tree_paths
from lora_jax.plan import axis_roles
from lora_jax.plan.adapter_plan import (
    EXCLUDED,
    NOT_CHOSEN,
    WITHOUT_FUNCTION,
    AdapterPlan,
    alike,
)
from lora_jax.plan.config import ALL_LINEAR, LoraConfig, kept_patterns
from lora_jax.plan.target import Target, TrainedLeaf, Use

_PER_WEIGHT = ("rank_pattern", "alpha_pattern", "axes")

Uses = Mapping[str, tuple[Use, ...]]


def select(config: LoraConfig, leaves: Mapping[str, Any], uses: Uses | None) -> AdapterPlan:
    """Makes the plan of a config for some params.

    Args:
        config: the config.
        leaves: of the params, by path. Only shapes and dtypes are used.
        uses: of the leaves in a function, by path; None if there is no function.

    Returns:
        The plan.

    Raises:
        ValueError: if a pattern matches nothing, a pattern of `targets` matches what
            cannot have an adapter, a pattern of `train` what cannot be trained, or nothing
            is adapted.
    """
    arrays = {path: leaf for path, leaf in leaves.items() if checks.is_array(leaf)}
    targets: dict[str, Target] = {}
    skipped: dict[str, str] = {}
    refused: dict[str, axis_roles.UnsuitableError] = {}
    all_linear = config.targets == ALL_LINEAR
    if not all_linear:
        tree_paths.check_matched(
            "targets", kept_patterns(config.targets), arrays, "array of params"
        )
    for name in ("exclude", "train"):
        patterns = kept_patterns(getattr(config, name))
        tree_paths.check_matched(name, patterns, arrays, "array of params")
    trained = _trained(config, arrays)
    for path, leaf in leaves.items():
        if path in trained:
            continue
        reason = _passed_over(config, path, leaf)
        if reason is not None:
            skipped[path] = reason
            continue
        try:
            targets[path] = _target(config, path, leaf, uses)
        except axis_roles.UnsuitableError as error:
            skipped[path] = str(error)
            refused[path] = error
    if all_linear:  # skips weights that do not fit, but not ambiguous ones
        refused = {path: why for path, why in refused.items() if uses and _unclear(why)}
    if refused:
        raise ValueError(_refusal(refused))
    if not targets:
        raise ValueError(_nothing(config, arrays, skipped))
    for name in _PER_WEIGHT:
        patterns = getattr(config, name)
        lost = tree_paths.unmatched(patterns, targets)
        others = [(p, why) for p, why in skipped.items() if tree_paths.first_match(lost, p)]
        hint = f" {others[0][0]!r} has no adapter: {others[0][1]}." if others else ""
        tree_paths.check_matched(name, patterns, targets, "weight that is adapted", hint)
    return AdapterPlan(
        config=config,
        targets=targets,
        skipped=skipped,
        uses=uses or {},
        total=count(arrays.values()),
        trained=trained,
    )


def _trained(config: LoraConfig, arrays: Mapping[str, Any]) -> dict[str, TrainedLeaf]:
    """The leaves that the patterns of `train` select."""
    trained, refused = {}, []
    for path, leaf in arrays.items():
        if tree_paths.first_match(kept_patterns(config.train), path) is None:
            continue
        trained[path] = TrainedLeaf(tuple(leaf.shape))
        if quantized.is_quantized(leaf):
            refused.append(f"  {path!r}: it is quantized, so a step would change its codes")
        elif (reason := _not_trainable(leaf.dtype)) is not None:
            refused.append(f"  {path!r}: {reason}")
        elif config.targets != ALL_LINEAR and _passed_over(config, path, leaf) is None:
            pattern = tree_paths.first_match(kept_patterns(config.targets), path)
            refused.append(
                f"  {path!r}: the pattern {pattern!r} of targets adapts it. To train it, "
                f"give exclude=({path!r},)"
            )
    if refused:
        lines = "\n".join(["train matches what cannot be trained:", *refused])
        raise ValueError(f"{lines}\nNarrow the patterns of train.")
    return trained


def _not_trainable(dtype: Any) -> str | None:
    """Why no array of a dtype can be trained, or None."""
    if not checks.is_floating(dtype):
        return f"its dtype {dtype} is not floating point"
    if jnp.dtype(dtype).itemsize < 2:
        return f"its dtype {dtype} has less than 16 bits, and no meaning without its scales"
    return None


def _unclear(why: axis_roles.UnsuitableError) -> bool:
    return isinstance(why, axis_roles.AmbiguousError)


def count(leaves: Iterable[Any]) -> int:
    """The number of entries of all numeric arrays, without random keys."""
    arrays = filter(checks.is_array, leaves)
    return sum(
        math.prod(array.shape)
        for array in arrays
        if checks.has_jax_dtype(array)
        and not jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    )


def _passed_over(config: LoraConfig, path: str, leaf: Any) -> str | None:
    """Why the config does not choose a leaf, or None if it does."""
    if not checks.is_array(leaf):
        return f"it is not an array: {type(leaf).__name__}"
    excluded = tree_paths.first_match(kept_patterns(config.exclude), path)
    if excluded is not None:
        return f"the pattern {excluded!r} {EXCLUDED}"
    if config.targets == ALL_LINEAR or tree_paths.first_match(
        kept_patterns(config.targets), path
    ):
        return None
    return NOT_CHOSEN


def _target(config: LoraConfig, path: str, leaf: Any, uses: Uses | None) -> Target:
    shape = tuple(leaf.shape)
    _check_leaf(shape, leaf.dtype)
    if uses is None:
        axes = _axes_without_function(config, path, shape)
    else:
        axes = _axes_of_uses(config, path, shape, uses.get(path, ()))
    return Target(
        shape=shape,
        method=config.method,
        rank=config.rank_of(path),
        scale=config.scale_of(path),
        dropout=config.dropout,
        in_axes=axes.in_axes,
        out_axes=axes.out_axes,
        batch_axes=axes.batch_axes,
    )


def _check_leaf(shape: tuple[int, ...], dtype: Any) -> None:
    reason = _not_trainable(dtype)
    if reason is not None:
        raise axis_roles.UnsuitableError(reason)
    if len(shape) < 2:
        raise axis_roles.UnsuitableError(
            f"it is a {'vector' if shape else 'scalar'}, {shape}"
        )
    if 0 in shape:
        raise axis_roles.UnsuitableError(f"it has no entries: its shape is {shape}")


def _axes_without_function(
    config: LoraConfig, path: str, shape: tuple[int, ...]
) -> axis_roles.Resolved:
    letters = _given_axes(config, path, shape)
    if letters is None and len(shape) > 2:
        raise axis_roles.AmbiguousError(
            f"it has {len(shape)} axes, {shape}, and {WITHOUT_FUNCTION}: give "
            "plan_adapters the function and its arguments"
        )
    return axis_roles.from_letters(letters or "io", shape)


def _axes_of_uses(
    config: LoraConfig, path: str, shape: tuple[int, ...], uses: Sequence[Use]
) -> axis_roles.Resolved:
    if not uses:
        raise axis_roles.UnsuitableError("the function never uses it")
    low_rank = [use for use in uses if not use.merged]
    if config.targets == ALL_LINEAR:
        _check_linear(uses, low_rank)
    letters = _given_axes(config, path, shape)
    if letters is not None:
        return axis_roles.from_letters(letters, shape)
    lost = [use for use in uses if not use.is_followed]
    if lost:
        raise axis_roles.UnsuitableError(f"not every use of it is understood: {lost[0]}")
    merged = _letters_of_merged(shape, uses, low_rank)
    if merged is not None:
        raise axis_roles.MergedError(
            f"every use of it needs the merged weight: {_listed(uses)}", merged
        )
    return axis_roles.resolve_axes(shape, low_rank)


def _letters_of_merged(
    shape: tuple[int, ...], uses: Sequence[Use], low_rank: Sequence[Use]
) -> str | None:
    """The letters of the axes of a weight that only merged uses multiply.

    Returns:
        The letters, `"..."` if the uses do not tell, or None for any other weight.
    """
    if not low_rank:
        return axis_roles.letters_of(shape, uses) or "..."
    if any(map(_multiplies, low_rank)) or not any(map(_multiplies, uses)):
        return None
    # Taking an entry of a stack is not a use, but looks like a look-up in a table.
    known, letters = (axis_roles.letters_of(shape, own) for own in (low_rank, uses))
    is_stack = letters is not None and "b" in letters and letters != known
    return letters if known is None or is_stack else None


def _multiplies(use: Use) -> bool:
    return {"contracted", "kept"} <= {*use.roles}


def _check_linear(uses: Sequence[Use], low_rank: Sequence[Use]) -> None:
    """Raises unless `"all-linear"` selects a weight with these uses."""
    merged = [use for use in uses if use.merged and _multiplies(use)]
    linear = any(use.linear for use in low_rank)
    added = [use for use in low_rank if use.primitive in ("add", "sub", "add_any")]
    if added and (linear or merged):
        raise axis_roles.UnsuitableError(
            f"it is added to something, as a bias or positions are: {added[0]}. Name it in "
            "targets if it is the weight of a product all the same"
        )
    if merged and not linear:
        raise axis_roles.UnsuitableError(
            f"only what needs the merged weight multiplies it: {_listed(merged)}. Name it "
            "in targets to see how to adapt it"
        )
    if not linear:
        raise axis_roles.UnsuitableError(f"no matrix product uses it, only {_listed(uses)}")


def _listed(uses: Sequence[Use]) -> str:
    return " and ".join(map(str, uses))


def _given_axes(config: LoraConfig, path: str, shape: tuple[int, ...]) -> str | None:
    letters = config.axes_of(path)
    if letters is not None and len(letters) != len(shape):
        raise ValueError(
            f"axes gives {path!r} the letters {letters!r}, and its shape is {shape}: "
            "expected one letter for each axis."
        )
    return letters


def _refusal(refused: Mapping[str, axis_roles.UnsuitableError]) -> str:
    ambiguous = [path for path, why in refused.items() if _unclear(why)]
    others = [path for path in refused if path not in ambiguous]
    lines = ["targets matches what cannot have an adapter:"]
    lines += [f"  {path!r}: {why}" for path, why in refused.items()]
    if others:
        lines.append(f"Leave out with exclude={tuple(others)!r}, or narrow the patterns.")
    if ambiguous:
        lines.append(
            f"Give axes={_axes_of(dict.fromkeys(ambiguous, '...'))} with one letter for "
            "each axis: i (input), o (output) or b (batch)."
        )
    merged = {
        path: why.letters
        for path, why in refused.items()
        if isinstance(why, axis_roles.MergedError)
    }
    if merged:
        lines.append(
            "A weight that every use needs merged can have an adapter if its axes are "
            f"given and the merges are allowed: axes={_axes_of(merged)}"
            + _UNKNOWN * ("..." in merged.values())
            + ", and adapt(fn, plan, on_merge='allow')."
        )
    return "\n".join(lines)


_UNKNOWN = (
    ' (for "..." one letter for each axis: i for input, o for output, b for batch, which '
    "the uses do not tell)"
)


def _axes_of(letters: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'{path!r}: "{own}"' for path, own in letters.items()) + "}"


def _nothing(
    config: LoraConfig, arrays: Mapping[str, Any], skipped: Mapping[str, str]
) -> str:
    """The error if no weight has an adapter; it lists the matrices first."""
    lines = [f"nothing is adapted with targets={config.targets!r}:"]
    matrices: dict[tuple[str, str], list[str]] = {}
    rest: dict[str, dict[str, str]] = {}
    for path, why in skipped.items():
        if path in arrays and _is_matrix(arrays[path]):
            matrices.setdefault((tree_paths.without_numbers(path), why), []).append(path)
        else:
            rest.setdefault(why.partition(",")[0].partition(":")[0], {})[path] = why
    lines += [f"  {alike(key[0], paths)}: {key[1]}" for key, paths in matrices.items()]
    for kind, reasons in rest.items():
        same = len(set(reasons.values())) == 1
        why = next(iter(reasons.values())) if same else kind
        lines.append(f"  {tree_paths.listed(list(reasons))}: {why}")
    if not skipped:
        lines.append("  params has no leaves")
    return "\n".join(lines)


def _is_matrix(leaf: Any) -> bool:
    return len(leaf.shape) >= 2 and checks.is_floating(leaf.dtype)
