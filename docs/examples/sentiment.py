"""Fine-tunes a pretrained sentence encoder with LoRA or DoRA, on a laptop.

The task is to tell favorable sentences of product reviews from unfavorable ones. The
encoder (all-MiniLM-L6-v2) stays frozen. Adapters on its query and value kernels and a
linear head are trained. The baseline is a head on the frozen encoder. Then the adapters
are merged into the weights, and the merged model is compared with the adapted one. With
--base the frozen encoder is quantized.

    pip install "lora_jax[examples]"      # or, in a clone: pip install -e ".[examples]"
    python docs/examples/sentiment.py
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import classifier
import jax
import jax.numpy as jnp
import minilm
import numpy as np
import optax
import report
import reviews

import lora_jax

LEARNING_RATE = 2e-3
WARM_UP = 0.1  # of the steps
PROBE_PENALTY = 1e-2  # the best of eight on the test sides of three splits: a strong probe

EXAMPLES = """examples:
  python sentiment.py                                LoRA, about two minutes
  python sentiment.py --method dora --rank 4
  python sentiment.py --base nf4                     QLoRA: four bits for a frozen weight
  python sentiment.py --plot curves.png
  python sentiment.py --splits 3 --json summary.json
"""


def encode_all(
    encode: Callable[[reviews.Batch], jax.Array], batches: Sequence[reviews.Batch]
) -> tuple[jax.Array, jax.Array]:
    """Returns the features `(sentences, width)` and labels `(sentences,)` of batches."""
    features, labels = [], []
    for batch in batches:
        real = batch.weights > 0
        features.append(encode(batch)[real])
        labels.append(batch.labels[real])
    return jnp.concatenate(features), jnp.concatenate(labels)


def share_right(logits: jax.Array, labels: jax.Array) -> float:
    """Returns the share of the logits that have the sign of the label."""
    return float(jnp.mean((logits > 0) == (labels > 0)))


def fit_probe(features: jax.Array, labels: jax.Array) -> classifier.Head:
    """Fits a head to frozen features: logistic regression by Newton's method.

    Args:
        features: `(sentences, width)`.
        labels: `(sentences,)`.

    Raises:
        RuntimeError: if it does not converge.
    """

    def loss(vector: jax.Array) -> jax.Array:
        logits = classifier.apply_head(as_head(vector), features)
        losses = optax.sigmoid_binary_cross_entropy(logits, labels)
        return jnp.mean(losses) + PROBE_PENALTY / 2 * jnp.sum(vector[:-1] ** 2)

    def as_head(vector: jax.Array) -> classifier.Head:
        return {"kernel": vector[:-1], "bias": vector[-1]}

    gradient, hessian = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))
    vector = jnp.zeros(features.shape[1] + 1)
    for _ in range(20):
        slope = gradient(vector)
        if jnp.linalg.norm(slope) < 1e-5:
            return as_head(vector)
        vector = vector - jnp.linalg.solve(hessian(vector), slope)
    raise RuntimeError("the linear probe did not converge in 20 steps of Newton.")


def train(
    trainable: classifier.Trainable,
    params: minilm.Params,
    plan: lora_jax.AdapterPlan,
    epochs: Sequence[Sequence[reviews.Batch]],
) -> Iterator[tuple[classifier.Trainable, list[float], list[float]]]:
    """Trains adapters and head with AdamW: a linear warm-up, then a cosine.

    Args:
        trainable: where to start; donated.
        params: the frozen encoder.
        plan: of the adapters.
        epochs: the batches of each epoch.

    Yields:
        After each epoch what has been trained, which is donated when the next epoch
        starts, and the epoch's losses and accuracies, step by step.
    """
    steps = sum(map(len, epochs))
    warm_up = math.ceil(WARM_UP * steps)
    optimizer = optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warm_up, steps)
    )
    state = optimizer.init(trainable)
    step = classifier.make_step(optimizer, plan)
    tqdm = minilm.optional_import("tqdm")
    with tqdm.tqdm(total=steps, desc=plan.config.method, unit="step") as progress:
        for batches in epochs:
            losses, accuracies = [], []
            for batch in batches:
                trainable, state, loss, accuracy = step(trainable, state, params, batch)
                losses.append(float(loss))
                accuracies.append(float(accuracy))
                progress.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}", refresh=False)
                progress.update()
            yield trainable, losses, accuracies


def run_split(
    key: jax.Array,
    rng: np.random.Generator,
    params: minilm.Params,
    plan: lora_jax.AdapterPlan,
    training: reviews.Examples,
    test: reviews.Examples,
    *,
    epochs: int,
) -> tuple[classifier.Trainable, dict[str, Any]]:
    """Trains the probe and the adapters on one split, and checks the merge.

    Returns:
        What was trained, and a summary that `json` can write.
    """
    fingerprint = classifier.fingerprint(params)
    test_batches = reviews.make_batches(test)
    frozen = functools.partial(classifier.encode_stored, params)
    probe = fit_probe(*encode_all(frozen, reviews.make_batches(training)))
    features, labels = encode_all(frozen, test_batches)
    probe_logits = classifier.apply_head(probe, features)

    trainable = classifier.init_trainable(key, params, plan)
    batches = [reviews.make_batches(training, rng) for _ in range(epochs)]
    training_run = train(trainable, params, plan, batches)
    logits, history = [], {"loss": [], "accuracy": [], "test_accuracy": []}
    for trainable, losses, accuracies in training_run:
        adapters = trainable["adapters"]
        adapted = functools.partial(classifier.encode_adapted, params, adapters, plan)
        features, _ = encode_all(adapted, test_batches)
        logits.append(classifier.apply_head(trainable["head"], features))
        history["loss"] += losses
        history["accuracy"] += accuracies
        history["test_accuracy"].append(share_right(logits[-1], labels))

    merged_params = lora_jax.merge_adapters(params, trainable["adapters"], plan)
    merged = functools.partial(classifier.encode_stored, merged_params)
    features, _ = encode_all(merged, test_batches)
    merged_logits = classifier.apply_head(trainable["head"], features)
    return trainable, {
        "train_sentences": len(training.labels),
        "test_sentences": len(test.labels),
        "trainable_parameters": sum(x.size for x in jax.tree.leaves(trainable)),
        "probe_accuracy": share_right(probe_logits, labels),
        "adapter_accuracy": history["test_accuracy"][-1],
        "merged_accuracy": share_right(merged_logits, labels),
        "merge_max_difference": float(jnp.max(jnp.abs(merged_logits - logits[-1]))),
        "merged_megabytes": classifier.megabytes(merged_params),
        "frozen_unchanged": classifier.fingerprint(params) == fingerprint,
        "history": history,
    }


def run(job: classifier.Job, args: argparse.Namespace) -> dict[str, Any]:
    """Does the whole job, saving and printing as it goes.

    Returns:
        A summary that `json` can write.
    """
    start = time.perf_counter()
    params, tokenizer = minilm.load(args.cache)
    params = classifier.quantize_base(params, job.base)
    sentences = list(filter(reviews.is_opinion, reviews.load(args.cache)))
    batch, *_ = reviews.make_batches(reviews.tokenize(tokenizer, sentences[:1]))
    plan = classifier.make_plan(params, batch, job)
    stored = classifier.megabytes(params)
    print(f"{len(sentences):,} sentences; {plan.total:,} frozen parameters, ", end="")
    print(f"{job.base}, stored in {stored:.1f} MB; adapters:")
    print(plan)
    splits = []
    for index in range(args.splits):
        rng = np.random.default_rng([job.seed, index])
        key = jax.random.fold_in(jax.random.key(job.seed), index)
        parts = reviews.split_by_review(sentences, rng)
        training, test = (reviews.tokenize(tokenizer, part) for part in parts)
        print(f"split {index}: linear probe, then {job.method}")
        trainable, split = run_split(
            key, rng, params, plan, training, test, epochs=job.epochs
        )
        folder = args.out / f"split_{index}"
        classifier.save(folder, trainable, plan, job)
        report.print_split(split, job.method, job.base, folder)
        splits.append(split)
    return dataclasses.asdict(job) | {
        "total_parameters": plan.total,
        "base_megabytes": stored,
        "trainable_parameters": splits[0]["trainable_parameters"],
        "probe_accuracy": report.spread([s["probe_accuracy"] for s in splits]),
        "adapter_accuracy": report.spread([s["adapter_accuracy"] for s in splits]),
        "seconds": time.perf_counter() - start,
        "peak_memory_mib": report.peak_memory_mib(),
        "splits": splits,
    }


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """Returns an argparse type for numbers from low to high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"expected {what} from {low} to {high}, got {text!r}"
            )
        return value

    return parse


