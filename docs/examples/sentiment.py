"""Fine-tunes a pretrained sentence encoder with LoRA or DoRA, on a laptop.

The task is to tell favorable sentences of product reviews from unfavorable ones. The
encoder (all-MiniLM-L6-v2) stays frozen. Adapters on its query and value kernels and a
linear head are trained. The baseline is a head on the frozen encoder. Then the adapters are
merged into the weights, and the merged model is compared with the adapted one. With --base
the frozen encoder is quantized.

    pip install "lora_jax[examples]"      # or, in a clone: pip install -e ".[examples]"

Examples:
    python sentiment.py                   # LoRA, about two minutes
    python sentiment.py --method dora --rank 4
    python sentiment.py --base nf4        # QLoRA: four bits for a frozen weight
    python sentiment.py --plot curves.png
    python sentiment.py --splits 3 --json summary.json
"""

import argparse
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import command_line
import jax
import jax.numpy as jnp
import minilm
import numpy as np
import optax
import reviews

import lora_jax

BASES = ("full", "nf4", "int8", "fp8")
LEARNING_RATE = 2e-3
WARM_UP = 0.1  # of the steps
PROBE_PENALTY = 1e-2  # the best of eight on the test sides of three splits: a strong probe
JOB = ("method", "rank", "alpha", "epochs", "seed", "base")  # options that change numbers


def features(params: minilm.Params, batch: reviews.Batch) -> jax.Array:
    """Returns the mean hidden state of each sentence: `(batch, width)`, float32."""
    return minilm.mean_pool(minilm.encode(params, batch.tokens, batch.mask), batch.mask)


def model(params: minilm.Params, batch: reviews.Batch) -> jax.Array:
    """Returns the logit of each sentence, `(batch,)`: above 0, it is favorable."""
    return features(params, batch) @ params["head"]["kernel"] + params["head"]["bias"]


# The same two functions, compiled, for params with quantized kernels too.
stored_features = jax.jit(lora_jax.accept_quantized(features))
stored_model = jax.jit(lora_jax.accept_quantized(model))


@jax.jit
def adapted_model(
    params: minilm.Params, adapters: Any, plan: lora_jax.AdapterPlan, batch: reviews.Batch
) -> jax.Array:
    """Returns the logits of the model with adapters."""
    return lora_jax.adapt(model, plan)(params, adapters, batch)


def new_head(params: minilm.Params) -> minilm.Params:
    """Returns the params with a head of zeros: each logit is 0."""
    width = params["embeddings"]["word"].shape[1]
    return params | {"head": {"kernel": jnp.zeros(width), "bias": jnp.zeros(())}}


def quantize_base(params: minilm.Params, base: Any) -> minilm.Params:
    """Quantizes all kernels of the encoder, unless the base is `"full"`."""
    if base == "full":
        return params
    return lora_jax.quantize_params(params, "encoder/*/kernel", base)


def make_config(method: str, rank: int, alpha: float) -> lora_jax.LoraConfig:
    """Selects the query and value kernels for adapters, and the head for training."""
    return lora_jax.LoraConfig(
        rank=rank,
        alpha=alpha,
        targets=("*/query/kernel", "*/value/kernel"),
        train="head/*",
        use_dora=method == "dora",
    )


