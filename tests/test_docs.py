"""Every example runs: docstrings, README and docs."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import jax
import pytest

import lora_jax
from lora_jax._core import equivalents

pytestmark = pytest.mark.whole

ROOT = pathlib.Path(lora_jax.__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / ".github").glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
MODULES = [info.name for info in pkgutil.walk_packages(lora_jax.__path__, "lora_jax.")]


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.fixture(autouse=True)
def as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    failed, _ = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert not failed


def test_there_are_docstring_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = map(importlib.import_module, MODULES)
    assert sum(bool(t.examples) for m in modules for t in finder.find(m)) >= 4


# Those of the guides need the frameworks: tests/frameworks/test_guides.py runs them.
RUNNABLE = [page for page in PAGES if page.parent.name != "guides"]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace, blocks = {"__name__": "__docs__"}, python_blocks(page)
    for i, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, block {i}", "exec"), namespace)
    printed = words(capsys.readouterr().out)
    for shown in re.findall(r"^```text\n(.*?)^```", page.read_text(), re.M | re.S):
        parts = map(re.escape, words(shown).split("..."))
        assert not blocks or re.search(".*".join(parts), printed), shown


def words(text):
    """A text without its line breaks. In what a page shows, `...` stands for anything."""
    return " ".join(text.split())


def test_the_readme_has_blocks():
    assert (ROOT / "README.md").read_text().count("```python") >= 1


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_the_site_has_a_place_for_each_page():
    placed = re.findall(r": ([\w/]+\.md)$", (ROOT / ".mkdocs.yml").read_text(), re.M)
    docs = ROOT / "docs"
    pages = [str(page.relative_to(docs)) for page in docs.rglob("*.md")]
    assert sorted(placed) == sorted(pages), "give it one in the part `nav` of .mkdocs.yml"


def test_the_readme_shows_what_its_code_prints(capsys):
    text = (ROOT / "README.md").read_text()
    code, shown = (
        re.search(f"```{kind}\n(.*?)```", text, re.S)[1] for kind in ("python", "text")
    )
    exec(code, {})
    assert capsys.readouterr().out == shown


FROM_PEFT = ROOT / "docs" / "from_peft.md"


def with_tables(page):
    """A page with the tables that errors about names of other packages are made from."""
    for kind, tables in (("fields", equivalents.FIELDS), ("names", equivalents.NAMES)):
        for package, rows in tables.items():
            mark = (
                f"<!-- {kind} of {package}: python -m tests.test_docs writes the table -->"
            )
            table = [f"| {package} | here |", "| --- | --- |", *map(row_of, rows)]
            start, end = page.split(f"{mark}\n")
            rest = re.sub(r"\A\n(\|.*\n)*\n*", "", end)
            page = "\n".join([start + mark, "", *table, "", rest])
    return page


def row_of(equivalent):
    """A row of a table; a `|` in code would end its cell."""
    names = ", ".join(f"`{name}`" for name in equivalent.names.split())
    here = f"`{equivalent.here}`" if equivalent.here else "none"
    row = f"{here}: {equivalent.note}" if equivalent.note else here
    row = re.sub(r"`([^`]*)\|([^`]*)`", r"<code>\1&#124;\2</code>", row)
    return f"| {names} | {row} |"


def test_the_page_for_users_of_peft_says_what_errors_say():
    page = FROM_PEFT.read_text()
    assert with_tables(page) == page, "write it anew: python -m tests.test_docs"


if __name__ == "__main__":
    FROM_PEFT.write_text(with_tables(FROM_PEFT.read_text()))
