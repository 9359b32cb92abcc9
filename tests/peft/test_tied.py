"""Adapters and arrays of one side of an embedding that is tied to the output head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import peft
from lora_jax._io.tensor_files import CheckpointError
from tests.peft.support import PREFIX, draw, linear, merged, read, update_of, write
from tests.support import asarray

ENTRIES, WIDTH = 11, 6
TABLE = "model/embed_tokens/embedding"
PARAMS = {
    "model": {
        "embed_tokens": {"embedding": asarray(draw(ENTRIES, WIDTH))},
        "layers": [{"q": {"kernel": asarray(draw(WIDTH, WIDTH))}}],
    }
}
TOKENS = jnp.arange(4)
Q = linear("model.layers.0.q", WIDTH, WIDTH, 2)
EMBEDDING = {
    "model.embed_tokens.lora_embedding_A": draw(2, ENTRIES),
    "model.embed_tokens.lora_embedding_B": draw(WIDTH, 2),
}
HEAD = linear("lm_head", WIDTH, ENTRIES, 2)
TO_TABLE = {"lm_head": TABLE, "lm_head.weight": TABLE}


def hidden(params, vectors):
    return jnp.tanh(vectors @ params["model"]["layers"][0]["q"]["kernel"])


def tied(params, tokens):
    table = params["model"]["embed_tokens"]["embedding"]
    return hidden(params, table[tokens]) @ table.T


def tied_by_product(params, tokens):
    table = params["model"]["embed_tokens"]["embedding"]
    return hidden(params, jax.nn.one_hot(tokens, ENTRIES) @ table) @ table.T


def headless(params, tokens):
    return hidden(params, params["model"]["embed_tokens"]["embedding"][tokens])


def untied(params, tokens):
    return headless(params, tokens) @ params["lm_head"]["kernel"]


def adapter(folder, *entries, saved=(), **config):
    """Adapters and arrays `entries` in one checkpoint."""
    tensors = {name: value for own in entries for name, value in own.items()}
    kinds = {"q": Q, "embed_tokens": EMBEDDING, "lm_head": HEAD}
    targets = [name for name, own in kinds.items() if any(own is each for each in entries)]
    saved = list(saved) or None
    fields = {"r": 2, "lora_alpha": 4, "target_modules": targets, "modules_to_save": saved}
    return write(folder, tensors, **fields | config)


LOOKUP, PRODUCT = f"{TABLE}@lookup", f"{TABLE}@product"
EITHER = {
    "embedding": ((Q, EMBEDDING), [LOOKUP]),
    "head": ((Q, HEAD), [PRODUCT]),
    "both": ((Q, EMBEDDING, HEAD), [LOOKUP, PRODUCT]),
}


def want_of(entries):
    """The logits of PEFT's model, in which the embedding and the head are two weights."""
    table = np.asarray(PARAMS["model"]["embed_tokens"]["embedding"], np.float64)
    weights = {
        "model.layers.0.q": np.asarray(PARAMS["model"]["layers"][0]["q"]["kernel"]).T,
        "model.embed_tokens": table,
        "lm_head": table,
    }
    for name, weight in weights.items():
        pair = [entries.get(f"{name}.lora_{x}.weight") for x in "AB"]
        update = 0.0 if pair[0] is None else 2.0 * pair[1].astype(np.float64) @ pair[0]
        if f"{name}.lora_embedding_A" in entries:
            pair = [entries[f"{name}.lora_embedding_{x}"] for x in "AB"]
            update = 2.0 * (pair[1].astype(np.float64) @ pair[0]).T
        own = weight + update
        m = entries.get(f"{name}.lora_magnitude_vector")
        if m is not None:
            across = 0 if name == "model.embed_tokens" else 1
            norm = np.sqrt(np.square(own).sum(across, keepdims=True))
            own = own * np.expand_dims(m, across) / norm
        weights[name] = own
    q, embed, head = weights.values()
    return np.tanh(embed[TOKENS] @ q.T) @ head.T


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("case", EITHER)
@pytest.mark.parametrize("base", [False, True])
def test_a_module_is_one_use_of_a_tied_leaf(case, dora, base, tmp_path):
    entries, paths = EITHER[case]
    tensors = {name: value for own in entries for name, value in own.items()}
    for module, n_out in (("model.embed_tokens", WIDTH), ("lm_head", ENTRIES)):
        if any(module in name for name in tensors):
            if dora:
                tensors[f"{module}.lora_magnitude_vector"] = 5 + draw(n_out)
            if base:  # PEFT saves the embeddings that have adapters, unchanged
                table = PARAMS["model"]["embed_tokens"]["embedding"]
                tensors[f"{module}.base_layer.weight"] = np.asarray(table)
    if dora:
        tensors["model.layers.0.q.lora_magnitude_vector"] = 5 + draw(WIDTH)
    targets = ["q", "embed_tokens", "lm_head"]
    kept = [t for t in targets if any(f"{t}.lora" in name for name in tensors)]
    config = {"r": 2, "lora_alpha": 4, "target_modules": kept, "use_dora": dora}
    folder = write(tmp_path / "in", tensors, **config)
    loaded = peft.load(folder, PARAMS, tied, TOKENS)
    assert list(loaded.plan.targets) == [*paths, "model/layers/0/q/kernel"]
    assert not loaded.replaced
    got = lora_jax.adapt(tied, loaded.plan)(PARAMS, loaded.adapters, TOKENS)
    want = want_of(tensors)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())

    table = peft.match_names(folder, PARAMS, tied, TOKENS)
    assert [table.get(name) for name in ("model.embed_tokens", "lm_head")] == [
        (LOOKUP, "io") if LOOKUP in paths else None,
        (PRODUCT, "oi") if PRODUCT in paths else None,
    ]
    peft.save(tmp_path / "out", loaded.adapters, loaded.plan, names=table)
    written, _ = read(tmp_path / "out")
    assert written.keys() == {PREFIX + n for n in tensors if "base_layer" not in n}
    for name, value in written.items():
        np.testing.assert_array_equal(value, tensors[name.removeprefix(PREFIX)])
    # The names say it too, without the function.
    again = peft.load(tmp_path / "out", PARAMS, names=table)
    assert again.plan.targets == loaded.plan.targets
    same = jax.tree.map(np.array_equal, again.adapters, loaded.adapters)
    assert jax.tree.all(same)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (draw(ENTRIES, WIDTH, seed=7), "would act on both"),
        (draw(ENTRIES + 1, WIDTH), "needs a leaf of the shape"),
        (1e6 * draw(ENTRIES, WIDTH), "would act on both"),
    ],
)
def test_a_base_that_differs_is_not_left_out(base, message, tmp_path):
    folder = adapter(tmp_path, Q, EMBEDDING, {"model.embed_tokens.base_layer.weight": base})
    params = jax.tree.map(lambda leaf: leaf.astype("float16"), PARAMS)
    with pytest.raises(CheckpointError, match=message):
        peft.load(folder, params, tied, TOKENS)


