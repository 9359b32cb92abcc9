"""Opens adapters of any dialect: PEFT, mlx-lm, kohya's trainers, diffusers.

The entries of a file get PEFT's names and layout, and its settings become a PEFT config. So
all steps of `load` and `save` serve all dialects.
"""

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from lora_jax._io import tensor_files
from lora_jax._io.tensor_files import CheckpointError, TensorFile
from lora_jax.peft.formats.checkpoint import (
    CONFIG,
    MLX_TENSORS,
    TENSORS,
    Checkpoint,
    belong_together,
    check_dtypes,
    is_checkpoint,
    log_ignored,
    new_checkpoint,
    of_another_config,
    read_files,
)
from lora_jax.peft.formats.config import PeftConfig, most_common, pattern_of
from lora_jax.peft.formats.dialects import (
    BY_NAME,
    KOHYA,
    MERGE,
    METADATA,
    MLX,
    PEFT,
    alpha_of,
    recognize,
    unknown_entry,
)
from lora_jax.peft.formats.fields import check_allowed, shorten
from lora_jax.peft.formats.keys import ENDS, PREFIX, WEIGHT, is_embedding

_DIFFUSERS_TENSORS = "pytorch_lora_weights.safetensors"
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
# Fields that each model of a pipeline has for itself, and their defaults.
_OF_ONE_MODEL = {
    name: getattr(PeftConfig(), name)
    for name in (
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("lora_bias", "target_parameters"),
    )
}
_Settings: TypeAlias = tuple[PeftConfig, Mapping[str, Any], dict[str, float]]
"""A config without ranks and alphas, the settings of a file, and alphas by module."""


def open_adapter(
    place: str | os.PathLike[str], allow_fields: Collection[str] = ()
) -> Checkpoint:
    """Opens an adapter: its config, and the names and shapes of its arrays.

    `place` is a directory of PEFT or mlx-lm, or a safetensors file of kohya or diffusers.
    `allow_fields` is as in `lora_jax.peft.load`.
    """
    allowed = check_allowed(allow_fields)
    path = find_file(pathlib.Path(place))
    if path is not None:
        where, dialect, config, settings, arrays = _read_foreign(path, allowed)
        fields = settings
    else:
        where, config, fields, arrays = read_files(place, allowed)
        dialect, settings = PEFT, {}
    ignored = log_ignored(where, fields, allowed)
    check_dtypes(where, arrays)
    opened = new_checkpoint(where, config, arrays, arrays)
    return opened._replace(dialect=dialect, settings=settings, ignored=ignored)


def find_file(place: pathlib.Path) -> pathlib.Path | None:
    """The file of arrays at a path, if it is of another dialect than PEFT; else None."""
    named = place.suffix == ".safetensors" and not place.is_dir()
    if named or (place.is_file() and place.suffix != ".json"):
        return place
    for name in (MLX_TENSORS, _DIFFUSERS_TENSORS):
        if (place / name).is_file() and not (place / TENSORS).is_file():
            return place / name
    return None


def find_dialect(place: pathlib.Path) -> str | None:
    """The dialect of the adapter at a path; None if there is none."""
    path = find_file(place)
    if path is None:
        return PEFT if is_checkpoint(place) else None
    return recognize(str(path), _open(path))


class _Entry(NamedTuple):
    """An entry of a file, in PEFT's layout."""

    key: str
    """The name in the file."""
    axes: tuple[int, ...]
    """The order of its axes."""
    shape: tuple[int, ...]
    """Its shape in that order."""


class _Renamed(Mapping[str, jax.ShapeDtypeStruct]):
    """The arrays of a file by PEFT's names, in PEFT's layout."""

    def __init__(self, file: TensorFile, entries: Mapping[str, _Entry]) -> None:
        self._file, self._entries = file, entries

    def __getitem__(self, name: str) -> jax.ShapeDtypeStruct:
        entry = self._entries[name]
        return tensor_files.abstract(entry.shape, self._file[entry.key].dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, name: str, /) -> np.ndarray:
        """The array of a name."""
        entry = self._entries[name]
        return self._file.read(entry.key).transpose(entry.axes).reshape(entry.shape)


class _Opened(NamedTuple):
    """The entries of a file that is not of PEFT."""

    file: TensorFile
    ranks: dict[str, int]
    """By module."""
    entries: Mapping[str, Collection[str]]
    """By module, the names of entries here."""
    stacks: list[str]
    """The modules that are stacks of experts."""


