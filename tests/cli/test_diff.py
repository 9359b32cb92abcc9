"""`lora-jax diff` finds each difference, and no other."""

import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_jax
from lora_jax import checkpoint
from lora_jax.cli import _diff, main
from tests.cli import models
from tests.cli.merging import to_own


def diff(capsys, a, b, *options):
    code = main(["diff", str(a), str(b), *options])
    return code, capsys.readouterr().out


def save(path, **tensors):
    save_file({name: np.asarray(value) for name, value in tensors.items()}, path)
    return path


def test_equal_models(tmp_path, capsys):
    tensors = models.make_tensors("bfloat16")
    one = models.write_base(tmp_path / "one", tensors)
    three = models.write_base(tmp_path / "three", tensors, 3)
    code, text = diff(capsys, one, three)
    assert code == 0
    equal = "0 settings differ; of the entries 11 are equal, 0 differ, 0 are in one only."
    assert text == f"{equal}\n"
    assert diff(capsys, one / "model.safetensors", three)[0] == 0


def test_differences_of_values(tmp_path, capsys):
    values = np.array([1, -8, 3], "float32")
    a = save(tmp_path / "a.safetensors", same=values, off=values, only=values)
    off = values + np.float32([0, 0.25, 0])
    b = save(tmp_path / "b.safetensors", same=values, off=off)
    code, text = diff(capsys, a, b)
    assert code == 3
    assert "off    3      float32                0.25   0.03125" in text
    assert f"only in {a}  only" in text
    assert "1 are equal, 1 differ, 1 are in one only." in text
    assert " same " not in text


def test_tolerance(tmp_path, capsys):
    a = save(tmp_path / "a.safetensors", x=np.float32([4, 1]))
    b = save(tmp_path / "b.safetensors", x=np.float32([4, 1.5]))
    assert diff(capsys, a, b, "--tolerance=0.124")[0] == 3
    assert diff(capsys, a, b, "--tolerance=0.125")[0] == 0


def test_dtypes_and_shapes(tmp_path, capsys):
    a = save(tmp_path / "a.safetensors", x=np.float32([4, 1]), y=np.zeros(2))
    b = save(tmp_path / "b.safetensors", x=np.float16([4, 1]), y=np.zeros((2, 1)))
    code, text = diff(capsys, a, b)
    assert code == 3
    assert "float32, float16" in text
    assert "2, 2 x 1" in text
    code, text = diff(capsys, a, b, "--tolerance=1e-9")
    assert code == 3
    assert "1 are equal, 1 differ" in text


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        ([1.0, np.nan], [1.0, np.nan], (0, 0, True)),
        ([1.0, np.nan], [1.0, 2.0], (np.inf, np.inf, False)),
        ([np.inf, 1.0], [np.inf, 3.0], (2, 2 / 3, False)),
        ([np.inf], [-np.inf], (np.inf, np.inf, False)),
        ([0.0], [-0.0], (0, 0, True)),
        ([], [], (0, 0, True)),
    ],
)
def test_distances(a, b, want):
    assert _diff.measure(np.array(a), np.array(b)) == pytest.approx(want)


def test_large_integers_are_compared_exactly():
    a, b = (np.array([2**60 + i]) for i in (0, 1))
    assert not _diff.measure(a, b).equal


def test_pieces_together_are_the_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_diff, "_PIECE", 7)
    values = np.arange(40, dtype="float32").reshape(8, 5)
    other = values.copy()
    other[7, 4] += 1
    a = save(tmp_path / "a.safetensors", x=values)
    b = save(tmp_path / "b.safetensors", x=other)
    code, text = diff(capsys, a, b)
    assert code == 3
    assert "8 x 5  float32                   1     0.025" in text


def test_adapters(tmp_path, capsys):
    factors = models.make_factors()
    a = models.write_adapter(tmp_path / "a", factors, peft_version="0.1.0")
    b = models.write_adapter(tmp_path / "b", factors, target_modules=[
        "up_proj", "q_proj", "down_proj"
    ])  # fmt: skip
    assert diff(capsys, a, b)[0] == 0
    c = models.write_adapter(tmp_path / "c", factors, lora_alpha=7, lora_dropout=0.5)
    code, text = diff(capsys, a, c)
    assert code == 3
    lines = [line.split() for line in text.splitlines()]
    assert ["lora_alpha", "6", "7"] in lines
    assert ["lora_dropout", "0.0", "0.5"] in lines
    assert "5 settings differ; of the entries 6 are equal" in text  # and three scales
    factors["model.layers.0.mlp.up_proj"][0][0, 0] += 1
    d = models.write_adapter(tmp_path / "d", factors)
    code, text = diff(capsys, a, d)
    assert code == 3
    assert "model.layers.0.mlp.up_proj A" in text
    assert "0 settings differ; of the entries 5 are equal, 1 differ" in text


