"""Adapters of a part of a weight, and of one kind of its uses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import quant
from tests import programs
from tests.support import asarray, draw, normal, optimizations, set_mesh, x64
from tests.transform.cases import CASES
from tests.transform.support import (
    assert_same,
    check,
    check_forms_no_weight,
    check_values,
    compiled_steps,
    loss_of,
    merged,
    plan_of,
    trained,
)
from tests.transform.test_cases import DORA_GRADIENTS, inputs

LAYERS = 4


def _part_of(path, letters, shape, of):
    """Half of the outputs of a weight, or of its stack, as a pattern; or all of it."""
    axes = [i for i, own in enumerate(letters) if own == of and shape[i] > 1]
    return f"{path}[{':,' * axes[0]}{shape[axes[0]] // 2}:]" if axes else path


HALVES = {
    (name, of): [
        _part_of(path, own, case.params[path], of) for path, own in case.axes.items()
    ]
    for name, case in CASES.items()
    for of in "ob"
    if of == "o" or any("b" in own for own in case.axes.values())
}


@pytest.mark.mostly_slow(60)
@pytest.mark.parametrize(("name", "of"), HALVES)
def test_half_of_a_weight_agrees_with_the_merged_function(name, of):
    case, targets = CASES[name], HALVES[name, of]
    with x64():
        params, args = inputs(case)
        config = {**case.config, "targets": targets}
        tolerance = {"cast": 1e-5}.get(name, 1e-10)
        options = {"config": config, "tolerance": tolerance, **case.options}
        plan = check_values(case.fn, params, *args, **options)
        assert {*plan.targets} == {*targets}
        if name in DORA_GRADIENTS:
            options["config"] = {**config, "use_dora": True}
            check(case.fn, params, *args, **options)


def stack(params, x):
    """The layers of a stack, in a loop."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["up"])[0]


def unrolled(params, x):
    for w in params["up"]:
        x = jnp.tanh(x @ w)
    return x


def fused(params, x):
    q, k, v = jnp.einsum("td,cdhk->cthk", x, params["qkv"])
    return q * k + v


def fused_flat(params, x):
    q, k, v = jnp.split(x @ params["qkv"], 3, axis=-1)
    return jnp.tanh(q) * k + v


def unstacked(params, x):
    q, k, v = (jnp.einsum("td,dhk->thk", x, w) for w in params["qkv"])
    return q * k + v


def kv(params, x):
    k, v = jnp.einsum("td,ckdh->ctkh", x, params["kv"])
    return k * v


def output(params, x):
    heads = x.reshape(5, 2, 4)
    return jnp.einsum("thk,hkd->td", heads, params["o"])


UP, QKV, FLAT = {"up": (LAYERS, 8, 8)}, {"qkv": (3, 8, 2, 4)}, {"qkv": (8, 24)}
PARTS = {
    "last layers": (stack, UP, ["up[2:]"]),
    "one layer": (stack, UP, ["up[-1]"]),
    "some layers": (stack, UP, ["up[[0, 2, 3]]"]),
    "every other layer": (stack, UP, ["up[::2]"]),
    "layers apart": (stack, UP, ["up[:1]", "up[2]"]),
    "outputs of layers": (stack, UP, ["up[1:, :, 4:]"]),
    "layers of a Python loop": (unrolled, UP, ["up[2:]"]),
    "query and value": (fused, QKV, ["qkv[0]", "qkv[2]"]),
    "query and value, with one A": (fused, QKV, ["qkv[::2]"]),
    "query and value, stacked": (unstacked, QKV, ["qkv[0]", "qkv[2]"]),
    "query and value, flat": (fused_flat, FLAT, ["qkv[:, :8]", "qkv[:, 16:]"]),
    "one head of the query": (fused, QKV, ["qkv[0, :, 1]"]),
    "key of Gemma": (kv, {"kv": (2, 2, 8, 4)}, ["kv[0]"]),
}
INPUTS = {"a head of the output": (output, {"o": (2, 4, 8)}, ["o[1]"])}


