"""`adapt` on params with weights in few bits, against the same weights dense."""

import dataclasses
import functools
import inspect
import types
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.scipy.linalg import solve_triangular
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax.transform._context import Context
from lora_jax.transform._deferred import Deferred
from lora_jax.transform._factored import Factored
from lora_jax.transform._rules import RULES
from tests import toy_format
from tests.support import normal, set_mesh
from tests.transform.calls import has_host_call, on_host_called
from tests.transform.support import assert_same, plan_of, trained


def product(params, x):
    return jnp.tanh(x @ params["w"])


def flipped(params, x):
    return x @ params["w"].T


def heads(params, x):
    return jnp.einsum("td,hdk->thk", x, params["w"])


def cast_and_scaled(params, x):
    return x @ (-2.0 * params["w"].astype(jnp.bfloat16).astype(jnp.float32))


def fused(params, x):
    return x @ jnp.concatenate([params["w"], params["v"]], axis=1)


def halves(params, x):
    left, right = jnp.split(params["w"], 2, axis=1)
    return jnp.tanh(x @ left) * (x @ right)


def padded_rows(params, x):
    return jnp.pad(x, ((0, 0), (0, 2))) @ jnp.pad(params["w"], ((0, 2), (0, 0)))


def looked_up(params, x):
    return jnp.tanh(params["w"][jnp.array([3, 0, 3])]) + x[:3, :10]


def with_unadapted(params, x):
    return jnp.tanh(x @ params["w"]) @ params["frozen"]


def in_branches(params, x):
    return lax.cond(x.sum() > 0, lambda: x @ params["w"], lambda: (2 * x) @ params["w"])


def in_a_while_loop(params, x):
    body = functools.partial(lambda w, s: (s[0] + 1, jnp.tanh(s[1] @ w)), params["w"])
    return lax.while_loop(lambda s: s[0] < 3, body, (0, x))[1]


def carried(params, x):
    def step(carry, _):
        h, w = carry
        return (jnp.tanh(h @ w), w), None

    return lax.scan(step, (x, params["w"]), None, length=3)[0][0]


def checkpointed(params, x):
    return jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(params["w"], x)


def convolved(params, x):
    return lax.conv(x[None, None], params["w"][:, None], (1, 1), "SAME")


def mapped(params, x):
    return jax.vmap(lambda row: jnp.tanh(row @ params["w"]))(x)


def scanned(params, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]


def scanned_in_bfloat16(params, x):
    stack = params["w"].astype(jnp.bfloat16)

    def step(h, w):
        return jnp.tanh((h.astype(jnp.bfloat16) @ w).astype(jnp.float32)), None

    return lax.scan(step, x, stack)[0]


def scanned_after_a_transpose(params, x):
    stack = params["w"].transpose(0, 2, 1)
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack)[0]


def indexed(params, x):
    for i in range(3):
        x = jnp.tanh(x @ params["w"][i])
    return x


def indexed_in_a_loop(params, x):
    def step(i, h):
        return jnp.tanh(h @ lax.dynamic_index_in_dim(params["w"], i, keepdims=False))

    return lax.fori_loop(0, 3, step, x)


