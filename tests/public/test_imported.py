"""Trees in which public packages train adapters, against the outputs of these packages."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from tests.public import checks, language
from tests.support import assert_close, by_path

pytestmark = [pytest.mark.public, pytest.mark.filterwarnings("ignore")]

ULPS = 2**12  # of float32, in which the models compute
SCALE = 1.5
IDS = checks.tokens(2, 5)


def check(params, layout, want, fn, scale=None):
    """Compares the model with imported adapters with what the package computes."""
    read = lora_jax.import_adapters(params, layout, fn, IDS, scale=scale)
    assert type(read.params) is type(params)
    assert 2 * len(read.adapters) == sum("lora" in path for path in by_path(params)) > 0
    assert_close(fn(lora_jax.merge_adapters(*read), IDS), want, ULPS, "float32")
    adapted = lora_jax.adapt(fn, read.plan)(read.params, read.adapters, IDS)
    assert_close(adapted, want, ULPS, "float32")
    assert jnp.abs(fn(read.params, IDS) - want).max() > 0.01


@pytest.mark.parametrize("name", language.GEMMA)
def test_gemma(name):
    gm = pytest.importorskip("gemma.gm")
    model = language.module_of_gemma(**language.GEMMA[name])
    tuned = gm.nn.LoRA(rank=2, model=model, dtype=jnp.float32)
    shapes = jax.eval_shape(tuned.init, jax.random.key(0), IDS)["params"]
    params = checks.drawn(shapes, "float32")
    check(
        params,
        "gemma",
        tuned.apply({"params": params}, IDS).logits,
        lambda params, ids: model.apply({"params": params}, ids).logits,
    )


@pytest.mark.parametrize("name", ["tunix_llama3", "tunix_qwen2", "tunix_gemma3"])
def test_tunix(name):
    pytest.importorskip("tunix")
    import flax
    import qwix
    from flax import nnx

    flax.config.update("flax_always_shard_variable", False)  # there is no mesh
    make, call = language.module_of_tunix(*language.TUNIX[name][:2])
    model = make(nnx.Rngs(0))
    provider = qwix.LoraProvider(module_path=".*(einsum|proj)", rank=2, alpha=2 * SCALE)
    length = IDS.shape[1]
    inputs = (
        IDS,
        jnp.broadcast_to(jnp.arange(length), IDS.shape),
        None,
        jnp.broadcast_to(jnp.tri(length, dtype=bool), (*IDS.shape, length)),
    )
    tuned = qwix.apply_lora_to_model(model, provider, *inputs, rngs=nnx.Rngs(1))
    params = checks.drawn(nnx.state(tuned, nnx.Param), "float32")
    nnx.update(tuned, params)
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def fn(params, ids):
        return call(nnx.merge(graphdef, params, rest, copy=True), ids)

    check(params, "qwix", call(tuned, IDS), fn, scale=SCALE)