def _read_foreign(
    path: pathlib.Path, allowed: tuple[str, ...]
) -> tuple[str, str, PeftConfig, Mapping[str, Any], _Renamed]:
    """The name of a file, its dialect, config and settings, and its arrays as PEFT's."""
    where, file = str(path), _open(path)
    dialect = recognize(where, file)
    found = _by_module(where, dialect, file)
    in_entries = {
        module: _read_alpha(where, own.pop("alpha"), file)
        for module, own in found.items()
        if "alpha" in own
    }
    entries, ranks, stacks = dict[str, _Entry](), dict[str, int](), list[str]()
    for module, own in found.items():
        layouts, ranks[module], is_stack = _as_peft(where, dialect, module, own, file)
        stacks += [module] if is_stack else []
        for entry, layout in layouts.items():
            entries[f"{PREFIX}{module}{ENDS[entry]}"] = layout
    read = _read_mlx if dialect == MLX else _read_metadata
    config, settings, alphas = read(path, _Opened(file, ranks, found, stacks), allowed)
    if in_entries and alphas:
        raise CheckpointError(
            f"{path} has alphas twice: entries .alpha, and {METADATA} in its metadata. "
            "Write it again with one of both."
        )
    alphas = ranks | alphas | in_entries
    rank, alpha = most_common(ranks, 1), most_common(alphas, 1)
    named = [re.escape(module) for module in ranks if module not in stacks]
    has = {entry for own in found.values() for entry in own}

    def complete() -> PeftConfig:
        return dataclasses.replace(
            config,
            r=rank,
            lora_alpha=alpha,
            rank_pattern=pattern_of(ranks, rank),
            alpha_pattern=pattern_of(alphas, alpha),
            target_modules="|".join(named) or None,
            target_parameters=tuple(f"{each}.{WEIGHT}" for each in stacks) or None,
            use_dora=config.use_dora or "m" in has,
            lora_bias="B_bias" in has,
        )

    complete_config = tensor_files.checked(path, complete)
    return where, dialect, complete_config, settings, _Renamed(file, entries)


def _open(path: pathlib.Path) -> TensorFile:
    """Opens a file; raises for other files that people take for adapters."""
    tensor_files.check_is_file(path)
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        raise CheckpointError(
            f"{path} is a GGUF file, from which no adapters are read: give the adapter "
            "that it was made from, as a safetensors file."
        )
    if path.suffix in _PICKLES or start == b"PK\3\4":
        raise CheckpointError(
            f"{path} looks like a pickle, which runs code when it is read, and is not read "
            "here: save its tensors with safetensors.torch.save_file."
        )
    return TensorFile(path)


def _by_module(where: str, name: str, file: TensorFile) -> dict[str, dict[str, str]]:
    """The keys of a file by module and entry."""
    found: dict[str, dict[str, str]] = {}
    for key in file:
        module, entry = BY_NAME[name].split(key)
        if not entry or entry == "tokens" or not module:
            raise unknown_entry(where, key, [key])
        other = found.setdefault(module, {}).setdefault(entry, key)
        if other != key:
            raise CheckpointError(f"{where}: {other!r} and {key!r} are the same entry.")
    for module, own in found.items():
        ends = {entry.removeprefix("embedding_") for entry in own}
        if not {"A", "B"} <= ends:
            raise CheckpointError(
                f"{where}: {module!r} must have both factors of an adapter, got "
                f"{', '.join(map(repr, own.values()))}: is the file whole?"
            )
    return found


def _read_alpha(where: str, key: str, file: TensorFile) -> float:
    """The value of an entry `.alpha`."""
    value = file.read(key).astype(np.float64).reshape(-1)
    if value.size != 1 or not np.isfinite(value).all() or not value.any():
        raise CheckpointError(
            f"{where}: {key!r} must be one number that is finite and not 0, got "
            f"{shorten(value[:4].tolist())}. Kohya's trainers read 0 as the rank, and "
            "other programs as 0: write the alpha that is meant."
        )
    return value[0].item()


def _as_peft(
    where: str, name: str, module: str, keys: Mapping[str, str], file: TensorFile
) -> tuple[dict[str, _Entry], int, bool]:
    """The entries of a module in PEFT's layout, its rank, and whether it is a stack."""
    shapes = {entry: tuple(file[key].shape) for entry, key in keys.items()}
    entries = {
        entry: _Entry(keys[entry], tuple(range(len(shape))), shape)
        for entry, shape in shapes.items()
    }
    if name == KOHYA and "m" in shapes:
        shape = shapes["m"]
        if shape[:1] != shapes["B"][:1] or math.prod(shape[1:]) != 1:
            raise CheckpointError(
                f"{where}: {keys['m']!r} must be ({', '.join(map(str, shapes['B'][:1]))}, "
                f"1, ...), one magnitude for each output, got {shape}. Magnitudes of "
                f"inputs are not DoRA as it is here: {MERGE}."
            )
        entries["m"] = entries["m"]._replace(shape=shape[:1])
    if name != MLX:
        first = shapes.get("A", shapes.get("embedding_A", ()))
        return entries, (*first, 0)[0], False
    a, b = shapes["A"], shapes["B"]
    if len(b) == 3 and "m" not in shapes:  # (experts, out, r)
        experts, n_out, rank = b
        if a not in ((experts, rank, *a[-1:]), (experts * rank, *a[-1:])):
            raise _wrong_shapes(where, module, a, b)
        entries["A"] = entries["A"]._replace(shape=(experts * rank, a[-1]))
        entries["B"] = _Entry(keys["B"], (1, 2, 0), (n_out, rank * experts))
        return entries, rank, True
    if len(a) != 2 or len(b) != 2:
        raise _wrong_shapes(where, module, a, b)
    for entry in "AB":
        entries[entry] = _Entry(keys[entry], (1, 0), shapes[entry][::-1])
    if is_embedding(module):
        if "m" in shapes:
            raise CheckpointError(
                f"{where}: {keys['m']!r} has a magnitude for each row of an embedding, and "
                f"DoRA here has one for each output: {MERGE}."
            )
        entries = {f"embedding_{entry}": own for entry, own in entries.items()}
    return entries, a[1], False


