"""`lora-jax combine`, `resize` and `extract`: adapters from other adapters or models."""

import argparse
import contextlib
import glob
import json
import logging
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax._core import tree_paths
from lora_jax._io.tensor_streams import Span
from lora_jax.arithmetic.combining import DerivedAdapters, combine_adapters, resize_adapters
from lora_jax.arithmetic.extraction import extract_adapters
from lora_jax.checkpoint import save_adapters
from lora_jax.cli import _adapters, _base, _convert, _loading, _output, _terminal, _ties
from lora_jax.layers.lora import Adapters
from lora_jax.model.adapters import plan_adapters
from lora_jax.peft.formats.keys import BIAS, WEIGHT
from lora_jax.peft.save import save
from lora_jax.peft.words import EMBEDDINGS, HEADS, last_word, split_path
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.config import LoraConfig

_LOG = logging.getLogger("lora_jax")
_PIECE = 2**22  # entries that are compared at once
_HEADER = ("weight", "rank", "scale", "energy kept")
# By the number of axes: the letters of the weights of linear layers and convolutions.
_AXES = {
    "torch": {2: "oi", 4: "oiii", 5: "oiiii"},
    "jax": {2: "io", 4: "iiio", 5: "iiiio"},
}


class _Source(NamedTuple):
    """Adapters that were read, and how to write others like them."""

    adapters: Adapters
    plan: AdapterPlan
    format: Any
    """One of `_adapters.FORMATS`."""
    about: Mapping[str, Any]
    """Fields of PEFT's config that name the model and the task."""
    notes: Sequence[str] = ()
    """Lines for the report."""


def combine(options: argparse.Namespace) -> int:
    """Runs the command."""
    places = [pathlib.Path(each) for each in options.adapter]
    out = _checked_out(options, places)
    sources = _read_all(places, options)
    given = [own.adapters for own in sources], [own.plan for own in sources]
    key = None if options.seed is None else jax.random.key(options.seed)
    with _progress(given[1], options):
        made = combine_adapters(
            *given, options.weights, options.method, params=_params(given[1], options),
            rank=options.rank, energy=options.energy, density=options.density,
            majority_sign=options.majority_sign, key=key,
        )  # fmt: skip
    _write(out, made, sources[0], options)
    _report(out, made, [note for own in sources for note in own.notes], options)
    return 0


def resize(options: argparse.Namespace) -> int:
    """Runs the command."""
    place = pathlib.Path(options.adapter)
    out = _checked_out(options, [place])
    (source,) = _read_all([place], options)
    params = _params([source.plan], options)
    with _progress([source.plan], options):
        made = resize_adapters(
            source.adapters, source.plan, rank=options.rank, energy=options.energy,
            params=params,
        )  # fmt: skip
    _write(out, made, source, options)
    _report(out, made, source.notes, options)
    return 0


def extract(options: argparse.Namespace) -> int:
    """Runs the command."""
    places = {"BASE": pathlib.Path(options.base), "TUNED": pathlib.Path(options.tuned)}
    out = pathlib.Path(options.out)
    if options.rank is None and options.energy is None:
        raise ValueError("give --rank or --energy: the ranks of the adapters.")
    _output.check_place(out, places, overwrite=False, own=lambda path: set())
    old, new = (_base.open_base(path).spans for path in places.values())
    _check_alike(old, new)
    changed = [name for name in old if not _are_equal(old[name], new[name])]
    plan = _plan_of(changed, old, options)
    base, tuned = ({n: _mapped(spans[n]) for n in plan.entries} for spans in (old, new))
    with _progress([plan], options):
        made = extract_adapters(base, tuned, plan, rank=options.rank, energy=options.energy)
    made = DerivedAdapters(made.adapters, made.plan, made.energy)
    source = _Source(made.adapters, plan, "peft", {"base_model": str(places["BASE"])})
    _write(out, made, source, options)
    full = list(plan.trained)
    size = _terminal.format_size(sum(new[name].nbytes for name in full))
    note = (
        f"modules that changed, and are saved in full ({size}): {tree_paths.listed(full)}"
    )
    unchanged = f"{len(old) - len(changed)} of {len(old)} tensors have not changed."
    _report(out, made, [unchanged, *([note] if full else [])], options)
    return 0


def _checked_out(
    options: argparse.Namespace, places: Sequence[pathlib.Path]
) -> pathlib.Path:
    """The place of the result, which must be new."""
    out = pathlib.Path(options.out)
    inputs = {f"ADAPTER {i}": place for i, place in enumerate(places, 1)}
    if options.base:
        inputs["BASE"] = pathlib.Path(options.base)
    _output.check_place(out, inputs, overwrite=False, own=lambda path: set())
    return out


