"""Initializes adapters from the gradients of their weights: LoRA-One and LoRA-GA."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core import checks, quantized, tree_paths
from lora_jax._core.tree_paths import Tree
from lora_jax.from_data import gradient_sums
from lora_jax.layers import decompositions
from lora_jax.layers.lora import Adapter
from lora_jax.model import initialization, merging, sharding
from lora_jax.model.column_norms import column_norm
from lora_jax.model.decompose import Decomposed
from lora_jax.plan import plan_checks, trained_leaves
from lora_jax.plan.adapter_plan import AdapterPlan, Target
from lora_jax.transform.adapt import OnMerge, adapt

__all__ = ["init_adapters_from_gradients"]


class _Method(NamedTuple):
    vectors: int
    """How many singular vectors it uses, as a multiple of the rank."""
    gamma: float
    """The default of gamma."""


_METHODS = {"lora_one": _Method(1, 128.0), "lora_ga": _Method(2, 16.0)}


def init_adapters_from_gradients(
    key: jax.Array,
    params: Tree,
    plan: AdapterPlan,
    loss: Callable[Concatenate[Tree, ...], jax.Array],
    batches: Iterable[tuple[Any, ...]],
    *,
    method: Literal["lora_one", "lora_ga"] = "lora_one",
    gamma: float | None = None,
    iterations: int = 2,
    on_merge: OnMerge = "error",
    on_stop_gradient: Literal["error", "base", "all"] = "error",
) -> Decomposed[Tree]:
    """Initializes adapters with singular vectors of the gradients of their weights.

    `G = U S V^T (in, out)` is the gradient of a weight, averaged over the batches. The
    factors have its first singular vectors, with `r` for the rank:

    - `"lora_one"`: `A = U_r sqrt(S_r / (gamma s_1))` and `B = -sqrt(S_r / (gamma s_1))
      V_r^T`. So `scale * A @ B` is a step of gradient descent, with the best approximation
      of the gradient of rank `r`. **The base stays, so the model changes at once** by this
      step of the learning rate `scale / (gamma s_1)`.
    - `"lora_ga"`: `A = c U_r`, and `B = c V^T` with the singular vectors `r + 1` to `2 r`
      and `c = out^(1/4) / sqrt(gamma)`. The base becomes `W - scale * A @ B`, so **the
      model does not change**, up to the rounding of the base. The first step of training
      is close to one of full fine-tuning.

    The singular vectors come from a randomized SVD, which takes products of `G` with thin
    matrices only. These are gradients of adapters of the rank `n + 10`, with `n` for the
    number of singular vectors. So `G` is never computed, and the memory is that of a
    training step. Products run in the dtypes of the model: singular vectors of a model in
    bfloat16 have its precision.

    Each matrix of a stack, each part of a weight and each kind of use (`"table@lookup"`)
    has its own gradient. Dropout of the plan is not applied.

    Args:
        key: a `jax.random` key, for the randomized SVD.
        params: the params of the plan. For `"lora_one"`, weights may be quantized.
        plan: what `plan_adapters` returned; the `init` of its config is not used.
        loss: `loss(params, *batch)`, a scalar, with the mean over the examples.
        batches: an iterable of tuples, each with the arguments of `loss` after `params`,
            of types that `jax.jit` accepts. It is read `2 + 2 * iterations` times, so a
            generator does not suffice. All batches have the same weight.
        method: `"lora_one"` or `"lora_ga"`.
        gamma: a positive number; larger values make smaller factors. None means 128 for
            LoRA-One and 16 for LoRA-GA, the values of their authors.
        iterations: the number of power iterations of the SVD. Singular values that decrease
            slowly need more of them.
        on_merge: as in `adapt`. A merge computes the whole gradient of its weight.
        on_stop_gradient: as in `adapt`.

    Returns:
        `params`, the base: for `"lora_one"` the same object, for `"lora_ga"` a tree with
        new weights of the plan, which have the dtypes and shardings of the old ones.
        `adapters` as from `init_adapters`, on a mesh with the shardings of
        `adapter_shardings(params, plan)`. For DoRA, `"m"` has the column norms of
        `W_base + scale * A @ B`. Adapters of `"lora_ga"` belong to the new base: save both,
        or convert the adapters with `to_plain_adapters`.

    Raises:
        FloatingPointError: if a gradient or a new weight has an infinity or a NaN.
        KeyError: if params lack a weight of the plan.
        TypeError: if an argument has the wrong type, a batch is not a tuple, `batches` can
            be read only once, or a weight is quantized and the method is LoRA-GA.
        ValueError: if the method is unknown, a number is out of its range, `batches` are
            empty or change, the gradient of a weight is zero, a rank is too large for its
            weight, or an adapter of LoRA-GA is for one kind of use; and as `adapt`.

    References:
        Zhang et al., 2025, algorithm 1, https://arxiv.org/abs/2502.01235. The paper's
        preconditioner is an optimizer, such as `lora_jax.optim.scale_by_riemannian`.
        Wang et al., 2024, section 3, https://arxiv.org/abs/2407.05000; its `W`, `A` and `B`
        are the transposes of ours, `B` and `A`. peft's LoRA-GA departs from it: it scales
        one factor alone, and multiplies it by the singular values `r + 1` to `2 r`. The
        randomized SVD: Halko et al., 2011, https://arxiv.org/abs/0909.4061.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> def loss(params, x, y):
        ...     return jnp.mean((x @ params["w"] - y) ** 2)
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 32, 8))
        >>> params = {"w": jnp.zeros((8, 8))}
        >>> config = lora_jax.LoraConfig(rank=2, alpha=8.0)
        >>> plan = lora_jax.plan_adapters(config, params, loss, x, y)
        >>> key, batches = jax.random.key(1), [(x, y)]
        >>> base, adapters = lora_jax.init_adapters_from_gradients(
        ...     key, params, plan, loss, batches
        ... )
        >>> before = loss(params, x, y)
        >>> after = lora_jax.adapt(loss, plan)(base, adapters, x, y)
        >>> bool(after < before)
        True
    """
    checks.check_key("key", key)
    leaves, treedef = tree_paths.flatten(params)
    plan_checks.check_params(leaves, plan, values=True)
    checks.check_choice("method", method, tuple(_METHODS))
    gamma = _METHODS[method].gamma if gamma is None else gamma
    checks.check_number("gamma", gamma)
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}.")
    iterations = checks.as_index("iterations", iterations)
    if iterations < 0:
        raise ValueError(f"iterations must not be negative, got {iterations}.")
    for path, target in plan.targets.items():
        with checks.at_path(path):
            _check_target(leaves[plan.leaf(path)], target, method)
    svds = _svds(
        functools.partial(
            adapt, loss, on_merge=on_merge, on_stop_gradient=on_stop_gradient
        ),
        *(key, params, leaves, plan, batches, _METHODS[method].vectors, iterations),
    )
    adapters: dict[str, Adapter] = {}
    for path, target in plan.targets.items():
        factors = _FACTORS[method](svds[path], target, float(gamma))
        dtype = plan.config.dtype or factors[0].dtype
        adapters[path] = {n: x.astype(dtype) for n, x in zip("AB", factors, strict=True)}
    bases = dict(leaves)
    if method == "lora_ga":
        plain = {
            path: dataclasses.replace(target, method="lora")
            for path, target in plan.targets.items()
        }
        of_lora = dataclasses.replace(plan, targets=plain, trained={})
        bases |= merging.fold_all(merging.unmerge, leaves, adapters, {}, of_lora, False)
        params = treedef.unflatten(bases.values())
    for path, target in plan.targets.items():
        if target.method == "dora":
            weight = bases[plan.leaf(path)]
            adapters[path]["m"] = column_norm(weight, adapters[path], target)
    adapters |= trained_leaves.init_all(leaves, plan)
    places = sharding.init_shardings(leaves, plan)
    if places is not None:
        adapters = {n: initialization.put(own, places[n]) for n, own in adapters.items()}
    return Decomposed(params, adapters)


def _check_target(weight: Any, target: Target, method: str) -> None:
    """Raises unless the method can initialize the adapter of a weight."""
    if method == "lora_ga" and quantized.is_quantized(weight):
        raise TypeError(
            f"LoRA-GA subtracts scale * A @ B from the weight, which is quantized, "
            f"{weight!r}: take method='lora_one', which leaves the weight unchanged, or "
            "dequantize it with lora_jax.quant.dequantize."
        )
    if method == "lora_ga" and target.use:
        raise ValueError(
            f"LoRA-GA changes the weight for all of its uses, and the adapter is for the "
            f"use as a {target.use} alone: adapt the weight for all uses, or take "
            "method='lora_one'."
        )
    vectors, most = _METHODS[method].vectors, min(target.matrix_shape[-2:])
    if vectors * target.rank > most:
        raise ValueError(
            f"{method} needs {vectors} singular vectors for each rank, and a gradient of "
            f"shape {target.matrix_shape} has {most}: take a rank of at most "
            f"{most // vectors}, got {target.rank}."
        )


def _svds(
    adapter: Callable[[AdapterPlan], Callable[..., jax.Array]],
    key: jax.Array,
    params: Any,
    leaves: dict[str, Any],
    plan: AdapterPlan,
    batches: Iterable[tuple[Any, ...]],
    vectors: int,
    iterations: int,
) -> dict[str, decompositions.Svd]:
    """The first `vectors * rank` terms of the SVD of each gradient.

    Subspace iteration from random columns (Halko et al., 2011, algorithms 4.4 and 5.1).
    """
    ranks = {
        path: min(vectors * own.rank + gradient_sums.OVERSAMPLING, *own.matrix_shape[-2:])
        for path, own in plan.targets.items()
    }
    wide = gradient_sums.widened(plan, ranks)
    gradients = gradient_sums.GradientSums(
        adapter(wide), params, batches, passes=2 + 2 * iterations
    )

    def products(name: str, factors: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The gradients of the other factor."""
        adapters = gradient_sums.with_one_factor(name, factors, leaves, wide)
        other = {"A": "B", "B": "A"}[name]
        found = {path: own[other] for path, own in gradients(adapters).items()}
        for path, own in found.items():
            gradient_sums.check_finite(path, own, "the gradient of the weight")
        return found

    rows = {  # (*batch, width, out)
        path: jax.random.normal(
            tree_paths.fold_in(key, path),
            own.adapter_shapes["B"],
            gradient_sums.factor_dtype(leaves, plan, path),
        )
        for path, own in wide.targets.items()
    }
    columns = {}
    for step in range(1 + iterations):
        if step:
            rows = {p: gradient_sums.orthonormal(own, True) for p, own in rows.items()}
        columns = products("B", rows)  # G @ rows.T, (*batch, in, width)
        columns = {p: gradient_sums.orthonormal(own) for p, own in columns.items()}
        rows = products("A", columns)  # columns.T @ G, (*batch, width, out)
    found = {}
    for path, target in plan.targets.items():
        rank = vectors * target.rank
        u, s, vh = gradient_sums.on_automatic_axes(_svd, rows[path], columns[path])
        _check_nonzero(path, s[..., 0])
        found[path] = decompositions.Svd(u[..., :rank], s[..., :rank], vh[..., :rank, :])
    return found


