"""A weight is merged and rounded once, and what rounding lost is counted exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.cli import _fold
from lora_jax.cli._blocks import Update
from lora_jax.plan import layout
from lora_jax.plan.adapter_plan import AdapterPlan, Target
from lora_jax.plan.config import LoraConfig
from tests import support

N_IN, N_OUT, RANK, SCALE = 24, 40, 3, 0.5


def make(method, size, dtype):
    """A target, its plan, rows `(out, in)` and an adapter, in NumPy."""
    target = Target((N_OUT, N_IN), method, RANK, SCALE, 0.0, (1,), (0,))
    plan = AdapterPlan(LoraConfig(rank=RANK), {"w": target})
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(N_OUT, N_IN)).astype(jnp.dtype(dtype))
    rows[3, :] = 0
    adapter = {
        "A": rng.normal(size=(N_IN, RANK)).astype("float32"),
        "B": (size * rng.normal(size=(RANK, N_OUT))).astype("float32"),
    }
    if method == "dora":
        norms = np.linalg.norm(rows.astype(np.float64), axis=1)
        adapter["m"] = (1.1 * norms).astype("float32")
        adapter["m"][3] = 1
    return plan, rows, adapter


def exact(rows, adapter):
    """The merged rows in float64."""
    a, b = (adapter[name].astype(np.float64) for name in "AB")
    merged = rows.astype(np.float64) + SCALE * (a @ b).T
    if "m" in adapter:
        merged *= (adapter["m"] / np.linalg.norm(merged, axis=1))[:, None]
    return merged


def fold(plan, rows, adapter, dtype):
    arrays = jax.tree.map(jnp.asarray, adapter)
    updates = [Update("w", plan.targets["w"], arrays)]
    return _fold.fold_rows("w", rows, updates, dtype)


@pytest.mark.parametrize("out", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merged_rounded_and_counted(method, dtype, out):
    plan, rows, adapter = make(method, 1e-3, dtype)
    out = jnp.dtype(out)
    got, loss = fold(plan, rows, adapter, out)
    want = exact(rows, adapter)
    assert got.dtype == out
    support.assert_close(got, want, 4 if method == "dora" else 1)
    update = want - rows.astype(np.float64)
    vanished = (update != 0) & (got == rows.astype(out))
    assert loss.entries == rows.size
    assert loss.vanished == np.sum(vanished)
    size = np.abs(np.where(rows == 0, 1, rows.astype(np.float64)))
    largest = np.max(np.abs(update / size)[vanished], initial=0)
    assert loss.largest == pytest.approx(largest, rel=1e-3)
    if method == "lora" and out != np.float32:
        assert 0.1 < loss.fraction < 0.9


@pytest.mark.parametrize(
    ("method", "out"), [("lora", "float32"), ("lora", "bfloat16"), ("dora", "bfloat16")]
)
def test_updates_below_float32_are_counted_too(method, out):
    plan, rows, adapter = make(method, 1e-12, "float32")
    if method == "dora":
        adapter["m"] = np.linalg.norm(rows, axis=1)
    _, loss = fold(plan, rows, adapter, jnp.dtype(out))
    assert loss.vanished == N_IN * (N_OUT - 1)  # all but those of the row of zeros


def test_weights_of_one_kind_are_compiled_once(monkeypatch):
    calls, low_rank = [], layout.low_rank

    def counted(*arguments):
        calls.append(None)
        return low_rank(*arguments)

    monkeypatch.setattr(layout, "low_rank", counted)
    plan, rows, adapter = make("lora", 1e-2, "float32")
    target = dataclasses.replace(plan.targets["w"], scale=0.375)
    arrays = jax.tree.map(jnp.asarray, adapter)
    for name in ("first", "second"):
        dtype = np.dtype("float32")
        updates = [Update(name, target, arrays)]
        _fold.fold_rows(name, rows, updates, dtype)
    assert len(calls) == 1  # while the first is traced


def test_losses_of_parts_add_up():
    parts = _fold.Loss(2, 10, 0.5), _fold.Loss(1, 20, 0.25)
    assert sum(parts, _fold.Loss()) == _fold.Loss(3, 30, 0.5)
    assert sum(parts, _fold.Loss()).fraction == 0.1
    assert _fold.Loss().fraction == 0


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_is_not_finite_is_an_error(method):
    plan, rows, adapter = make(method, 1e-3, "float32")
    rows[2, 5] = np.inf
    with pytest.raises(FloatingPointError, match="'w': the weight had an infinity"):
        fold(plan, rows, adapter, np.dtype("float32"))
    rows[2, 5] = 1e5
    if method == "dora":  # within the range without this
        fold(plan, rows, adapter, np.dtype("float16"))
        adapter["m"][2] = 2e5
    with pytest.raises(FloatingPointError, match="at 'w': there are values beyond the"):
        fold(plan, rows, adapter, np.dtype("float16"))


def test_a_nan_of_a_large_weight_is_an_error():
    # XLA for the CPU takes the maximum of a large array past a NaN.
    rows = np.random.default_rng(0).normal(size=(160, 120)).astype("float32")
    dtype = rows.dtype
    target = Target(rows.shape, "lora", 1, SCALE, 0.0, (0,), (1,))
    plan = AdapterPlan(LoraConfig(rank=1), {"w": target})
    adapter = {"A": rows[:, :1], "B": rows[:1]}
    fold(plan, rows.copy(), adapter, dtype)
    rows[3, 4] = np.nan
    with pytest.raises(FloatingPointError, match="'w': the weight had an infinity"):
        fold(plan, rows, adapter, dtype)
