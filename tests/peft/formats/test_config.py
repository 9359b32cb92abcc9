import copy
import dataclasses
import json
import math
import pathlib
import pickle

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lora_jax.peft.formats.config import PeftConfig
from lora_jax.peft.formats.fields import IGNORED, UNSUPPORTED

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "peft_json"
DEFAULT = json.loads((GOLDEN / "adapter_config_default.json").read_text())
FIELDS = {
    field["name"]: field["default"]
    for field in json.loads((GOLDEN / "lora_config_fields.json").read_text())
}
SAVED = [
    case["adapter_config_saved"]
    for case in json.loads((GOLDEN / "checkpoint_keys.json").read_text())
]


def read(**fields):
    return PeftConfig.from_dict(fields, "adapter_config.json")


FULL = read(
    r=4,
    lora_alpha=2.5,
    target_modules=["v", "q", "v"],
    exclude_modules=r".*\.0\.q",
    lora_dropout=0.25,
    bias="lora_only",
    use_rslora=True,
    modules_to_save=["score", "lm_head"],
    init_lora_weights="pissa_niter_16",
    layers_to_transform=3,
    layers_pattern="layers",
    rank_pattern={"^q": 2, "a|b": 6},
    alpha_pattern={"q": 8, "^q": 9},
    trainable_token_indices={"emb": [3, 1], "dec": []},
    use_dora=True,
    task_type="CAUSAL_LM",
    peft_version="0.14.0",
    auto_mapping={"parent_library": "m", "base_model_class": "Net"},
)


def test_defaults_are_those_of_peft():
    own = {field.name for field in dataclasses.fields(PeftConfig)} - {"_"}
    got = json.loads(json.dumps(vars(PeftConfig()), default=dict))
    assert got == {name: FIELDS[name] for name in own} | {"peft_type": "LORA"}
    assert read() == PeftConfig()


def test_every_field_of_peft_is_known():
    for name, default in FIELDS.items():
        if name != "peft_type":
            assert read(**{name: default}) == PeftConfig(), name
    assert read(**DEFAULT) == PeftConfig(target_modules=("q_proj", "v_proj"))


def test_fields_are_kept_in_one_form():
    assert FULL.target_modules == ("q", "v")
    assert FULL.modules_to_save == ("score", "lm_head")
    assert (FULL.layers_to_transform, FULL.layers_pattern) == ((3,), ("layers",))
    assert read(layers_pattern="").layers_pattern == ()
    assert list(FULL.alpha_pattern) == ["q", "^q"]
    assert FULL.trainable_token_indices == {"dec": (), "emb": (3, 1)}
    assert list(FULL.trainable_token_indices) == ["dec", "emb"]
    assert read(trainable_token_indices=[2, 0]).trainable_token_indices == (2, 0)
    assert read(rank_pattern=None).rank_pattern == {}
    assert PeftConfig(np.int64(8), lora_alpha=np.float16(8)) == PeftConfig()


def test_it_is_hashable_and_frozen():
    again = pickle.loads(pickle.dumps(FULL))
    assert again == FULL
    assert hash(again) == hash(FULL)
    assert hash(PeftConfig()) != hash(FULL)
    with pytest.raises(dataclasses.FrozenInstanceError, match="'r'"):
        FULL.r = 3


@pytest.mark.parametrize("fields", [DEFAULT, *SAVED], ids=range(len(SAVED) + 1))
def test_json_is_what_peft_writes(fields):
    want = fields | {"inference_mode": True}
    for name in ("target_modules", "exclude_modules"):
        if isinstance(want[name], list):
            want[name] = sorted(want[name])
    if isinstance(want["layers_pattern"], str):  # kept as a list, which means the same
        want["layers_pattern"] = [want["layers_pattern"]]
    assert read(**fields).to_json() == json.dumps(want, indent=2, sort_keys=True)


@pytest.mark.parametrize("config", [PeftConfig(), FULL], ids=["default", "full"])
def test_json_round_trip(config):
    again = read(**json.loads(config.to_json()))
    assert again == config
    assert list(again.alpha_pattern) == list(config.alpha_pattern)
    assert again.inference_mode
    assert again.to_json() == config.to_json()


def test_json_has_the_version_of_the_file_or_of_the_fields():
    assert json.loads(FULL.to_json())["peft_version"] == "0.14.0"
    assert json.loads(PeftConfig().to_json())["peft_version"] == DEFAULT["peft_version"]


