"""Sentences of product reviews with ratings: read, split, tokenized, batched.

The 3,708 sentences are from 309 reviews (Hu and Liu, 2004); twenty people rated each from
-4 to 4 (Hutto and Gilbert, 2014). They are in the source archive of vaderSentiment.
"""

import pathlib
import tarfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import minilm
import numpy as np

BATCH_SIZE = 32
BUCKETS = (24, 56)  # tokens; 2 % of the sentences are longer and lose their end
NEUTRAL = 0.5  # ratings no further from 0 than this are dropped
TEST_SHARE = 0.2  # of the reviews


class Sentence(NamedTuple):
    """A sentence, the review it is from, and the mean of its ratings."""

    review: str
    rating: float
    text: str


class Examples(NamedTuple):
    """Token ids of each sentence, and `(sentences,)` float32, 1 where favorable."""

    tokens: list[np.ndarray]
    labels: np.ndarray


class Batch(NamedTuple):
    """`BATCH_SIZE` sentences of one bucket, padded to its length."""

    tokens: minilm.Array  # (batch, length), int32
    mask: minilm.Array  # (batch, length), bool, false where a token is padding
    labels: minilm.Array  # (batch,), float32, 1 where favorable and 0 where not
    weights: minilm.Array  # (batch,), float32, 0 where a row only fills the batch up


def load(
    cache: pathlib.Path,
    needed: Sequence[minilm.Package] = (minilm.MODEL, minilm.SENTENCES),
    name: str = "amazonReviewSnippets",
) -> list[Sentence]:
    """Returns all the sentences of a file; `minilm.fetch` has the other arguments."""
    path = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(minilm.fetch(minilm.SENTENCES, cache, needed)) as archive:
        inner: Any = archive.extractfile(path)
        with tarfile.open(fileobj=inner) as files:
            file: Any = files.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            return parse_ratings(file.read().decode())


def parse_ratings(text: str) -> list[Sentence]:
    r"""Parses lines such as `12_3\t-1.85\tthe battery died`, with tabs."""
    rows = [line.split("\t") for line in text.splitlines()]
    return [Sentence(n.split("_")[0], float(rating), t.strip()) for n, rating, t in rows]


def is_opinion(sentence: Sentence) -> bool:
    """Says whether the rating is far enough from neutral for its sign to be a label."""
    return abs(sentence.rating) > NEUTRAL


def split_by_review(
    sentences: Sequence[Sentence], rng: np.random.Generator
) -> tuple[list[Sentence], list[Sentence]]:
    """Splits into train and test, with no review and no text on both sides."""
    names = rng.permutation(sorted({sentence.review for sentence in sentences}))
    held_out = set(names[: round(TEST_SHARE * len(names))].tolist())
    test = [sentence for sentence in sentences if sentence.review in held_out]
    texts = {sentence.text for sentence in test}
    train = [s for s in sentences if s.review not in held_out and s.text not in texts]
    return train, test


def tokenize(tokenizer: Any, sentences: Sequence[Sentence]) -> Examples:
    """Turns texts into token ids, and the signs of the ratings into labels."""
    texts = [sentence.text for sentence in sentences]
    labels = [float(sentence.rating > 0) for sentence in sentences]
    tokens = minilm.tokenize(tokenizer, texts, length=BUCKETS[-1])
    return Examples(tokens, np.array(labels, np.float32))


def make_batches(examples: Examples, rng: np.random.Generator | None = None) -> list[Batch]:
    """Sorts sentences into buckets by length, and cuts the buckets into batches.

    A generator shuffles the sentences of each bucket, and the batches.
    """
    sizes = np.array([len(tokens) for tokens in examples.tokens])
    order = np.arange(len(sizes)) if rng is None else rng.permutation(len(sizes))
    buckets = np.searchsorted(BUCKETS, sizes[order])  # the first that is long enough
    batches = []
    for bucket, length in enumerate(BUCKETS):
        rows = order[buckets == bucket]
        for start in range(0, len(rows), BATCH_SIZE):
            batches.append(_pad(examples, rows[start : start + BATCH_SIZE], length))
    if rng is not None:
        rng.shuffle(batches)
    return batches


def _pad(examples: Examples, rows: np.ndarray, length: int) -> Batch:
    """Makes a batch of these rows, repeating the first as often as it takes."""
    filled = np.append(rows, np.repeat(rows[:1], BATCH_SIZE - len(rows)))
    tokens = np.zeros((BATCH_SIZE, length), np.int32)
    mask = np.zeros((BATCH_SIZE, length), bool)
    for i, row in enumerate(filled):
        ids = examples.tokens[row]
        tokens[i, : len(ids)] = ids
        mask[i, : len(ids)] = True
    weights = (np.arange(BATCH_SIZE) < len(rows)).astype(np.float32)
    return Batch(tokens, mask, examples.labels[filled], weights)