def _svd(product: jax.Array, columns: jax.Array) -> decompositions.Svd:
    """The SVD of `columns @ product`."""
    svd = decompositions.exact(product)
    return svd._replace(u=jnp.matmul(columns, svd.u, precision="highest"))


def _check_nonzero(path: str, largest: jax.Array) -> None:
    """Raises if the largest singular value of a gradient is zero."""
    zero = np.argwhere(np.asarray(largest) == 0)
    if len(zero):
        where = (
            f" of the matrix {tuple(map(int, zero[0]))} of its stack" if zero.size else ""
        )
        raise ValueError(
            f"at {path!r}: the gradient{where} is zero in all batches, so it has no "
            "singular vectors: give more batches, or leave the weight out of the plan and "
            "make its adapter with init_adapters."
        )


def _lora_one(
    svd: decompositions.Svd, target: Target, gamma: float
) -> tuple[jax.Array, jax.Array]:
    root = jnp.sqrt(svd.s / (gamma * svd.s[..., :1]))
    sign = math.copysign(1.0, target.scale)
    return svd.u * root[..., None, :], -sign * root[..., :, None] * svd.vh


def _lora_ga(
    svd: decompositions.Svd, target: Target, gamma: float
) -> tuple[jax.Array, jax.Array]:
    size = target.matrix_shape[-1] ** 0.25 / math.sqrt(gamma)
    return size * svd.u[..., : target.rank], size * svd.vh[..., target.rank :, :]


_FACTORS = {"lora_one": _lora_one, "lora_ga": _lora_ga}