def test_rank_alpha_and_scale_of_a_module():
    assert [FULL.rank_of(name) for name in ("q", "m.q", "m.b")] == [2, 4, 6]
    assert [FULL.alpha_of(name) for name in ("q", "m.q", "m.b")] == [8, 8, 2.5]
    assert FULL.scale_of("m.b") == 2.5 / math.sqrt(6)


def test_scale_is_that_of_peft():
    for case in json.loads((GOLDEN / "scaling_api.json").read_text()):
        fields = {name: case[name] for name in ("r", "lora_alpha", "use_rslora")}
        assert read(**fields).scale_of("q") == dict(case["sequence"])["init"], case


@pytest.mark.parametrize(
    ("init", "changes"),
    [
        *[(init, False) for init in (True, False, "gaussian", "Gaussian", "orthogonal")],
        *[(init, False) for init in ("eva", "mica")],
        *[(init, True) for init in ("pissa", "pissa_niter_4", "olora", "corda")],
        *[(init, True) for init in ("loftq", "lora_ga")],
    ],
)
def test_initializations(init, changes):
    config = read(init_lora_weights=init)
    assert config.init_lora_weights is init
    assert config.changes_base is changes


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
@pytest.mark.parametrize("value", [True, {"a": 1}, [3]], ids=str)
def test_fields_of_other_methods_are_named(name, value):
    with pytest.raises(ValueError, match=rf"'adapter_config\.json': {name} is .* not supp"):
        read(**{name: value})


def test_details_of_what_is_off_do_not_matter():
    off = {"qalora_group_size": 32, "megatron_core": "other", "eva_config": {"rho": 3}}
    assert read(**off, runtime_config={"ephemeral_gpu_offload": True}) == PeftConfig()
    with pytest.raises(ValueError, match="use_qalora is True, which"):
        read(**off, use_qalora=True)


def test_unknown_fields_have_to_be_off():
    assert read(a=None, b=False, c={}, d=[], e="") == PeftConfig()
    with pytest.raises(ValueError, match=r"no field 'tucker', which is 0.* newer version"):
        read(tucker=0)
    with pytest.raises(ValueError, match=r"no field 'lora_alfa'.* mean 'lora_alpha'"):
        read(lora_alfa=4)


def test_unknown_fields_are_ignored_if_the_caller_says_so():
    fields = {"r": 4, "tucker": 0, "velora_config": {"a": 1}, "newer": True}
    allowed = ["tucker", "velora_config"]
    with pytest.raises(ValueError, match=r"'newer', .* allow_fields=\('newer',\)"):
        PeftConfig.from_dict(fields, "x", allowed)
    config = PeftConfig.from_dict(fields, "x", [*allowed, "newer"])
    assert config == PeftConfig(r=4)


@pytest.mark.parametrize("method", ["LOHA", "IA3", None, 3])
def test_other_methods_are_named(method):
    with pytest.raises(ValueError, match=f"peft_type must be 'LORA', got {method!r}"):
        read(unknown=1, peft_type=method)