def some_layers(params, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"][1:])[0]


def mapped_over_the_stack(params, x):
    return jax.vmap(lambda w: jnp.tanh(x @ w))(params["w"])


def with_a_block(params, x):
    @jax.jit
    def block(h, w):
        for _ in range(8):  # too large to be evaluated in place
            h = jnp.tanh(h @ w) + jnp.sin(h) * 0.1
        return h

    return block(block(x, params["v"]), params["u"])


SQUARE = {"w": (12, 12)}
STACK = {"w": (3, 12, 12)}
CASES = {
    product: ({"w": (12, 10)}, 0),
    flipped: ({"w": (10, 12)}, 0),
    heads: ({"w": (2, 12, 5)}, 0),
    cast_and_scaled: ({"w": (12, 10)}, 0),
    fused: ({"w": (12, 10), "v": (12, 4)}, 0),
    halves: ({"w": (12, 10)}, 0),
    padded_rows: ({"w": (12, 10)}, 0),
    looked_up: ({"w": (12, 10)}, 0),
    with_unadapted: ({"w": (12, 10), "frozen": (10, 7)}, 0),
    in_branches: ({"w": (12, 10)}, 0),
    in_a_while_loop: (SQUARE, 0),
    carried: (SQUARE, 0),
    checkpointed: ({"w": (12, 10)}, 0),
    convolved: ({"w": (4, 3, 3)}, 0),
    mapped: ({"w": (12, 10)}, 0),
    scanned: (STACK, 1),
    scanned_in_bfloat16: (STACK, 1),
    scanned_after_a_transpose: (STACK, 1),
    indexed: (STACK, 1),
    indexed_in_a_loop: (STACK, 1),
    some_layers: (STACK, 1),
    mapped_over_the_stack: (STACK, 1),
    with_a_block: ({"u": (12, 12), "v": (12, 12)}, 0),
}
FORWARD_ONLY = (in_a_while_loop,)
METHODS = {"lora": {}, "dora": {"use_dora": True}}


def params_of(shapes, stack_ndim=0):
    """Quantized weights, and the dense ones that they stand for."""
    stored = {
        name: toy_format.quantize(normal(*shape, dtype="float32") / 3, stack_ndim)
        for name, shape in shapes.items()
    }
    return stored, {
        name: lora_jax.quant.dequantize(weight) for name, weight in stored.items()
    }


def options_of(fn):
    """Adapters for all but what is to have none."""
    shapes, _ = CASES[fn]
    return {"targets": [name for name in shapes if name != "frozen"], "rank": 2}


def some(slow):
    """All cases, of which some are slow: they say little that the others do not."""
    marks = dict.fromkeys(slow, pytest.mark.slow)
    return [pytest.param(fn, id=fn.__name__, marks=marks.get(fn, ())) for fn in CASES]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "fn",
    some(
        [
            flipped,
            in_branches,
            carried,
            mapped,
            halves,
            with_a_block,
            mapped_over_the_stack,
            scanned_after_a_transpose,
            some_layers,
        ]
    ),
)
def test_outputs_and_gradients_are_those_of_the_dense_weight(fn, method):
    stored, dense = params_of(*CASES[fn])
    x = jnp.asarray(normal(5, 12), "float32")
    plan = plan_of(fn, stored, x, **options_of(fn), **METHODS[method])
    assert plan == plan_of(fn, dense, x, **options_of(fn), **METHODS[method])
    adapters = trained(dense, plan)
    adapters = jax.tree.map(lambda v: 0.3 * v, adapters)
    adapted = lora_jax.adapt(fn, plan, on_merge="allow")

    def loss(adapters, x, params):
        return jnp.sum(jnp.sin(adapted(params, adapters, x)))

    run = loss if fn in FORWARD_ONLY else jax.value_and_grad(loss, argnums=(0, 1))
    got, want = (jax.jit(run)(adapters, x, params) for params in (stored, dense))
    jax.tree.map(lambda g, w: assert_same(g, w, 1e-5), got, want)


@pytest.mark.parametrize(
    "fn", some([*CASES.keys() - {with_unadapted, scanned, looked_up, in_a_while_loop}])
)
def test_a_function_accepts_quantized_weights_without_adapters(fn):
    stored, dense = params_of(*CASES[fn])
    x = jnp.asarray(normal(5, 12), "float32")
    got = jax.jit(lora_jax.accept_quantized(fn))(stored, x)
    assert_same(got, fn(dense, x), 1e-5)


