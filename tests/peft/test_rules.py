import dataclasses
import json
import pathlib

import jax
import pytest

from lora_jax import peft, plan_adapters
from lora_jax.peft.formats.config import Patterns, PeftConfig
from lora_jax.peft.rules import ModuleMatch, Rules, match_modules

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "peft_json"


def load(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


TABLE = load("matching_models")
MODELS = {name: dict(modules) for name, modules in TABLE["models"].items()}
# In these the reference looks the targets up by the type of the model.
NAMED = [c for c in TABLE["cases"] if c["config"]["target_modules"] is not None]
WORKING = [case for case in NAMED if "error" not in case]
MODULES = {
    "embed": "Embedding",
    "layers.0.q": "Linear",
    "layers.0.up": "Conv1D",
    "layers.0.norm": "LayerNorm",
    "layers.1.q": "Linear",
    "layers.1.up": "Conv1D",
    "score": "Linear",
}


def config_of(**fields):
    return PeftConfig.from_dict(fields, "config")


def test_names_of_the_reference():
    rows = load("matching_strings")
    assert len(rows) == 106
    assert {row[2] for row in rows} == {True, False, "excluded"}
    for fields, name, want in rows:
        config = config_of(**fields)
        rules = Rules(config)
        assert rules.matched(name) is (want is True), (fields, name)
        excluded = rules.verdict(name, config.target_modules) == "excluded"
        assert excluded is (want == "excluded"), (fields, name)


def test_keys_of_the_reference():
    rows = load("rank_alpha_pattern_lookup")
    assert len(rows) == 31
    for keys, name, want in rows:
        assert Patterns(keys).key_of(name) == want, (keys, name)


@pytest.mark.parametrize("case", WORKING, ids=[str(i) for i in range(len(WORKING))])
def test_models_of_the_reference(case):
    got = match_modules(case["config"], MODELS[case["model"]])
    want = {
        k: ModuleMatch(v["r"], v["alpha"], v["scaling"]) for k, v in case["matched"].items()
    }
    assert got == want
    assert list(got) == [name for name in MODELS[case["model"]] if name in want]


def test_what_the_reference_does_not_match():
    assert len(WORKING) == 15
    (case,) = [case for case in NAMED if "error" in case]
    with pytest.raises(ValueError, match=r"such as 'model\.layers\.0.*none in layers_to_t"):
        match_modules(case["config"], MODELS[case["model"]])


def test_the_model_itself_is_no_module():
    got = match_modules({"target_modules": ".*"}, {"": "Net", "q": "Linear"})
    assert list(got) == ["q"]


def test_a_config_may_be_an_object_or_a_dict():
    fields = {"target_modules": ["q"], "r": 2, "use_rslora": True}
    want = ModuleMatch(2, 8, 8 / 2**0.5)
    for config in (fields, config_of(**fields)):
        assert match_modules(config, MODULES) == {"layers.0.q": want, "layers.1.q": want}


def all_linear(modules=MODULES, output_embedding=None, **fields):
    config = config_of(target_modules="ALL-linear", **fields)
    return [*match_modules(config, modules, output_embedding=output_embedding)]


def test_all_linear():
    inner = ["layers.0.q", "layers.0.up", "layers.1.q", "layers.1.up"]
    assert all_linear() == [*inner, "score"]
    assert all_linear(task_type="SEQ_CLS") == inner
    assert all_linear(output_embedding="score") == inner
    assert all_linear(output_embedding="q") == ["layers.0.up", "layers.1.up", "score"]
    assert all_linear(exclude_modules=["q"], modules_to_save=["score"]) == inner[1::2]


def test_all_linear_leaves_one_kind_of_head_out():
    both = {"a": "Linear", "classifier": "Linear", "score": "Linear"}
    assert all_linear(both, task_type="SEQ_CLS") == ["a", "classifier"]
    logits = {"a": "Linear", "score": "Linear", "m.lm_head": "Linear"}
    assert all_linear(logits, task_type="SEQ_CLS") == ["a", "score"]


def test_whole_names_are_in_every_layer():
    fields = {"target_modules": ["m.layers.0.q", "up"], "layers_to_transform": [1]}
    names = ["m.layers.0.q", "m.layers.0.up", "m.layers.1.q", "m.layers.1.up"]
    got = [Rules(config_of(**fields)).matched(name) for name in names]
    assert got == [True, False, False, True]


def test_what_is_inside_a_saved_module_is_left_out():
    config = config_of(target_modules=["dense"], modules_to_save=["head"])
    names = ["head.dense", "m.head.dense", "ahead.dense", "m.headed.dense"]
    assert [Rules(config).matched(name) for name in names] == [False, False, True, True]


def test_a_key_with_signs_names_itself():
    assert Patterns(["a+b", "a.*"]).key_of("m.a+b") == "a.*"
    assert Patterns(["a+b"]).key_of("a+b") == "a+b"
    assert Patterns(["a+b"]).key_of("m.a+b") is None


def test_only_parameters_are_targeted():
    config = config_of(target_parameters=["experts.up"])
    assert match_modules(config, MODULES) == {}
    assert not Rules(config).matched("experts")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "target_modules is None: .* Name the modules"),
        ({"target_modules": []}, r"target_modules is \(\): .* Name the modules"),
        ({"target_modules": ["qq"]}, r"matches no module; the nearest names are 'q'"),
        ({"target_modules": ["layers.q.0"]}, r"the nearest names are 'layers\.1\.q'"),
        ({"target_modules": r".*\.(scores|vv)"}, "the nearest names are 'score'"),
        ({"target_modules": ["zzz"]}, r"the first names are 'embed', 'layers\.0\.q'"),
        (
            {"target_modules": ["q"], "exclude_modules": ["layers.0.q", "layers.1.q"]},
            "all 2 modules that target_modules=.* left out by exclude_modules=",
        ),
        (
            {"target_modules": ["score"], "modules_to_save": ["score"]},
            "all 1 modules .* such as 'score', are left out",
        ),
        (
            {"target_modules": ["q"], "layers_to_transform": 7},
            "matches 2 modules, such as 'layers.0.q', but none in layers_to_transform",
        ),
        ({"target_modules": ["q"], "r": 0}, "at 'config': r must be"),
    ],
)
def test_why_nothing_matches(fields, match):
    with pytest.raises(ValueError, match=match):
        match_modules(fields, MODULES)


