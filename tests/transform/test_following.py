"""Which axes of the values of a program hold the rows of the batch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lora_jax._core import compat
from lora_jax.transform._following import Atom, Lost, Rows, Taken, follow
from tests.support import asarray, draw, optimizations

N = 4  # rows
BOTH = "data", "model"  # the axes of the mesh


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
    return asarray(np.broadcast_to(own, shape))


def on_mesh(body, in_specs, out_specs):
    mesh = jax.make_mesh((2, 2), BOTH, axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return lambda *args: mapped(*args)


@jax.custom_vjp
def turned(x):
    return x.T


turned.defvjp(lambda x: (x.T, None), lambda _, g: (g.T,))


def pooled(x):
    rows, first = jnp.arange(N), x[:, 0, 0].astype(int)
    return lax.scan(lambda c, i: (c, x[rows, c + i]), first, jnp.arange(2))[1]


def pooled_while(x):
    rows, first = jnp.arange(N), x[:, 0, 0].astype(int)

    def is_on(state):
        return state[0] < 2 + 0 * first[0]

    return lax.while_loop(
        is_on, lambda state: (state[0] + 1, x[rows, first + state[0]]), (0, x[:, 0])
    )[1]


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
    "pool_of_constants": lambda x: x[np.arange(N), np.array([3, 0, 1, 5])],
    "pool_in_a_loop": pooled,
    "pool_in_a_while_loop": pooled_while,
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
    "barrier": lambda x: lax.optimization_barrier((x.T, x.sum()))[0],
    "custom_vjp": lambda x: turned(x),
    "vmap_update": lambda x: jax.vmap(
        lambda x, i: lax.dynamic_update_slice(jnp.zeros((6, 3)) + x[:1], x[1:3], (i, 0))
    )(x, x[:, 0, 0].astype(int)),
    "associative": lambda x: lax.associative_scan(jnp.maximum, x, axis=1),
    "bits": lambda x: lax.bitcast_convert_type(
        lax.bitcast_convert_type(x, jnp.uint8), jnp.float32
    ),
    "median": lambda x: jnp.median(x, axis=1),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", MOVES)
def test_entries_move_as_places_say(name):
    _, found = followed(MOVES[name], IDS)
    (place,), want = found.outputs, jax.jit(MOVES[name])(IDS)
    assert isinstance(place, Rows), place
    np.testing.assert_array_equal(numbers(place, want.shape), want)


def weight(*shape, seed=0):
    """A weight, the same for all rows."""
    return draw(*shape, seed=seed, size=1 / 3)


def mlp(x):
    hidden = jax.nn.gelu(x.reshape(-1, 3) @ weight(3, 8) + weight(1, 8))
    return (hidden @ weight(8, 3)).reshape(x.shape) + x


def layer_norm(x):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-6)


def rope(x, positions):
    """`(batch, time, heads, size)`."""
    angles = positions[:, None].astype(x.dtype) / 10.0 ** jnp.arange(0, 2.0)[None]
    sin, cos = jnp.sin(angles)[None, :, None], jnp.cos(angles)[None, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attend(q, k, v, mask):
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9), axis=-1)
    out = jnp.einsum("bhts,bshd->bthd", weights, v)
    return out.reshape(*out.shape[:2], -1)


def block(x, weights, cache, at):
    """A transformer block; the keys and values from `at` on go to the cache."""
    n, time, _ = x.shape
    qkv = layer_norm(x) @ weights["qkv"]
    q, k, v = jnp.split(qkv.reshape(n, time, 2, -1), 3, axis=-1)
    positions = at + jnp.arange(time)
    k, v = rope(k, positions), v
    cache = [
        lax.dynamic_update_slice(c, new, (0, at, 0, 0))
        for c, new in zip(cache, (k, v), strict=True)
    ]
    mask = jnp.arange(cache[0].shape[1])[None] <= positions[:, None]
    x = x + attend(rope(q, positions), *cache, mask[None, None]) @ weights["out"]
    hidden = jax.nn.silu(layer_norm(x) @ weights["up"])
    return x + hidden @ weights["down"], cache


def transformer(tokens):
    """Greedy decoding with a cache for each layer, then logits; the layers are scanned."""
    table, layers, length = weight(11, 8), 2, 7
    weights = {
        "qkv": weight(layers, 8, 24, seed=1),
        "out": weight(layers, 8, 8, seed=2),
        "up": weight(layers, 8, 16, seed=3),
        "down": weight(layers, 16, 8, seed=4),
    }

    def apply(tokens, caches, at):
        @jax.checkpoint
        def layer(x, of_layer):
            return block(x, *of_layer, at)

        x, caches = lax.scan(layer, table[tokens], (weights, caches))
        return x @ table.T, caches

    n, prompt = tokens.shape
    caches = [jnp.zeros((layers, n, length, 2, 4)) for _ in range(2)]
    logits, caches = apply(tokens, caches, 0)

    def step(state):
        i, out, logits, caches = state
        token = jnp.argmax(logits[:, -1], axis=-1).astype(out.dtype)
        out = out.at[:, i].set(token)
        logits, caches = apply(token[:, None], caches, prompt + i)
        return i + 1, out, logits, caches

    state = 0, jnp.zeros((n, 3), tokens.dtype), logits[:, -1:], caches
    _, out, logits, caches = lax.while_loop(lambda s: s[0] < 3, step, state)
    return out, logits, caches


def gru(x):
    w, u = weight(3, 12), weight(4, 12, seed=1)

    def cell(h, x):
        update, reset, new = jnp.split(x @ w + h @ u, 3, axis=-1)
        z = jax.nn.sigmoid(update)
        return z * h + (1 - z) * jnp.tanh(new * jax.nn.sigmoid(reset)), h

    h, states = lax.scan(cell, jnp.zeros((len(x), 4)), x.swapaxes(0, 1), reverse=True)
    return h, states.swapaxes(0, 1)


def conv(x):
    dimensions = "NHWC", "HWIO", "NHWC"
    for i, stride in enumerate((1, 2)):
        x = lax.conv_general_dilated(
            x,
            weight(3, 3, 3, 3, seed=i),
            (stride, stride),
            "SAME",
            dimension_numbers=dimensions,
        )
        x = jax.nn.relu(x)
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.mean((1, 2)) @ weight(3, 5)


def tied(tokens):
    table = weight(11, 6)
    logits = jnp.tanh(table[tokens]) @ table.T
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
    return logits, -picked[..., 0].mean(-1)


def moe_by_einsum(x):
    gates = jax.nn.softmax(x @ weight(3, 4))
    top, experts = lax.top_k(gates, 2)
    place = jnp.cumsum(jax.nn.one_hot(experts, 4).sum(2), axis=1)
    dispatch = jax.nn.one_hot(place.astype(int), 3) * gates[..., None]
    inside = jnp.einsum("btec,btd->becd", dispatch, x)
    out = jnp.einsum("becd,edf->becf", inside, weight(4, 3, 3))
    return jnp.einsum("btec,becf->btf", dispatch, jax.nn.relu(out)) * top.sum(
        -1, keepdims=True
    )


def moe_by_sorting(x):
    flat = x.reshape(-1, 3)
    expert = jnp.argmax(flat @ weight(3, 4), axis=-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=4)
    out = lax.ragged_dot(jnp.take(flat, order, axis=0), weight(4, 3, 5), sizes)
    out = lax.ragged_dot(jax.nn.relu(out), weight(4, 5, 3, seed=1), sizes)
    return (flat + out[jnp.argsort(order)]).reshape(x.shape)


def dropout(x):
    keep = jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)
    keys = jax.random.split(jax.random.key(1), len(x))
    noise = jax.vmap(lambda key, x: x * jax.random.normal(key, x.shape))(keys, x)
    return jnp.where(keep, x / 0.5, 0) + noise


def last_token(x, lengths):
    return x[jnp.arange(len(x)), lengths % 6] @ weight(3, 4)


def micro_batches(x):
    return lax.map(lambda x: mlp(x).sum(1), x.reshape(2, 2, 6, 3)), lax.map(mlp, x)


def solved(x):
    matrix = jnp.einsum("bti,btj->bij", x, x) + 5 * jnp.eye(3)[None]
    right = jnp.swapaxes(x, 1, 2)
    factors = jnp.linalg.qr(jnp.linalg.cholesky(matrix))
    return jnp.linalg.solve(matrix, right), factors, jnp.abs(jnp.fft.fft(x, axis=1))


FLOATS = draw(N, 6, 3)
TOKENS = asarray(np.arange(N * 4).reshape(N, 4) * 7 % 11)
MODELS = {
    "mlp": (mlp, FLOATS),
    "transformer": (transformer, TOKENS),
    "gru": (gru, FLOATS),
    "conv": (conv, draw(N, 8, 8, 3)),
    "tied": (tied, TOKENS),
    "moe_by_einsum": (moe_by_einsum, FLOATS),
    "moe_by_sorting": (moe_by_sorting, FLOATS),
    "dropout": (dropout, FLOATS),
    "last_token": (last_token, FLOATS, asarray(np.arange(N))),
    "micro_batches": (micro_batches, FLOATS),
    "solved": (solved, FLOATS),
}


def values(jaxpr, found, constants, arguments, places):
    """The values of a jaxpr and of the calls in it; their places are added to `places`."""
    known = dict(zip(jaxpr.constvars, constants, strict=True))
    known |= dict(zip(jaxpr.invars, arguments, strict=True))
    seen = []
    for equation in jaxpr.eqns:
        inputs = [
            atom.val if isinstance(atom, compat.Literal) else known[atom]
            for atom in equation.invars
        ]
        out = compat.bind(equation, inputs)
        out = out if equation.primitive.multiple_results else [out]
        known.update(zip(equation.outvars, out, strict=True))
        for variable, value in zip(equation.outvars, out, strict=True):
            if not jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
                seen.append(value)
                places.append((equation, found.place(variable)))
        body = compat.body_of(equation)
        if body and equation.primitive.name in ("jit", "remat2", "custom_jvp_call"):
            inside = found.inside(equation, body[0])
            seen += values(body[0], inside, body[1], inputs, places)
    return seen


@pytest.mark.whole
@pytest.mark.parametrize("name", MODELS)
def test_only_entries_of_a_changed_row_change(name):
    """The models mix no rows. So entries of another row, and values without rows, stay."""
    model, *arguments = MODELS[name]
    jaxpr, found = followed(model, *arguments)
    assert all(isinstance(place, Rows) for place in found.outputs), found.outputs
    changed_rows, places = {1, 3}, []
    other = [np.array(x) for x in arguments]
    for x in other:
        x[[1, 3]] += 1
    run = jax.jit(lambda *args: values(jaxpr.jaxpr, found, jaxpr.consts, args, places))
    with optimizations(False):
        both = run(*arguments), run(*other)
    n_changed = 0
    for (equation, place), x, y in zip(places, *both, strict=True):
        changed = np.asarray(x) != np.asarray(y)
        if isinstance(place, Rows):
            rows = set(numbers(place, x.shape)[changed].tolist())
            assert rows <= changed_rows, equation
            n_changed += rows == changed_rows
        elif place is None:
            assert not changed.any(), equation
    assert n_changed >= 3


OF_ALL = lax.GatherDimensionNumbers((), tuple(range(N)), tuple(range(N)))
PERMUTATION = asarray([2, 0, 3, 1])
OPAQUE = core.Primitive("core_call")
OPAQUE.def_abstract_eval(lambda x: x)
# Programs whose rows are lost, and what is said of the primitive.
LOST = {
    "row": (lambda x: x[0], "`slice` takes a part of an axis that holds rows"),
    "row_of_index": (
        lambda x: lax.dynamic_slice(x, (jnp.int32(1), 0, 0), (1, 6, 3)),
        "`dynamic_slice` takes a part of an axis that holds rows",
    ),
    "half": (
        lambda x: jnp.split(x, 2)[0],
        "`split` takes a part of an axis that holds rows",
    ),
    "sorted": (lambda x: jnp.sort(x, 0), "`sort` sorts an axis that holds rows"),
    "top": (lambda x: lax.top_k(x.T, 2)[0], "`top_k` sorts an axis that holds rows"),
    "reversed": (lambda x: x[::-1], "`rev` reverses an axis that holds rows"),
    "between": (lambda x: x.reshape(3, 24), "`reshape` splits an axis between its rows"),
    "some": (
        lambda x: x.reshape(2, 2, 18).sum(0),
        "`reduce_sum` mixes a part of the rows",
    ),
    "frequencies": (
        lambda x: jnp.fft.fft(x, axis=0).real,
        "`fft` mixes an axis that holds rows",
    ),
    "padded": (
        lambda x: lax.pad(x, jnp.float32(0), ((1, 0, 0), (0, 0, 0), (0, 0, 0))),
        "`pad` pads an axis that holds rows",
    ),
    "longer": (
        lambda x: jnp.concatenate([x, jnp.zeros((1, 6, 3))]),
        "`concatenate` joins values along an axis that holds rows",
    ),
    "pairs": (
        lambda x: x[:, 0] @ x[:, 0].T,
        "`dot_general` joins values that hold the rows along different axes",
    ),
    "crossed": (
        lambda x: x[:, :4, 0] + x[:, :4, 0].T,
        "`add` joins values that hold the rows along different axes",
    ),
    "windows": (
        lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 1, 1), (1, 1, 1), "SAME"),
        "`reduce_window_sum` has windows along an axis that holds rows",
    ),
    "kernel": (
        lambda x: lax.conv(jnp.ones((1, 6, 9)), x, (1,), "SAME"),
        "`conv_general_dilated` has a kernel that holds rows",
    ),
    "convolved": (
        lambda x: lax.conv(x.T, jnp.ones((3, 6, 2)), (1,), "SAME"),
        "`conv_general_dilated` convolves an axis that holds rows",
    ),
    "groups_of_the_batch": (
        lambda x: lax.conv_general_dilated(
            x, jnp.ones((2, 6, 2)), (1,), "SAME", batch_group_count=2
        ),
        "`conv_general_dilated` splits the batch into groups",
    ),
    "experts": (
        lambda x: lax.ragged_dot(jnp.ones((9, 6)), x, jnp.array([3, 0, 4, 2])),
        "`ragged_dot_general` has a group for each row",
    ),
    "matrices": (
        lambda x: jnp.linalg.qr(x[:, :, 0])[0],
        "`qr` mixes an axis that holds rows",
    ),
    "solved": (
        lambda x: jax.scipy.linalg.solve_triangular(jnp.eye(N), x[:, 0]),
        "`triangular_solve` mixes an axis that holds rows",
    ),
    "components": (
        lambda x: lax.gather(jnp.ones((2,) * N), x[:, 0, 0].astype(int), OF_ALL, (1,) * N),
        "`gather` has an index with rows along its components",
    ),
    "components_put": (
        lambda x: lax.scatter(
            jnp.ones((2,) * N),
            x[:, 0, 0].astype(int),
            jnp.float32(1),
            lax.ScatterDimensionNumbers((), tuple(range(N)), tuple(range(N))),
        ),
        "`scatter` has an index with rows along its components",
    ),
    "transposed": (
        lambda x: lax.reshape(x, (6, 12), dimensions=(1, 0, 2)),
        "`reshape` transposes as well",
    ),
    "update": (
        lambda x: lax.dynamic_update_slice(jnp.ones((9, 6, 3)), x, (jnp.int32(1), 0, 0)),
        "`dynamic_update_slice` takes a part of an axis that holds rows",
    ),
    "taken_repeated": (
        lambda x: jnp.repeat(x[PERMUTATION], 2, axis=0),
        "`reshape` splits or repeats rows in an order that the data determine",
    ),
    "taken_in_a_map": (
        lambda x: lax.map(jnp.sin, x[PERMUTATION]),
        "`scan` runs over rows in an order that the data determine",
    ),
    "put": (
        lambda x: jnp.zeros_like(x).at[PERMUTATION].set(x),
        "`scatter` puts rows at indices that only the data know",
    ),
    "pairs_of_indices": (
        lambda x: x[PERMUTATION.reshape(2, 2)],
        "`gather` looks up rows at indices that only the data know",
    ),
    "carry": (
        lambda x: lax.scan(lambda c, _: (c.T, None), x[:, :4, 0], length=2)[0],
        "`scan` changes the axes of its carry that hold rows",
    ),
    "loop": (
        lambda x: lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c.T, x[:, :4, 0]),
        "`while` changes the axes of its carry that hold rows",
    ),
    "branches": (
        lambda x: lax.cond(x.sum() > 1, lambda x: x, lambda x: x.T, x[:, :4, 0]),
        "`cond` has branches that return rows along different axes",
    ),
    "taken_in_a_loop": (
        lambda x: lax.fori_loop(0, 2, lambda i, c: c[PERMUTATION], x),
        "`scan` returns rows in an order that its body determines",
    ),
    "each_with_every": (
        lambda x: lax.map(lambda row: row[None] + x, x),
        "`scan` runs over groups of rows, and all of them use a value with rows",
    ),
    "part_of_an_axis": (
        lambda x: lax.map(jnp.sin, x.reshape(-1, 3)),
        "`scan` runs over a part of an axis that holds rows",
    ),
    "callback": (
        lambda x: jax.pure_callback(np.asarray, x, x),
        "there is no rule that follows rows through `pure_callback`",
    ),
    "opaque": (
        lambda x: OPAQUE.bind(x),
        "`core_call` has no body in which rows could be followed",
    ),
    "gathered": (
        on_mesh(lambda x: lax.all_gather(x, "data", tiled=True), P("data"), P()),
        "`all_gather` exchanges rows between devices",
    ),
    "gathered_single": (
        on_mesh(lambda x: lax.all_gather(x, BOTH, tiled=True), P(BOTH), P()),
        "`all_gather` exchanges rows between devices",
    ),
    "other_groups": (
        lambda x: on_mesh(jnp.abs, P("data"), P("data"))(
            x.reshape(2, 2, 18).swapaxes(0, 1)
        ),
        "`shard_map` does not split the rows into consecutive groups",
    ),
    "not_joined": (
        on_mesh(lambda x: x, P("data"), P()),
        "`shard_map` does not join the rows that it has split",
    ),
    "stacked_shards": (
        lambda x: on_mesh(lambda x: lax.psum_scatter(x, "model"), P(), P())(
            x.reshape(2, 2, 18)
        ),
        "`reduce_scatter` splits an axis that holds rows",
    ),
    "gathered_rows": (
        on_mesh(
            lambda x: lax.all_gather(x, "model", tiled=True),
            P(None, "data"),
            P(None, "data"),
        ),
        "`all_gather` splits or joins an axis that holds rows",
    ),
    "exchanged_rows": (
        on_mesh(
            lambda x: lax.all_to_all(x, "model", 0, 1, tiled=True),
            P(None, "data"),
            P(None, "data"),
        ),
        "`all_to_all` splits or joins an axis that holds rows",
    ),
    "shards_of_taken": (
        lambda x: on_mesh(jnp.sin, P("data"), P("data"))(x[PERMUTATION]),
        "`shard_map` splits rows in an order that the data determine",
    ),
    "taken_shards": (
        lambda x: on_mesh(jnp.sin, P(), P("data"))(x[PERMUTATION]),
        "`shard_map` joins rows in an order that the data determine",
    ),
    "more_places": (
        lambda x: jnp.zeros((N + 1, 6, 3)).at[jnp.arange(N)].set(x),
        "`scatter` puts rows at indices that only the data know",
    ),
    "two_orders": (
        lambda x: x[PERMUTATION] + x[PERMUTATION[::-1]],
        "`add` joins values with rows in different orders",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_lost_rows_have_a_reason(name):
    fn, reason = LOST[name]
    _, found = followed(fn, IDS)
    (place,) = found.outputs
    assert isinstance(place, Lost), place
    assert place.reason == reason
    assert "test_following.py" in place.where


NOWHERE = {
    "mean": lambda x: x.mean(0),
    "total": lambda x: x.sum(),
    "contracted": lambda x: jnp.einsum("bti,btj->ij", x, x),
    "shape": lambda x: jnp.zeros(x.shape),
    "random": lambda x: jax.random.normal(jax.random.key(0), x.shape),
    "carry": lambda x: lax.scan(lambda c, x: (c + x.sum(), None), 0.0, x)[0],
    "summed": on_mesh(lambda x: lax.psum(x, "data"), P("data"), P()),
    "sum_of_both": on_mesh(lambda x: lax.psum(x, BOTH), P(BOTH), P()),
    "empty": lambda x: x[:, :0].reshape(0, 4),
    "empty_count": lambda x: jnp.arange(0).reshape(0, 1),
}


@pytest.mark.parametrize("name", NOWHERE)
def test_values_without_rows(name):
    assert followed(NOWHERE[name], IDS)[1].outputs == [None]


STAY = {  # what mixes rows, or loses them, is of a row where it meets entries of the row
    "less_the_mean": lambda x: x - x.mean(0, keepdims=True),
    "sums": lambda x: jnp.cumsum(x, axis=0),
    "gradient": lambda x: jax.grad(lambda x: jnp.tanh(x @ weight(3, 2)).sum())(x),
    "residual": lambda x: x + x[PERMUTATION],
    "residual_of_lost": lambda x: jnp.sort(x, axis=0) * x,
    "put_into_rows": lambda x: x.at[PERMUTATION].add(x),
    "scattered_back": lambda x: x + jnp.zeros_like(x).at[PERMUTATION].set(x[PERMUTATION]),
    "carried": lambda x: lax.fori_loop(0, 2, lambda i, c: x + c[PERMUTATION], x),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", STAY)
def test_rows_stay_where_they_are(name):
    assert followed(STAY[name], IDS)[1].outputs == [whole_axis(IDS.shape, 0)]


@pytest.mark.whole
@pytest.mark.parametrize("name", MOVES)
def test_entries_that_are_taken_move_as_places_say(name):
    def fn(x, order):
        return MOVES[name](x[order])

    _, found = followed(fn, IDS, PERMUTATION, axes=(0, None))
    (place,), want = found.outputs, np.asarray(jax.jit(fn)(IDS, PERMUTATION))
    assert isinstance(place, Taken | Lost), place
    if isinstance(place, Taken):
        want = np.moveaxis(want, place.axis, 0)
        np.testing.assert_array_equal(want.T, np.broadcast_to(PERMUTATION, want.T.shape))


TAKEN = {  # the axis along which entries belong to rows
    "index": (lambda x, i: x[i], 0),
    "first": (lambda x, i: x[jnp.arange(2)], 0),
    "take": (lambda x, i: jnp.take(x, i[:3], axis=0), 0),
    "more": (lambda x, i: x.reshape(24, 3)[jnp.tile(i, 9)], 0),
    "moved": (lambda x, i: jnp.tanh(jnp.transpose(x[i], (1, 2, 0)))[:, None, :2], 3),
    "of_last_axis": (lambda x, i: x.T[:, :, i], 2),
    "product": (lambda x, i: x[i] @ jnp.ones((3, 5)), 0),
    "experts": (
        lambda x, i: lax.ragged_dot(x[i][:, 0], jnp.ones((2, 3, 5)), jnp.array([1, 3])),
        0,
    ),
    "again": (lambda x, i: x[i][i], 0),
    "scanned": (lambda x, i: lax.map(lambda x: x * 2, x[i].swapaxes(0, 1)), 1),
    "checkpoint": (lambda x, i: jax.checkpoint(lambda x, i: x[i] + 1)(x, i), 0),
}


@pytest.mark.parametrize("name", TAKEN)
def test_rows_that_are_taken_in_the_order_of_the_data(name):
    fn, axis = TAKEN[name]
    _, found = followed(fn, IDS, PERMUTATION, axes=(0, None))
    (place,) = found.outputs
    assert isinstance(place, Taken), place
    assert place.axis == axis


def test_takings_have_different_numbers():
    """Also two calls of one function, which is analyzed once."""

    def fn(x, i, j):
        return x[i], x[i], jnp.take(x, i, axis=0), jnp.take(x, j, axis=0)

    _, found = followed(fn, IDS, PERMUTATION, PERMUTATION, axes=(0, None, None))
    assert len({place.number for place in found.outputs}) == 4


def test_equal_calls_are_analyzed_once():
    layer = jax.jit(lambda x: jnp.tanh(x))
    jaxpr, found = followed(
        lambda x: layer(layer(x)) + layer(x.mean(0, keepdims=True)), IDS
    )
    calls = [e for e in jaxpr.eqns if e.primitive.name == "jit"]
    assert len(calls) == 3
    first, second, mean = (found.inside(e, e.params["jaxpr"]) for e in calls)
    assert first is second
    assert (first.outputs, mean.outputs) == ([whole_axis(IDS.shape, 0)], [None])


@pytest.mark.parametrize("shape", [(4, 2, 3), (2, 4, 3), (2, 2, 2)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_loop_over_rows_renumbers_them(shape, axis):
    """The rows of each iteration are those that the caller's reshape gives it."""
    n = int(np.prod(shape))

    def fn(x):
        x = jnp.moveaxis(x.reshape(*shape, 5), axis, 0)
        return lax.map(lambda x: x.T, x)

    x = ids(n, 5)
    jaxpr, found = followed(fn, x, n=n)
    (scan,) = (e for e in jaxpr.eqns if e.primitive.name == "scan")
    outer, length, inner = found.scanned[id(scan)]
    assert (length, outer * inner) == (shape[axis], n // shape[axis])
    rows = np.arange(n).reshape(outer, length, inner).swapaxes(0, 1).reshape(length, -1)
    body = found.inside(scan, scan.params["jaxpr"])
    assert body.n_rows == outer * inner
    y = np.asarray(jax.jit(fn)(x)).astype(int)
    local = numbers(body.outputs[0], y.shape[1:])
    for own, got in zip(rows, y, strict=True):
        np.testing.assert_array_equal(own[local], got)
    np.testing.assert_array_equal(numbers(found.outputs[0], y.shape), y)


# Bodies of a `shard_map` over "data" (2) and "model" (2), the axes of the mesh that split
# the argument, those of the result, and the axes that split the rows.
SHARDED = {
    "rows": (lambda x: jnp.abs(x), P("data"), P("data"), ("data",)),
    "single_rows": (lambda x: x.T, P(BOTH), P(None, None, BOTH), BOTH),
    "columns": (lambda x: jnp.abs(x), P(None, "data"), P(None, "data"), ()),
    "both": (lambda x: x.T, P("data", "model"), P(None, "model", "data"), ("data",)),
    "replicated": (lambda x: x.T, P(), P(), ()),
    "again": (lambda x: x, P(), P("data"), ()),
    "flat": (lambda x: x.reshape(-1, 4), P("data"), P("data"), ("data",)),
    "inner": (lambda x: x.swapaxes(0, 1).reshape(-1, 4), P("data"), P("data"), ("data",)),
    "summed": (
        lambda x: lax.pmax(x, "model"),
        P("data", "model"),
        P("data", "model"),
        ("data",),
    ),
    "gathered": (
        lambda x: lax.all_gather(x, "model", axis=1, tiled=True),
        P("data", "model"),
        P("data"),
        ("data",),
    ),
    "stacked": (
        lambda x: lax.all_gather(x, "model"),
        P("data", "model"),
        P(None, "data"),
        ("data",),
    ),
    "scattered": (
        lambda x: lax.psum_scatter(x / 2, "model", scatter_dimension=1, tiled=True),
        P("data"),
        P("data", "model"),
        ("data",),
    ),
    "exchanged": (
        lambda x: lax.all_to_all(x, "model", 1, 2, tiled=True),
        P("data", None, "model"),
        P("data", "model"),
        ("data",),
    ),
    "permuted": (
        lambda x: lax.ppermute(x, "model", [(0, 1), (1, 0)]),
        P("data", "model"),
        P("data", "model"),
        ("data",),
    ),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", SHARDED)
def test_shards_have_the_rows_that_the_specs_say(name):
    body, in_spec, out_spec, names = SHARDED[name]
    fn = on_mesh(body, in_spec, out_spec)
    x = asarray(np.tile(np.asarray(IDS)[:, :2, :2], (1, 2, 2)))
    jaxpr, found = followed(fn, x)
    (place,), want = found.outputs, jax.jit(fn)(x)
    assert isinstance(place, Rows), place
    (equation,) = jaxpr.eqns
    assert found.specs[id(equation)] == names
    n_rows = found.inside(equation, equation.params["jaxpr"]).n_rows
    assert n_rows == N // 2 ** len(names)
    np.testing.assert_array_equal(numbers(place, want.shape), want)


def test_shards_of_values_with_and_without_rows():
    specs = (P("data"), P(), P("model")), (P("data"), P())
    fn = on_mesh(lambda x, y, t: (x + t, y), *specs)
    _, found = followed(fn, IDS, IDS, IDS, axes=(0, 0, None))
    split, unsplit = found.outputs
    assert split == whole_axis(IDS.shape, 0)
    assert isinstance(unsplit, Lost)
    reason = "`shard_map` splits the rows of some values, and not those of others"
    assert unsplit.reason == reason


@pytest.mark.parametrize(
    ("move", "n", "axes"),
    [
        (lambda x: x.reshape(12), 6, BOTH),
        (lambda x: x.reshape(2, 2, 2).swapaxes(1, 2).reshape(8), 4, BOTH),
        (lambda x: jnp.tile(x[:, 0], 3), 4, BOTH),
        (lambda x: x.reshape(2, 2, 2).swapaxes(0, 1).reshape(8), 4, BOTH[0]),
    ],
    ids=["too_few", "apart", "repeated", "in_another_order"],
)
def test_rows_that_a_mesh_does_not_divide(move, n, axes):
    fn = on_mesh(jnp.sin, P(axes), P(axes))
    _, found = followed(lambda x: fn(move(x)), ids(n, 2), n=n)
    reason = "`shard_map` does not split the rows into consecutive groups"
    assert found.outputs[0].reason == reason


def test_one_row_of_several():  # by a primitive that not every JAX has
    _, found = followed(lambda x: jnp.unstack(x)[1], IDS)
    assert found.outputs[0].reason.endswith("takes a part of an axis that holds rows")


def test_shards_without_rows():
    jaxpr, found = followed(on_mesh(jnp.sin, P("data"), P("data")), IDS, axes=(None,))
    (equation,) = jaxpr.eqns
    assert found.outputs == [None]
    assert found.specs[id(equation)] == ()
    assert found.inside(equation, equation.params["jaxpr"]).n_rows == N


def test_a_sum_over_some_of_the_axes_that_split_the_rows():
    fn = on_mesh(lambda x: lax.psum(x, "data"), P(BOTH), P("model"))
    _, found = followed(fn, ids(8, 3), n=8)
    assert found.outputs[0].reason == "`psum` exchanges rows between devices"


def test_a_single_row_has_no_place():
    assert followed(lambda x: x.T, ids(1, 6, 3), n=1)[1].outputs == [None]


def random_shape(rng, size):
    """A random shape of so many entries."""
    factors = []
    for prime in (2, 3):
        while size % prime == 0:
            factors.append(prime)
            size //= prime
    rng.shuffle(factors)
    factors.append(size)
    cuts = np.sort(rng.integers(0, len(factors) + 1, rng.integers(0, 4)))
    return [math.prod(map(int, part)) for part in np.split(np.array(factors, int), cuts)]


def moved_at_random(rng, x, xp):
    """One random move of entries, by the functions of NumPy or JAX."""
    axis = int(rng.integers(x.ndim))
    n, size = int(rng.integers(1, 3)), x.shape[axis]
    start = int(rng.integers(size))
    part = [slice(None)] * axis + [slice(start, int(rng.integers(start, size)) + 1)]
    loop = (
        (lambda x: lax.map(lambda x: x.T, x))
        if xp is jnp
        else lambda x: np.stack([x.T for x in x])
    )
    moves = [
        lambda: x.reshape(random_shape(rng, x.size)),
        lambda: x.transpose(rng.permutation(x.ndim)),
        lambda: x[tuple(part)],
        lambda: xp.concatenate([x] * n, axis),
        lambda: xp.repeat(x, n, axis=axis),
        lambda: xp.tile(x, n),
        lambda: loop(x),
    ]
    return moves[rng.choice(len(moves), p=[0.4] + [0.1] * 6)]()


def test_random_moves():
    n_followed = 0
    for seed in range(300):
        n = (4, 6, 12)[seed % 3]

        def fn(x, xp=jnp, seed=seed):
            rng = np.random.default_rng(seed)
            for _ in range(rng.integers(1, 6)):
                x = moved_at_random(rng, x, xp)
            return x

        x = ids(n, 6, 4)
        _, found = followed(fn, x, n=n)
        (place,), want = found.outputs, fn(np.asarray(x), np)
        if isinstance(place, Rows):
            np.testing.assert_array_equal(numbers(place, want.shape), want)
            n_followed += 1
        else:
            assert isinstance(place, Lost)
    assert n_followed >= 150
