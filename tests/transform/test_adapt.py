"""The contract of `adapt`: what it takes, what it refuses, what it compiles to."""

import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax
from lora_jax.lowrank.norm_matrix import Matrix
from lora_jax.transform import _norms
from tests.programs import equations
from tests.support import asarray, count_traces, normal, optimizations, x64
from tests.transform.cases import block
from tests.transform.support import (
    assert_same,
    check,
    check_values,
    merged,
    plan_of,
    trained,
)

X, W = normal(5, 12), normal(12, 10)


def model(params, x):
    return jnp.tanh(x @ params["w"])


def layers(params, x):
    return lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, params["w"])[0]


def single(dtype="float32", **config):
    """Params, plan and adapters of one weight, and an input."""
    params, x = {"w": asarray(W, dtype)}, asarray(X, dtype)
    plan = plan_of(model, params, x, **config)
    return params, plan, trained(params, plan), x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_lower_precision_is_off_by_roundings_only(dtype):
    params, plan, adapters, x = single(dtype)
    got = jax.jit(lora_jax.adapt(model, plan))(params, adapters, x)
    weight = np.float64(params["w"]) + plan.targets["w"].scale * (
        np.float64(adapters["w"]["A"]) @ np.float64(adapters["w"]["B"])
    )
    assert got.dtype == dtype
    product = np.abs(np.float64(x)) @ np.abs(weight)
    error = np.abs(np.float64(got) - np.tanh(np.float64(x) @ weight))
    assert np.all(error <= 8 * float(jnp.finfo(dtype).eps) * (1 + product))