@pytest.mark.mostly_slow(12)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", PARTS | INPUTS)
def test_parts(name, method):
    fn, shapes, targets = (PARTS | INPUTS)[name]
    with x64():
        params = {path: normal(*shape, seed=3) for path, shape in shapes.items()}
        x = normal(5, 8, seed=4)
        config = {"targets": targets, "use_dora": method == "dora"}
        if method == "dora" and name in INPUTS:
            with pytest.raises(ValueError, match="only some of the inputs"):
                plan_of(fn, params, x, **config)
            return
        plan = check(fn, params, x, config=config)

        @jax.jit
        def outputs(params, x):
            fresh = lora_jax.init_adapters(jax.random.key(0), params, plan)
            return lora_jax.adapt(fn, plan)(params, fresh, x), fn(params, x)

        rtol = 0 if method == "lora" else 1e-12
        np.testing.assert_allclose(*outputs(params, x), rtol=rtol)
        _check_merges(jax.tree.map(asarray, params), trained(params, plan), plan)


def _check_merges(params, adapters, plan):
    """The library's own merge, and back; and what it says of it."""

    @jax.jit
    def merges(params, adapters):
        norms = lora_jax.adapted_column_norms(params, adapters, plan) or None
        folded = lora_jax.merge_adapters(params, adapters, plan)
        back = lora_jax.unmerge_adapters(folded, adapters, plan, column_norms=norms)
        losses = lora_jax.merge_losses(params, adapters, plan)
        return folded, merged(params, adapters, plan), back, losses

    folded, want, back, losses = merges(params, adapters)
    assert_same(folded, want)
    assert_same(back, params)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert lora_jax.count_parameters(params, plan).trainable == sizes
    for loss in losses.values():
        assert loss.relative_error < 1e-12


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_ranks_and_alphas_by_layer(method):
    with x64():
        params, x = {"up": normal(LAYERS, 8, 8)}, normal(5, 8)
        plan = check(
            stack,
            params,
            x,
            config={
                "rank_pattern": {"up[3]": 4},
                "alpha_pattern": {"up[[0, 2]]": 1.0},
                "exclude": "up[1]",
                "use_dora": method == "dora",
            },
        )
    assert {path: (t.rank, t.scale) for path, t in plan.targets.items()} == {
        "up[::2]": (3, 1 / 3),
        "up[3:]": (4, 1.5),
    }


@pytest.mark.mostly_slow(5)
@pytest.mark.parametrize("name", PARTS)
def test_forms_nothing_of_the_shape_of_a_part(name):
    fn, shapes, targets = PARTS[name]
    stacked = {  # five layers and rank 7: no factor has the shape of a part
        path: (5, *shape[1:]) if shape[0] == LAYERS else shape
        for path, shape in shapes.items()
    }
    with x64():
        params = {path: normal(*shape) for path, shape in stacked.items()}
        x = normal(5, 8)
        plan = plan_of(fn, params, x, targets=targets, rank=7)
        telling = name != "key of Gemma"  # XLA folds the axes of its merge
        check_forms_no_weight(fn, params, plan, x, telling=telling)


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize(
    ("fn", "shape", "targets"),
    [
        (stack, (4, 256, 256), ["w[1:]"]),
        (fused_flat, (256, 768), ["w[:, 256:512]", "w[:, 512:]"]),
    ],
)
def test_the_norms_of_a_part_make_no_copy_of_it(fn, shape, targets):
    def model(params, x):
        return fn(dict.fromkeys(("up", "qkv"), params["w"]), x)

    def memory(targets):
        plan = plan_of(model, params, x, targets=targets, use_dora=True)
        return programs.temporary(compiled_steps(model, params, plan, x)[0]())

    params = {"w": normal(*shape, dtype="float32")}
    x = normal(5, 256, dtype="float32")
    entry = 4 * 256 * 256
    assert memory(targets) < memory("w") + entry / 2


def test_layers_outside_of_a_part_keep_their_program():
    """A Python loop over layers multiplies with the factors where they are adapted."""
    params, x = {"up": normal(LAYERS, 8, 8, dtype="float32")}, np.ones((5, 8), "float32")

    def steps(targets):
        plan = plan_of(unrolled, params, x, targets=targets)
        return compiled_steps(unrolled, params, plan, x)

    frozen = programs.flops(steps("up")[1]())

    def more(targets):
        return programs.flops(steps(targets)[0]()) - frozen

    layer = more("up[1]")
    products = 6 * 5 * 3 * (8 + 8)  # forward, gradients of the factors and of x
    assert products < layer < 1.1 * products
    gradients = LAYERS * 3 * (8 + 8)  # those of two layers are summed in the stack
    for targets, layers in (("up[2:]", 2), ("up[0]", 1), ("up", LAYERS)):
        assert more(targets) == layers * layer + (layers - 1) * gradients


