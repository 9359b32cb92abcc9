"""Adapters of Hugging Face PEFT and of other trainers, read and written without torch."""

from typing import TYPE_CHECKING

from lora_jax._core.unknown_names import explain_attributes
from lora_jax.peft.formats.config import PeftConfig
from lora_jax.peft.load import Loaded, NameTable, load, match_names
from lora_jax.peft.replaced import replace_leaves
from lora_jax.peft.rules import ModuleMatch, match_modules, to_lora_config
from lora_jax.peft.save import save
from lora_jax.peft.torchtune import load_torchtune

__all__ = [
    "Loaded",
    "ModuleMatch",
    "NameTable",
    "PeftConfig",
    "load",
    "load_torchtune",
    "match_modules",
    "match_names",
    "replace_leaves",
    "save",
    "to_lora_config",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:  # type checkers know the names that are not here
    __getattr__ = explain_attributes(__name__)
