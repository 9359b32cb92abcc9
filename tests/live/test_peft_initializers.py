"""EVA and LoRA-GA, against PEFT's, on a small network."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
support = pytest.importorskip("tests.live.support")

from peft.tuners.lora.eva import get_eva_state_dict  # noqa: E402
from peft.tuners.lora.loraga import preprocess_loraga  # noqa: E402

pytestmark = [
    pytest.mark.live,
    # The inputs of the first layer have no gradient.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    *support.FILTERS,
]

KEY = jax.random.key(0)
SIZES = (12, 16, 10, 8)
NAMES = [str(2 * i) for i in range(len(SIZES) - 1)]


def network():
    torch.manual_seed(0)
    layers = []
    for n_in, n_out in itertools.pairwise(SIZES):
        layers += [torch.nn.Linear(n_in, n_out), torch.nn.Tanh()]
    with torch.no_grad():  # so that the other layers' inputs have almost one direction
        layers[0].weight[:, 1:] *= 0.05
    return torch.nn.Sequential(*layers[:-1])


def apply(params, x):
    for name in NAMES:
        x = x @ params[f"{name}.weight"].T + params[f"{name}.bias"][None]
        x = jnp.tanh(x) if name != NAMES[-1] else x
    return x


def loss(params, x):
    return jnp.mean(apply(params, x) ** 2)


def make_plan(params, x, rank=2):
    config = lora_jax.LoraConfig(rank, 2.0 * rank, "*.weight")
    return lora_jax.plan_adapters(config, params, apply, x)


def make_batch():
    generator = torch.Generator().manual_seed(1)
    sizes = 0.8 ** torch.arange(SIZES[0])
    return torch.randn(192, SIZES[0], generator=generator) * sizes


def onto(columns):
    """The projection onto the span of some columns."""
    q = np.linalg.qr(np.asarray(columns, "float64"))[0]
    return q @ q.T


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva(rho):
    model, batch = network(), make_batch()
    config = peft.LoraConfig(
        r=2,
        target_modules=NAMES,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, tau=0.9999),
    )
    theirs = get_eva_state_dict(
        model,
        [batch],  # of several batches, PEFT's components are approximate
        config,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    params = support.params_of(model)
    x = jnp.asarray(batch.numpy())
    plan = make_plan(params, x)
    found = lora_jax.init_adapters_from_inputs(KEY, params, plan, apply, [(x,)], rho=rho)
    ranks = {f"{name}.weight": len(own) for name, own in theirs.items() if len(own)}
    assert {p: own.rank for p, own in found.plan.targets.items()} == ranks
    for path in ranks:
        own = support.array(theirs[path.removesuffix(".weight")])
        difference = onto(found.adapters[path]["A"]) - onto(own.T)
        assert np.abs(difference).max() < 1e-2
    assert rho == 1.0 or len({*ranks.values()}) > 1


def test_lora_ga():
    model, batch = network(), make_batch()
    before = support.params_of(model)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=NAMES,
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(
            direction="ArB2r", scale="stable", stable_gamma=16
        ),
    )
    preprocess_loraga(model, config, lambda: model(batch).square().mean().backward())
    adapted = peft.get_peft_model(model, config)
    x = jnp.asarray(batch.numpy())
    plan = make_plan(before, x)
    base, adapters = lora_jax.init_adapters_from_gradients(
        KEY, before, plan, loss, [(x,)], method="lora_ga"
    )
    for name in NAMES:
        layer, path = adapted.base_model.model[int(name)], f"{name}.weight"
        a = support.array(layer.lora_A["default"].weight).T
        b = support.array(layer.lora_B["default"].weight).T
        own = adapters[path]
        np.testing.assert_allclose(onto(own["A"]), onto(a), atol=1e-3)
        np.testing.assert_allclose(onto(own["B"].T), onto(b.T), atol=1e-3)
        # PEFT's columns of A have the length 1, and its B has the singular values.
        size = SIZES[1:][NAMES.index(name)] ** 0.25 / 16**0.5
        np.testing.assert_allclose(np.linalg.norm(own["A"], axis=0), size, rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(own["B"], axis=1), size, rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(a, axis=0), 1.0, rtol=1e-4)
        assert np.all(np.linalg.norm(b, axis=1) < size)
    for path, target in plan.targets.items():
        update = target.scale * (adapters[path]["A"] @ adapters[path]["B"]).T
        np.testing.assert_allclose(base[path] + update, before[path], atol=1e-6)
