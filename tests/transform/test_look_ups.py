"""What is indexed: a table's rows, a weight in another order, or one of several weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.transform.support import plan_of

ORDER = np.array([0, 2, 4, 1, 3, 5, 7, 6, 9, 8], "int32")
X = jnp.ones((5, 12))  # closed over by functions of the params alone


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


def i32(*shape):
    return jax.ShapeDtypeStruct(shape, "int32")


def rnn(p, ids):
    def step(h, row):
        return jnp.tanh(jnp.concatenate([row, h]) @ p["w"]), None

    return lax.scan(step, jnp.zeros(10), p["e"][ids])[0]


def layers_by_data(p, x, ids):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"][ids])[0]


def text_convolution(p, ids):
    dimensions = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        p["e"][ids], p["w"], (1,), "VALID", dimension_numbers=dimensions
    )


def with_positions(p, ids):
    positions = p["pos"][jnp.arange(3)]
    return (p["e"][ids] @ p["w"]) + (positions @ p["w"])[None]


TABLE, WEIGHT = (20, 12), (12, 10)
# Function, the shapes of its params, its other arguments, the axes.
READINGS = {
    # Rows that become activations.
    "columns scaled entry by entry, tied": (
        lambda p, x, i: (
            jnp.einsum("td,td->td", jnp.take(p["e"].T, i, axis=1).T, x) @ p["e"].T
        ),
        {"e": TABLE},
        (f32(3, 12), i32(3)),
        {"e": "io"},
    ),
    "rows times a weight": (
        lambda p, i: (p["e"][i] * 3.0) @ p["w"],
        {"e": TABLE, "w": WEIGHT},
        (i32(2, 3),),
        {"e": "io", "w": "io"},
    ),
    "rows times a weight in another order": (
        lambda p, i: p["e"][i] @ p["w"][:, ORDER],
        {"e": TABLE, "w": WEIGHT},
        (i32(2, 3),),
        {"e": "io", "w": "io"},
    ),
    "rows times rows in another order": (
        lambda p, i: p["e"][i] @ p["w"][ORDER].T,
        {"e": TABLE, "w": (10, 12)},
        (i32(2, 3),),
        {"e": "io", "w": "oi"},
    ),
    "rows times a merged weight": (
        lambda p, i: p["e"][i] @ jnp.tanh(p["w"]),
        {"e": TABLE, "w": WEIGHT},
        (i32(2, 3),),
        {"e": "io"},
    ),
    "positions times a weight": (
        with_positions,
        {"e": TABLE, "pos": (7, 12), "w": WEIGHT},
        (i32(2, 3),),
        {"e": "io", "pos": "io", "w": "io"},
    ),
    "rows in a scan": (
        rnn,
        {"e": (20, 7), "w": (17, 10)},
        (i32(5),),
        {"e": "io", "w": "io"},
    ),
    "rows in a convolution": (
        text_convolution,
        {"e": (20, 7), "w": (3, 7, 12)},
        (i32(2, 5),),
        {"e": "io", "w": "iio"},
    ),
    "rows in a checkpoint": (
        lambda p, i: jax.checkpoint(lambda h, w: jnp.tanh(h @ w))(p["e"][i], p["w"]),
        {"e": TABLE, "w": WEIGHT},
        (i32(2, 3),),
        {"e": "io", "w": "io"},
    ),
    "sums of rows": (
        lambda p, i: p["e"][i].sum(1),
        {"e": TABLE},
        (i32(5, 3),),
        {"e": "io"},
    ),
    "weighted sums of rows": (
        lambda p, x, i: jnp.einsum("bk,bkd->bd", x, p["e"][i]),
        {"e": TABLE},
        (f32(5, 3), i32(5, 3)),
        {"e": "io"},
    ),
    "two tables": (
        lambda p, i, j: p["e"][i] @ p["w"][j].T,
        {"e": TABLE, "w": (30, 12)},
        (i32(3), i32(4)),
        {"e": "io", "w": "io"},
    ),
    "indices that are closed over": (
        lambda p: jnp.tanh(p["e"][jnp.array([3, 1])]),
        {"e": TABLE},
        (),
        {"e": "io"},
    ),
    # Rows that are both: the look-up decides, as with a tied head.
    "a tied head of sampled rows": (
        lambda p, i, j: jnp.tanh(p["e"][i]) @ p["e"][j].T,
        {"e": TABLE},
        (i32(2, 3), i32(4)),
        {"e": "io"},
    ),
    "rows times themselves": (
        lambda p, i: jnp.tanh(p["e"][i]) @ p["e"][i].T,
        {"e": TABLE},
        (i32(3),),
        {"e": "io"},
    ),
    # An output for each index.
    "scores of rows": (
        lambda p, x, i: jnp.einsum("bd,bd->b", jnp.tanh(x), p["e"][i]),
        {"e": TABLE},
        (f32(3, 12), i32(3)),
        {"e": "oi"},
    ),
    "distances": (
        lambda p, x: jnp.einsum(
            "btd,tsd->bts", x, p["e"][jnp.arange(4)[:, None] - jnp.arange(4)[None] + 3]
        ),
        {"e": (7, 12)},
        (f32(3, 4, 12),),
        {"e": "oi"},
    ),
    "one column": (
        lambda p, x: x @ p["w"][:, 3],
        {"w": WEIGHT},
        (f32(5, 12),),
        {"w": "io"},
    ),
    "one row": (lambda p, x: p["w"][3] @ x, {"w": WEIGHT}, (f32(10),), {"w": "oi"}),
    "a column kept": (
        lambda p, x: x @ p["w"][:, 3:4],
        {"w": WEIGHT},
        (f32(5, 12),),
        {"w": "io"},
    ),
    "a column for each example": (
        lambda p, x, i: jax.vmap(lambda x, i: x @ p["w"][:, i])(x, i),
        {"w": WEIGHT},
        (f32(5, 12), i32(5)),
        {"w": "io"},
    ),
    "columns of a mask": (
        lambda p, x: x @ p["w"][:, np.arange(10) % 2 == 0],
        {"w": WEIGHT},
        (f32(5, 12),),
        {"w": "io"},
    ),
    "inputs and outputs in another order": (
        lambda p, x: x @ p["w"][np.ix_(np.arange(11, -1, -1), ORDER)],
        {"w": WEIGHT},
        (f32(5, 12),),
        {"w": "io"},
    ),
    "data that is closed over": (
        lambda p: jnp.tanh(X @ p["w"][ORDER].T),
        {"w": (10, 12)},
        (),
        {"w": "oi"},
    ),
    # A matrix for each index.
    "experts by number": (
        lambda p, x, i: jnp.einsum("td,tkdf->tkf", x, p["w"][i]),
        {"w": (4, 12, 10)},
        (f32(5, 12), i32(5, 2)),
        {"w": "bio"},
    ),
    "two matrices, stacked": (
        lambda p, x: jnp.einsum(
            "tdk,dkf->tf", x, jnp.stack([p["w"][:, 2], p["w"][:, 0]], 1)
        ),
        {"w": (12, 3, 10)},
        (f32(5, 12, 2),),
        {"w": "iio"},
    ),
    "experts of rows": (
        lambda p, i, j: jnp.einsum("td,tdf->tf", p["e"][j], p["w"][i]),
        {"e": TABLE, "w": (4, 12, 10)},
        (i32(5), i32(5)),
        {"e": "io", "w": "bio"},
    ),
    "layers by data": (
        layers_by_data,
        {"w": (3, 12, 12)},
        (f32(5, 12), i32(5)),
        {"w": "bio"},
    ),
    "one of two columns": (
        lambda p, x, i: (
            x @ jax.lax.cond(i > 0, lambda w: w[:, 1], lambda w: w[:, 2], p["w"])
        ),
        {"w": WEIGHT},
        (f32(5, 12), i32()),
        {"w": "io"},
    ),
    "a column of a layer": (
        lambda p, x: x @ p["w"][1][:, 3],
        {"w": (4, 12, 10)},
        (f32(5, 12),),
        {"w": "bio"},
    ),
    "one of query, key and value in another order": (
        lambda p, x: x @ p["w"][:, 1][:, ORDER],
        {"w": (12, 3, 10)},
        (f32(5, 12),),
        {"w": "ibo"},
    ),
}


@pytest.mark.parametrize("name", READINGS)
def test_axes(name):
    fn, shapes, args, axes = READINGS[name]
    params = {path: f32(*shape) for path, shape in shapes.items()}
    plan = plan_of(fn, params, *args, targets=list(axes))
    assert {path: target.axes for path, target in plan.targets.items()} == axes


def test_copies_of_a_weight_by_number_are_no_activations():
    def fn(p, x, i):
        copies = jnp.broadcast_to(p["w"], (4, *WEIGHT))
        return x @ p["w"] + jnp.tanh(copies[i]).sum(1)

    plan = plan_of(fn, {"w": f32(*WEIGHT)}, f32(5, 12), i32(5))
    assert [use.primitive for use in plan.uses["w"] if use.merged] == ["tanh"]


def test_a_plan_says_that_a_look_up_only_moved_what_a_product_uses():
    plan = plan_of(
        lambda p, x: x @ p["w"][:, ORDER], {"w": f32(*WEIGHT)}, f32(5, 12), use_dora=True
    )
    moved, product = plan.uses["w"]
    assert (moved.primitive, moved.roles) == ("gather", ("", "moved"))
    assert product.roles == ("contracted", "kept")
    assert plan.targets["w"].adapter_shapes["m"] == (10,)
