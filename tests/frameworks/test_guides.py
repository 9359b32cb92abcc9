"""The Python blocks of each guide run, in order."""

import jax
import pytest

from tests.test_docs import ROOT, python_blocks

GUIDES = ROOT / "docs" / "guides"
PACKAGES = {
    "checkpoints": "orbax.checkpoint",
    "combine": "jax",
    "data_initializers": "jax",
    "equinox": "equinox",
    "gguf": "gguf",
    "haiku": "haiku",
    "huggingface": "transformers",
    "imported": "qwix",
    "keras": "keras",
    "linen": "flax",
    "meshes": "orbax.checkpoint",
    "nnx": "flax",
    "peft": "safetensors",
    "plain": "jax",
    "quantized": "safetensors",
    "slots": "jax",
    "targets": "jax",
    "training": "jax",
}


# qwix calls what flax has deprecated.
IGNORED = {"imported": "ignore::DeprecationWarning"}


def marked(name):
    own = "huggingface" if name == "huggingface" else "frameworks"
    marks = [getattr(pytest.mark, own)]
    if name in IGNORED:
        marks.append(pytest.mark.filterwarnings(IGNORED[name]))
    return pytest.param(name, marks=marks)


@pytest.fixture(scope="module", autouse=True)
def settings():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", [marked(name) for name in PACKAGES])
def test_guide(name):
    pytest.importorskip(PACKAGES[name])
    namespace = {"__name__": "__docs__"}
    for i, block in enumerate(python_blocks(GUIDES / f"{name}.md")):
        exec(compile(block, f"{name}.md, block {i}", "exec"), namespace)
    assert "merged" in namespace


@pytest.mark.frameworks
def test_every_guide_is_run():
    assert {page.stem for page in GUIDES.glob("*.md")} == {*PACKAGES}
