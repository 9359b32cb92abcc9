"""`adapt` on quantized weights, against the same weights dense."""

import dataclasses
import inspect
import math
import types
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.scipy.linalg import solve_triangular
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import quant
from lora_jax.transform._context import Context
from lora_jax.transform._deferred import Deferred
from lora_jax.transform._factored import Factored
from lora_jax.transform._rules import RULES
from tests import programs, toy_format
from tests.support import asarray, normal, set_mesh, x64
from tests.transform.calls import has_host_call, on_host_called
from tests.transform.cases import CASES, NO_DORA, Case, inputs, while_loop
from tests.transform.support import assert_same, loss_of, plan_of, trained


def _some_layers(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"][1:])[0]


def _indexed(p, x):
    def step(i, h):
        return jnp.tanh(h @ lax.dynamic_index_in_dim(p["w"], i, keepdims=False))

    return lax.fori_loop(0, 3, step, x)


def _scanned_in_bfloat16(p, x):
    def step(h, w):
        return jnp.tanh((h.astype("bfloat16") @ w).astype(x.dtype)), None

    return lax.scan(step, x, p["w"].astype("bfloat16"))[0]


STACK = {"w": (3, 12, 12)}
MORE = {
    "while": Case(while_loop, {"w": (12, 12)}, ((5, 12),), {"w": "io"}),
    "some_layers": Case(_some_layers, STACK, ((5, 12),), {"w": "bio"}),
    "indexed_in_a_loop": Case(_indexed, STACK, ((5, 12),), {"w": "bio"}),
    "scanned_in_bfloat16": Case(_scanned_in_bfloat16, STACK, ((5, 12),), {"w": "bio"}),
}
FORWARD_ONLY = ("while",)
METHODS = {"lora": {}, "dora": {"use_dora": True}}
# What is chosen, solved, split, or scanned after a move is dense, and kept so.
KEPT = {
    *("where_zeros", "where_columns", "branch_chooses", "branch_of_zeros"),
    *("branches_of_two", "solved", "solved_by_cholesky", "summed_up", "conv_grouped"),
    *("conv_depthwise", "scan_moved", "scan_of_casts"),
    # A function that rounds a weight returns a dense one; of two weights one is merged.
    *("stated_rounding", "stated_of_weights", "squared"),
}
KEPT_BY_DORA = {"attention"}  # the norms of three weights of one shape are one function
# The others go the same ways through the deferred weight.
QUICK = (
    *("matmul", "heads", "cast", "scaled", "fused_with_frozen", "padded", "embedding"),
    *("checkpoint", "conv", "scan", "layer_by_number", *MORE),
)


dequantize = jax.jit(quant.dequantize)


def quantized(params, **stack_ndim):
    """Params of which some are quantized, and the dense ones that they stand for."""
    stored = {n: toy_format.quantize(params[n], stack_ndim[n]) for n in stack_ndim}
    return params | stored, params | {n: dequantize(w) for n, w in stored.items()}


def params_of(shapes, stack_ndim=0):
    params = {k: normal(*shape, dtype="float32") / 3 for k, shape in shapes.items()}
    return quantized(params, **dict.fromkeys(shapes, stack_ndim))


def prepared(case, **config):
    """Quantized and dense params, arguments, the plan, and adapters of a case."""
    params, args = inputs(case)
    frozen = {"f": "io"} if "f" in params else {}
    stacks = {
        name: len(axes) - len(axes.lstrip("b"))
        for name, axes in (case.axes | frozen).items()
    }
    stored, dense = quantized({k: v / 3 for k, v in params.items()}, **stacks)
    plan = plan_of(case.fn, stored, *args, **case.config, **config)
    assert plan == plan_of(case.fn, dense, *args, **case.config, **config)
    adapters = trained(dense, plan, size=0.3)
    return stored, dense, args, plan, adapters


@pytest.mark.mostly_slow(15)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in (*MORE, *CASES)],
)
def test_a_quantized_weight_is_the_dense_one(name, method):
    """Outputs and gradients agree, also without adapters; no dense weight is kept."""
    if method == "dora" and name in NO_DORA:
        pytest.skip("refused: test_rules.py has the errors")
    case = (MORE | CASES)[name]
    with x64():
        stored, dense, args, plan, adapters = prepared(case, **METHODS[method])
        accepting = lora_jax.accept_quantized(case.fn)
        adapted = lora_jax.adapt(case.fn, plan, **case.options)
        moving = {i: v for i, v in enumerate(args) if v.dtype == "float64"}

        def loss(trained, params):
            adapters, moving = trained
            return adapted(
                params, adapters, *(moving.get(i, v) for i, v in enumerate(args))
            )

        run = loss_of(loss)
        if name not in FORWARD_ONLY:
            run = jax.value_and_grad(run, has_aux=True)
            kept = programs.kept(loss, (adapters, moving), stored)
            found = programs.are_weights(programs.floats(kept), plan)
            assert not found or name in KEPT | (KEPT_BY_DORA if method == "dora" else set())
            kept = programs.kept(loss, (adapters, moving), dense)
            telling = name in ("matmul", "heads", "scan", "checkpoint", "conv")
            assert programs.are_weights(programs.floats(kept), plan) or not telling

        def both(trained, stored, dense, *args):  # one program
            got = accepting(stored, *args), run(trained, stored)
            return got, (case.fn(dense, *args), run(trained, dense))

        given = (adapters, moving), stored, dense
        assert_same(*jax.jit(both)(*given, *args), 1e-6)


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
    both = jax.jit(lambda w, v: (lora_jax.accept_quantized(part)(w), part(v)))
    got, want = both(stored["w"], dense["w"])
    assert_same(got, want, 0)
    assert got.shape == want.shape