HIGH, HIGHEST = lax.Precision.HIGH, lax.Precision.HIGHEST
PRESETS = lax.DotAlgorithmPreset


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(
    ("precision", "dtype", "kept"),
    [
        (HIGHEST, "float32", (HIGHEST, HIGHEST)),
        ((HIGH, HIGHEST), "float32", (HIGH, HIGHEST)),
        (PRESETS.F32_F32_F32, "float32", PRESETS.F32_F32_F32),
        (PRESETS.F16_F16_F16, "float16", None),  # factors are multiplied in float32
    ],
)
def test_products_with_factors_have_the_precision_of_the_product(
    precision, dtype, kept, flipped
):
    params, plan, adapters, x = single(dtype)

    def fn(params, x):
        operands = (params["w"], x) if flipped else (x, params["w"])
        dimensions = (((0,), (1,)) if flipped else ((1,), (0,)), ((), ()))
        return lax.dot_general(*operands, dimensions, precision)

    program = jax.make_jaxpr(lora_jax.adapt(fn, plan))(params, adapters, x)
    dots = [e for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
    assert len(dots) == 3
    if flipped and isinstance(precision, tuple):
        kept = kept[::-1]
    assert [dot.params["precision"] for dot in dots[1:]] == [kept] * 2


def test_adapters_in_float32_train_a_bfloat16_weight():
    params, plan, adapters, x = single("bfloat16")

    def loss(adapters):
        return jnp.sum(lora_jax.adapt(model, plan)(params, adapters, x).astype("float32"))

    gradient = jax.jit(jax.grad(loss))(adapters)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float32"}


def test_second_derivatives():
    with x64():
        params, plan, adapters, x = single("float64")
        adapted = lora_jax.adapt(model, plan)

        def loss(fn):
            return jax.jit(jax.hessian(lambda adapters: jnp.sum(jnp.sin(fn(adapters)))))

        got = loss(lambda a: adapted(params, a, x))(adapters)
        want = loss(lambda a: model(merged(params, a, plan), x))(adapters)
        assert_same(got, want)


def test_forward_derivatives_through_a_while_loop():
    from tests.transform.cases import while_loop

    with x64():
        params = {"w": normal(12, 12)}
        plan = plan_of(while_loop, params, X)
        adapters = trained(params, plan)
        adapted = lora_jax.adapt(while_loop, plan)
        functions = (
            lambda a: adapted(params, a, X),
            lambda a: while_loop(merged(params, a, plan), X),
        )
        both = jax.jit(lambda a: [jax.jvp(f, (a,), (a,)) for f in functions])
        assert_same(*both(adapters))


def test_derivatives_of_the_params_are_those_of_the_merged_function():
    with x64():
        params, plan, adapters, x = single("float64")
        adapted = lora_jax.adapt(model, plan)
        functions = (
            lambda p: jnp.sum(adapted(p, adapters, x)),
            lambda p: jnp.sum(model(merged(p, adapters, plan), x)),
        )
        assert_same(*jax.jit(lambda p: [jax.grad(f)(p) for f in functions])(params))


def test_a_new_value_never_traces_again_and_a_new_plan_does():
    params, plan, adapters, x = single()
    other = plan_of(model, params, x, alpha=3.0)

    def run(params, adapters, x, plan):
        return lora_jax.adapt(model, plan)(params, adapters, x)

    with count_traces(run) as (run, traces):
        run(params, adapters, x, plan)
        run(params, jax.tree.map(jnp.zeros_like, adapters), x + 1, plan)
        run(params, adapters, x, lora_jax.AdapterPlan.from_json(plan.to_json()))
        assert len(traces) == 1
        run(params, adapters, x, other)
        assert len(traces) == 2


def test_a_jitted_block_stays_one_function_for_all_layers():
    params = {f"w{i}": normal(12, 12, seed=i) for i in range(4)}

    def fn(params, x):
        for weight in params.values():
            x = block(x, weight)
        return x

    plan = plan_of(fn, params, X, rank_pattern={"w3": 5})
    adapted = lora_jax.adapt(fn, plan)
    text = jax.jit(adapted).lower(params, trained(params, plan), X).as_text()
    # One for the three weights of rank 3, one for that of rank 5.
    assert text.count("func.func private @block") == 2


def test_merges_in_a_jitted_block_are_reported_for_each_weight():
    @jax.jit
    def bad_block(h, w):
        for _ in range(30):
            h = jnp.sin(h)
        return h @ jnp.tanh(w)

    params = {"a": normal(12, 12), "b": normal(12, 12, seed=1)}

    def fn(params, x):
        return bad_block(bad_block(x, params["a"]), params["b"])

    merges = []
    with x64():
        plan = plan_of(None, params)
        check(fn, params, X, plan=plan, on_merge=merges.append)
        with pytest.raises(ValueError, match=r"'a' .*`tanh`.*bad_block.*, called at .*fn"):
            lora_jax.adapt(fn, plan)(params, trained(params, plan), X)
    assert [merge.path for merge in merges[:2]] == ["a", "b"]


def test_params_are_arguments_of_the_program():
    params, plan, adapters, x = single()
    jaxpr = jax.make_jaxpr(lora_jax.adapt(model, plan))(params, adapters, x)
    assert not jaxpr.consts


def test_what_is_no_array_stays_as_it_is():
    def fn(params, x, flag, *, mode, act):
        assert flag is True
        assert mode == "fast"
        assert params["name"] == "net"
        assert isinstance(params["eps"], float)
        return act(x @ params["w"] * params["eps"]), mode, 3, None

    params = {"w": W, "name": "net", "eps": 0.5, "none": None, "act": jnp.tanh}
    config = lora_jax.LoraConfig(rank=3)
    plan = lora_jax.plan_adapters(config, params, fn, X, True, mode="fast", act=jnp.tanh)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    y, *rest = lora_jax.adapt(fn, plan)(
        params, adapters, X, True, mode="fast", act=jnp.tanh
    )
    assert rest == ["fast", 3, None]
    assert y.shape == (5, 10)


def test_a_function_may_close_over_values_of_an_outer_trace():
    with x64():
        params, plan, adapters, x = single("float64")

        def outer(scale):
            adapted = lora_jax.adapt(lambda p, x: model(p, x) * scale, plan)
            return jnp.sum(adapted(params, adapters, x))

        want = jax.jit(lambda: jnp.sum(model(merged(params, adapters, plan), x)))
        assert_same(jax.jit(jax.grad(outer))(2.0), want())


def test_unused_weights_are_an_error_unless_allowed():
    params = {"w": W, "other": W}
    plan = plan_of(None, params)
    adapters = trained(params, plan)
    with pytest.raises(
        ValueError, match=r"never uses the adapted weights 'other': .*closure"
    ):
        lora_jax.adapt(model, plan)(params, adapters, X)
    got = lora_jax.adapt(model, plan, on_unused="allow")(params, adapters, X)
    assert got.shape == (5, 10)


def test_an_allowed_merge_is_logged(caplog):
    params = {"w": W}
    plan = plan_of(None, params)
    adapted = lora_jax.adapt(lambda p, x: x @ jnp.tanh(p["w"]), plan, on_merge="allow")
    with caplog.at_level(logging.INFO, logger="lora_jax"):
        adapted(params, trained(params, plan), X)
    assert "'w' (here of shape (12, 10)) reaches `tanh`" in caplog.text
    assert pathlib.Path(__file__).name in caplog.text


class TestErrors:
    def test_of_arguments(self):
        params, plan, _, _ = single()
        with pytest.raises(
            TypeError, match=r"fn must be a function .* got dict: the order"
        ):
            lora_jax.adapt(params, plan)
        with pytest.raises(TypeError, match="plan must be an AdapterPlan, got dict"):
            lora_jax.adapt(model, params)
        with pytest.raises(ValueError, match="on_merge must be one of 'error', 'allow'"):
            lora_jax.adapt(model, plan, on_merge="eror")
        with pytest.raises(ValueError, match="on_unused must be one of"):
            lora_jax.adapt(model, plan, on_unused="ignore")
        with pytest.raises(TypeError, match=r"dropout_key must be a jax.random key"):
            lora_jax.adapt(model, plan, dropout_key=3)

    @pytest.mark.parametrize(
        ("scales", "error", "message"),
        [
            ({"v": 1.0}, KeyError, r"scales has 'v', which the plan does not adapt"),
            ("0.5", TypeError, r"scales must be a number"),
            (True, TypeError, r"must be a number or a scalar array, got True"),
            ({"w": None}, TypeError, r"at 'w': the scale must be a number"),
            (
                {"w": jnp.ones(2)},
                ValueError,
                r"at 'w': .*must be a scalar, got an array of",
            ),
            (jnp.ones(2), ValueError, r"got an array of shape \(2,\): for one"),
            ({"w": 1j}, TypeError, r"at 'w': the scale must be a number"),
            ({"w": float("nan")}, ValueError, r"at 'w': the scale must be finite"),
        ],
    )
    def test_of_scales(self, scales, error, message):
        _, plan, _, _ = single()
        with pytest.raises(error, match=message):
            lora_jax.adapt(model, plan, scales=scales)

    def test_of_scales_of_a_stack(self):
        params = {"w": jnp.ones((3, 4, 4))}
        plan = plan_of(None, params, axes={"w": "bio"}, use_dora=True)
        with pytest.raises(ValueError, match=r"or an array of the batch axes \(3,\), got"):
            lora_jax.adapt(model, plan, scales={"w": jnp.ones(4)})
        with pytest.raises(TypeError, match=r"the scale must be floating point, got dt"):
            lora_jax.adapt(model, plan, scales={"w": jnp.ones(3, "complex64")})
        norms = {"w": jnp.ones((3, 4))}
        with pytest.raises(ValueError, match=r"column_norms are given for a weight whose"):
            lora_jax.adapt(model, plan, scales=1.0, column_norms=norms)

    def test_of_a_plan_for_other_params(self):
        params, plan, adapters, x = single()
        adapted = lora_jax.adapt(model, plan)
        with pytest.raises(KeyError, match="params lack weights that the plan adapts: 'w'"):
            adapted({"weight": params["w"]}, adapters, x)
        with pytest.raises(ValueError, match=r"at 'w': the plan is for .* \(12, 10\), got"):
            adapted({"w": params["w"][:, :4]}, adapters, x)
        with pytest.raises(TypeError, match=r"at 'w': .*floating point, got dtype int32"):
            adapted({"w": params["w"].astype("int32")}, adapters, x)

    def test_of_arguments_in_another_order(self):
        params, plan, adapters, x = single()
        with pytest.raises(KeyError, match="They come first, before the adapters"):
            lora_jax.adapt(model, plan)(adapters, params, x)

    def test_of_abstract_values(self):
        params, plan, adapters, x = single()
        shapes = jax.eval_shape(lambda p: p, params)
        adapted = lora_jax.adapt(model, plan)
        with pytest.raises(TypeError, match=r"w is a jax.ShapeDtypeStruct.*jax.eval_shape"):
            adapted(shapes, adapters, x)
        with pytest.raises(TypeError, match=r"args\[0\] is a jax.ShapeDtypeStruct"):
            adapted(params, adapters, jax.ShapeDtypeStruct(x.shape, x.dtype))

    def test_of_deleted_arrays(self):
        params, plan, adapters, x = single()
        given = {r"at 'w': adapter\['A'\]": adapters, "w": params, r"args\[0\]": x}
        adapted = lora_jax.adapt(model, plan)
        for name, tree in given.items():
            gone = jax.tree.map(lambda v: jnp.array(v, copy=True), tree)
            jax.tree.map(lambda v: v.delete(), gone)
            arguments = [gone if v is tree else v for v in (params, adapters, x)]
            with pytest.raises(ValueError, match=f"^{name} has been deleted or donated"):
                adapted(*arguments)
        with pytest.raises(ValueError, match=r"^args\[1\] has been deleted"):
            lora_jax.accept_quantized(model)(params, gone)

    def test_of_a_byte_order_that_jax_does_not_take(self):
        params, plan, adapters, x = single()
        swapped = np.asarray(x).astype(">f4")
        adapted = lora_jax.adapt(lambda p, x, y=None: model(p, x), plan)
        with pytest.raises(TypeError, match=r"^args\[1\] has the byte order .* '>f4'"):
            adapted(params, adapters, x, swapped)
        with pytest.raises(TypeError, match=r"^kwargs\['y'\]\[0\] has the byte order"):
            adapted(params, adapters, x, y=[swapped])
        with pytest.raises(TypeError, match=r"^other has the byte order"):
            plan_of(model, {**params, "other": swapped}, x)

    def test_of_arrays_that_jax_does_not_have(self):
        params, plan, adapters, x = single()
        for odd in (np.array(["a", "b"]), np.array([{}, None]), np.zeros(2, "M8[s]")):
            # They reach the function as they are, in params and elsewhere.
            def fn(params, x, names, odd=odd):
                assert names is odd
                assert params["names"] is odd
                return model(params, x)

            named = {**params, "names": odd}
            got = lora_jax.adapt(fn, plan)(named, adapters, x, odd)
            want = lora_jax.adapt(model, plan)(params, adapters, x)
            np.testing.assert_array_equal(got, want)
            assert plan_of(fn, named, x, odd).explain("names").startswith("names: no adapt")
            assert lora_jax.count_parameters(named, plan).total == 120 + plan.parameters
            with pytest.raises(
                TypeError, match=r"not support, names \(dtype .*\): they rea"
            ):
                plan_of(lambda p, x: x @ p["w"] + p["names"], named, x)

    @pytest.mark.parametrize("use", [bool, np.asarray])
    def test_of_values_that_a_trace_does_not_know(self, use):
        params, plan, adapters, x = single()

        def fn(params, x):
            return x @ params["w"] if use(x[0, 0] > 0) else x

        with pytest.raises(TypeError) as error:
            lora_jax.adapt(fn, plan)(params, adapters, x)
        assert any("lora_jax traces the function" in note for note in error.value.__notes__)

    def test_of_adapters(self):
        params, plan, adapters, x = single()
        adapted = lora_jax.adapt(model, plan)
        with pytest.raises(KeyError, match="adapters must have the 1 paths"):
            adapted(params, {}, x)
        with pytest.raises(KeyError, match="unknown: 'v'"):
            adapted(params, {**adapters, "v": adapters["w"]}, x)
        with pytest.raises(ValueError, match=r"at 'w': .*A \(12, rank\)"):
            adapted(params, {"w": {**adapters["w"], "A": adapters["w"]["A"].T}}, x)
        with pytest.raises(ValueError, match=r"at 'w': .*'B_bias' would be lost"):
            adapted(params, {"w": {**adapters["w"], "B_bias": jnp.ones(10)}}, x)
        with pytest.raises(ValueError, match="no magnitude"):
            adapted(params, {"w": {**adapters["w"], "m": jnp.ones(10)}}, x)


class TestDropout:
    RATE = 0.4

    @pytest.fixture(autouse=True)
    def quick(self):
        with optimizations(False):
            yield

    def setup_method(self):
        self.params, self.plan, self.adapters, self.x = single(dropout=self.RATE)

    def run(self, key, fn=model, params=None, plan=None, adapters=None):
        adapted = jax.jit(lora_jax.adapt(fn, plan or self.plan, dropout_key=key))
        return adapted(params or self.params, adapters or self.adapters, self.x)

    def test_without_a_key_there_is_none(self):
        plan = plan_of(model, self.params, self.x)
        want = lora_jax.adapt(model, plan)(self.params, self.adapters, self.x)
        np.testing.assert_allclose(self.run(None), want, rtol=1e-6)

    @pytest.mark.parametrize(
        "fn",
        [
            lambda p, x: x @ p["w"],
            lambda p, x: lax.conv(x[..., None], p["w"].T[..., None], (1,), "VALID")[..., 0],
            lambda p, x: lax.ragged_dot(x, p["w"][None], asarray([5])),
        ],
        ids=["product", "conv", "ragged_dot"],
    )
    def test_is_that_of_the_input_of_the_adapter(self, fn, monkeypatch):
        keep = np.random.default_rng(3).random((5, 12)) > self.RATE
        monkeypatch.setattr(
            jax.random, "bernoulli", lambda key, p, shape: jnp.reshape(keep, shape)
        )
        adapter, x = self.adapters["w"], np.float64(self.x)
        dropped = np.where(keep, x / (1 - self.RATE), 0.0)
        update = dropped @ np.float64(adapter["A"]) @ np.float64(adapter["B"]) * 2.0
        got = self.run(jax.random.key(0), fn)
        jax.clear_caches()
        np.testing.assert_allclose(
            got, x @ np.float64(self.params["w"]) + update, rtol=1e-4
        )

    def test_the_key_decides(self):
        given = self.params, self.adapters, self.x
        first, again, other = (
            lora_jax.adapt(model, self.plan, dropout_key=jax.random.key(i))(*given)
            for i in (1, 1, 2)
        )
        np.testing.assert_array_equal(first, again)
        assert not np.allclose(first, other)

    def masks(self, fn, weight, **config):
        """The masks that a run of `fn` draws."""
        seen = []
        draw = jax.random.bernoulli

        def record(key, p, shape):
            mask = draw(key, p, shape)
            jax.debug.callback(lambda mask: seen.append(np.array(mask)), mask)
            return mask

        params = {"w": asarray(weight, "float32")}
        plan = plan_of(fn, params, self.x, dropout=self.RATE, **config)
        adapters = trained(params, plan)
        jax.clear_caches()  # of programs that draw without a record, and then with one
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.random, "bernoulli", record)
            self.run(jax.random.key(0), fn, params, plan, adapters)
            jax.effects_barrier()
        jax.clear_caches()
        return seen

    def test_each_use_has_a_mask_of_its_own(self):
        first, second = self.masks(lambda p, x: x @ p["w"] + jnp.sin(x) @ p["w"], W)
        assert first.shape == (5, 12)
        assert (first != second).any()

    @pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint])
    def test_each_step_of_a_scan_has_a_mask_of_its_own(self, wrap):
        def fn(p, x):
            return lax.scan(wrap(lambda h, w: (jnp.tanh(h @ w), None)), x, p["w"])[0]

        masks = self.masks(fn, normal(3, 12, 12))
        assert len({mask.tobytes() for mask in masks}) == 3

    def test_each_branch_call_and_loop_draws(self):
        def fn(p, x):
            x = lax.cond(x[0, 0] > -100, lambda: jnp.tanh(x @ p["w"]), lambda: x)
            return lax.fori_loop(0, 2, lambda _, h: jnp.tanh(block(h, p["w"])), x)

        masks = self.masks(fn, normal(12, 12))
        assert len({mask.tobytes() for mask in masks}) == len(masks) == 3

    def test_the_mask_is_drawn_again_for_the_gradient(self):
        def loss(adapters):
            return jnp.sum(jnp.sin(self.run(jax.random.key(5), adapters=adapters)))

        with x64():
            self.params, self.adapters, self.x = jax.tree.map(
                lambda v: np.asarray(v, "float64"), (self.params, self.adapters, self.x)
            )
            run, step = jax.jit(jax.value_and_grad(loss)), 1e-5
            _, gradient = run(self.adapters)
            (up, _), (down, _) = (
                run(jax.tree.map(lambda a, by=by: a + by, self.adapters))
                for by in (step, -step)
            )
            slope = sum(np.sum(leaf) for leaf in jax.tree.leaves(gradient))
            np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-6)

    @pytest.mark.parametrize(
        "fn",
        [
            lambda p, x: x @ jnp.tanh(p["w"]),
            lambda p, x: lax.dot(
                jnp.ones((5, 12), int), p["w"], preferred_element_type="f4"
            ),
        ],
        ids=["tanh", "integers"],
    )
    def test_a_merged_use_refuses_it(self, fn):
        adapted = lora_jax.adapt(
            fn, self.plan, on_merge="allow", dropout_key=jax.random.key(0)
        )
        with pytest.raises(ValueError, match=r"adapter of 'w' has dropout.*dropout=0.0"):
            adapted(self.params, self.adapters, self.x)

    @pytest.mark.parametrize("name", ["conv", "ragged_dot", "tied_head", "attention"])
    def test_reaches_every_product(self, name):
        from tests.transform.cases import CASES, inputs

        case = CASES[name]
        params, args = jax.tree.map(
            lambda v: asarray(v, "float32") if v.dtype == "float64" else v,
            inputs(case),
        )
        plan = plan_of(case.fn, params, *args, dropout=self.RATE, **case.config)
        adapters = trained(params, plan)

        @jax.jit
        @jax.grad
        def run(adapters, key):
            adapted = lora_jax.adapt(case.fn, plan, dropout_key=key)
            return jnp.sum(jnp.sin(adapted(params, adapters, *args)))

        first, second = (run(adapters, jax.random.key(i)) for i in range(2))
        for path in plan.targets:
            assert not np.allclose(first[path]["B"], second[path]["B"])
            assert np.isfinite(first[path]["A"]).all()


