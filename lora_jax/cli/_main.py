"""Reads the command line, runs the command, and turns errors into one line."""

import argparse
import contextlib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax

from lora_jax.cli import (
    _adapters,
    _convert,
    _derive,
    _diff,
    _inspect,
    _merge,
    _messages,
    _output,
    _terminal,
)
from lora_jax.layers import combinations

_NAME = "lora-jax"
_SHOWN = 3  # of the problems of an input
_FAILED, _WRONG, _INTERRUPTED = 1, 2, 130
_CODES = """exit codes:
  0    success
  1    the input cannot be used
  2    the command line is wrong
  3    diff found differences
  130  interrupted or terminated

An error is one line; --debug also prints a traceback.
"""
_FLAG = {"action": "store_true"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "--json": _FLAG | {"help": "print JSON"},
    "--plot": {
        "metavar": "FILE.png",
        "type": _inspect.picture,
        "help": "draw the norms of the updates, by layer and module; needs matplotlib",
    },
    "--dtype": {
        "choices": ("bfloat16", "float16", "float32"),
        "help": "dtype of the written floating-point arrays of at least 16 bits; by "
        "default each keeps its own",
    },
    "--names": {
        "metavar": "FILE.json",
        "help": "JSON object from names of PEFT's modules to paths of weights, for modules "
        "that cannot be matched by name",
    },
    "--layout": {
        "choices": ("torch", "jax"),
        "help": "layout of the weights: torch, (out, in), the default for the files of a "
        "model; or jax, (in, out), the default of convert without --base",
    },
    "--prefix": {
        "metavar": "TEXT",
        "help": "use only tensors whose names start with these words, for an adapter of a "
        "part of the model: language_model",
    },
    "--strict": {
        "action": argparse.BooleanOptionalAction,
        "default": True,
        "help": "raise an error for what does not match (the default), or skip and list it",
    },
    "--allow-field": {
        "metavar": "NAME",
        "action": "append",
        "default": [],
        "help": "ignore this field of PEFT's config, which is not supported or is of a "
        "newer version; may be repeated",
    },
    "--overwrite": _FLAG | {"help": "replace the model in OUT"},
    "--quiet": _FLAG | {"help": "print only the report"},
    "--to": {"choices": _adapters.FORMATS, "required": True, "help": "the new format"},
    "--base": {
        "help": "model of the adapters: its shapes for --to lora_jax, and its values for "
        "adapters with DoRA and for full arrays"
    },
    "--uniform": _FLAG
    | {
        "help": "write one rank and one scale: for mlx-lm, and for programs that read "
        "neither rank_pattern nor alpha_pattern, such as vLLM"
    },
    "--tolerance": {
        "type": _diff.check_tolerance,
        "metavar": "X",
        "help": "largest relative difference that counts as equal; for updates, in the "
        "Frobenius norm. By default 0, and 1e-6 for updates",
    },
}
_NUMBERS: dict[str, dict[str, Any]] = {
    "--weights": {
        "type": _derive.read_weights,
        "metavar": "W,W,...",
        "help": "what each update is multiplied by; 1 by default. If the first is "
        "negative, write --weights=-1,1",
    },
    "--method": {
        "choices": combinations.METHODS,
        "default": "exact",
        "help": "how to combine: exact (the default) is the sum, with the sum of the ranks",
    },
    "--rank": {"type": int, "metavar": "N", "help": "largest rank of the result"},
    "--energy": {
        "type": float,
        "metavar": "X",
        "help": "take the smallest rank that keeps this share of the squared norm of an "
        "update",
    },
    "--density": {
        "type": float,
        "metavar": "X",
        "help": "share of the entries that are kept, for methods that prune",
    },
    "--majority-sign": {
        "choices": combinations.MAJORITIES,
        "default": "total",
        "help": "the sign that ties keeps: of the sum (the default), or of most entries",
    },
    "--seed": {"type": int, "metavar": "N", "help": "for methods that drop at random"},
    "--targets": {
        "metavar": "PATTERN",
        "action": "append",
        "default": [],
        "help": "tensors that get an adapter, such as '*q_proj.weight'; may be repeated. "
        "By default all changed matrices and convolutions but embeddings and heads",
    },
}
_OPTIONS |= _NUMBERS
_EXAMPLES = {
    "combine": """examples:
  lora-jax combine math/ code/ both/
  lora-jax combine math/ code/ both/ --weights 0.7,0.3 --method svd --rank 16
  lora-jax combine math/ code/ both/ --method ties --density 0.2
""",
    "resize": """examples:
  lora-jax resize adapter/ small/ --rank 8
  lora-jax resize adapter/ small/ --energy 0.95
""",
    "extract": """examples:
  lora-jax extract Llama-3-8B/ tuned/ adapter/ --rank 32
  lora-jax extract Llama-3-8B/ tuned/ adapter/ --energy 0.9 --targets '*_proj.weight'
""",
    "inspect": """examples:
  lora-jax inspect adapter/
  lora-jax inspect adapter/ --json | jq .warnings
  lora-jax inspect adapter/ --plot norms.png
""",
    "merge": """examples:
  lora-jax merge Llama-3-8B/ adapter/ merged/
  lora-jax merge Llama-3-8B/ adapter/ merged/ --dtype float32
  lora-jax merge model.safetensors adapter/ merged.safetensors --layout jax
""",
    "convert": """examples:
  lora-jax convert adapter/ converted/ --to lora_jax --base Llama-3-8B/
  lora-jax convert adapters/ exported/ --to peft --names names.json
  lora-jax convert adapter/ for_mlx/ --to mlx
""",
    "diff": """examples:
  lora-jax diff adapter/ converted/
  lora-jax diff merged/ expected.safetensors --tolerance 1e-6
""",
}


