"""Saves adapters in the format of Hugging Face PEFT."""

import dataclasses
import functools
import logging
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from lora_jax._core import checks
from lora_jax._core.immutable import FrozenDict
from lora_jax._io import processes, tensor_files
from lora_jax.layers.lora import Adapter, Adapters
from lora_jax.peft.formats.checkpoint import InMemory, new_checkpoint, write_checkpoint
from lora_jax.peft.formats.config import PeftConfig, most_common, pattern_of
from lora_jax.peft.formats.dialects import (
    DIALECTS,
    DIFFUSERS,
    MLX,
    PEFT,
    DialectName,
    write_adapter,
)
from lora_jax.peft.formats.fields import layer_regex
from lora_jax.peft.formats.keys import ENDS, PREFIX, WRAPPED, entry_of, name_ends
from lora_jax.peft.layout import LAYOUTS, Layout
from lora_jax.peft.modules import LeafModules, SavedFull, SavedModule, saved_modules
from lora_jax.peft.names import Names, SaveNames
from lora_jax.peft.rules import Rules
from lora_jax.peft.words import split_path
from lora_jax.plan import plan_checks, trained_leaves
from lora_jax.plan.adapter_plan import AdapterPlan, Target

__all__ = ["save"]

_LOG = logging.getLogger("lora_jax.peft")


def save(
    directory: str | os.PathLike[str],
    adapters: Adapters,
    plan: AdapterPlan,
    *,
    names: SaveNames = None,
    layout: Layout = "jax",
    replaced: Mapping[str, jax.Array] | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    dtype: DTypeLike | None = None,
    uniform: bool = False,
    dialect: DialectName = "peft",
) -> None:
    """Saves adapters so that PEFT or another program loads them, with the same outputs.

    PEFT needs the names of its modules. Without `names` they are the words of the paths:
    `model/layers_0/q_proj/kernel` is `model.layers.0.q_proj`. Ranks and alphas that differ
    become `rank_pattern` and `alpha_pattern`. A stack of layers becomes one module for each
    layer, and a fused weight one for each part that has a name: `{"layers.{}.q_proj":
    "layers/qkv[:,0]", ...}`. If some layers have adapters, `layers_to_transform` says
    which, or else the names of their modules do.

    An old adapter in the directory stays until the new one is on the disk. If the process
    stops while it saves, `load` reads the old or the new adapter. PEFT does too, or finds
    no config. Only one process may save to a directory at a time. If arrays lie on devices
    of several processes, all of them must call this, as `save_adapters`.

    Args:
        directory: to write `adapter_config.json` and `adapter_model.safetensors` in, or
            `adapters.safetensors` for mlx-lm. It is made if it does not exist. For kohya
            and diffusers, the path of one file that ends in `.safetensors`.
        adapters: the adapters of the plan.
        plan: the plan that `plan_adapters` or `load` returned.
        names: a dict from the names of modules to paths, as `load` takes it and
            `match_names` returns it, or a function from paths to names. A stack of layers
            or experts needs a name for each index, or a template with `{}`. A single name
            for a stack of experts is the name of a parameter (`target_parameters`). If a
            module has several parameters, give them in the order in which the module
            registers them.
        layout: of the weights of the plan and of `replaced`; as in `load`.
        replaced: path to array for full (not low-rank) leaves: trained heads, norms,
            biases, embeddings. They become `modules_to_save`, or entries of the adapted
            layers. The trained leaves of the plan are among them.
        base_model: the name or directory of the base model, for the config.
        task_type: PEFT's name of the task, such as `"CAUSAL_LM"`. Only PEFT's files have
            it.
        dtype: of all arrays in the file; None for the dtypes that they have.
        uniform: whether to write one rank and one scale for all modules. Programs such as
            vLLM read neither `rank_pattern` nor `alpha_pattern` and scale every module
            alike. Smaller ranks are padded with zeros, and other scales are multiplied
            into `B`. So each update stays the same, up to rounding. `use_rslora` is then
            false in the file. If this is false and scales differ, a warning goes to the
            logger `lora_jax.peft`. For diffusers the scale is 1, which old versions read
            without the metadata of the file.
        dialect: `"peft"`; `"mlx"` for mlx-lm, which has one rank and one scale; `"kohya"`,
            whose names `lora_unet_...` and `lora_te_...` come from names that start with
            the model of a pipeline, `"text_encoder.layers.{}.fc1"`; or `"diffusers"`, for a
            pipeline if names start so, or for one model. Only `"peft"` holds full leaves.
            Files of kohya hold no dropout rate.

    Raises:
        KeyError: if the adapters' paths or entries are not the plan's.
        ModuleNotFoundError: if the package safetensors is not installed.
        OSError: if the directory cannot be written to, or has an adapter in another format.
        TypeError: if an array has no values, or an argument has the wrong type.
        ValueError: if a shape is not the plan's; if the dialect has no such adapter; if a
            name is missing, two leaves have the same name, or a name has no leaf; if a
            value is out of the range of the dtype.

    References:
        The format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
    """
    checks.check_choice("layout", layout, LAYOUTS)
    checks.check_choice("dialect", dialect, DIALECTS)
    checks.check_flags(uniform=uniform)
    dtype = None if dtype is None else checks.check_factor_dtype(dtype)
    plan_checks.check_adapters(adapters, plan)
    for path in replaced or {}:
        if path in plan.trained:
            raise ValueError(
                f"replaced has {path!r}, which the plan trains: leave it out, because its "
                "value is in adapters."
            )

    def write(held: tuple[Adapters, Mapping[str, Any]]) -> None:
        arrays: Mapping[str, Mapping[str, Any]]
        arrays, own, wholes = trained_leaves.split(held[0], plan)
        if uniform:
            arrays, own = _uniform(arrays, own, dtype, dialect)
        full = {**wholes, **held[1]}
        config, tensors = make_files(
            arrays, own, names, layout, full, base_model, task_type, dtype, dialect
        )
        place = pathlib.Path(directory)
        if dialect != PEFT:
            entries = new_checkpoint(str(place), config, InMemory(tensors), tensors)
            write_adapter(place, dialect, entries)
            return
        _warn_of_patterns(config)
        place.mkdir(parents=True, exist_ok=True)
        write_checkpoint(place, config.to_json(), tensors)

    processes.write_once("peft.save", (adapters, replaced or {}), write)


