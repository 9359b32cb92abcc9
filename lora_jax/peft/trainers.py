"""Opens and writes adapters of any dialect: PEFT, mlx-lm, kohya's trainers, diffusers.

The settings of a file become a PEFT config, and back. So all steps of `load` and `save`
serve all dialects.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import numpy as np

from lora_jax._io import replacement, tensor_files, tensor_streams
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft import checkpoint as peft_files
from lora_jax.peft.checkpoint import CONFIG, MLX_TENSORS, Checkpoint
from lora_jax.peft.config import PeftConfig, most_common, pattern_of
from lora_jax.peft.dialects import (
    BY_NAME,
    DIFFUSERS,
    KOHYA,
    MLX,
    PEFT,
    ForeignFile,
    find_file,
    open_foreign,
)
from lora_jax.peft.fields import check_allowed, shorten
from lora_jax.peft.keys import Module, Parameters, nesting
from lora_jax.peft.words import MODELS, WEIGHT, is_flat

_METADATA = "lora_adapter_metadata"  # of diffusers
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
    """Opens an adapter of any dialect; as `open_checkpoint`.

    `place` is a directory of PEFT or mlx-lm, or a safetensors file of kohya or diffusers.
    """
    path = find_file(pathlib.Path(place))
    if path is not None:
        return _open_foreign(path, check_allowed(allow_fields))
    return peft_files.open_checkpoint(place, allow_fields)


def _open_foreign(path: pathlib.Path, allowed: tuple[str, ...]) -> Checkpoint:
    """Opens a file of another dialect than PEFT, whose settings become a config."""
    own = open_foreign(path)
    read = _read_mlx if own.dialect == MLX else _read_metadata
    config, settings, alphas = read(path, own, allowed)
    if own.alphas and alphas:
        raise CheckpointError(
            f"{path} has alphas twice: entries .alpha, and {_METADATA} in its metadata. "
            "Write it again with one of both."
        )
    alphas = own.ranks | alphas | own.alphas
    rank, alpha = most_common(own.ranks, 1), most_common(alphas, 1)
    named = [re.escape(module) for module in own.ranks if module not in own.stacks]

    def complete() -> PeftConfig:
        return dataclasses.replace(
            config,
            r=rank,
            lora_alpha=alpha,
            rank_pattern=pattern_of(own.ranks, rank),
            alpha_pattern=pattern_of(alphas, alpha),
            target_modules="|".join(named) or None,
            target_parameters=tuple(f"{each}.{WEIGHT}" for each in own.stacks) or None,
            use_dora=config.use_dora or any("m" in names for names in own.entries.values()),
            lora_bias=any("B_bias" in names for names in own.entries.values()),
        )

    config = tensor_files.checked(path, complete)
    ignored = peft_files.log_ignored(path, settings, allowed)
    opened = peft_files.new_checkpoint(str(path), config, own.arrays, own.arrays)
    return opened._replace(dialect=own.dialect, settings=settings, ignored=ignored)


def _read_mlx(path: pathlib.Path, own: ForeignFile, allowed: tuple[str, ...]) -> _Settings:
    """A config, the fields of mlx-lm's config, and alphas."""
    place = path.with_name(CONFIG)
    tensor_files.check_is_file(place)
    fields = tensor_files.read_json(place)
    if not peft_files.belong_together(place, fields, own.file):
        raise peft_files.of_another_config(path)
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


def _read_metadata(
    path: pathlib.Path, own: ForeignFile, allowed: tuple[str, ...]
) -> _Settings:
    """A config, the metadata of a file, and the alphas in it.

    diffusers writes a config of PEFT for each model of a pipeline, with the name of the
    model in front of each field.
    """
    text = own.file.metadata.get(_METADATA)
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
            path, lambda each=each: PeftConfig.from_dict(each, _METADATA, allowed)
        )
        for model, each in by_model.items()
    }
    alphas = {}
    for module, rank in own.ranks.items():
        model = next(filter(module.startswith, sorted(configs, reverse=True)), None)
        if model is None:
            raise CheckpointError(
                f"{path}: {_METADATA} in its metadata has no config for {module!r}."
            )
        config, name = configs[model], module.removeprefix(model)
        said, has = config.rank_of(name), (rank, "m" in own.entries[module])
        if (said, config.use_dora) != has:
            raise CheckpointError(
                f"{path}: {_METADATA} in its metadata says rank {said} and use_dora "
                f"{config.use_dora} for {module!r}, whose entries have rank {rank} and "
                f"use_dora {has[1]}."
            )
        alphas[module] = _alpha(config, name, rank)
    common = {dataclasses.replace(c, **_OF_ONE_MODEL) for c in configs.values()}
    if len(common) > 1:
        raise CheckpointError(
            f"{path}: {_METADATA} in its metadata has models with different "
            f"settings, {', '.join(map(shorten, configs))}, beside ranks, alphas and "
            "targets: write the same lora_dropout and so on for all."
        )
    flat = {name.partition(".")[2] or name: value for name, value in fields.items()}
    return next(iter(common), PeftConfig()), flat if allowed else fields, alphas


