"""GGUF: blocks dequantize to the bits of the package `gguf`, and files load as stored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import quant
from lora_jax._io.tensor_files import CheckpointError
from lora_jax.quant import _ggml
from tests.quant.support import GGUF_BLOCKS, gguf_blocks, gguf_tensor, write_gguf
from tests.support import asarray, assert_close, assert_same_bits, normal

each = pytest.mark.parametrize("name", _ggml.TYPES)


def assert_bits_but_nan(got, want):
    """The same bits, for NaN of any kind."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    assert_same_bits(np.where(nan, 0, got), np.where(nan, 0, want))


# --------------------------------------------------------------------------------- blocks


@each
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.usefixtures("optimized")
def test_values_have_the_bits_of_the_package(name, jit):
    stored, want = GGUF_BLOCKS[f"{name}/blocks"], GGUF_BLOCKS[f"{name}/values"]
    assert not np.isfinite(want).all()  # the scales have all that float16 has
    assert (want == 0).any()
    rows = quant.GGUFTensor(asarray(stored.reshape(2, -1)), name, "float32")
    got = (jax.jit if jit else lambda f: f)(quant.dequantize)(rows)
    assert_bits_but_nan(np.asarray(got), want.reshape(2, -1))


@each
def test_any_bytes_have_the_values_of_the_package(name):
    gguf = pytest.importorskip("gguf", reason="in the extra `gguf`")
    kind, stored = _ggml.TYPES[name], GGUF_BLOCKS[f"{name}/blocks"]
    ggml_type = gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[ggml_type] == (kind.entries, kind.n_bytes)
    new = np.random.default_rng(7).integers(0, 256, (500, kind.n_bytes), dtype=np.uint8)
    for some in (stored, new):
        with np.errstate(invalid="ignore"):
            want = gguf.dequantize(some, ggml_type)
        got = quant.dequantize(quant.GGUFTensor(asarray(some), name, "float32"))
        assert_bits_but_nan(np.asarray(got), want)


@pytest.mark.parametrize(
    ("settings", "array", "match"),
    [
        (
            {"ggml_type": "IQ2_XS"},
            np.zeros((2, 18), np.uint8),
            "ggml_type must be one of Q4",
        ),
        (
            {"ggml_type": ["Q4_0"]},
            np.zeros((2, 18), np.uint8),
            "ggml_type must be one of Q4",
        ),
        ({"weight_dtype": "int8"}, np.zeros((2, 18), np.uint8), "weight_dtype must be"),
        ({}, np.zeros((2, 20), np.uint8), "not rows of blocks of 18 bytes"),
        ({}, np.zeros((0, 18), np.uint8), "not rows of blocks of 18 bytes"),
        ({}, np.zeros((), np.uint8), "not rows of blocks of 18 bytes"),
        ({}, np.zeros((2, 18), np.int8), "should be uint8"),
    ],
)
def test_what_does_not_fit(settings, array, match):
    settings = {"ggml_type": "Q4_0", "weight_dtype": "float32"} | settings
    with pytest.raises(ValueError, match=match):
        quant.GGUFTensor.from_arrays({"blocks": array}, settings)


# --------------------------------------------------------------------------------- a model


def model(params, x):
    def layer(x, own):
        hidden = jnp.tanh(1e-3 * jnp.einsum("bi,oi->bo", x, own["up"]))
        return x + 0.1 * hidden @ own["down"].T, None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return 1e-3 * x @ params["embed"].T


def make_params():
    layers = {
        "up": gguf_tensor("Q4_K", 3, 64, 256),
        "down": gguf_tensor("Q8_0", 3, 256, 64),
    }
    return {"layers": layers, "embed": gguf_tensor("Q6_K", 32, 256, seed=1)}


