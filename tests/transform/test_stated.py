"""Functions that are stated to be products, besides the cases: errors, rules, options."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl

import lora_jax
from tests import toy_format
from tests.support import asarray, assert_same_bits, normal, x64
from tests.transform.cases import STATED, grouped, mul, product_of, rounded
from tests.transform.support import assert_same, both, loss_of, merged, plan_of, trained

X, W = normal(5, 12), normal(12, 10, seed=1)
SQUARE = normal(12, 12, seed=2) / 4


def model(params, x):
    return jnp.tanh(mul(x, params["w"]))


def plain(params, x):
    return jnp.tanh(x @ params["w"])


def layers(product):
    def fn(params, x):
        return lax.scan(lambda h, w: (jnp.tanh(product(h, w)), None), x, params["w"])[0]

    return fn


@pytest.mark.mostly_slow(5)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"dropout": 0.5}], ids=str)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("product", ["one", "layers"])
def test_is_adapted_as_the_plain_product(product, quantized, options, fresh_operations):
    """The same outputs and gradients, with the same masks, also in a second adapter."""
    fns = (model, plain) if product == "one" else (layers(mul), layers(jnp.matmul))
    params = {"w": asarray(W if product == "one" else [SQUARE] * 3, "float32")}
    x = asarray(X, "float32")
    plan = plan_of(fns[0], params, x, **STATED, **options)
    adapters = trained(params, plan, size=0.3)
    if quantized:
        params = {"w": toy_format.quantize(params["w"])}

    def run(fn):
        adapted = lora_jax.adapt(fn, plan, dropout_key=jax.random.key(0))
        twice = lora_jax.adapt(adapted, plan)

        def loss(adapters, x):
            return loss_of(lambda a, x: (adapted(params, a, x), twice(params, a, a, x)))(
                adapters, x
            )

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(adapters, x)

    assert_same(run(fns[0]), run(fns[1]), 1e-5)
    fresh = lora_jax.init_adapters(
        jax.random.key(0), {"w": jnp.zeros(plan.targets["w"].shape)}, plan
    )
    if not options and not quantized:
        assert_same_bits(lora_jax.adapt(fns[0], plan)(params, fresh, x), fns[0](params, x))


def test_the_custom_derivative_is_that_of_the_frozen_weight():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (3 * g @ r[1].T, 0 * r[1]))

    def fn(params, x):
        return product(x, params["w"])

    with x64():
        params = {"w": asarray(W)}
        plan = plan_of(fn, params, X, products={"product": "mk,kn->mn"})
        adapters = trained(params, plan)
        model = lora_jax.adapt(fn, plan)
        _, pull = jax.vjp(functools.partial(model, params), adapters, X)
        got = pull(jnp.ones((5, 10)))
        delta = 2.0 * adapters["w"]["A"] @ adapters["w"]["B"]
        _, pull = jax.vjp(lambda a, x: X @ (2.0 * a["w"]["A"] @ a["w"]["B"]), adapters, X)
        assert_same(got[0], pull(jnp.ones((5, 10)))[0])
        assert_same(got[1], jnp.ones((5, 10)) @ (3 * W + delta).T)


def test_megablox():
    """JAX's grouped product, interpreted; its body is not read."""
    megablox = pytest.importorskip("jax.experimental.pallas.ops.tpu.megablox")
    sizes = jnp.array([50, 30, 48], "int32")

    def fn(params, x):
        tiling, others = (128, 128, 128), (None, None, False, True)
        return megablox.gmm(x, params["w"], sizes, jnp.float32, tiling, *others)

    params = {"w": normal(3, 128, 128, dtype="float32") / 8}
    x = normal(128, 128, dtype="float32")
    plan = plan_of(fn, params, x, products={"gmm": "mk,gkn,g->mn"})
    assert plan.targets["w"].axes == "bio"
    adapters = jax.tree.map(lambda v: v / 4, trained(params, plan))
    with jax.numpy_dtype_promotion("standard"):  # as its backward pass needs it
        got, want = both(
            fn,
            params,
            plan,
            adapters,
            x,
            dense=lambda p, x: lax.ragged_dot(x, p["w"], sizes),
        )
    assert_same(got, want, 1e-4)


