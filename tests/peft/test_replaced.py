import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import peft, quant
from lora_jax._io.tensor_files import CheckpointError
from tests.peft import support
from tests.peft.support import draw, linear, update_of, write
from tests.support import asarray

HEAD = {"score": {"bias": jnp.zeros(3), "kernel": jnp.zeros((5, 3))}}
LAYER = {"q": {"bias": jnp.ones(7), "kernel": jnp.ones((5, 7))}}


def load(folder, params, entries, layout="jax", **config):
    config = {"r": 2, "target_modules": ["q"]} | config
    return peft.load(write(folder, entries, **config), params, layout=layout)


def test_saved_modules_in_both_layouts(tmp_path):
    entries = {
        "score.weight": draw(3, 5),
        "score.bias": draw(3),
        "norm.weight": draw(6),
        "tok.weight": draw(9, 5),
        "conv.weight": draw(4, 2, 3, 6),
    } | linear("q", 5, 7, 2)
    shapes = {
        "score": {"kernel": (5, 3), "bias": (3,)},
        "norm": {"scale": (6,)},
        "tok": {"embedding": (9, 5)},
        "conv": {"kernel": (3, 6, 2, 4)},
        "q": {"kernel": (5, 7)},
    }
    names = ["score", "norm", "tok", "conv"]
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    own = load(tmp_path, params, entries, modules_to_save=names).replaced
    np.testing.assert_array_equal(own["score/kernel"], entries["score.weight"].T)
    np.testing.assert_array_equal(own["norm/scale"], entries["norm.weight"])
    np.testing.assert_array_equal(own["tok/embedding"], entries["tok.weight"])
    want = entries["conv.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(own["conv/kernel"], want)
    torch = {name: jnp.zeros(value.shape) for name, value in entries.items()}
    torch["q.weight"] = jnp.zeros((7, 5))
    own = load(tmp_path, torch, entries, "torch", modules_to_save=names).replaced
    assert len(own) == 5
    for name, value in own.items():
        np.testing.assert_array_equal(value, entries[name])


def test_square_modules_are_told_apart_by_their_names(tmp_path):
    weight = draw(5, 5)
    for name, leaf, want in [
        ("score", "kernel", weight.T),
        ("tok_emb", "embedding", weight),
        ("tok_emb", "weight", weight),
        ("embed_out", "kernel", weight.T),  # an output head
    ]:
        params = LAYER | {name: {leaf: jnp.zeros((5, 5))}}
        entries = {f"{name}.weight": weight} | linear("q", 5, 7, 2)
        loaded = load(tmp_path, params, entries, modules_to_save=[name])
        np.testing.assert_array_equal(loaded.replaced[f"{name}/{leaf}"], want)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(bias, tmp_path):
    entries = {"q.base_layer.bias": draw(7), "score.bias": draw(3)} | linear("q", 5, 7, 2)
    own = load(tmp_path, LAYER | HEAD, entries, bias=bias).replaced
    np.testing.assert_array_equal(own["q/bias"], entries["q.base_layer.bias"])
    np.testing.assert_array_equal(own["score/bias"], entries["score.bias"])


@pytest.mark.parametrize(
    ("layers", "kernel", "shape"),
    [((), (5, 6), (6,)), ((), (5, 2, 3), (2, 3)), ((0, 2), (3, 5, 6), (3, 6))],
)
def test_the_bias_of_an_adapter_is_added(layers, kernel, shape, tmp_path):
    names = [f"h.{i}.q" for i in layers] or ["h.q"]
    entries, old = {}, draw(*shape)
    params = {"h": {"q": {"kernel": jnp.ones(kernel), "bias": asarray(old)}}}
    want = old.copy()  # JAX may share the memory of `old`
    for i, name in enumerate(names):
        bias = draw(6, seed=i)
        entries |= {f"{name}.lora_B.bias": bias} | linear(name, 5, 6, 2, seed=i)
        want[layers[i] if layers else ...] += 3 * bias.reshape(
            shape[-2:] if not layers else 6
        )
    fields = {"lora_bias": True, "lora_alpha": 6, "target_modules": names}
    loaded = load(tmp_path, params, entries, **fields)
    assert all(set(own) == {"A", "B"} for own in loaded.adapters.values())
    got = support.merged(params, loaded)["h"]["q"]
    np.testing.assert_allclose(got["bias"], want, rtol=1e-6)
    for i, name in enumerate(names):
        kernel = got["kernel"][layers[i]] if layers else got["kernel"].reshape(5, 6)
        update = 1 + support.update_of(entries, name, 3.0)
        np.testing.assert_allclose(kernel, update, rtol=1e-5, atol=1e-6)
    params["h"]["q"]["bias"] = jnp.zeros((*shape[:-1], 5))
    with pytest.raises(CheckpointError, match="it is not the bias of that layer"):
        load(tmp_path, params, entries, **fields)


@pytest.mark.parametrize("given", [[4, 1], {"tok": [4, 1]}, {"m.tok": [4, 1]}])
def test_rows_of_tokens(given, tmp_path):
    rows, old = draw(2, 5), draw(9, 5, seed=1)
    name = "m.tok.token_adapter.trainable_tokens_delta"
    params = LAYER | {"tok": {"embedding": asarray(old)}}
    entries = {name: rows} | linear("q", 5, 7, 2)
    loaded = load(tmp_path, params, entries, trainable_token_indices=given)
    old[[4, 1]] = rows
    np.testing.assert_array_equal(loaded.replaced["tok/embedding"], old)


@pytest.mark.parametrize(
    ("given", "rows", "message"),
    [
        ([4, 9], (2, 5), r"has 2 rows, .* \[4, 9\], and 'tok/embedding' has 9 rows"),
        ([4], (2, 5), r"has 2 rows, the config has the indices \[4\]"),
        ({"other": [4, 1]}, (2, 5), "trainable_token_indices does not list its rows"),
        (None, (2, 5), "trainable_token_indices does not list its rows"),
        ([1, 0], (2, 5, 1), "must have rows of an embedding"),
        ([1, 0], (2, 7), "has rows of 7 entries"),
    ],
)
def test_rows_that_do_not_fit(given, rows, message, tmp_path):
    entries = {"tok.token_adapter.trainable_tokens_delta": draw(*rows)}
    params = {"tok": {"embedding": jnp.zeros((9, 5))}}
    folder = write(tmp_path, entries, trainable_token_indices=given)
    with pytest.raises(CheckpointError, match=message):
        peft.load(folder, params, names={"tok": "tok/embedding"})


NEEDS_VALUES = {
    "rows": (
        {"tok.token_adapter.trainable_tokens_delta": draw(2, 5)},
        {"trainable_token_indices": [1, 2]},
        "tok/embedding",
    ),
    "bias": (
        {"q.lora_B.bias": draw(7)} | linear("q", 5, 7, 2), {"lora_bias": True}, "q/bias"
    ),
    "base": (linear("q", 5, 7, 2), {"init_lora_weights": "olora"}, "q/kernel"),
    "layers": ({"h.0.norm.weight": draw(4)}, {"modules_to_save": ["norm"]}, "h/norm/scale"),
}  # fmt: skip


@pytest.mark.parametrize("case", NEEDS_VALUES)
def test_values_that_are_needed(case, tmp_path):
    entries, config, path = NEEDS_VALUES[case]
    shapes = {
        "tok/embedding": (9, 5),
        "q/kernel": (5, 7),
        "q/bias": (7,),
        "h/norm/scale": (2, 4),
    }
    kept = {p: s for p, s in shapes.items() if p.split("/")[-2] == path.split("/")[-2]}
    abstract = {p: jax.ShapeDtypeStruct(s, "float32") for p, s in kept.items()}
    with pytest.raises(
        CheckpointError, match=f"(?s)safetensors.*values of '{path}' are needed"
    ):
        load(tmp_path, abstract, entries, **config)
    load(tmp_path, {p: jnp.ones(s) for p, s in kept.items()}, entries, **config)


def test_layers_that_are_not_saved_are_those_of_the_params(tmp_path):
    old, new = draw(3, 4), draw(4)
    entries = {"h.1.norm.weight": new} | linear("q", 5, 7, 2)
    params = LAYER | {"h": {"norm": {"scale": asarray(old)}}}
    loaded = load(tmp_path, params, entries, modules_to_save=["norm"])
    np.testing.assert_array_equal(loaded.replaced["h/norm/scale"], [old[0], new, old[2]])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"score.weight": draw(4, 5)},
            r"no leaf of the params fits 'score.weight', .*\(4, 5\)",
        ),
        ({"other.bias": draw(4)}, "no leaf of the params fits 'other.bias'"),
        ({"h.3.norm.weight": draw(4)}, "no leaf of the params fits 'h.3.norm.weight'"),
        ({"norm.weight": draw(5)}, "no leaf of the params fits 'norm.weight'"),
        ({"ln.weight": draw(4)}, "'ln.weight' may be any of 'a/ln/scale', 'c/ln/scale'"),
        ({"q.lora_B.bias": draw(7)}, "must have one lora_A and one lora_B"),
        ({"score.weight": draw(3, 5, dtype="float64")}, "float64, which JAX would narrow"),
    ],
)
def test_wholes_without_a_place(entries, message, tmp_path):
    norm = {"scale": jnp.zeros(4)}
    params = HEAD | {"h": {"norm": {"scale": jnp.zeros((3, 4))}}, "a": {"ln": norm}}
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, params | {"c": {"ln": norm}}, entries)


