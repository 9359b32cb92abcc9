"""What the tests of `lora_jax.peft` share: checkpoints written by hand, and golden ones."""

import functools
import json

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax import peft
from lora_jax.plan.adapter_plan import AdapterPlan
from tests.support import GOLDEN, normal

draw = functools.partial(normal, dtype="float32")  # as NumPy: it is written to files
LLAMA = GOLDEN / "checkpoints" / "llama_lora_patterns"
PREFIX = "base_model.model."
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def abstract(shapes):
    """A tree of shapes as arrays without values."""
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, "float32"), shapes, is_leaf=is_shape
    )


def write(folder, tensors, **config):
    """Writes a checkpoint as PEFT would; the names are those of the model."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {PREFIX + name: np.ascontiguousarray(v) for name, v in tensors.items()}
    save_file(arrays, folder / TENSORS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def read(folder):
    """The arrays and the config of a checkpoint."""
    tensors = load_file(folder / TENSORS)
    return tensors, json.loads((folder / CONFIG).read_text())


def linear(name, n_in, n_out, rank, seed=0, dora=False, dtype="float32"):
    """The entries of the adapter of a `torch.nn.Linear`."""
    entries = {
        f"{name}.lora_A.weight": draw(rank, n_in, seed=seed, dtype=dtype),
        f"{name}.lora_B.weight": draw(n_out, rank, seed=seed, dtype=dtype),
    }
    if dora:
        m = 5 + draw(n_out, seed=seed, dtype=dtype)
        entries[f"{name}.lora_magnitude_vector"] = m
    return entries


def update_of(tensors, name, scale):
    """`(in, out)`, the update of a Linear, in float64."""
    a, b = (tensors[f"{name}.lora_{f}.weight"].astype(np.float64) for f in "AB")
    return scale * (b @ a).T


def merged(params, loaded):
    """The params with all that a checkpoint has."""
    params = peft.replace_leaves(params, loaded.replaced)
    return lora_jax.merge_adapters(params, loaded.adapters, loaded.plan)


def check(got, want, case=None, rtol=1e-5):
    """Compares as the golden cases say."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    bound = 2 * rtol if case is None else case["atol"] + case["rtol"]
    error = np.abs(got - want).max()
    assert error <= bound * max(1.0, np.abs(want).max()), f"off by {error:.3g}"


def reference_rows():
    """The entries and the config of each kind of adapter that PEFT wrote, by name."""
    text = (GOLDEN / "peft_json" / "checkpoint_keys.json").read_text()
    return {row["name"]: row for row in json.loads(text)}


def cases(suite):
    """The golden cases of a suite that are read from checkpoints."""
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    return [case for case in manifest["checkpoint_cases"] if case["suite"] == suite]


def changed_base_cases():
    """The golden cases whose initialization changed the base."""
    return json.loads((GOLDEN / "manifest.json").read_text())["changed_base_cases"]


def same_updates(one: AdapterPlan, other: AdapterPlan, adapters, others):
    """Asserts that two sets of adapters change weights by the same."""
    assert list(one.targets) == list(other.targets)
    for path, target in one.targets.items():
        second = other.targets[path]
        assert target.axes == second.axes, path
        assert target.method == second.method
        updates = [
            t.scale * np.asarray(a["A"], np.float64) @ np.asarray(a["B"], np.float64)
            for t, a in ((target, adapters[path]), (second, others[path]))
        ]
        np.testing.assert_allclose(updates[1], updates[0], rtol=1e-6, atol=1e-6)
        if target.method == "dora":
            np.testing.assert_array_equal(others[path]["m"], adapters[path]["m"])
