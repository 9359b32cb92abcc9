"""Models with one array for their embedding and their output head (tied).

An adapter of only one of both needs a model with an array for each. `untie` makes one if
the names of both arrays are known.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_jax._io import tensor_files
from lora_jax.cli._adapters import Contents
from lora_jax.cli._base import Base
from lora_jax.cli._blocks import Update
from lora_jax.cli._loading import Loaded
from lora_jax.layers.lora import Adapter
from lora_jax.peft.words import EMBEDDINGS, HEADS
from lora_jax.plan import parts
from lora_jax.plan.adapter_plan import AdapterPlan, Use

_LEAVES = frozenset({"weight", "kernel", "embedding", "value"})
_TIED = "tie_word_embeddings"
_INNER = "text_config"
_NOTE = (
    f"config.json says {_TIED}: true, although the files have an embedding and a head: "
    "set it to false in OUT, or other programs may use one for both."
)
_LANGUAGE_MODEL = re.compile(r"ForCausalLM|LMHead|ForConditionalGeneration|ForMaskedLM")
# The embedding and the head of models of Hugging Face that can be tied or not.
_HEADS_OF = {
    "model.embed_tokens.weight": "lm_head.weight",
    "model.language_model.embed_tokens.weight": "lm_head.weight",
    "language_model.model.embed_tokens.weight": "language_model.lm_head.weight",
    "transformer.wte.weight": "lm_head.weight",
    "gpt_neox.embed_in.weight": "embed_out.weight",
}


def untie(base: Base, contents: Contents) -> Base:
    """A model in which an embedding and a head with different adapters are two arrays.

    It has a copy of the embedding as its head. Adapters of PEFT's format are of the
    embedding or of the head. Those of mlx-lm are of both, and so are those of this
    library's format, unless they are of one use.

    Raises:
        CheckpointError: if the model's files do not say whether both are one array, or if
            they are and the name of the head is not known.
    """
    if contents.checkpoint and contents.checkpoint.on_both:
        return base
    if contents.plan is None:
        touched = _touched(contents.changed, contents.embeddings)
    else:
        touched = [path for path, own in contents.plan.targets.items() if own.use]
    if not touched or not _is_tied(base, touched[0]):
        return base
    known = [name for name in _HEADS_OF if name in base.spans]
    if len(known) != 1:
        names, count = ", ".join(_HEADS_OF), len(known)
        reason = f"The command can copy one of {names}, and the model has {count} of them. "
        raise _error(touched[0], reason)
    if contents.rows:
        raise _error(touched[0], "The trained rows of tokens are of both. ")
    return base.with_copies({head_of(known[0]): known[0]})


def check_merge(base: Base, contents: Contents, loaded: Loaded) -> str:
    """Raises if a merge would change an embedding and a head with an adapter of one.

    Returns a line for the end of the report, which may be empty.
    """
    if base.copies:
        ((head, embedding),) = base.copies.items()
        if base.is_file:
            raise _error(
                embedding,
                f"BASE is one file, and {_TIED} is in config.json: give the "
                "directory of the model. ",
            )
        return (
            f"untied: {head} is a tensor of its own in OUT, made of {embedding}, and "
            f"config.json has {_TIED}: false."
        )
    names = contents.changed
    if contents.plan is not None:  # its paths may differ from the names of the tensors
        names = [*map(loaded.plan.leaf, loaded.plan.entries), *loaded.replaced]
    touched = _touched(names, contents.embeddings)
    if not touched:
        return ""
    if contents.plan is not None and _is_tied(base, touched[0]):
        raise _error(touched[0])
    return f"note: {_NOTE}" if _says_tied(base.settings) and _has_head(base) else ""


def find_updates(base: Base, loaded: Loaded) -> dict[str, list[Update]]:
    """The adapters of each array of a model, by its name."""
    adapters, plan, *_ = loaded
    found: dict[str, list[Update]] = {}
    for leaf, paths in plan.by_leaf().items():
        arrays = {"": [leaf]}
        one_use = next((path for path in paths if plan.targets[path].use), "")
        if one_use:
            head = _HEADS_OF.get(leaf, "")
            if head not in base.spans or base.spans[head].shape != base.spans[leaf].shape:
                raise ValueError(
                    f"{one_use!r} is an adapter of one use of {leaf!r}, and a merge would "
                    "change all uses: save a base with a tensor for each use, named "
                    "like those of Hugging Face, such as model.embed_tokens.weight and "
                    "lm_head.weight."
                )
            arrays = {parts.LOOKUP: [leaf], parts.PRODUCT: [head], "": [leaf, head]}
        for path in paths:
            target = plan.targets[path]
            update = Update(path, dataclasses.replace(target, use=""), adapters[path])
            for name in arrays[target.use]:
                found.setdefault(name, []).append(update)
    return found


def head_of(embedding: str) -> str:
    """The usual name of the head of a model whose embedding has this name."""
    return _HEADS_OF.get(embedding, "lm_head.weight")


def rejoin(
    copies: Mapping[str, str],
    leaves: Mapping[str, Any],
    adapters: dict[str, Adapter],
    plan: AdapterPlan,
) -> tuple[dict[str, Adapter], AdapterPlan]:
    """Adapters and their plan, with the two uses of an embedding in place of two arrays.

    Args:
        copies: from the names of heads to those of embeddings, as in `Base`.
        leaves: of the model with both.
        adapters: for these leaves.
        plan: of the adapters.
    """
    if not copies:
        return adapters, plan
    uses = dict.fromkeys(copies.values(), parts.LOOKUP)
    uses |= dict.fromkeys(copies, parts.PRODUCT)
    targets, keys = {}, {}
    for path, target in plan.targets.items():
        leaf = plan.leaf(path)
        own = dataclasses.replace(target, use=uses.get(leaf, ""))
        keys[path] = copies.get(leaf, leaf) + own.suffix
        targets[keys[path]] = own
    config = dataclasses.replace(
        plan.config,
        targets=tuple(targets) or plan.config.targets,
        rank_pattern={keys[path]: own for path, own in plan.config.rank_pattern.items()},
        alpha_pattern={keys[path]: own for path, own in plan.config.alpha_pattern.items()},
        axes={copies.get(leaf, leaf): own for leaf, own in plan.config.axes.items()},
    )
    found: dict[str, tuple[Use, ...]] = {}
    for leaf, own in plan.uses.items():
        name = copies.get(leaf, leaf)
        found[name] = found.get(name, ()) + own
    joined = AdapterPlan(
        config=config,
        targets=targets,
        skipped={leaf: why for leaf, why in plan.skipped.items() if leaf not in uses},
        uses=found,
        total=plan.total - sum(math.prod(leaves[head].shape) for head in copies),
    )
    return {keys[path]: adapters[path] for path in keys}, joined


def untied_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json` for a model with an embedding and a head."""
    inner = settings.get(_INNER)
    inner = {_INNER: {**inner, _TIED: False}} if isinstance(inner, dict) else {}
    return {**settings, **inner, _TIED: False}