def test_names_of_wholes(tmp_path):
    entries = {"score.weight": draw(3, 5), "score.bias": draw(3), "ln.weight": draw(4)}
    params = {"top": HEAD["score"], "ends": {"g": jnp.zeros(4)}}
    folder = write(tmp_path, entries, modules_to_save=["score", "ln"])
    names = {"score": "top/kernel", "ln.weight": "ends/g"}
    own = peft.load(folder, params, names=names).replaced
    assert set(own) == {"top/kernel", "top/bias", "ends/g"}
    np.testing.assert_array_equal(own["top/kernel"], entries["score.weight"].T)
    with pytest.raises(CheckpointError, match="there is none beside 'top/kernel'"):
        peft.load(folder, {"top": {"kernel": jnp.zeros((5, 3))}} | {"ends": params["ends"]},
            names=names)  # fmt: skip


def test_leaves_are_put_in_their_dtype():
    params = {"a": jnp.zeros(3, "bfloat16"), "b": np.ones(2)}
    got = peft.replace_leaves(params, {"a": asarray([1.0, 2.0, 3.0])})
    assert got["a"].dtype == jnp.bfloat16
    assert got["b"] is params["b"]
    np.testing.assert_array_equal(got["a"].astype("float32"), [1, 2, 3])
    with pytest.raises(KeyError, match="no leaf at 'c'"):
        peft.replace_leaves(params, {"c": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"at 'a': the leaf must be an array of the shape"):
        peft.replace_leaves(params, {"a": jnp.zeros(4)})
    for dtype, message in (("float16", "does not hold all"), ("int8", "without their sc")):
        with pytest.raises(ValueError, match=f"at 'a': the leaf is {dtype}.*{message}"):
            peft.replace_leaves({"a": jnp.zeros(3, dtype)}, {"a": asarray([1.5, 1e5, 0])})
    whole = {"a": jnp.zeros(3, "complex64")}
    got = peft.replace_leaves(whole, {"a": asarray([1.0, 2.0, 3.0])})["a"]
    np.testing.assert_array_equal(got, np.array([1, 2, 3], "complex64"))
    with pytest.raises(ValueError, match="the leaf is float32, got complex values: give a"):
        peft.replace_leaves({"a": jnp.zeros(3)}, whole)


@pytest.mark.parametrize(
    ("case", "cast", "message"),
    [
        ("rows", "float16", "is float16 in the params: .* up to 1e"),
        ("bias", "float16", "is float16 in the params: .* up to 4e"),
        ("rows", "int8", "is int8 in the params: .*without their scales"),
        ("rows", quant.quantize_int8, "is quantized, Int8.*: give params with the dense"),
        ("base", quant.quantize_int8, "is quantized, Int8.*: give params with the dense"),
    ],
)
def test_leaves_that_do_not_hold_the_values(case, cast, message, tmp_path):
    entries, config, path = NEEDS_VALUES[case]
    shapes = {"tok/embedding": (9, 5), "q/kernel": (5, 7), "q/bias": (7,)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    params[path] = cast(params[path]) if callable(cast) else params[path].astype(cast)
    full = {name: np.full_like(array, 1e5) for name, array in entries.items()}
    entries = linear("q", 5, 7, 2) | full
    with pytest.raises(CheckpointError, match=f"'{path}' {message}"):
        load(tmp_path, params, entries, **config)


def test_what_a_plan_trains_and_states(tmp_path):
    """The leaves that a plan trains are trained further, and its products are stated."""

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

    def fn(params, x):
        h = product(x, params["q"]["kernel"]) * params["norm"]["scale"][None]
        return h @ params["score"]["kernel"] + params["score"]["bias"][None]

    params = {
        "q": {"kernel": asarray(draw(5, 7))},
        "norm": {"scale": asarray(draw(7))},
        "score": {"kernel": asarray(draw(7, 3)), "bias": asarray(draw(3))},
    }
    entries = linear("q", 5, 7, 2)
    for seed, name, shape in ((1, "score.weight", (3, 7)), (2, "score.bias", (3,))):
        entries[name] = draw(*shape, seed=seed)
    entries["norm.weight"] = draw(7, seed=3)
    saved = {"target_modules": ["q"], "modules_to_save": ["score", "norm"]}
    folder = write(tmp_path / "in", entries, r=2, lora_alpha=4, **saved)
    config = lora_jax.LoraConfig(
        rank=3, targets="q/kernel", train="score/*", products={"product": "...k,kn->...n"}
    )
    x = asarray(draw(4, 5))
    plan = lora_jax.plan_adapters(config, params, fn, x)
    loaded = peft.load(folder, params, plan=plan)
    assert {*loaded.plan.trained} == {"score/kernel", "score/bias"}
    assert list(loaded.replaced) == ["norm/scale"]
    assert loaded.plan.config.products == config.products
    assert dict(lora_jax.plan_adapters(loaded.plan.config, params, fn, x).entries) == dict(
        loaded.plan.entries
    )
    own = peft.replace_leaves(params, loaded.replaced)
    got = lora_jax.adapt(fn, loaded.plan)(own, loaded.adapters, x)
    kernel = params["q"]["kernel"] + update_of(entries, "q", 2.0)
    want = np.asarray(x @ kernel) * entries["norm.weight"] @ entries["score.weight"].T
    np.testing.assert_allclose(got, want + entries["score.bias"], rtol=1e-4, atol=1e-4)
    whole = peft.load(folder, params)
    assert {*whole.replaced} == {"norm/scale", "score/kernel", "score/bias"}
    peft.save(tmp_path / "out", loaded.adapters, loaded.plan, replaced=loaded.replaced)
    again = peft.load(tmp_path / "out", params, plan=plan)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.adapters, loaded.adapters))