@pytest.mark.parametrize("axes", [(0,), (0, 1), (2,), (1, 2)], ids=str)
def test_axes_of_a_stack_and_of_its_weights_are_squeezed(axes):
    stored, dense = params_of({"w": (1, 1, 1, 10)}, 2)
    got = lora_jax.accept_quantized(lambda w: w.squeeze(axes))(stored["w"])
    want = np.squeeze(dense["w"], axes)
    assert_same(got, want, 0)
    assert got.shape == want.shape


def test_an_entry_of_a_stack_of_two_axes():
    stored, dense = params_of({"w": (2, 3, 4, 5)}, 2)
    take = lora_jax.accept_quantized(
        lambda w, i, j: lax.dynamic_slice(w, (i, j, 0, 0), (1, 1, 4, 5))
    )
    got = take(stored["w"], 0, 2)
    assert_same(got, np.asarray(dense["w"])[:1, 2:], 0)


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
REFUSED = [inspect.unwrap(RULES[name]) for name in ("pallas_call", "pure_callback")]
OPAQUE = [name for name, rule in RULES.items() if inspect.unwrap(rule) in REFUSED]
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


@pytest.mark.mostly_slow(30)
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
    x = asarray(normal(5, 12), "float32")
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
        plan = plan_of(None, dense, rank=2, axes={"w": "io"})  # whatever the use has
        adapters = trained(dense, plan, size=0.3)
        options: Any = {"on_merge": "allow", "on_stop_gradient": "base"}
        adapted = lora_jax.adapt(fn, plan, **options)

        def loss(adapters, x, params):
            out = jax.tree.leaves(adapted(params, adapters, x))
            return sum(jnp.sum(jnp.sin(leaf.astype("float32"))) for leaf in out)

        run = loss if name == "while" else jax.value_and_grad(loss, argnums=(0, 1))

        @jax.jit
        def both(stored, dense):  # one program
            got = lora_jax.accept_quantized(fn)(stored, x)
            if not calls and name in NEW_PRIMITIVES:
                pytest.skip(f"this JAX has no primitive {name}")
            assert any(calls)
            values = got, fn(dense, x)
            return values, [run(adapters, x, params) for params in (stored, dense)]

        values, gradients = both(stored, dense)
        assert_same(*values, 1e-5)
        assert_same(*gradients, 2e-2 if name == "convert_element_type" else 1e-5)


# What is computed

TAKEN = {
    "index": lambda w: w[1][2],
    "slice": lambda w: lax.slice_in_dim(w[1], 1, 2),
    "squeezed": lambda w: lax.squeeze(lax.slice_in_dim(w[1], 1, 2), [0]),
    "dynamic": lambda w: lax.dynamic_index_in_dim(w[1], 1, keepdims=False),
    "of a cast": lambda w: -w.astype("bfloat16")[1, 2],
    "of what was negated": lambda w: lax.dynamic_slice_in_dim(-w[1], 1, 1),
    "cast": lambda w: lax.scan(lambda c, v: (c, v[0]), 0, w[1].astype("bfloat16"))[1],
}


@pytest.mark.parametrize("take", TAKEN.values(), ids=TAKEN)
def test_an_entry_of_a_stack_is_taken_from_what_is_stored(take):
    stored, _ = params_of({"w": (2, 3, 12, 10)}, 2)
    jaxpr = jax.make_jaxpr(lora_jax.accept_quantized(take))(stored["w"])
    found = {math.prod(shape) for shape in programs.float_shapes(jaxpr)}
    assert 12 * 10 in found
    assert 3 * 12 * 10 not in found


def test_one_function_serves_all_layers_with_quantized_weights():
    stored, _, args, plan, adapters = prepared(CASES["jitted_blocks"])
    adapted = lora_jax.adapt(CASES["jitted_blocks"].fn, plan)
    text = jax.jit(adapted).lower(stored, adapters, *args).as_text()
    assert text.count("func.func private @block") == 1


def test_gradients_stop_at_what_is_stored():
    case = CASES["matmul"]
    stored, _, args, plan, adapters = prepared(case)
    weight, adapted = stored["w"], lora_jax.adapt(case.fn, plan)

    def loss(scale):
        changed = dataclasses.replace(weight, scale=scale)
        return jnp.sum(adapted({"w": changed}, adapters, *args))

    assert not np.any(jax.jit(jax.grad(loss))(weight.scale))
