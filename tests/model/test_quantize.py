"""Quantized params: which leaves, read when, and what they become."""

import functools
import inspect
import os
import pathlib
import re
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import save_file

import lora_jax
from lora_jax import quant
from lora_jax.model.quantize import quantize_params
from tests import toy_format
from tests.support import assert_same_bits, draw, needs_host_memory

SMALL = {"block_size": 8, "scaler_block_size": 2}
FORMATS = {
    "nf4": (quant.quantize_nf4, SMALL),
    "int8": (quant.quantize_int8, {"block_size": 5}),
    "fp8": (quant.quantize_fp8, {}),
}


def make(dtype="float32"):
    """Params with a weight, a stack, and leaves that are to stay as they are."""
    return {
        "up": {"kernel": draw(12, 8, dtype=dtype), "bias": draw(8)},
        "layers": {"kernel": draw(3, 8, 16, dtype=dtype, seed=1), "scale": draw(3, 8)},
        "name": "run",
        "step": 3,
    }


# ------------------------------------------------------------------ which leaves, how


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", FORMATS)
def test_matching_leaves_are_quantized_and_the_others_are_the_same(format, dtype):
    params = make(dtype)
    quantize, settings = FORMATS[format]
    axes = {"layers/*": 1}
    got = quantize_params(params, "*/kernel", format, batch_axes=axes, **settings)
    assert_same_bits(got["up"]["kernel"], quantize(params["up"]["kernel"], **settings))
    want = quantize(params["layers"]["kernel"], batch_axes=1, **settings)
    assert_same_bits(got["layers"]["kernel"], want)
    for block, name in (("up", "bias"), ("layers", "scale")):
        assert got[block][name] is params[block][name]
    assert (got["name"], got["step"]) == ("run", 3)
    assert isinstance(params["up"]["kernel"], jax.Array)


def test_the_settings_are_those_of_the_formats():
    for name, (quantize, settings) in FORMATS.items():
        assert sys.modules[quantize_params.__module__]._FORMATS[name] is quantize
        assert settings.keys() <= inspect.signature(quantize).parameters.keys()
    params = {"w": draw(7, 9)}
    got = quantize_params(params, "w", codec="bitsandbytes")["w"]
    assert_same_bits(got, quant.quantize_nf4(params["w"], codec="bitsandbytes"))


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ("up/kernel", ["up/kernel"]),
        (["*/kernel", "*/scale"], ["layers/kernel", "layers/scale", "up/kernel"]),
        (re.compile(r"\w+/kernel"), ["layers/kernel", "up/kernel"]),
        (("re:up/k.*",), ["up/kernel"]),
        ((p for p in ["up/*nel"]), ["up/kernel"]),
    ],
)
def test_patterns_are_those_of_a_config(patterns, chosen):
    got = quantize_params(make(), patterns, "int8")
    leaves = jax.tree_util.tree_leaves_with_path(got, is_leaf=quant.is_quantized)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in leaves
        if quant.is_quantized(leaf)
    ]
    assert paths == chosen


def test_a_plan_gives_paths_and_stacks():
    axes = {"w": "io", "stack": "boi", "experts": "bbio", "split": "bibo", "last": "oib"}
    shapes = {"w": (6, 5), "stack": (2, 6, 5), "experts": (2, 3, 6, 5)}
    shapes |= {"split": (2, 6, 3, 5), "last": (6, 5, 2)}
    params = {name: draw(*shape) for name, shape in shapes.items()} | {"bias": draw(5, 5)}
    config = lora_jax.LoraConfig(2, targets=list(axes), axes=axes)
    plan = lora_jax.plan_adapters(config, params)
    counts = {"w": 0, "stack": 1, "experts": 2, "split": 1, "last": 0}
    got = quantize_params(params, plan, "int8")
    assert got["bias"] is params["bias"]
    assert {name: got[name].batch_ndim for name in counts} == counts
    more = quantize_params(params, "*", "int8", plan=plan, batch_axes={"exp*": 1})
    counts |= {"experts": 1, "bias": 0}
    assert {name: leaf.batch_ndim for name, leaf in more.items()} == counts


