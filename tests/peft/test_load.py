"""What `load` makes of checkpoints that are written by hand."""

import logging
import re
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import peft
from lora_jax._io import tensor_files
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft import names as module_names
from lora_jax.peft import words
from tests.peft import support
from tests.peft.support import abstract, draw, linear, update_of, write
from tests.support import asarray, x64

ROWS = support.reference_rows()
# A model for each row, in torch's layout, and what is to be adapted in it.
TORCH = {
    "dora": {"model.layers.0.self_attn.q_proj.weight": (32, 32)},
    "modules_to_save": {
        "lm_head.weight": (64, 32),
        "model.embed_tokens.weight": (64, 32),
        "model.layers.0.self_attn.q_proj.weight": (32, 32),
    },
    "trainable_tokens": {
        "model.embed_tokens.weight": (64, 32),
        "model.layers.0.self_attn.q_proj.weight": (32, 32),
    },
    "bert_lora_bias": {
        "bert.encoder.layer.0.attention.self.query.weight": (32, 32),
        "bert.encoder.layer.0.attention.self.query.bias": (32,),
    },
    "gpt2": {"transformer.h.0.attn.c_attn.weight": (32, 96)},
    "conv_dora": {
        "c1.weight": (4, 3, 3), "conv.weight": (4, 3, 3, 3), "emb.weight": (5, 3)
    },
    "mha": {"mha.in_proj_weight": (12, 4), "mha.out_proj.weight": (4, 4)},
}  # fmt: skip


def checkpoint(folder, *modules, target_modules=None, **config):
    """Adapters of Linear modules `(name, in, out)` of rank 2, with scale 2."""
    entries = {}
    for seed, (name, n_in, n_out) in enumerate(modules):
        entries |= linear(name, n_in, n_out, 2, seed)
    targets = target_modules or [name for name, *_ in modules]
    fields = {"r": 2, "lora_alpha": 4, "target_modules": targets}
    return write(folder, entries, **fields | config)


@pytest.mark.parametrize("name", ROWS)
def test_entries_of_the_reference_are_read(name, tmp_path):
    row = ROWS[name]
    prefix = support.PREFIX
    entries = {
        key.removeprefix(prefix): 1 + np.abs(draw(*shape))
        for key, (_, shape) in row["keys"].items()
    }
    folder = write(tmp_path / "in", entries, **row["adapter_config_saved"])
    params = {key: asarray(draw(*shape)) for key, shape in TORCH[name].items()}
    loaded = peft.load(folder, params, layout="torch")
    assert set(loaded.adapters) | set(loaded.replaced) == set(params)
    assert {t.method for t in loaded.plan.targets.values()} == {
        "dora" if row["config"].get("use_dora") else "lora"
    }
    merged = support.merged(params, loaded)
    assert all(np.any(merged[path] != params[path]) for path in params)
    if name in ("trainable_tokens", "bert_lora_bias"):
        return
    peft.save(
        tmp_path / "out", loaded.adapters, loaded.plan, layout="torch",
        replaced=loaded.replaced, names=peft.match_names(folder, params, layout="torch"),
    )  # fmt: skip
    again = peft.load(tmp_path / "out", params, layout="torch")
    support.same_updates(loaded.plan, again.plan, loaded.adapters, again.adapters)


def test_a_plan_and_what_it_says(tmp_path):
    folder = checkpoint(tmp_path, ("m.q", 5, 7), use_rslora=True, lora_dropout=0.25)
    params = {"m": {"q": {"kernel": jnp.zeros((5, 7))}, "k": jnp.zeros((2, 3))}}
    adapters, plan, replaced = peft.load(folder, params)
    target = plan.targets["m/q/kernel"]
    assert (target.rank, target.scale, target.dropout) == (2, 4 / np.sqrt(2), 0.25)
    assert plan.config.scale_of("m/q/kernel") == target.scale
    assert plan.config.rank_stabilized
    assert plan.total == 35 + 6
    assert "no adapter for it" in plan.explain("m/k")
    assert replaced == {}
    entries = support.read(folder)[0]
    for name in "AB":
        own = entries[f"base_model.model.m.q.lora_{name}.weight"]
        np.testing.assert_array_equal(adapters["m/q/kernel"][name], own.T)


