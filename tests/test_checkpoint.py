"""Adapters in a directory: bit for bit, whole or not there, damaged or refused."""

import dataclasses
import json
import os
import pathlib
import random
import shutil

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import checkpoint
from lora_jax._io import tensor_files
from lora_jax.checkpoint import CheckpointError, load_adapters, save_adapters
from lora_jax.model.adapters import plan_adapters
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.config import LoraConfig
from lora_jax.plan.target import Target
from tests.support import asarray, file_digest, set_mesh, x64

SHAPES = {"w": (12, 9), "q": (12, 2, 3), "stack": (3, 12, 9), "o:A": (9, 12)}
AXES = {"*/w": "io", "*/q": "ioo", "*/stack": "bio", "*/o:A": "oi"}


def make_plan(**fields):
    params = {"bias": jax.ShapeDtypeStruct((9,), "float32")} | {
        "block": {n: jax.ShapeDtypeStruct(s, "float32") for n, s in SHAPES.items()}
    }
    fields = {"rank_pattern": {"*/q": 2, "*": 4}} | fields
    return plan_adapters(LoraConfig(4, 3.0, "block/*", axes=AXES, **fields), params)


def make_adapters(plan, dtype="float32", seed=0):
    """Adapters of random bits, NaNs and infinities among them."""
    rng = np.random.default_rng(seed)
    size = jnp.dtype(dtype).itemsize

    def draw(shape):
        return rng.integers(0, 256, (*shape, size), np.uint8).view(dtype).reshape(shape)

    return {
        path: {name: asarray(draw(s)) for name, s in target.adapter_shapes.items()}
        for path, target in plan.targets.items()
    }


def bits(adapters):
    return {
        (path, name): (value.shape, value.dtype, np.asarray(value).tobytes())
        for path, adapter in adapters.items()
        for name, value in adapter.items()
    }


def saved(folder, seed=0, **fields):
    plan = make_plan(**fields)
    adapters = make_adapters(plan, seed=seed)
    save_adapters(folder, adapters, plan)
    return adapters, plan


NAME = "lora_jax_adapters.safetensors"


def stored_arrays(folder):
    file = tensor_files.TensorFile(folder / NAME)
    return {name: file.read(name) for name in file}


def stored_record(folder):
    return json.loads(tensor_files.TensorFile(folder / NAME).metadata["record"])


def rewrite(folder, arrays=None, record=(), **metadata):
    """Writes other arrays and fields as another program would, with a right digest."""
    arrays = stored_arrays(folder) if arrays is None else arrays
    text = json.dumps(stored_record(folder) | dict(record))
    fields = {"format": "lora_jax adapters", "version": "2", "record": text}
    fields |= {"digest": file_digest(text, arrays)} | metadata
    (folder / NAME).write_bytes(safetensors.numpy.save(arrays, fields))


def outcome(folder, **options):
    """What is loaded and an empty message, or None and that of the error."""
    try:
        return load_adapters(folder, **options), ""
    except CheckpointError as error:
        return None, str(error)


# ---------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_every_bit_comes_back(tmp_path, use_dora, dtype):
    plan = make_plan(use_dora=use_dora)
    with x64():
        adapters = make_adapters(plan, dtype)
        save_adapters(tmp_path, adapters, plan)
        loaded, loaded_plan = load_adapters(tmp_path)
    assert bits(loaded) == bits(adapters)
    assert all(isinstance(value, jax.Array) for value in jax.tree.leaves(loaded))
    assert loaded_plan == plan
    assert list(loaded_plan.targets) == list(plan.targets)
    assert list(loaded_plan.config.rank_pattern) == ["*/q", "*"]
    assert str(loaded_plan) == str(plan)
    assert loaded_plan.explain("bias") == plan.explain("bias")


