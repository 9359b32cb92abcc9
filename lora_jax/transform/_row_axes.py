"""A table of primitives: on which axes of the results the rows of a batch are."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from lora_jax.transform._moves import MOVES
from lora_jax.transform._parameters import parameter
from lora_jax.transform._row_look_ups import gather, scatter
from lora_jax.transform._row_places import (
    Atom,
    Axes,
    Held,
    NotFollowedError,
    Step,
    Takes,
    held,
    join,
    merged,
)

# The axes with rows of all results, or of each result.
Rule: TypeAlias = Callable[..., Held | list[Held] | Takes]


def _same(step: Step, *operands: Axes | None) -> Held:
    return join(*map(held, operands))


def _moved(step: Step, *operands: Axes | None) -> list[Held]:
    """As the table of moves says; an axis with rows must stay one axis."""
    out = []
    for move in MOVES[step.equation.primitive.name].moves(step.equation):
        rows = join(*map(held, operands))
        if any(len(move.axes[axis]) != 1 for axis in rows):
            raise NotFollowedError("takes a part of an axis that holds rows")
        out.append({move.axes[axis][0]: atoms for axis, atoms in rows.items()})
    return out


def _range(atoms: Sequence[Atom], start: int, stop: int, step: int) -> tuple[Atom, ...]:
    """The atoms of a range of an axis, which must have each row equally often."""
    whole = math.prod(size for size, _ in atoms)
    if (start, stop, step) == (0, whole, 1):
        return tuple(atoms)
    first, *minor = atoms
    n = whole // first.size
    if first.stride is not None or step != 1 or start % n or stop % n:
        raise NotFollowedError("takes a part of an axis that holds rows")
    return merged([((stop - start) // n, None), *minor])


def _slice(step: Step, x: Axes) -> Held:
    starts = parameter(step.equation, "start_indices")
    stops = parameter(step.equation, "limit_indices")
    steps = parameter(step.equation, "strides") or (1,) * len(starts)
    return {
        axis: _range(atoms, starts[axis], stops[axis], steps[axis])
        for axis, atoms in held(x).items()
    }


def _split(step: Step, x: Axes) -> list[Held]:
    out, start, along = [], 0, parameter(step.equation, "axis")
    for size in parameter(step.equation, "sizes"):
        rows = held(x)
        if along in rows:
            rows[along] = _range(rows[along], start, start + size, 1)
        out.append(rows)
        start += size
    return out


def _reshape(step: Step, x: Axes) -> Held:
    """Splits and joins atoms."""
    if step.equation.params.get("dimensions") is not None:
        raise NotFollowedError("transposes as well")
    if 0 in step.shape:
        return {}
    left = list(merged(atom for atoms in x for atom in atoms))
    out = []
    for needed in step.out:
        atoms = []
        while needed > 1:
            size, stride = left.pop(0)
            part = math.gcd(size, needed)
            if part not in (size, needed):
                raise NotFollowedError("splits an axis between its rows")
            rest = size // part
            atoms.append(Atom(part, None if stride is None else stride * rest))
            if rest > 1:
                left.insert(0, Atom(rest, stride))
            needed //= part
        out.append(merged(atoms))
    return held(tuple(out))


def _concatenate(step: Step, *operands: Axes | None) -> Held:
    along = parameter(step.equation, "dimension")
    shapes = [atom.aval.shape for atom in step.equation.invars]
    pairs = zip(shapes, operands, strict=True)
    operands = tuple(axes for shape, axes in pairs if shape[along])
    found = [held(axes) for axes in operands]
    if not any(along in rows for rows in found):
        return join(*found)
    if any(axes != operands[0] for axes in operands):
        raise NotFollowedError("joins values along an axis that holds rows")
    return {**found[0], along: merged([(len(operands), None), *found[0][along]])}


def _tile(step: Step, x: Axes) -> Held:
    repeats = parameter(step.equation, "reps")
    return {
        axis: merged([(repeats[axis], None), *atoms]) for axis, atoms in held(x).items()
    }


def _pad(step: Step, x: Axes | None, value: Any) -> Held:
    widths, rows = parameter(step.equation, "padding_config"), held(x)
    if any(any(widths[axis]) for axis in rows):
        raise NotFollowedError("pads an axis that holds rows")
    return rows


def _not_along(*names: str, does: str) -> Rule:
    """Every axis stays, but none of those in the named parameter may hold rows."""

    def rule(step: Step, *operands: Axes | None) -> Held:
        along = parameter(step.equation, *names)
        rows = join(*map(held, operands))
        if not rows.keys().isdisjoint([along] if isinstance(along, int) else along):
            raise NotFollowedError(f"{does} an axis that holds rows")
        return rows

    return rule


def _top_k(step: Step, x: Axes) -> Held:
    last = len(step.shape) - 1
    if step.equation.params.get("axis", last) % (last + 1) in held(x):
        raise NotFollowedError("sorts an axis that holds rows")
    return held(x)


def _reduced(step: Step, *operands: Axes | None) -> Held:
    gone = parameter(step.equation, "axes", "dimensions")
    return {
        axis - sum(other < axis for other in gone): atoms
        for axis, atoms in join(*map(held, operands)).items()
        if axis not in gone
    }


def _leading(n_last: int) -> Callable[..., Held]:
    """The primitive is applied to arrays of the `n_last` last axes."""

    def rule(step: Step, *operands: Axes | None) -> Held:
        rows = join(*map(held, operands))
        ndim = max(len(atom.aval.shape) for atom in step.equation.invars)
        if any(axis >= ndim - n_last for axis in rows):
            raise NotFollowedError("mixes an axis that holds rows")
        return rows

    return rule


def _fft(step: Step, x: Axes) -> Held:
    return _leading(len(parameter(step.equation, "fft_lengths")))(step, x)


def _triangular_solve(step: Step, a: Axes | None, b: Axes | None) -> Held:
    solved = len(step.out) - (2 if parameter(step.equation, "left_side") else 1)
    if solved in held(b):
        raise NotFollowedError("mixes an axis that holds rows")
    return join(_leading(2)(step, a), held(b))


def _windows(step: Step, *operands: Axes | None) -> Held:
    rows = join(*map(held, operands))
    names = "window_dimensions", "window_strides", "base_dilation"
    for axis in rows:
        of_axis = [step.equation.params.get(name, {axis: 1})[axis] for name in names]
        if of_axis != [1, 1, 1] or any(parameter(step.equation, "padding")[axis]):
            raise NotFollowedError("has windows along an axis that holds rows")
    return rows


def _conv(step: Step, x: Axes | None, kernel: Axes | None) -> Held:
    numbers = parameter(step.equation, "dimension_numbers")
    if held(kernel):
        raise NotFollowedError("has a kernel that holds rows")
    if any(axis != numbers.lhs_spec[0] for axis in held(x)):
        raise NotFollowedError("convolves an axis that holds rows")
    if parameter(step.equation, "batch_group_count") != 1:
        raise NotFollowedError("splits the batch into groups")
    rows = [(numbers.out_spec[0], atoms) for atoms in held(x).values()]
    return dict(rows)


def _dot(step: Step, x: Axes | None, y: Axes | None) -> Held:
    contracted, batch = parameter(step.equation, "dimension_numbers")
    return _product(step, x, y, contracted, batch)


def _product(
    step: Step,
    x: Axes | None,
    y: Axes | None,
    contracted: Sequence[Sequence[int]],
    batch: Sequence[Sequence[int]],
    without: Sequence[int] = (),
) -> Held:
    """The result has the batch axes, and the other axes of `x`, then of `y`."""
    x_ndim, y_ndim = (len(atom.aval.shape) for atom in step.equation.invars[:2])
    x_kept = [i for i in range(x_ndim) if i not in (*contracted[0], *batch[0])]
    y_gone = (*contracted[1], *batch[1], *without)
    y_kept = [i for i in range(y_ndim) if i not in y_gone]
    first = len(step.out) - len(batch[0]) - len(x_kept) - len(y_kept)
    of_x = {axis: first + i for i, axis in enumerate([*batch[0], *x_kept])}
    of_y = {axis: first + i for i, axis in enumerate(batch[1])}
    of_y |= {axis: len(step.out) - len(y_kept) + i for i, axis in enumerate(y_kept)}
    return join(
        *(
            {to[axis]: atoms for axis, atoms in held(axes).items() if axis in to}
            for axes, to in ((x, of_x), (y, of_y))
        )
    )


def _ragged_dot(step: Step, x: Axes | None, y: Axes | None, *sizes: Any) -> Held:
    numbers = parameter(step.equation, "ragged_dot_dimension_numbers")
    contracted, batch = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions
    if not held(y).keys().isdisjoint(groups):
        raise NotFollowedError("has a group for each row")
    return _product(step, x, y, contracted, batch, groups)


def _new_axis(dimension: str) -> Rule:
    """A collective that joins arrays along an axis, or along a new one."""

    def rule(step: Step, x: Axes) -> Held:
        along = parameter(step.equation, dimension)
        if not parameter(step.equation, "tiled"):
            change = len(step.out) - len(step.shape)
            if change < 0 and along in held(x):
                raise NotFollowedError("splits an axis that holds rows")
            return {i + change * (i >= along): atoms for i, atoms in held(x).items()}
        if along in held(x):
            raise NotFollowedError("splits or joins an axis that holds rows")
        return held(x)

    return rule


def _all_to_all(step: Step, x: Axes) -> Held:
    axes = {parameter(step.equation, name) for name in ("split_axis", "concat_axis")}
    if not parameter(step.equation, "tiled") or not axes.isdisjoint(held(x)):
        raise NotFollowedError("splits or joins an axis that holds rows")
    return held(x)


_ENTRYWISE = (
    *("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2"),
    *("atanh", "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex"),
    *("conj", "convert_element_type", "copy", "cos", "cosh", "cumlogsumexp"),
    *("cummax", "cummin", "cumprod", "cumsum", "digamma", "div", "eq", "eq_to", "erf"),
    *("erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma"),
    *("igamma_grad_a", "igammac", "imag", "integer_pow", "is_finite", "layout_constraint"),
    *("le", "le_to", "lgamma", "log", "log1p", "log2", "logistic", "lt", "lt_to", "max"),
    *("mesh_cast", "min", "mul", "mulhi", "name", "ne", "neg", "nextafter", "not"),
    *("one_minus_square", "or", "polygamma", "polynomial", "population_count", "pow"),
    *("random_clone", "random_fold_in", "random_gamma", "random_seed", "real"),
    *("reduce_precision", "regularized_incomplete_beta", "rem", "reshard", "round"),
    *("rsqrt", "select_n", "sharding_constraint", "shift_left", "shift_right_arithmetic"),
    *("shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient"),
    *("sub", "tan", "tanh", "threefry2x32", "xor", "zeros_like", "zeta"),
    *("dynamic_update_slice", "ppermute", "pbroadcast"),
)
_REDUCTIONS = (
    *("argmax", "argmin", "reduce", "reduce_and", "reduce_max", "reduce_min", "reduce_or"),
    *("reduce_prod", "reduce_sum", "reduce_xor"),
)
_WINDOWS = (
    *("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum"),
    *("select_and_gather_add", "select_and_scatter", "select_and_scatter_add"),
)
_MATRICES = (
    *("cholesky", "cholesky_update", "eig", "eigh", "geqp3", "geqrf", "hessenberg"),
    *("householder_product", "lu", "ormqr", "qr", "schur", "svd", "symmetric_product"),
    *("tridiagonal", "tridiagonal_solve"),
)

# By the name of the primitive.
RULES: dict[str, Rule] = {
    **dict.fromkeys(_ENTRYWISE, _same),
    **dict.fromkeys(_REDUCTIONS, _reduced),
    **dict.fromkeys(_WINDOWS, _windows),
    **dict.fromkeys(_MATRICES, _leading(2)),
    # Axes behind those of the operand are new, or belong to one entry.
    **dict.fromkeys(("random_bits", "random_split", "random_unwrap"), _leading(0)),
    **dict.fromkeys(("bitcast_convert_type", "from_edtype", "to_edtype"), _leading(0)),
    "random_wrap": _leading(1),
    "lu_pivots_to_permutation": _leading(1),
    **dict.fromkeys(("transpose", "squeeze", "broadcast_in_dim", "dynamic_slice"), _moved),
    **dict.fromkeys(("unstack", "stack"), _moved),
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "tile": _tile,
    "pad": _pad,
    "rev": _not_along("dimensions", does="reverses"),
    "sort": _not_along("dimension", does="sorts"),
    "approx_top_k": _not_along("reduction_dimension", does="sorts"),
    "top_k": _top_k,
    "fft": _fft,
    "triangular_solve": _triangular_solve,
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "gather": gather,
    **dict.fromkeys(("scatter", "scatter-add", "scatter-sub", "scatter-mul"), scatter),
    **dict.fromkeys(("scatter-min", "scatter-max"), scatter),
    "all_gather": _new_axis("all_gather_dimension"),
    "all_gather_invariant": _new_axis("all_gather_dimension"),
    "reduce_scatter": _new_axis("scatter_dimension"),
    "all_to_all": _all_to_all,
}
