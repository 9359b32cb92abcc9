"""LoRA-RITE: Adam for `A @ B`, whose steps do not depend on how the product is factored.

Let `U H` be the polar decomposition of a factor, with its rank last: `U` is an orthonormal
basis `(n, rank)` and `H` a symmetric `(rank, rank)`. The gradient of `A` is that of the
product times `U H` of `B^T`. Without `H` it is *unmagnified*: the gradient of the product
in the basis `U`. Its moments are kept in this basis, and move into the new basis before
each step. All arithmetic runs in at least float32.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jax.sharding import PartitionSpec

from lora_jax._core import checks, compat, numerics
from lora_jax.optim import _leaves
from lora_jax.optim.labels import weight_decay_mask
from lora_jax.optim.preconditioning import Number, by_adapter, factors_of, transpose

__all__ = ["lora_rite", "scale_by_lora_rite"]

_UNITS = 32  # rounding units, of the largest value, below which a value counts as zero


class Moments(NamedTuple):
    """What the optimizer knows of one leaf."""

    mu: Any
    """The first moment, in the shape of the leaf."""
    nu: Any
    """The second moment: `(*batch, rank, rank)` of a factor, else as the leaf."""
    basis: Any = optax.MaskedNode()
    """`U` of a factor, in the shape of the factor."""
    escaped: Any = optax.MaskedNode()
    """`(*batch,)`, what the second moment of a factor lost in changes of the basis."""


Arrays: TypeAlias = dict[str, jax.Array]  # of an adapter: `{"A": ..., "B": ...}`
Pair: TypeAlias = dict[str, Moments]


class LoraRiteState(NamedTuple):
    """The number of steps, and the fields of `Moments` as trees like the params."""

    count: Any
    mu: Any
    nu: Any
    basis: Any
    escaped: Any


class Rates(NamedTuple):
    """The hyperparameters, and the corrections of the moments' bias towards zero."""

    b1: jax.Array
    b2: jax.Array
    eps: jax.Array
    whole1: jax.Array
    whole2: jax.Array