@pytest.mark.parametrize(
    ("alpha", "pattern", "scale"), [(0.3, {"k": 7}, 0.3 / 2), (0, {"q": 6}, 3)]
)
def test_alphas_that_modules_have(alpha, pattern, scale, tmp_path):
    folder = checkpoint(tmp_path, ("q", 5, 7), lora_alpha=alpha, alpha_pattern=pattern)
    plan = peft.load(folder, abstract({"q": (5, 7)})).plan
    assert plan.targets["q"].scale == plan.config.scale_of("q") == scale
    assert {*plan.config.alpha_pattern} == {*pattern} - {"k"}


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", [None, "file", "float32", "bfloat16", jnp.float16])
def test_adapters_are_float32_unless_told_otherwise(stored, dtype, tmp_path):
    """A stack with magnitudes, and a saved module."""
    entries = {"score.weight": draw(3, 5, dtype=stored)}
    for i in range(2):
        entries |= linear(f"h.{i}.q", 5, 7, 2, i, dora=True, dtype=stored)
    folder = write(
        tmp_path, entries, r=2, lora_alpha=2, target_modules=["q"], use_dora=True,
        modules_to_save=["score"],
    )  # fmt: skip
    params = abstract({"h": {"q": {"kernel": (2, 5, 7)}}, "score": {"kernel": (5, 3)}})
    loaded = peft.load(folder, params, dtype=dtype)
    adapter, whole = loaded.adapters["h/q/kernel"], loaded.replaced["score/kernel"]
    want = stored if dtype == "file" else dtype or "float32"
    assert {x.dtype for x in adapter.values()} == {jnp.dtype(want)}
    assert whole.dtype == (stored if dtype == "file" else "float32")
    for i in range(2):
        for entry, name in (("B", "lora_B.weight"), ("m", "lora_magnitude_vector")):
            wide = entries[f"h.{i}.q.{name}"].astype(np.float32)
            np.testing.assert_array_equal(adapter[entry][i], wide.T.astype(want))


def test_a_dtype_that_does_not_hold_a_value(tmp_path):
    entries = linear("q", 5, 7, 2)
    entries["q.lora_B.weight"][3, 1] = 7e4
    folder = write(tmp_path, entries, r=2, target_modules=["q"])
    params = abstract({"q": (5, 7)})
    with pytest.raises(
        CheckpointError, match=r"'q:B' has values up to 7e\+04, and float16"
    ):
        peft.load(folder, params, dtype="float16")
    for dtype in ("int8", "float8_e5m2", "16 bits"):
        with pytest.raises(TypeError, match="dtype must be"):
            peft.load(folder, params, dtype=dtype)


def test_64_bits(tmp_path):
    entries = linear("q", 5, 7, 2, dtype="float64")
    folder = write(tmp_path, entries, r=2, target_modules=["q"])
    params = abstract({"q": (5, 7), "score": {"scale": (3,)}})
    with pytest.raises(CheckpointError, match="'q:A' is float64, which JAX would narrow"):
        peft.load(folder, params)
    entries["score.weight"] = draw(3, dtype="float64")
    folder = write(tmp_path, entries, r=2, target_modules=["q"], modules_to_save=["score"])
    loaded = peft.load(folder, params, dtype="float32")
    want = entries["q.lora_A.weight"].T.astype("float32")
    np.testing.assert_array_equal(loaded.adapters["q"]["A"], want)
    want = entries["score.weight"].astype("float32")
    np.testing.assert_array_equal(loaded.replaced["score/scale"], want)
    with x64():
        loaded = peft.load(folder, params)
    assert (
        loaded.adapters["q"]["A"].dtype == loaded.replaced["score/scale"].dtype == "float64"
    )
    entries["score.weight"][1] = 1e300
    write(tmp_path, entries, r=2, target_modules=["q"], modules_to_save=["score"])
    with pytest.raises(CheckpointError, match=r"score.weight' has values up to 1e\+300"):
        peft.load(folder, params, dtype="float32")


def test_the_table_is_logged_and_printed(tmp_path, caplog):
    folder = checkpoint(tmp_path, ("h.0.q", 5, 7), ("h.1.q", 5, 7))
    params = abstract({"h": {"q": {"kernel": (2, 5, 7)}}})
    with caplog.at_level(logging.INFO, "lora_jax.peft"):
        peft.load(folder, params)
    table = peft.match_names(folder, params)
    assert str(table) in caplog.text
    assert "adapter_model.safetensors" in caplog.text
    assert dict(table) == {"h.0.q": "h/q/kernel", "h.1.q": "h/q/kernel"}
    assert str(table).splitlines() == [
        "module  path           shape      axes",
        "h.0.q   h/q/kernel[0]  (2, 5, 7)  bio",
        "h.1.q   h/q/kernel[1]  (2, 5, 7)  bio",
    ]
    row = table.rows[1]
    assert (row.site.name, row.site.target, row.site.indices) == (
        "h.1.q",
        "h/q/kernel",
        (1,),
    )
    assert row.shape == (2, 5, 7)


