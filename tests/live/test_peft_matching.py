"""`match_modules` against the modules that PEFT really adapts."""

import pytest

import lora_jax.peft

peft = pytest.importorskip("peft")
support = pytest.importorskip("tests.live.support")

pytestmark = [pytest.mark.live, *support.FILTERS]

ALL = {"target_modules": "all-linear"}
CASES = {
    "llama": [
        ALL,
        {**ALL, "exclude_modules": ["k_proj", "1.mlp.up_proj"]},
        {**ALL, "exclude_modules": r".*mlp.*", "use_rslora": True},
        {**ALL, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5}},
        {**ALL, "modules_to_save": ["o_proj", "0.mlp.down_proj"]},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r"model\.layers\.1\..*_proj", "alpha_pattern": {"^model": 3}},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {
            "target_modules": ["q_proj", "model.layers.0.mlp.up_proj"],
            "layers_to_transform": 1,
            "layers_pattern": "layers",
        },
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "use_rslora": True,
            "rank_pattern": {"layers.0.self_attn.q_proj": 5, "q_proj": 6, "j": 7},
            "alpha_pattern": {r".*\.0\..*": 9, "k_proj$": 1, "v_proj": 0.5},
        },
    ],
    "llama_scores": [
        {**ALL, "task_type": "SEQ_CLS"},
        ALL,
    ],
    "bert": [
        {**ALL, "task_type": "SEQ_CLS"},
        ALL,
        {"target_modules": ["query", "dense"], "exclude_modules": ["pooler.dense"]},
        {
            "target_modules": ["dense"],
            "task_type": "SEQ_CLS",
            "exclude_modules": "bert.p.*",
        },
        {"target_modules": ["classifier", "key"], "task_type": "SEQ_CLS"},
        {"target_modules": ["word_embeddings"], "rank_pattern": {"embeddings": 7}},
    ],
    "gpt2": [
        {**ALL, "fan_in_fan_out": True},
        {"target_modules": ["c_proj"], "fan_in_fan_out": True, "layers_to_transform": [0]},
        {
            "target_modules": ["c_attn", "wte", "wpe"],
            "fan_in_fan_out": True,
            "rank_pattern": {"h.1.attn.c_attn": 1, "wte": 2},
            "alpha_pattern": {"attn.c_attn": 3},
        },
        {
            "target_modules": ["c_fc"],
            "fan_in_fan_out": True,
            "layers_to_transform": [1],
            "layers_pattern": ["h", "layers"],
        },
    ],
    "t5": [
        {**ALL, "task_type": "SEQ_2_SEQ_LM"},
        {"target_modules": ["q", "v", "wo"]},
        {"target_modules": ["k"], "layers_to_transform": [0], "layers_pattern": "block"},
        {"target_modules": ["q", "wi"], "layers_to_transform": [1]},
        {"target_modules": r"decoder.*\.o", "rank_pattern": {r"EncDecAttention\.o": 1}},
    ],
}
LISTED = [(name, fields) for name, cases in CASES.items() for fields in cases]


@pytest.mark.parametrize(("name", "fields"), LISTED)
def test_the_same_modules_with_the_same_numbers(name, fields):
    fields = {"r": 4, "lora_alpha": 6, **fields}
    base = support.model(name)
    modules = support.modules_of(base)
    config = peft.LoraConfig(**fields)
    with support.quiet():
        adapted = peft.get_peft_model(base, config).base_model.model
    want = {
        module: (layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"])
        for module, layer in adapted.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert lora_jax.peft.match_modules(config.to_dict() | fields, modules) == want


@pytest.mark.parametrize("targets", [["proj"], r"q_proj", ["q_proj."]])
def test_both_refuse_targets_that_are_not_there(targets):
    base = support.model("llama")
    modules = support.modules_of(base)
    with pytest.raises(ValueError, match=r"not found|not supported"):
        peft.get_peft_model(base, peft.LoraConfig(target_modules=targets))
    with pytest.raises(ValueError, match="matches no module"):
        lora_jax.peft.match_modules({"target_modules": targets}, modules)
