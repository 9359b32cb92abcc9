"""Trains adapters for eight tenants over one frozen language model, in one program.

The model is SmolLM2-135M in its four bits. Each tenant has a question about sentences of
product reviews, words for the answers, sentences to train on, a rank and a learning rate.
Tenants come and go while others train: there are six slots. In the middle, those that are
present and the frozen model answer about one sentence. The adapters of each tenant are
saved, and compared with the adapters that it has after training alone.

    pip install "lora_jax[examples]"      # or, in a clone: pip install -e ".[examples]"
    python docs/examples/tenants.py --quick
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
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
from tenants_service import Batch, Service, State, cross_entropy

import lora_jax

SLOTS = 6
EACH = 2  # rows of a slot in a batch
LENGTH = 32  # tokens; longer sentences are left out
ANSWER = 2  # tokens: a word and the end of the turn
GENERATED = 3  # tokens
TEST = 12  # sentences of each tenant that it does not train on
PROMPT = "Review: {}\nAnswer:"
TARGETS = tuple(f"layers/{name}" for name in smollm_model.PROJECTIONS)
SAME = 1e-3  # of the largest entry: what sums in another order may change in training
# Adam divides by the size of the gradient. A larger `eps` than its default keeps it from
# magnifying the rounding errors of gradients near 0, which depend on the batch.
EPSILON = 1e-2
EXAMPLES = """examples:
  python tenants.py --quick          less than two minutes on two free cores
  python tenants.py --steps 200 --json summary.json
