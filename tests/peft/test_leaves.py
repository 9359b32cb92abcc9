"""What a function, a plan or names say of axes that shapes leave open."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax
from lora_jax import peft
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.leaves import agrees, find_known
from tests.peft.support import draw, linear, merged, update_of, write
from tests.support import asarray, html_cells

LAYERS = HEADS = 3
SIZE, WIDTH = 2, 6
OUT = "decoder/layers/out/kernel"


def attention(axis):
    """Output kernels of as many layers as heads, scanned over an axis, and a function."""
    shape = [HEADS, SIZE, WIDTH]
    shape.insert(axis, LAYERS)
    params = {"decoder": {"layers": {"out": {"kernel": asarray(draw(*shape) / 4)}}}}

    def apply(params, x):
        kernels = jnp.moveaxis(params["decoder"]["layers"]["out"]["kernel"], axis, 0)

        def layer(x, kernel):
            heads = jnp.tanh(x).reshape(-1, HEADS, SIZE)
            return x + jnp.einsum("bhk,hkd->bd", heads, kernel), None

        return jax.lax.scan(layer, x, kernels)[0]

    return params, apply, asarray(draw(5, WIDTH))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(("axis", "axes"), [(0, "biio"), (1, "ibio")])
def test_layers_that_are_as_many_as_heads(axis, axes, use_dora, tmp_path):
    params, apply, x = attention(axis)
    config = lora_jax.LoraConfig(rank=2, use_dora=use_dora)
    plan = lora_jax.plan_adapters(config, params, apply, x)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    adapters = jax.tree.map(lambda a: a + draw(*a.shape), adapters)
    want = lora_jax.adapt(apply, plan)(params, adapters, x)
    names = {"model.layers.{}.o_proj": OUT}
    peft.save(tmp_path, adapters, plan, names=names)
    with pytest.raises(CheckpointError, match=r"axes 'biio' and 'ibio': shapes do not say"):
        peft.load(tmp_path, params, names=names)
    table = peft.match_names(tmp_path, params, apply, x, names=names)
    lines = [line.split() for line in str(table).splitlines()]
    assert [" ".join(row).split() for row in html_cells(table)] == lines
    letters = {"model.layers.{layer}.o_proj": (OUT, axes.replace("b", "{layer}"))}
    for loaded in (
        peft.load(tmp_path, params, apply, x, names=names),
        peft.load(tmp_path, params, plan=plan, names=names),
        peft.load(tmp_path, params, names={"model.layers.{}.o_proj": (OUT, axes)}),
        peft.load(tmp_path, params, names=letters),
        peft.load(tmp_path, params, names=table),
    ):
        assert loaded.plan.targets[OUT].axes == axes
        got = apply(merged(params, loaded), x)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_square_weights_as_equinox_has_them(tmp_path):
    params = {
        name: {"weight": asarray(draw(6, 6, seed=i))}
        for i, name in enumerate(["up", "down"])
    }

    def apply(params, x):
        return jnp.tanh(x @ params["up"]["weight"].T) @ params["down"]["weight"].T

    x = asarray(draw(5, 6))
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=2), params, apply, x)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    adapters = jax.tree.map(lambda a: a + draw(*a.shape), adapters)
    want = lora_jax.adapt(apply, plan)(params, adapters, x)
    peft.save(tmp_path, adapters, plan)
    with pytest.raises(
        CheckpointError, match=r"'up/weight' \(6, 6\) fits 'up' .*'io'.*'oi'"
    ):
        peft.load(tmp_path, params)
    for loaded in (
        peft.load(tmp_path, params, apply, x),
        peft.load(tmp_path, params, plan=plan),
        peft.load(tmp_path, params, layout="torch"),
    ):
        got = apply(merged(params, loaded), x)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    turned = peft.load(tmp_path, params, layout="jax").plan.targets["up/weight"]
    assert turned.axes == "io"
    kernels = {name: {"kernel": own["weight"]} for name, own in params.items()}
    assert peft.load(tmp_path, kernels).plan.targets["up/kernel"].axes == "io"


def test_other_weights_show_how_square_ones_lie(tmp_path):
    entries = linear("m.q", 5, 5, 2) | linear("m.up", 5, 7, 2)
    folder = write(tmp_path, entries, r=2, target_modules=["q", "up"])
    params = {"m": {"q": jnp.zeros((5, 5)), "up": jnp.zeros((5, 7))}}
    assert peft.load(folder, params).plan.targets["m/q"].axes == "io"
    # An embedding lies alike in all layouts, and shows nothing.
    entries = linear("m.q", 5, 5, 2) | {
        "m.e.lora_embedding_A": draw(2, 9),
        "m.e.lora_embedding_B": draw(5, 2),
    }
    folder = write(tmp_path / "own", entries, r=2, target_modules=["q", "e"])
    params = {"m": {"q": {"weight": jnp.zeros((5, 5))}, "e": {"weight": jnp.zeros((9, 5))}}}
    with pytest.raises(CheckpointError, match=r"'io' .*'oi'"):
        peft.load(folder, params)


NAME = "model.layers.{}.mlp.experts.{}.up"
WI = "layers/experts/up/kernel"
NAMED = {"model.layers.{layer}.mlp.experts.{expert}.up": (WI, "{expert}{layer}io")}


def experts_first(experts, layers=3):
    entries = {}
    for layer in range(layers):
        for expert in range(experts):
            name = NAME.format(layer, expert)
            entries |= linear(name, 5, 7, 2, seed=10 * layer + expert)
    kernel = asarray(draw(experts, layers, 5, 7))
    return entries, {"layers": {"experts": {"up": {"kernel": kernel}}}}


def check_experts(loaded, params, entries):
    old = np.asarray(params["layers"]["experts"]["up"]["kernel"])
    new = np.asarray(merged(params, loaded)["layers"]["experts"]["up"]["kernel"])
    for expert, layer in np.ndindex(*old.shape[:2]):
        want = old[expert, layer] + update_of(entries, NAME.format(layer, expert), 2.0)
        np.testing.assert_allclose(new[expert, layer], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "names",
    [
        NAMED,
        {NAME: (WI, "{experts}{layers}io")},
        {"model.layers.{}.mlp.experts.{e}.up": (WI, "{e}{layers}io")},
    ],
)
@pytest.mark.parametrize("experts", [3, 4])
def test_experts_in_front_of_layers(experts, names, tmp_path):
    entries, params = experts_first(experts)
    folder = write(tmp_path / "in", entries, r=2, lora_alpha=4, target_modules=["up"])
    loaded = peft.load(folder, params, names=names)
    check_experts(loaded, params, entries)
    table = peft.match_names(folder, params, names=names)
    line = next(
        line for line in str(table).splitlines() if "layers.1.mlp.experts.2" in line
    )
    assert line.split() == [
        "model.layers.1.mlp.experts.2.up", f"{WI}[2,", "1]", f"({experts},", "3,", "5,",
        "7)", "{experts}{layers}io",
    ]  # fmt: skip
    check_experts(peft.load(folder, params, names=table), params, entries)
    for own in (names, table):
        peft.save(tmp_path / "out", loaded.adapters, loaded.plan, names=own)
        check_experts(peft.load(tmp_path / "out", params, names=names), params, entries)


def test_an_order_that_shapes_leave_open(tmp_path):
    entries, params = experts_first(3)
    folder = write(tmp_path, entries, r=2, lora_alpha=4, target_modules=["up"])

    def apply(params, x):
        kernels = jnp.moveaxis(params["layers"]["experts"]["up"]["kernel"], 1, 0)
        layer = lambda x, k: (jnp.einsum("ebd,edf->ebf", x, k)[..., :5], None)  # noqa: E731
        return jax.lax.scan(layer, x, kernels)[0]

    for names in (None, {NAME: WI}, {NAME: (WI, "bbio")}):
        for more in ((), (apply, jnp.zeros((3, 2, 5)))):
            with pytest.raises(
                CheckpointError, match=r"'{layers}{experts}io' and '{experts}{layers}io'"
            ):
                peft.load(folder, params, *more, names=names)
    loaded = peft.load(folder, params, apply, jnp.zeros((3, 2, 5)), names=NAMED)
    check_experts(loaded, params, entries)
    # With another number of experts, one order has no room for all indexes.
    entries, params = experts_first(4)
    folder = write(tmp_path / "own", entries, r=2, lora_alpha=4, target_modules=["up"])
    check_experts(peft.load(folder, params), params, entries)


@pytest.mark.parametrize("axes", ["b{layer}io", "{layer}bio"])
def test_stacks_of_experts_in_a_stack_of_layers(axes, tmp_path):
    n, entries = 3, {}
    for layer in range(n):
        name = f"model.layers.{layer}.experts"
        entries |= {f"{name}.lora_A.weight": draw(2 * n, 5, seed=layer)}
        entries |= {f"{name}.lora_B.weight": draw(7, 2 * n, seed=layer)}
    config = {"r": 2, "lora_alpha": 4, "target_parameters": ["experts.up"]}
    folder = write(tmp_path / "in", entries, **config)
    params = {"layers": {"experts": {"up": jnp.zeros((n, n, 5, 7))}}}
    with pytest.raises(CheckpointError, match=r"'{layers}bio' and 'b{layers}io'"):
        peft.load(folder, params)
    names = {"model.layers.{layer}.experts.up": ("layers/experts/up", axes)}
    loaded = peft.load(folder, params, names=names)
    peft.save(tmp_path / "out", loaded.adapters, loaded.plan, names=names)
    for each in (loaded, peft.load(tmp_path / "out", params, names=names)):
        got = np.asarray(merged(params, each)["layers"]["experts"]["up"])
        got = got if axes.startswith("{") else got.swapaxes(0, 1)
        for layer in range(n):
            name = f"model.layers.{layer}.experts.lora_"
            a = entries[f"{name}A.weight"].reshape(n, 2, 5)
            b = entries[f"{name}B.weight"].reshape(7, 2, n)
            want = 2 * np.einsum("ore,eri->eio", b.astype(float), a)
            np.testing.assert_allclose(got[layer], want, rtol=1e-5, atol=1e-5)


def convolve(numbers, params, x):
    kernel = params["c"]["weight"]
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers
    )


CONVOLUTIONS = [
    (("NHWC", "HWIO", "NHWC"), (1, 4, 4, 3), (2, 3, 1, 0)),
    (("NCHW", "OIHW", "NCHW"), (1, 3, 4, 4), (0, 1, 2, 3)),
]


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(("numbers", "x", "order"), CONVOLUTIONS)
def test_convolutions_of_equal_sizes(numbers, x, order, saved, tmp_path):
    """The kernel of an adapter, or one that is saved whole."""
    a, b, kernel = draw(2, 3, 3, 3), draw(3, 2, 1, 1), draw(3, 3, 3, 3)
    if saved:
        entries = {"c.weight": kernel} | linear("q", 5, 7, 2)
        config = {"target_modules": ["q"], "modules_to_save": ["c"]}
        message = r"'c.weight' fits 'c/weight' .* in 2 ways"
    else:
        entries = {"c.lora_A.weight": a, "c.lora_B.weight": b}
        entries |= linear("q", 5, 7, 2)
        config, message = {"target_modules": ["c", "q"]}, r"'iiio' .*'oiii'"
    folder = write(tmp_path, entries, r=2, lora_alpha=4, **config)
    params = {"c": {"weight": jnp.zeros((3, 3, 3, 3))}, "q": {"kernel": jnp.zeros((5, 7))}}
    with pytest.raises(CheckpointError, match=message):
        peft.load(folder, params)

    def apply(params, x):
        return convolve(numbers, params, x), jnp.zeros((1, 5)) @ params["q"]["kernel"]

    x = jax.ShapeDtypeStruct(x, "float32")
    loaded = peft.load(folder, params, apply, x)
    update = 2 * np.einsum("or,rihw->oihw", b[:, :, 0, 0].astype(float), a)
    want = kernel if saved else update
    got = merged(params, loaded)["c"]["weight"]
    np.testing.assert_allclose(got, want.transpose(order), rtol=1e-5, atol=1e-5)

    config = lora_jax.LoraConfig(2, targets="q/*")
    plan = lora_jax.plan_adapters(config, params, apply, x)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    own = {"c/weight": asarray(kernel.transpose(order))}
    peft.save(tmp_path / "again", adapters, plan, replaced=own)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    np.testing.assert_array_equal(again["base_model.model.c.weight"], kernel)


@pytest.mark.parametrize("lies", ["rows", "columns"])
def test_stacks_of_tables_and_of_kernels_are_saved_by_their_uses(lies, tmp_path):
    books, kernels = draw(2, 7, 5), draw(2, 4, 3, 3, 3)
    turn = {"rows": (0, 1, 2), "columns": (0, 2, 1)}[lies]
    order = {"rows": (0, 3, 4, 2, 1), "columns": (0, 1, 2, 3, 4)}[lies]
    numbers, x = {
        "rows": (("NHWC", "HWIO", "NHWC"), jnp.ones((1, 4, 4, 3))),
        "columns": (("NCHW", "OIHW", "NCHW"), jnp.ones((1, 3, 4, 4))),
    }[lies]
    params = {
        "tok": {"weight": asarray(books.transpose(turn))},
        "c": {"weight": asarray(kernels.transpose(order))},
        "q": {"kernel": jnp.zeros((5, 6))},
    }

    def apply(params, ids, x):
        table, kernel = params["tok"]["weight"], params["c"]["weight"]
        rows = sum((table[i].T if lies == "columns" else table[i])[ids] for i in range(2))
        return rows @ params["q"]["kernel"], [
            convolve(numbers, {"c": {"weight": kernel[i]}}, x) for i in range(2)
        ]

    config = lora_jax.LoraConfig(2, targets="q/*", train=["tok/*", "c/*"])
    plan = lora_jax.plan_adapters(config, params, apply, jnp.arange(3), x)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    names = {"tok.{}": "tok/weight", "c.{}": "c/weight"}
    peft.save(tmp_path / "a", adapters, plan, names=names)
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for i in range(2):
        tok, c = (saved[f"base_model.model.{name}.{i}.weight"] for name in ("tok", "c"))
        np.testing.assert_array_equal(tok, books[i])
        np.testing.assert_array_equal(c, kernels[i])


@pytest.mark.parametrize(
    "numbers",
    [
        ("NHWC", "OHWI", "NHWC"),
        ("NCHW", "IOHW", "NCHW"),
        ("NHWC", "IHWO", "NHWC"),
        ("NHWC", "WHIO", "NHWC"),
    ],
)
def test_kernels_in_other_orders_are_an_error(numbers, tmp_path):
    """The sizes do not show the order, and the function does."""
    entries = {"c.lora_A.weight": draw(2, 3, 3, 3), "c.lora_B.weight": draw(3, 2, 1, 1)}
    full = {"c.weight": draw(3, 3, 3, 3)} | linear("q", 5, 7, 2)
    kernel = jnp.zeros((3, 3, 3, 3))
    params = {"c": {"weight": kernel}, "q": {"kernel": jnp.zeros((5, 7))}}

    def apply(params, x):
        return convolve(numbers, params, x), jnp.zeros((1, 5)) @ params["q"]["kernel"]

    x = jnp.zeros((1, 4, 4, 3) if numbers[0] == "NHWC" else (1, 3, 4, 4))
    one = write(tmp_path / "one", entries, r=2, target_modules=["c"])
    saved = {"target_modules": ["q"], "modules_to_save": ["c"]}
    for folder in (one, write(tmp_path / "full", full, r=2, **saved)):
        with pytest.raises(CheckpointError, match=r"'c/weight' .*\(\*kernel, in, out\)"):
            peft.load(folder, params, apply, x)
    plan = lora_jax.plan_adapters(
        lora_jax.LoraConfig(rank=2, targets="c/*"), params, apply, x
    )
    plan = lora_jax.AdapterPlan.from_json(plan.to_json())
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    with pytest.raises(ValueError, match=r"at 'c/weight': .*\(\*kernel, in, out\)"):
        peft.save(tmp_path / "out", adapters, plan)
    plan = lora_jax.plan_adapters(
        lora_jax.LoraConfig(rank=2, targets="q/*"), params, apply, x
    )
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    with pytest.raises(ValueError, match=r"at 'c/weight': .*\(\*kernel, in, out\)"):
        peft.save(tmp_path / "out", adapters, plan, replaced={"c/weight": kernel})


@pytest.mark.parametrize("lies", ["rows", "columns"])
@pytest.mark.parametrize("n_entries", [5, 7])
def test_tables_that_are_looked_up_in_either_layout(n_entries, lies, tmp_path):
    table, rows = draw(n_entries, 5), draw(2, 5, seed=1)
    turn = np.transpose if lies == "columns" else np.array
    params = {"tok": {"weight": asarray(turn(table))}, "q": {"kernel": jnp.zeros((5, 7))}}

    def apply(params, ids):
        return turn_of(params["tok"]["weight"])[ids] @ params["q"]["kernel"]

    turn_of = jnp.transpose if lies == "columns" else jnp.asarray
    layer, ids = linear("q", 5, 7, 2), jnp.arange(3)
    new = draw(n_entries, 5, seed=2)
    config = {"r": 2, "target_modules": ["q"]}
    saved = write(
        tmp_path / "saved", layer | {"tok.weight": new}, **config, modules_to_save=["tok"]
    )
    found = peft.load(saved, params, apply, ids).replaced["tok/weight"]
    np.testing.assert_array_equal(found, turn(new))
    name = "tok.token_adapter.trainable_tokens_delta"
    some = write(
        tmp_path / "some", layer | {name: rows}, **config, trainable_token_indices=[4, 1]
    )
    found = peft.load(some, params, apply, ids).replaced["tok/weight"]
    table[[4, 1]] = rows
    np.testing.assert_array_equal(found, turn(table))

    config = lora_jax.LoraConfig(2, targets="q/*", train="tok/*")
    plan = lora_jax.plan_adapters(config, params, apply, ids)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    adapters["tok/weight"]["value"] = asarray(turn(new))
    peft.save(tmp_path / "again", adapters, plan)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    np.testing.assert_array_equal(again["base_model.model.tok.weight"], new)


@pytest.mark.parametrize(("equation", "axes"), [("io", "bio"), ("oi", "boi")])
def test_experts_as_wide_as_long(equation, axes, tmp_path):
    entries = {"m.lora_A.weight": draw(6, 5), "m.lora_B.weight": draw(5, 6)}
    folder = write(tmp_path, entries, r=2, target_parameters=["m.w"])
    params = {"m.w": jnp.zeros((3, 5, 5))}
    with pytest.raises(CheckpointError, match=r"'bio' and 'boi'"):
        peft.load(folder, params, layout="torch")
    apply = lambda params, x: jnp.einsum(f"ebi,e{equation}->ebo", x, params["m.w"])  # noqa: E731
    for layout in (None, "jax", "torch"):
        loaded = peft.load(folder, params, apply, jnp.zeros((3, 2, 5)), layout=layout)
        assert loaded.plan.targets["m.w"].axes == axes


@pytest.mark.parametrize(
    ("equation", "shape", "axes"),
    [
        ("btd,ndh->btnh", (2, 6, 3), "oio"),
        ("btd,nhd->btnh", (2, 3, 6), "ooi"),
        ("btd,dnh->btnh", (6, 2, 3), "ioo"),
    ],
)
def test_heads_wherever_they_are(equation, shape, axes, tmp_path):
    entries = linear("q", 6, 6, 2)
    folder = write(tmp_path, entries, r=2, lora_alpha=4, target_modules=["q"])
    params = {"q": {"w": jnp.zeros(shape)}}
    apply = lambda params, x: jnp.einsum(equation, x, params["q"]["w"])  # noqa: E731
    x = asarray(draw(1, 4, 6))
    loaded = peft.load(folder, params, apply, x)
    assert loaded.plan.targets["q/w"].axes == axes
    got = apply(merged(params, loaded), x).reshape(4, 6)
    np.testing.assert_allclose(
        got, x[0] @ update_of(entries, "q", 2.0), rtol=1e-4, atol=1e-5
    )


def test_norms_and_biases_that_are_stacked_behind(tmp_path):
    n, entries = 3, {}
    for i in range(n):
        entries |= linear(f"h.{i}.q", 5, 6, 2, seed=i)
        entries |= {f"h.{i}.q.lora_B.bias": draw(6, seed=i)}
        entries |= {f"h.{i}.norm.weight": draw(n, seed=i)}
    folder = write(
        tmp_path, entries, r=2, lora_alpha=2, lora_bias=True, target_modules=["q"],
        modules_to_save=["norm"],
    )  # fmt: skip
    shapes = {
        "q": {"kernel": (5, n, n, 2), "bias": (n, n, 2)},
        "norm": {"scale": (n, n)},
    }
    params = {"h": jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))}

    def apply(params, x, y):
        own = params["h"]
        kernel, bias = (jnp.moveaxis(own["q"][k], 1, 0) for k in ("kernel", "bias"))

        def layer(carry, layer):
            kernel, bias, scale = layer
            return carry, (jnp.einsum("bd,dhk->bhk", x, kernel) + bias[None], y * scale)

        return jax.lax.scan(layer, 0.0, (kernel, bias, own["norm"]["scale"].T))[1]

    with pytest.raises(CheckpointError, match=r"norm/scale' \(3, 3\) in 2 ways"):
        peft.load(folder, params)
    loaded = peft.load(folder, params, apply, jnp.zeros((2, 5)), jnp.zeros(n))
    assert loaded.plan.targets["h/q/kernel"].axes == "iboo"
    for i in range(n):
        got = loaded.replaced["h/norm/scale"][:, i]
        np.testing.assert_array_equal(got, entries[f"h.{i}.norm.weight"])
        got = loaded.replaced["h/q/bias"][:, i].reshape(-1)
        np.testing.assert_allclose(got, entries[f"h.{i}.q.lora_B.bias"], rtol=1e-6)


def test_a_square_head_lies_as_the_function_uses_it(tmp_path):
    weight = draw(5, 5)
    entries = {"score.weight": weight} | linear("q", 5, 7, 2)
    folder = write(tmp_path, entries, r=2, target_modules=["q"], modules_to_save=["score"])
    params = {"score": {"weight": jnp.zeros((5, 5))}, "q": {"kernel": jnp.zeros((5, 7))}}
    with pytest.raises(CheckpointError, match=r"'score.weight' fits .* in 2 ways"):
        peft.load(folder, params)
    for equation, want in (("bi,io->bo", weight.T), ("bi,oi->bo", weight)):

        def apply(params, x, equation=equation):
            y = jnp.einsum(equation, x, params["score"]["weight"])
            return y, x @ params["q"]["kernel"]

        names = {"score": ("score/weight", equation[3:5])}
        for loaded in (
            peft.load(folder, params, apply, jnp.zeros((2, 5))),
            peft.load(folder, params, names=names),
        ):
            np.testing.assert_array_equal(loaded.replaced["score/weight"], want)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((None, 1), {}, TypeError, "got arguments and no function"),
        ((3,), {}, TypeError, "fn must be a function, got int"),
        ((), {"plan": 3}, TypeError, "plan must be an AdapterPlan, got int"),
        ((), {"on_tied": "ask"}, ValueError, "on_tied must be"),
        ((), {"layout": "flax"}, ValueError, "layout must be"),
        ((), {"strict": 1}, TypeError, "strict"),
    ],
)
def test_arguments(args, options, error, message, tmp_path):
    folder = write(tmp_path, linear("q", 5, 7, 2), r=2, target_modules=["q"])
    params = {"q": jnp.zeros((5, 7))}
    with pytest.raises(error, match=message):
        peft.load(folder, params, *args, **options)
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=2), params)
    with pytest.raises(TypeError, match=r"both fn and plan show the axes"):
        peft.load(folder, params, lambda params: params, plan=plan)
    with pytest.raises(KeyError, match=r"'q'"):
        peft.load(folder, {"k": jnp.zeros((5, 7))}, plan=plan)


def test_letters_as_far_as_they_are_known():
    shape = jax.ShapeDtypeStruct((3, 5), "float32")
    known = find_known({"w": shape}, lambda params: params["w"] * 2, (), None)
    assert known.axes["w"] in ("??", "--")
    assert agrees("bio", "b??")
    assert agrees("bio", "b--")
    assert not agrees("bio", "?b?")
    assert not agrees("bio", "-??")
