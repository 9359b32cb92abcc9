"""Loads adapters that torchtune trained."""

import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from lora_jax._core import checks, tree_paths
from lora_jax._io.tensor_files import CheckpointError, TensorFile
from lora_jax.peft.formats.checkpoint import (
    Checkpoint,
    FileDtype,
    check_dtype,
    check_dtypes,
)
from lora_jax.peft.formats.config import PeftConfig
from lora_jax.peft.formats.keys import PREFIX, Module, sort_entries
from lora_jax.peft.layout import Layout
from lora_jax.peft.leaves import make_places
from lora_jax.peft.load import Loaded, Placement, assemble, find_places
from lora_jax.peft.missing import OnTied
from lora_jax.peft.names import NamesArgument
from lora_jax.plan.adapter_plan import AdapterPlan

__all__ = ["load_torchtune"]

MODELS = ("hf", "torchtune")
_SUFFIXES = {
    ".lora_a.weight": ".lora_A.weight",
    ".lora_b.weight": ".lora_B.weight",
    ".magnitude": ".lora_magnitude_vector",
}
# From torchtune's names of modules to the names of Hugging Face, for models like Llama.
_RENAMED = {
    r"layers\.(\d+)\.attn\.(q|k|v)_proj": r"model.layers.\1.self_attn.\2_proj",
    r"layers\.(\d+)\.attn\.output_proj": r"model.layers.\1.self_attn.o_proj",
    r"layers\.(\d+)\.mlp\.w1": r"model.layers.\1.mlp.gate_proj",
    r"layers\.(\d+)\.mlp\.w2": r"model.layers.\1.mlp.down_proj",
    r"layers\.(\d+)\.mlp\.w3": r"model.layers.\1.mlp.up_proj",
    r"output": r"lm_head",
}


def load_torchtune(
    source: str | os.PathLike[str] | Mapping[str, Any],
    params: tree_paths.PyTree,
    fn: Callable[..., Any] | None = None,
    *args: Any,
    alpha: float,
    num_heads: int,
    num_kv_heads: int | None = None,
    model: Literal["hf", "torchtune"] = "hf",
    plan: AdapterPlan | None = None,
    names: NamesArgument = None,
    layout: Layout | None = None,
    on_tied: OnTied = "error",
    strict: bool = True,
    dtype: FileDtype = None,
) -> Loaded:
    """Loads an adapter that torchtune trained, for some params.

    The two rows of a rotary pair are side by side in torchtune, and half a head apart in
    Hugging Face's models. For params of such a model, the rows of `lora_b` and of the
    magnitude of queries and keys are permuted.

    Args:
        source: a safetensors file, or the state dict of the adapter as arrays:
            `layers.0.attn.q_proj.lora_a.weight` and so on.
        params: as in `load`.
        fn: as in `load`.
        args: as in `load`.
        alpha: of the adapter; the state dict does not contain it. The update is multiplied
            by `alpha / rank`.
        num_heads: the number of heads of queries.
        num_kv_heads: the number of heads of keys; None for `num_heads`.
        model: the model of the params: `"hf"`, with the names and the rotary order of
            Hugging Face, or `"torchtune"`.
        plan: as in `load`.
        names: as in `load`, from the names of modules in `model`.
        layout: as in `load`.
        on_tied: as in `load`.
        strict: as in `load`.
        dtype: as in `load`; `"file"` for the dtype of `source`.

    Returns:
        As `load`.

    Raises:
        CheckpointError: as `load`; also if an entry is not of torchtune, if heads do not
            divide its width, or if DoRA is on a layer with a bias, which only torchtune
            multiplies by the magnitude.
        FileNotFoundError, KeyError, ModuleNotFoundError: as `load`.
        TypeError, ValueError: if an argument is not valid.

    References:
        `torchtune.modules.peft`, and `tune_to_peft_adapter_weights` in
        https://github.com/pytorch/torchtune, which leaves the magnitudes as they are.
    """
    checks.check_flags(strict=strict)
    dtype = check_dtype(dtype)
    checks.check_choice("model", model, MODELS)
    checks.check_number("alpha", alpha)
    heads = {"q": num_heads, "k": num_heads if num_kv_heads is None else num_kv_heads}
    for name, count in zip(("num_heads", "num_kv_heads"), heads.values(), strict=True):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} must be a positive integer, got {count!r}.")
    where, arrays = _opened(source)
    state = _State(where, arrays, heads, model)
    check_dtypes(where, arrays)
    entries = sort_entries(where, {key: state.shape(key) for key in state.keys})
    modules = entries.modules
    if model == "hf":
        _check_heads(where, modules, heads)
    ranks = {module.rank for module in modules.values()}
    if len(ranks) != 1:
        raise CheckpointError(
            f"{where}: the adapters of torchtune have one rank, got {sorted(ranks)}."
        )
    config = PeftConfig(
        r=ranks.pop(),
        lora_alpha=alpha,
        target_modules=tuple(modules),
        use_dora=any("m" in module.shapes for module in modules.values()),
    )
    checkpoint = Checkpoint(where, config, state, entries)
    places = make_places(params, fn, args, plan, names, layout)
    placement = find_places(checkpoint, places, on_tied=on_tied)
    if config.use_dora:
        placement.problems.lines += _scaled_biases(placement)
    return assemble(placement, strict, dtype=dtype)


