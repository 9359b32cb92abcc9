"""The Python blocks of each guide run, in order."""

import pathlib
import re

import jax
import pytest

import lora_jax

GUIDES = pathlib.Path(lora_jax.__file__).parent.parent / "docs" / "guides"
PACKAGES = {
    "checkpoints": "orbax.checkpoint",
    "equinox": "equinox",
    "haiku": "haiku",
    "huggingface": "transformers",
    "keras": "keras",
    "linen": "flax",
    "nnx": "flax",
    "peft": "safetensors",
    "plain": "jax",
    "quantized": "safetensors",
    "training": "jax",
}


def marked(name):
    own = "huggingface" if name == "huggingface" else "frameworks"
    return pytest.param(name, marks=getattr(pytest.mark, own))


@pytest.fixture(scope="module", autouse=True)
def settings():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", [marked(name) for name in PACKAGES])
def test_guide(name):
    pytest.importorskip(PACKAGES[name])
    text = (GUIDES / f"{name}.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    namespace = {"__name__": "__docs__"}
    for i, block in enumerate(blocks):
        exec(compile(block, f"{name}.md, block {i}", "exec"), namespace)
    assert "merged" in namespace


@pytest.mark.frameworks
def test_every_guide_is_run():
    assert {page.stem for page in GUIDES.glob("*.md")} == {*PACKAGES}
