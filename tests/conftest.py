"""Eight CPU devices, and JAX at its strictest, for the whole suite."""

import collections
import gc
import importlib.util
import itertools
import os
import pathlib
import random

from tests import xla_flags

os.environ["XLA_FLAGS"] = xla_flags.for_tests(os.environ.get("XLA_FLAGS", ""))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

from tests import support

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Examples are drawn from a fixed seed, so that a run on an old JAX fails where one on a
# new JAX does; the first call of each shape compiles, so there is no deadline.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")

# Tests of numbers whose programs are compiled as those of a user are. All others are
# compiled without LLVM's optimizations, in half the time. XLA's passes are the same then,
# and so are the text of a program, its FLOPs, its memory and its collectives.
OPTIMIZED = (
    *("tests.core", "tests.lowrank.test_contraction", "tests.lowrank.test_low_rank"),
    *("tests.quant.test_arithmetic", "tests.quant.test_channels", "tests.quant.test_fp8"),
    *("tests.quant.test_golden_nf4", "tests.quant.test_int8", "tests.quant.test_packing"),
    "tests.test_golden",
)

# Tests whose cases compile programs, or run them: most of the time of a run. Each has many
# cases, of which a run of everything takes some. The cases of other tests cost nothing.
COSTLY = (
    *("tests.layers", "tests.lowrank", "tests.model", "tests.optim", "tests.peft"),
    *("tests.qlora", "tests.quant", "tests.test_compiled", "tests.test_docs"),
    *("tests.test_golden", "tests.test_kills", "tests.transform"),
)
DEFAULT_CASES = 2

MISSING = [name for name in OPTIMIZED + COSTLY if importlib.util.find_spec(name) is None]
if MISSING:
    raise RuntimeError(f"there are no modules {MISSING}, which this file names")


def pytest_addoption(parser):
    parser.addoption(
        "--cases",
        type=int,
        metavar="N",
        help="run at most N cases of each costly test, but all of those marked `whole`",
    )


def pytest_configure(config):
    """Sees whether this is a run of everything, without a choice of tests or cases."""
    option = config.option
    everything = (
        config.args_source == config.ArgsSource.TESTPATHS
        and option.markexpr in config.getini("addopts")
        and not option.keyword
        and option.cases is None
    )
    option.default_cases = DEFAULT_CASES if everything else None


def pytest_report_header(config):
    most = config.option.default_cases
    if most is not None:
        return f"cases: {most} of each costly test; all, where a file or test is named"
    return None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks cases that are slow, lets `-m` choose, and leaves out what `--cases` does."""
    for table in _tables(items):
        mark = table[0].get_closest_marker("mostly_slow")
        most = [] if mark is None else [*mark.args]
        if config.option.default_cases is not None and _is_costly(table):
            most.append(config.option.default_cases)
        if most:
            quick = [item for item in table if not item.get_closest_marker("slow")]
            for item in _all_but(min(most), quick):
                item.add_marker("slow")
    yield
    most = config.getoption("cases")
    if most is None:
        return
    left_out = {
        item
        for table in _tables(items)
        if _is_costly(table) and not table[0].get_closest_marker("whole")
        for item in _all_but(most, table)
    }
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _tables(items):
    """The collected cases of each test."""
    found = collections.defaultdict(list)
    for item in items:
        found[item.nodeid.partition("[")[0]].append(item)
    return found.values()


def _is_costly(table):
    """Whether a test is in one of the folders and files of `COSTLY`."""
    file = table[0].nodeid.partition(".py")[0].replace("/", ".")
    return f"{file}.".startswith(tuple(f"{name}." for name in COSTLY))


def _all_but(n, table):
    """The cases of a test but for `n`, which are drawn by its name and the version of JAX.

    So they are the same in each run, and the stages of .ci/run try others.
    """
    name = table[0].nodeid.partition("[")[0] if table else ""
    drawn = random.Random(f"{name} {jax.__version__}")
    kept = drawn.sample(table, min(n, len(table)))
    return [item for item in table if item not in kept]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives each process tests that follow each other, so that more of it is compiled once.

    xdist's default deals them out in turn, and a tenth of the time is then spent twice.
    """
    if config.getoption("dist") == "load":
        # xdist is no requirement of the tests
        from xdist.scheduler import WorkStealingScheduling

        return WorkStealingScheduling(config, log)
    return None


def pytest_collection_finish():
    """Lets the garbage collector look at new objects alone, and less often.

    JAX and the tests stay until the end, and to go through all of their objects again and
    again takes a tenth of the time of small tests.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


# Linux allows a process 65,530 mappings of memory, and XLA takes some for each program.
MAPPINGS = pathlib.Path("/proc/self/maps")
MOST_MAPPINGS = 6_000  # a test may add 10,000
TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs():
    """Frees the compiled programs of earlier tests before a process has too many."""
    yield
    if next(TESTS) % 4 or not MAPPINGS.exists():  # to read them takes some milliseconds
        return
    if MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Compiles the programs of most modules without optimizations."""
    name = f"{request.module.__name__}."
    optimized = name.startswith(tuple(f"{name}." for name in OPTIMIZED))
    everywhere = jax.config.read("jax_disable_most_optimizations")
    with support.optimizations(optimized and not everywhere):
        yield


@pytest.fixture
def optimized():
    """For tests of bits in other modules."""
    with support.optimizations(True):
        yield


@pytest.fixture(scope="module")
def fresh_operations():
    """For tests of bits: every operation is compiled anew, all with the same settings."""
    jax.clear_caches()