HUGE = 10**5000
WRONG = {
    "r": [None, True, 8.0, "8", [8]],
    "lora_alpha": [None, True, "16", {}],
    "target_modules": [3, {}, [3], [None], [["q"]]],
    "exclude_modules": [3, [3]],
    "lora_dropout": [None, True, "0"],
    "fan_in_fan_out": [None, 0, "true"],
    "bias": [None, True, ["none"]],
    "use_rslora": [None, 1],
    "modules_to_save": ["lm_head", 3, [None]],
    "init_lora_weights": [None, 1, ["pissa"], {}],
    "layers_to_transform": ["0", [0.0], [True], {}],
    "layers_pattern": [3, [3]],
    "rank_pattern": [[], "q", {"q": None}, {"q": 2.0}, {3: 4}],
    "alpha_pattern": [[], {"q": "8"}, {"q": None}, {"q": True}],
    "trainable_token_indices": ["a", 3, [0.5], {"e": 3}, {"e": ["a"]}, {3: [1]}],
    "use_dora": [None, 1],
    "lora_bias": [None, 0],
    "target_parameters": ["mlp.experts", [3]],
    "task_type": [3, ["CAUSAL_LM"]],
    "base_model_name_or_path": [3],
    "revision": [False],
    "peft_version": [0.5],
    "inference_mode": [None],
    "auto_mapping": ["a", {"a": []}, {3: "a"}],
}
OUT_OF_RANGE = {
    "r": [0, -1, HUGE],
    "lora_alpha": [math.nan, math.inf, -math.inf, HUGE, 1e39],
    "target_modules": ["(", "a{99999999999}", "(" * 9999, [""]],
    "exclude_modules": ["*", [""]],
    "lora_dropout": [1.0, -0.1, math.nan, HUGE],
    "bias": ["some"],
    "modules_to_save": [["("], [""]],
    "init_lora_weights": ["xavier", "pissa_niter_", "Pissa", ""],
    "layers_to_transform": [-1, [-1], HUGE],
    "layers_pattern": ["(", ["a", "[b"], "(?P<idx>a)", [""]],
    "rank_pattern": [{"q": 0}, {"(": 1}, {"(?i)q": 1}, {"q": HUGE}],
    "alpha_pattern": [{"q": math.nan}, {"[": 1}],
    "trainable_token_indices": [[-1], {"e": [-1]}, [HUGE]],
    "target_parameters": [[""]],
    "task_type": ["CAUSAL", "causal_lm"],
    "auto_mapping": [{"a": math.nan}],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_types_are_named(name):
    for value in WRONG[name]:
        with pytest.raises(TypeError, match=rf"'adapter_config\.json': .*{name}.* must be"):
            read(**{name: value})


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_wrong_values_are_named(name):
    for value in OUT_OF_RANGE[name]:
        with pytest.raises(ValueError, match=rf"'adapter_config\.json': .*{name}"):
            read(**{"layers_to_transform": [0]} | {name: value})


def test_keys_are_valid_where_peft_puts_them():
    assert read(rank_pattern={"a)|(b": 3}).rank_of("m.ab") == 3


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"layers_pattern": ["h"]}, "layers_to_transform has to select"),
        (
            {"target_modules": "q", "layers_to_transform": []},
            "needs target_modules to be a list",
        ),
        ({"target_modules": "all-linear", "layers_to_transform": 1}, "list of names"),
        (
            {"target_modules": "q", "layers_pattern": []},
            "needs target_modules to be a list",
        ),
        ({"lora_bias": True, "use_dora": True}, "lora_bias needs use_dora=False"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias needs"),
        ({"target_parameters": ["w"], "use_dora": True}, "use_dora must be off"),
        ({"target_parameters": ["w"], "lora_bias": True}, "lora_bias must be off"),
        ({"target_parameters": ["w"], "lora_dropout": 0.1}, "lora_dropout must be off"),
        ({"target_parameters": ["w"], "fan_in_fan_out": True}, "fan_in_fan_out must be"),
    ],
)
def test_what_peft_refuses(fields, match):
    with pytest.raises(ValueError, match=match):
        read(**fields)


def test_the_content_has_to_be_an_object():
    with pytest.raises(TypeError, match="a JSON object, got \\[\\] \\(list\\)"):
        PeftConfig.from_dict([], "adapter_config.json")


def test_values_too_deep_to_show():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for name in {*DEFAULT, "unknown"} - IGNORED.keys():
        with pytest.raises((TypeError, ValueError), match=name):
            read(**{name: deep})


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["(?P<idx>a)", "[[a", "a{9999999999}", "\\1", "(?i)", "all-linear"])
    | st.sampled_from([10**400, -(10**400), math.nan, math.inf]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=4,
)
MUTATIONS = st.dictionaries(st.sampled_from([*DEFAULT, "unknown"]), JUNK, max_size=3)


@hypothesis.settings(max_examples=300)
@hypothesis.given(MUTATIONS, st.sets(st.sampled_from([*DEFAULT]), max_size=3))
def test_any_content_is_read_or_refused(mutations, lacking):
    fields = copy.deepcopy(DEFAULT) | mutations
    try:
        config = read(**{k: v for k, v in fields.items() if k not in lacking})
    except (TypeError, ValueError) as error:
        assert str(error).startswith("at 'adapter_config.json': ")  # noqa: PT017
        return
    hash(config)
    assert read(**json.loads(config.to_json())) == config
    assert math.isfinite(config.scale_of("model.q_proj"))
