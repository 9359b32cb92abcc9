"""`lora-jax inspect`: prints the adapters in a directory or a file, with warnings."""

import argparse
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax import plots
from lora_jax._core import checks
from lora_jax.cli import _adapters, _terminal
from lora_jax.cli._adapters import Adapter, Contents
from lora_jax.cli._effects import update_norm

# Common scales are 0.25 to 32. A scale above this one is most often a mistake.
_HUGE_SCALE = 100.0
# Smaller arrays, in bytes, do not change the size of the file much.
_LARGE = 2**20
_PICTURES = (".png", ".pdf", ".svg")
_NUMBERS = ("rank", "scale", "update", "bytes")
_SHOWN = (
    ("base model", "base_model_name_or_path"),
    ("base model", "model"),
    ("base model", "ss_sd_model_name"),
    ("init", "init_lora_weights"),
    ("init", "init"),
    ("target modules", "target_modules"),
    ("targets", "targets"),
    ("trained", "train"),
    ("modules to save", "modules_to_save"),
    ("task", "task_type"),
)


class Finding(NamedTuple):
    """What the values of an adapter show."""

    norm: float
    """The Frobenius norm of `scale * A @ B`."""
    zero: bool
    """Whether a factor is zero everywhere."""
    bad: tuple[str, ...]
    """The arrays with an infinity or a NaN in them."""
    sizes: tuple[int, int]
    """The sizes of the weight's input and output."""


def inspect(options: argparse.Namespace) -> int:
    """Runs the command."""
    directory = pathlib.Path(options.dir)
    contents = _adapters.read_contents(directory, options.allow_field)
    findings = {name: examine(each) for name, each in contents.adapters.items()}
    warnings = list(find_warnings(contents, findings))
    if options.plot:
        draw(contents).savefig(options.plot)
    if options.json:
        record = as_record(contents, findings, warnings)
        text = json.dumps(_terminal.as_json(record), indent=2, allow_nan=False)
        _terminal.print_text(text)
    else:
        _terminal.say(*as_text(contents, findings, warnings))
    return 0


def draw(contents: Contents) -> Any:
    """A heat map of the norms of the updates by layer and module."""
    targets = contents.plan.targets if contents.plan else {}
    series = {}
    for name, adapter in contents.adapters.items():
        values = adapter.read()
        spectrum = plots.singular_values(values["A"], values["B"], adapter.scale)
        series[name] = plots.Series(spectrum, targets.get(name))
    return plots.heat_map(series, plots.NORM)


def picture(text: str) -> pathlib.Path:
    """The argparse type of `--plot`: the name of a file for a picture."""
    path = pathlib.Path(text)
    if path.suffix not in _PICTURES:
        raise argparse.ArgumentTypeError(
            f"expected the name of a {', '.join(_PICTURES)} file, got {text!r}"
        )
    return path


def examine(adapter: Adapter) -> Finding:
    """Reads the values of an adapter and examines them."""
    entries = {name: value.astype(np.float64) for name, value in adapter.read().items()}
    bad = tuple(name for name, each in entries.items() if not np.isfinite(each).all())
    zero = not (entries["A"].any() and entries["B"].any())
    norm = math.nan if bad else update_norm(entries["A"], entries["B"], adapter.scale)
    sizes = entries["A"].shape[-2], entries["B"].shape[-1]
    return Finding(norm, zero, bad, sizes)


def find_warnings(contents: Contents, findings: Mapping[str, Finding]) -> Iterator[str]:
    """The warnings, one line each."""
    for name, finding in findings.items():
        for entry in finding.bad:
            yield f"{entry} of {name} has an infinity or a NaN in it."
    for name, whole in contents.wholes.items():
        floating = checks.is_floating(whole.dtype)
        if floating and not np.isfinite(np.asarray(whole, np.float32)).all():
            yield f"{name} has an infinity or a NaN in it."
    yield from _about_zeros(findings)
    for name, adapter in contents.adapters.items():
        yield from _about_numbers(name, adapter, *findings[name].sizes)
    yield from _about_dtypes(contents)
    yield from contents.ignored
    if contents.changes_base:
        yield (
            f"init {contents.changes_base!r} changed the base weights: the adapters belong "
            "to the changed base, unless they were converted."
        )
    yield from _about_wholes(contents)


def _about_zeros(findings: Mapping[str, Finding]) -> Iterator[str]:
    zero = [name for name, finding in findings.items() if finding.zero]
    if not findings:
        yield "there are no adapters."
    elif len(zero) == len(findings):
        yield "no adapter has an effect: A or B is zero everywhere in each of them."
    elif zero:
        yield (
            f"{len(zero)} of {len(findings)} adapters have no effect, A or B is zero "
            f"everywhere: {_listed(zero)}."
        )