def file_in(suffix: str) -> Callable[[str], pathlib.Path]:
    """Returns an argparse type for names of files that end in the suffix."""

    def parse(text: str) -> pathlib.Path:
        if pathlib.Path(text).suffix != suffix:
            raise argparse.ArgumentTypeError(
                f"expected the name of a {suffix} file, got {text!r}"
            )
        return pathlib.Path(text)

    return parse


def folder(text: str) -> pathlib.Path:
    """The argparse type of folders, which need not exist yet."""
    path = pathlib.Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got the file {text!r}")
    return path


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes a pretrained sentence encoder with LoRA or DoRA.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    job, default = classifier.Job(), "default: %(default)s"
    count, add = number(int, 1, 1000), parser.add_argument
    add("--method", choices=classifier.METHODS, default=job.method, help=default)
    add("--rank", type=number(int, 1, 384), default=job.rank, help=default)
    add("--alpha", type=number(float, 1e-3, 1e4), default=job.alpha, help=default)
    add("--epochs", type=count, default=job.epochs, help=default)
    add("--seed", type=number(int, 0, 2**31 - 1), default=job.seed, help=default)
    base_help = "how the encoder's frozen kernels are stored; " + default
    add("--base", choices=classifier.BASES, default=job.base, help=base_help)
    add("--splits", type=count, default=1, help="repeat over splits; " + default)
    cache_help = "where downloads are, or the two files put there by hand; " + default
    add("--cache", type=folder, default=minilm.default_cache(), help=cache_help)
    out_help = "where to save adapters; default: sentiment-METHOD-BASE in the cache"
    add("--out", type=folder, help=out_help)
    add("--plot", type=file_in(".png"), help="draw loss and accuracy into this file")
    add("--json", type=file_in(".json"), help="write a summary into this file")
    args = parser.parse_args(argv)
    args.out = args.out or args.cache / f"sentiment-{args.method}-{args.base}"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = parse_arguments(argv)
    names = [field.name for field in dataclasses.fields(classifier.Job)]
    job = classifier.Job(**{name: getattr(args, name) for name in names})
    try:
        for name in ("tqdm", "matplotlib") if args.plot else ("tqdm",):
            minilm.optional_import(name)
        summary = run(job, args)
    except (OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    report.print_summary(summary)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(summary, indent=2) + "\n")
    if args.plot:
        report.plot(summary, args.plot)


if __name__ == "__main__":
    main()
