"""Compares DoRA's norm per output, its norm per input, and LoRA, on real sentences.

DoRA divides the adapted weight by norms and multiplies it by trained magnitudes: one for
each output in the paper and in peft, one for each input in the code of an article. The
arms train the same encoder on the same batches from the same start, with equally many
parameters. The two DoRA arms differ only in the axis of the norm.

    python docs/studies/dora_norm_axis.py               # resumes a run that was killed
    python docs/studies/dora_norm_axis.py --report      # tables and plot, no training
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import dora_norm_axis_arms as arms
import dora_norm_axis_report as report
import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

import command_line
import minilm
import reviews
import sentiment

RECORD = pathlib.Path(__file__).with_suffix(".json")
FILES = {"products": "amazonReviewSnippets", "movies": "movieReviewSnippets"}
RATES = (2e-3, 4e-3, 1e-3)  # that of sentiment.py comes first
LONGEST = reviews.BUCKETS[0]  # tokens; longer sentences are left out, none is cut


@dataclasses.dataclass(frozen=True)
class Settings:
    """How large the study is; the sentences are those of one seed and one data set."""

    seeds: int = 5
    epochs: int = 2
    train: int = 640
    test: int = 288
    loss: int = 128  # of those to train on, for the loss at the end


class Drawn(NamedTuple):
    """What all arms share that have a seed and a data set in common."""

    entropy: list[int]
    train: reviews.Examples
    test: reviews.Examples
    batches: list[reviews.Batch]  # of all epochs


def short_opinions(
    tokenizer: Any, sentences: Sequence[reviews.Sentence]
) -> list[reviews.Sentence]:
    """Returns the sentences that are opinions, of at most `LONGEST` tokens."""
    opinions = list(filter(reviews.is_opinion, sentences))
    tokens = minilm.tokenize(tokenizer, [s.text for s in opinions], length=LONGEST + 1)
    return [s for s, ids in zip(opinions, tokens, strict=True) if len(ids) <= LONGEST]


def draw(
    tokenizer: Any, pool: Sequence[reviews.Sentence], settings: Settings, entropy: list[int]
) -> Drawn:
    """Draws what the arms share, with no review to train on and to test on.

    Raises:
        ValueError: if there are not enough sentences.
    """
    rng = np.random.default_rng(entropy)
    sides, sizes = reviews.split_by_review(pool, rng), (settings.train, settings.test)
    if any(len(side) < size for side, size in zip(sides, sizes, strict=True)):
        raise ValueError(
            f"expected at least {sizes} sentences to train on and to test on, got "
            f"{tuple(map(len, sides))}: give smaller numbers with --train and --test."
        )
    train, test = (
        reviews.tokenize(tokenizer, [side[i] for i in rng.permutation(len(side))[:size]])
        for side, size in zip(sides, sizes, strict=True)
    )
    epochs = (reviews.make_batches(train, rng) for _ in range(settings.epochs))
    return Drawn(entropy, train, test, list(itertools.chain(*epochs)))


def measure(
    examples: reviews.Examples, apply: Callable[[reviews.Batch], jax.Array]
) -> tuple[float, float]:
    """Returns the mean loss of the examples, and the share that is right."""
    logits, labels = sentiment.apply_all(apply, reviews.make_batches(examples))
    losses = optax.sigmoid_binary_cross_entropy(logits, labels)
    return float(jnp.mean(losses)), sentiment.share_right(logits, labels)


def train_arm(
    adapters: arms.Adapters,
    params: minilm.Params,
    batches: Sequence[reviews.Batch],
    rate: float,
    arm: arms.Arm,
) -> arms.Adapters:
    """Trains as the sentiment example does: a linear warm-up, then a cosine."""
    warm_up = math.ceil(sentiment.WARM_UP * len(batches))
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warm_up, len(batches))
    state = arms.OPTIMIZER.init(adapters)
    for index, batch in enumerate(batches):
        rate_now = jnp.asarray(schedule(index))
        adapters, state = arms.step(adapters, state, params, batch, rate_now, arm=arm)
    return adapters


def jobs(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yields what identifies each run, in such an order that pairs are soon complete."""
    for rate, seed in itertools.product(RATES, range(settings.seeds)):
        for name in FILES:
            if rate == RATES[0]:
                yield {"data": name, "seed": seed, "rate": None, "arm": "probe"}
            for arm in arms.ARMS:
                yield {"data": name, "seed": seed, "rate": rate, "arm": arm}


