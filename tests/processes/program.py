"""Trains, saves, loads, merges and resumes, in one process or in several.

`python -m tests.processes.program TASK INDEX COUNT PORT FOLDER` is one of `COUNT`.
"""

import functools
import importlib.util
import itertools
import os
import pathlib
import signal
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import peft, quant
from lora_jax._io import processes

METHODS = ("lora", "dora", "nf4")
RESUMED = "dora"
HAS_ORBAX = importlib.util.find_spec("orbax") is not None
# Devices of both processes have parts along "tensor", also of the adapters.
WEIGHTS = {
    "layers": ((3, 32, 32), P(None, "data", "tensor")),
    "down": ((32, 16), P("tensor", "data")),
    "norm/scale": ((32,), P("tensor")),
}
NAMES = {"layers.{}.mlp": "layers", "down": "down", "norm": "norm/scale"}  # in PEFT


def mesh_of(*shape, kind=AxisType.Auto):
    """The first four devices; those of a process lie along "data"."""
    devices = np.array(jax.devices()[:4]).reshape(shape)
    return Mesh(devices, ("tensor", "data"), axis_types=(kind,) * 2)


def put(values, mesh, spec):
    """An array of which each device gets its part."""
    place = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(values.shape, place, lambda part: values[part])


def drawn():
    """The weights, inputs and outputs, as NumPy arrays."""
    rng = np.random.default_rng(0)
    sizes = {path: shape for path, (shape, _) in WEIGHTS.items()} | {"y": (8, 16)}
    arrays = {name: rng.normal(size=size) / 4 for name, size in sizes.items()}
    arrays["x"] = rng.normal(size=(8, 32))
    return {name: array.astype("float32") for name, array in arrays.items()}


def model(params, x):
    def layer(x, weight):
        return x + jnp.tanh(x @ weight), None

    x, _ = jax.lax.scan(layer, x * params["norm"]["scale"][None], params["layers"])
    return x @ params["down"]


class Run:
    """What a script makes when it starts, for the first time or again."""

    def __init__(self, method, mesh):
        arrays = drawn()
        self.batch = {name: put(arrays[name], mesh, P("data")) for name in "xy"}
        own = {path: put(arrays[path], mesh, spec) for path, (_, spec) in WEIGHTS.items()}
        params = {name: own[name] for name in ("layers", "down")}
        params["norm"] = {"scale": own["norm/scale"]}
        config = lora_jax.LoraConfig(
            rank=4, alpha=8.0, use_dora=method == "dora", train="norm/scale"
        )
        self.plan = lora_jax.plan_adapters(config, params, model, self.batch["x"])
        if method == "nf4":
            params = lora_jax.quantize_params(params, self.plan, block_size=8)
        self.mesh, self.params, self.optimizer = mesh, params, optax.adam(1e-2, eps=1e-3)
        self.shardings = lora_jax.adapter_shardings(params, self.plan)
        self._step = jax.jit(self._update)

    def start(self):
        adapters = lora_jax.init_adapters(jax.random.key(0), self.params, self.plan)
        assert jax.tree.map(lambda x: x.sharding, adapters) == self.shardings
        places = lora_jax.optimizer_shardings(self.optimizer, adapters, self.shardings)
        optimizer = jax.jit(self.optimizer.init, out_shardings=places)(adapters)
        step = jax.device_put(jnp.int32(0), NamedSharding(self.mesh, P()))
        return {"adapters": adapters, "optimizer": optimizer, "step": step}

    def _update(self, state, params, batch):
        def loss(adapters):
            out = lora_jax.adapt(model, self.plan)(params, adapters, batch["x"])
            return jnp.square(out - batch["y"]).mean()

        grads = jax.grad(loss)(state["adapters"])
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = self.optimizer.update(grads, state["optimizer"])
        adapters = optax.apply_updates(state["adapters"], updates)
        adapters = jax.lax.with_sharding_constraint(adapters, self.shardings)
        return {"adapters": adapters, "optimizer": optimizer, "step": state["step"] + 1}

    def train(self, state, end):
        while int(state["step"]) < end:
            state = self._step(state, self.params, self.batch)
        return state