def test_a_model_is_no_adapter(tmp_path, capsys):
    base = models.write_base(tmp_path / "base", models.make_tensors())
    adapter = models.write_adapter(tmp_path / "adapter", models.make_factors())
    assert main(["diff", str(adapter), str(base)]) == 1
    assert f"{base} is a model and {adapter} is not" in capsys.readouterr().err


def stacked(folder, factors):
    """This library's form of an adapter of two layers: one stack for each weight."""
    names = {name.rpartition(".")[2] for name in factors}
    params, adapters = {}, {}
    for name in names:
        own = [factors[f"model.layers.{i}.mlp.{name}"] for i in (0, 1)]
        a, b = (np.stack([each[k].T for each in own]) for k in (0, 1))
        params[name] = {"kernel": np.zeros((2, a.shape[1], b.shape[2]), "float32")}
        adapters[f"model/layers/mlp/{name}/kernel"] = {"A": a, "B": b}
    params = {"model": {"layers": {"mlp": params}}}
    axes = dict.fromkeys(adapters, "bio")
    config = lora_jax.LoraConfig(rank=3, alpha=6, targets=tuple(adapters), axes=axes)
    plan = lora_jax.plan_adapters(config, params)
    checkpoint.save_adapters(folder, adapters, plan)
    return folder


SHAPES = {"up": (20, 12), "down": (12, 20)}
LAYERS = {f"model.layers.{i}.mlp.{n}": SHAPES[n] for i in (0, 1) for n in SHAPES}


def wider(n, a, b):
    return np.pad(a, ((0, n), (0, 0))), np.pad(b, ((0, 0), (0, n)))


def other_form(form, factors):
    """The same adapter written in another way: the factors and the config."""
    rng = np.random.default_rng(7)
    if form == "folded":
        return {n: (a, 2 * b) for n, (a, b) in factors.items()}, {"lora_alpha": 3}
    if form == "turned":
        turn = rng.normal(size=(3, 3)) + 3 * np.eye(3)
        back = np.linalg.inv(turn)
        return {n: (turn @ a, b @ back) for n, (a, b) in factors.items()}, {}
    if form == "wider":
        return {name: wider(2, *own) for name, own in factors.items()}, {"lora_alpha": 10}
    if form == "patterns":
        name = "model.layers.1.mlp.up"
        return factors | {name: wider(1, *factors[name])}, {
            "r": 3, "rank_pattern": {"layers.1.mlp.up": 4},
            "alpha_pattern": {"layers.1.mlp.up": 8},
        }  # fmt: skip
    assert form == "stabilized"
    return factors, {"lora_alpha": 6 / 3**0.5, "use_rslora": True}


@pytest.mark.parametrize("form", ["folded", "turned", "wider", "patterns", "stabilized"])
@pytest.mark.parametrize("own", ["", "one by one", "stacked"])
def test_two_forms_of_one_adapter(tmp_path, capsys, form, own):
    factors = models.make_factors(modules=LAYERS)
    a = models.write_adapter(tmp_path / "a", factors)
    if own == "stacked":
        a = stacked(tmp_path / "own", factors)
    elif own:
        shapes = {f"{name}.weight": np.zeros(s, "float32") for name, s in LAYERS.items()}
        a = to_own(a, models.write_base(tmp_path / "base", shapes), tmp_path / "own")
    capsys.readouterr()
    other, config = other_form(form, factors)
    other = {n: tuple(x.astype("float32") for x in pair) for n, pair in other.items()}
    b = models.write_adapter(tmp_path / "b", other, **config)
    for pair in ((a, b), (b, a)):
        code, text = diff(capsys, *pair)
        assert "The effects are the same: of " in text
        assert code == 0
    name = "model.layers.1.mlp.down"
    other[name] = other[name][0], other[name][1] * np.float32(1.001)
    c = models.write_adapter(tmp_path / "c", other, **config)
    code, text = diff(capsys, a, c)
    assert code == 3
    count = 2 if own == "stacked" else 4
    assert f"The effects differ: 1 of {count} updates and arrays." in text
    path = "model/layers/mlp/down/kernel" if own == "stacked" else name
    (line,) = (x.split() for x in text.splitlines() if " update " in x)
    assert line[0] == path
    updates = [factors[n][1] @ factors[n][0] for n in LAYERS if n.endswith("down")]
    norm = np.linalg.norm(updates if own == "stacked" else updates[1])
    want = 1e-3 * np.linalg.norm(updates[1]) / norm
    assert float(line[-1]) == pytest.approx(want, rel=3e-3)
    assert diff(capsys, a, c, "--tolerance=0.0011")[0] == 0
    assert diff(capsys, a, b, "--tolerance=0")[0] == (3 if form == "turned" else 0)


