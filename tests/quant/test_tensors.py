"""What holds for every format: stacks, transformations, abstract values, the registry."""

import dataclasses
import html
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import quant
from lora_jax._core import compat, placement
from tests.quant import support
from tests.quant.support import ALL, SHAPE, STORED, SignTensor, gguf_tensor, make
from tests.support import (
    assert_close,
    assert_same_bits,
    count_traces,
    draw,
    html_cells,
    set_mesh,
    x64,
)

each = pytest.mark.parametrize("name", ALL)
every = pytest.mark.parametrize("name", [*ALL, *STORED])
# One of each kind, where every format takes programs of its own.
NESTED = ("torchao", "bitsandbytes")
SOME = (*NESTED, "int8_blocks", "fp8", "sign")
some = pytest.mark.parametrize("name", SOME)


def take(tree, *index):
    return jax.tree.map(lambda x: np.asarray(x)[index], tree)


@every
def test_a_stack_is_its_entries(name):
    q = make(name, 2, 3)
    dense = np.asarray(quant.dequantize(q))
    assert (q.shape, q.dtype) == (dense.shape, jnp.float32)
    assert (q.ndim, q.batch_ndim, q.size) == (4, 2, dense.size)
    entry = take(q, 1, 2)
    assert (entry.shape, entry.batch_ndim) == (dense.shape[2:], 0)
    assert_same_bits(np.asarray(quant.dequantize(entry)), dense[1, 2])


@each
def test_each_entry_of_a_stack_is_quantized_alone(name):
    stack = draw(2, 3, *SHAPE, seed=1)
    entry, one = take(ALL[name](stack, batch_axes=2), 1, 2), ALL[name](stack[1, 2])
    if name == "sign":  # a mean as anyone would write it
        assert_close(entry.scale, one.scale, 4)
    else:
        assert_same_bits(entry, one)


@pytest.mark.parametrize("name", ["torchao", "int8_blocks", "fp8"])
def test_quantizing_under_vmap(name):
    stack = draw(3, *SHAPE)
    mapped, q = jax.vmap(ALL[name])(stack), ALL[name](stack, batch_axes=1)
    assert_same_bits(mapped, q)


@pytest.mark.parametrize("name", [*SOME, *STORED])
def test_scan_and_vmap_over_a_stack(name):
    q, x = make(name, 3), draw(5, SHAPE[0])
    weights = np.asarray(quant.dequantize(q), np.float64)
    want = np.stack([np.asarray(x, np.float64) @ w for w in weights])

    def layer(carry, one):
        assert one.shape == weights.shape[1:]
        return carry, x @ quant.dequantize(one)

    _, scanned = jax.jit(lambda q: jax.lax.scan(layer, 0, q))(q)
    assert_close(scanned, want, 64)
    mapped = jax.jit(jax.vmap(quant.dequantize))(q)
    assert_close(mapped, weights, 0 if name in STORED else 4)


@some
def test_jit_has_it_as_argument_result_and_constant(name):
    weight = draw(*SHAPE)
    q = ALL[name](weight)
    if name != "sign":
        assert_same_bits(jax.jit(ALL[name])(weight), q)
    want = quant.dequantize(q)
    with count_traces(quant.dequantize) as (dequantize, traces):
        for value in (q, ALL[name](draw(*SHAPE, seed=1)), q):
            assert dequantize(value).shape == SHAPE
        assert_close(dequantize(q), want, 4)
    assert len(traces) == 1
    assert_close(jax.jit(lambda: quant.dequantize(q))(), want, 4)


@pytest.mark.parametrize("name", ["torchao", "int8", "fp8", "sign", "Q4_1"])
def test_dtypes(name):
    for dtype in ("bfloat16", "float16"):
        q = make(name, dtype=dtype)
        assert quant.dequantize(q).dtype == q.dtype == jnp.dtype(dtype)
        wide = np.asarray(quant.dequantize(q, jnp.float32))
        rounded = wide.astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(quant.dequantize(q), rounded)
        assert np.any(rounded != wide)
    with x64():
        assert quant.dequantize(q, jnp.float64).dtype == jnp.float64