def test_one_number_of_batch_axes_is_for_all():
    params = {"a": draw(3, 4, 5), "b": draw(2, 6, 5)}
    got = quantize_params(params, "*", "fp8", batch_axes=1)
    assert [leaf.batch_ndim for leaf in got.values()] == [1, 1]


def test_a_function_is_a_format():
    params = make()
    calls = []

    def quantize(weight, batch_axes):
        calls.append(batch_axes)
        return toy_format.quantize(weight, batch_axes)

    got = quantize_params(params, "*/kernel", quantize, batch_axes={"layers/*": 1})
    assert calls == [1, 0]
    want = toy_format.quantize(params["layers"]["kernel"], 1)
    assert_same_bits(got["layers"]["kernel"], want)
    nf4 = functools.partial(quant.quantize_nf4, **SMALL)
    assert_same_bits(
        quantize_params(params, "up/kernel", nf4),
        quantize_params(params, "up/kernel", **SMALL),
    )


# ------------------------------------------------------------------- kinds of leaves


class Lazy:
    """A leaf that is read when it is asked for."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype


class WithArray(Lazy):
    def __array__(self, dtype=None, copy=None):
        return np.array(self.values)


class WithEllipsis(Lazy):
    def __getitem__(self, index):
        assert index is ...
        return np.array(self.values)


@pytest.mark.parametrize("kind", [np.asarray, WithArray, WithEllipsis])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_leaves_may_be_read_when_they_are_needed(kind, dtype):
    values = draw(8, 16, dtype=dtype)
    got = quantize_params({"w": kind(np.asarray(values)), "v": 1}, "w", **SMALL)["w"]
    assert_same_bits(got, quant.quantize_nf4(values, **SMALL))


def test_leaves_may_be_those_of_files(tmp_path):
    values = np.asarray(draw(8, 16))
    save_file({"w": values}, tmp_path / "w.safetensors")
    values.tofile(tmp_path / "w.bin")
    with safe_open(tmp_path / "w.safetensors", "numpy") as file:
        params = {
            "slice": file.get_slice("w"),
            "mapped": np.memmap(tmp_path / "w.bin", "float32", "r", shape=(8, 16)),
        }
        got = quantize_params(params, "*", **SMALL)
    for leaf in got.values():
        assert_same_bits(leaf, quant.quantize_nf4(values, **SMALL))


def test_nothing_is_donated_if_a_slice_of_a_file_does_not_fit(tmp_path):
    save_file({"w": np.arange(4, dtype="int32")}, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "numpy") as file:
        params = {"a": draw(8, 16), "b": file.get_slice("w")}
        with pytest.raises(TypeError, match="at 'b': weight must be floating"):
            quantize_params(params, "*", donate=True, **SMALL)
    assert not params["a"].is_deleted()


def test_abstract_leaves_give_abstract_ones():
    abstract = jax.eval_shape(lambda: make()["layers"])
    got = quantize_params(abstract, "kernel", batch_axes=1, **SMALL)["kernel"]
    want = quantize_params(make()["layers"], "kernel", batch_axes=1, **SMALL)["kernel"]
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(got))
    assert repr(got) == repr(want)
    same = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), got, want)
    assert all(jax.tree.leaves(same))


def test_under_jit():
    params = {"w": draw(3, 8, 16)}
    traces = []

    @jax.jit
    def store(params):
        traces.append(None)
        return quantize_params(params, "w", batch_axes=1, donate=True, **SMALL)

    got = [store(params), store(params)][1]
    assert len(traces) == 1
    assert_same_bits(got["w"], quant.quantize_nf4(params["w"], batch_axes=1, **SMALL))


# ---------------------------------------------------------------- what is in memory


def test_donated_leaves_are_deleted_one_after_the_other():
    params = {name: draw(8, 16, seed=i) for i, name in enumerate("abcd")}
    kept = params | {"bias": draw(16), "numpy": np.ones((4, 4), "float32")}
    seen = []

    def quantize(weight, batch_axes):
        seen.append([leaf.is_deleted() for leaf in params.values()])
        return quant.quantize_nf4(weight, **SMALL, batch_axes=batch_axes)

    got = quantize_params(kept, ["?", "numpy"], quantize, donate=True)
    gone = [[i < turn for i in range(4)] for turn in range(5)]
    assert seen == gone  # the last turn is that of the NumPy array
    assert all(leaf.is_deleted() for leaf in params.values())
    assert not kept["bias"].is_deleted()
    want = quant.quantize_nf4(draw(8, 16, seed=1), **SMALL)
    assert_same_bits(got["b"], want)


@pytest.mark.parametrize("format", ["nf4", toy_format.quantize])
def test_of_leaves_that_are_read_one_is_in_memory_at_a_time(format):
    read = []

    class Watched(Lazy):
        def __array__(self, dtype=None, copy=None):
            assert all(values() is None for values in read)
            values = np.full(self.shape, len(read) + 1.0, self.dtype)
            read.append(weakref.ref(values))
            return values

    params = {name: Watched(np.ones((128, 128), "float32")) for name in "abcd"}
    if callable(format):
        format = functools.partial(
            lambda quantize, weight, batch_axes: quantize(weight), format
        )
    got = quantize_params(params, "*", format)
    assert len(read) == 4
    means = [float(quant.dequantize(leaf).mean()) for leaf in got.values()]
    np.testing.assert_allclose(means, [1, 2, 3, 4], rtol=1e-2)


MEASURED = """
import resource, sys
import numpy as np
from lora_jax.model.quantize import quantize_params