def test_a_kernel_without_a_derivative():
    """The adapters have one all the same."""

    def double(x_ref, w_ref, y_ref, z_ref):
        y_ref[...] = jnp.dot(x_ref[...], w_ref[...])
        z_ref[...] = x_ref[...] * 2.0

    def fn(params, x):
        kinds = [jax.ShapeDtypeStruct(s, x.dtype) for s in ((5, 10), x.shape)]
        return pl.pallas_call(double, out_shape=kinds, interpret=True)(x, params["w"])

    def dense(params, x):
        return [x @ params["w"], x * 2.0]

    with x64():
        params = {"w": asarray(W)}
        plan = plan_of(fn, params, X, products={"double": "mk,kn->mn,_"})
        adapters = trained(params, plan)
        adapted = lora_jax.adapt(fn, plan)
        got, want = (
            jax.value_and_grad(loss_of(f), has_aux=True)(adapters)
            for f in (
                lambda a: adapted(params, a, X),
                lambda a: dense(merged(params, a, plan), X),
            )
        )
        assert_same(got, want)


def wide(x, w):
    return jnp.dot(x, w, preferred_element_type="float32")


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32", "int8"])
def test_results_of_another_dtype(x_dtype):
    x = (4 * asarray(X)).astype(x_dtype)
    params = {"w": asarray(W, "bfloat16")}

    def fn(product):
        return lambda params, x: product(x, params["w"])

    plan = plan_of(fn(jax.jit(wide)), params, x, products={"wide": "mk,kn->mn"})
    adapters = trained(params, plan)
    got, want = (
        lora_jax.adapt(fn(product), plan)(params, adapters, x)
        for product in (jax.jit(wide), wide)
    )
    assert got.dtype == "float32"
    assert_same(got, want, 1e-6)


@jax.jit
def integers(x, w):
    return (x @ w).astype("int32")


@jax.jit
def small(w):
    return w.astype("float8_e4m3fn")


@jax.jit
def widened(x, w):
    return x.astype(w.dtype) @ w


@jax.jit
def summed(x, w):
    return jnp.sum(x @ w, axis=0)


