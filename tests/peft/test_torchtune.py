"""Adapters of torchtune: the golden export of a Llama, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax import peft
from lora_jax._io.tensor_files import CheckpointError
from tests.peft import support
from tests.peft.support import GOLDEN, draw
from tests.support import asarray

TENSORS = load_file(GOLDEN / "torchtune" / "llama_dora_to_peft.safetensors")


def part(prefix):
    own = TENSORS.items()
    return {k.removeprefix(prefix): v for k, v in own if k.startswith(prefix)}


STATE, PEFT, FIXED, BASE = map(part, ("tune/", "peft/", "peft_fixed/", "hf_base/"))
HEADS = {"alpha": 8.0, "num_heads": 4, "num_kv_heads": 2}
ATTENTION = "layers.0.attn.q_proj"


def load(state=STATE, params=BASE, **options):
    return peft.load_torchtune(state, params, **{"layout": "torch", **HEADS, **options})


def test_the_export_of_a_llama(tmp_path):
    loaded = load()
    peft.save(tmp_path, loaded.adapters, loaded.plan, layout="torch")
    written = support.read(tmp_path)[0]
    assert written.keys() == PEFT.keys()
    for name, value in written.items():
        # torchtune's own export leaves the magnitudes in the wrong order.
        np.testing.assert_array_equal(value, FIXED.get(name, PEFT[name]), err_msg=name)
    changed = [name for name in FIXED if not np.array_equal(FIXED[name], PEFT[name])]
    assert len(changed) == 4
    assert {t.scale for t in loaded.plan.targets.values()} == {2.0}


def test_a_file_and_a_tree_of_jax(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_file(STATE, path)
    layers = {"layers": {"self_attn": {"q_proj": {"kernel": jnp.zeros((2, 32, 32))}}}}
    state = {k: v for k, v in STATE.items() if "q_proj" in k}
    stacked = load(state, layers, layout="jax")
    own, plain = stacked.adapters["layers/self_attn/q_proj/kernel"], load(path).adapters
    for i in range(2):
        one = plain[f"model.layers.{i}.self_attn.q_proj.weight"]
        for name, value in one.items():
            np.testing.assert_array_equal(own[name][i], value)


def test_models_of_torchtune_keep_its_order():
    params = {f"{ATTENTION}.weight": jax.ShapeDtypeStruct((32, 32), "float32")}
    state = {k: v for k, v in STATE.items() if ATTENTION in k}
    adapter = load(state, params, model="torchtune").adapters[f"{ATTENTION}.weight"]
    np.testing.assert_array_equal(adapter["B"].T, STATE[f"{ATTENTION}.lora_b.weight"])
    np.testing.assert_array_equal(adapter["m"], STATE[f"{ATTENTION}.magnitude"])


def test_lora_merges_with_alpha(tmp_path):
    state = {k: v for k, v in STATE.items() if k.startswith("layers.0.mlp.w2.lora")}
    params = {"model.layers.0.mlp.down_proj.weight": asarray(draw(32, 48))}
    (path,) = params
    loaded = load(state, params, alpha=6)
    merged = lora_jax.merge_adapters(params, loaded.adapters, loaded.plan)
    a, b = (state[f"layers.0.mlp.w2.lora_{n}.weight"] for n in "ab")
    np.testing.assert_allclose(
        merged[path], params[path] + 1.5 * b @ a, rtol=1e-5, atol=1e-6
    )


def test_a_bias_that_dora_would_multiply_is_refused():
    params = BASE | {"model.layers.1.mlp.up_proj.bias": jnp.zeros(48)}
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.up_proj.bias' too"):
        load(params=params)
    plain = {k: v for k, v in STATE.items() if "magnitude" not in k}
    assert len(load(plain, params).adapters) == 15


ONE = {k: v for k, v in STATE.items() if k.startswith(ATTENTION)}


@pytest.mark.parametrize(
    ("state", "options", "error", "message"),
    [
        (STATE, {"num_heads": 6, "num_kv_heads": 3}, CheckpointError, "which 3 heads"),
        (STATE, {"num_heads": 32, "num_kv_heads": 16}, CheckpointError, "16 heads of an e"),
        (STATE, {"num_kv_heads": None}, CheckpointError, "sizes of these heads differ"),
        ({}, {}, CheckpointError, r"have one rank, got \[\]"),
        ("a.pt", {}, CheckpointError, r"is a pickle.* safetensors.torch.save_file"),
        ("a.pth", {}, CheckpointError, "is a pickle"),
        ("a.bin", {}, CheckpointError, "is a pickle"),
        (ONE | {"x.weight": draw(2, 2)}, {}, CheckpointError, "not an entry of a torch"),
        (
            {"vision.q.lora_a.weight": draw(2, 2)}, {}, CheckpointError,
            "no name of 'vision.q' in the models of Hugging Face .* model='torchtune'",
        ),
        (
            ONE | {"layers.1.attn.q_proj.lora_a.weight": draw(2, 32),
                "layers.1.attn.q_proj.lora_b.weight": draw(32, 2)},
            {}, CheckpointError, r"have one rank, got \[2, 4\]",
        ),
        (
            {k: v.astype("int32") for k, v in ONE.items()}, {}, CheckpointError,
            "is int32, and must be an array, floating point",
        ),
        (dict.fromkeys(ONE, "text"), {}, CheckpointError, "is str, and must be an array"),
        (STATE, {"num_heads": 0}, ValueError, "num_heads must be a positive .*, got 0"),
        (STATE, {"num_kv_heads": 2.0}, ValueError, "num_kv_heads must be a positive"),
        (STATE, {"num_heads": True}, ValueError, "num_heads must be a positive integer"),
        (STATE, {"alpha": 0}, CheckpointError, "the alpha of .* is 0"),
        (STATE, {"alpha": "8"}, TypeError, "alpha must be a number"),
        (STATE, {"model": "llama"}, ValueError, "model must be"),
        (STATE, {"strict": None}, TypeError, "strict"),
    ],
)  # fmt: skip
def test_what_is_refused(state, options, error, message):
    with pytest.raises(error, match=message):
        load(state, **options)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_adapters_are_float32_unless_told_otherwise(stored):
    state = {name: value.astype(stored) for name, value in STATE.items()}
    for dtype, expected in ((None, "float32"), ("file", stored), ("bfloat16", "bfloat16")):
        loaded = load(state, dtype=dtype)
        leaves = jax.tree.leaves(loaded.adapters)
        assert {x.dtype for x in leaves} == {jnp.dtype(expected)}
