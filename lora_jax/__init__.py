"""Low-rank adapters for any JAX model, as pure functions over parameter pytrees."""

from typing import TYPE_CHECKING

from lora_jax import optim, peft, quant
from lora_jax._core.unknown_names import explain_attributes
from lora_jax.arithmetic.combining import (
    DerivedAdapters,
    combine_adapters,
    resize_adapters,
    scale_adapters,
)
from lora_jax.arithmetic.extraction import ExtractedAdapters, extract_adapters
from lora_jax.checkpoint import CheckpointError, load_adapters, save_adapters
from lora_jax.foreign_trees.imported import (
    FoundAdapter,
    FoundWeight,
    ImportedAdapters,
    import_adapters,
)
from lora_jax.from_data.gradients import init_adapters_from_gradients
from lora_jax.from_data.inputs import ExplainedAdapters, init_adapters_from_inputs
from lora_jax.layers import initializers
from lora_jax.layers.biases import lora_bias_delta, merge_lora_layer, unmerge_lora_layer
from lora_jax.layers.decompose import (
    DecomposedWeight,
    init_loftq_adapter,
    init_olora_adapter,
    init_orthogonal_adapter,
    init_pissa_adapter,
    to_plain_adapter,
)
from lora_jax.layers.dora import (
    dora_column_norm,
    dora_linear,
    init_dora_adapter,
    init_dora_magnitude,
    merge_dora_weight,
    unmerge_dora_weight,
)
from lora_jax.layers.lora import (
    Adapter,
    init_lora_adapter,
    lora_delta,
    lora_linear,
    merge_lora_weight,
    tree_lora_delta,
    unmerge_lora_weight,
)
from lora_jax.model.adapters import (
    ParameterCount,
    count_parameters,
    init_adapters,
    plan_adapters,
)
from lora_jax.model.column_norms import adapted_column_norms
from lora_jax.model.decompose import (
    Decomposed,
    PlainAdapters,
    decompose_params,
    to_plain_adapters,
)
from lora_jax.model.losses import MergeLoss, merge_losses
from lora_jax.model.merging import merge_adapters, unmerge_adapters
from lora_jax.model.quantize import quantize_params
from lora_jax.model.sharding import adapter_shardings, optimizer_shardings
from lora_jax.model.slots import (
    put_adapters,
    stack_adapters,
    stacked_column_norms,
    take_adapters,
)
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.adapter_stack import AdapterStack
from lora_jax.plan.config import LoraConfig
from lora_jax.plan.target import Target, TrainedLeaf, Use
from lora_jax.plots import plot_plan, plot_spectra
from lora_jax.transform.adapt import Merge, OnMerge, accept_quantized, adapt
from lora_jax.transform.rows import adapt_rows

__all__ = [
    "Adapter",
    "AdapterPlan",
    "AdapterStack",
    "CheckpointError",
    "Decomposed",
    "DecomposedWeight",
    "DerivedAdapters",
    "ExplainedAdapters",
    "ExtractedAdapters",
    "FoundAdapter",
    "FoundWeight",
    "ImportedAdapters",
    "LoraConfig",
    "Merge",
    "MergeLoss",
    "OnMerge",
    "ParameterCount",
    "PlainAdapters",
    "Target",
    "TrainedLeaf",
    "Use",
    "accept_quantized",
    "adapt",
    "adapt_rows",
    "adapted_column_norms",
    "adapter_shardings",
    "combine_adapters",
    "count_parameters",
    "decompose_params",
    "dora_column_norm",
    "dora_linear",
    "extract_adapters",
    "import_adapters",
    "init_adapters",
    "init_adapters_from_gradients",
    "init_adapters_from_inputs",
    "init_dora_adapter",
    "init_dora_magnitude",
    "init_loftq_adapter",
    "init_lora_adapter",
    "init_olora_adapter",
    "init_orthogonal_adapter",
    "init_pissa_adapter",
    "initializers",
    "load_adapters",
    "lora_bias_delta",
    "lora_delta",
    "lora_linear",
    "merge_adapters",
    "merge_dora_weight",
    "merge_lora_layer",
    "merge_lora_weight",
    "merge_losses",
    "optim",
    "optimizer_shardings",
    "peft",
    "plan_adapters",
    "plot_plan",
    "plot_spectra",
    "put_adapters",
    "quant",
    "quantize_params",
    "resize_adapters",
    "save_adapters",
    "scale_adapters",
    "stack_adapters",
    "stacked_column_norms",
    "take_adapters",
    "to_plain_adapter",
    "to_plain_adapters",
    "tree_lora_delta",
    "unmerge_adapters",
    "unmerge_dora_weight",
    "unmerge_lora_layer",
    "unmerge_lora_weight",
]

__version__ = "0.1.0"


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:  # type checkers know the names that are not here
    __getattr__ = explain_attributes(__name__)