@each
def test_abstract_weights_are_quantized_to_abstract_ones(name):
    struct = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    q, concrete = jax.eval_shape(ALL[name], struct), make(name)
    assert jax.tree.structure(q) == jax.tree.structure(concrete)
    assert (q.shape, q.nbytes) == (SHAPE, concrete.nbytes)


@every
def test_abstract_weights_have_sizes_and_abstract_results(name):
    concrete = make(name)
    q = jax.eval_shape(lambda: concrete)
    assert q.nbytes == concrete.nbytes == sum(x.nbytes for x in jax.tree.leaves(concrete))
    assert jax.eval_shape(quant.dequantize, q).shape == q.shape == concrete.shape


@every
def test_repr_is_one_short_line_whatever_the_leaves_are(name):
    q = make(name)
    assert repr(q).startswith(f"{type(q).__name__}(shape={q.shape}, dtype=float32")
    for setting in q.settings():
        twice = setting in ("entry_shape", "weight_dtype")
        assert (f", {setting}=" in repr(q)) == (not twice)
    shown = []
    jax.jit(lambda q: shown.append(repr(q)))(q)
    shown += [repr(jax.tree.map(to, q)) for to in (jax.typeof, lambda _: None, id)]
    for text in (repr(q), *shown):
        assert len(text) < 130
        assert "\n" not in text
        assert "Array" not in text
    assert "shape=?" in shown[-1]


@every
def test_a_notebook_shows_the_arrays(name):
    q = make(name)
    rows = html_cells(q)
    assert rows[0] == ["array", "shape", "dtype", "bytes"]
    assert re.findall("text-align:right.*?>(.*?)<", q._repr_html_()) == [r[3] for r in rows]
    assert sum(int(row[3].replace(",", "")) for row in rows[1:]) == q.nbytes
    assert html.escape(repr(q)) in q._repr_html_()
    assert html_cells(jax.eval_shape(lambda: q)) == rows
    assert len(html_cells(jax.tree.map(lambda _: None, q))) == 1


@pytest.mark.parametrize("name", ["torchao", "int8_blocks"])
def test_a_sharded_stack_is_quantized_where_it_is(name):
    mesh = Mesh(np.array(jax.devices()[:4]), ("layers",))
    sharding = NamedSharding(mesh, P("layers"))
    quantize = jax.jit(lambda w: ALL[name](w, batch_axes=1))
    q = quantize(jax.device_put(draw(4, *SHAPE), sharding))
    assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in jax.tree.leaves(q))
    assert_same_bits(q, make(name, 4))


def blocks_of_gguf():
    return gguf_tensor("Q4_1", 4, 8, 128)


def int8_in_blocks(size):  # of 8 inputs, which are two axes
    return quant.quantize_int8(draw(2, 4, 2, 8), block_size=size, batch_axes=1)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(
    ("quantized", "axes", "stored"),
    [
        (blocks_of_gguf, ("x", None, None), [P("x")]),
        (blocks_of_gguf, (None, "x", None), [P(None, "x")]),
        (blocks_of_gguf, (None, None, "x"), [P(None, None, "x")]),
        (blocks_of_gguf, (None, None, ("x", "y")), [P()]),  # 4 blocks in 8 parts
        (lambda: int8_in_blocks(4), (None, "y", None, "x"), [..., P(None, "y", "x")]),
        (lambda: int8_in_blocks(8), (None, "y", None, "x"), [..., P(None, None, "x")]),
        (lambda: int8_in_blocks(None), (None, "y", None, "x"), [..., P(None, "x")]),
        (lambda: make("fp8", 2), ("y", None, "x"), [..., P("y", "x")]),
        (lambda: make("sign", 4), ("x", "y"), [..., P("x")]),
    ],
)
def test_arrays_are_sharded_as_the_weight_is(quantized, axes, stored, explicit):
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh, q = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind)), quantized()
    places = placement.shardings(q, NamedSharding(mesh, P(*axes)))
    specs = [place.spec for place in jax.tree.leaves(places)]
    assert specs == [P(*axes) if spec is ... else spec for spec in stored]
    placed = jax.device_put(q, places)
    with set_mesh(mesh):
        if explicit:
            spec = placement.as_abstract(placed).sharding.spec
            assert tuple(spec) == (*specs[0], *[None] * (q.ndim - len(specs[0])))
        dense = jax.jit(quant.dequantize)(placed)
    assert dense.sharding.is_equivalent_to(NamedSharding(mesh, specs[0]), q.ndim)
    assert_same_bits(np.asarray(dense), np.asarray(quant.dequantize(q)))