def _touched(names: Iterable[str], embeddings: Collection[str]) -> list[str]:
    """The names of embeddings and heads; `embeddings` are those that do not show it."""
    ends = EMBEDDINGS | HEADS
    return [name for name in names if name in embeddings or _last_word(name) in ends]


def _is_tied(base: Base, touched: str) -> bool:
    """Whether the embedding and the head of a model are one array; raises if unknown."""
    tied = _says_tied(base.settings)
    if tied is False or _has_head(base):
        return False
    if tied is None and not base.settings.get("architectures"):
        raise tensor_files.CheckpointError(
            f"the adapter changes {touched!r}, and the model has no lm_head.weight: if "
            "its embedding and its output head are one array, merging would change both. "
            f"No config.json beside the weights says it: write {_TIED} into one, false if "
            "the model has no such head."
        )
    return tied is True or _is_language_model(base.settings)


def _error(touched: str, reason: str = "") -> tensor_files.CheckpointError:
    return tensor_files.CheckpointError(
        f"the adapter changes {touched!r}, but the embedding and the output head of "
        f"this model are one array ({_TIED}, and no lm_head.weight): merging would change "
        f"both. {reason}Save the base with a lm_head.weight of its own and {_TIED}: false "
        "in config.json, and merge into that."
    )


def _has_head(base: Base) -> bool:
    return any(_last_word(name) in HEADS for name in base.spans)


def _last_word(name: str) -> str:
    """The name of a layer: the last word that is not the name of a leaf."""
    words = [word for word in re.split(r"[./]", name) if word not in _LEAVES]
    return words[-1] if words else ""


def _says_tied(settings: dict[str, Any]) -> bool | None:
    """Whether the settings say that embedding and head are tied; None without a word."""
    inner = settings.get(_INNER)
    for fields in (settings, inner if isinstance(inner, dict) else {}):
        if isinstance(fields.get(_TIED), bool):
            return fields[_TIED]
    return None


def _is_language_model(settings: dict[str, Any]) -> bool:
    names = settings.get("architectures")
    names = names if isinstance(names, list) else []
    return any(_LANGUAGE_MODEL.search(str(name)) for name in names)
