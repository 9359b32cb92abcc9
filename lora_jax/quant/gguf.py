"""Weights of GGUF files, quantized as they are stored.

GGUF is the file format of llama.cpp. The package `gguf` reads the container; the blocks are
dequantized here, in JAX.
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from lora_jax._core import checks, placement, tree_paths
from lora_jax._core.quantized import QuantizedTensor
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.quant import _ggml, inputs, tensors
from lora_jax.quant._gguf_reader import as_checkpoint_error, as_path, open_gguf

__all__ = ["GGUFTensor", "load_gguf", "load_gguf_metadata"]

_FLOATS = ("F32", "F16", "BF16")
_LAYER = re.compile(r"(?:^|(?<=\.))blk\.(\d+)\.")  # in names of tensors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GGUFTensor(QuantizedTensor):
    """A weight `(*batch, out, in)` in a block type of GGUF files; see `load_gguf`.

    A block is a run of 32 or 256 entries along the last axis, the inputs of a linear layer.
    It has its scales and codes in consecutive bytes. All axes but the last are axes of the
    stored array, so it can be sharded like the weight, along the last axis in whole blocks.

    Blocks are dequantized in float32, with the bits of the package `gguf`, and rounded once
    to the dtype of the result. These types are not written: a merged weight cannot be
    quantized again in its type.

    Attributes:
        blocks: `(*batch, out, in / entries * bytes)`, uint8: the bytes of the file, with
            the entries and bytes of one block.
        ggml_type: the block type by its name in ggml, such as `"Q4_K"`.
        weight_dtype: name of the dtype of the dense weight.

    Example:
        >>> import numpy as np
        >>> from lora_jax import quant
        >>> scale = np.array([0.5], np.float16).view(np.uint8)
        >>> codes = np.full(16, 0x9A, np.uint8)  # two codes of four bits, 10 and 9
        >>> block = np.concatenate([scale, codes])[None]
        >>> weight = quant.GGUFTensor(block, ggml_type="Q4_0", weight_dtype="float32")
        >>> weight
        GGUFTensor(shape=(1, 32), dtype=float32, ggml_type='Q4_0')
        >>> quant.dequantize(weight)[:, 14:18]  # half of (10 - 8), half of (9 - 8)
        Array([[1. , 1. , 0.5, 0.5]], dtype=float32)
    """

    blocks: jax.Array
    ggml_type: str = dataclasses.field(metadata={"static": True})
    weight_dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, with the axes of the stack in front."""
        kind, (*rows, n_bytes) = _ggml.TYPES[self.ggml_type], self.blocks.shape
        return (*rows, n_bytes // kind.n_bytes * kind.entries)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the dense weight."""
        return jnp.dtype(self.weight_dtype)

    @property
    def batch_ndim(self) -> int:
        """How many leading axes form the stack: all but the last two."""
        return max(len(self.blocks.shape) - 2, 0)

    def array_specs(self, spec: Sequence[Any], sizes: Mapping[Any, int]) -> "GGUFTensor":
        """The mesh axes of each array: see `QuantizedTensor.array_specs`."""
        entries = _ggml.TYPES[self.ggml_type].entries
        last = placement.axes_of_fold(spec[-1:], self.shape[-1], entries, sizes)
        blocks: Any = PartitionSpec(*spec[:-1], last)
        return dataclasses.replace(self, blocks=blocks)

    def array_with_axes(self) -> tuple[jax.Array, int]:
        """The blocks, which are split like the weight along each axis."""
        return self.blocks, self.ndim

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        """The dense weight, `shape`, in `dtype`, sharded like the blocks."""
        function = functools.partial(_dequantize, dtype=jnp.dtype(dtype).name)
        return placement.automatic(function, self, like=self.blocks, ndim=self.ndim)

    def multiply_row(self, x: jax.Array) -> jax.Array | None:
        """The product with one row: see `QuantizedTensor.multiply_row`."""
        kind = _ggml.TYPES[self.ggml_type]
        if not kind.n_scales or {x.dtype, self.dtype} != {jnp.dtype("float32")}:
            return None
        blocks = self.blocks.reshape(self.shape[0], -1, kind.n_bytes)
        return _ggml.multiply_row(kind, blocks, x)

    def quantize_like(self, weight: jax.Array) -> "GGUFTensor":
        """Raises ValueError: the types of GGUF files are not written."""
        raise ValueError(
            f"{self.ggml_type} and the other types of GGUF files are read and not written: "
            "merge without requantize, and quantize the merged weight in another format, "
            "for example with lora_jax.quantize_params."
        )

    def check(self) -> None:
        """Raises ValueError unless the blocks and settings fit each other."""
        inputs.check_weight_dtype(self.weight_dtype)
        inputs.check_present(blocks=self.blocks)
        if self.ggml_type not in _ggml.TYPES:
            raise ValueError(
                f"ggml_type must be one of {', '.join(_ggml.TYPES)}, got "
                f"{self.ggml_type!r}."
            )
        shape, n_bytes = tuple(self.blocks.shape), _ggml.TYPES[self.ggml_type].n_bytes
        if not shape or 0 in shape or shape[-1] % n_bytes:
            raise ValueError(
                f"blocks of the shape {shape} are not rows of blocks of {n_bytes} bytes, "
                f"which {self.ggml_type} has."
            )
        inputs.check_leaf("blocks", self.blocks, shape, jnp.uint8)


tensors.register_format(GGUFTensor, "gguf")


@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def _dequantize(quantized: GGUFTensor, dtype: str) -> jax.Array:
    kind = _ggml.TYPES[quantized.ggml_type]
    rows = quantized.blocks.shape[:-1]
    blocks = quantized.blocks.reshape(*rows, -1, kind.n_bytes)
    return kind.values(*kind.fields(blocks)).astype(dtype).reshape(quantized.shape)


def load_gguf(
    path: str | os.PathLike[str],
    patterns: Any = "*",
    *,
    stack: bool = False,
    dense: Any = (),
    rope_heads: Mapping[Any, int] | None = None,
    shardings: Mapping[Any, Sharding] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, Any]:
    """Loads the weights of a GGUF file, quantized as they are in the file.

    Shapes are in the order of JAX: a linear weight is `(out, in)`, an embedding
    `(vocabulary, width)`. The file is memory-mapped, and one weight after the other is
    read from it. So beside the loaded weights, at most one weight is in memory. A model may
    be split into files `NAME-00001-of-00003.gguf`: the path of one of them loads all.

    All patterns are globs, or regular expressions `"re:..."`, on the names in the result.

    Args:
        path: of the file.
        patterns: one pattern or several, of the tensors to load.
        stack: stacks the tensors `blk.0.<role>`, `blk.1.<role>`, ... of all layers along a
            new first axis. The stack has the name `blk.<role>`.
        dense: patterns of tensors that are dequantized when they are loaded.
        rope_heads: patterns of tensors whose rows are permuted, and their numbers of heads.
            llama.cpp stores the query and key projections of some architectures (`llama`
            among them) for rope on pairs of neighboring rows. Here the rows of each head
            get their original order back, for rope that pairs a row with the one half a
            head later. The numbers are `<architecture>.attention.head_count` and
            `<architecture>.attention.head_count_kv` in `load_gguf_metadata`.
        shardings: patterns and shardings of the weights, with the axes of the result. A
            shard along the last axis has to be a whole number of blocks.
        dtype: of weights that are dequantized: float32, bfloat16 or float16.

    Returns:
        A dict by name. Tensors in `Q4_0`, `Q4_1`, `Q5_0`, `Q5_1`, `Q8_0`, `Q2_K`, `Q3_K`,
        `Q4_K`, `Q5_K`, `Q6_K` or `IQ4_NL` are `GGUFTensor`s, and those in `F32`, `F16` or
        `BF16` are arrays of the dtype in the file.

    Raises:
        CheckpointError: if the file is not a complete GGUF file, or a tensor to load has
            another type, or no entries.
        FileNotFoundError: if the file, or another one of a split model, does not exist.
        ModuleNotFoundError: if the package gguf is not installed.
        TypeError: if a pattern or a number of heads is of the wrong type.
        ValueError: if a pattern matches no tensor, the rows are not those of so many heads,
            layers cannot be stacked because they lack a tensor or have tensors of different
            types or shapes, or a sharding does not split a weight into whole blocks.
    """
    file = as_path(path)
    wanted = tree_paths.as_texts("patterns", patterns)
    to_dense = tree_paths.as_texts("dense", dense)
    heads = tree_paths.as_entries("rope_heads", rope_heads or {})
    heads = {p: inputs.check_count(f"rope_heads[{p!r}]", n) for p, n in heads.items()}
    placed = tree_paths.as_entries("shardings", shardings or {})
    weight_dtype = jnp.dtype(dtype).name
    inputs.check_weight_dtype(weight_dtype)
    stored = {tensor.name: tensor for tensor in open_gguf(file).tensors}
    groups = _groups(stored, stack)
    tree_paths.check_matched("patterns", wanted, groups, f"tensor of {file}")
    groups = {n: group for n, group in groups.items() if tree_paths.first_match(wanted, n)}
    choices = {"dense": to_dense, "rope_heads": heads, "shardings": placed}
    for argument, entries in choices.items():
        tree_paths.check_matched(argument, entries, groups, f"loaded tensor of {file}")
    if stack:
        _check_stacks(groups, stored)
    loaded = {}
    for name, group in groups.items():
        with checks.at_path(name):
            number = tree_paths.look_up(heads, name, None)
            parts = [_rows(file, stored[member], number) for member in group.values()]
            weight: Any = np.array(parts[0]) if None in group else np.stack(parts)
            kind = stored[next(iter(group.values()))].tensor_type.name
            if kind not in _FLOATS:
                weight = GGUFTensor(weight, kind, weight_dtype)
            weight = _place(weight, tree_paths.look_up(placed, name, None))
            if tensors.is_quantized(weight) and tree_paths.first_match(to_dense, name):
                weight = tensors.dequantize(weight)
            loaded[name] = weight
    return loaded


def load_gguf_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads the metadata of a GGUF file: settings of the model, and its tokenizer.

    Args:
        path: of the file.

    Returns:
        A dict by key, such as `"general.architecture"`, with strings, numbers, bools and
        lists of these.

    Raises:
        CheckpointError: if the file is not a complete GGUF file.
        FileNotFoundError: if the file does not exist.
        ModuleNotFoundError: if the package gguf is not installed.
    """
    file = as_path(path)
    fields = open_gguf(file).fields
    own = {key: field for key, field in fields.items() if not key.startswith("GGUF.")}
    with as_checkpoint_error(file):
        return {key: field.contents() for key, field in own.items()}


def _groups(names: Iterable[str], stack: bool) -> dict[str, dict[int | None, str]]:
    """The tensors of each weight by layer, in order; the layer is None without a stack."""
    groups: dict[str, dict[int | None, str]] = {}
    for name in names:
        found = _LAYER.search(name) if stack else None
        if found is None:
            groups[name] = {None: name}
        else:
            role = f"{name[: found.start()]}blk.{name[found.end() :]}"
            groups.setdefault(role, {})[int(found[1])] = name
    return {role: dict(sorted(group.items())) for role, group in groups.items()}


def _check_stacks(
    groups: Mapping[str, Mapping[int | None, str]], stored: Mapping[str, Any]
) -> None:
    """Raises unless each stack has one tensor for each layer, all of one kind."""
    layers: dict[str, set[Any]] = {}  # of the stacks with a prefix
    for role, group in groups.items():
        layers.setdefault(role.partition("blk.")[0], set()).update(group)
    for role, group in groups.items():
        if None in group:
            continue
        last = max(layers[role.partition("blk.")[0]])
        missing = sorted({*range(last + 1)} - {*group})
        kinds: dict[str, list[int | None]] = {}
        for layer, name in group.items():
            shape = tuple(map(int, stored[name].shape[::-1]))
            kinds.setdefault(f"{stored[name].tensor_type.name} {shape}", []).append(layer)
        if missing or len(kinds) > 1:
            found = "; ".join(f"{kind} in the layers {of}" for kind, of in kinds.items())
            lacks = f"; none in the layers {missing}" if missing else ""
            raise ValueError(
                f"the layers of {role!r} cannot be stacked, they have {found}{lacks}: load "
                "them with stack=False, or leave them out of patterns."
            )


def _rows(path: pathlib.Path, tensor: Any, heads: int | None) -> np.ndarray:
    """The stored array of a tensor, with its rows in the order of half-split rope."""
    kind, array = tensor.tensor_type.name, tensor.data
    if kind not in _FLOATS and kind not in _ggml.TYPES:
        raise CheckpointError(
            f"{path}: the tensor {tensor.name!r} has the type {kind}, and only "
            f"{', '.join((*_FLOATS, *_ggml.TYPES))} are read."
        )
    if array.size == 0:
        raise CheckpointError(f"{path}: the tensor {tensor.name!r} has no entries.")
    if kind == "BF16":
        array = array.view(jnp.bfloat16)
    if heads is None:
        return array
    axis = max(array.ndim - 2, 0)
    n_rows = array.shape[axis]
    if n_rows % (2 * heads) or (array.ndim == 1 and kind not in _FLOATS):
        raise ValueError(
            f"a tensor {tuple(map(int, tensor.shape[::-1]))} does not have the rows of "
            f"{heads} heads of an even size, which rope_heads says."
        )
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    pairs = array.reshape(*before, heads, n_rows // (2 * heads), 2, *after)
    return pairs.swapaxes(axis + 1, axis + 2).reshape(array.shape)


def _place(weight: Any, sharding: Sharding | None) -> Any:
    """A weight of NumPy arrays as one of JAX arrays with a sharding."""
    if sharding is None:
        return jax.tree.map(jnp.asarray, weight)
    if not isinstance(sharding, NamedSharding):
        return jax.device_put(weight, sharding)
    places = placement.shardings(weight, sharding)
    last = len(weight.shape) - 1
    if any(sharding.spec[last:]) and not any(jax.tree.leaves(places)[0].spec[last:]):
        raise ValueError(
            f"{sharding.spec} does not split the last axis of {weight!r} into whole blocks "
            f"of {_ggml.TYPES[weight.ggml_type].entries} entries: split another axis."
        )
    return jax.device_put(weight, places)
