"""Arrays written one after the other are those that safetensors reads, and the reverse."""

import json
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lora_jax._io import tensor_files, tensor_streams

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "uint8")
SHAPES = ((3, 4), (), (0, 5), (7,), (2, 1, 3))


def make(names=DTYPES, shapes=SHAPES):
    rng = np.random.default_rng(0)
    return {
        f"{dtype} {shape}": np.asarray(rng.integers(0, 9, shape)).astype(jnp.dtype(dtype))
        for dtype in names
        for shape in shapes
    }


def abstract(tensors):
    return {name: tensor_files.abstract(t.shape, t.dtype) for name, t in tensors.items()}


def write(path, tensors, metadata=None, pieces=1):
    with tensor_streams.open_writer(path, abstract(tensors), metadata or {}) as writer:
        for name, tensor in tensors.items():
            for piece in np.array_split(tensor.reshape(-1), pieces):
                writer.write(name, piece)


def assert_same(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("pieces", [1, 3])
def test_safetensors_reads_what_is_written(tmp_path, pieces):
    tensors = make()
    write(tmp_path / "a.safetensors", tensors, {"format": "pt"}, pieces)
    read = load_file(tmp_path / "a.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert_same(read[name], tensor)
    with safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_spans_are_where_safetensors_wrote(tmp_path):
    tensors = make()
    save_file(tensors, tmp_path / "a.safetensors")
    file = tensor_files.TensorFile(tmp_path / "a.safetensors")
    spans = tensor_streams.find_spans(file)
    assert list(spans.values()) == sorted(spans.values(), key=lambda span: span.start)
    for name, tensor in tensors.items():
        assert_same(spans[name].read(), tensor)
        assert spans[name].nbytes == tensor.nbytes
        if tensor.size > 1:
            assert_same(spans[name].read_rows(1, 2), tensor[1:2])


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["float32", "bfloat16", "int16", "bool"]),
            st.lists(st.integers(0, 4), max_size=3).map(tuple),
        ),
        max_size=6,
    )
)
def test_any_order_of_any_shapes_comes_back(tmp_path_factory, kinds):
    path = tmp_path_factory.mktemp("stream") / "a.safetensors"
    tensors = {
        f"{i}\n\u00e9": np.ones(shape, jnp.dtype(dtype))
        for i, (dtype, shape) in enumerate(kinds)
    }
    write(path, tensors)
    assert path.stat().st_size >= sum(tensor.nbytes for tensor in tensors.values())
    spans = tensor_streams.find_spans(tensor_files.TensorFile(path))
    for name, tensor in tensors.items():
        assert_same(spans[name].read(), tensor)


def test_the_order_is_that_of_the_entries(tmp_path):
    tensors = {name: np.full(2, i, "float32") for i, name in enumerate("cab")}
    write(tmp_path / "a.safetensors", tensors)
    spans = tensor_streams.find_spans(tensor_files.TensorFile(tmp_path / "a.safetensors"))
    assert list(spans) == ["c", "a", "b"]
    header = tensor_streams.make_header(abstract(tensors), {})
    assert len(header) % 8 == 0
    assert list(json.loads(header[8:])) == ["c", "a", "b"]


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    entries = {"a": tensor_files.abstract((4,), "float32")}
    with (
        pytest.raises(ValueError, match="'a' lacks 16 bytes"),
        tensor_streams.open_writer(path, entries, {}),
    ):
        pass
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("sizes", "start", "excess"), [((4,), None, 8), ((1, 2), None, 4), ((2,), 1, 4)]
)
def test_too_many_values_are_refused(tmp_path, sizes, start, excess):
    entries = {name: tensor_files.abstract((2,), "float32") for name in "ab"}
    *first, last = (np.zeros(size, "float32") for size in sizes)
    with (tmp_path / "x").open("wb") as file:
        writer = tensor_streams.TensorWriter(file, entries, {})
        for values in first:
            writer.write("a", values)
        with pytest.raises(ValueError, match=f"'a' got {excess} bytes too many"):
            writer.write("a", last, start)


def test_pieces_come_in_any_order_from_any_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_streams, "_UNWRITTEN", 100)
    monkeypatch.setattr(tensor_streams, "_CHUNK", 48)
    tensors, old = make(shapes=((50, 6), (7, 3), ())), tmp_path / "old.safetensors"
    save_file(tensors, old)
    file = tensor_files.TensorFile(old)
    spans = tensor_streams.find_spans(file)
    data = old.read_bytes()
    old.unlink()  # the values are those of the open file

    def write(piece):
        name, start = piece
        stop = min(start + 11, spans[name].size)
        if spans[name].dtype == "int64":  # those are copied
            writer.copy_from(name, spans[name], 8 * start, 8 * stop)
        else:
            writer.write(name, spans[name].read_flat(start, stop), start)

    new = tmp_path / "new.safetensors"
    pieces = [(name, i) for name in spans for i in range(0, spans[name].size, 11)]
    with (
        tensor_streams.open_writer(new, abstract(tensors), {}) as writer,
        ThreadPoolExecutor(3) as pool,
    ):
        list(pool.map(write, reversed(pieces)))
    read = load_file(new)
    for name, tensor in tensors.items():
        assert_same(read[name], tensor)
    with tensor_streams.open_copy(tmp_path / "copy") as writer:
        for start in range(0, file.size, 1000):
            writer.copy(file, start, min(start + 1000, file.size), start)
    assert (tmp_path / "copy").read_bytes() == data


def test_a_dtype_that_safetensors_lacks_is_refused():
    entries = {"a": tensor_files.abstract((2,), ml_dtypes.int4)}
    with pytest.raises(TypeError, match="'a' is int4, which safetensors does not have"):
        tensor_streams.make_header(entries, {})


def test_an_array_is_not_named_as_the_metadata():
    entries = {"__metadata__": tensor_files.abstract((2,), "float32")}
    with pytest.raises(ValueError, match="no array of the name '__metadata__': rename it"):
        tensor_streams.make_header(entries, {"a": "b"})


def test_a_file_that_got_shorter_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": np.zeros(8, "float32")}, path)
    span = tensor_streams.find_spans(tensor_files.TensorFile(path))["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(tensor_files.CheckpointError, match="ends too early"):
        span.read()


def test_copies_are_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_streams, "_CHUNK", 300)
    data = np.random.default_rng(0).bytes(1000)
    (tmp_path / "old").write_bytes(data)
    tensor_streams.copy_file(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == data


def test_a_span_is_an_array_to_numpy(tmp_path):
    path, tensors = tmp_path / "a.safetensors", make()
    save_file(tensors, path)
    spans = tensor_streams.find_spans(tensor_files.TensorFile(path))
    for name, tensor in tensors.items():
        assert_same(np.asarray(spans[name]), tensor)
