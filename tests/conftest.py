"""Eight CPU devices, and JAX at its strictest, for the whole suite."""

import os

from tests import xla_flags

os.environ["XLA_FLAGS"] = xla_flags.for_tests(os.environ.get("XLA_FLAGS", ""))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

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
    *("tests.test_checkpoint", "tests.test_decomposed", "tests.test_decomposed_params"),
    *("tests.test_dora", "tests.test_lora", "tests.test_model", "tests.test_column_norm"),
    *("tests.test_initializers", "tests.test_properties", "tests.test_quantized_params"),
    *("tests.quant.test_files", "tests.quant.test_tensors"),
    "tests.qlora",
    *("tests.public", "tests.quant.test_nf4", "tests.training"),
    "tests.transform.test_fuzz",
    *("tests.transform.test_calls", "tests.transform.test_meshes"),
    "tests.transform.test_quantized",
    *("tests.transform.test_rules", "tests.transform.test_surroundings"),
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Compiles the programs of some modules without optimizations."""
    before = jax.config.read("jax_disable_most_optimizations")
    quick = f"{request.module.__name__}.".startswith(tuple(f"{name}." for name in QUICK))
    jax.config.update("jax_disable_most_optimizations", before or quick)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