def test_saving_a_product_of_a_plan(tmp_path):
    config = lora_jax.LoraConfig(rank=2, alpha=4.0, targets=(LOOKUP, PRODUCT))
    plan = lora_jax.plan_adapters(config, PARAMS, tied, TOKENS)
    assert (plan.targets[LOOKUP].axes, plan.targets[PRODUCT].axes) == ("io", "oi")
    adapters = lora_jax.init_adapters(jax.random.key(0), PARAMS, plan)
    adapters = jax.tree.map(lambda a: a + 0.1, adapters)
    with pytest.raises(
        ValueError, match=r"give names=\{'lm_head': 'model/embed_.*@product'"
    ):
        peft.save(tmp_path, adapters, plan)
    with pytest.raises(ValueError, match="would both be the module 'lm_head'"):
        peft.save(tmp_path, adapters, plan, names={"lm_head": TABLE})
    peft.save(tmp_path, adapters, plan, names={"lm_head": PRODUCT})
    tensors, _ = read(tmp_path)
    assert {name: array.shape for name, array in tensors.items()} == {
        f"{PREFIX}lm_head.lora_A.weight": (2, WIDTH),
        f"{PREFIX}lm_head.lora_B.weight": (ENTRIES, 2),
        f"{PREFIX}model.embed_tokens.lora_embedding_A": (2, ENTRIES),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": (WIDTH, 2),
    }
    loaded = peft.load(tmp_path, PARAMS, tied, TOKENS)
    got = lora_jax.adapt(tied, loaded.plan)(PARAMS, loaded.adapters, TOKENS)
    want = lora_jax.adapt(tied, plan)(PARAMS, adapters, TOKENS)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    dora = dataclasses.replace(config, use_dora=True, axes={TABLE: "io"})
    plan = lora_jax.plan_adapters(dora, PARAMS, tied, TOKENS)
    adapters = lora_jax.init_adapters(jax.random.key(0), PARAMS, plan)
    with pytest.raises(ValueError, match="magnitudes belong to the axes"):
        peft.save(tmp_path, adapters, plan, names={"lm_head": PRODUCT})