def test_dora_with_a_column_of_norm_zero():
    params = {"w": asarray(W * (np.arange(10) != 3), "float32")}
    x = asarray(X, "float32")
    plan = plan_of(model, params, x, use_dora=True)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)

    def loss(adapters):
        y = lora_jax.adapt(model, plan)(params, adapters, x)
        return jnp.sum(y), (y, model(params, x))

    gradient, outputs = jax.jit(jax.grad(loss, has_aux=True))(adapters)
    np.testing.assert_allclose(*outputs, rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_the_users_keyword_arguments_have_any_name():
    params, plan, adapters, x = single()
    names = ["config", "params", "fn", "args", "kwargs", "adapters", "plan", "self", "_"]

    def fn(weights, x, **options):
        assert sorted(options) == sorted(names)
        return {name: model(weights, x * option) for name, option in options.items()}

    options = {name: jnp.float32(i) for i, name in enumerate(names)}
    made = lora_jax.plan_adapters(plan.config, params, fn, x, **options)
    assert made == plan
    got = lora_jax.adapt(fn, plan)(params, adapters, x, **options)
    for name, option in options.items():
        want = lora_jax.adapt(model, plan)(params, adapters, x * option)
        np.testing.assert_array_equal(got[name], want)
    dense = lora_jax.accept_quantized(fn)(params, x, **options)
    np.testing.assert_array_equal(dense["plan"], fn(params, x, **options)["plan"])


def given_norms(fn, params, x, plan, adapters):
    """The gradients for adapters and norms, which are formed outside, and the norms."""
    norms = lora_jax.adapted_column_norms(params, adapters, plan)

    def loss(adapters, norms):
        adapted = lora_jax.adapt(fn, plan, column_norms=norms)
        return jnp.sum(jnp.sin(adapted(params, adapters, x)))

    return jax.jit(jax.grad(loss, (0, 1))).lower(adapters, norms).compile(), norms


@pytest.mark.parametrize("axes", ["io", "oi", "bio"])
def test_given_norms_are_those_that_adapt_forms(axes):
    shapes = {"io": (12, 10), "oi": (10, 12), "bio": (3, 12, 12)}
    fn = {"io": model, "oi": lambda p, x: x @ p["w"].T, "bio": layers}[axes]
    params, x = (
        {"w": asarray(normal(*shapes[axes]), "float32")},
        asarray(X, "float32"),
    )
    plan = plan_of(fn, params, x, use_dora=True)
    adapters = trained(params, plan)
    compiled, norms = given_norms(fn, params, x, plan, adapters)
    adapted = lora_jax.adapt(fn, plan)
    want = jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(adapted(params, a, x)))))(adapters)
    got, of_norms = compiled(adapters, norms)
    assert_same(got, want, 1e-5)
    assert not np.any(of_norms["w"])  # constants, like those that are formed
    twice, _ = compiled(adapters, {"w": 2 * norms["w"]})  # nothing forms them again
    assert not np.allclose(twice["w"]["m"], want["w"]["m"])