def test_fields_that_are_not_known(tmp_path, caplog):
    more = {"use_new": {"depth": 2}, "velora_config": {"a": 1}, "unused": None}
    folder = checkpoint(tmp_path, ("q", 5, 7), **more)
    params = abstract({"q": {"kernel": (5, 7)}})
    for read in (peft.load, peft.match_names):
        with pytest.raises(CheckpointError, match=r"allow_fields=\('use_new',\)"):
            read(folder, params)
        with pytest.raises(CheckpointError, match="velora_config is"):
            read(folder, params, allow_fields=["use_new"])
        for wrong, error in (("use_new", TypeError), (["r"], ValueError), ([3], TypeError)):
            with pytest.raises(error, match="allow_fields"):
                read(folder, params, allow_fields=wrong)
    allowed = ("use_new", "velora_config", "unused", "absent")
    with caplog.at_level(logging.INFO, "lora_jax.peft"):
        loaded = peft.load(folder, params, allow_fields=allowed)
    assert list(loaded.adapters) == ["q/kernel"]
    assert (
        "ignored, as the caller allows: use_new={'depth': 2}, velora_config" in caplog.text
    )
    assert "unused" not in caplog.text
    table = peft.match_names(folder, params, allow_fields=allowed)
    assert dict(table) == {"q": "q/kernel"}


NAMED = abstract({"x": {"up": (5, 7), "down": (7, 5)}, "layers": {"w": (3, 5, 7)}})


@pytest.mark.parametrize(
    ("names", "paths"),
    [
        ({"m.q": "x/up"}, {"x/up": "io"}),
        ({"m.q": ("x/up", "io")}, {"x/up": "io"}),
        ({"m.q": ("x/down", "oi")}, {"x/down": "oi"}),
        (lambda name: "x/up" if name == "m.q" else None, {"x/up": "io"}),
        (lambda name: ("x/down", "oi"), {"x/down": "oi"}),
    ],
)
def test_names(names, paths, tmp_path):
    folder = checkpoint(tmp_path, ("m.q", 5, 7))
    plan = peft.load(folder, NAMED, names=names).plan
    assert {path: target.axes for path, target in plan.targets.items()} == paths


@pytest.mark.parametrize(
    "names",
    [
        {"m.{}.q": "layers/w"},
        {"m.{}.q": ("layers/w", "bio")},
        {"m.0.q": "layers/w", "m.2.q": "layers/w"},
        lambda name: "layers/w",
    ],
)
def test_names_of_a_stack(names, tmp_path):
    folder = checkpoint(tmp_path, ("m.2.q", 5, 7), ("m.0.q", 5, 7))
    loaded = peft.load(folder, NAMED, names=names)
    adapter = loaded.adapters["layers/w[::2]"]
    entries = support.read(folder)[0]
    for i in (0, 1):
        want = update_of(entries, f"base_model.model.m.{2 * i}.q", 2.0)
        np.testing.assert_allclose(2 * adapter["A"][i] @ adapter["B"][i], want, rtol=1e-5)


