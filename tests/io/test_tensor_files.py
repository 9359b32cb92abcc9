"""Files of arrays and settings: whole or not there, read or refused."""

import json
import random
import struct
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax._io import tensor_files, tensor_streams
from lora_jax._io.tensor_files import CheckpointError, TensorFile
from tests.support import x64

DTYPES = sorted(tensor_files.DTYPES.values())
HEADERS = {
    "an array": b"[]",
    "no JSON": b"{x}",
    "no text": b"\xff\xfe{}",
    "no dtype": b'{"a":{"shape":[1],"data_offsets":[0,4]}}',
    "an unknown dtype": b'{"a":{"dtype":"F5","shape":[1],"data_offsets":[0,4]}}',
    "another size": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
    "offsets beyond the end": b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}',
    "a negative shape": b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    "an overflow": b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],'
    b'"data_offsets":[0,4]}}',
    "metadata of numbers": b'{"__metadata__":{"a":1}}',
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "arrays.safetensors"


def some(dtype, *shape):
    bits = np.random.default_rng(0).integers(0, 256, (*shape, jnp.dtype(dtype).itemsize))
    if dtype == "bool":
        bits %= 2
    return bits.astype(np.uint8).view(dtype).reshape(shape)


def with_header(header, data=b"\0\0\x80\x3f"):
    return struct.pack("<Q", len(header)) + header + data


# ---------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_comes_back(path, dtype):
    arrays = {"a": some(dtype, 5, 3), "b/c:A": some(dtype, 2), "empty": some(dtype, 0, 4)}
    arrays["scalar"] = some(dtype, 1).reshape(())
    tensor_streams.write_tensors(path, arrays, {"who": "a test"})
    file = TensorFile(path)
    assert file.metadata == {"who": "a test"}
    assert set(file) == set(arrays)
    for name, array in arrays.items():
        assert (file[name].shape, file[name].dtype) == (array.shape, array.dtype)
        read = file.read(name)
        assert (read.shape, read.dtype) == (array.shape, array.dtype)
        assert read.tobytes() == array.tobytes()


def test_bytes_are_those_of_the_file(path):
    arrays = {"b": some("float32", 3, 2), "a": some("bfloat16", 7)}
    tensor_streams.write_tensors(path, arrays, {"who": "a test"})
    assert safetensors.numpy.save(arrays, {"who": "a test"}) == path.read_bytes()


def test_values_outlive_the_file(path):
    array = some("uint32", 1000)
    tensor_streams.write_tensors(path, {"a": array}, {})
    read = TensorFile(path).read("a")
    path.write_bytes(b"\0" * path.stat().st_size)
    np.testing.assert_array_equal(read, array)


def test_values_are_those_of_the_file_that_was_opened(path):
    arrays = {name: some("float32", 3, 2) for name in "ab"}
    tensor_streams.write_tensors(path, arrays, {"who": "old"})
    file = TensorFile(path)
    tensor_streams.write_tensors(path, {"a": some("int8", 99_999)}, {"who": "new"})
    other = TensorFile(path)
    assert (file.metadata, other.metadata) == ({"who": "old"}, {"who": "new"})
    assert file.is_same(file)
    assert not file.is_same(other)
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.read(name), array)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends too early"):
        other.read("a")


def test_a_file_that_is_replaced_while_it_is_opened(path, monkeypatch):
    import safetensors

    for value in (1.0, 2.0):
        tensor_streams.write_tensors(path, {"a": np.full(3, value, "float32")}, {})
        path = path.rename(path.with_name(f"{value}")) and path
    old, new = path.with_name("1.0"), path.with_name("2.0")
    old.rename(path)
    real = safetensors.safe_open

    def replaced(*args, **options):
        if new.exists():
            new.rename(path)
        return real(*args, **options)

    monkeypatch.setattr(safetensors, "safe_open", replaced)
    np.testing.assert_array_equal(TensorFile(path).read("a"), np.full(3, 2.0))


