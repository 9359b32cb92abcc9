"""Adapters of Hugging Face PEFT, read and written without torch."""

from lora_jax.peft.config import PeftConfig as PeftConfig
from lora_jax.peft.given import NameTable as NameTable
from lora_jax.peft.load import Loaded as Loaded
from lora_jax.peft.load import load as load
from lora_jax.peft.load import match_names as match_names
from lora_jax.peft.load import replace_leaves as replace_leaves
from lora_jax.peft.rules import ModuleMatch as ModuleMatch
from lora_jax.peft.rules import match_modules as match_modules
from lora_jax.peft.rules import to_lora_config as to_lora_config
from lora_jax.peft.save import save as save
from lora_jax.peft.torchtune import load_torchtune as load_torchtune
