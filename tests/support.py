"""What the tests share: random values, cases of one layer, comparisons, settings of JAX."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference

GOLDEN = pathlib.Path(__file__).parent / "golden"
HALF = ("bfloat16", "float16")
DTYPES = ("float32", *HALF)

# Axes in front of a weight, and axes between those and the last one of the input.
LAYOUTS = {
    "vector": ((), ()),
    "rows": ((), (5,)),
    "tokens": ((), (2, 5)),
    "stacked": ((3,), (5,)),
    "stacked_vector": ((3,), ()),
    "experts_in_layers": ((2, 3), (5, 4)),
}
N_IN, N_OUT, RANK = 12, 9, 4


def normal(*shape, seed=0, size=1.0, dtype="float64"):
    """Normal values that depend on the shape and the seed, as a NumPy array."""
    values = np.random.default_rng([seed, *shape]).normal(size=shape)
    return np.asarray(size * values).astype(jnp.dtype(dtype))


def needs_host_memory():
    """Skips a test on a JAX whose CPU devices have no memory of the host."""
    kinds = {memory.kind for memory in jax.devices()[0].addressable_memories()}
    if "pinned_host" not in kinds:
        pytest.skip(f"CPU devices of this JAX have the memories {kinds} only")


def html_cells(value):
    """The texts of the cells of the table that a notebook shows, by rows."""
    root = ElementTree.fromstring(f"<div>{value._repr_html_()}</div>")
    return [[cell.text or "" for cell in row] for row in root.iter("tr")]


def asarray(values, dtype=None):
    """A JAX array of NumPy's values. `jnp.asarray` compiles a program for each shape."""
    return jax.device_put(np.asarray(values, dtype and jnp.dtype(dtype)))


def draw(*shape, dtype="float32", **options):
    """`normal` as a JAX array, in float32 by default."""
    return asarray(normal(*shape, dtype=dtype, **options))


def coarse(weight):
    """Rounds to quarters: a quantization and its inverse."""
    return jnp.round(weight * 4) / 4


def best(matrix, rank):
    """The best approximation of that rank, in float64."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


def straight(weight, target):
    """The `(*batch, in, out)` matrix of a weight, in float64."""
    order = (*target.batch_axes, *target.in_axes, *target.out_axes)
    moved = np.moveaxis(reference.f64(weight), order, range(len(order)))
    return moved.reshape(target.matrix_shape)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, its adapter, an input and a cotangent of its output."""

    x: jax.Array
    weight: jax.Array
    bias: jax.Array
    adapter: dict
    c: jax.Array

    def reference(self):
        """x, weight, bias, adapter and c in float64, with the tokens folded to rows."""
        batch = self.weight.ndim - 2
        x, c = (
            reference.f64(v).reshape(*v.shape[:batch], -1, v.shape[-1])
            for v in (self.x, self.c)
        )
        return x, *map(reference.f64, (self.weight, self.bias, self.adapter)), c


jax.tree_util.register_dataclass(
    Case, data_fields=["x", "weight", "bias", "adapter", "c"], meta_fields=[]
)


def make_case(
    layout="rows",
    dtype="float32",
    adapter_dtype="float32",
    method="lora",
    norm_axis="out",
    shape=(N_IN, N_OUT),
    rank=RANK,
    seed=0,
):
    """A case with every factor non-zero; `method` is lora, lora_bias or dora."""
    batch, tokens = LAYOUTS[layout]
    rng = np.random.default_rng(seed)
    n_in, n_out = shape

    def draw(*shape, dtype=dtype, offset=0.0):
        return asarray(rng.normal(offset, 1.0, shape), dtype)

    adapter = {
        "A": draw(*batch, n_in, rank, dtype=adapter_dtype),
        "B": draw(*batch, rank, n_out, dtype=adapter_dtype),
    }
    if method == "lora_bias":
        adapter["A_bias"] = draw(*batch, rank, dtype=adapter_dtype)
        adapter["B_bias"] = draw(*batch, n_out, dtype=adapter_dtype)
    if method == "dora":
        width = n_out if norm_axis == "out" else n_in
        adapter["m"] = draw(*batch, width, dtype="float32", offset=6.0)
    return Case(
        x=draw(*batch, *tokens, n_in),
        weight=draw(*batch, n_in, n_out),
        bias=draw(*batch, n_out),
        adapter=adapter,
        c=draw(*batch, *tokens, n_out),
    )