PARTS = {
    "entries": lambda w: lax.slice_in_dim(w, 1, 3),
    "every_second_entry": lambda w: lax.slice_in_dim(w, 0, 3, 2),
    "first_columns": lambda w: lax.slice_in_dim(w, 0, 4, axis=2),
    "last_columns": lambda w: lax.slice_in_dim(w, 4, 10, axis=2),
    "every_second_column": lambda w: lax.slice_in_dim(w, 0, 10, 2, axis=2),
    "second_half": lambda w: jnp.split(w, 2, axis=2)[1],
    "columns_at_an_index": lambda w: lax.dynamic_slice_in_dim(w, 4, 6, axis=2),
    "an_entry_of_the_transpose": lambda w: w.transpose(0, 2, 1)[1],
    "an_entry_of_the_negative": lambda w: (-w)[1],
    "entries_of_the_transpose": lambda w: lax.map(lambda v: v, w.transpose(1, 0, 2)),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_parts_of_a_stack(part):
    stored, dense = params_of({"w": (3, 12, 10)}, 1)
    got = jax.jit(lora_jax.accept_quantized(part))(stored["w"])
    assert_same(got, part(dense["w"]), 0)
    assert got.shape == part(dense["w"]).shape


@pytest.mark.parametrize("axes", [(0,), (0, 1), (2,), (1, 2)], ids=str)
def test_axes_of_a_stack_and_of_its_weights_are_squeezed(axes):
    stored, dense = params_of({"w": (1, 1, 1, 10)}, 2)
    got = lora_jax.accept_quantized(lambda w: w.squeeze(axes))(stored["w"])
    assert_same(got, dense["w"].squeeze(axes), 0)
    assert got.shape == dense["w"].squeeze(axes).shape


def test_an_entry_of_a_stack_of_two_axes():
    stored, dense = params_of({"w": (2, 3, 4, 5)}, 2)
    take = lora_jax.accept_quantized(
        lambda w, i, j: lax.dynamic_slice(w, (i, j, 0, 0), (1, 1, 4, 5))
    )
    assert_same(take(stored["w"], 0, 2)[0, 0], dense["w"][0, 2], 0)


def test_quantized_arguments_and_results_of_any_function():
    stored, dense = params_of({"w": (12, 10)})
    accepting = lora_jax.accept_quantized(lambda *args, w: (w, [w.T, *args], "text"))
    got = accepting(stored["w"], 3, w=stored["w"])
    assert_same(got[0], dense["w"], 0)
    assert_same(got[1][0], dense["w"].T, 0)
    assert_same(got[1][1], dense["w"], 0)
    assert (got[1][2], got[2]) == (3, "text")
    with pytest.raises(TypeError, match="fn must be a function, got dict"):
        lora_jax.accept_quantized(stored)


def test_params_may_be_mixed_and_need_no_adapter_to_be_quantized():
    stored, dense = params_of({"w": (12, 10), "frozen": (10, 7)})
    x = jnp.asarray(normal(5, 12), "float32")
    mixed = {"w": dense["w"], "frozen": stored["frozen"]}
    plan = plan_of(with_unadapted, mixed, x, targets="w")
    adapters = trained(mixed, plan)
    adapted = lora_jax.adapt(with_unadapted, plan)
    assert_same(adapted(mixed, adapters, x), adapted(dense, adapters, x), 1e-6)


@jax.custom_jvp
def odd(w):
    return 2.0 * w


@jax.custom_vjp
def odd_product(x, w):
    return x @ w


odd.defjvp(lambda primals, tangents: (odd(*primals), 3.0 * tangents[0]))
odd_product.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g)
)


def mesh(kind):
    return jax.make_mesh((1,), ("data",), axis_types=(kind,))


def mapped_shards(f, **options):
    def fn(w, x):
        specs = {"mesh": mesh(AxisType.Auto), "in_specs": (P("data"), P()), **options}
        return jax.shard_map(f, out_specs=P(), **specs)(w, x)

    return fn


def gathering(w, x):
    return x @ lax.all_gather(w, "data", axis=0, tiled=True)


def varying(w, x):
    if hasattr(lax, "pcast"):
        return lax.psum(x @ lax.pcast(w, ("data",), to="varying"), "data")
    return lax.psum(x @ lax.pvary(w, ("data",)), "data")


def resharded(w, x):
    return x @ jax.sharding.reshard(w, NamedSharding(mesh(AxisType.Explicit), P()))


def constrained(w, x):
    sharding = NamedSharding(mesh(AxisType.Auto), P())
    return x @ lax.with_sharding_constraint(w, sharding)


def stepped(w, x):
    return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ w), (0, x))[1]


def added(v, w):
    return jnp.sum(v * w) + 2.0 * jnp.sum(v * w)


