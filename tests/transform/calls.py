"""Primitives that call something, or do something, beside the weights of a model.

Each is a function of the activations `x (4, 12)` and of a weight `w (12, 12)`. It is tried
with an array for `w`, between two adapted weights, and with an adapted or a quantized one.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.experimental import checkify, io_callback, sparse
from jax.experimental import compute_on as host
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

ROWS, WIDTH = 4, 12


@dataclasses.dataclass(frozen=True)
class Call:
    """A call, and what `adapt` does with an adapted weight that reaches it.

    Attributes:
        fn: `fn(x, w)`, any number of floating-point results.
        merged_by: the primitives, as a pattern, one of which merges the weight; empty if
            the weight stays low-rank.
        gradient: whether JAX differentiates it.
        vmap: whether JAX maps it over `x`.
        prints: how often one evaluation prints "seen".
        needs: a name in `jax` without which it cannot be tried.
        compiles_since: the first JAX that compiles it with a merged weight. Before it XLA
            aborts where a callback takes a sum with a product.
    """

    fn: Callable[[jax.Array, jax.Array], Any]
    merged_by: str = ""
    gradient: bool = True
    vmap: bool = True
    prints: int = 0
    needs: str = ""
    compiles_since: tuple[int, ...] = ()


def _shard_map(body, out_specs):
    def fn(x, w):
        mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
        in_specs = (P("d"), P())
        return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(x, w)

    return fn


def _pmap(x, w):
    return jax.pmap(lambda x, w: jnp.tanh(x @ w), in_axes=(0, None))(x, w)


@jax.custom_jvp
def _with_jvp(x, w):
    return x @ w


@_with_jvp.defjvp
def _jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, 3 * (dx @ w) + x @ dw


@jax.custom_vjp
def _with_vjp(x, w):
    return x @ w, jnp.sin(x)


_with_vjp.defvjp(
    lambda x, w: (_with_vjp(x, w), (x, w)),
    lambda kept, g: (g[0] @ kept[1].T + 3 * g[1], 2 * kept[0].T @ g[0]),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_function(f, x, w):
    return f(x @ w)


_with_function.defvjp(
    lambda f, x, w: (f(x @ w), (x, w)),
    lambda f, kept, g: (g @ kept[1].T, 2 * kept[0].T @ g),
)


@jax.custom_gradient
def _custom_gradient(x, w):
    return x @ w, lambda g: (g @ w.T, 2 * x.T @ g)


def _pallas(x, w):
    def kernel(x_ref, w_ref, y_ref, z_ref):
        y_ref[...] = jnp.dot(x_ref[...], w_ref[...])
        z_ref[...] = x_ref[...] * 2.0

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, out_shape=(out, out), interpret=True)(x, w)


def _pure_callback(x, w):
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(
        lambda x, w: np.asarray(x) @ np.asarray(w), out, x, w, vmap_method="sequential"
    )


def _io_beside(x, w):
    io_callback(lambda positive: print("seen"), None, x > 0, ordered=True)
    return x @ w


def _io_callback(x, w, ordered=False):
    def seen(x, w):
        print("seen")
        return np.asarray(x) @ np.asarray(w)

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return io_callback(seen, out, x, w, ordered=ordered)


def _debug_print(x, w, ordered=False):
    jax.debug.print("seen {} {}", x, w, ordered=ordered)
    return jnp.sin(x)


def _debug_callback(x, w):
    jax.debug.callback(lambda x, w: print("seen"), x, w)
    return jnp.sin(x)


def _effect_in_scan(x, w):
    def step(h, _):
        jax.debug.callback(lambda h: print("seen"), h, ordered=True)
        return jnp.tanh(h @ w), None

    return lax.scan(step, x, None, length=3)[0]


def _seen(x, w):
    jax.debug.callback(lambda x, w: print("seen"), x, w)
    return x @ w


_seen_product = jax.custom_vjp(_seen)
_seen_product.defvjp(
    lambda x, w: (_seen(x, w), (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g)
)


def _exported(x, w):
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (x, w)]
    function = jax.jit(lambda x, w: (jnp.tanh(x @ w), x + 1.0))
    return export.export(function)(
        *shapes,
    ).call(x, w)


@custom_partitioning
def _partitioned(x, w):
    return jnp.tanh(x @ w)


_partitioned.def_partition(
    partition=lambda mesh, args, result: (
        mesh,
        lambda x, w: jnp.tanh(x @ w),
        result.sharding,
        [a.sharding for a in args],
    ),
    infer_sharding_from_operands=lambda mesh, args, result: NamedSharding(mesh, P()),
    sharding_rule="i j, j k -> i k",
)


def _root(x, w):
    def solve(f, start):
        return lax.fori_loop(0, 60, lambda _, y: y - 0.5 * f(y), start)

    target = jnp.sin(x @ w)
    return lax.custom_root(
        lambda y: y + 0.1 * jnp.tanh(y) - target,
        jnp.zeros_like(target),
        solve,
        lambda g, y: y / g(jnp.ones_like(y)),
    )


def _linear_solve(x, w):
    matrix = 0.05 * w

    def apply(y):
        return y + y @ matrix

    def solve(_, b):
        return jnp.linalg.solve((jnp.eye(WIDTH, dtype=b.dtype) + matrix).T, b.T).T

    def transposed(_, b):
        return jnp.linalg.solve(jnp.eye(WIDTH, dtype=b.dtype) + matrix, b.T).T

    return lax.custom_linear_solve(apply, x, solve, transposed)


def _conjugate_gradients(x, w):
    def apply(y):
        return y + 0.01 * (y @ w) @ w.T

    return jax.scipy.sparse.linalg.cg(apply, x, tol=1e-14, maxiter=100)[0]


def _on_host(x, w):
    """By a context manager, in the versions of JAX that have it."""
    if not _has_host_context():
        return jnp.tanh(x @ w)
    with host.compute_on("device_host"):
        y = x @ w
    return jnp.tanh(y)


def _has_host_context():
    return "out_memory_spaces" not in inspect.signature(host.compute_on).parameters


_COMPUTE_ON = "compute_on2" if _has_host_context() else "compute_on"


def has_host_call():
    return hasattr(host, _COMPUTE_ON) and hasattr(jax, "memory")


def on_host_called(x, w):
    """By a function, in the versions of JAX that have it."""
    options = {"compute_type": "device_host", "out_memory_spaces": jax.memory.Space.Device}
    return getattr(host, _COMPUTE_ON)(lambda x, w: jnp.tanh(x @ w), **options)(x, w)


def _sparse(x, w):
    mask = sparse.BCOO.fromdense(np.eye(ROWS, dtype="float64"), nse=ROWS)
    mask = sparse.BCOO((mask.data.astype(x.dtype), mask.indices), shape=mask.shape)
    return mask @ x, mask @ (x @ w)


def _sparse_of_weight(x, w):
    rows = np.arange(6) * 2
    ones = jnp.ones(6, x.dtype)
    left = sparse.BCOO((ones, np.stack([rows // 3, rows], 1)), shape=(ROWS, WIDTH))
    return left @ w + x


def _branch(x, w):
    return lax.cond(jnp.sum(x) > 0, lambda: x @ w, lambda: jnp.sin(x) @ w)


def _switch(x, w):
    index = (jnp.sum(x) > 0).astype("int32")
    return lax.switch(index, [lambda x: x @ w, lambda x: x @ w * 2, jnp.sin], x)


def _while(x, w):
    def step(state):
        i, h = state
        return i + 1, jnp.tanh(h @ w)

    return lax.while_loop(lambda s: s[0] < 3, step, (0, x))[1]


@jax.custom_batching.custom_vmap
def _with_vmap(x, w):
    return x @ w, jnp.sin(x)


@_with_vmap.def_vmap
def _vmap_rule(size, batched, x, w):
    x, w = (
        v if b else jnp.broadcast_to(v, (size, *v.shape))
        for v, b in zip((x, w), batched, strict=True)
    )
    return (x @ w, jnp.sin(x)), (True, True)


def _transposed(x, w):
    (y,) = jax.linear_transpose(lambda x: x @ w, x)(x)
    return y


def _linear_call(x, w):
    return jax.custom_derivatives.linear_call(
        lambda w, x: x @ w, lambda w, g: g @ w.T, w, x
    )


def _mutable(x, w):
    ref = jax.new_ref(x)
    ref[...] = jnp.tanh(ref[...] @ w)
    ref[2:4] = x[:2]
    return ref[...]


def _mutable_in_scan(x, w):
    total = jax.new_ref(jnp.zeros_like(x))

    def step(h, _):
        total[...] += h
        return jnp.tanh(h @ w), None

    h, _ = lax.scan(step, x, None, length=3)
    return h, total[...]


def _mutable_weight(x, w):
    return x @ jax.new_ref(w)[...]


def _run_state(x, w):
    def body(refs):
        x_ref, w_ref = refs
        x_ref[...] = jnp.tanh(x_ref[...] @ w_ref[...])

    return pl.run_state(body)((x, w))[0]


def _random(x, w):
    key = jax.random.key(0)
    noise = jax.random.normal(key, x.shape, x.dtype)
    bits = lax.rng_bit_generator(jnp.zeros(4, "uint32"), x.shape)[1]
    keep = jax.random.bernoulli(jax.random.split(key)[0], 0.5, x.shape)
    return (x + noise) @ w + (bits % 2).astype(x.dtype) * keep.astype(x.dtype)


def _by_platform(x, w):
    return lax.platform_dependent(
        x, w, cpu=lambda x, w: x @ w, default=lambda x, w: x @ w * 1.0
    )


def _sorted(x, w):
    keys = jnp.cos(x)
    by_key, x = lax.sort((keys, x), num_keys=1)
    largest, _ = lax.top_k(x, 3)
    some, _ = lax.approx_max_k(x, 3)
    return by_key + x @ w, largest, jnp.sort(some)


def _decomposed(x, w):
    gram = 0.1 * x.T @ x + 2.0 * jnp.eye(WIDTH, dtype=x.dtype)
    lower = jnp.linalg.cholesky(gram)
    values, _ = jnp.linalg.eigh(gram + jnp.diag(jnp.arange(float(WIDTH)).astype(x.dtype)))
    return jnp.linalg.solve(gram, x.T).T @ w, lower, values


def _to_host(x, w):
    device = jax.devices()[0]
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="unpinned_host")
    back = jax.sharding.SingleDeviceSharding(device)
    return jax.device_put(jax.device_put(x, host), back) @ jax.device_put(w, back)


def _reduced(x, w):
    total = lax.reduce(x, np.zeros((), x.dtype), lambda a, b: a + b, (1,))
    windows = lax.reduce_window(x, -np.inf, lax.max, (1, 3), (1, 1), "SAME")
    return total[:, None] * (x @ w), windows


def _checked(x, w):
    def f(x):
        checkify.check(jnp.all(x < 100), "too large")
        return jnp.tanh(x @ w)

    return checkify.checkify(f)(x)[1]


def _forward_mode(x, w):
    return jax.jvp(lambda x: jnp.tanh(x @ w), (x,), (jnp.cos(x),))


def _named(x, w):
    with jax.named_scope("block"):
        return jax.named_call(lambda x, w: jnp.tanh(x @ w), name="named")(x, w)


CALLS = {
    # calls of a function
    "shard_map": Call(_shard_map(lambda x, w: jnp.tanh(x @ w), P("d"))),
    "shard_map_of_two": Call(
        _shard_map(lambda x, w: (x @ w, lax.psum(x, "d")), (P("d"), P()))
    ),
    "pmap": Call(_pmap, "xla_pmap" if jax.__version_info__ < (0, 8, 0) else "", vmap=False),
    "jit": Call(jax.jit(lambda x, w: jnp.tanh(x @ w), inline=True)),
    "named": Call(_named),
    "checkpoint": Call(jax.checkpoint(lambda x, w: jnp.tanh(jnp.sin(x) @ w))),
    "composite": Call(
        lambda x, w: lax.composite(jnp.matmul, name="my.product")(x, w),
        "composite",
        gradient=False,
        vmap=False,
        needs="lax.composite",
    ),
    "exported": Call(_exported, "custom_vjp_call|call_exported", vmap=False),
    "custom_partitioning": Call(
        _partitioned, "custom_partitioning", gradient=False, vmap=False
    ),
    "pallas": Call(_pallas, "pallas_call", gradient=False),
    "compute_on": Call(_on_host),
    "compute_on_called": Call(
        on_host_called, needs=f"experimental.compute_on.{_COMPUTE_ON}"
    ),
    # derivatives and mappings of their own
    "custom_jvp": Call(_with_jvp, "custom_jvp_call"),
    "custom_vjp": Call(_with_vjp, "custom_vjp_call"),
    "custom_vjp_of_a_function": Call(
        lambda x, w: _with_function(jnp.tanh, x, w), "custom_vjp_call"
    ),
    "custom_gradient": Call(_custom_gradient, "custom_vjp_call"),
    "custom_vmap": Call(_with_vmap, "custom_vmap_call", gradient=False),
    "forward_mode": Call(_forward_mode),
    "linear_transpose": Call(_transposed),
    "linear_call": Call(_linear_call, "linear_call", gradient=False, vmap=False),
    "custom_root": Call(_root),
    "custom_linear_solve": Call(_linear_solve, "custom_linear_solve"),
    "conjugate_gradients": Call(_conjugate_gradients, "custom_linear_solve"),
    # effects
    "pure_callback": Call(
        _pure_callback, "pure_callback", gradient=False, compiles_since=(0, 7, 1)
    ),
    "io_callback": Call(
        _io_callback, "io_callback", gradient=False, prints=1, compiles_since=(0, 7, 1)
    ),
    "io_callback_ordered": Call(
        functools.partial(_io_callback, ordered=True),
        "io_callback",
        gradient=False,
        vmap=False,
        prints=1,
        compiles_since=(0, 7, 1),
    ),
    "io_callback_beside": Call(_io_beside, vmap=False, prints=1),
    "debug_callback": Call(_debug_callback, "debug_callback", prints=1),
    "debug_print": Call(_debug_print, "debug_callback|debug_print", prints=1),
    "debug_print_ordered": Call(
        functools.partial(_debug_print, ordered=True),
        "debug_callback|debug_print",
        vmap=False,
        prints=1,
    ),
    "effect_in_custom_vjp": Call(_seen_product, "custom_vjp_call", prints=1),
    "effect_in_scan": Call(_effect_in_scan, vmap=False, prints=3),
    "checkify": Call(_checked),
    "mutable": Call(_mutable, needs="new_ref"),
    "mutable_in_scan": Call(_mutable_in_scan, needs="new_ref"),
    "mutable_weight": Call(_mutable_weight, "new_ref", needs="new_ref"),
    "run_state": Call(_run_state, "run_state", gradient=False, vmap=False),
    # control flow
    "cond": Call(_branch),
    "switch": Call(_switch),
    "while": Call(_while, gradient=False),
    "scan": Call(lambda x, w: lax.scan(lambda h, _: (jnp.tanh(h @ w), h), x, None, 3)),
    "fori": Call(lambda x, w: lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ w), x)),
    "map": Call(lambda x, w: lax.map(lambda row: row @ w, x, batch_size=2)),
    "associative_scan": Call(lambda x, w: lax.associative_scan(jnp.add, x) @ w),
    "platform_dependent": Call(_by_platform, "cond"),
    # other primitives
    "random": Call(_random),
    "sparse": Call(_sparse),
    "sparse_of_weight": Call(_sparse_of_weight, "bcoo_dot_general"),
    "fft": Call(lambda x, w: jnp.abs(jnp.fft.fft(x)) @ w),
    "fft_of_weight": Call(lambda x, w: x @ jnp.abs(jnp.fft.rfft(w)), "fft"),
    "sort": Call(_sorted),
    "sort_of_weight": Call(lambda x, w: x @ jnp.sort(w), "sort"),
    "top_k_of_weight": Call(lambda x, w: x @ lax.top_k(w, 3)[0], "top_k"),
    "linalg": Call(_decomposed),
    "linalg_of_weight": Call(
        lambda x, w: x @ jnp.linalg.svd(w, compute_uv=False)[:, None], "svd"
    ),
    "reductions": Call(_reduced),
    "device_put": Call(_to_host),
}
