"""Compares ways to start and to train adapters, on real sentences.

Each arm differs from plain LoRA with AdamW in one thing: how the adapters start, how they
are scaled, or which optimizer trains them. Each arm has the same learning rates to choose
from, and the sentences of one review are never on two sides of a split.

    python docs/studies/initializers.py               # resumes a run that was killed
    python docs/studies/initializers.py --report      # tables and plot, no training
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import dora_norm_axis as norm_axis
import initializers_report as report
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from lora_jax import optim

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

import command_line
import minilm
import reviews
import sentiment

Adapters = dict[str, lora_jax.Adapter]
RECORD = pathlib.Path(__file__).with_suffix(".json")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # of the adapters
HEAD_RATE = sentiment.LEARNING_RATE  # of the head, in all runs
LENGTH = 16  # tokens; longer sentences are left out, none is cut
BATCH_SIZE = 16
GRADIENT_BATCHES = 8  # from which LoRA-One and LoRA-GA start


class Arm(NamedTuple):
    """What differs from plain LoRA."""

    start: str = "default"
    optimizer: str = "adamw"
    rank_stabilized: bool = False


ARMS = {
    "default": Arm(),
    "pissa": Arm(start="pissa"),
    "olora": Arm(start="olora"),
    "lora_one": Arm(start="lora_one"),
    "lora_ga": Arm(start="lora_ga"),
    "eva": Arm(start="eva"),
    "rank_stabilized": Arm(rank_stabilized=True),
    "lora_plus": Arm(optimizer="lora_plus"),
    "riemannian": Arm(optimizer="riemannian"),
    "lora_rite": Arm(optimizer="lora_rite"),
}
# Each has the learning rate 1: `step` multiplies the updates.
OPTIMIZERS = {
    "adamw": optax.adamw(1.0),
    "lora_plus": optim.lora_plus(1.0, optimizer=optax.adamw),
    "riemannian": optax.chain(optim.scale_by_riemannian(), optax.adamw(1.0)),
    "lora_rite": optim.lora_rite(1.0, weight_decay=1e-4),  # that of optax.adamw
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How large the study is; the numbers of sentences are multiples of the batch size."""

    seeds: int = 4
    epochs: int = 1
    train: int = 640
    validation: int = 160
    test: int = 192


class Drawn(NamedTuple):
    """What all arms of a seed share."""

    key: jax.Array
    batches: list[reviews.Batch]  # of all epochs
    train: list[reviews.Batch]
    validation: list[reviews.Batch]
    test: list[reviews.Batch]
    params: minilm.Params  # with a head fitted to the frozen features of `train`


def make_batches(
    examples: reviews.Examples, order: Sequence[int] | np.ndarray
) -> list[reviews.Batch]:
    """Pads the examples to `LENGTH`, and cuts them into full batches, in this order."""
    batches = []
    for rows in np.reshape(order, (-1, BATCH_SIZE)):
        tokens = np.zeros((BATCH_SIZE, LENGTH), np.int32)
        mask = np.zeros((BATCH_SIZE, LENGTH), bool)
        for i, row in enumerate(rows):
            ids = examples.tokens[row]
            tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
        ones = np.ones(BATCH_SIZE, np.float32)
        batches.append(reviews.Batch(tokens, mask, examples.labels[rows], ones))
    return batches


def short_opinions(
    tokenizer: Any, sentences: Sequence[reviews.Sentence]
) -> list[reviews.Sentence]:
    """Returns the sentences that are opinions, of at most `LENGTH` tokens."""
    opinions = list(filter(reviews.is_opinion, sentences))
    tokens = minilm.tokenize(tokenizer, [s.text for s in opinions], length=LENGTH + 1)
    return [s for s, ids in zip(opinions, tokens, strict=True) if len(ids) <= LENGTH]


def draw(
    seed: int,
    params: minilm.Params,
    tokenizer: Any,
    pool: Sequence[reviews.Sentence],
    settings: Settings,
) -> Drawn:
    """Draws what the arms of a seed share, and fits the probe.

    Sentences to train on and to validate on are from the same reviews, those to test on
    from others.

    Raises:
        ValueError: if there are not enough sentences.
    """
    rng = np.random.default_rng(seed)
    sizes = settings.train + settings.validation, settings.test
    sides = reviews.split_by_review(pool, rng)
    if any(len(side) < size for side, size in zip(sides, sizes, strict=True)):
        raise ValueError(
            f"expected at least {sizes} sentences to train and validate on and to test on, "
            f"got {tuple(map(len, sides))}: give smaller numbers."
        )
    train, test = (
        reviews.tokenize(tokenizer, [side[i] for i in rng.permutation(len(side))[:size]])
        for side, size in zip(sides, sizes, strict=True)
    )
    own, rest = np.split(np.arange(sizes[0]), [settings.train])
    epochs = [make_batches(train, rng.permutation(own)) for _ in range(settings.epochs)]
    batches = make_batches(train, own)
    features = sentiment.apply_all(sentiment.stored_features, batches, params)
    return Drawn(
        jax.random.key(seed),
        list(itertools.chain(*epochs)),
        batches,
        make_batches(train, rest),
        make_batches(test, np.arange(sizes[1])),
        params | {"head": sentiment.fit_probe(*features)},
    )


