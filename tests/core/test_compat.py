import functools
import pathlib
import re

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
