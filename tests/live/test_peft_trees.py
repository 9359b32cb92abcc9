"""Adapters that PEFT saved, on trees of other shapes: stacked layers, heads as axes."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
import lora_jax.peft

support = pytest.importorskip("tests.live.support")

pytestmark = [pytest.mark.live, *support.FILTERS]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PATTERNS = {
    "rank_pattern": {"q_proj": 5, "1.mlp.up_proj": 2, "0.self_attn.v_proj": 1},
    "alpha_pattern": {"0.self_attn.k_proj": 9, "up_proj": 2},
}
CASES = {
    "all-linear": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {"target_modules": [*ATTENTION, "up_proj"], **PATTERNS},
    "dora": {"target_modules": "all-linear", "use_dora": True, **PATTERNS},
    "dora-of-one-layer": {
        "target_modules": [*ATTENTION, "up_proj"],
        "layers_to_transform": [1],
        "use_dora": True,
    },
    "saved": {
        "target_modules": ["v_proj"],
        "modules_to_save": ["embed_tokens", "norm", "input_layernorm", "1.mlp.up_proj"],
    },
    "pissa": {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"},
    "pissa-of-one-layer": {
        "target_modules": ["k_proj", "up_proj"],
        "init_lora_weights": "pissa",
        "layers_to_transform": [0],
    },
}
# Leaves that have no adapter, and are saved whole.
WHOLE = {
    "model.layers.{}." + module: f"model/layers/{path}"
    for module, path in {
        "input_layernorm": "input_layernorm/scale",
        "post_attention_layernorm": "post_attention_layernorm/scale",
        "mlp.up_proj": "mlp/up_proj/kernel",
    }.items()
}
HEADS = {"q_proj": (16, 4, 4), "k_proj": (16, 2, 4), "o_proj": (4, 4, 16)}


def with_heads(tree, word=""):
    """A tree with the heads of some kernels as axes of their own."""
    if isinstance(tree, dict):
        return {
            key: with_heads(value, _last_word(word, key)) for key, value in tree.items()
        }
    return tree.reshape(HEADS[word]) if word in HEADS else tree


def _last_word(word, key):
    return word if key == "kernel" else key


def without_heads(tree, word=""):
    """Undoes `with_heads`."""
    if isinstance(tree, dict):
        return {
            key: without_heads(value, _last_word(word, key)) for key, value in tree.items()
        }
    if word not in HEADS:
        return tree
    *_, last = HEADS[word]
    return np.asarray(tree).reshape((-1, last) if word == "o_proj" else (16, -1))


def heads_of_stacks(tree):
    return support.stacked(with_heads(tree))


def undo_heads_of_stacks(tree):
    return without_heads(support.unstacked(tree))


SHAPES = {
    "stacked": (support.stacked, support.unstacked),
    "heads": (with_heads, without_heads),
    "heads-of-stacks": (heads_of_stacks, undo_heads_of_stacks),
}


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    return support.train("llama", folder, **CASES[request.param])


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


@pytest.fixture
def params(shape):
    base = support.model("llama")
    tree = support.as_tree(support.params_of(base), support.leaves_of(base))
    return SHAPES[shape][0](tree)


def test_merged_trees(trained, shape, params):
    loaded = lora_jax.peft.load(trained.folder, params)
    tree = SHAPES[shape][1](support.merged(params, loaded))
    merged = support.from_tree(tree, support.leaves_of(support.model("llama")))
    support.assert_same(
        support.logits(support.with_params("llama", merged)), trained.logits
    )


def names_of(trained, shape, params, loaded):
    """What `save` needs to know: all layers of each stack."""
    table = dict(lora_jax.peft.match_names(trained.folder, params))
    if "stack" not in shape:
        return table
    if trained.model.peft_config["default"].layers_to_transform:
        table = {re.sub(r"\d", "{}", name): path for name, path in table.items()}
    return table | {k: v for k, v in WHOLE.items() if v not in loaded.plan.by_leaf()}


def test_peft_loads_what_is_written_again(trained, shape, params, tmp_path):
    loaded = lora_jax.peft.load(trained.folder, params)
    lora_jax.peft.save(
        tmp_path,
        loaded.adapters,
        loaded.plan,
        names=names_of(trained, shape, params, loaded),
        replaced=loaded.replaced,
    )
    again = support.from_files("llama", tmp_path)
    support.assert_same(support.logits(again), trained.logits)


QKV = {"q_proj": 16, "k_proj": 8, "v_proj": 8}
FUSED_NAMES = {
    f"model.layers.{{}}.self_attn.{name}": f"model/layers/self_attn/qkv[:,:,{own}]"
    for name, own in {"q_proj": ":16", "k_proj": "16:24", "v_proj": "24:"}.items()
}


def fused(tree):
    """Stacked layers whose queries, keys and values are one leaf, `(layers, d, 32)`."""
    tree = support.stacked(tree)
    attention = tree["model"]["layers"]["self_attn"]
    parts = [attention.pop(name)["kernel"] for name in QKV]
    attention["qkv"] = np.concatenate(parts, axis=-1)
    return tree


def undo_fused(tree):
    attention = tree["model"]["layers"]["self_attn"]
    split = np.split(np.asarray(attention.pop("qkv")), (16, 24), axis=-1)
    for name, part in zip(QKV, split, strict=True):
        attention[name] = {"kernel": part}
    return support.unstacked(tree)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": [*ATTENTION, "up_proj"], **PATTERNS},
        {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
        {"target_modules": ["k_proj"], "layers_to_transform": [1]},
    ],
)
def test_fused_attention(fields, tmp_path):
    trained = support.train("llama", tmp_path / "in", **fields)
    base = support.model("llama")
    leaves = support.leaves_of(base)
    params = fused(support.as_tree(support.params_of(base), leaves))
    loaded = lora_jax.peft.load(trained.folder, params, names=FUSED_NAMES, layout="jax")
    paths = loaded.plan.by_leaf()["model/layers/self_attn/qkv"]
    assert all("[" in path for path in paths)
    merged = support.from_tree(undo_fused(support.merged(params, loaded)), leaves)
    support.assert_same(
        support.logits(support.with_params("llama", merged)), trained.logits
    )
    names = lora_jax.peft.match_names(
        trained.folder, params, names=FUSED_NAMES, layout="jax"
    )
    lora_jax.peft.save(tmp_path / "out", loaded.adapters, loaded.plan, names=names)
    again = support.from_files("llama", tmp_path / "out")
    support.assert_same(support.logits(again), trained.logits)


def tied(params, ids):
    table = params["embed_tokens"]["embedding"]
    return jnp.tanh(table[ids] @ params["up"]["kernel"]) @ table.T


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    "modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]]
)
def test_one_use_of_a_tied_leaf(modules, use_dora, tmp_path):
    fields = {"target_modules": [*modules, "up"], "use_dora": use_dora}
    trained = support.train("tied", tmp_path / "in", **fields)
    base = support.params_of(support.model("tied"))
    params = {
        "embed_tokens": {"embedding": jnp.asarray(base["embed_tokens.weight"])},
        "up": {"kernel": jnp.asarray(base["up.weight"].T)},
    }
    ids = jnp.asarray(support.IDS)
    loaded = lora_jax.peft.load(trained.folder, params, tied, ids)
    uses = {"embed_tokens": "lookup", "lm_head": "product"}
    want = {f"embed_tokens/embedding@{uses[name]}" for name in modules}
    assert {*loaded.adapters} == {*want, "up/kernel"}
    assert not loaded.replaced
    adapted = lora_jax.adapt(tied, loaded.plan)
    support.assert_same(adapted(params, loaded.adapters, ids), trained.logits)
    names = lora_jax.peft.match_names(trained.folder, params, tied, ids)
    lora_jax.peft.save(tmp_path / "out", loaded.adapters, loaded.plan, names=names)
    again = support.from_files("tied", tmp_path / "out")
    support.assert_same(support.logits(again), trained.logits)
