"""Compares encoders with quantized kernels to the same encoders in full precision.

One is all-MiniLM-L6-v2, pretrained, with 6 layers of width 384. The other has the sizes of
BERT base, 12 layers of width 768, and random kernels that keep the size of what they are
applied to: errors add up over twice as many layers there, but nothing was learned that
could depend on few of the features. What is compared is the mean of a sentence's hidden
states, and the logits of each of its tokens with the word embeddings as the head.

    python docs/studies/quantized_accuracy.py
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

import command_line
import minilm
import reviews
import sentiment

import lora_jax

LAYERS, WIDTH, HIDDEN = 12, 768, 3072  # of BERT base
HEADINGS = (
    "encoder",
    "base",
    "MB of layers",
    "embeddings: rms",
    "max",
    "least cosine",
    "logits: rms",
    "max",
    "least cosine",
)


def random_encoder(
    key: jax.Array, words: int, positions: int, layers: int, width: int, hidden: int
) -> minilm.Params:
    """Returns params like those of `minilm.load`, with embeddings and kernels drawn.

    Args:
        key: a `jax.random` key.
        words: size of the vocabulary.
        positions: most tokens of a sentence.
        layers: how many there are.
        width: features of a token, a multiple of `minilm.HEADS`.
        hidden: features between the two products of an MLP.
    """
    keys = iter(jax.random.split(key, 6 * layers + 3))

    def normal(rows: int, columns: int, std: float) -> jax.Array:
        return std * jax.random.normal(next(keys), (rows, columns))

    def dense(n_in: int, n_out: int) -> minilm.Params:
        return {"kernel": normal(n_in, n_out, n_in**-0.5), "bias": jnp.zeros(n_out)}

    def norm() -> minilm.Params:
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    def layer() -> minilm.Params:
        names = ("query", "key", "value", "output")
        attention = {name: dense(width, width) for name in names}
        mlp = {"up": dense(width, hidden), "down": dense(hidden, width), "norm": norm()}
        return {"attention": attention | {"norm": norm()}, "mlp": mlp}

    rows = {"word": words, "position": positions, "token_type": 2}
    embeddings = {name: normal(count, width, 0.02) for name, count in rows.items()}
    return {
        "embeddings": embeddings | {"norm": norm()},
        "encoder": {f"layer_{i}": layer() for i in range(layers)},
    }


@jax.jit
def outputs(params: minilm.Params, batch: reviews.Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the hidden states `(batch, length, width)`, and their means by sentence."""
    hidden = lora_jax.accept_quantized(minilm.encode)(params, batch.tokens, batch.mask)
    return hidden, minilm.mean_pool(hidden, batch.mask)


def embeddings_and_logits(
    params: minilm.Params, batch: reviews.Batch
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(sentences, width)`, and `(tokens, words)` of the tokens that are real."""
    hidden, pooled = outputs(params, batch)
    real = np.asarray(batch.mask) & (batch.weights > 0)[:, None]
    logits = hidden[real] @ params["embeddings"]["word"].T
    return np.asarray(pooled)[batch.weights > 0], np.asarray(logits)


def deviations(actual: np.ndarray, expected: np.ndarray) -> tuple[float, float, float]:
    """Measures how far some rows are from those of full precision.

    Args:
        actual: `(rows, features)`.
        expected: `(rows, features)`, of full precision.

    Returns:
        The root of the mean square and the largest of the differences, both over the root
        of the mean square of what is expected; and the least cosine of two rows. Formed in
        float64.
    """
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    difference, size = actual - expected, np.sqrt(np.mean(expected**2))
    lengths = np.linalg.norm(actual, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = np.sum(actual * expected, axis=1) / lengths
    rms = np.sqrt(np.mean(difference**2))
    return rms / size, np.max(np.abs(difference)) / size, np.min(cosines)


def rows(title: str, params: minilm.Params, batch: reviews.Batch) -> Iterator[list[str]]:
    """Yields the rows of an encoder in the table, one for each base."""
    expected = embeddings_and_logits(params, batch)
    for base in sentiment.BASES:
        stored = sentiment.quantize_base(params, base)
        row = [title, base, f"{sentiment.megabytes(stored['encoder']):.1f}"]
        if base != "full":
            actual = embeddings_and_logits(stored, batch)
            for rms, largest, cosine in map(deviations, actual, expected):
                row += [f"{rms:.2%}", f"{largest:.2%}", f"{cosine:.5f}"]
        yield row + [""] * (len(HEADINGS) - len(row))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line: prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cache, default = minilm.default_cache(), "where downloads are; default: %(default)s"
    parser.add_argument("--cache", type=command_line.folder, default=cache, help=default)
    args = parser.parse_args(argv)
    try:
        params, tokenizer = minilm.load(args.cache)
        sentences = reviews.load(args.cache)[: reviews.BATCH_SIZE]
    except (OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    batch, *_ = reviews.make_batches(reviews.tokenize(tokenizer, sentences))
    words, positions = (params["embeddings"][x].shape[0] for x in ("word", "position"))
    sizes = (words, positions, LAYERS, WIDTH, HIDDEN)
    encoders = {
        "MiniLM, 6 layers, pretrained": params,
        "BERT base, 12 layers, random": random_encoder(jax.random.key(0), *sizes),
    }
    print("| " + " | ".join(HEADINGS) + " |")
    print("| --- " * len(HEADINGS) + "|")
    for title, encoder in encoders.items():
        for row in rows(title, encoder, batch):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
