"""Adapters of Hugging Face PEFT, read and written without torch."""

from lora_jax.peft.config import PeftConfig as PeftConfig
from lora_jax.peft.configuring import to_lora_config as to_lora_config
from lora_jax.peft.matching import ModuleMatch as ModuleMatch
from lora_jax.peft.matching import match_modules as match_modules
from lora_jax.peft.reading import Loaded as Loaded
from lora_jax.peft.reading import NameTable as NameTable
from lora_jax.peft.reading import load as load
from lora_jax.peft.reading import match_names as match_names
from lora_jax.peft.reading import replace_leaves as replace_leaves
from lora_jax.peft.torchtune import load_torchtune as load_torchtune
from lora_jax.peft.writing import save as save