@pytest.mark.parametrize(
    ("entries", "apply", "names", "message"),
    [
        (
            (Q, EMBEDDING),
            tied_by_product,
            None,
            "'model.embed_tokens' is one of two modules that share",
        ),
        (
            (Q, HEAD),
            tied_by_product,
            {"lm_head": TABLE},
            "'lm_head' is one of two modules that share",
        ),
        (
            (Q, EMBEDDING, HEAD),
            tied_by_product,
            {"lm_head": TABLE},
            "'lm_head' and 'model.embed_tokens' have an adapter each, and both are",
        ),
        ((Q, HEAD), tied, {"lm_head": LOOKUP}, "names has the use 'lookup' of"),
    ],
)
def test_two_products_cannot_be_told_apart(entries, apply, names, message, tmp_path):
    folder = adapter(tmp_path, *entries)
    with pytest.raises(CheckpointError, match=message):
        peft.load(folder, PARAMS, apply, TOKENS, names=names)
    with pytest.raises(CheckpointError, match=message):
        peft.match_names(folder, PARAMS, apply, TOKENS, names=names)
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=2), PARAMS, apply, TOKENS)
    with pytest.raises(CheckpointError, match=message):
        peft.load(folder, PARAMS, plan=plan, names=names)
    with pytest.warns(UserWarning, match=message):
        loaded = peft.load(folder, PARAMS, apply, TOKENS, names=names, strict=False)
    assert list(loaded.adapters) == ["model/layers/0/q/kernel"]


def test_an_adapter_of_the_embedding_that_is_tied_to_nothing(tmp_path):
    folder = adapter(tmp_path, Q, EMBEDDING)
    other = PARAMS | {"lm_head": {"kernel": asarray(draw(WIDTH, ENTRIES))}}
    a, b = (EMBEDDING[f"model.embed_tokens.lora_embedding_{x}"] for x in "AB")
    table = PARAMS["model"]["embed_tokens"]["embedding"] + 2 * (b @ a).T
    kernel = PARAMS["model"]["layers"][0]["q"]["kernel"]
    kernel = kernel + update_of(Q, "model.layers.0.q", 2.0)
    want = np.tanh(table[TOKENS] @ kernel)
    for params, apply, head in ((PARAMS, headless, 1), (other, untied, other["lm_head"])):
        loaded = peft.load(folder, params, apply, TOKENS)
        got = apply(merged(params, loaded), TOKENS)
        own = want if head == 1 else want @ head["kernel"]
        np.testing.assert_allclose(got, own, rtol=1e-4, atol=1e-5)
    # Params with a head of their own show it without the function.
    assert TABLE in peft.load(folder, other).adapters


@pytest.mark.parametrize(
    ("entries", "config", "asked"),
    [
        ((Q, EMBEDDING), {}, True),
        ((Q, EMBEDDING), {"task_type": "CAUSAL_LM"}, True),
        ((Q, {"model.embed_tokens.weight": draw(ENTRIES, WIDTH)}), {}, True),
        ((Q,), {"task_type": "CAUSAL_LM"}, False),
    ],
)
def test_without_a_function_a_tie_is_asked_for(entries, config, asked, tmp_path):
    saved = ["embed_tokens"] if "model.embed_tokens.weight" in entries[-1] else ()
    folder = adapter(tmp_path, *entries, saved=saved, **config)
    if asked:
        with pytest.raises(
            CheckpointError, match=r"no leaf of the params is an output head: if this one"
        ):
            peft.load(folder, PARAMS)
    else:
        peft.load(folder, PARAMS)
    loaded = peft.load(folder, PARAMS, on_tied="allow")
    assert (TABLE in loaded.adapters | loaded.replaced) is asked


def test_embeddings_of_positions_are_not_asked_for(tmp_path):
    entries = {"wpe.lora_embedding_A": draw(2, 9), "wpe.lora_embedding_B": draw(5, 2)}
    folder = write(tmp_path, entries, r=2, target_modules=["wpe"], task_type="CAUSAL_LM")
    assert list(peft.load(folder, {"wpe": {"embedding": jnp.zeros((9, 5))}}).adapters)


