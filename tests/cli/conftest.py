"""A PEFT adapter for the tiny model."""

import pytest

from tests.cli import models


@pytest.fixture
def factors():
    return models.make_factors()


@pytest.fixture
def adapter(tmp_path, factors):
    return models.write_adapter(tmp_path / "adapter", factors)
