"""Low-rank factors of a matrix: truncated SVDs, exact and randomized, and a QR.

Everywhere `matrix` is `(*batch, in, out)` in at least float32, `rank` is at most
`min(in, out)`, and products run at the highest precision. The SVD of a product of factors
never forms the product.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import checks

# Extra columns of the randomized SVD. Halko et al., 2011, section 1.3, recommend 5 or 10.
_OVERSAMPLING = 10


class Svd(NamedTuple):
    """The largest singular values of a matrix, in descending order, and their vectors."""

    u: jax.Array
    """`(*batch, in, rank)`."""
    s: jax.Array
    """`(*batch, rank)`."""
    vh: jax.Array
    """`(*batch, rank, out)`."""


def check_rank(rank: int, shape: tuple[int, ...]) -> None:
    """Raises unless a decomposition of a weight of this shape has so many terms."""
    checks.check_rank(rank)
    most = min(shape[-2:])
    if rank > most:
        raise ValueError(
            f"rank must be at most min(in, out) = {most} for a weight of shape {shape}, "
            f"got {rank}: its decomposition has no more terms. Take a smaller rank, or an "
            "initializer that does not decompose the weight."
        )


def exact(matrix: jax.Array, rank: int | None = None) -> Svd:
    """The terms of the SVD that have the largest singular values, by default all."""
    u, s, vh = jnp.linalg.svd(matrix, full_matrices=False)
    return Svd(u[..., :rank], s[..., :rank], vh[..., :rank, :])


# Compiled once for each shape, and inlined where something else is traced.
@functools.partial(jax.jit, static_argnums=(2, 3), inline=True)
def randomized(key: jax.Array, matrix: jax.Array, rank: int, iterations: int) -> Svd:
    """An approximation of `exact` from products with `rank + 10` columns.

    Subspace iteration from random columns, made orthonormal at each half step (Halko et
    al., 2011, algorithms 4.4 and 5.1). Never forms an `(in, in)` or `(out, out)` array.
    """
    *batch, n_in, n_out = matrix.shape
    width = min(rank + _OVERSAMPLING, n_in, n_out)
    transposed = jnp.swapaxes(matrix, -1, -2)

    def step(_, q):  # (*batch, in, width)
        return _orthonormal(_product(matrix, _orthonormal(_product(transposed, q))))

    probes = jax.random.normal(key, (*batch, n_out, width), matrix.dtype)
    q = lax.fori_loop(0, iterations, step, _orthonormal(_product(matrix, probes)))
    small = exact(_product(jnp.swapaxes(q, -1, -2), matrix), rank)
    return small._replace(u=_product(q, small.u))


def of_product(a: jax.Array, b: jax.Array) -> Svd:
    """The full SVD of `A @ B`, from QR decompositions of the two factors.

    With `A = Q_a R_a` and `B^T = Q_b R_b`, it is the SVD of the small `R_a R_b^T`, between
    `Q_a` and `Q_b^T`. It has `min(in, rank, out)` terms, some of which may be zero.
    """
    q_a, r_a = jnp.linalg.qr(a)
    q_b, r_b = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    small = exact(_product(r_a, jnp.swapaxes(r_b, -1, -2)))
    vh = _product(small.vh, jnp.swapaxes(q_b, -1, -2))
    return Svd(_product(q_a, small.u), small.s, vh)


def polar(matrix: jax.Array) -> jax.Array:
    """The nearest matrix with orthonormal columns; there are at most as many as rows."""
    q, r = jnp.linalg.qr(matrix)
    u, _, vh = jnp.linalg.svd(r, full_matrices=False)
    return _product(q, _product(u, vh))


def factors(svd: Svd, scale: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """`A` and `B` with `scale * A @ B = U S V^H`, and equal norms for each term."""
    scale = jnp.asarray(scale, svd.s.dtype)
    root = jnp.sqrt(svd.s / jnp.abs(scale))
    a = svd.u * root[..., None, :]
    b = svd.vh * (jnp.sign(scale) * root)[..., :, None]
    return a, b


def qr_factors(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """`A = R_r^T` and `B = Q_r^T` of the QR decomposition `W^T = Q R`.

    The first columns of `Q` depend on the first columns of `W^T` only, so the rest is not
    decomposed; `R_r` is `Q_r^T W^T`.
    """
    q = _orthonormal(jnp.swapaxes(matrix[..., :rank, :], -1, -2))  # (*batch, out, rank)
    return _product(matrix, q), jnp.swapaxes(q, -1, -2)


def _orthonormal(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.qr(matrix)[0]


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
