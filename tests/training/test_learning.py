"""Adapters learn: digits that lie on their side, for a model that knows upright ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from tests.support import assert_close, x64
from tests.training import problem
from tests.transform.support import assert_same, trained

STEPS = 100
TRAIN, TEST = problem.load_digits(turned=True)


def make_plan(method, params, **config):
    config = {"rank": 4, "alpha": 8.0, "use_dora": method == "dora", **config}
    images = TRAIN.images[:2]
    return lora_jax.plan_adapters(
        lora_jax.LoraConfig(**config), params, problem.apply, images
    )


def new_adapters(params, plan):
    return jax.jit(lora_jax.init_adapters)(jax.random.key(1), params, plan)


def data():
    return problem.batches(TRAIN, STEPS)


def as_bytes(tree):
    return jax.tree.map(lambda v: np.asarray(v).tobytes(), tree)


@functools.cache
def fully_tuned():
    """Params and losses of full fine-tuning."""
    params = jax.tree.map(jnp.copy, problem.pretrained())
    state = problem.full_optimizer.init(params)
    return problem.train(problem.full_step, params, state, data())


def last(losses):
    return losses[-10:].mean()


def has_learned(losses):
    """Whether a run went the way of full fine-tuning."""
    _, full = fully_tuned()
    return last(losses) < losses[0] / 15 and last(losses) < 10 * last(full)


def check_learned(plan, adapters, losses):
    """Losses, what is learned of other digits, and that nothing else has changed."""
    assert losses[0] == fully_tuned()[1][0]  # new adapters change no bit
    assert has_learned(losses)
    params = lora_jax.merge_adapters(problem.pretrained(), adapters, plan)
    assert problem.accuracy(params, TEST) > problem.accuracy(fully_tuned()[0], TEST) - 0.08


def test_the_frozen_model_knows_upright_digits_only():
    params = problem.pretrained()
    assert problem.accuracy(params, problem.load_digits()[1]) > 0.8
    assert problem.accuracy(params, TEST) < 0.25


def test_full_fine_tuning_learns():
    params, losses = fully_tuned()
    assert last(losses) < losses[0] / 30
    assert problem.accuracy(params, TEST) > 0.75


@functools.cache
def parts():
    """Plan, optimizer, gradients and update of LoRA: programs with room in between."""
    plan, optimizer = make_plan("lora", problem.pretrained()), optax.adam(1e-2)
    gradients = jax.jit(jax.value_and_grad(problem.adapted_loss(plan)))
    update = jax.jit(functools.partial(problem.update, optimizer))
    return plan, optimizer, gradients, update


def run_in_parts(change=lambda path, adapter: adapter):
    """Plan, adapters and losses of LoRA, with a change of the gradients."""
    params = problem.pretrained()
    plan, optimizer, gradients, update = parts()
    adapters, losses = new_adapters(params, plan), []
    state = optimizer.init(adapters)
    for batch in data():
        value, found = gradients(adapters, params, batch)
        found = {path: change(path, adapter) for path, adapter in found.items()}
        adapters, state = update(adapters, state, found)
        losses.append(value)
    return plan, adapters, np.array(losses)


def test_lora_learns_as_full_fine_tuning_does():
    before = as_bytes(problem.pretrained())
    check_learned(*run_in_parts())
    assert as_bytes(problem.pretrained()) == before


def exchanged(path, adapter):
    return {n: v[::-1] for n, v in adapter.items()} if "layers" in path else adapter


WRONG = {
    "negated, of B": lambda path, adapter: adapter | {"B": -adapter["B"]},
    "none, of B": lambda path, adapter: adapter | {"B": jnp.zeros_like(adapter["B"])},
    "of another layer": exchanged,
}


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_gradients_do_not_learn(name):
    # Guards the test above: it can tell.
    _, _, losses = run_in_parts(WRONG[name])
    assert not has_learned(losses)


@functools.cache
def tuned_with_dropout():
    """Plan, adapters and losses of DoRA, in one program that takes what it changes."""
    params, optimizer = problem.pretrained(), optax.adam(1e-2)
    targets = ("embed", "*qkv", "*up")
    plan = make_plan("dora", params, targets=targets, dropout=0.05)
    adapters, loss = new_adapters(params, plan), problem.adapted_loss(plan)
    step = problem.make_step(lambda a, params, keyed: loss(a, params, *keyed), optimizer)
    keyed = ((batch, jax.random.key(i)) for i, batch in enumerate(data()))
    return plan, *problem.train(step, adapters, optimizer.init(adapters), keyed, params)


@pytest.mark.slow
def test_dora_learns_with_dropout():
    before = as_bytes(problem.pretrained())
    check_learned(*tuned_with_dropout())
    assert as_bytes(problem.pretrained()) == before


@pytest.mark.slow
def test_dropout_is_for_training_only():
    params, (plan, adapters, _) = problem.pretrained(), tuned_with_dropout()

    @jax.jit
    def logits(params, merged_params, adapters):
        adapted, dropped = (
            lora_jax.adapt(problem.apply, plan, dropout_key=key)
            for key in (None, jax.random.key(0))
        )
        return (
            adapted(params, adapters, TEST.images),
            dropped(params, adapters, TEST.images),
            problem.apply(merged_params, TEST.images),
        )

    merged_params = lora_jax.merge_adapters(params, adapters, plan)
    got, dropped, want = logits(params, merged_params, adapters)
    assert_close(got, want, ulps=500)
    assert jnp.abs(dropped - want).max() > 0.1


def small_setup(method="lora", **config):
    """Params, plan, adapters and a batch of a float64 model, in which nothing is zero."""
    params = problem.make_params(width=8, hidden=12, dtype="float64")
    data = jax.tree.map(lambda v: v[:6], problem.load_digits()[0])
    config = lora_jax.LoraConfig(3, use_dora=method == "dora", **config)
    plan = lora_jax.plan_adapters(config, params, problem.apply, data.images)
    return params, plan, trained(params, plan), data


@pytest.mark.slow
def test_a_checkpointed_layer_draws_its_masks_again():
    # Those are not the masks that the layer has without jax.checkpoint.
    with x64():
        params, plan, adapters, data = small_setup(targets="*qkv", dropout=0.2)
        loss = problem.adapted_loss(plan, problem.checkpointed)
        run = jax.jit(lambda adapters: loss(adapters, params, data, jax.random.key(0)))
        gradient, by = jax.jit(jax.grad(run))(adapters), 1e-6
        slope = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(gradient))
        up, down = (run(jax.tree.map(lambda v: v + b, adapters)) for b in (by, -by))  # noqa: B023
        assert_same(slope, (up - down) / (2 * by), tolerance=1e-5)
