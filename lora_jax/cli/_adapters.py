"""The adapters in a directory or a file, in any format."""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax._io import tensor_files, tensor_streams
from lora_jax._io.tensor_streams import Span
from lora_jax.checkpoint import FILE, OLD_RECORD, load_adapters
from lora_jax.layers.lora import Adapters
from lora_jax.peft.formats.checkpoint import Checkpoint, FileDtype
from lora_jax.peft.formats.config import PeftConfig
from lora_jax.peft.formats.dialects import DIALECTS
from lora_jax.peft.formats.keys import Module, Parameters, nesting, without_wrapper
from lora_jax.peft.formats.opening import find_dialect, open_adapter
from lora_jax.peft.layout import same_bits
from lora_jax.peft.missing import may_be_tied
from lora_jax.peft.words import EMBEDDINGS, HEADS, last_word
from lora_jax.plan import parts, trained_leaves
from lora_jax.plan.adapter_plan import AdapterPlan, Target
from lora_jax.plan.config import LoraConfig

OWN = "lora_jax"
FORMATS = (DIALECTS[0], OWN, *DIALECTS[1:])

_PEFT_RECORD = "adapter_config.json"
_GLOB = frozenset("*?[")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapter of one module.

    Args:
        method: `"lora"` or `"dora"`.
        shape: of the weight, or of its adapted part; empty if it is not known.
        rank: of the factors.
        configured_rank: the rank in the settings.
        scale: what multiplies `A @ B`.
        entries: the shape and dtype of each stored array.
        read: returns the values, with `A (*batch, in, rank)` and `B (*batch, rank, out)`;
            the other arrays as stored.
    """

    method: str
    shape: tuple[int, ...]
    rank: int
    configured_rank: int
    scale: float
    entries: Mapping[str, Any]
    read: Callable[[], dict[str, np.ndarray]]

    @property
    def dtypes(self) -> set[np.dtype]:
        """The dtypes of the stored arrays."""
        return {np.dtype(entry.dtype) for entry in self.entries.values()}

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(math.prod(entry.shape) for entry in self.entries.values())

    @property
    def nbytes(self) -> int:
        """The size of the stored arrays in bytes."""
        return sum(map(tensor_streams.count_bytes, self.entries.values()))


@dataclasses.dataclass(frozen=True)
class Contents:
    """The content of a directory of adapters.

    Args:
        directory: of the files, for error messages.
        format: of the files.
        settings: the fields of the config, with the names of the format.
        shared: the settings that both formats have, with the names of this library.
        adapters: by the name of the module or the path of the target.
        wholes: by name, full (not low-rank) arrays that replace arrays of the model: saved
            modules, trained leaves.
        rows: the names in `wholes` that are only rows of an embedding.
        changes_base: the initializer, if it changed the base weights.
        checkpoint: the open files of another format than this library's; else None.
        own: the adapters and the plan in this library's format; else None.
    """

    directory: pathlib.Path
    format: str
    settings: dict[str, Any]
    shared: dict[str, Any]
    adapters: dict[str, Adapter]
    wholes: dict[str, Span | np.ndarray] = dataclasses.field(default_factory=dict)
    rows: frozenset[str] = frozenset()
    changes_base: str = ""
    checkpoint: Checkpoint | None = None
    own: tuple[Adapters, AdapterPlan] | None = None

    @property
    def plan(self) -> AdapterPlan | None:
        """The plan in this library's format; None for other formats."""
        return self.own and self.own[1]

    @property
    def embeddings(self) -> list[str]:
        """The names of the adapters of token embeddings, and not of heads tied to them."""
        modules = {} if self.checkpoint is None else self.checkpoint.entries.modules
        return [n for n, module in modules.items() if may_be_tied(n, module.kind)]

    @property
    def ignored(self) -> list[str]:
        """A line for each field of the config that is in use and ignored."""
        fields = self.checkpoint.ignored if self.checkpoint else {}
        return [
            f"ignored, as --allow-field says: {name} {json.dumps(value):.80}"
            for name, value in fields.items()
        ]

    @property
    def changed(self) -> list[str]:
        """The names of what the adapters change in one array but not in a tied array.

        PEFT puts rows into all tied arrays. If the embedding and the head are tied and both
        are saved in full, their two arrays are equal.
        """
        ends = [n for n in self.wholes if last_word(n) in EMBEDDINGS | HEADS]
        arrays = [np.asarray(self.wholes[n]) for n in ends] if len(ends) == 2 else []
        equal = ends if arrays and same_bits(*arrays) else []
        wholes = (n for n in self.wholes if n not in self.rows and n not in equal)
        return [*(self.plan.by_leaf() if self.plan else self.adapters), *wholes]


def find_format(directory: pathlib.Path) -> str:
    """Finds the format of the adapters in a directory or in a file."""
    if not directory.exists():
        raise FileNotFoundError(
            f"there is no directory or file {directory} with adapters in it."
        )
    found = find_dialect(directory)
    own = next((n for n in (FILE, OLD_RECORD) if (directory / n).is_file()), None)
    if found and own:
        record = _PEFT_RECORD if found == FORMATS[0] else f"adapters of {found}"
        raise tensor_files.CheckpointError(
            f"{directory} has {record} and {own}: keep one adapter in a directory."
        )
    if found or own:
        return found or OWN
    inner = sorted(str(file.parent) for file in directory.glob(f"*/{_PEFT_RECORD}"))
    hint = f"; there are adapters in {', '.join(inner)}" if inner else ""
    raise tensor_files.CheckpointError(
        f"{directory} has neither {_PEFT_RECORD} nor {FILE}: it is not a directory of "
        f"adapters{hint}."
    )


