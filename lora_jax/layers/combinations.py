"""Sums of low-rank updates of one weight, and updates of a lower rank.

An update is `scale * A @ B`, with `A (*batch, in, rank)` and `B (*batch, rank, out)`. Each
matrix of a stack is treated alone, and all have the same rank. Everything is computed in at
least float32 and rounded once. The methods whose names end in `_svd` compute a dense update
of each adapter, one matrix of a stack at a time, and `extract` takes dense weights. No
other function has an array of the size `in * out`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from lora_jax._core import numerics
from lora_jax.layers import decompositions, pruning
from lora_jax.layers.decompositions import Svd

_OnFactors: TypeAlias = Literal["linear", "magnitude", "dare_linear", "dare_ties", "ties"]
_OnUpdates: TypeAlias = Literal[
    "magnitude_svd", "dare_linear_svd", "dare_ties_svd", "ties_svd"
]
_OnSvds: TypeAlias = Literal["svd", "knots", "tsv"]
MethodName: TypeAlias = Literal["exact"] | _OnFactors | _OnUpdates | _OnSvds

TRUNCATE: tuple[str, ...] = (*get_args(_OnSvds), *get_args(_OnUpdates))
METHODS = ("exact", *get_args(_OnFactors), *TRUNCATE)
ELECT = (*(name for name in METHODS if "ties" in name), "knots")
NEED_KEY = tuple(name for name in METHODS if "dare" in name)
NEED_DENSITY = (*NEED_KEY, *ELECT, "magnitude", "magnitude_svd")
MAJORITIES = ("total", "frequency")


class Term(NamedTuple):
    """An update in a sum, `weight * scale * A @ B`."""

    a: jax.Array
    b: jax.Array
    scale: float
    weight: float


class Method(NamedTuple):
    """How updates are combined."""

    name: str
    """One of `METHODS`."""
    density: float = 1.0
    """The share of the entries that are kept."""
    majority: str = "total"
    """How a sign is elected: by the sum of the entries, or by their signs."""


class Cut(NamedTuple):
    """The rank of a result."""

    rank: int | None = None
    """The largest rank; None for no limit."""
    energy: float | None = None
    """Take the smallest rank that keeps this share of the squared Frobenius norm."""


class Update(NamedTuple):
    """The update `scale * A @ B`."""

    a: jax.Array
    b: jax.Array
    scale: float
    energy: Any
    """The share of the squared Frobenius norm that was kept; an array in a trace."""


def combine(
    terms: Sequence[Term], method: Method, cut: Cut, key: jax.Array | None = None
) -> Update:
    """Combines updates of one weight.

    Args:
        terms: at least one. Those with the weight 0 take no part.
        method: how to combine them.
        cut: the rank, for the methods of `TRUNCATE`. Without a rank and an energy, the rank
            is the largest one of the terms, or for `"tsv"` the number of components.
        key: a `jax.random` key, for the methods of `NEED_KEY`.

    Returns:
        An update with the widest dtype of the terms. It has the scale of the terms if they
        have the same one, and otherwise 1.

    Raises:
        ValueError: if the method adds factors, and the ranks differ; or if it is `"tsv"`,
            and there are more terms than inputs or outputs.
    """
    scales = {term.scale for term in terms}
    scale = (scales.pop() if len(scales) == 1 else 1.0) or 1.0
    # If no term takes part, the first one has a zero B.
    terms = [term for term in terms if term.weight and term.scale] or [terms[0]]
    dtype = numerics.promote(*(x.dtype for term in terms for x in (term.a, term.b)))
    wide = numerics.accumulation_dtype(dtype)
    factors = [(term.a, term.b) for term in terms]
    ratios = np.asarray([term.scale / scale for term in terms], wide)
    weights = np.asarray([term.weight for term in terms], wide)
    given = factors, ratios, weights, key if method.name in NEED_KEY else None
    if method.name not in TRUNCATE:
        if method.name != "exact":
            _check_same_rank(terms, method.name)
        a, b = _combined_factors(method, dtype, *given)
        return Update(a, b, scale, 1.0)
    if method.name == "tsv":
        _check_room(terms)
    elif cut == Cut():
        cut = Cut(max(term.a.shape[-1] for term in terms))
    shape = (terms[0].a.shape[-2], terms[0].b.shape[-1])
    svd, rest = _combined_svd(method, _most(cut, shape), *given)
    made = _cut(svd, rest, cut, 1.0, dtype)
    return made._replace(scale=scale)


def resize(a: jax.Array, b: jax.Array, scale: float, cut: Cut) -> Update:
    """The best approximation of an update by one of a lower rank, with the same scale.

    Factors whose rank is not too large are returned as they are.
    """
    if cut.energy is None and a.shape[-1] <= (cut.rank or 0):
        return Update(a, b, scale, 1.0)
    dtype = numerics.promote(a.dtype, b.dtype)
    wide = numerics.accumulation_dtype(dtype)
    made = _cut(_of_product(a, b, wide), None, cut, 1.0, dtype)
    if made.a.shape[-1] >= a.shape[-1]:
        return Update(a, b, scale, 1.0)
    return made._replace(scale=scale)


def extract(
    base: jax.Array, tuned: jax.Array, scale: float, cut: Cut, dtype: Any
) -> Update:
    """The best approximation of `tuned - base` by an update.

    Args:
        base: `(*batch, in, out)`, floating point.
        tuned: of the same shape.
        scale: of the update, not 0.
        cut: the rank; a rank above `min(in, out)` counts as `min(in, out)`.
        dtype: of the factors.
    """
    wide = numerics.accumulation_dtype(base.dtype, tuned.dtype, dtype)
    svd, rest = _difference_svd(base, tuned, wide, _most(cut, base.shape[-2:]))
    return _cut(svd, rest, cut, scale, dtype)


def _most(cut: Cut, shape: Sequence[int]) -> int:
    """The largest number of terms of an SVD that may be kept."""
    return min(*shape, cut.rank or min(shape))


def _cut(svd: Svd, rest: Any, cut: Cut, scale: float, dtype: Any) -> Update:
    """An update from the first terms of an SVD, with factors of equal norms.

    Args:
        svd: of the update.
        rest: `(*batch,)`, the squared Frobenius norm of what the SVD lacks, or None.
        cut: the rank.
        scale: of the update.
        dtype: of the factors.
    """
    xp: Any = jnp if isinstance(svd.s, Tracer) else np
    if cut.energy is not None and xp is jnp:
        raise TypeError(
            "with energy the rank would depend on values in a trace: give a rank alone, or "
            "call the function outside of jax.jit."
        )
    wide = svd.s.dtype if xp is jnp else np.float64
    squares = xp.square(xp.asarray(svd.s, wide)).reshape(-1, svd.s.shape[-1]).sum(0)
    lost = 0.0 if rest is None else xp.asarray(rest, wide).sum()
    # lost[k] is the squared norm of all terms behind the first k.
    tail = xp.cumsum(squares[::-1])[::-1]
    lost = xp.concatenate([tail, xp.zeros(1, wide)]) + lost
    most = rank = min(len(squares), cut.rank or len(squares))
    if cut.energy is not None:
        # Terms that are rounding errors of zero do not count.
        unit = (8 * float(jnp.finfo(svd.s.dtype).eps)) ** 2 * len(squares)
        small = lost <= (1.0 - cut.energy + unit) * lost[0]
        rank = min(most, max(1, int(small.argmax()) if small.any() else most))
    energy = 1.0 - lost[rank] / xp.where(lost[0] == 0, 1.0, lost[0])
    kept = energy if xp is jnp else float(energy)
    a, b = _first_factors(svd, rank, scale, dtype)
    return Update(a, b, scale, kept)


@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _first_factors(
    svd: Svd, rank: int, scale: float, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Factors of the first terms of an SVD."""
    u, s, vh = svd
    svd = Svd(u[..., :rank], s[..., :rank], vh[..., :rank, :])
    a, b = decompositions.factors(svd, scale)
    return a.astype(dtype), b.astype(dtype)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _of_product(a: jax.Array, b: jax.Array, wide: Any) -> Svd:
    return decompositions.of_product(*_wide([(a, b)], wide)[0])


