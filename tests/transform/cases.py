"""Functions that use a weight in every way that keeps it low-rank.

Each case is a function, its params and arguments, the axes that the plan finds, and what
the plan has to be told. No two sizes of a case are alike where a mix-up could hide.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.scipy.linalg import cho_solve, solve_triangular

from tests.support import asarray, normal

IDS = np.array([[1, 2, 3], [4, 5, 4]])


@dataclasses.dataclass(frozen=True)
class Case:
    """A use of weights.

    Attributes:
        fn: `fn(params, *args)`.
        params: the shape of each.
        args: shapes of floating-point arguments, or the arguments.
        axes: what the plan finds, by path.
        config: options of the config besides rank and alpha.
        options: of `adapt`.
    """

    fn: Callable[..., Any]
    params: dict[str, tuple[int, ...]]
    args: tuple[Any, ...]
    axes: dict[str, str]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def _einsum(spec, weight, x, axes):
    """One einsum of `x` with the weight `w`."""
    return Case(lambda p, x: jnp.einsum(spec, x, p["w"]), {"w": weight}, (x,), {"w": axes})


def _w(fn, axes, weight=(12, 10), x=(5, 12), **config):
    """A function of the weight `w` and of one argument."""
    return Case(fn, {"w": weight}, (x,), {"w": axes}, config)


def _conv(weight, x, dimensions, axes, **options):
    options = {"window_strides": (1, 1), "padding": "VALID"} | options

    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], dimension_numbers=dimensions, **options)

    return Case(fn, {"w": weight}, (x,), {"w": axes}, {"targets": "w"})


def _scan(body, weight, axes, **options):
    def fn(p, x):
        return lax.scan(body, x, p["w"], **options)

    return Case(fn, {"w": weight}, ((5, 12),), {"w": axes})


def _layer(h, w):
    return jnp.tanh(h @ w), h.sum()


def _moved_scan(p, x):
    return lax.scan(jax.checkpoint(_layer), x, jnp.moveaxis(p["w"], 1, 0), reverse=True)


def _scan_of_casts(p, x):
    # Casts and turns the whole stack in a first loop, which hands the weights on.
    _, stack = lax.scan(lambda c, w: (c, w.T * 0.5), None, p["w"])
    return lax.scan(_layer, x, stack)


def _two(fn, p="ab", shape=(12, 12), x=(5, 12), axes="io", **config):
    return Case(fn, dict.fromkeys(p, shape), (x,), dict.fromkeys(p, axes), config)


def _fori(p, x):
    return lax.fori_loop(0, 3, lambda _, c: (jnp.tanh(c[0] @ c[1]), c[1]), (x, p["w"]))[0]


def while_loop(p, x):
    """Differentiable forwards only."""

    def body(carry):
        step, h, w = carry
        return step + 1, jnp.tanh(h @ w + h @ p["w"].T), w

    return lax.while_loop(lambda c: c[0] < 3, body, (0, x, p["w"]))[1]


def _switch(p, x):
    branches = [
        lambda w, x: x @ w,
        lambda w, x: jnp.sin(x) @ w * 2.0,
        lambda w, x: jnp.zeros((x.shape[0], w.shape[1]), x.dtype),
    ]
    return lax.switch((x[0, 0] > 0).astype("int32"), branches, p["w"], x)


@jax.jit
def block(h, w):
    """More equations than are evaluated in place."""
    for _ in range(4):
        h = jnp.tanh(h * 1.5 + 0.5) - jnp.mean(h)
        h = h / jnp.sqrt(jnp.var(h) + 1.0)
    return jnp.tanh(h @ w)


@jax.custom_jvp
def _odd_sine(x):
    return jnp.sin(x)


@_odd_sine.defjvp
def _odd_sine_jvp(primals, tangents):
    return jnp.sin(primals[0]), tangents[0] * 5.0  # wrong on purpose: it has to be used


@jax.custom_vjp
def _odd_cosine(x):
    return jnp.cos(x)


_odd_cosine.defvjp(lambda x: (jnp.cos(x), x), lambda x, g: (g * x * 3.0,))


def _lstm(p, x):
    """A recurrent layer: one weight for all gates, used in every step."""

    def step(state, x):
        h, c = state
        i, f, g, o = jnp.split(x @ p["in"] + h @ p["hidden"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), h

    zeros = jnp.zeros((x.shape[1], 6), x.dtype)
    return lax.scan(step, (zeros, zeros), x)


def _parts(y):
    """A complex result as two real ones, of which a loss can be made."""
    return jnp.real(y), jnp.imag(y)


def _complex(x):
    return x.astype("complex128")


def _turns(n):
    return jnp.exp(1j * _complex(jnp.arange(n)))


def _turned(x):
    return _complex(x) * (1.0 + 2.0j)


def _pair(w):
    """A complex matrix that is stored as two real ones."""
    return _complex(w[..., 0]) + 1j * _complex(w[..., 1])


def _positive(x):
    return x[0, 0] > 0


def _triangle(x):
    """A well-conditioned triangular matrix of activations."""
    n = x.shape[1]
    return jnp.tril(x.T @ x) + (4.0 + jnp.sum(x * x)) * jnp.eye(n, dtype=x.dtype)


def _ab(fn, axes="io", shape=(12, 10)):
    return Case(fn, {"a": shape, "b": shape}, ((5, 12),), {"a": axes, "b": axes})


def _attention(p, x):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    return jnp.einsum("bhts,bshk,hkd->btd", weights, v, p["o"])


def _hidden(function):
    """The function with a derivative of its own, which is the right one."""
    hidden = jax.custom_vjp(function)
    hidden.defvjp(
        lambda *args: (function(*args), args),
        lambda args, g: jax.vjp(function, *args)[1](g),
    )
    return hidden


@_hidden
def mul(x, w):
    return x @ w


@_hidden
def grouped(x, w, sizes):
    return lax.ragged_dot(x, w, sizes)


@_hidden
def grouped_turned(w, sizes, x):
    return lax.ragged_dot(x, w.swapaxes(1, 2), sizes)


@_hidden
def rounded(w, scale):
    return (w * scale).T / scale


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def product_of(x, w, axes):
    return jnp.tensordot(x, w, axes)


@product_of.defjvp
def _(axes, primals, tangents):
    return jax.jvp(lambda x, w: jnp.tensordot(x, w, axes), primals, tangents)


@jax.custom_jvp
def scaled(scale, w, x):
    return x * scale, jnp.einsum("bthk,hkd->dtb", x * scale, w) / scale


scaled.defjvp(lambda primals, tangents: jax.jvp(scaled.fun, primals, tangents))


@jax.custom_vjp
def kernel(x, w):
    def body(x_ref, w_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], w_ref[...])

    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(body, out_shape=out, interpret=True)(x, w)


kernel.defvjp(
    lambda x, w: (kernel(x, w), (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g)
)


def _stated_layer(h, w):
    return jnp.tanh(mul(h, w)), h.sum()


def _closure(other):
    """A function that closes over an activation, which is an operand of its call."""

    @jax.custom_jvp
    def mul(x, w):
        return (x + 0.0 * other) @ w

    mul.defjvp(lambda primals, tangents: jax.jvp(jnp.matmul, primals, tangents))
    return mul


STATED = {"products": {"mul": "...k,kn->...n"}}


CASES = {
    # products
    "matmul": _w(lambda p, x: x @ p["w"], "io"),
    "tokens": _w(lambda p, x: x @ p["w"], "io", x=(2, 7, 12)),
    "out_in": _w(lambda p, x: x @ p["w"].T, "oi", (10, 12)),
    "weight_first": _w(lambda p, x: p["w"] @ x, "oi", (10, 12), (12, 4)),
    "vector": _w(lambda p, x: p["w"] @ x, "oi", (10, 12), (12,)),
    "heads": _einsum("btd,dhk->bthk", (12, 2, 4), (3, 5, 12), "ioo"),
    "from_heads": _einsum("bthk,hkd->btd", (2, 4, 12), (3, 5, 2, 4), "iio"),
    "channels_inside": _einsum("bdt,kd->bkt", (10, 12), (2, 12, 7), "oi"),
    "experts": _einsum("ebd,edf->ebf", (3, 12, 10), (3, 5, 12), "bio"),
    "expert_sum": _einsum("ebd,edf->bf", (3, 12, 10), (3, 5, 12), "iio"),
    "bilinear": Case(
        lambda p, x, z: jnp.einsum("bi,ij,bj->b", x, p["w"], z),
        {"w": (12, 10)},
        ((5, 12), (5, 10)),
        {"w": "io"},
    ),
    "three_operands": Case(
        lambda p, x: jnp.einsum("bi,ij,jk->bk", x, p["w"], p["v"]),
        {"w": (12, 10), "v": (10, 7)},
        ((5, 12),),
        {"w": "io", "v": "io"},
    ),
    "squared": _w(lambda p, x: x @ (p["w"] @ p["w"]), "oi", (12, 12)),
    "summed": Case(
        lambda p, x: jnp.einsum("bi,ij->b", x, p["w"]),
        {"w": (12, 10)},
        ((5, 12),),
        {"w": "io"},
        {"targets": "w", "axes": {"w": "io"}},
    ),
    "ragged_dot": Case(
        lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes),
        {"w": (3, 12, 10)},
        ((8, 12), np.array([3, 1, 4], "int32")),
        {"w": "bio"},
    ),
    # products that are stated
    "stated": Case(
        lambda p, x: mul(jnp.tanh(mul(x, p["w"])), p["v"].T),
        {"w": (12, 10), "v": (12, 10)},
        ((5, 12),),
        {"w": "io", "v": "oi"},
        STATED,
    ),
    "stated_scan": _w(
        lambda p, x: lax.scan(jax.checkpoint(_stated_layer), x, p["w"]),
        "bio",
        (3, 12, 12),
        **STATED,
    ),
    "stated_vmap": _w(
        lambda p, x: jax.vmap(mul)(x, p["w"]),
        "bio",
        (3, 12, 10),
        (3, 5, 12),
        products={"mul": "...mk,...kn->...mn"},
    ),
    "stated_weight_first": _w(
        lambda p, x: mul(p["w"], x), "oi", (10, 12), (12, 4), products={"mul": "mk,kn->mn"}
    ),
    "stated_groups": Case(
        lambda p, x, sizes: grouped(x, p["w"], sizes),
        {"w": (3, 12, 10)},
        ((8, 12), np.array([3, 1, 4], "int32")),
        {"w": "bio"},
        {"products": {"grouped": "mk,gkn,g->mn"}},
    ),
    "stated_groups_turned": Case(
        lambda p, x, sizes: grouped_turned(p["w"], sizes, x),
        {"w": (3, 10, 12)},
        ((8, 12), np.array([3, 1, 2], "int32")),
        {"w": "boi"},
        {"products": {"grouped*": "gnk,g,mk->mn"}},
    ),
    "stated_rounding": _w(
        lambda p, x: x @ rounded(p["w"], 4.0),
        "oi",
        (10, 12),
        products={"rounded": "ab,_->ba"},
    ),
    "stated_results": Case(
        lambda p, x: scaled(2.0, p["w"], x),
        {"w": (2, 4, 12)},
        ((3, 5, 2, 4),),
        {"w": "iio"},
        {"products": {"scaled": "_,hkd,bthk->_,dtb"}},
    ),
    "stated_ranks": Case(
        lambda p, x: product_of(product_of(x, p["w"], 1), p["o"], 2),
        {"w": (12, 2, 4), "o": (2, 4, 10)},
        ((3, 5, 12),),
        {"w": "ioo", "o": "iio"},
        {"products": {"product_of": "...k,kn->...n; ...d,dhk->...hk; ...hk,hkd->...d"}},
    ),
    "stated_positions": Case(
        lambda p, x: mul(x + p["positions"], p["w"]),
        {"w": (12, 10), "positions": (5, 12)},
        ((5, 12),),
        {"w": "io"},
        STATED,
    ),
    "stated_of_weights": Case(
        lambda p, x: x @ mul(p["a"], p["b"]),
        {"a": (12, 10), "b": (10, 30)},
        ((5, 12),),
        {"a": "oi", "b": "io"},
        STATED,
    ),
    "stated_closure": _w(lambda p, x: _closure(jnp.cos(x))(x, p["w"]), "io", **STATED),
    "stated_kernel": _w(
        lambda p, x: kernel(x, p["w"]), "io", products={"kernel": "mk,kn->mn"}
    ),
    "stated_jit": _w(
        lambda p, x: jax.jit(lambda x, w: x @ w)(x, p["w"]),
        "io",
        products={"<lambda>": "mk,kn->mn"},
    ),
    "one_column": _einsum("bd,dxf->bxf", (12, 1, 10), (5, 12), "ioo"),
    "unit_input": _einsum("bxd,xdf->bf", (1, 12, 10), (5, 1, 12), "iio"),
    # structure
    "reshaped": _w(lambda p, x: x @ p["w"].reshape(12, 10), "iio", (3, 4, 10)),
    "split_by_reshape": _w(
        lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"].reshape(12, 2, 5)), "io"
    ),
    "squeezed": _w(lambda p, x: x @ jnp.squeeze(p["w"]), "ioo", (12, 1, 10)),
    "broadcast": _w(
        lambda p, x: jnp.einsum("nbd,ndf->nbf", x, jnp.broadcast_to(p["w"], (3, 12, 10))),
        "io",
        x=(3, 5, 12),
    ),
    "sliced": _w(lambda p, x: x @ lax.slice(p["w"], (0, 2), (12, 9), (1, 2)), "io"),
    "sliced_inputs": _w(lambda p, x: x @ p["w"][3:], "io", (15, 10)),
    "split": _w(lambda p, x: [x @ w for w in jnp.split(p["w"], [4, 7], 1)], "io"),
    "split_in_three": _w(
        lambda p, x: [x @ w for w in jnp.split(p["w"], 3, 1)], "io", (12, 9)
    ),
    "reversed": _w(lambda p, x: x @ p["w"][::-1, ::-1], "io"),
    "padded": _w(lambda p, x: x @ jnp.pad(p["w"], ((0, 2), (3, 0))), "io", (10, 8)),
    "repeated": _w(lambda p, x: x @ jnp.repeat(p["w"], 3, axis=1), "io"),
    "repeated_inputs": _w(lambda p, x: x @ jnp.repeat(p["w"], 2, axis=0), "io", (6, 10)),
    "tiled": _w(lambda p, x: x @ jnp.tile(p["w"], (1, 2)), "io"),
    "fused": _two(lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], 1)),
    "fused_rows": _two(lambda p, x: x @ jnp.concatenate([p["a"], p["b"]]), x=(5, 24)),
    "fused_with_frozen": Case(
        lambda p, x: x @ jnp.concatenate([p["f"], p["w"], p["f"]], 1),
        {"f": (12, 7), "w": (12, 10)},
        ((5, 12),),
        {"w": "io"},
        {"targets": "w"},
    ),
    "stacked_here": _two(
        lambda p, x: jnp.einsum("bd,ndf->nbf", x, jnp.stack([p["a"], p["b"]]))
    ),
    "list_of_layers": _two(
        lambda p, x: lax.scan(_layer, x, jnp.stack([p["a"], p["b"]])),
    ),
    "one_of_qkv": _w(
        lambda p, x: [jnp.einsum("bd,dhk->bhk", x, p["w"][:, i]) for i in range(3)],
        "iboo",
        (12, 3, 2, 5),
    ),
    "layer_by_number": _w(lambda p, x: x @ p["w"][0] + x @ p["w"][2], "bio", (4, 12, 10)),
    "layer_by_array": Case(
        lambda p, x, i: x @ p["w"][i],
        {"w": (4, 12, 10)},
        ((5, 12), np.array(2)),
        {"w": "bio"},
    ),
    "experts_by_array": Case(
        lambda p, x, i: jnp.einsum("td,tdf->tf", x, p["w"][i]),
        {"w": (4, 12, 10)},
        ((5, 12), np.array([0, 3, 3, 1, 2])),
        {"w": "bio"},
    ),
    "unstacked": _w(lambda p, x: [x @ w for w in p["w"]], "bio", (2, 12, 10)),
    # arithmetic
    "scaled": _w(lambda p, x: x @ (p["w"] * 2.5 / 3.0), "io"),
    "negated": _w(lambda p, x: x @ -p["w"], "io"),
    "row_gains": Case(
        lambda p, x, g: x @ (p["w"] * g[:, None]),
        {"w": (12, 10)},
        ((5, 12), (12,)),
        {"w": "io"},
    ),
    "column_gains": Case(
        lambda p, x, g: x @ (p["w"] / g[None]),
        {"w": (12, 10)},
        ((5, 12), (10,)),
        {"w": "io"},
    ),
    # Scales among the params, which have the axes of a matrix and are none.
    "column_scales": Case(
        lambda p, x: x @ (p["w"] * p["up"] / p["down"]),
        {"w": (12, 10), "up": (1, 10), "down": (1, 10)},
        ((5, 12),),
        {"w": "io"},
    ),
    "row_scales": Case(
        lambda p, x: x @ (p["scale"] * p["w"]),
        {"w": (12, 10), "scale": (12, 1)},
        ((5, 12),),
        {"w": "io"},
    ),
    "scales_of_heads": Case(
        lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"] * p["scale"][None]),
        {"w": (12, 2, 4), "scale": (2, 4)},
        ((5, 12),),
        {"w": "ioo"},
    ),
    "scales_of_layers": Case(
        lambda p, x: lax.scan(
            lambda h, layer: (jnp.tanh(h @ (layer[0] * layer[1])), None),
            x,
            (p["w"], p["s"]),
        )[0],
        {"w": (3, 12, 12), "s": (3, 1, 12)},
        ((5, 12),),
        {"w": "bio"},
    ),
    "cast": _w(lambda p, x: x.astype("float32") @ p["w"].astype("float32"), "io"),
    "barrier": _w(lambda p, x: x @ lax.optimization_barrier((p["w"], x))[0], "io"),
    "frozen_by_user": Case(
        lambda p, x: x @ lax.stop_gradient(p["w"]) + x @ p["w"],
        {"w": (12, 10)},
        ((5, 12),),
        {"w": "io"},
        options={"on_stop_gradient": "all"},
    ),
    "used_twice": _w(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], "io", (12, 12)),
    "used_both_ways": _w(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, "io"),
    # complex numbers
    "to_complex": _w(lambda p, x: _parts(_complex(x) @ _complex(p["w"])), "io"),
    "times_i": _w(lambda p, x: _parts(_turned(x) @ (_complex(p["w"]) * 1j)), "io"),
    "pair": _w(lambda p, x: _parts(_turned(x) @ _pair(p["w"]).T), "oib", (10, 12, 2)),
    "pair_of_leaves": _ab(
        lambda p, x: _parts(_turned(x) @ (_complex(p["a"]) + 1j * _complex(p["b"])))
    ),
    "complex": _ab(lambda p, x: _parts(_turned(x) @ lax.complex(p["a"], p["b"]))),
    "conjugate": _ab(
        lambda p, x: _parts(_turned(x) @ jnp.conj(lax.complex(p["a"], p["b"]).T)),
        "oi",
        (10, 12),
    ),
    "real_part": _w(
        lambda p, x: (
            x @ jnp.real(_complex(p["w"]) * _turns(12)[:, None] * _turns(10)[None])
        ),
        "io",
    ),
    "imaginary_part": _ab(
        lambda p, x: (
            x @ jnp.imag(lax.complex(p["a"], p["b"]) * (2.0 - 1.0j) * _turns(10)[None])
        )
    ),
    # choices
    "where_scalar": _w(
        lambda p, x: x @ jnp.where(_positive(x), p["w"], 2.0 * p["w"]), "io"
    ),
    "where_zeros": _w(
        lambda p, x: x @ jnp.where(_positive(x), jnp.zeros_like(p["w"]), p["w"]), "io"
    ),
    "where_columns": _w(
        lambda p, x: x @ jnp.where((jnp.arange(10) > 3)[None], p["w"], 0.5), "io"
    ),
    "where_mapped": _w(
        lambda p, x: jax.vmap(lambda x: x @ jnp.where(x[0] > 0, p["w"], 0.0))(x), "io"
    ),
    "branch_chooses": _w(
        lambda p, x: x @ lax.cond(_positive(x), lambda: p["w"], lambda: p["w"] * 2.0), "io"
    ),
    "branch_of_zeros": _w(
        lambda p, x: (
            x @ lax.cond(_positive(x), lambda: jnp.zeros_like(p["w"]), lambda: p["w"])
        ),
        "io",
    ),
    "branches_of_two": Case(
        lambda p, x: x @ lax.cond(_positive(x), lambda: p["a"], lambda: p["b"].T),
        {"a": (12, 10), "b": (10, 12)},
        ((5, 12),),
        {"a": "io", "b": "oi"},
    ),
    # maps of one axis
    "solved": _w(lambda p, x: x @ solve_triangular(_triangle(x), p["w"], lower=True), "io"),
    "solved_by_cholesky": _w(
        lambda p, x: x @ cho_solve((_triangle(x), True), p["w"]), "io"
    ),
    "summed_up": _w(lambda p, x: x @ jnp.cumsum(p["w"], 0), "io"),
    "integers": _w(
        lambda p, x: (
            lax.dot_general(
                jnp.arange(24).reshape(2, 12),
                p["w"],
                (((1,), (0,)), ((), ())),
                preferred_element_type=x.dtype,
            )
            * x[0, 0]
        ),
        "io",
    ),
    # tables
    "embedding": Case(
        lambda p, i: p["w"][i], {"w": (20, 12)}, (IDS,), {"w": "io"}, {"targets": "w"}
    ),
    "vmapped_embedding": Case(
        lambda p, i: jax.vmap(lambda i: p["w"][i])(i),
        {"w": (20, 12)},
        (IDS[0],),
        {"w": "io"},
        {"targets": "w"},
    ),
    "one_row": Case(
        lambda p, i: p["w"][i],
        {"w": (20, 12)},
        (np.array(3),),
        {"w": "io"},
        {"targets": "w"},
    ),
    "tied_head": Case(
        lambda p, i: jnp.tanh(p["w"][i]) @ p["w"].T, {"w": (20, 12)}, (IDS,), {"w": "io"}
    ),
    "sampled_softmax": Case(
        lambda p, x, i: x @ p["w"][i].T, {"w": (20, 12)}, ((5, 12), IDS[0]), {"w": "oi"}
    ),
    "row_of_each_example": Case(
        lambda p, x, i: jnp.einsum("bd,bd->b", x, p["w"][i]),
        {"w": (20, 12)},
        ((5, 12), np.array([3, 0, 7, 7, 19])),
        {"w": "oi"},
    ),
    "chosen_columns": Case(
        lambda p, x, i: x @ p["w"][:, i],
        {"w": (12, 20)},
        ((5, 12), IDS[0]),
        {"w": "io"},
        {"axes": {"w": "io"}},
    ),
    "positions": Case(
        lambda p, i: jnp.tanh(p["e"][i] + p["pos"][None, :3]) @ p["w"],
        {"e": (20, 12), "pos": (7, 12), "w": (12, 10)},
        (IDS,),
        {"w": "io"},
    ),
    # convolutions
    "conv": _conv((3, 3, 4, 6), (2, 8, 8, 4), ("NHWC", "HWIO", "NHWC"), "iiio"),
    "conv_torch": _conv((6, 4, 3, 3), (2, 4, 8, 8), ("NCHW", "OIHW", "NCHW"), "oiii"),
    "conv_1x1": _conv((1, 1, 4, 6), (2, 8, 8, 4), ("NHWC", "HWIO", "NHWC"), "iiio"),
    "conv_strided": _conv(
        (3, 3, 4, 6),
        (2, 8, 8, 4),
        ("NHWC", "HWIO", "NHWC"),
        "iiio",
        window_strides=(2, 1),
        padding="SAME",
    ),
    "conv_dilated": _conv(
        (3, 3, 4, 6), (2, 8, 8, 4), ("NHWC", "HWIO", "NHWC"), "iiio", rhs_dilation=(2, 2)
    ),
    "conv_grouped": _conv(
        (6, 2, 3, 3), (2, 4, 8, 8), ("NCHW", "OIHW", "NCHW"), "oiii", feature_group_count=2
    ),
    "conv_depthwise": _conv(
        (3, 3, 1, 8), (2, 8, 8, 4), ("NHWC", "HWIO", "NHWC"), "iiio", feature_group_count=4
    ),
    "conv_transposed": _conv(
        (3, 3, 4, 6),
        (2, 5, 5, 4),
        ("NHWC", "HWIO", "NHWC"),
        "iiio",
        padding=((1, 2), (2, 1)),
        lhs_dilation=(2, 2),
    ),
    # calls and control flow
    "jitted_blocks": _two(lambda p, x: block(block(x, p["a"]), p["b"])),
    "checkpoint": _w(jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"])), "io"),
    "checkpoint_policy": _w(
        jax.checkpoint(
            lambda p, x: jnp.tanh(x @ p["w"]), policy=jax.checkpoint_policies.dots_saveable
        ),
        "io",
    ),
    "custom_rules": _w(lambda p, x: _odd_cosine(_odd_sine(x @ p["w"])), "io"),
    "vmapped": _w(
        lambda p, x: jax.vmap(lambda w, x: x @ w)(p["w"], x), "bio", (3, 12, 10), (3, 5, 12)
    ),
    "gradient_inside": _w(
        lambda p, x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"])))(x), "io"
    ),
    "scan": _scan(_layer, (4, 12, 12), "bio"),
    "scan_unrolled": _scan(_layer, (4, 12, 12), "bio", unroll=2),
    "scan_moved": Case(_moved_scan, {"w": (12, 4, 12)}, ((5, 12),), {"w": "ibo"}),
    "scan_of_casts": Case(_scan_of_casts, {"w": (4, 12, 12)}, ((5, 12),), {"w": "boi"}),
    "scan_constant": _w(
        lambda p, x: lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), h), x, None, 3),
        "io",
        (12, 12),
    ),
    "fori": Case(_fori, {"w": (12, 12)}, ((5, 12),), {"w": "io"}),
    "cond": _w(
        lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: jnp.sin(x) @ p["w"]),
        "io",
    ),
    "switch": Case(_switch, {"w": (12, 10)}, ((5, 12),), {"w": "io"}),
    "lstm": Case(
        _lstm,
        {"in": (12, 24), "hidden": (6, 24)},
        ((4, 5, 12),),
        {"in": "io", "hidden": "io"},
    ),
    "attention": Case(
        _attention,
        {**dict.fromkeys("qkv", (12, 2, 5)), "o": (2, 5, 12)},
        ((3, 4, 12),),
        {**dict.fromkeys("qkv", "ioo"), "o": "iio"},
    ),
}

# Refused, see test_rules.py: DoRA would scale a sum, a fill value, inputs and outputs.
NO_DORA = {"summed", "padded", "fused_rows"}
NO_DORA |= {"pair", "pair_of_leaves", "complex", "conjugate", "imaginary_part"}


def inputs(case, dtype="float64"):
    params = {
        name: normal(*shape, seed=7, dtype=dtype) for name, shape in case.params.items()
    }
    args = [
        normal(*a, dtype=dtype) if isinstance(a, tuple) else asarray(a) for a in case.args
    ]
    return params, args


# The grid: every way to move a weight about, in front of every product.


@dataclasses.dataclass(frozen=True)
class Product:
    """A use of a matrix `m`, `(*shape)`, with the axes that are right."""

    fn: Callable[..., Any]
    shape: tuple[int, ...]
    axes: str
    args: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Move:
    """What comes before: `fn(w, axis, i)` gives the matrix of the stored weight.

    Attributes:
        fn: of the weight, an axis, and an index of it, `()` or as the move has it.
        stored: the shape of the weight, by that of the matrix and the axis.
        letters: its axes, by those of the matrix and the axis.
        index: the traced index, by the shape and the axis; None for none.
    """

    fn: Callable[..., Any]
    stored: Callable[..., tuple[int, ...]] = lambda shape, axis: shape
    letters: Callable[..., str] = lambda axes, axis: axes
    index: Callable[..., Any] | None = None


def _other(shape, axis, size):
    return (*shape[:axis], size, *shape[axis + 1 :])


def _order(shape, axis):
    """Every second entry, then the others: how rotary halves are sorted."""
    return np.r_[: shape[axis] : 2, 1 : shape[axis] : 2].astype("int32")


def _first(w, axis):
    """The axis moved to the front, as in a stored weight with another order of axes."""
    return jnp.moveaxis(w, 0, axis)


def _moved_letters(axes, axis):
    return axes[axis] + axes[:axis] + axes[axis + 1 :]


def _moved_shape(shape, axis):
    return (shape[axis], *shape[:axis], *shape[axis + 1 :])


PRODUCTS = {
    "x @ m": Product(lambda m, x: x @ m, (12, 10), "io", ((5, 12),)),
    "m @ x": Product(lambda m, x: m @ x, (10, 12), "oi", ((12, 5),)),
    "heads": Product(
        lambda m, x: jnp.einsum("btd,dhk->bthk", x, m), (12, 4, 6), "ioo", ((2, 3, 12),)
    ),
    "from heads": Product(
        lambda m, x: jnp.einsum("bthk,hkd->btd", x, m), (4, 6, 12), "iio", ((2, 3, 4, 6),)
    ),
    "batched": Product(
        lambda m, x: jnp.einsum("ebd,edf->ebf", x, m), (4, 12, 10), "bio", ((4, 5, 12),)
    ),
    "scanned": Product(
        lambda m, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, m)[0],
        (4, 12, 12),
        "bio",
        ((5, 12),),
    ),
    "conv": Product(
        lambda m, x: lax.conv_general_dilated(
            x, m, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (2, 2, 4, 6),
        "iiio",
        ((2, 5, 5, 4),),
    ),
    "ragged": Product(
        lambda m, x: lax.ragged_dot(x, m, jnp.array([3, 1, 2, 2], "int32")),
        (4, 12, 10),
        "bio",
        ((8, 12),),
    ),
    "look-up": Product(lambda m, i: jnp.tanh(m[i]) * 2.0, (20, 12), "io", (IDS,)),
    "tied": Product(lambda m, i: jnp.tanh(m[i]) @ m.T, (20, 12), "io", (IDS,)),
    "sampled": Product(lambda m, x, i: x @ m[i].T, (20, 12), "oi", ((5, 12), IDS[0])),
    "checkpointed": Product(
        lambda m, x: jax.checkpoint(lambda m, x: jnp.tanh(x @ m))(m, x),
        (12, 10),
        "io",
        ((5, 12),),
    ),
}
MOVES = {
    "none": Move(lambda w, axis: w),
    "transposed": Move(_first, _moved_shape, _moved_letters),
    "sliced": Move(
        lambda w, axis: lax.slice_in_dim(w, 1, w.shape[axis] - 1, axis=axis),
        lambda shape, axis: _other(shape, axis, shape[axis] + 2),
    ),
    "strided": Move(
        lambda w, axis: lax.slice_in_dim(w, 1, None, 2, axis),
        lambda shape, axis: _other(shape, axis, 2 * shape[axis]),
    ),
    "reversed": Move(lambda w, axis: jnp.flip(w, axis)),
    "rolled by one": Move(lambda w, axis: jnp.roll(w, 1, axis)),
    "halves swapped": Move(
        lambda w, axis: jnp.concatenate(jnp.split(w, 2, axis)[::-1], axis)
    ),
    "repeated": Move(
        lambda w, axis: jnp.repeat(w, 2, axis),
        lambda shape, axis: _other(shape, axis, shape[axis] // 2),
    ),
    "tiled": Move(
        lambda w, axis: jnp.concatenate([w, w], axis),
        lambda shape, axis: _other(shape, axis, shape[axis] // 2),
    ),
    "padded": Move(
        lambda w, axis: jnp.pad(w, [(i == axis, 0) for i in range(w.ndim)]),
        lambda shape, axis: _other(shape, axis, shape[axis] - 1),
    ),
    "reshaped": Move(
        lambda w, axis: lax.collapse(w, axis, axis + 2),
        lambda shape, axis: (*shape[:axis], 2, shape[axis] // 2, *shape[axis + 1 :]),
        lambda axes, axis: axes[:axis] + axes[axis] + axes[axis:],
    ),
    "scaled": Move(lambda w, axis: w * 2.0),
    "permuted": Move(lambda w, axis: jnp.take(w, _order(w.shape, axis), axis)),
    "permuted, scaled": Move(
        lambda w, axis: 0.5 * jnp.take(w, _order(w.shape, axis), axis, mode="clip")
    ),
    "permuted by data": Move(
        lambda w, axis, i: jnp.take(w, i, axis, mode="clip"), index=_order
    ),
    "some taken by data": Move(
        lambda w, axis, i: jnp.take(w, i, axis),
        lambda shape, axis: _other(shape, axis, 2 * shape[axis]),
        index=_order,
    ),
    "a run at an index": Move(
        lambda w, axis, i: lax.dynamic_slice_in_dim(w, i, w.shape[axis] // 2, axis),
        lambda shape, axis: _other(shape, axis, 2 * shape[axis]),
        index=lambda shape, axis: np.array(3),
    ),
    "layer by number": Move(
        lambda w, axis: w[1],
        lambda shape, axis: (3, *shape),
        lambda axes, axis: "b" + axes,
    ),
    "layer at an index": Move(
        lambda w, axis, i: w[i],
        lambda shape, axis: (3, *shape),
        lambda axes, axis: "b" + axes,
        index=lambda shape, axis: np.array(1),
    ),
    "layers in another axis": Move(
        lambda w, axis: lax.index_in_dim(w, 1, axis, keepdims=False),
        lambda shape, axis: (*shape[:axis], 3, *shape[axis:]),
        lambda axes, axis: axes[:axis] + "b" + axes[axis:],
    ),
}


def _grid():
    """Every move of every axis in front of every product, as cases."""
    grid = {}
    for (what, product), (how, move) in itertools.product(PRODUCTS.items(), MOVES.items()):
        for axis in range(len(product.shape)):
            index = () if move.index is None else (move.index(product.shape, axis),)
            fn = functools.partial(_moved_product, product.fn, move.fn, axis, len(index))
            stored = move.stored(product.shape, axis)
            grid[f"{what}, {how}, axis {axis}"] = Case(
                fn,
                {"w": stored},
                (*index, *product.args),
                {"w": move.letters(product.axes, axis)},
                {"targets": "w"},
            )
    return grid


def _moved_product(product, move, axis, n_index, p, *args):
    return product(move(p["w"], axis, *args[:n_index]), *args[n_index:])


GRID = _grid()