def run(
    job: dict[str, Any],
    params: minilm.Params,
    plans: arms.Plans,
    drawn: Drawn,
    settings: Settings,
) -> dict[str, float]:
    """Does one run; its start is that of the other arms of the seed and the data set."""
    arm, start = job["arm"], time.perf_counter()
    if arm == "probe":
        batches = reviews.make_batches(drawn.train)
        features = sentiment.apply_all(sentiment.stored_features, batches, params)
        probed = params | {"head": sentiment.fit_probe(*features)}
        apply = functools.partial(sentiment.stored_model, probed)
    else:
        seed, data = drawn.entropy
        key = jax.random.fold_in(jax.random.key(seed), data)
        adapters = arms.init_adapters(key, params, plans[arm], arm)
        adapters = train_arm(adapters, params, drawn.batches, job["rate"], arm)
        apply = functools.partial(arms.model, params, adapters, arm=arm)
    tokens, labels = drawn.train
    some = reviews.Examples(tokens[: settings.loss], labels[: settings.loss])
    return {
        "test_accuracy": round(measure(drawn.test, apply)[1], 6),
        "training_loss": round(measure(some, apply)[0], 6),
        "seconds": round(time.perf_counter() - start, 1),
    }


def all_settings(settings: Settings) -> dict[str, Any]:
    """Returns the settings with the constants, as the record has them."""
    return dataclasses.asdict(settings) | {"rates": list(RATES), "longest": LONGEST}


def open_record(path: pathlib.Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Returns the record of the runs so far with the wanted settings, or a new one.

    Raises:
        ValueError: if it was made with other settings.
    """
    if not path.exists():
        date, device = datetime.date.today().isoformat(), jax.devices()[0].device_kind
        environment = {"date": date, "jax": jax.__version__, "device": device}
        return {"settings": wanted, "environment": environment, "runs": []}
    record = json.loads(path.read_text())
    if record["settings"] != wanted:
        raise ValueError(
            f"{path} was made with other settings: expected {wanted}, got "
            f"{record['settings']}. Give those, or the name of another file with --json."
        )
    return record


def save_record(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Replaces the file at once: whoever kills the study keeps what was there."""
    runs = ",\n  ".join(json.dumps(entry) for entry in record["runs"])
    rest = {name: value for name, value in record.items() if name != "runs"}
    text = json.dumps(rest, indent=1).removesuffix("\n}")
    part = path.with_suffix(".part")
    part.write_text(f'{text},\n "runs": [\n  {runs}\n ]\n}}\n')
    os.replace(part, path)


def run_all(path: pathlib.Path, cache: pathlib.Path, settings: Settings) -> None:
    """Checks the arms, does the runs that the record lacks, and adds each to it."""
    record = open_record(path, all_settings(settings))
    params, tokenizer = minilm.load(cache)
    params = sentiment.new_head(params)
    pools = {
        name: short_opinions(tokenizer, reviews.load(cache, name=file))
        for name, file in FILES.items()
    }
    batch, *_ = reviews.make_batches(reviews.tokenize(tokenizer, pools["products"][:32]))
    drawn = {
        (name, seed): draw(tokenizer, pools[name], settings, [seed, index])
        for (index, name), seed in itertools.product(
            enumerate(FILES), range(settings.seeds)
        )
    }
    plans = arms.make_plans(params, batch)
    record["sentences"] = {name: len(pool) for name, pool in pools.items()}
    record["parameters"] = arms.count_parameters(params, plans)
    record["disagreement"] = {
        arm: arms.disagreement(params, batch, plans[arm], arm)
        for arm in ("dora_out", "lora")
    }
    if not max(record["disagreement"].values()) < 1e-4:
        raise RuntimeError(f"the arms are not what adapt does: {record['disagreement']}")
    done = [{name: entry[name] for name in report.JOB} for entry in record["runs"]]
    for job in itertools.filterfalse(done.__contains__, jobs(settings)):
        result = run(job, params, plans, drawn[job["data"], job["seed"]], settings)
        record["runs"].append(job | result)
        save_record(path, record)
        print(json.dumps(job | result), flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Compares DoRA's norm axes, and LoRA, on real sentences.",
        epilog="It appends each run to the JSON: started again, it does what is missing.",
    )
    add, default = parser.add_argument, "default: %(default)s"
    sizes = {
        "seeds": "splits, starts and orders",
        "epochs": "passes over the sentences to train on",
        "train": "sentences to train on",
        "test": "sentences to test on",
        "loss": "sentences for the training loss at the end",
    }
    for name, what in sizes.items():
        kind = command_line.number(int, 1, 10_000)
        add(f"--{name}", type=kind, default=getattr(Settings(), name), help=what)
    cache_help = "where downloads are; " + default
    add(
        "--cache", type=command_line.folder, default=minilm.default_cache(), help=cache_help
    )
    add("--json", type=command_line.file_in(".json"), default=RECORD, help="the record")
    add("--plot", type=command_line.file_in(".png"), help="default: beside the record")
    add("--report", action="store_true", help="do not train: only tables and plot")
    args = parser.parse_args(argv)
    args.plot = args.plot or args.json.with_suffix(".png")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = parse_arguments(argv)
    sizes = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)}
    try:
        minilm.optional_import("matplotlib")
        if not args.report:
            run_all(args.json, args.cache, Settings(**sizes))
        record = json.loads(args.json.read_text())
        report.plot(record, args.plot)
    except (OSError, ModuleNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(report.tables(record))


if __name__ == "__main__":
    main()
