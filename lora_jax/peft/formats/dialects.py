"""The dialects of adapters: the files of mlx-lm, of kohya's trainers and of diffusers.

A `Dialect` has the names that a trainer gives to the entries of its files. A config of PEFT
becomes the settings of a file.
"""

import json
import math
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from lora_jax._io import replacement, tensor_streams
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.formats.checkpoint import (
    CONFIG,
    MLX_TENSORS,
    TENSORS,
    Checkpoint,
    write_checkpoint,
)
from lora_jax.peft.formats.config import PeftConfig, most_common, pattern_of
from lora_jax.peft.formats.keys import (
    MODELS,
    PREFIX,
    SUFFIXES,
    WEIGHT,
    Kind,
    Module,
    Parameters,
    entry_of,
    is_flat,
    nesting,
)

PEFT, MLX, KOHYA, DIFFUSERS = DIALECTS = ("peft", "mlx", "kohya", "diffusers")
DialectName: TypeAlias = Literal["peft", "mlx", "kohya", "diffusers"]
FILES = (KOHYA, DIFFUSERS)
"""The dialects of one file, not of a directory."""
METADATA = "lora_adapter_metadata"  # of diffusers


class Dialect(NamedTuple):
    """The names of a trainer for the entries of a module."""

    ends: Mapping[str, str]
    """From the end of an entry's name to its name in `SUFFIXES`, or `"alpha"`. Of several
    ends with one name, the first is written."""
    kinds: tuple[Kind, ...]
    """Of the modules that its files hold."""
    old: tuple[tuple[str, str], ...] = ()
    """Patterns in the names of older files, and their replacements."""

    def split(self, key: str) -> tuple[str, str]:
        """The module of an entry, and its name here; empty if it is not known."""
        for pattern, new in self.old:
            key = re.sub(pattern, new, key)
        end = next(filter(key.endswith, self.ends), "")
        return key.removesuffix(end), self.ends.get(end, "")

    def named(self, module: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of a module, from their names here, by their names in a file."""
        ends = {entry: end for end, entry in reversed([*self.ends.items()])}
        return {module + ends[own]: np.asarray(x, order="C") for own, x in arrays.items()}


BY_NAME = {
    MLX: Dialect(
        {".lora_a": "A", ".lora_b": "B", ".m": "m"}, ("linear", "embedding", "experts")
    ),
    KOHYA: Dialect(
        {
            ".lora_down.weight": "A",
            ".lora_up.weight": "B",
            ".dora_scale": "m",
            ".alpha": "alpha",
        },
        ("linear", "convolution"),
    ),
    DIFFUSERS: Dialect(
        {**SUFFIXES, ".lora.down.weight": "A", ".lora.up.weight": "B", ".alpha": "alpha"},
        ("linear", "convolution", "embedding"),
        (
            (r"\.processor\.", "."),
            (r"^(text_encoder.*)\.to_([qkv])_lora\.", r"\1.\2_proj.lora."),
            (r"^(text_encoder.*)\.to_out_lora\.", r"\1.out_proj.lora."),
            (r"\.to_([qkv])_lora\.", r".to_\1.lora."),
            (r"\.to_out_lora\.", ".to_out.0.lora."),
            (r"\.lora_linear_layer\.", ".lora."),
        ),
    ),
}
# What else such files hold: patterns in the names of entries, what the file looks like,
# and what to do.
MERGE = "merge it into the weights of the model with the program that trained it"
_FULL = "use the weights as params"
_OTHERS = (
    (re.escape(PREFIX), "PEFT", f"give the directory with {CONFIG} and {TENSORS}"),
    (r"\.lora_[ab]\.weight$", "torchtune", "load it with lora_jax.peft.load_torchtune"),
    (r"\.hada_[wt]\d", "LoHa (LyCORIS)", MERGE),
    (r"\.lokr_[wt]\d", "LoKr (LyCORIS)", MERGE),
    (r"\.lora_mid\.", "a Tucker decomposition (LyCORIS)", MERGE),
    (r"\.(?:oft|boft)_", "OFT", MERGE),
    (r"\.on_input$", "IA3 (LyCORIS)", MERGE),
    (r"\.[ab][12]\.weight$", "GLoRA (LyCORIS)", MERGE),
    (r"\.(?:diff|diff_b|w_norm|b_norm)$", "weights trained in full", MERGE),
    (r"emb_params|^clip_[lg]$|string_to_param", "textual inversion", "leave it out"),
    (r"^lora_controlnet$|\.(?:down|up)$", "Control-LoRA", MERGE),
    (r"(?:^|[./])(?:weight|bias|kernel|embedding)$", "the weights of a model", _FULL),
)


def recognize(where: str, file: Collection[str]) -> str:
    """The dialect of a file, by the names of its entries."""
    found = {
        name: key
        for key in file
        for name, dialect in BY_NAME.items()
        if not key.startswith(PREFIX)
        and dialect.split(key)[1] in ("A", "B", "embedding_A", "embedding_B")
    }
    if len(found) > 1:
        pair = " and ".join(f"{key!r} of {name}" for name, key in found.items())
        raise CheckpointError(f"{where} has entries of several trainers: {pair}.")
    if not found:
        raise unknown_entry(where, next(iter(file), ""), sorted(file))
    return next(iter(found))


def unknown_entry(where: str, key: str, keys: Iterable[str]) -> CheckpointError:
    """The error for an entry that no adapter has. It names what `keys` look like."""
    for pattern, what, advice in _OTHERS:
        for each in keys:
            if re.search(pattern, each):
                return CheckpointError(
                    f"{where} is or contains something else than LoRA and DoRA: its entry "
                    f"{each!r} looks like {what}. It is not read here: {advice}."
                )
    ends = (end for dialect in BY_NAME.values() for end in dialect.ends)
    return CheckpointError(
        f"{where}: the entry {key!r} is not of an adapter that is known here: names end in "
        f"{', '.join(dict.fromkeys(ends))}."
    )


def alpha_of(config: PeftConfig, name: str, rank: int) -> float:
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
        write_checkpoint(place, checkpoint.config.to_json(), tensors)
        return
    _check_fits(dialect, checkpoint)
    if dialect == MLX:
        place.mkdir(parents=True, exist_ok=True)
        text, tensors = _to_mlx(checkpoint)
        write_checkpoint(place, text, tensors, MLX_TENSORS)
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
        alpha = np.asarray(alpha_of(config, module.model_name, module.rank))
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
        arrays = {
            entry_of(module.kind, entry): array
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
            "alpha_pattern": pattern_of(alphas, alpha),
            "base_model_name_or_path": config.base_model_name_or_path,
            "lora_alpha": alpha,
            "lora_bias": config.lora_bias,
            "lora_dropout": config.lora_dropout,
            "r": rank,
            "rank_pattern": pattern_of(ranks, rank),
            "target_modules": [*own],
            "use_dora": config.use_dora,
            "use_rslora": config.use_rslora,
        }
        fields |= {start + name: value for name, value in settings.items()}
    return {METADATA: json.dumps(fields, indent=2, sort_keys=True)}, tensors