def _read_all(places: Sequence[pathlib.Path], options: argparse.Namespace) -> list[_Source]:
    """Reads adapters of one format.

    Without a base, PEFT's modules are put on a model that has these modules only.
    """
    contents = [_adapters.read_contents(each, options.allow_field) for each in places]
    first = contents[0]
    for own in contents:
        if own.format != first.format:
            raise ValueError(
                f"{first.directory} is in the format {first.format} and {own.directory} in "
                f"the format {own.format}: convert one of them with lora-jax convert."
            )
        if own.changes_base:
            raise ValueError(
                f"the adapters in {own.directory} belong to a base that their initializer, "
                f"{own.changes_base}, changed: save them for the original base, with "
                "to_plain_adapters, or PEFT's path_initial_model_for_weight_conversion."
            )
    if options.base is not None:
        base = _base.open_base(pathlib.Path(options.base))
    else:
        base = _base.Base(first.directory, {})
        base.__dict__["spans"] = _weights_of(contents)
        base.__dict__["config"] = json.dumps(_ties.untied_settings({})).encode()
    return [_source(own, base, options) for own in contents]


def _source(
    contents: _adapters.Contents, base: _base.Base, options: argparse.Namespace
) -> _Source:
    if contents.own is not None:
        if options.uniform:
            raise ValueError("--uniform is for other formats: a plan has all scales.")
        return _Source(*contents.own, contents.format, {})
    adapters, plan, notes = _convert.put_on(base, contents, options)
    assert contents.checkpoint is not None
    config = contents.checkpoint.config
    about = {"base_model": config.base_model_name_or_path, "task_type": config.task_type}
    return _Source(adapters, plan, contents.format, about, notes)


def _weights_of(contents: Sequence[_adapters.Contents]) -> dict[str, Any]:
    """The weights of a model that has the modules of some adapters only, by name."""
    found: dict[str, Any] = {}
    for own in contents:
        modules = {} if own.checkpoint is None else own.checkpoint.entries.modules
        for module in modules.values():
            if module.kind == "experts":
                raise ValueError(
                    f"{own.directory} has adapters of experts, {module.name!r}, whose "
                    "weights may lie in several ways: give the model, with --base."
                )
            n_in, n_out, window, _ = module.dims
            shape = (n_out, n_in, *window)
            if module.kind == "embedding":
                shape = (n_in, n_out)
            _add(found, f"{module.model_name}.weight", shape, own)
        for name, whole in own.wholes.items():
            if name in own.rows:
                raise ValueError(
                    f"{own.directory} has trained rows of {name!r}, and not the others: "
                    "merge it, and use lora-jax extract."
                )
            _add(found, name, whole.shape, own)
    return found


def _add(
    found: dict[str, Any], name: str, shape: Any, contents: _adapters.Contents
) -> None:
    weight = found.setdefault(name, jax.ShapeDtypeStruct(tuple(shape), np.float32))
    if weight.shape != tuple(shape):
        raise ValueError(
            f"{name!r} is {_terminal.format_shape(shape)} for {contents.directory}, and "
            f"{_terminal.format_shape(weight.shape)} for another adapter: are they of the "
            "same model?"
        )


def _params(
    plans: Sequence[AdapterPlan], options: argparse.Namespace
) -> dict[str, np.ndarray] | None:
    """The weights of the plans in the files of the base; read when they are used."""
    if options.base is None:
        return None
    spans = _base.open_base(pathlib.Path(options.base)).spans
    names = dict.fromkeys(plan.leaf(path) for plan in plans for path in plan.entries)
    missing = [name for name in names if name not in spans]
    if missing:
        raise ValueError(
            f"{options.base} lacks {tree_paths.listed(missing)}, which the adapters are of."
        )
    return {name: _mapped(spans[name]) for name in names}


def _mapped(span: Span) -> np.ndarray:
    """An array in a file, mapped into memory: only what is used is read."""
    if not span.size:
        return np.zeros(span.shape, span.dtype)
    raw = np.memmap(span.file.path, np.uint8, "r", span.start, (span.nbytes,))
    return np.asarray(raw).view(span.dtype).reshape(span.shape)


def _check_alike(old: Mapping[str, Span], new: Mapping[str, Span]) -> None:
    """Raises unless two models have the same tensors."""
    lost = [name for name in old if name not in new]
    more = [name for name in new if name not in old]
    if lost or more:
        raise ValueError(
            "the models have different tensors: only BASE has "
            f"{tree_paths.listed(lost) or 'none'}, and only TUNED has "
            f"{tree_paths.listed(more) or 'none'}."
        )
    for name, span in old.items():
        if span.shape != new[name].shape:
            raise ValueError(
                f"{name!r} is {_terminal.format_shape(span.shape)} in BASE and "
                f"{_terminal.format_shape(new[name].shape)} in TUNED: an adapter cannot "
                "change a shape."
            )


