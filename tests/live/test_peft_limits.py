"""Where PEFT and this library part, and what each of them refuses."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax.peft
from lora_jax import CheckpointError
from lora_jax._core import equivalents
from tests.support import assert_close

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
support = pytest.importorskip("tests.live.support")

pytestmark = [pytest.mark.live, *support.FILTERS]


def params_of(name):
    return support.params_of(support.model(name))


def load(folder, params, **arguments):
    return lora_jax.peft.load(folder, params, layout="torch", **arguments)


def merged_logits(name, folder, params=None, into=None):
    params = params_of(name) if params is None else params
    merged = support.merged(params, load(folder, params))
    return support.logits(support.with_params(into or name, merged))


def test_peft_applies_the_update_of_an_output_projection_twice(tmp_path):
    trained = support.train("toy", tmp_path, target_modules=["attn"])
    params = params_of("toy")
    merged = support.merged(params, load(tmp_path, params))
    path = "attn.out_proj.weight"
    twice = merged | {path: 2 * merged[path] - params[path]}
    support.assert_same(support.logits(support.with_params("toy", twice)), trained.logits)
    assert np.abs(merged[path] - params[path]).max() > 0.1


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"rank_pattern": {"1.self_attn.v_proj": 3}}]
)
def test_converted_adapters(init, fields, tmp_path):
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=init,
        **fields,
    )
    with support.quiet():
        adapted = peft.get_peft_model(support.model("llama"), config).eval()
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(tmp_path / "start")
        adapted.peft_config["default"].init_lora_weights = init
        support.disturb(adapted, 5, trainable=True)
        want = support.logits(adapted)
        adapted.save_pretrained(
            tmp_path, path_initial_model_for_weight_conversion=tmp_path / "start"
        )
    support.assert_same(merged_logits("llama", tmp_path), want)


def test_randomized_initializations_are_refused(tmp_path):
    fields = {"target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_2"}
    support.train("llama", tmp_path, **fields)
    with pytest.raises(CheckpointError, match="cannot be repeated here"):
        load(tmp_path, params_of("llama"))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"alora_invocation_tokens": [3, 1], "task_type": "CAUSAL_LM"}, "alora_invocation"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"lora_bias": True}, "add a bias of zeros"),
    ],
)
def test_settings_that_are_refused(fields, match, tmp_path):
    support.train("llama", tmp_path, target_modules=["q_proj"], **fields)
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path, params_of("llama"))


def test_shared_adapters_of_tied_weights_are_refused(tmp_path):
    fields = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    support.train("llama_tied", tmp_path, **fields)
    with pytest.raises(CheckpointError, match="ensure_weight_tying"):
        load(tmp_path, params_of("llama_tied"))


def test_other_methods_are_refused(tmp_path):
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    peft.get_peft_model(support.model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="peft_type must be 'LORA'"):
        load(tmp_path, params_of("llama"))


def test_groups_of_a_convolution_are_refused(tmp_path):
    class Grouped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 6, 3, groups=2)

    model = Grouped()
    params = support.params_of(model)
    config = peft.LoraConfig(r=2, target_modules=["conv"])
    with support.quiet():
        peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="factors of 'conv' do not fit"):
        load(tmp_path, params)


@pytest.mark.parametrize(
    ("tied", "untied", "targets"),
    [
        ("llama_tied", "llama_untied", ["embed_tokens", "up_proj"]),
        ("gpt2", "gpt2_untied", ["wte", "c_fc"]),
        ("gpt2", "gpt2_untied", ["wte", "lm_head"]),
    ],
)
def test_an_adapter_of_a_tied_table_unties_it(tied, untied, targets, tmp_path):
    # PEFT's head has the frozen table, or an adapter of its own.
    fields = {"target_modules": targets, "fan_in_fan_out": tied == "gpt2"}
    trained = support.train(tied, tmp_path, **fields)
    support.assert_same(merged_logits(tied, tmp_path, into=untied), trained.logits)


def test_an_adapter_of_a_tied_table_is_not_written(tmp_path):
    params = {"wte": {"embedding": jnp.ones((5, 3))}}

    def apply(params, ids):
        return params["wte"]["embedding"][ids] @ params["wte"]["embedding"].T

    config = lora_jax.LoraConfig(rank=2, targets="wte/*")
    plan = lora_jax.plan_adapters(config, params, apply, jnp.arange(4))
    adapters = {path: _empty(target) for path, target in plan.targets.items()}
    with pytest.raises(ValueError, match="such as a tied output head"):
        lora_jax.peft.save(tmp_path, adapters, plan)


def test_rows_of_a_tied_table_stay_tied(tmp_path):
    fields = {"target_modules": ["q_proj"], "trainable_token_indices": [2, 9]}
    trained = support.train("llama_tied", tmp_path, **fields)
    params = params_of("llama_tied")
    del params["lm_head.weight"]  # as in the files of the model, and in a tree
    merged = support.merged(params, load(tmp_path, params))
    merged["lm_head.weight"] = merged["model.embed_tokens.weight"]
    merged = support.with_params("llama_tied", merged)
    support.assert_same(support.logits(merged), trained.logits)


def test_larger_vocabularies(tmp_path):
    base = support.model("llama")
    with support.quiet():
        base.resize_token_embeddings(25)
        params = support.params_of(base)
        config = peft.LoraConfig(target_modules=["q_proj"])
        adapted = peft.get_peft_model(base, config).eval()
        support.disturb(adapted, 6, trainable=True)
        adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = load(tmp_path, params)
    heads = "lm_head.weight", "model.embed_tokens.weight"
    assert sorted(loaded.replaced) == sorted(heads)
    for path in heads:
        np.testing.assert_array_equal(loaded.replaced[path], params[path])
    with pytest.raises(CheckpointError, match="embed_tokens"):
        load(tmp_path, params_of("llama"))


def test_pickles_are_not_read(tmp_path):
    with support.quiet():
        config = peft.LoraConfig(target_modules=["q_proj"])
        adapted = peft.get_peft_model(support.model("llama"), config)
        adapted.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(CheckpointError, match="is a pickle"):
        load(tmp_path, params_of("llama"))


def test_bfloat16(tmp_path):
    base = support.model("llama").to(torch.bfloat16)
    params = {
        name: jnp.asarray(value.float().numpy(), jnp.bfloat16)
        for name, value in base.state_dict().items()
    }
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")
    with support.quiet():
        adapted = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
        support.disturb(adapted, 7, trainable=True)
        adapted.save_pretrained(tmp_path)
    loaded = load(tmp_path, params, dtype="file")
    assert {a.dtype for each in loaded.adapters.values() for a in each.values()} == {
        jnp.dtype("bfloat16")
    }
    merged = support.merged(params, loaded)
    want = adapted.merge_and_unload().state_dict()
    for path in loaded.adapters:
        # PEFT rounds the update first.
        assert_close(merged[path], want[path].float().numpy(), 1)


def test_a_module_that_peft_saves_whole_needs_its_bias(tmp_path):
    base = support.model("bert")
    params = support.as_jax(support.as_tree(params_of("bert"), support.leaves_of(base)))
    config = lora_jax.LoraConfig(rank=2, targets="*/query/kernel")
    plan = lora_jax.plan_adapters(config, params)
    adapters = support.random_like(
        {path: _empty(target) for path, target in plan.targets.items()}, seed=0
    )
    replaced = {"classifier/kernel": params["classifier"]["kernel"]}
    with pytest.raises(ValueError, match="give 'classifier/bias' too"):
        lora_jax.peft.save(tmp_path, adapters, plan, replaced=replaced)
    replaced["classifier/bias"] = params["classifier"]["bias"]
    lora_jax.peft.save(tmp_path, adapters, plan, replaced=replaced)
    support.from_files("bert", tmp_path)


def _empty(target):
    return {name: jnp.zeros(shape) for name, shape in target.adapter_shapes.items()}


def test_each_name_of_peft_is_an_error_that_says_what_to_write():
    ours = {*lora_jax.__all__, *lora_jax.peft.__all__}
    other = re.compile(r"[A-Z_]+|.*(Error|Warning)|find_kappa.*|shift_tok.*|bloom_.*")
    names = [n for n in peft.__all__ if n not in ours and not other.fullmatch(n)]
    fields = [field.name for field in dataclasses.fields(peft.LoraConfig)]
    assert not [n for n in names if not equivalents.describe(equivalents.NAMES, n)]
    assert not [n for n in fields if not equivalents.describe(equivalents.FIELDS, n)]