def make_plan(
    params: minilm.Params, batch: reviews.Batch, arm: Arm
) -> lora_jax.AdapterPlan:
    """Plans the adapters of the sentiment example, with its rank and alpha."""
    config = sentiment.make_config("lora", rank=8, alpha=16.0)
    config = dataclasses.replace(config, rank_stabilized=arm.rank_stabilized)
    return lora_jax.plan_adapters(config, params, sentiment.model, batch)


class Start(NamedTuple):
    """What an arm of a seed starts from, at each learning rate."""

    params: minilm.Params
    adapters: Adapters
    plan: lora_jax.AdapterPlan


def start(drawn: Drawn, arm: Arm) -> Start:
    """Makes the adapters of an arm; some methods change the params or the plan."""
    params, method, key = drawn.params, arm.start, drawn.key
    plan = make_plan(params, drawn.batches[0], arm)

    def loss(params: minilm.Params, batch: reviews.Batch) -> jax.Array:
        logits = sentiment.model(params, batch)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, batch.labels))

    if method == "default":
        return Start(params, lora_jax.init_adapters(key, params, plan), plan)
    if method == "eva":
        every = jax.tree.map(lambda *arrays: np.concatenate(arrays), *drawn.train)
        full = every.mask.all(axis=1)  # padding would count as an input
        batches = [(jax.tree.map(lambda array: array[full], every),)]
        made = lora_jax.init_adapters_from_inputs(key, params, plan, loss, batches)
        return Start(params, made.adapters, made.plan)
    if method in ("lora_one", "lora_ga"):
        batches = [(batch,) for batch in drawn.train[:GRADIENT_BATCHES]]
        made = lora_jax.init_adapters_from_gradients(
            key, params, plan, loss, batches, method=method
        )
    else:
        made = lora_jax.decompose_params(params, plan, cast(Any, method))
    return Start(cast(Any, made.params), made.adapters, plan)


def split(adapters: Adapters, plan: lora_jax.AdapterPlan) -> dict[str, Adapters]:
    """Returns the adapters, and the trained leaves of the head."""
    parts = {"adapters": plan.targets, "head": plan.trained}
    return {part: {path: adapters[path] for path in of} for part, of in parts.items()}


@functools.partial(
    jax.jit, static_argnames=("plan", "optimizer"), donate_argnames=("adapters", "state")
)
def step(
    adapters: Adapters,
    state: dict[str, optax.OptState],
    params: minilm.Params,
    batch: reviews.Batch,
    rates: dict[str, jax.Array],
    *,
    plan: lora_jax.AdapterPlan,
    optimizer: str,
) -> tuple[Adapters, dict[str, optax.OptState]]:
    """Takes a step with a learning rate for the adapters and one for the head."""

    def loss(adapters: Adapters) -> jax.Array:
        return sentiment.loss_and_accuracy(adapters, params, plan, batch)[0]

    grads, before = (split(x, plan) for x in (jax.grad(loss)(adapters), adapters))
    trained, states = {}, {}
    for part, name in (("adapters", optimizer), ("head", "adamw")):
        updates, states[part] = OPTIMIZERS[name].update(
            grads[part], state[part], before[part]
        )
        updates = jax.tree.map(functools.partial(jnp.multiply, rates[part]), updates)
        moved: Any = optax.apply_updates(before[part], updates)
        trained |= moved
    return trained, states


def train(begin: Start, drawn: Drawn, rate: float, optimizer: str) -> Adapters:
    """Trains as the sentiment example does: a linear warm-up, then a cosine."""
    steps, (params, adapters, plan) = len(drawn.batches), begin
    adapters = jax.tree.map(jnp.array, adapters)  # copies, since `step` donates them
    warm_up = math.ceil(sentiment.WARM_UP * steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warm_up, steps + 1)
    parts = split(adapters, plan)
    state = {
        "adapters": OPTIMIZERS[optimizer].init(parts["adapters"]),
        "head": OPTIMIZERS["adamw"].init(parts["head"]),
    }
    # at 0 and at the end the rate is 0
    for index, batch in enumerate(drawn.batches, start=1):
        share = schedule(index)
        rates = {"adapters": rate * share, "head": HEAD_RATE * share}
        adapters, state = step(
            adapters, state, params, batch, rates, plan=plan, optimizer=optimizer
        )
    return adapters