def apply_all(
    function: Callable[..., jax.Array], batches: Sequence[reviews.Batch], *args: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns what `function(*args, batch)` returns for each sentence, and the labels."""
    outputs = [function(*args, batch)[batch.weights > 0] for batch in batches]
    labels = [batch.labels[batch.weights > 0] for batch in batches]
    return jnp.concatenate(outputs), jnp.concatenate(labels)


def share_right(logits: jax.Array, labels: jax.Array) -> float:
    """Returns the share of the logits that have the sign of the label."""
    return float(jnp.mean((logits > 0) == (labels > 0)))


def fit_probe(features: jax.Array, labels: jax.Array) -> minilm.Params:
    """Fits a head to features `(sentences, width)`: logistic regression, by Newton."""

    def loss(vector: jax.Array) -> jax.Array:
        logits = features @ vector[:-1] + vector[-1]
        losses = optax.sigmoid_binary_cross_entropy(logits, labels)
        return jnp.mean(losses) + PROBE_PENALTY / 2 * jnp.sum(vector[:-1] ** 2)

    gradient, hessian = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))
    vector = jnp.zeros(features.shape[1] + 1)
    for _ in range(20):
        slope = gradient(vector)
        if jnp.linalg.norm(slope) < 1e-5:
            return {"kernel": vector[:-1], "bias": vector[-1]}
        vector = vector - jnp.linalg.solve(hessian(vector), slope)
    raise RuntimeError("the linear probe did not converge in 20 steps of Newton.")


def loss_and_accuracy(
    adapters: Any, params: minilm.Params, plan: lora_jax.AdapterPlan, batch: reviews.Batch
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean cross-entropy and the accuracy of a batch."""
    logits = adapted_model(params, adapters, plan, batch)
    losses = optax.sigmoid_binary_cross_entropy(logits, batch.labels)
    right = ((logits > 0) == (batch.labels > 0)).astype(losses.dtype)
    weights = batch.weights / jnp.sum(batch.weights)
    return jnp.sum(losses * weights), jnp.sum(right * weights)


def make_step(
    optimizer: optax.GradientTransformation, plan: lora_jax.AdapterPlan
) -> Callable[..., Any]:
    """Returns a compiled training step.

    The adapters and the optimizer state are donated: their memory holds the new ones. The
    frozen params are an argument; closed over, they would become constants of the program.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapters: Any, state: Any, params: minilm.Params, batch: reviews.Batch) -> Any:
        value_and_grad = jax.value_and_grad(loss_and_accuracy, has_aux=True)
        values, grads = value_and_grad(adapters, params, plan, batch)
        updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, *values

    return step


def fingerprint(params: minilm.Params) -> list[str]:
    """Returns a hash of each array, as it is stored."""
    leaves = map(np.asarray, jax.tree.leaves(params))
    return [hashlib.sha256(leaf.tobytes()).hexdigest() for leaf in leaves]


def megabytes(params: minilm.Params) -> float:
    """Returns what the parameters take, as they are stored, in 10^6 bytes."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6


def run_split(
    params: minilm.Params,
    plan: lora_jax.AdapterPlan,
    sides: Sequence[reviews.Examples],
    epochs: Sequence[Sequence[reviews.Batch]],
    key: jax.Array,
) -> tuple[Any, dict[str, Any]]:
    """Trains on one side, tests on the other, and merges; returns adapters and results."""
    before, (train, test) = fingerprint(params), map(reviews.make_batches, sides)
    probe = fit_probe(*apply_all(stored_features, train, params))
    probe_logits, labels = apply_all(stored_model, test, params | {"head": probe})

    steps = sum(map(len, epochs))  # a linear warm-up, then a cosine
    rates = LEARNING_RATE, math.ceil(WARM_UP * steps), steps
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, *rates))
    adapters = lora_jax.init_adapters(key, params, plan)
    step, state = make_step(optimizer, plan), optimizer.init(adapters)
    logits, history = labels, {"loss": [], "accuracy": [], "test_accuracy": []}
    tqdm = minilm.optional_import("tqdm")
    for number, batches in enumerate(epochs):
        for batch in (bar := tqdm.tqdm(batches, desc=f"epoch {number}", unit="step")):
            adapters, state, loss, accuracy = step(adapters, state, params, batch)
            history["loss"].append(float(loss))
            history["accuracy"].append(float(accuracy))
            bar.set_postfix(loss=f"{np.mean(history['loss'][-20:]):.3f}", refresh=False)
        logits, _ = apply_all(adapted_model, test, params, adapters, plan)
        history["test_accuracy"].append(share_right(logits, labels))

    merged = lora_jax.merge_adapters(params, adapters, plan)
    merged_logits, _ = apply_all(stored_model, test, merged)
    return adapters, {
        "train_sentences": len(sides[0].labels),
        "test_sentences": len(sides[1].labels),
        "trainable_parameters": plan.parameters,
        "probe_accuracy": share_right(probe_logits, labels),
        "adapter_accuracy": history["test_accuracy"][-1],
        "merged_accuracy": share_right(merged_logits, labels),
        "merge_max_difference": float(jnp.max(jnp.abs(merged_logits - logits))),
        "merged_megabytes": megabytes(merged),
        "frozen_unchanged": fingerprint(params) == before,
        "history": history,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Does the whole job, saving and printing as it goes; returns a summary for JSON."""
    start = time.perf_counter()
    params, tokenizer = minilm.load(args.cache)
    params = new_head(quantize_base(params, args.base))
    sentences = list(filter(reviews.is_opinion, reviews.load(args.cache)))
    batch, *_ = reviews.make_batches(reviews.tokenize(tokenizer, sentences[:1]))
    config = make_config(args.method, args.rank, args.alpha)
    plan = lora_jax.plan_adapters(config, params, model, batch)
    frozen = plan.total - sum(leaf.parameters for leaf in plan.trained.values())
    print(
        f"{len(sentences):,} sentences; {frozen:,} frozen parameters, {args.base}, ", end=""
    )
    print(f"stored in {megabytes(params):.1f} MB; adapters:\n{plan}")
    job = {name: getattr(args, name) for name in JOB} | {"model": minilm.MODEL.requirement}
    splits = []
    for index in range(args.splits):
        rng = np.random.default_rng([args.seed, index])
        key = jax.random.fold_in(jax.random.key(args.seed), index)
        texts = reviews.split_by_review(sentences, rng)
        train, test = (reviews.tokenize(tokenizer, side) for side in texts)
        epochs = [reviews.make_batches(train, rng) for _ in range(args.epochs)]
        print(f"split {index}: linear probe, then {args.method}")
        adapters, split = run_split(params, plan, (train, test), epochs, key)
        folder = args.out / f"split_{index}"
        lora_jax.save_adapters(folder, adapters, plan)  # load_adapters reads them
        (folder / "job.json").write_text(json.dumps(job, indent=2) + "\n")
        command_line.print_split(job, split, folder)
        splits.append(split)
    accuracies = ("probe_accuracy", "adapter_accuracy")
    means = {name: command_line.spread([s[name] for s in splits]) for name in accuracies}
    return {
        **job,
        **means,
        "total_parameters": frozen,
        "base_megabytes": megabytes(params),
        "trainable_parameters": plan.parameters,
        "seconds": time.perf_counter() - start,
        "peak_memory_mib": command_line.peak_memory_mib(),
        "splits": splits,
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    default, number = "default: %(default)s", command_line.number
    folder, count, add = command_line.folder, number(int, 1, 1000), parser.add_argument
    add("--method", choices=("lora", "dora"), default="lora", help=default)
    add("--rank", type=number(int, 1, 384), default=8, help=default)
    add("--alpha", type=number(float, 1e-3, 1e4), default=16.0, help=default)
    add("--epochs", type=count, default=2, help=default)
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help=default)
    base_help = "how the encoder's frozen kernels are stored; " + default
    add("--base", choices=BASES, default="full", help=base_help)
    add("--splits", type=count, default=1, help="repeat over splits; " + default)
    cache_help = "where downloads are, or the two files put there by hand; " + default
    add("--cache", type=folder, default=minilm.default_cache(), help=cache_help)
    out_help = "where to save adapters; default: sentiment-METHOD-BASE in the cache"
    add("--out", type=folder, help=out_help)
    add("--plot", type=command_line.file_in(".png"), help="draw curves into this file")
    add("--json", type=command_line.file_in(".json"), help="write a summary into this file")
    args = parser.parse_args(argv)
    args.out = args.out or args.cache / f"sentiment-{args.method}-{args.base}"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = parse_arguments(argv)
    try:
        for name in ("tqdm", "matplotlib") if args.plot else ("tqdm",):
            minilm.optional_import(name)
        summary = run(args)
    except (OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    command_line.print_summary(summary)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(summary, indent=2) + "\n")
    if args.plot:
        command_line.plot(summary, args.plot)


if __name__ == "__main__":
    main()