class _Parser(argparse.ArgumentParser):
    """Prints an error in the command line as one line."""

    def error(self, message: str) -> NoReturn:
        text = _terminal.printable(f"{message}; see {self.prog} --help")
        self.exit(_WRONG, f"{_NAME}: error: {text}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; None for the arguments of the program. The program runs on the
            CPU unless `JAX_PLATFORMS` is set, and cleans up when it is terminated.

    Returns:
        The exit code: 0 for success, 1 if the input cannot be used, 2 if the command line
        is wrong, 3 if `diff` found differences, 130 if it was interrupted.
    """
    parser = make_parser()
    try:
        options = parser.parse_args(argv)
    except SystemExit as exit:  # after --help, or an error that has been printed
        return int(exit.code or 0)
    if options.run is None:
        _terminal.print_text(parser.format_help())
        return 0
    try:
        with _as_program() if argv is None else contextlib.nullcontext():
            return options.run(options)
    except KeyboardInterrupt:
        _complain("interrupted")
        return _INTERRUPTED
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        _complain(_describe(error))
        return _FAILED


@contextlib.contextmanager
def _as_program() -> Iterator[None]:
    """Sets up the process of the program: the platform and the signals."""
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")

    def interrupt(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    kept = {number: signal.signal(number, interrupt) for number in _output.signals()}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _complain(text: str) -> None:
    first, *others = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    more = f"; and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    shown = "; ".join(each.removesuffix(".") for each in others[:_SHOWN])
    line = f"{first} {shown}{more}".strip()
    print(f"{_NAME}: error: {_terminal.printable(line)}", file=sys.stderr)


def _describe(error: Exception) -> str:
    """The message of an error. Errors other than of the library also have their class."""
    if isinstance(error, KeyError) and error.args:
        return _messages.translate(str(error.args[0]))
    known = OSError | ValueError | TypeError | ArithmeticError | ModuleNotFoundError
    if isinstance(error, known) and str(error):
        return _messages.translate(str(error))
    return f"{type(error).__name__}: {error} (--debug shows where)"


def make_parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    parser = _Parser(
        _NAME,
        description="Inspects, merges, converts and compares low-rank adapters.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=None)
    parser.add_argument("--debug", action="store_true", help="print tracebacks")
    package = importlib.import_module("lora_jax")  # above all modules, and has the version
    version = f"{_NAME} {package.__version__}, jax {jax.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add(
        commands, _inspect.inspect, "print the adapters in a directory",
        ("DIR", "directory or file with the adapters, in any format"),
        options=("--json", "--plot", "--allow-field"),
    )  # fmt: skip
    _add(
        commands, _merge.merge, "merge adapters into the files of a model",
        ("BASE", "model: a directory with safetensors files, or one file"),
        ("ADAPTER", "directory or file with the adapters"),
        ("OUT", "new model, with the same files as BASE"),
        options=(
            "--dtype", "--names", "--layout", "--prefix", "--strict", "--allow-field",
            "--overwrite", "--quiet",
        ),
    )  # fmt: skip
    _add(
        commands, _convert.convert, "convert adapters to another format",
        ("SRC", "directory or file with the adapters"),
        ("DST", "new directory; for kohya and diffusers a new file"),
        options=(
            "--to", "--base", "--dtype", "--uniform", "--names", "--layout", "--prefix",
            "--strict", "--allow-field",
        ),
    )  # fmt: skip
    _add(
        commands, _diff.diff, "compare two directories of adapters, or two models",
        ("A", "directory with adapters, or a model"),
        ("B", "the same kind as A"),
        options=("--tolerance", "--names", "--allow-field"),
    )  # fmt: skip
    of_adapters = (
        "--rank", "--energy", "--base", "--dtype", "--uniform", "--names", "--layout",
        "--prefix", "--strict", "--allow-field", "--quiet",
    )  # fmt: skip
    _add(
        commands, _derive.combine, "combine several adapters into one",
        ("ADAPTER...", "directories or files with the adapters, in one format"),
        ("OUT", "new directory or file"),
        options=(
            "--weights", "--method", "--density", "--majority-sign", "--seed", *of_adapters,
        ),
    )  # fmt: skip
    _add(
        commands, _derive.resize, "approximate adapters by adapters of lower ranks",
        ("ADAPTER", "directory or file with the adapters"),
        ("OUT", "new directory or file"),
        options=of_adapters,
    )  # fmt: skip
    _add(
        commands, _derive.extract, "approximate the difference of two models by adapters",
        ("BASE", "model: a directory with safetensors files, or one file"),
        ("TUNED", "model with the same tensors"),
        ("OUT", "new directory for the adapters, in PEFT's format"),
        options=(
            "--rank", "--energy", "--targets", "--dtype", "--uniform", "--names",
            "--layout", "--quiet",
        ),
    )  # fmt: skip
    return parser


def _add(
    commands: Any,
    run: Callable[[argparse.Namespace], int],
    text: str,
    *places: tuple[str, str],
    options: Sequence[str],
) -> None:
    """Adds a command with the name of its function `run`.

    `places` are the names of its paths with a text about each, `options` names in
    `_OPTIONS`.
    """
    name = run.__name__
    parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"{_EXAMPLES[name]}\n{_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="print tracebacks"
    )
    for place, about in places:
        one = place.removesuffix("...")
        count: Any = {} if one == place else {"nargs": "+"}
        parser.add_argument(one.lower(), metavar=one, help=about, **count)
    for option in options:
        parser.add_argument(option, **_OPTIONS[option])