def test_given_norms_save_the_products_that_form_them():
    params, plan, adapters, x = single(use_dora=True)
    lora = plan_of(model, params, x)
    without_m = {"w": {name: adapters["w"][name] for name in ("A", "B")}}
    flops = [
        given_norms(model, params, x, *of)[0].cost_analysis()["flops"]
        for of in ((plan, adapters), (lora, without_m))
    ]
    assert flops[0] - flops[1] < 12 * X.shape[0] * W.shape[1]  # no (in, out) by rank


def test_norms_that_are_not_the_plans_are_refused():
    params, plan, adapters, x = single(use_dora=True)
    norms = lora_jax.adapted_column_norms(params, adapters, plan)
    with pytest.raises(KeyError, match=r"column_norms must have .*; missing: 'w'"):
        lora_jax.adapt(model, plan, column_norms={})
    with pytest.raises(KeyError, match="unknown: 'w'"):
        lora_jax.adapt(model, plan_of(model, params, x), column_norms=norms)
    with pytest.raises(ValueError, match=r"expected shape \(10,\), one for each column"):
        lora_jax.adapt(model, plan, column_norms={"w": norms["w"][:3]})
    with pytest.raises(TypeError, match="column_norms must be a dict"):
        lora_jax.adapt(model, plan, column_norms=norms["w"])