REFUSED = {
    "it returns int32": (
        lambda w, x: integers(x, w).astype(x.dtype),
        "integers",
        "mk,kn->mn",
    ),
    "it returns float8_e4m3fn": (
        lambda w, x: x @ small(w).astype(x.dtype),
        "small",
        "kn->kn",
    ),
    "the other operand is float8_e4m3fn": (
        lambda w, x: widened(x.astype("float8_e4m3fn"), w),
        "widened",
        "mk,kn->mn",
    ),
    "the weight is not the operand with the groups": (
        lambda w, x: grouped(w, jnp.ones((3, 12, 5)), jnp.array([3, 4, 5], "int32")),
        "grouped",
        "mk,gkn,g->mn",
    ),
    "takes no part in the product": (lambda w, x: mul(x, w), "mul", "mk,_->mk"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_calls_that_stay_merged(why):
    call, name, text = REFUSED[why]

    def fn(params, x):
        return call(params["w"], x)

    params = {"w": asarray(SQUARE, "float32")}
    fields = {"targets": "w", "axes": {"w": "io"}, "products": {name: text}}
    x = asarray(X[:, :12], "float32")
    plan = plan_of(fn, params, x, **fields)
    assert why in plan.uses["w"][0].merged
    with pytest.raises(ValueError, match=f"the adapted weight 'w'.*{why}"):
        lora_jax.adapt(fn, plan)(params, trained(params, plan), x)


WRONG = {
    "k,kn->n": r"\(5, 12\), \(12, 10\) .* \(5, 10\). 'k' stands for 2 axes.*jax.vmap",
    "...k,nk->...n": "The axis 'k' has the sizes 12 and 10",
    "km,kn->mn": "The axis 'k' has the sizes 5 and 12",
    "mk,kn->nm": "The axis 'n' has the sizes 10 and 5",
    "mk,kn,_->mn": "Expected one part for each operand",
    "mk,kn->mn,_": "Expected one part for each operand",
    "m...,...n->m...n": "is no part",
    "mk,nk->mn; k,kn->n": "(?s)sizes 12 and 10.*'k' stands for 2 axes",
    "...mk,kn->...m": "the letter 'n' is in one",
    "...amk,kn->...amn": "'...amk' stands for 2 axes",
    "mk,kn,n->mn": "with three operands it must be as",
    "kg,gnk,g->kn": "with three operands it must be as",
    "mk,gkm,g->mk": "with three operands it must be as",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_statement_that_does_not_fit_is_an_error(text):
    params = {"w": asarray(W)}
    with pytest.raises(ValueError, match=WRONG[text]):
        plan_of(model, params, X, products={"mul": text})


def test_the_axes_of_the_result_are_those_of_the_operands():
    params = {"w": asarray(W)}
    with pytest.raises(ValueError, match=r"axes '...' of the operands are not those of"):
        plan_of(
            lambda params, x: summed(x, params["w"]),
            params,
            X,
            products={"summed": "...k,kn->...n"},
        )


def test_a_statement_is_compared_with_each_call():
    params = {"w": asarray(W)}
    plan = plan_of(model, params, X, products={"mul": "mk,kn->mn"})
    with pytest.raises(
        ValueError, match=r"'mul' is 'mk,kn->mn'.*\(2, 5, 12\).*'mk' stands"
    ):
        lora_jax.adapt(model, plan)(params, trained(params, plan), jnp.stack([X, X]))


@pytest.mark.parametrize("place", ["alone", "in a loop"])
def test_a_statement_that_the_function_contradicts_is_an_error(place):
    """Of a square weight the shapes do not tell."""
    params = {"w": asarray(SQUARE)}
    fn = model
    if place == "in a loop":
        fn, params = layers(mul), {"w": jnp.stack([SQUARE] * 3)}
    with pytest.raises(ValueError, match=r"axes of 'w' are .*In the function they are"):
        plan_of(fn, params, X, products={"mul": "mk,nk->mn"})


def test_a_name_that_no_weight_reaches_is_an_error():
    params = {"w": asarray(W)}
    with pytest.raises(ValueError, match=r"products matches no function .*nearest.* 'mul'"):
        plan_of(model, params, X, products={"mull": "mk,kn->mn"})


SUGGESTED = {
    "mul": (lambda w, x: mul(x, w), W.shape, "{'mul': '...k,kn->...n'}"),
    "heads": (
        lambda w, x: product_of(x, w, 1),
        (12, 2, 4),
        "{'product_of': '...d,dhk->...hk'}",
    ),
    "turned": (lambda w, x: mul(w, x.T), (10, 12), "{'mul': '...'}"),
    "grouped": (
        lambda w, x: grouped(x, w, jnp.array([2, 2, 1], "int32")),
        (3, 12, 10),
        "{'grouped': 'mk,gkn,g->mn'}",
    ),
    "rounded": (lambda w, x: x @ rounded(w, 4.0).T, W.shape, "{'rounded': '...'}"),
}


@pytest.mark.parametrize("name", SUGGESTED)
def test_errors_suggest_a_statement(name):
    call, shape, suggested = SUGGESTED[name]

    def fn(params, x):
        return call(params["w"], x)

    params, hint = {"w": jnp.ones(shape)}, re.escape(f"LoraConfig(products={suggested})")
    for targets in ("all-linear", "w"):
        with pytest.raises(ValueError, match=hint):
            plan_of(fn, params, X, targets=targets)
    plan = plan_of(fn, params, X, targets="w", axes={"w": "bio"[-len(shape) :]})
    with pytest.raises(ValueError, match=hint):
        lora_jax.adapt(fn, plan)(params, trained(params, plan), X)
