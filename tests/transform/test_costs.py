"""What an adapted transformer costs when compiled, against the same model by hand.

Exact facts of the compiled programs, of a training step: operations and temporary
memory. The models, and the times, are those of `benchmarks/bench_transform.py`.
"""

import functools
import importlib
import pathlib
import sys

import pytest

from tests import programs

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
bench = importlib.import_module("bench_transform")

pytestmark = pytest.mark.slow  # a minute of compiling

LAYERS = 2
OPTIONS = bench.parse(["--batch=2", "--length=16", "--width=64", "--rank=4"])


@functools.cache
def compiled(method, layout, contestant, layers=LAYERS):
    setup = bench.set_up(OPTIONS, method, layout, layers)
    return bench.compile_step(setup, contestant)


def flops(method, layout, contestant):
    once = bench.flops(compiled(method, layout, contestant))
    if layout == "loop":
        return once
    twice = bench.flops(compiled(method, layout, contestant, 2 * LAYERS))
    return bench.looped_flops(once, twice, LAYERS)


def temporary(method, layout, contestant):
    return programs.temporary(compiled(method, layout, contestant))


CASES = [(method, layout) for method in bench.LINEARS for layout in bench.LAYOUTS]
# DoRA's factors are formed for all layers in front of the loop, by hand in each step of it:
# one vector for each weight is kept.
VECTORS = {("dora", "scan"): 1.02}


# Those of a scan are known from two compiled programs.
@pytest.mark.parametrize(
    ("method", "layout"),
    [pytest.param(*c, marks=[pytest.mark.slow] * (c[1] == "scan")) for c in CASES],
)
def test_operations_are_those_by_hand(method, layout):
    own, by_hand = (flops(method, layout, name) for name in (bench.ADAPT, bench.BY_HAND))
    assert own <= 1.01 * by_hand


@pytest.mark.parametrize(("method", "layout"), CASES)
def test_no_more_temporary_memory_than_by_hand(method, layout):
    own, by_hand = (temporary(method, layout, c) for c in (bench.ADAPT, bench.BY_HAND))
    assert own <= by_hand * VECTORS.get((method, layout), 1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", bench.LAYOUTS)
def test_merging_in_every_step_costs_more(layout):
    # Guards the tests above: they can tell.
    assert flops("lora", layout, bench.MERGED) > 1.1 * flops("lora", layout, bench.BY_HAND)
    merged, by_hand = (temporary("lora", layout, c) for c in (bench.MERGED, bench.BY_HAND))
    assert merged > 1.1 * by_hand
