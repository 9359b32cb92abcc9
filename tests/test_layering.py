"""Modules import from lower storeys only, at the top of the file."""

import ast
import pathlib
import sys

import pytest

import lora_jax

PACKAGE = pathlib.Path(lora_jax.__file__).parent
STOREYS = (
    {"_checks", "_compat", "_files", "_frozen", "_quantized", "_tables"},
    {"_adapter_checks", "_numerics", "_paths", "_placement", "_svd", "_tensor_stream"},
    {"initializers", "quant", "_column_norm", "_dora_products"},
    {"config", "lora"},
    {"plan", "lora_layer", "dora", "decomposed"},
    {"_axes", "_layout", "_plan_checks", "_stacks"},
    {"_selection", "_merging", "quantized_params"},
    {"transform"},
    {"model", "decomposed_params"},
    {"checkpoint", "optim", "peft"},
    {"cli"},
    {"__init__", "__main__"},
)
# The storeys of those that are rooms of their own.
ROOMS = {
    "quant": (
        {"_arithmetic", "_packing", "tensors"},
        {"_bitsandbytes", "_channels", "_inputs", "_torchao"},
        {"fp8", "int8", "nf4"},
        {"files"},
        {"__init__"},
    ),
    "transform": (
        {"__init__", "_deferred"},
        {"_factored"},
        {"_choosing", "_context", "_joining", "_parameters"},
        {"_interpreter", "_norms", "_products", "_tracing"},
        {
            "_rules_arithmetic",
            "_rules_calls",
            "_rules_convolution",
            "_rules_gather",
            "_rules_loops",
            "_rules_products",
            "_rules_spmd",
            "_rules_structure",
        },
        {"_rules"},
        {"_discovery", "adapt"},
    ),
    "optim": (
        {"_leaves"},
        {"freezing", "labels", "preconditioning"},
        {"optimizers"},
        {"__init__"},
    ),
    "peft": (
        {"_entries", "_fields", "_names", "_uses"},
        {"_arrays", "_fitting", "config"},
        {"_places", "_table", "matching"},
        {"_checkpoint", "_modules", "_sites"},
        {"_wholes"},
        {"_completeness", "_planning", "_replaced", "_saved", "configuring"},
        {"_bases", "_ties", "writing"},
        {"_placing"},
        {"reading", "torchtune"},
        {"__init__"},
    ),
    "cli": (
        {"_adapters", "_base", "_blocks", "_messages", "_terminal"},
        {"_fold", "_loading", "_output"},
        {"_effects"},
        {"_convert", "_diff", "_inspect", "_merge"},
        {"_main"},
        {"__init__"},
    ),
}
# Packages that are extras, imported where they are needed.
EXTRAS = {"_files.py": {"safetensors"}, "cli/_terminal.py": {"tqdm"}}
STOREY = {module: (i, 0) for i, storey in enumerate(STOREYS) for module in storey}
STOREY |= {
    f"{room}.{module}": (STOREY[room][0], i)
    for room, storeys in ROOMS.items()
    for i, storey in enumerate(storeys)
    for module in storey
}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imports(path):
    """Pairs of an imported module's full name and whether that is at the top level."""
    tree = ast.parse((PACKAGE / path).read_text())
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            if (PACKAGE.parent / node.module.replace(".", "/")).is_dir():
                yield from ((f"{node.module}.{alias.name}", top) for alias in node.names)
            else:
                yield node.module, top


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_down(path):
    own = ".".join(path.with_suffix("").parts)
    assert own in STOREY, f"give {own} a storey, here and in docs/design.md"
    for name, top in imports(path):
        if name.split(".")[0] == "lora_jax":
            assert top, f"{path} imports {name} inside a function"
            imported = name.removeprefix("lora_jax.")
            assert STOREY[imported] < STOREY[own], f"{path} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_internals_of_jax_are_imported_in_one_place(path):
    private = [
        name
        for name, _ in imports(path)
        if name.startswith(("jax._src", "jax.extend", "jaxlib"))
    ]
    assert not private or path.name == "_compat.py"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_core_dependencies(path):
    core = {"jax", "numpy", "optax", "chex", "lora_jax"}
    names = {name.split(".")[0] for name, _ in imports(path)}
    extras = names - core - sys.stdlib_module_names
    assert extras <= EXTRAS.get(path.as_posix(), set())


def test_the_design_has_the_same_storeys():
    text = (PACKAGE.parent / "docs" / "design.md").read_text()
    rows = [*enumerate(STOREYS[:-1])]
    for room, storeys in ROOMS.items():
        floor = STOREY[room][0]
        rows += [(f"{room} {floor}.{i}", storey) for i, storey in enumerate(storeys)]
    for number, storey in rows:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {number} |")]
        assert all(f"`{module}`" in row for module in storey), row
