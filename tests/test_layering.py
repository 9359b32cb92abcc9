"""Modules import from lower storeys only, at the top of the file."""

import ast
import pathlib

import pytest

import lora_jax

PACKAGE = pathlib.Path(lora_jax.__file__).parent
STOREYS = (
    {"_checks", "_compat", "_frozen", "_paths"},
    {"_numerics"},
    {"initializers", "_column_norm", "_dora_products"},
    {"config", "lora"},
    {"plan", "lora_layer", "dora"},
    {"_axes", "_layout", "_plan_checks"},
    {"_selection", "_merging"},
    {"transform"},
    {"model"},
    {"__init__"},
)
# The storeys of one of those rooms.
TRANSFORM = (
    {"__init__", "_factored"},
    {"_context", "_joining", "_parameters"},
    {"_interpreter", "_products", "_tracing"},
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
)
STOREY = {module: (i, 0) for i, storey in enumerate(STOREYS) for module in storey}
STOREY |= {
    f"transform.{module}": (STOREY["transform"][0], i)
    for i, storey in enumerate(TRANSFORM)
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
    standard = {
        "collections", "contextlib", "dataclasses", "difflib", "fnmatch", "functools",
        "hashlib", "json", "logging", "math", "operator", "pathlib", "re", "sysconfig",
        "traceback", "typing",
    }  # fmt: skip
    assert {name.split(".")[0] for name, _ in imports(path)} <= core | standard


def test_the_design_has_the_same_storeys():
    text = (PACKAGE.parent / "docs" / "design.md").read_text()
    rows = [*enumerate(STOREYS[:-1]), *((f"7.{i}", s) for i, s in enumerate(TRANSFORM))]
    for number, storey in rows:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {number} |")]
        assert all(f"`{module}`" in row for module in storey), row
