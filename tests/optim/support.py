"""What the tests of `lora_jax.optim` share: trees, Adam in float64, golden cases."""

import json

import jax
import numpy as np
import optax
from safetensors.numpy import load_file

from tests.support import GOLDEN, asarray, by_path, draw

N_IN, N_OUT, RANK = 12, 9, 4
# Of the models that are compiled.
LAYERS, TOKENS, WIDTH, SMALL = 6, 512, 128, 8
INPUT_BYTES = 4 * TOKENS * WIDTH


def adapter(*batch, seed=0, dtype="float32", rest=()):
    """An adapter with factors that are not zero, and those of `m` and biases in `rest`."""
    widths = {"m": N_OUT, "A_bias": RANK, "B_bias": N_OUT}
    return {
        "A": draw(*batch, N_IN, RANK, seed=seed, dtype=dtype),
        "B": draw(*batch, RANK, N_OUT, seed=seed, dtype=dtype),
        **{name: draw(*batch, widths[name], seed=seed) for name in rest},
    }


def tree(seed=0):
    """Two adapters, one of them of stacked layers with all entries, and a head."""
    return {
        "adapters": {
            "layers/q/kernel": adapter(3, seed=seed, rest=("m", "A_bias", "B_bias")),
            "embed/table": adapter(seed=seed + 1),
        },
        "head": {"bias": draw(5, seed=seed), "kernel": draw(6, 5, seed=seed)},
    }


def gradients():
    """Three steps for the params `tree()`."""
    return [tree(seed) for seed in (2, 3, 4)]


def stateful(state, name="mu"):
    """The paths of the leaves that an optimizer keeps a moment of, each once."""
    found = optax.tree_utils.tree_get_all_with_path(state, name)
    paths = [path for _, moments in found for path in by_path(moments)]
    assert len(paths) == len(set(paths))
    return sorted(paths)


def compiled(optimizer):
    """A step of an optimizer: from gradients, state and params to params and state."""

    @jax.jit
    def step(grads, state, params):
        # optax.adam itself promotes.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

    return step


def run(optimizer, params, steps):
    """The params after some gradients, and the state."""
    step, state = compiled(optimizer), optimizer.init(params)
    for grads in steps:
        params, state = step(grads, state, params)
    return params, state


def adamw(p, steps, rates, decay=0.0, eps=1e-8):
    """AdamW in float64, with a learning rate for each step."""
    p = np.asarray(p, np.float64)
    mu, nu = np.zeros_like(p), np.zeros_like(p)
    for t, (g, rate) in enumerate(zip(steps, rates, strict=True), 1):
        g = np.asarray(g, np.float64)
        mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g * g
        direction = (mu / (1 - 0.9**t)) / (np.sqrt(nu / (1 - 0.999**t)) + eps)
        p = p - rate * (direction + decay * p)
    return p


def solved(factor, gradient, damping):
    """`(F F^T + damping I)^-1 G` in float64."""
    f, g = np.asarray(factor, np.float64), np.asarray(gradient, np.float64)
    gram = f @ np.swapaxes(f, -1, -2)
    return np.linalg.solve(gram + damping * np.eye(gram.shape[-1]), g)


def golden(name):
    """A case of PEFT's optimizers: its tensors in this library's layout, and its entry."""
    cases = json.loads((GOLDEN / "manifest.json").read_text())["optimizer_cases"]
    (case,) = [case for case in cases if case["id"] == name]
    return {k: asarray(v.T) for k, v in load_file(GOLDEN / case["file"]).items()}, case


def compile_step(optimizer, params, loss):
    """A compiled training step, from shapes."""

    def step(params, state, *args):
        grads = jax.grad(loss)(params, *args)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), "float32")
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), "float32")
    state = jax.eval_shape(optimizer.init, params)
    return jax.jit(step).lower(params, state, weights, x, x).compile()