@pytest.mark.mostly_slow(5)
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("part", ["up[2:]", "up[1]", "up[[0, 3]]", "up[1:, :, 8:]"])
def test_parts_of_a_quantized_stack(part, method, format):
    params = {"up": normal(LAYERS, 16, 16, dtype="float32") / 4}
    x = normal(5, 16, dtype="float32")
    plan = plan_of(stack, params, x, targets=part, use_dora=method == "dora")

    @jax.jit
    def results(stored, adapters):
        out = lora_jax.adapt(stack, plan)(stored, adapters, x)
        dense = {"up": stored["up"].dequantize("float32")}
        losses = lora_jax.merge_losses(stored, adapters, plan, requantize=True)
        return out, stack(merged(dense, adapters, plan), x), losses

    with optimizations(False):
        stored = lora_jax.quantize_params(params, "up", format=format, batch_axes=1)
        # Small, so that the layers do not make roundings of float32 grow.
        adapters = trained(stored, plan, size=0.3)
        out, want, losses = results(stored, adapters)
    assert_same(out, want, 1e-5)
    assert all(0 < loss.relative_error < 1 for loss in losses.values())


def test_dropout_of_a_part():
    """Layers without an adapter drop nothing; at scale 0 nothing is left of the rest."""
    params, x = {"up": draw(LAYERS, 8, 8)}, np.ones((5, 8), "float32")
    plan = plan_of(stack, params, x, targets="up[3:]", dropout=0.5)
    key, zero = jax.random.key(1), {"up[3:]": np.zeros(1, "float32")}

    @jax.jit
    def outputs(*given):
        run = lora_jax.adapt(stack, plan, dropout_key=key)
        off = lora_jax.adapt(stack, plan, dropout_key=key, scales=zero)
        return run(*given), lora_jax.adapt(stack, plan)(*given), off(*given)

    dropped, whole, off = outputs(params, trained(params, plan), x)
    assert not np.allclose(dropped, whole)
    np.testing.assert_array_equal(off, stack(params, x))


# Uses of a tied table: `fn(table of the look-ups, table of the products, other, tokens)`.


def tied(looked_up, multiplied, w, tokens):
    return jnp.tanh(looked_up[tokens] @ w) @ multiplied.T


def called(looked_up, multiplied, w, tokens):
    """In a call, behind casts and a checkpoint."""

    @jax.jit
    def inner(looked_up, multiplied, tokens):
        rows = jax.checkpoint(lambda table: 2 * jnp.take(table, tokens, axis=0))
        return jnp.tanh(rows(looked_up) @ w) @ multiplied.T

    return inner(looked_up, multiplied, tokens)


def sampled(looked_up, multiplied, w, tokens):
    """A softmax over sampled classes: their rows are looked up for a product."""
    return jnp.tanh(looked_up[tokens] @ w) @ multiplied[tokens[::-1]].T


def in_bodies(looked_up, multiplied, w, tokens):
    """Weights multiply rows in bodies that are traced anew."""

    def look_up(table, w):
        return jnp.tanh(table[tokens] @ w)

    @jax.jit
    def large(table, w):
        x = look_up(table, w)
        for _ in range(30):
            x = jnp.sin(x)
        return x

    x = jax.checkpoint(look_up)(looked_up, w) + large(looked_up, w)
    x += jax.lax.cond(tokens[0] < 9, look_up, lambda table, w: x, looked_up, w)
    steps = jnp.stack([w, 2 * w])
    x, _ = jax.lax.scan(lambda x, w: (x + look_up(looked_up, w), None), x, steps)
    kinds, spec = (jax.sharding.AxisType.Auto,), jax.sharding.PartitionSpec()
    mesh = jax.make_mesh((2,), ("d",), axis_types=kinds)
    spread = jax.shard_map(look_up, mesh=mesh, in_specs=spec, out_specs=spec)
    return (x + spread(looked_up, w)) @ multiplied.T


