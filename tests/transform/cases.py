"""Functions that use a weight in every way that keeps it low-rank.

Each case is a function, its params and arguments, the axes that the plan finds, and what
the plan has to be told. No two sizes of a case are alike where a mix-up could hide.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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


def _attention(p, x):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    return jnp.einsum("bhts,bshk,hkd->btd", weights, v, p["o"])


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
        lambda p, x, i: x @ p["w"][i].T, {"w": (20, 12)}, ((5, 12), IDS[0]), {"w": "io"}
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
