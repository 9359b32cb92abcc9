"""Layers with adapters, against what goes into PEFT's and comes out, and its gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
import lora_jax.peft
from tests.support import assert_close

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
support = pytest.importorskip("tests.live.support")

pytestmark = [pytest.mark.live, *support.FILTERS]

ULPS = 2**7  # of float32, of the largest entry: sums of up to 64 products in another order
PATTERNS = {
    "rank_pattern": {"o_proj": 5, "1.mlp.up_proj": 1},
    "alpha_pattern": {"k_proj": 9},
}
DORA = {"use_dora": True}
CASES = {
    "llama": ("llama", {"target_modules": "all-linear", "use_rslora": True, **PATTERNS}),
    "llama-dora": ("llama", {"target_modules": "all-linear", **PATTERNS, **DORA}),
    "llama-embedding": ("llama", {"target_modules": ["embed_tokens"]}),
    "llama-embedding-dora": ("llama", {"target_modules": ["embed_tokens"], **DORA}),
    "bert": ("bert", {"target_modules": "all-linear"}),
    "bert-dora": ("bert", {"target_modules": "all-linear", "use_rslora": True, **DORA}),
    "gpt2": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "gpt2-dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, **DORA}),
    "toy": ("toy", {"target_modules": ["conv1", "conv2", "square"]}),
    "toy-dora": ("toy", {"target_modules": ["conv1", "conv2", "emb"], **DORA}),
}
ENTRIES = {
    "lora_A": "A",
    "lora_embedding_A": "A",
    "lora_B": "B",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
}


class Layer(NamedTuple):
    """What a layer of PEFT did."""

    kind: str
    bias: np.ndarray | None
    x: np.ndarray
    y: np.ndarray
    dy: np.ndarray
    """The gradient of the loss with respect to `y`."""
    grads: dict[str, np.ndarray]
    alpha: float


class Recorded(NamedTuple):
    """What the layers of a model did, by the paths of their weights in a state dict."""

    layers: dict[str, Layer]
    params: dict[str, Any]
    loaded: lora_jax.peft.Loaded
    config: Any


@pytest.fixture(scope="module", params=CASES)
def recorded(request, tmp_path_factory):
    name, fields = CASES[request.param]
    folder = tmp_path_factory.mktemp("peft")
    trained = support.train(name, folder, **fields)
    params = support.params_of(support.model(name))
    loaded = lora_jax.peft.load(folder, params, layout="torch")
    config = trained.model.peft_config["default"]
    return Recorded(record(trained.model), support.as_jax(params), loaded, config)


def record(model):
    """Runs a model forwards and backwards, and takes note of its layers."""
    calls = {}
    layers = {
        f"{name}.weight": layer
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }

    def hook(path):
        def note(module, inputs, output):
            output.retain_grad()
            assert path not in calls
            calls[path] = inputs[0], output

        return note

    handles = [layer.register_forward_hook(hook(path)) for path, layer in layers.items()]
    support.run(model).pow(2).sum().backward()
    for handle in handles:
        handle.remove()
    return {path: noted(layer, *calls[path]) for path, layer in layers.items()}


def noted(layer, x, y):
    base = layer.get_base_layer()
    bias = getattr(base, "bias", None)
    grads = {}
    for name, entry in ENTRIES.items():
        for key, value in getattr(layer, name, {}).items():
            assert key == "default"
            value = getattr(value, "weight", value)
            grads[entry] = matrix(entry, value.grad.numpy().copy())
    return Layer(
        kind=type(base).__name__,
        bias=None if bias is None else support.array(bias),
        x=support.array(x),
        y=support.array(y),
        dy=y.grad.numpy().copy(),
        grads=grads,
        alpha=layer.lora_alpha["default"],
    )


def matrix(entry, value):
    """The gradient of an entry as the adapter here has it: `(in, r)`, `(r, out)`."""
    return value.reshape(-1) if entry == "m" else value.reshape(len(value), -1).T


def forward(layer, weight, x):
    """What torch's layer does, with its own weight."""
    if layer.kind == "Embedding":
        return weight[x]
    bias = 0.0 if layer.bias is None else jnp.asarray(layer.bias)
    if layer.kind in ("Linear", "Conv1D"):
        product = x @ (weight if layer.kind == "Conv1D" else weight.T)
        return product + jnp.broadcast_to(bias, product.shape)
    numbers = {"Conv1d": ("NCH", "OIH", "NCH"), "Conv2d": ("NCHW", "OIHW", "NCHW")}
    padding = {"Conv1d": [(1, 1)], "Conv2d": [(0, 0), (0, 0)]}  # of the model `toy`
    product = jax.lax.conv_general_dilated(
        x,
        weight,
        (1,) * (weight.ndim - 2),
        padding[layer.kind],
        dimension_numbers=numbers[layer.kind],
    )
    bias = jnp.reshape(bias, (-1, *(1,) * (weight.ndim - 2)))
    return product + jnp.broadcast_to(bias, product.shape)


def assert_grads(got, recorded, ulps=ULPS):
    for path, layer in recorded.layers.items():
        assert got[path].keys() == layer.grads.keys()
        for entry, want in layer.grads.items():
            assert_close(got[path][entry], want, ulps)


def test_adapted_functions(recorded):
    layers = recorded.layers

    def fn(params, xs):
        return {
            path: forward(layer, params[path], xs[path]) for path, layer in layers.items()
        }

    adapted = lora_jax.adapt(fn, recorded.loaded.plan)

    @jax.jit
    def run(params, adapters, xs, dys):
        outputs, pull = jax.vjp(lambda adapters: adapted(params, adapters, xs), adapters)
        return outputs, pull(dys)[0]

    xs = {path: jnp.asarray(layer.x, _dtype(layer)) for path, layer in layers.items()}
    dys = {path: jnp.asarray(layer.dy) for path, layer in layers.items()}
    outputs, grads = run(recorded.params, recorded.loaded.adapters, xs, dys)
    for path, layer in layers.items():
        assert_close(outputs[path], layer.y, ULPS)
    assert_grads(grads, recorded)


def _dtype(layer):
    return jnp.int32 if layer.kind == "Embedding" else jnp.float32


MATRICES = [case for case in CASES if not case.startswith(("toy", "llama-emb"))]


@pytest.mark.parametrize("recorded", MATRICES, indirect=True, scope="module")
def test_functions_of_one_weight(recorded):
    linear = lora_jax.dora_linear if recorded.config.use_dora else lora_jax.lora_linear

    @jax.jit
    def run(params, adapters):
        outputs, grads = {}, {}
        for path, layer in recorded.layers.items():
            weight = params[path] if layer.kind == "Conv1D" else params[path].T
            bias = None if layer.bias is None else jnp.asarray(layer.bias)

            def apply(adapter, layer=layer, weight=weight, bias=bias):
                return linear(
                    jnp.asarray(layer.x),
                    weight,
                    adapter,
                    layer.alpha,
                    bias=bias,
                    rank_stabilized=recorded.config.use_rslora,
                )

            outputs[path], pull = jax.vjp(apply, adapters[path])
            (grads[path],) = pull(jnp.asarray(layer.dy))
        return outputs, grads

    outputs, grads = run(recorded.params, recorded.loaded.adapters)
    for path, layer in recorded.layers.items():
        assert_close(outputs[path], layer.y, ULPS)
    assert_grads(grads, recorded)