# For each rule a function of a quantized weight that the rule is applied to.
BY_RULE = {
    "transpose": lambda w, x: x @ w.T,
    "squeeze": lambda w, x: x @ w[None][0],
    "broadcast_in_dim": lambda w, x: x[None] @ jnp.broadcast_to(w, (2, 12, 12)),
    "reshape": lambda w, x: jnp.einsum("bi,ijk->bjk", x, w.reshape(12, 3, 4)),
    "slice": lambda w, x: x @ w[:, 2:7],
    "dynamic_slice": lambda w, x: x @ lax.dynamic_slice(w, (0, 3), (12, 4)),
    "rev": lambda w, x: x @ w[::-1],
    "split": lambda w, x: [x @ v for v in jnp.split(w, 2, axis=1)],
    "unstack": lambda w, x: [x @ v for v in jnp.unstack(w.reshape(12, 2, 6), axis=1)],
    "tile": lambda w, x: x @ jnp.tile(w, (1, 2)),
    "pad": lambda w, x: x @ jnp.pad(w, ((0, 0), (1, 2))),
    "concatenate": lambda w, x: x @ jnp.concatenate([w, w], axis=1),
    "stack": lambda w, x: jnp.einsum("bi,nij->nbj", x, jnp.stack([w, 2.0 * w])),
    "convert_element_type": lambda w, x: x.astype("bfloat16") @ w.astype("bfloat16"),
    "copy": lambda w, x: x @ jnp.copy(w),
    "name": lambda w, x: x @ checkpoint_name(w, "weight"),
    "reduce_precision": lambda w, x: x @ lax.reduce_precision(w, 8, 23),
    "reshard": resharded,
    "sharding_constraint": constrained,
    "layout_constraint": lambda w, x: x @ with_layout_constraint(w, Layout((0, 1))),
    "stop_gradient": lambda w, x: x @ lax.stop_gradient(w),
    "pvary": mapped_shards(varying, in_specs=(P(), P())),
    "complex": lambda w, x: jnp.real(x.astype("complex64") @ lax.complex(w, 2.0 * w)),
    "real": lambda w, x: x @ jnp.real(w.astype("complex64")),
    "imag": lambda w, x: x @ jnp.imag(w.astype("complex64") * 2.0j),
    "conj": lambda w, x: jnp.real(
        x.astype("complex64") @ jnp.conj(w.astype("complex64") * 2j)
    ),
    "cumsum": lambda w, x: x @ jnp.cumsum(w, axis=0),
    "triangular_solve": lambda w, x: x @ solve_triangular(jnp.eye(12) * 2.0, w),
    "custom_linear_solve": lambda w, x: x @ jnp.linalg.solve(jnp.eye(12) * 2.0, w),
    "fft": lambda w, x: x @ jnp.real(jnp.fft.fft(w, axis=0)),
    "select_n": lambda w, x: x @ jnp.where(x[0, 0] > 0, w, 2.0 * w),
    "optimization_barrier": lambda w, x: x @ lax.optimization_barrier((w, x))[0],
    "device_put": lambda w, x: x @ jax.device_put(w, jax.devices()[0]),
    "neg": lambda w, x: x @ -w,
    "mul": lambda w, x: x @ (w * jnp.arange(12.0)[:, None]),
    "div": lambda w, x: x @ (w / 3.0),
    "add": lambda w, x: x @ (w + 1.0),
    "add_any": lambda w, x: x @ jax.grad(added)(jnp.zeros_like(w), w),
    "sub": lambda w, x: x @ (1.0 - w),
    "reduce_sum": lambda w, x: x + jnp.sum(w, axis=0)[None],
    "dot_general": lambda w, x: w.T @ x.T,
    "ragged_dot_general": lambda w, x: lax.ragged_dot(x, w[None], jnp.array([5])),
    "conv_general_dilated": lambda w, x: lax.conv(
        x[None, None], w.reshape(12, 1, 12, 1), (1, 1), "SAME"
    ),
    "gather": lambda w, x: w[jnp.array([3, 0, 3])] + x[:3],
    "jit": lambda w, x: jax.jit(jnp.matmul)(x, w),
    "checkpoint": lambda w, x: jax.checkpoint(jnp.matmul)(x, w),
    "custom_jvp_call": lambda w, x: x @ odd(w),
    "custom_vjp_call": lambda w, x: odd_product(x, w),
    "scan": lambda w, x: lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=2)[0],
    "while": stepped,
    "compute_on": lambda w, x: on_host_called(x, w),
    "cond": lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w.T),
    "shard_map": mapped_shards(lambda w, x: lax.psum(x @ w, "data"), in_specs=(P(), P())),
    "all_gather": mapped_shards(gathering, check_vma=False),
}
# Other names of a rule: those of other versions of JAX.
SAME_RULE = {
    "all_gather_invariant": "all_gather",
    "mesh_cast": "reshard",
    "pcast": "pvary",
    "remat2": "checkpoint",
}
# Kernels and callbacks, all of one rule, which merges: see `tests/transform/calls.py`.
OPAQUE = [name for name, rule in RULES.items() if rule is RULES["pallas_call"]]
# Primitives that no public function of every JAX gives: their equations are made by hand.
BY_HAND = {
    "closed_call": lambda jaxpr: {"call_jaxpr": jaxpr},
    "call_hi_primitive": lambda jaxpr: {"_prim": RematTraced(jaxpr)},
}
NEW_PRIMITIVES = ("stack", "tile", "unstack")  # that the oldest JAX lacks


