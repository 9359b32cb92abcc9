"""Fine-tunes a language model in its four bits, with LoRA or DoRA, on a laptop.

SmolLM2-135M-Instruct is read from its GGUF file and stays quantized and frozen. Adapters on
its seven projections learn to answer, in a chat, whether a sentence of a product review is
positive or negative. Then the adapted and the merged model generate texts.

    pip install "lora_jax[examples]"      # or, in a clone: pip install -e ".[examples]"
    python docs/examples/smollm.py
"""

import argparse
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import command_line
import jax
import jax.numpy as jnp
import minilm
import numpy as np
import optax
import reviews
import smollm_model
import smollm_text

import lora_jax

WARM_UP = 0.1  # of the steps
QUESTION = ("You are a helpful AI assistant.", "What is the capital of France?")
EXAMPLES = """examples:
  python smollm.py --quick                     LoRA on few sentences
  python smollm.py --method dora --rank 4
  python smollm.py --base dense --plot curve.png
"""


class Size(NamedTuple):
    """How many sentences to train on and to test on, and tokens to generate."""

    training: int
    test: int
    generated: int


SIZES = {"quick": Size(96, 64, 16), "default": Size(1024, 256, 32)}
Model = Callable[..., Any]  # `(params, ...)`, or `(params, adapters, ...)` if adapted


class Language(NamedTuple):
    """A model's config and the tokens of its answers, and its functions of params."""

    config: smollm_model.Config
    answers: np.ndarray

    def answer(self, params: Any, batch: smollm_text.Batch) -> jax.Array:
        """Returns the logits after the prompt and after the answer, `(batch, 2, vocab)`."""
        features, _ = smollm_model.apply(params, jnp.asarray(batch.tokens), self.config)
        places = batch.last[:, None] + np.arange(2)[None]
        chosen = jnp.take_along_axis(features, places[..., None], axis=1)
        return chosen @ params["embed"].T

    def next_token(
        self, params: Any, tokens: jax.Array, cache: smollm_model.Cache, start: Any
    ) -> tuple[jax.Array, smollm_model.Cache | None]:
        """Returns the most likely next token, `(batch, 1)`, and the cache."""
        features, filled = smollm_model.apply(params, tokens, self.config, cache, start)
        logits = features[:, -1:] @ params["embed"].T
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), filled

    def loss(self, logits: jax.Array, batch: smollm_text.Batch) -> jax.Array:
        """Returns the mean cross-entropy of the answer and the end behind it."""
        answers = jnp.asarray(self.answers)
        ends = jnp.full_like(batch.labels, self.answers[-1])
        targets = jnp.stack([answers[batch.labels], ends], axis=1)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(each.mean(axis=1) * batch.weights) / jnp.sum(batch.weights)

    def right(self, logits: jax.Array, batch: smollm_text.Batch) -> jax.Array:
        """Returns how many answers are right, by the logits of the two answers alone."""
        chosen = jnp.argmax(logits[:, 0, self.answers[:-1]], axis=-1)
        return jnp.sum(batch.weights, where=chosen == batch.labels)


def make_plan(
    params: Any, language: Language, batch: smollm_text.Batch, args: argparse.Namespace
) -> lora_jax.AdapterPlan:
    """Plans adapters of the seven projections of all layers."""
    config = lora_jax.LoraConfig(
        rank=args.rank,
        alpha=2.0 * args.rank,
        targets=tuple(f"layers/{name}" for name in smollm_model.PROJECTIONS),
        use_dora=args.method == "dora",
    )
    return lora_jax.plan_adapters(config, params, language.answer, batch)


def train(
    language: Language,
    params: Any,
    plan: lora_jax.AdapterPlan,
    batches: Sequence[smollm_text.Batch],
    args: argparse.Namespace,
) -> tuple[Any, dict[str, Any]]:
    """Trains adapters with AdamW: a linear warm-up, then a cosine.

    Returns:
        The adapters, and the losses and the tokens a second of the steps.
    """
    adapters = lora_jax.init_adapters(jax.random.key(args.seed), params, plan)
    adapted = lora_jax.adapt(language.answer, plan)
    warm_up = math.ceil(WARM_UP * len(batches))
    optimizer = optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, args.rate, warm_up, len(batches))
    )

    def loss(adapters: Any, params: Any, batch: smollm_text.Batch) -> jax.Array:
        return language.loss(adapted(params, adapters, batch), batch)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapters: Any, state: Any, params: Any, batch: smollm_text.Batch) -> Any:
        value, grads = jax.value_and_grad(loss)(adapters, params, batch)
        updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    state, losses, seconds, seen = optimizer.init(adapters), [], [], set()
    tqdm = minilm.optional_import("tqdm")
    with tqdm.tqdm(batches, desc=args.method, unit="step") as progress:
        for batch in progress:
            start = time.perf_counter()
            adapters, state, value = step(adapters, state, params, batch)
            losses.append(float(value))
            spent = time.perf_counter() - start
            if batch.tokens.shape in seen:  # the first of each shape compiles
                seconds.append(spent / batch.tokens.size)
            seen.add(batch.tokens.shape)
            progress.set_postfix(loss=f"{np.mean(losses[-10:]):.3f}", refresh=False)
    rate = 1 / float(np.median(seconds)) if seconds else math.nan
    return adapters, {"loss": losses, "tokens_per_second": rate}