def test_stacked_and_one_by_one_of_this_library(tmp_path, capsys):
    factors = models.make_factors(modules=LAYERS)
    a = stacked(tmp_path / "a", factors)
    shapes = {f"{name}.weight": np.zeros(s, "float32") for name, s in LAYERS.items()}
    base = models.write_base(tmp_path / "base", shapes)
    b = to_own(models.write_adapter(tmp_path / "peft", factors), base, tmp_path / "b")
    for pair in ((a, b), (b, a)):
        code, text = diff(capsys, *pair)
        assert code == 0
        assert "The effects are the same: of 2 updates" in text


def padded(array, axis, size, first):
    widths = [(0, 0)] * array.ndim
    widths[axis] = first, size - first - array.shape[axis]
    return np.pad(array, widths)


# A part, and the factor and axis that have zeros outside of it.
WHOLE = {"up[1:]": "AB", "up[:, :, 4:]": "B", "up[:, 4:]": "A", "up[2]": "AB"}


@pytest.mark.parametrize("part", WHOLE)
def test_a_part_and_a_weight_with_zeros_elsewhere(tmp_path, capsys, part):
    params = {"up": np.zeros((3, 8, 8), "float32"), "down": np.zeros((8, 6), "float32")}
    a, b = tmp_path / "a", tmp_path / "b"
    config = {"axes": {"up": "bio"}, "rank": 2, "train": ()}
    adapters, plan = models.write_own(a, params, targets=(part, "down"), **config)
    own = adapters[next(path for path in plan.targets if path != "down")]
    whole = {name: np.asarray(own[name]) for name in "AB"}
    if part == "up[2]":
        whole = {name: array[None] for name, array in whole.items()}
    for name in WHOLE[part]:
        axis = 0 if WHOLE[part] == "AB" else {"A": 1, "B": 2}[name]
        size = (3, 8, 8)[axis]
        whole[name] = padded(whole[name], axis, size, size - whole[name].shape[axis])
    more, plan = models.write_own(b, params, targets=("up", "down"), **config)
    more |= {"up": whole, "down": adapters["down"]}
    checkpoint.save_adapters(b, more, plan)
    for pair in ((a, b), (b, a)):
        code, text = diff(capsys, *pair)
        assert "The effects are the same: of 2 updates" in text
        assert code == 0
    whole["B"] = 2 * whole["B"]
    checkpoint.save_adapters(b, more, plan)
    code, text = diff(capsys, a, b)
    assert code == 3
    (line,) = (x.split() for x in text.splitlines() if " update " in x)
    assert (line[0], line[-1]) == ("up", "0.5")


_EFFECTS = ("update", "magnitude", "whole")


def test_parts_of_parts_and_uses(tmp_path, capsys):
    """One adapter in several targets of this library; DoRA, uses and trained leaves."""
    params = {"up": np.zeros((3, 8, 8), "float32"), "table": np.zeros((9, 4), "float32")}
    params["bias"] = np.zeros(4, "float32")
    a, b = tmp_path / "a", tmp_path / "b"
    config = {"axes": {"up": "bio"}, "rank": 2, "train": "bias", "use_dora": True}
    adapters, _ = models.write_own(a, params, targets=("up[1:]", "table"), **config)
    targets = "up[1]", "up[2]", "table@lookup", "table@product"
    more, cut = models.write_own(b, params, targets=targets, **config)
    whole = adapters["up[1:]"].items()
    more |= {f"up[{i}]": {name: x[i - 1] for name, x in whole} for i in (1, 2)}
    more |= dict.fromkeys(("table@lookup", "table@product"), adapters["table"])
    more["bias"] = adapters["bias"]
    checkpoint.save_adapters(b, more, cut)
    code, text = diff(capsys, a, b)
    assert "The effects are the same: of 4 updates and arrays" in text
    assert code == 0
    more["table@product"] = {**adapters["table"], "A": 2 * adapters["table"]["A"]}
    more["bias"] = {"value": 2 * adapters["bias"]["value"]}
    more["up[1]"] = {**more["up[1]"], "m": 2 * more["up[1]"]["m"]}
    checkpoint.save_adapters(b, more, cut)
    code, text = diff(capsys, a, b)
    assert code == 3
    lines = [line.split() for line in text.splitlines()]
    found = {x[0]: (x[-2], x[-1]) for x in lines if x and x[-2] in _EFFECTS}
    up = adapters["up[1:]"]["m"]
    share = np.linalg.norm(up[0]) / np.linalg.norm([2 * up[0], up[1]])
    half = {"table@product": ("update", "0.5"), "bias": ("whole", "0.5")}
    assert found == {"up": ("magnitude", f"{share:.4g}"), **half}
    # Of a column outside of the part nothing is known.
    models.write_own(b, params, targets=("up", "table"), **config)
    code, text = diff(capsys, a, b)
    assert code == 3
    (line,) = (x.split() for x in text.splitlines() if x.startswith("up "))
    assert line[-2:] == ["magnitude", "inf"]


