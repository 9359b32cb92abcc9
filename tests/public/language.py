"""Models of language: Tunix, DeepMind's Gemma, Levanter, KerasHub, transformers, Penzai."""

import functools
import importlib

import jax
import jax.numpy as jnp

from tests.public.building import (
    of_equinox,
    of_keras,
    of_linen,
    of_nnx,
    public,
)
from tests.public.checks import Model, drawn, normal, tokens

# Softmax, rotary embeddings or norms are float32 in these.
IN_FLOAT32 = {"dtype": "float32", "ulps": 2**12}
WIDTHS = {"hidden_dim": 16, "intermediate_dim": 20}

# Tunix

OF_TUNIX = {"num_layers": 2, "embed_dim": 12, "hidden_dim": 20}
OF_TUNIX |= {"num_heads": 4, "head_dim": 4, "num_kv_heads": 2}
OF_QWEN = {**OF_TUNIX, "vocab_size": 11, "rope_theta": 10_000, "norm_eps": 1e-6}
OF_GEMMA = {**OF_TUNIX, "num_embed": 11, "sliding_window_size": 3}
LOOK_UP = ("embedder/input_embedding/value",)  # where the head is a weight of its own
TUNIX = {
    "tunix_llama3": ("Llama3", OF_QWEN, LOOK_UP),
    "tunix_qwen2": ("Qwen2", OF_QWEN, LOOK_UP),
    "tunix_qwen3_experts": (
        "Qwen3",
        {**OF_QWEN, "num_experts": 4, "num_experts_per_tok": 2},
        LOOK_UP,
    ),
    "tunix_gemma3": ("Gemma3", {**OF_GEMMA, "param_dtype": jnp.float32}, ()),
    "tunix_gemma4": (
        "Gemma4",
        {**OF_GEMMA, "global_key_size": 4, "per_layer_input_dim": 3},
        ("embedder/per_layer_input_embedding/value",),
    ),
    "tunix_gemma4_experts": (
        "Gemma4",
        {
            **OF_GEMMA,
            "global_key_size": 4,
            "enable_moe": True,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "expert_dim": 6,
            "moe_dense_hidden_dim": 8,
        },
        (),
    ),
}


def module_of_tunix(name, fields):
    """What makes a model of Tunix, and what calls it."""
    module = importlib.import_module(f"tunix.models.{name.lower()}.model")
    if name == "Gemma4":
        types = module.AttentionType
        fields = {**fields, "attention_pattern": (types.LOCAL_SLIDING, types.GLOBAL)}
    config = module.ModelConfig(**fields)

    def make(rngs):
        return getattr(module, name)(config, rngs=rngs)

    def call(model, ids):
        length = ids.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
        mask = jnp.broadcast_to(jnp.tri(length, dtype=bool), (*ids.shape, length))
        return model(ids, positions, None, mask)[0]

    return make, call


def of_tunix(name, fields, left_out):
    make, call = module_of_tunix(name, fields)
    return of_nnx(make, tokens(2, 5), call=call, left_out=left_out, **IN_FLOAT32)


for name, row in TUNIX.items():
    public("tunix", name)(functools.partial(of_tunix, *row))

# DeepMind's Gemma

NORMS = {"use_post_attn_norm": True, "use_post_ffw_norm": True}
GEMMA = {
    "gemma_2": {**NORMS, "final_logit_softcap": 30.0, "attn_logits_soft_cap": 50.0},
    "gemma_3": {
        **NORMS,
        "final_logit_softcap": None,
        "use_qk_norm": True,
        "transpose_gating_einsum": True,
    },
}


def module_of_gemma(**fields):
    from gemma import gm

    types = gm.nn.AttentionType
    kinds = (types.LOCAL_SLIDING, types.GLOBAL)
    sizes = {k: v for k, v in OF_GEMMA.items() if k != "num_layers"}
    config = gm.nn.config.TransformerConfig(attention_types=kinds, **sizes, **fields)
    return gm.nn.Transformer(config=config, dtype=jnp.float32, tokens="tokens")


def of_gemma(**fields):
    model = module_of_gemma(**fields)
    return of_linen(model, tokens(2, 5), output=lambda out: out.logits, **IN_FLOAT32)