def _about_numbers(name: str, adapter: Adapter, n_in: int, n_out: int) -> Iterator[str]:
    if adapter.scale == 0:
        yield f"the scale of {name} is 0: the adapter has no effect."
    if abs(adapter.scale) > _HUGE_SCALE:
        yield f"the scale of {name} is {adapter.scale:g}: common scales are 0.25 to 32."
    if adapter.rank != adapter.configured_rank:
        yield (
            f"{name} has rank {adapter.rank}, but the settings say "
            f"{adapter.configured_rank}, from which the scale is computed."
        )
    if adapter.rank > min(n_in, n_out):
        yield (
            f"{name} has rank {adapter.rank} for a weight with {n_in} inputs and {n_out} "
            "outputs."
        )


def _about_dtypes(contents: Contents) -> Iterator[str]:
    dtypes = set().union(*(adapter.dtypes for adapter in contents.adapters.values()))
    narrow = {dtype.name for dtype in dtypes if dtype.itemsize < 4}
    if narrow:
        yield (
            f"there are factors in {', '.join(sorted(narrow))}: cast them to float32 "
            "before further training."
        )


def _about_wholes(contents: Contents) -> Iterator[str]:
    large = [name for name, whole in contents.wholes.items() if whole.nbytes >= _LARGE]
    if large:
        size = sum(contents.wholes[name].nbytes for name in large)
        yield (
            f"{_listed(large)} {'is' if len(large) == 1 else 'are'} saved in full, "
            f"{_terminal.format_size(size)}; a merge replaces the arrays of the model."
        )
    saved = contents.settings.get("modules_to_save")
    if saved:
        yield (
            f"the modules {_listed(saved)} were trained in full (modules_to_save): the "
            "adapters alone are not the whole result of the training."
        )


def _listed(names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(str, names[:3])) + more


def as_text(
    contents: Contents, findings: Mapping[str, Finding], warnings: list[str]
) -> list[str]:
    """The lines that the command prints: settings, tables, totals, warnings."""
    lines = [f"{name}: {value}" for name, value in _head(contents)]
    columns = [name for name in _COLUMNS if contents.plan or name != "shape"]
    rows = [
        [_row(name, adapter, findings[name])[column] for column in columns]
        for name, adapter in contents.adapters.items()
    ]
    lines += ["", *_terminal.format_table(columns, rows, _NUMBERS)]
    if contents.wholes:
        wholes = [
            (name, _terminal.format_shape(w.shape), w.dtype.name, f"{w.nbytes:,}")
            for name, w in contents.wholes.items()
        ]
        header = ("saved in full", "shape", "dtype", "bytes")
        lines += ["", *_terminal.format_table(header, wholes, ("bytes",))]
    parameters, size = _sums(contents)
    return [
        *lines,
        "",
        f"{len(contents.adapters)} adapters, {parameters:,} parameters, "
        f"{_terminal.format_size(size)}.",
        *(f"warning: {line}" for line in warnings),
    ]


def _head(contents: Contents) -> Iterator[tuple[str, Any]]:
    yield "format", contents.format
    for name, value in contents.shared.items():
        yield name.replace("_", " "), value
    for name, field in _SHOWN:
        value = contents.settings.get(field)
        if value is not None and value != []:
            yield name, ", ".join(map(str, value)) if isinstance(value, list) else value


_COLUMNS = ("module", "method", "shape", "A", "B", "dtype", *_NUMBERS)


def _row(name: str, adapter: Adapter, finding: Finding) -> dict[str, str]:
    return {
        "module": name,
        "method": adapter.method,
        "shape": _terminal.format_shape(adapter.shape),
        **{n: _terminal.format_shape(adapter.entries[n].shape) for n in "AB"},
        "dtype": ", ".join(sorted(dtype.name for dtype in adapter.dtypes)),
        "rank": str(adapter.rank),
        "scale": f"{adapter.scale:g}",
        "update": _terminal.format_number(finding.norm),
        "bytes": f"{adapter.nbytes:,}",
    }


def _sums(contents: Contents) -> tuple[int, int]:
    """The number of parameters of the adapters, and the size of all arrays in bytes."""
    own = contents.adapters.values()
    size = sum(a.nbytes for a in own) + sum(w.nbytes for w in contents.wholes.values())
    return sum(a.parameters for a in own), size


def as_record(
    contents: Contents, findings: Mapping[str, Finding], warnings: list[str]
) -> dict[str, Any]:
    """The JSON object that the command prints with `--json`."""
    parameters, size = _sums(contents)
    adapters = {
        name: {
            "method": a.method,
            **({"shape": list(a.shape)} if contents.plan else {}),
            "rank": a.rank,
            "scale": a.scale,
            "update_norm": findings[name].norm,
            "entries": {
                entry: {"shape": list(array.shape), "dtype": np.dtype(array.dtype).name}
                for entry, array in a.entries.items()
            },
            "parameters": a.parameters,
            "bytes": a.nbytes,
        }
        for name, a in contents.adapters.items()
    }
    wholes = {
        name: {"shape": list(w.shape), "dtype": w.dtype.name, "bytes": w.nbytes}
        for name, w in contents.wholes.items()
    }
    return {
        "format": contents.format,
        **contents.shared,
        "settings": contents.settings,
        "adapters": adapters,
        "wholes": wholes,
        "parameters": parameters,
        "bytes": size,
        "warnings": warnings,
    }