def test_the_names_of_the_file_and_its_entries(tmp_path):
    folder = tmp_path / "new" / "folder"
    adapters, plan = saved(str(folder), use_dora=True)
    assert [file.name for file in folder.iterdir()] == [NAME]
    assert stored_record(folder) == {
        "plan": json.loads(plan.to_json()),
        "dtypes": {},
        "replaced": None,
    }
    arrays = stored_arrays(folder)
    names = {f"{path}:{n}" for path, adapter in adapters.items() for n in adapter}
    assert set(arrays) == names
    assert {"block/o:A:A", "block/w:m"} < names
    np.testing.assert_array_equal(arrays["block/w:B"], adapters["block/w"]["B"])


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_a_dtype_for_the_file(tmp_path, stored):
    """Arrays are rounded once, and those that come back have the dtype that they had."""
    plan = make_plan(use_dora=True)
    paths, rng = list(plan.targets), np.random.default_rng(0)
    adapters = {
        path: {
            name: asarray(
                rng.normal(size=shape), "bfloat16" if path == paths[0] else "float32"
            )
            for name, shape in target.adapter_shapes.items()
        }
        for path, target in plan.targets.items()
    }
    save_adapters(tmp_path, adapters, plan, dtype=stored)
    assert {array.dtype for array in stored_arrays(tmp_path).values()} == {
        jnp.dtype(stored)
    }
    loaded, loaded_plan = load_adapters(tmp_path)
    want = jax.tree.map(lambda x: x.astype(stored).astype(x.dtype), adapters)
    assert bits(loaded) == bits(want)
    assert loaded_plan == plan
    for dtype in ("float16", "file"):
        leaves = jax.tree.leaves(load_adapters(tmp_path, dtype=dtype)[0])
        expected = stored if dtype == "file" else dtype
        assert {x.dtype for x in leaves} == {jnp.dtype(expected)}


def test_dtypes_that_do_not_hold_the_values(tmp_path):
    plan = make_plan()
    adapters = jax.tree.map(lambda x: jnp.full(x.shape, 7e4), make_adapters(plan))
    with pytest.raises(
        ValueError, match=r"block/o:A:A has values up to 7e\+04, and float16"
    ):
        save_adapters(tmp_path / "new", adapters, plan, dtype="float16")
    assert not list(tmp_path.iterdir())
    save_adapters(tmp_path, adapters, plan)
    with pytest.raises(CheckpointError, match="has values up to 7e"):
        load_adapters(tmp_path, dtype="float16")
    for call in (
        lambda: save_adapters(tmp_path, adapters, plan, dtype="int8"),
        lambda: load_adapters(tmp_path, dtype="int8"),
    ):
        with pytest.raises(TypeError, match="dtype must be floating point"):
            call()


@pytest.mark.parametrize("dtypes", [[], "{", None, {"block/w:A": 3}])
def test_dtypes_that_are_none(tmp_path, dtypes):
    saved(tmp_path)
    rewrite(tmp_path, record={"dtypes": dtypes})
    with pytest.raises(CheckpointError, match=NAME):
        load_adapters(tmp_path)


def test_a_save_while_arrays_are_read(tmp_path, monkeypatch):
    adapters, plan = saved(tmp_path)
    real, others = tensor_files.TensorFile.read, make_adapters(plan, seed=1)

    def read(self, name):
        save_adapters(tmp_path, others, plan)
        return real(self, name)

    monkeypatch.setattr(tensor_files.TensorFile, "read", read)
    assert bits(load_adapters(tmp_path)[0]) == bits(adapters)


def test_what_killed_processes_left_is_removed(tmp_path):
    adapters, plan = saved(tmp_path)
    for name in (NAME, "adapters.json", "adapters-0123456789abcdef.safetensors"):
        (tmp_path / f".{name}.0123456789abcdef.tmp").touch()
    others = [".adapters.json.tmp", ".notes.0123456789abcdef.tmp", "adapters.json.old"]
    for name in others:
        (tmp_path / name).touch()
    save_adapters(tmp_path, adapters, plan)
    assert {file.name for file in tmp_path.iterdir()} == {NAME, *others}