def test_names_that_make_a_head_of_an_embedding(tmp_path):
    folder = adapter(tmp_path, Q, HEAD)
    names = {"lm_head": (TABLE, "oi")}
    with pytest.raises(
        CheckpointError, match=r"'lm_head' is an output head, and .* an emb"
    ):
        peft.load(folder, PARAMS, names=names)
    loaded = peft.load(folder, PARAMS, tied, TOKENS, names=names, on_tied="allow")
    want = PARAMS["model"]["embed_tokens"]["embedding"]
    want = want + update_of(HEAD, "lm_head", 2.0).T
    got = merged(PARAMS, loaded)["model"]["embed_tokens"]["embedding"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


ONE, OTHER = draw(ENTRIES, WIDTH, seed=1), draw(ENTRIES, WIDTH, seed=2)
EMBED, HEAD_WEIGHT = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("more", [(), (tied, TOKENS)])
@pytest.mark.parametrize("names", [None, TO_TABLE])
def test_two_arrays_that_are_one_leaf(names, more, tmp_path):
    saved = ["embed_tokens", "lm_head"]
    folder = adapter(tmp_path / "same", Q, {EMBED: ONE, HEAD_WEIGHT: ONE}, saved=saved)
    loaded = peft.load(folder, PARAMS, *more, names=names and {HEAD_WEIGHT: TABLE})
    np.testing.assert_array_equal(loaded.replaced[TABLE], ONE)
    folder = adapter(tmp_path / "two", Q, {EMBED: ONE, HEAD_WEIGHT: OTHER}, saved=saved)
    message = "differ, and both are" if names else "the head was trained apart from it"
    with pytest.raises(CheckpointError, match=message):
        peft.load(folder, PARAMS, *more, names=names and {HEAD_WEIGHT: TABLE})
    both = PARAMS | {"lm_head": {"kernel": jnp.zeros((WIDTH, ENTRIES))}}
    own = (untied, TOKENS) if more else ()
    loaded = peft.load(folder, both, *own)
    np.testing.assert_array_equal(loaded.replaced[TABLE], ONE)
    np.testing.assert_array_equal(loaded.replaced["lm_head/kernel"], OTHER.T)


@pytest.mark.parametrize("more", [(), (tied, TOKENS)])
def test_one_array_of_a_leaf_that_is_two(more, tmp_path):
    folder = adapter(tmp_path / "embedding", Q, {EMBED: ONE}, saved=["embed_tokens"])
    with pytest.raises(CheckpointError, match=r"what the file has would act on both"):
        peft.load(folder, PARAMS, *more)
    folder = adapter(tmp_path / "head", Q, {HEAD_WEIGHT: ONE}, saved=["lm_head"])
    with pytest.raises(CheckpointError, match=r"the head was trained apart from it"):
        peft.load(folder, PARAMS, *more)
    names = {HEAD_WEIGHT: TABLE}
    with pytest.raises(CheckpointError, match=r"what the file has would act on both"):
        peft.load(folder, PARAMS, *more, names=names)
    loaded = peft.load(folder, PARAMS, *more, names=names, on_tied="allow")
    np.testing.assert_array_equal(loaded.replaced[TABLE], ONE)


def test_an_array_and_an_adapter_that_are_one_leaf(tmp_path):
    folder = adapter(tmp_path, Q, EMBEDDING, {HEAD_WEIGHT: ONE}, saved=["lm_head"])
    names = {HEAD_WEIGHT: TABLE}
    with pytest.raises(
        CheckpointError, match=r"the file changes 'lm_head' and 'model.embed"
    ):
        peft.load(folder, PARAMS, names=names, on_tied="allow")


def test_rows_of_tokens_are_put_into_both(tmp_path):
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": draw(2, WIDTH)}
    folder = adapter(tmp_path, Q, rows, trainable_token_indices=[7, 1])
    loaded = peft.load(folder, PARAMS, tied, TOKENS)
    (value,) = rows.values()
    np.testing.assert_array_equal(loaded.replaced[TABLE][asarray([7, 1])], value)


@pytest.mark.parametrize("name", ["embedding", "head"])
def test_a_table_with_as_many_rows_as_columns(name, tmp_path):
    """Its size does not show which axis is the input; the use does."""
    table = draw(WIDTH, WIDTH)
    a, b = draw(2, WIDTH, seed=1), draw(WIDTH, 2, seed=2)
    module, ends = {
        "embedding": ("embed_tokens", ("lora_embedding_A", "lora_embedding_B")),
        "head": ("lm_head", ("lora_A.weight", "lora_B.weight")),
    }[name]
    entries = {f"{module}.{end}": x for end, x in zip(ends, (a, b), strict=True)}
    folder = write(tmp_path, entries, r=2, lora_alpha=4, target_modules=[module])

    def apply(params, tokens):
        table = params["embed_tokens"]["embedding"]
        return table[tokens] @ table.T

    params = {"embed_tokens": {"embedding": asarray(table)}}
    loaded = peft.load(folder, params, apply, TOKENS)
    got = lora_jax.adapt(apply, loaded.plan)(params, loaded.adapters, TOKENS)
    wide, update = table.astype(np.float64), 2 * b.astype(np.float64) @ a
    rows = wide + (update.T if name == "embedding" else 0)
    head = wide + (update if name == "head" else 0)
    np.testing.assert_allclose(got, rows[np.asarray(TOKENS)] @ head.T, rtol=1e-5, atol=1e-5)
