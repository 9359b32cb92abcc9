"""Layers of peft and torchtune: outputs, gradients, merged and unmerged weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax
from tests import support
from tests.support import GOLDEN

CASES = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
# The gradients' names there and here; biases have no transpose.
NAMES = ("A", "B", "m", "B_bias")


class Golden:
    """One case in this library's layout: weights and factors are transposed once."""

    def __init__(self, case):
        self.case, meta = case, case["meta"]
        self.tensors = load_file(GOLDEN / case["file"])
        self.fan_in_fan_out = meta.get("fan_in_fan_out", False)
        config = meta.get("config", {})
        self.rank_stabilized = config.get("use_rslora", False)
        self.alpha = config.get("lora_alpha", meta.get("alpha"))
        self.dropout = config.get("lora_dropout", meta.get("dropout", 0.0))
        self.train = meta["train"]
        self.torchtune = case["suite"] == "torchtune"
        self.x, self.c = self.tensors["x"], self.tensors["c"]
        self.bias = self.tensors.get("b0")
        self.weight = self.weight_of("W0")
        self.adapter = {name: self.entry(name) for name in NAMES if name in self.tensors}
        self.is_dora = "m" in self.adapter

    def weight_of(self, name):
        weight = self.tensors[name]
        return weight if self.fan_in_fan_out else weight.T

    def entry(self, name, prefix=""):
        value = self.tensors[prefix + name]
        return value.T if name in "AB" else value

    def options(self):
        return {"rank_stabilized": self.rank_stabilized}

    def linear(self, x, adapter):
        options = self.options() | {"bias": self.bias}
        if self.train and self.dropout:
            options |= {"dropout_rate": self.dropout, "dropout_key": jax.random.key(0)}
        if not self.is_dora:
            return lora_jax.lora_linear(x, self.weight, adapter, self.alpha, **options)
        if self.torchtune:
            options |= {"scale_bias": True, "dropout_mode": "torchtune"}
        return lora_jax.dora_linear(x, self.weight, adapter, self.alpha, **options)

    def check(self, name, got, want):
        support.assert_golden(self.case, got, want, name)


def case_id(case):
    return f"{case['suite']}-{case['id']}"


def load(case, monkeypatch):
    golden = Golden(case)
    if "dropout_mask" in golden.tensors:
        support.recorded_dropout(monkeypatch, golden.tensors["dropout_mask"] != 0)
    return golden


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_output_and_gradients(case, monkeypatch):
    golden = load(case, monkeypatch)

    def loss(x, adapter):
        y = golden.linear(x, adapter)
        return jnp.sum((y * golden.c).astype(jnp.float32)), y

    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (grad_x, grads), y = jax.jit(grad)(golden.x, golden.adapter)
    golden.check("y", y, golden.tensors["y"])
    golden.check("grad/x", grad_x, golden.tensors["grad/x"])
    for name, value in grads.items():
        golden.check(f"grad/{name}", value, golden.entry(name, "grad/"))
        assert value.dtype == golden.adapter[name].dtype


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_merged_and_unmerged_weight(case):
    golden = Golden(case)
    alpha, options = golden.alpha, golden.options()
    bias = golden.tensors.get("b_merged")

    @jax.jit
    def dora(weight, adapter):
        merged = lora_jax.merge_dora_weight(weight, adapter, alpha, **options)
        norm = lora_jax.dora_column_norm(weight, adapter, alpha, **options)
        unmerge = lora_jax.unmerge_dora_weight
        return merged, unmerge(merged, adapter, norm, alpha, **options)

    @jax.jit
    def layer(weight, bias, adapter):
        merged = lora_jax.merge_lora_layer(weight, bias, adapter, alpha, **options)
        unmerge = lora_jax.unmerge_lora_layer
        return merged, unmerge(*merged, adapter, alpha, **options)

    @jax.jit
    def lora(weight, adapter):
        merged = lora_jax.merge_lora_weight(weight, adapter, alpha, **options)
        return merged, lora_jax.unmerge_lora_weight(merged, adapter, alpha, **options)

    if golden.is_dora:
        merged, unmerged = dora(golden.weight, golden.adapter)
    elif "B_bias" in golden.adapter:
        (merged, bias), (unmerged, unmerged_bias) = layer(
            golden.weight, golden.bias, golden.adapter
        )
        golden.check("b_merged", bias, golden.tensors["b_merged"])
        golden.check("b_unmerged", unmerged_bias, golden.bias)
    else:
        merged, unmerged = lora(golden.weight, golden.adapter)
    golden.check("W_merged", merged, golden.weight_of("W_merged"))
    golden.check("W0", unmerged, golden.weight)
    if "W_unmerged" in golden.tensors:
        golden.check("W_unmerged", unmerged, golden.weight_of("W_unmerged"))
    if "y_merged" in golden.tensors:
        y = golden.x @ merged
        y = y if bias is None else y + jnp.broadcast_to(bias, y.shape)
        golden.check("y_merged", y, golden.tensors["y_merged"])


@pytest.mark.parametrize(
    "case", [case for case in CASES if "m_init" in case["tensors"]], ids=case_id
)
def test_first_magnitude(case):
    golden = Golden(case)
    rank = golden.case["meta"].get("r", 4)

    @jax.jit
    def first(weight, x):
        adapter = lora_jax.init_dora_adapter(jax.random.key(0), weight, rank)
        return adapter["m"], golden.linear(x, adapter)

    with support.optimizations(False):  # of the random values, which are slow to compile
        m, y = first(golden.weight, golden.x)
    golden.check("m_init", m, golden.tensors["m_init"])
    if "y_init" in golden.tensors:
        golden.check("y_init", y, golden.tensors["y_init"])


def test_float32_merge_into_half_precision_is_bit_exact():
    cases = [c for c in CASES if c["meta"].get("autocast_adapter_dtype")]
    half = [c for c in cases if c["meta"]["dtype"] != "float32" and "lora" in c["id"]]
    assert half
    for case in half:
        golden = Golden(case)
        merged = lora_jax.merge_lora_weight(golden.weight, golden.adapter, golden.alpha)
        np.testing.assert_array_equal(merged, golden.weight_of("W_merged"))