def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    *,
    weight_decay: Number = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains adapters with steps that do not depend on how `A @ B` is factored (LoRA-RITE).

    It takes the place of `optax.adamw`. Training from `A R` and `R^-1 B`, for any
    invertible `R`, has the same products after each step as from `A` and `B`. This holds
    up to rounding, for factors of full rank, for a `B` of zeros, and without `A_bias`.
    Magnitudes, biases and leaves outside of adapters are trained with Adam. See
    `scale_by_lora_rite` for the method.

    A step of length `learning_rate` changes `A @ B` by as much as one of Adam changes it
    if the singular values of both factors are 1. New adapters have smaller factors, so the
    best learning rate may be lower than that of Adam. A norm of all gradients, as in
    `optax.clip_by_global_norm`, depends on how `A @ B` is factored.

    Args:
        learning_rate: a number, or a schedule.
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment; not negative.
        weight_decay: each step multiplies the decayed leaves by
            `1 - learning_rate * weight_decay`, and so the product of two factors by its
            square.
        mask: the leaves to decay, as for `optax.adamw`, but None means those of
            `weight_decay_mask`. Both factors of an adapter, or none, should be in it.

    Returns:
        A gradient transformation for trees that contain adapters. `update` needs the
        params.

    Raises:
        TypeError: if a number has the wrong type.
        ValueError: if a number is out of range. And in `init` and `update`: as in
            `scale_by_lora_rite`.

    References:
        Yen et al., 2024, https://arxiv.org/abs/2410.20625.

    Example:
        >>> import jax.numpy as jnp
        >>> from lora_jax import optim
        >>> adapters = {"q/kernel": {"A": jnp.full((4, 1), 0.5), "B": jnp.zeros((1, 3))}}
        >>> grads = {"q/kernel": {"A": jnp.zeros((4, 1)), "B": jnp.ones((1, 3))}}
        >>> optimizer = optim.lora_rite(0.25)
        >>> updates, _ = optimizer.update(grads, optimizer.init(adapters), adapters)
        >>> print(updates["q/kernel"]["B"].round(6))  # Adam's, since A is a unit vector
        [[-0.25 -0.25 -0.25]]
    """
    if not callable(learning_rate):
        checks.check_number("learning_rate", learning_rate)
    checks.check_number("weight_decay", weight_decay)
    return optax.with_extra_args_support(
        optax.chain(
            scale_by_lora_rite(b1, b2, eps),
            optax.add_decayed_weights(
                weight_decay, weight_decay_mask if mask is None else mask
            ),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def scale_by_lora_rite(
    b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8
) -> optax.GradientTransformation:
    """Rescales gradients by the method of LoRA-RITE; of other leaves, by that of Adam.

    For `A`, with `U H` the polar decomposition of `B^T`, `P` the product of the new `U^T`
    and the `U` of the step before, and `n` the rows of `A`:

        G = gA H^-1
        V = b2 P V P^T + (1 - b2) G^T G / n
        rho = b2 (rho + largest decrease of an eigenvalue from V to P V P^T)
        M = b1 M P^T + (1 - b1) G (V + rho I)^-1/2
        gA becomes M H^-1

    `V` and `rho` are divided by `1 - b2^t` and `M` by `1 - b1^t` at step `t`, as in Adam.
    `B` is treated in the same way, transposed.

    `H^-1` is the pseudo-inverse. So a factor of lower rank, such as the `B` of a new
    adapter, makes no step of the other factor in the directions that it lacks, and padding
    with zeros stays zero. Singular values of a factor below 32 rounding units of the
    largest one count as zero.

    The state has four arrays for each factor. Two have the shape of the factor, as in Adam.
    A step decomposes each factor, and symmetric matrices `(rank, rank)`.

    Args:
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment; not negative.

    Returns:
        A gradient transformation. Updates have the dtypes of the gradients, and the state
        has at least float32. `update` needs the params with both factors, so inside an
        `optax.masked` or `optax.partition` that hides one of them it raises an error.

    Raises:
        TypeError: if a number has the wrong type.
        ValueError: if a number is out of range. And in `init` and `update`: if the tree
            has no adapters, there are no params, or a factor is missing or does not fit.

    References:
        Yen et al., 2024, section 3, https://arxiv.org/abs/2410.20625. The paper's `B` is
        our `B.T`, and its sum of squares is a decaying mean here. As in the authors' code,
        the second moment is a mean over the `n` rows, so that an entry of an update is
        about as large as in Adam. Their code can also clip unmagnified gradients. The
        formulas leave out the scale of the adapter.

    Example:
        >>> import jax.numpy as jnp
        >>> from lora_jax import optim
        >>> adapters = {"q/kernel": {"A": jnp.eye(4, 1), "B": 0.5 * jnp.eye(1, 3)}}
        >>> grads = {"q/kernel": {"A": jnp.ones((4, 1)), "B": jnp.ones((1, 3))}}
        >>> optimizer = optim.scale_by_lora_rite()
        >>> updates, _ = optimizer.update(grads, optimizer.init(adapters), adapters)
        >>> print(updates["q/kernel"]["A"][:, 0])  # divided by the length of B
        [2. 2. 2. 2.]
    """
    for name, value, end in (("b1", b1, 1), ("b2", b2, 1), ("eps", eps, math.inf)):
        checks.check_number(name, value)
        if not isinstance(value, Tracer) and not 0 <= value < end:
            raise ValueError(f"{name} must be at least 0 and below {end}, got {value}.")

    def rates(count: jax.Array, dtype: Any) -> Rates:
        one, two, small = (jnp.asarray(x, dtype) for x in (b1, b2, eps))
        steps = count.astype(dtype)
        return Rates(one, two, small, 1 - one**steps, 1 - two**steps)

    def init(params: optax.Params) -> LoraRiteState:
        leaves, structure = _leaves.flatten(params)
        _leaves.check_holds_adapters("scale_by_lora_rite", leaves)
        fresh = [_fresh(leaf) for leaf in leaves]
        columns = ([own[i] for own in fresh] for i in range(len(Moments._fields)))
        return LoraRiteState(jnp.zeros([], jnp.int32), *map(structure.unflatten, columns))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **_: Any,
    ) -> tuple[optax.Updates, LoraRiteState]:
        if params is None:
            raise ValueError(
                "scale_by_lora_rite needs the params, since it reads the factors: call "
                "update(grads, state, params)."
            )
        leaves, structure = _leaves.flatten(updates)
        _leaves.check_holds_adapters("scale_by_lora_rite", leaves)
        count: Any = optax.safe_increment(state.count)
        moments = map(Moments, *(structure.flatten_up_to(tree) for tree in state[1:]))
        results: list[tuple[Any, Moments]] = []
        pairs: dict[str, dict[str, int]] = {}  # of each adapter, where its factors are
        for i, (leaf, own) in enumerate(zip(leaves, moments, strict=True)):
            results.append((leaf.value, own))
            if _is_factor(leaf):
                pairs.setdefault(str(leaf.adapter), {})[leaf.entry] = i
            elif not _leaves.is_gap(leaf.value):
                results[i] = _adam(leaf.value, own, rates(count, own.mu.dtype))
        adapters = by_adapter(_leaves.flatten(params)[0])
        for path, places in pairs.items():
            with checks.at_path(path):
                own = {name: leaves[i] for name, i in places.items()}
                factors = _checked(own, adapters.get(path, {}))
            if factors:
                pair = {name: results[i][1] for name, i in places.items()}
                gradients = {name: leaf.value for name, leaf in own.items()}
                made, kept = _on_any_mesh(factors, gradients, pair, count, rates)
                for name, i in places.items():
                    results[i] = made[name], kept[name]
        columns = ([own[i] for _, own in results] for i in range(len(Moments._fields)))
        new = LoraRiteState(count, *map(structure.unflatten, columns))
        return structure.unflatten([step for step, _ in results]), new

    return optax.GradientTransformationExtraArgs(init, update)


def _is_factor(leaf: _leaves.Leaf) -> bool:
    return leaf.adapter is not None and leaf.entry in ("A", "B")


def _checked(leaves: dict[str, _leaves.Leaf], adapter: dict[str, Any]) -> Arrays:
    """The factors that some gradients belong to: none if both gradients are masked."""
    gaps = [name for name, leaf in leaves.items() if _leaves.is_gap(leaf.value)]
    if len(gaps) == 2:
        return {}
    factors = {}
    for leaf in leaves.values():
        if leaf.entry not in gaps:
            factors = factors_of("scale_by_lora_rite", leaf, adapter)
    if gaps:
        raise ValueError(
            "scale_by_lora_rite needs the gradients of A and B, and that of "
            f"{gaps[0]} is missing: to freeze it, use lora_fa or trainable_and_frozen."
        )
    return dict(zip("AB", factors, strict=True))


def _fresh(leaf: _leaves.Leaf) -> Moments:
    """The moments of a leaf before the first step."""
    if _leaves.is_gap(leaf.value):
        return Moments(*[leaf.value] * 4)
    value = jnp.asarray(leaf.value)
    dtype = numerics.accumulation_dtype(value.dtype)
    # Each array has its own memory, so that the state can be donated.
    made = [jnp.zeros_like(value, dtype) for _ in range(2)]
    if not _is_factor(leaf):
        return Moments(*made)
    batch, rank = value.shape[:-2], value.shape[-1 if leaf.entry == "A" else -2]
    nu, escaped = jnp.zeros((*batch, rank, rank), dtype), jnp.zeros(batch, dtype)
    return Moments(made[0], nu, made[1], escaped)


def _adam(gradient: jax.Array, old: Moments, rates: Rates) -> tuple[jax.Array, Moments]:
    """Adam's direction for a leaf that is no factor."""
    g = gradient.astype(old.mu.dtype)
    mu = rates.b1 * old.mu + (1 - rates.b1) * g
    nu = rates.b2 * old.nu + (1 - rates.b2) * g * g
    step = mu / rates.whole1 / (jnp.sqrt(nu / rates.whole2) + rates.eps)
    return step.astype(gradient.dtype), Moments(mu, nu)