for name, fields in GEMMA.items():
    public("gemma", name)(functools.partial(of_gemma, **fields))

# Levanter, on Haliax

OF_LEVANTER = {"max_seq_len": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 16}
GROUPED = {"intermediate_dim": 20, "num_kv_heads": 2}
NORM_WEIGHTS = ("transformer/*norm*/weight/0",)
LEVANTER = {
    "levanter_llama": ("llama", "Llama", GROUPED, (*NORM_WEIGHTS, "embeddings/*")),
    "levanter_gpt2": (
        "gpt2",
        "Gpt2",
        {},
        ("embeddings/position_embeddings/*", "*/bias/0", "*/ln_?/weight/0"),
    ),
    "levanter_gemma2": ("gemma", "Gemma2", {**GROUPED, "head_dim": 4}, NORM_WEIGHTS),
    "levanter_olmo2": ("olmo", "Olmo2", GROUPED, (*NORM_WEIGHTS, "embeddings/*")),
}


def of_levanter(module, name, fields, left_out):
    import haliax as hax

    module = importlib.import_module(f"levanter.models.{module}")
    masks = importlib.import_module("levanter.layers.attention")
    config = getattr(module, f"{name}Config")(**OF_LEVANTER, **fields)
    vocabulary = hax.Axis("vocab", 11)

    def make(key):
        return config.model_type.init(vocabulary, config, key=key)

    def call(model, ids):
        position = config.max_Pos.resize(ids.shape[1])
        ids = hax.named(ids, (hax.Axis("batch", len(ids)), position))
        return jax.tree.leaves(model(ids, attn_mask=masks.AttentionMask.causal()))

    return of_equinox(make, tokens(2, 5), call=call, left_out=left_out, **IN_FLOAT32)


for name, row in LEVANTER.items():
    public("levanter", name)(functools.partial(of_levanter, *row))

# KerasHub

OF_KERAS_HUB = {"vocabulary_size": 11, "num_layers": 2}
QUERIES = {"num_query_heads": 4, "num_key_value_heads": 2}
SEQUENCE = {"max_sequence_length": 8}
TABLES = ("token_embedding/embeddings",)
HEAD = ("token_embedding/reverse_embeddings",)  # a backbone does not use it
KERAS_HUB = {
    "Gemma": ({**WIDTHS, **QUERIES, "head_dim": 4}, TABLES),
    "Falcon": ({**WIDTHS, "num_attention_heads": 4}, (*TABLES, "*/bias")),
    "Bloom": ({**WIDTHS, "num_heads": 4, **SEQUENCE}, (*TABLES, "*/bias")),
    "Qwen3Moe": (
        {
            **WIDTHS,
            **QUERIES,
            "head_dim": 4,
            "moe_intermediate_dim": 6,
            "num_experts": 4,
            "top_k": 2,
            "norm_top_k_prob": True,
            "decoder_sparse_step": 1,
        },
        (*TABLES, *HEAD),
    ),
    "GptOss": (
        {
            **QUERIES,
            "hidden_dim": 16,
            "intermediate_dim": 8,
            "head_dim": 4,
            "num_experts": 4,
            "top_k": 2,
            "sliding_window": 3,
        },
        (*TABLES, *HEAD, "*/bias", "*_bias"),
    ),
    "RWKV7": (
        {
            "hidden_size": 12,
            "head_size": 4,
            "intermediate_dim": 20,
            "gate_lora": 3,
            "mv_lora": 3,
            "aaa_lora": 3,
            "decay_lora": 3,
        },
        (*TABLES, "*/r_k"),
    ),
    "FNet": ({**WIDTHS, **SEQUENCE}, ("*_embedding/embeddings",)),
    "DebertaV3": (
        {**WIDTHS, "num_heads": 4, **SEQUENCE, "bucket_size": 4},
        (*TABLES, "*/bias", "rel_embedding/rel_embedding"),
    ),
    "Albert": (
        {**WIDTHS, "num_heads": 4, "embedding_dim": 6, **SEQUENCE},
        ("*_embedding/embeddings", "*/bias"),
    ),
    "XLNet": ({**WIDTHS, "num_heads": 4}, ("*/word_embedding/embeddings", "*_bias")),
    "T5": ({**WIDTHS, "num_heads": 4}, (*TABLES, "self_attention/embeddings/*")),
}