def test_an_adapters_json_of_another_program_stays(tmp_path):
    adapters, plan = saved(tmp_path)
    (tmp_path / "adapters.json").write_text('["mine"]')
    assert bits(load_adapters(tmp_path)[0]) == bits(adapters)
    save_adapters(tmp_path, adapters, plan)
    assert (tmp_path / "adapters.json").read_text() == '["mine"]'
    assert bits(load_adapters(tmp_path)[0]) == bits(adapters)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("any_plan")


dimension = st.integers(1, 5)
target = st.builds(
    lambda batch, n_in, n_out, method, rank: Target(
        (*batch, n_in, *n_out), method, rank, 0.1, 0.0, (len(batch),),
        tuple(range(len(batch) + 1, len(batch) + 1 + len(n_out))), tuple(range(len(batch))),
    ),
    st.lists(dimension, max_size=2), dimension, st.lists(dimension, min_size=1, max_size=2),
    st.sampled_from(["lora", "dora"]), dimension,
)  # fmt: skip


@hypothesis.settings(max_examples=25)
@given(
    targets=st.dictionaries(
        st.text('aé:/.\\"\n 日', max_size=4), target, min_size=1, max_size=4
    ),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
)
def test_any_plan_comes_back(folder, targets, dtype):
    plan = AdapterPlan(LoraConfig(), targets)
    adapters = make_adapters(plan, dtype)
    save_adapters(folder, adapters, plan)
    loaded, loaded_plan = load_adapters(folder)
    assert (bits(loaded), loaded_plan) == (bits(adapters), plan)
    assert [file.name for file in folder.iterdir()] == [NAME]


def test_numpy_and_sharded_arrays_are_saved_whole(tmp_path):
    plan = make_plan()
    adapters = make_adapters(plan)
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(3, 2), ("x", "y"))
    stack = adapters["block/stack"]
    spread = {
        "A": jax.device_put(stack["A"], NamedSharding(mesh, P("x", "y"))),
        "B": np.asarray(stack["B"].mT).swapaxes(1, 2),
    }
    save_adapters(tmp_path, adapters | {"block/stack": spread}, plan)
    assert bits(load_adapters(tmp_path)[0]) == bits(adapters)


def test_without_shardings_arrays_lie_where_jax_puts_new_ones(tmp_path):
    """JAX 0.10 replicates them over the mesh of the program."""
    adapters, _ = saved(tmp_path)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with set_mesh(mesh):
        loaded, _ = load_adapters(tmp_path)
        want = jnp.asarray(np.zeros((2, 2))).sharding
    assert bits(loaded) == bits(adapters)
    for leaf in jax.tree.leaves(loaded):
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim)


def test_arrays_are_loaded_to_where_they_belong(tmp_path):
    mesh = Mesh(np.array(jax.devices()[:3]), ("tensor",))
    adapters, plan = saved(tmp_path)
    split = NamedSharding(mesh, P("tensor"))
    places = jax.tree.map(lambda array: NamedSharding(mesh, P()), adapters)
    places["block/w"] = {"A": split, "B": NamedSharding(mesh, P(None, "tensor"))}
    for shardings in (places, lambda loaded: places if loaded == plan else {}):
        loaded, _ = load_adapters(tmp_path, shardings=shardings)
        assert jax.tree.map(lambda array: array.sharding, loaded) == places
        assert bits(loaded) == bits(adapters)
    with pytest.raises(ValueError, match=r"'block/w': B of shape .* cannot be split"):
        load_adapters(tmp_path, shardings=places | {"block/w": {"A": split, "B": split}})
    del places["block/w"]["B"]
    with pytest.raises(KeyError, match="missing: 'B'"):
        load_adapters(tmp_path, shardings=places)