# ------------------------------------------------- the axes of the plan and of the use

SQUARE, OTHER = normal(12, 12), normal(12, 12, seed=1)
TWO = {"w": SQUARE, "v": OTHER}
TOKENS = np.array([3, 1, 4, 1, 5])


def many_sines(h, w):
    for _ in range(30):
        h = jnp.sin(h)
    return h @ w.T


def along(weights, x, turn=False):
    return lax.scan(lambda h, w: (h @ (w.T if turn else w), None), x, weights)[0]


# Functions that use `w` otherwise than a plan without a function has it, and how.
TURNED = {
    "turned": (lambda p, x: x @ p["w"].T, "oi"),
    "einsum": (lambda p, x: jnp.einsum("bi,oi->bo", x, p["w"]), "oi"),
    "scaled": (lambda p, x: x @ (p["w"] * 2).T, "oi"),
    "part": (lambda p, x: x @ p["w"][:4].T, "oi"),
    "heads": (lambda p, x: jnp.einsum("bd,hkd->bhk", x, p["w"].reshape(3, 4, 12)), "oi"),
    "columns_of_a_table": (
        lambda p, x: jnp.take(p["w"], TOKENS + (x[0, 0] > 9).astype(TOKENS.dtype), axis=1),
        "oi",
    ),
    "checkpoint": (lambda p, x: jax.checkpoint(lambda x, w: x @ w.T)(x, p["w"]), "oi"),
    "block": (lambda p, x: jax.jit(many_sines)(x, p["w"]), "oi"),
    "jit": (jax.jit(lambda p, x: x @ p["w"].T), "oi"),
    "vmap": (jax.vmap(lambda p, x: p["w"] @ x, (None, 0)), "oi"),
    "cond": (
        lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p["w"].T, lambda: x * 1.0),
        "oi",
    ),
    "fused": (lambda p, x: x @ jnp.concatenate([p["w"], p["w"]]).T, "oi"),
    "stacked": (lambda p, x: along(jnp.stack([p["w"], p["w"]]), x, turn=True), "oi"),
    "stack_of_vectors": (
        lambda p, x: lax.scan(lambda h, b: (h + b[None], None), x, p["w"])[0],
        "bo",
    ),
}


