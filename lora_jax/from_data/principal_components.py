"""Principal components of the inputs of weights, from products with their covariance."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core import tree_paths
from lora_jax.from_data import gradient_sums
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.transform.inputs import MOMENTS, Statistic, observe

Columns: TypeAlias = dict[str, jax.Array]
"""`{path: (*batch, in, columns)}`."""


class Components(NamedTuple):
    """The principal components of the inputs of a target."""

    vectors: jax.Array
    """`(*batch, in, components)`, orthonormal columns."""
    explained: jax.Array
    """`(*batch, components)`."""


def sums_of_inputs(
    fn: Callable[..., Any],
    params: Any,
    leaves: Mapping[str, Any],
    plan: AdapterPlan,
    batches: Iterable[tuple[Any, ...]],
    counts: Mapping[str, int],
    passes: int,
    options: Any,
) -> Callable[[Columns], tuple[Columns, Columns]]:
    """A function from `(*batch, in, width)` by path to the sums of one pass.

    These are `C A` for the covariances `C = x^T x (*batch, in, in)`, not centered, and the
    moments `(*batch, in, 3)`.
    """
    widths = {
        path: min(count + gradient_sums.OVERSAMPLING, plan.targets[path].matrix_shape[-2])
        for path, count in counts.items()
    }
    plans: dict[Statistic, AdapterPlan] = {
        "gram": gradient_sums.widened(plan, widths),
        "moments": gradient_sums.widened(plan, dict.fromkeys(counts, MOMENTS)),
    }
    totals = {
        statistic: observe(fn, own, statistic, **options)
        for statistic, own in plans.items()
    }

    def loss(params: Any, factors: dict[Statistic, Columns], *args: Any) -> jax.Array:
        values = []
        for statistic, own in factors.items():
            shapes = {p: t.adapter_shapes["B"] for p, t in plans[statistic].targets.items()}
            adapters = {
                path: {"A": a, "B": jnp.zeros(shapes[path], a.dtype)}
                for path, a in own.items()
            }
            values.append(totals[statistic](params, adapters, *args))
        return values[0] + values[1]

    gradients = gradient_sums.GradientSums(loss, params, batches, passes)

    def run(columns: Columns) -> tuple[Columns, Columns]:
        zeros = {
            path: jnp.zeros((*own.shape[:-1], MOMENTS), own.dtype)
            for path, own in columns.items()
        }
        given: dict[Statistic, Columns] = {"gram": columns, "moments": zeros}
        factors = {}
        for statistic, own in given.items():
            adapters = gradient_sums.with_one_factor("A", own, leaves, plans[statistic])
            factors[statistic] = {path: own["A"] for path, own in adapters.items()}
        found = gradients(factors)
        return found["gram"], found["moments"]

    return run


def of_inputs(
    key: jax.Array,
    leaves: Mapping[str, Any],
    plan: AdapterPlan,
    sums: Callable[[Columns], tuple[Columns, Columns]],
    counts: Mapping[str, int],
    iterations: int,
) -> dict[str, Components]:
    """The first principal components of the inputs of each target."""
    columns = {}
    for path, target in plan.targets.items():
        *batch, n_in, _ = target.matrix_shape
        shape = (*batch, n_in, min(counts[path] + gradient_sums.OVERSAMPLING, n_in))
        dtype = gradient_sums.factor_dtype(leaves, plan, path)
        drawn = jax.random.normal(tree_paths.fold_in(key, path), shape, dtype)
        columns[path] = gradient_sums.orthonormal(drawn)
    products, moments = columns, columns
    for step in range(1 + iterations):
        products, moments = sums(columns)
        for path, own in products.items():
            gradient_sums.check_finite(path, own, "the sum over the inputs of the weight")
            gradient_sums.check_finite(path, moments[path], "the sum over the inputs")
            products[path] = gradient_sums.on_automatic_axes(
                _centered, own, moments[path], columns[path]
            )
            if step < iterations:
                columns[path] = gradient_sums.orthonormal(products[path])
    found = {}
    for path, own in products.items():
        total, count = gradient_sums.on_automatic_axes(_total, moments[path])
        _check_varies(path, total, count)
        vectors, variances = gradient_sums.on_automatic_axes(_nystrom, own, columns[path])
        share = variances / total[..., None]
        n = counts[path]
        found[path] = Components(vectors[..., :n], share[..., :n])
    return found


def _centered(product: jax.Array, moments: jax.Array, columns: jax.Array) -> jax.Array:
    """`C Q` with the mean of the inputs subtracted from them, `(*batch, in, width)`."""
    total = moments[..., 0]
    count = jnp.max(moments[..., 2], axis=-1)
    onto = jnp.einsum("...i,...ik->...k", total, columns, precision="highest")
    mean = total / jnp.maximum(count, 1)[..., None]
    return product - mean[..., :, None] * onto[..., None, :]


def _total(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The trace of the centered `C`, zero if it is below its rounding; and the rows."""
    total, squares, counts = (moments[..., i] for i in range(MOMENTS))
    count = jnp.max(counts, axis=-1)
    whole = jnp.sum(squares, axis=-1)
    means = jnp.sum(total * total, axis=-1) / jnp.maximum(count, 1)
    rounding = 8 * jnp.finfo(moments.dtype).eps * whole
    return jnp.where(whole - means > rounding, whole - means, 0.0), count


def _nystrom(product: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The eigenvectors and eigenvalues of `C`, given `C Q`: `C Q (Q^T C Q)^-1 Q^T C`.

    Tropp et al., 2017, https://arxiv.org/abs/1706.05736. Directions of `Q` in which `C` is
    zero, up to rounding, are left out. The largest entry of each eigenvector is positive.
    """
    small = jnp.matmul(columns.mT, product, precision="highest")
    values, vectors = jnp.linalg.eigh((small + small.mT) / 2)
    least = product.shape[-2] * jnp.finfo(product.dtype).eps * values[..., -1:]
    kept = values > least
    root = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1.0)), 0.0)
    factor = jnp.matmul(product, vectors * root[..., None, :], precision="highest")
    left, singular, _ = jnp.linalg.svd(factor, full_matrices=False)
    places = jnp.argmax(jnp.abs(left), axis=-2, keepdims=True)
    signs = jnp.where(jnp.take_along_axis(left, places, axis=-2) < 0, -1, 1)
    return left * signs.astype(left.dtype), singular * singular


def _check_varies(path: str, total: jax.Array, count: jax.Array) -> None:
    """Raises unless the inputs of each matrix of a target vary."""
    for values, what in ((count, "has no inputs"), (total, "has inputs that do not vary")):
        zero = np.argwhere(np.asarray(values) == 0)
        if len(zero):
            where = ""
            if zero.size:
                where = f", the matrix {tuple(map(int, zero[0]))} of its stack,"
            raise ValueError(
                f"at {path!r}: the weight{where} {what} in the products of fn. Give "
                "more batches and an fn whose outputs depend on these products; or leave "
                "the weight out of the plan, and make its adapter with init_adapters."
            )
