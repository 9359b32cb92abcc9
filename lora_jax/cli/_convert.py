"""`lora-jax convert`: converts adapters from one format to another."""

import argparse
import contextlib
import dataclasses
import glob
import pathlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from lora_jax._core import tree_paths
from lora_jax._io import tensor_files
from lora_jax.checkpoint import load_adapters, save_adapters
from lora_jax.cli import _adapters, _base, _loading, _output, _terminal, _ties
from lora_jax.layers.lora import Adapters
from lora_jax.peft.formats.checkpoint import InMemory
from lora_jax.peft.formats.dialects import FILES, write_adapter
from lora_jax.peft.save import save
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.target import VALUE, TrainedLeaf


def convert(options: argparse.Namespace) -> int:
    """Runs the command."""
    source, out = pathlib.Path(options.src), pathlib.Path(options.dst)
    found = _adapters.find_format(source)
    if found == options.to:
        raise ValueError(f"{source} is in the format {found} already: copy it.")
    base = {"BASE": pathlib.Path(options.base)} if options.base else {}
    inputs = {"SRC": source, **base}
    _output.check_place(out, inputs, overwrite=False, own=lambda path: set())
    if _adapters.OWN in (found, options.to):
        run = _to_own if options.to == _adapters.OWN else _from_own
        plan, omissions = run(source, out, options)
        counts = len(plan.targets), len(plan.trained)
    else:
        counts, omissions = _between(source, out, options)
    trained = f" and {counts[1]} full arrays" if counts[1] else ""
    what = f"{counts[0]} adapters{trained}"
    _terminal.say(f"{out}: {what} in the format {options.to}.", *omissions)
    return 0


def _to_own(
    source: pathlib.Path, out: pathlib.Path, options: argparse.Namespace
) -> tuple[AdapterPlan, list[str]]:
    if options.uniform:
        raise ValueError("--uniform is for --to peft: a plan has all ranks and scales.")
    if options.base is None:
        raise ValueError(
            f"adapters of {source} do not say the shapes of the weights: give the model "
            "they are for, with --base."
        )
    base = _base.open_base(pathlib.Path(options.base))
    contents = _adapters.read_contents(source, options.allow_field)
    adapters, plan, omissions = put_on(base, contents, options)
    with _output.new_directory(out) as new:
        save_adapters(new, adapters, plan, dtype=options.dtype or _dtype(contents))
    return plan, omissions


def put_on(
    base: _base.Base, contents: _adapters.Contents, options: argparse.Namespace
) -> tuple[Adapters, AdapterPlan, list[str]]:
    """Adapters of PEFT on the arrays of a model, their plan, and lines for the report.

    Their full arrays become trained leaves.
    """
    base = _ties.untie(base, contents)
    matching = _loading.read_matching(options)
    loaded = _loading.load_for(contents, base, matching)
    adapters, plan = _ties.rejoin(base.copies, base.spans, loaded.adapters, loaded.plan)
    trained = {p: own for p, own in loaded.replaced.items() if p in plan.skipped}
    others = [path for path in loaded.replaced if path not in trained]
    if others and (options.strict or not (plan.targets or trained)):
        raise tensor_files.CheckpointError(
            f"{contents.directory} has another base for adapted weights, or an array for "
            "one end of a tied embedding, and the format lora_jax has no place for it: "
            f"{tree_paths.listed(others)}. Merge it, or load it in a program with "
            "lora_jax.peft.load, or leave them out with --no-strict."
        )
    plan = _with_trained(plan, trained)
    adapters |= {path: {VALUE: array} for path, array in trained.items()}
    more = [f"the format lora_jax has no place for {name!r}." for name in others]
    loaded = loaded._replace(left_out=[*loaded.left_out, *more])
    return adapters, plan, _loading.report_omissions(contents, loaded)


def _with_trained(plan: AdapterPlan, trained: Mapping[str, jax.Array]) -> AdapterPlan:
    """The plan with leaves that are trained without an adapter."""
    leaves = {path: TrainedLeaf(array.shape) for path, array in trained.items()}
    config = dataclasses.replace(plan.config, train=tuple(map(glob.escape, trained)))
    skipped = {path: why for path, why in plan.skipped.items() if path not in trained}
    return AdapterPlan(config, plan.targets, skipped, plan.uses, plan.total, leaves)


def _dtype(contents: _adapters.Contents) -> np.dtype | None:
    """The common dtype of all arrays; None if there are several."""
    dtypes = {np.dtype(whole.dtype) for whole in contents.wholes.values()}
    dtypes = dtypes.union(*(adapter.dtypes for adapter in contents.adapters.values()))
    return dtypes.pop() if len(dtypes) == 1 else None


def _from_own(
    source: pathlib.Path, out: pathlib.Path, options: argparse.Namespace
) -> tuple[AdapterPlan, list[str]]:
    if options.base is not None:
        raise ValueError("--base is for --to lora_jax: the plan has all shapes.")
    for name, given in (("--prefix", options.prefix), ("--no-strict", not options.strict)):
        if given:
            raise ValueError(f"{name} is for --to lora_jax: it is about the model.")
    names = _loading.read_names(options.names)
    adapters, plan = load_adapters(source, dtype="file")
    with new_place(out, options.to) as new:
        save(
            new, adapters, plan, names=names, layout=options.layout or "jax",
            dtype=options.dtype, uniform=options.uniform, dialect=options.to,
        )  # fmt: skip
    return plan, []


@contextlib.contextmanager
def new_place(out: pathlib.Path, dialect: str) -> Iterator[pathlib.Path]:
    """The path to write at: a new directory, or a file, which is written in one step."""
    if dialect in FILES:
        yield out
        return
    with _output.new_directory(out) as new:
        yield new


def _between(
    source: pathlib.Path, out: pathlib.Path, options: argparse.Namespace
) -> tuple[tuple[int, int], list[str]]:
    """Converts between two formats of other programs, module by module."""
    for name in ("base", "names", "layout", "prefix", "uniform"):
        if getattr(options, name):
            raise ValueError(
                f"--{name} is for adapters on a model: convert to lora_jax, with --base, "
                f"--base, and from there to {options.to}."
            )
    contents = _adapters.read_contents(source, options.allow_field)
    opened = contents.checkpoint
    assert opened is not None
    if "mlx" in (opened.dialect, options.to) and contents.embeddings:
        raise ValueError(
            f"{contents.embeddings[0]!r} is an embedding. If a head is tied to it, "
            "adapters of mlx-lm act on both, and others do not: convert to lora_jax, with "
            f"--base, and from there to {options.to}."
        )
    arrays = InMemory()
    for name in opened.entries.names():
        array = opened.arrays.read(name)
        arrays[name] = tensor_files.cast(repr(name), array, options.dtype)
    with new_place(out, options.to) as new:
        write_adapter(new, options.to, opened._replace(arrays=arrays))
    counts = len(contents.adapters), len(contents.wholes)
    return counts, contents.ignored
