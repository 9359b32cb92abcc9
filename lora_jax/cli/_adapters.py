"""The adapters in a directory, of either format, as what the commands show and compare."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import numpy as np

from lora_jax._core import tree_paths
from lora_jax._io import tensor_files
from lora_jax.checkpoint import FILE, OLD_RECORD, load_adapters
from lora_jax.peft.checkpoint import Checkpoint, is_checkpoint, open_checkpoint
from lora_jax.peft.config import PeftConfig
from lora_jax.peft.keys import Module, Parameters, nesting, without_wrapper
from lora_jax.peft.layout import same_bits
from lora_jax.peft.names import EMBEDDINGS, HEADS, last_word
from lora_jax.peft.tied import may_be_tied
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.config import LoraConfig

Format = Literal["peft", "lora_jax"]
FORMATS = ("peft", "lora_jax")

_PEFT_RECORD = "adapter_config.json"
_GLOB = frozenset("*?[")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapter of one module.

    Args:
        method: `"lora"` or `"dora"`.
        rank: of the factors.
        configured_rank: what the settings say of the rank.
        scale: what multiplies `A @ B`.
        shapes: of the entries as they are stored.
        dtypes: of the entries as they are stored.
        read: gives the entries as `A (*batch, in, rank)`, `B (*batch, rank, out)`, and the
            others as they are.
    """

    method: str
    rank: int
    configured_rank: int
    scale: float
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]
    read: Callable[[], dict[str, np.ndarray]]

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def nbytes(self) -> int:
        """How many bytes the entries have."""
        return sum(
            math.prod(shape) * self.dtypes[name].itemsize
            for name, shape in self.shapes.items()
        )


@dataclasses.dataclass(frozen=True)
class Whole:
    """An array that stands for one of the model, or for rows of one."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a directory of adapters has in it.

    Args:
        format: of the files.
        settings: what the config says, by the format's own names.
        shared: what both formats say, by this library's names.
        adapters: by the name of the module or the path of the weight.
        wholes: arrays that stand for those of the model, by name.
        rows: the names of those arrays that are but rows of an embedding.
        changes_base: how the adapters were made, if that changed the base weights.
        checkpoint: what PEFT wrote; None for the format of this library.
        plan: of the adapters in the format of this library; None for PEFT's.
    """

    format: Format
    settings: dict[str, Any]
    shared: dict[str, Any]
    adapters: dict[str, Adapter]
    wholes: dict[str, Whole]
    rows: frozenset[str] = frozenset()
    changes_base: str = ""
    checkpoint: Checkpoint | None = None
    plan: AdapterPlan | None = None

    @property
    def embeddings(self) -> list[str]:
        """The names of adapters that are those of embeddings of tokens."""
        modules = self.checkpoint.entries.modules if self.checkpoint else {}
        return [n for n, module in modules.items() if may_be_tied(n, module.kind)]

    @property
    def ignored(self) -> list[str]:
        """What to say of the fields of the config that are in use and ignored."""
        fields = self.checkpoint.ignored if self.checkpoint else {}
        return [
            f"ignored, as --allow-field says: {name} {json.dumps(value):.80}"
            for name, value in fields.items()
        ]

    @property
    def changed(self) -> list[str]:
        """What the adapters change of one array and not of those that are tied to it.

        PEFT puts rows into all of them, and has the embedding and the head of a model that
        is tied, where both are saved whole, as two arrays that are equal.
        """
        ends = [n for n in self.wholes if last_word(n) in EMBEDDINGS | HEADS]
        arrays = [self.wholes[name].read() for name in ends] if len(ends) == 2 else []
        equal = ends if arrays and same_bits(*arrays) else []
        wholes = (n for n in self.wholes if n not in self.rows and n not in equal)
        return [*self.adapters, *wholes]


