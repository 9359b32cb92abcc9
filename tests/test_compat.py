import pathlib
import re

import jax
import jax.numpy as jnp

from lora_jax import _compat

SOURCE = pathlib.Path(_compat.__file__).read_text()


def test_guards_are_above_the_floor():
    pyproject = (
        pathlib.Path(_compat.__file__).parent.parent / "pyproject.toml"
    ).read_text()
    floor = tuple(map(int, re.search(r'"jax>=([\d.]+)"', pyproject)[1].split(".")))
    guards = re.findall(r"__version_info__ < \(([\d, ]+)\)", SOURCE)
    assert guards
    for guard in guards:
        assert tuple(map(int, guard.split(","))) > floor, "this guard can be deleted"


def test_arrays_outside_explicit_meshes_have_no_spec():
    assert not any(_compat.explicit_spec(jnp.ones((2, 3))))
    jax.jit(lambda x: [x] if not any(_compat.explicit_spec(x)) else 1 / 0)(jnp.ones(3))
