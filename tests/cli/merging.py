"""What the tests of merging share."""

import pathlib

import jax.numpy as jnp
import numpy as np

from lora_jax.cli import main
from tests import support
from tests.cli import models


def run(*arguments):
    return main(["merge", *map(str, arguments)])


def refuse(capsys, *arguments):
    """The one line that a merge ends with, which fails and leaves nothing."""
    folder = pathlib.Path(arguments[2]).parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(*arguments) == 1
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lora-jax: error: ")
    return line


def to_own(adapter, base, own, *options):
    """Converts an adapter of PEFT, and returns the folder."""
    convert = ["convert", adapter, own, "--to=lora_jax", f"--base={base}", *options]
    assert main([*map(str, convert)]) == 0
    return own


def assert_equal(got, want):
    assert set(got) == set(want)
    for name, values in want.items():
        np.testing.assert_array_equal(got[name], values, name)


def assert_merged(got, tensors, factors, dtype=None, ulps=4):
    want = models.merged(tensors, factors)
    assert set(got) == set(want)
    for name, values in want.items():
        floating = jnp.issubdtype(tensors[name].dtype, jnp.floating)
        expected = jnp.dtype(dtype if dtype and floating else tensors[name].dtype)
        assert got[name].dtype == expected, name
        assert got[name].shape == values.shape
        if name.removesuffix(".weight") in factors:
            support.assert_close(got[name], values, ulps)
        else:
            np.testing.assert_array_equal(got[name], values.astype(expected))
