"""Models with one array for the embedding and the head, and adapters of one of both."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax
from lora_jax.cli import main
from tests import support
from tests.cli import models
from tests.cli.merging import assert_equal, assert_merged, refuse, run, to_own

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPE = models.ENTRIES, models.WIDTH
TIED = {"tie_word_embeddings": True}


def draw(seed):
    return models.draw(SHAPE, seed)


def write_tied(folder, shards=1, dtype="float32", **config):
    tensors = models.make_tensors(dtype)
    del tensors[HEAD]
    return models.write_base(folder, tensors, shards, **config), tensors


def embedding_entries(module="model.embed_tokens"):
    return {
        f"{module}.lora_embedding_A": models.draw((2, models.ENTRIES), 1),
        f"{module}.lora_embedding_B": models.draw((models.WIDTH, 2), 2),
    }


def write_peft(folder, which):
    """An adapter of PEFT, and what it adds to or has for each of the two arrays."""
    entries, factors, options, added = {}, {}, {}, {}
    if "embedding" in which:
        entries |= embedding_entries()
        a, b = entries.values()
        added[EMBEDDING] = 3 * (b @ a).T.astype(np.float64)
    if "head" in which:
        factors = models.make_factors(2, modules={"lm_head": SHAPE})
        ((a, b),) = factors.values()
        added[HEAD] = 3 * b.astype(np.float64) @ a
    saved = {"saved head": (HEAD,), "both saved": (EMBEDDING, HEAD)}.get(which, ())
    if saved:
        factors = models.make_factors(2)
        added = {name: draw(i + 7) for i, name in enumerate(saved)}
        entries |= added
        options["modules_to_save"] = [name.split(".")[-2] for name in saved]
    else:
        ends = {"embedding": "embed_tokens", "head": "lm_head"}
        options["target_modules"] = [own for end, own in ends.items() if end in which]
    models.write_adapter(folder, factors, entries, r=2, **options)
    return factors if saved else {}, added


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize(
    "which", ["embedding", "head", "embedding and head", "saved head", "both saved"]
)
def test_adapters_of_one_end_untie(tmp_path, capsys, which, shards, dtype):
    options = {**TIED, "torch_dtype": "float32", "vocab_size": 16}
    base, tensors = write_tied(tmp_path / "base", shards, **options)
    factors, added = write_peft(tmp_path / "adapter", which)
    out, more = tmp_path / "out", [f"--dtype={dtype}"] if dtype else []
    assert run(base, tmp_path / "adapter", out, *more) == 0
    got = models.read_model(out)
    want = dict.fromkeys((EMBEDDING, HEAD), tensors[EMBEDDING])
    for name, own in added.items():
        want[name] = own if "saved" in which else want[name].astype(np.float64) + own
    for name, values in want.items():
        assert got[name].dtype == jnp.dtype(dtype or "float32")
        support.assert_close(got.pop(name), values, 4)
    rest = {name: tensor for name, tensor in tensors.items() if name != EMBEDDING}
    assert_merged(got, rest, factors if "saved" in which else {}, dtype)
    config = json.loads((out / "config.json").read_text())
    changed = {"tie_word_embeddings": False} | ({"torch_dtype": dtype} if dtype else {})
    assert config == {"model_type": "llama", **options, **changed}
    *_, line = capsys.readouterr().out.splitlines()
    assert line == (
        f"untied: {HEAD} is a tensor of its own in OUT, made of {EMBEDDING}, and "
        "config.json has tie_word_embeddings: false."
    )
    if shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"][HEAD] == index["weight_map"][EMBEDDING]
        for name, shard in index["weight_map"].items():
            assert name in load_file(out / shard)


@pytest.mark.parametrize("path", [EMBEDDING, f"{EMBEDDING}@product"])
def test_a_head_may_be_named_as_the_embedding(tmp_path, path):
    """Which is what a model without a head has; its copy is meant, and not the rows."""
    base, tensors = write_tied(tmp_path / "base", **TIED)
    (tmp_path / "names.json").write_text(json.dumps({"lm_head": path}))
    names = f"--names={tmp_path / 'names.json'}"
    for which in ("head", "saved head"):
        adapter = tmp_path / which
        _, added = write_peft(adapter, which)
        assert run(base, adapter, tmp_path / f"out {which}", names) == 0
        got = models.read_model(tmp_path / f"out {which}")
        np.testing.assert_array_equal(got[EMBEDDING], tensors[EMBEDDING])
        old = 0 if which == "saved head" else tensors[EMBEDDING].astype(np.float64)
        support.assert_close(got[HEAD], old + added[HEAD], 4)
    own = to_own(tmp_path / "head", base, tmp_path / "own", names)
    assert [*lora_jax.load_adapters(own)[0]] == [f"{EMBEDDING}@product"]
    sources, both = [str(tmp_path / "head")] * 2, str(tmp_path / "both")
    assert main(["combine", *sources, both, f"--base={base}", names]) == 0
    written = load_file(tmp_path / "both" / "adapter_model.safetensors")
    ends = ("lora_A.weight", "lora_B.weight")
    assert written.keys() == {f"base_model.model.lm_head.{end}" for end in ends}


@pytest.mark.parametrize(
    ("config", "untied"),
    [
        ({"text_config": {**TIED, "size": 1}}, {"text_config": {"size": 1}}),
        ({"architectures": ["GemmaForCausalLM"]}, {}),
    ],
)
def test_where_a_config_says_that_a_model_is_tied(tmp_path, config, untied):
    base, tensors = write_tied(tmp_path / "base", **config)
    write_peft(tmp_path / "adapter", "head")
    assert run(base, tmp_path / "adapter", tmp_path / "out") == 0
    got = json.loads((tmp_path / "out" / "config.json").read_text())
    off = {"tie_word_embeddings": False}
    inner = {name: fields | off for name, fields in untied.items()}
    assert got == {"model_type": "llama", **config, **inner, **off}
    written = models.read_model(tmp_path / "out")
    np.testing.assert_array_equal(written[EMBEDDING], tensors[EMBEDDING])


@pytest.mark.parametrize(
    ("config", "head"),
    [
        ({"architectures": ["BertModel"]}, False),
        ({"tie_word_embeddings": False}, False),
        (TIED, True),
    ],
)
def test_models_that_are_not_tied_stay_as_they_are(tmp_path, config, head, capsys):
    tensors = models.make_tensors()
    if not head:
        del tensors[HEAD]
    base = models.write_base(tmp_path / "base", tensors, **config)
    _, added = write_peft(tmp_path / "adapter", "embedding")
    assert run(base, tmp_path / "adapter", tmp_path / "out") == 0
    assert ("note: config.json says" in capsys.readouterr().out) == head
    got = models.read_model(tmp_path / "out")
    assert set(got) == set(tensors)
    support.assert_close(got[EMBEDDING], tensors[EMBEDDING] + added[EMBEDDING], 4)
    source = (base / "config.json").read_bytes()
    assert (tmp_path / "out" / "config.json").read_bytes() == source


def test_a_tied_model_of_which_both_arrays_are_saved_alike(tmp_path, factors):
    base, tensors = write_tied(tmp_path / "base", **TIED)
    extra = dict.fromkeys((EMBEDDING, HEAD), draw(1))
    saved = {"modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = models.write_adapter(tmp_path / "adapter", factors, extra, **saved)
    assert run(base, adapter, tmp_path / "out") == 0
    tensors[EMBEDDING] = extra[EMBEDDING]
    assert_merged(models.read_model(tmp_path / "out"), tensors, factors)


TOKENS = "model.embed_tokens.token_adapter.trainable_tokens_delta"
ROWS = {TOKENS: models.draw((1, models.WIDTH), 10)}


def test_rows_of_a_tied_embedding(tmp_path):
    base, tensors = write_tied(tmp_path / "base", **TIED)
    options = {"target_modules": ["q_proj"], "trainable_token_indices": [5]}
    excluded = {**options, "exclude_modules": ["q_proj"]}
    adapter = models.write_adapter(tmp_path / "adapter", {}, ROWS, **excluded)
    assert run(base, adapter, tmp_path / "out") == 0
    tensors[EMBEDDING][5] = ROWS[TOKENS]
    assert_merged(models.read_model(tmp_path / "out"), tensors, {})


# Targets of this library, and the targets of each of the two arrays.
LOOKUP, PRODUCT = f"{EMBEDDING}@lookup", f"{EMBEDDING}@product"
FIRST, LAST = f"{EMBEDDING}[:4]", f"{EMBEDDING}[4:]@product"
USES = {
    (LOOKUP,): ({LOOKUP}, set()),
    (PRODUCT,): (set(), {PRODUCT}),
    (LOOKUP, LAST): ({LOOKUP}, {LAST}),
    (FIRST, LAST): ({FIRST}, {FIRST, LAST}),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", USES)
def test_uses_of_this_library(tmp_path, targets, tied):
    config = {"tie_word_embeddings": tied}
    base, tensors = write_tied(tmp_path / "base", **config)
    table = support.asarray(tensors[EMBEDDING])
    if not tied:
        tensors[HEAD] = tensors[EMBEDDING]
        base = models.write_base(tmp_path / "untied", tensors, 2, **config)
    adapters, plan = models.write_own(tmp_path / "own", {EMBEDDING: table}, targets=targets)
    assert run(base, tmp_path / "own", tmp_path / "out") == 0
    got = models.read_model(tmp_path / "out")
    assert set(got) == {*tensors, HEAD}
    for name, paths in zip((EMBEDDING, HEAD), USES[targets], strict=True):
        own = {name + plan.targets[p].part: p for p in paths}
        every = {k: dataclasses.replace(plan.targets[p], use="") for k, p in own.items()}
        whole = lora_jax.AdapterPlan(plan.config, every)
        values = {key: adapters[p] for key, p in own.items()}
        want = lora_jax.merge_adapters({name: table}, values, whole)[name]
        np.testing.assert_array_equal(got[name], want)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False


@pytest.mark.parametrize("which", ["embedding", "head", "embedding and head"])
def test_a_converted_adapter_is_of_one_use(tmp_path, capsys, which):
    base, _ = write_tied(tmp_path / "base", 2, **TIED)
    peft = tmp_path / "peft"
    write_peft(peft, which)
    own = to_own(peft, base, tmp_path / "own")
    _, plan = lora_jax.load_adapters(own)
    uses = {"embedding": LOOKUP, "head": PRODUCT}
    assert set(plan.targets) == {path for end, path in uses.items() if end in which}
    for name in ("peft", "own"):
        assert run(base, tmp_path / name, tmp_path / f"from {name}") == 0
    assert main(["diff", str(peft), str(own)]) == 0
    assert f"effects are the same: of {len(plan.targets)} up" in capsys.readouterr().out
    assert_equal(*(models.read_model(tmp_path / f"from {n}") for n in ("own", "peft")))


def test_the_effect_of_a_head_is_that_of_a_product(tmp_path, capsys):
    def fn(params, tokens):
        table = params["embed_tokens"]["embedding"]
        return table[tokens] @ table.T

    params = {"embed_tokens": {"embedding": models.draw(SHAPE, 0)}}
    path = "embed_tokens/embedding@product"
    config = lora_jax.LoraConfig(rank=2, alpha=6, targets=path)
    plan = lora_jax.plan_adapters(config, params, fn, jnp.arange(3))
    write_peft(tmp_path / "peft", "head")
    entries = models.read_model(tmp_path / "peft")
    a, b = (entries[f"base_model.model.lm_head.lora_{name}.weight"] for name in "AB")
    for size in (1, 2):
        own = {path: {"A": support.asarray(a.T), "B": support.asarray(size * b.T)}}
        lora_jax.save_adapters(tmp_path / "own", own, plan)
        for pair in (("own", "peft"), ("peft", "own")):
            code = main(["diff", *(str(tmp_path / name) for name in pair)])
            text = capsys.readouterr().out
            assert code == (0 if size == 1 else 3), text
            same = "are the same: of 1 updates" if size == 1 else "differ: 1 of 1 updates"
            assert f"The effects {same}" in text


@pytest.mark.parametrize("module", ["model.embed_tokens", "model.tok"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_model_that_does_not_say_whether_it_is_tied(tmp_path, module, whole, capsys):
    tensors = models.make_tensors()
    del tensors[HEAD]
    tensors[f"{module}.weight"] = tensors.pop(EMBEDDING)
    base = models.write_base(tmp_path / "base", tensors)
    (base / "config.json").unlink()
    options = {"r": 2, "target_modules": [module.rpartition(".")[2]]}
    entries, out = embedding_entries(module), tmp_path / "out"
    adapter = models.write_adapter(tmp_path / "adapter", {}, entries, **options)
    if whole:
        base, out = base / "model.safetensors", tmp_path / "out.safetensors"
    line = refuse(capsys, base, adapter, out)
    assert f"changes {module!r}, and the model has no lm_head.weight" in line
    config = tmp_path / "base" / "config.json"
    config.write_text('{"tie_word_embeddings": false}')
    assert run(base, adapter, out) == 0


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("other name", "can copy one of model.embed_tokens.weight, "),
        ("one file", "BASE is one file, and tie_word_embeddings is in config.json"),
        ("rows", "The trained rows of tokens are of both. "),
        ("both uses", "merging would change both. Save the base with"),
    ],
)
def test_what_cannot_be_untied(tmp_path, capsys, case, reason):
    base, tensors = write_tied(tmp_path / "base", **TIED)
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    name = "model.embed_tokens"
    if case == "rows":
        options = {"target_modules": ["lm_head"], "trainable_token_indices": [5]}
        head = models.make_factors(modules={"lm_head": SHAPE})
        models.write_adapter(adapter, head, ROWS, **options)
        name = "lm_head"
    elif case == "both uses":
        name = EMBEDDING
        params = {name: support.asarray(tensors[name])}
        models.write_own(adapter, params, targets=name)
    else:
        name = {"one file": EMBEDDING, "other name": "model.tok"}[case]
        module = name.removesuffix(".weight")
        options = {"r": 2, "target_modules": [module.rpartition(".")[2]]}
        models.write_adapter(adapter, {}, embedding_entries(module), **options)
        tensors[f"{module}.weight"] = tensors.pop(EMBEDDING)
        models.save_file(tensors, base / "model.safetensors")
    if case == "one file":
        base, out = base / "model.safetensors", tmp_path / "out.safetensors"
    line = refuse(capsys, base, adapter, out)
    assert f"the adapter changes {name!r}, but the embedding and the output head" in line
    assert reason in line


def test_one_use_of_a_tensor_without_a_pair(tmp_path, capsys):
    base, tensors = write_tied(tmp_path / "base", tie_word_embeddings=False)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[HEAD] = tensors[name]
    models.save_file(tensors, base / "model.safetensors")
    params = {name: support.asarray(tensors[name])}
    models.write_own(tmp_path / "own", params, targets=f"{name}@product")
    line = refuse(capsys, base, tmp_path / "own", tmp_path / "out")
    assert f"'{name}@product' is an adapter of one use of {name!r}" in line
    assert "save a base with a tensor for each use" in line