def dense_of(params):
    return jax.tree.map(quant.dequantize, params, is_leaf=quant.is_quantized)


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_and_dora_on_a_model_of_gguf_weights(use_dora):
    params, x = make_params(), asarray(normal(5, 256), jnp.float32)
    config = lora_jax.LoraConfig(rank=2, use_dora=use_dora)
    plan = lora_jax.plan_adapters(config, params, model, x)
    assert set(plan.targets) == {"layers/up", "layers/down", "embed"}
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    if use_dora:
        norms = np.linalg.norm(dense_of(params)["layers"]["up"], axis=2)
        assert_close(adapters["layers/up"]["m"], norms, 16)
    adapters = jax.tree.map(lambda v: np.asarray(v) + np.float32(0.01), adapters)
    adapted = jax.jit(lora_jax.adapt(model, plan))
    loss = lambda adapters, params: jnp.sum(jnp.sin(adapted(params, adapters, x)))  # noqa: E731
    got = jax.jit(jax.value_and_grad(loss))(adapters, params)
    want = jax.jit(jax.value_and_grad(loss))(adapters, dense_of(params))
    for x_got, x_want in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(x_got, x_want, 256)
    merged = lora_jax.merge_adapters(params, adapters, plan)
    assert not any(
        map(quant.is_quantized, jax.tree.leaves(merged, is_leaf=quant.is_quantized))
    )
    assert_close(jax.jit(model)(merged, x), adapted(params, adapters, x), 256)
    with pytest.raises(ValueError, match=r"at .*Q\d_\w and .* are read and not written"):
        lora_jax.merge_adapters(params, adapters, plan, requantize=True)


rows = {  # products of a weight (out, in) with x (1, 1, in)
    "x @ w.T": lambda w, x: x @ w.T,
    "w @ x": lambda w, x: w @ x[0, 0],
    "einsum": lambda w, x: jnp.einsum("bti,oi->obt", x, w),
}


@pytest.mark.parametrize(
    ("name", "row", "n_blocks"),
    [
        *((name, "x @ w.T", 3) for name, kind in _ggml.TYPES.items() if kind.n_scales),
        *(("Q4_1", row, 3) for row in rows if row != "x @ w.T"),
        *(("Q5_0", "x @ w.T", n) for n in (67, 130)),  # several loops, of one and of more
    ],
)
def test_one_row_is_multiplied_without_a_dense_weight(name, row, n_blocks):
    n_in, n_out, product = 32 * n_blocks, 7, rows[row]
    weight, x = gguf_tensor(name, n_out, n_in), jnp.float32(normal(1, 1, n_in))
    f = lora_jax.accept_quantized(product)
    dense = np.float64(quant.dequantize(weight))
    compiled = jax.jit(f).lower(weight, x)
    assert_close(compiled.compile()(weight, x), product(dense, np.float64(x)), 64)
    assert f"tensor<{n_out}x{n_in}xf32>" not in compiled.as_text()
    slope = jax.jit(jax.grad(lambda x: jnp.sum(f(weight, x))))(x)
    assert_close(slope[0, 0], dense.sum(0), 64)


def test_a_row_times_itself():
    weight = gguf_tensor("Q4_1", 1, 96)
    dense = np.float64(quant.dequantize(weight))
    assert_close(lora_jax.accept_quantized(lambda w: w @ w.T)(weight), dense @ dense.T, 64)


ONE = (("Q4_1", 7, 96), (1, 96))


@pytest.mark.parametrize(
    ("product", "weight", "x", "dtype"),
    [
        (lambda w, x: x @ w.T, ("Q4_1", 7, 96), (2, 96), "float32"),  # two rows
        (lambda w, x: x @ w.T, ("Q4_K", 7, 256), (1, 256), "float32"),
        (lambda w, x: x @ w.T, *ONE, "bfloat16"),
        (lambda w, x: x @ w.T.astype("float16"), *ONE, "float16"),
        (lambda w, x: x @ (w + 0).T, *ONE, "float32"),
        (lambda w, x: x @ w, ("Q4_1", 7, 96), (1, 7), "float32"),  # the other axis
        (lambda w, x: jnp.outer(w[0], x), ("Q4_1", 7, 96), (7,), "float32"),
        (lambda w, x: jnp.einsum("oi,oi->", w, x), ("Q4_1", 7, 96), (7, 96), "float32"),
        (lambda w, x: jnp.einsum("oi,oi->o", w, x), ("Q4_1", 7, 96), (7, 96), "float32"),
        (lambda w, x: jnp.einsum("loi,i->lo", w, x), ("Q4_1", 2, 7, 96), (96,), "float32"),
        (lambda w, x: jnp.einsum("loi,o->li", w, x), ("Q4_1", 2, 7, 96), (7,), "float32"),
    ],
)
def test_other_products_are_of_the_dense_weight(product, weight, x, dtype):
    x = asarray(normal(*x), dtype)
    weight = gguf_tensor(*weight, dtype="float32" if dtype == "float16" else dtype)
    got = lora_jax.accept_quantized(product)(weight, x)
    assert_same_bits(got, product(quant.dequantize(weight), x))