@pytest.mark.parametrize("name", TURNED)
def test_a_plan_with_other_axes_than_the_use_is_refused(name):
    fn, letters = TURNED[name]
    with x64():
        plan = plan_of(None, {"w": SQUARE})
        adapters = trained({"w": SQUARE}, plan)
        message = (
            rf"'w': the plan has the axes 'io' of \(12, 12\), the function has "
            rf"'{letters}' in `\w+` at .*test_adapt.py:(.|\n)*Make the plan with this "
            r"function(.|\n)*LoraConfig\(axes="
        )
        for one in (plan, lora_jax.AdapterPlan.from_json(plan.to_json())):
            with pytest.raises(ValueError, match=message):
                jax.jit(lora_jax.adapt(fn, one))({"w": SQUARE}, adapters, X)
        if letters != "bo":
            own = plan_of(fn, {"w": SQUARE}, X, targets="w")
            assert own.targets["w"].axes == letters
            check(fn, {"w": SQUARE}, X, plan=own)
        given = plan_of(None, {"w": SQUARE}, axes={"w": "io"})
        check(fn, {"w": SQUARE}, X, plan=given, on_merge="allow")


# Functions that use the weights as a plan without a function has them, or say nothing.
AGREEING = {
    "tied": lambda p, x: (p["w"][TOKENS] + x) @ p["w"].T,
    "tied_single": lambda p, x: (p["w"][2][None] + x) @ p["w"].T,
    "tied_dynamic": lambda p, x: (
        (lax.dynamic_slice_in_dim(p["w"], jnp.int32(2), 1, 0) + x) @ p["w"].T
    ),
    "both_ways": lambda p, x: x @ p["w"].T @ p["w"],
    "sampled": lambda p, x: x @ p["w"][:, TOKENS],
    "columns": lambda p, x: jnp.stack([x @ p["w"][:, i] for i in range(3)]),
    "halves": lambda p, x: [x @ part for part in jnp.split(p["w"], 2, axis=1)],
    "blocks": lambda p, x: x[:, :4] @ p["w"][:4] + x[:, 4:] @ p["w"][4:],
    "blocks_of_a_loop": lambda p, x: lax.map(
        lambda i: x @ lax.dynamic_slice_in_dim(p["w"], 4 * i, 4, 1), jnp.arange(3)
    ),
    "heads": lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"].reshape(12, 3, 4)),
    "heads_of_the_input": lambda p, x: jnp.einsum(
        "bhd,dhk->bhk", jnp.stack([x] * 3, 1), p["w"].reshape(12, 3, 4)
    ),
    "absorbed": lambda p, x: jnp.einsum(
        "bd,dhk,bhk->bh", x, p["w"].reshape(12, 3, 4), x.reshape(5, 3, 4)
    ),
    "merged": lambda p, x: x @ jnp.tanh(p["w"]).T,
    "sum": lambda p, x: x * jnp.sum(p["w"]),
    "fused": lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1),
    "chain": lambda p, x: x @ (p["w"] @ p["v"]),
    "stacked": lambda p, x: along(jnp.stack([p["w"], p["v"]]), x),
    "chunks": lambda p, x: lax.map(lambda w: x @ w.T, p["w"].T.reshape(3, 4, 12)),
}


@pytest.mark.parametrize("name", AGREEING)
def test_a_plan_that_one_use_agrees_with_is_no_mistake(name):
    params = TWO if name in ("fused", "chain", "stacked") else {"w": SQUARE}
    with x64():
        plan = plan_of(None, params)
        check(AGREEING[name], params, X, plan=plan, on_merge="allow")


def test_layers_of_two_layouts_that_the_function_stacks():
    def fn(params, x):
        return x @ params["w"] @ params["v"].T

    def stacked(params, x):
        return along(jnp.stack([params["w"], params["v"].T]), x)

    def wrong(params, x):
        return along(jnp.stack([params["w"], params["v"]]), x)

    with x64():
        plan = plan_of(fn, TWO, X)
        check(stacked, TWO, X, plan=plan)
        adapters = trained(TWO, plan)
        with pytest.raises(ValueError, match=r"'v': .* axes 'oi' .*has 'io'") as error:
            lora_jax.adapt(wrong, plan)(TWO, adapters, X)
        assert "'w'" not in str(error.value)


EXPERTS = {"w": normal(4, 12, 12)}


def mixed(params, x):
    return jnp.einsum("be,bd,edf->bf", x[:, :4], x, params["w"])


def apart(params, x):
    return jnp.einsum("ebd,edf->ebf", jnp.stack([x] * 4), params["w"])


@pytest.mark.parametrize(
    ("fn", "letters"),
    [(apart, "bio"), (lambda p, x: along(p["w"], x), "bio")],
    ids=["experts", "layers"],
)
def test_a_batch_axis_that_the_plan_has_as_input(fn, letters):
    with x64():
        plan = plan_of(mixed, EXPERTS, X)
        assert plan.targets["w"].axes == "iio"
        adapters = trained(EXPERTS, plan)
        with pytest.raises(ValueError, match=f"'iio' of .*, the function has '{letters}'"):
            lora_jax.adapt(fn, plan)(EXPERTS, adapters, X)
        # What has a matrix for each index can be used in any way.
        check(mixed, EXPERTS, X, plan=plan_of(fn, EXPERTS, X))


def test_a_part_of_a_function_that_uses_a_weight_both_ways():
    with x64():
        plan = plan_of(AGREEING["tied"], {"w": SQUARE}, X, targets="w")
        assert plan.targets["w"].axes == "io"
        check(lambda p, x: x @ p["w"].T, {"w": SQUARE}, X, plan=plan)