def test_saving_again_leaves_one_checkpoint(tmp_path):
    (tmp_path / "adapters-notes.txt").write_text("mine")
    (tmp_path / "model.safetensors").write_text("mine")
    saved(tmp_path)
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    adapters, plan = saved(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == first
    others = make_adapters(plan, seed=1)
    save_adapters(tmp_path, others, plan)
    assert len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / "adapters-notes.txt").read_text() == "mine"
    assert (tmp_path / "model.safetensors").read_text() == "mine"
    assert bits(load_adapters(tmp_path)[0]) == bits(others) != bits(adapters)


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: {}, KeyError, "adapters must have the 4 paths of the plan; missing"),
        (lambda a: {**a, "x": a["block/w"]}, KeyError, "unknown: 'x'"),
        (lambda a: {**a, "block/w": a["block/q"]}, ValueError, "at 'block/w': the fac"),
        (
            lambda a: jax.eval_shape(lambda: a),
            TypeError,
            r"adapter\['A'\] is a jax.ShapeDtypeStruct",
        ),
        (lambda a: jax.tree.map(lambda x: x.astype(int), a), TypeError, "floating point"),
    ],
)
def test_what_is_not_saved(tmp_path, change, error, message):
    plan = make_plan()
    with pytest.raises(error, match=message):
        save_adapters(tmp_path / "new", change(make_adapters(plan)), plan)
    assert not (tmp_path / "new").exists()


def test_tracers_are_not_saved(tmp_path):
    plan = make_plan()
    with pytest.raises(TypeError, match=r"block/o:A:A has no values to write, .*Tracer"):
        jax.jit(lambda a: save_adapters(tmp_path, a, plan))(make_adapters(plan))


def test_functions_are_not_saved(tmp_path):
    plan = make_plan()
    config = dataclasses.replace(plan.config, init=jax.nn.initializers.zeros)
    with pytest.raises(TypeError, match=r"init is the function .* JSON cannot hold"):
        save_adapters(
            tmp_path, make_adapters(plan), dataclasses.replace(plan, config=config)
        )
    assert list(tmp_path.iterdir()) == []


def test_arguments(tmp_path):
    plan = make_plan()
    adapters = make_adapters(plan)
    with pytest.raises(
        TypeError, match=r"must be a path, got dict: the order is save_adap"
    ):
        save_adapters(adapters, tmp_path, plan)
    with pytest.raises(TypeError, match="plan must be an AdapterPlan, got LoraConfig"):
        save_adapters(tmp_path, adapters, plan.config)
    with pytest.raises(TypeError, match="strict must be True or False, got 'no'"):
        load_adapters(tmp_path, strict="no")


def test_directories_that_are_none(tmp_path, monkeypatch):
    plan = make_plan()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file: give a directory"):
        save_adapters(tmp_path / "file", make_adapters(plan), plan)
    with pytest.raises(NotADirectoryError, match="file is a file: give a directory"):
        load_adapters(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        save_adapters(tmp_path / "file" / "below", make_adapters(plan), plan)
    with pytest.raises(
        FileNotFoundError, match=r"no directory .*gone to read lora_jax_adap"
    ):
        load_adapters(tmp_path / "gone")
    with pytest.raises(
        FileNotFoundError, match=r"no file .*adapters\.safetensors; .* has file"
    ):
        load_adapters(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directories_that_may_not_be_written(tmp_path):
    plan = make_plan()
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=NAME):
        save_adapters(tmp_path, make_adapters(plan), plan)


def test_float64_is_not_narrowed(tmp_path):
    plan = make_plan()
    with x64():
        save_adapters(tmp_path, make_adapters(plan, "float64"), plan)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match="is float64, which JAX would narrow"):
            load_adapters(tmp_path, strict=strict)


# ---------------------------------------------------------------------------- crashes


def test_a_first_save_that_fails_leaves_no_record(tmp_path, monkeypatch):
    plan = make_plan()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError, match="division"):
            save_adapters(tmp_path, make_adapters(plan), plan)
    with pytest.raises(FileNotFoundError, match=rf"no file .*{NAME}"):
        load_adapters(tmp_path)


# ---------------------------------------------------------------------------- damage