def of_keras_hub(name, fields, left_out):
    import keras_hub

    model = getattr(keras_hub.models, f"{name}Backbone")(**OF_KERAS_HUB, **fields)
    mask = jnp.ones((2, 5), "int32").at[1, 3:].set(0)
    inputs = {"segment_ids": tokens(2, 5, below=2)}
    for prefix in ("", "encoder_", "decoder_"):
        inputs |= {f"{prefix}token_ids": tokens(2, 5), f"{prefix}padding_mask": mask}
    inputs = {name: inputs[name] for name in model.input}
    return of_keras(model, inputs, left_out=left_out, **IN_FLOAT32)


for name, row in KERAS_HUB.items():
    build = functools.partial(of_keras_hub, name, *row)
    public("keras_hub", f"keras_hub_{name.lower()}")(build)

# Hugging Face's Flax models, beside those of tests/frameworks

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"hidden_size": 8, "intermediate_size": 12}
IMAGE = {"image_size": 8, "patch_size": 4}
BOTH = ("encoder", "decoder")
WHISPER = {
    "vocab_size": 11,
    "d_model": 8,
    "num_mel_bins": 4,
    "max_source_positions": 6,
    "max_target_positions": 8,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    **{f"{side}_layers": 1 for side in BOTH},
    **{f"{side}_attention_heads": 2 for side in BOTH},
    **{f"{side}_ffn_dim": 12 for side in BOTH},
}
GPTJ = {"n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2, "rotary_dim": 2}
WAV2VEC2 = {
    "vocab_size": 11,
    "conv_dim": (6, 6),
    "conv_stride": (3, 2),
    "conv_kernel": (5, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    **SMALL,
}
BIG_BIRD = {
    "vocab_size": 11,
    "block_size": 4,
    "num_random_blocks": 1,
    "max_position_embeddings": 64,
    "attention_type": "block_sparse",
    **SMALL,
}


def of_transformers(name, config, *args, left_out=()):
    import transformers

    config = getattr(
        transformers, f"{name.partition('For')[0].removesuffix('Model')}Config"
    )(**config)
    model = getattr(transformers, f"Flax{name}")(config, dtype="float64", _do_init=False)

    def fn(params, *args):
        leaves = jax.tree.leaves(dict(model(*args, params=params)))
        return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    return Model(fn, drawn(model.params_shape_tree), args, left_out=left_out)


@public("transformers")
def transformers_whisper():
    args = normal(2, 4, 12), tokens(2, 5)
    left_out = "*/embed_positions/*", "*/conv?/kernel"
    name = "WhisperForConditionalGeneration"
    return of_transformers(name, WHISPER, *args, left_out=left_out)


@public("transformers")
def transformers_wav2vec2():
    left_out = "*/conv/kernel", "*/conv/weight_v"
    return of_transformers("Wav2Vec2ForCTC", WAV2VEC2, normal(2, 64), left_out=left_out)


@public("transformers")
def transformers_big_bird():
    left_out = "*/position_embeddings/*", "*/token_type_embeddings/*"
    args = (tokens(2, 64),)
    return of_transformers("BigBirdForMaskedLM", BIG_BIRD, *args, left_out=left_out)


@public("transformers")
def transformers_gptj():
    config = {"vocab_size": 11, **GPTJ}
    left_out = ("transformer/wte/embedding",)
    return of_transformers("GPTJForCausalLM", config, tokens(2, 5), left_out=left_out)


@public("transformers")
def transformers_clip():
    config = {
        "text_config": {"vocab_size": 11, "max_position_embeddings": 8, **SMALL},
        "vision_config": {**IMAGE, **SMALL},
        "projection_dim": 6,
    }
    args = tokens(2, 5), normal(2, 3, 8, 8)
    left_out = "*_embedding/embedding", "*/patch_embedding/kernel"
    return of_transformers("CLIPModel", config, *args, left_out=left_out)


@public("transformers")
def transformers_beit():
    config = {**SMALL, **IMAGE, "use_relative_position_bias": True, "num_labels": 3}
    left_out = "*/projection/kernel", "*/relative_position_bias_table"
    args = (normal(2, 3, 8, 8),)
    return of_transformers("BeitForImageClassification", config, *args, left_out=left_out)


# Penzai, whose params are the values of a model's variables

OF_PENZAI = {
    "num_kv_heads": 2,
    "query_head_multiplier": 2,
    "embedding_dim": 12,
    "projection_dim": 4,
    "mlp_hidden_dim": 20,
    "num_decoder_blocks": 2,
    "vocab_size": 11,
}
EMBEDDER = "transformer/embedder.embeddings/*"


def of_penzai(build, config, **fields):
    from penzai import pz

    model = build(config, init_base_rng=jax.random.key(0))
    unbound, frozen = pz.unbind_variables(model, freeze=True)
    params = drawn({str(variable.label): variable for variable in frozen})

    def fn(params, ids):
        run = pz.bind_variables(unbound, list(params.values()), unfreeze_as_copy=True)
        positions = pz.nx.wrap(jnp.arange(ids.shape[1]), "seq")
        logits = run(pz.nx.wrap(ids, "batch", "seq"), token_positions=positions)
        return logits.unwrap("batch", "seq", "vocabulary")

    return Model(fn, params, (tokens(2, 5),), **fields)


@public("penzai")
def penzai_gemma2():
    from penzai.models.transformer.variants import llamalike_common as common

    window, everything = (
        common.AttentionTypeSlidingWindowCausal(3),
        common.AttentionTypeGlobalCausal(),
    )
    config = common.LlamalikeTransformerConfig(
        **OF_PENZAI,
        mlp_variant="geglu_approx",
        tie_embedder_and_logits=True,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        final_logit_softcap=30.0,
        attn_logits_soft_cap=50.0,
        attention_type=(window, everything),
    )
    return of_penzai(common.build_llamalike_transformer, config)


@public("penzai")
def penzai_mistral_in_a_layer_stack():
    from penzai.models.transformer.variants import llamalike_common as common

    config = common.LlamalikeTransformerConfig(
        **OF_PENZAI,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
        use_layer_stack=True,
        attention_type=common.AttentionTypeSlidingWindowCausal(3),
    )
    left_out = EMBEDDER, "*_norm/scale*"
    return of_penzai(common.build_llamalike_transformer, config, left_out=left_out)


@public("penzai")
def penzai_gpt_neox():
    from penzai.models.transformer.variants import gpt_neox

    config = gpt_neox.GPTNeoXTransformerConfig(
        num_attention_heads=2,
        embedding_dim=12,
        projection_dim=6,
        mlp_hidden_dim=20,
        num_decoder_blocks=2,
        vocab_size=11,
        activation_fn="gelu_exact",
        rope_subset_size=4,
        rope_wavelength=10_000,
        layernorm_epsilon=1e-5,
        parameter_dtype=jnp.float64,
        activation_dtype=jnp.float64,
    )
    left_out = EMBEDDER, "*/AddBias.bias/*"
    return of_penzai(gpt_neox.build_gpt_neox_transformer, config, left_out=left_out)


# Others


@public("mamba2_jax")
def mamba2():
    import mamba2_jax

    config = mamba2_jax.Mamba2Config(
        vocab_size=11,
        hidden_size=8,
        state_size=5,
        head_dim=4,
        chunk_size=4,
        num_hidden_layers=2,
    )
    return of_nnx(
        lambda rngs: mamba2_jax.Mamba2ForCausalLM(config, rngs=rngs),
        tokens(2, 6),
        call=lambda model, ids: model(ids)["logits"],
        left_out=("*/conv1d/*",),
        **IN_FLOAT32,
    )


@public("nanodl")
def nanodl_t5():
    import nanodl

    model = nanodl.T5(
        num_layers=2,
        hidden_dim=12,
        embed_dim=12,
        num_heads=3,
        feedforward_dim=20,
        dropout=0.0,
        vocab_size=11,
        max_length=6,
        start_token=0,
        end_token=1,
    )
    return of_linen(model, tokens(2, 6), tokens(2, 5), left_out=("*/embedding",))
