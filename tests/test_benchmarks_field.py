"""The benchmark against other packages: what it checks, counts, leaves out and prints.

Nothing here depends on how fast anything is, or on which of the packages are installed.
"""

import contextlib
import importlib
import io
import json
import math
import pathlib
import shutil
import sys
import types

import pytest

from tests import support

pytestmark = pytest.mark.slow  # for developers of the library

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
LAYERS, WIDTH, RANK = 1, 16, 4
SIZES = [
    *(f"--layers={LAYERS}", f"--width={WIDTH}", f"--rank={RANK}", "--heads=2"),
    *("--batch=3", "--length=5", "--rounds=2", "--threads=0"),
]
HERE = ["frozen", "adapt LoRA", "by hand LoRA", "textbook LoRA", "adapt DoRA"]
HERE += ["full fine-tuning"]
ELSEWHERE = ["nnx.LoRA", "qwix LoRA, linen", "torch peft LoRA"]


@pytest.fixture(scope="module")
def field():
    """The modules of the benchmark."""
    names = ("bench_field", *(f"_field_{n}" for n in ("case", "checks", "client")))
    names += ("_field_report", "_field_worker", "_timing")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        modules = {
            name.removeprefix("_field_"): importlib.import_module(name) for name in names
        }
        yield types.SimpleNamespace(**modules)


@pytest.fixture(scope="module")
def run(field, tmp_path_factory):
    """One run of everything that this environment has, and what it printed and wrote."""
    folder, printed = tmp_path_factory.mktemp("bench_field"), io.StringIO()
    arguments = [
        *SIZES,
        *("--python", f"jax={sys.executable}", f"torch={folder / 'none'}"),
        *("--only", *HERE, *ELSEWHERE),
        *(f"--json={folder / 'result.json'}", f"--plot={folder / 'bars.png'}"),
    ]
    with support.optimizations(False), contextlib.redirect_stdout(printed):
        field.bench_field.main(arguments)
    result = json.loads((folder / "result.json").read_text())
    plot = (folder / "bars.png").read_bytes()
    return types.SimpleNamespace(text=printed.getvalue(), result=result, plot=plot)


def test_prints_every_contestant_or_why_not(field, run):
    rows, left_out = run.result["rows"], run.result["left_out"]
    assert set(HERE) <= set(rows)
    assert {*rows, *left_out} == {*HERE, *ELSEWHERE}
    assert not set(rows) & set(left_out)
    assert "does not start" in left_out["torch peft LoRA"]
    assert all(f"\n{name}  " in run.text for name in rows)
    assert all(f"Left out: {name}: {why}" in run.text for name, why in left_out.items())
    assert all(f" {column}" in run.text for column in field.report.COLUMNS)
    assert run.plot.startswith(b"\x89PNG")
    markdown = field.report.format_result(run.result, markdown=True)
    assert markdown.count("\n|") == len(rows) + 2 + len(field.report.GOALS) + 2


