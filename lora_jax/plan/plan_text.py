"""The text about a plan: its table, and why a leaf is adapted or not."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from lora_jax._core import tree_paths
from lora_jax._core.tables import format_html, format_table
from lora_jax.plan import mesh_layout, parts
from lora_jax.plan.config import ALL_LINEAR
from lora_jax.plan.target import Target, Use

_HEADER = ("path", "shape", "axes", "method", "rank", "scale", "parameters", "share")
_NUMBERS = (4, 5, 6, 7, 11)  # the columns that are aligned on the right

# Reasons why a leaf has no adapter that a printed plan has to tell apart.
NOT_CHOSEN = "no pattern of targets matches it"
EXCLUDED = "of exclude matches it"
NOT_IN_SUBSET = "no pattern of the subset matches it"
WITHOUT_FUNCTION = "without a function only the axes of a 2-D weight are known"


# An `AdapterPlan`, whose module imports this one.
_Plan: TypeAlias = Any


def table(plan: _Plan) -> str:
    """The table of `AdapterPlan.__str__`."""
    return "\n".join([*format_table(_rows(plan), _NUMBERS), *_notes(plan)])


def html(plan: _Plan) -> str:
    """The table of a plan for a notebook."""
    return format_html(_rows(plan), _NUMBERS, [*_notes(plan)], foot=1)


def _rows(plan: _Plan) -> list[tuple[str, ...]]:
    """The header of the table, a row for each entry, and a row for their sum."""
    total = plan.total and plan.total + plan.parameters
    layout = plan.layout
    rows: list[tuple[str, ...]] = [_HEADER]
    for path, target in plan.targets.items():
        shape, count = str(target.alone.shape), target.parameters
        numbers = str(target.rank), f"{target.scale:g}", *_counted(count, total)
        rows.append((path, shape, target.alone.axes, target.method, *numbers))
    for path, leaf in plan.trained.items():
        counted = _counted(leaf.parameters, total)
        rows.append((path, str(leaf.shape), "", "trained", "", "", *counted))
    whole = _counted(plan.parameters, total)
    rows.append((f"total of {len(plan.entries)}", *[""] * 5, *whole))
    if layout is not None:
        own = map(layout.cells, plan.entries)
        more = (mesh_layout.HEADER, *own, layout.total(plan.entries))
        rows = [(*row, *cells) for row, cells in zip(rows, more, strict=True)]
    return rows


def _notes(plan: _Plan) -> Iterable[str]:
    """The lines below the table."""
    if plan.layout is not None:
        yield str(plan.layout)
    uses = [(path, use) for path in plan.by_leaf() for use in plan.uses.get(path, ())]
    for path, use in uses:
        if use.merged:
            yield f"to be merged: {path!r}, {use}"
    for path, use in uses:
        if "stopped" in use.roles:
            yield f"gradient stopped: {path!r}, {use}"
    yield from _left_out(plan)


def explain(plan: _Plan, path: str) -> str:
    """The lines of `AdapterPlan.explain`."""
    of_leaf = plan.by_leaf()
    paths = dict.fromkeys((*plan.entries, *of_leaf, *plan.skipped))
    path = tree_paths.find(path, paths)
    if path in plan.skipped:
        lines, leaf = [f"{path}: no adapter, because {plan.skipped[path]}."], path
    elif path in plan.targets:
        lines, leaf = [*_explained(plan, path, plan.targets[path])], plan.leaf(path)
    elif path in plan.trained:
        pattern = tree_paths.first_match(plan.config.train, path)
        count, leaf = plan.trained[path].parameters, path
        lines = [f"{path}: trained without an adapter, {count:,} parameters."]
        lines += [f"chosen by train: {pattern!r}"] if pattern else []
    elif path in of_leaf:
        lines, leaf = [f"{path}: adapted in part."], path
        for own in of_leaf[path]:
            lines += _explained(plan, own, plan.targets[own])
    else:
        hint = tree_paths.nearest_hint(path, paths)
        raise KeyError(f"the params of this plan have no leaf at {path!r}{hint}.")
    uses = plan.uses.get(leaf, ())
    return "\n  ".join([*lines, *(f"use: {use}" for use in uses)])


def _counted(count: int, total: int) -> tuple[str, str]:
    """A number of parameters, and its share of all of them."""
    return f"{count:,}", f"{100 * count / total:.3f} %" if total else ""


def _left_out(plan: _Plan) -> Iterable[str]:
    """A line for each reason why weights that look like matrices have no adapter."""
    lines: dict[tuple[str, str], list[str]] = {}
    for path, reason in plan.skipped.items():
        if _looks_like_matrix(plan.uses.get(path), reason):
            lines.setdefault((tree_paths.without_numbers(path), reason), []).append(path)
    for (pattern, reason), paths in lines.items():
        yield f"left out: {alike(pattern, paths)}: {reason}"


def _looks_like_matrix(uses: Sequence[Use] | None, reason: str) -> bool:
    """Whether users may expect an adapter for a weight that has none, for a reason.

    `uses` are those of a floating-point weight with two axes or more, else None.
    """
    if uses is None:
        return WITHOUT_FUNCTION in reason
    chosen = not reason.endswith((NOT_CHOSEN, EXCLUDED, NOT_IN_SUBSET))
    return chosen and not any(_of_vectors(use.roles) for use in uses)


def _of_vectors(roles: tuple[str, ...]) -> bool:
    """Whether a use scans over a stack of vectors, such as biases of layers."""
    return 0 < len(roles) - 1 <= roles.count("stacked")


def alike(pattern: str, paths: Sequence[str]) -> str:
    """Names weights whose paths differ in numbers only."""
    if len(paths) == 1:
        return repr(paths[0])
    return f"{len(paths)} weights {pattern!r}"


def _explained(plan: _Plan, path: str, target: Target) -> Iterable[str]:
    """The lines about a target, without its uses."""
    yield (
        f"{path}: {target.method}, rank {target.rank}, scale {target.scale:g}, "
        f"{target.parameters:,} parameters."
    )
    yield f"chosen by targets: {_choice(plan, path)}"
    *batch, n_in, n_out = target.matrix_shape
    stack = f"{' x '.join(map(str, batch))} of " if batch else ""
    pattern = tree_paths.first_match(plan.config.axes, plan.leaf(path))
    given = "" if pattern is None else f", given by axes[{pattern!r}]"
    part = f", of which {target.part}" if target.part else ""
    yield f"axes: {target.axes} of {target.shape}{part}{given}: {stack}({n_in}, {n_out})"
    if target.rank * (n_in + n_out) >= n_in * n_out:
        yield (
            f"note: at rank {target.rank} A and B have {target.rank * (n_in + n_out):,} "
            f"entries for the {n_in * n_out:,} of each matrix: use a smaller rank"
        )


def _choice(plan: _Plan, path: str) -> str:
    """Which pattern chose a target."""
    targets = plan.config.targets
    if targets != ALL_LINEAR:
        target = plan.targets[path]
        return repr(parts.first_match(targets, path, target.suffix, target.shape))
    if plan.uses:
        return "'all-linear', since a matrix product uses it"
    return "'all-linear', which without a function means every floating-point matrix"