def scaled(looked_up, multiplied, w, tokens):
    """Scales, and a choice between two, before the use."""
    head = jax.lax.cond(tokens[0] > 9, lambda: multiplied.T, lambda: multiplied.T / 3)
    return jnp.tanh((8**0.5 * looked_up)[tokens] @ w) @ head


def one_row(looked_up, multiplied, w, tokens):
    """The logit of one class: its row is looked up for a product."""
    return jnp.tanh(looked_up[tokens] @ w) @ multiplied[7]


USES = {
    "the look-ups": ("table@lookup",),
    "the products": ("table@product",),
    "each with its own": ("table@lookup", "table@product"),
    "rows of the look-ups": ("table[4:]@lookup", "table@product", "w"),
}


# Which terms a use takes does not depend on the method, so DoRA has one row of the table.
@pytest.mark.mostly_slow(12)
@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "lora") for name in USES), ("each with its own", "dora")],
)
@pytest.mark.parametrize("fn", [tied, called, sampled, in_bodies, scaled, one_row])
def test_one_use_of_a_tied_table(fn, name, method):
    def model(params, tokens):
        return fn(params["table"], params["table"], params["w"], tokens)

    def untied(adapters):
        lookup, product = (
            merged(params, adapters, plan, use=use) for use in ("lookup", "product")
        )
        return fn(lookup["table"], product["table"], lookup["w"], tokens)

    def adapted(adapters):
        return lora_jax.adapt(model, plan)(params, adapters, tokens)

    with x64(), optimizations(False):
        params = {"table": normal(20, 8), "w": normal(8, 8, seed=1)}
        params, tokens = jax.tree.map(asarray, params), asarray(np.arange(6))
        config = {"targets": USES[name], "use_dora": method == "dora"}
        plan = plan_of(model, params, tokens, **config)
        adapters = trained(params, plan)
        steps = [jax.value_and_grad(loss_of(f), has_aux=True) for f in (adapted, untied)]
        got, want = jax.jit(lambda adapters: [step(adapters) for step in steps])(adapters)
    assert_same(got, want)


@pytest.mark.parametrize("fn", [tied, called, sampled, scaled])
def test_uses_form_nothing_of_the_shape_of_the_table(fn):
    def model(params, tokens):
        return fn(params["table"], params["table"], params["w"], tokens)

    with x64():
        params = {"table": normal(20, 8), "w": normal(8, 8, seed=1)}
        plan = plan_of(
            model, params, np.arange(6), targets=(*USES["each with its own"], "w")
        )
        check_forms_no_weight(model, params, plan, np.arange(6), telling=True)


@jax.custom_vjp
def stated(x, w):
    return x @ w


stated.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, None))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_uses_in_products_that_are_stated(method, table):
    def model(multiply, params, tokens):
        x = multiply(params["table"][tokens], params["w"])
        return multiply(jnp.tanh(x), params["table"].T)

    first, second = (
        functools.partial(model, multiply) for multiply in (stated, jnp.matmul)
    )
    tokens = np.arange(6)
    plans = [
        plan_of(
            fn,
            table,
            tokens,
            targets=("table@lookup", "table@product"),
            use_dora=method == "dora",
            products=products,
        )
        for fn, products in ((first, {"stated": "...k,kn->...n"}), (second, {}))
    ]
    adapters = trained(table, plans[0])
    got, want = (
        jax.jit(lora_jax.adapt(fn, plan))(table, adapters, tokens)
        for fn, plan in zip((first, second), plans, strict=True)
    )
    assert_same(got, want, 1e-5)


def _model(params, tokens):
    return tied(params["table"], params["table"], params["w"], tokens)


def _squared(params, tokens):
    return params["table"] ** 2 + _model(params, tokens).sum()


@pytest.fixture
def table():
    return {"table": normal(20, 8, dtype="float32"), "w": normal(8, 8, dtype="float32")}


def test_a_merge_of_one_use_says_to_untie(table):
    tokens = np.arange(6)
    plan = plan_of(_model, table, tokens, targets="table@lookup")
    adapters = trained(table, plan)
    norms = lora_jax.adapted_column_norms(table, adapters, plan)
    for fold in (
        lora_jax.merge_adapters,
        lambda *args: lora_jax.unmerge_adapters(*args, column_norms=norms),
    ):
        with pytest.raises(ValueError, match=r"'table@lookup' .*the products .*Untie them"):
            fold(table, adapters, plan)


