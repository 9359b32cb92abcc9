"""Settings for public models, whose own code needs JAX's usual promotion."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # Keras reads it when it is imported
os.environ["NETKET_SHARDING"] = "0"  # else NetKet sets a mesh for the whole process

import jax
import pytest

from tests.support import x64

pytest.register_assert_rewrite("tests.public.checks")


def pytest_addoption(parser):
    parser.addoption(
        "--packages", default="", help="whose models: import names, with commas"
    )


def pytest_collection_modifyitems(config, items):
    """Leaves out the models of other packages, which may be here in another release."""
    wanted = config.getoption("packages", "")
    others = [item for item in items if wanted and _package(item) not in wanted.split(",")]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def _package(item):
    from tests.public.building import MODELS

    return MODELS[item.callspec.params["name"]][0]


@pytest.fixture(scope="module", autouse=True)
def settings():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), x64():
        yield
