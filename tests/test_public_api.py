"""Each public name has one address, the design's signature, and a full docstring."""

import functools
import importlib
import inspect
import operator
import pathlib
import pkgutil
import re

import pytest

import lora_jax

DOCS = pathlib.Path(lora_jax.__file__).parent.parent / "docs"
MODULES = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(lora_jax.__path__, "lora_jax.")
    if not info.ispkg and "._" not in info.name and info.name != "lora_jax.__main__"
]
MODULES = [module for module in MODULES if hasattr(module, "__all__")]
# Names that are used through a module or package, as those of jax.nn.initializers.
NAMESPACES = ("lora_jax.initializers", "lora_jax.optim", "lora_jax.peft", "lora_jax.quant")
NAMES = [(module, name) for module in MODULES for name in module.__all__]
FUNCTIONS = [
    (module, name) for module, name in NAMES if inspect.isfunction(getattr(module, name))
]


def address(module):
    """The module or package that users find a module's names in."""
    name = module.__name__.replace(".layers.initializers", ".initializers")
    return next((n for n in NAMESPACES if f"{name}.".startswith(f"{n}.")), "lora_jax")


CANNOT_FAIL = (
    "is_quantized",
    *("zeros", "kaiming_uniform", "xavier_uniform", "xavier_normal"),
)
SIGNATURES = """
init_lora_adapter(key, weight, rank, init_std=0.01, dtype=None, *, init='gaussian')
lora_delta(adapter, alpha=1.0, *, rank_stabilized=False)
lora_linear(x, frozen_weight, adapter, alpha=1.0, *, bias=None, rank_stabilized=False,
    dropout_rate=0.0, dropout_key=None, dropout_position='pre')
merge_lora_weight(frozen_weight, adapter, alpha=1.0, *, rank_stabilized=False)
unmerge_lora_weight(merged_weight, adapter, alpha=1.0, *, rank_stabilized=False)
tree_lora_delta(adapters, alpha=1.0, *, is_leaf=None)
init_pissa_adapter(weight, rank, alpha=1.0, *, dtype=None, rank_stabilized=False, key=None,
    iterations=None, quantize=None)
init_olora_adapter(weight, rank, alpha=1.0, *, dtype=None, rank_stabilized=False)
init_loftq_adapter(weight, rank, alpha=1.0, *, quantize, dtype=None, rank_stabilized=False,
    iterations=1)
init_orthogonal_adapter(key, weight, rank, *, dtype=None)
to_plain_adapter(adapter, initial)
lora_bias_delta(adapter, alpha=1.0, *, rank_stabilized=False)
merge_lora_layer(frozen_weight, frozen_bias, adapter, alpha=1.0, *, rank_stabilized=False)
unmerge_lora_layer(merged_weight, merged_bias, adapter, alpha=1.0, *, rank_stabilized=False)
dora_column_norm(weight, adapter=None, alpha=1.0, *, rank_stabilized=False, norm_axis='out')
init_dora_adapter(key, weight, rank, init_std=0.01, dtype=None, *, init='gaussian',
    norm_axis='out')
init_dora_magnitude(weight, adapter, alpha=1.0, *, rank_stabilized=False, norm_axis='out')
dora_linear(x, frozen_weight, adapter, alpha=1.0, *, bias=None, rank_stabilized=False,
    scale_bias=False, detach_norm=True, norm_axis='out', weight_norm_squared=None,
    column_norm=None, dropout_rate=0.0, dropout_key=None, dropout_mode='peft')
merge_dora_weight(frozen_weight, adapter, alpha=1.0, *, rank_stabilized=False,
    norm_axis='out')
unmerge_dora_weight(merged_weight, adapter, column_norm, alpha=1.0, *,
    rank_stabilized=False, norm_axis='out')
LoraConfig(rank=8, alpha=16.0, targets='all-linear', exclude=(), *, train=(),
    rank_pattern={}, alpha_pattern={}, axes={}, products={}, rank_stabilized=False,
    use_dora=False, dropout=0.0, init='kaiming_uniform', dtype=None)
plan_adapters(config, params, fn=None, /, *args, **kwargs)
init_adapters(key, params, plan, shardings=None)
import_adapters(params, layout, fn=None, *args, scale=None, axes=None)
adapter_shardings(params, plan, *, data_axes=None)
optimizer_shardings(optimizer, adapters, shardings, split_over=())
adapt(fn, plan, *, on_merge='error', on_unused='error', on_stop_gradient='error',
      dropout_key=None, column_norms=None, scales=None)
merge_adapters(params, adapters, plan, *, donate=False, requantize=False)
quant.quantize_nf4(weight, block_size=64, scaler_block_size=256, *, codec='torchao',
      batch_axes=0, row_axes=None)
quant.quantize_int8(weight, *, block_size=None, batch_axes=0)
quant.quantize_fp8(weight, *, batch_axes=0)
quant.dequantize(quantized, dtype=None)
quant.load_gguf(path, patterns='*', *, stack=False, dense=(), rope_heads=None,
      shardings=None, dtype=<class 'jax.numpy.float32'>)
quant.load_gguf_metadata(path)
accept_quantized(fn)
quantize_params(params, patterns, format='nf4', *, batch_axes={}, plan=None, donate=False,
      **settings)
optim.adapter_labels(tree, patterns={}, *, other='other')
optim.lora_rite(learning_rate, b1=0.9, b2=0.999, eps=1e-08, *, weight_decay=0.0,
    mask=None)
optim.scale_by_lora_rite(b1=0.9, b2=0.999, eps=1e-08)
optim.per_slot(optimizer)
optim.trainable_and_frozen(params, trainable, optimizer)
unmerge_adapters(params, adapters, plan, *, column_norms=None, originals=None)
adapted_column_norms(params, adapters, plan)
merge_losses(params, adapters, plan, *, requantize=False)
decompose_params(params, plan, method, *, key=None, iterations=None, quantize=None)
init_adapters_from_gradients(key, params, plan, loss, batches, *, method='lora_one',
    gamma=None, iterations=2, on_merge='error', on_stop_gradient='error')
init_adapters_from_inputs(key, params, plan, fn, batches, *, rho=2.0, iterations=1,
    on_merge='error', on_stop_gradient='error')
to_plain_adapters(adapters, initial, plan)
combine_adapters(adapters, plans, weights=None, method='exact', *, params=None, rank=None,
    energy=None, density=None, majority_sign='total', key=None)
resize_adapters(adapters, plan, *, rank=None, energy=None, params=None)
scale_adapters(adapters, plan, factor)
extract_adapters(base, tuned, plan, *, rank=None, energy=None)
count_parameters(params, plan)
plot_plan(plan, adapters=None)
plot_spectra(adapters, plan)
adapt_rows(fn, plan, in_axes=0, *, on_unused='error', on_stop_gradient='error',
    dropout_key=None, column_norms=None)
stacked_column_norms(params, stack, plan)
stack_adapters(adapters, plans, slots=None, rank=None)
put_adapters(stack, slot, adapters, plan)
take_adapters(stack, slot, rank=None, plan=None)
save_adapters(directory, adapters, plan, *, dtype=None)
load_adapters(directory, *, strict=True, dtype=None, shardings=None)
peft.load(directory, params, fn=None, *args, plan=None, names=None, layout=None,
    on_tied='error', strict=True, dtype=None, allow_fields=())
peft.save(directory, adapters, plan, *, names=None, layout='jax', replaced=None,
    base_model=None, task_type=None, dtype=None, uniform=False, dialect='peft')
"""


