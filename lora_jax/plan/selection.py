"""Selects the weights that a config adapts, and gives a reason for every other leaf."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp

from lora_jax._core import checks, quantized, tree_paths
from lora_jax.plan import axis_roles, parts
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.axis_roles import AmbiguousError, UnsuitableError, listed, multiplies
from lora_jax.plan.config import ALL_LINEAR, LoraConfig, resolved_scale
from lora_jax.plan.plan_text import EXCLUDED, NOT_CHOSEN, WITHOUT_FUNCTION, alike
from lora_jax.plan.target import Target, TrainedLeaf, Use

_WHICH = ("targets", "exclude", "train")
_PER_WEIGHT = ("rank_pattern", "alpha_pattern", "axes")

Leaves: TypeAlias = Mapping[str, Any]
Uses: TypeAlias = Mapping[str, tuple[Use, ...]]


def select(config: LoraConfig, leaves: Leaves, uses: Uses | None) -> AdapterPlan:
    """Makes the plan of a config for the leaves of params, by path.

    `uses` are the uses of the leaves in a function, by path; None without a function.

    Raises:
        ValueError: if a pattern matches nothing, a pattern of `targets` matches a leaf that
            cannot have an adapter, a pattern of `train` matches a leaf that cannot be
            trained, or nothing is adapted.
    """
    arrays = {path: leaf for path, leaf in leaves.items() if checks.is_array(leaf)}
    targets: dict[str, Target] = {}
    skipped: dict[str, str] = {}
    refused: dict[str, UnsuitableError] = {}
    patterns = _Patterns(config, arrays)
    trained = _trained(patterns, arrays)
    for path, leaf in leaves.items():
        if path in trained:
            continue
        reason = _passed_over(patterns, path, leaf)
        if reason is None:
            try:
                found = _targets(config, patterns, path, leaf, uses)
                reason = None if found else f"the patterns of its parts {EXCLUDED}"
                targets |= found
            except UnsuitableError as error:
                reason = str(error)
                # "all-linear" skips unsuitable weights, but not ambiguous ones.
                if not patterns.all_linear or (uses and isinstance(error, AmbiguousError)):
                    refused[path] = error
        if reason is not None:
            skipped[path] = reason
    if refused:
        raise ValueError(_refusal(refused))
    if not targets:
        raise ValueError(_nothing(config, arrays, skipped))
    plan = AdapterPlan(
        config=config,
        targets=targets,
        skipped=skipped,
        uses=uses or {},
        total=tree_paths.count_entries(arrays),
        trained=trained,
    )
    adapted = plan.by_leaf()
    for name in _PER_WEIGHT:
        bases = [own.base for own in patterns.readings[name].values()]
        lost = tree_paths.unmatched(bases, adapted)
        others = [(p, why) for p, why in skipped.items() if tree_paths.first_match(lost, p)]
        hint = f" {others[0][0]!r} has no adapter: {others[0][1]}." if others else ""
        tree_paths.check_matched(name, bases, adapted, "weight that is adapted", hint)
    return plan


class _Patterns:
    """The patterns of a config, split into base, part and use for the given paths."""

    def __init__(self, config: LoraConfig, paths: Iterable[str]):
        paths = list(paths)
        self.all_linear = config.targets == ALL_LINEAR
        self.readings: dict[str, dict[str, parts.Reading]] = {}
        for name in (*_WHICH, *_PER_WEIGHT):
            given = getattr(config, name)
            own = () if given == ALL_LINEAR else given
            self.readings[name] = {p: parts.read(name, p, paths) for p in own}
        self._indices = {
            name: tree_paths.PatternIndex(tuple(each.base for each in own.values()))
            for name, own in self.readings.items()
        }
        for name in _WHICH:
            bases = [own.base for own in self.readings[name].values()]
            with_use = any("@" in base for base in bases)
            hint = " A use is '@lookup' or '@product'." if with_use else ""
            tree_paths.check_matched(name, bases, paths, "array of params", hint)

    def of(self, name: str, path: str) -> dict[str, parts.Reading]:
        """The patterns of a field that match a leaf or parts of it, in their order."""
        given = [*self.readings[name].items()]
        return dict(given[i] for i in self._indices[name].matching(path))


class _Piece(NamedTuple):
    """A weight, or a part of one, that has one adapter."""

    part: str
    use: str
    rank: int
    alpha: float


def _pieces(
    config: LoraConfig,
    patterns: _Patterns,
    path: str,
    shape: tuple[int, ...],
    kinds: Sequence[str],
) -> list[_Piece]:
    """The parts of a leaf that have adapters, with their ranks and alphas.

    A selected part is cut into several pieces if patterns of `exclude`, `rank_pattern` or
    `alpha_pattern` select only some of its indices, or one kind of use.
    """
    chosen = patterns.of("targets", path).values() or [parts.Reading(path)]
    excluded, ranks, alphas = (
        patterns.of(name, path) for name in ("exclude", "rank_pattern", "alpha_pattern")
    )
    others = [*excluded.values(), *ranks.values(), *alphas.values()]
    cuts, by_use = [own.part for own in others], any(own.use for own in others)
    wholes = dict.fromkeys(
        (parts.canonical(own.part, shape), use)
        for own in chosen
        for use in (kinds if by_use and not own.use else [own.use])
    )
    pieces = []
    for whole, use in wholes:
        alike: dict[tuple[int, float], list[str]] = {}
        for part in parts.cut(whole, cuts, shape):
            first = functools.partial(_first_of_part, part, use, shape)
            if first(excluded) is None:
                rank = config.rank_pattern.get(first(ranks) or "", config.rank)
                alpha = config.alpha_pattern.get(first(alphas) or "", config.alpha)
                alike.setdefault((rank, alpha), []).append(part)
        for numbers, own in alike.items():
            pieces += [_Piece(part, use, *numbers) for part in parts.joined(own, shape)]
    return pieces


def _first_of_part(
    part: str, use: str, shape: tuple[int, ...], found: Mapping[str, parts.Reading]
) -> str | None:
    """The first pattern that applies to a part; the part is inside or outside of each."""
    for pattern, own in found.items():
        if own.use in ("", use) and parts.overlap(own.part, part, shape):
            return pattern
    return None


def _trained(patterns: _Patterns, arrays: Mapping[str, Any]) -> dict[str, TrainedLeaf]:
    """The leaves that the patterns of `train` select."""
    trained, refused = {}, []
    for path, leaf in arrays.items():
        selected = patterns.of("train", path)
        if not selected:
            continue
        trained[path] = TrainedLeaf(tuple(leaf.shape))
        if quantized.is_quantized(leaf):
            refused.append(f"  {path!r}: it is quantized, so a step would change its codes")
        elif (reason := _not_trainable(leaf.dtype)) is not None:
            refused.append(f"  {path!r}: {reason}")
        elif part := next((p for p, own in selected.items() if own.part or own.use), None):
            refused.append(
                f"  {path!r}: the pattern {part!r} selects a part of it, but a leaf is "
                "trained as a whole"
            )
        elif not patterns.all_linear and _passed_over(patterns, path, leaf) is None:
            pattern = next(iter(patterns.of("targets", path)))
            refused.append(
                f"  {path!r}: the pattern {pattern!r} of targets adapts it. To train it, "
                f"give exclude=({path!r},)"
            )
    if refused:
        lines = "\n".join(["train matches leaves that cannot be trained:", *refused])
        raise ValueError(f"{lines}\nNarrow the patterns of train.")
    return trained


def _not_trainable(dtype: Any) -> str | None:
    """The reason why an array of this dtype cannot be trained, or None."""
    if not checks.is_floating(dtype):
        return f"its dtype {dtype} is not floating point"
    if jnp.dtype(dtype).itemsize < 2:
        return f"its dtype {dtype} has less than 16 bits, and no meaning without its scales"
    return None


def _passed_over(patterns: _Patterns, path: str, leaf: Any) -> str | None:
    """The reason why the config does not select a leaf, or None if it does."""
    if not checks.is_array(leaf):
        return f"it is not an array: {type(leaf).__name__}"
    for pattern, own in patterns.of("exclude", path).items():
        if not own.part and not own.use:
            return f"the pattern {pattern!r} {EXCLUDED}"
    return None if patterns.all_linear or patterns.of("targets", path) else NOT_CHOSEN


def _targets(
    config: LoraConfig, patterns: _Patterns, path: str, leaf: Any, uses: Uses | None
) -> dict[str, Target]:
    """The targets of a leaf that the config selects, by path: one for each piece."""
    shape = tuple(leaf.shape)
    _check_leaf(shape, leaf.dtype)
    own = () if uses is None else uses.get(path, ())
    if uses is None:
        axes = _axes_without_function(config, path, shape)
    else:
        axes = _axes_of_uses(config, path, shape, own)
    targets = {}
    kind_of = {use: use.kind(axes.batch_axes) for use in own}
    kinds = [k for k in parts.USES if uses is None or k in kind_of.values()]
    with checks.at_path(path):
        pieces = _pieces(config, patterns, path, shape, kinds)
    for piece in pieces:
        _check_has_use(piece.use, kinds, own)
        if piece.use and own and config.axes_of(path) is None:
            # The inputs of a tied table's look-ups are the outputs of its products.
            alike = [u for u in own if kind_of[u] in ("", piece.use) and not u.merged]
            axes = axis_roles.resolve_axes(shape, alike)
        with checks.at_path(path):
            target = Target(
                shape=shape,
                method=config.method,
                rank=piece.rank,
                scale=resolved_scale(config, piece.rank, piece.alpha),
                dropout=config.dropout,
                **axes._asdict(),
                part=piece.part,
                use=piece.use,
            )
            if min(target.matrix_shape[-2:]) == 1:
                raise ValueError(
                    f"the part {target.part} is a vector: as a matrix it is "
                    f"{target.matrix_shape[-2:]}, of rank 1."
                )
        targets[path + target.suffix] = target
    return targets


def _check_has_use(use: str, kinds: Sequence[str], uses: Sequence[Use]) -> None:
    """Raises unless the function has a use of the kind that is adapted."""
    if use and use not in kinds:
        what = "look-up of its rows" if use == parts.LOOKUP else "product"
        raise UnsuitableError(
            f"the function has no {what} that '@{use}' would adapt, only {listed(uses)}"
        )


def _check_leaf(shape: tuple[int, ...], dtype: Any) -> None:
    reason = _not_trainable(dtype)
    if reason is None and len(shape) < 2:
        reason = f"it is a {'vector' if shape else 'scalar'}, {shape}"
    elif reason is None and 0 in shape:
        reason = f"it has no entries: its shape is {shape}"
    if reason is not None:
        raise UnsuitableError(reason)


def _axes_without_function(
    config: LoraConfig, path: str, shape: tuple[int, ...]
) -> axis_roles.Resolved:
    letters = _given_axes(config, path, shape)
    if letters is None and len(shape) > 2:
        raise AmbiguousError(
            f"it has {len(shape)} axes, {shape}, and {WITHOUT_FUNCTION}: give "
            "plan_adapters the function and its arguments"
        )
    return axis_roles.from_letters(letters or "io", shape)


def _axes_of_uses(
    config: LoraConfig, path: str, shape: tuple[int, ...], uses: Sequence[Use]
) -> axis_roles.Resolved:
    if not uses:
        raise UnsuitableError("the function never uses it")
    low_rank = [use for use in uses if not use.merged]
    if config.targets == ALL_LINEAR:
        _check_linear(uses, low_rank)
    letters = _given_axes(config, path, shape)
    if letters is not None:
        return axis_roles.from_letters(letters, shape)
    lost = [use for use in uses if not use.is_followed]
    if lost:
        raise UnsuitableError(f"not every use of it is understood: {lost[0]}")
    merged = axis_roles.letters_of_merged(shape, uses, low_rank)
    if merged is not None:
        raise axis_roles.MergedError(
            f"every use of it needs the merged weight: {listed(uses)}", merged
        )
    return axis_roles.resolve_axes(shape, low_rank)


def _check_linear(uses: Sequence[Use], low_rank: Sequence[Use]) -> None:
    """Raises unless `"all-linear"` selects a weight with these uses."""
    merged = [use for use in uses if use.merged and multiplies(use)]
    linear = any(use.linear for use in low_rank)
    added = [use for use in low_rank if use.primitive in ("add", "sub", "add_any")]
    if added and (linear or merged):
        raise UnsuitableError(
            f"it is added to something, as biases and position embeddings are: {added[0]}. "
            "If it is the weight of a product, name it in targets"
        )
    if merged and not linear:
        raise UnsuitableError(
            f"only uses that need the merged weight multiply it: {listed(merged)}. Name "
            "it in targets to see how to adapt it"
        )
    if not linear:
        raise UnsuitableError(f"no matrix product uses it, only {listed(uses)}")


def _given_axes(config: LoraConfig, path: str, shape: tuple[int, ...]) -> str | None:
    letters = config.axes_of(path)
    if letters is not None and len(letters) != len(shape):
        raise ValueError(
            f"axes gives {path!r} the letters {letters!r}, and its shape is {shape}: "
            "expected one letter for each axis."
        )
    return letters


def _refusal(refused: Mapping[str, UnsuitableError]) -> str:
    ambiguous = [p for p, why in refused.items() if isinstance(why, AmbiguousError)]
    others = [path for path in refused if path not in ambiguous]
    lines = ["targets matches leaves that cannot have an adapter:"]
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
            "A weight can have an adapter although every use needs it merged, if its axes "
            f"are given and the merges are allowed: axes={_axes_of(merged)}"
            + _UNKNOWN * ("..." in merged.values())
            + ", and adapt(fn, plan, on_merge='allow')."
        )
    return "\n".join(lines)


_UNKNOWN = (
    ' (for "..." one letter for each axis, since the uses do not show them: i for input, o '
    "for output, b for batch)"
)


def _axes_of(letters: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'{path!r}: "{own}"' for path, own in letters.items()) + "}"


def _nothing(config: LoraConfig, arrays: Leaves, skipped: Mapping[str, str]) -> str:
    """The error message if no weight has an adapter; it lists the matrices first."""
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
