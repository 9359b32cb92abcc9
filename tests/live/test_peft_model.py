"""A whole model in JAX with adapters of PEFT: its logits and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
import lora_jax.peft
from lora_jax.plan import parts
from tests.support import assert_close

support = pytest.importorskip("tests.live.support")

pytestmark = [pytest.mark.live, *support.FILTERS]

HEADS, PAIRS = 4, 2
CASES = {
    "lora": {"target_modules": "all-linear", "rank_pattern": {"up_proj": 5}},
    "dora": {"target_modules": ["q_proj", "k_proj", "down_proj"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "gate_proj"]},
    "one-layer": {"target_modules": ["v_proj", "o_proj"], "layers_to_transform": [1]},
}
ENTRIES = {"A": ("lora_A", "lora_embedding_A"), "B": ("lora_B", "lora_embedding_B")}


def norm(x, scale):
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return x * jnp.broadcast_to(scale, x.shape)


def rotate(x):
    """Rotary embedding of `(batch, tokens, heads, 2 * PAIRS)`, halves apart."""
    frequencies = 10000.0 ** (-np.arange(PAIRS, dtype=np.float32) / PAIRS)
    angles = np.arange(x.shape[1], dtype=np.float32)[:, None] * frequencies
    first, second = x[..., :PAIRS], x[..., PAIRS:]
    cos, sin = (
        jnp.broadcast_to(jnp.asarray(f(angles))[None, :, None], first.shape)
        for f in (np.cos, np.sin)
    )
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attention(layer, x):
    q, k, v = (
        (x @ layer[f"{name}_proj"]["kernel"]).reshape(*x.shape[:2], -1, 2 * PAIRS)
        for name in "qkv"
    )
    q, k = rotate(q), rotate(k)
    k, v = (jnp.repeat(each, HEADS // each.shape[2], axis=2) for each in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / (2 * PAIRS) ** 0.5
    causal = np.tril(np.ones(scores.shape[-2:], bool))
    scores = jnp.where(jnp.broadcast_to(causal, scores.shape), scores, -jnp.inf)
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
    return mixed.reshape(x.shape) @ layer["o_proj"]["kernel"]


def llama(params, ids):
    """The model of transformers, on params with stacked layers."""
    model = params["model"]

    def block(x, layer):
        x = x + attention(layer["self_attn"], norm(x, layer["input_layernorm"]["scale"]))
        h = norm(x, layer["post_attention_layernorm"]["scale"])
        mlp = {name: own["kernel"] for name, own in layer["mlp"].items()}
        h = jax.nn.silu(h @ mlp["gate_proj"]) * (h @ mlp["up_proj"])
        return x + h @ mlp["down_proj"], None

    x, _ = jax.lax.scan(block, model["embed_tokens"]["embedding"][ids], model["layers"])
    return norm(x, model["norm"]["scale"]) @ params["lm_head"]["kernel"]


@pytest.fixture(scope="module")
def params():
    base = support.model("llama")
    tree = support.as_tree(support.params_of(base), support.leaves_of(base))
    return support.as_jax(support.stacked(tree))


def test_the_model_is_the_same(params):
    ids = jnp.asarray(support.IDS)
    support.assert_same(llama(params, ids), support.logits(support.model("llama")))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, params, tmp_path):
    trained = support.train("llama", tmp_path, **CASES[case])
    loaded = lora_jax.peft.load(tmp_path, params)
    adapted = lora_jax.adapt(llama, loaded.plan)
    ids = jnp.asarray(support.IDS)

    @jax.jit
    def loss(adapters):
        logits = adapted(params, adapters, ids)
        return (logits**2).sum(), logits

    grads, logits = jax.grad(loss, has_aux=True)(loaded.adapters)
    support.assert_same(logits, trained.logits)
    support.run(trained.model).pow(2).sum().backward()
    names = lora_jax.peft.match_names(tmp_path, params)
    targets = loaded.plan.by_leaf()
    assert set(names.values()) == set(targets)
    for site in (row.site for row in names.rows):
        layer = trained.model.base_model.model.get_submodule(site.name)
        places = {path: place(loaded.plan, path, site) for path in targets[site.target]}
        ((path, index),) = ((p, i) for p, i in places.items() if i is not None)
        for entry, grad in grads[path].items():
            want = gradient(layer, entry)
            own = grad[index][tuple(slice(n) for n in want.shape)]
            assert_close(own, want, support.ULPS)


def place(plan, path, site):
    """The index of a module's layer in a target, which may have some of the layers."""
    if not site.indices:
        return ()
    target = plan.targets[path]
    layers = parts.indices_of(parts.entries(target.part, target.shape)[0])
    return layers.index(site.indices[0]) if site.indices[0] in layers else None


def gradient(layer, entry):
    """The gradient of an entry of a layer of PEFT, as it lies here."""
    if entry == "m":
        return support.array(layer.lora_magnitude_vector["default"].weight.grad)
    for name in ENTRIES[entry]:
        for value in getattr(layer, name).values():
            return support.array(getattr(value, "weight", value).grad).T
    raise AssertionError(entry)