def find_format(directory: pathlib.Path) -> Format:
    """Which format the files of a directory have.

    Raises:
        CheckpointError: if they have none, or both.
        FileNotFoundError: if there is no directory.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory} with adapters in it.")
    is_peft = is_checkpoint(directory)
    own = next((n for n in (FILE, OLD_RECORD) if (directory / n).is_file()), None)
    if is_peft and own:
        raise tensor_files.CheckpointError(
            f"{directory} has {_PEFT_RECORD} and {own}: keep one adapter in a directory."
        )
    if is_peft:
        return "peft"
    if own:
        return "lora_jax"
    inner = sorted(str(file.parent) for file in directory.glob(f"*/{_PEFT_RECORD}"))
    hint = f"; there are adapters in {', '.join(inner)}" if inner else ""
    raise tensor_files.CheckpointError(
        f"{directory} has neither {_PEFT_RECORD} nor {FILE}: it is no directory of "
        f"adapters{hint}."
    )


def read_contents(directory: pathlib.Path, allow_fields: Collection[str] = ()) -> Contents:
    """Reads what a directory of adapters has in it.

    Args:
        directory: of either format.
        allow_fields: of PEFT's config, to ignore; as in `lora_jax.peft.load`.

    Raises:
        CheckpointError: if the files are not what they should be.
        OSError: if they cannot be read.
    """
    if find_format(directory) == "peft":
        return _read_peft(directory, allow_fields)
    return _read_own(directory)


def _read_peft(directory: pathlib.Path, allow_fields: Collection[str]) -> Contents:
    checkpoint = open_checkpoint(directory, allow_fields)
    config, entries = checkpoint.config, checkpoint.entries
    file = checkpoint.arrays
    assert isinstance(file, tensor_files.TensorFile)
    rows = {f"{name}.weight": key for name, key in entries.tokens.items()}
    wholes = entries.wholes | rows
    parameters = Parameters(config.target_parameters or ())
    return Contents(
        format="peft",
        settings=json.loads(config.to_json()),
        shared={
            "rank": config.r,
            "alpha": float(config.lora_alpha),
            "rank_stabilized": config.use_rslora,
            "use_dora": config.use_dora,
            "dropout": config.lora_dropout,
        },
        adapters={
            name: of_module(file, module, config, parameters)
            for name, module in entries.modules.items()
        },
        wholes={name: _whole(file, key) for name, key in wholes.items()},
        rows=frozenset(rows),
        changes_base=str(config.init_lora_weights) if config.changes_base else "",
        checkpoint=checkpoint,
    )


def _configured(module: Module, config: PeftConfig, parameters: Parameters) -> str:
    """What the config calls the module, or the first parameter that it can be."""
    owner, _ = nesting(module.name)
    if module.kind != "experts":
        return without_wrapper(module.name)
    names = parameters.of(owner)
    return next((n for n in names if config.rank_of(n) == module.rank), owner)


def of_module(
    file: Any,
    module: Module,
    config: PeftConfig,
    parameters: Parameters,
) -> Adapter:
    """The adapter of a module of PEFT.

    Args:
        file: of the arrays: `read(name)` gives one, and `file[name]` has its dtype.
        module: which one.
        config: of the adapter.
        parameters: those that the config has adapters of.
    """
    name = _configured(module, config, parameters)

    def read() -> dict[str, np.ndarray]:
        stored = {name: file.read(key) for name, key in module.keys.items()}
        return stored | _factors(stored, module.experts)

    return Adapter(
        method="dora" if "m" in module.keys else "lora",
        rank=module.rank,
        configured_rank=config.rank_of(name),
        scale=config.scale_of(name),
        shapes=module.shapes,
        dtypes={name: np.dtype(file[key].dtype) for name, key in module.keys.items()},
        read=read,
    )


def _factors(stored: Mapping[str, np.ndarray], experts: int) -> dict[str, np.ndarray]:
    """`A (*batch, in, rank)` and `B (*batch, rank, out)`, of the transposed ones."""
    a, b = (stored[name].reshape(len(stored[name]), -1) for name in ("A", "B"))
    if experts:  # (experts * rank, in) and (out, rank * experts)
        rank = len(a) // experts
        a = a.reshape(experts, rank, -1)
        b = b.reshape(len(b), rank, experts).transpose(2, 0, 1)
    return {"A": a.swapaxes(-1, -2), "B": b.swapaxes(-1, -2)}


def _whole(file: tensor_files.TensorFile, key: str) -> Whole:
    return Whole(file[key].shape, np.dtype(file[key].dtype), lambda: file.read(key))


def _read_own(directory: pathlib.Path) -> Contents:
    adapters, plan = load_adapters(directory, dtype="file")
    if plan.trained:
        raise tensor_files.CheckpointError(
            f"{directory} has leaves that are trained without an adapter, and this command "
            f"does not read them: {tree_paths.listed([*plan.trained])}. Convert it to the "
            "format of PEFT first (lora-jax convert --to peft), or use merge_adapters."
        )
    config = plan.config
    names = ("rank", "alpha", "rank_stabilized", "use_dora", "dropout")
    read, rank_of = {}, _ranks(config)
    for path, target in plan.targets.items():
        arrays = {name: np.asarray(value) for name, value in adapters[path].items()}
        read[path] = Adapter(
            method=target.method,
            rank=target.rank,
            configured_rank=rank_of(path),
            scale=target.scale,
            shapes={name: value.shape for name, value in arrays.items()},
            dtypes={name: value.dtype for name, value in arrays.items()},
            read=lambda arrays=arrays: arrays,
        )
    return Contents(
        format="lora_jax",
        settings=json.loads(config.to_json()),
        shared={name: getattr(config, name) for name in names},
        adapters=read,
        wholes={},
        plan=plan,
    )


def _ranks(config: LoraConfig) -> Callable[[str], int]:
    """The rank that a config has for a path, for many of both.

    Of thousands of patterns that are paths only those are tried that a path begins with.
    """
    order = {pattern: place for place, pattern in enumerate(config.rank_pattern)}
    globs = [p for p in order if p.startswith("re:") or not _GLOB.isdisjoint(p)]

    def rank_of(path: str) -> int:
        starts = (path[:end] for end in range(1, len(path) + 1))
        near = {*globs, *(start for start in starts if start in order)}
        own = {p: config.rank_pattern[p] for p in sorted(near, key=order.__getitem__)}
        return tree_paths.look_up(own, path, config.rank)

    return rank_of
