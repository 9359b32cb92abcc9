"""`lora-jax inspect` shows what is there, and warns of what would surprise."""

import json

import jax
import numpy as np
import pytest

import lora_jax
from lora_jax import checkpoint
from lora_jax.cli import _adapters, _inspect, main
from tests.cli import models


def inspect(capsys, folder, code=0):
    """What the command gives as JSON, and what it prints."""
    assert main(["inspect", str(folder), "--json"]) == code
    record = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(folder)]) == code
    text = capsys.readouterr().out
    assert all(f"warning: {line}" in text for line in record["warnings"])
    return record, text


@pytest.mark.parametrize(("n_in", "rank", "n_out"), [(9, 4, 7), (3, 5, 8), (6, 1, 2)])
def test_the_norm_is_that_of_the_product(n_in, rank, n_out):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, n_in, rank)), rng.normal(size=(2, rank, n_out))
    want = np.linalg.norm((-0.5 * a @ b).ravel())
    assert _inspect.update_norm(a, b, -0.5) == pytest.approx(want, rel=1e-12)


def test_the_norm_of_a_product_that_cancels_is_zero():
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 4)))[0].T
    a, b = np.ones((5, 2)) @ q[:2], q[2:].T @ np.ones((2, 3))
    assert _inspect.update_norm(a, b, 1.0) < 1e-14  # its square is no more than 1e-16


def test_a_peft_adapter(tmp_path, capsys):
    factors = models.make_factors()
    folder = models.write_adapter(
        tmp_path / "adapter", factors, use_rslora=True, base_model_name_or_path="org/model"
    )
    record, text = inspect(capsys, folder)
    assert record["format"] == "peft"
    assert (record["rank"], record["alpha"], record["rank_stabilized"]) == (3, 6, True)
    assert record["warnings"] == []
    for name, (a, b) in factors.items():
        own = record["adapters"][name]
        norm = np.linalg.norm(6 / np.sqrt(3) * b.astype(float) @ a.astype(float))
        assert own["update_norm"] == pytest.approx(norm)
        assert own["scale"] == pytest.approx(6 / np.sqrt(3))
        assert own["entries"]["A"] == {"shape": list(a.shape), "dtype": "float32"}
        assert own["bytes"] == 4 * own["parameters"] == a.nbytes + b.nbytes
        assert name in text
    assert record["bytes"] == sum(each["bytes"] for each in record["adapters"].values())
    assert "base model: org/model" in text


def test_own_adapters(tmp_path, capsys):
    params = {"a": np.zeros((6, 5), "float32"), "b": np.zeros((4, 6, 5), "float32")}
    params |= {"bias": np.ones(5, "float32"), "qkv": np.zeros((3, 6, 5), "float32")}
    config = {"rank": 2, "alpha": 3, "train": "bias"}
    config["rank_pattern"] = {"b[2:]": 4, "qkv": 1}
    config["targets"] = "a", "b", "qkv[0]", "qkv[2]@product"
    config["axes"] = dict.fromkeys(("b", "qkv"), "bio")
    adapters, plan = models.write_own(tmp_path / "own", params, **config)
    record, text = inspect(capsys, tmp_path / "own")
    assert record["format"] == "lora_jax"
    assert [record["adapters"][path]["shape"] for path in plan.targets] == [
        *([6, 5], [2, 6, 5], [2, 6, 5], [6, 5], [6, 5])
    ]
    for path, target in plan.targets.items():
        update = target.scale * np.asarray(adapters[path]["A"] @ adapters[path]["B"], float)
        norm = record["adapters"][path]["update_norm"]
        assert norm == pytest.approx(np.linalg.norm(update)), path
        assert path in text
    assert record["wholes"] == {"bias": {"shape": [5], "dtype": "float32", "bytes": 20}}
    assert "trained: bias" in text
    assert record["warnings"] == []
    fresh = lora_jax.init_adapters(jax.random.key(0), params, plan)
    fresh["b[:2]"]["B"] += 1
    fresh["bias"]["value"] = np.full(5, np.inf, "float32")
    checkpoint.save_adapters(tmp_path / "own", fresh, plan)
    assert inspect(capsys, tmp_path / "own")[0]["warnings"] == [
        "bias has an infinity or a NaN in it.",
        "4 of 5 adapters have no effect, A or B is zero everywhere: a, b[2:], qkv[0] and "
        "1 more.",
    ]


def test_experts_and_convolutions(tmp_path, capsys):
    experts, rank, n_in, n_out = 3, 2, 5, 4
    stack = models.draw((experts * rank, n_in), 0), models.draw((n_out, rank * experts), 1)
    kernel = models.draw((rank, n_in, 3, 3), 2), models.draw((n_out, rank, 1, 1), 3)
    factors = {"mlp.experts": stack, "conv": kernel}
    config = {"r": rank, "target_modules": ["conv"]}
    config["target_parameters"] = ["mlp.experts.gate_up_proj"]
    folder = models.write_adapter(tmp_path / "adapter", factors, **config)
    record, _ = inspect(capsys, folder)
    a = stack[0].reshape(experts, rank, n_in)
    b = stack[1].reshape(n_out, rank, experts)
    update = 3 * np.einsum("ore,eri->eoi", b, a)
    own = record["adapters"]
    assert own["mlp.experts"]["rank"] == rank
    assert own["mlp.experts"]["update_norm"] == pytest.approx(np.linalg.norm(update), 1e-5)
    update = 3 * np.einsum("orxy,rikl->oikl", kernel[1], kernel[0])
    assert own["conv"]["update_norm"] == pytest.approx(np.linalg.norm(update), 1e-5)


