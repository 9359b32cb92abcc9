"""What to write here for the names of PEFT and torchtune."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias


class Equivalent(NamedTuple):
    """Names of another package, and what to write here."""

    names: str
    """Separated by spaces. A name may be a glob."""
    here: str
    """Code of this library; empty if it has no equal."""
    note: str = ""
    """More about it, or what to do if there is no equal; without a period."""


Table: TypeAlias = Mapping[str, Sequence[Equivalent]]
"""By the name of the other package."""

_DECOMPOSE = "decompose_params(params, plan, {})"

# Fields of the configuration, and arguments that take their place.
FIELDS: Table = {
    "PEFT": (
        Equivalent("r", "rank"),
        Equivalent("lora_alpha", "alpha"),
        Equivalent("lora_dropout", "dropout"),
        Equivalent(
            "target_modules",
            "targets",
            'a pattern matches a whole path, as in `targets="*/q_proj/kernel"`',
        ),
        Equivalent(
            "target_parameters", "targets", "any leaf of the params can be a target"
        ),
        Equivalent("exclude_modules", "exclude"),
        Equivalent("use_rslora", "rank_stabilized"),
        Equivalent("use_dora", "use_dora"),
        Equivalent("rank_pattern", "rank_pattern", "a pattern matches a whole path"),
        Equivalent("alpha_pattern", "alpha_pattern", "a pattern matches a whole path"),
        Equivalent(
            "init_lora_weights",
            "init",
            '`True` is `"kaiming_uniform"`, `"gaussian"` and `"orthogonal"` have the same '
            "names, and PiSSA, OLoRA and LoftQ are `decompose_params`",
        ),
        Equivalent(
            "layers_to_transform layers_pattern",
            "targets",
            r'`"re:layers/[0-3]/.*"` selects four layers, and `"layers/up[:4]"` selects '
            "them in a stack",
        ),
        Equivalent("bias", "train", '`train="*/bias"` trains the biases'),
        Equivalent("modules_to_save", "train", '`train="head/*"` trains a whole module'),
        Equivalent(
            "trainable_token_indices",
            "",
            'single rows of a table cannot be trained: `targets="*/embedding@lookup"` '
            'adapts the whole table, and `train="*/embedding"` trains it',
        ),
        Equivalent(
            "lora_bias",
            "",
            '`train="*/bias"` trains the bias of a layer, and an adapter of one weight may '
            'have an entry `"B_bias"`',
        ),
        Equivalent(
            "fan_in_fan_out",
            "",
            "`plan_adapters` infers the layout of each weight from the traced function, "
            "and `axes` overrides it",
        ),
        Equivalent("ensure_weight_tying", "", "a tied weight is one leaf with one adapter"),
        Equivalent("loftq_config", _DECOMPOSE.format('"loftq"')),
        Equivalent("eva_config", "init_adapters_from_inputs(...)"),
        Equivalent("lora_ga_config", "init_adapters_from_gradients(...)"),
        Equivalent(
            "corda_config kasa_config",
            "",
            "the initializers that read the weights are those of `decompose_params`, and "
            "`init_adapters_from_inputs` and `init_adapters_from_gradients` read data",
        ),
        Equivalent(
            "task_type base_model_name_or_path",
            "",
            "adapters do not depend on them, and `lora_jax.peft.save` takes `task_type` "
            "and `base_model` for PEFT's file",
        ),
        Equivalent(
            "peft_type", "", "every config is of LoRA or, with `use_dora=True`, of DoRA"
        ),
        Equivalent(
            "auto_mapping revision peft_version",
            "",
            "only files of PEFT have it, and `lora_jax.peft.save` writes what PEFT needs",
        ),
        Equivalent(
            "inference_mode",
            "",
            "adapters are arrays, trained where you differentiate with respect to them",
        ),
        Equivalent(
            "runtime_config",
            "",
            "`jax.jit` and the shardings of the arrays decide where a computation runs",
        ),
        Equivalent(
            "megatron_config megatron_core use_bdlora",
            "",
            "`init_adapters` splits adapters over a mesh as their weights are split",
        ),
        Equivalent(
            "layer_replication", "", "repeat the layers in the function of your model"
        ),
        Equivalent(
            "arrow_config alora_invocation_tokens",
            "",
            "adapters are not chosen by token; `adapt_rows` chooses them by row",
        ),
        Equivalent(
            "use_qalora qalora_group_size",
            "",
            "`merge_adapters(..., requantize=True)` quantizes merged weights again",
        ),
        Equivalent("velora_config", "", "use `jax.checkpoint` to save memory"),
        Equivalent("monteclora_config", "", "factors are not sampled"),
    ),
    "torchtune": (
        Equivalent("lora_rank", "rank"),
        Equivalent(
            "lora_attn_modules apply_lora_to_mlp apply_lora_to_output",
            "targets",
            'patterns of paths; the default `"all-linear"` selects all linear layers',
        ),
        Equivalent(
            "quantize_base",
            'quantize_params(params, "*", plan=plan)',
            "the quantized weights take the place of the dense ones in the params",
        ),
    ),
}

# Methods of PEFT other than LoRA.
_OTHER_METHODS = " ".join(
    f"{name}Config {name}Model"
    for name in (
        *("AdaLora", "Adamss", "AdaptionPrompt", "BOFT", "Beft", "C3A", "Deft", "Delora"),
        *("FourierFT", "Frod", "Glora", "Gralora", "HRA", "Hira", "IA3", "LNTuning"),
        *("Lily", "LoHa", "LoKr", "Miss", "Monteclora", "OFT", "OSF", "Peanut", "Poly"),
        *("Psoft", "Pvera", "RandLora", "Road", "Shadow", "Shira", "Supertuning"),
        *("TinyLora", "UniLora", "VBLoRA", "Velora", "Vera", "WaveFT"),
    )
)

# Functions, classes and methods.
NAMES: Table = {
    "PEFT": (
        Equivalent(
            "get_peft_model inject_adapter_in_model LoraModel PeftMixedModel",
            "lora_jax.adapt(fn, plan)",
            "the model is a function of params, adapters and inputs; "
            "`lora_jax.plan_adapters` makes the plan and `lora_jax.init_adapters` the "
            "adapters",
        ),
        Equivalent(
            "PeftModel PeftModelFor* AutoPeftModel* from_pretrained load_adapter "
            "load_peft_weights",
            "lora_jax.peft.load(directory, params, fn, *args)",
            "it returns adapters and a plan, for `lora_jax.adapt(fn, plan)`",
        ),
        Equivalent(
            "save_pretrained",
            "lora_jax.peft.save(directory, adapters, plan)",
            "`lora_jax.save_adapters` saves them with the whole plan",
        ),
        Equivalent("PeftConfig", "lora_jax.peft.PeftConfig"),
        Equivalent(
            "get_peft_model_state_dict set_peft_model_state_dict "
            "get_base_model_state_dict set_base_model_state_dict get_base_model",
            "",
            "the adapters and the params of the base are two trees, which you hold",
        ),
        Equivalent(
            "merge_and_unload merge_adapter",
            "lora_jax.merge_adapters(params, adapters, plan)",
            "it returns merged params, and `params` stay as they are",
        ),
        Equivalent("unmerge_adapter", "lora_jax.unmerge_adapters(merged, adapters, plan)"),
        Equivalent(
            "unload disable_adapter disable_adapter_layers enable_adapter_layers "
            "delete_adapter",
            "fn(params, *args)",
            "the function of your model is the model without adapters; "
            "`plan.replace(scale=0.0)` switches some adapters off",
        ),
        Equivalent(
            "add_adapter set_adapter active_adapters",
            "adapted(params, adapters, *args)",
            "the adapters are an argument, so pass others; `lora_jax.adapt_rows` gives "
            "each row of a batch its own",
        ),
        Equivalent(
            "add_weighted_adapter",
            "lora_jax.combine_adapters(adapters, plans, weights, method)",
            "it has the same methods, and more",
        ),
        Equivalent(
            "rescale_adapter_scale set_scale", "lora_jax.adapt(fn, plan, scales=...)"
        ),
        Equivalent(
            "print_trainable_parameters get_nb_trainable_parameters get_model_status "
            "get_layer_status",
            "lora_jax.count_parameters(params, plan)",
            "`print(plan)` shows each adapter",
        ),
        Equivalent(
            "prepare_model_for_kbit_training",
            'lora_jax.quantize_params(params, "*", plan=plan)',
            "frozen weights need no other preparation; `jax.checkpoint` saves memory",
        ),
        Equivalent("prepare_model_for_gradient_checkpointing", "jax.checkpoint(adapted)"),
        Equivalent(
            "cast_mixed_precision_params",
            "lora_jax.LoraConfig(dtype=...)",
            "it is the dtype of the adapters; the params keep theirs",
        ),
        Equivalent(
            "LoftQConfig replace_lora_weights_loftq",
            'lora_jax.decompose_params(params, plan, "loftq", quantize=...)',
        ),
        Equivalent(
            "EvaConfig initialize_lora_eva_weights get_eva_state_dict",
            "lora_jax.init_adapters_from_inputs(key, params, plan, fn, batches)",
        ),
        Equivalent(
            "LoraGAConfig preprocess_loraga",
            "lora_jax.init_adapters_from_gradients(...)",
            "its method is `lora_ga`",
        ),
        Equivalent(
            "CordaConfig preprocess_corda KasaConfig",
            "",
            "the initializers that read the weights are those of "
            "`lora_jax.decompose_params`",
        ),
        Equivalent("create_loraplus_optimizer", "lora_jax.optim.lora_plus"),
        Equivalent("create_lorafa_optimizer", "lora_jax.optim.lora_fa"),
        Equivalent("create_riemannian_optimizer", "lora_jax.optim.scale_by_riemannian"),
        Equivalent(
            "TrainableTokensConfig TrainableTokensModel",
            "",
            "single rows of a table cannot be trained; "
            '`LoraConfig(targets="*/embedding@lookup")` adapts the whole table',
        ),
        Equivalent(
            "TaskType",
            "",
            "adapters do not depend on the task; "
            '`lora_jax.peft.save(..., task_type="CAUSAL_LM")` writes it for PEFT',
        ),
        Equivalent(
            "LoraConfig PeftType get_peft_config",
            "lora_jax.LoraConfig",
            "it is of LoRA or, with `use_dora=True`, of DoRA",
        ),
        Equivalent(
            "LoraRuntimeConfig BdLoraConfig",
            "",
            "`jax.jit` and the shardings of the arrays decide where a computation runs",
        ),
        Equivalent(
            "ArrowConfig create_arrow_model XLora*",
            "lora_jax.adapt_rows",
            "it chooses adapters by row, not by token",
        ),
        Equivalent(
            "Prompt* Prefix* MultitaskPrompt* CPT* Cartridge* *_kv_prefix_* *_cartridge_* "
            "prompt_embeddings_*",
            "",
            "prompts are inputs of your function; differentiate with respect to them",
        ),
        Equivalent(
            "convert_to_lora save_as_lora",
            "lora_jax.extract_adapters(base, tuned, plan, rank=...)",
            "with the merged params as `tuned`",
        ),
        Equivalent(
            _OTHER_METHODS,
            "",
            "adapters are LoRA or DoRA; merge others into their model with PEFT, and "
            "approximate the result with `lora_jax.extract_adapters`",
        ),
    ),
    "torchtune": (
        Equivalent(
            "LoRALinear",
            "lora_jax.lora_linear(x, weight, adapter)",
            "for a whole model, `lora_jax.adapt(fn, plan)`",
        ),
        Equivalent(
            "DoRALinear",
            "lora_jax.dora_linear(x, weight, adapter)",
            "for a whole model, `LoraConfig(use_dora=True)`",
        ),
        Equivalent(
            "get_adapter_params get_adapter_state_dict AdapterModule",
            "adapters",
            "`lora_jax.init_adapters` returns them as a tree of their own",
        ),
        Equivalent(
            "set_trainable_params",
            "",
            "differentiate with respect to the adapters; the params are another argument",
        ),
        Equivalent(
            "get_merged_lora_ckpt", "lora_jax.merge_adapters(params, adapters, plan)"
        ),
        Equivalent(
            "tune_to_peft_adapter_weights tune_to_peft_adapter_config",
            "lora_jax.peft.load_torchtune(state_dict, params, fn, *args, ...)",
            "`lora_jax.peft.save` writes the files of PEFT",
        ),
        Equivalent("get_lora_module_names", "plan.targets"),
        Equivalent(
            "load_dora_magnitudes",
            "lora_jax.init_adapters(key, params, plan)",
            "it computes the magnitudes of DoRA",
        ),
        Equivalent(
            "validate_missing_and_unexpected_for_lora validate_state_dict_for_lora",
            "lora_jax.peft.load_torchtune",
            "it raises an error for entries that are missing or unexpected",
        ),
        Equivalent(
            "QATLoRALinear swap_lora_linear_with_qat",
            "",
            "training does not imitate roundings; `lora_jax.merge_losses` measures what a "
            "quantized merge loses",
        ),
    ),
}


def describe(tables: Table, name: str) -> str | None:
    """Says what to write for a name of another package; None if no table has it."""
    for package, rows in tables.items():
        for names, here, note in rows:
            if any(fnmatch.fnmatchcase(name, own) for own in names.split()):
                if not here:
                    return f"{package}'s `{name}` has no equal here: {note}"
                return f"{package}'s `{name}` is `{here}` here" + (note and f": {note}")
    return None
