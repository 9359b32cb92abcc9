"""Calls and effects beside adapted weights, and in their way."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests import toy_format
from tests.support import asarray, normal, x64
from tests.transform.calls import CALLS, ROWS, WIDTH
from tests.transform.support import assert_same, both, loss_of, merged, plan_of, trained

X = normal(ROWS, WIDTH)
PARAMS = {name: normal(WIDTH, WIDTH, seed=i) / 3 for i, name in enumerate(("w", "v"), 1)}
FROZEN = normal(WIDTH, WIDTH, seed=3) / 3


def beside(call):
    """A function of which no adapted weight reaches the call."""

    def fn(params, x):
        out = call.fn(x @ params["w"], asarray(FROZEN, x.dtype))
        total = sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out))
        return out, total * (x @ params["v"])

    return fn


def reached(call):
    """A function of which the weight `w` reaches the call."""
    return lambda params, x: call.fn(x @ params["v"], params["w"])


def call_of(name):
    call = CALLS[name]
    try:
        operator.attrgetter(call.needs or "jit")(jax)
    except AttributeError:
        pytest.skip(f"JAX {jax.__version__} has no jax.{call.needs}")
    return call


def jitted(function):
    return jax.jit(lambda *args: function(*args))


# JAX 0.7 says so of every pmap inside a jit.
pytestmark = pytest.mark.filterwarnings("ignore:.*includes a pmap:UserWarning")

EVERY = pytest.mark.parametrize("name", CALLS)
PLACES = pytest.mark.parametrize("place", [beside, reached], ids=["beside", "reached"])
# A call that no weight reaches is bound unchanged, whatever is around it. The first test
# shows it, so other tests of such calls are slow.
MOST_PLACES = pytest.mark.parametrize(
    "place",
    [pytest.param(beside, marks=pytest.mark.slow), reached],
    ids=["beside", "reached"],
)


def prepared(fn, call, place):
    """Params, plan and adapters; where no weight reaches the call, the plan is found."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    if place is beside:
        plan = plan_of(fn, params, X)
        assert {path: target.axes for path, target in plan.targets.items()} == {
            "w": "io",
            "v": "io",
        }
    else:
        plan = plan_of(None, params, axes={"w": "io", "v": "io"})
    return params, plan, trained(params, plan)


def check_compiles(call, place):
    if place is reached and jax.__version_info__ < call.compiles_since:
        pytest.skip("XLA of this version aborts")


@pytest.mark.whole
@PLACES
@EVERY
def test_values_and_gradients(name, place):
    call = call_of(name)
    fn = place(call)
    with x64():
        params, plan, adapters = prepared(fn, call, place)
        merges = []
        if call.gradient:
            got, want = both(fn, params, plan, adapters, X, on_merge=merges.append)
            assert_same(got, want)
            want = want[0][1]
        else:
            want = jax.tree.leaves(jitted(fn)(merged(params, adapters, plan), X))
        adapted = lora_jax.adapt(fn, plan, on_merge=merges.append)
        if place is reached:  # without jit too
            assert_same(jax.tree.leaves(adapted(params, adapters, X)), want)
        if not call.gradient:
            check_compiles(call, place)
            got = jitted(adapted)(params, adapters, X)
            assert_same(jax.tree.leaves(got), want)
        if place is beside or not call.merged_by:
            assert not merges


@pytest.mark.parametrize("name", [name for name in CALLS if CALLS[name].merged_by])
def test_a_weight_that_cannot_stay_low_rank_is_an_error_with_its_line(name):
    call = call_of(name)
    fn = reached(call)
    with x64():
        params, plan, adapters = prepared(fn, call, reached)
        wanted = rf"'w' .*`({call.merged_by})`: .*at .*calls\.py:\d+.*on_merge"
        with pytest.raises(ValueError, match=wanted):
            lora_jax.adapt(fn, plan)(params, adapters, X)


@pytest.mark.mostly_slow(20)
@MOST_PLACES
@EVERY
def test_mapped_from_outside(name, place):
    call = call_of(name)
    if not call.vmap:
        pytest.skip("JAX does not map it")
    check_compiles(call, place)
    fn = place(call)
    with x64():
        params, plan, adapters = prepared(fn, call, place)
        adapted = lora_jax.adapt(fn, plan, on_merge="allow")
        over_rows = functools.partial(jax.vmap, in_axes=(None, 0))
        xs = np.stack([X, X[::-1]])
        # Two programs: in one, a callback may run in a thread that knows no float64.
        got = jitted(over_rows(lambda p, x: adapted(p, adapters, x)))(params, xs)
        want = jitted(over_rows(fn))(merged(params, adapters, plan), xs)
        assert_same(got, want)


@pytest.mark.mostly_slow(20)
@MOST_PLACES
@EVERY
def test_quantized_weights(name, place):
    call = call_of(name)
    fn = place(call)
    x = asarray(X, "float32")
    stored = {
        path: toy_format.quantize(weight.astype("float32"))
        for path, weight in PARAMS.items()
    }
    dense = {path: lora_jax.quant.dequantize(weight) for path, weight in stored.items()}
    accepting = lora_jax.accept_quantized(fn)
    both = jitted(lambda stored, dense: (accepting(stored, x), fn(dense, x)))
    assert_same(*both(stored, dense), 1e-4)

    check_compiles(call, place)
    plan = plan_of(None, dense, axes={"w": "io", "v": "io"})
    adapters = jax.tree.map(lambda v: 0.3 * v, trained(dense, plan))
    adapted = lora_jax.adapt(fn, plan, on_merge="allow")

    def run(adapters, params):
        return loss_of(lambda a: adapted(params, a, x))(adapters)

    if call.gradient:
        run = jax.value_and_grad(run, has_aux=True)
    both = jitted(lambda *given: [run(adapters, params) for params in given])
    assert_same(*both(stored, dense), 1e-4)


@PLACES
@pytest.mark.parametrize("name", [name for name in CALLS if CALLS[name].prints])
def test_effects_happen_once(name, place, capfd):
    call = call_of(name)
    fn = place(call)
    params, plan, adapters = prepared(fn, call, place)
    stored = jax.tree.map(lambda w: toy_format.quantize(w.astype("float32")), params)

    def printed(function, *args):
        jax.block_until_ready(function(*args))
        jax.effects_barrier()
        return capfd.readouterr().out.count("seen")

    assert capfd.readouterr().out.count("seen") == 0  # by the plan
    x = asarray(X, "float32")
    adapted = lora_jax.adapt(fn, plan, on_merge="allow")
    runs = {
        "dense": lambda x: adapted(params, adapters, x),
        "quantized": lambda x: adapted(stored, adapters, x),
        "no adapters": lambda x: lora_jax.accept_quantized(fn)(stored, x),
    }
    times = {name: printed(run, x) for name, run in runs.items()}
    assert times == dict.fromkeys(runs, call.prints)
    check_compiles(call, place)
    for name, run in runs.items():
        times[name] = printed(jitted(run), x)
        if call.gradient:
            gradient = jax.grad(lambda x, run=run: loss_of(run)(x)[0])
            times[f"gradient, {name}"] = printed(jitted(gradient), x)
    assert times == dict.fromkeys(times, call.prints)
