"""Quantized layers of torchtune: NF4 in blocks of the rows of PyTorch's (out, in)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from safetensors.flax import load_file

import lora_jax
from lora_jax import quant
from tests.qlora.support import KEY
from tests.quant.support import golden_cases
from tests.support import GOLDEN, assert_golden

CASES = golden_cases("torchtune")


class Golden:
    """A quantized layer of torchtune. The weight stays (out, in), as do its blocks."""

    def __init__(self, case):
        self.case, meta = case, case["meta"]
        tensors = self.tensors = load_file(GOLDEN / case["file"])
        sizes = {"block_size": 64, "scaler_block_size": 256} | meta["quant_kwargs"]
        names = {
            "codes": "quantized_data",
            "scales": "quantized_scalers",
            "group_scales": "quantization_factor",
            "mean": "scaler_mean",
        }
        self.stored = quant.NF4Tensor(
            **{ours: tensors[f"nf4/{theirs}"] for ours, theirs in names.items()},
            **sizes,
            entry_shape=tensors["W0"].shape,
            weight_dtype=meta["dtype"],
            codec="torchao",
        )
        self.is_dora, self.alpha = "m" in tensors, meta["alpha"]
        self.adapter = {n: self.entry(n) for n in ("A", "B", "m") if n in tensors}
        config = lora_jax.LoraConfig(
            meta["rank"], self.alpha, use_dora=self.is_dora, dtype=tensors["A"].dtype
        )
        self.params = {"w": self.stored}
        self.plan = lora_jax.plan_adapters(config, self.params, torch_linear, tensors["x"])

    def entry(self, name, prefix=""):
        value = self.tensors[prefix + name]
        return value.T if name in "AB" else value

    def by_adapt(self, x, adapter):
        adapters = {"w": adapter}
        y = lora_jax.adapt(torch_linear, self.plan)(self.params, adapters, x)
        if "b0" not in self.tensors:
            return y
        bias = self.tensors["b0"]
        if self.is_dora:  # torchtune scales the bias, too; to adapt it is the user's own
            norms = lora_jax.adapted_column_norms(self.params, adapters, self.plan)
            bias = adapter["m"] / lax.stop_gradient(norms["w"]) * bias
        return y + bias[None]

    def by_layer(self, x, adapter):
        """On the dequantized weight: the transpose of the stored one has other blocks."""
        weight, bias = quant.dequantize(self.stored).T, self.tensors.get("b0")
        if not self.is_dora:
            return lora_jax.lora_linear(x, weight, adapter, self.alpha, bias=bias)
        return lora_jax.dora_linear(
            x, weight, adapter, self.alpha, bias=bias, scale_bias=True
        )

    def check(self, name, got, want):
        assert_golden(self.case, got, want, name)


def torch_linear(params, x):
    return x @ params["w"].T


EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])


@EVERY_CASE
def test_torchtune_has_the_same_bits(case):
    golden = Golden(case)
    golden.stored.check()
    # W0 is what its tensor dequantizes to: quantized again, it has the same 4-bit codes.
    got, want = quant.dequantize(golden.stored), golden.tensors["W0"]
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)
    again = golden.stored.quantize_like(want)
    np.testing.assert_array_equal(again.codes, golden.stored.codes)


@pytest.mark.parametrize("how", ["by_adapt", "by_layer"])
@EVERY_CASE
def test_torchtune_has_the_same_outputs_and_gradients(case, how):
    golden = Golden(case)
    c = golden.tensors["c"]

    def loss(x, adapter):
        y = getattr(golden, how)(x, adapter)
        return jnp.sum((y * c).astype(jnp.float32)), y

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grad_x, grads), y = grad(golden.tensors["x"], golden.adapter)
    golden.check("y", y, golden.tensors["y"])
    golden.check("grad/x", grad_x, golden.tensors["grad/x"])
    for name, value in grads.items():
        golden.check(f"grad/{name}", value, golden.entry(name, "grad/"))
        assert value.dtype == golden.adapter[name].dtype


@EVERY_CASE
def test_torchtune_has_the_same_merges_and_first_magnitudes(case):
    golden = Golden(case)
    if golden.is_dora:
        first = lora_jax.init_adapters(KEY, golden.params, golden.plan)
        golden.check("m", first["w"]["m"], golden.tensors["m_init"])
    else:
        merged = lora_jax.merge_adapters(golden.params, {"w": golden.adapter}, golden.plan)
        golden.check("W", merged["w"], golden.tensors["W_merged"])


def test_blocks_of_the_transpose_are_others():
    # Guards the tests above: which way round the weight is quantized makes a difference.
    w = load_file(GOLDEN / CASES[0]["file"])["W0"]
    there = quant.dequantize(quant.quantize_nf4(w, 8, 4))
    back = quant.dequantize(quant.quantize_nf4(w.T, 8, 4)).T
    assert np.abs(there - back).max() > 1e-2
