"""Translates errors of the library into the terms of the command line.

The library's errors name Python arguments, `names={module: path}`, and params with leaves.
The command line has options, and a model with tensors.
"""

import re

_QUOTED = r"""'[^'\n]*'|"[^"\n]*\""""
_FUNCTION = r"the function \(fn, \*args\)"
_PROGRAM = "Load it in a program, with lora_jax.peft.load and the model's function"
_USES = ", and a function that uses both"
_TWO = "the model with a tensor for each"
_DICT = rf"names=(\{{(?:{_QUOTED}|[^{{}}'\"])*\}})"
# Patterns and replacements for the whole text, in this order.
_ARGUMENTS = (
    (rf"{_FUNCTION} or plan=, or ", ""),
    (rf"Give {_FUNCTION} or plan=", _PROGRAM),
    (rf"Give {_FUNCTION}, which shows (?:whether it is|the use of each)\. ", ""),
    (
        rf"Give {_FUNCTION} that looks rows up .*? or params in which (.*?) are two leaves",
        r"Save \1 as two tensors",
    ),
    (rf", or {_FUNCTION}", ""),
    (r"; or give on_tied='allow' if ", "; or load it with lora_jax.peft.load if "),
    (r"layout='(\w+)'", r"--layout \1"),
    (rf"(may be any of .*?: give {_DICT})", r"\1, or --prefix"),
    (
        r"there is no adapter for it: is the file whole\?",
        r"\g<0> For an adapter of a part of the model there is --prefix.",
    ),
    (r"strict=False", "--no-strict"),
    (r"uniform=True", "--uniform"),
    (r"save with dialect='peft'", "write it with --to peft"),
    # The temporary names of files that are not complete yet.
    (r"(^|/)\.([^/\n]+)\.\w{8}\.tmp/new\b", r"\1\2"),
    (r"(^|/)\.([^/\n]+)\.[0-9a-f]{16}\.tmp\b", r"\1\2"),
    (r"allow_fields=\('?([^',]*)'?,\)", r"--allow-field \1"),
    (r"allow_fields has", "--allow-field has"),
    (r"dtype=", "--dtype "),
    (r"params=\.\.\.", "--base"),
    (r"method='(\w+)'", r"--method \1"),
    (r"give rank or energy", "give --rank or --energy"),
    (r"needs (density|key), which is None", r"needs --\1"),
    (r"(needs --|does not use )key\b", r"\1seed"),
    (r"does not use seed", "does not use --seed"),
    (r"\bresize_adapters\b", "lora-jax resize"),
    (r"use combine_adapters\(.*\)", "use lora-jax combine"),
    (r"extract_adapters on merged params", "lora-jax extract on merged models"),
    (r"plan_adapters\(config, params, fn, \*args\)", "plan_adapters"),
)
# Patterns and replacements outside of quotes.
_WORDS = (
    (r"\bnames (has|must)\b", r"--names \1"),
    (r" Is the plan that of these params\? They come first, before the adapters\.", ""),
    (r": make the plan anew for these params", ": they are adapters of another model"),
    (rf"\bGive params with a leaf for each{_USES}", f"Save {_TWO}"),
    (rf": give params with a leaf for each{_USES}", f": save {_TWO}"),
    (rf"\bGive params in which (.*?) are two leaves{_USES}", r"Save \1 as two tensors"),
    (r"\bparams have\b", "the model has"),
    (r"\bparams lack\b", "the model lacks"),
    (r"(?<![\w/.-])(?:these |the )?params(?![\w/-]|\.\w)", "the model"),
    (r"(?<![\w/.-])the right the model", "the right model"),
    (r"(?<![\w/.-])leaf(?![\w/-]|\.\w)", "tensor"),
    (r"(?<![\w/.-])leaves(?= (?:are|lie|that|with|have|of)\b)", "tensors"),
)


def translate(text: str) -> str:
    """A message of the library in the terms of the command line."""
    for pattern, new in _ARGUMENTS:
        text = re.sub(pattern, new, text)
    text = re.sub(_DICT, lambda match: f"--names FILE.json with {_as_json(match[1])}", text)
    # Quoted names are masked while words are replaced.
    kept = re.findall(_QUOTED, text)
    masked = re.sub(_QUOTED, "'\0'", text)
    for pattern, new in _WORDS:
        masked = re.sub(pattern, new, masked)
    own = iter(kept)
    return re.sub("'\0'", lambda match: next(own), masked)


def _as_json(shown: str) -> str:
    """The text of a dict as JSON: `{'a': ('b', 'io')}` becomes `{"a": ["b", "io"]}`."""
    return shown.replace("(", "[").replace(")", "]").replace("'", '"')