def test_templates_fill_paths(tmp_path):
    folder = checkpoint(tmp_path, ("m.4.q", 5, 7), ("m.5.q", 5, 7))
    params = abstract({"a": {"l4": {"x": (5, 7)}, "l5": {"x": (5, 7)}}})
    table = peft.match_names(folder, params, names={"m.{}.q": "a/l{}/x"})
    assert dict(table) == {"m.4.q": "a/l4/x", "m.5.q": "a/l5/x"}


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (
            {"m.q": "x/up", "m.k": "x/up"},
            CheckpointError,
            "names has 'x/up' for 'm.k', and there is no such module in the checkpoint[.]",
        ),
        ({"m.q": "x/upp"}, CheckpointError, "no such leaf; the nearest paths are 'x/up'"),
        ({"m.q": "x/down"}, CheckpointError, r"5 in and 7 out .*'x/down' \(7, 5\)"),
        ({"m.q": ("x/down", "io")}, CheckpointError, "with the axes 'io'"),
        ({"m.q": ("x/up", "ioo")}, CheckpointError, "with the axes 'ioo'"),
        ({"m.q": ("layers/w", "bio")}, CheckpointError, "with the axes 'bio'"),
        ({"m.q": "layers/w"}, CheckpointError, "no leaf of the params fits 'm.q'"),
        ({"m.q": ("x/up", "xy")}, ValueError, "must be letters i, o and b"),
        ({"m.q": ("x/up", "ii")}, ValueError, "at least one i and one o"),
        ({"m.q": 3}, TypeError, "names must have a path for 'm.q'"),
        ({"m.q": "x/{}"}, ValueError, "fewer numbers"),
        (["m.q"], TypeError, "names must be a dict from the names of modules"),
        (lambda name: 3, TypeError, "names must have a path for 'm.q'"),
    ],
)
def test_names_that_do_not_fit(names, error, message, tmp_path):
    folder = checkpoint(tmp_path, ("m.q", 5, 7))
    with pytest.raises(error, match=message):
        peft.load(folder, NAMED, names=names)


@pytest.mark.parametrize(
    ("modules", "shapes", "message"),
    [
        (
            [("q", 5, 7)],
            {"q": {"kernel": (5, 8)}},
            r"fits 'q', which needs .* 5 in and 7 out in layout='jax'; by its name it is "
            r"'q/kernel' \(5, 8\)\. Give names=.* or layout='torch' if weights have",
        ),
        ([("a.q", 5, 7)], {"b": {"k": (5, 7)}}, "no leaf of the params fits 'a.q'"),
        (
            [("m.q", 5, 7)],
            {"a": {"q": (5, 7)}, "b": {"q": (5, 7)}},
            "'m.q' may be any of 'a/q', 'b/q': give names={'m.q': path}",
        ),
        (
            [("a.q", 5, 7), ("b.q", 5, 7)],
            {"x": {"q": (5, 7)}},
            "'a.q' and 'b.q' both match 'x/q': give names={module: path}",
        ),
        (
            [("h.0.q", 5, 7), ("h.3.q", 5, 7)],
            {"h": {"q": (3, 5, 7)}},
            "no leaf of the params fits 'h.3.q'",
        ),
        (
            [("q", 3, 12), ("1.q", 3, 4)],
            {"q": (3, 3, 4)},
            "'1.q' and 'q' both match 'q', the first as 'linear' with the axes 'bio'",
        ),
        (
            [("h.0.q", 5, 7)],
            {"h_1": {"q": (5, 7)}},
            "no leaf of the params fits 'h.0.q'",
        ),
        (
            [("encoder.q", 5, 7)],
            {"decoder": {"q": (5, 7)}},
            "no leaf of the params fits 'encoder.q'",
        ),
    ],
)
def test_modules_without_a_place(modules, shapes, message, tmp_path):
    folder = checkpoint(tmp_path, *modules)
    with pytest.raises(CheckpointError, match=f"(?s)safetensors does not fit.*{message}"):
        peft.load(folder, abstract(shapes))
    with pytest.raises(CheckpointError, match=message):
        peft.match_names(folder, abstract(shapes))


def test_all_problems_are_listed_up_to_ten(tmp_path):
    folder = checkpoint(tmp_path, *((f"h.{i}.q", 5, 7) for i in range(12)))
    with pytest.raises(CheckpointError, match=r"(?s)'h.7.q'.*\n  and 2 more$"):
        peft.load(folder, abstract({"k": (5, 7)}))


def test_a_targeted_weight_without_an_adapter(tmp_path):
    folder = checkpoint(tmp_path, ("h.0.q", 5, 7), target_modules=["q"])
    params = abstract({"h": [{"q": {"kernel": (5, 7)}}, {"q": {"kernel": (5, 7)}}]})
    with pytest.raises(CheckpointError, match=r"targets 'h.1.q', which is 'h/1/q/kernel'"):
        peft.load(folder, params)
    # Left out on purpose.
    for config in ({"exclude_modules": ["1.q"]}, {"layers_to_transform": [0]}):
        folder = checkpoint(
            tmp_path / "own", ("m.h.0.q", 5, 7), target_modules=["q"], **config
        )
        assert list(peft.load(folder, {"m": params}).adapters) == ["m/h/0/q/kernel"]


