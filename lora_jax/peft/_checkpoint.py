"""The two files of a PEFT adapter, before they are compared with any params."""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from lora_jax import _checks, _files
from lora_jax._files import CheckpointError, TensorFile
from lora_jax.config import ALL_LINEAR
from lora_jax.peft import _entries
from lora_jax.peft._entries import Entries, Module, without_wrapper
from lora_jax.peft.config import PeftConfig
from lora_jax.peft.matching import Rules

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_OWN = "adapters.json"  # of lora_jax.checkpoint


class Readable(Protocol):
    """Something that arrays are read from by name."""

    def read(self, name: str, /) -> np.ndarray:
        """The array of a name."""
        ...


class Checkpoint(NamedTuple):
    """What PEFT wrote."""

    where: str
    """The file of the arrays, for messages."""
    config: PeftConfig
    arrays: Readable
    entries: Entries


def open_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Reads the settings and the names and shapes of the arrays.

    Raises:
        CheckpointError: if a file is not whole, or no PEFT adapter.
        FileNotFoundError: if one is not there.
    """
    folder = pathlib.Path(directory)
    if not (folder / CONFIG).is_file() and (folder / _OWN).is_file():
        raise CheckpointError(
            f"{folder} has adapters that lora_jax.save_adapters wrote: read them with "
            "lora_jax.load_adapters."
        )
    fields = _files.read_json(folder / CONFIG)
    config = _files.checked(
        folder / CONFIG, lambda: PeftConfig.from_dict(fields, "the config")
    )
    path = folder / TENSORS
    if not path.is_file() and (folder / _PICKLE).is_file():
        raise CheckpointError(
            f"{folder / _PICKLE} is a pickle, which runs code when it is read, and is not "
            "read here: load it with PEFT and save it with safe_serialization=True."
        )
    file = TensorFile(path)
    check_dtypes(str(path), file)
    shapes = {name: tuple(entry.shape) for name, entry in file.items()}
    return Checkpoint(str(path), config, file, sort(str(path), config, shapes))


def check_dtypes(where: str, arrays: Mapping[str, Any]) -> None:
    """Raises unless all arrays have dtypes of adapters.

    Raises:
        CheckpointError: if one is not floating point, or of less than 16 bits.
    """
    for name, array in arrays.items():
        dtype = getattr(array, "dtype", None)
        if dtype is None or not _checks.is_floating(dtype) or dtype.itemsize < 2:
            raise CheckpointError(
                f"{where}: the entry {name!r} is {dtype or type(array).__name__}, and must "
                "be an array, floating point of at least 16 bits."
            )


def sort(where: str, config: PeftConfig, shapes: dict[str, tuple[int, ...]]) -> Entries:
    """The entries of a checkpoint, those of experts' parameters marked.

    Raises:
        CheckpointError: if there are none, or some are not what they have to be.
    """
    entries = _entries.sort_entries(where, shapes)
    if not any(entries):
        raise CheckpointError(f"{where} has no entries: the adapter would change nothing.")
    marked = _entries.as_experts(
        where, entries.modules, config.target_parameters or (), config.rank_of
    )
    return entries._replace(modules=marked)


def chooses_by_name(config: PeftConfig) -> bool:
    """Whether a module's name decides if it has an adapter."""
    targets = config.target_modules
    whole = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    return bool(targets) and not whole


def module_check(config: PeftConfig) -> Callable[[Module], None]:
    """What raises unless the config of a checkpoint agrees with the adapter of a module.

    Raises:
        CheckpointError: from the result, if PEFT would not load it, or not as it is.
    """
    rules = Rules(config)

    def check(module: Module) -> None:
        name = without_wrapper(module.name)
        inside = module.name.rpartition(".base_layer.")[0]  # of torch.nn.MultiheadAttention
        targeted = chooses_by_name(config) and module.kind != "experts"
        if targeted and not any(rules.matched(each) for each in (name, inside) if each):
            raise CheckpointError(
                f"the module {name!r} has an adapter, but the config's target_modules, "
                "exclude_modules and layers_to_transform do not choose it"
            )
        _check_numbers(config, module, name)

    return check


def _check_numbers(config: PeftConfig, module: Module, name: str) -> None:
    """Raises unless the ranks and the entries of a module are those of the config."""
    # That of experts goes by the name of the parameter.
    if module.kind != "experts" and module.rank != config.rank_of(name):
        raise CheckpointError(
            f"the adapter of {name!r} has the rank {module.rank}, and the config says "
            f"{config.rank_of(name)}"
        )
    if config.alpha_of(name) == 0:
        raise CheckpointError(
            f"the alpha of {name!r} is 0 in the config: the adapter would change nothing"
        )
    has, expected = "m" in module.shapes, config.use_dora
    if has != expected:
        raise CheckpointError(
            f"the adapter of {name!r} has {'a' if has else 'no'} magnitude, and the config "
            f"says use_dora={expected}"
        )
    if ("B_bias" in module.shapes) != config.lora_bias:
        has_bias = "B_bias" in module.shapes
        raise CheckpointError(
            f"the adapter of {name!r} has {'a' if has_bias else 'no'} lora_B.bias, and the "
            f"config says lora_bias={config.lora_bias}"
        )
