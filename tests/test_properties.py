"""What holds for every shape, rank and dtype."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax
from tests import reference, support

ALL_DTYPES = (*support.DTYPES, "float64")
linear, merge, delta = (
    jax.jit(function, static_argnames="rank_stabilized")
    for function in (lora_jax.lora_linear, lora_jax.merge_lora_weight, lora_jax.lora_delta)
)


@st.composite
def layers(draw, method="lora"):
    """A case with a rank from 1 to beyond min(in, out), any layout and dtypes."""
    n_in, n_out = draw(st.sampled_from([(1, 1), (3, 7), (17, 2), (8, 16)]))
    dtype = draw(st.sampled_from(ALL_DTYPES))
    options = {
        "layout": draw(st.sampled_from(list(support.LAYOUTS))),
        "dtype": dtype,
        "adapter_dtype": draw(st.sampled_from([dtype, "float32"])),
        "shape": (n_in, n_out),
        "rank": draw(st.sampled_from([1, 2, min(n_in, n_out), max(n_in, n_out) + 3])),
        "seed": draw(st.integers(0, 3)),
        "method": method,
    }
    if method == "dora":
        options["norm_axis"] = draw(st.sampled_from(["out", "in"]))
    return options, draw(st.sampled_from([0.5, 1.0, 8.0])), draw(st.booleans())


@contextlib.contextmanager
def build(options):
    """The case, and the scope in which its dtype exists."""
    wide = "float64" in (options["dtype"], options["adapter_dtype"])
    with support.x64() if wide else contextlib.nullcontext():
        yield support.make_case(**options)


def size_of(x, weight, adapter, scale):
    """A bound of the absolute values that were added up to each output."""
    update = np.abs(adapter["A"]) @ np.abs(adapter["B"])
    return np.abs(x) @ (np.abs(weight) + abs(scale) * update) + 1e-30


def scale_of(options, alpha, rank_stabilized):
    return alpha / (options["rank"] ** 0.5 if rank_stabilized else options["rank"])


def sums(options):
    """Rounding units that sums over `in` and the rank may lose, and 2 for dtype casts."""
    return 4 + (options["shape"][0] + options["rank"]) ** 0.5


@settings(max_examples=15)
@given(layers())
def test_adapted_forward_is_merged_forward(layer):
    options, alpha, stabilized = layer
    with build(options) as case:
        y = linear(case.x, case.weight, case.adapter, alpha, rank_stabilized=stabilized)
        merged = merge(case.weight, case.adapter, alpha, rank_stabilized=stabilized)
        assert y.dtype == merged.dtype == options["dtype"]
        x, weight, _, adapter, _ = case.reference()
        size = size_of(x, weight, adapter, scale_of(options, alpha, stabilized))
        support.assert_close(y, x @ reference.f64(merged), sums(options), scale=size)


@settings(max_examples=15)
@given(layers())
def test_merging_zero_b_changes_no_bit(layer):
    options, alpha, _ = layer
    with build(options) as case:
        adapter = case.adapter | {"B": np.zeros_like(case.adapter["B"])}
        merged = merge(case.weight, adapter, alpha)
        np.testing.assert_array_equal(merged, case.weight)


@settings(max_examples=15)
@given(layers(), st.sampled_from([0.25, 2.0, 64.0]))
def test_delta_is_linear_in_alpha(layer, factor):
    # By powers of two, so exactly.
    options, alpha, stabilized = layer
    with build(options | {"adapter_dtype": "float32"}) as case:
        one, many = (
            delta(case.adapter, a, rank_stabilized=stabilized)
            for a in (alpha, factor * alpha)
        )
        np.testing.assert_array_equal(many, factor * np.asarray(one))


@settings(max_examples=15)
@given(layers(method="dora"))
def test_dora_forward_is_merged_forward_and_unmerge_undoes_it(layer):
    options, alpha, stabilized = layer
    axis = options["norm_axis"]
    with build(options) as case:
        keywords = {"rank_stabilized": stabilized, "norm_axis": axis}

        @jax.jit  # one compilation instead of one for each operation
        def apply(case):
            args = (case.adapter, alpha)
            merged = lora_jax.merge_dora_weight(case.weight, *args, **keywords)
            norm = lora_jax.dora_column_norm(case.weight, *args, **keywords)
            back = lora_jax.unmerge_dora_weight(
                merged, case.adapter, norm, alpha, **keywords
            )
            return (
                merged,
                back,
                lora_jax.dora_linear(case.x, case.weight, *args, **keywords),
            )

        merged, back, y = apply(case)
        assert y.dtype == merged.dtype == back.dtype == options["dtype"]
        x, weight, _, adapter, _ = case.reference()
        scale = scale_of(options, alpha, stabilized)
        delta = scale * np.abs(adapter["A"]) @ np.abs(adapter["B"])
        exact = reference.norms(reference.lora_weight(weight, adapter, scale), axis)
        terms = reference.norms(np.abs(weight) + delta, axis)
        k = reference.along(np.abs(adapter["m"]) / exact, axis)
        # The norm's law, and no more than the float32 of m where the weight is float64.
        loss = reference.along((terms / exact) ** 2, axis)
        wide = "float64" if options["dtype"] == "float64" else "float32"
        unit = float(jnp.finfo(wide).eps) / float(jnp.finfo(options["dtype"]).eps)
        size = np.abs(x) @ (k * (np.abs(weight) + delta) * (1 + unit * loss)) + 1e-30
        support.assert_close(y, x @ reference.f64(merged), 2 * sums(options), scale=size)
        size = (np.abs(reference.f64(merged)) / k + np.abs(weight)) + unit * (
            (np.abs(weight) + delta) * loss * sums(options)
        )
        support.assert_close(back, weight, 4, scale=size)
