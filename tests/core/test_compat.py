import functools
import importlib
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from lora_jax._core import compat

SOURCE = pathlib.Path(compat.__file__).read_text()


def test_guards_are_above_the_floor():
    pyproject = (pathlib.Path(compat.__file__).parents[2] / "pyproject.toml").read_text()
    floor = tuple(map(int, re.search(r'"jax>=([\d.]+)"', pyproject)[1].split(".")))
    guards = re.findall(r"__version_info__ < \(([\d, ]+)\)", SOURCE)
    asked = re.findall(r"# JAX < \(([\d, ]+)\)", SOURCE)  # which JAX answers itself
    assert guards
    assert asked
    guards += asked
    for guard in guards:
        assert tuple(map(int, guard.split(","))) > floor, "this guard can be deleted"


def test_arrays_outside_explicit_meshes_have_no_spec():
    assert not any(compat.explicit_spec(jnp.ones((2, 3))))
    jax.jit(lambda x: [x] if not any(compat.explicit_spec(x)) else 1 / 0)(jnp.ones(3))


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


def sharded(x, results):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("d")
    out_specs = (spec,) * results
    mapped = functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=out_specs)
    return mapped(lambda x: tuple(x * i for i in range(results)))(x)


@pytest.mark.parametrize(
    "function",
    [
        jnp.sin,
        doubled,
        jax.jit(lambda x: (x, -x)),
        lambda x: lax.top_k(x, 2),
        lambda x: sharded(x, 1),
        lambda x: sharded(x, 2),
    ],
    ids=["one", "custom_vjp", "jit", "top_k", "shard_map", "shard_map_of_two"],
)
def test_bind_gives_what_the_equation_gave(function):
    x = jnp.arange(4.0)
    (equation,) = jax.make_jaxpr(function)(x).eqns
    out = compat.bind(equation, [x])
    several = equation.primitive.multiple_results
    assert isinstance(out, list) == several
    results = out if several else [out]
    for got, want in zip(results, jax.tree.leaves(function(x)), strict=True):
        np.testing.assert_array_equal(got, want)


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
    monkeypatch.setattr(compat, "_LAYERS", ("flax_like.py",))
    yield importlib.import_module("some_models.text.bert").call
    for name in ("some_models.text.bert", "some_models.text", "some_models", "flax_like"):
        sys.modules.pop(name, None)


def lines_of(fn):
    jaxpr = jax.make_jaxpr(fn)(jnp.ones((3, 3)), jnp.ones((3, 3)))
    return compat.source_lines(jaxpr.jaxpr.eqns[0])


def test_lines_of_an_installed_model(installed):
    def loss(w, x):
        return installed(w, x)

    where = "some_models/text/bert.py:6 (call)"
    own, user = lines_of(loss)
    assert own == where
    assert re.fullmatch(r"tests/core/test_compat.py:\d+ \(loss\)", user)
    assert lines_of(installed)[0] == where  # newer JAX forgets who called it


def test_lines_of_a_model_of_the_user(installed):
    from flax_like import apply

    def model(w, x):
        return apply(w, x)

    (own,) = lines_of(lambda w, x: model(w, x))
    assert re.fullmatch(r"tests/core/test_compat.py:\d+ \(model\)", own)


def test_lines_of_jax_are_of_no_interest():
    assert not any("lines_of" not in line for line in lines_of(jnp.matmul))