def _alpha(config: PeftConfig, name: str, rank: int) -> float:
    """The alpha of a module whose scale is `alpha / rank`."""
    return config.alpha_of(name) * (math.sqrt(rank) if config.use_rslora else 1)


def write_adapter(place: pathlib.Path, dialect: str, checkpoint: Checkpoint) -> None:
    """Writes an adapter in a dialect. An old one stays until the new one is complete.

    Raises:
        ValueError: if the dialect cannot represent the adapter.
    """
    flat = next(filter(is_flat, checkpoint.entries.modules), None)
    if flat is not None and dialect != KOHYA:
        raise ValueError(
            f"{flat!r} is a name of kohya, which has lost its dots, and {dialect} needs "
            "them: load the adapter for params, and give names={module: path} to save it."
        )
    if dialect == PEFT:
        tensors = {
            name: checkpoint.arrays.read(name) for name in checkpoint.entries.names()
        }
        place.mkdir(parents=True, exist_ok=True)
        peft_files.write_checkpoint(place, checkpoint.config.to_json(), tensors)
        return
    _check_fits(dialect, checkpoint)
    if dialect == MLX:
        place.mkdir(parents=True, exist_ok=True)
        text, tensors = _to_mlx(checkpoint)
        peft_files.write_checkpoint(place, text, tensors, MLX_TENSORS)
        return
    if place.suffix != ".safetensors":
        raise ValueError(
            f"an adapter of {dialect} is one file: give a path that ends in .safetensors, "
            f"got {str(place)!r}."
        )
    metadata, tensors = (_to_kohya if dialect == KOHYA else _to_diffusers)(checkpoint)
    with replacement.replacing(place) as temporary:
        tensor_streams.write_arrays(temporary, tensors, {"format": "pt", **metadata})


def _check_fits(dialect: str, checkpoint: Checkpoint) -> None:
    """Raises for what only PEFT's files hold."""
    config, (modules, tokens, wholes) = checkpoint.config, checkpoint.entries
    advice = "save with dialect='peft', or merge the adapters into the weights"
    for name in (*tokens, *wholes):
        raise ValueError(
            f"files of {dialect} hold no full arrays, and {name!r} was trained: {advice}."
        )
    if config.changes_base:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changed the base weights, and "
            f"files of {dialect} do not say so: {advice}."
        )
    for name, module in modules.items():
        if module.kind not in BY_NAME[dialect].kinds:
            raise ValueError(
                f"files of {dialect} hold adapters of the kinds "
                f"{', '.join(BY_NAME[dialect].kinds)}, and {name!r} is of the kind "
                f"{module.kind!r}: {advice}."
            )
        if "B_bias" in module.keys and "B_bias" not in BY_NAME[dialect].ends.values():
            raise ValueError(
                f"files of {dialect} hold no biases of adapters, and {name!r} has one: "
                f"{advice}."
            )


def _factors(checkpoint: Checkpoint, module: Module) -> dict[str, np.ndarray]:
    return {entry: checkpoint.arrays.read(key) for entry, key in module.keys.items()}


def _to_mlx(checkpoint: Checkpoint) -> tuple[str, dict[str, np.ndarray]]:
    """The text of mlx-lm's config, and the arrays."""
    config, tensors, keys = checkpoint.config, {}, dict[str, None]()
    scales: dict[str, tuple[int, float]] = {}
    parameters = Parameters(config.target_parameters or ())
    for module in checkpoint.entries.modules.values():
        arrays, name, in_config = _factors(checkpoint, module), module.model_name, ""
        a, b = arrays["A"].T, arrays["B"].T
        if module.kind == "experts":
            name = nesting(module.name)[0]
            if parameters.of(name) != [f"{name}.{WEIGHT}"]:
                raise ValueError(
                    f"mlx-lm has a module for each stack of experts, and {name!r} has the "
                    f"parameters {', '.join(parameters.of(name))}: give names={{module: "
                    "path}} with a name for each stack."
                )
            in_config, rank = f".{WEIGHT}", module.rank
            a = arrays["A"].reshape(module.experts, rank, -1)
            b = arrays["B"].reshape(-1, rank, module.experts).transpose(2, 0, 1)
        if module.kind == "embedding" and "m" in arrays:
            raise ValueError(
                f"mlx-lm has a magnitude for each row of an embedding, and {name!r} has "
                "one for each output: save with dialect='peft', or merge the adapters."
            )
        scales[name] = module.rank, config.scale_of(name + in_config)
        own = {".lora_a": a, ".lora_b": b}
        own |= {".m": arrays["m"].reshape(-1)} if "m" in arrays else {}
        tensors |= {name + end: np.ascontiguousarray(x) for end, x in own.items()}
        layer = re.fullmatch(r"(?:.*\.)?layers\.\d+\.(.+)", name)
        keys[layer[1] if layer else name] = None
    (rank, scale), *more = dict.fromkeys(scales.values())
    if more:
        raise ValueError(
            f"mlx-lm has one rank and one scale for all modules, and these have "
            f"{len(more) + 1}, for example rank {rank} with scale {scale:g} and rank "
            f"{more[0][0]} with scale {more[0][1]:g}: give uniform=True, which pads ranks "
            "with zeros and multiplies scales into B."
        )
    fields = {
        "fine_tune_type": "dora" if config.use_dora else "lora",
        "lora_parameters": {
            "dropout": config.lora_dropout,
            "keys": sorted(keys),
            "rank": rank,
            "scale": scale,
        },
        "model": config.base_model_name_or_path,
        "num_layers": -1,  # all: layers without entries get adapters that are zero
    }
    return json.dumps(fields, indent=4), tensors


