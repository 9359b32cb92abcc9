"""Models of public packages, which nobody prepared for adapters, at toy size.

`tests/public/run.py` makes the environments that have them, and runs these tests there.
"""

import importlib

import pytest

from tests.public import checks, language, science, vision
from tests.public.building import BUILDERS

pytestmark = pytest.mark.public

MODULES = (language, science, vision)


def built(name):
    packages, build = BUILDERS[name]
    for package in packages:
        pytest.importorskip(package)
    return build()


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", BUILDERS)
def test_adapted_is_merged(name, method):
    checks.check(built(name), use_dora=method == "dora")