def test_wrong_arguments():
    fields = {"target_modules": ["q"]}
    with pytest.raises(ValueError, match="modules is empty"):
        match_modules(fields, {})
    with pytest.raises(ValueError, match="no Linear or Conv1D besides a head"):
        all_linear({"embed": "Embedding", "lm_head": "Linear"})
    with pytest.raises(TypeError, match=r"modules must be a dict .* got list"):
        match_modules(fields, ["q"])
    with pytest.raises(TypeError, match="got the entry 'q': 3"):
        match_modules(fields, {"q": 3})
    with pytest.raises(TypeError, match="at 'config': the content must be a JSON object"):
        match_modules(3, MODULES)
    with pytest.raises(KeyError, match=r"no module 'scores' .* nearest names are 'score'"):
        all_linear(output_embedding="scores")
    with pytest.raises(ValueError, match="by their classes"):
        Rules(config_of(target_modules="all-linear")).matched("q")
    with pytest.raises(ValueError, match="target_modules is None"):
        Rules(config_of()).matched("q")


def tree(layers=2):
    def layer():
        return {
            "self_attn": {
                "q_proj": {"kernel": jax.ShapeDtypeStruct((12, 16), "float32")},
                "v_proj": {"kernel": jax.ShapeDtypeStruct((12, 8), "float32")},
            },
            "norm": {"scale": jax.ShapeDtypeStruct((12,), "float32")},
        }

    return {
        "embed_tokens": {"embedding": jax.ShapeDtypeStruct((50, 12), "float32")},
        **{f"layers_{i}": layer() for i in range(layers)},
        "lm_head": {"kernel": jax.ShapeDtypeStruct((12, 50), "float32")},
    }


def planned(prefix="", **config):
    params = tree()
    return plan_adapters(peft.to_lora_config(config, params, prefix=prefix), params)