def _are_equal(old: Span, new: Span) -> bool:
    """Whether two arrays of one shape have the same values, in any dtypes."""
    for start in range(0, old.size, _PIECE):
        stop = min(start + _PIECE, old.size)
        one, other = (each.read_flat(start, stop) for each in (old, new))
        if old.dtype == new.dtype:
            one, other = (each.view(np.uint8) for each in (one, other))
        if not np.array_equal(one, other):
            return False
    return True


def _plan_of(
    changed: Sequence[str], spans: Mapping[str, Span], options: argparse.Namespace
) -> AdapterPlan:
    """The plan of adapters of the weights that have changed, and of leaves in full."""
    letters = _AXES[options.layout or "torch"]
    for pattern in options.targets:
        if not any(tree_paths.first_match([pattern], name) for name in spans):
            near = tree_paths.listed(tree_paths.nearest(pattern, spans))
            raise ValueError(
                f"--targets {pattern} matches no tensor; the nearest are {near}."
            )
    adapted, full = [], []
    for name in changed:
        is_weight = len(spans[name].shape) in letters
        chosen = tree_paths.first_match(options.targets, name) is not None
        if chosen and not is_weight:
            raise ValueError(
                f"{name!r}, {_terminal.format_shape(spans[name].shape)}, is no matrix and "
                "no weight of a convolution: leave it out of --targets."
            )
        if not options.targets:
            chosen = is_weight and last_word(name) not in EMBEDDINGS | HEADS
        (adapted if chosen else full).append(name)
    if not adapted:
        raise ValueError(
            "no weight of TUNED that could have an adapter differs from BASE"
            + (f", only {tree_paths.listed(full)}." if full else ".")
        )
    full = _with_biases(full, spans)
    rank = options.rank or 1
    config = LoraConfig(
        rank=rank,
        alpha=float(rank),
        targets=tuple(map(glob.escape, adapted)),
        train=tuple(map(glob.escape, full)),
        axes={glob.escape(name): letters[len(spans[name].shape)] for name in adapted},
    )
    entries = {n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in spans.items()}
    return plan_adapters(config, entries)


def _with_biases(full: Sequence[str], names: Iterable[str]) -> list[str]:
    """Names of full arrays, and the biases beside weights: PEFT saves modules whole."""
    words = {name: split_path(name) for name in names}
    biases = {own.words: name for name, own in words.items() if own.leaf == BIAS}
    modules = [words[name].words for name in full if words[name].leaf == WEIGHT]
    return [*dict.fromkeys([*full, *(biases[own] for own in modules if own in biases)])]


def _write(
    out: pathlib.Path, made: DerivedAdapters, like: _Source, options: argparse.Namespace
) -> None:
    names = _loading.read_names(options.names)
    with _convert.new_place(out, like.format) as new:
        if like.format == _adapters.OWN:
            save_adapters(new, made.adapters, made.plan, dtype=options.dtype)
            return
        save(
            new, made.adapters, made.plan, layout=options.layout or "torch", names=names,
            dtype=options.dtype, uniform=options.uniform, dialect=like.format, **like.about,
        )  # fmt: skip


def _report(
    out: pathlib.Path,
    made: DerivedAdapters,
    notes: Sequence[str],
    options: argparse.Namespace,
) -> None:
    rows = [
        (path, str(own.rank), f"{own.scale:g}", f"{made.energy[path]:.4%}")
        for path, own in made.plan.targets.items()
    ]
    if not options.quiet:
        _terminal.say(*_terminal.format_table(_HEADER, rows, _HEADER[1:]), "")
    energy = min(made.energy.values(), default=1.0)
    ranks = [own.rank for own in made.plan.targets.values()]
    _terminal.say(
        f"{out}: {len(rows)} adapters with ranks from {min(ranks)} to {max(ranks)}; the "
        f"least energy that one keeps of its update is {energy:.4%}.",
        *notes,
    )


@contextlib.contextmanager
def _progress(plans: Sequence[AdapterPlan], options: argparse.Namespace) -> Iterator[None]:
    """Shows the progress of a function that logs each weight that it has done."""
    sizes = {
        path: 4 * math.prod(target.shape)
        for plan in plans
        for path, target in plan.targets.items()
    }
    total = sum(sizes.values())
    with _terminal.show_progress(total, quiet=options.quiet) as done:
        handler = logging.Handler(logging.INFO)
        handler.emit = lambda record: done(sizes.get(_path_of(record), 0))
        level = _LOG.level
        _LOG.addHandler(handler)
        _LOG.setLevel(logging.INFO)
        try:
            yield
        finally:
            _LOG.removeHandler(handler)
            _LOG.setLevel(level)


def _path_of(record: logging.LogRecord) -> str:
    return str(record.args[0]) if isinstance(record.args, tuple) and record.args else ""


def read_weights(text: str) -> list[float]:
    """Reads the argument of `--weights`, numbers with commas between them."""
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        message = f"expected numbers such as 0.7,0.3, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None
