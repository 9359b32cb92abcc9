"""Which axes of the values of a program hold the rows of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lora_jax.transform._following import Atom, Rows, follow

N = 4  # rows


def whole_axis(shape, axis, n=N):
    """The place of a value with the rows along one whole axis."""
    others = [(Atom(size, None),) if size > 1 else () for size in shape]
    return Rows(tuple((Atom(n, 1),) if i == axis else o for i, o in enumerate(others)))


def followed(fn, *args, axes=None, n=N):
    """The jaxpr of a function, and the places of its values.

    The rows are along the axes `axes` of the arguments, the first ones by default.
    """
    jaxpr = jax.make_jaxpr(fn)(*args)
    axes = axes or [0] * len(args)
    places = [
        None if axis is None else whole_axis(arg.shape, axis, n)
        for arg, axis in zip(args, axes, strict=True)
    ]
    return jaxpr, follow(jaxpr, places, n)


def numbers(place, shape):
    """For each entry of a value with rows the number of its row."""
    out = np.zeros(shape, int)
    assert len(place.axes) == len(shape)
    for axis, atoms in enumerate(place.axes):
        own = np.zeros(1, int)
        for size, stride in atoms:
            own = (own[:, None] + (stride or 0) * np.arange(size)).reshape(-1)
        out += own.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return out


def ids(*shape, axis=0):
    """An array of the row number of each entry."""
    own = np.arange(shape[axis], dtype="float32")
    own = own.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return jnp.asarray(np.broadcast_to(own, shape))


# Programs that move entries: the row numbers are moved as the places say.
IDS = ids(N, 6, 3)
MOVES = {
    "transpose": lambda x: x.transpose(2, 0, 1),
    "flat": lambda x: x.reshape(-1, 3),
    "all_flat": lambda x: x.transpose(1, 0, 2).reshape(-1),
    "unflat": lambda x: x.transpose(1, 0, 2).reshape(-1).reshape(3, 2, 2, 6),
    "split_rows": lambda x: x.reshape(2, 2, 18).transpose(1, 2, 0),
    "one": lambda x: x[:, None, :, 2:, None][:, 0],
    "slice": lambda x: x[:, 1:5:2, ::2],
    "dynamic": lambda x: lax.dynamic_slice(x, (0, jnp.int32(2), 0), (N, 3, 1)),
    "tile": lambda x: jnp.tile(x, (2, 1, 3)),
    "repeat": lambda x: jnp.repeat(x, 3, axis=0),
    "twice": lambda x: jnp.concatenate([x, x]),
    "half_of_twice": lambda x: jnp.split(jnp.concatenate([x, x]), 2)[1],
    "join": lambda x: jnp.concatenate([x, x[:, :2]], axis=1),
    "stack": lambda x: jnp.stack([x, x, x], axis=1),
    "unstack": lambda x: jnp.minimum(x[:, 0], jnp.unstack(x, axis=1)[3]),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0)), mode="edge"),
    "reverse": lambda x: x[:, ::-1],
    "roll": lambda x: jnp.roll(x, 1, axis=2),
    "sort": lambda x: jnp.sort(x, axis=1),
    "top": lambda x: lax.top_k(x, 2)[0],
    "pool": lambda x: x[jnp.arange(N), jnp.array([3, 0, 1, 5])],
    "cache": lambda x: jnp.zeros((N, 6, 3)).at[jnp.arange(N)].set(x),
    "along_axis": lambda x: jnp.take_along_axis(x, jnp.ones((N, 2, 3), int), axis=1),
    "look_up": lambda x: jnp.arange(9.0)[x.astype(int)],
    "vmap": lambda x: jax.vmap(lambda x, i: lax.dynamic_slice(x, (i, 0), (2, 3)))(
        x, x[:, 0, 0].astype(int)
    ),
    "update": lambda x: lax.dynamic_update_slice(
        jnp.zeros((N, 6, 3)).at[:].set(x[:, :1]), x[:, 1:3], (0, 3, 0)
    ),
    "max": lambda x: jnp.max(x, axis=(1, 2)),
    "cumulative": lambda x: lax.cummax(x, axis=1),
    "windows": lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "SAME"
    ),
    "choice": lambda x: jnp.where(x[:, :1] > 1, x, x),
    "cond": lambda x: lax.cond(x.sum() > 0, lambda x: x * 1, lambda x: x.T.T, x),
    "scan": lambda x: lax.scan(lambda c, x: (c, x.T), x[:, 0], x.swapaxes(0, 1))[1],
    "map": lambda x: lax.map(lambda x: x.T, x),
    "map_groups": lambda x: lax.map(lambda x: x.T, x.reshape(2, 2, 6, 3)),
    "map_inner": lambda x: lax.map(lambda x: x.T, x.reshape(2, 2, 6, 3).swapaxes(0, 1)),
    "while": lambda x: lax.fori_loop(0, 3, lambda _, c: (c[0] + 1, c[1]), (0, x))[1],
    "jit": lambda x: jax.jit(lambda x: x.T)(x),
    "checkpoint": lambda x: jax.checkpoint(lambda x: x.T)(x),
    "relu": lambda x: jax.nn.relu(x.T),
}


@pytest.mark.parametrize("name", MOVES)
def test_entries_move_as_places_say(name):
    _, found = followed(MOVES[name], IDS)
    (place,), want = found.outputs, MOVES[name](IDS)
    assert isinstance(place, Rows), place
    np.testing.assert_array_equal(numbers(place, want.shape), want)