data = np.memmap(sys.argv[1], "float32", "r", offset=8, shape=(12, 1024, 4096))
params = {str(i): leaf for i, leaf in enumerate(data)}
float(data.sum())  # pages of the file count too, so all of them are there before
quantize_params({"0": params["0"]}, "*")  # compiles
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stored = quantize_params(params, "*")
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(1024 * growth, sum(leaf.nbytes for leaf in stored.values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit there")
def test_the_peak_of_memory_is_that_of_the_result_and_a_leaf(tmp_path):
    leaf = 4 * 1024 * 4096
    with open(tmp_path / "weights", "wb") as file:
        file.truncate(8 + 12 * leaf)
    # Blocks that are freed go back at once, and are not kept for later.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    root = str(pathlib.Path(lora_jax.__file__).parent.parent)
    environment |= {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "weights")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    growth, stored = map(int, run.stdout.split())
    assert stored < 12 * leaf / 7
    assert growth < stored + 3 * leaf


# ------------------------------------------------------------------------- sharding


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("format", FORMATS)
def test_the_arrays_are_sharded_along_the_stack(format, kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    dense, (quantize, settings) = draw(4, 8, 16), FORMATS[format]
    sharded = jax.device_put(dense, NamedSharding(mesh, P("x", None, "y")))
    got = quantize_params({"w": sharded}, "w", format, batch_axes=1, **settings)["w"]
    want = quantize(dense, batch_axes=1, **settings)
    assert_same_bits(*(jax.tree.map(np.asarray, q.to_arrays()) for q in (got, want)))
    abstract = jax.ShapeDtypeStruct((4, 8, 16), "float32", sharding=sharded.sharding)
    shapes = quantize_params({"w": abstract}, "w", format, batch_axes=1, **settings)["w"]
    # Two shards of 8 outputs: one block of NF4 each. Scales of int8 are (4, 2, 16).
    own = {"codes": P("x", None, "y"), "scales": P("x", None, "y")}
    own |= {"scales": P("x", "y")} if format == "fp8" else {}
    for name, array in got.to_arrays().items():
        sharding = NamedSharding(mesh, own.get(name, P("x")))
        array, shape = getattr(got, name), getattr(shapes, name)
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
        assert shape.sharding == sharding


def test_all_axes_of_a_stack_keep_their_sharding_and_the_kind_of_memory():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    # Of several kinds, where this JAX has them, one that is not the default.
    kind = max(memory.kind for memory in jax.devices()[0].addressable_memories())
    sharding = NamedSharding(mesh, P("x", "y"), memory_kind=kind)
    leaf = jax.ShapeDtypeStruct((2, 4, 8, 16), "float32", sharding=sharding)
    got = quantize_params({"w": leaf}, "w", batch_axes=2, **SMALL)["w"]
    assert {array.sharding for array in jax.tree.leaves(got)} == {sharding}


@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_in_the_memory_of_the_host(format, kind):
    needs_host_memory()
    place = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    if kind is not None:
        mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)
        place = NamedSharding(mesh, P(None, "x", "y"), memory_kind="pinned_host")
    dense, (quantize, settings) = draw(3, 8, 16), FORMATS[format]
    store = functools.partial(quantize_params, batch_axes=1, **settings)
    got = store({"w": jax.device_put(dense, place)}, "w", format)["w"]
    assert {x.sharding.memory_kind for x in jax.tree.leaves(got)} == {"pinned_host"}
    want = quantize(dense, batch_axes=1, **settings)
    assert_same_bits(*(jax.tree.map(np.asarray, q.to_arrays()) for q in (got, want)))


def test_a_mesh_with_explicit_axes_under_jit():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    sharded = jax.device_put(draw(4, 8, 16), NamedSharding(mesh, P("x", "y")))
    store = functools.partial(quantize_params, patterns="w", batch_axes=1, **SMALL)
    got = jax.jit(store)({"w": sharded})["w"]
    want = quant.quantize_nf4(draw(4, 8, 16), batch_axes=1, **SMALL)
    assert {jax.typeof(x).sharding.spec[0] for x in jax.tree.leaves(got)} == {"x"}
    assert_same_bits(jax.device_get(got), jax.device_get(want))
    broken = jax.device_put(draw(4, 8, 16).at[0, 0, 0].set(jnp.nan), sharded.sharding)
    with pytest.raises(ValueError, match=r"at 'w': 1 of the 512 .* infinite or NaN"):
        store({"w": broken})


def test_automatic_axes_under_jit_need_what_abstract_leaves_get():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    place = NamedSharding(mesh, P("x", "y"))
    store = functools.partial(quantize_params, patterns="w", **SMALL)
    shapes = store({"w": jax.ShapeDtypeStruct((8, 32), "float32", sharding=place)})
    store = functools.partial(store, row_axes=shapes["w"].row_axes)
    places = jax.tree.map(lambda x: x.sharding, shapes)
    got = jax.jit(store, out_shardings=places)({"w": jax.device_put(draw(8, 32), place)})
    assert_same_bits(jax.device_get(got), jax.device_get(store({"w": draw(8, 32)})))
    assert got["w"].codes.sharding.is_equivalent_to(place, 2)
    assert got["w"].scales.sharding.is_equivalent_to(place, 2)


def test_a_sharding_that_does_not_divide():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    place = NamedSharding(mesh, P(None, ("x", "y")))
    leaf = jax.ShapeDtypeStruct((8, 36), "float32", sharding=place)
    for format in FORMATS:
        with pytest.raises(
            ValueError, match=r"at 'w': .* axis 1 .*36, into 8 parts, which"
        ):
            quantize_params({"w": leaf}, "w", format)


# --------------------------------------------------------------------------- errors


def test_patterns_that_cannot_be():
    params = make()
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(2, targets="up/kernel"), params)
    with pytest.raises(ValueError, match=r"matches no leaf: '\*/kernal'.*'up/k"):
        quantize_params(params, ["*/bias", "*/kernal"])
    for wrong in (None, 5, params):  # the last if arguments change places
        with pytest.raises(TypeError, match="patterns must be a pattern or a tuple of"):
            quantize_params(params, wrong)
    with pytest.raises(ValueError, match="patterns is empty"):
        quantize_params(params, [])
    with pytest.raises(TypeError, match="a pattern in patterns must be a string"):
        quantize_params(params, [3])
    with pytest.raises(ValueError, match=r"'all-linear' needs a function .*give the plan"):
        quantize_params(params, "all-linear")
    with pytest.raises(ValueError, match="batch_axes matches no weight to quantize: 'lay"):
        quantize_params(params, "up/kernel", "int8", batch_axes={"lay*": 1})
    with pytest.raises(ValueError, match="patterns is a plan already"):
        quantize_params(params, plan, plan=plan)
    with pytest.raises(TypeError, match="plan must be an AdapterPlan"):
        quantize_params(params, "*/kernel", plan={})
    with pytest.raises(KeyError, match="params lack weights that the plan adapts"):
        quantize_params({"down": draw(4, 4)}, plan)


def test_formats_that_cannot_be():
    params = make()
    with pytest.raises(
        ValueError, match=r"format must be one of .*got 'nf5'. Did you mean"
    ):
        quantize_params(params, "*/kernel", "nf5")
    with pytest.raises(TypeError, match="'int8' has the settings block_size, got codec"):
        quantize_params(params, "*/kernel", "int8", codec="torchao")
    with pytest.raises(TypeError, match="'fp8' has the settings none, got block_size"):
        quantize_params(params, "*/kernel", "fp8", block_size=8)
    with pytest.raises(
        TypeError, match=r"or a function \(weight, batch_axes\), got 8 \(int"
    ):
        quantize_params(params, "*/kernel", 8)
    with pytest.raises(TypeError, match=r"settings are only for .*with functools\.partial"):
        quantize_params(params, "*/kernel", quant.quantize_int8, block_size=8)
    with pytest.raises(TypeError, match="donate must be True or False"):
        quantize_params(params, "*/kernel", donate=1)
    with pytest.raises(TypeError, match=r"at 'up/kernel': .*a QuantizedTensor, got Array"):
        quantize_params(params, "up/kernel", lambda weight, batch_axes: weight)
    with pytest.raises(ValueError, match=r"have the shape \(12, 8\) .*got \(8, 12\)"):
        quantize_params(
            params, "up/kernel", lambda weight, batch_axes: quant.quantize_int8(weight.T)
        )
    with pytest.raises(ValueError, match=r"the dtype float32 of .* got .* and bfloat16"):
        quantize_params(
            params,
            "up/kernel",
            lambda weight, batch_axes: quant.quantize_int8(weight.astype("bfloat16")),
        )


def test_leaves_that_cannot_be_quantized():
    params = make()
    end = "To skip this weight, narrow the patterns"
    with pytest.raises(ValueError, match=f"at 'up/bias': int8 has a scale for .*{end}"):
        quantize_params(params, "up/*", "int8")
    with pytest.raises(ValueError, match=r"at 'up/kernel': row_axes must be 0, or leave"):
        quantize_params(params, "up/kernel", row_axes=1)
    with pytest.raises(TypeError, match=f"at 'name': .* an array, got str.*{end}"):
        quantize_params(params, "name")
    with pytest.raises(
        TypeError, match=f"at 'i': .*floating point, got dtype int32.*{end}"
    ):
        quantize_params({"i": jnp.ones((4, 4), "int32")}, "*", "int8")
    with pytest.raises(ValueError, match="at 'up/kernel': batch_axes must be at least 0"):
        quantize_params(params, "up/kernel", "int8", batch_axes=2)
    with pytest.raises(TypeError, match="at 'up/kernel': batch_axes must be an integer"):
        quantize_params(params, "up/kernel", "int8", batch_axes={"up/*": 1.0})
    stored = quantize_params(params, "up/kernel", "int8")
    with pytest.raises(
        TypeError, match=r"at 'up/kernel': .* quantized already: Int8Tensor"
    ):
        quantize_params(stored, "*/kernel", toy_format.quantize)
    with pytest.raises(ValueError, match=r"at 'w': 1 of the 16 entries .* infinite or NaN"):
        quantize_params({"w": jnp.ones((4, 4)).at[0, 0].set(jnp.inf)}, "w", "int8")


def test_errors_of_a_function_have_the_path():
    def quantize(weight, batch_axes):
        return np.asarray(weight)

    store = functools.partial(quantize_params, patterns="w", format=quantize)
    with pytest.raises(TypeError, match=r"at 'w': The numpy.ndarray conversion method"):
        jax.jit(store)({"w": draw(4, 4)})


def test_nothing_is_donated_before_the_checks():
    weight = draw(8, 16)
    with pytest.raises(ValueError, match="at 'odd': weight has no entries to quantize"):
        quantize_params({"a": weight, "odd": draw(3, 0)}, "*", donate=True, **SMALL)
    with pytest.raises(ValueError, match=r"array at 'a' is also at 'b', .*donate=False"):
        quantize_params({"a": weight, "b": weight}, "a", donate=True, **SMALL)
    assert not weight.is_deleted()
    weight.delete()
    with pytest.raises(ValueError, match="at 'a': the weight has been deleted or donated"):
        quantize_params({"a": weight}, "a", **SMALL)