def test_a_checkpoint_in_the_other_layout(tmp_path):
    from lora_jax import peft

    params = {"layer": {"weight": SQUARE}}

    def fn(params, x):
        return x @ params["layer"]["weight"].T

    with x64():
        plan = plan_of(fn, params, X)
        adapters = trained(params, plan)
        peft.save(tmp_path, adapters, plan)
        loaded, plan, *_ = peft.load(tmp_path, params, layout="jax")
        with pytest.raises(ValueError, match=r"axes 'io' .*, the function has 'oi'"):
            lora_jax.adapt(fn, plan)(params, loaded, X)
        for options in (
            {"layout": "torch"},
            {"names": {"layer": ("layer/weight", "oi")}},
        ):
            loaded, plan, *_ = peft.load(tmp_path, params, **options)
            check(fn, params, X, plan=plan)
        given = {"names": {"layer": ("layer/weight", "io")}}
        loaded, plan, *_ = peft.load(tmp_path, params, **given)
        check(fn, params, X, plan=plan)


def test_the_heads_of_a_module_of_a_checkpoint(tmp_path):
    from lora_jax import peft

    params = {"layer": {"kernel": normal(12, 3, 4)}}

    def fn(params, x):
        return jnp.einsum("bd,dhk->bhk", x, params["layer"]["kernel"])

    def each(params, x):
        return jax.vmap(lambda w: x @ w, 1)(params["layer"]["kernel"])

    def mapped(params, x):
        rows = jnp.stack([x] * 3)
        return jax.vmap(lambda x, w: x @ w, (0, 1))(rows, params["layer"]["kernel"])

    with x64():
        plan = plan_of(fn, params, X)
        peft.save(tmp_path, trained(params, plan), plan)
        _, plan, *_ = peft.load(tmp_path, params)
        assert plan.targets["layer/kernel"].axes == "ioo"
        for model in (fn, each, mapped):
            check(model, params, X, plan=plan)


DORA_OR_LORA = pytest.mark.parametrize("methods", ["ll", "ld", "dl", "dd", "ddd", "dld"])


def nested(methods, fn, params, *args, **options):
    """`adapt` once for each letter, the innermost first, and the weights merged alike."""
    function, weights, adapters = fn, params, []
    made = []
    for i, method in enumerate(methods):
        plan = plan_of(fn, params, *args, use_dora=method == "d", rank=i + 2)
        made.append((plan, trained(params, plan, seed=i)))
    for plan, _ in made:
        function = lora_jax.adapt(function, plan, **options)
    for plan, own in reversed(made):
        weights = lora_jax.merge_adapters(weights, own, plan)
        adapters.append(own)
    return function, adapters, weights


@pytest.mark.parametrize("layout", ["io", "oi", "scan"])
@DORA_OR_LORA
def test_adapted_functions_are_adapted_again(methods, layout):
    fn, w = model, W
    if layout == "oi":
        fn, w = lambda params, x: jnp.tanh(x @ params["w"].T), W.T
    if layout == "scan":
        fn, w = layers, normal(3, 12, 12) / 4
    with x64():
        params, x = {"w": asarray(w)}, asarray(X)
        function, adapters, weights = nested(methods, fn, params, x)
        got = jax.jit(function)(params, *adapters, x)
        np.testing.assert_allclose(got, fn(weights, x), rtol=0, atol=1e-10)


def test_gains_that_are_broadcast_twice():
    def fn(p, x, g):
        gains = jnp.broadcast_to(jnp.broadcast_to(g, (12, 10)), (3, 12, 10))
        return jnp.einsum("bi,lio->lbo", x, p["w"] * gains)

    with x64():
        w, g = asarray(normal(3, 12, 10)), asarray(normal(10))
        check_values(fn, {"w": w}, asarray(X), g, config={}, tolerance=1e-10)


@pytest.mark.parametrize("methods", ["ll", "ld", "dl", "dd"])
def test_gradients_of_nested_adapters(methods):
    with x64():
        params, x = {"w": asarray(W)}, asarray(X)
        function, adapters, _ = nested(methods, model, params, x)
        adapted = lambda own: jnp.sum(function(params, *own, x) ** 2)  # noqa: E731
        norm = lambda v: lax.stop_gradient(jnp.linalg.norm(v, axis=0))  # noqa: E731

        def by_hand(adapters):
            w = params["w"]
            for own in adapters:
                w = w + 6.0 / own["w"]["A"].shape[1] * own["w"]["A"] @ own["w"]["B"]
                if "m" in own["w"]:
                    w = w * (own["w"]["m"] / norm(w))[None]
            return jnp.sum(jnp.tanh(x @ w) ** 2)

        both = jax.jit(lambda own: [jax.grad(f)(own) for f in (adapted, by_hand)])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), *both(adapters)
        )


def test_nested_adapters_on_a_quantized_stack():
    dense = asarray(normal(3, 12, 12) / 4, "float32")
    params = {"w": lora_jax.quant.quantize_int8(dense, batch_axes=1)}
    like, x = {"w": lora_jax.quant.dequantize(params["w"])}, asarray(X, "float32")
    function, adapters, weights = nested("dd", layers, like, x)
    got = jax.jit(function)(params, *adapters, x)
    np.testing.assert_allclose(got, layers(weights, x), rtol=0, atol=2e-5)