def _scaled_biases(placement: Placement) -> Iterator[str]:
    """Lists the layers with a bias, which DoRA multiplies in torchtune and not here."""
    for site in placement.sites.values():
        bias = placement.places.bias_of(site.path)
        if bias:
            yield (
                f"the adapter of {site.name!r} multiplies the bias {bias!r} too, and DoRA "
                "here does not: merge it where it was trained"
            )


def _check_heads(
    where: str, modules: Mapping[str, Module], heads: Mapping[str, int]
) -> None:
    """Raises unless queries and keys of a layer have heads of one size."""
    for name, module in modules.items():
        other = modules.get(name.replace(".q_proj", ".k_proj"))
        if not name.endswith(".q_proj") or other is None:
            continue
        queries, keys = module.dims.n_out, other.dims.n_out
        if queries * heads["k"] != keys * heads["q"]:
            raise CheckpointError(
                f"{where}: {name!r} has {queries} rows for num_heads={heads['q']}, and "
                f"{other.name!r} has {keys} for num_kv_heads={heads['k']}: the sizes of "
                "these heads differ. Give the numbers of heads of the model."
            )


def _opened(source: Any) -> tuple[str, Any]:
    """The name of the source for messages, and its arrays by name."""
    if isinstance(source, Mapping):
        return "the state dict", source
    path = pathlib.Path(source)
    if path.suffix in (".pt", ".pth", ".bin"):
        raise CheckpointError(
            f"{path} is a pickle, which runs code when it is read, and is not read here: "
            "save the state dict with safetensors.torch.save_file."
        )
    return str(path), TensorFile(path)


class _State:
    """A state dict of torchtune, with PEFT's names for its entries."""

    def __init__(self, where: str, arrays: Any, heads: dict[str, int], model: str) -> None:
        self._arrays, self._heads, self._is_hf = arrays, heads, model == "hf"
        self._where = where
        self.keys = {self._renamed(name): name for name in arrays}

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of an entry."""
        return tuple(np.shape(self._arrays[self.keys[key]]))

    def read(self, key: str) -> np.ndarray:
        """An entry, with its rows in the order of the model."""
        name, own = self.keys[key], self._arrays
        array = own.read(name) if isinstance(own, TensorFile) else np.asarray(own[name])
        match = re.search(r"\.attn\.([qk])_proj\.(lora_b\.weight|magnitude)$", name)
        if match is None or not self._is_hf:
            return array
        heads = self._heads[match[1]]  # from (heads, pairs, 2) to (heads, 2, pairs)
        if len(array) % (2 * heads):
            raise CheckpointError(
                f"{name!r} has {len(array)} rows, which {heads} heads of an even size "
                "cannot have: check num_heads and num_kv_heads."
            )
        pairs = array.reshape(heads, -1, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)

    def _renamed(self, name: str) -> str:
        suffix = next(filter(name.endswith, _SUFFIXES), None)
        if suffix is None:
            raise CheckpointError(
                f"{self._where}: {name!r} is not an entry of a torchtune adapter: names "
                f"must end in {', '.join(_SUFFIXES)}. Give the result of "
                "get_adapter_state_dict."
            )
        module = name.removesuffix(suffix)
        if self._is_hf:
            matches = ((re.fullmatch(p, module), own) for p, own in _RENAMED.items())
            renamed = next((match.expand(own) for match, own in matches if match), None)
            if renamed is None:
                raise CheckpointError(
                    f"{self._where}: no name of {module!r} in the models of Hugging Face "
                    "is known: give model='torchtune' and names={module: path}."
                )
            module = renamed
        return f"{PREFIX}{module}{_SUFFIXES[suffix]}"