def test_what_does_not_fit_is_left_out_if_asked(tmp_path):
    folder = checkpoint(tmp_path, ("q", 5, 7), ("k", 5, 7), ("v", 5, 7))
    params = abstract({"q": (5, 7), "v": (6, 7)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = peft.load(folder, params, strict=False)
    assert list(loaded.adapters) == list(loaded.plan.targets) == ["q"]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    assert "fits 'k'" in text
    assert "fits 'v'" in text
    assert text.endswith("It was left out.")
    with (
        pytest.warns(UserWarning, match="It was left out"),
        pytest.raises(CheckpointError, match="nothing of it fits the params"),
    ):
        peft.load(folder, abstract({"x": (5, 7)}), strict=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 3}, "has the rank 2, and the config says 3"),
        ({"rank_pattern": {"q": 4}}, "has the rank 2, and the config says 4"),
        ({"use_dora": True}, "has no magnitude, and the config says use_dora=True"),
        ({"lora_bias": True}, "has no lora_B.bias, and the config says lora_bias=True"),
        ({"lora_alpha": 0}, "the alpha of 'm.q' is 0"),
        ({"target_modules": ["k"]}, "do not choose it"),
        ({"target_modules": "m.k|m.v"}, "do not choose it"),
        ({"exclude_modules": ["q"]}, "do not choose it"),
    ],
)
def test_configs_that_do_not_agree(config, message, tmp_path):
    fields = {"target_modules": ["q"]} | config
    folder = checkpoint(tmp_path, ("m.q", 5, 7), **fields)
    with pytest.raises(CheckpointError, match=message):
        peft.load(folder, abstract({"m": {"q": (5, 7)}}))


def with_values(*values):
    """A matrix (5, 7) with some singular values."""
    u, v = (np.linalg.qr(draw(n, n))[0] for n in (5, 7))
    return asarray(u @ np.diag(values) @ v[:5], "float32")


@pytest.mark.parametrize(
    ("init", "weight", "message"),
    [
        *[(i, draw(5, 7), "not unique") for i in ("pissa_niter_4", "corda", "lora_ga")],
        ("loftq", draw(5, 7), "not unique"),
        ("pissa", draw(5, 7), ""),
        ("OLoRA", draw(5, 7), ""),
        ("pissa", with_values(3.0, 2.0, 1.0, 0.5, 0.1), ""),
        (
            "pissa",
            with_values(3, 2, 2.00001, 0.5, 0.1),
            "two singular values are nearly eq",
        ),
        ("pissa", draw(3, 4, 6), "it is not a matrix, 'iio'"),
    ],
)
def test_changed_bases(init, weight, message, tmp_path):
    entries = linear("q", 5, 7, 2)
    if weight.ndim == 3:
        entries = {"q.lora_A.weight": draw(2, 4, 3), "q.lora_B.weight": draw(6, 2, 1)}
    config = {"lora_alpha": 4, "target_modules": ["q"], "init_lora_weights": init}
    folder, params = write(tmp_path, entries, r=2, **config), {"q": asarray(weight)}
    if not message:
        assert set(peft.load(folder, params).replaced) == {"q"}
        return
    with pytest.raises(CheckpointError, match=f"'{init}' changed .*of 'q'.*{message}") as e:
        peft.load(folder, params)
    assert "path_initial_model_for_weight_conversion" in str(e.value)


