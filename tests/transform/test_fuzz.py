"""Random programs around two weights: adapted and merged function agree.

A program is a chain of primitives applied to a weight, a product with an activation, and
something around it. Where the chain has no low-rank form the weight is merged, so that
every program has a right answer.
"""

import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import lora_jax
from tests.support import asarray, normal, x64
from tests.transform.support import assert_same, both, plan_of, trained


def split_axis(rng, w, p):
    axis = rng.integers(w.ndim)
    factors = [n for n in (2, 3) if w.shape[axis] % n == 0]
    if not factors or w.ndim > 4:
        return w
    n = rng.choice(factors)
    return w.reshape(*w.shape[:axis], n, w.shape[axis] // n, *w.shape[axis + 1 :])


def join_axes(rng, w, p):
    if w.ndim < 3:
        return w
    axis = rng.integers(w.ndim - 1)
    return w.reshape(*w.shape[:axis], -1, *w.shape[axis + 2 :])


def permute(rng, w, p):
    return w.transpose(rng.permutation(w.ndim))


def cut(rng, w, p):
    axis = rng.integers(w.ndim)
    start = rng.integers(w.shape[axis])
    stop = rng.integers(start + 1, w.shape[axis] + 1)
    return lax.slice_in_dim(w, start, stop, rng.integers(1, 3), axis)


def cut_anywhere(rng, w, p):
    axis = rng.integers(w.ndim)
    return lax.dynamic_slice_in_dim(w, p["i"], rng.integers(1, w.shape[axis] + 1), axis)


def backwards(rng, w, p):
    return jnp.flip(w, rng.integers(w.ndim))


def padded(rng, w, p):
    return jnp.pad(w, [tuple(rng.integers(3, size=2)) for _ in w.shape])


def new_axis(rng, w, p):
    if w.ndim > 4:
        return w
    axis, size = rng.integers(w.ndim + 1), rng.integers(1, 4)
    longer = jnp.expand_dims(w, axis)
    return jnp.broadcast_to(longer, (*longer.shape[:axis], size, *longer.shape[axis + 1 :]))


def gains(rng, w, p):
    axis = rng.integers(w.ndim)
    row = jnp.arange(1.0, w.shape[axis] + 1).astype(w.dtype)
    row = row.reshape([-1 if i == axis else 1 for i in range(w.ndim)])
    return w * row if rng.integers(2) else w / row


def scaled(rng, w, p):
    return (w * 0.5, -w, w / 3.0)[rng.integers(3)]


def doubled(rng, w, p):
    return jnp.concatenate([w, w * 2.0], rng.integers(w.ndim))


def stacked(rng, w, p):
    return w if w.ndim > 3 else jnp.stack([w, -w], rng.integers(w.ndim + 1))


def pieces(rng, w, p):
    axis = rng.integers(w.ndim)
    at = rng.integers(w.shape[axis] + 1)
    return jnp.concatenate(jnp.split(w, [at], axis)[::-1], axis)


def rows(rng, w, p):
    axis = rng.integers(w.ndim)
    return jnp.take(w, jnp.array([0, w.shape[axis] - 1, 0]), axis)


def with_itself_moved(rng, w, p):
    return w + jnp.flip(w, rng.integers(w.ndim))


def with_other(rng, w, p):
    other = p["v"]
    if w.shape != other.shape:
        return w
    axis = rng.integers(w.ndim)
    return (w + other, w - other, jnp.concatenate([w, other], axis))[rng.integers(3)]


STEPS = [
    split_axis, join_axes, permute, cut, cut_anywhere, backwards, padded, new_axis, gains,
    scaled, doubled, stacked, pieces, rows, with_itself_moved, with_other,
]  # fmt: skip


def contract(rng, w, x_first):
    """A product of the weight with an activation, of any batch and contracted axes."""
    letters = string.ascii_lowercase[: w.ndim]
    kinds = dict(zip(letters, rng.integers(3, size=w.ndim), strict=True))
    sizes = dict(zip(letters, w.shape, strict=True))
    tokens = "tu"[: rng.integers(3)]
    x_letters = rng.permutation([*tokens, *(c for c in letters if kinds[c])])
    out = rng.permutation([*tokens, *(c for c in letters if kinds[c] < 2)])
    x = asarray(normal(*(sizes.get(c, 2) for c in x_letters)), w.dtype)
    spec = "".join(x_letters), letters
    spec, operands = (spec, (x, w)) if x_first else (spec[::-1], (w, x))
    return jnp.einsum(f"{','.join(spec)}->{''.join(out)}", *operands)


AROUND = {
    "nothing": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda p: lax.scan(lambda c, x: (c, f(p) * x), None, jnp.ones(2))[1],
    "cond": lambda f: lambda p: lax.cond(p["i"] > 0, f, f, p),
    "vmap": lambda f: lambda p: jax.vmap(lambda s: f({**p, "w": p["w"] * s}))(jnp.ones(2)),
}


@st.composite
def programs(draw):
    """The shape of the weights, the letters of their axes, and a function of them."""
    sizes = st.sampled_from([2, 3, 4])
    shape = tuple(draw(st.lists(sizes, min_size=2, max_size=3)))
    extra = draw(st.sampled_from("iob")) if len(shape) == 3 else ""
    axes = "".join(draw(st.permutations(["i", "o", *extra])))
    steps = draw(st.lists(st.sampled_from(STEPS), max_size=6))
    around = draw(st.sampled_from(sorted(AROUND)))
    seed, x_first = draw(st.integers(0, 10**6)), draw(st.booleans())

    def fn(params):
        def chain(params):
            rng, w = np.random.default_rng(seed), params["w"]
            for step in steps:
                w = step(rng, w, params)
            return jnp.sin(contract(rng, w, x_first))

        return AROUND[around](chain)(params)

    return shape, axes, fn


def agrees(program):
    shape, axes, fn = program
    with x64(), jax.numpy_dtype_promotion("standard"):
        params = {"w": normal(*shape), "v": normal(*shape, seed=1), "i": np.array(1)}
        plan = plan_of(None, params, targets=("w", "v"), axes={"*": axes}, rank=2)
        adapters = trained(params, plan)
        got, want = both(fn, params, plan, adapters, on_merge="allow", on_unused="allow")
        assert_same(got, want, 1e-9)


@settings(max_examples=20)
@given(programs())
def test_a_random_program_agrees_with_the_merged_one(program):
    agrees(program)


@pytest.mark.slow
@settings(max_examples=60)
@given(programs())
def test_many_random_programs_agree_with_the_merged_ones(program):
    agrees(program)


def test_programs_are_not_all_merged():
    """Most chains stay low-rank: they do not agree for being merged."""
    kept = []

    @settings(max_examples=20, database=None)
    @given(programs())
    def count(program):
        shape, axes, fn = program
        params = {"w": normal(*shape), "v": normal(*shape, seed=1), "i": np.array(1)}
        plan = plan_of(None, params, targets=("w", "v"), axes={"*": axes}, rank=2)
        adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
        merges = []
        adapted = lora_jax.adapt(fn, plan, on_merge=merges.append, on_unused="allow")
        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(adapted, params, adapters)
        kept.append(not merges)

    count()
    assert sum(kept) > len(kept) / 2