def _to_kohya(checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the arrays of a file of kohya."""
    config, tensors = checkpoint.config, dict[str, np.ndarray]()
    modules = checkpoint.entries.modules.values()
    names = _flat_names([module.model_name for module in modules])
    for module in modules:
        arrays, name = _factors(checkpoint, module), names[module.model_name]
        if "m" in arrays:
            ones = (1,) * (arrays["A"].ndim - 1)
            arrays["m"] = arrays["m"].reshape(-1, *ones)
        alpha = np.asarray(_alpha(config, module.model_name, module.rank))
        narrow = alpha.astype(np.float32)
        arrays["alpha"] = narrow if narrow == alpha else alpha
        tensors |= BY_NAME[KOHYA].named(name, arrays)
    model = config.base_model_name_or_path
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": str(config.lora_alpha),
        **({} if model is None else {"ss_sd_model_name": model}),
    }, tensors


def _flat_names(names: list[str]) -> dict[str, str]:
    """The names of kohya for some modules."""
    starts = {model: short for short, model in MODELS.items()}
    if any(name.startswith("text_encoder_2.") for name in names):
        starts["text_encoder"] = "te1"
    flat, owners = {}, dict[str, str]()
    for name in names:
        model, _, rest = name.partition(".")
        short, rest = (starts[model], rest) if model in starts else ("unet", name)
        new = name if is_flat(name) else f"lora_{short}_{rest.replace('.', '_')}"
        other = owners.setdefault(new, name)
        if other != name:
            raise ValueError(
                f"{other!r} and {name!r} would both be {new!r} in a file of kohya, whose "
                "names have no dots: give names={module: path}."
            )
        flat[name] = new
    return flat


def _to_diffusers(checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the arrays of a file of diffusers."""
    config, tensors = checkpoint.config, dict[str, np.ndarray]()
    by_model: dict[str, list[Module]] = {}
    for module in checkpoint.entries.modules.values():
        name = module.model_name
        model, _, rest = name.partition(".")
        by_model.setdefault(model if rest and model in MODELS.values() else "", []).append(
            module
        )
        kind = "embedding_" if module.kind == "embedding" else ""
        arrays = {
            kind * (entry in "AB") + entry: array
            for entry, array in _factors(checkpoint, module).items()
        }
        tensors |= BY_NAME[DIFFUSERS].named(name, arrays)
    if len(by_model) > 1 and "" in by_model:
        raise ValueError(
            f"{by_model[''][0].model_name!r} is in no model of a pipeline, and others are: "
            f"names have to start with one of {', '.join(dict.fromkeys(MODELS.values()))}, "
            "or none of them. Give names={module: path}."
        )
    fields: dict[str, Any] = {}
    for model, modules in by_model.items():
        start = f"{model}." if model else ""
        own = {m.model_name.removeprefix(start): m for m in modules}
        ranks = {name: module.rank for name, module in own.items()}
        alphas = {name: config.alpha_of(start + name) for name in own}
        rank, alpha = most_common(ranks, 1), most_common(alphas, 1)
        settings = {
            "alpha_pattern": dict(pattern_of(alphas, alpha)),
            "base_model_name_or_path": config.base_model_name_or_path,
            "lora_alpha": alpha,
            "lora_bias": config.lora_bias,
            "lora_dropout": config.lora_dropout,
            "r": rank,
            "rank_pattern": dict(pattern_of(ranks, rank)),
            "target_modules": [*own],
            "use_dora": config.use_dora,
            "use_rslora": config.use_rslora,
        }
        fields |= {start + name: value for name, value in settings.items()}
    return {_METADATA: json.dumps(fields, indent=2, sort_keys=True)}, tensors
