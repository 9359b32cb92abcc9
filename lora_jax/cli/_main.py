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
    _diff,
    _inspect,
    _merge,
    _messages,
    _output,
    _terminal,
)

_NAME = "lora-jax"
_SHOWN = 3  # of the problems of an input
_FAILED, _WRONG, _INTERRUPTED = 1, 2, 130
_CODES = """exit codes:
  0    fine
  1    the input cannot be used
  2    the command line is wrong
  3    diff: they differ
  130  interrupted, or terminated

Errors are one line; --debug shows where they come from.
"""
_EXAMPLES = {
    "inspect": """examples:
  lora-jax inspect adapter/
  lora-jax inspect adapter/ --json | jq .warnings
""",
    "merge": """examples:
  lora-jax merge Llama-3-8B/ adapter/ merged/
  lora-jax merge Llama-3-8B/ adapter/ merged/ --dtype float32
  lora-jax merge model.safetensors adapter/ merged.safetensors --layout jax
""",
    "convert": """examples:
  lora-jax convert adapter/ converted/ --to lora_jax --base Llama-3-8B/
  lora-jax convert adapters/ exported/ --to peft --names names.json
""",
    "diff": """examples:
  lora-jax diff adapter/ converted/
  lora-jax diff merged/ expected.safetensors --tolerance 1e-6
""",
}


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line."""

    def error(self, message: str) -> NoReturn:
        text = _terminal.printable(f"{message}; see {self.prog} --help")
        self.exit(_WRONG, f"{_NAME}: error: {text}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; None for those of the program, which then also uses the CPU
            if `JAX_PLATFORMS` says nothing else, and ends tidily when it is terminated.

    Returns:
        The exit code: 0 if all went well, 1 if the input cannot be used, 2 if the command
        line is wrong, 3 if `diff` found a difference, 130 if it was interrupted.
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
    """What this process may do because it is the program, and not a part of another."""
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
    """An error in words. Those of the library say what to do; others are its own fault."""
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
        description="Low-rank adapters: look at them, merge, convert and compare them.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=None)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    package = importlib.import_module("lora_jax")  # above all modules, and has the version
    version = f"{_NAME} {package.__version__}, jax {jax.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_inspect(commands)
    _add_merge(commands)
    _add_convert(commands)
    _add_diff(commands)
    return parser


def _add(commands: Any, run: Callable[[argparse.Namespace], int], text: str) -> Any:
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
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
    )
    return parser


def _add_inspect(commands: Any) -> None:
    parser = _add(commands, _inspect.inspect, "show what adapters there are in a directory")
    parser.add_argument("directory", metavar="DIR", help="of PEFT, or of this library")
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_allow_field(parser)


def _add_merge(commands: Any) -> None:
    parser = _add(commands, _merge.merge, "write a model's files with adapters merged in")
    parser.add_argument(
        "base",
        metavar="BASE",
        help="directory with model.safetensors, or its parts and index; or one file",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="directory with the adapters")
    parser.add_argument("out", metavar="OUT", help="what to write, with the same files")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of all floating-point tensors of at least 16 bits; by default as they are",
    )
    _add_names(parser)
    _add_fit(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a model at OUT")
    parser.add_argument("--quiet", action="store_true", help="print the report only")


def _add_convert(commands: Any) -> None:
    parser = _add(commands, _convert.convert, "write adapters in the other format")
    parser.add_argument("source", metavar="SRC", help="directory with the adapters")
    parser.add_argument("out", metavar="DST", help="directory to make")
    parser.add_argument("--to", choices=_adapters.FORMATS, required=True)
    parser.add_argument(
        "--base", help="the model of the adapters, for --to lora_jax: its shapes"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of all arrays in DST; by default as they are",
    )
    parser.add_argument(
        "--uniform",
        action="store_true",
        help="write one rank and one scale, for --to peft: for programs that read no "
        "rank_pattern and no alpha_pattern, such as vLLM",
    )
    _add_names(parser)
    _add_fit(parser)


def _add_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--names",
        metavar="FILE.json",
        help="from names of PEFT's modules to paths of weights, where they do not tell",
    )
    parser.add_argument(
        "--layout",
        choices=("torch", "jax"),
        help="how the weights lie: torch, (out, in), the default for those of a model's "
        "files; or jax, (in, out), the default for --to peft",
    )


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prefix",
        metavar="TEXT",
        help="of the names of weights that are looked at, for adapters of a part of a "
        "model: language_model",
    )
    parser.add_argument(
        "--strict",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether what does not fit is an error (the default), or left out and listed",
    )
    _add_allow_field(parser)


def _add_allow_field(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-field",
        metavar="NAME",
        action="append",
        default=[],
        help="field of PEFT's config to ignore, of a newer version or not supported; may "
        "be given several times",
    )


def _add_diff(commands: Any) -> None:
    parser = _add(
        commands, _diff.diff, "compare two directories of adapters, or two models"
    )
    parser.add_argument("a", metavar="A", help="directory of adapters, or a model")
    parser.add_argument("b", metavar="B", help="another of the same kind")
    parser.add_argument(
        "--tolerance",
        type=_diff.check_tolerance,
        metavar="X",
        help="largest difference over the largest entry that counts as equal; of updates, "
        "in the Frobenius norm. Default 0, and 1e-6 for updates",
    )
    parser.add_argument(
        "--names",
        metavar="FILE.json",
        help="from names of PEFT's modules to paths of weights, where they do not tell",
    )
    _add_allow_field(parser)
