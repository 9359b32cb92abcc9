"""`adapt_rows`: any JAX function, run with another adapter for each row of a batch."""

from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Literal, NoReturn, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._core import compat, quantized, tree_paths
from lora_jax._core.tree_paths import Tree
from lora_jax.plan import plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.adapter_stack import AdapterStack, check_trains_nothing, slots_of
from lora_jax.transform import _following, _tracing
from lora_jax.transform._adapted_weights import Update
from lora_jax.transform._context import Context, Merge, OnStopGradient
from lora_jax.transform._row_places import Atom, Rows, whole
from lora_jax.transform._rules import RULES
from lora_jax.transform.adapt import as_updated, check_options, has_dropout, run

__all__ = ["adapt_rows"]

P = ParamSpec("P")
R = TypeVar("R")


def adapt_rows(
    fn: Callable[Concatenate[Tree, P], R],
    plan: AdapterPlan,
    in_axes: Any = 0,
    *,
    on_unused: Literal["error", "allow"] = "error",
    on_stop_gradient: OnStopGradient = "error",
    dropout_key: jax.Array | None = None,
    column_norms: Mapping[str, jax.Array] | None = None,
) -> Callable[Concatenate[Tree, AdapterStack, jax.Array, P], R]:
    """Makes a function of a batch run with another adapter for each row.

    `fn` is the function of the whole batch, without a change to its code. Its program runs
    once for the batch. Each product with an adapted weight adds, for each row,

        y[row] = x[row] W + scale[slot] * (x[row] A[slot]) B[slot],   slot = slots[row],

    and for DoRA scales the columns. The slots are a traced array, so any traffic of rows
    uses one compiled program. Both products with factors have the size that they have with
    one adapter for all rows. Forward and backward, and all that `adapt` supports: scans,
    checkpoints, quantized weights, tied embeddings, experts, meshes.

    `fn` may mix rows, for example by statistics of the batch. For each product the axis
    that holds the rows is followed from the arguments, through transposes, reshapes, loops
    and calls. If it cannot be followed, the error says where it was lost.

    Convolutions, products with groups of experts, and rows in an order that only the data
    know (tokens sorted by expert) are multiplied by the factors of all slots, and keep the
    result of their own. So are few tokens with few slots, as in decoding, because that
    reads less than a copy of each row's factors: if `slots * (12 + tokens) < 20 * rows`.

    Args:
        fn: `fn(params, *args, **kwargs)`, with any arguments.
        plan: of the stack, from `stack_adapters`.
        in_axes: which axis of each argument has the rows, as in `jax.vmap`: an integer,
            None for an argument without rows, or a tuple with one entry for each argument
            behind `params`, each of which may be a tree prefix of its argument. Arguments
            given by name have the rows in axis 0. Scalars have no rows.
        on_unused: as in `adapt`.
        on_stop_gradient: as in `adapt`.
        dropout_key: as in `adapt`. Rows have different masks.
        column_norms: for DoRA, the result of `stacked_column_norms` for these params and
            this stack: `{path: (slots, *batch, out)}`. Otherwise each call computes them,
            once for each slot, or for the slot of each row if there are fewer rows. Give
            them if the stack does not change between calls, as in decoding.

    Returns:
        `adapted(params, stack, slots, *args, **kwargs)`, which returns what `fn` does.
        `slots` is `(rows,)` int32, the slot of each row: -1 for the base alone. A slot out
        of range gives NaN in its row. `stack.scales` and `stack.magnitudes` are constants
        in the backward pass.

    Raises:
        TypeError: if `fn` is not a function or `plan` is not a plan. The adapted function:
            if `stack` is not an `AdapterStack`, or `slots` is not an integer array.
        KeyError: the adapted function, if the stack has other paths than the plan.
        ValueError: if an option is unknown, or the plan trains whole leaves. The adapted
            function: if an argument does not have as many rows as there are slots, rows
            cannot be followed to a product, a use needs a merged weight, which would be
            another one for each row, or an array of the stack has a wrong shape.

    References:
        Chen et al., 2023, https://arxiv.org/abs/2310.18547; Sheng et al., 2023,
        https://arxiv.org/abs/2311.03285.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> def model(params, x):
        ...     return jnp.tanh(x @ params["up"]) @ params["down"]
        >>> params = {"up": jnp.ones((8, 16)), "down": jnp.ones((16, 8))}
        >>> x = jnp.ones((4, 8))
        >>> plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=2), params, model, x)
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> tenants = [lora_jax.init_adapters(key, params, plan) for key in keys]
        >>> stack, plan = lora_jax.stack_adapters(tenants, plan)
        >>> slots = jnp.array([2, 0, -1, 2])  # the third row: the base alone
        >>> lora_jax.adapt_rows(model, plan)(params, stack, slots, x).shape
        (4, 8)
    """
    check_options("adapt_rows", fn, plan, on_unused, on_stop_gradient, dropout_key)
    check_trains_nothing(plan)

    def adapted(
        params: Tree,
        stack: AdapterStack,
        slots: jax.Array,
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        n_slots = slots_of(stack)
        stack = jax.tree.map(_with_whole_slots, stack)
        plan_checks.check_paths("stack.adapters", stack.adapters, list(plan.targets))
        slots = _check_slots(slots)
        leaves, treedef = tree_paths.flatten(params)
        plan_checks.check_params(leaves, plan)
        key = dropout_key if has_dropout(plan) else None
        given = stack.adapters, stack.scales, stack.magnitudes, column_norms or {}
        own = as_updated(leaves, plan, *given, shared=(slots, key))
        traced = _tracing.trace(fn, treedef.unflatten(own.values()), args, kwargs)
        traced.check_values()
        places = _places(traced, in_axes, args, kwargs, len(slots))
        followed = _following.follow(traced.jaxpr, places, len(slots))

        def one_slot(adapters, scales, magnitudes, norms):
            plan_checks.check_adapters(adapters, plan)
            context = Context(
                RULES,
                _refuse_merge,
                on_stop_gradient=on_stop_gradient,
                key=key,
                targets=plan_checks.to_be_compared(plan),
                closed_over_is_constant=None in traced.paths,
                products=plan.config.products,
                slots=slots,
                n_slots=n_slots,
            )
            context.frame.followed = followed

            def update(path: str) -> Update:
                own = plan.targets[path], True, dict(adapters[path]), norms.get(path)
                return Update(path, *own, scales[path], magnitudes.get(path), slots)

            return run(context, traced, plan, update, on_unused)

        if column_norms is not None:
            plan_checks.check_column_norms(column_norms, plan, (n_slots,))
        given = stack.scales, stack.magnitudes, dict(column_norms or {})
        constants = lax.stop_gradient(given)
        out = jax.vmap(one_slot, out_axes=None, axis_name=compat.SLOTS)(
            stack.adapters, *constants
        )
        return traced.result(out)

    adapted.__name__ = adapted.__qualname__ = f"adapted_{getattr(fn, '__name__', 'fn')}"
    return adapted


def _with_whole_slots(x: jax.Array) -> jax.Array:
    """An array of a stack with the slots on every device: each row may need any of them."""
    front, *rest = compat.explicit_spec(x) or (None,)
    if front is None:
        return x
    mesh = compat.mesh_of(jax.typeof(x))
    return compat.retyped(x, NamedSharding(mesh, PartitionSpec(None, *rest)))


def _refuse_merge(merge: Merge) -> NoReturn:
    raise ValueError(
        f"the adapted weight {merge}. This use needs the merged weight, and each row would "
        "have its own. Leave the weight out with LoraConfig(exclude=...)."
    )


def _check_slots(slots: Any) -> jax.Array:
    if not isinstance(slots, jax.Array | np.ndarray):
        raise TypeError(
            "slots must be an integer array (rows,), the slot of each row, got "
            f"{type(slots).__name__}: write jnp.array([0, 2, -1])."
        )
    if not jnp.issubdtype(slots.dtype, jnp.integer):
        raise TypeError(
            f"slots must be integers, got {slots.dtype}: give the number of the slot of "
            "each row, jnp.array([0, 2, -1])."
        )
    # So that none of more than 32 bits, or without a sign, becomes another slot.
    limits, clip = jnp.iinfo(slots.dtype), jnp.clip
    if isinstance(slots, np.ndarray):
        clip = np.clip
    slots = jnp.asarray(clip(slots, max(limits.min, -2), min(limits.max, 2**31 - 1)))
    if slots.ndim == 1 and not isinstance(slots.shape[0], int):
        raise ValueError(
            f"slots has the symbolic shape {slots.shape}: the number of rows must be known "
            "when the function is traced."
        )
    if slots.ndim != 1 or not len(slots):
        raise ValueError(
            f"slots must be (rows,), one slot for each row of the batch, got the shape "
            f"{slots.shape}."
        )
    return slots.astype(jnp.int32)


def _places(
    traced: _tracing.Traced,
    in_axes: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    n_rows: int,
) -> list[Rows | None]:
    """Where the rows are in each argument of the program."""
    given = _axes_of(in_axes, args)
    given += [0] * len(_leaves(kwargs))
    leaves = [*_leaves(args), *_leaves(kwargs)]
    of_arrays = (
        axis
        for axis, leaf in zip(given, leaves, strict=True)
        if _tracing.is_array(leaf) or quantized.is_quantized(leaf)
    )
    places: list[Rows | None] = []
    for path, name, value in zip(traced.paths, traced.names, traced.arguments, strict=True):
        axis = None if path is not None else next(of_arrays)
        places.append(_place(name, value.shape, axis, n_rows))
    return places


def _place(name: str, shape: tuple[int, ...], axis: Any, n_rows: int) -> Rows | None:
    if axis is None or not shape:
        return None
    is_number = isinstance(axis, int) and not isinstance(axis, bool)
    if not is_number or not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"in_axes has {axis!r} for {name}, whose shape is {shape}: expected the number "
            "of the axis that has the rows, or None."
        )
    if shape[axis] != n_rows:
        raise ValueError(
            f"{name} has the shape {shape}, and its axis {axis} must have the {n_rows} "
            "rows of slots. State in in_axes which axis has the rows, or None if none has."
        )
    return Rows(whole(shape, {axis % len(shape): (Atom(n_rows, 1),)}))


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=quantized.is_quantized)


def _axes_of(in_axes: Any, args: tuple[Any, ...]) -> list[Any]:
    """The entry of `in_axes` for each leaf of the arguments."""
    if isinstance(in_axes, list):
        in_axes = tuple(in_axes)
    if isinstance(in_axes, tuple) and len(in_axes) != len(args):
        raise ValueError(
            f"in_axes has {len(in_axes)} entries, and there are {len(args)} arguments "
            "behind params, stack and slots: one for each, or one number for all."
        )

    def spread(axis: Any, part: Any) -> list[Any]:
        return [axis] * len(_leaves(part))

    try:
        found = jax.tree.map(spread, in_axes, args, is_leaf=lambda x: x is None)
    except ValueError as error:
        raise ValueError(
            f"in_axes is not a prefix of the arguments behind params, stack and slots: "
            f"{error}"
        ) from None
    is_list = lambda x: isinstance(x, list)  # noqa: E731
    return [axis for own in jax.tree.leaves(found, is_leaf=is_list) for axis in own]