@dataclasses.dataclass
class RematTraced:
    """What JAX calls a checkpoint where `jax_remat3` is set."""

    jaxpr: Any
    policy: Any = None
    prevent_cse: bool = True


@pytest.mark.parametrize("name", [name for name in RULES if name not in OPAQUE])
def test_every_rule_takes_a_quantized_weight(name, monkeypatch):
    if name in SAME_RULE:
        rules = [inspect.unwrap(RULES[each]) for each in (name, SAME_RULE[name])]
        assert rules[0] is rules[1]
        return
    if name == "compute_on" and not has_host_call():
        pytest.skip("this JAX has compute_on as a context only, which is no call")
    rule, calls = RULES[name], []

    def spy(context, equation, *values):
        calls.append([v for v in values if isinstance(v, Factored)])
        return rule(context, equation, *values)

    for other in (name, *(k for k, v in SAME_RULE.items() if v == name)):
        monkeypatch.setitem(RULES, other, spy)
    stored, dense = params_of({"w": (12, 12)})
    x = jnp.asarray(normal(5, 12), "float32")
    if name in BY_HAND:
        jaxpr = jax.make_jaxpr(jnp.matmul)(x, dense["w"])
        equation = types.SimpleNamespace(params=BY_HAND[name](jaxpr))
        weight = Factored(Deferred((stored["w"],)), ())
        context = Context(RULES, on_merge=pytest.fail)
        assert_same(spy(context, equation, x, weight), [x @ dense["w"]], 1e-6)
        return

    def fn(params, x):
        return BY_RULE[name](params["w"], x)  # a new rule needs a function there

    with set_mesh(mesh(AxisType.Explicit)) if name == "reshard" else nullcontext():
        got = lora_jax.accept_quantized(fn)(stored, x)
        if not calls and name in NEW_PRIMITIVES:
            pytest.skip(f"this JAX has no primitive {name}")
        assert any(calls)
        assert_same(got, fn(dense, x), 1e-5)
        plan = plan_of(None, dense, rank=2, axes={"w": "io"})  # whatever the use has
        adapters = jax.tree.map(lambda v: 0.3 * v, trained(dense, plan))
        options: Any = {"on_merge": "allow", "on_stop_gradient": "base"}
        adapted = lora_jax.adapt(fn, plan, **options)

        def loss(adapters, x, params):
            out = jax.tree.leaves(adapted(params, adapters, x))
            return sum(jnp.sum(jnp.sin(leaf.astype("float32"))) for leaf in out)

        run = loss if name == "while" else jax.value_and_grad(loss, argnums=(0, 1))
        got, want = (jax.jit(run)(adapters, x, params) for params in (stored, dense))
        assert_same(got, want, 2e-2 if name == "convert_element_type" else 1e-5)
