"""Adapters and arrays of one side of an embedding that is tied to the output head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import peft
from lora_jax._io.tensor_files import CheckpointError
from tests.peft.support import draw, linear, merged, update_of, write

ENTRIES, WIDTH = 11, 6
TABLE = "model/embed_tokens/embedding"
PARAMS = {
    "model": {
        "embed_tokens": {"embedding": jnp.asarray(draw(ENTRIES, WIDTH))},
        "layers": [{"q": {"kernel": jnp.asarray(draw(WIDTH, WIDTH))}}],
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


@pytest.mark.parametrize("apply", [tied, tied_by_product])
@pytest.mark.parametrize(
    ("entries", "names", "message"),
    [
        ((Q, EMBEDDING), None, "'model.embed_tokens' is one of two modules that share"),
        ((Q, HEAD), {"lm_head": TABLE}, "'lm_head' is one of two modules that share"),
        (
            (Q, EMBEDDING, HEAD),
            {"lm_head": TABLE},
            "'lm_head' and 'model.embed_tokens' have an adapter each, and both are",
        ),
    ],
)
def test_a_function_shows_ties(apply, entries, names, message, tmp_path):
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
    other = PARAMS | {"lm_head": {"kernel": jnp.asarray(draw(WIDTH, ENTRIES))}}
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
    np.testing.assert_array_equal(loaded.replaced[TABLE][jnp.asarray([7, 1])], value)
