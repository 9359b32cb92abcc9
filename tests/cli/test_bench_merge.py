"""The benchmark of merging runs; nothing here depends on how fast anything is."""

import importlib
import json
import math
import pathlib

import pytest

from lora_jax.cli import _base

BENCHMARKS = pathlib.Path(__file__).parent.parent.parent / "benchmarks"
SIZES = ["--mib=1", "--shard-mib=1", "--width=96", "--rank=2", "--rounds=1", "--warmup=0"]


@pytest.fixture(scope="module")
def bench_merge():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("bench_merge")


@pytest.mark.slow
def test_it_prints_every_contestant(bench_merge, tmp_path, capsys):
    file = tmp_path / "result.json"
    bench_merge.main([*SIZES, f"--folder={tmp_path}", f"--json={file}"])
    text, result = capsys.readouterr().out, json.loads(file.read_text())
    rows = result["rows"]
    assert list(rows) == list(bench_merge.CONTESTANTS)
    assert all(f"\n{name} " in text for name in rows)
    for name, row in rows.items():
        assert set(row) == set(bench_merge.COLUMNS)
        assert row["wall"] > 0
        assert math.isnan(row["peak MiB"]) == (name == bench_merge.COPY)
    assert {rows["copy"][name] for name in bench_merge.COLUMNS[:4]} == {1}
    assert result["shares"]["tenth"] < result["shares"]["all"] < 1
    # What does not depend on speed: memory does not grow with the model.
    assert rows["LoRA, all"]["over start"] < bench_merge.LIMIT_MIB
    assert list(tmp_path.iterdir()) == [file]
    markdown = bench_merge.format_result(result, markdown=True)
    assert markdown.count("\n|") == len(rows) + 2


def test_the_model_has_its_size_and_shards(bench_merge, tmp_path):
    shapes = bench_merge.make_shapes(32, 2, 64)
    bench_merge.write_model(tmp_path / "base", shapes, 20_000)
    base = _base.open_base(tmp_path / "base")
    assert {name: entry.shape for name, entry in base.spans.items()} == shapes
    shards = [file.values() for file in base.shards.values()]
    sizes = [sum(2 * entry.size for entry in entries) for entries in shards]
    assert sum(sizes) == sum(2 * math.prod(shape) for shape in shapes.values())
    assert len(sizes) > 1
    assert max(sizes) <= 20_000
    bench_merge.copy(tmp_path / "base", tmp_path / "copy")
    for file in (tmp_path / "base").iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(bench_merge):
    shapes = {"a": (2,), "b": (100,), "c": (2,), "d": (2,)}
    assert list(bench_merge.split(shapes, 10)) == [["a"], ["b"], ["c", "d"]]
