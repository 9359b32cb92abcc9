"""Eight CPU devices, and JAX at its strictest, for the whole suite."""

import gc
import importlib.util
import itertools
import os
import pathlib

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

# Tests of values that other tests see compiled with all optimizations. Most of their time
# goes into compiling, and without them it is half of it.
QUICK = (
    *("tests.cli", "tests.frameworks", "tests.live", "tests.optim", "tests.peft"),
    *("tests.processes", "tests.public", "tests.qlora", "tests.training"),
    *("tests.test_checkpoint", "tests.test_docs", "tests.test_properties"),
    *("tests.test_smollm", "tests.test_tenants"),
    *("tests.test_studies", "tests.layers.test_combinations"),
    *("tests.layers.test_decompose", "tests.layers.test_dora", "tests.layers.test_lora"),
    *("tests.layers.test_initializers", "tests.layers.test_linear"),
    "tests.lowrank.test_weight_norms",
    *("tests.model.test_adapters", "tests.model.test_adapter_shardings"),
    *("tests.arithmetic", "tests.foreign_trees", "tests.from_data"),
    *("tests.model.test_decompose", "tests.model.test_meshes"),
    *("tests.model.test_sharding", "tests.transform.test_inputs"),
    *("tests.model.test_quantize", "tests.model.test_slots", "tests.quant.test_files"),
    *("tests.plan.test_layout", "tests.quant.test_nf4", "tests.quant.test_tensors"),
    *("tests.transform.test_adapt", "tests.transform.test_calls"),
    *("tests.transform.test_cases", "tests.transform.test_fuzz"),
    *("tests.transform.test_meshes", "tests.transform.test_parts"),
    *("tests.transform.test_quantized", "tests.transform.test_rows"),
    *("tests.transform.test_rules", "tests.transform.test_stated"),
    *("tests.transform.test_stop_gradient", "tests.transform.test_surroundings"),
)
MISSING = [name for name in QUICK if importlib.util.find_spec(name) is None]
if MISSING:
    raise RuntimeError(f"QUICK has modules that do not exist: {MISSING}")


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
    """Compiles the programs of some modules without optimizations."""
    quick = f"{request.module.__name__}.".startswith(tuple(f"{name}." for name in QUICK))
    everywhere = jax.config.read("jax_disable_most_optimizations")
    with support.optimizations(not (quick or everywhere)):
        yield


@pytest.fixture
def optimized():
    """For tests, in modules of `QUICK`, of what the compiler makes of a program."""
    with support.optimizations(True):
        yield


@pytest.fixture(scope="module")
def fresh_operations():
    """For tests of bits: every operation is compiled anew, all with the same settings."""
    jax.clear_caches()