# ----------------------------------------------------------------------------------- files


def of_two_layers(**other):
    arrays = {"token_embd.weight": ("Q6_K", gguf_blocks("Q6_K", 6, 256))}
    for i in (1, 0):  # in any order
        arrays |= {
            f"blk.{i}.attn_q.weight": ("Q4_K", gguf_blocks("Q4_K", 8, 256, seed=i)),
            f"blk.{i}.attn_q.bias": np.float16(normal(8, seed=i)),
            f"blk.{i}.attn_norm.weight": np.float32(normal(256, seed=i)),
        }
    return arrays | other


def test_load_gguf_has_the_weights_of_the_file(tmp_path):
    arrays = {f"{n}.weight": (n, gguf_blocks(n, 3, 512)) for n in _ggml.TYPES}
    bf16 = normal(3, 4, dtype=jnp.bfloat16)
    arrays["bf16"] = ("BF16", bf16.view(np.uint8))
    arrays |= {"f16": np.float16(normal(3, 4)), "f32": np.float32(normal(2, 3, 4))}
    path = write_gguf(tmp_path / "a.gguf", arrays)
    got = quant.load_gguf(path, dtype="bfloat16")
    assert list(got) == list(arrays)
    for name in _ggml.TYPES:
        assert_same_bits(got[f"{name}.weight"], gguf_tensor(name, 3, 512, dtype="bfloat16"))
    for name, want in (("bf16", bf16), ("f16", arrays["f16"]), ("f32", arrays["f32"])):
        assert isinstance(got[name], jax.Array)
        assert_same_bits(np.asarray(got[name]), want)
    dense = quant.load_gguf(str(path), ["Q5_*", "re:Q[23]_K.*"], dense="Q*_K*")
    assert set(dense) == {f"{n}.weight" for n in ("Q5_0", "Q5_1", "Q5_K", "Q2_K", "Q3_K")}
    assert_same_bits(dense["Q2_K.weight"], quant.dequantize(gguf_tensor("Q2_K", 3, 512)))
    assert quant.is_quantized(dense["Q5_0.weight"])


def test_load_gguf_stacks_layers(tmp_path):
    other = {"v.blk.0.scale": np.float32(normal(4))}  # another stack, of one layer
    path = write_gguf(tmp_path / "a.gguf", of_two_layers(**other))
    alone = quant.load_gguf(path)
    got = quant.load_gguf(path, stack=True)
    roles = ["attn_q.weight", "attn_q.bias", "attn_norm.weight"]
    names = ["token_embd.weight", *(f"blk.{role}" for role in roles), "v.blk.scale"]
    assert list(got) == names
    assert_same_bits(got["v.blk.scale"], alone["v.blk.0.scale"][None])
    assert_same_bits(got["token_embd.weight"], alone["token_embd.weight"])
    for role in roles:
        layers = [alone[f"blk.{i}.{role}"] for i in range(2)]
        assert_same_bits(got[f"blk.{role}"], jax.tree.map(lambda *x: np.stack(x), *layers))


@pytest.mark.parametrize("stack", [False, True])
def test_rope_rows_get_their_order_back_exactly(stack, tmp_path):
    experts = {"attn_q.experts": np.float32(normal(3, 8, 4))}
    path = write_gguf(tmp_path / "a.gguf", of_two_layers(**experts))
    plain, got = (
        quant.load_gguf(path, stack=stack, rope_heads=heads)
        for heads in (None, {"*attn_q.*": 2})
    )
    # Two heads of four rows; llama.cpp's neighbors are rows that are two apart.
    order = np.array([0, 2, 1, 3, 4, 6, 5, 7])
    for name in plain:
        rows, moved = (
            np.asarray(w.blocks if quant.is_quantized(w) else w)
            for w in (plain[name], got[name])
        )
        if "attn_q" not in name:
            assert_same_bits(moved, rows)
        elif name.endswith("bias"):
            assert_same_bits(moved, rows[..., order])
        else:
            assert_same_bits(moved, rows[..., order, :])