"""


class Tenant(NamedTuple):
    """A tenant, its question, and how and when it trains.

    Attributes:
        name: of its folder, too.
        answers: the words for no and for yes.
        asks: the question, about a sentence.
        rank: of its adapters.
        rate: its learning rate.
        stays: from which to which share of all steps.
        every: the number of batches whose gradients make a step.
    """

    name: str
    answers: tuple[str, str]
    asks: Callable[[reviews.Sentence], bool]
    rank: int
    rate: float
    stays: tuple[float, float]
    every: int = 1


def is_favorable(sentence: reviews.Sentence) -> bool:
    """Says whether people rated the sentence above 0."""
    return sentence.rating > 0


def is_long(sentence: reviews.Sentence) -> bool:
    """Says whether the sentence has more than twelve words."""
    return len(sentence.text.split()) > 12


def is_personal(sentence: reviews.Sentence) -> bool:
    """Says whether the sentence is about its author."""
    return not {"i", "my", "me", "we"}.isdisjoint(sentence.text.lower().split())


TENANTS = (
    Tenant("ada", (" bad", " good"), is_favorable, 2, 5e-3, (0.0, 0.5)),
    Tenant("ben", (" down", " up"), is_favorable, 4, 3e-3, (0.0, 0.6)),
    Tenant("cleo", (" short", " long"), is_long, 8, 2e-3, (0.0, 1.0)),
    Tenant("dan", (" sell", " buy"), is_favorable, 16, 2e-3, (0.1, 0.8), every=2),
    Tenant("eve", (" general", " personal"), is_personal, 8, 2e-3, (0.1, 0.9)),
    Tenant("finn", (" false", " true"), is_favorable, 4, 3e-3, (0.2, 1.0)),
    Tenant("gail", (" -", " +"), is_favorable, 2, 5e-3, (0.5, 1.0)),
    Tenant("hugo", (" few", " many"), is_long, 16, 1e-3, (0.6, 1.0)),
)


class Model(NamedTuple):
    """The functions of params that the service adapts."""

    config: smollm_model.Config

    def answer(self, params: Any, tokens: jax.Array, last: jax.Array) -> jax.Array:
        """Returns the logits of the tokens behind `last`, `(rows, ANSWER, vocabulary)`."""
        features, _ = smollm_model.apply(params, tokens, self.config)
        places = last[:, None] + np.arange(ANSWER)[None]
        chosen = jnp.take_along_axis(features, places[..., None], axis=1)
        return chosen @ params["embed"].T

    def generate(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Returns the most likely tokens behind prompts, `(rows, GENERATED)`."""
        rows, length = tokens.shape
        depth, n_out, _ = params["layers"]["key"].shape
        heads = self.config.key_heads
        shape = depth, rows, length + GENERATED, heads, n_out // heads
        cache = {name: jnp.zeros(shape) for name in ("key", "value")}

        def step(carry: Any, start: Any) -> tuple[Any, jax.Array]:
            tokens, cache = carry
            features, cache = smollm_model.apply(params, tokens, self.config, cache, start)
            logits = features[:, -1:] @ params["embed"].T
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return (token, cache), token[:, 0]

        carry, first = step((tokens, cache), 0)
        _, others = jax.lax.scan(step, carry, length + jnp.arange(GENERATED - 1))
        return jnp.concatenate([first[:, None], others.T], axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Client:
    """What a tenant brings along.

    Attributes:
        tenant: who it is.
        plan: of its adapters.
        adapters: at the start.
        batches: `EACH` sentences for each step of its stay.
        test: `TEST` others.
        start: the step at which it comes.
    """

    tenant: Tenant
    plan: lora_jax.AdapterPlan
    adapters: Any
    batches: list[Batch]
    test: Batch
    start: int

    @property
    def stop(self) -> int:
        """The step at which it has gone."""
        return self.start + len(self.batches)


class Served(NamedTuple):
    """The losses of a tenant on its `test`, and the folder of its adapters."""

    before: float
    after: float
    folder: pathlib.Path


IDLE = Batch(
    tokens=np.zeros((EACH, LENGTH), np.int32),
    last=np.zeros(EACH, np.int32),
    answer=np.zeros((EACH, ANSWER), np.int32),
    weights=np.zeros(EACH, np.float32),
)


def make_batch(
    tokenizer: Any, tenant: Tenant, sentences: Sequence[reviews.Sentence]
) -> Batch:
    """Returns sentences with a tenant's answers."""
    words = [tokenizer.encode(word).ids for word in tenant.answers]
    if any(len(ids) != 1 for ids in words):
        raise ValueError(
            f"the answers {tenant.answers} are not of one token each: {words}."
        )
    end = tokenizer.token_to_id("<|im_end|>")
    tokens, last, answer = np.zeros((len(sentences), LENGTH), np.int32), [], []
    for row, sentence in zip(tokens, sentences, strict=True):
        prompt = tokenizer.encode(PROMPT.format(sentence.text)).ids
        last.append(len(prompt) - 1)
        answer.append([*words[tenant.asks(sentence)], end])
        row[: len(prompt) + 1] = [*prompt, answer[-1][0]]
    weights = np.full(len(sentences), 1 / (EACH * tenant.every), np.float32)
    return Batch(tokens, np.array(last, np.int32), np.array(answer, np.int32), weights)


def make_clients(
    model: Any,
    params: Any,
    tokenizer: Any,
    sentences: Sequence[reviews.Sentence],
    args: argparse.Namespace,
) -> list[Client]:
    """Prepares the tenants, each with its own part of the sentences."""
    rng, clients = np.random.default_rng(args.seed), []
    parts = np.array_split(rng.permutation(len(sentences)), len(TENANTS))
    for number, (tenant, part) in enumerate(zip(TENANTS, parts, strict=True)):
        own = [sentences[i] for i in part]
        start, stop = (round(share * args.steps) for share in tenant.stays)
        stop -= (stop - start) % tenant.every
        drawn = rng.integers(TEST, len(own), (stop - start, EACH))
        batches = [make_batch(tokenizer, tenant, [own[i] for i in some]) for some in drawn]
        test = make_batch(tokenizer, tenant, own[:TEST])
        config = lora_jax.LoraConfig(tenant.rank, 2.0 * tenant.rank, targets=TARGETS)
        plan = lora_jax.plan_adapters(config, params, model.answer, test.tokens, test.last)
        key = jax.random.fold_in(jax.random.key(args.seed), number)
        adapters = lora_jax.init_adapters(key, params, plan)
        clients.append(Client(tenant, plan, adapters, batches, test, start))
    return clients


def next_batch(
    present: Mapping[int, Client], now: int
) -> tuple[np.ndarray, Batch, np.ndarray]:
    """Returns the slot of each row, the rows of all slots, and which slots step."""
    slots, step, parts = np.full(SLOTS, -1, np.int32), np.zeros(SLOTS, bool), [IDLE] * SLOTS
    for slot, client in present.items():
        own = now - client.start
        slots[slot], parts[slot] = slot, client.batches[own]
        step[slot] = (own + 1) % client.tenant.every == 0
    batch = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
    return np.repeat(slots, EACH), batch, step


def serve(
    service: Service,
    state: State,
    params: Any,
    clients: Sequence[Client],
    folder: pathlib.Path,
    in_the_middle: Callable[[State, Mapping[int, Client]], None],
) -> dict[str, Served]:
    """Trains the adapters of tenants that come and go.

    Args:
        service: with `SLOTS` slots.
        state: of the service; donated.
        params: of the frozen model.
        clients: the tenants; at most `SLOTS` of them stay at the same time.
        folder: to save adapters in.
        in_the_middle: is called after half of the steps, before any tenant goes, with the
            state and the tenants by slot.

    Returns:
        What each tenant has, by its name.
    """
    tqdm = minilm.optional_import("tqdm").tqdm
    present: dict[int, Client] = {}
    before, served = {}, {}
    steps = max(client.stop for client in clients)

    def loss(slot: int, client: Client) -> float:
        slots = np.full(TEST, slot, np.int32)
        return float(service.forward(state, params, slots, client.test).mean())

    for now in tqdm(range(steps + 1), desc="training", unit="step"):
        if now == steps // 2:
            in_the_middle(state, present)
        for slot, client in [*present.items()]:
            if client.stop == now:
                name = client.tenant.name
                service.save(state, slot, client.plan, folder / name)
                served[name] = Served(before[name], loss(slot, client), folder / name)
                del present[slot]
                tqdm.write(f"step {now}: {name} leaves slot {slot}")
        for client in clients:
            if client.start == now:
                slot = min({*range(SLOTS)} - {*present})
                name, rate = client.tenant.name, client.tenant.rate
                state = service.join(state, slot, client.adapters, client.plan, rate)
                before[name], present[slot] = loss(slot, client), client
                tqdm.write(f"step {now}: {name} takes slot {slot}")
        if present:
            slots, batch, step = next_batch(present, now)
            state, _ = service.forward_backward(state, params, slots, batch)
            state = service.optim_step(state, step)
    return served


@functools.partial(jax.jit, static_argnums=0)
def grads_alone(model: Any, plan: Any, adapters: Any, params: Any, batch: Batch) -> Any:
    """Returns the gradients of one tenant's adapters, without a stack."""
    adapted = lora_jax.adapt(model.answer, plan)

    def loss(adapters: Any) -> jax.Array:
        logits = adapted(params, adapters, batch.tokens, batch.last)
        return jnp.sum(batch.weights * cross_entropy(logits, batch))

    return jax.grad(loss)(adapters)


def train_alone(model: Any, params: Any, client: Client) -> dict[str, lora_jax.Adapter]:
    """Returns the adapters that a tenant has after its steps without the service."""
    optimizer = optax.adamw(client.tenant.rate, eps=EPSILON)

    @jax.jit
    def step(adapters: Any, state: Any, parts: Any) -> Any:
        grads = jax.tree.map(lambda *leaves: sum(leaves), *parts)
        updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    adapters, every = client.adapters, client.tenant.every
    state = optimizer.init(adapters)
    for first in range(0, len(client.batches), every):
        some = client.batches[first : first + every]
        parts = [grads_alone(model, client.plan, adapters, params, part) for part in some]
        adapters, state = step(adapters, state, parts)
    return adapters


def difference(adapters: Any, others: Any) -> float:
    """Returns the largest difference of entries, over the largest entry of the array."""
    trees = jax.device_get((adapters, others))
    pairs = zip(*map(jax.tree.leaves, trees), strict=True)
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Does the whole job, saving and printing as it goes.

    Returns:
        A summary that `json` can write.
    """
    start = time.perf_counter()
    params, config, metadata = smollm_model.load(smollm_text.fetch(args.cache))
    tokenizer = smollm_text.make_tokenizer(metadata, params["embed"].shape[0])
    model = Model(config)
    sentences = [
        sentence
        for sentence in reviews.load(args.cache, smollm_text.NEEDED)
        if reviews.is_opinion(sentence)
        and len(tokenizer.encode(PROMPT.format(sentence.text)).ids) < LENGTH
    ]
    clients = make_clients(model, params, tokenizer, sentences, args)
    widest = max(clients, key=lambda client: client.tenant.rank)
    stack, plan = lora_jax.stack_adapters([widest.adapters], [widest.plan], slots=SLOTS)
    adamw = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, eps=EPSILON)
    service = Service(model, plan, adamw)
    answers: dict[str, str] = {}

    def ask(state: State, present: Mapping[int, Client]) -> None:
        prompt = np.array(tokenizer.encode(PROMPT.format(args.sentence)).ids, np.int32)
        slots = np.array([-1, *present], np.int32)
        tokens = service.sample(state, params, slots, np.tile(prompt, (len(slots), 1)))
        names = ["frozen model", *(client.tenant.name for client in present.values())]
        texts = tokenizer.decode_batch(tokens.tolist())
        answers.update(zip(names, texts, strict=True))

    served = serve(service, service.start(stack), params, clients, args.out, ask)
    rows = {}
    for client in clients:
        tenant, own = client.tenant, served[client.tenant.name]
        saved, _ = lora_jax.load_adapters(own.folder / "adapters")
        rows[tenant.name] = {
            "answers": tenant.answers,
            "rank": tenant.rank,
            "rate": tenant.rate,
            "steps": len(client.batches) // tenant.every,
            "loss_before": own.before,
            "loss_after": own.after,
            "folder": str(own.folder / "peft"),
            "difference": difference(saved, train_alone(model, params, client)),
        }
    return {
        "tenants": rows,
        "sentence": args.sentence,
        "answers": answers,
        "compilations": dict(service.compilations),
        "seconds": time.perf_counter() - start,
        "peak_memory_mib": command_line.peak_memory_mib(),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """Prints the answers in the middle, and a table of the tenants."""
    print(f"in the middle, about {summary['sentence']!r}:")
    for name, text in summary["answers"].items():
        print(f"  {name:14}{text!r}")
    head = f"{'tenant':8}{'answers':22}{'rank':>4}{'rate':>8}{'steps':>7}"
    print(f"{head}{'loss':>15}  {'alone':22}saved for PEFT in")
    for name, row in summary["tenants"].items():
        words = " or ".join(word.strip() for word in row["answers"])
        losses = f"{row['loss_before']:.2f} -> {row['loss_after']:.2f}"
        same = "equal" if row["difference"] <= SAME else "DIFFERENT"
        alone = f"{same}, to {row['difference']:.0e}"
        print(
            f"{name:8}{words:22}{row['rank']:4}{row['rate']:8}{row['steps']:7}"
            f"{losses:>15}  {alone:22}{row['folder']}"
        )
    counts = ", ".join(f"{name} {n}" for name, n in summary["compilations"].items())
    print(f"compilations: {counts}")
    print(f"{summary['seconds']:.0f} s, peak memory {summary['peak_memory_mib']:.0f} MiB")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Trains adapters for eight tenants over one frozen language model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default, add = "default: %(default)s", parser.add_argument
    number = command_line.number
    add("--quick", action="store_true", help="the same as --steps 20")
    add("--steps", type=number(int, 20, 100000), default=40, help=default)
    add("--sentence", default="the picture is sharp and i love it", help=default)
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help=default)
    cache_help = "where downloads are, or the two files put there by hand; " + default
    add(
        "--cache", type=command_line.folder, default=minilm.default_cache(), help=cache_help
    )
    add("--out", type=command_line.folder, help="default: tenants in the cache")
    add("--json", type=command_line.file_in(".json"), help="write a summary into this file")
    args = parser.parse_args(argv)
    args.steps = 20 if args.quick else args.steps
    args.out = args.out or args.cache / "tenants"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = parse_arguments(argv)
    try:
        for name in ("tqdm", "gguf"):
            minilm.optional_import(name)
        summary = run(args)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    print_summary(summary)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
