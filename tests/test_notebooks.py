"""docs/notebooks: they are valid, and run; here with a small model and few tenants."""

import importlib
import pathlib
import re
import sys

import jax
import pytest

from tests import test_smollm, test_tenants
from tests.support import optimizations

FOLDER = pathlib.Path(__file__).parents[1] / "docs" / "notebooks"
NAMES = ["smollm.ipynb", "tenants.ipynb"]

sys.path.append(str(FOLDER))
notebooks = importlib.import_module("run")


def outputs(notebook):
    """The texts and the kinds of all outputs."""
    found = [each for cell in notebook["cells"] for each in cell.get("outputs", ())]
    texts = ["".join(each["text"]) for each in found if each["output_type"] == "stream"]
    kinds = [kind for each in found for kind in each.get("data", ())]
    return "".join(texts), kinds


def test_all_notebooks_are_tested():
    assert sorted(path.name for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_of_one_run(name):
    notebook = notebooks.read(FOLDER / name)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len({*ids}) == len(ids)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    text, kinds = outputs(notebook)
    assert "text/html" in kinds or "image/png" in kinds
    assert not re.search(r"/(root|home|Users|tmp)\b|Warning|Traceback", text)
    assert (FOLDER / name).stat().st_size < 200_000


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Puts a small model and made-up sentences in the place of the downloads."""
    params, config = test_smollm.make_params(), test_smollm.CONFIG
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(test_tenants.tenants, "TENANTS", test_tenants.SOME)
    monkeypatch.setattr(test_tenants.tenants, "SLOTS", 3)
    text, model = test_smollm.smollm_text, test_smollm.smollm_model
    monkeypatch.setattr(text, "fetch", lambda cache: cache)
    monkeypatch.setattr(text, "make_tokenizer", lambda *_: test_tenants.Words())
    monkeypatch.setattr(model, "load", lambda file: (params, config, {}))
    made_up = test_tenants.made_up_sentences(None, None)
    sentences = [each._replace(review=str(i)) for i, each in enumerate(made_up)]
    monkeypatch.setattr(test_smollm.reviews, "load", lambda *_: sentences)
    with jax.numpy_dtype_promotion("standard"), optimizations(False):
        yield


def test_the_language_model(small):
    notebook = notebooks.read(FOLDER / "smollm.ipynb")
    namespace = notebooks.run(notebook)
    assert namespace["history"]["loss"][-1] < namespace["history"]["loss"][0]
    text, kinds = outputs(notebook)
    assert "the merged and the adapted model agree: True" in text
    assert kinds.count("text/html") == kinds.count("image/png") == 1


@pytest.mark.slow
def test_the_tenants(small):
    notebook = notebooks.read(FOLDER / "tenants.ipynb")
    namespace = notebooks.run(notebook)
    assert list(namespace["served"]) == [t.name for t in test_tenants.SOME]
    assert all(own.after < own.before for own in namespace["served"].values())
    counts = namespace["service"].compilations
    assert {name: n for name, n in counts.items() if name != "join"} == {
        name: 1 for name in counts if name != "join"
    }


def test_an_error_in_a_cell_is_raised(tmp_path):
    cell = {"cell_type": "code", "source": ["1 +\\\n", " '2'"]}
    with pytest.raises(TypeError, match="unsupported operand"):
        notebooks.run({"cells": [cell]}, tmp_path)