def test_without_an_array_of_its_shape_a_weight_is_split_along_the_stack():
    q, base = make("torchao", 2), quant.QuantizedTensor  # NF4 has methods of its own
    array, n = base.array_with_axes(q)
    assert (array is q.codes, n) == (True, 1)
    specs = base.array_specs(q, ("x", "y", None), {})
    assert jax.tree.leaves(specs) == [P("x")] * 4


@pytest.mark.parametrize("name", ["bitsandbytes", "int8", "sign", "Q4_1"])
def test_no_gradient_goes_through(name):
    q, x = make(name), draw(5, SHAPE[0])
    loss = jax.jit(lambda x, q: jnp.sum(x @ quant.dequantize(q)))
    grad_x, grads = jax.grad(loss, (0, 1), allow_int=True)(x, q)
    dense = np.asarray(quant.dequantize(q), np.float64)
    assert_close(grad_x[0], dense.sum(1), 16, scale=np.abs(dense).sum(1).max())
    for grad in jax.tree.leaves(grads):
        assert grad.dtype == jax.dtypes.float0 or not np.any(grad)


# ---------------------------------------------------------------------------- registry


def test_is_quantized():
    q = quant.quantize_int8(draw(*SHAPE))
    assert quant.is_quantized(q)
    assert not any(map(quant.is_quantized, (draw(2), None, {"a": q}, quant.NF4Tensor)))
    tree = {"a": q, "b": draw(2)}
    assert jax.tree.leaves(tree, is_leaf=quant.is_quantized)[0] is q


@pytest.mark.parametrize(
    ("value", "dtype", "match"),
    [
        (np.ones(3), None, "expected a quantized tensor, got ndarray"),
        (support.quantize_sign(jnp.ones((2, 3))), "int32", "at least 16 bits, got int32"),
        (support.quantize_sign(jnp.ones((2, 3))), "float8_e4m3fn", "at least 16 bits"),
    ],
)
def test_what_is_not_dequantized(value, dtype, match):
    with pytest.raises(TypeError, match=match):
        quant.dequantize(value, dtype)


def test_formats_have_to_be_complete():
    class Half(quant.QuantizedTensor):
        pass

    @dataclasses.dataclass(frozen=True, eq=False, repr=False)
    class NoTree(SignTensor):
        pass

    methods = dict.fromkeys(quant.QuantizedTensor.__abstractmethods__)
    NoDataclass = type("NoDataclass", (quant.QuantizedTensor,), methods)  # noqa: N806
    jax.tree_util.register_pytree_node(NoDataclass, lambda _: ((), None), lambda *_: None)

    for cls, match in (
        (dict, "a format is a subclass of QuantizedTensor"),
        ("sign", "a format is a subclass of QuantizedTensor, got 'sign'"),
        (
            Half,
            "Half has to define batch_ndim, check, dequantize, dtype, quantize_like, shape",
        ),
        (NoTree, "NoTree has to be a dataclass and a pytree"),
        (NoDataclass, "NoDataclass has to be a dataclass and a pytree"),
    ):
        with pytest.raises(TypeError, match=match):
            quant.register_format(cls, "other")


def test_names_of_formats_are_kept():
    quant.register_format(SignTensor, "toy_sign")  # again, as a reloaded module would
    for name in ("nf4", ""):
        with pytest.raises(
            ValueError, match=f"'{name}' is empty or that of another format"
        ):
            quant.register_format(SignTensor, name)
    with pytest.raises(ValueError, match="SignTensor has the name 'toy_sign' already"):
        quant.register_format(SignTensor, "other")
    with pytest.raises(TypeError, match="must be a string, got 3"):
        quant.register_format(SignTensor, 3)  # pyright: ignore[reportArgumentType]


