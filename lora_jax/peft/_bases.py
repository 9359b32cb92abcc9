"""Bases that the initialization of an adapter changed.

PEFT saves the adapter and not the base: whoever reads it has to change the base in the
same way again. That is exact where the initialization has one outcome.
"""

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from lora_jax._io.tensor_files import CheckpointError
from lora_jax.layers.decompose import init_olora_adapter, init_pissa_adapter
from lora_jax.peft import _wholes
from lora_jax.peft._entries import Module, without_wrapper
from lora_jax.peft._places import Places
from lora_jax.peft._replaced import Replaced
from lora_jax.peft._sites import Site
from lora_jax.peft.config import PeftConfig

# Singular values that are nearer to each other than this have no directions of their own.
_SMALLEST_GAP = 1e-4


def change(
    config: PeftConfig,
    places: Places,
    sites: Iterable[Site],
    modules: Mapping[str, Module],
    replaced: Replaced,
) -> None:
    """Puts the bases that belong to some adapters, if they are not those of the params.

    Raises:
        CheckpointError: if the initialization cannot be repeated.
    """
    if not config.changes_base:
        return
    for site in sites:
        name = without_wrapper(site.module)
        if config.init_lora_weights != "pissa" and not _is_olora(config):
            raise _not_repeatable(config, name, "it has not one outcome")
        if modules[site.module].kind != "linear":
            raise _not_repeatable(config, name, f"it is no matrix, {site.axes!r}")
        why = f"init_lora_weights={config.init_lora_weights!r} changed the base of {name!r}"
        weight = replaced.current(site.path, site.indices, why, site.stack)
        axes = site.axes.replace("b", "")
        base = _base(config, name, _wholes.to_matrix(weight, axes))
        own = _wholes.from_matrix(base, weight.shape, axes).astype(weight.dtype)
        replaced.set(site.path, site.indices, own, site.stack)


def _is_olora(config: PeftConfig) -> bool:
    return str(config.init_lora_weights).lower() == "olora"


def _base(config: PeftConfig, name: str, matrix: np.ndarray) -> np.ndarray:
    """The base `(in, out)` that is left of a weight."""
    rank, alpha = config.rank_of(name), config.alpha_of(name)
    init = init_pissa_adapter
    if _is_olora(config):
        init = init_olora_adapter
    else:
        wide = matrix.astype(np.promote_types(matrix.dtype, np.float32))
        values = np.linalg.svd(wide, compute_uv=False)
        if rank < len(values) and values[rank - 1] - values[rank] < (
            _SMALLEST_GAP * values[rank - 1]
        ):
            raise _not_repeatable(config, name, "two singular values are nearly equal")
    base, _ = init(jnp.asarray(matrix), rank, alpha, rank_stabilized=config.use_rslora)
    return np.asarray(base)


def _not_repeatable(config: PeftConfig, name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"init_lora_weights={config.init_lora_weights!r} changed the base weight of "
        f"{name!r} before training, and cannot be repeated here: {why}. Save the adapter "
        "for the original base with PEFT's save_pretrained(..., "
        "path_initial_model_for_weight_conversion=<the adapter as it was initialized>)."
    )
