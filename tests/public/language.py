"""Models of language."""

import dataclasses

import jax
import jax.numpy as jnp

from tests.public.building import of_haiku, of_linen, of_nnx, public
from tests.public.checks import Model, drawn, normal, tokens

LLAMA = {
    "num_kv_heads": 2, "query_head_multiplier": 2, "embedding_dim": 12, "projection_dim": 4,
    "mlp_hidden_dim": 20, "num_decoder_blocks": 2, "vocab_size": 11,
}


EMBEDDER = "transformer/embedder.embeddings/*"


def of_penzai(build, config, **fields):
    """A model whose params are the values of its variables, by label."""
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
def penzai_llama():
    from penzai.models.transformer.variants import llamalike_common as common

    config = common.LlamalikeTransformerConfig(**LLAMA, mlp_variant="swiglu", tie_embedder_and_logits=False)
    return of_penzai(common.build_llamalike_transformer, config, left_out=(EMBEDDER,))


@public("penzai")
def penzai_gemma2():
    from penzai.models.transformer.variants import llamalike_common as common

    config = common.LlamalikeTransformerConfig(
        **LLAMA, mlp_variant="geglu_approx", tie_embedder_and_logits=True, 
        use_post_attn_norm=True, use_post_ffw_norm=True, final_logit_softcap=30.0, attn_logits_soft_cap=50.0,
        attention_type=(common.AttentionTypeSlidingWindowCausal(3), common.AttentionTypeGlobalCausal()),
    )
    return of_penzai(common.build_llamalike_transformer, config)


@public("penzai")
def penzai_mistral_in_a_layer_stack():
    from penzai.models.transformer.variants import llamalike_common as common

    config = common.LlamalikeTransformerConfig(
        **LLAMA, mlp_variant="swiglu", tie_embedder_and_logits=False, use_layer_stack=True,
        attention_type=common.AttentionTypeSlidingWindowCausal(3),
    )
    return of_penzai(
        common.build_llamalike_transformer, config, left_out=(EMBEDDER, "*_norm/scale*")
    )


@public("penzai")
def penzai_gpt_neox():
    from penzai.models.transformer.variants import gpt_neox

    config = gpt_neox.GPTNeoXTransformerConfig(
        num_attention_heads=2, embedding_dim=12, projection_dim=6, mlp_hidden_dim=20, num_decoder_blocks=2,
        vocab_size=11, activation_fn="gelu_exact", rope_subset_size=4, rope_wavelength=10_000,
        layernorm_epsilon=1e-5, parameter_dtype=jnp.float64, activation_dtype=jnp.float64,
    )
    return of_penzai(gpt_neox.build_gpt_neox_transformer, config, left_out=(EMBEDDER, "*/AddBias.bias/*"))


@public("mamba2_jax", "flax")
def mamba2():
    import mamba2_jax

    config = mamba2_jax.Mamba2Config(
        vocab_size=11, hidden_size=8, state_size=5, head_dim=4, chunk_size=4, num_hidden_layers=2,
    )
    return of_nnx(lambda rngs: mamba2_jax.Mamba2ForCausalLM(config, rngs=rngs), tokens(2, 6), call=lambda m, x: m(x)["logits"], left_out=("*/conv1d/*",), dtype="float32", ulps=2**12)


def nanodl_text(name, **fields):
    import nanodl

    return {
        "num_layers": 2, "embed_dim": 12, "feedforward_dim": 20, "num_heads": 3, "vocab_size": 11, "dropout": 0.0,
        "max_length": 6, "start_token": 0, "end_token": 1, **fields,
    }


@public("nanodl")
def nanodl_t5():
    import nanodl
    return of_linen(nanodl.T5(num_layers=2, hidden_dim=12, num_heads=3, feedforward_dim=20, dropout=0.0, vocab_size=11, embed_dim=12, max_length=6, start_token=0, end_token=1), tokens(2, 6), tokens(2, 5), left_out=("*/embedding",))


@public("long_range_models")
def s4():
    import long_range_models as models

    layer = models.S4Module(6, 2, lambda dim: models.S5Layer(dim, 4))
    return of_linen(models.SequenceModel(layer, 11), tokens(2, 8), left_out=("*_comps",))


@public("long_range_models")
def s5():
    import long_range_models as models

    return of_linen(models.SequenceModel(models.S5Layer(6, 4), 11, 6), tokens(2, 8), left_out=("*_comps",))


@public("long_range_models")
def linear_recurrent_unit():
    import long_range_models as models

    return of_linen(models.SequenceModel(models.LRULayer(6, 4), 11, 6), tokens(2, 8), left_out=("*_re", "*_im"))
