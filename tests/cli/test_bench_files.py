"""The benchmark of readers runs; nothing here depends on how fast anything is."""

import importlib
import json
import pathlib

import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent.parent / "benchmarks"


@pytest.mark.slow
def test_it_prints_every_reader(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench_files = importlib.import_module("bench_files")
    file = tmp_path / "result.json"
    sizes = ["--layers", "2", "3", "--experts=4", "--rounds=1", "--warmup=0"]
    bench_files.main([*sizes, f"--json={file}"])
    text, result = capsys.readouterr().out, json.loads(file.read_text())
    rows = result["rows"]
    readers = bench_files.READERS
    assert list(rows) == [f"{count}: {name}" for count in (24, 36) for name in readers]
    assert all(f"\n{name} " in text for name in rows)
    assert all(set(row) == set(bench_files.COLUMNS) for row in rows.values())
    assert rows["24: load_file"]["ratio"] == rows["24: peft.load"]["growth"] == 1
    assert bench_files.format_result(result, markdown=True).count("\n|") == len(rows) + 2