@pytest.mark.parametrize("kind", HEADERS)
def test_bad_headers(path, kind):
    path.write_bytes(with_header(HEADERS[kind]))
    with pytest.raises(
        CheckpointError, match=r"arrays\.safetensors cannot be read as safe"
    ):
        TensorFile(path)


def test_a_dtype_that_is_not_read(path):
    header = b'{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'
    path.write_bytes(with_header(header))
    with pytest.raises(CheckpointError, match="entry 'a' has the dtype F8_E4M3, and only"):
        TensorFile(path)


def test_damaged_files_are_read_or_refused(path):
    rng = random.Random(0)
    arrays = {"a:A": some("float32", 2, 3), "a:B": some("bfloat16", 3, 2)}
    whole = safetensors.numpy.save(arrays, {"who": "a test"})
    refused = 0
    for i in range(400):
        data = bytearray(whole)
        if i % 4 == 0:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(len(data) - 36)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            file = TensorFile(path)
            assert all(file.read(name).shape == file[name].shape for name in file)
        except CheckpointError:
            refused += 1
    assert refused > 200


def test_missing_files_are_missed_by_name(tmp_path):
    (tmp_path / "other.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.json; .* has other\.txt\."):
        tensor_files.read_json(tmp_path / "a.json")
    with pytest.raises(
        FileNotFoundError, match=r"no directory .*gone to read a\.safetensors"
    ):
        TensorFile(tmp_path / "gone" / "a.safetensors")


def test_without_the_package(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lora_jax\[checkpoints\]"'):
        tensor_streams.write_tensors(path, {}, {})
    assert not path.exists()


# ---------------------------------------------------------------------------- JAX


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32"])
def test_to_jax_keeps_bits(path, dtype):
    array = some(dtype, 4, 3)
    got = tensor_files.to_jax(path, "a", array)
    assert isinstance(got, jax.Array)
    assert np.asarray(got).tobytes() == array.tobytes()


def test_to_jax_does_not_narrow(path):
    with pytest.raises(CheckpointError, match="'a' is float64, which JAX would narrow to"):
        tensor_files.to_jax(path, "a", np.ones(3))
    with x64():
        assert tensor_files.to_jax(path, "a", np.ones(3)).dtype == "float64"


def test_to_numpy_makes_arrays_contiguous_and_whole():
    array = np.arange(24, dtype=ml_dtypes.bfloat16).reshape(4, 6)
    assert tensor_files.to_numpy("a", array.T).flags.c_contiguous
    assert tensor_files.to_numpy("a", np.float32(3)).shape == ()
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("x",)), P("x"))
    got = tensor_files.to_numpy("a", jax.device_put(array, sharding))
    np.testing.assert_array_equal(got, array)


def test_arrays_of_the_other_byte_order(path):
    tensor_streams.write_tensors(
        path, {"a": tensor_files.to_numpy("a", np.arange(3.0, dtype=">f4"))}, {}
    )
    np.testing.assert_array_equal(TensorFile(path).read("a"), np.arange(3, dtype="f4"))


def test_what_has_no_values_is_not_written():
    with pytest.raises(TypeError, match=r"q:A has no values .* a ShapeDtypeStruct: save"):
        tensor_files.to_numpy("q:A", jax.ShapeDtypeStruct((3,), "float32"))
    with pytest.raises(
        TypeError, match=r"q:A has no values to write, .*Tracer: save outside"
    ):
        jax.jit(lambda x: tensor_files.to_numpy("q:A", x))(jnp.ones(3))


