"""docs/studies: the arms, the study on made-up sentences, and its committed record."""

import importlib
import json
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from tests import test_examples
from tests.support import asarray

STUDIES = pathlib.Path(__file__).parents[1] / "docs" / "studies"
RECORD = STUDIES / "dora_norm_axis.json"

sys.path.append(str(STUDIES))
minilm = importlib.import_module("minilm")
reviews = importlib.import_module("reviews")
sentiment = importlib.import_module("sentiment")
arms = importlib.import_module("dora_norm_axis_arms")
report = importlib.import_module("dora_norm_axis_report")
study = importlib.import_module("dora_norm_axis")
initializers = importlib.import_module("initializers")
initializers_report = importlib.import_module("initializers_report")

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def as_users_have_it():
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        yield


@pytest.fixture
def tiny():
    """Params of one layer, a batch, and the plan of each arm."""
    params = sentiment.new_head(test_examples.tiny_params())
    params["encoder"] = {"layer_0": params["encoder"]["layer_0"]}
    (batch,) = reviews.make_batches(test_examples.tiny_examples([5, 9, 24]))
    return params, batch, arms.make_plans(params, batch)


class Words:
    """A tokenizer of words that are numbers below the size of the tiny vocabulary."""

    def encode_batch(self, texts):
        words = ([int(word) for word in text.split()] for text in texts)
        return [types.SimpleNamespace(ids=[1, *ids, 2]) for ids in words]