def _on_any_mesh(
    factors: Arrays,
    gradients: Arrays,
    moments: Pair,
    count: jax.Array,
    rates: Callable[[jax.Array, Any], Rates],
) -> tuple[Arrays, Pair]:
    """`_factors`, also on a mesh with explicit axes, where it keeps all shardings."""
    dtype = numerics.accumulation_dtype(*(x.dtype for x in jax.tree.leaves(gradients)))
    dtype = numerics.promote(dtype, *(x.dtype for x in jax.tree.leaves(factors)))
    args = factors, gradients, moments, rates(count, dtype)
    explicit = [x for x in jax.tree.leaves(args) if any(compat.explicit_spec(x))]
    if not explicit:
        return _factors(*args)
    out = jax.tree.map(lambda x: PartitionSpec(*compat.explicit_spec(x)), args[1:3])
    with compat.on_mesh_of(explicit[0]):
        return jax.jit(jax.sharding.auto_axes(_factors, out_sharding=out))(*args)


def _factors(
    factors: Arrays, gradients: Arrays, moments: Pair, rates: Rates
) -> tuple[Arrays, Pair]:
    """The directions of both factors of an adapter, and their moments."""
    dtype = rates.eps.dtype

    def with_rank_last(x: jax.Array, entry: str) -> jax.Array:
        return (x if entry == "A" else transpose(x)).astype(dtype)

    polar = {entry: _polar(with_rank_last(x, entry)) for entry, x in factors.items()}
    steps, kept = {}, {}
    for entry, other in ("AB", "BA"):
        basis, inverse = polar[other]
        turn = _dot(transpose(basis), with_rank_last(moments[other].basis, other))
        old = moments[entry]
        step, mu, nu, escaped = _direction(
            _dot(with_rank_last(gradients[entry], entry), inverse),
            _dot(with_rank_last(old.mu, entry), transpose(turn)),
            old.nu.astype(dtype),
            old.escaped.astype(dtype),
            turn,
            rates,
        )
        made = [_dot(step, inverse), mu, polar[entry][0]]
        step, mu, own = (x if entry == "A" else transpose(x) for x in made)
        steps[entry] = step.astype(gradients[entry].dtype)
        new = Moments(mu, nu, own, escaped)
        kept[entry] = jax.tree.map(lambda x, y: x.astype(y.dtype), new, old)
    return steps, kept