@functools.partial(jax.jit, static_argnums=(2, 3), inline=True)
def _difference_svd(
    base: jax.Array, tuned: jax.Array, wide: Any, most: int
) -> tuple[Svd, Any]:
    def difference(_, pair):
        return pair[1].astype(wide) - pair[0].astype(wide)

    return _svd_of_each(difference, None, (base, tuned), most)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _combined_factors(
    method: Method,
    dtype: Any,
    factors: Any,
    ratios: jax.Array,
    weights: jax.Array,
    key: Any,
) -> tuple[jax.Array, jax.Array]:
    wide = _wide(factors, ratios.dtype)
    gains = ratios * weights
    if method.name == "exact":
        a, b = _concatenated(wide, gains)
    else:
        roots = jnp.sqrt(jnp.abs(gains))
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        # The signs are in A, as in peft: its cross terms depend on that.
        a = _merged(method, [a for a, _ in wide], jnp.sign(gains) * roots, keys[0])
        b = _merged(method, [b for _, b in wide], roots, keys[1])
    return a.astype(dtype), b.astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _combined_svd(
    method: Method, most: int, factors: Any, ratios: jax.Array, weights: jax.Array, key: Any
) -> tuple[Svd, Any]:
    """The SVD of the combination, and the squared norm of what it lacks, or None."""
    factors = _wide(factors, ratios.dtype)
    if method.name == "svd":
        return decompositions.of_product(*_concatenated(factors, ratios * weights)), None
    if method.name == "knots":
        return _knots(method, factors, ratios, weights), None
    if method.name == "tsv":
        return _tsv(factors, ratios, weights)

    def combined(key: Any, factors: Any) -> jax.Array:
        updates = [r * _product(a, b) for r, (a, b) in zip(ratios, factors, strict=True)]
        return _merged(method, updates, weights, key)

    return _svd_of_each(combined, key, factors, most)