def made_up_sentences(cache, name=study.FILES["products"]):
    """Ten for each review; favorable ones have large numbers."""
    rng = np.random.default_rng(list(study.FILES.values()).index(name))
    sentences = []
    for i in range(400):
        rating = rng.uniform(-4, 4)
        words = rng.integers(3, 14, rng.integers(3, 30)) + 3 * (rating > 0)
        text = " ".join(map(str, words))
        sentences.append(reviews.Sentence(str(i // 10), rating, text))
    return sentences


# --- arms ---------------------------------------------------------------------------


def test_arms_are_what_adapt_does(tiny):
    params, batch, plans = tiny
    for arm in ("dora_out", "lora"):
        assert arms.disagreement(params, batch, plans[arm], arm) < 1e-5
    assert arms.disagreement(params, batch, plans["dora_out"], "dora_in") > 1e-2


def test_arms_have_as_many_parameters(tiny):
    params, batch, plans = tiny
    expected = 2 * (2 * 8 + 1) * test_examples.WIDTH
    assert arms.count_parameters(params, plans) == expected
    config = sentiment.make_config("lora", rank=8, alpha=16.0)
    fewer = plans | {"lora": lora_jax.plan_adapters(config, params, sentiment.model, batch)}
    with pytest.raises(RuntimeError, match="expected as many parameters in each arm"):
        arms.count_parameters(params, fewer)


@pytest.mark.parametrize("arm", arms.ARMS)
def test_arms_start_as_the_frozen_encoder(tiny, arm):
    params, batch, plans = tiny
    adapters = arms.init_adapters(jax.random.key(0), params, plans[arm], arm)
    features = arms.encode(params, adapters, batch, arm=arm)
    expected = np.asarray(sentiment.stored_features(params, batch))
    test_examples.assert_close(features, expected, ulps=64)


def test_arms_start_with_the_same_factors(tiny):
    params, _, plans = tiny
    per_output, per_input, lora = (
        arms.init_adapters(jax.random.key(0), params, plans[arm], arm) for arm in arms.ARMS
    )
    for path in plans["lora"].targets:
        adapter = per_output[path]
        np.testing.assert_array_equal(adapter["A"], per_input[path]["A"])
        if "query" in path:
            np.testing.assert_array_equal(adapter["A"], lora[path]["A"])
        else:
            assert lora[path]["A"].shape == (test_examples.WIDTH, 9)


def test_dense_layers_of_the_arms():
    rng = np.random.default_rng(0)
    x, bias = rng.normal(size=(2, 3, 6)), rng.normal(size=5)
    kernel, a, b = (rng.normal(size=s) for s in ((6, 5), (6, 2), (2, 5)))
    v = kernel + arms.SCALE * a @ b
    m = {"dora_out": rng.uniform(1, 2, 5), "dora_in": rng.uniform(1, 2, 6)}
    expected = {
        "dora_out": x @ (v * m["dora_out"] / np.linalg.norm(v, axis=0)) + bias,
        "dora_in": x * (m["dora_in"] / np.linalg.norm(v, axis=1)) @ v + bias,
        "lora": x @ v + bias,
    }
    for arm, y in expected.items():
        adapter = {"A": a, "B": b} | ({"m": m[arm]} if arm in m else {})
        layer = {"kernel": kernel, "bias": bias, "adapter": adapter}
        layer = jax.tree.map(lambda leaf: asarray(leaf, jnp.float32), layer)
        actual = arms.apply_dense(asarray(x, jnp.float32), layer, arm=arm)
        test_examples.assert_close(actual, y, ulps=16)


def test_step_is_that_of_adamw(tiny):
    params, batch, plans = tiny
    plan, rate = plans["dora_out"], 3e-3
    optimizer = optax.adamw(rate)
    step = sentiment.make_step(optimizer, plan)
    own, other = (
        arms.init_adapters(jax.random.key(0), params, plan, "dora_out") for _ in range(2)
    )
    states = arms.OPTIMIZER.init(own), optimizer.init(other)
    for _ in range(3):
        own, *states = (
            *arms.step(own, states[0], params, batch, rate, arm="dora_out"),
            states[1],
        )
        other, states[1], *_ = step(other, states[1], params, batch)
    for x, y in zip(*map(jax.tree.leaves, (own, other)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-2 * rate)


# --- the study ----------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The arguments of a small study of made-up sentences, without downloads."""
    model = test_examples.tiny_params(), Words()
    monkeypatch.setattr(minilm, "load", lambda cache: model)
    monkeypatch.setattr(reviews, "load", made_up_sentences)
    monkeypatch.setattr(study, "RATES", (0.1, 0.05))  # in so few steps
    sizes = {"seeds": 2, "epochs": 2, "train": 96, "test": 32, "loss": 48}
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    return [*arguments, f"--json={tmp_path / 'record.json'}"]


def test_study(command, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    study.main(command)
    record = json.loads((tmp_path / "record.json").read_text())
    settings = study.Settings(seeds=2, epochs=2, train=96, test=32, loss=48)
    wanted = list(study.jobs(settings))
    assert tuple(study.FILES) == report.DATA
    assert [{name: run[name] for name in report.JOB} for run in record["runs"]] == wanted
    assert len({run["training_loss"] for run in record["runs"]}) == len(wanted)
    assert report.tables(record) in capsys.readouterr().out
    assert (tmp_path / "record.png").read_bytes().startswith(b"\x89PNG")

    # a run that was killed goes on, to the same numbers, and runs that are there stay
    cut = record | {"runs": [record["runs"][0] | {"seconds": -1}, *record["runs"][3:]]}
    study.save_record(tmp_path / "record.json", cut)
    assert json.loads((tmp_path / "record.json").read_text()) == cut
    study.main(command)
    again = json.loads((tmp_path / "record.json").read_text())
    assert again["runs"][:-2] == cut["runs"]
    for run, before in zip(again["runs"][-2:], record["runs"][1:3], strict=True):
        assert run | {"seconds": 0} == before | {"seconds": 0}

    with pytest.raises(SystemExit, match="was made with other settings: expected"):
        study.main([*command, "--epochs=3"])


def test_bad_commands(command, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match=r"error: .*record\.json"):
        study.main([*command, "--report"])
    with pytest.raises(SystemExit, match=r"expected at least .* sentences to train on"):
        study.main([*command, "--train=1000"])
    with pytest.raises(SystemExit, match="2"):
        study.main([*command, "--seeds=0"])
    assert "expected a whole number from 1 to" in capsys.readouterr().err


def test_sentences_are_opinions_and_short():
    pool = study.short_opinions(
        Words(),
        [
            reviews.Sentence("1", 0.4, "3"),
            reviews.Sentence("1", 0.6, " ".join(["3"] * 22)),
            reviews.Sentence("1", 0.6, " ".join(["3"] * 23)),
        ],
    )
    assert [len(sentence.text.split()) for sentence in pool] == [22]


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622)]
)
def test_t_quantile(freedom, expected):
    assert report.t_quantile(freedom) == pytest.approx(expected, abs=2e-4)


def test_paired():
    result = report.paired([1.0, 2.0, 6.0])
    assert result == pytest.approx(
        (3.0, 7**0.5 / 3**0.5, 4.3027 * (7 / 3) ** 0.5), rel=1e-4
    )


def test_differences_are_of_pairs():
    runs = [
        {"data": data, "seed": seed, "rate": rate, "arm": arm, "test_accuracy": value}
        for data, seed, rate, arm, value in [
            ("movies", 1, 1.0, "lora", 0.5),
            ("movies", 0, 1.0, "lora", 0.25),
            ("movies", 0, 1.0, "dora_in", 0.75),
            ("movies", 1, 1.0, "dora_in", 0.5),
            ("movies", 0, 2.0, "lora", 0.0),
            ("movies", 1, 2.0, "lora", 0.0),
            ("movies", 0, 2.0, "dora_in", 0.25),
            ("movies", 1, 2.0, "dora_in", 1.0),
        ]
    ]
    pair, record = ("dora_in", "lora"), {"runs": runs}
    one = report.differences(record, "test_accuracy", ["movies"], [1.0], pair)
    np.testing.assert_allclose(one, [50, 0])
    both = report.differences(record, "test_accuracy", ["movies"], [1.0, 2.0], pair)
    np.testing.assert_allclose(both, [37.5, 50])


def test_incomplete_rates_are_left_out():
    settings = study.Settings(seeds=2)
    runs = list(study.jobs(settings))
    record = {"settings": {"seeds": 2, "rates": list(study.RATES)}, "runs": runs[:-1]}
    assert report.complete_rates(record) == [2e-3, 4e-3]
    ten = record | {"settings": {"seeds": 2, "rates": [2e-3]}, "runs": runs[:16]}
    assert report.table_of_rest(ten) == ""
    with pytest.raises(ValueError, match="expected two seeds or more, and 12 runs"):
        report.complete_rates(record | {"runs": runs[:10]})


# --- initializers -------------------------------------------------------------------


def test_initializers(command, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, params = tmp_path / "other.json", test_examples.tiny_params()
    params["encoder"] = {"layer_0": params["encoder"]["layer_0"]}
    monkeypatch.setattr(minilm, "load", lambda cache: (params, Words()))
    monkeypatch.setattr(initializers, "RATES", (0.1, 0.01))
    sizes = {"seeds": 2, "train": 3, "validation": 1, "test": 1, "json": path}
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    initializers.main(arguments)
    record = json.loads(path.read_text())
    settings = initializers.Settings(seeds=2, train=48, validation=16, test=16)
    wanted = list(initializers.jobs(settings))
    done = [{name: run[name] for name in initializers_report.JOB} for run in record["runs"]]
    assert done == wanted
    assert initializers_report.complete_arms(record) == list(initializers_report.LABELS)
    assert initializers_report.tables(record) in capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    losses = {(run["arm"], run["rate"]): run["train_loss"] for run in record["runs"]}
    assert len(set(losses.values())) == len(losses)

    # a run that was killed goes on, to the same numbers
    first, second, *rest = record["runs"]
    study.save_record(path, record | {"runs": [first, *rest]})
    initializers.main(arguments)
    again = json.loads(path.read_text())["runs"]
    assert again[:-1] == [first, *rest]
    assert again[-1] | {"seconds": 0} == second | {"seconds": 0}
    with pytest.raises(SystemExit, match="was made with other settings"):
        initializers.main([*arguments, "--epochs=2"])
    more = ["--train=100", f"--json={tmp_path / 'new.json'}"]
    with pytest.raises(SystemExit, match=r"expected at least .* sentences to train and"):
        initializers.main(more)


def test_arms_of_the_initializers_start_from_the_probe(tiny):
    params, batch, _ = tiny
    batch = jax.tree.map(lambda x: x[:16], batch)
    head = {"kernel": jnp.linspace(-1, 1, test_examples.WIDTH), "bias": jnp.zeros(())}
    drawn = initializers.Drawn(jax.random.key(0), *[[batch]] * 4, params | {"head": head})
    expected = np.asarray(sentiment.stored_model(drawn.params, batch))
    for name, arm in initializers.ARMS.items():
        base, adapters, plan = initializers.start(drawn, arm)
        logits = sentiment.adapted_model(base, adapters, plan, batch)
        is_same = np.abs(np.asarray(logits) - expected).max() < 1e-4
        assert is_same == (name != "lora_one")  # which starts with a step
    arms = initializers.ARMS.values()
    assert len({initializers.make_plan(params, batch, arm) for arm in arms}) == 2


def test_rates_are_chosen_on_validation_sentences():
    names = ("validation_loss", "test_loss", "test_accuracy", "train_loss")
    runs = [
        {"seed": seed, "rate": rate, "arm": "default"}
        | dict(zip(names, (loss, 1 - loss + seed, 0.5, 0.25), strict=True))
        for seed in (0, 1)
        for rate, loss in ((1e-3, 0.5), (3e-3, 0.25))
    ]
    probe = [run | {"arm": "probe", "rate": None} for run in runs[1::2]]
    record = {"settings": {"seeds": 2, "rates": [1e-3, 3e-3]}, "runs": runs + probe}
    assert initializers_report.best_rate(record, "default") == 3e-3
    row = "| LoRA with AdamW | 0.003 | 50.0 (0.0) | 1.250 (0.500) | 0.250 (0.000) |  |  |"
    assert row in initializers_report.tables(record)
    with pytest.raises(ValueError, match="expected two seeds or more, and 4 runs"):
        initializers_report.tables(record | {"runs": runs[1:]})


# --- what is committed --------------------------------------------------------------


def test_committed_page_shows_the_committed_record():
    record = json.loads(RECORD.read_text())
    page = RECORD.with_suffix(".md").read_text()
    for table in report.tables(record).split("\n\n"):
        assert table in page
    assert f"{record['parameters']:,}" in page
    assert f"JAX {record['environment']['jax']}" in page
    for size in record["sentences"].values():
        assert f"{size:,}" in page
    assert re.search(r"!\[.*\]\(dora_norm_axis\.png\)", page, re.S)
    assert RECORD.with_suffix(".png").stat().st_size < 100_000


def test_committed_page_of_the_initializers_shows_their_record():
    path = initializers.RECORD
    record, page = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    for table in initializers_report.tables(record).split("\n\n"):
        assert table in page
    assert f"{record['sentences']:,}" in page
    assert f"JAX {record['environment']['jax']}" in page
    assert re.search(r"!\[.*\]\(initializers\.png\)", page, re.S)
    assert path.with_suffix(".png").stat().st_size < 100_000
    settings = initializers.all_settings(initializers.Settings())
    assert study.open_record(path, settings) == record
    done = [{name: run[name] for name in initializers_report.JOB} for run in record["runs"]]
    wanted = list(initializers.jobs(initializers.Settings()))
    assert sorted(done, key=str) == sorted(wanted, key=str)


def test_committed_record_is_of_this_study():
    record = json.loads(RECORD.read_text())
    assert study.open_record(RECORD, study.all_settings(study.Settings())) == record
    done = [{name: run[name] for name in report.JOB} for run in record["runs"]]
    assert done == list(study.jobs(study.Settings()))[: len(done)]
    assert study.RATES[0] in report.complete_rates(record)
    assert record["parameters"] == 12 * (2 * 8 * 384 + 384)
    assert max(record["disagreement"].values()) < 1e-5
