"""Settings for the frameworks, whose own code needs JAX's usual promotion."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # Keras reads it when it is imported

import jax
import pytest

from tests.support import x64

pytest.register_assert_rewrite("tests.frameworks.checks")


@pytest.fixture(scope="module", autouse=True)
def settings():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), x64():
        yield