def test_magnitudes_of_layers_without_an_adapter(tmp_path):
    entries = linear("h.1.q", 5, 7, 2, dora=True)
    folder = write(tmp_path, entries, r=2, use_dora=True, target_modules=["h.1.q"])
    for axis in (0, 1, 2):
        weight = np.moveaxis(draw(3, 5, 7), 0, axis)
        params = {"h": {"q": {"kernel": asarray(weight)}}}
        loaded = peft.load(folder, params)
        merged = support.merged(params, loaded)["h"]["q"]["kernel"]
        got, old = (np.moveaxis(np.asarray(w), axis, 0) for w in (merged, weight))
        np.testing.assert_allclose(got[[0, 2]], old[[0, 2]], rtol=1e-5)
        adapted = old[1] + update_of(entries, "h.1.q", 4.0)
        want = adapted * entries["h.1.q.lora_magnitude_vector"]
        want /= np.linalg.norm(adapted, axis=0)
        np.testing.assert_allclose(got[1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("entries", "config", "message"),
    [
        ({}, {}, "has no entries"),
        (
            {"q.lora_A.weight": np.ones((2, 5), "int32")},
            {},
            "is int32, and must be an array, floating",
        ),
        ({"q.weight": draw(2, 2)}, {"peft_type": "LOHA"}, "peft_type must be 'LORA'"),
        ({"q.weight": draw(2, 2)}, {"use_qalora": True}, "use_qalora is True"),
    ],
)
def test_files_that_are_refused(entries, config, message, tmp_path):
    folder = write(tmp_path, entries, **config)
    with pytest.raises(CheckpointError, match=message):
        peft.load(folder, NAMED)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        peft.load(tmp_path / "none", NAMED)
    folder = checkpoint(tmp_path, ("q", 5, 7))
    (folder / support.TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*adapter_model"):
        peft.load(folder, NAMED)
    (folder / "adapter_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"is a pickle.* safe_serialization=True"):
        peft.load(folder, NAMED)


@pytest.mark.parametrize(
    ("layers", "absent", "part"), [((0, 2), [1], "[::2]"), ((1,), [0, 2], "[1:2]")]
)
def test_a_layer_that_a_stack_lacks_is_missed(tmp_path, layers, absent, part):
    params = abstract({"layers": {"q": {"kernel": (3, 6, 4)}}})
    modules = [(f"model.layers.{i}.q", 6, 4) for i in layers]
    folder = checkpoint(tmp_path, *modules, target_modules=["q"])
    with pytest.raises(CheckpointError, match="is the file whole") as error:
        peft.load(folder, params)
    assert all(f"'model.layers.{i}.q'" in str(error.value) for i in absent)
    with pytest.warns(UserWarning, match=f"layers.{absent[0]}.q"):
        loaded = peft.load(folder, params, strict=False)
    assert list(loaded.plan.targets) == [f"layers/q/kernel{part}"]


def test_names_may_be_those_of_the_whole_model(tmp_path):
    folder = checkpoint(tmp_path, ("m.q", 5, 7))
    params = abstract({"x": {"up": (5, 7)}, "y": {"up": (5, 7)}})
    names = {"m.q": "x/up", "m.{}.k": "y/up", "m.v": "y/up"}
    assert list(peft.load(folder, params, names=names).adapters) == ["x/up"]
    assert list(peft.match_names(folder, params, names=names)) == ["m.q"]
    with pytest.raises(CheckpointError, match="go from modules to paths"):
        peft.load(folder, params, names={"x/up": "m.q"})


LAYERS = {
    f"{i}": {"attn": {"wq": {"kernel": (5, 7)}, "wv": {"kernel": (5, 7)}}} for i in range(3)
}
RENAMED = {
    "model.layers.{}.q_proj": "decoder/{}/attn/wq/kernel",
    "model.layers.{}.v_proj": "decoder/{}/attn/wv/kernel",
}


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r"model\.layers\.\d+\.[qv]_proj"},
        {"target_modules": "all-linear"},
    ],
)
def test_a_layer_that_renamed_params_have_is_missed(tmp_path, config):
    modules = [(f"model.layers.{i}.{m}_proj", 5, 7) for i in (0, 2) for m in "qv"]
    folder = checkpoint(tmp_path, *modules, **config)
    params = abstract({"decoder": LAYERS})
    with pytest.raises(
        CheckpointError, match=r"layers.1.q_proj.*is the file whole"
    ) as error:
        peft.load(folder, params, names=RENAMED)
    assert "'model.layers.1.v_proj', which is 'decoder/1/attn/wv/kernel'" in str(
        error.value
    )
    excluded = {**config, "exclude_modules": ["1.q_proj", "1.v_proj"]}
    folder = checkpoint(tmp_path / "own", *modules, **excluded)
    assert len(peft.load(folder, params, names=RENAMED).adapters) == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modules_to_save": ["head"]}, "modules_to_save has 'head'"),
        ({"modules_to_save": ["classifier", "score"]}, "modules_to_save has 'classifier'"),
        ({"trainable_token_indices": [1, 2]}, "no rows of tokens"),
        ({"target_parameters": ["experts.w1"]}, "parameter 'experts.w1', and the file has"),
        ({"bias": "lora_only"}, "bias='lora_only', and the file lacks the bias of 'm.q'"),
    ],
)
def test_what_the_config_says_is_saved_is_missed(tmp_path, config, message):
    folder = checkpoint(tmp_path, ("m.q", 5, 7), target_modules=["q"], **config)
    params = abstract({"m": {"q": {"kernel": (5, 7), "bias": (7,)}}, "head": {"w": (7, 3)}})
    with pytest.raises(CheckpointError, match=message):
        peft.load(folder, params)