def _direction(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    escaped: jax.Array,
    turn: jax.Array,
    rates: Rates,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The direction for an unmagnified gradient `(*batch, n, rank)`, and the new moments.

    `mu` is in the new basis. `nu` is in the old one, and `turn` `(*batch, rank, rank)`
    moves it into the new one.
    """
    turned = _dot(_dot(turn, nu), transpose(turn))
    turned = (turned + transpose(turned)) / 2
    lost = jnp.max(jnp.linalg.eigvalsh(nu) - jnp.linalg.eigvalsh(turned), axis=-1)
    escaped = rates.b2 * (escaped + jnp.maximum(lost, 0))
    square = _dot(transpose(g), g) / g.shape[-2]
    nu = rates.b2 * turned + (1 - rates.b2) * square
    values, vectors = jnp.linalg.eigh(nu / rates.whole2)
    # Rounding hides how small an eigenvalue is. Divided by less, it would be amplified.
    values = jnp.maximum(values, _smallest(values))
    values = jnp.sqrt(values + escaped[..., None] / rates.whole2) + rates.eps
    scaled = _dot(_dot(g, vectors) / values[..., None, :], transpose(vectors))
    mu = rates.b1 * mu + (1 - rates.b1) * scaled
    return mu / rates.whole1, mu, nu, escaped


def _polar(factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`U` and the pseudo-inverse of `H`, where the factor `(*batch, n, rank)` is `U H`.

    `U` has no directions with a singular value of zero. Columns of zeros are zero in both.
    """
    q, upper = jnp.linalg.qr(factor)
    x, values, y = jnp.linalg.svd(upper, full_matrices=False)
    is_zero = values <= _smallest(values)
    inverses = jnp.where(is_zero, 0, 1 / jnp.where(is_zero, 1, values))
    used = jnp.any(factor != 0, axis=-2)  # (*batch, rank)
    y = jnp.where(used[..., None, :], y, 0)
    basis = _dot(_dot(q, jnp.where(is_zero[..., None, :], 0, x)), y)
    return basis, _dot(transpose(y) * inverses[..., None, :], y)


def _smallest(values: jax.Array) -> jax.Array:
    """What counts as zero next to the largest of some values `(*batch, k)`."""
    info = jnp.finfo(values.dtype)
    largest = jnp.max(values, axis=-1, keepdims=True)
    return jnp.maximum(largest * (_UNITS * float(info.eps)), float(info.tiny))


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
