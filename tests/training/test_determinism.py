"""Runs with one key are equal in every bit, also when one of them was interrupted.

With dropout, and with gradients that `optax.MultiSteps` adds up over two steps: a run is
interrupted between the two.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from tests.support import asarray, assert_same_bits
from tests.training import problem

STEPS, INTERRUPTED = 6, 3
PARAMS = problem.make_params()
BATCHES = list(problem.batches(problem.load_digits()[0], STEPS, size=10))


class Run(NamedTuple):
    """What a script makes before it starts or goes on."""

    plan: lora_jax.AdapterPlan
    optimizer: Any
    step: Any


def new_run(use_dora=False):
    config = lora_jax.LoraConfig(rank=3, dropout=0.2, use_dora=use_dora, targets="*qkv")
    images = BATCHES[0].images
    plan = lora_jax.plan_adapters(config, PARAMS, problem.apply, images)
    optimizer = optax.MultiSteps(optax.adam(1e-2), 2)
    loss = problem.adapted_loss(plan)

    def keyed_loss(adapters, batch, key, number):
        return loss(adapters, PARAMS, batch, jax.random.fold_in(key, number))

    return Run(plan, optimizer, problem.make_step(keyed_loss, optimizer))


@functools.cache
def first_run():
    return new_run()


def start(run, key):
    adapters = lora_jax.init_adapters(jax.random.key(5), PARAMS, run.plan)
    return adapters, run.optimizer.init(adapters), key


def go_on(run, adapters, state, key, begin=0, end=STEPS):
    """Adapters, state and losses after some steps."""
    losses = []
    for number in range(begin, end):
        batch = BATCHES[number]
        adapters, state, loss = run.step(adapters, state, batch, key, jnp.int32(number))
        losses.append(loss)
    return adapters, state, losses


@functools.cache
def straight():
    return go_on(first_run(), *start(first_run(), jax.random.key(0)))


def test_one_key_one_run():
    again = go_on(first_run(), *start(first_run(), jax.random.key(0)))
    assert_same_bits(again, straight())


def test_another_key_is_another_run():
    adapters, _, losses = go_on(first_run(), *start(first_run(), jax.random.key(1)))
    want_adapters, _, want_losses = straight()
    # Two steps without an update: masks alone do not show while B is zero.
    assert losses[:2] == want_losses[:2]
    assert all(a != b for a, b in zip(losses[2:], want_losses[2:], strict=True))
    for path, adapter in want_adapters.items():
        assert np.all(adapter["B"] != adapters[path]["B"])


def save(directory, run, adapters, state):
    lora_jax.save_adapters(directory, adapters, run.plan)
    leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}
    np.savez(directory / "optimizer.npz", **leaves)


def load(directory, run):
    adapters, plan = lora_jax.load_adapters(directory)
    assert plan == run.plan
    with np.load(directory / "optimizer.npz") as file:
        leaves = [asarray(file[name]) for name in sorted(file.files, key=int)]
    expected = jax.eval_shape(run.optimizer.init, adapters)
    return adapters, jax.tree.unflatten(jax.tree.structure(expected), leaves)


def check_resumed(directory, run, use_dora):
    want_adapters, want_state, want_losses = go_on(run, *start(run, jax.random.key(0)))
    adapters, state, _ = go_on(run, *start(run, jax.random.key(0)), end=INTERRUPTED)
    assert state.mini_step == 1  # with half of a gradient
    save(directory, run, adapters, state)
    del run, adapters, state
    run = new_run(use_dora)  # as a new process would
    adapters, state = load(directory, run)
    got = go_on(run, adapters, state, jax.random.key(0), begin=INTERRUPTED)
    assert_same_bits(got, (want_adapters, want_state, want_losses[INTERRUPTED:]))


def test_a_run_that_was_interrupted_goes_on_bit_for_bit(tmp_path):
    check_resumed(tmp_path, first_run(), use_dora=False)


@pytest.mark.slow
def test_so_does_one_with_dora(tmp_path):
    check_resumed(tmp_path, new_run(use_dora=True), use_dora=True)


def test_a_state_without_the_half_gradient_does_not(tmp_path):
    # Guards the tests above: they can tell.
    run = first_run()
    adapters, state, _ = go_on(run, *start(run, jax.random.key(0)), end=INTERRUPTED)
    save(tmp_path, run, adapters, state)
    adapters, state = load(tmp_path, run)
    lost = state._replace(acc_grads=jax.tree.map(jnp.zeros_like, state.acc_grads))
    got, _, _ = go_on(run, adapters, lost, jax.random.key(0), begin=INTERRUPTED)
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        assert_same_bits(got, straight()[0])
