"""`lora-jax combine`, `resize` and `extract`: what merges say about their results."""

import json
import logging

import numpy as np
import pytest

from lora_jax import checkpoint
from lora_jax.cli import main
from tests.cli import models
from tests.cli.merging import to_own

NAMES = tuple(models.LINEARS)
MAGNITUDE = "lora_magnitude_vector"


@pytest.fixture
def tensors():
    return models.make_tensors()


@pytest.fixture
def base(tmp_path, tensors):
    return models.write_base(tmp_path / "base", tensors, 2)


def close(got, want):
    """Up to the rounding of float32 sums of numbers near 1."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def factors(seed, rank, modules=models.LINEARS):
    return models.make_factors(rank, seed=seed, modules=modules)


def run(*arguments):
    assert main(list(map(str, arguments))) == 0


def refuse(capsys, *arguments):
    assert main(list(map(str, arguments))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def update(adapter, name, alpha=6):
    """The update of one weight, `(out, in)`, in float64."""
    if name not in adapter:
        return 0.0
    a, b = (np.asarray(x, np.float64) for x in adapter[name])
    return alpha / len(a) * b @ a


def changes(base, adapter, out):
    """What a merge of an adapter adds to the tensors of a base, in float64."""
    run("merge", base, adapter, out, "--quiet")
    merged, old = models.read_model(out), models.read_model(base)
    return {n: merged[n].astype(np.float64) - old[n] for n in old if n.endswith("weight")}


def test_combine_is_the_weighted_sum(tmp_path, base):
    """Of adapters with other ranks and modules, with the fields of the first."""
    few = {name: models.LINEARS[name] for name in NAMES[:2]}
    one, two = factors(100, 3), factors(200, 2, few)
    about = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny"}
    places = [
        models.write_adapter(tmp_path / "one", one, **about),
        models.write_adapter(tmp_path / "two", two),
    ]
    run("combine", *places, tmp_path / "both", "--weights=-0.5,2", "--quiet")
    found = changes(base, tmp_path / "both", tmp_path / "merged")
    for name in NAMES:
        want = -0.5 * update(one, name) + 2 * update(two, name)
        close(found[f"{name}.weight"], want)
    written = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert {name: written[name] for name in about} == about


def test_combine_in_our_own_format_is_that_of_peft(tmp_path, base):
    places = [models.write_adapter(tmp_path / n, factors(i, 2)) for i, n in enumerate("ab")]
    own = [to_own(place, base, tmp_path / f"own_{place.name}") for place in places]
    options = ("--method", "svd", "--rank", 1, "--quiet")
    run("combine", *own, tmp_path / "own", *options)
    run("combine", *places, tmp_path / "peft", *options)
    assert checkpoint.load_adapters(tmp_path / "own")[1].config.rank == 1
    run("diff", tmp_path / "own", tmp_path / "peft")


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_ends_of_a_model_need_no_model(tmp_path, base, module):
    """Embeddings and heads are modules of their own in PEFT, whatever the model ties."""
    suffixes = ("lora_A.weight", "lora_B.weight")
    sizes = models.WIDTH, models.ENTRIES
    if module != "lm_head":
        suffixes, sizes = ("lora_embedding_A", "lora_embedding_B"), sizes[::-1]
    places, want = [], 0.0
    for i, rank in enumerate((2, 3)):
        a, b = models.draw((rank, sizes[0]), i), models.draw((sizes[1], rank), 9 + i)
        extra = {f"{module}.{end}": x for end, x in zip(suffixes, (a, b), strict=True)}
        config = {"r": rank, "target_modules": [module]}
        places.append(models.write_adapter(tmp_path / f"{i}", {}, extra, **config))
        want += update({module: (a, b)}, module)
    run("combine", *places, tmp_path / "both", "--quiet")
    found = changes(base, tmp_path / "both", tmp_path / "merged")[f"{module}.weight"]
    close(found, want if module == "lm_head" else want.T)


@pytest.mark.parametrize("dialect", ["mlx", "kohya", "diffusers"])
def test_the_result_has_the_format_of_the_adapters(tmp_path, base, dialect):
    end = "" if dialect == "mlx" else ".safetensors"
    places = []
    for i, name in enumerate("ab"):
        peft = models.write_adapter(tmp_path / name, factors(i, 2))
        places.append(tmp_path / f"{name}_{dialect}{end}")
        run("convert", peft, places[-1], "--to", dialect)
    out = tmp_path / f"out{end}"
    run("combine", *places, out, "--quiet")
    found = changes(base, out, tmp_path / "merged")
    for name in NAMES:
        want = sum(update(factors(i, 2), name) for i in range(2))
        close(found[f"{name}.weight"], want)


def test_a_seed_gives_the_same_again(tmp_path):
    places = [models.write_adapter(tmp_path / n, factors(i, 2)) for i, n in enumerate("ab")]
    for out, seed in (("first", 1), ("again", 1), ("other", 2)):
        options = ("--method", "dare_linear", "--density", 0.5, "--seed", seed, "--quiet")
        run("combine", *places, tmp_path / out, *options)
    run("diff", tmp_path / "first", tmp_path / "again")
    assert main(["diff", str(tmp_path / "first"), str(tmp_path / "other")]) == 3


def test_dora_needs_the_weights(tmp_path, base, tensors, capsys):
    one = factors(100, 3)
    sizes = {
        f"{n}.{MAGNITUDE}": abs(models.draw(a[1].shape[:1], 7)) for n, a in one.items()
    }
    dora = models.write_adapter(tmp_path / "dora", one, sizes, use_dora=True)
    lora = models.write_adapter(tmp_path / "lora", factors(200, 2))
    out = tmp_path / "both"
    assert "give --base" in refuse(capsys, "combine", dora, lora, out)
    run("combine", dora, lora, out, "--base", base, "--quiet")
    found, alone, other = (
        changes(base, adapter, tmp_path / f"merged_{i}")
        for i, adapter in enumerate((out, dora, lora))
    )
    for name in NAMES:
        key = f"{name}.weight"
        close(found[key], alone[key] + other[key])
    assert "give --base" in refuse(capsys, "resize", dora, tmp_path / "x", "--rank", 1)
    run("resize", dora, tmp_path / "small", "--rank", 3, "--base", base, "--quiet")
    run("diff", tmp_path / "small", dora)


def test_full_arrays_are_combined_too(tmp_path, base, tensors, capsys):
    head = models.draw((models.ENTRIES, models.WIDTH), 9)
    saved = {"modules_to_save": ["lm_head"]}
    extra = {"lm_head.weight": head}
    full = models.write_adapter(tmp_path / "full", factors(100, 2), extra, **saved)
    plain = models.write_adapter(tmp_path / "plain", factors(200, 2))
    out, options = tmp_path / "both", ("--weights", "0.5,0.5", "--quiet")
    assert "give --base" in refuse(capsys, "combine", full, plain, out, *options)
    run("combine", full, plain, out, *options, "--base", base)
    found = changes(base, out, tmp_path / "merged")["lm_head.weight"]
    close(found, 0.5 * (head - np.float64(tensors["lm_head.weight"])))


def test_resize_cuts_the_svd_and_reports_its_energy(tmp_path, base, capsys):
    one = factors(100, 3)
    place = models.write_adapter(tmp_path / "one", one)
    run("resize", place, tmp_path / "small", "--rank", 2)
    shown = capsys.readouterr().out
    found = changes(base, tmp_path / "small", tmp_path / "merged")
    for name in NAMES:
        u, s, vh = np.linalg.svd(update(one, name))
        close(found[f"{name}.weight"], u[:, :2] * s[:2] @ vh[:2])
        assert f"{(s[:2] ** 2).sum() / (s**2).sum():.4%}" in shown
    run("resize", place, tmp_path / "same", "--rank", 3)
    run("diff", tmp_path / "same", place)


@pytest.fixture
def tuned(tmp_path, tensors):
    """A model with a low-rank update of some weights, and other changes."""
    one = factors(100, 3)
    merged = models.merged(tensors, one)
    merged["model.norm.weight"] = merged["model.norm.weight"] + 1
    merged["lm_head.weight"] = merged["lm_head.weight"] * 2
    return models.write_base(tmp_path / "tuned", merged)


def test_extract_gives_the_update_back(tmp_path, base, tuned, capsys):
    run("extract", base, tuned, tmp_path / "out", "--energy", 0.9999999)
    shown = capsys.readouterr().out
    assert "saved in full" in shown
    assert "model.norm.weight" in shown
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 3
    run("merge", base, tmp_path / "out", tmp_path / "merged", "--quiet")
    run("diff", tmp_path / "merged", tuned, "--tolerance", 1e-5)


def test_extract_the_targets_that_are_named(tmp_path, base, tuned, capsys):
    options = ("--rank", 3, "--targets", "*q_proj.weight", "--targets", "lm_head.weight")
    run("extract", base, tuned, tmp_path / "out", *options)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["lm_head", NAMES[0]]
    assert len(config["modules_to_save"]) == 3
    wrong = (*options[:2], "--targets")
    line = refuse(capsys, "extract", base, tuned, tmp_path / "x", *wrong, "*q_prj.weight")
    assert "matches no tensor" in line
    line = refuse(capsys, "extract", base, tuned, tmp_path / "x", *wrong, "*norm.weight")
    assert "leave it out of --targets" in line


def test_extract_saves_modules_whole(tmp_path, base, tuned):
    """With a bias that has not changed, as PEFT needs it."""
    bias = {"model.norm.bias": models.draw((models.WIDTH,), 3)}
    places = [
        models.write_base(tmp_path / f"{each.name}_bias", models.read_model(each) | bias)
        for each in (base, tuned)
    ]
    run("extract", *places, tmp_path / "out", "--rank", 3, "--quiet")
    run("merge", places[0], tmp_path / "out", tmp_path / "merged", "--quiet")
    run("diff", tmp_path / "merged", places[1], "--tolerance", 1e-5)


def test_extract_convolutions(tmp_path):
    old = {"conv.weight": models.draw((6, 5, 3, 2), 1)}
    a, b = models.draw((2, 30), 2), models.draw((6, 2), 3)
    new = {"conv.weight": old["conv.weight"] + (b @ a).reshape(6, 5, 3, 2)}
    places = [models.write_base(tmp_path / n, t) for n, t in (("a", old), ("b", new))]
    run("extract", *places, tmp_path / "out", "--rank", 2, "--quiet")
    run("merge", places[0], tmp_path / "out", tmp_path / "merged", "--quiet")
    merged = models.read_model(tmp_path / "merged")
    close(merged["conv.weight"], new["conv.weight"])


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("combine", ("--method", "linear"), "the ranks are 3, 2: use lora-jax resize"),
        ("combine", ("--method", "ties"), "--method ties needs --density"),
        ("combine", ("--method", "dare_ties", "--density", 1), "needs --seed"),
        ("combine", ("--seed", 1), "does not use --seed"),
        ("combine", ("--weights", "1"), "one weight for each of the 2 adapters, got 1"),
        ("resize", (), "give --rank or --energy"),
        ("resize", ("--energy", 2), "at most 1, got 2"),
        ("extract", (), "give --rank or --energy"),
        ("extract", ("--rank", 1), "differs from BASE"),
    ],
)
def test_refusals(tmp_path, base, command, options, message, capsys):
    a, b = (
        models.write_adapter(tmp_path / n, factors(1, r)) for n, r in (("a", 3), ("b", 2))
    )
    given = {"combine": (a, b), "resize": (a,), "extract": (base, base)}[command]
    assert message in refuse(capsys, command, *given, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_belong_together(tmp_path, base, capsys):
    one = factors(100, 2)
    a = models.write_adapter(tmp_path / "a", one)
    pissa = models.write_adapter(tmp_path / "pissa", one, init_lora_weights="pissa")
    own = to_own(a, base, tmp_path / "own")
    wide = {name: (out + 1, n_in) for name, (out, n_in) in models.LINEARS.items()}
    other = models.write_adapter(tmp_path / "other", factors(1, 2, wide))
    capsys.readouterr()
    out = tmp_path / "out"
    assert "to_plain_adapters" in refuse(capsys, "combine", a, pissa, out)
    assert "convert one of them" in refuse(capsys, "combine", a, own, out)
    assert "of the same model?" in refuse(capsys, "combine", a, other, out)
    assert "never changed" in refuse(capsys, "combine", a, a, a)


def test_models_that_do_not_belong_together(tmp_path, base, tensors, capsys):
    less = {name: x for name, x in tensors.items() if name != "lm_head.weight"}
    wide = tensors | {"lm_head.weight": models.draw((3, 3), 1)}
    for name, other, message in (
        ("less", less, "only BASE has 'lm_head.weight'"),
        ("wide", wide, "an adapter cannot change a shape"),
    ):
        tuned = models.write_base(tmp_path / name, other)
        options = ("extract", base, tuned, tmp_path / "out", "--rank", 1)
        assert message in refuse(capsys, *options)


def test_progress_counts_each_weight(tmp_path, monkeypatch):
    """The library logs each weight that is done; the log is as before afterwards."""
    steps = []

    class Terminal:
        def __init__(self, total, quiet):
            steps.append(total)

        def __enter__(self):
            return steps.append

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("lora_jax.cli._terminal.show_progress", Terminal)
    logger = logging.getLogger("lora_jax")
    before = logger.level, list(logger.handlers)
    place = models.write_adapter(tmp_path / "a", factors(1, 2))
    run("resize", place, tmp_path / "out", "--rank", 1)
    assert len(steps) == 1 + len(NAMES)
    assert sum(steps[1:]) == steps[0]
    assert (logger.level, list(logger.handlers)) == before