def test_rope_on_pairs_of_neighbors_is_rope_on_halves_of_the_loaded_rows(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", of_two_layers())
    load = functools.partial(quant.load_gguf, path, "blk.0.attn_q.weight", dense="*")
    x, angles = normal(256), np.arange(2.0)  # of the two pairs of each head
    rows = np.float64(load()["blk.0.attn_q.weight"]) @ x
    moved = np.float64(load(rope_heads={"*": 2})["blk.0.attn_q.weight"]) @ x
    neighbors = rows.reshape(2, 2, 2) @ [1, 1j] * np.exp(1j * angles)
    halves = (moved.reshape(2, 2, 2).swapaxes(1, 2) @ [1, 1j]) * np.exp(1j * angles)
    np.testing.assert_allclose(halves, neighbors, rtol=1e-12)


def test_load_gguf_places_weights_on_a_mesh(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", of_two_layers())
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    rows = NamedSharding(mesh, P(None, "x"))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    shardings = {"blk.*.weight": rows, "token*": one}
    got = quant.load_gguf(path, stack=True, shardings=shardings, dense="token*")
    assert got["blk.attn_q.weight"].blocks.sharding.is_equivalent_to(rows, 3)
    assert got["blk.attn_norm.weight"].sharding.is_equivalent_to(rows, 2)
    assert got["token_embd.weight"].sharding == one
    assert_same_bits(
        jax.device_get(got),
        jax.device_get(quant.load_gguf(path, stack=True, dense="token*")),
    )
    split = {"*attn_q.weight": NamedSharding(mesh, P(None, "y", "x"))}
    with pytest.raises(ValueError, match=r"attn_q.weight.*whole blocks of 256 entries"):
        quant.load_gguf(path, stack=True, shardings=split)


def test_metadata(tmp_path):
    metadata = (("general.name", "small"), ("tokens", ["a", "\u0120b"]), ("ids", [1, 2]))
    nested = ("pairs", [[1, 2], [3, 4]])
    path = write_gguf(tmp_path / "a.gguf", of_two_layers(), [nested, *metadata])
    got = quant.load_gguf_metadata(path)
    assert {key: got[key] for key in dict(metadata)} == dict(metadata)
    assert got["pairs"] == [1, 2, 3, 4]  # as the package has it
    assert got["general.architecture"] == "llama"
    assert not any(key.startswith("GGUF.") for key in got)
    path = write_gguf(tmp_path / "a.gguf", {}, [("tokens", ["a", "b"])])
    path.write_bytes(path.read_bytes().rstrip(b"\0"))  # no padding behind the last string
    assert quant.load_gguf_metadata(path)["tokens"] == ["a", "b"]


MIXED = {"blk.1.attn_q.weight": ("Q6_K", gguf_blocks("Q6_K", 8, 256))}


@pytest.mark.parametrize(
    ("other", "options", "error", "match"),
    [
        (
            {},
            {"patterns": "blk.attn_q.weight"},
            ValueError,
            "patterns matches no tensor of",
        ),
        ({}, {"dense": "attn_k"}, ValueError, "dense matches no loaded tensor of"),
        ({}, {"rope_heads": {"*attn_k*": 2}}, ValueError, "rope_heads matches no loaded"),
        ({}, {"shardings": {"*attn_k*": None}}, ValueError, "shardings matches no loaded"),
        (
            {},
            {"rope_heads": {"*q*": 3}},
            ValueError,
            r"blk.1.attn_q.*\(8, 256\).* of 3 heads",
        ),
        (
            {"bias": ("Q8_0", gguf_blocks("Q8_0", 64))},
            {"rope_heads": {"bias": 2}},
            ValueError,
            "at 'bias': .* does not have the rows of 2 heads",
        ),
        ({}, {"rope_heads": {"*q*": 8}}, ValueError, "rows of 8 heads of an even size"),
        ({}, {"rope_heads": {"*q*": 2.0}}, TypeError, "must be an integer, got 2.0"),
        ({}, {"rope_heads": 2}, TypeError, "rope_heads must be a dict"),
        ({}, {"dtype": "int8"}, ValueError, "weight_dtype must be one of"),
        (
            MIXED,
            {"stack": True},
            ValueError,
            r"'blk.attn_q.weight' .* Q4_K \(8, 256\) in .* \[0\]; Q6_K .*\[1\]: load",
        ),
        (
            {"blk.2.attn_q.weight": of_two_layers()["blk.1.attn_q.weight"]},
            {"stack": True},
            ValueError,
            r"'blk.attn_q.bias' cannot be stacked.*none in the layers \[2\]",
        ),
        (
            {"odd": ("TQ1_0", np.zeros((2, 54), np.uint8))},
            {},
            CheckpointError,
            r"a.gguf: the tensor 'odd' has the type TQ1_0, and only F32, F16, BF16, Q4_0",
        ),
        (
            {"odd": np.zeros((0, 4), np.float32)},
            {},
            CheckpointError,
            "'odd' has no entries",
        ),
        (
            {"odd": np.zeros((2, 4), np.int32)},
            {},
            CheckpointError,
            "'odd' has the type I32",
        ),
    ],
)
def test_what_is_not_loaded(other, options, error, match, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", of_two_layers(**other))
    with pytest.raises(error, match=match):
        quant.load_gguf(path, **options)
    if "odd" in other:
        assert "odd" not in quant.load_gguf(path, ["blk*", "token*"])


@pytest.mark.parametrize("stack", [False, True])
def test_a_model_in_several_files_is_loaded_whole(stack, tmp_path):
    """Which is how `llama-gguf-split` and the package write large models."""
    gguf = pytest.importorskip("gguf", reason="in the extra `gguf`")
    arrays = {f"blk.{i}.up.weight": normal(3, 4, seed=i) for i in range(5)}
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama", split_max_tensors=2)
    for name, array in arrays.items():
        writer.add_tensor(name, np.asarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    for file in files:
        got = quant.load_gguf(file, stack=stack)
        assert got.keys() == ({"blk.up.weight"} if stack else arrays.keys())
        assert sum(weight.size for weight in got.values()) == 5 * 3 * 4
        assert quant.load_gguf_metadata(file)["general.architecture"] == "llama"
    other = files[0].rename(tmp_path / "first.gguf")
    for file, error, match in (
        (files[1], FileNotFoundError, "no file .*a-00001-of-00003.gguf"),
        (other, CheckpointError, r"one of 3 files .* NAME-00001-of-00003.gguf: give"),
    ):
        with pytest.raises(error, match=match):
            quant.load_gguf(file)


def test_damaged_files_are_named(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", of_two_layers())
    data = path.read_bytes()
    other = tmp_path / "other.gguf"
    last = "blk.0.attn_norm.weight"
    for end, match in (
        (0, "cannot be read as GGUF"),
        (3, "it has 3 bytes, and needs 4"),
        (100, "it has 100 bytes"),
        (len(data) - 100, rf"other.gguf cannot .*tensor '{last}': it has \d+ bytes"),
    ):
        other.write_bytes(data[:end])
        for load in (quant.load_gguf, quant.load_gguf_metadata):
            with pytest.raises(CheckpointError, match=match):
                load(other)
    at = data.index(last.encode()) + len(last) + 4 + 8  # the type, after one size
    other.write_bytes(data[:at] + b"\xe7" + data[at + 1 :])
    with pytest.raises(CheckpointError, match=rf"tensor '{last}': .*231.* is not a valid"):
        quant.load_gguf(other)
    twice = data.replace(b"blk.0.attn_norm", b"blk.1.attn_norm")
    other.write_bytes(twice)
    with pytest.raises(CheckpointError, match=r"other.gguf .* have one name"):
        quant.load_gguf(other)
    other.write_bytes(b"\x89HDF" + data[4:])
    with pytest.raises(
        CheckpointError, match=r"other.gguf cannot be read as GGUF \(GGUF magic"
    ):
        quant.load_gguf(other)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.gguf"):
        quant.load_gguf(tmp_path / "none.gguf")
    with pytest.raises(TypeError, match="path must be a path, got dict"):
        quant.load_gguf({})  # pyright: ignore[reportArgumentType]


def test_files_of_random_bytes_are_read_or_refused(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", of_two_layers())
    data, rng = path.read_bytes(), np.random.default_rng(0)
    header = data.index(b"blk.0.attn_norm") + 60
    refused = 0
    for _ in range(60):
        changed = np.frombuffer(data, np.uint8).copy()
        changed[rng.integers(0, header, 3)] = rng.integers(0, 256, 3)
        path.write_bytes(changed.tobytes())
        messages = []
        try:
            quant.load_gguf(path)
            quant.load_gguf_metadata(path)
        except CheckpointError as error:
            messages.append(str(error))
        assert all("a.gguf" in message for message in messages)
        refused += len(messages)
    assert refused > 20


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lora_jax\[gguf\]"'):
        quant.load_gguf(tmp_path / "a.gguf")
