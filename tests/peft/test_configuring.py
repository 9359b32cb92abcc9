"""A config of PEFT means the same weights here."""

import jax
import pytest

from lora_jax import peft, plan_adapters


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
    assert got == {
        "layers_0/self_attn/q_proj/kernel": (4, 4.0, "dora"),
        "layers_0/self_attn/v_proj/kernel": (4, 1.5, "dora"),
        "layers_1/self_attn/q_proj/kernel": (2, 8.0, "dora"),
        "layers_1/self_attn/v_proj/kernel": (4, 1.5, "dora"),
    }
    assert plan.config.dropout == 0.1


def test_layers_and_exclusions():
    plan = planned(
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[1],
        exclude_modules=["v_proj"],
        prefix="model.",
    )
    assert list(plan.targets) == ["layers_1/self_attn/q_proj/kernel"]


def test_all_linear_leaves_out_embedding_and_head():
    plan = planned(target_modules="all-linear", use_rslora=True, r=4, lora_alpha=4)
    assert len(plan.targets) == 4
    assert {t.scale for t in plan.targets.values()} == {2.0}


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
        ({"target_modules": ["q_proj"], "init_lora_weights": False}, "no initializer"),
        ({"target_modules": ["q_proj"], "lora_alpha": 0}, "alpha must not be 0"),
    ],
)
def test_what_has_no_meaning_here_is_an_error(config, match):
    with pytest.raises(ValueError, match=match):
        peft.to_lora_config(config, tree())


def test_a_layer_of_a_stack_has_no_rank_of_its_own():
    stack = jax.ShapeDtypeStruct((2, 12, 16), "float32")
    params = {"layers": {"q_proj": {"kernel": stack}}}
    config = {"target_modules": ["q_proj"], "rank_pattern": {r"layers\.1\.q_proj": 2}}
    with pytest.raises(ValueError, match="layers are stacked"):
        peft.to_lora_config(config, params)


def test_stacked_norms_are_no_matrices():
    shapes = {"norm": "scale", "ln_1": "weight", "up": "kernel"}
    params = {
        name: {leaf: jax.ShapeDtypeStruct((2, 48), "float32")}
        for name, leaf in shapes.items()
    }
    config = peft.to_lora_config({"target_modules": "all-linear"}, {"blocks": params})
    assert config.targets == ("blocks/up/kernel",)
