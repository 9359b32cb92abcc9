"""Exit codes, help, and errors of one line."""

import io
import os
import subprocess
import sys
import types

import pytest

import lora_jax
from lora_jax.cli import _inspect, _main, _terminal, main
from tests.cli import models

COMMANDS = ("inspect", "merge", "convert", "diff")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_exit_codes(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"  lora-jax {command} " in text.split("examples:")[1]
    assert "130  interrupted" in text.split("exit codes:")[1]


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"    {command} " in text for command in COMMANDS)


def test_a_bare_call_prints_the_help(capsys):
    assert main([]) == 0
    bare = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert bare.strip() == capsys.readouterr().out.strip()


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"lora-jax {lora_jax.__version__}, jax ")


@pytest.mark.parametrize("how", ["closed", "unread"])
def test_the_work_does_not_depend_on_who_reads_the_output(how, tmp_path, adapter):
    base = models.write_base(tmp_path / "base", models.make_tensors())
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lora_jax", "merge", str(base), str(adapter), str(out)]
    if how == "closed":
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (run.returncode, run.stderr) == (0, "")
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_command_lines(command):
    lines = _main._EXAMPLES[command].splitlines()[1:]
    assert lines
    for line in lines:
        words = line.split("|")[0].split()
        assert words[0] == "lora-jax"
        assert _main.make_parser().parse_args(words[1:]).run.__name__ == command


@pytest.mark.parametrize(
    "arguments",
    [
        ("frobnicate",),
        ("merge", "a", "b"),
        ("convert", "a", "b"),
        ("merge", "a", "b", "c", "--dtype=int4"),
        ("diff", "a", "b", "--tolerance=-1"),
        ("diff", "a", "b", "--tolerance=nan"),
    ],
)
def test_wrong_command_lines(arguments, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lora-jax: error: ")
    assert line.endswith("--help")


def test_errors_are_one_line(capsys, monkeypatch):
    def fail(options):
        raise ValueError("first\n  second \x1b[2J")

    monkeypatch.setattr(_inspect, "inspect", fail)
    monkeypatch.setattr(fail, "__name__", "inspect")
    assert main(["inspect", "x"]) == 1
    assert capsys.readouterr().err == "lora-jax: error: first second \\x1b[2J\n"
    for arguments in (["inspect", "x", "--debug"], ["--debug", "inspect", "x"]):
        assert main(arguments) == 1
        text = capsys.readouterr().err
        assert "Traceback" in text
        assert "in fail" in text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("no such path"), "no such path"),
        (FileNotFoundError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
        (AssertionError(), "AssertionError:  (--debug shows where)"),
        (ValueError(), "ValueError:  (--debug shows where)"),
    ],
)
def test_errors_in_words(error, text):
    assert _main._describe(error) == text


def test_an_interruption(capsys, monkeypatch):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(interrupt, "__name__", "inspect")
    monkeypatch.setattr(_inspect, "inspect", interrupt)
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "lora-jax: error: interrupted\n"


def test_the_module_is_the_program(tmp_path):
    command = [sys.executable, "-m", "lora_jax", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "has neither adapter_config.json nor lora_jax_adapters.safetensors" in line


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (3 * 2**40, "3.0 TiB")],
)
def test_sizes(count, text):
    assert _terminal.format_size(count) == text


def test_json_has_no_numbers_that_json_lacks():
    value = {"a": [float("nan"), 1.5], "b": (float("-inf"),)}
    assert _terminal.as_json(value) == {"a": ["nan", 1.5], "b": ["-inf"]}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("tqdm", [False, True])
def test_progress(monkeypatch, quiet, tqdm):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    bars = []

    class Bar:
        def __init__(self, **options):
            bars.append(options["total"])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, n):
            bars.append(n)

    module = types.SimpleNamespace(tqdm=Bar) if tqdm else None
    monkeypatch.setitem(sys.modules, "tqdm", module)
    with _terminal.show_progress(40, quiet=quiet) as progress:
        for _ in range(4):
            progress(10)
    assert bars == ([40, 10, 10, 10, 10] if tqdm and not quiet else [])
    plain = "" if tqdm or quiet else "20 %\n50 %\n70 %\n100 %\n"
    assert screen.getvalue() == plain


def test_nothing_is_shown_where_nobody_looks(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with _terminal.show_progress(1, quiet=False) as progress:
        progress(1)
    assert sys.stderr.getvalue() == ""


def test_several_problems_are_one_line(capsys):
    _main._complain("it does not fit:\n  one\n  two\n\n  three\n  four\n  five")
    assert capsys.readouterr().err == (
        "lora-jax: error: it does not fit: one; two; three; and 2 more\n"
    )
    _main._complain("one\tline")
    assert capsys.readouterr().err == "lora-jax: error: one line\n"
