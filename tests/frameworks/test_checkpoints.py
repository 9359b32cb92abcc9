"""A run that was saved by Orbax and restored goes on bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax.checkpoint import load_adapters, save_adapters

ocp = pytest.importorskip("orbax.checkpoint")
pytestmark = pytest.mark.frameworks

rng = np.random.default_rng(0)
PARAMS = {
    "up": jnp.asarray(rng.normal(size=(8, 12)) / 3, "bfloat16"),
    "experts": jnp.asarray(rng.normal(size=(3, 12, 5)) / 3, "bfloat16"),
}
BATCHES = jnp.asarray(rng.normal(size=(6, 7, 8)), "bfloat16")


def apply(params, x):
    return jnp.einsum("bd,edk->ebk", jnp.tanh(x @ params["up"]), params["experts"])


class Run:
    """What a script makes when it starts, for the first time or again."""

    def __init__(self, use_dora, dtype):
        config = lora_jax.LoraConfig(2, 4.0, dropout=0.2, use_dora=use_dora, dtype=dtype)
        self.plan = lora_jax.plan_adapters(config, PARAMS, apply, BATCHES[0])
        self.optimizer = optax.adam(3e-2)
        self.step = jax.jit(self._step)

    def start(self, key):
        key_init, key = jax.random.split(key)
        adapters = lora_jax.init_adapters(key_init, PARAMS, self.plan)
        optimizer = self.optimizer.init(adapters)
        return {
            "adapters": adapters,
            "optimizer": optimizer,
            "step": jnp.int32(0),
            "key": key,
        }

    def _step(self, state, x):
        key = jax.random.fold_in(state["key"], state["step"])
        adapted = lora_jax.adapt(apply, self.plan, dropout_key=key)

        def loss(adapters):
            return jnp.square(adapted(PARAMS, adapters, x).astype("float32") - 1).mean()

        grads = jax.grad(loss)(state["adapters"])
        updates, optimizer = self.optimizer.update(grads, state["optimizer"])
        adapters = optax.apply_updates(state["adapters"], updates)
        return state | {
            "adapters": adapters, "optimizer": optimizer, "step": state["step"] + 1
        }  # fmt: skip

    def train(self, state, steps):
        for _ in range(steps):
            state = self.step(state, BATCHES[int(state["step"])])
        return state


def leaves(state):
    state = state | {"key": jax.random.key_data(state["key"])}
    with_paths = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in with_paths}


@pytest.mark.parametrize(("use_dora", "dtype"), [(False, "bfloat16"), (True, None)])
def test_six_steps_are_three_and_three(tmp_path, use_dora, dtype):
    run = Run(use_dora, dtype)
    start = run.start(jax.random.key(0))
    straight = run.train(start, 6)
    half = Run(use_dora, dtype).train(start, 3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", half)

    run = Run(use_dora, dtype)
    expected = jax.eval_shape(run.start, jax.random.key(0))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "half", expected)
    got, want = leaves(run.train(restored, 3)), leaves(straight)
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        assert got[path].dtype == leaf.dtype, path
        assert got[path].tobytes() == leaf.tobytes(), path
    untrained = leaves(start)
    same = [
        path for path, leaf in want.items() if leaf.tobytes() == untrained[path].tobytes()
    ]
    assert same == ["['key']"]

    save_adapters(tmp_path, straight["adapters"], run.plan)
    adapters, plan = load_adapters(tmp_path)
    assert plan == run.plan
    assert all(
        jax.tree.leaves(jax.tree.map(jnp.array_equal, adapters, straight["adapters"]))
    )
