"""The order of the folders: each imports from those in front of it, and nothing private."""

import ast
import graphlib
import pathlib
import sys

import lora_jax

PACKAGE = pathlib.Path(lora_jax.__file__).parent
# docs/design.md draws them. Those of one line do not import each other.
ORDER = (
    {"_core"},
    {"_io", "lowrank"},
    {"quant", "layers"},
    {"plan"},
    {"transform"},
    {"model"},
    {"arithmetic", "from_data", "foreign_trees"},
    {"checkpoint", "optim", "peft", "plots"},
    {"cli"},
    {"__init__", "__main__"},
)
# Packages that are extras, imported where they are needed.
EXTRAS = {
    "_io/tensor_files.py": {"safetensors"},
    "cli/_terminal.py": {"tqdm"},
    "plots.py": {"matplotlib"},
    "quant/_gguf_reader.py": {"gguf"},
}
LEVEL = {folder: level for level, folders in enumerate(ORDER) for folder in folders}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imports(path):
    """Triples of a module, the name taken from it, and whether that is at the top level."""
    tree = ast.parse((PACKAGE / path).read_text())
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for alias in node.names:
                inner = PACKAGE.parent / node.module.replace(".", "/") / alias.name
                if inner.with_suffix(".py").exists() or inner.is_dir():
                    yield f"{node.module}.{alias.name}", "", top
                else:
                    yield node.module, alias.name, top


def own_imports(path):
    """Modules of the library that a module imports, as words, and the names taken."""
    for name, taken, top in imports(path):
        first, *words = name.split(".")
        if first == "lora_jax":
            assert top, f"{path} imports {name} inside a function"
            yield (*words,), taken


def words_of(path):
    words = path.with_suffix("").parts
    return words[:-1] if len(words) > 1 and words[-1] == "__init__" else words


def test_folders_import_from_those_in_front_of_them():
    for path in MODULES:
        own = path.with_suffix("").parts[0]
        for words, _ in own_imports(path):
            same = words[0] == own
            assert same or LEVEL[words[0]] < LEVEL[own], f"{path} imports {'.'.join(words)}"


def test_a_folder_in_a_folder_imports_nothing_of_the_outer_one():
    for path in MODULES:
        inner = path.parts[:-1]
        for words, _ in own_imports(path) if len(inner) > 1 else ():
            own = words[: len(inner)] == inner
            assert own or words[0] != inner[0], f"{path} imports {'.'.join(words)}"


def test_nothing_private_leaves_its_folder():
    for path in MODULES:
        for words, taken in own_imports(path):
            if words[0] != path.parts[0]:
                private = [word for word in (*words[1:], taken) if word.startswith("_")]
                assert not private, f"{path} imports {private} of {'.'.join(words)}"


def test_no_import_circle():
    graph = {words_of(path): {words for words, _ in own_imports(path)} for path in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


def test_internals_of_jax_are_imported_in_one_place():
    for path in MODULES:
        private = [
            name
            for name, _, _ in imports(path)
            if name.startswith(("jax._src", "jax.extend", "jaxlib"))
        ]
        assert not private or path.name == "compat.py", f"{path} imports {private}"


def test_only_core_dependencies():
    core = {"jax", "numpy", "optax", "chex", "lora_jax"}
    for path in MODULES:
        names = {name.split(".")[0] for name, _, _ in imports(path)}
        extras = names - core - sys.stdlib_module_names
        assert extras <= EXTRAS.get(path.as_posix(), set()), path


def test_the_design_draws_the_same_folders():
    text = (PACKAGE.parent / "docs" / "design.md").read_text()
    for folder in LEVEL.keys() - {"__init__", "__main__"}:
        assert f"{folder}[" in text, f"the picture in docs/design.md lacks {folder}"