def make_files(
    adapters: Mapping[str, Mapping[str, Any]],
    plan: AdapterPlan,
    names: SaveNames,
    layout: Layout = "jax",
    replaced: Mapping[str, jax.Array] = FrozenDict(),
    base_model: str | None = None,
    task_type: str | None = None,
    dtype: Any = None,
    dialect: str = PEFT,
) -> tuple[PeftConfig, dict[str, np.ndarray]]:
    """The config and the arrays that `save` writes. It takes the arguments of `save`."""
    naming = Names(names)
    naming.check_paths([*plan.by_leaf(), *plan.skipped, *replaced])
    modules: list[SavedModule] = []
    others: set[str] = set()
    of_leaf = functools.lru_cache(maxsize=1)(LeafModules)  # targets of a leaf are neighbors
    for path in plan.targets:
        with checks.at_path(path):
            adapter = {
                name: tensor_files.cast(name, tensor_files.to_numpy(name, value), dtype)
                for name, value in adapters[path].items()
            }
            own, every = saved_modules(
                path, adapter, plan, naming, layout, dialect == MLX, of_leaf
            )
            modules += own
            others.update(every)
    _check_distinct(modules)
    others -= {module.site.module for module in modules}
    full = SavedFull(plan, naming, layout, modules)
    full.check_complete(replaced)
    for path, array in replaced.items():
        with checks.at_path(path):
            array = tensor_files.to_numpy("the leaf", array)
            full.put(path, tensor_files.cast("the leaf", array, dtype))
    tensors = _tensors(modules, naming) | full.tensors
    config = _config(modules, others, plan, full, base_model, task_type)
    return config, {f"{PREFIX}{name}": array for name, array in tensors.items()}


