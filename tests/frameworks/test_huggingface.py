"""The Flax models of Hugging Face's transformers, as they ship."""

import jax.numpy as jnp
import pytest

from tests.frameworks import checks

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.huggingface

SMALL = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = jnp.arange(10).reshape(2, 5)


def made(architecture, config, inputs):
    model = architecture(config, dtype="float64", _do_init=False)
    params = checks.drawn(model.params_shape_tree)
    return checks.Model(
        lambda params, inputs: model(inputs, params=params).logits, params, (inputs,)
    )


@pytest.fixture(scope="module")
def gpt2():
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=12, n_layer=2, n_head=3
    )
    return made(transformers.FlaxGPT2LMHeadModel, config, TOKENS)


@pytest.fixture(scope="module")
def bert():
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=12, max_position_embeddings=8, **SMALL
    )
    return made(transformers.FlaxBertForMaskedLM, config, TOKENS)


def of_layers(prefix, *names, axes):
    return {f"{prefix}/{i}/{name}/kernel": axes for i in range(2) for name in names}


def test_gpt2_has_its_kernels_the_other_way_round(gpt2):
    names = "attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"
    axes = {
        **of_layers("transformer/h", *names, axes="oi"),
        "transformer/wte/embedding": "io",
    }
    checks.check_training(gpt2, axes)


def test_dora_on_chosen_weights_of_gpt2(gpt2):
    checks.check_dora(gpt2, ("*/c_attn/kernel", "*/wpe/embedding"))


def test_llama():
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        num_key_value_heads=2,
        max_position_embeddings=8,
        **SMALL,
    )
    model = made(transformers.FlaxLlamaForCausalLM, config, TOKENS)
    names = [f"self_attn/{name}_proj" for name in "qkvo"]
    names += [f"mlp/{name}_proj" for name in ("gate", "up", "down")]
    axes = {
        **of_layers("model/layers", *names, axes="io"),
        "lm_head/kernel": "io",
    }
    checks.check_training(model, axes)


def test_bert_has_its_embedding_as_its_head(bert):
    names = [f"attention/self/{name}" for name in ("query", "key", "value")]
    names += ["attention/output/dense", "intermediate/dense", "output/dense"]
    axes = {
        **of_layers("bert/encoder/layer", *names, axes="io"),
        "bert/embeddings/word_embeddings/embedding": "io",
        "cls/predictions/transform/dense/kernel": "io",
    }
    checks.check_training(bert, axes)


def test_every_embedding_of_bert(bert):
    names = ("position", "token_type", "word")
    paths = [f"bert/embeddings/{name}_embeddings/embedding" for name in names]
    axes = dict.fromkeys(paths, "io")
    checks.check_training(bert, axes, "*_embeddings/embedding")


def test_vit_with_its_patches():
    config = transformers.ViTConfig(
        hidden_size=12, image_size=6, patch_size=3, num_labels=3, **SMALL
    )
    images = checks.normal(2, 3, 6, 6)
    model = made(transformers.FlaxViTForImageClassification, config, images)
    names = [f"attention/attention/{name}" for name in ("query", "key", "value")]
    names += ["attention/output/dense", "intermediate/dense", "output/dense"]
    axes = {
        **of_layers("vit/encoder/layer", *names, axes="io"),
        "vit/embeddings/patch_embeddings/projection/kernel": "iiio",
        "classifier/kernel": "io",
    }
    checks.check_training(model, axes, "*/kernel")
