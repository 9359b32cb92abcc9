"""What a step of training costs in memory: exact facts of compiled programs."""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import lora_jax
from tests import programs
from tests.training import problem

pytestmark = pytest.mark.slow  # half a minute of compiling

# The smallest frozen matrix of a layer, (400, 400), has more entries than anything else a
# step makes: an activation of all layers, or the 128 rows of a weight, at most, of which
# DoRA forms the norm at a time. Only where it does so for all layers there are more.
LAYERS, WIDTH, HIDDEN, RANK = 3, 400, 448, 3
EXAMPLES, ROWS = 2, 8
WEIGHTS = {"qkv": WIDTH * 3 * WIDTH, "out": WIDTH * WIDTH, "up": WIDTH * HIDDEN}
LARGE = min(WEIGHTS.values())
OLD_XLA = jax.__version_info__ < (0, 10, 2)
OPTIMIZER = optax.adam(1e-2)
KEY = jax.random.key(0)
SHAPE = jax.ShapeDtypeStruct
BATCH = problem.Batch(SHAPE((EXAMPLES, ROWS, 8), "float32"), SHAPE((EXAMPLES,), "int32"))
CASES = [
    ("lora", "scan", "float32"),
    ("lora", "loop", "float32"),
    ("dora", "scan", "float32"),
    ("dora", "loop", "float32"),
    *((m, layout, "bfloat16") for m in ("lora", "dora") for layout in ("scan", "loop")),
]
EVERY_CASE = pytest.mark.parametrize(("method", "layout", "dtype"), CASES)


@functools.cache
def make_params(layout, dtype):
    """Shapes of a model."""

    def make():
        params = problem.make_params(layers=LAYERS, width=WIDTH, hidden=HIDDEN, dtype=dtype)
        return params if layout == "scan" else problem.unstack(params)

    return jax.eval_shape(make)


@functools.cache
def set_up(method, layout, dtype="float32", **config):
    """Params, plan and adapters; of the matrices of a layer, every other one is adapted."""
    params = make_params(layout, dtype)
    config = lora_jax.LoraConfig(
        RANK, use_dora=method == "dora", targets=("*qkv", "*down"), **config
    )
    plan = lora_jax.plan_adapters(config, params, problem.apply, BATCH.images)
    adapters = jax.eval_shape(
        lambda params: lora_jax.init_adapters(KEY, params, plan), params
    )
    return params, plan, adapters


def compile_step(loss, tuned, *rest):
    state = jax.eval_shape(OPTIMIZER.init, tuned)
    return problem.make_step(loss, OPTIMIZER).lower(tuned, state, *rest).compile()


@functools.cache
def adapted_step(method, layout, dtype="float32"):
    params, plan, adapters = set_up(method, layout, dtype)
    return compile_step(problem.adapted_loss(plan), adapters, params, BATCH)


@functools.cache
def frozen_step(layout, dtype="float32"):
    """The loss and the gradient of its input: the least that training can do."""

    def loss(images, params, labels):
        return problem.cross_entropy(problem.apply(params, images), labels)

    params = make_params(layout, dtype)
    step = jax.jit(jax.value_and_grad(loss))
    return step.lower(BATCH.images, params, BATCH.labels).compile()


def large_arrays(compiled):
    return programs.large_arrays(compiled.as_text(), LARGE)


def analysis(compiled) -> Any:
    return compiled.memory_analysis()


def skip_squares(method):
    if method == "dora" and OLD_XLA:
        pytest.skip("XLA on the CPU before jaxlib 0.10.2 squares a weight before it sums")


@EVERY_CASE
def test_no_update_and_no_gradient_of_a_weight_is_formed(method, layout, dtype):
    skip_squares(method)
    made = large_arrays(adapted_step(method, layout, dtype))
    if method == "dora" and layout == "scan":
        # 100 of the 400 rows, of the weights and of their updates.
        made -= {(LAYERS * 100 * 3 * WIDTH, name) for name in ("dynamic-slice", "dot")}
    # XLA on the CPU widens 16-bit weights, with all the layers of a stack; those of the
    # frozen model too.
    assert made <= large_arrays(frozen_step(layout, dtype))


@pytest.mark.parametrize("layout", ["scan", "loop"])
def test_the_frozen_model_makes_but_slices_of_the_stack(layout):
    # And so does the adapted one, by the test above.
    slices = {(size, "dynamic-slice") for size in WEIGHTS.values()}
    want = slices if layout == "scan" else set()
    assert large_arrays(frozen_step(layout)) == want