def test_rows_are_ratios_and_exact_counts(run):
    rows = run.result["rows"]
    times = ("wall", "cpu", "best", "own")
    for name in HERE:
        assert all(math.isfinite(rows[name][c]) and rows[name][c] > 0 for c in times)
        assert rows[name]["temp MiB"] > 0
    assert {rows["frozen"][column] for column in times} == {1}
    kernels = [(WIDTH, WIDTH)] * 4 + [(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
    lora = LAYERS * sum(RANK * (n_in + n_out) for n_in, n_out in kernels)
    dora = lora + LAYERS * sum(n_out for _, n_out in kernels)
    full = LAYERS * (sum(n_in * n_out for n_in, n_out in kernels) + 2 * WIDTH) + WIDTH
    wanted = {"frozen": 0, "adapt LoRA": lora, "adapt DoRA": dora, "full fine-tuning": full}
    for name, count in wanted.items():
        assert rows[name]["trained k"] == count / 1000
        state = 8 * count + 4 if count else 0  # two moments in float32 and a count
        assert rows[name]["state MiB"] == state / 2**20


def test_losses_of_the_run_agree_and_fall(field, run):
    losses = run.result["losses"]
    assert list(losses) == list(run.result["rows"])
    for name, (first, *_, last) in losses.items():
        assert first == pytest.approx(losses["frozen"][0], rel=1e-4)
        if name != "frozen":
            assert last < 0.999 * first
    assert losses["by hand LoRA"][-1] == pytest.approx(losses["adapt LoRA"][-1], rel=1e-5)


def test_goals_of_the_run(run):
    goals = {(g["own"], g["other"], g["of"]): g for g in run.result["goals"]}
    memory = goals["adapt LoRA", "textbook LoRA", "memory"]
    rows = run.result["rows"]
    ratio = rows["adapt LoRA"]["temp MiB"] / rows["textbook LoRA"]["temp MiB"]
    assert memory["memory"] == pytest.approx(ratio)
    assert memory["met"] is (ratio <= 1)
    torch = goals["adapt LoRA", "torch peft LoRA", "time"]
    assert torch["wall"] is torch["cpu"] is torch["met"] is None
    (line,) = (x for x in run.text.splitlines() if x.startswith("adapt LoRA / torch"))
    assert line.endswith("not judged")


def losses_of(first, lora, dora=None):
    losses = {"frozen": [first, first], "adapt LoRA": [first, lora]}
    return losses if dora is None else {**losses, "adapt DoRA": [first, dora]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_agreement_passes_what_agrees(field, dtype):
    field.checks.check_losses(losses_of(2.0, 1.9, 1.8), dtype)
    losses = {**losses_of(2.0, 1.9), "textbook LoRA": [2.0001, 1.9005]}
    field.checks.check_losses(losses, dtype)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([2.0005, 1.9], "losses before training differ: expected 'textbook LoRA'.*2.0005"),
        (
            [2.0, 1.904],
            "losses of training lora differ.*'adapt LoRA', which has 1.9,.*1.904",
        ),
        ([2.0, math.nan], "losses of training lora differ.*nan"),
        ([2.0, 2.0], "losses of training lora differ"),  # it trains nothing
    ],
)
def test_agreement_refuses_what_differs(field, other, words):
    losses = {**losses_of(2.0, 1.9), "textbook LoRA": other}
    with pytest.raises(ValueError, match=words):
        field.checks.check_losses(losses, "float32")


def test_agreement_refuses_steps_too_small_to_tell(field):
    with pytest.raises(ValueError, match=r"'adapt LoRA' went from 2\.0 to 1\.999.*sizes"):
        field.checks.check_losses(losses_of(2.0, 1.999), "float32")


def test_goals_are_medians_of_paired_ratios(field):
    times = {
        "frozen": field._timing.Times([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]),
        "adapt LoRA": field._timing.Times([1.1, 6.0, 4.8], [1.3, 1.3, 1.3]),
        "torch peft LoRA": field._timing.Times([1.1, 6.0, 4.8], [1.3, 1.3, 1.3]),
    }
    costs = {name: {} for name in times}

    def judged(measure, one_thread=True):
        goals = field.report.judge(times, costs, measure, one_thread=one_thread)
        return {goal["other"]: goal for goal in goals}

    frozen = judged("wall")["frozen"]
    assert (frozen["wall"], frozen["cpu"]) == (pytest.approx(1.2), pytest.approx(1.3))
    assert frozen["met"] is (frozen["wall"] <= 1.2)
    assert judged("cpu")["frozen"]["met"] is False
    assert judged("cpu")["torch peft LoRA"]["met"] is True
    assert judged("cpu", one_thread=False)["torch peft LoRA"]["met"] is None
    assert judged("cpu")["nnx.LoRA"]["met"] is None  # it did not run
    assert judged("cpu")["textbook LoRA"]["met"] is None


def test_own_ratio_is_to_the_frozen_step_of_the_framework(field):
    times = {
        name: field._timing.Times([seconds], [seconds])
        for name, seconds in {
            "frozen": 1.0,
            "frozen, torch": 2.0,
            "torch peft LoRA": 3.0,
        }.items()
    }
    costs = {name: {"state_bytes": 2**20, "trained": 7000} for name in times}
    row = field.report.make_rows(times, costs, "cpu")["torch peft LoRA"]
    assert (row["wall"], row["own"], row["temp MiB"]) == (3, 1.5, None)
    assert (row["state MiB"], row["trained k"]) == (1, 7)
    del times["frozen, torch"]
    assert field.report.make_rows(times, costs, "cpu")["torch peft LoRA"]["own"] is None


def test_case_is_written_once_for_all(field, tmp_path):
    files = [str(tmp_path / name / "case.safetensors") for name in ("a", "b")]
    sizes = {"layers": 2, "width": 8, "heads": 2, "batch": 3, "length": 5, "rank": 4}
    for file in files:
        case = field.case.Case(**sizes, dtype="bfloat16", threads=1, file=file)
        assert field.case.Case.from_json(case.to_json()) == case
        field.case.write_arrays(case)
    first, second = (pathlib.Path(file).read_bytes() for file in files)
    assert first == second
    arrays = importlib.import_module("safetensors.flax").load_file(files[0])
    assert arrays["layers.1.up"].shape == (8, 32)
    assert arrays["layers.1.down.A"].shape == (32, 4)
    assert arrays["x"].shape == arrays["target"].shape == (3, 5, 8)
    assert {name for name, a in arrays.items() if a.dtype == "float32"} == {
        name for name in arrays if name.endswith(".A")
    }


def test_environment_is_made_once_for_its_requirements(field, tmp_path, monkeypatch):
    commands, pins = [], tmp_path / "pins.txt"

    def pretend(command):
        commands.append(command)
        (tmp_path / "torch").mkdir(exist_ok=True)

    def make():
        commands.clear()
        python = field.client.make_environment("torch", tmp_path, pins)
        assert python == tmp_path / "torch" / "bin" / "python"
        return [command[-1] for command in commands]

    monkeypatch.setattr(field.client, "_run", pretend)
    pins.write_text("# a comment\n\nfirst==1\nsecond==2\n")
    assert make() == [str(tmp_path / "torch"), "first==1", str(pins)]
    assert make() == []
    pins.write_text("first==2\n")
    assert make()[1] == "first==2"
    (tmp_path / "torch" / "requirements.txt").unlink()  # as if it had been interrupted
    assert make()[1] == "first==2"


def test_environment_that_cannot_be_made(field, tmp_path, monkeypatch):
    monkeypatch.setattr(field.client.sys, "executable", str(tmp_path / "none"))
    with pytest.raises(field.client.WorkerError, match=r"could not be made.*none"):
        field.client.make_environment("torch", tmp_path)
    assert not (tmp_path / "torch" / "requirements.txt").exists()


@pytest.mark.parametrize("environment", ["jax", "torch"])
def test_requirements_are_pinned(field, environment):
    text = (BENCHMARKS / "field" / f"requirements-{environment}.txt").read_text()
    pins = [line for line in text.splitlines() if not line.startswith("#")]
    assert pins[0].startswith(f"{environment}==")
    assert all(line.count("==") == 1 for line in pins)


def test_worker_answers_errors_and_goes_on(field, capsys):
    def fail():
        raise KeyError("what")

    source = '{"command": "fail"}\n{"command": "add", "a": 2, "b": 3}\n'
    sink = io.StringIO()
    commands = {"fail": fail, "add": lambda a, b: {"sum": a + b}}
    field.worker.serve(commands, io.StringIO(source), sink)
    answers = [json.loads(line) for line in sink.getvalue().splitlines()]
    assert answers == [{"error": "KeyError: 'what'"}, {"sum": 5}]
    assert "Traceback" in capsys.readouterr().err


def test_client_says_what_its_worker_did(field):
    case = field.case.Case(1, 8, 2, 3, 5, 4, "float32", 1, "no.safetensors")
    client = field.client.Client(sys.executable, "torch", case)
    with (
        contextlib.closing(client),
        pytest.raises(field.client.WorkerError, match=r"torch could not 'prepare it'"),
    ):
        client.ask("prepare", name="it")
    ends = shutil.which("false")
    assert ends is not None
    client = field.client.Client(ends, "jax", case)
    with (
        contextlib.closing(client),
        pytest.raises(field.client.WorkerError, match="ended, with status 1"),
    ):
        client.ask("list")


def test_worker_variables(field):
    variables = field.client.worker_variables({"PYTHONPATH": "there", "HOME": "/h"}, 3)
    assert variables["PYTHONPATH"].split(":") == [str(BENCHMARKS.parent), "there"]
    assert (variables["HOME"], variables["OMP_NUM_THREADS"]) == ("/h", "3")
    assert "OMP_NUM_THREADS" not in field.client.worker_variables({}, 0)


def test_frozen_has_to_run(field):
    arguments = [*SIZES, "--python", "jax=none", "--only", "frozen"]
    with pytest.raises(
        field.client.WorkerError, match=r"'frozen', which.*none does not start"
    ):
        field.bench_field.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--width=10", "--heads=4"], "--heads 4 does not divide --width 10"),
        (["--python", "keras=python"], "--python wants NAME=PATH"),
        (["--python", "jax"], "--python wants NAME=PATH"),
        (["--only", "nobody"], "invalid choice: 'nobody'"),
    ],
)
def test_options_that_are_refused(field, arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        field.bench_field.parse(arguments)
    assert words in capsys.readouterr().err


def test_presets(field):
    small, large = (
        field.bench_field.parse(a) for a in ([], ["--preset=large", "--rank=8"])
    )
    assert (small.width, small.dtype, small.threads) == (512, "float32", 1)
    assert (large.width, large.dtype, large.rank) == (4096, "bfloat16", 8)
    assert small.only == list(field.case.CONTESTANTS)
