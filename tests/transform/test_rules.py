"""What cannot stay low-rank: the reason that is given, and the exact merge instead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax
from lora_jax.transform._moves import MOVES, Row
from tests import programs
from tests.support import normal, x64
from tests.transform.support import check, plan_of, trained

X, W = normal(5, 12), normal(12, 10)
MASK = np.arange(120).reshape(12, 10) % 3 == 0


@jax.custom_vjp
def custom_matmul(x, w):
    return x @ w


custom_matmul.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, 2 * kept[0].T @ g)
)


def growing(p, x):
    return lax.fori_loop(
        0, 2, lambda _, c: (c[0] + x @ c[1], c[1] * 0.5), (x @ p["w"], p["w"])
    )


def by_platform(p, x):
    return lax.platform_dependent(
        x, p["w"], cpu=lambda x, w: x @ w, default=lambda x, w: x @ w * 1.0
    )


def callback(p, x):
    total = jax.ShapeDtypeStruct((), x.dtype)
    return (
        x
        @ jax.pure_callback(np.copy, W, p["w"], vmap_method="sequential")
        * (jnp.zeros(total.shape, total.dtype) + 2.0)
    )


def conv(x, w, **options):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=dimensions, **options
    )


def turned_groups(p, x):
    numbers = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
    return lax.ragged_dot_general(x[:, :10], p["w"][None], jnp.array([5]), numbers)


# A function, its weights, its argument, the primitive, and a part of the reason.
REFUSED = {
    "integers": (
        lambda p, x: x @ p["w"].astype("int32").astype(x.dtype),
        W,
        X,
        "convert_element_type",
        "a cast to int32 has no low-rank form",
    ),
    "nonlinear": (lambda p, x: x @ jnp.tanh(p["w"]), W, X, "tanh", "no low-rank rule"),
    "mask": (
        lambda p, x: x @ (p["w"] * (MASK * 1.0)),
        W,
        X,
        "mul",
        "varies along all axes",
    ),
    "gains_both": (
        lambda p, x: x @ (p["w"][None] * jnp.ones((1, 12, 10)))[0],
        W,
        X,
        "mul",
        "varies along inputs and outputs",
    ),
    "square": (
        lambda p, x: x @ (p["w"] * p["w"]),
        W,
        X,
        "mul",
        "product of adapted weights",
    ),
    "divides": (lambda p, x: x @ (1.0 / p["w"]), W, X, "div", "divides by the weight"),
    "joined_axes": (
        lambda p, x: p["w"].reshape(-1)[:5] + x[:, 0],
        W,
        X,
        "reshape",
        "joins an input axis to an output axis",
    ),
    "clipped": (
        lambda p, x: x @ jnp.clip(p["w"], -1.0, 1.0),
        W,
        X,
        "max|min|clamp",
        "no low-rank rule for it, since it is not linear",
    ),
    "transformed": (
        lambda p, x: x @ jnp.real(jnp.fft.fft(p["w"], axis=0)),
        W,
        X,
        "fft",
        "transform the activations, or the product",
    ),
    "solved": (
        lambda p, x: x @ jnp.linalg.solve(x.T @ x + 9.0 * jnp.eye(12), p["w"]),
        W,
        X,
        "custom_linear_solve",
        "its solver is made for right-hand sides",
    ),
    "solved_with": (
        lambda p, x: jax.scipy.linalg.solve_triangular(
            p["w"][:10] + 9 * jnp.eye(10), x.T[:10]
        ),
        W,
        X,
        "triangular_solve",
        "the weight is its matrix",
    ),
    "padded_between": (
        lambda p, x: (
            x @ lax.pad(p["w"], jnp.zeros((), p["w"].dtype), ((0, 0, 0), (0, 0, 1)))
        ),
        W,
        X,
        "pad",
        "between entries",
    ),
    "chosen": (
        lambda p, x: x @ jnp.where(MASK, p["w"], jnp.zeros_like(p["w"])),
        W,
        X,
        "select_n",
        "no low-rank rule for a choice entry by entry",
    ),
    "changing_carry": (growing, W, X, "while|scan", "carried by a loop that changes it"),
    "custom_rule": (
        lambda p, x: custom_matmul(x, p["w"]),
        W,
        X,
        "custom_vjp",
        "custom deriv",
    ),
    "platform": (by_platform, W, X, "cond", "platforms"),
    "callback": (callback, W, X, "pure_callback", "no low-rank rule"),
    "batched_look_up": (
        lambda p, x: jax.vmap(lambda w, i: w[i])(p["w"], np.arange(12) % 10),
        W,
        X,
        "gather",
        "different indices",
    ),
    "filled_look_up": (
        lambda p, x: lax.gather(
            p["w"],
            np.array([[0, 0], [3, 1]]),
            lax.GatherDimensionNumbers((1,), (0,), (0, 1)),
            (1, 10),
            mode="fill",
            fill_value=0,
        ),
        W,
        X,
        "gather",
        "out of range would fill",
    ),
    "conv_of_the_weight": (
        lambda p, x: conv(p["w"][None, :, :, None], x[:1, :1, None, None]),
        W,
        X,
        "conv_general_dilated",
        "not its kernel",
    ),
    "turned_groups": (turned_groups, W, X, "ragged_dot_general", "groups, in, out"),
    "returned": (lambda p, x: (x @ p["w"], p["w"]), W, X, "output", "returns it"),
}


def config_for(weight):
    axes = "i" * (weight.ndim - 1) + "o"
    return {"targets": "w", "axes": {"w": axes}}


@pytest.mark.whole
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason_and_the_line(name):
    fn, weight, x, primitive, reason = REFUSED[name]
    with x64():
        plan = plan_of(None, {"w": weight}, **config_for(weight))
        adapters = trained({"w": weight}, plan)
        with pytest.raises(
            ValueError, match=f"'w' .*`({primitive}).*{reason}.*on_merge"
        ) as error:
            lora_jax.adapt(fn, plan)({"w": weight}, adapters, x)
    assert name == "returned" or "test_rules.py:" in str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_merged_for_that_use_if_allowed(name):
    fn, weight, x, _, reason = REFUSED[name]
    merges = []
    with x64():
        plan = plan_of(None, {"w": weight}, **config_for(weight))
        if name == "callback":  # which has no derivative
            adapters = trained({"w": weight}, plan)
            model = lora_jax.adapt(fn, plan, on_merge=merges.append)
            want = fn(lora_jax.merge_adapters({"w": weight}, adapters, plan), x)
            assert jnp.allclose(model({"w": weight}, adapters, x), want, rtol=1e-12)
        else:
            check(fn, {"w": weight}, x, plan=plan, on_merge=merges.append)
    assert any(merge.path == "w" and reason in merge.reason for merge in merges)


def _integers_times(weight, dtype):
    integers, axes = jnp.arange(2 * len(weight)).reshape(2, -1), (((1,), (0,)), ((), ()))
    return lax.dot_general(integers, weight, axes, preferred_element_type=dtype)


DORA_REFUSED = {
    "complex": (
        lambda p, x: jnp.real(x.astype("complex128") @ lax.complex(p["w"], p["w"])),
        "complex",
        "not the sum",
    ),
    "summed_up": (
        lambda p, x: x @ jnp.cumsum(p["w"], 1),
        "cumsum",
        "mixes entries along an axis that DoRA scales",
    ),
    "rows_chosen": (
        lambda p, x: x @ jnp.where((jnp.arange(12) > 3)[:, None], p["w"], -p["w"]),
        "select_n",
        "DoRA scales each of the weights differently",
    ),
    "sum": (
        lambda p, x: x * jnp.sum(p["w"], 1)[None],
        "reduce_sum",
        "scales what is summed",
    ),
    "pad": (lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (0, 3))), "pad", "fill value"),
    "added": (lambda p, x: x @ (p["w"] + 1.0), "add", "not the sum"),
    "fused_rows": (
        lambda p, x: (
            jnp.concatenate([x, x], 1) @ jnp.concatenate([p["w"], jnp.ones_like(p["w"])])
        ),
        "dot_general",
        "contracted and kept",
    ),
    "integers": (
        lambda p, x: x @ p["w"] + jnp.sum(_integers_times(p["w"].T, x.dtype)),
        "dot_general",
        "the other operand is int64",
    ),
}


@pytest.mark.parametrize("name", DORA_REFUSED)
def test_refused_for_dora_only(name):
    fn, primitive, reason = DORA_REFUSED[name]
    with x64():
        config = config_for(W)
        check(fn, {"w": W}, X, plan=plan_of(None, {"w": W}, **config))
        plan = plan_of(None, {"w": W}, use_dora=True, **config)
        with pytest.raises(ValueError, match=f"`{primitive}`: .*{reason}"):
            lora_jax.adapt(fn, plan)({"w": W}, trained({"w": W}, plan), X)
        check(fn, {"w": W}, X, plan=plan, on_merge="allow")


def test_two_adapted_weights_may_be_multiplied():
    params = {"a": normal(4, 12), "b": normal(12, 10)}

    def fn(params, x):
        return x @ (params["a"] @ params["b"])

    with x64():
        plan = check(fn, params, X[:, :4])
        assert {path: target.axes for path, target in plan.targets.items()} == {
            "a": "oi",
            "b": "io",
        }
        plan = plan_of(fn, params, X[:, :4], dropout=0.5)
        adapted = lora_jax.adapt(fn, plan, dropout_key=jax.random.key(0))
        with pytest.raises(ValueError, match="adapter of 'a' has dropout"):
            adapted(params, trained(params, plan), X[:, :4])


def test_batch_groups_and_mixed_kernels_are_merged():
    weight, x = normal(3, 3, 4, 6), normal(2, 8, 8, 4)
    with x64():
        for fn, axes, reason in (
            (lambda p, x: conv(x, p["w"], batch_group_count=2), "iiio", "batch groups"),
            (lambda p, x: conv(x, p["w"]), "oiii", "not \\(positions, in\\) and \\(out\\)"),
        ):
            plan = plan_of(None, {"w": weight}, targets="w", axes={"w": axes})
            adapters = trained({"w": weight}, plan)
            with pytest.raises(ValueError, match=reason):
                lora_jax.adapt(fn, plan)({"w": weight}, adapters, x)
            check(fn, {"w": weight}, x, plan=plan, on_merge="allow")


def test_a_value_added_keeps_the_terms_of_both():
    params = {"a": W, "b": normal(12, 10, seed=1)}
    with x64():
        plan = plan_of(None, params)
        check(lambda p, x: x @ (p["a"] - p["b"] + 0.5), params, X, plan=plan)
        check(lambda p, x: x @ (p["a"] - p["a"] + p["b"]), params, X, plan=plan)


def test_an_unknown_parameter_of_a_primitive_is_a_merge():
    # As in a JAX that calls it otherwise.
    from lora_jax.transform._parameters import NotFactorableError, parameter

    equation = jax.make_jaxpr(lambda x: x.T)(W).eqns[0]
    with pytest.raises(NotFactorableError, match="no parameter 'order'"):
        parameter(equation, "order")


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("weight", [(3, 12, 10), (1, 12, 10)])
def test_rows_in_no_group_of_a_ragged_dot_have_no_update(weight, use_dora):
    sizes = np.array([2, 0, 1][: weight[0]], "int32")  # of 8 rows
    with x64():
        params, x = {"w": normal(*weight)}, normal(8, 12)
        for axes in ("bio", "iio", "oio"):
            plan = plan_of(None, params, axes={"w": axes}, use_dora=use_dora)
            check(
                lambda p, x: lax.ragged_dot(x, p["w"], sizes),
                params,
                x,
                plan=plan,
                on_merge="allow",
            )


@pytest.mark.parametrize("fill", [None, 0.0, 7.0])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"axes": {"w": "oi"}}])
def test_what_is_filled_in_for_a_missing_row_is_not_changed(config, fill):
    def fn(params, x):
        rows = params["w"].at[jnp.array([1, 99, 3])].get(mode="fill", fill_value=fill)
        wide = jnp.broadcast_to(params["w"], (4, *W.shape))
        more = wide.at[jnp.array([1, 99])].get(mode="fill", fill_value=fill)
        one = params["w"].at[jnp.array([[1], [99]]), jnp.array([[9], [2]])]
        entries = one.get(mode="clip"), one.get(mode="fill", fill_value=fill)
        return jax.tree.map(jnp.nan_to_num, (rows + x[:3, :1], more, *entries))

    with x64():
        plan = plan_of(None, {"w": W}, **config)
        check(fn, {"w": W}, X, plan=plan, on_merge="allow")


def stacked(names):
    def fn(params, x):
        layers = jnp.stack([params[name] for name in names])
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, layers)[0]

    return fn


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"exclude": "w1"},
        {"exclude": "w1", "use_dora": True},
        {"rank_pattern": {"w0": 5}},
        {"alpha_pattern": {"w2": 1.0}},
    ],
)
def test_layers_stacked_by_the_function_do_not_pay_for_each_other(config):
    names = [f"w{i}" for i in range(4)]
    params = {name: normal(12, 12, seed=i) for i, name in enumerate(names)}
    with x64():
        plan = check(stacked(names), params, X, config=config)
        adapters = trained(params, plan)
        adapted = lora_jax.adapt(stacked(names), plan)
        jaxpr = str(jax.make_jaxpr(adapted)(params, adapters, X))
    body = jaxpr[jaxpr.rindex("scan[") :]
    assert body.count("dot_general[") == 3


def test_layers_stacked_in_either_orientation():
    params = {"a": normal(12, 12), "b": normal(12, 12, seed=1)}
    with x64():
        plan = plan_of(None, params, axes={"a": "io", "b": "oi"})
        check(stacked("ab"), params, X, plan=plan)


def test_a_checkpoint_in_a_gradient_in_the_function_keeps_its_barrier():
    @jax.checkpoint
    def energy(w, x):
        return jnp.sum(jnp.tanh(jnp.sin(x @ w)))

    def force(params, x):
        return jax.grad(energy, argnums=1)(params["w"], x)

    with x64():
        plan = check(force, {"w": W}, X)
        adapters = trained({"w": W}, plan)
        lowered = jax.jit(lora_jax.adapt(force, plan)).lower({"w": W}, adapters, X)
        plain = jax.jit(force).lower({"w": W}, X)
    barriers = [text.as_text().count("optimization_barrier") for text in (lowered, plain)]
    assert barriers[0] >= barriers[1] > 0


@pytest.mark.parametrize(
    ("groups", "features", "convolutions"), [(8, 8, 1), (2, 6, 1), (2, 8, 2)]
)
def test_grouped_kernels_of_high_rank_are_merged_for_the_convolution(
    groups, features, convolutions
):
    weight, x = normal(3, 3, 8 // groups, features), normal(2, 8, 8, 8)

    def fn(params, x):
        return conv(x, params["w"], feature_group_count=groups)

    with x64():
        plan = check(fn, {"w": weight}, x, config={"targets": "w"})
        adapters = trained({"w": weight}, plan)
        jaxpr = jax.make_jaxpr(lora_jax.adapt(fn, plan))({"w": weight}, adapters, x)
    assert str(jaxpr).count("conv_general_dilated[") == convolutions


@pytest.mark.parametrize("shape", [(20, 4, 2, 3), (2, 3, 20, 4)])
def test_the_factor_that_costs_less_comes_first(shape):
    """Each factor has an axis that is summed and one that is kept."""
    params, x = {"w": jnp.ones(shape)}, jnp.ones((100, shape[0], shape[2]))
    fn = lambda p, x: jnp.einsum("nio,ijop->njp", x, p["w"])  # noqa: E731
    plan = plan_of(fn, params, x, axes={"w": "iioo"})
    adapters = trained(params, plan)
    compiled = jax.jit(lora_jax.adapt(fn, plan)).lower(params, adapters, x).compile()
    i, j, o, p = shape
    a_first, b_first = 3 * (i * j * o + j * o * p), 3 * (i * o * p + i * j * p)
    least = 200 * (i * j * o * p + min(a_first, b_first))
    assert programs.product_flops(compiled.as_text()) == least


def test_a_column_of_a_weight_keeps_its_dropout():
    def fn(params, x):
        return x @ params["w"][:, 0]

    plan = plan_of(lambda p, x: x @ p["w"], {"w": W}, X, dropout=0.5)
    adapters = trained({"w": W}, plan)
    with_key = lora_jax.adapt(fn, plan, dropout_key=jax.random.key(0))
    without = lora_jax.adapt(fn, plan)
    assert not np.allclose(with_key({"w": W}, adapters, X), without({"w": W}, adapters, X))
    summed = lora_jax.adapt(
        lambda p, x: jnp.sum(p["w"], 0), plan, dropout_key=jax.random.key(0)
    )
    with pytest.raises(ValueError, match="merges or sums"):
        summed({"w": W}, adapters, X)


def own_derivative(fn, kind=jax.custom_vjp):
    """A function with a derivative of its own, whose backward rule is all wrong."""
    own = kind(fn)
    if kind is jax.custom_jvp:
        own.defjvp(lambda x, t: (fn(*x), 2 * jax.jvp(fn, x, t)[1]))
    else:
        own.defvjp(
            lambda x, w: (fn(x, w), (x, w)),
            lambda kept, g: jax.tree.map(lambda v: 2 * v, jax.vjp(fn, *kept)[1](g)),
        )
    return own


def in_float8(x, w):
    scale = jnp.max(jnp.abs(w)) / 448
    codes = jnp.clip(w / scale, -448, 448).astype("float8_e4m3fn").astype(w.dtype)
    return (x @ codes) * scale


def in_int8(x, w):
    scale = jnp.max(jnp.abs(w), axis=1, keepdims=True) / 127
    return (x @ jnp.round(w / scale).astype("int8").astype(x.dtype).T) * scale.T


product = own_derivative(lambda x, w: x @ w)
turned = own_derivative(lambda x, w: x @ w.T)
SQUARE = normal(12, 12)


def batched_product():
    own = jax.custom_batching.custom_vmap(lambda x, w: x @ w)
    own.def_vmap(lambda size, batched, x, w: (x @ w, True))
    return own


def backward_only(x, w):
    """A function that multiplies by the weight in its backward rule alone."""
    own = jax.custom_vjp(lambda x, w: x + w[0, 0])
    own.defvjp(lambda x, w: (x + w[0, 0], w), lambda w, g: (g @ w @ w.T, w))
    return own(x, w)


# A function of x and a weight that needs it merged, the weight, and its axes.
BODIES = {
    "vjp": (product, W, "io"),
    "jvp": (own_derivative(lambda x, w: x @ w, jax.custom_jvp), W, "io"),
    "turned": (turned, W.T, "oi"),
    "turned_outside": (lambda x, w: product(x, w.T), W.T, "oi"),
    "heads": (
        own_derivative(lambda x, w: jnp.einsum("bd,dhk->bhk", x, w)),
        normal(12, 2, 5),
        "ioo",
    ),
    "nested": (own_derivative(lambda x, w: jnp.sin(product(x, w))), W, "io"),
    "jit": (own_derivative(jax.jit(lambda x, w: x @ w)), W, "io"),
    "checkpoint": (jax.checkpoint(lambda x, w: product(x, w)), W, "io"),
    "groups": (
        own_derivative(lambda x, w: lax.ragged_dot(x, w, jnp.array([2, 3]))),
        normal(2, 12, 10),
        "bio",
    ),
    "scanned": (
        lambda x, w: lax.scan(lambda h, w: (product(h, w), None), x, w)[0],
        normal(3, 12, 12),
        "bio",
    ),
    "scanned_inside": (
        own_derivative(
            lambda x, w: lax.scan(lambda h, w: (h @ w, None), x, w)[0],
        ),
        normal(3, 12, 12),
        "bio",
    ),
    "indexed": (lambda x, w: product(product(x, w[0]), w[1]), normal(3, 12, 12), "bio"),
    "loop": (
        own_derivative(lambda x, w: lax.fori_loop(0, 3, lambda _, h: h @ w, x)),
        SQUARE,
        "io",
    ),
    "mapped": (
        lambda x, w: jax.vmap(product)(jnp.stack([x, x]), w),
        normal(2, 12, 10),
        "bio",
    ),
    "first_use_decides": (lambda x, w: product(turned(x, w), w), W.T, "oi"),
    "float8": (own_derivative(in_float8), W, "io"),
    "int8": (own_derivative(in_int8), W.T, "oi"),
    "custom_vmap": (batched_product(), W, "io"),
    "identity": (lambda x, w: x @ own_derivative(lambda _, w: w)(x, w), W, "io"),
    "straight_through": (
        lambda x, w: x @ own_derivative(lambda _, w: jnp.round(w))(x, w).T,
        W.T,
        "oi",
    ),
    "two_results": (
        lambda x, w: x @ own_derivative(lambda x, w: (x * 2, w * jnp.max(w)))(x, w)[1],
        W,
        "io",
    ),
    "backward_only": (backward_only, SQUARE, "..."),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", BODIES)
def test_the_axes_are_read_from_the_body_of_a_call(name):
    call, weight, letters = BODIES[name]
    params = {"other": SQUARE, "w": weight}

    def fn(params, x):
        return call(x @ params["other"], params["w"])

    plan = plan_of(fn, params, X)
    assert list(plan.targets) == ["other"]
    (line,) = [line for line in str(plan).splitlines() if line.startswith("left out")]
    verb = "no matrix product uses it" if letters == "..." else "only uses that need the"
    assert line.startswith(f"left out: 'w': {verb}")
    assert "test_rules.py:" in line
    with pytest.raises(ValueError, match="every use of it needs the merged") as error:
        plan_of(fn, params, X, targets="w")
    assert f"axes={{'w': \"{letters}\"}}" in str(error.value)
    assert "adapt(fn, plan, on_merge='allow')" in str(error.value)
    axes = "io" if letters == "..." else letters
    if name == "custom_vmap":  # which has no derivative
        return
    with x64():
        config = {"targets": "w", "axes": {"w": axes}}
        plan = check(fn, params, X, config=config, on_merge="allow")
        assert plan.targets["w"].axes == axes
        assert "to be merged: 'w', " in str(plan)
        with pytest.raises(ValueError, match=r"'w' .* reaches `custom_"):
            lora_jax.adapt(fn, plan)(params, trained(params, plan), X)


def test_a_callback_has_no_body_to_read():
    def fn(params, x):
        result = jax.ShapeDtypeStruct((5, 10), "float32")
        y = jax.pure_callback(np.matmul, result, x, params["w"])
        return y, x @ params["other"]

    params = {"other": SQUARE, "w": W}
    with pytest.raises(ValueError, match="no body to read the axes from") as error:
        plan_of(fn, params, X, targets="w")
    assert 'axes={\'w\': "..."} (for "..." one letter for each axis' in str(error.value)


def test_a_kernel_has_no_body_to_read():
    from jax.experimental import pallas as pl

    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    def fn(params, x):
        shape = jax.ShapeDtypeStruct((5, 10), "float32")
        call = pl.pallas_call(kernel, out_shape=shape, interpret=True)
        return call(x, params["w"]), x @ params["other"]

    params = jax.tree.map(jnp.float32, {"other": SQUARE, "w": W})
    plan = plan_of(fn, params, jnp.float32(X))
    assert "left out: 'w': no matrix product uses it, only pallas_call" in str(plan)
    assert "no body to read the axes from" in str(plan)


def test_a_table_with_a_fused_loss_is_one_all_the_same():
    loss = own_derivative(lambda h, table: jax.nn.logsumexp(h @ table.T, axis=-1))

    def fn(params, x):
        return loss(params["table"][jnp.arange(5)] + x, params["table"])

    with x64():
        params, config = {"table": normal(9, 12)}, {"targets": "table"}
        plan = check(fn, params, X, config=config, on_merge="allow")
    assert plan.targets["table"].axes == "io"


def test_left_out_layers_share_a_line():
    params = {
        "layers": [{"up": normal(12, 12, seed=i), "scale": np.ones(12)} for i in range(3)],
        "stack": {"bias": normal(3, 12), "w": normal(3, 12, 12)},
        "positions": normal(5, 12),
        "unused": W,
        "out": W,
    }

    def fn(params, x):
        x = x + params["positions"]
        for layer in params["layers"]:
            x = product(x, layer["up"]) * layer["scale"][None]
        stack = params["stack"]
        x, _ = lax.scan(lambda h, s: (h @ s["w"] + s["bias"][None], None), x, stack)
        return x @ params["out"]

    lines = str(plan_of(fn, params, X)).splitlines()
    left_out = [line.split(" at ")[0] for line in lines if line.startswith("left out")]
    assert left_out == [
        "left out: 3 weights 'layers/*/up': only uses that need the merged weight multiply "
        "it: custom_vjp_call",
        "left out: 'positions': it is added to something, as biases and position "
        "embeddings are: add",
        "left out: 'unused': the function never uses it",
    ]
    by_name = str(plan_of(fn, params, X, targets="out"))
    without = str(plan_of(fn, params, X, exclude=("*/up", "positions", "unused")))
    assert "left out" not in by_name + without


def fails(equation):
    raise TypeError("no rule for\nthis")


def test_weights_whose_rule_fails_are_left_out_unless_named(monkeypatch):
    monkeypatch.setitem(MOVES, "transpose", Row(fails))

    def fn(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"].T

    params = {"up": jnp.ones((4, 6)), "down": jnp.ones((5, 6))}
    plan = plan_of(fn, params, jnp.ones((3, 4)))
    assert list(plan.targets) == ["up"]
    assert "transpose at tests/transform/test_rules.py" in plan.skipped["down"]
    assert "TypeError: no rule for" in plan.explain("down")
    assert list(plan_of(fn, params, jnp.ones((3, 4)), targets="up").targets) == ["up"]
    with pytest.raises(ValueError, match=r"'down': .* cannot be followed .* TypeError"):
        plan_of(fn, params, jnp.ones((3, 4)), targets="*")
    given = plan_of(fn, params, jnp.ones((3, 4)), targets="*", axes={"down": "oi"})
    assert given.targets["down"].axes == "oi"
    with pytest.raises(TypeError, match="no rule for"):
        lora_jax.adapt(fn, given)(params, trained(params, given), jnp.ones((3, 4)))