def damage(rng, data):
    data = bytearray(data)
    kind = rng.randrange(4)
    place = rng.randrange(len(data))
    if kind == 0:
        del data[place:]
    elif kind == 1:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[place : place + 1] = rng.choice([b'"', b"0", b"1", b",", b"{", b"[", b"\xff"])
    else:
        data[place : place + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
    return bytes(data)


@pytest.fixture(params=["one file", "record", "tensors"])
def damaged_file(request, tmp_path):
    """A file of a checkpoint in either form."""
    if request.param == "one file":
        saved(tmp_path, use_dora=True)
        return tmp_path / NAME
    shutil.copytree(TWO_FILES, tmp_path, dirs_exist_ok=True)
    return next(tmp_path.glob("*.json" if request.param == "record" else "*.safetensors"))


def test_damaged_files_are_refused(tmp_path, damaged_file):
    adapters, plan = load_adapters(tmp_path)
    whole, rng, refused = damaged_file.read_bytes(), random.Random(0), 0
    for _ in range(400):
        damaged_file.write_bytes(damage(rng, whole))
        loaded, message = outcome(tmp_path, strict=rng.random() < 0.5)
        refused += loaded is None
        same = loaded and (bits(loaded[0]), loaded[1]) == (bits(adapters), plan)
        assert damaged_file.name in message or same
    assert refused > 200


def test_every_other_byte_counts(tmp_path, damaged_file):
    """Each changed byte of the tensors, and each of the record that is no space."""
    whole = damaged_file.read_bytes()
    for place in range(1, len(whole), 7):
        if damaged_file.suffix != ".json" or not whole[place : place + 1].isspace():
            data = bytearray(whole)
            data[place] ^= 1
            damaged_file.write_bytes(data)
            with pytest.raises(CheckpointError, match=damaged_file.name):
                load_adapters(tmp_path, strict=False)


def test_the_order_of_the_record_counts(tmp_path):
    saved(tmp_path)
    digest = tensor_files.TensorFile(tmp_path / NAME).metadata["digest"]
    plan = stored_record(tmp_path)["plan"]
    ranks = plan["config"]["rank_pattern"]
    plan["config"]["rank_pattern"] = dict(reversed(ranks.items()))
    rewrite(tmp_path, record={"plan": plan}, digest=digest)
    with pytest.raises(CheckpointError, match=rf"{NAME} is not as it was written"):
        load_adapters(tmp_path)


# ---------------------------------------------------------------------- version 1


TWO_FILES = pathlib.Path(__file__).parent / "checkpoint_two_files"


def two_files():
    """The adapters that the version before wrote to `TWO_FILES`, with dtype="bfloat16"."""
    shapes = {
        "attn/fused": {"A": (6, 2), "B": (2, 12), "m": (12,)},
        "attn/q": {"A": (6, 2), "B": (2, 6), "m": (6,)},
        "head": {"A": (6, 3), "B": (3, 4)},
        "stack": {"A": (2, 5, 2), "B": (2, 2, 4)},
    }

    def values(shape, dtype):
        return (jnp.arange(np.prod(shape), dtype="float32").reshape(shape) / 8).astype(
            dtype
        )

    return {
        path: {
            name: values(shape, "bfloat16" if path == "stack" else "float32")
            for name, shape in entries.items()
        }
        for path, entries in shapes.items()
    }


def test_the_two_files_of_version_1(tmp_path):
    adapters, plan = load_adapters(TWO_FILES)
    assert bits(adapters) == bits(two_files())
    assert str(plan).splitlines()[1:-1] == [
        "attn/fused  (6, 3, 4)  ioo   dora       2    1.5          48  15.190 %",
        "attn/q      (6, 2, 3)  ioo   dora       2    1.5          30   9.494 %",
        "head        (4, 6)     oi    lora       3      1          30   9.494 %",
        "stack       (2, 5, 4)  bio   lora       2    1.5          36  11.392 %",
    ]
    shutil.copytree(TWO_FILES, tmp_path, dirs_exist_ok=True)
    save_adapters(tmp_path, adapters, plan)
    assert [file.name for file in tmp_path.iterdir()] == [NAME]
    loaded, loaded_plan = load_adapters(tmp_path)
    assert (bits(loaded), loaded_plan) == (bits(adapters), plan)


def test_two_files_that_do_not_belong_together(tmp_path):
    shutil.copytree(TWO_FILES, tmp_path, dirs_exist_ok=True)
    (tensors,) = tmp_path.glob("*.safetensors")
    tensors.unlink()
    with pytest.raises(CheckpointError, match=r"json names adapters-.*, which is not besi"):
        load_adapters(tmp_path)
    (tmp_path / "adapters.json").write_text('{"rank": 4}')
    with pytest.raises(
        CheckpointError, match=r"json was not written by save_adapters: its"
    ):
        load_adapters(tmp_path)


def test_a_save_while_the_two_files_are_read(tmp_path, monkeypatch):
    shutil.copytree(TWO_FILES, tmp_path, dirs_exist_ok=True)
    adapters, plan = load_adapters(tmp_path)
    new, real = jax.tree.map(jnp.ones_like, adapters), checkpoint._read_old_record

    def slow(path):
        record = real(path)
        save_adapters(tmp_path, new, plan)
        return record

    monkeypatch.setattr(checkpoint, "_read_old_record", slow)
    assert bits(load_adapters(tmp_path)[0]) == bits(new)


def test_an_older_version_that_saves_beside_the_new_file(tmp_path, monkeypatch):
    """What the new file replaced may be left; two files that came later are an error."""
    shutil.copytree(TWO_FILES, tmp_path, dirs_exist_ok=True)
    adapters, plan = load_adapters(tmp_path)
    new = jax.tree.map(jnp.ones_like, adapters)
    record = tmp_path / "adapters.json"
    text = record.read_text()

    def stop(*args, **kwargs):
        raise OSError("stopped")

    with monkeypatch.context() as stopped:
        stopped.setattr(pathlib.Path, "unlink", stop)  # after the new file is there
        with pytest.raises(OSError, match="stopped"):
            save_adapters(tmp_path, new, plan)
    assert record.exists()
    assert bits(load_adapters(tmp_path)[0]) == bits(new)
    message = rf"has adapters of two versions: .* Remove {NAME} to load the later adapters"
    record.write_text(text + " ")
    with pytest.raises(CheckpointError, match=message):
        load_adapters(tmp_path)
    record.write_text(text)
    for _ in range(2):  # the older version may save what it saved before
        save_adapters(tmp_path, new, plan)
        assert not record.exists()
        record.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_adapters(tmp_path)
    record.unlink()
    assert bits(load_adapters(tmp_path)[0]) == bits(new)


# ---------------------------------------------------------------------------- others


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": "3"}, "version 3 of the format, .* none above 2: upgrade it"),
        ({"version": "1"}, "has the version 1, which never was"),
        ({"version": "True"}, "has the version 'True', which never was"),
        ({"format": "safetensors"}, "should be 'lora_jax adapters', and is 'safetensors'"),
        ({"extra": "1"}, "expected the metadata format, version, .* got .*extra"),
        ({"record": {"extra": 1}}, "the fields plan, dtypes, replaced, got .*, extra"),
        ({"record": {"plan": []}}, r"safetensors: .*Plan must be a JSON object, got list"),
        ({"record": {"plan": {"config": {}}}}, r"safetensors: .* lacks the fields targets"),
        ({"record": {"plan": {"rank": 1}}}, "AdapterPlan has no field 'rank'.* newer ver"),
    ],
)
def test_files_of_other_programs(tmp_path, fields, message):
    saved(tmp_path)
    rewrite(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=message):
        load_adapters(tmp_path)