def accuracy(
    language: Language, model: Model, batches: Sequence[smollm_text.Batch]
) -> float:
    """Returns the share of right answers of a model of batches."""
    right = sum(float(language.right(model(batch), batch)) for batch in batches)
    return right / float(sum(batch.weights.sum() for batch in batches))


def generate(
    model: Model, tokenizer: Any, prompt: str, empty: smollm_model.Cache, count: int
) -> tuple[str, float]:
    """Generates greedily with a cache of keys and values.

    Args:
        model: `(tokens, cache, start)` -> the next token and the cache.
        tokenizer: of the model.
        prompt: to continue.
        empty: a cache for the prompt and `count` more tokens.
        count: how many tokens to generate.

    Returns:
        The text up to the end of the turn, and the tokens a second after the first.
    """
    ids = tokenizer.encode(prompt).ids
    token, cache = model(jnp.array([ids], jnp.int32), empty, 0)
    tokens, seconds = [int(token[0, 0])], []
    for place in range(len(ids), len(ids) + count - 1):
        start = time.perf_counter()
        token, cache = model(token, cache, place)
        tokens.append(int(token[0, 0]))
        seconds.append(time.perf_counter() - start)
    end = tokenizer.token_to_id("<|im_end|>")
    text = tokens[: tokens.index(end)] if end in tokens else tokens
    return tokenizer.decode(text), 1 / float(np.median(seconds[1:]))