def _uniform(
    adapters: Mapping[str, Adapter], plan: AdapterPlan, dtype: Any, dialect: str
) -> tuple[Mapping[str, Mapping[str, Any]], AdapterPlan]:
    """Converts adapters to one rank and one scale, with the same updates.

    The scale is the most common one if it makes alpha an integer, which some programs need.
    Otherwise, and for diffusers, it is 1.
    """
    targets = plan.targets
    rank = max((target.rank for target in targets.values()), default=plan.config.rank)
    common = most_common({path: target.scale for path, target in targets.items()}, 1.0)
    alpha = round(common * rank)
    if (
        not alpha
        or dialect == DIFFUSERS
        or not math.isclose(common * rank, alpha, rel_tol=1e-12)
    ):
        alpha = rank
    scale = alpha / rank
    filled, alike = {}, {}
    for path, target in targets.items():
        arrays = {
            name: tensor_files.to_numpy(name, v) for name, v in adapters[path].items()
        }
        wide = _fill_up(arrays, rank, target.scale / scale)
        with checks.at_path(path):
            filled[path] = {
                name: tensor_files.cast(name, value, dtype or arrays[name].dtype)
                for name, value in wide.items()
            }
        alike[path] = dataclasses.replace(target, rank=rank, scale=scale)
    config = dataclasses.replace(plan.config, rank_stabilized=False)
    return filled, AdapterPlan(config, alike, plan.skipped, plan.uses, plan.total)


def _fill_up(
    arrays: Mapping[str, np.ndarray], rank: int, factor: float
) -> dict[str, np.ndarray]:
    """Pads an adapter to a larger rank with zeros, and multiplies its `B` by a factor.

    If the factor is not 1, `B` is float64, not rounded yet.
    """
    filled = dict(arrays)
    missing = rank - arrays["A"].shape[-1]
    a, b = arrays["A"], arrays["B"]
    if missing:
        filled["A"] = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)])
        filled["B"] = np.pad(b, [(0, 0)] * (b.ndim - 2) + [(0, missing), (0, 0)])
    if not math.isclose(factor, 1, rel_tol=1e-12):
        filled["B"] = filled["B"].astype(np.float64) * factor
    return filled


def _warn_of_patterns(config: PeftConfig) -> None:
    """Warns if a program that ignores the patterns would scale a module differently."""
    own = config.scale(config.r, config.lora_alpha)
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        rank = config.rank_pattern.get(pattern, config.r)
        alpha = config.alpha_pattern.get(pattern, config.lora_alpha)
        if not math.isclose(config.scale(rank, alpha), own, rel_tol=1e-12):
            _LOG.warning(
                "the scales of some modules differ from lora_alpha and r, for example %s. "
                "Programs that read neither rank_pattern nor alpha_pattern, such as vLLM, "
                "would scale all modules alike: for such programs write a uniform file.",
                pattern,
            )
            return


def _check_distinct(modules: Iterable[SavedModule]) -> None:
    owners: dict[str, str] = {}
    for module in modules:
        path = module.site.target
        other = owners.setdefault(module.name, path)
        if other != path:
            raise ValueError(
                f"{other!r} and {path!r} would both be the module "
                f"{module.name!r}: give names={{module: path}}."
            )


