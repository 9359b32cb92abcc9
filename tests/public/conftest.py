"""Settings for public models, whose own code needs JAX's usual promotion."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # Keras reads it when it is imported
os.environ["NETKET_SHARDING"] = "0"  # else NetKet sets a mesh for the whole process

import jax
import pytest

from tests.support import x64

pytest.register_assert_rewrite("tests.public.checks")


@pytest.fixture(scope="module", autouse=True)
def settings():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), x64():
        yield