def _wrong_shapes(where: str, module: str, a: Any, b: Any) -> CheckpointError:
    return CheckpointError(
        f"{where}: the factors of {module!r} do not fit each other: expected (in, r) and "
        f"(r, out), or (experts, r, in) and (experts, out, r), got {a} and {b}."
    )


def _read_mlx(path: pathlib.Path, own: _Opened, allowed: tuple[str, ...]) -> _Settings:
    """A config, the fields of mlx-lm's config, and alphas."""
    place = path.with_name(CONFIG)
    tensor_files.check_is_file(place)
    fields = tensor_files.read_json(place)
    if not belong_together(place, fields, own.file):
        raise of_another_config(path)
    method, given = fields.get("fine_tune_type", "lora"), fields.get("lora_parameters")
    if method not in ("lora", "dora") or not isinstance(given, Mapping):
        raise CheckpointError(
            f"{place}: expected the fine_tune_type lora or dora, and lora_parameters, got "
            f"{shorten(method)} and {shorten(given)}: is it the config of these adapters?"
        )
    known = ("rank", "scale", "dropout", "keys", "alpha", *allowed)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise CheckpointError(
            f"{place}: lora_parameters has the unknown field {shorten(unknown[0])}. If the "
            f"adapter does not need it, give allow_fields=({shorten(unknown[0])},)."
        )
    for module, rank in own.ranks.items():
        if rank != given.get("rank"):
            raise CheckpointError(
                f"{place}: lora_parameters has the rank {shorten(given.get('rank'))}, and "
                f"{module!r} has the rank {rank}."
            )
    scale = given.get("scale")
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise CheckpointError(f"{place}: scale must be a number, got {shorten(scale)}.")
    if given.get("dropout") and own.stacks:
        raise CheckpointError(
            f"{place}: lora_parameters has dropout, and {own.stacks[0]!r} is a stack of "
            "experts, for which there is none here: set it to 0, if the adapter is not "
            "trained further with it."
        )
    model = fields.get("model")
    config = tensor_files.checked(
        place,
        lambda: PeftConfig(
            lora_dropout=given.get("dropout", 0.0),
            use_dora=method == "dora",
            base_model_name_or_path=model if isinstance(model, str) else None,
        ),
    )
    return config, fields, {module: scale * rank for module, rank in own.ranks.items()}


def _read_metadata(path: pathlib.Path, own: _Opened, allowed: tuple[str, ...]) -> _Settings:
    """A config, the metadata of a file, and the alphas in it.

    diffusers writes a config of PEFT for each model of a pipeline, with the name of the
    model in front of each field.
    """
    text = own.file.metadata.get(METADATA)
    if text is None:
        name = own.file.metadata.get("ss_sd_model_name")
        return PeftConfig(base_model_name_or_path=name), own.file.metadata, {}
    fields = tensor_files.parse_json(path, text.encode())
    by_model: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        model, dot, field = name.partition(".")
        by_model.setdefault(f"{model}." if dot else "", {})[field or model] = value
    configs = {
        model: tensor_files.checked(
            path, lambda each=each: PeftConfig.from_dict(each, METADATA, allowed)
        )
        for model, each in by_model.items()
    }
    alphas = {}
    for module, rank in own.ranks.items():
        model = next(filter(module.startswith, sorted(configs, reverse=True)), None)
        if model is None:
            raise CheckpointError(
                f"{path}: {METADATA} in its metadata has no config for {module!r}."
            )
        config, name = configs[model], module.removeprefix(model)
        said, has = config.rank_of(name), (rank, "m" in own.entries[module])
        if (said, config.use_dora) != has:
            raise CheckpointError(
                f"{path}: {METADATA} in its metadata says rank {said} and use_dora "
                f"{config.use_dora} for {module!r}, whose entries have rank {rank} and "
                f"use_dora {has[1]}."
            )
        alphas[module] = alpha_of(config, name, rank)
    common = {dataclasses.replace(c, **_OF_ONE_MODEL) for c in configs.values()}
    if len(common) > 1:
        raise CheckpointError(
            f"{path}: {METADATA} in its metadata has models with different "
            f"settings, {', '.join(map(shorten, configs))}, beside ranks, alphas and "
            "targets: write the same lora_dropout and so on for all."
        )
    flat = {name.partition(".")[2] or name: value for name, value in fields.items()}
    return next(iter(common), PeftConfig()), flat if allowed else fields, alphas
