"""Quantized weights on disk: the same bits, or an error that says what is wrong."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax import quant
from lora_jax.quant import tensors
from tests.quant.support import ALL, SHAPE, STORED, make
from tests.support import assert_same_bits, draw, file_digest


@pytest.fixture
def path(tmp_path):
    return tmp_path / "base.safetensors"


def example():
    tree = {name: make(name, 2) for name in (*ALL, *STORED)}
    stack = {"layers/q": make("torchao", 2, dtype="float16")}
    return (
        tree | stack | {"norm/scale": draw(7, dtype="bfloat16"), "empty": jnp.ones((0, 2))}
    )


def test_bits_and_classes_come_back(path):
    quant.save_quantized(path, example())
    loaded = quant.load_quantized(path)
    assert_same_bits(loaded, example())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_tree_is_saved_by_paths(path):
    q, bias = quant.quantize_fp8(draw(*SHAPE)), draw(4)
    quant.save_quantized(str(path), {"layer": [{"q": q, "b": bias}]})
    assert_same_bits(quant.load_quantized(path), {"layer/0/b": bias, "layer/0/q": q})


def test_saving_refuses_what_it_cannot_keep(path):
    q = quant.quantize_int8(draw(*SHAPE))
    with pytest.raises(TypeError, match="at 'a': expected an array or a quantized tensor"):
        quant.save_quantized(path, {"a": "text"})
    with pytest.raises(TypeError, match=r"b/k is a jax.random key: save its .*key_data"):
        quant.save_quantized(path, {"b": {"k": jax.random.key(0)}})
    with pytest.raises(ValueError, match="two arrays would have the name 'a:codes'"):
        quant.save_quantized(path, {"a": q, "a:codes": draw(2)})
    with pytest.raises(ValueError, match="two arrays would have the name 'a/b'"):
        quant.save_quantized(path, {"a": {"b": draw(2)}, "a/b": q})
    with pytest.raises(TypeError, match="a:codes has no values to write"):
        quant.save_quantized(path, {"a": jax.eval_shape(lambda: q)})
    with pytest.raises(TypeError, match="file must be a path, got dict"):
        quant.save_quantized({"a": q}, path)  # pyright: ignore[reportArgumentType]
    assert not path.exists()


def test_a_format_without_a_name_is_refused(path, monkeypatch):
    quant.save_quantized(path, {"a": ALL["sign"](draw(*SHAPE))})
    monkeypatch.delitem(tensors._FORMATS, "toy_sign")
    with pytest.raises(TypeError, match="SignTensor has no name in files: give it one"):
        quant.save_quantized(path, {"a": ALL["sign"](draw(*SHAPE))})
    with pytest.raises(lora_jax.CheckpointError, match="format 'toy_sign', and known are"):
        quant.load_quantized(path)


def test_settings_that_json_lacks_are_not_saved(path, monkeypatch):
    q = ALL["sign"](draw(*SHAPE))
    quant.save_quantized(path, {"a": q})
    before = path.read_bytes()
    monkeypatch.setattr(type(q), "settings", lambda self: {"weight_dtype": float("inf")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        quant.save_quantized(path, {"a": q})
    assert path.read_bytes() == before


def test_files_of_other_kinds(path):
    with pytest.raises(IsADirectoryError, match="is a directory: give a file, none"):
        quant.load_quantized(path.parent)
    with pytest.raises(FileNotFoundError, match=r"no directory .*lacking to write f in"):
        quant.save_quantized(path.parent / "lacking" / "f", {"a": draw(2)})
    with pytest.raises(FileNotFoundError, match="there is no file"):
        quant.load_quantized(path)
    for data in (b"", b"{}", bytes(100)):
        path.write_bytes(data)
        with pytest.raises(lora_jax.CheckpointError, match="cannot be read as safetensors"):
            quant.load_quantized(path)
    save_file({"a": np.ones(3)}, path)
    with pytest.raises(lora_jax.CheckpointError, match="was not written by save_quantized"):
        quant.load_quantized(path)


# ------------------------------------------------------------------ edited and damaged


def rewrite(path, edit):
    """Changes the record and the arrays of a file, and gives it the digest it needs."""
    arrays = load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    record = json.loads(metadata["record"])
    edit(record, arrays, metadata)
    text = metadata["record"] = json.dumps(record)
    metadata["digest"] = file_digest(text, arrays)
    save_file(arrays, path, metadata)


def settings(**changes):
    return lambda record, arrays, metadata: record["a"]["settings"].update(changes)


def more(n):
    return lambda r, a, m: a.update({f"b{i}": np.ones(2) for i in range(n)})


ENTRY = {"format": "nf4", "settings": {}, "arrays": []}
EDITS = {
    "nothing": (lambda r, a, m: None, None),
    "version": (lambda r, a, m: m.update(version="2"), "has version 2 of the format"),
    "format": (lambda r, a, m: m.update(format="x"), "was not written by save_quantized"),
    "metadata": (lambda r, a, m: m.update(more="x"), "expected the metadata format"),
    **{
        f"entry {i}": (lambda r, a, m, c=change: r.update(a=c), "record should have a form")
        for i, change in enumerate([[*ENTRY], *({**ENTRY, key: 1} for key in ENTRY), {}])
    },
    "names": (lambda r, a, m: r["a"].update(arrays=[1]), "its record should have a format"),
    "unknown": (lambda r, a, m: r["a"].update(format="nf3"), "the format 'nf3', and known"),
    "other": (lambda r, a, m: r["a"].update(format="int8"), "at 'a': expected arrays of"),
    "arrays": (lambda r, a, m: r["a"].update(arrays=["codes"]), "unexpected 'a:group_sc"),
    "missing": (lambda r, a, m: a.pop("a:codes") is None, "missing are 'a:codes'"),
    "extra": (more(1), r"missing are none, unexpected 'b0'\."),
    "5 more": (more(5), r"unexpected 'b0', 'b1', 'b2', 'b3', 'b4'\.$"),
    "6 more": (more(6), r"unexpected 'b0', 'b1', 'b2', 'b3', 'b4', \.\.\."),
    "dropped": (
        lambda r, a, m: (a.pop("a:mean"), r["a"]["arrays"].remove("mean")),
        "at 'a': the array mean is missing",
    ),
    "shape": (
        lambda r, a, m: a.update({"a:codes": a["a:codes"][:-1]}),
        "at 'a': the array codes should be uint8 of the shape",
    ),
    "dtype": (
        lambda r, a, m: a.update({"a:scales": a["a:scales"].astype(np.float32)}),
        "the array scales should be int8",
    ),
    "size": (settings(block_size=0), "block_size must be a positive integer"),
    "kind": (settings(block_size=None), "block_size must be an integer"),
    "huge": (settings(entry_shape=[2**62, 2**62]), "the array codes should be"),
    "text": (settings(entry_shape="abc"), "entry_shape must be an integer"),
    "codec": (settings(codec={}), "codec must be one of"),
    "weight": (settings(weight_dtype="float64"), "weight_dtype must be one of"),
    "more": (settings(more=1), "and the settings"),
    "64 bits": (
        lambda r, a, m: (a.update(b=np.ones(2)), r.update(b={"format": None})),
        "JAX wo",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_file_with_the_right_digest(name, path):
    q = ALL["torchao"](draw(*SHAPE))
    quant.save_quantized(path, {"a": q})
    edit, match = EDITS[name]
    rewrite(path, edit)
    if match is None:
        assert_same_bits(quant.load_quantized(path), {"a": q})
        return
    with pytest.raises(lora_jax.CheckpointError, match=match) as caught:
        quant.load_quantized(path)
    assert str(path) in str(caught.value)


def test_damaged_files_are_refused_or_the_same(path):
    tree = {"a": ALL["bitsandbytes"](draw(*SHAPE)), "b": draw(3)}
    quant.save_quantized(path, tree)
    data, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(data)
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(data)) :]
        else:
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert_same_bits(quant.load_quantized(path), tree)
        except lora_jax.CheckpointError as error:
            refused += str(path) in str(error)
    assert refused > 140
