"""Adapters that PEFT saved: read, merged, and written again, against its own outputs."""

import json

import numpy as np
import pytest
import safetensors.numpy

import lora_jax.peft

support = pytest.importorskip("tests.live.support")

pytestmark = [pytest.mark.live, *support.FILTERS]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PATTERNS = {
    "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.up_proj": 2},
    "alpha_pattern": {r"^model\.layers\.0\.self_attn\.k_proj": 9, "up_proj": 2},
}
CONVOLUTIONS = ["emb", "conv1", "conv2", "square", "out"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

# The base model and the settings of each adapter.
CASES = {
    "llama-all-linear": ("llama", {"target_modules": "all-linear"}),
    "llama-rslora": (
        "llama",
        {"target_modules": ATTENTION, "use_rslora": True, "lora_dropout": 0.1},
    ),
    "llama-dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "llama-patterns": ("llama", {"target_modules": [*ATTENTION, "up_proj"], **PATTERNS}),
    "llama-patterns-dora-rslora": (
        "llama",
        {"target_modules": "all-linear", "use_dora": True, "use_rslora": True, **PATTERNS},
    ),
    "llama-regex": ("llama", {"target_modules": r".*\.[01]\.mlp\.(up|down)_proj"}),
    "llama-layers": (
        "llama",
        {"target_modules": ATTENTION, "layers_to_transform": [1], "use_dora": True},
    ),
    "llama-excluded": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "0.mlp.up_proj"]},
    ),
    "llama-saved": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    ),
    "llama-saved-head": (
        "llama",
        {"target_modules": ["up_proj"], "modules_to_save": ["lm_head", "1.mlp.down_proj"]},
    ),
    "llama-tokens": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3, 20]},
    ),
    "llama-tokens-of-two": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [7]},
        },
    ),
    "llama-embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "llama-embedding-dora": (
        "llama",
        {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
    ),
    "llama-gaussian": (
        "llama",
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    ),
    "llama-orthogonal": (
        "llama",
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "r": 4},
    ),
    "llama-pissa": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"},
    ),
    "llama-olora": (
        "llama",
        {"target_modules": ["k_proj", "down_proj"], "init_lora_weights": "olora"},
    ),
    "llama-scores": (
        "llama_scores",
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    ),
    "bert-classifier": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "bert-all-biases": ("bert", {"target_modules": ["query", "value"], "bias": "all"}),
    "bert-biases-of-adapted": (
        "bert",
        {"target_modules": ["query", "dense"], "bias": "lora_only", "task_type": "SEQ_CLS"},
    ),
    "bert-bias-of-b": (
        "bert",
        {"target_modules": ["key", "classifier"], "lora_bias": True, "use_rslora": True},
    ),
    "bert-bias-of-b-and-all": (
        "bert",
        {"target_modules": ["key"], "lora_bias": True, "bias": "all"},
    ),
    "bert-dora-all-biases": (
        "bert",
        {"target_modules": "all-linear", "use_dora": True, "bias": "all"},
    ),
    "bert-embeddings": (
        "bert",
        {
            "target_modules": ["word_embeddings", "position_embeddings", "key"],
            "modules_to_save": ["LayerNorm", "classifier"],
        },
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2-default": ("gpt2", {"fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
    "gpt2-dora": (
        "gpt2",
        {"target_modules": "all-linear", "use_dora": True, "fan_in_fan_out": True},
    ),
    "gpt2-positions-and-biases": (
        "gpt2",
        {"target_modules": ["wpe", "c_fc"], "fan_in_fan_out": True, "bias": "all"},
    ),
    "gpt2-pissa": (
        "gpt2",
        {"target_modules": ["c_fc"], "init_lora_weights": "pissa", "fan_in_fan_out": True},
    ),
    "t5": ("t5", {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
    "t5-dora": (
        "t5",
        {
            "target_modules": "all-linear",
            "use_dora": True,
            "modules_to_save": ["layer_norm", "relative_attention_bias"],
        },
    ),
    "toy": ("toy", {"target_modules": CONVOLUTIONS, "bias": "lora_only"}),
    "toy-dora": ("toy", {"target_modules": CONVOLUTIONS, "use_dora": True}),
    "toy-saved": (
        "toy",
        {"target_modules": ["square"], "modules_to_save": ["conv1", "conv2", "emb"]},
    ),
    "toy-experts": (
        "toy_experts",
        {"target_modules": ["head"], "target_parameters": ["experts.up", "experts.down"]},
    ),
    "mixtral": ("mixtral", {"target_modules": [], "target_parameters": EXPERTS}),
    "mixtral-one-parameter": (
        "mixtral",
        {
            "target_modules": ["q_proj", "gate"],
            "target_parameters": ["0.mlp.experts.down_proj"],
            "use_rslora": True,
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "bias": "lora_only"},
    ),
}


# What PEFT does not say: of two parameters of one shape but for the order of its axes,
# which has which adapter.
EXPERTS_OF_TOY = {
    "experts.base_layer": ("experts.up", "bio"),
    "experts": ("experts.down", "bio"),
}
# What a tree does not say: that `h_0` is one of a list, and `ln_1` is a name.
NORMS_OF_GPT2 = {"transformer.h.{}.ln_{}": "transformer/h_{}/ln_{}/scale"}

# Settings that say the same in another way.
RESTATED = {
    "alpha_pattern",
    "auto_mapping",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "trainable_token_indices",
}


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory):
    name, fields = CASES[request.param]
    return support.train(name, tmp_path_factory.mktemp("peft"), **fields)


@pytest.fixture
def config(trained):
    return trained.model.peft_config["default"]


def reload(trained, layout):
    """The params in a layout, the adapter on them, and its names for `save`."""
    base = support.model(trained.name)
    params = support.params_of(base)
    if layout == "jax":
        params = support.as_tree(params, support.leaves_of(base))
    names = EXPERTS_OF_TOY if (trained.name, layout) == ("toy_experts", "torch") else None
    # The embedding of this classifier is no output head; nothing in its files says so.
    on_tied = "allow" if trained.name == "bert" else "error"
    arguments = {"names": names, "layout": layout, "on_tied": on_tied}
    loaded = lora_jax.peft.load(trained.folder, params, **arguments)
    table = lora_jax.peft.match_names(trained.folder, params, **arguments)
    return params, loaded, table


def write_again(trained, layout, folder):
    """Saves what was loaded, and returns the tensors of the old file and of the new."""
    _, loaded, table = reload(trained, layout)
    names = dict(table)
    if trained.name == "gpt2" and layout == "jax":
        names |= NORMS_OF_GPT2
    config = trained.model.peft_config["default"]
    lora_jax.peft.save(
        folder,
        loaded.adapters,
        loaded.plan,
        names=names,
        layout=layout,
        replaced=loaded.replaced,
        base_model=config.base_model_name_or_path,
        task_type=config.task_type,
    )
    name = "adapter_model.safetensors"
    return safetensors.numpy.load_file(trained.folder / name), safetensors.numpy.load_file(
        folder / name
    )


def test_the_adapter_changes_the_model(trained):
    base = support.logits(support.model(trained.name))
    assert np.abs(trained.logits - base).max() > 0.02 * np.abs(base).max()


def test_merged_state_dicts(trained):
    params, loaded, _ = reload(trained, "torch")
    merged = support.with_params(trained.name, support.merged(params, loaded))
    support.assert_same(support.logits(merged), trained.logits)


def test_merged_trees(trained):
    params, loaded, _ = reload(trained, "jax")
    leaves = support.leaves_of(support.model(trained.name))
    merged = support.from_tree(support.merged(params, loaded), leaves)
    merged = support.with_params(trained.name, merged)
    support.assert_same(support.logits(merged), trained.logits)


@pytest.mark.parametrize("layout", ["torch", "jax"])
def test_peft_loads_what_is_written_again(trained, config, layout, tmp_path):
    write_again(trained, layout, tmp_path)
    if config.init_lora_weights == "pissa" and (trained.name, layout) == ("gpt2", "jax"):
        # A tree does not say that torch has whole bases the other way round.
        with pytest.raises(RuntimeError, match="size mismatch"):
            support.from_files(trained.name, tmp_path)
        return
    again = support.from_files(trained.name, tmp_path)
    support.assert_same(support.logits(again), trained.logits)


@pytest.mark.parametrize("layout", ["torch", "jax"])
def test_files_are_the_same(trained, config, layout, tmp_path):
    old, new = write_again(trained, layout, tmp_path)
    if (
        config.lora_bias
        or config.trainable_token_indices
        or config.init_lora_weights
        in (
            "pissa",
            "olora",
        )
    ):
        # These become whole biases, embeddings and bases.
        old, new = (
            {k: v for k, v in each.items() if ".lora_" in k and not k.endswith("B.bias")}
            for each in (old, new)
        )
    np.testing.assert_equal(new, old)


def test_settings_are_the_same(trained, config, tmp_path):
    write_again(trained, "torch", tmp_path)
    old, new = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (trained.folder, tmp_path)
    )
    assert old.keys() == new.keys()
    assert {key for key in old if old[key] != new[key]} <= RESTATED
    modules = support.modules_of(support.model(trained.name))
    if new["target_modules"]:
        got, want = (lora_jax.peft.match_modules(each, modules) for each in (new, old))
        assert got == want
