"""`lora-jax diff` finds each difference, and no other."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax.cli import _diff, main
from tests.cli import models


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
    assert text == (
        "0 settings differ; of the entries 11 are equal, 0 differ, 0 are in one only.\n"
    )
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
    left, right = (_diff._of_array(np.array(each)) for each in (a, b))
    assert _diff.measure(left, right) == pytest.approx(want)


def test_large_integers_are_compared_exactly():
    a, b = (_diff._of_array(np.array([2**60 + i])) for i in (0, 1))
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