def test_nested_dropout_leaves_the_norms_alone():
    params, x = {"w": asarray(W, "float32")}, asarray(X, "float32")
    inner = plan_of(model, params, x, use_dora=True)
    outer = plan_of(model, params, x, dropout=0.5)
    own = [trained(params, plan, seed=i) for i, plan in enumerate((outer, inner))]
    function = lora_jax.adapt(model, inner)
    function = lora_jax.adapt(function, outer, dropout_key=jax.random.key(0))
    # A magnitude that makes the factor 1 says what the norm is.
    first = lora_jax.merge_adapters(params, own[0], outer)
    dropped = lora_jax.adapt(model, outer, dropout_key=jax.random.key(0))
    own[1]["w"]["B"] = np.zeros_like(own[1]["w"]["B"])
    own[1]["w"]["m"] = lora_jax.adapted_column_norms(first, own[1], inner)["w"]
    both = jax.jit(lambda: (function(params, *own, x), dropped(params, own[0], x)))
    np.testing.assert_allclose(*both(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("mapped", [None, "weight", "left", "right", "columns", "out"])
def test_shapes_show_which_norms_are_mapped(mapped, axis):
    kept, left = (10, (3, 12, 4)) if axis == -2 else (12, (3, 4, 10))
    shapes = {"weight": (3, 12, 10), "left": left, "right": (3, 4, kept)}
    shapes |= {"columns": (3, kept), "out": (3, kept)}
    if mapped:
        shapes[mapped] = (3, *shapes[mapped])
    out = shapes.pop("out")
    arrays = {name: jax.ShapeDtypeStruct(shape, "f4") for name, shape in shapes.items()}
    is_matrix = _norms._is_matrix(Matrix(**arrays), axis, out)
    assert is_matrix == (mapped is None)


def test_norms_of_weights_of_one_shape_are_one_function():
    def deep(params, x):
        for w in params["w"]:
            x = jnp.tanh(x @ w)
        return x

    params = {"w": [asarray(normal(12, 12, seed=i), "float32") for i in range(6)]}
    x = asarray(X, "float32")
    plan = plan_of(deep, params, x, use_dora=True)
    adapters = trained(params, plan)
    text = jax.jit(lora_jax.adapt(deep, plan)).lower(params, adapters, x).as_text()
    assert text.count("func.func private @lora_jax_column_norms") == 1
    assert text.count("call @lora_jax_column_norms") == 6


def coupling_flow(params, x):
    total = 0.0
    for layer in params:
        a, b = jnp.split(x, 2, axis=-1)
        log_scale = jnp.tanh(jnp.tanh(a @ layer["up"]) @ layer["scale"])
        b = b * jnp.exp(log_scale) + a @ layer["shift"]
        x, total = jnp.concatenate([b, a], axis=-1), total + log_scale.sum(-1)
    return x, total


def test_new_adapters_of_a_flow_change_no_bit_and_under_jit_roundings(fresh_operations):
    shapes = {"up": (6, 16), "scale": (16, 6), "shift": (6, 6)}
    params = [
        {name: asarray(normal(*s, seed=i) / 3, "float32") for name, s in shapes.items()}
        for i in range(3)
    ]
    x = asarray(normal(5, 12), "float32")
    plan = plan_of(coupling_flow, params, x)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    adapted = lora_jax.adapt(coupling_flow, plan)
    jax.tree.map(
        np.testing.assert_array_equal,
        adapted(params, adapters, x),
        coupling_flow(params, x),
    )
    eps = float(jnp.finfo("float32").eps)
    for got, want in zip(
        jax.jit(adapted)(params, adapters, x),
        jax.jit(coupling_flow)(params, x),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=16 * eps * np.abs(want).max())


OUT_OF_RANGE = {
    "matmul": (lambda p, x: x @ p["w"], (12, 10)),
    "transposed": (lambda p, x: x @ p["w"].T, (10, 12)),
    "scaled": (lambda p, x: x @ (p["w"] * 2.0), (12, 10)),
    "heads": (lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"]), (12, 2, 5)),
    "experts": (
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 3], "int32")),
        (2, 12, 10),
    ),
    "convolution": (
        lambda p, x: lax.conv_general_dilated(
            x[None], p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (3, 12, 10),
    ),
    "table": (lambda p, x: p["w"][jnp.array([1, 3])], (12, 10)),
}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_large_a_and_small_b_in_float16(name, use_dora):
    fn, shape = OUT_OF_RANGE[name]
    params, x = {"w": asarray(normal(*shape), "float16")}, asarray(X, "float16")
    plan = plan_of(fn, params, x, targets="*", use_dora=use_dora)
    adapters = trained(params, plan)
    sizes = {"A": 1e6, "B": 1e-6, "m": 1.0}
    adapters = {"w": {k: v * np.float32(sizes[k]) for k, v in adapters["w"].items()}}
    narrow, wide = ((params, x), jax.tree.map(np.float32, (params, x)))
    function = lora_jax.adapt(fn, plan)
    c = normal(*jax.eval_shape(fn, params, x).shape) / 8

    def loss(adapters, params, x):
        return jnp.sum(function(params, adapters, x).astype("float32") * jnp.float32(c))

    def run(adapters, narrow, wide):
        grads = (jax.grad(loss)(adapters, *given) for given in (narrow, wide))
        dense = merged(wide[0], adapters, plan)
        return function(narrow[0], adapters, narrow[1]), fn(dense, wide[1]), *grads

    got, want, *grads = jax.jit(run)(adapters, narrow, wide)
    want = np.float64(want)
    assert got.dtype == jnp.float16
    eps = float(jnp.finfo("float16").eps)
    np.testing.assert_allclose(
        np.float64(got), want, rtol=0, atol=4 * eps * abs(want).max()
    )
    for own, other in zip(*map(jax.tree.leaves, grads), strict=True):
        bound = 4 * eps * np.abs(other).max()
        np.testing.assert_allclose(own, other, rtol=0, atol=bound)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w,
        lambda x, w: lax.ragged_dot(x, w[None], jnp.array([len(x)])),
    ],
    ids=["matmul", "ragged_dot"],
)
def test_large_columns_of_inputs_in_float16(product):
    """The outputs of DoRA are the inputs of a product with the transposed weight."""
    params = {"w": asarray(normal(12, 10, size=1e-3), "float16")}
    x = asarray(normal(5, 10, seed=1), "float16")

    def fn(p, x):
        return product(x, p["w"].T), jnp.ones((1, 12), x.dtype) @ p["w"]

    plan = plan_of(fn, params, x, targets="w", axes={"w": "io"}, use_dora=True)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    adapters["w"]["m"] *= 1e5  # so that a scaled input is out of range
    got, _ = jax.jit(lora_jax.adapt(fn, plan))(params, adapters, x)
    want = np.float64(x) @ np.float64(params["w"]).T * 1e5
    np.testing.assert_allclose(got, want, rtol=0, atol=0.01 * np.max(np.abs(want)))