def whole(tree):
    """The values of arrays, by path; all processes must call this."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        shared = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        gather = functools.partial(multihost_utils.process_allgather, tiled=True)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = (gather if shared else np.asarray)(leaf)
    return found


def record(folder, name, tree):
    values = whole(tree)
    if jax.process_index() == 0:
        np.savez(folder / f"{name}.npz", **values)


def assert_same(got, want):
    got, want = whole(got), whole(want)
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype, name
        assert got[name].tobytes() == array.tobytes(), name


def train_and_save(method, folder):
    """Trains, and writes everything that a training run may write."""
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(method, mesh_of(2, 2))
    state = run.train(run.start(), 2)
    if method == RESUMED and HAS_ORBAX:
        save_state(folder / "state", state)
    adapters = run.train(state, 4)["adapters"]
    if jax.process_count() > 1:
        arrays = jax.tree.leaves((run.params, adapters))
        assert not any(array.is_fully_addressable for array in arrays)
        assert not adapters["down"]["A"].is_fully_replicated
    lora_jax.save_adapters(folder / "own", adapters, run.plan)
    peft.save(folder / "peft", adapters, run.plan, names=NAMES)
    if method == "nf4":
        quant.save_quantized(folder / "base.safetensors", run.params)
    merged = lora_jax.merge_adapters(run.params, adapters, run.plan)
    dense = {path: NamedSharding(run.mesh, spec) for path, (_, spec) in WEIGHTS.items()}
    leaves = {"layers": merged["layers"], "down": merged["down"], **merged["norm"]}
    assert [leaf.sharding for leaf in leaves.values()] == list(dense.values())
    record(folder, "merged", dict(zip(dense, leaves.values(), strict=True)))
    return run, adapters


def check_loading(run, adapters, folder):
    """Loads what `train_and_save` wrote, on the mesh and in each process alone."""
    places = run.shardings
    for shardings in (places, functools.partial(lora_jax.adapter_shardings, run.params)):
        loaded, plan = lora_jax.load_adapters(folder / "own", shardings=shardings)
        assert plan == run.plan
        assert jax.tree.map(lambda x: x.sharding, loaded) == places
        assert_same(loaded, adapters)
    alone, _ = lora_jax.load_adapters(folder / "own")
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(alone))
    assert_same(alone, adapters)
    exported = peft.load(folder / "peft", run.params, names=NAMES)
    own = {path: adapters[path] for path in run.plan.targets}
    assert_same(jax.device_put(exported.adapters, {p: places[p] for p in own}), own)
    params = peft.replace_leaves(run.params, exported.replaced)
    assert params["norm"]["scale"].sharding == run.params["norm"]["scale"].sharding
    assert_same(params["norm"]["scale"], adapters["norm/scale"]["value"])


def save_state(path, state):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)


def resume(path, folder):
    """Goes on from the state of a run on another mesh, in any number of processes."""
    import orbax.checkpoint as ocp

    run = Run(RESUMED, mesh_of(4, 1))
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, run.start())
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(path, like)
    places = jax.tree.map(lambda x: x.sharding, state["adapters"])
    assert places == run.shardings
    assert int(state["step"]) == 2
    record(folder, "resumed", run.train(state, 4)["adapters"])


def check_gathering():
    """Arrays on any mesh and in any memory are gathered, in pieces and whole."""
    values = np.arange(96, dtype="int8").reshape(24, 4)
    memories = [memory.kind for memory in jax.devices()[0].addressable_memories()]
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(2, 2, kind=kind)
        for spec, memory in itertools.product((P(None, "tensor"), P("tensor")), memories):
            place = NamedSharding(mesh, spec, memory_kind=memory)
            array = jax.make_array_from_callback((24, 4), place, lambda i: values[i])
            assert np.array_equal(processes.to_host(array), values), place


def everything(folder):
    """Trains in all processes; several of them go on from the state of one as well."""
    pieces, processes.PIECE_BYTES = processes.PIECE_BYTES, 40
    check_gathering()
    processes.PIECE_BYTES = 1024  # a stack of adapters takes several
    for method in METHODS:
        own = folder / f"{jax.process_count()}" / method
        check_loading(*train_and_save(method, own), own)
        if method == RESUMED and HAS_ORBAX and jax.process_count() > 1:
            resume(folder / "1" / method / "state", own)
    processes.PIECE_BYTES = pieces


def filled(number):
    """A run, and its adapters, in which each `B` is a number."""
    run = Run("lora", mesh_of(2, 2))
    adapters = run.start()["adapters"]
    for path in run.plan.targets:
        adapters[path]["B"] = jnp.full_like(adapters[path]["B"], number)
    return run, adapters


def raised(kind, function):
    try:
        function()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def mistakes(folder):
    """What fails is an error in all processes, and what comes next succeeds."""
    first, marker = jax.process_index() == 0, folder / "file"
    run, adapters = filled(1e6)

    def save(name, dtype=None):
        lora_jax.save_adapters(folder / name, adapters, run.plan, dtype=dtype)

    if first:  # and no other process
        usual, processes.WAIT_SECONDS = processes.WAIT_SECONDS, 1.0
        text = raised(TimeoutError, lambda: save("own"))
        assert "so every process must call it" in text, text
        processes.WAIT_SECONDS = usual
        marker.write_text("")
    while not marker.exists():
        time.sleep(0.05)
    in_first = [
        "process 0" not in raised(OSError, lambda: save("file/own")),
        "process 0" not in raised(ValueError, lambda: save("own", "float16")),
    ]
    assert in_first == [first, first]
    assert not (folder / "own").exists()
    save("own")
    assert_same(lora_jax.load_adapters(folder / "own")[0], adapters)

    adapters["down"]["A"] *= np.float32("inf")
    merge = functools.partial(lora_jax.merge_adapters, run.params, adapters, run.plan)
    assert "'down': the adapter had an infinity" in raised(FloatingPointError, merge)
    params = run.params | {"down": run.params["down"] * np.float32("nan")}
    quantize = functools.partial(lora_jax.quantize_params, params, run.plan, block_size=8)
    assert "512 of the 512 entries" in raised(ValueError, quantize)


def kill(index, folder):
    """Saves adapters in both formats, and kills a process while both save others."""
    run, old = filled(1.0)
    lora_jax.save_adapters(folder / "own", old, run.plan)
    peft.save(folder / "peft", old, run.plan, names=NAMES)
    _, new = filled(2.0)
    if jax.process_index() == index == 0:  # the new file is whole, and not in its place
        sys.addaudithook(lambda event, _: event == "os.rename" and end())
    if jax.process_index() == index == 1:  # process 0 waits for the rest of the arrays
        gather, left = processes.to_host, [2, 1]
        processes.to_host = lambda x: gather(x) if left and left.pop() else end()
    try:
        if index == 0:
            lora_jax.save_adapters(folder / "own", new, run.plan)
        else:
            peft.save(folder / "peft", new, run.plan, names=NAMES)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # and do not wait for the other process to shut down


def end():
    os.kill(os.getpid(), signal.SIGKILL)


TASKS = {
    "everything": everything,
    "mistakes": mistakes,
    "kill-0": functools.partial(kill, 0),
    "kill-1": functools.partial(kill, 1),
}


def main(task, index, count, port, folder):
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
    TASKS[task](pathlib.Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
