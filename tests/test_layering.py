"""Modules import from lower storeys only, at the top of the file."""

import ast
import pathlib

import pytest

import lora_jax

PACKAGE = pathlib.Path(lora_jax.__file__).parent
STOREYS = (
    {"_checks", "_compat"},
    {"_numerics"},
    {"initializers", "_column_norm", "_dora_products"},
    {"lora"},
    {"lora_layer", "dora"},
    {"__init__"},
)
STOREY = {module: i for i, storey in enumerate(STOREYS) for module in storey}
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
            if node.module == "lora_jax":
                yield from ((f"lora_jax.{alias.name}", top) for alias in node.names)
            else:
                yield node.module, top


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_down(path):
    own = path.with_suffix("").parts[0]
    assert own in STOREY, f"give {own} a storey, here and in docs/design.md"
    for name, top in imports(path):
        if name.split(".")[0] == "lora_jax":
            assert top, f"{path} imports {name} inside a function"
            assert STOREY[name.split(".")[1]] < STOREY[own], f"{path} imports {name}"


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
    standard = {
        "collections", "contextlib", "dataclasses", "difflib", "functools", "math",
        "operator", "typing",
    }  # fmt: skip
    assert {name.split(".")[0] for name, _ in imports(path)} <= core | standard


def test_the_design_has_the_same_storeys():
    text = (PACKAGE.parent / "docs" / "design.md").read_text()
    for i, storey in enumerate(STOREYS[:-1]):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {i} |")]
        assert all(f"`{module}`" in row for module in storey), row