@EVERY_CASE
def test_temporary_memory_is_that_of_the_frozen_model(method, layout, dtype):
    skip_squares(method)
    _, _, adapters = set_up(method, layout, dtype)
    extra = 5 * programs.number_of_bytes(adapters)
    if method == "dora":
        # The output before the scaling, for the gradient of the magnitude.
        extra += 4 * LAYERS * EXAMPLES * ROWS * 4 * WIDTH
        # Blocks of the direct norm.
        extra += 4 * 128 * 3 * WIDTH * (LAYERS if layout == "scan" else 1)
        # Of the weights that XLA on the CPU widens, one lives on for the norm.
        extra += 4 * WEIGHTS["qkv"] * (dtype == "bfloat16")
    frozen = programs.temporary(frozen_step(layout, dtype))
    assert programs.temporary(adapted_step(method, layout, dtype)) < frozen + extra


@functools.cache
def merged_step(layout):
    params, plan, adapters = set_up("lora", layout)
    return compile_step(problem.merged_loss(plan), adapters, params, BATCH)


@functools.cache
def full_step(layout):
    return compile_step(problem.full_loss, make_params(layout, "float32"), BATCH)


SLOW_LOOP = pytest.mark.parametrize("layout", ["scan", "loop"])


@SLOW_LOOP
@pytest.mark.parametrize("step", [merged_step, full_step])
def test_merging_and_full_fine_tuning_form_them(step, layout):
    # Guards the tests above: they can tell.
    made = large_arrays(step(layout)) - large_arrays(frozen_step(layout))
    assert {"dot", "add", "multiply"} <= {operation for _, operation in made}
    frozen = programs.temporary(frozen_step(layout))
    assert programs.temporary(step(layout)) > frozen + 2 * 4 * WEIGHTS["qkv"]


@EVERY_CASE
def test_outputs_are_adapters_state_and_loss(method, layout, dtype):
    _, _, adapters = set_up(method, layout, dtype)
    state = jax.eval_shape(OPTIMIZER.init, adapters)
    changed = programs.number_of_bytes((adapters, state))
    found = analysis(adapted_step(method, layout, dtype))
    pointers = 8 * (len(jax.tree.leaves((adapters, state))) + 1)
    assert found.output_size_in_bytes == changed + 4 + pointers
    assert found.alias_size_in_bytes == changed  # the donated ones


def kept(fn, method, **config):
    params, plan, adapters = set_up(method, "scan", **config)
    key = KEY if config else None
    loss = problem.adapted_loss(plan, fn)

    def keyed_loss(adapters, params, batch):
        return loss(adapters, params, batch, key)

    return programs.kept(keyed_loss, adapters, params, BATCH)


def activations(shapes):
    """Those with all layers and all rows."""
    rows = EXAMPLES * ROWS
    stacked = [shape for shape, _ in shapes if shape[:1] == (LAYERS,)]
    return [s for s in stacked if s[1:3] == (EXAMPLES, ROWS) or s[1:2] == (rows,)]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_keeps_keys_and_no_masks(method):
    without = collections.Counter(kept(problem.apply, method))
    more = collections.Counter(kept(problem.apply, method, dropout=0.1)) - without
    assert more
    assert all(jnp.issubdtype(dtype, jax.dtypes.prng_key) for _, dtype in more), more


def test_dropout_by_hand_keeps_masks():
    # Guards the test above: it can tell.
    def loss(adapters, x, keys):
        def body(x, layer):
            key, a, b = layer
            keep = jax.random.bernoulli(key, 0.9, x.shape)
            return jnp.tanh(x + jnp.where(keep, x, 0.0) @ a @ b), None

        return jnp.sum(jax.lax.scan(body, x, (keys, *adapters))[0])

    a, b = SHAPE((LAYERS, WIDTH, RANK), "float32"), SHAPE((LAYERS, RANK, WIDTH), "float32")
    x = SHAPE((EXAMPLES, ROWS, WIDTH), "float32")
    shapes = programs.kept(loss, (a, b), x, jax.random.split(KEY, LAYERS))
    assert ((LAYERS, EXAMPLES, ROWS, WIDTH), jnp.dtype("bool")) in shapes


@pytest.mark.parametrize("config", [{}, {"dropout": 0.1}], ids=str)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_checkpointed_layer_keeps_its_input_only(method, config):
    plain = activations(kept(problem.apply, method, **config))
    assert len(plain) > 5
    assert activations(kept(problem.checkpointed, method, **config)) == [
        (LAYERS, EXAMPLES, ROWS, WIDTH)
    ]


def test_accumulated_gradients_cost_no_memory_for_more_microbatches():
    params, plan, adapters = set_up("lora", "scan")
    loss = problem.adapted_loss(plan)

    def compiled(count):
        batches = jax.tree.map(lambda v: SHAPE((count, *v.shape), v.dtype), BATCH)
        step = jax.jit(problem.accumulated(loss))
        return step.lower(adapters, params, batches).compile()

    few, many = compiled(2), compiled(16)
    assert programs.temporary(many) == programs.temporary(few)
    assert large_arrays(many) == large_arrays(frozen_step("scan"))