def test_names_that_do_not_tell(tmp_path, capsys):
    factors = models.make_factors(modules={"model.layers.0.mlp.up": (20, 12)})
    peft = models.write_adapter(tmp_path / "peft", factors)
    ((a, b),) = factors.values()
    params = {"body": {"first": np.zeros((12, 20), "float32")}}
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=3, alpha=6), params)
    adapters = {"body/first": {"A": a.T, "B": b.T}}
    checkpoint.save_adapters(tmp_path / "own", adapters, plan)
    code, text = diff(capsys, peft, tmp_path / "own")
    assert code == 3
    assert "The effects were not compared" in text
    assert "'body/first' and 'model.layers.0.mlp.up': give --names" in text
    names = tmp_path / "names.json"
    names.write_text('{"model.layers.0.mlp.up": "body/first"}')
    for pair in ((peft, tmp_path / "own"), (tmp_path / "own", peft)):
        code, text = diff(capsys, *pair, f"--names={names}")
        assert code == 0
        assert "The effects are the same: of 1 updates" in text


def test_what_the_arrays_do_not_say(tmp_path, capsys):
    factors = models.make_factors()
    a = models.write_adapter(tmp_path / "a", factors)
    b = models.write_adapter(tmp_path / "b", factors, lora_dropout=0.5)
    code, text = diff(capsys, a, b)
    assert code == 3
    assert ", but the settings differ." in text
    c = models.write_adapter(tmp_path / "c", factors, task_type="CAUSAL_LM")
    code, text = diff(capsys, a, c)
    assert code == 0
    assert "task_type" in text
    # An adapter that does nothing is none; one that does is in one only.
    name = "model.layers.1.mlp.up_proj"
    for size in (0, 1):
        more = models.make_factors(modules={name: (20, 12)})
        more = {n: (x, size * y) for n, (x, y) in more.items()}
        d = models.write_adapter(tmp_path / f"d{size}", factors | more)
        code, text = diff(capsys, a, d)
        assert code == 3 * size
        assert (" update " in text) == bool(size)


def test_magnitudes_and_saved_arrays(tmp_path, capsys):
    factors = models.make_factors()
    head = models.draw((models.ENTRIES, models.WIDTH), 3)
    magnitudes = {
        f"{name}.lora_magnitude_vector": models.draw((n_out,), 5)
        for name, (n_out, _) in models.LINEARS.items()
    }
    config = {"use_dora": True, "modules_to_save": ["lm_head"]}

    def write(folder, alpha, extra):
        own = {n: (a, b * np.float32(6 / alpha)) for n, (a, b) in factors.items()}
        extra = magnitudes | {"lm_head.weight": head} | extra
        return models.write_adapter(folder, own, extra, lora_alpha=alpha, **config)

    a, b = write(tmp_path / "a", 6, {}), write(tmp_path / "b", 3, {})
    code, text = diff(capsys, a, b)
    assert code == 0
    assert "of 4 updates and arrays, none differs" in text
    name = "model.layers.0.mlp.up_proj"
    other = 1.5 * magnitudes[f"{name}.lora_magnitude_vector"]
    c = write(tmp_path / "c", 3, {f"{name}.lora_magnitude_vector": other})
    code, text = diff(capsys, a, c)
    assert code == 3
    (line,) = (x.split() for x in text.splitlines() if " magnitude " in x)
    assert (line[0], line[-1]) == (name, "0.3333")
    d = write(tmp_path / "d", 3, {"lm_head.weight": 2 * head})
    code, text = diff(capsys, a, d)
    assert code == 3
    (line,) = (x.split() for x in text.splitlines() if " whole " in x)
    assert (line[0], line[-1]) == ("lm_head", "0.5")


def test_options_that_are_for_adapters(tmp_path, capsys):
    a = save(tmp_path / "a.safetensors", x=np.zeros(2))
    for option in ("--names=names.json", "--allow-field=x"):
        (tmp_path / "names.json").write_text("{}")
        option = option.replace("names.json", str(tmp_path / "names.json"))
        assert main(["diff", str(a), str(a), option]) == 1
        assert "are for adapters, not for models" in capsys.readouterr().err