def read_contents(
    directory: pathlib.Path,
    allow_fields: Collection[str] = (),
    dtype: FileDtype = "file",
) -> Contents:
    """Reads the content of a directory of adapters. Each file is opened once.

    Args:
        directory: in any format; or a file.
        allow_fields: fields of PEFT's config to ignore, as in `lora_jax.peft.load`.
        dtype: of the arrays of this library's format, as in `lora_jax.load_adapters`.

    """
    if find_format(directory) != OWN:
        return _from_peft(directory, open_adapter(directory, allow_fields))
    return _from_own(directory, *load_adapters(directory, dtype=dtype))


def _from_peft(directory: pathlib.Path, checkpoint: Checkpoint) -> Contents:
    config, entries, file = checkpoint.config, checkpoint.entries, checkpoint.arrays
    rows = {f"{name}.weight": key for name, key in entries.tokens.items()}
    is_file = isinstance(file, tensor_files.TensorFile)
    spans = tensor_streams.find_spans(file) if is_file else {}  # no dialect has wholes
    return Contents(
        directory=directory,
        format=checkpoint.dialect,
        settings={**checkpoint.settings} or json.loads(config.to_json()),
        shared={
            "rank": config.r,
            "alpha": float(config.lora_alpha),
            "rank_stabilized": config.use_rslora,
            "use_dora": config.use_dora,
            "dropout": config.lora_dropout,
        },
        adapters=read_modules(checkpoint, entries.modules),
        wholes={name: spans[key] for name, key in (entries.wholes | rows).items()},
        rows=frozenset(rows),
        changes_base=str(config.init_lora_weights) if config.changes_base else "",
        checkpoint=checkpoint,
    )


def read_modules(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Adapter]:
    """The adapters of some modules of a PEFT checkpoint, by name."""
    config: PeftConfig = checkpoint.config
    parameters = Parameters(config.target_parameters or ())
    file: Any = checkpoint.arrays

    def configured(module: Module) -> str:
        """The name of a module in the config; of experts, the first fitting parameter."""
        if module.kind != "experts":
            return without_wrapper(module.name)
        owner, _ = nesting(module.name)
        fitting = (n for n in parameters.of(owner) if config.rank_of(n) == module.rank)
        return next(fitting, owner)

    def read(module: Module) -> dict[str, np.ndarray]:
        stored = {entry: file.read(key) for entry, key in module.keys.items()}
        return stored | _factors(stored, module.experts)

    found = {}
    for name in names:
        module = checkpoint.entries.modules[name]
        found[name] = Adapter(
            method="dora" if "m" in module.keys else "lora",
            shape=(),
            rank=module.rank,
            configured_rank=config.rank_of(configured(module)),
            scale=config.scale_of(configured(module)),
            entries={entry: file[key] for entry, key in module.keys.items()},
            read=functools.partial(read, module),
        )
    return found


def _factors(stored: Mapping[str, np.ndarray], experts: int) -> dict[str, np.ndarray]:
    """`A (*batch, in, rank)` and `B (*batch, rank, out)`, from PEFT's factors."""
    a, b = (stored[name].reshape(len(stored[name]), -1) for name in ("A", "B"))
    if experts:  # (experts * rank, in) and (out, rank * experts)
        rank = len(a) // experts
        a = a.reshape(experts, rank, -1)
        b = b.reshape(len(b), rank, experts).transpose(2, 0, 1)
    return {"A": a.swapaxes(-1, -2), "B": b.swapaxes(-1, -2)}


def _from_own(directory: pathlib.Path, adapters: Adapters, plan: AdapterPlan) -> Contents:
    names = ("rank", "alpha", "rank_stabilized", "use_dora", "dropout")
    read, rank_of = {}, _ranks(plan.config)
    _, _, trained = trained_leaves.split(adapters, plan)
    for path, target in plan.targets.items():
        arrays = {name: np.asarray(value) for name, value in adapters[path].items()}
        read[path] = Adapter(
            method=target.method,
            shape=target.alone.shape,
            rank=target.rank,
            configured_rank=rank_of(path, target),
            scale=target.scale,
            entries=arrays,
            read=lambda arrays=arrays: arrays,
        )
    return Contents(
        directory=directory,
        format=OWN,
        settings=json.loads(plan.config.to_json()),
        shared={name: getattr(plan.config, name) for name in names},
        adapters=read,
        wholes={path: np.asarray(value) for path, value in trained.items()},
        own=(adapters, plan),
    )


def _ranks(config: LoraConfig) -> Callable[[str, Target], int]:
    """Returns a function from a path and its target to the rank in a config.

    It is fast for thousands of patterns that are paths: only patterns that are a beginning
    of the path, or have wildcards, are tried.
    """
    order = {pattern: place for place, pattern in enumerate(config.rank_pattern)}
    globs = [p for p in order if p.startswith("re:") or not _GLOB.isdisjoint(p)]

    def rank_of(path: str, target: Target) -> int:
        starts = (path[:end] for end in range(1, len(path) + 1))
        near = {*globs, *(start for start in starts if start in order)}
        own = sorted(near, key=order.__getitem__)
        pattern = parts.first_match(own, path, target.suffix, target.shape)
        return config.rank if pattern is None else config.rank_pattern[pattern]

    return rank_of