def test_names_and_patterns_become_paths():
    plan = planned(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 2},
        alpha_pattern={"v_proj": 6},
        lora_dropout=0.1,
        use_dora=True,
    )
    got = {path: (t.rank, t.scale, t.method) for path, t in plan.targets.items()}
    first, second = ("layers_0/self_attn/{}/kernel", "layers_1/self_attn/{}/kernel")
    assert got == {
        first.format("q_proj"): (4, 4.0, "dora"),
        first.format("v_proj"): (4, 1.5, "dora"),
        second.format("q_proj"): (2, 8.0, "dora"),
        second.format("v_proj"): (4, 1.5, "dora"),
    }
    assert plan.config.dropout == 0.1
    some = {"layers_to_transform": [1], "exclude_modules": ["v_proj"], "prefix": "model."}
    plan = planned(target_modules=["q_proj", "v_proj"], **some)
    assert list(plan.targets) == [second.format("q_proj")]
    plan = planned(target_modules="all-linear", use_rslora=True, r=4, lora_alpha=4)
    assert {path: t.scale for path, t in plan.targets.items()} == dict.fromkeys(got, 2.0)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"target_modules": ["up_proj"]}, "up_proj"),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}},
            "rank_pattern.*k_p",
        ),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"x": 2}}, "alpha_pattern.*'x'"),
        ({"target_modules": ["q_proj"], "bias": "all"}, "config's bias is 'all'"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "decompose_params"),
        ({"target_modules": ["q_proj"], "init_lora_weights": False}, "not an initializer"),
        ({"target_modules": ["q_proj"], "lora_alpha": 0}, "alpha must not be 0"),
    ],
)
def test_what_has_no_meaning_here_is_an_error(config, match):
    with pytest.raises(ValueError, match=match):
        peft.to_lora_config(config, tree())


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, {"": (8, 1.0)}),
        ({"layers_to_transform": [4, 5]}, {"[4:]": (8, 1.0)}),
        ({"layers_to_transform": [0, 3, 4]}, {"[[0,3,4]]": (8, 1.0)}),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, {"[1:2]": (8, 1.0)}),
        ({"layers_to_transform": range(6)}, {"": (8, 1.0)}),
        (
            {"rank_pattern": {r"layers\.[24]\.q": 2}, "alpha_pattern": {"5.q": 4}},
            {"[[0,1,3]]": (8, 1.0), "[2::2]": (2, 4.0), "[5:]": (8, 0.5)},
        ),
        (
            {"target_modules": r".*\.[01]\.q", "rank_pattern": {"0.q": 2}},
            {"[:1]": (2, 4.0), "[1:2]": (8, 1.0)},
        ),
    ],
)
def test_layers_of_a_stack_become_parts(config, found):
    shapes = {"layers": {"q": (6, 12, 16), "k": (6, 12, 16)}, "q_norm": (6, 12)}
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, "float32"),
        shapes,
        is_leaf=lambda each: isinstance(each, tuple),
    )
    if not isinstance(config.get("layers_to_transform"), int | None):
        config = config | {"layers_to_transform": [*config["layers_to_transform"]]}
    own = {"target_modules": ["q"], **config}
    plan = plan_adapters(
        dataclasses.replace(
            peft.to_lora_config(own, params, prefix="model."), axes={"layers/q": "bio"}
        ),
        params,
    )
    got = {path: (t.rank, t.scale) for path, t in plan.targets.items()}
    assert got == {f"layers/q{part}": numbers for part, numbers in found.items()}


def test_a_prefix_that_layers_need():
    params = {"layers": {"q": jax.ShapeDtypeStruct((6, 12, 16), "float32")}}
    config = {"target_modules": ["q"], "layers_to_transform": [4]}
    with pytest.raises(ValueError, match=r"layers_to_transform=\(4,\).* prefix='model.'"):
        peft.to_lora_config(config, params)
    for wrong in ({"layers_to_transform": [7]}, {"target_modules": ["up"]}):
        with pytest.raises(ValueError, match="matches") as error:
            peft.to_lora_config(config | wrong, params)
        assert "prefix" not in str(error.value)


def test_stacked_norms_are_no_matrices():
    shapes = {"norm": "scale", "ln_1": "weight", "up": "kernel"}
    params = {
        name: {leaf: jax.ShapeDtypeStruct((2, 48), "float32")}
        for name, leaf in shapes.items()
    }
    config = peft.to_lora_config({"target_modules": "all-linear"}, {"blocks": params})
    assert config.targets == ("blocks/up/kernel",)


def test_each_key_is_compared_once(monkeypatch):
    """Not with each module: a file may have a rank for each of thousands."""
    calls, key_of = [], Patterns.key_of
    monkeypatch.setattr(Patterns, "key_of", lambda *a: calls.append(a) or key_of(*a))
    counts = []
    for layers in (8, 16, 32):
        calls.clear()
        ranks = {rf"layers\.{i}\.self_attn\.q_proj": 2 + i % 3 for i in range(layers)}
        config = {"target_modules": ["q_proj"], "rank_pattern": ranks}
        assert len(peft.to_lora_config(config, tree(layers)).targets) == layers
        counts.append(len(calls))
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])
    shadowed = {"q_proj": 2, r"0\.self_attn\.q_proj": 4}  # never the first that matches
    config = {"target_modules": ["q_proj"], "rank_pattern": shadowed}
    assert peft.to_lora_config(config, tree()).rank_pattern
