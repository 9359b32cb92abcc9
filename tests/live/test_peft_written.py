"""Adapters that were made here, on trees of JAX, as PEFT loads them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
import lora_jax.peft

support = pytest.importorskip("tests.live.support")

pytestmark = [pytest.mark.live, *support.FILTERS]

DORA = {"use_dora": True}
PATTERNS = {
    "rank_pattern": {"*/q_proj/*": 5, "*k_proj*": 1},
    "alpha_pattern": {"*k*": 7},
}
CONVOLUTIONS = ("conv1/kernel", "conv2/kernel")
AXES = {"conv1/kernel": "iio", "conv2/kernel": "iiio"}

# The base model, the config, and the leaves that are replaced as well.
CASES = {
    "llama": ("llama", {"targets": "*_proj/kernel"}, ()),
    "llama-patterns": (
        "llama",
        {"targets": "*_proj/kernel", "rank_stabilized": True, **PATTERNS},
        (),
    ),
    "llama-dora": (
        "llama",
        {"targets": ("*/self_attn/*", "*head*"), **DORA, **PATTERNS},
        (),
    ),
    "llama-embedding": ("llama", {"targets": ("*embedding", "*/q_proj/*")}, ()),
    "llama-embedding-dora": ("llama", {"targets": "*embedding", **DORA}, ()),
    "llama-replaced": (
        "llama",
        {"targets": "*_proj/kernel", "exclude": "*/v_proj/*"},
        ("lm_head/kernel", "model/embed_tokens/embedding", "model/norm/scale"),
    ),
    "llama-replaced-projections": (
        "llama",
        {"targets": "*/q_proj/kernel"},
        ("model/layers_0/self_attn/v_proj/kernel", "model/layers_1/mlp/up_proj/kernel"),
    ),
    "bert": ("bert", {"targets": ("*/query/kernel", "*/dense/kernel"), "dropout": 0.1}, ()),
    "bert-head-and-biases": (
        "bert",
        {"targets": "*/query/kernel", **DORA},
        (
            "classifier/kernel",
            "classifier/bias",
            "bert/encoder/layer_0/attention/self/query/bias",
            "bert/encoder/layer_1/output/dense/bias",
            "bert/encoder/layer_1/output/LayerNorm/scale",
            "bert/encoder/layer_1/output/LayerNorm/bias",
        ),
    ),
    "bert-biases-of-adapted": (
        "bert",
        {"targets": "*/query/kernel"},
        tuple(f"bert/encoder/layer_{i}/attention/self/query/bias" for i in range(2)),
    ),
    "gpt2": ("gpt2", {"targets": "*/c_*/kernel"}, ()),
    "gpt2-dora": ("gpt2", {"targets": "*/c_*/kernel", **DORA, "rank_stabilized": True}, ()),
    "gpt2-positions": ("gpt2", {"targets": ("*/wpe/*", "*/c_fc/kernel")}, ()),
    "t5": ("t5", {"targets": ("*/q/kernel", "*/wo/kernel"), **DORA}, ()),
    "toy": (
        "toy",
        {"targets": (*CONVOLUTIONS, "square/kernel", "emb/*"), "axes": AXES},
        (),
    ),
    "toy-dora": ("toy", {"targets": CONVOLUTIONS, "axes": AXES, **DORA}, ()),
    "toy-replaced": (
        "toy",
        {"targets": "square/kernel"},
        (*CONVOLUTIONS, "conv1/bias", "conv2/bias", "emb/embedding"),
    ),
    "mixtral": (
        "mixtral",
        {"targets": ("*/experts/*", "*/q_proj/*"), "axes": {"*/experts/*": "bio"}},
        (),
    ),
    "gpt-oss": ("gpt_oss", {"targets": "*/experts/*_proj", "axes": {"*": "bio"}}, ()),
}
NAMES = {
    # Parameters of a module in the order in which it registers them.
    "mixtral": {
        "model.layers.{}.mlp.experts.gate_up_proj": (
            "model/layers_{}/mlp/experts/gate_up_proj"
        ),
        "model.layers.{}.mlp.experts.down_proj": "model/layers_{}/mlp/experts/down_proj",
    },
}
NAMES["gpt_oss"] = NAMES["mixtral"]
STATE_DICT_NAMES = {name: name for name in NAMES["mixtral"]}


def random_leaves(params, paths):
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    rng = np.random.default_rng(4)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }
    return {path: jnp.asarray(random_leaf(rng, named[path])) for path in paths}


def random_leaf(rng, leaf):
    return rng.normal(0.5, 0.3, leaf.shape).astype(leaf.dtype)


def made(params, fields, paths):
    """A plan, random adapters, and random leaves in place of some."""
    config = lora_jax.LoraConfig(**{"rank": 3, "alpha": 4.0, **fields})
    plan = lora_jax.plan_adapters(config, params)
    adapters = lora_jax.init_adapters(jax.random.key(1), params, plan)
    replaced = random_leaves(params, paths)
    return lora_jax.peft.Loaded(support.random_like(adapters, seed=3), plan, replaced)


@pytest.mark.parametrize("case", CASES)
def test_peft_has_the_outputs_of_the_merged_model(case, tmp_path):
    name, fields, paths = CASES[case]
    base = support.model(name)
    leaves = support.leaves_of(base)
    params = support.as_jax(support.as_tree(support.params_of(base), leaves))
    own = made(params, fields, paths)
    lora_jax.peft.save(
        tmp_path, own.adapters, own.plan, names=NAMES.get(name), replaced=own.replaced
    )
    merged = support.from_tree(support.merged(params, own), leaves)
    want = support.logits(support.with_params(name, merged))
    assert np.abs(want - support.logits(base)).max() > 0.02 * np.abs(want).max()
    support.assert_same(support.logits(support.from_files(name, tmp_path)), want)


@pytest.mark.parametrize("fields", [{}, DORA, {"rank_stabilized": True}])
def test_stacked_layers(fields, tmp_path):
    base = support.model("llama")
    leaves = support.leaves_of(base)
    params = support.as_tree(support.params_of(base), leaves)
    params = support.as_jax(support.stacked(params))
    fields = {"targets": "*_proj/kernel", "axes": {"*": "bio"}, **fields}
    norm = "model/layers/input_layernorm/scale"
    own = made(params, fields, (norm, "lm_head/kernel"))
    names = {
        f"model.layers.{{}}.{path.split('/')[-3]}.{path.split('/')[-2]}": path
        for path in own.plan.targets
    } | {"model.layers.{}.input_layernorm": norm}
    lora_jax.peft.save(tmp_path, own.adapters, own.plan, names=names, replaced=own.replaced)
    merged = support.unstacked(support.merged(params, own))
    merged = support.with_params("llama", support.from_tree(merged, leaves))
    again = support.from_files("llama", tmp_path)
    support.assert_same(support.logits(again), support.logits(merged))


@pytest.mark.parametrize(
    ("name", "axes", "paths"),
    [
        ("gpt2", {"*.c_*.weight": "io", "*.wpe.*": "io"}, ("transformer.h.0.ln_1.bias",)),
        ("toy", {"conv1.weight": "oii", "conv2.weight": "oiii", "out.weight": "oi"}, ()),
        ("llama", {"*_proj.weight": "oi"}, ("lm_head.weight", "model.norm.weight")),
        ("mixtral", {"*.gate_up_proj": "boi", "*.mlp.experts.down_proj": "boi"}, ()),
    ],
)
@pytest.mark.parametrize("fields", [{}, DORA])
def test_state_dicts(name, axes, paths, fields, tmp_path):
    params = support.as_jax(support.params_of(support.model(name)))
    own = made(params, {"targets": tuple(axes), "axes": axes, **fields}, paths)
    names = STATE_DICT_NAMES if name == "mixtral" else None
    arguments = {"names": names, "layout": "torch", "replaced": own.replaced}
    if name == "mixtral" and fields:
        with pytest.raises(ValueError, match="and without DoRA"):
            lora_jax.peft.save(tmp_path, own.adapters, own.plan, **arguments)
        return
    lora_jax.peft.save(tmp_path, own.adapters, own.plan, **arguments)
    merged = support.with_params(name, support.merged(params, own))
    again = support.from_files(name, tmp_path)
    support.assert_same(support.logits(again), support.logits(merged))
