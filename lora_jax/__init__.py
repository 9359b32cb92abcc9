"""Low-rank adapters for any JAX model, as pure functions over parameter pytrees."""

from lora_jax import initializers as initializers
from lora_jax.config import LoraConfig as LoraConfig
from lora_jax.dora import dora_column_norm as dora_column_norm
from lora_jax.dora import dora_linear as dora_linear
from lora_jax.dora import init_dora_adapter as init_dora_adapter
from lora_jax.dora import init_dora_magnitude as init_dora_magnitude
from lora_jax.dora import merge_dora_weight as merge_dora_weight
from lora_jax.dora import unmerge_dora_weight as unmerge_dora_weight
from lora_jax.lora import Adapter as Adapter
from lora_jax.lora import init_lora_adapter as init_lora_adapter
from lora_jax.lora import lora_delta as lora_delta
from lora_jax.lora import lora_linear as lora_linear
from lora_jax.lora import merge_lora_weight as merge_lora_weight
from lora_jax.lora import tree_lora_delta as tree_lora_delta
from lora_jax.lora import unmerge_lora_weight as unmerge_lora_weight
from lora_jax.lora_layer import lora_bias_delta as lora_bias_delta
from lora_jax.lora_layer import merge_lora_layer as merge_lora_layer
from lora_jax.lora_layer import unmerge_lora_layer as unmerge_lora_layer
from lora_jax.model import MergeLoss as MergeLoss
from lora_jax.model import ParameterCount as ParameterCount
from lora_jax.model import adapted_column_norms as adapted_column_norms
from lora_jax.model import count_parameters as count_parameters
from lora_jax.model import init_adapters as init_adapters
from lora_jax.model import merge_adapters as merge_adapters
from lora_jax.model import merge_losses as merge_losses
from lora_jax.model import plan_adapters as plan_adapters
from lora_jax.model import unmerge_adapters as unmerge_adapters
from lora_jax.plan import AdapterPlan as AdapterPlan
from lora_jax.plan import Target as Target
from lora_jax.plan import Use as Use
from lora_jax.transform.adapt import Merge as Merge
from lora_jax.transform.adapt import OnMerge as OnMerge
from lora_jax.transform.adapt import adapt as adapt

__version__ = "0.1.0.dev0"