_evaluate = jax.jit(sentiment.loss_and_accuracy, static_argnames="plan")


def measure(
    adapters: Adapters,
    params: minilm.Params,
    plan: lora_jax.AdapterPlan,
    batches: Sequence[reviews.Batch],
) -> tuple[float, float]:
    """Returns the mean loss of the sentences, and the share that is right."""
    results = [_evaluate(adapters, params, plan=plan, batch=batch) for batch in batches]
    loss, accuracy = np.mean(np.array(results, np.float64), axis=0)
    return round(float(loss), 6), round(float(accuracy), 6)


def jobs(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yields what identifies each run, seed by seed."""
    for seed in range(settings.seeds):
        yield {"seed": seed, "rate": None, "arm": "probe"}
        for arm, rate in itertools.product(ARMS, RATES):
            yield {"seed": seed, "rate": rate, "arm": arm}


def run(begin: Start, drawn: Drawn, rate: float | None, optimizer: str) -> dict[str, float]:
    """Trains adapters and head, from the probe, and measures; without a rate, no step."""
    time_before, (params, adapters, plan) = time.process_time(), begin
    if rate is not None:
        adapters = train(begin, drawn, rate, optimizer)
    result = {}
    for name in ("train", "validation", "test"):  # as many of `train` as of `validation`
        batches = getattr(drawn, name)
        batches = batches[: len(drawn.validation)] if name == "train" else batches
        loss, accuracy = measure(adapters, params, plan, batches)
        result |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
    return result | {"seconds": round(time.process_time() - time_before, 1)}


def all_settings(settings: Settings) -> dict[str, Any]:
    """Returns the settings with the constants, as the record has them."""
    fixed = {"rates": list(RATES), "head_rate": HEAD_RATE, "longest": LENGTH}
    return dataclasses.asdict(settings) | fixed


def run_all(path: pathlib.Path, cache: pathlib.Path, settings: Settings) -> None:
    """Does the runs that the record lacks, and adds each to it."""
    record = norm_axis.open_record(path, all_settings(settings))
    params, tokenizer = minilm.load(cache)
    pool = short_opinions(tokenizer, reviews.load(cache))
    record["sentences"] = len(pool)
    done = [{name: entry[name] for name in report.JOB} for entry in record["runs"]]
    missing, drawn = itertools.filterfalse(done.__contains__, jobs(settings)), {}
    for (seed, name), group in itertools.groupby(
        missing, lambda job: (job["seed"], job["arm"])
    ):
        if seed not in drawn:
            drawn = {seed: draw(seed, params, tokenizer, pool, settings)}
        own, arm = drawn[seed], ARMS.get(name, Arm())
        begin = start(own, arm)
        for job in group:
            result = run(begin, own, job["rate"], arm.optimizer)
            record["runs"].append(job | result)
            norm_axis.save_record(path, record)
            print(json.dumps(record["runs"][-1]), flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Compares ways to start and to train adapters, on real sentences.",
        epilog="It appends each run to the JSON: started again, it does what is missing.",
    )
    add, default = parser.add_argument, "default: %(default)s"
    for name, what in {"seeds": "splits and starts", "epochs": "passes"}.items():
        help_text = f"{what}; {default}"
        kind = command_line.number(int, 1, 100)
        add(f"--{name}", type=kind, default=getattr(Settings(), name), help=help_text)
    for name, what in {"train": "train", "validation": "choose on", "test": "test"}.items():
        size, help_text = getattr(Settings(), name), f"batches to {what}; {default}"
        kind = command_line.number(int, 1, 1000)
        add(f"--{name}", type=kind, default=size // BATCH_SIZE, help=help_text)
    cache_help = "where downloads are; " + default
    add(
        "--cache", type=command_line.folder, default=minilm.default_cache(), help=cache_help
    )
    add("--json", type=command_line.file_in(".json"), default=RECORD, help="the record")
    add("--report", action="store_true", help="do not train: only tables and plot")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = parse_arguments(argv)
    sizes = {
        name: BATCH_SIZE * getattr(args, name) for name in ("train", "validation", "test")
    }
    settings = Settings(args.seeds, args.epochs, **sizes)
    try:
        minilm.optional_import("matplotlib")
        if not args.report:
            run_all(args.json, args.cache, settings)
        record = json.loads(args.json.read_text())
        report.plot(record, args.json.with_suffix(".png"))
    except (OSError, ModuleNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(report.tables(record))


if __name__ == "__main__":
    main()