@pytest.mark.parametrize("value", [[], {}, "text", 1e400, -1, None, {"a": []}, {"a": {}}])
@pytest.mark.parametrize("field", ["config", "targets", "skipped", "uses"])
def test_plans_of_other_programs_are_read_or_refused(tmp_path, field, value):
    saved(tmp_path)
    rewrite(tmp_path, record={"plan": stored_record(tmp_path)["plan"] | {field: value}})
    loaded, message = outcome(tmp_path)
    assert (loaded is None) == (str(tmp_path / NAME) in message)
    if field in ("config", "targets") and value != {}:
        assert loaded is None


def other_arrays(folder):
    """An array that lacks, one that is longer, one of integers, one too many."""
    arrays = stored_arrays(folder)
    del arrays["block/w:B"]
    arrays["block/q:A"] = np.zeros((13, 2), "float32")
    arrays["block/o:A:A"] = arrays["block/o:A:A"].view("int32")
    return arrays | {"block/v:A": np.zeros((12, 4), "float32")}


WHAT = (
    "'block/o:A:A' is int32, not floating point; 'block/q:A' has the shape (13, 2) instead "
    "of (12, 2); 'block/w:B' is missing; 'block/v:A' is of no adapter."
)


def test_strict_names_what_does_not_fit(tmp_path):
    saved(tmp_path)
    rewrite(tmp_path, other_arrays(tmp_path))
    with pytest.raises(
        CheckpointError, match="does not have the arrays of the plan"
    ) as info:
        load_adapters(tmp_path)
    assert WHAT in str(info.value)
    assert NAME in str(info.value)