def test_a_head_of_another_model_need_not_be_there(tmp_path):
    folder = checkpoint(tmp_path, ("m.q", 5, 7), target_modules=["q"], extra=None)
    tensors, config = support.read(folder)
    whole = {name.removeprefix(support.PREFIX): value for name, value in tensors.items()}
    whole["score.weight"] = draw(3, 7)
    config["modules_to_save"] = ["classifier", "score"]
    del config["peft_type"]
    folder = support.write(tmp_path / "own", whole, **config)
    params = abstract({"m": {"q": {"kernel": (5, 7)}}, "score": {"kernel": (7, 3)}})
    assert list(peft.load(folder, params).replaced) == ["score/kernel"]


@pytest.mark.parametrize(
    ("module", "path"),
    [
        ("layer.0.crossattention.self.query", "layer/0/attention/self/query/kernel"),
        ("layers.0.encoder_attn.q_proj", "layers/0/self_attn/q_proj/kernel"),
        ("h.0.mlp.c_proj", "h/0/attn/c_proj/kernel"),
        ("visual.blocks.0.attn.out_proj", "text/blocks/0/attn/out_proj/kernel"),
        ("encoder.block.0.SelfAttention.q", "decoder/block/0/SelfAttention/q/kernel"),
        ("text_model.layers.0.q", "vision_model/layers_0/q/kernel"),
        ("vision_tower.layers.0.q", "language_model/layers_0/q/kernel"),
    ],
)
def test_the_same_weight_of_another_part_is_not_taken(tmp_path, module, path):
    folder = checkpoint(tmp_path, (module, 5, 7))
    with pytest.raises(CheckpointError, match="no leaf of the params fits"):
        peft.load(folder, abstract({path: (5, 7)}))
    own = module.replace(".", "/") + "/kernel"
    assert list(peft.load(folder, abstract({path: (5, 7), own: (5, 7)})).adapters) == [own]


def test_the_directory_of_the_other_format(tmp_path):
    (tmp_path / "adapters.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"read them with lora_jax\.load_adapters"):
        peft.load(tmp_path, {})
    with pytest.raises(NotADirectoryError, match=r"adapters\.json is a file"):
        peft.load(tmp_path / "adapters.json", {})


def counted(monkeypatch, owner, name, counts):
    """Counts the calls of a function."""
    function = getattr(owner, name)

    def run(*args, **kwargs):
        counts[name] = counts.get(name, 0) + 1
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, run)


@pytest.mark.parametrize("config", ["ends", "names", "ranks"])
@pytest.mark.parametrize("stacked", [False, True])
def test_work_grows_with_the_number_of_modules(stacked, config, tmp_path, monkeypatch):
    """A name is compared with the paths that end as it does, and with no other."""
    counts, work = {}, []
    counted(monkeypatch, words, "_common", counts)
    counted(monkeypatch, module_names, "numbers_in", counts)
    counted(monkeypatch, re, "match", counts)
    counted(monkeypatch, re, "fullmatch", counts)
    counted(monkeypatch, tensor_files.load_safetensors(), "safe_open", counts)
    for layers in (2, 4, 8):
        names = [f"h.{i}.experts.{j}.up" for i in range(layers) for j in range(3)]
        targets = {"target_modules": ["up"] if config == "ends" else names}
        if config == "ranks":
            targets["rank_pattern"] = {name.replace(".", r"\."): 2 for name in names}
            targets["r"] = 3
        modules = [(name, 5, 7) for name in names]
        folder = checkpoint(tmp_path / f"{layers}", *modules, **targets)
        given = None
        if stacked:
            params = {"h": {"experts": {"up": (layers, 3, 5, 7)}}}
            given = {"h.{}.experts.{}.up": "h/experts/up"}
        else:
            params = {"h": [{"experts": [{"up": (5, 7)}] * 3} for _ in range(layers)]}
        counts.clear()
        peft.load(folder, abstract(params), names=given)
        assert counts["safe_open"] == 1
        work.append({name: n for name, n in counts.items() if name != "safe_open"})
    first, second, third = work
    assert first.keys() == second.keys() == third.keys()
    for name, count in second.items():
        assert third[name] - count <= 2 * (count - first[name]), name