def test_a_merge_where_a_row_may_be_either_use(table):
    def model(params, x):
        return jnp.tanh(x + params["table"][3:4] @ params["w"]) @ params["table"].T

    x = np.ones((3, 8), "float32")
    plan = plan_of(model, table, x, targets="table@product")
    with pytest.raises(ValueError, match=r"adapts one use.*the look-ups .*Untie"):
        lora_jax.merge_adapters(table, trained(table, plan), plan)


def test_a_merge_of_the_only_use(table):
    def head(params, x):
        return x @ params["table"].T

    x = np.ones((3, 8), "float32")
    plan = plan_of(head, table, x, targets="table@product")
    adapters = trained(table, plan)
    whole = plan_of(head, table, x, targets="table")
    own = {"table": adapters["table@product"]}
    assert_same(
        lora_jax.merge_adapters(table, adapters, plan),
        lora_jax.merge_adapters(table, own, whole),
    )


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_use_of_neither_kind_is_an_error(table, method):
    tokens = np.arange(6)
    config = {"targets": "table@product", "axes": {"table": "io"}}
    plan = plan_of(_squared, table, tokens, **config, use_dora=method == "dora")
    with pytest.raises(ValueError, match=r"`(integer_pow|square)`.*neither a look-up"):
        lora_jax.adapt(_squared, plan, on_merge="allow")(
            table, trained(table, plan), tokens
        )


def test_a_layer_of_a_stack_is_no_look_up():
    params, x = {"up": draw(LAYERS, 8, 8)}, np.ones((5, 8), "float32")
    with pytest.raises(ValueError, match="no look-up of its rows that '@lookup'"):
        plan_of(unrolled, params, x, targets="up@lookup")
    plan = plan_of(unrolled, params, x, targets="up@product")
    adapters = trained(params, plan)

    @jax.jit
    def outputs(params, adapters):
        whole = lora_jax.merge_adapters(params, adapters, plan)  # there is no other use
        return lora_jax.adapt(unrolled, plan)(params, adapters, x), unrolled(whole, x)

    assert_same(*outputs(params, adapters), 1e-5)


@pytest.mark.parametrize("layers", [[0, 1], [0, 1, 2]])
def test_a_part_that_is_missing_counts_as_unused(layers):
    """Parts of one stack are one term, and each is still a weight of its own."""

    def some(params, x):
        for layer in layers:
            x = jnp.tanh(x @ params["up"][layer])
        return x

    params, x = {"up": draw(LAYERS, 8, 8)}, np.ones((5, 8), "float32")
    plan = plan_of(unrolled, params, x, targets=("up[:2]", "up[2:]"))

    @jax.jit
    def outputs(params, adapters):
        out = lora_jax.adapt(some, plan)(params, adapters, x)
        return out, some(merged(params, adapters, plan), x)

    adapters = trained(params, plan)
    if 2 in layers:
        assert_same(*outputs(params, adapters), 1e-5)
        return
    with pytest.raises(ValueError, match=r"never uses .*'up\[2:\]'"):
        outputs(params, adapters)


def test_a_use_that_is_missing_counts_as_unused(table):
    tokens = np.arange(6)
    plan = plan_of(_model, table, tokens, targets=("table@product", "w"))

    def without_head(params, tokens):
        return params["table"][tokens] @ params["w"]

    with pytest.raises(ValueError, match=r"never uses .*'table@product'"):
        jax.jit(lora_jax.adapt(without_head, plan))(table, trained(table, plan), tokens)