def test_what_does_not_fit_is_left_out(tmp_path):
    adapters, plan = saved(tmp_path)
    rewrite(tmp_path, other_arrays(tmp_path))
    with pytest.warns(UserWarning, match="left out of .*safetensors: ") as warned:
        loaded, loaded_plan = load_adapters(tmp_path, strict=False)
    assert [str(w.message).split(": ", 1)[1] for w in warned] == [WHAT]
    assert warned[0].filename == __file__
    assert bits(loaded) == bits({"block/stack": adapters["block/stack"]})
    assert loaded_plan.targets == {"block/stack": plan.targets["block/stack"]}
    assert loaded_plan.config == plan.config
    assert "no adapter, because 'block/w:B' in lora_jax_ad" in loaded_plan.explain(
        "block/w"
    )
    assert loaded_plan.explain("bias") == plan.explain("bias")
    save_adapters(tmp_path, loaded, loaded_plan)
    assert load_adapters(tmp_path)[1] == loaded_plan


def test_without_any_adapter_there_is_an_error(tmp_path):
    saved(tmp_path)
    rewrite(tmp_path, {"block/w:A": np.zeros((12, 4), "float32")})
    with pytest.raises(
        CheckpointError, match=r"no adapter in .* fits the plan in lora_jax"
    ):
        load_adapters(tmp_path, strict=False)


def test_long_lists_are_cut(tmp_path):
    adapters, _ = saved(tmp_path)
    extra = {f"x{i:02}:A": np.zeros((2, 2), "float32") for i in range(14)}
    rewrite(tmp_path, stored_arrays(tmp_path) | extra)
    with pytest.raises(CheckpointError, match=r"'x09:A' is of no adapter and 4 more\. To"):
        load_adapters(tmp_path)
    with pytest.warns(UserWarning, match="'x13:A' is of no adapter"):
        assert bits(load_adapters(tmp_path, strict=False)[0]) == bits(adapters)


def test_nothing_that_runs_code_is_imported():
    text = pathlib.Path(checkpoint.__file__).read_text()
    files = pathlib.Path(tensor_files.__file__).parent.glob("*.py")
    text += "".join(file.read_text() for file in files)
    assert not any(f"import {name}" in text for name in ("pickle", "shelve", "marshal"))
    assert "allow_pickle" not in text


def test_an_adapter_that_peft_wrote(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"read it with lora_jax\.peft\.load"):
        load_adapters(tmp_path)
