"""Riemannian preconditioning of the gradients of `A` and `B`.

The product of a factor with itself is `(*batch, rank, rank)`. It is computed, and the
system is solved, in at least float32. `damping` is at least `rank` rounding units of the
product's largest diagonal entry. A smaller value would be lost to rounding, and the product
of a factor without full rank would be singular. `rank` does not count padding: components
that are zero in the factor and in the gradient.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jax.sharding import PartitionSpec

from lora_jax._core import checks, compat, numerics
from lora_jax.layers import adapter_checks
from lora_jax.optim import _leaves

__all__ = ["scale_by_riemannian"]

Number: TypeAlias = float | jax.Array
Scales: TypeAlias = Mapping[str, jax.Array] | None  # by path
Precondition: TypeAlias = Callable[[_leaves.Leaf, jax.Array, jax.Array, Scales], jax.Array]


def scale_by_riemannian(damping: Number = 1e-2) -> optax.GradientTransformation:
    """Preconditions the gradients of `A` and `B` as steps on the low-rank manifold.

    `gA` becomes `gA (B B^T + damping I)^-1`, and `gB` becomes `(A^T A + damping I)^-1 gB`.
    Then the change of the weight does not depend on how `A @ B` is factored. Leaves outside
    of adapters, magnitudes and biases are not changed.

    Chain it in front of an optimizer: `optax.chain(scale_by_riemannian(), optax.sgd(0.1))`.
    It has no state. `update` needs the params with both factors, so inside an
    `optax.masked` or `optax.partition` that hides one of them it raises an error.

    Args:
        damping: a positive number or scalar array. It is raised to at least `rank`
            rounding units of the largest diagonal entry of the product. `rank` does not
            count padding with zeros. The system is solved in at least float32.

    Returns:
        A gradient transformation. Results have the dtypes of the gradients.

    Raises:
        TypeError: if `damping` is not a number.
        ValueError: if `damping` is not positive. And in `init` and `update`: if the tree
            has no adapters, there are no params, or a factor is missing or does not fit.

    References:
        Zhang and Pilanci, 2024, https://arxiv.org/abs/2402.02347. The paper multiplies
        from the left, so its `A` and `B` are our `B.T` and `A.T`. The formulas leave out
        the scale of the adapter, as the paper and PEFT do.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from lora_jax import optim
        >>> adapters = {"q/kernel": {"A": jnp.ones((3, 1)), "B": jnp.zeros((1, 3))}}
        >>> grads = {"q/kernel": {"A": jnp.zeros((3, 1)), "B": jnp.ones((1, 3))}}
        >>> optimizer = optax.chain(optim.scale_by_riemannian(damping=1.0), optax.sgd(1.0))
        >>> state = optimizer.init(adapters)
        >>> updates, state = optimizer.update(grads, state, adapters)
        >>> print(updates["q/kernel"]["B"])  # 1 / (3 + 1)
        [[-0.25 -0.25 -0.25]]
    """
    check_damping(damping)

    def precondition(
        leaf: _leaves.Leaf, a: jax.Array, b: jax.Array, _: Scales
    ) -> jax.Array:
        if leaf.entry == "A":
            return transpose(solve_gram(b, transpose(leaf.value), damping))
        return solve_gram(transpose(a), leaf.value, damping)

    return on_factors("scale_by_riemannian", precondition, ("A", "B"))


def check_damping(damping: Any) -> None:
    """Raises unless `damping` is a positive number or scalar array."""
    checks.check_number("damping", damping)
    if not isinstance(damping, Tracer) and not damping > 0:
        raise ValueError(
            f"damping must be positive, got {damping}: without it, the step would divide "
            "by zero where a factor is zero, as B is at the start."
        )


def on_factors(
    name: str, precondition: Precondition, entries: tuple[str, ...]
) -> optax.GradientTransformation:
    """Returns a stateless transformation of the gradients of some entries of adapters.

    `precondition` takes a leaf of the gradients, `A`, `B`, and the scales of the slot if
    `per_slot` calls. Errors give the `name` of the public function.
    """

    def init(params: optax.Params) -> optax.OptState:
        _leaves.check_holds_adapters(name, _leaves.flatten(params)[0])
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        slot_scales: Scales = None,
        **_: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError(
                f"{name} needs the params, since it reads the factors: call "
                "update(grads, state, params)."
            )
        leaves, structure = _leaves.flatten(updates)
        _leaves.check_holds_adapters(name, leaves)
        adapters = by_adapter(_leaves.flatten(params)[0])

        def changed(leaf: _leaves.Leaf) -> Any:
            if leaf.entry not in entries or _leaves.is_gap(leaf.value):
                return leaf.value
            with checks.at_path(str(leaf.adapter)):
                a, b = factors_of(name, leaf, adapters.get(str(leaf.adapter), {}))
            return precondition(leaf, a, b, slot_scales).astype(leaf.value.dtype)

        return structure.unflatten(map(changed, leaves)), state

    return optax.GradientTransformationExtraArgs(init, update)


def by_adapter(leaves: list[_leaves.Leaf]) -> dict[str, dict[str, Any]]:
    """The entries of each adapter, by its path in the tree."""
    adapters: dict[str, dict[str, Any]] = {}
    for leaf in leaves:
        if leaf.adapter is not None:
            adapters.setdefault(leaf.adapter, {})[leaf.entry] = leaf.value
    return adapters


def factors_of(
    name: str, gradient: _leaves.Leaf, adapter: Mapping[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """Checks and returns `A` and `B` of the adapter that a gradient belongs to."""
    factors: dict[str, Any] = {entry: adapter.get(entry) for entry in "AB"}
    missing = [entry for entry, value in factors.items() if _leaves.is_gap(value)]
    if missing:
        raise ValueError(
            f"{name} needs A and B of the params here, and {' and '.join(missing)} is "
            "missing or masked: put it in front of what masks them, as in "
            f"optax.chain({name}(...), optax.partition(...))."
        )
    adapter_checks.check_adapter(factors, None)
    expected = factors[gradient.entry].shape
    if gradient.value.shape != expected:
        raise ValueError(
            f"the gradient of {gradient.entry} must have its shape {expected}, got "
            f"{gradient.value.shape}."
        )
    return factors["A"], factors["B"]


def transpose(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def solve_gram(factor: jax.Array, gradient: jax.Array, damping: Number) -> jax.Array:
    """`(F F^T + damping I)^-1 G` `(*batch, rank, k)`, in at least float32.

    Args:
        factor: `F (*batch, rank, n)`.
        gradient: `G (*batch, rank, k)`.
        damping: a positive scalar.
    """
    arrays = jnp.asarray(factor), jnp.asarray(gradient), jnp.asarray(damping)
    explicit = [array for array in arrays if any(compat.explicit_spec(array))]
    if not explicit:
        return _solve_gram(*arrays)
    # On a mesh with explicit axes each intermediate would need a sharding.
    out: Any = PartitionSpec(*compat.explicit_spec(arrays[1]))
    with compat.on_mesh_of(explicit[0]):
        inner: Any = jax.sharding.auto_axes(_solve_gram, out_sharding=out)
        return jax.jit(inner)(*arrays)


def _solve_gram(factor: jax.Array, gradient: jax.Array, damping: jax.Array) -> jax.Array:
    dtype = numerics.accumulation_dtype(factor.dtype, gradient.dtype)
    f = factor.astype(dtype)
    gram = jnp.matmul(f, transpose(f), precision=lax.Precision.HIGHEST)
    used = jnp.any(f != 0, axis=-1) | jnp.any(gradient != 0, axis=-1)  # (*batch, rank)
    units = jnp.sum(used, axis=-1, dtype=dtype) * float(jnp.finfo(dtype).eps)
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)  # (*batch, rank)
    rounding = units * jnp.max(diagonal, axis=-1)
    added = jnp.maximum(damping.astype(dtype), rounding)[..., None, None]
    eye = lax.expand_dims(jnp.eye(*gram.shape[-2:], dtype=dtype), range(gram.ndim - 2))
    root = jnp.linalg.cholesky(gram + added * eye)
    return jax.scipy.linalg.cho_solve((root, True), gradient.astype(dtype))
