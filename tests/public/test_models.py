"""Models of public packages, which nobody prepared for adapters, at toy size.

`tests/public/run.py` makes the environments that have them, and runs these tests there.
"""

import pytest

from tests.public import checks, language, science, vision
from tests.public.building import MODELS

# What the packages warn of, and what they are warned of, is theirs.
pytestmark = [pytest.mark.public, pytest.mark.filterwarnings("ignore")]

FAMILIES = (language, science, vision)  # each enters its models when it is imported


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", MODELS)
def test_adapted_is_merged(name, method, pytestconfig):
    package, build = MODELS[name]
    if not pytestconfig.getoption("packages", ""):
        pytest.importorskip(package)
    model = build()
    if method == "dora" and model.no_dora:
        pytest.skip(model.no_dora)
    checks.check(model, use_dora=method == "dora")
    checks.check_uses(model, use_dora=method == "dora")
