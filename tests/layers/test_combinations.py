"""Combinations of updates, against peft's and against dense float64 arithmetic."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax.layers import combinations, pruning
from lora_jax.layers.combinations import Cut, Method, Term
from tests import reference, support
from tests.support import GOLDEN, assert_close, assert_same_bits, best, draw

CASES = json.loads((GOLDEN / "manifest.json").read_text())["weighted_cases"]
KEY = jax.random.key(5)
# The names of peft.
NAMES = {
    "cat": "exact",
    "magnitude_prune": "magnitude",
    "magnitude_prune_svd": "magnitude_svd",
}


def update(made):
    """The dense update, in float64."""
    return made.scale * reference.f64(made.a) @ reference.f64(made.b)


def dense(term):
    return term.scale * reference.f64(term.a) @ reference.f64(term.b)


def make_terms(
    ranks=(3, 3, 3), scales=(0.5, -1.25, 2.0), weights=(1.0, 0.75, -0.5), batch=()
):
    return [
        Term(draw(*batch, 12, rank, seed=i), draw(*batch, rank, 9, seed=i), scale, weight)
        for i, (rank, scale, weight) in enumerate(zip(ranks, scales, weights, strict=True))
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_peft_combines_alike(case, monkeypatch):
    tensors, meta = load_file(GOLDEN / case["file"]), case["meta"]
    scales, weights, kind = meta["scaling"], meta["weights"], meta["combination_type"]
    options = meta.get("kwargs", {})
    terms = [
        Term(
            *(support.asarray(tensors[f"{name}/{f}"].T) for f in "AB"),
            scales[name],
            weight,
        )
        for name, weight in zip("ab", weights, strict=False)
    ]
    drawn = iter(
        [
            np.stack([tensors[f"bernoulli/{i}"].T for i in pair])
            for pair in ((0, 1), (2, 3))
            if "bernoulli/0" in tensors
        ]
    )
    monkeypatch.setattr(pruning, "_drawn", lambda *_: next(drawn) != 0)
    method = Method(NAMES.get(kind, kind), options.get("density", 1.0))
    with jax.disable_jit(method.name.startswith("dare")):
        made = combinations.combine(terms, method, Cut(options.get("svd_rank")), KEY)
    got, want = update(made), tensors["m/delta"].T.astype("float64")
    if case["id"].startswith("KNOWN_BUG"):  # too strong by the square root of the rank
        support.assert_golden(case, got, tensors["a/delta"].T)
        want = want / math.sqrt(terms[0].a.shape[-1])
    support.assert_golden(case, got, want)
    assert made.a.shape[-1] == meta.get("r_new", terms[0].a.shape[-1])


def pruned(values, density):
    """The largest entries of a matrix, those that come first among equal ones."""
    count = max(1, int(density * values.size))
    kept = np.argsort(-np.abs(values), axis=None, kind="stable")[:count]
    out = np.zeros_like(values)
    out.flat[kept] = values.flat[kept]
    return out


def elected(arrays, weights, density, majority="total"):
    """TIES of some matrices."""
    arrays = np.stack([pruned(x, density) for x in arrays])
    votes = (arrays if majority == "total" else np.sign(arrays)).sum(0)
    agree = np.sign(arrays) == np.where(votes >= 0, 1, -1)
    weighted = arrays * np.reshape(weights, (-1, 1, 1))
    return (weighted * agree).sum(0) / np.maximum(agree.sum(0), 1)


def knots(updates, weights, density):
    """KnOTS with dense matrices: `[D_1^T ...] = U S V^T`, TIES on the parts of `S V`."""
    u, s, vh = np.linalg.svd(
        np.concatenate([x.T for x in updates], axis=1), full_matrices=False
    )
    real = s > 1e-9 * s[0]
    parts = np.split((s[:, None] * vh)[real], len(updates), axis=1)
    return (u[:, real] @ elected(parts, weights, density)).T


def tsv(updates, weights, rank):
    us, ss, vs = [], [], []
    for x, weight in zip(updates, weights, strict=True):
        u, s, vh = np.linalg.svd(x)
        n = rank // len(updates)
        us.append(u[:, :n])
        ss.append(weight * s[:n])
        vs.append(vh[:n].T)
    u, v = (polar(np.concatenate(x, axis=1)) for x in (us, vs))
    return u * np.concatenate(ss) @ v.T


def polar(matrix):
    u, _, vh = np.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def reference_of(name, terms, density, majority):
    updates, weights = [dense(term) for term in terms], [term.weight for term in terms]
    if name == "knots":
        return knots(updates, weights, density)
    if name == "tsv":
        return tsv(updates, weights, terms[0].a.shape[-1])
    if name == "ties_svd":
        return elected(updates, weights, density, majority)
    return sum(w * pruned(x, density) for w, x in zip(weights, updates, strict=True))


@pytest.mark.parametrize(
    ("name", "majority"),
    [
        ("magnitude_svd", "total"),
        ("ties_svd", "total"),
        ("ties_svd", "frequency"),
        ("knots", "total"),
        ("tsv", "total"),
    ],
)
def test_dense_arithmetic_gives_the_same(name, majority):
    terms = make_terms()
    density = 0.6 if name in combinations.NEED_DENSITY else 1.0
    want = reference_of(name, terms, density, majority)
    made = combinations.combine(terms, Method(name, density, majority), Cut(9))
    assert_close(update(made), want, 512, "float32")
    low = combinations.combine(terms, Method(name, density, majority), Cut(2))
    assert_close(update(low), best(want, 2), 512, "float32")
    swapped = combinations.combine(terms[::-1], Method(name, density, majority), Cut(9))
    assert_close(update(swapped), want, 512, "float32")
    if name != "tsv":  # whose energy counts the components that it drops, too
        s = np.linalg.svd(want, compute_uv=False) ** 2
        assert low.energy == pytest.approx(s[:2].sum() / s.sum(), rel=1e-5)
        assert made.energy == pytest.approx(1.0, abs=1e-9)
    else:
        squares = [np.linalg.svd(t.weight * dense(t), compute_uv=False) ** 2 for t in terms]
        share = sum(s[0] for s in squares) / np.sum(squares)
        assert made.energy == pytest.approx(share, rel=1e-5)


def test_each_matrix_of_a_stack_is_combined_alone():
    stacks = make_terms(batch=(2,))
    for name in ("svd", "ties", "magnitude_svd", "knots", "tsv"):
        method = Method(name, 0.5 if name in combinations.NEED_DENSITY else 1.0)
        made = update(combinations.combine(stacks, method, Cut()))
        for i in range(2):
            terms = [Term(t.a[i], t.b[i], t.scale, t.weight) for t in stacks]
            alone = combinations.combine(terms, method, Cut())
            assert_close(made[i], update(alone), 256, "float32")


def test_scale_of_a_combination():
    for scales, scale in (((2.0,) * 3, 2.0), ((0.5, -1.25, 2.0), 1.0), ((0.0,) * 3, 1.0)):
        terms = make_terms(scales=scales)
        want = sum(term.weight * dense(term) for term in terms)
        for name in ("exact", "svd"):
            made = combinations.combine(terms, Method(name), Cut(9))
            assert made.scale == scale
            assert_close(update(made), want, 256, "float32", scale=10.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_equal_entries_the_first_ones_are_kept(dtype):
    values = np.random.default_rng(0).integers(-3, 4, (3, 6, 7))
    for density in (0.01, 0.35, 0.8):
        got = pruning.merged([support.asarray(values, dtype)], jnp.ones(1, dtype), density)
        want = np.stack([pruned(matrix, density) for matrix in values])
        np.testing.assert_array_equal(got, want)


def test_dare_keeps_the_mean():
    terms = make_terms()
    for name in ("dare_linear", "dare_linear_svd"):
        full = combinations.combine(terms, Method(name), Cut(9), KEY)
        plain = combinations.combine(
            terms, Method("linear" if name == "dare_linear" else "exact"), Cut()
        )
        assert_close(update(full), update(plain), 256, "float32")
    stack = jnp.ones((1, 200, 100))
    keep = pruning.merged([stack[0]], jnp.ones(1), 0.25, key=KEY)
    assert {*np.unique(keep)} == {0.0, 4.0}
    assert np.mean(keep) == pytest.approx(1.0, abs=0.05)
    signs = support.asarray([1.0, -1.0])
    other = pruning.merged([stack[0]] * 2, signs, 0.25, key=KEY)
    assert np.any(other)  # the masks of two adapters differ


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_are_rounded_once(dtype):
    terms = [
        Term(t.a.astype(dtype), t.b.astype(dtype), 1.0, t.weight) for t in make_terms()
    ]
    made = combinations.combine(terms, Method("exact"), Cut())
    assert made.a.dtype == made.b.dtype == dtype
    roots = np.sqrt(np.abs([t.weight for t in terms])).astype("float32")
    for i, (term, root) in enumerate(zip(terms, roots, strict=True)):
        own = made.a[:, 3 * i : 3 * i + 3]
        assert_same_bits(own, (root * np.asarray(term.a, "float32")).astype(dtype))
    mixed = [terms[0], make_terms()[1]]
    assert combinations.combine(mixed, Method("svd"), Cut()).a.dtype == "float32"


def test_energies_of_a_rank():
    q = np.linalg.qr(support.normal(12, 4))[0]
    p = np.linalg.qr(support.normal(9, 4))[0]
    a, b = (
        support.asarray(q, "float32"),
        support.asarray(np.diag([4.0, 2.0, 1.0, 0.0]) @ p.T, "float32"),
    )
    shares = {0.5: 1, 16 / 21 - 1e-5: 1, 16 / 21 + 1e-5: 2, 0.96: 3, 1.0: 3}
    for energy, rank in shares.items():
        made = combinations.resize(a, b, -2.0, Cut(None, energy))
        assert made.a.shape[-1] == rank
        assert made.scale == -2.0
    both = combinations.resize(a, b, 1.0, Cut(2, 1.0))
    assert both.a.shape[-1] == 2
    assert both.energy == pytest.approx(20 / 21)
    for kept, cut in ((4, Cut(4)), (3, Cut(None, 1.0))):  # nothing to cut
        same = combinations.resize(a[:, :kept], b[:kept], -2.0, cut)
        assert_same_bits(same, combinations.Update(a[:, :kept], b[:kept], -2.0, 1.0))
    # Singular values of a few rounding units are taken for zeros.
    for units, rank in ((8, 2), (32, 3)):
        last = units * float(jnp.finfo("float32").eps)
        small = jnp.diag(jnp.array([1.0, 0.5, last, 0.0]))
        made = combinations.resize(jnp.eye(4), small, 1.0, Cut(None, 1.0))
        assert made.a.shape[-1] == rank
    nothing = combinations.resize(a, 0 * b, 1.0, Cut(2))
    assert nothing.energy == 1.0
    assert not np.any(nothing.b)


@pytest.mark.parametrize("name", ["exact", "svd", "knots", "tsv", "resize"])
def test_no_array_is_as_large_as_the_weight(name):
    n_in, n_out = 300, 200
    factors = [(jnp.ones((n_in, 4)), jnp.ones((4, n_out)))] * 2

    def run(factors):
        if name == "resize":
            return combinations.resize(*factors[0], 2.0, Cut(2))
        terms = [Term(a, b, float(i + 1), 0.5) for i, (a, b) in enumerate(factors)]
        method = Method(name, 0.5 if name == "knots" else 1.0)
        return combinations.combine(terms, method, Cut(3 if name != "exact" else None))

    text = jax.jit(run).lower(factors).as_text()
    shapes = {
        tuple(map(int, dims.split("x")[:-1]))
        for dims in re.findall(r"tensor<((?:\d+x)+\w)", text)
    }
    assert (n_in, 4) in shapes
    largest = max(map(math.prod, shapes))
    assert largest < n_in * n_out / 4


def test_of_each_matrix_of_a_stack_only_the_terms_of_the_rank_stay():
    def extract(base, tuned):
        return combinations.extract(base, tuned, 1.0, Cut(2), jnp.float32)

    program = str(jax.make_jaxpr(extract)(draw(3, 12, 9), draw(3, 12, 9, seed=1)))
    assert "f32[3,2,9]" in program
    assert "f32[3,9,9]" not in program


def test_ranks_that_do_not_fit_are_errors():
    terms = make_terms(ranks=(3, 2, 3))
    with pytest.raises(
        ValueError,
        match="'ties' adds factors, which needs one rank, and the ranks are 3, 2, 3",
    ):
        combinations.combine(terms, Method("ties", 0.5), Cut())
    small = [Term(jnp.ones((2, 1)), jnp.ones((1, 9)), 1.0, 1.0)] * 3
    with pytest.raises(ValueError, match="there are 3 adapters and 2 inputs or outputs"):
        combinations.combine(small, Method("tsv"), Cut())
