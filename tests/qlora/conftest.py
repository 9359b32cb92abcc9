"""Programs of these tests are compiled without optimizations, unless they ask for them."""

import jax
import pytest


@pytest.fixture
def optimized():
    """For tests of what the compiler makes of a program."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
