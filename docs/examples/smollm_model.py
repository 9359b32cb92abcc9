"""A Llama model in plain JAX, with the weights of a GGUF file.

The weights stay as the file has them, quantized or not: `lora_jax` dequantizes them where
they are used. SmolLM2-135M is such a model; others with tied embeddings load too.

Shapes: `batch` texts of `length` tokens; `width` features; `heads` of `size` features.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import quant

Params = dict[str, Any]
Cache = dict[str, jax.Array]
PROJECTIONS = {  # names here, in GGUF files, and in Hugging Face's model
    "query": ("attn_q", "self_attn.q_proj"),
    "key": ("attn_k", "self_attn.k_proj"),
    "value": ("attn_v", "self_attn.v_proj"),
    "output": ("attn_output", "self_attn.o_proj"),
    "gate": ("ffn_gate", "mlp.gate_proj"),
    "up": ("ffn_up", "mlp.up_proj"),
    "down": ("ffn_down", "mlp.down_proj"),
}
NORMS = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"}


class Config(NamedTuple):
    """The numbers of a model that the shapes of its weights do not show."""

    heads: int
    key_heads: int
    rope_base: float
    epsilon: float


def load(file: pathlib.Path, dense: str = "") -> tuple[Params, Config, dict[str, Any]]:
    """Loads a model: its params, its numbers, and the metadata of the file.

    Args:
        file: a GGUF file.
        dense: a pattern of tensors to dequantize.

    Raises:
        ValueError: if the file is damaged, or has another kind of model.
    """
    metadata = quant.load_gguf_metadata(file)
    if (kind := metadata.get("general.architecture")) != "llama":
        raise ValueError(
            f"{file} has the architecture {kind!r}, and this model is 'llama'."
        )
    try:
        config = Config(
            heads=metadata["llama.attention.head_count"],
            key_heads=metadata["llama.attention.head_count_kv"],
            rope_base=metadata["llama.rope.freq_base"],
            epsilon=metadata["llama.attention.layer_norm_rms_epsilon"],
        )
        heads = {"*attn_q.weight": config.heads, "*attn_k.weight": config.key_heads}
        stored = quant.load_gguf(file, stack=True, rope_heads=heads, dense=dense or ())
        names = NORMS | {own: name for own, (name, _) in PROJECTIONS.items()}
        params = {
            "embed": stored.pop("token_embd.weight"),
            "layers": {own: stored.pop(f"blk.{n}.weight") for own, n in names.items()},
            "norm": stored.pop("output_norm.weight"),
        }
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}, which this model has.") from None
    if stored:
        raise ValueError(f"{file} has {', '.join(stored)}, which this model lacks.")
    return params, config, metadata


def apply(
    params: Params,
    tokens: jax.Array,
    config: Config,
    cache: Cache | None = None,
    start: Any = 0,
) -> tuple[jax.Array, Cache | None]:
    """Runs the layers.

    Args:
        params: of `load`.
        tokens: `(batch, length)`, int32. Padding at the end changes nothing before it.
        config: of `load`.
        cache: keys and values of earlier tokens, `(layers, batch, most, heads, size)`.
        start: how many tokens are in the cache.

    Returns:
        The features `(batch, length, width)`, and the cache with these tokens.
    """
    positions = start + jnp.arange(tokens.shape[1])
    split = config.heads, config.key_heads, config.key_heads

    def layer(x: jax.Array, scanned: tuple[Params, Cache | None]) -> tuple[jax.Array, Any]:
        own, cached = scanned
        normed = rms_norm(x, own["attention_norm"], config.epsilon)
        query, key, value = (
            (normed @ own[name].T).reshape(*x.shape[:2], heads, -1)
            for name, heads in zip(("query", "key", "value"), split, strict=True)
        )
        query = rope(query, positions, config)
        new = {"key": rope(key, positions, config), "value": value}
        if cached is not None:
            put = jax.lax.dynamic_update_slice
            new = {name: put(cached[name], new[name], (0, start, 0, 0)) for name in new}
        mixed = attend(query, new["key"], new["value"], positions)
        x = x + mixed @ own["output"].T
        normed = rms_norm(x, own["mlp_norm"], config.epsilon)
        hidden = jax.nn.silu(normed @ own["gate"].T) * (normed @ own["up"].T)
        return x + hidden @ own["down"].T, None if cached is None else new

    x, cache = jax.lax.scan(layer, params["embed"][tokens], (params["layers"], cache))
    return rms_norm(x, params["norm"], config.epsilon), cache


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Divides by the root mean square of the last axis, then scales it."""
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + epsilon) * scale[None, None, :]


def rope(x: jax.Array, positions: jax.Array, config: Config) -> jax.Array:
    """Turns each pair of a feature and the one half a head later by its angle."""
    half = x.shape[-1] // 2
    rates = config.rope_base ** (-np.arange(half) / half)
    angles = jnp.outer(positions.astype(x.dtype), jnp.asarray(rates, x.dtype))[
        None, :, None
    ]
    cos, sin, first, second = jnp.cos(angles), jnp.sin(angles), x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array
) -> jax.Array:
    """Mixes values; each key head serves a group of query heads."""
    batch, length, _, size = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, size)
    scores = jnp.einsum("blhgd,bmhd->bhglm", grouped, key) * size**-0.5
    hidden = jnp.arange(key.shape[1])[None, :] > positions[:, None]
    scores = jnp.where(hidden[None, None, None], -jnp.inf, scores)
    mixed = jnp.einsum("bhglm,bmhd->blhgd", jax.nn.softmax(scores), value)
    return mixed.reshape(batch, length, -1)