def test_each_name_is_at_one_address():
    names = [name for _, name in NAMES]
    assert len(names) == len(set(names))
    handed_on = {n for n in lora_jax.__all__ if not inspect.ismodule(getattr(lora_jax, n))}
    top = {name for module, name in NAMES if address(module) == "lora_jax"}
    assert handed_on == top
    for module, name in NAMES:
        owner = functools.reduce(getattr, address(module).split(".")[1:], lora_jax)
        assert getattr(owner, name) is getattr(module, name)


@pytest.mark.parametrize("package", ["lora_jax", *NAMESPACES[1:]])
def test_packages_show_their_public_names_alone(package):
    namespace = {}
    exec(f"from {package} import *", namespace)
    shown = dir(importlib.import_module(package))
    want = {name for module, name in NAMES if address(module) == package}
    if package == "lora_jax":
        want |= {name.split(".")[1] for name in NAMESPACES}
    assert {*shown} == {*namespace} - {"__builtins__"} == want


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda v: getattr(v, "__name__", v))
def test_all_names_are_defined_in_their_module(module, name):
    value = getattr(module, name)
    if inspect.isfunction(value):
        assert value.__module__ == module.__name__


@pytest.mark.parametrize("line", re.split(r"\n(?=\S)", SIGNATURES.strip()))
def test_fixed_signatures(line):
    name, parameters = re.sub(r"\s+", " ", line).split("(", 1)
    signature = inspect.signature(operator.attrgetter(name)(lora_jax))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    got = str(signature.replace(parameters=bare, return_annotation=signature.empty))
    assert got == f"({parameters}"


@pytest.mark.parametrize(
    ("module", "name"), FUNCTIONS, ids=lambda v: getattr(v, "__name__", v)
)
def test_docstrings_have_their_sections(module, name):
    function = getattr(module, name)
    text = inspect.getdoc(function)
    parameters = inspect.signature(function).parameters
    sections = re.findall(r"^(Args|Returns|Raises|References|Example):$", text, re.M)
    order = ["Args", "Returns", "Raises", "References", "Example"]
    assert sections == [section for section in order if section in sections]
    returns = inspect.signature(function).return_annotation is not None
    assert {"Args"} | ({"Returns"} if returns else set()) <= set(sections)
    args = re.split(r"^(?:Returns|Raises):$", text.split("Args:\n")[1], flags=re.M)[0]
    assert re.findall(r"^    (\w+):", args, re.M) == list(parameters)
    assert text.splitlines()[0].endswith(".")
    if name not in CANNOT_FAIL:
        assert "Raises" in sections


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_modules_have_docstrings(module):
    assert module.__doc__


def test_the_api_page_lists_every_name_once():
    text = (DOCS / "api.md").read_text()
    listed = re.findall(r"^\| `([\w.]+)`", text, re.M)
    want = [f"{address(module)}.{name}" for module, name in NAMES]
    assert sorted(listed) == sorted(want)


def test_the_version_is_written_in_one_place():
    pyproject = (DOCS.parent / "pyproject.toml").read_text()
    assert lora_jax.__version__ not in pyproject
    assert 'path = "lora_jax/__init__.py"' in pyproject
