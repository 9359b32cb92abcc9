"""A command opens each file once, and matches modules with arrays at most once."""

import collections
import functools
import sys

import numpy as np
import pytest

from lora_jax import checkpoint, peft
from lora_jax.cli import _effects, _loading, main
from tests.cli import models
from tests.cli.merging import to_own

# The command, and how often it matches modules with arrays.
COMMANDS = {
    "inspect peft": 0,
    "inspect own": 0,
    "inspect parts": 0,
    "merge shards peft out": 1,
    "merge whole peft out": 1,
    "merge whole peft out --dtype=bfloat16": 1,
    "merge whole/model.safetensors peft out.safetensors": 1,
    "merge shards own out": 0,
    "merge shards layers out": 1,
    "merge shards parts out": 0,
    "merge tied head out": 1,
    "merge tied use out": 0,
    "convert peft out --to=lora_jax --base=shards": 1,
    "convert layers out --to=peft": 0,
    "diff peft other": 0,
    "diff peft own": 0,
    "diff other own": 1,
    "diff peft layers": 1,
    "diff own layers": 1,
    "diff parts own": 1,
    "diff head use": 1,
    "diff shards whole": 0,
    "diff shards changed": 0,
}


class Opens:
    """Counts how often Python opens each file in a folder to read it."""

    folder = None

    def __init__(self):
        sys.addaudithook(self.note)  # it stays as long as the process

    def note(self, event, arguments):
        if event == "open" and self.folder is not None:
            path, mode, _ = arguments
            if str(path).startswith(self.folder) and (mode is None or "r" in mode):
                self.found[str(path).removeprefix(self.folder)] += 1

    def start(self, folder):
        self.found, self.folder = collections.Counter(), f"{folder}/"

    def stop(self):
        self.folder = None
        return self.found


OPENS = Opens()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, and one adapter in each format: `layers` has other paths and layouts.

    `parts` has an adapter of a part, and a trained leaf. `head` and `use` are of the head
    of `tied`.
    """
    folder = tmp_path_factory.mktemp("opens")
    tensors = models.make_tensors()
    models.write_base(folder / "shards", tensors, 2)
    models.write_base(folder / "whole", tensors)
    models.write_base(folder / "changed", tensors | {"lm_head.weight": np.ones(3)}, 2)
    factors = models.make_factors()
    head = {"lm_head.weight": tensors["lm_head.weight"]}
    models.write_adapter(folder / "peft", factors)
    models.write_adapter(folder / "other", models.make_factors(seed=5), head)
    to_own(folder / "peft", folder / "whole", folder / "own")
    shapes = {
        f"body/{name.replace('.', '/')}/kernel": np.zeros(shape[::-1], "float32")
        for name, shape in models.LINEARS.items()
    }
    adapters, plan, _ = peft.load(folder / "peft", shapes)
    checkpoint.save_adapters(folder / "layers", adapters, plan)
    up, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    params = {name: tensors[name] for name in (up, norm)}
    options = {"targets": f"{up}[:8]", "axes": {up: "oi"}, "train": norm}
    models.write_own(folder / "parts", params, **options)
    del tensors["lm_head.weight"]
    tied = models.write_base(folder / "tied", tensors, 2, tie_word_embeddings=True)
    shape = models.ENTRIES, models.WIDTH
    models.write_adapter(folder / "head", models.make_factors(modules={"lm_head": shape}))
    to_own(folder / "head", tied, folder / "use")
    return folder


def counted(function, calls, *arguments, **options):
    calls.append(function.__name__)
    return function(*arguments, **options)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_file_is_opened_once(folder, tmp_path, monkeypatch, command):
    matched = []
    for module in (_loading, _effects):
        find = module.find_places
        count = functools.partial(counted, find, matched)
        monkeypatch.setattr(module, "find_places", count)
    name, *words = command.split()
    inputs = [word for word in words if (folder / word).exists()]
    place = {word: f"{folder / word}" for word in inputs}
    place |= {word: f"{tmp_path / word}" for word in ("out", "out.safetensors")}
    place["--base=shards"] = f"--base={folder / 'shards'}"
    OPENS.start(folder)
    try:
        code = main([name, *(place.get(word) or word for word in words)])
    finally:
        found = OPENS.stop()
    differ = {"other", "changed", "parts"} & {*words} and name == "diff"
    assert code == (3 if differ else 0)
    assert set(found.values()) == {1}, found
    inputs += ["shards"] * ("--base=shards" in words)
    files = {path for path in inputs if (folder / path).is_file()}
    for path in inputs:
        files |= {f"{path}/{file.name}" for file in (folder / path).glob("*.safetensors")}
    assert files <= set(found)
    assert len(matched) == COMMANDS[command]