@every
def test_arrays_and_settings_make_the_tensor_again(name):
    q = make(name)
    assert_same_bits(type(q).from_arrays(q.to_arrays(), q.settings()), q)
    arrays = q.to_arrays()
    with pytest.raises(ValueError, match=r"expected (an array|arrays of|arrays)|missing"):
        type(q).from_arrays({"other": arrays.popitem()[1], **arrays}, q.settings())
    with pytest.raises(ValueError, match="and the settings"):
        type(q).from_arrays(q.to_arrays(), {**q.settings(), "other": 1})


@some
def test_a_stack_on_a_mesh_with_explicit_axes(name):
    stack, rows = draw(8, *SHAPE), draw(8, 5, SHAPE[0])
    whole = ALL[name](stack, batch_axes=1)
    mesh = jax.make_mesh((8,), ("layers",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, P("layers"))
    with set_mesh(mesh):
        placed = jax.device_put(whole, sharding)
        dense = jax.jit(quant.dequantize)(placed)
        assert dense.sharding.is_equivalent_to(sharding, 3)
        dense = np.asarray(dense)
        if name != "sign":  # a mean as anyone would write it
            quantize = jax.jit(lambda w: ALL[name](w, batch_axes=1))
            again = quantize(jax.device_put(stack, sharding))
            assert_same_bits(jax.device_get(again.codes), jax.device_get(whole.codes))
            for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
                # The mean of scales may differ in its last bit, which counts more in what
                # is left of them without it.
                np.testing.assert_allclose(x, y, rtol=1e-5)
        product = jax.jit(jax.grad(lambda x, q: jnp.sum(jnp.sin(x @ quant.dequantize(q)))))
        got = product(jax.device_put(rows, sharding), placed)
    assert_close(dense, np.asarray(quant.dequantize(whole), np.float64), 4)
    want = jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w))))(rows, dense)
    assert_close(jax.device_get(got), np.asarray(want, np.float64), 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in ALL if name != "sign"])
def test_a_nan_of_a_large_weight_is_not_lost(name, dtype):
    # XLA for the CPU takes the maximum of a large array past a NaN.
    weight = np.array(draw(160, 120, dtype=dtype))
    weight[3, 4] = np.nan
    got = jax.jit(lambda w: quant.dequantize(ALL[name](w)))(weight)
    assert np.isnan(np.asarray(got)[3, 4])


@pytest.mark.mostly_slow(8)
@pytest.mark.parametrize("axes", [(None, "x"), ("x", None), (None, None, "x"), ("x",)])
@pytest.mark.parametrize("name", [name for name in ALL if name != "sign"])
def test_a_weight_with_explicit_axes(name, axes):
    weight = draw(16, 24) if len(axes) == 2 else draw(8, 2, 24)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    whole = ALL[name](weight)
    if name == "int8_blocks" and axes[0] and not compat.pads_sharded_axes():
        with pytest.raises(ValueError, match="block_size must divide the inputs"):
            ALL[name](jax.device_put(weight, NamedSharding(mesh, P(*axes))))
        return
    with set_mesh(mesh):
        q = ALL[name](jax.device_put(weight, NamedSharding(mesh, P(*axes))))
        dense = quant.dequantize(q)
    assert_same_bits(np.asarray(q.codes), np.asarray(whole.codes))
    assert_same_bits(np.asarray(dense), np.asarray(quant.dequantize(whole)))


@pytest.mark.parametrize(
    "use",
    [
        lambda q: np.ones((5, 16), np.float32) @ q,
        lambda q: jnp.ones((5, 16)) @ q,
        lambda q: q @ jnp.ones((24, 2)),
        lambda q: q[0],
        lambda q: 2 * q,
        lambda q: jnp.ones(24) + q,
        lambda q: -q,
        np.asarray,
    ],
)
def test_what_needs_an_array_says_how_to_get_one(use):
    message = r"Int8Tensor\(.* is not an array.*lora_jax.adapt or lora_jax.accept_quantized"
    with pytest.raises(TypeError, match=message):
        use(quant.quantize_int8(draw(*SHAPE)))
