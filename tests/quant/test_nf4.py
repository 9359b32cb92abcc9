"""NF4: its codes and errors against NumPy, its sizes, and weights of odd kinds."""

import dataclasses
import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import quant
from lora_jax._core import placement
from lora_jax.quant import _bitsandbytes, _torchao
from tests.quant.support import in_blocks, nibbles
from tests.support import asarray, assert_same_bits, draw, x64

DTYPES = ("float32", "bfloat16", "float16")
CODECS = ("torchao", "bitsandbytes")


def torchao_codes(weight, block):
    """Codes of torchao, rounded to the dtype of the weight by NumPy after each step."""
    blocks = np.asarray(weight).reshape(-1, block)
    ratio = blocks / np.abs(blocks).max(1, keepdims=True)
    table = _torchao.table(weight.dtype.name).astype(blocks.dtype)
    return np.abs(ratio.reshape(-1, 1) - table[None]).argmin(1)


def torchao_scales(weight, block, group):
    """Nested scales of torchao in the same way, and what they come back as."""
    kind = np.asarray(weight).dtype.type
    absmax = np.abs(np.asarray(weight).reshape(-1, block)).max(1)
    mean = kind(absmax.astype(np.float64).mean())
    rest = (absmax - mean).reshape(-1, group)
    factor = kind(256) / (kind(2) * np.abs(rest).max(1, keepdims=True))
    codes = np.clip(np.round((rest * factor).astype(np.float32)), -128, 127)
    return codes.reshape(-1), (codes.astype(kind) / factor + mean).reshape(-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torchao_rounds_after_every_operation(dtype):
    weight = draw(64, 96, dtype=dtype, seed=3)
    q = quant.quantize_nf4(weight, 8, 16)
    np.testing.assert_array_equal(nibbles(q.codes, q.size), torchao_codes(weight, 8))
    codes, scales = torchao_scales(weight, 8, 16)
    np.testing.assert_array_equal(q.scales, codes)
    table = _torchao.table(dtype).astype(jnp.dtype(dtype))
    values = table[nibbles(q.codes, q.size)].reshape(-1, 8) * scales[:, None]
    got = np.asarray(quant.dequantize(q)).reshape(-1, 8)
    if dtype == "float32":  # the mean may differ in its last bit
        np.testing.assert_allclose(got, values, rtol=1e-6, atol=1e-6)
    else:
        np.testing.assert_array_equal(got, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_rounds_in_float32(dtype):
    weight = draw(64, 96, dtype=dtype, seed=4)
    q = quant.quantize_nf4(weight, 32, None, codec="bitsandbytes")
    blocks = np.asarray(weight, np.float32).reshape(-1, 32)
    absmax = np.abs(blocks).max(1)
    ratio = (blocks * (np.float32(1) / absmax)[:, None]).reshape(-1, 1)
    table = _bitsandbytes.table(dtype)
    codes = np.abs(ratio - table[None]).argmin(1)
    np.testing.assert_array_equal(nibbles(q.codes, q.size), codes)
    want = (table[codes].reshape(-1, 32) * absmax[:, None]).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(quant.dequantize(q)).reshape(-1, 32), want)


def error_bound(weight, q):
    """The bound of the docstring, for each entry, in float64."""
    unit = float(jnp.finfo(q.dtype).eps) / 2
    absmax = np.abs(in_blocks(weight, q.block_size)).max(1)
    bound = (0.1520 + 3 * unit) * absmax
    if q.scaler_block_size is not None:
        rest = in_blocks(np.abs(absmax - absmax.mean()), q.scaler_block_size)
        peak = np.repeat(rest.max(1), q.scaler_block_size)[: absmax.size]
        step = np.maximum(peak / 128, 2.0**-17 * (q.dtype == jnp.float16))
        step = 0.0071 * peak if q.codec == "bitsandbytes" else step
        bound = bound + step + 5 * unit * absmax.max() * (1 + 3 * unit)
    return np.repeat(bound, q.block_size)[: q.size].reshape(q.shape)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    codec=st.sampled_from(CODECS),
    nested=st.sampled_from([4, None]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    exponent=st.integers(-12, 12),
    kind=st.sampled_from(["normal", "heavy", "uneven", "sparse"]),
    seed=st.integers(0, 1000),
)
def test_the_error_is_bounded(codec, nested, dtype, exponent, kind, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(16, 24))
    if kind == "heavy":
        values = rng.standard_t(2, (16, 24)).clip(-1000, 1000)
    elif kind == "uneven":
        values *= np.exp2(rng.integers(-10, 1, (16, 1)))
    elif kind == "sparse":
        values *= rng.uniform(size=(16, 24)) < 0.1
    weight = asarray((values * 2.0**exponent).astype(np.float32), dtype)
    q = quant.quantize_nf4(weight, 16, nested, codec=codec)
    error = np.abs(np.asarray(quant.dequantize(q), np.float64) - np.asarray(weight, float))
    assert np.all(error <= error_bound(weight, q))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("codec", CODECS)
def test_plain_scales_make_a_fixed_point(codec, dtype):
    q = quant.quantize_nf4(draw(16, 24, dtype=dtype), 16, None, codec=codec)
    again = quant.quantize_nf4(quant.dequantize(q), 16, None, codec=codec)
    assert_same_bits(again, q)


@pytest.mark.parametrize("codec", CODECS)
def test_nested_scales_move_but_the_codes_stay(codec):
    # The scales of the second round have a mean and largest differences of their own.
    q = quant.quantize_nf4(draw(16, 24), 16, 4, codec=codec)
    again = quant.quantize_nf4(quant.dequantize(q), 16, 4, codec=codec)
    assert_same_bits(again.codes, q.codes)
    assert np.any(np.asarray(again.mean) != np.asarray(q.mean))
    spread = np.abs(np.asarray(quant.dequantize(again) - quant.dequantize(q)))
    assert 0 < spread.max() < 0.05


def test_bytes():
    weight = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
    for codec, extra in (("torchao", 2), ("bitsandbytes", 4)):
        q = jax.eval_shape(lambda w, c=codec: quant.quantize_nf4(w, codec=c), weight)
        n = 1024 * 512
        assert q.nbytes == n // 2 + n // 64 + extra * (n // 64 // 256) + extra
        assert q.nbytes / q.size == pytest.approx(0.5159, abs=1e-3)
        assert (q.shape, q.dtype, q.ndim) == ((1024, 512), jnp.bfloat16, 2)


# ------------------------------------------------------------------------- odd weights


@pytest.mark.parametrize("nested", [4, None])
@pytest.mark.parametrize("codec", CODECS)
def test_blocks_of_zeros_come_back_as_zeros(codec, nested):
    weight = np.array(draw(16, 24))
    weight.reshape(-1, 16)[3:7] = 0
    for values in (weight, np.zeros_like(weight), np.full_like(weight, 1e-42)):
        q = quant.quantize_nf4(values, 16, nested, codec=codec)
        got = np.asarray(quant.dequantize(q)).reshape(-1, 16)
        assert np.all(got[3:7] == 0)
        assert np.all(np.isfinite(got))


@pytest.mark.parametrize("value", [-2.5, 1e-30, 3e38])
@pytest.mark.parametrize("nested", [4, None])
@pytest.mark.parametrize("codec", CODECS)
def test_a_constant_weight_is_exact(codec, nested, value):
    weight = np.full((16, 24), value, np.float32)
    got = quant.dequantize(quant.quantize_nf4(weight, 16, nested, codec=codec))
    np.testing.assert_allclose(got, weight, rtol=3e-7)


@pytest.mark.parametrize("size", [1e-3, 3e-6, 1e3])
def test_float16_scales_whose_factor_would_overflow(size):
    weight = draw(16, 24, dtype="float16", size=size)
    q = quant.quantize_nf4(weight, 16, 4)
    assert np.all(np.isfinite(np.asarray(q.group_scales)))
    error = np.abs(np.asarray(quant.dequantize(q), float) - np.asarray(weight, float))
    assert np.all(error <= error_bound(weight, q))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("codec", CODECS)
def test_nested_scales_stay_in_the_range_of_the_weight(codec, dtype):
    values = np.random.default_rng(3).uniform(0.2, 1.0, (16, 24))
    values.reshape(-1, 16)[::3, 0] = 1.0  # the largest number of the dtype
    weight = asarray(values * float(jnp.finfo(dtype).max), dtype)
    q = quant.quantize_nf4(weight, 16, 4, codec=codec)
    error = np.abs(np.asarray(quant.dequantize(q), float) - np.asarray(weight, float))
    assert np.all(error <= error_bound(weight, q))


@pytest.mark.parametrize("shape", [(7,), (3, 5, 13), ()])
def test_ragged_weights_of_bitsandbytes(shape):
    weight = draw(*shape)
    q = quant.quantize_nf4(weight, 8, 2, codec="bitsandbytes")
    assert (q.shape, q.codes.shape) == (shape, (-(-weight.size // 2),))
    assert q.codes[-1] & 15 == 7  # the code of 0, after an odd number of entries
    got = np.asarray(quant.dequantize(q), np.float64)
    assert np.all(np.abs(got - np.asarray(weight, float)) <= error_bound(weight, q))
    last = np.asarray(weight).reshape(-1)[-(weight.size % 8) :]
    whole = quant.quantize_nf4(weight, 8, None, codec="bitsandbytes")
    assert whole.scales[-1] == np.abs(last).max()


@functools.partial(jax.jit, static_argnums=(1, 2))
def there_and_back(weight, nested, codec):
    return quant.dequantize(quant.quantize_nf4(weight, 16, nested, codec=codec))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("codec", CODECS)
def test_what_is_not_finite(codec, bad):
    weight = np.array(draw(16, 24))
    weight[2, 3] = weight[2, 5] = bad
    with pytest.raises(ValueError, match="2 of the 384 entries of weight are infinite or"):
        quant.quantize_nf4(weight, 16, 4, codec=codec)
    plain = np.asarray(there_and_back(weight, None, codec)).reshape(-1, 16)
    block = np.flatnonzero(~np.isfinite(weight.reshape(-1, 16)).all(1))
    assert np.isnan(plain).all(1).nonzero()[0].tolist() == block.tolist()
    assert np.isfinite(np.delete(plain, block, 0)).all()
    assert np.isnan(there_and_back(weight, 4, codec)).all()


def test_values_are_checked_while_another_function_is_traced():
    weight = np.full((4, 16), np.inf, np.float32)

    def traced(x):
        return x + jnp.sum(quant.dequantize(quant.quantize_nf4(weight, 16, None)))

    with pytest.raises(ValueError, match="64 of the 64 entries"):
        jax.jit(traced)(1.0)


@pytest.mark.parametrize(
    ("weight", "options", "error", "match"),
    [
        (np.ones((4, 8), np.int32), {}, TypeError, "weight must be floating point, got"),
        ([[1.0]], {}, TypeError, "weight must be an array, got list"),
        (np.ones((0, 4), np.float32), {}, ValueError, r"no entries .* shape is \(0, 4\)"),
        (np.ones((5, 7), np.float32), {"row_axes": 1}, ValueError, "has rows of 7 entri"),
        (
            np.ones((4, 64), np.float32),
            {"row_axes": 2},
            ValueError,
            "row_axes must be 0, or",
        ),
        (np.ones((4, 64), np.float32), {"row_axes": -1}, ValueError, "row_axes must be at"),
        (np.ones((4, 64), np.float32), {"row_axes": 0.5}, TypeError, "row_axes must be an"),
        (np.ones(64, np.float32), {"codec": "bnb"}, ValueError, "codec must be one of"),
        (np.ones(64, np.float32), {"block_size": 0}, ValueError, "block_size must be a po"),
        (np.ones(64, np.float32), {"block_size": 2**17}, ValueError, "too large for a we"),
        (np.ones(64, np.float32), {"block_size": 3}, ValueError, "block_size must be even"),
        (np.ones(64, np.float32), {"block_size": 2.0}, TypeError, "must be an integer, g"),
        (np.ones(64, np.float32), {"scaler_block_size": -1}, ValueError, "scaler_block_s"),
        (np.ones(64, np.float32), {"batch_axes": 1}, ValueError, "at least 0 and below 1"),
        (np.ones(64, np.float32), {"batch_axes": True}, TypeError, "batch_axes must be an"),
        (jax.ShapeDtypeStruct((4,), jnp.float32), {}, TypeError, "inside jax.eval_shape"),
        (jnp.ones((4, 4), jnp.float8_e4m3fn), {}, TypeError, "mean nothing without their"),
    ],
)
def test_weights_and_options_that_are_none(weight, options, error, match):
    with pytest.raises(error, match=match):
        quant.quantize_nf4(weight, **options)


def test_float64_is_refused():
    with x64(), pytest.raises(TypeError, match=r"got float64: .* \.astype\('float32'\)"):
        quant.quantize_nf4(jnp.ones((64, 256), jnp.float64))


def test_a_quantized_weight_is_not_quantized_again():
    q = quant.quantize_nf4(draw(4, 16), 16, None)
    with pytest.raises(TypeError, match=r"quantized already: NF4Tensor\(shape=\(4, 16\)"):
        quant.quantize_nf4(q)


# ------------------------------------------------------------------ sizes of any kind


@pytest.mark.parametrize("shape", [(1,), (5, 7), (64, 64), (48, 72), (257, 96)])
@pytest.mark.parametrize("options", [{}, {"scaler_block_size": None}], ids=["nested", ""])
@pytest.mark.parametrize("codec", CODECS)
def test_any_size_is_within_the_bound_with_the_default_settings(shape, options, codec):
    weight = draw(*shape, seed=5)
    q = quant.quantize_nf4(weight, codec=codec, **options)
    q.check()
    error = np.abs(np.float64(quant.dequantize(q)) - np.float64(weight)).ravel()
    assert np.all(error <= error_bound(weight, q).ravel()[: error.size])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shorter_group_has_the_bits_of_a_whole_one(dtype):
    # 6 blocks of 8 in groups of 4: torchao takes the first 4, or groups of 6 or 3.
    weight = draw(6, 8, dtype=dtype, seed=6)
    q = quant.quantize_nf4(weight, 8, 4)
    absmax = np.abs(np.asarray(weight)).max(1)
    kind = absmax.dtype.type
    mean = kind(absmax.astype(np.float64).mean())
    rest = absmax - mean
    factor = np.array(
        [kind(256) / (kind(2) * np.abs(rest[i : i + 4]).max()) for i in (0, 4)]
    )
    codes = np.round((rest * np.repeat(factor, 4)[:6]).astype(np.float32))
    np.testing.assert_array_equal(nibbles(q.codes, q.size), torchao_codes(weight, 8))
    np.testing.assert_array_equal(q.scales, np.clip(codes, -128, 127))
    np.testing.assert_array_equal(q.group_scales, factor.astype(kind))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("nested", [None, 4])
@pytest.mark.parametrize("row_axes", [1, 2])
def test_rows_are_the_same_numbers_in_the_same_order(codec, nested, row_axes):
    weight = draw(2, 3, 5, 48, seed=7)
    flat = quant.quantize_nf4(weight, 16, nested, codec=codec, batch_axes=1)
    rows = quant.quantize_nf4(
        weight, 16, nested, codec=codec, batch_axes=1, row_axes=row_axes
    )
    assert rows.codes.shape[: 1 + row_axes] == weight.shape[: 1 + row_axes]
    assert (rows.shape, rows.batch_ndim) == (flat.shape, flat.batch_ndim)
    rows.check()
    assert flat.to_arrays()["codes"] is flat.codes
    for name, array in flat.to_arrays().items():
        np.testing.assert_array_equal(getattr(rows, name).reshape(array.shape), array)
        np.testing.assert_array_equal(rows.to_arrays()[name], array)
    np.testing.assert_array_equal(quant.dequantize(rows), quant.dequantize(flat))
    assert rows.settings() == flat.settings()
    again = rows.quantize_like(weight)
    assert jax.tree.structure(again) == jax.tree.structure(rows)
    entry = jax.tree.map(lambda x: x[1], rows)
    np.testing.assert_array_equal(quant.dequantize(entry), quant.dequantize(flat)[1])


# ------------------------------------------------------------------ meshes


def on_mesh(shape, spec, kind, dtype="bfloat16"):
    """A weight on a mesh of 2 times 4 devices."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    return jax.device_put(draw(*shape, dtype=dtype, seed=8), NamedSharding(mesh, P(*spec)))


def bytes_on_one_device(tree):
    device = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for array in jax.tree.leaves(tree)
        for shard in array.addressable_shards
        if shard.device == device
    )


@pytest.mark.mostly_slow(8)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("nested", [None, 4])
@pytest.mark.parametrize(
    ("spec", "row_axes", "parts"),
    [
        ((None, ("x", "y"), None), 0, 8),
        ((None, None, ("x", "y")), 1, 8),
        ((None, "x", "y"), 1, 8),
        ((None, "y", None), 0, 4),
        (("x", None, "y"), 1, 8),
        ((None, None, None), 0, 1),
    ],
)
def test_a_sharded_weight_is_sharded_in_nf4(spec, row_axes, parts, nested, kind):
    weight = on_mesh((2, 32, 256), spec, kind)
    q = quant.quantize_nf4(weight, 16, nested, batch_axes=1)
    assert q.row_axes == row_axes
    alone = quant.quantize_nf4(np.asarray(weight), 16, nested, batch_axes=1)
    for name, array in alone.to_arrays().items():
        np.testing.assert_array_equal(q.to_arrays()[name], array)
    for name in ("codes", "scales"):
        share = bytes_on_one_device(getattr(q, name))
        assert share == getattr(q, name).nbytes // parts
    places = placement.shardings(q, weight.sharding)
    assert jax.tree.structure(places) == jax.tree.structure(q)
    dense = jax.jit(quant.dequantize)(q)
    np.testing.assert_array_equal(dense, quant.dequantize(alone))
    # Each device has what it needs, but for the scales of groups, which all of them have.
    if kind == AxisType.Auto:
        hlo = jax.jit(quant.dequantize).lower(q).compile().as_text()
        assert not re.search(r"all-gather|all-to-all|collective-permute|all-reduce", hlo)
        assert dense.sharding.is_equivalent_to(weight.sharding, 3)


def test_a_sharded_weight_is_never_whole_on_a_device():
    weight = on_mesh((64, 512), (None, ("x", "y")), AxisType.Auto, "float32")
    compiled = jax.jit(functools.partial(quant.quantize_nf4, row_axes=1)).lower(weight)
    memory = compiled.compile().memory_analysis()
    assert memory.temp_size_in_bytes < weight.nbytes / 2


@pytest.mark.parametrize(
    ("shape", "spec", "message"),
    [
        (
            (8, 288),  # runs of 72 too, but that is more than four times the size
            (None, "y"),
            r"along axis 1: its 4 shards have runs of 72 .*block_size=36",
        ),
        ((8, 20), (None, "y"), "runs of 5 entries.* No even block size divides it"),
        ((2, 24), ("x", None), r"along axis 0: its 2 shards .* of 24 .*block_size=24"),
    ],
)
def test_a_sharding_that_blocks_do_not_allow_is_reported(shape, spec, message, caplog):
    q = quant.quantize_nf4(on_mesh(shape, spec, AxisType.Auto), 16, None)
    assert q.codes.sharding.is_fully_replicated
    assert re.search(message, caplog.text)
    np.testing.assert_array_equal(
        quant.dequantize(q),
        quant.dequantize(
            quant.quantize_nf4(draw(*shape, dtype="bfloat16", seed=8), 16, None)
        ),
    )


# ------------------------------------------------------------------ arrays from a file

BROKEN = {
    "codes": (lambda q: {"codes": q.codes[:-1]}, "codes should be uint8"),
    "scales": (lambda q: {"scales": q.scales.astype(jnp.int32)}, "scales should be int8"),
    "no codes": (lambda q: {"codes": None}, "the array codes is missing"),
    "no mean": (lambda q: {"mean": None}, "the array mean is missing"),
    "group": (lambda q: {"group_scales": q.group_scales[:-1]}, "group_scales should be"),
    "shape": (lambda q: {"entry_shape": (16, -24)}, "entry_shape must be a positive"),
    "text": (lambda q: {"entry_shape": "ab"}, "entry_shape must be an integer"),
    "number": (lambda q: {"entry_shape": 7}, "not iterable"),
    "dtype": (lambda q: {"weight_dtype": "float64"}, "weight_dtype must be one of"),
    "codec": (lambda q: {"codec": []}, "codec must be one of"),
    "block": (lambda q: {"block_size": 2**16 + 2}, "too large for a weight of 384 entries"),
    "nested": (lambda q: {"scaler_block_size": 10**30}, "are too large for a weight"),
    "plain": (lambda q: {"scaler_block_size": None}, "scales should be float32"),
    "float": (lambda q: {"block_size": 1.5}, "block_size must be an integer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_finds_what_does_not_fit(name):
    q = quant.quantize_nf4(draw(16, 24), 16, 4)
    q.check()
    change, match = BROKEN[name]
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(q, **change(q)).check()


@pytest.mark.parametrize("name", ["group_scales", "mean"])
def test_plain_scales_have_nothing_of_nested_ones(name):
    plain, nested = (quant.quantize_nf4(draw(16, 24), 16, size) for size in (None, 4))
    plain.check()
    with pytest.raises(ValueError, match="group_scales and mean belong to nested scales"):
        dataclasses.replace(plain, **{name: getattr(nested, name)}).check()


def test_a_small_weight_may_have_a_block_of_64_ki():
    q = quant.quantize_nf4(draw(16, 24), 16, None)
    dataclasses.replace(q, block_size=2**16, scales=q.scales[:1]).check()
