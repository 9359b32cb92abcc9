"""What `save` writes, and that `load` reads the same adapters again."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import peft
from lora_jax._core.immutable import FrozenDict
from lora_jax.peft.layout import Site
from lora_jax.plan.target import TrainedLeaf, Use
from tests.peft import support
from tests.peft.support import PREFIX, abstract, draw
from tests.support import asarray

ROWS = support.reference_rows()
LAYER = "model/layers_0/self_attn/q_proj/kernel"


def plan_of(shapes, axes=None, uses=(), **config):
    """A plan for weights of some shapes, and adapters without zeros."""
    axes = {path: "i" * (len(s) - 1) + "o" for path, s in shapes.items()} | (axes or {})
    fields = {"rank": 2, "alpha": 4, "targets": tuple(shapes), "axes": axes} | config
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(**fields), abstract(shapes))
    if uses:
        plan = dataclasses.replace(plan, uses=FrozenDict(uses))
    return plan, adapters_of(plan)


def adapters_of(plan):
    return {
        path: {
            name: asarray((4 if name == "m" else 0) + draw(*shape, seed=i))
            for name, shape in target.adapter_shapes.items()
        }
        for i, (path, target) in enumerate(plan.targets.items())
    }


def keys(folder):
    tensors, config = support.read(folder)
    return {name: [str(x.dtype), list(x.shape)] for name, x in tensors.items()}, config


@pytest.mark.parametrize("name", ["dora", "modules_to_save", "gpt2", "conv_dora", "mha"])
def test_entries_and_configs_of_the_reference(name, tmp_path):
    row, options, replaced = ROWS[name], {}, {}
    config = {"rank": row["config"]["r"], "alpha": 8, "use_dora": name != "mha"}
    if name in ("dora", "modules_to_save"):
        shapes, config["use_dora"] = {LAYER: (32, 32)}, name == "dora"
        if name == "modules_to_save":
            replaced = {
                "lm_head/kernel": asarray(draw(32, 64)),
                "model/embed_tokens/embedding": asarray(draw(64, 32)),
            }
    elif name == "gpt2":
        shapes = {"transformer.h.0.attn.c_attn.weight": (32, 96)}
        options["layout"] = "torch"
    elif name == "conv_dora":
        shapes = {"c1/kernel": (3, 3, 4), "conv/kernel": (3, 3, 3, 4)}
        shapes["emb/embedding"] = (5, 3)
        use = Use("conv_general_dilated", ("contracted", "contracted", "kept"))
        config["uses"] = {"c1/kernel": (use,)}
    else:
        shapes = {"mha/in_proj": (4, 12), "mha/out_proj/kernel": (4, 4)}
        options["names"] = {"mha": "mha/in_proj", "mha.out_proj": "mha/out_proj/kernel"}
    task = row["config"].get("task_type")
    plan, adapters = plan_of(shapes, **config)
    peft.save(tmp_path, adapters, plan, replaced=replaced, task_type=task, **options)
    written, own = keys(tmp_path)
    assert written == row["keys"]
    wanted = row["adapter_config_saved"]
    assert own.keys() == wanted.keys()
    # What chooses the same modules in other words, and what only a PyTorch model has.
    other = ("layers_to_transform", "layers_pattern", "auto_mapping")
    lists = ("target_modules", "modules_to_save")
    for field in own.keys() - {*other, *lists}:
        assert own[field] == wanted[field], field
    for field in lists:
        ends = {name.rpartition(".")[2] for name in own[field] or ()}
        assert ends == set(wanted[field] or ())


def test_the_file_says_what_it_is(tmp_path):
    plan, adapters = plan_of({LAYER: (5, 7)})
    peft.save(tmp_path / "new" / "one", adapters, plan, base_model="me/model")
    header = (tmp_path / "new" / "one" / support.TENSORS).read_bytes()[8:60]
    assert b'"__metadata__":{"format":"pt",' in header
    assert (
        support.read(tmp_path / "new" / "one")[1]["base_model_name_or_path"] == "me/model"
    )
    assert len(list((tmp_path / "new" / "one").iterdir())) == 2


def test_patterns_of_names_that_end_alike(tmp_path):
    shapes = dict.fromkeys(("q", "a/q", "b/a/q", "c/k", "c/v"), (5, 7))
    ranks = {"q": 1, "a/q": 3, "b/a/q": 4, "c/k": 3}
    plan, adapters = plan_of(shapes, rank_pattern=ranks, alpha_pattern={"a/q": 9})
    peft.save(tmp_path, adapters, plan)
    config = peft.PeftConfig.from_dict(support.read(tmp_path)[1], "config")
    for path in shapes:
        name = path.replace("/", ".")
        assert config.rank_of(name) == plan.targets[path].rank
        assert config.scale_of(name) == plan.targets[path].scale
    again = peft.load(tmp_path, abstract(shapes))
    support.same_updates(plan, again.plan, adapters, again.adapters)


def test_a_name_that_is_the_end_of_another_without_an_adapter(tmp_path):
    plan, adapters = plan_of({"q/kernel": (5, 7), "a/k/kernel": (5, 7)})
    both = {"b/q/kernel": "not chosen", "b/k/kernel": "not chosen"}
    plan = dataclasses.replace(plan, skipped=FrozenDict(both))
    peft.save(tmp_path, adapters, plan)
    config = peft.PeftConfig.from_dict(support.read(tmp_path)[1], "config")
    modules = dict.fromkeys(("q", "b.q", "a.k", "b.k"), "Linear")
    assert list(peft.match_modules(config, modules)) == ["q", "a.k"]


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_alpha_comes_back_whole(rank_stabilized, tmp_path):
    plan, adapters = plan_of(
        {"q": (5, 7), "k": (5, 7), "v": (5, 7)}, rank=3, alpha=16,
        rank_pattern={"k": 5}, alpha_pattern={"v": 0.3}, rank_stabilized=rank_stabilized,
    )  # fmt: skip
    peft.save(tmp_path, adapters, plan)
    text = (tmp_path / support.CONFIG).read_text()
    config = json.loads(text)
    assert '"lora_alpha": 16,' in text
    assert config["use_rslora"] is rank_stabilized
    assert config["rank_pattern"] == {"k": 5}
    assert list(config["alpha_pattern"]) == ["v"]
    np.testing.assert_allclose(config["alpha_pattern"]["v"], 0.3, rtol=1e-12)


KINDS = {
    "linear": ((5, 7), "io"),
    "turned": ((7, 5), "oi"),
    "heads": ((5, 2, 3), "ioo"),
    "heads_out": ((2, 3, 5), "iio"),
    "layers": ((3, 5, 7), "bio"),
    "one_layer": ((1, 5, 7), "bio"),
    "inner_layers": ((5, 3, 7), "ibo"),
    "head_layers": ((3, 5, 2, 4), "bioo"),
    "layers_turned": ((3, 7, 5), "boi"),
    "conv": ((3, 2, 4, 6), "iiio"),
    "conv_torch": ((6, 4, 3, 2), "oiii"),
    "emb": ((11, 5), "io"),
    "experts": ((4, 5, 7), "bio"),
    "expert_layers": ((2, 4, 5, 7), "bbio"),
    "experts_as_modules": ((2, 3, 5, 7), "bbio"),
}
TORCH = {"turned", "layers_turned", "conv_torch"}
STACKED = {k for k in KINDS if "layer" in k}
MOE = {"experts", "expert_layers"}
# Matrices (in, out) in a tree of torch: PEFT has no fan_in_fan_out beside experts.
ACROSS = {"layers", "one_layer", "inner_layers", "experts_as_modules"}


def named(kind):
    """The path of a weight, and the name of its module in the model."""
    leaf = "embedding" if kind == "emb" else "kernel"
    if kind == "experts_as_modules":
        return f"net/{kind}/{leaf}", f"net.{{}}.{kind}.{{}}.w"
    if kind in MOE:
        layer = ".{}" if kind == "expert_layers" else ""
        return f"net/{kind}/up", f"net{layer}.{kind}.up"
    return f"net/{kind}/{leaf}", f"net.{{}}.{kind}" if kind in STACKED else f"net.{kind}"


@st.composite
def plans(draw):
    layout = draw(st.sampled_from(["jax", "torch"]))
    use_dora = draw(st.booleans())
    allowed = [
        kind
        for kind in KINDS
        if (layout == "jax" and kind not in TORCH)
        or (layout == "torch" and kind not in ("conv", "linear"))
    ]
    allowed = [k for k in allowed if not (use_dora and k in MOE)]
    kinds = draw(st.lists(st.sampled_from(allowed), min_size=1, max_size=4, unique=True))
    hypothesis.assume(layout == "jax" or not (MOE & {*kinds} and ACROSS & {*kinds}))
    ranks = draw(st.lists(st.integers(1, 4), min_size=4, max_size=4))
    alphas = draw(st.lists(st.sampled_from([1, 2.5, 16, -3]), min_size=4, max_size=4))
    paths = {kind: named(kind)[0] for kind in kinds}
    return layout, paths, {
        "rank_pattern": dict(zip(paths.values(), ranks, strict=False)),
        "alpha_pattern": dict(zip(paths.values(), alphas, strict=False)),
        "rank_stabilized": draw(st.booleans()),
        "use_dora": use_dora,
    }  # fmt: skip


class Drawn:
    """A drawn plan with adapters, and how to save and load it."""

    def __init__(self, drawn, folder):
        layout, paths, config = drawn
        self.shapes = {path: KINDS[kind][0] for kind, path in paths.items()}
        axes = {path: KINDS[kind][1] for kind, path in paths.items()}
        self.plan, self.adapters = plan_of(self.shapes, axes, **config)
        self.names = {named(kind)[1]: (path, axes[path]) for kind, path in paths.items()}
        searched = {
            name: value
            for kind, (name, value) in zip(paths, self.names.items(), strict=True)
            if kind == "experts_as_modules" or (kind in MOE and layout == "torch")
        }
        self.folder, self.options = folder, {"names": searched, "layout": layout}
        self.params = abstract(self.shapes)

    def save(self, adapters, plan, names, **options):
        layout = self.options["layout"]
        peft.save(self.folder, adapters, plan, names=names, layout=layout, **options)

    def load(self, function=peft.load):
        return function(self.folder, self.params, **self.options)


def examples(test):
    """Runs a test for 40 plans that are drawn."""
    checks = [hypothesis.HealthCheck.function_scoped_fixture]
    settings = hypothesis.settings(max_examples=40, suppress_health_check=checks)
    return settings(hypothesis.given(drawn=plans())(test))


@examples
def test_what_is_saved_is_loaded(drawn, tmp_path):
    own = Drawn(drawn, tmp_path)
    own.save(own.adapters, own.plan, own.names)
    again = own.load()
    support.same_updates(own.plan, again.plan, own.adapters, again.adapters)
    own.save(again.adapters, again.plan, own.load(peft.match_names))
    third = own.load()
    support.same_updates(own.plan, third.plan, own.adapters, third.adapters)


@examples
def test_uniform_files_have_one_rank_and_one_scale(drawn, tmp_path):
    own = Drawn(drawn, tmp_path)
    adapters, plan = own.adapters, own.plan
    own.save(adapters, plan, own.names, uniform=True)
    fields = support.read(tmp_path)[1]
    assert fields["rank_pattern"] == fields["alpha_pattern"] == {}
    assert fields["use_rslora"] is False
    assert fields["r"] == max(target.rank for target in plan.targets.values())
    assert isinstance(fields["lora_alpha"], int)
    again = own.load()
    for path, target in plan.targets.items():
        a, b = (np.asarray(adapters[path][n], np.float64) for n in "AB")
        # As a reader has it that knows one scale for all modules.
        scale = fields["lora_alpha"] / fields["r"]
        got = np.asarray(again.adapters[path]["A"], np.float64)
        got = scale * got @ np.asarray(again.adapters[path]["B"], np.float64)
        terms = abs(target.scale) * np.abs(a) @ np.abs(b)
        assert (np.abs(got - target.scale * a @ b) <= 2.0**-24 * 1.001 * terms).all()
        if target.method == "dora":
            np.testing.assert_array_equal(again.adapters[path]["m"], adapters[path]["m"])


def test_uniform_files_of_dora_merge_alike(tmp_path):
    shapes = {"a/q": (5, 7), "b/q": (5, 7), "c/q": (5, 7)}
    plan, adapters = plan_of(
        shapes, use_dora=True, rank_stabilized=True, rank_pattern={"a/q": 4, "b/q": 3},
        alpha_pattern={"c/q": 0.7},
    )  # fmt: skip
    params = {path: asarray(draw(*shape)) for path, shape in shapes.items()}
    peft.save(tmp_path, adapters, plan, uniform=True)
    again = support.merged(params, peft.load(tmp_path, params))
    for path, want in lora_jax.merge_adapters(params, adapters, plan).items():
        np.testing.assert_allclose(again[path], want, rtol=2e-6, atol=2e-6)


def test_uniform_files_keep_what_is_uniform(tmp_path):
    """Scales that are alike stay, and no bit of a factor changes."""
    plan, adapters = plan_of({"q": (5, 7), "k": (5, 7)}, rank=3, alpha=12)
    for uniform in (False, True):
        peft.save(tmp_path / str(uniform), adapters, plan, uniform=uniform)
    one, other = (tmp_path / str(uniform) for uniform in (False, True))
    for file in (support.CONFIG, support.TENSORS):
        assert (one / file).read_bytes() == (other / file).read_bytes()


def test_files_that_other_programs_would_scale_otherwise_are_named(tmp_path, caplog):
    shapes = {"q": (5, 7), "k": (5, 7)}
    for config, warned in (
        ({"rank_pattern": {"k": 1}}, True),
        ({"rank_pattern": {"k": 1}, "rank_stabilized": True}, True),
        ({"alpha_pattern": {"k": 7}}, True),
        ({"rank_pattern": {"k": 1}, "alpha_pattern": {"k": 2}}, False),  # one scale
        ({}, False),
    ):
        plan, adapters = plan_of(shapes, **config)
        caplog.clear()
        peft.save(tmp_path, adapters, plan)
        assert ("write a uniform file" in caplog.text) is warned
        caplog.clear()
        peft.save(tmp_path, adapters, plan, uniform=True)
        assert not caplog.text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", jnp.float32, None])
@pytest.mark.parametrize("uniform", [False, True])
def test_the_dtype_of_the_file(dtype, uniform, tmp_path):
    shapes = {"q": (5, 7), "k": (5, 7), "v": (5, 7)}
    plan, adapters = plan_of(shapes, use_dora=True, alpha_pattern={"k": 5})
    replaced = {"score/kernel": asarray(draw(5, 3))}
    peft.save(tmp_path, adapters, plan, replaced=replaced, dtype=dtype, uniform=uniform)
    tensors = support.read(tmp_path)[0]
    assert {x.dtype for x in tensors.values()} == {jnp.dtype(dtype or "float32")}
    assert len(tensors) == 10
    # Rounded once: also where B takes up a scale.
    b = np.asarray(adapters["k"]["B"], np.float64) * (5 / 4 if uniform else 1)
    want = b.astype(dtype or "float32").T
    np.testing.assert_array_equal(tensors[PREFIX + "k.lora_B.weight"], want)


def test_dtypes_that_do_not_hold_the_values(tmp_path):
    shapes = {"q": (5, 7), "k": (5, 7), "v": (5, 7)}
    plan, adapters = plan_of(shapes, alpha_pattern={"k": 4e5})
    large = {"q": adapters["q"] | {"A": adapters["q"]["A"].at[1, 0].set(-7e4)}}
    for changed, options, message in (
        (large, {}, r"at 'q': A has values up to 7e\+04, and float16 holds none above"),
        ({}, {"uniform": True}, r"at 'k': B has values up to .*, and float16 holds none"),
        ({"q": jax.tree.map(lambda x: x * 1e-10, adapters["q"])}, {}, "which are all 0 in"),
        (
            {}, {"replaced": {"s/kernel": jnp.full((5, 3), 1e6)}},
            "at 's/kernel': the leaf has values up to",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            peft.save(
                tmp_path / "new", adapters | changed, plan, dtype="float16", **options
            )
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="dtype must be floating point"):
        peft.save(tmp_path, adapters, plan, dtype="int8")
    # What is infinite stays so.
    infinite = {"q": adapters["q"] | {"A": adapters["q"]["A"].at[1, 0].set(jnp.inf)}}
    peft.save(tmp_path, adapters | infinite, plan, dtype="float16")


@pytest.mark.parametrize(
    ("ranks", "n_in"),  # shapes or ranks tell the two apart
    [({}, 7), ({"*/up": 4}, 7), ({"*/down": 4}, 7), ({"*/up": 4}, 5)],
)
def test_experts_of_different_ranks(ranks, n_in, tmp_path):
    shapes = {"h/0/moe/up": (3, 5, 7), "h/0/moe/down": (3, n_in, 12 - n_in)}
    axes = dict.fromkeys(shapes, "bio")
    plan, adapters = plan_of(shapes, axes, rank_pattern=ranks, alpha_pattern={"*/up": 3})
    params = abstract(shapes)
    for order in (("up", "down"), ("down", "up")):
        names = {f"h.0.moe.{name}": f"h/0/moe/{name}" for name in order}
        peft.save(tmp_path, adapters, plan, names=names)
        again = peft.load(tmp_path, params)
        support.same_updates(plan, again.plan, adapters, again.adapters)
        # The one that is registered first lies innermost.
        written, inner = keys(tmp_path)[0], {"up": 5, "down": n_in}
        assert len(written) == 4
        for wrapped, name in zip((".base_layer", ""), order, strict=True):
            shape = [3 * ranks.get(f"*/{name}", 2), inner[name]]
            assert written[f"{PREFIX}h.0.moe{wrapped}.lora_A.weight"][1] == shape


def test_replaced_leaves_there_and_back(tmp_path):
    own = {"h/q/kernel": (2, 5, 7), "up/kernel": (5, 7), "i/q/kernel": (5, 3, 7)}
    plan, adapters = plan_of(own, {"h/q/kernel": "bio", "i/q/kernel": "ibo"})
    shapes = {
        "h/q/kernel": (2, 5, 7),
        "i/q/kernel": (5, 3, 7),
        "h/q/bias": (2, 7),
        "h/norm/scale": (2, 5),
        "score/bias": (3,),
        "score/kernel": (5, 3),
        "heads/kernel": (5, 2, 4),
        "tok/embedding": (5, 5),
        "out/kernel": (5, 5),
        "conv/kernel": (3, 3, 2, 4),
        "up/kernel": (5, 7),
    }
    replaced = {path: asarray(draw(*shape)) for path, shape in shapes.items()}
    names = {
        "h.{}.q": "h/q/kernel",
        "i.{}.q": "i/q/kernel",
        "h.{}.norm": "h/norm/scale",
        "heads": ("heads/kernel", "ioo"),
    }
    peft.save(tmp_path, adapters, plan, names=names, replaced=replaced)
    tensors, config = support.read(tmp_path)
    saved = ["conv", "h.0.norm", "h.1.norm", "heads", "out", "score", "tok"]
    assert sorted(config["modules_to_save"]) == saved
    assert config["bias"] == "lora_only"
    assert tensors[PREFIX + "up.base_layer.weight"].shape == (7, 5)
    assert tensors[PREFIX + "h.1.q.base_layer.bias"].shape == (7,)
    for i in range(3):
        got = tensors[f"{PREFIX}i.{i}.q.base_layer.weight"]
        np.testing.assert_array_equal(got, replaced["i/q/kernel"][:, i].T)
    assert tensors[PREFIX + "conv.weight"].shape == (4, 2, 3, 3)
    again = peft.load(tmp_path, abstract(shapes))
    assert again.replaced.keys() == replaced.keys()
    for path, want in replaced.items():
        np.testing.assert_array_equal(again.replaced[path], want, err_msg=path)


@pytest.mark.parametrize(
    ("paths", "bias", "saved"),
    [
        (("q/bias",), "lora_only", None),
        (("k/bias",), "all", None),
        (("k/bias", "q/bias"), "all", None),
        (("k/bias", "k/kernel"), "none", ["k"]),
        (("k/kernel", "k/bias", "q/bias"), "lora_only", ["k"]),
    ],
)
def test_the_word_for_biases(paths, bias, saved, tmp_path):
    plan, adapters = plan_of({"q/kernel": (5, 7)})
    shapes = {"bias": (7,), "kernel": (5, 7)}
    replaced = {path: asarray(draw(*shapes[path.split("/")[1]])) for path in paths}
    peft.save(tmp_path, adapters, plan, replaced=replaced)
    tensors, config = support.read(tmp_path)
    assert (config["bias"], config["modules_to_save"]) == (bias, saved)
    # The same leaves in the plan.
    leaves = {path: TrainedLeaf(array.shape) for path, array in replaced.items()}
    own = dataclasses.replace(plan, trained=leaves)
    values = adapters | {path: {"value": array} for path, array in replaced.items()}
    for uniform in (False, True):
        peft.save(tmp_path / "trained", values, own, uniform=uniform)
        again, same_config = support.read(tmp_path / "trained")
        assert same_config == config
        jax.tree.map(np.testing.assert_array_equal, again, tensors)
    with pytest.raises(ValueError, match=rf"replaced has '{paths[0]}', which the plan tr"):
        peft.save(tmp_path, values, own, replaced=replaced)


def tied(path):
    roles = (("indexed", "kept"), ("kept", "contracted"))
    uses = (Use("gather", roles[0]), Use("dot_general", roles[1]))
    return {"uses": {path: uses}}


@pytest.mark.parametrize(
    ("shapes", "axes", "options", "message"),
    [
        ({"h/q": (3, 5, 7)}, {"h/q": "bio"}, {"names": None}, r"names=\{'name.\{\}.of'"),
        ({"tok": (9, 5)}, {}, tied("tok"), "at 'tok': .*such as a tied output head"),
        ({"a_1": (5, 7), "a/1": (5, 7)}, {}, {}, "'a/1' and 'a_1' would both be"),
        (
            {"q": (5, 7)}, {}, {"names": {"q": "k"}},
            "names has 'k' for 'q', and neither the plan nor `replaced` has that path",
        ),
        ({"e/up": (3, 5, 7)}, {"e/up": "bio"},
            {"use_dora": True, "names": {"e.up": "e/up"}}, "and without DoRA"),
        ({"e/up": (2, 3, 5, 7)}, {"e/up": "bbio"}, {"names": {"e.up": "e/up"}},
            "along one axis"),
        ({"e/up": (3, 5, 7)}, {"e/up": "bio"}, {"dropout": 0.1, "names": {"e.up": "e/up"}},
            "lora_dropout must be off with target_parameters"),
        ({"q": (5, 7)}, {}, {"replaced": {"tok/trained": jnp.zeros(3)}},
            "at 'tok/trained': .* called neither weight nor bias"),
        ({"q": (5, 7)}, {}, {"replaced": {"o/kernel": jnp.zeros((2, 3, 4))}},
            r"names=\{module: \(path, axes\)\}"),
        ({"e/w": (3, 5, 7)}, {"e/w": "bio"},
            {"names": {"e.w": "e/w"}, "replaced": {"e/w": jnp.zeros((3, 5, 7))}},
            "cannot represent a full stack of experts"),
        ({"q": (5, 7)}, {}, {"layout": "flax"}, "layout must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_written(shapes, axes, options, message, tmp_path):
    given = {n: options[n] for n in ("names", "replaced", "layout") if n in options}
    config = {n: value for n, value in options.items() if n not in given}
    plan, adapters = plan_of(shapes, axes, **config)
    with pytest.raises(ValueError, match=message):
        peft.save(tmp_path / "new", adapters, plan, **given)
    assert not list(tmp_path.iterdir())


def test_a_plan_of_two_methods_is_refused(tmp_path):
    plan, _ = plan_of({"q": (5, 7), "k": (5, 7)})
    dora = dataclasses.replace(plan.targets["q"], method="dora")
    plan = dataclasses.replace(plan, targets=FrozenDict({**plan.targets, "q": dora}))
    with pytest.raises(ValueError, match="LoRA and DoRA: save them separately"):
        peft.save(tmp_path, adapters_of(plan), plan)


def test_adapters_have_to_be_those_of_the_plan(tmp_path):
    plan, adapters = plan_of({"q": (5, 7)})
    with pytest.raises(KeyError, match="adapters"):
        peft.save(tmp_path, {}, plan)
    with pytest.raises(TypeError, match="names must be a dict"):
        peft.save(tmp_path, adapters, plan, names=["q"])
    shape = jax.ShapeDtypeStruct((5, 3), "float32")
    with pytest.raises(TypeError, match="the leaf has no values to write"):
        peft.save(tmp_path, adapters, plan, replaced={"head/kernel": shape})


def test_sharded_adapters_are_written_whole(tmp_path):
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    plan, adapters = plan_of({"q": (6, 7)})
    on_mesh = {"q": adapters["q"] | {"A": jax.device_put(adapters["q"]["A"], sharding)}}
    peft.save(tmp_path, on_mesh, plan)
    got = support.read(tmp_path)[0][PREFIX + "q.lora_A.weight"]
    np.testing.assert_array_equal(got, adapters["q"]["A"].T)


def test_work_grows_with_the_number_of_parts(tmp_path, monkeypatch):
    """The modules of a leaf are found once, and not for each of its targets."""
    found, work, region = [], [], Site.region
    monkeypatch.setattr(Site, "region", lambda *args: found.append(args) or region(*args))
    for layers in (4, 8, 16):
        pattern = {
            f"up[{i},{2 * j}:{2 * j + 2}]": 1 + i % 2 for i in range(layers) for j in (0, 1)
        }
        plan, adapters = plan_of(
            {"up": (layers, 4, 5, 7)},
            {"up": "bbio"},
            rank=3,
            rank_pattern=pattern,
            targets=(*pattern,),
        )
        found.clear()
        names = {"h.{l}.experts.{e}.up": ("up", "{l}{e}io")}
        peft.save(tmp_path, adapters, plan, names=names)
        work.append(len(found))
        assert len(support.read(tmp_path)[0]) == 2 * 4 * layers
    assert work[2] == 2 * work[1] == 4 * work[0]
