"""Another adapter for each row of a batch: the results are those of each adapter alone."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import lora_jax
from lora_jax.transform import _following, _tracing
from lora_jax.transform._row_places import Atom, Rows
from tests import programs
from tests.support import asarray, assert_same_bits, count_traces, draw, normal, x64
from tests.transform.cases import CASES, inputs
from tests.transform.support import assert_same, loss_of, plan_of, trained
from tests.transform.test_cases import DORA_GRADIENTS
from tests.xla_flags import WITH_NEW_EMITTERS

SLOTS = 2
SLOW = pytest.mark.slow
# Uses of a weight without an activation that has the rows.
NO_ROWS = {"integers", "vector", "summed", "stated_of_weights", "squared", "one_row"}
REFUSED = "adapt_rows|each row"
TOLERANCE = {"cast": 1e-5}


def row_axes(fn, params, args, axis, n_rows):
    """The axis with the rows in each output, None if it has none; they are followed."""
    traced = _tracing.trace(fn, params, tuple(args), {})
    places = [None] * len(traced.arguments)
    at = traced.paths.index(None)
    shape = traced.arguments[at].shape
    places[at] = Rows(
        tuple((Atom(size, 1 if i == axis else None),) for i, size in enumerate(shape))
    )
    axes = []
    for place in _following.follow(traced.jaxpr, places, n_rows).outputs:
        alone = [
            i
            for i, atoms in enumerate(getattr(place, "axes", ()))
            if len(atoms) == 1 and atoms[0].stride == 1 and atoms[0].size == n_rows
        ]
        axes.append(alone[0] if alone else None)
    return axes


def is_by_row(fn, params, args, axis, axes):
    """Whether row 1 of each output depends on row 1 of the first argument alone."""
    x, *rest = args
    other = np.moveaxis(np.array(x), axis, 0)
    other[[0, *range(2, len(other))]] += 1
    other = asarray(np.moveaxis(other, 0, axis))
    run = jax.jit(fn)
    outs = [jax.tree.leaves(run(params, given, *rest)) for given in (x, other)]
    outs = [list(map(np.asarray, out)) for out in outs]
    return all(
        at is not None and np.allclose(a.take(1, at), b.take(1, at), 1e-12)
        for a, b, at in zip(*outs, axes, strict=True)
    )


def of_own_rows(fn, model, slots, axes):
    """For each row the result of its adapter alone, run on the whole batch."""

    def run(params, tenants, *args):
        outs = [jax.tree.leaves(model(params, own, *args)) for own in tenants]
        frozen = jax.tree.leaves(fn(params, *args))
        total = []
        for k, axis in enumerate(axes):
            own = slots.reshape([-1 if i == axis else 1 for i in range(frozen[k].ndim)])
            total.append(jnp.where(own == -1, frozen[k], 0))
            for slot, out in enumerate(outs):
                total[-1] += jnp.where(own == slot, out[k], 0)
        return total

    return run


def steps_of(rows, alone, wrt):
    """Compiled functions of values and gradients, of `rows` and of `alone`."""

    def loss(f, own, params, *args):
        return loss_of(functools.partial(f, params))(own, *args)

    def of_rows(params, stack, slots, *args):
        f = lambda p, s, *x: rows(p, s, slots, *x)  # noqa: E731
        step = jax.value_and_grad(functools.partial(loss, f), (0, *wrt), has_aux=True)
        value, (gradient, *others) = step(stack, params, *args)
        return value, gradient.adapters, others

    def of_tenants(params, tenants, *args):
        step = jax.value_and_grad(functools.partial(loss, alone), (0, *wrt), has_aux=True)
        value, (gradients, *others) = step(tenants, params, *args)
        return value, jax.tree.map(lambda *own: jnp.stack(own), *gradients), others

    # XLA's former emitters cannot compile some of these.
    return jax.jit(of_rows, compiler_options=WITH_NEW_EMITTERS), jax.jit(of_tenants)


# One of each kind of product with DoRA, whose columns go the same ways in the others.
COLUMNS = {
    *("matmul", "heads", "experts", "ragged_dot", "scan", "tied_head", "conv", "attention"),
    *("stated_groups", "stated_rounding"),
}
PAIRS = [
    *((name, "lora") for name in sorted(DORA_GRADIENTS)),
    *((name, "dora") for name in sorted(COLUMNS)),
    *(pytest.param(n, "dora", marks=SLOW) for n in sorted(DORA_GRADIENTS - COLUMNS)),
    *(pytest.param(n, "lora", marks=SLOW) for n in CASES if n not in DORA_GRADIENTS),
]


@pytest.mark.mostly_slow(12)
@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_each_row_has_its_own_adapter(name, method):
    case = CASES[name]
    with x64():
        params, args = inputs(case)
        plan = plan_of(case.fn, params, *args, **case.config, use_dora=method == "dora")
        params = jax.tree.map(jnp.asarray, params)
        tenants = [trained(params, plan, seed=i) for i in range(SLOTS)]
        stack, own_plan = lora_jax.stack_adapters(tenants, plan)
        ran = 0
        for axis, n_rows in enumerate(args[0].shape):
            axes = row_axes(case.fn, params, args, axis, n_rows)
            in_axes = (axis, *[None] * (len(args) - 1))
            rows = lora_jax.adapt_rows(case.fn, own_plan, in_axes, **case.options)
            slots = jnp.arange(n_rows) % (SLOTS + 1) - 1
            if n_rows == 1:
                continue
            by_row = None not in axes and is_by_row(case.fn, params, args, axis, axes)
            model = lora_jax.adapt(case.fn, plan, **case.options)
            if by_row:
                wrt = (2,) if jnp.issubdtype(args[0].dtype, jnp.inexact) else ()
                alone = of_own_rows(case.fn, model, slots, axes)
                run, want = steps_of(rows, alone, wrt)
                own = tenants
            else:  # then all rows have one adapter
                run, want = jax.jit(rows), jax.jit(model)
                slots, own = jnp.full(n_rows, 1), tenants[1]
            try:
                got = run(params, stack, slots, *args)
            except ValueError as error:
                if (by_row and name not in NO_ROWS) or not re.search(REFUSED, str(error)):
                    raise
                continue
            ran += 1
            want = want(params, own, *args)
            assert_same(got, want, tolerance=TOLERANCE.get(name, 1e-10))
        assert ran or name in NO_ROWS


WIDTH, HIDDEN, VOCABULARY = 12, 10, 20
X = normal(6, 5, WIDTH)
TOKENS = np.arange(18, dtype="int32").reshape(6, 3) * 7 % VOCABULARY


def layers(p, x):
    def layer(x, w):
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    return lax.scan(jax.checkpoint(layer), x, p)[0]


STACK = {"up": (3, WIDTH, HIDDEN), "down": (3, HIDDEN, WIDTH)}


def folded(p, x):
    """Tokens of all rows in one axis, and a scan over groups of rows."""
    flat = jnp.tanh(x.reshape(-1, WIDTH) @ p["up"][0])
    x = x + (flat @ p["down"][0]).reshape(x.shape)
    return lax.map(lambda rows: layers(p, rows), x.reshape(3, 2, *x.shape[1:])).reshape(
        x.shape
    )


def recurrent(p, x):
    def step(h, x):
        h = jnp.tanh(x @ p["in"] + h @ p["hidden"])
        return h, h

    start = jnp.zeros((len(x), WIDTH), x.dtype)
    end, states = lax.scan(step, start, x.swapaxes(0, 1))
    return states.swapaxes(0, 1), end


def _experts(p, x):
    flat = x.reshape(-1, WIDTH)
    return flat, jnp.argmax(flat @ lax.stop_gradient(p["router"]), -1)


def sorted_experts(p, x):
    flat, expert = _experts(p, x)
    order = jnp.argsort(expert)
    sizes = jnp.sum(expert[:, None] == jnp.arange(4)[None], 0, dtype="int32")
    hidden = jnp.tanh(lax.ragged_dot(jnp.take(flat, order, axis=0), p["w"], sizes))
    y = lax.ragged_dot(hidden, p["v"], sizes)[jnp.argsort(order)]
    return (x + y.reshape(x.shape)) @ p["out"]


def experts_by_token(p, x):
    flat, expert = _experts(p, x)
    hidden = jnp.tanh(jnp.einsum("td,tdf->tf", flat, p["w"][expert]))
    return x + jnp.einsum("tf,tfd->td", hidden, p["v"][expert]).reshape(x.shape)


EXPERTS = {
    "router": (WIDTH, 4),
    "w": (4, WIDTH, HIDDEN),
    "v": (4, HIDDEN, WIDTH),
    "out": (WIDTH, WIDTH),
}


def decode(p, prompt):
    """Generates greedily: a tied embedding, and a cache of keys and values in a loop."""
    (rows, start), length = prompt.shape, 6
    tokens = jnp.zeros((rows, length), "int32").at[:, :start].set(prompt)
    cache = jnp.zeros((2, rows, length, WIDTH), p["embed"].dtype)

    def step(state):
        i, tokens, cache, _ = state
        x = p["embed"][lax.dynamic_index_in_dim(tokens, i, 1, keepdims=False)]
        new = jnp.stack([x @ p["key"], x @ p["value"]])[:, :, None]
        cache = lax.dynamic_update_slice(cache, new, (0, 0, i, 0))
        scores = jnp.einsum("bd,btd->bt", x @ p["query"], cache[0])
        scores = jnp.where(jnp.arange(length)[None] <= i, scores, -jnp.inf)
        x += jnp.einsum("bt,btd->bd", jax.nn.softmax(scores), cache[1])
        logits = x @ p["embed"].T
        follows = jnp.minimum(i + 1, length - 1)
        given = lax.dynamic_index_in_dim(tokens, follows, 1, keepdims=False)
        made = jnp.argmax(logits, -1).astype("int32")
        token = jnp.where(i + 1 < start, given, made)
        return (
            i + 1,
            lax.dynamic_update_index_in_dim(tokens, token, follows, 1),
            cache,
            logits,
        )

    logits = jnp.zeros((rows, VOCABULARY), p["embed"].dtype)
    _, tokens, _, logits = lax.while_loop(
        lambda state: state[0] < length, step, (0, tokens, cache, logits)
    )
    return tokens, logits


SQUARE = (WIDTH, WIDTH)
MODELS = {
    "scan": (layers, STACK, X, {}),
    "folded": (folded, STACK, X, {}),
    "recurrent": (recurrent, {"in": SQUARE, "hidden": SQUARE}, X, {}),
    "sorted_experts": (sorted_experts, EXPERTS, X, {"targets": ("w", "v", "out")}),
    "experts_by_token": (experts_by_token, EXPERTS, X, {"targets": ("w", "v")}),
    "decode": (
        decode,
        {"embed": (VOCABULARY, WIDTH), "key": SQUARE, "query": SQUARE, "value": SQUARE},
        TOKENS[:, :3],
        {"targets": "*"},
    ),
}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("scan", "int8"), ("scan", "lora"), ("decode", "lora")),
        *((name, "mixed") for name in MODELS),  # of which most slots have LoRA
        *(
            pytest.param(name, "lora", marks=SLOW)
            for name in MODELS
            if name not in ("scan", "decode")
        ),
    ],
)
def test_models_equal_each_row_alone(name, method):
    """Ranks, scales and methods differ between slots."""
    fn, shapes, x, config = MODELS[name]
    with x64():
        dtype = "float32" if method == "int8" else "float64"
        params = {
            k: draw(*shape, dtype=dtype, seed=7, size=0.5) for k, shape in shapes.items()
        }
        x = asarray(x, dtype if np.issubdtype(x.dtype, np.floating) else x.dtype)
        if method == "int8":
            params = lora_jax.quantize_params(params, "*", "int8", batch_axes={"*": 1})
        plans = [
            plan_of(fn, params, x, **config, rank=i + 2, alpha=5.0, use_dora=use)
            for i, use in enumerate([False, method == "mixed", False])
        ]
        tenants = [trained(params, plan, i, size=0.3) for i, plan in enumerate(plans)]
        stack, plan = lora_jax.stack_adapters(tenants, plans, slots=5)
        slots = jnp.array([1, 0, -1, 2, 4, 1])  # 4 is empty
        got = jax.jit(lora_jax.adapt_rows(fn, plan))(params, stack, slots, x)
        frozen = jax.jit(lora_jax.accept_quantized(fn))
        models = [jax.jit(lora_jax.adapt(fn, plan)) for plan in plans]
        for row, slot in enumerate(slots.tolist()):
            # Six times the row, for a model that scans over groups of rows.
            alone = asarray(np.broadcast_to(np.asarray(x)[row], x.shape))
            want = (
                models[slot](params, tenants[slot], alone)
                if slot in (0, 1, 2)
                else frozen(params, alone)
            )
            of_row = lambda v, row=row: np.asarray(v)[row]  # noqa: E731
            pair = jax.tree.map(of_row, (got, want))
            assert_same(*pair, tolerance=1e-5 if method == "int8" else 1e-12)
        if "dora" in {target.method for target in plan.targets.values()}:
            norms = lora_jax.stacked_column_norms(params, stack, plan)
            model = lora_jax.adapt_rows(fn, plan, column_norms=norms)
            assert_same(jax.jit(model)(params, stack, slots, x), got)


@pytest.mark.parametrize(  # gathered, dense
    ("length", "factor"), [(5, "A"), (1, "A"), (1, "B")]
)
def test_a_slot_that_diverged_reaches_no_other_row(length, factor):
    """Nor does a slot out of range; -1 is the base, bit for bit."""
    params = {k: draw(*s) for k, s in STACK.items()}
    x = draw(4, length, WIDTH)
    plan = plan_of(layers, params, x)
    own = trained(params, plan)
    bad = {
        path: {**factors, factor: jnp.full_like(factors[factor], jnp.nan)}
        for path, factors in own.items()
    }
    stack, plan = lora_jax.stack_adapters([own, bad, own], plan)
    model = lora_jax.adapt_rows(layers, plan)
    slots = np.array([0, 2, -1, 0])

    def loss(stack, x, slots):
        y = model(params, stack, slots, x)
        return jnp.sum(y[:3]), y

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, y), grads = step(stack, x, slots)
    y = np.asarray(y)
    assert all(np.isfinite(v).all() for v in (y, *jax.tree.leaves(grads)))
    base = jax.jit(layers)(params, x)
    for own in (jax.jit(model)(params, stack, slots, x), y):
        assert_same_bits(np.asarray(own)[2], np.asarray(base)[2])
    for many in (np.int64(2**32), np.uint32(2**32 - 1), np.uint8(255)):
        assert np.isnan(model(params, stack, np.full(4, many), x)).all()  # jit cuts digits
    for wrong in (1, 3, 2**20, -2):
        (_, other), _ = step(stack, x, np.array([0, 2, -1, wrong]))
        assert np.isnan(other[3]).all()
        assert_same_bits(np.asarray(other)[:3], y[:3])


@pytest.mark.parametrize(
    ("slots", "rows", "length", "is_dense"), [(9, 10, 1, True), (5, 6, 2, False)]
)
def test_factors_are_copied_for_each_row_unless_there_are_few_tokens(
    slots, rows, length, is_dense
):
    """On both sides of the bound that the docstring of `adapt_rows` states."""
    params, x = {"w": jnp.ones(SQUARE)}, jnp.ones((rows, length, WIDTH))
    plan = plan_of(lambda p, x: x @ p["w"], params, x)
    stack, plan = lora_jax.stack_adapters([trained(params, plan)] * slots, plan)
    model = lora_jax.adapt_rows(lambda p, x: x @ p["w"], plan)
    program = str(jax.make_jaxpr(model)(params, stack, jnp.zeros(rows, "int32"), x))
    assert (f"f32[{rows},{WIDTH},3]" in program) != is_dense


def _one_weight_both_ways(p, x):
    return p["w"][jnp.argmax(x, axis=-1)] + x @ p["w"]


def _inputs_in_another_order(p, x):
    order = jnp.arange(WIDTH)[::-1]
    return x[..., order] @ p["w"][order]


@jax.jit
def _twice_and_taken(x, y, order):
    return 2 * x, jnp.take(y, order, axis=0)


def _returns_two_orders(p, x):
    """A call with rows in its own order, and with rows in one that no rule follows."""
    order = jnp.argsort(x[:, 0, 0])
    taken = jax.checkpoint(lambda x: jnp.take(x, order, axis=0))(x)
    _, y = _twice_and_taken(taken, x, order)
    return (y @ p["w"])[jnp.argsort(order)]


def _constant_flags(p, x):
    with jax.ensure_compile_time_eval():
        flags = jnp.arange(WIDTH) % 2 == 0
    return jnp.where(flags, x, 0) @ p["w"]


@pytest.mark.parametrize(
    ("fn", "rows"),
    [
        (_one_weight_both_ways, 1),
        (_inputs_in_another_order, 2),
        (_returns_two_orders, 4),
        (_constant_flags, 2),
    ],
)
def test_functions_equal_each_row_alone(fn, rows):
    params, x = {"w": draw(*SQUARE)}, asarray(X[:rows], "float32")
    slots = np.array([1, 0, 1, 0])[:rows]
    plan = plan_of(fn, params, x)
    tenants = [trained(params, plan, seed=i) for i in range(2)]
    stack, of_stack = lora_jax.stack_adapters(tenants, plan)

    @jax.jit
    def both(params, stack, tenants, x):
        alone = jnp.stack([lora_jax.adapt(fn, plan)(params, own, x) for own in tenants])
        got = lora_jax.adapt_rows(fn, of_stack)(params, stack, slots, x)
        return got, alone[slots, np.arange(rows)]

    assert_same(*both(params, stack, tenants, x), 1e-5)


def test_one_compilation_for_any_traffic():
    params = {k: draw(*s) for k, s in STACK.items()}
    plan = plan_of(layers, params, X)
    stack, plan = lora_jax.stack_adapters([trained(params, plan)] * 3, plan)
    with count_traces(lora_jax.adapt_rows(layers, plan)) as (run, traces):
        for slots in ([0] * 6, [2, 1, 0, -1, 2, 1], [7, -3, 0, 0, 0, 0]):
            run(params, stack, np.array(slots), asarray(X, "float32"))
        assert len(traces) == 1


def test_scales_and_magnitudes_are_not_trained():
    params = {k: draw(*s) for k, s in STACK.items()}
    x = asarray(X, "float32")
    plan = plan_of(layers, params, x, use_dora=True)
    stack, plan = lora_jax.stack_adapters([trained(params, plan)] * 2, plan)
    model, slots = lora_jax.adapt_rows(layers, plan), np.array([0, 1, 0, 1, -1, 0])
    loss = lambda stack: jnp.sum(model(params, stack, slots, x))  # noqa: E731
    grads = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(stack))
    assert not any(g.any() for g in jax.tree.leaves((grads.scales, grads.magnitudes)))
    assert all(g.any() for g in jax.tree.leaves(grads.adapters))


def test_rows_have_different_dropout_masks():
    params = {k: draw(*s) for k, s in STACK.items()}
    x = asarray(np.broadcast_to(X[:1], X.shape), "float32")
    plan = plan_of(layers, params, x, dropout=0.5)
    stack, plan = lora_jax.stack_adapters([trained(params, plan)], plan)
    model = lora_jax.adapt_rows(layers, plan, dropout_key=jax.random.key(0))
    y = np.asarray(jax.jit(model)(params, stack, np.array([0, 0, 0, 0, 0, -1]), x))
    assert len(np.unique(y, axis=0)) == len(X)
    assert_same_bits(y[5], np.asarray(jax.jit(layers)(params, x))[5])


def _sums_over_rows(p, x):
    return x.T @ p["w"][:4]


def _loses_rows(p, x):
    return jnp.sort(x, axis=0) @ p["w"]


W = {"w": SQUARE}
ERRORS = {
    "one slot too few": (
        lambda f, p, s, x: f(p, s, jnp.zeros(3, int), x),
        ValueError,
        r"args\[0\] has the shape \(4, 12\), and its axis 0 must have the 3 rows of slots",
    ),
    "slots are floats": (
        lambda f, p, s, x: f(p, s, jnp.zeros(4), x),
        TypeError,
        "slots must be integers, got float32",
    ),
    "a scalar slot": (
        lambda f, p, s, x: f(p, s, jnp.array(1), x),
        ValueError,
        r"slots must be \(rows,\), .* got the shape \(\)",
    ),
    "a symbolic number of rows": (
        lambda f, p, s, x: export.export(jax.jit(f))(
            p, s, jax.ShapeDtypeStruct(export.symbolic_shape("rows"), "int32"), x
        ),
        ValueError,
        r"slots has the symbolic shape \(rows,\): the number of rows must be known",
    ),
    "no slots": (lambda f, p, s, x: f(p, s, None, x), TypeError, "got NoneType"),
    "adapters instead of a stack": (
        lambda f, p, s, x: f(p, s.adapters, jnp.zeros(4, int), x),
        TypeError,
        "stack must be an AdapterStack",
    ),
    "another stack": (
        lambda f, p, s, x: f(p, dataclasses.replace(s, adapters={}), jnp.zeros(4, int), x),
        ValueError,
        "stack.adapters must be a dict",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_arguments(name):
    call, kind, text = ERRORS[name]
    params, x = {"w": jnp.ones(SQUARE)}, jnp.ones((4, WIDTH))
    plan = plan_of(lambda p, x: x @ p["w"], params, x)
    stack, plan = lora_jax.stack_adapters([trained(params, plan)], plan)
    model = lora_jax.adapt_rows(lambda p, x: x @ p["w"], plan)
    with pytest.raises(kind, match=text):
        call(model, params, stack, x)


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (_sums_over_rows, "and it sums over the rows"),
        (_loses_rows, "the rows of its other operand are lost: `sort` .*test_rows.py"),
        (lambda p, x: x.mean(0) @ p["w"], "is the same for all rows, or mixes them"),
        (lambda p, x: x + jnp.tanh(p["w"])[:1], "each row would have its own"),
        (lambda p, x: (x @ p["w"], p["w"]), "the function returns it"),
    ],
)
def test_uses_without_rows_are_errors(fn, text):
    params, x = {"w": jnp.ones(SQUARE)}, jnp.ones((4, WIDTH))
    plan = plan_of(lambda p, x: x @ p["w"], params, x)
    stack, plan = lora_jax.stack_adapters([trained(params, plan)], plan)
    model = lora_jax.adapt_rows(fn, plan)
    with pytest.raises(ValueError, match=text):
        model(params, stack, jnp.zeros(4, "int32"), x)


@pytest.mark.parametrize(
    ("in_axes", "text"),
    [
        ((0,), "in_axes has 1 entries, and there are 2 arguments"),
        ((0, 1.5), r"in_axes has 1.5 for args\[1\]"),
        ((0, True), r"in_axes has True for args\[1\]"),
        ((0, 2), r"in_axes has 2 for args\[1\]"),
        (({"a": 0}, 0), "in_axes is not a prefix"),
    ],
)
def test_bad_in_axes(in_axes, text):
    params, x = {"w": jnp.ones(SQUARE)}, jnp.ones((4, WIDTH))
    plan = plan_of(lambda p, x: x @ p["w"], params, x)
    stack, plan = lora_jax.stack_adapters([trained(params, plan)], plan)
    model = lora_jax.adapt_rows(lambda p, x, z: x @ p["w"] + z, plan, in_axes)
    with pytest.raises(ValueError, match=text):
        model(params, stack, jnp.zeros(4, "int32"), x, x)


def test_a_quantized_argument_has_one_entry_in_in_axes():
    quantized = lora_jax.quant.quantize_int8(jnp.ones(SQUARE))
    params, x = {"w": jnp.ones(SQUARE)}, jnp.ones((4, WIDTH))
    args = params, x, quantized, x
    fn = lambda p, x, q, y: x @ p["w"] @ q + y  # noqa: E731
    plan = plan_of(fn, *args)
    stack, of_stack = lora_jax.stack_adapters([trained(params, plan)], plan)
    model = lora_jax.adapt_rows(fn, of_stack, (0, None, 0))
    out = jax.eval_shape(model, params, stack, jnp.zeros(4, "int32"), *args[1:])
    assert out.shape == x.shape


def test_bad_functions_and_plans():
    params, x = {"w": jnp.ones(SQUARE)}, jnp.ones((4, WIDTH))
    plan = plan_of(lambda p, x: x @ p["w"], params, x)
    with pytest.raises(TypeError, match=r"the order is adapt_rows\(fn, plan\)"):
        lora_jax.adapt_rows(plan, lambda p, x: x)
    with pytest.raises(ValueError, match="on_unused"):
        lora_jax.adapt_rows(lambda p, x: x, plan, on_unused="no")
    whole = plan_of(lambda p, x: x @ p["w"] * p["b"], {**params, "b": x[:1]}, x, train="b")
    with pytest.raises(ValueError, match="trains the leaves 'b'"):
        lora_jax.adapt_rows(lambda p, x: x, whole)


FEATURES, RANK, TENANTS = 512, 16, 8


def step_with(model, adapters, x, *rest):
    """A compiled training step of two layers inside of a larger model."""
    weight = jax.ShapeDtypeStruct((FEATURES, FEATURES), "float32")
    params = {"down": weight, "up": weight}

    def loss(adapters, x, params, *rest):
        return jnp.sum(jnp.sin(model(params, adapters, *rest, x)))

    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return step.lower(adapters, x, params, *rest).compile(WITH_NEW_EMITTERS)


def two_layers(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def by_one_hot(params, stack, slots, x):
    """All tokens times the factors of all slots, of which a one-hot vector keeps one."""
    own = jax.nn.one_hot(slots, TENANTS)

    def product(x, path):
        a, b = stack.adapters[path]["A"], stack.adapters[path]["B"]
        down = jnp.einsum("btd,sdr->btsr", x, a)
        down = down * (own * stack.scales[path][None])[:, None, :, None]
        return x @ params[path] + jnp.einsum("btsr,srf->btf", down, b)

    return product(jnp.tanh(product(x, "up")), "down")


@pytest.mark.parametrize(("method", "length"), [("lora", 128), ("dora", 256)])
def test_a_step_costs_what_it_costs_with_one_adapter(method, length):
    """But for the norms of DoRA, which are computed for each slot.

    They are `slots * rank / (2 * tokens)` of the products of a step.
    """
    params = {path: jnp.zeros((FEATURES, FEATURES)) for path in ("down", "up")}
    x = jax.ShapeDtypeStruct((TENANTS, length, FEATURES), "float32")
    slots = jax.ShapeDtypeStruct((TENANTS,), "int32")
    plan = plan_of(two_layers, params, x, rank=RANK, use_dora=method == "dora")
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    stack, of_stack = lora_jax.stack_adapters([adapters] * TENANTS, plan)
    one = step_with(lora_jax.adapt(two_layers, plan), adapters, x)
    rows = step_with(lora_jax.adapt_rows(two_layers, of_stack), stack, x, slots)

    def products(compiled):  # the branch of norms that cancel does not run
        return programs.product_flops(compiled.as_text(), branches=False)

    if method == "lora":
        assert products(rows) == products(one)
        assert programs.flops(rows) <= 1.02 * programs.flops(one)
        one_hot = step_with(by_one_hot, stack, x, slots)
        assert products(rows) <= 0.7 * products(one_hot)
        frozen = 8 * TENANTS * length * FEATURES**2
        assert (products(rows) - frozen) * TENANTS == products(one_hot) - frozen
        return
    # `A^T W`, `A^T A` and its product with `B`, for both weights.
    more = 2 * (TENANTS - 1) * (2 * RANK * FEATURES**2 + 4 * RANK**2 * FEATURES)
    assert products(rows) == products(one) + more
    # XLA counts the body of the loop over slots once; it squares the weights as well.
    more += 2 * (TENANTS - 1) * 2 * FEATURES**2
    assert programs.flops(rows) + more <= 1.05 * programs.flops(one)
