"""The Llama of docs/examples/smollm.py is transformers', and PEFT loads its adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests import test_smollm
from tests.qlora.support import dequantized, train
from tests.quant.support import gguf_tensor
from tests.test_smollm import CONFIG, HIDDEN, LAYERS, VOCABULARY, WIDTH, smollm_model

support = pytest.importorskip("tests.live.support")

pytestmark = [pytest.mark.live, *support.FILTERS]
IDS = np.array(support.IDS, np.int32)


def model(params, tokens):
    features, _ = smollm_model.apply(params, tokens, CONFIG)
    return features @ params["embed"].T


def llama(params):
    """The model of transformers with the same weights."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=CONFIG.heads,
        num_key_value_heads=CONFIG.key_heads,
        rms_norm_eps=CONFIG.epsilon,
        rope_parameters={"rope_theta": CONFIG.rope_base, "rope_type": "default"},
        tie_word_embeddings=True,
    )
    params = dequantized(params)
    names = {own: name for own, (_, name) in smollm_model.PROJECTIONS.items()}
    names |= {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    state = {"model.embed_tokens.weight": params["embed"]}
    state |= {"model.norm.weight": params["norm"], "lm_head.weight": params["embed"]}
    for own, value in params["layers"].items():
        for i in range(LAYERS):
            state[f"model.layers.{i}.{names[own]}.weight"] = value[i]
    module = transformers.LlamaForCausalLM(config).eval()
    module.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
    return module


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_logits_are_those_of_transformers_and_of_peft(method, tmp_path):
    import peft

    params = test_smollm.make_params(
        lambda shape, seed: gguf_tensor("Q4_1", *shape, seed=seed)
    )
    module = llama(params)
    support.assert_same(
        lora_jax.accept_quantized(model)(params, IDS), support.logits(module)
    )

    targets = tuple(f"layers/{name}" for name in smollm_model.PROJECTIONS)
    config = lora_jax.LoraConfig(rank=3, targets=targets, use_dora=method == "dora")
    plan = lora_jax.plan_adapters(config, params, model, IDS)
    adapters = train(params, plan)
    got = jax.jit(lora_jax.adapt(model, plan))(params, adapters, jnp.asarray(IDS))
    test_smollm.smollm.save(tmp_path, adapters, plan)
    loaded = peft.PeftModel.from_pretrained(module, tmp_path / "peft").eval()
    want = support.logits(loaded)
    assert np.abs(want - support.logits(llama(params))).max() > 0.1
    support.assert_same(got, want)