def save(folder: pathlib.Path, adapters: Any, plan: lora_jax.AdapterPlan) -> None:
    """Saves adapters in this library's form, and in PEFT's."""
    lora_jax.save_adapters(folder / "adapters", adapters, plan)
    names = {
        f"model.layers.{{}}.{name}": f"layers/{own}"
        for own, (_, name) in smollm_model.PROJECTIONS.items()
    }
    lora_jax.peft.save(
        folder / "peft",
        adapters,
        plan,
        names=names,
        layout="torch",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        task_type="CAUSAL_LM",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Does the whole job, saving and printing as it goes.

    Returns:
        A summary that `json` can write.
    """
    start, size = time.perf_counter(), SIZES["quick" if args.quick else "default"]
    file = smollm_text.fetch(args.cache)
    dense = "*" if args.base == "dense" else ""
    params, config, metadata = smollm_model.load(file, dense)
    tokenizer = smollm_text.make_tokenizer(metadata, params["embed"].shape[0])
    language = Language(config, smollm_text.answer_tokens(tokenizer))

    rng = np.random.default_rng(args.seed)
    sentences = reviews.load(args.cache, smollm_text.NEEDED)
    sides = reviews.split_by_review(list(filter(reviews.is_opinion, sentences)), rng)
    training, test = (
        [side[i] for i in rng.permutation(len(side))[:count]]
        for side, count in zip(sides, size[:2], strict=True)
    )
    batches = smollm_text.make_batches(tokenizer, test)
    plan = make_plan(params, language, batches[0], args)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6
    print(f"{plan.total:,} frozen parameters, {args.base}, {stored:.1f} MB; adapters:")
    print(plan)

    frozen = jax.jit(lora_jax.accept_quantized(language.answer))
    zero_shot = accuracy(language, functools.partial(frozen, params), batches)
    print(f"zero-shot accuracy on {len(test)} sentences: {zero_shot:.1%}")
    steps = [
        batch
        for _ in range(args.epochs)
        for batch in smollm_text.make_batches(tokenizer, training, rng)
    ]
    adapters, history = train(language, params, plan, steps, args)
    adapted = jax.jit(lora_jax.adapt(language.answer, plan))
    learned = accuracy(language, functools.partial(adapted, params, adapters), batches)
    print(f"accuracy after training on {len(training)}: {learned:.1%}")
    save(args.out, adapters, plan)

    merged = lora_jax.merge_adapters(params, adapters, plan)
    decode = language.next_token
    programs = {
        "frozen": functools.partial(jax.jit(lora_jax.accept_quantized(decode)), params),
        "adapted": functools.partial(
            jax.jit(lora_jax.adapt(decode, plan)), params, adapters
        ),
        "merged": functools.partial(jax.jit(lora_jax.accept_quantized(decode)), merged),
    }
    texts = {"review": (smollm_text.TASK, test[0].text), "question": QUESTION}
    prompts = {name: smollm_text.chat(*turns) for name, turns in texts.items()}
    longest = max(len(tokenizer.encode(prompt).ids) for prompt in prompts.values())
    depth, n_out, _ = params["layers"]["key"].shape
    shape = (
        depth,
        1,
        longest + size.generated,
        config.key_heads,
        n_out // config.key_heads,
    )
    empty = {name: jnp.zeros(shape) for name in ("key", "value")}
    generated, speed = {}, {}
    for name, program in programs.items():
        for prompt, text in prompts.items():
            made = generate(program, tokenizer, text, empty, size.generated)
            generated.setdefault(prompt, {})[name], speed[name] = made
    return {
        "method": args.method,
        "base": args.base,
        "rank": args.rank,
        "trainable_parameters": sum(x.size for x in jax.tree.leaves(adapters)),
        "base_megabytes": stored,
        "zero_shot_accuracy": zero_shot,
        "adapter_accuracy": learned,
        "generated": generated,
        "training_tokens_per_second": history["tokens_per_second"],
        "decoded_tokens_per_second": speed,
        "loss": history["loss"],
        "seconds": time.perf_counter() - start,
        "peak_memory_mib": command_line.peak_memory_mib(),
    }


def print_summary(summary: dict[str, Any], folder: pathlib.Path) -> None:
    """Prints what was generated, the speeds, and how to load the adapters."""
    for prompt, texts in summary["generated"].items():
        same = "the same" if texts["adapted"] == texts["merged"] else "ANOTHER TEXT"
        print(
            f"{prompt}: frozen {texts['frozen']!r}, adapted {texts['adapted']!r}, ", end=""
        )
        print(f"merged {same}")
    speeds = summary["decoded_tokens_per_second"].items()
    listed = ", ".join(f"{name} {speed:.1f}" for name, speed in speeds)
    print(
        f"tokens a second: {summary['training_tokens_per_second']:.0f} in training, ",
        end="",
    )
    print(f"{listed} in generation")
    print(f"{summary['seconds']:.0f} s, peak memory {summary['peak_memory_mib']:.0f} MiB")
    print(f"adapters, plan = lora_jax.load_adapters({str(folder / 'adapters')!r})")
    print(f"model = peft.PeftModel.from_pretrained(llama, {str(folder / 'peft')!r})")


def plot(summary: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the loss over the steps."""
    figure = minilm.optional_import("matplotlib.figure").Figure((5, 3.6), dpi=150)
    axes = figure.subplots()
    axes.plot(*command_line.smooth(summary["loss"]))
    axes.set(xlabel="step", ylabel="training loss, mean of 10 steps", ylim=(0, None))
    axes.set_title(f"{summary['method']}, rank {summary['rank']}, {summary['base']} base")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes a language model in its four bits with LoRA or DoRA.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default, add = "default: %(default)s", parser.add_argument
    number = command_line.number
    add("--quick", action="store_true", help="few sentences, at most three minutes")
    add("--method", choices=("lora", "dora"), default="lora", help=default)
    add("--base", choices=("q4", "dense"), default="q4", help="frozen weights; " + default)
    add("--rank", type=number(int, 1, 192), default=8, help=default)
    add("--rate", type=number(float, 0, 1), default=1e-3, help="learning rate; " + default)
    add("--epochs", type=number(int, 1, 1000), default=1, help=default)
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help=default)
    cache_help = "where downloads are, or the two files put there by hand; " + default
    add(
        "--cache", type=command_line.folder, default=minilm.default_cache(), help=cache_help
    )
    out_help = "where to save adapters; default: smollm-METHOD-BASE in the cache"
    add("--out", type=command_line.folder, help=out_help)
    add("--plot", type=command_line.file_in(".png"), help="draw the loss into this file")
    add("--json", type=command_line.file_in(".json"), help="write a summary into this file")
    args = parser.parse_args(argv)
    args.out = args.out or args.cache / f"smollm-{args.method}-{args.base}"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = parse_arguments(argv)
    try:
        for name in ("tqdm", "gguf", "matplotlib") if args.plot else ("tqdm", "gguf"):
            minilm.optional_import(name)
        summary = run(args)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    print_summary(summary, args.out)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(summary, indent=2) + "\n")
    if args.plot:
        plot(summary, args.plot)


if __name__ == "__main__":
    main()