def test_decomposed_parts_are_the_function(table):
    """The base of a part, with its adapter, is the weight again."""
    with x64():
        params, x = {"up": asarray(normal(LAYERS, 8, 8))}, normal(5, 8)
        plan = plan_of(stack, params, x, targets=("up[1:3]", "up[3]"))

        @jax.jit
        def decomposed(params):
            base, adapters = lora_jax.decompose_params(params, plan, "pissa")
            return base, lora_jax.merge_adapters(base, adapters, plan), adapters

        base, again, adapters = decomposed(params)
        assert_same(again, params)
        np.testing.assert_array_equal(
            *(np.asarray(tree["up"])[0] for tree in (base, params))
        )
        doubled = lora_jax.to_plain_adapters(adapters, adapters, plan)
        again = lora_jax.plan_adapters(doubled.plan.config, params, stack, x)
        assert again == doubled.plan
        with pytest.raises(ValueError, match="quantize gives a whole weight"):
            lora_jax.decompose_params(params, plan, "loftq", quantize=quant.quantize_int8)
    plan = plan_of(_model, table, np.arange(6), targets="table@lookup")
    with pytest.raises(ValueError, match="changes the weight for all of its uses"):
        lora_jax.decompose_params(table, plan, "pissa")


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("spec", [("l",), ("m", None, "l")])
def test_parts_that_cut_across_the_shards_of_explicit_axes(spec, method):
    """Results are those of one device; weights keep their sharding."""
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("l", "m"), axis_types=kinds)
    whole, place = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(*spec)

    def gathered(params, x):
        return stack({"up": jax.sharding.reshard(params["up"], whole)}, x)

    def loss(fn, plan, params, x):
        return lambda adapters: loss_of(lora_jax.adapt(fn, plan))(params, adapters, x)[0]

    # JAX 0.7 keeps nothing on automatic axes for the gradients of loops.
    old = jax.__version_info__ < (0, 8, 0)
    differentiate = (lambda f: f) if old else jax.value_and_grad
    targets = ("up[0]", "up[2:, :, 1:5]")
    with x64(), optimizations(False):
        params, x = {"up": asarray(normal(LAYERS, 8, 8))}, asarray(normal(5, 8))
        plan = plan_of(stack, params, x, targets=targets, use_dora=method == "dora")
        adapters = trained(params, plan)

        def results(fn, params, adapters, x):
            base, parted = lora_jax.decompose_params(params, plan, "olora")
            return (
                lora_jax.init_adapters(jax.random.key(0), params, plan),
                jax.jit(differentiate(loss(fn, plan, params, x)))(adapters),
                lora_jax.merge_adapters(params, adapters, plan),
                lora_jax.merge_adapters(base, parted, plan),
            )

        alone = jax.jit(functools.partial(results, stack))
        want = jax.tree.map(np.asarray, alone(params, adapters, x))
        with set_mesh(mesh):
            put = jax.device_put(
                (params, adapters, x), jax.sharding.NamedSharding(mesh, whole)
            )
            sharded = {"up": jax.sharding.reshard(put[0]["up"], place)}
            got = results(gathered, sharded, *put[1:])
        assert_same(jax.tree.map(np.asarray, got), want)
        for merged_params in got[2:]:
            assert jax.typeof(merged_params["up"]) == jax.typeof(sharded["up"])


def listed(params, x):
    """Weights in a list, stacked for a loop."""
    return stack({"up": jnp.stack(params["up"])}, x)


@pytest.mark.parametrize("fn", [stack, listed])
def test_parts_of_scale_0_change_nothing(fn):
    params, x = {"up": normal(LAYERS, 8, 8)}, normal(5, 8)
    targets = ("up[:2]", "up[2:]") if fn is stack else "up/*"
    params = params if fn is stack else {"up": list(params["up"])}
    with x64():
        plan = plan_of(fn, params, x, targets=targets).replace(scale=0.0)
        check(fn, params, x, plan=plan)


def test_one_trace_for_all_scales_of_parts():
    params, x = {"up": draw(LAYERS, 8, 8)}, np.ones((5, 8), "float32")
    plan = plan_of(stack, params, x, targets=("up[:2]", "up[2:]"))
    scales = {"up[:2]": asarray([0.5, 2.0], "float32"), "up[2:]": asarray(0.0, "float32")}

    adapters = trained(params, plan)
    out = lora_jax.adapt(stack, plan, scales=scales)(params, adapters, x)
    want = jax.jit(lambda *given: stack(merged(*given[:2], plan, given[2]), x))
    assert_same(out, want(params, adapters, scales), 1e-5)
    off = dataclasses.replace(plan, targets={"up[:2]": plan.targets["up[:2]"]})
    assert list(off.targets) == ["up[:2]"]