def warnings_of(capsys, tmp_path, factors, extra=None, **config):
    folder = models.write_adapter(tmp_path / "adapter", factors, extra, **config)
    return "\n".join(inspect(capsys, folder)[0]["warnings"])


@pytest.mark.parametrize(
    ("config", "warning"),
    [
        ({"lora_alpha": 0}, "the scale of model.layers.0.mlp.up_proj is 0"),
        ({"lora_alpha": 900}, "the scale of model.layers.0.mlp.up_proj is 300"),
        ({"r": 4}, "up_proj has rank 3, but the settings say 4"),
        ({"init_lora_weights": "pissa"}, "init 'pissa' changed the base weights"),
        ({"modules_to_save": ["score"]}, "the modules score were trained in full"),
    ],
)
def test_warnings_of_settings(tmp_path, capsys, config, warning):
    assert warning in warnings_of(capsys, tmp_path, models.make_factors(), **config)


def test_warnings_of_values(tmp_path, capsys):
    factors = models.make_factors()
    factors["model.layers.0.mlp.up_proj"][0][0, 0] = np.inf
    head = {"lm_head.weight": np.full((4, 4), np.nan, "float32")}
    text = warnings_of(capsys, tmp_path, factors, head)
    assert "A of model.layers.0.mlp.up_proj has an infinity or a NaN in it." in text
    assert "lm_head.weight has an infinity or a NaN in it." in text


def test_warnings_of_what_does_nothing(tmp_path, capsys):
    factors = {name: (a, 0 * b) for name, (a, b) in models.make_factors().items()}
    text = warnings_of(capsys, tmp_path, factors)
    assert "no adapter has an effect: A or B is zero everywhere" in text


def test_warnings_of_sizes(tmp_path, capsys):
    large = {"model.embed_tokens.base_layer.weight": np.zeros((512, 1024), "float32")}
    ((a, b),) = models.make_factors(modules={"a": (4, 6)}, rank=5).values()
    factors = {"a": (a.astype("float16"), b.astype("float16"))}
    text = warnings_of(capsys, tmp_path, factors, large)
    assert "model.embed_tokens.weight is saved in full, 2.0 MiB" in text
    assert "a has rank 5 for a weight with 6 inputs and 4 outputs" in text
    assert "there are factors in float16" in text


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path, capsys):
    name = "layer.\x1b[31mred\u202e"
    factors = models.make_factors(modules={name: (4, 6)})
    folder = models.write_adapter(
        tmp_path / "adapter", factors, base_model_name_or_path="\x07bell\nrank: 64"
    )
    record, text = inspect(capsys, folder)
    assert name in record["adapters"]
    assert "layer.\\x1b[31mred\\u202e" in text
    assert "\\x07bell" in text
    assert not set(text) & set("\x1b\x07\u202e")
    assert "\nrank: 64" not in text


def test_what_is_no_adapter(tmp_path, capsys):
    def error(folder):
        assert main(["inspect", str(folder)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "there is no directory" in error(tmp_path / "no")
    models.write_adapter(tmp_path / "inner", models.make_factors())
    line = error(tmp_path)
    assert "has neither adapter_config.json nor lora_jax_adapters.safetensors" in line
    assert f"there are adapters in {tmp_path / 'inner'}" in line
    (tmp_path / "inner" / "adapters.json").write_text("{}")
    assert "has adapter_config.json and adapters.json" in error(tmp_path / "inner")
    (tmp_path / "inner" / "adapter_config.json").unlink()
    assert "adapters.json was not written by save_adapters" in error(tmp_path / "inner")


@pytest.mark.parametrize("own", [False, True])
def test_a_picture(own, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "adapter"
    if own:
        params = {"a": np.zeros((6, 5), "float32"), "b": np.zeros((4, 6, 5), "float32")}
        models.write_own(folder, params, rank=2, axes={"b": "bio"}, targets=("a", "b[2:]"))
    else:
        models.write_adapter(folder, models.make_factors())
    file = tmp_path / "norms.png"
    assert main(["inspect", str(folder), "--json", "--plot", str(file)]) == 0
    norms = json.loads(capsys.readouterr().out)["adapters"].values()
    assert file.read_bytes().startswith(b"\x89PNG")
    contents = _adapters.read_contents(folder, ())
    drawn = _inspect.draw(contents).axes[0].images[0].get_array()
    whole = np.linalg.norm([each["update_norm"] for each in norms])
    assert np.linalg.norm(drawn.compressed()) == pytest.approx(whole)
    assert drawn.count() == (3 if own else len(norms))


def test_a_picture_needs_the_name_of_a_picture(tmp_path, capsys):
    assert main(["inspect", str(tmp_path), "--plot", "a.txt"]) == 2
    error = capsys.readouterr().err
    assert "expected the name of a .png, .pdf, .svg file, got 'a.txt'" in error
