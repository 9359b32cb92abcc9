"""Checkpoints of PEFT and the outputs, gradients and merged weights that belong to them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax
from lora_jax import peft
from lora_jax._io.tensor_files import CheckpointError
from tests.peft import support
from tests.peft.support import GOLDEN, LLAMA, PREFIX, check
from tests.support import asarray

BASE = load_file(LLAMA / "base" / "model.safetensors")
EXPECTED = load_file(LLAMA / "expected.safetensors")
MODULES = json.loads((LLAMA / "modules.json").read_text())
LAYERS, HEADS, KV_HEADS, WIDTH, HEAD = 2, 4, 2, 48, 12
CONV, EMBEDDING = support.cases("peft_conv"), support.cases("peft_embedding")
CHANGED = support.changed_base_cases()


def expected(prefix):
    return {k.removeprefix(prefix): v for k, v in EXPECTED.items() if k.startswith(prefix)}


def nested(tensors):
    """The tree of a JAX model: kernels `(in, out)`."""
    tree = {}
    for name, value in tensors.items():
        *words, last = name.removeprefix("model.").removesuffix(".weight").split(".")
        node = tree
        for word in words:
            node = node.setdefault(word, {})
        kind = "embedding" if "embed" in last else "kernel" if value.ndim == 2 else "scale"
        node[last] = {kind: asarray(value.T if kind == "kernel" else value)}
    return tree


def stacked(tensors):
    tree = nested(tensors)
    layers = [tree["layers"][str(i)] for i in range(LAYERS)]
    return tree | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def torch_params():
    return {name: asarray(value) for name, value in BASE.items()}


def in_tree(tree, name):
    for word in name.removeprefix("model.").split("."):
        tree = tree[word]
    return next(iter(tree.values()))


def rotated(x):
    """Rotary positions of `(batch, tokens, heads, head)`, halves apart."""
    frequency = 10000.0 ** (-np.arange(0, HEAD, 2) / HEAD)
    angle = np.outer(np.arange(x.shape[1]), frequency)
    cos, sin = (
        asarray(np.tile(f(angle), 2), "float32")[None, :, None] for f in (np.cos, np.sin)
    )
    low, high = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-high, low], axis=-1) * sin


def llama(weight, ids):
    """Logits; `weight` gives `(in, out)` matrices by name."""

    def normed(x, name):
        mean = jnp.mean(x * x, axis=-1, keepdims=True)
        return x / jnp.sqrt(mean + jnp.float32(1e-6)) * weight(name)[None, None]

    def attention(x, name):
        q, k, v = (
            (x @ weight(f"{name}.{p}_proj")).reshape(*x.shape[:2], -1, HEAD) for p in "qkv"
        )
        k, v = (jnp.repeat(y, HEADS // KV_HEADS, axis=2) for y in (rotated(k), v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", rotated(q), k) / jnp.sqrt(jnp.float32(HEAD))
        mask = np.tril(np.ones(scores.shape[-2:], bool))
        scores = jnp.where(mask[None, None], scores, jnp.float32(-1e30))
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return y.reshape(*x.shape) @ weight(f"{name}.o_proj")

    x = weight("model.embed_tokens")[ids]
    for i in range(LAYERS):
        name = f"model.layers.{i}"
        x += attention(normed(x, f"{name}.input_layernorm"), f"{name}.self_attn")
        y = normed(x, f"{name}.post_attention_layernorm")
        gate, up = (y @ weight(f"{name}.mlp.{p}_proj") for p in ("gate", "up"))
        x += (jax.nn.silu(gate) * up) @ weight(f"{name}.mlp.down_proj")
    return normed(x, "model.norm") @ weight("lm_head")


def llama_torch(params, ids):
    def weight(name):
        value = params[f"{name}.weight"]
        return value.T if value.ndim == 2 and "embed" not in name else value

    return llama(weight, ids)


def llama_tree(params, ids):
    return llama(lambda name: in_tree(params, name), ids)


MODELS = {
    "torch": (llama_torch, torch_params, "torch"),
    "tree": (llama_tree, lambda: nested(BASE), "jax"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_logits_of_a_llama(kind):
    forward, make, layout = MODELS[kind]
    params, ids = make(), asarray(EXPECTED["input/input_ids"], "int32")
    loaded = peft.load(LLAMA / "adapter", params, layout=layout)
    forward = jax.jit(forward)
    check(forward(params, ids), EXPECTED["logits_base"])
    check(forward(support.merged(params, loaded), ids), EXPECTED["logits_merged"])
    assert np.abs(EXPECTED["logits"] - EXPECTED["logits_base"]).max() > 0.1


def test_gradients_of_a_llama():
    params, ids = torch_params(), asarray(EXPECTED["input/input_ids"], "int32")
    loaded = peft.load(LLAMA / "adapter", params, layout="torch")
    adapted = lora_jax.adapt(llama_torch, loaded.plan)

    def loss(adapters):
        logits = adapted(params, adapters, ids)
        return jnp.sum(logits * EXPECTED["loss_weight"]), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(loaded.adapters)
    check(logits, EXPECTED["logits"])
    wanted = expected(f"grad/{PREFIX}")
    assert len(wanted) == 2 * len(grads) == 24
    for name, want in wanted.items():
        module, entry = name.removesuffix(".weight").split(".lora_")
        check(grads[f"{module}.weight"][entry], want.T)


def test_ranks_and_scales_of_a_llama():
    plan = peft.load(LLAMA / "adapter", torch_params(), layout="torch").plan
    assert {path.removesuffix(".weight") for path in plan.targets} == set(MODULES)
    for name, fields in MODULES.items():
        target, config = plan.targets[f"{name}.weight"], plan.config
        for rank in (target.rank, config.rank_of(f"{name}.weight")):
            assert rank == fields["r"]
        for scale in (target.scale, config.scale_of(f"{name}.weight")):
            assert scale == fields["scaling"]
        assert (target.axes, target.dropout) == ("oi", 0.05)


def test_stacked_layers_of_a_llama():
    params = stacked(BASE)
    loaded = peft.load(LLAMA / "adapter", params)
    got = support.merged(params, loaded)["layers"]
    wanted = expected("merged/model.layers.")
    assert len(wanted) == 12
    for name, want in wanted.items():
        layer, *words = name.removesuffix(".weight").split(".")
        check(in_tree(got, ".".join(words))[int(layer)].T, want)
    # Layer 1 has rank 2, and layer 0 has 8.
    down = "layers/mlp/down_proj/kernel"
    shapes = {path: own["A"].shape for path, own in loaded.adapters.items() if down in path}
    assert shapes == {f"{down}[:1]": (1, 80, 8), f"{down}[1:]": (1, 80, 2)}


@pytest.mark.parametrize("kind", ["torch", "tree", "stacked"])
def test_a_llama_is_written_as_it_was(kind, tmp_path):
    own = {"torch": torch_params, "tree": lambda: nested(BASE)}
    params = own.get(kind, lambda: stacked(BASE))()
    layout = "torch" if kind == "torch" else "jax"
    loaded = peft.load(LLAMA / "adapter", params, layout=layout)
    names = peft.match_names(LLAMA / "adapter", params, layout=layout)
    config = written_as(LLAMA / "adapter", tmp_path, loaded, names=names, layout=layout)
    own = peft.PeftConfig.from_dict(config, "config")
    for name, fields in MODULES.items():
        assert (own.rank_of(name), own.alpha_of(name)) == (fields["r"], fields["alpha"])
    assert (own.r, own.lora_alpha, own.lora_dropout) == (8, 16, 0.05)


def golden(case, tmp_path, module, suffixes):
    """A checkpoint of a golden case, and its tensors."""
    tensors = load_file(GOLDEN / case["file"])
    entries = {f"{module}.{s}": tensors[n] for n, s in suffixes.items() if n in tensors}
    fields = {"target_modules": [module]} | case["meta"]["config"]
    return support.write(tmp_path, entries, **fields), tensors


def written_as(folder, out, loaded, **options):
    """Asserts that a save has the arrays of a folder."""
    peft.save(out, loaded.adapters, loaded.plan, **options)
    written, config = support.read(out)
    for name, value in support.read(folder)[0].items():
        np.testing.assert_array_equal(written.pop(name), value)
    assert not written
    return config


@pytest.mark.parametrize("layout", ["jax", "torch"])
@pytest.mark.parametrize("case", [*CONV, *EMBEDDING], ids=lambda case: case["id"])
def test_convolutions_and_embeddings(case, layout, tmp_path):
    conv, jax_layout = case in CONV, layout == "jax"
    kind = "" if conv else "embedding_"
    suffixes = {x: f"lora_{kind}{x}" + ".weight" * conv for x in "AB"}
    suffixes |= {"B_bias": "lora_B.bias", "m": "lora_magnitude_vector"}
    folder, tensors = golden(case, tmp_path / "in", "net.own", suffixes)

    def own(name):
        moved = conv and jax_layout
        return np.moveaxis(tensors[name], (0, 1), (-1, -2)) if moved else tensors[name]

    leaf = "kernel" if conv else "embedding" if jax_layout else "weight"
    params = {"net": {"own": {leaf: asarray(own("W0"))}}}
    if "b0" in tensors:
        params["net"]["own"]["bias"] = asarray(tensors["b0"])
    loaded = peft.load(folder, params, layout=layout)
    merged = support.merged(params, loaded)["net"]["own"]
    check(merged[leaf], own("W_merged"), case)
    if conv:
        assert loaded.plan.targets["net/own/kernel"].scale == case["meta"]["scaling"]
    if "B_bias" in tensors:
        assert set(loaded.replaced) == {"net/own/bias"}
        check(merged["bias"], tensors["b_merged"], case)
        return
    written_as(folder, tmp_path / "out", loaded, layout=layout)


def changed_base(case, tmp_path, **config):
    suffixes = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}
    case = case | {"meta": case["meta"] | {"config": case["meta"]["config"] | config}}
    folder, tensors = golden(case, tmp_path, "net.q", suffixes)
    weight = {n: tensors[n] for n in ("W0", "W_base", "W_merged") if n in tensors}
    if not case["meta"]["fan_in_fan_out"]:
        weight = {name: value.T for name, value in weight.items()}
    return folder, weight


@pytest.mark.parametrize("layout", ["jax", "torch"])
@pytest.mark.parametrize(
    "case",
    [case for case in CHANGED if "W_base" in case["tensors"]],
    ids=lambda case: case["id"],
)
def test_bases_that_the_initialization_changed(case, layout, tmp_path):
    folder, weight = changed_base(case, tmp_path)
    turn = (lambda w: w.T) if layout == "torch" else (lambda w: w)
    params = {"net": {"q": {"kernel": asarray(turn(weight["W0"]))}}}
    loaded = peft.load(folder, params, layout=layout)
    check(turn(loaded.replaced["net/q/kernel"]), weight["W_base"], case)
    got = support.merged(params, loaded)["net"]["q"]["kernel"]
    check(turn(got), weight["W_merged"], case)


@pytest.mark.parametrize("axis", [0, 1])
def test_changed_bases_of_stacked_layers(axis, tmp_path):
    case = next(case for case in CHANGED if case["id"] == "pissa_rslora_16x24")
    _, weight = changed_base(case, tmp_path)
    tensors = load_file(GOLDEN / case["file"])
    other = support.draw(16, 24)
    entries = {}
    for layer, sign in ((0, 1), (2, -1)):  # the second has the negated weight
        entries[f"h.{layer}.q.lora_A.weight"] = tensors["A"]
        entries[f"h.{layer}.q.lora_B.weight"] = sign * tensors["B"]
    fields = case["meta"]["config"] | {"target_modules": ["h.0.q", "h.2.q"]}
    folder = support.write(tmp_path, entries, **fields)
    stack = np.stack([weight["W0"], other, -weight["W0"]], axis)
    params = {"h": {"q": {"kernel": asarray(stack)}}}
    loaded = peft.load(folder, params)
    base = np.moveaxis(np.asarray(loaded.replaced["h/q/kernel"]), axis, 0)
    check(base, [weight["W_base"], other, -weight["W_base"]], case)
    got = np.moveaxis(support.merged(params, loaded)["h"]["q"]["kernel"], axis, 0)
    check(got, [weight["W_merged"], other, -weight["W_merged"]], case)


def experts_of_the_golden_case(tmp_path, **config):
    (case,) = support.cases("peft_params")
    tensors = load_file(GOLDEN / case["file"])
    depth = {"w1": "experts.base_layer", "w2": "experts"}
    entries = {
        f"{depth[w]}.lora_{f}.weight": tensors[f"{w}/{f}"] for w in depth for f in "AB"
    }
    assert {PREFIX + name for name in entries} == set(case["meta"]["state_dict_keys"])
    targets = ["experts.w1", "experts.w2"]
    fields = {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": targets}
    return support.write(tmp_path / "in", entries, **fields | config), tensors, case


def experts(tensors, layout):
    turned = (0, 2, 1) if layout == "torch" else (0, 1, 2)
    stacks = {w: asarray(tensors[f"W_{w}"].transpose(turned)) for w in ("w1", "w2")}
    return {"experts": stacks}, turned


@pytest.mark.parametrize("layout", ["jax", "torch"])
def test_experts(layout, tmp_path):
    folder, tensors, case = experts_of_the_golden_case(tmp_path)
    params, turned = experts(tensors, layout)
    # With the axes either way round, the shapes of torch fit both.
    given = {f"experts.{w}": (f"experts/{w}", "boi") for w in ("w1", "w2")}
    found = {name: path for name, (path, _) in given.items()}
    names = given if layout == "torch" else None
    loaded = peft.load(folder, params, names=names, layout=layout)
    got = support.merged(params, loaded)["experts"]
    for name in ("w1", "w2"):
        want = tensors[f"W_{name}"] + tensors[f"{name}/delta"]
        check(got[name].transpose(turned), want, case)
    names = peft.match_names(folder, params, names=names, layout=layout)
    assert dict(names) == (given if layout == "torch" else found)
    config = written_as(folder, tmp_path / "out", loaded, names=names, layout=layout)
    assert config["target_parameters"] == ["experts.w1", "experts.w2"]


def test_experts_whose_shapes_leave_it_open(tmp_path):
    folder, tensors, case = experts_of_the_golden_case(tmp_path)
    params, turned = experts(tensors, "torch")
    with pytest.raises(CheckpointError, match=r"more than one way .* give names=.*'bio'"):
        peft.load(folder, params, layout="torch")
    names = {
        "experts.base_layer": ("experts/w1", "boi"),
        "experts": ("experts/w2", "boi"),
    }
    loaded = peft.load(folder, params, names=names, layout="torch")
    merged = support.merged(params, loaded)["experts"]["w2"].transpose(turned)
    check(merged, tensors["W_w2"] + tensors["w2/delta"], case)
    both = peft.match_names(folder, params, names=names, layout="torch")
    assert list(both) == ["experts.w1", "experts.w2"]


def test_experts_with_ranks_of_their_own(tmp_path):
    # PEFT looks rank and alpha of a parameter up by its own name.
    folder, tensors, case = experts_of_the_golden_case(
        tmp_path, alpha_pattern={"experts.w1": 6, "experts": 100}
    )
    params, _ = experts(tensors, "jax")
    got = support.merged(params, peft.load(folder, params))["experts"]
    check(got["w1"], tensors["W_w1"] + 1.5 * tensors["w1/delta"], case)
    check(got["w2"], tensors["W_w2"] + tensors["w2/delta"], case)
