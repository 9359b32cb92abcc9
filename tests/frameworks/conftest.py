"""Settings for the frameworks, whose own code needs JAX's usual promotion."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # Keras reads it when it is imported

import jax
import pytest

from tests.support import x64

pytest.register_assert_rewrite("tests.frameworks.checks")


@pytest.fixture(scope="package", autouse=True)
def quick_compilation():
    """Halves the time, most of which goes into compiling."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", autouse=True)
def settings():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), x64():
        yield