def assert_close(got, want, ulps, dtype=None, scale=None):
    """Asserts `|got - want| <= ulps * eps * scale`, everywhere.

    Args:
        got: an array.
        want: what it should be, in float64 and of any shape of as many entries.
        ulps: the number of rounding units, of `dtype` (by default that of `got`).
        dtype: of the rounding.
        scale: what the units are relative to; the largest entry of `want` by default.
    """
    eps = float(jnp.finfo(dtype or got.dtype).eps)
    got, want = reference.f64(got), reference.f64(want)
    got = got.reshape(want.shape)
    scale = np.abs(want).max(initial=0.0) if scale is None else scale
    error = np.abs(got - want)
    assert np.all(error <= ulps * eps * scale), (
        f"off by {np.max(error / (eps * scale)):.3g} units of {eps:.3g}, allowed {ulps}"
    )


def assert_golden(case, got, want, name=""):
    """The comparison that tests/golden/README.md asks for."""
    got, want = reference.f64(got), reference.f64(want)
    assert got.shape == want.shape, name
    bound = (case["atol"] + case["rtol"]) * max(1.0, np.abs(want).max())
    error = np.abs(got - want).max()
    assert error <= bound, f"{name}: off by {error:.3g}, allowed {bound:.3g}"


def by_path(tree):
    """The leaves of a tree by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in leaves}


def file_digest(record, arrays):
    """The SHA-256 that a file of the library has of its record and its arrays."""
    digest = hashlib.sha256(record.encode())
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def bits(array):
    """An array of any dtype as bytes, to compare NaN and signed zeros too."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def assert_same_bits(got, want):
    """Asserts that two trees have one structure, and the same bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    leaves = (map(np.asarray, jax.tree.leaves(tree)) for tree in (got, want))
    for x, y in zip(*leaves, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        np.testing.assert_array_equal(bits(x), bits(y))


@contextlib.contextmanager
def optimizations(wanted):
    """Compiles with XLA's optimizations, or without most of them, in half the time.

    So do the processes that are started in this context.
    """
    option, variable = "jax_disable_most_optimizations", "JAX_DISABLE_MOST_OPTIMIZATIONS"
    before, inherited = jax.config.read(option), os.environ.get(variable)
    jax.config.update(option, not wanted)
    os.environ[variable] = str(int(not wanted))
    try:
        yield
    finally:
        jax.config.update(option, before)
        os.environ.pop(variable)
        if inherited is not None:
            os.environ[variable] = inherited


def x64():
    """A context in which float64 is float64, under old and new names of JAX."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


def set_mesh(mesh):
    """A context in which a mesh is the one of the program, under old and new names."""
    return jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh)


@contextlib.contextmanager
def count_traces(function):
    """Yields a jitted `function` and a list that gets an entry at each trace."""
    traces = []

    def traced(*args, **kwargs):
        traces.append(None)
        return function(*args, **kwargs)

    yield jax.jit(traced), traces


def recorded_dropout(monkeypatch, *masks):
    """Makes `jax.random.bernoulli` return recorded masks in turn."""
    left = list(masks)

    def bernoulli(key, p=0.5, shape=None):
        del key, p
        return jnp.asarray(left.pop(0) if len(left) > 1 else left[0]).reshape(shape)

    monkeypatch.setattr(jax.random, "bernoulli", bernoulli)
