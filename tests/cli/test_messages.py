"""The errors of the library name the options of the command line."""

import ast
import errno
import os
import pathlib
import re

import pytest

import lora_jax
from lora_jax._io import replacement
from lora_jax.cli import _messages, main
from tests.cli import models
from tests.cli.merging import refuse, to_own

PACKAGE = pathlib.Path(lora_jax.__file__).parent
# What the commands call; `torchtune` reads arguments that no command gives.
MODULES = [
    *(f for f in PACKAGE.glob("peft/*.py") if f.stem != "torchtune"),
    *(PACKAGE / f"_core/{name}.py" for name in ("checks", "tree_paths")),
    *(PACKAGE / f"_io/{name}.py" for name in ("replacement", "tensor_files")),
    PACKAGE / "checkpoint.py",
    *(PACKAGE / name for name in ("layers/adapter_checks.py", "plan/plan_checks.py")),
]
ARGUMENT = re.compile(
    r"\b(names|layout|strict|on_tied|plan|dtype|fn|allow_fields|uniform)=|\(fn\b"
    r"|(?<!['\w/.])params\b(?!\w)|\bGive load"
)


def texts(tree):
    """The texts of a module but for docstrings, `'x'` and `x` for what is put in."""
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            inside.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            inside |= set(map(id, node.values))
            yield "".join(
                part.value
                if isinstance(part, ast.Constant)
                else "'x'"
                if part.conversion == ord("r")
                else "x"
                for part in node.values
            )
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if id(node) not in inside and isinstance(text, str):
            yield text


def test_no_message_names_an_argument():
    found = [
        (file.name, text)
        for file in MODULES
        for text in texts(ast.parse(file.read_text()))
        if ARGUMENT.search(text) and text != "params"  # the name of a collection of Flax
    ]
    assert len(found) > 20  # so that the test cannot pass without looking
    assert [f for f in found if ARGUMENT.search(_messages.translate(f[1]))] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "give names={'a.{layer}.b': ('c/params/{layer}', '{layer}io')}.",
            'give --names FILE.json with {"a.{layer}.b": ["c/params/{layer}", '
            '"{layer}io"]}.',
        ),
        (
            "no leaf of the params fits 'params.leaf' in /data/params/leaf.json, or "
            "the function (fn, *args), or layout='jax'.",
            "no tensor of the model fits 'params.leaf' in /data/params/leaf.json, or "
            "--layout jax.",
        ),
        (
            "shapes do not say which. Give the function (fn, *args) or plan=.",
            "shapes do not say which. Load it in a program, with lora_jax.peft.load and "
            "the model's function.",
        ),
        (
            "shapes do not say which. Give the function (fn, *args) or plan=, or "
            "layout='jax' or layout='torch'.",
            "shapes do not say which. Give --layout jax or --layout torch.",
        ),
        (
            "Both are 'x', which is tied. Give the function (fn, *args) that looks rows up "
            "and multiplies by the leaf, or names={'a': 'x@lookup'}, or params in which "
            "the embedding and the output head are two leaves.",
            "Both are 'x', which is tied. Save the embedding and the output head as two "
            "tensors.",
        ),
    ],
)
def test_translations(text, expected):
    assert _messages.translate(text) == expected


def test_no_temporary_path_is_shown(tmp_path, capsys, adapter):
    base = models.write_base(tmp_path / "base", models.make_tensors())
    own = str(to_own(adapter, base, tmp_path / "own"))
    tensors = models.make_tensors()
    del tensors["model.layers.0.mlp.up_proj.weight"]
    less = models.write_base(tmp_path / "less", tensors)
    line = refuse(capsys, less, own, tmp_path / "out")
    assert line.startswith(f"lora-jax: error: {own} does not fit: no tensor of the model")
    assert set(re.findall(r"/tmp\S*", line)) <= {own}


@pytest.mark.parametrize("command", ["merge", "convert", "convert to peft", "one file"])
def test_no_temporary_name_is_shown(tmp_path, capsys, adapter, monkeypatch, command):
    base = models.write_base(tmp_path / "base", models.make_tensors())
    own, out = str(tmp_path / "own"), tmp_path / "out"
    convert = ["convert", str(adapter), own, "--to=lora_jax", f"--base={base}"]
    if command == "convert to peft":
        assert main(convert) == 0
        convert = ["convert", own, str(out), "--to=peft"]
    convert[2] = str(out)
    arguments = convert if "convert" in command else ["merge", base, adapter, out]
    if command == "one file":
        arguments[1], arguments[3] = base / "model.safetensors", f"{out}.safetensors"

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(replacement, "synchronize", full)
    assert main([*map(str, arguments)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert f"'{out}" in line
    assert ".tmp" not in line
