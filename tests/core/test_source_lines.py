import importlib
import re
import sys

import jax
import jax.numpy as jnp
import pytest

from lora_jax._core import source_lines

MODEL = """
import jax.numpy as jnp
from flax_like import apply

def call(w, x):
    return apply(w, x)
"""
LAYER = """
import jax.numpy as jnp

def apply(w, x):
    return jnp.sin(x @ w)
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A model in one installed package, of the layers of another."""
    site = tmp_path / "site-packages"
    (site / "some_models" / "text").mkdir(parents=True)
    (site / "some_models" / "text" / "bert.py").write_text(MODEL)
    (site / "flax_like.py").write_text(LAYER)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(source_lines, "_LAYERS", ("flax_like.py",))
    yield importlib.import_module("some_models.text.bert").call
    for name in ("some_models.text.bert", "some_models.text", "some_models", "flax_like"):
        sys.modules.pop(name, None)


def lines_of(fn):
    jaxpr = jax.make_jaxpr(fn)(jnp.ones((3, 3)), jnp.ones((3, 3)))
    return source_lines.source_lines(jaxpr.jaxpr.eqns[0])


def test_lines_of_an_installed_model(installed):
    def loss(w, x):
        return installed(w, x)

    where = "some_models/text/bert.py:6 (call)"
    own, user = lines_of(loss)
    assert own == where
    assert re.fullmatch(r"tests/core/test_source_lines.py:\d+ \(loss\)", user)
    assert lines_of(installed)[0] == where  # newer JAX forgets who called it


def test_lines_of_a_model_of_the_user(installed):
    from flax_like import apply

    def model(w, x):
        return apply(w, x)

    (own,) = lines_of(lambda w, x: model(w, x))
    assert re.fullmatch(r"tests/core/test_source_lines.py:\d+ \(model\)", own)


def test_lines_of_jax_are_of_no_interest():
    assert not any("lines_of" not in line for line in lines_of(jnp.matmul))