def _tensors(modules: list[SavedModule], names: Names) -> dict[str, np.ndarray]:
    """The arrays of adapters, by name without the prefix of the format."""
    tensors, inner = {}, _inner(modules)
    owners: dict[str, list[SavedModule]] = {}
    for module in modules:
        if module.kind == "experts":
            owners.setdefault(module.name.rpartition(".")[0], []).append(module)
            continue
        name = module.name
        if name in inner:
            name = f"{WRAPPED}.".join(name.rsplit(".", 1))
        for entry, array in module.arrays.items():
            tensors[name + ENDS[entry_of(module.kind, entry)]] = array
    for owner, own in owners.items():
        own.sort(key=lambda module: names.position(module.name))
        # The parameter that is registered first is innermost.
        for depth, module in enumerate(reversed(own)):
            for entry, array in module.arrays.items():
                tensors[owner + WRAPPED * depth + ENDS[entry]] = array
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def _inner(modules: Iterable[SavedModule]) -> set[str]:
    """The names of modules inside an adapted module: attention of torch.nn."""
    names = {module.name for module in modules}
    return {name for name in names if name.rpartition(".")[0] in names}


def _config(
    modules: list[SavedModule],
    others: set[str],
    plan: AdapterPlan,
    full: SavedFull,
    base_model: str | None,
    task_type: str | None,
) -> PeftConfig:
    """The config that makes PEFT adapt the same modules."""
    methods = {module.target.method for module in modules}
    if len(methods) > 1:
        raise ValueError(
            "a checkpoint of PEFT has adapters of one method, and the plan has LoRA and "
            "DoRA: save them separately."
        )
    stabilized = plan.config.rank_stabilized
    ranks = {module.name: module.target.rank for module in modules}
    alphas = {module.name: _alpha(module.target, stabilized) for module in modules}
    rank, alpha = most_common(ranks, plan.config.rank), most_common(alphas, 1)
    experts = tuple(module.name for module in modules if module.kind == "experts")
    inner = _inner(modules)
    named = tuple(m.name for m in modules if m.kind != "experts" and m.name not in inner)
    derived = {".".join(split_path(path).words) for path in plan.skipped}
    layers, target_modules = (), _target_modules(named, others | derived)
    if others and not (experts or inner):
        layers, target_modules = _layers(named, others, derived) or ((), target_modules)
    return PeftConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=target_modules,
        layers_to_transform=layers or None,
        target_parameters=experts or None,
        rank_pattern=pattern_of(ranks, rank),
        alpha_pattern=pattern_of(alphas, alpha),
        lora_dropout=plan.config.dropout,
        use_rslora=stabilized,
        use_dora="dora" in methods,
        fan_in_fan_out=any(module.lies_in_out for module in modules),
        bias=full.bias,
        modules_to_save=tuple(full.modules) or None,
        task_type=task_type,
        base_model_name_or_path=base_model,
    )


def _layers(
    named: tuple[str, ...], others: set[str], derived: set[str]
) -> tuple[tuple[int, ...], tuple[str, ...]] | None:
    """The layers that have adapters, and the ends of their modules' names.

    None unless PEFT selects the modules `named` by them and none of `others`. `derived` are
    names of other weights, which lack the number of a layer in a stack.
    """
    found = [re.match(layer_regex(), name) for name in named]
    if not all(found):
        return None
    layers = tuple(sorted({int(match["idx"]) for match in found if match}))
    ends = tuple({match.string[match.end() :]: 0 for match in found if match})
    rules = Rules(PeftConfig(target_modules=ends, layers_to_transform=layers))
    stacks = {end for name in derived if name not in named for end in name_ends(name)}
    exact = all(map(rules.matched, named)) and not any(map(rules.matched, others))
    restricts = any(end in ends for name in others for end in name_ends(name))
    return (layers, ends) if exact and restricts and stacks.isdisjoint(ends) else None


def _target_modules(named: tuple[str, ...], others: set[str]) -> str | tuple[str, ...]:
    """The names of modules; or a regular expression of whole names.

    The latter if one of the names is the end of the name of another module.
    """
    others = others - set(named)
    ends = {end for other in others for end in name_ends(other)[1:]}
    if not ends.isdisjoint(named):
        return "|".join(map(re.escape, named))
    return named


def _alpha(target: Target, stabilized: bool) -> float:
    """PEFT's alpha for the scale of a target; an integer if it is one."""
    alpha = target.scale * (math.sqrt(target.rank) if stabilized else target.rank)
    nearest = round(alpha)
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha
