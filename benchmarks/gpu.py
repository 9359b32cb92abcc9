"""Runs the benchmarks that need a GPU, in less than eight minutes, and writes a report.

    python benchmarks/gpu.py --out gpu

The report is `gpu/report.md` and `gpu/report.json`. `gpu/hlo*.txt` have the compiled
programs of one layer. Every section is a process of its own with its own limit of time.
The report is written anew after each section and says which of them failed, ran out of time
or did not start. The exit status is 1 if there is one.

All ratios are of programs that ran in the same rounds, and every table of layers or steps
has the frozen program among them. `--toy` runs the sections on small arrays, also on a CPU.
"""

import argparse
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).parent
LIMIT_S = 470
"""For all sections together."""


class Section(NamedTuple):
    """One run of a benchmark.

    Attributes:
        script: its name without the ending.
        seconds: its limit of time.
        arguments: those of the command line.
    """

    script: str
    seconds: int
    arguments: Sequence[str]


LAYERS = (
    *("frozen", "lora_linear", "dora_linear", "frozen, nf4", "adapt LoRA, nf4"),
    *("lora_linear, dropout 0.1", "LoRA, x@W + s*(x@A)@B", "LoRA, x@(W + s*A@B)"),
    *("adapt DoRA, nf4", "frozen, int8", "adapt LoRA, int8", "dora_linear, column_norm"),
    "DoRA, peft form",
)


def layer(size: int, seconds: int, *more: str) -> Section:
    """One layer in bfloat16: dense, quantized, with DoRA and dropout.

    The layers that it has no time to compile are left out, the last first.
    """
    sizes = f"--in={size}", f"--out={size}", "--tokens=4096", "--batch=4"
    options = "--dtype=bfloat16", "--repeat=10", f"--seconds={0.7 * seconds}"
    formats = "--format", "nf4", "int8", "--only", *LAYERS
    return Section("bench_linear", seconds, (*sizes, *options, *formats, *more))


MODEL = ("--width=2048", "--heads=16", "--length=512", "--dtype=bfloat16")
FIELD = (
    *("frozen", "adapt LoRA", "by hand LoRA", "adapt DoRA", "merge every step"),
    "full fine-tuning",
)
PYTHON = f"--python=jax={sys.executable}"
SECTIONS = {
    "One layer of 4096, forward": layer(4096, 50, "--forward", "--hlo=hlo_forward.txt"),
    "One layer of 4096, forward and backward": layer(4096, 60, "--hlo=hlo.txt"),
    "One layer of 8192, forward and backward": layer(8192, 70),
    "Quantized weights": Section(
        "bench_quant",
        70,
        ("--size=4096", *MODEL, "--repeat=10", "--format", "nf4", "int8", "--method=lora"),
    ),
    "Training step, large model": Section(
        "bench_field",
        240,
        ("--preset=large", "--rounds=10", "--threads=0", PYTHON, "--only", *FIELD),
    ),
    "adapt against a model by hand, scanned": Section(
        "bench_transform",
        90,
        (*MODEL, "--layout=scan", "--traces=1", "--rounds=10"),
    ),
}
_TOY_MODEL = (
    *("--layers=1", "--width=128", "--heads=2", "--batch=2", "--length=8"),
    "--rank=4",
)
TOY = {
    "bench_linear": (
        *("--in=128", "--out=128", "--tokens=32", "--rounds=2", "--repeat=2"),
        *("--only", "frozen", "lora_linear", "adapt LoRA, nf4"),
    ),
    "bench_quant": (*_TOY_MODEL, "--size=128", "--rounds=2", "--format=nf4"),
    "bench_field": (*_TOY_MODEL, "--dtype=float32", "--rounds=1"),
    "bench_transform": (*_TOY_MODEL, "--rounds=1", "--method=lora"),
}
"""Arguments behind those of a section, which replace its sizes and contestants."""


def run_section(section: Section, out: pathlib.Path, seconds: float) -> dict[str, Any]:
    """Runs a section in the folder of the report, and ends it when its time is over.

    Returns:
        The command, the `"status"`, the `"seconds"` it took, and what it printed and found.
    """
    numbers = out / "section.json"
    numbers.unlink(missing_ok=True)
    script = HERE / f"{section.script}.py"
    command = [sys.executable, str(script), *section.arguments, "--markdown"]
    path = os.pathsep.join(
        [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    start = time.monotonic()
    process = subprocess.Popen(
        [*command, f"--json={numbers.name}"],
        cwd=out,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # bench_field has processes of its own
    )
    try:
        text, errors = process.communicate(timeout=seconds)
        status = "done" if process.returncode == 0 else f"failed ({process.returncode})"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, errors = process.communicate()
        status = f"ran out of its {seconds:.0f} s"
    return {
        "command": ["python", f"benchmarks/{script.name}", *command[2:]],
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "text": text,
        "errors": "" if status == "done" else errors[-2000:],
        "result": json.loads(numbers.read_text()) if status == "done" else None,
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    blocks = [f"# Benchmarks on one device, {report['date']}"]
    for name, one in report["sections"].items():
        blocks.append(f"## {name}")
        if "command" in one:
            command = " ".join(f"'{a}'" if " " in a else a for a in one["command"])
            blocks += [f"```bash\n{command}\n```", one["text"].strip()]
        blocks.append(f"Section: {one['status']}, {one['seconds']} s.")
        if one.get("errors"):
            blocks.append(f"```\n{one['errors'].strip()}\n```")
    return "\n\n".join(filter(None, blocks)) + "\n"


def write_report(report: Mapping[str, Any], out: pathlib.Path) -> None:
    """Replaces both files of the report."""
    texts = {"json": json.dumps(report, indent=2), "md": format_report(report)}
    for ending, text in texts.items():
        new = out / f"report.{ending}.new"
        new.write_text(text)
        new.replace(out / f"report.{ending}")


def main(arguments: list[str] | None = None) -> None:
    """Runs the sections from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu"))
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help="for all sections")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=SECTIONS)
    parser.add_argument("--toy", action="store_true", help="small arrays, also on a CPU")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    sections = {name: SECTIONS[name] for name in SECTIONS if name in options.only}
    waiting = {"status": "did not start", "seconds": 0}
    report: dict[str, Any] = {
        "date": f"{datetime.date.today()}",
        "toy": options.toy,
        "sections": dict.fromkeys(sections, waiting),
    }
    end = time.monotonic() + options.seconds
    for name, section in sections.items():
        left = min(end - time.monotonic(), section.seconds)
        if left > 0:
            if options.toy:
                more = (*section.arguments, *TOY[section.script])
                section = section._replace(arguments=more)
            print(f"{name}: at most {left:.0f} s", file=sys.stderr, flush=True)
            report["sections"][name] = run_section(section, options.out, left)
        write_report(report, options.out)
    print((options.out / "report.md").read_text())
    sys.exit(any(one["status"] != "done" for one in report["sections"].values()))


if __name__ == "__main__":
    main()