def _svd_of_each(
    function: Callable[[Any, Any], jax.Array], key: Any, stacks: Any, most: int
) -> tuple[Svd, Any]:
    """The first terms of the SVD of a dense matrix, one matrix of a stack at a time.

    Args:
        function: of a key and arrays of two axes, to a matrix.
        key: of all matrices, or None.
        stacks: arrays with the same leading axes.
        most: how many terms to compute.

    Returns:
        The SVD, and the squared norm of all other terms.
    """

    def one(given: Any) -> tuple[Svd, jax.Array]:
        u, s, vh = decompositions.exact(function(*given))
        return Svd(u[:, :most], s[:most], vh[:most]), jnp.sum(jnp.square(s[most:]))

    batch = jax.tree.leaves(stacks)[0].shape[:-2]
    if not batch:
        return one((key, stacks))
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[-2:]), stacks)
    n = len(jax.tree.leaves(flat)[0])
    keys = None if key is None else jax.random.split(key, n)
    out = lax.map(one, (keys, flat))
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), out)


def _concatenated(factors: Any, gains: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factors of the exact sum; the square root of each gain is in `A` and in `B`."""
    roots = jnp.sqrt(jnp.abs(gains))
    roots_a = jnp.where(gains == 0, 1, roots)
    signed = jnp.sign(gains) * roots
    a = [root * a for root, (a, _) in zip(roots_a, factors, strict=True)]
    b = [root * b for root, (_, b) in zip(signed, factors, strict=True)]
    return jnp.concatenate(a, axis=-1), jnp.concatenate(b, axis=-2)


def _merged(
    method: Method, arrays: Sequence[jax.Array], weights: jax.Array, key: Any
) -> jax.Array:
    majority = method.majority if method.name in ELECT else None
    return pruning.merged(arrays, weights, method.density, majority, key)


def _knots(method: Method, factors: Any, ratios: jax.Array, weights: jax.Array) -> Svd:
    """TIES in the space that the SVD of all updates, one below the other, gives them.

    With `B_i = C_i Q`, the blocks `A_i C_i` have the inputs and the joint output space as
    axes. `Q` is turned so that the rows of its `Z^T Q` are the right singular vectors.
    """
    q, r = jnp.linalg.qr(_transposed(jnp.concatenate([b for _, b in factors], axis=-2)))
    ends = np.cumsum([a.shape[-1] for a, _ in factors])[:-1]
    coordinates = jnp.split(_transposed(r), ends, axis=-2)
    blocks = [
        ratio * _product(a, c)
        for ratio, (a, _), c in zip(ratios, factors, coordinates, strict=True)
    ]
    _, r = jnp.linalg.qr(jnp.concatenate(blocks, axis=-2))
    turn = _transposed(decompositions.exact(r).vh)
    merged = _merged(method, [_product(block, turn) for block in blocks], weights, None)
    return decompositions.of_product(merged, _transposed(_product(q, turn)))


def _tsv(factors: Any, ratios: jax.Array, weights: jax.Array) -> tuple[Svd, Any]:
    """The first singular vectors of each update, made orthogonal to those of the others."""
    svds = [decompositions.of_product(a, b) for a, b in factors]
    kept, rest = [], []
    for ratio, weight, (u, s, vh) in zip(ratios, weights, svds, strict=True):
        n, s = max(1, s.shape[-1] // len(svds)), ratio * weight * s
        kept.append(Svd(u[..., :n], s[..., :n], vh[..., :n, :]))
        rest.append(jnp.sum(jnp.square(s[..., n:]), -1))
    u = decompositions.polar(jnp.concatenate([svd.u for svd in kept], axis=-1))
    v = decompositions.polar(
        _transposed(jnp.concatenate([svd.vh for svd in kept], axis=-2))
    )
    s = jnp.concatenate([svd.s for svd in kept], axis=-1)
    order = jnp.argsort(-jnp.abs(s), axis=-1)
    u, v = (jnp.take_along_axis(x, order[..., None, :], axis=-1) for x in (u, v))
    s = jnp.take_along_axis(s, order, axis=-1)
    vh = _transposed(v * jnp.where(s < 0, -1, 1)[..., None, :])
    return Svd(u, jnp.abs(s), vh), sum(rest)


def _wide(factors: Any, dtype: Any) -> list[tuple[jax.Array, jax.Array]]:
    return [(jnp.asarray(a, dtype), jnp.asarray(b, dtype)) for a, b in factors]


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _check_same_rank(terms: Sequence[Term], name: str) -> None:
    ranks = [term.a.shape[-1] for term in terms]
    if len({*ranks}) > 1:
        raise ValueError(
            f"method={name!r} adds factors, which needs one rank, and the ranks are "
            f"{', '.join(map(str, ranks))}: use resize_adapters first, or method='svd'"
            + (f" or '{name}_svd'." if name in NEED_DENSITY else ".")
        )


def _check_room(terms: Sequence[Term]) -> None:
    most = min(terms[0].a.shape[-2], terms[0].b.shape[-1])
    if len(terms) > most:
        raise ValueError(
            f"method='tsv' needs one dimension of the weight for each adapter, and there "
            f"are {len(terms)} adapters and {most} inputs or outputs: use method='svd'."
        )