@pytest.mark.parametrize("dtype", ["complex64", "float8_e5m2"])
def test_dtypes_that_are_not_written(dtype):
    dtype = np.dtype(getattr(np, dtype, None) or getattr(ml_dtypes, dtype))
    with pytest.raises(TypeError, match=r"a is (float|complex).* written: cast it"):
        tensor_files.to_numpy("a", np.ones(3, dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_casts_that_hold_the_values(dtype):
    array = np.array([1 / 3, -65504, 6e-8, 0, np.inf, -np.inf, np.nan])
    got = tensor_files.cast("a", array, dtype)
    assert (got.dtype, got.tobytes()) == (dtype, array.astype(dtype).tobytes())
    assert tensor_files.cast("a", array, None) is array
    numbers = np.arange(5)
    assert tensor_files.cast("a", numbers, dtype) is numbers


@pytest.mark.parametrize(
    ("value", "stored", "dtype", "message"),
    [
        (65520.0, "float32", "float16", r"a has values up to 6.55e\+04, and float16 holds"),
        (
            -7e4,
            "bfloat16",
            "float16",
            r"values up to 7.01e\+04, and float16 holds none above",
        ),
        (
            3.4e38,
            "float32",
            "bfloat16",
            r"3.4e\+38, and bfloat16 holds none above 3.39e\+38",
        ),
        (1e39, "float64", "float32", r"values up to 1e\+39, and float32 holds none above"),
        (1e-9, "float32", "float16", "values up to 1e-09, which are all 0 in float16"),
        (-1e-60, "float64", "bfloat16", "values up to 1e-60, which are all 0 in bfloat16"),
    ],
)
def test_casts_that_do_not(value, stored, dtype, message):
    array = np.array([0, value, 0]).astype(stored)
    with pytest.raises(ValueError, match=message):
        tensor_files.cast("a", array, dtype)
    array = np.array([np.nan, value, np.inf]).astype(stored)
    if abs(value) > 1:
        with pytest.raises(ValueError, match="choose a wider dtype"):
            tensor_files.cast("a", array, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "int8"])
def test_widened_arrays(dtype):
    array = some(dtype, 4, 3)
    wide = tensor_files.widen(array)
    assert wide.dtype == (dtype if dtype not in ("bfloat16", "float16") else "float32")
    np.testing.assert_array_equal(wide.astype(dtype), array)


# ---------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b'{"a": NaN}', "cannot be read as JSON: NaN is no JSON"),
        (b'{"a": -Infinity}', "cannot be read as JSON: -Infinity is no JSON"),
        (b"\xff\xff{}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"1" * 10_000, "cannot be read as JSON|holds a int"),
        (b"[1]", "holds a list, no JSON object"),
        (b'{"a": 1e999}', "cannot be read as JSON: 1e999 is larger than any number"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', "JSON: the key 'b' comes twice"),
        (b'{"a": "\\ud800"}', "cannot be read as JSON"),
        (b'{"\\udc00": 1}', "cannot be read as JSON"),
        (b'{"a": "\xed\xa0\x80"}', "cannot be read as JSON"),
        ('{"a": 1}'.encode("utf-16"), "cannot be read as JSON"),
        (b'{"a": "\xe9"}', "cannot be read as JSON"),
        (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, "cannot be read as JSON"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "JSON: it is nested more than 100 deep"),
    ],
    ids=[
        *("empty", "nan", "infinity", "bytes", "deep", "long", "list", "huge", "twice"),
        *("half", "half_key", "half_bytes", "utf16", "latin1", "deep_objects", "deeper"),
    ],
)
def test_bad_settings(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        tensor_files.read_json(path)


def test_settings_come_back(tmp_path):
    path = tmp_path / "a.json"
    value = {"Größe": [1, 2.5, None, True], "nested": {"a": "日本"}}
    for text in (json.dumps(value, ensure_ascii=False), json.dumps(value | {"b": "😀"})):
        path.write_text(text, encoding="utf-8")
        assert tensor_files.read_json(path) == json.loads(text)
    path.write_bytes(b"\xef\xbb\xbf{}")  # as some editors begin
    assert tensor_files.read_json(path) == {}


def test_what_is_too_large_for_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_LARGEST_JSON", 4)
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(CheckpointError, match="has 8 bytes, and settings have at most 4"):
        tensor_files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "error", [KeyError("no x"), TypeError("no x"), OverflowError("no x"), AttributeError()]
)
def test_errors_of_checks_become_those_of_the_file(path, error):
    def read():
        raise error

    with pytest.raises(
        CheckpointError, match=r"arrays\.safetensors: (no x|AttributeError)"
    ):
        tensor_files.checked(path, read)
