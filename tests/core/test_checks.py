"""What a user may get wrong, and what the error says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax._core import checks
from tests import support

CASE = support.make_case("rows")
BIASED = support.make_case("rows", method="lora_bias").adapter
DORA = support.make_case("rows", method="dora").adapter
A, B, W, X = CASE.adapter["A"], CASE.adapter["B"], CASE.weight, CASE.x
KEY = jax.random.key(0)


def lora(x=X, weight=W, adapter=CASE.adapter, alpha=1.0, **options):
    return lora_jax.lora_linear(x, weight, adapter, alpha, **options)


def dora(x=X, weight=W, adapter=DORA, alpha=1.0, **options):
    return lora_jax.dora_linear(x, weight, adapter, alpha, **options)


BOTH = pytest.mark.parametrize("linear", [lora, dora])


@pytest.mark.parametrize(
    ("rank", "error", "message"),
    [
        (0, ValueError, "rank must be a positive integer, got 0: to leave a weight with"),
        (-2, ValueError, "rank must be a positive integer, got -2"),
        (4.0, TypeError, r"rank must be a positive integer, got 4.0 \(float\)"),
        ("4", TypeError, r"rank must be a positive integer, got '4' \(str\)"),
        (True, TypeError, r"rank must be a positive integer, got True \(bool\)"),
    ],
)
def test_rank(rank, error, message):
    for init in (lora_jax.init_lora_adapter, lora_jax.init_dora_adapter):
        with pytest.raises(error, match=message):
            init(KEY, W, rank)


def test_numpy_integer_ranks_are_welcome():
    assert lora_jax.init_lora_adapter(KEY, W, np.int64(4))["A"].shape == (12, 4)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (jnp.ones(12), ValueError, r"must have a shape \(\*batch, in, out\).*got \(12,\)"),
        (jnp.ones((0, 9)), ValueError, r"without empty axes, got \(0, 9\)"),
        (jnp.ones((12, 9), "int8"), TypeError, "must be floating point, got dtype int8"),
        (jnp.ones((12, 9), "float8_e4m3fn"), TypeError, "float8_e4m3fn, whose values mean"),
        (KEY, TypeError, "got a jax.random key: are the arguments in order"),
        (jnp.ones((12, 9), "complex64"), TypeError, "floating point, got dtype complex64"),
        ([[1.0]], TypeError, "must be an array, got list"),
        (None, TypeError, "must be an array, got NoneType"),
    ],
)
@pytest.mark.parametrize("verb", ["init", "linear", "merge", "unmerge", "norm"])
def test_weight(verb, weight, error, message):
    calls = {
        "init": [
            lambda: lora_jax.init_lora_adapter(KEY, weight, 4),
            lambda: lora_jax.init_dora_adapter(KEY, weight, 4),
        ],
        "linear": [lambda: lora(weight=weight), lambda: dora(weight=weight)],
        "merge": [
            lambda: lora_jax.merge_lora_weight(weight, CASE.adapter),
            lambda: lora_jax.merge_dora_weight(weight, DORA),
        ],
        "unmerge": [
            lambda: lora_jax.unmerge_lora_weight(weight, CASE.adapter),
            lambda: lora_jax.unmerge_dora_weight(weight, DORA, jnp.ones(9)),
        ],
        "norm": [lambda: lora_jax.dora_column_norm(weight)],
    }
    for call in calls[verb]:
        with pytest.raises(error, match=message):
            call()


@BOTH
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"A": A[:-1]}, ValueError,
         r"do not fit a weight of shape \(12, 9\): expected A \(12, rank\) and B "
         r"\(rank, 9\) with rank >= 1, got A \(11, 4\) and B \(4, 9\)"),
        ({"A": jnp.ones((4, 9)), "B": jnp.ones((12, 4))}, ValueError,
         "A and B look swapped"),
        ({"A": A.T, "B": B.T}, ValueError,
         r"look transposed, as PyTorch stores them: pass A.T and B.T"),
        ({"B": B[:2]}, ValueError, r"got A \(12, 4\) and B \(2, 9\)"),
        ({"A": A[:, :0], "B": B[:0]}, ValueError, r"rank >= 1, got A \(12, 0\)"),
        ({"A": A.astype(int)}, TypeError, r"adapter\['A'\] must be floating point, got d"),
        ({"B": None}, TypeError, r"adapter\['B'\] must be an array, got NoneType"),
        ({"C": A}, KeyError, "got A, B.*; unknown: C"),
    ],
)  # fmt: skip
def test_factors(linear, change, error, message):
    adapter = (CASE.adapter if linear is lora else DORA) | change
    with pytest.raises(error, match=message):
        linear(adapter=adapter)


@BOTH
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (jnp.ones((5, 11)), ValueError,
         r"x does not fit a weight of shape \(12, 9\): expected x \(..., 12\), got \(5, 1"),
        (jnp.ones((5, 9)), ValueError, r"is the weight \(out, in\), as in PyTorch"),
        (jnp.ones((5, 12), int), TypeError, "x must be floating point, got dtype int32"),
        (jnp.ones(()), ValueError, r"got \(\)"),
        ([1.0] * 12, TypeError, "x must be an array, got list"),
    ],
)  # fmt: skip
def test_input(linear, x, error, message):
    with pytest.raises(error, match=message):
        linear(x)


@BOTH
@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        (float("nan"), ValueError, "alpha must be finite in float32, got nan"),
        (float("inf"), ValueError, "alpha must be finite in float32, got inf"),
        (1e39, ValueError, r"alpha must be finite in float32, got 1e\+39"),
        (10**400, ValueError, "alpha must be finite in float32, got 1000"),
        (jnp.float32(jnp.nan), ValueError, "alpha must be finite in float32, got nan"),
        (1j, TypeError, "alpha must be a number or a scalar array, got 1j"),
        (np.complex64(1), TypeError, "alpha must be a real number, got dtype complex64"),
        ("16", TypeError, r"alpha must be a number or a scalar array, got '16' \(str\)"),
        (True, TypeError, "alpha must be a number or a scalar array, got True"),
        (None, TypeError, "alpha must be a number or a scalar array, got None"),
        (jnp.ones(3), ValueError, r"alpha must be a scalar.*shape \(3,\).*use jax.vmap"),
    ],
)
def test_alpha(linear, alpha, error, message):
    with pytest.raises(error, match=message):
        linear(alpha=alpha)


@BOTH
@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (">f4", r"has the byte order of dtype '>f4'.*x\.dtype\.newbyteorder\('='\)"),
        (">f2", "has the byte order of dtype '>f2'"),
        (object, r"got dtype object and shape .*np\.asarray\(values, 'float32'\)"),
        ("U3", "got dtype <U3 and shape .*of which JAX has no arrays"),
        ("S3", "got dtype .S3 and shape .*of which JAX has no arrays"),
        ("M8[s]", r"got dtype datetime64\[s\] and shape"),
    ],
)
def test_arrays_that_jax_does_not_take(linear, dtype, message):
    def cast(value):
        return np.ones(value.shape).astype(dtype)

    for name, options in {
        "x": {"x": cast(X)},
        "frozen_weight": {"weight": cast(W)},
        r"adapter\['A'\]": {"adapter": {**DORA, "A": cast(A)}},
    }.items():
        if linear is lora and "adapter" in options:
            del options["adapter"]["m"]
        with pytest.raises(TypeError, match=f"^{name} .*{message}"):
            linear(**options)


def test_arrays_without_values_any_more():
    def gone(tree):
        tree = jax.tree.map(lambda v: v.copy(), tree)
        for leaf in jax.tree.leaves(tree):
            leaf.delete()
        return tree

    int8 = lora_jax.quant.quantize_int8(W)
    for name, call in {
        "x": lambda: lora(x=gone(X)),
        "frozen_weight": lambda: lora(weight=gone(W)),
        r"adapter\['A'\]": lambda: lora_jax.lora_delta(gone(CASE.adapter)),
        "key": lambda: lora_jax.init_lora_adapter(gone(KEY), W, 2),
        "dropout_key": lambda: dora(dropout_rate=0.5, dropout_key=gone(KEY)),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} has been deleted or donated"):
            call()
    with pytest.raises(ValueError, match="frozen_weight has been deleted or donated"):
        lora(weight=gone(int8))


@BOTH
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_rate": 0.1}, ValueError,
         "dropout_rate is 0.1 but dropout_key is None: pass a jax.random key to train"),
        ({"dropout_rate": 1.0, "dropout_key": KEY}, ValueError,
         "dropout_rate must be at least 0 and below 1, got 1.0"),
        ({"dropout_rate": -0.1, "dropout_key": KEY}, ValueError, "got -0.1"),
        ({"dropout_rate": float("nan"), "dropout_key": KEY}, ValueError, "got nan"),
        ({"dropout_rate": jnp.float32(0.1), "dropout_key": KEY}, TypeError,
         "dropout_rate must be a Python number.*static"),
        ({"dropout_rate": "0.1"}, TypeError, r"must be a Python number.*got '0.1' \(str\)"),
        ({"rank_stabilized": "no"}, TypeError, "rank_stabilized must be True or False"),
        ({"dropout_rate": 0.1, "dropout_key": 3}, TypeError,
         "dropout_key must be a jax.random key, got int"),
        ({"dropout_rate": 0.1, "dropout_key": jnp.ones(2)}, ValueError,
         r"dropout_key must be one jax.random key, got shape \(2,\) and dtype float32"),
        ({"dropout_rate": 0.1, "dropout_key": jax.random.split(KEY)}, ValueError,
         r"must be one jax.random key, got shape \(2,\)"),
    ],
)  # fmt: skip
def test_dropout(linear, options, error, message):
    with pytest.raises(error, match=message):
        linear(**options)


STACKED, DORAS = support.make_case("stacked"), support.make_case("stacked", method="dora")


def misspelt(name, right):
    return {key: value for key, value in DORA.items() if key != right} | {name: A}


def without(name, adapter):
    return {key: value for key, value in adapter.items() if key != name}


# Each message, and the calls that raise it.
REFUSALS = {
    r"frozen_weight is a jax.ShapeDtypeStruct.*eval_shape": (TypeError, [
        lambda: lora(weight=jax.ShapeDtypeStruct((12, 9), "float32")),
        lambda: dora(weight=jax.ShapeDtypeStruct((12, 9), "float32")),
    ]),
    r"expected A \(3, 12, rank\) and B \(3, rank, 9\)": (ValueError, [
        lambda: lora(STACKED.x, STACKED.weight, STACKED.adapter | {"A": A[None]}),
        lambda: dora(DORAS.x, DORAS.weight, DORAS.adapter | {"A": A[None]}),
    ]),
    "must have the entries A, B.*missing: A": (KeyError, [
        lambda: lora(adapter={"B": B}), lambda: dora(adapter=without("A", DORA)),
    ]),
    "must have the entries A, B.*missing: B": (KeyError, [
        lambda: lora(adapter={"A": A}), lambda: dora(adapter=without("B", DORA)),
    ]),
    "missing: m": (KeyError, [lambda: dora(adapter=CASE.adapter)]),
    "unknown: lora_A; 'lora_A' is called 'A' h": (KeyError, [
        lambda: dora(adapter=misspelt("lora_A", "A")),
    ]),
    "unknown: a; 'a' is called 'A'": (KeyError, [lambda: dora(adapter=misspelt("a", "A"))]),
    "unknown: lora_B; 'lora_B' is called 'B' h": (KeyError, [
        lambda: dora(adapter=misspelt("lora_B", "B")),
    ]),
    "'magnitude' is called 'm' h": (KeyError, [
        lambda: dora(adapter=misspelt("magnitude", "m")),
    ]),
    "'bias' is called 'B_bias' h": (KeyError, [lambda: dora(adapter=misspelt("bias", ""))]),
    "at 'q'.*'lora_A' is called 'A' here": (KeyError, [
        lambda: lora_jax.tree_lora_delta({"q": {"lora_A": A, "lora_B": B}}),
    ]),
    "adapter must be a dict of arrays.*got tuple": (TypeError, [
        lambda: lora(adapter=(A, B)), lambda: dora(adapter=(A, B)),
    ]),
    "entry 'm' would be lost here: it is the magnitude of a DoRA adapter.*dora_lin": (
        ValueError, [
            lambda: lora(adapter=DORA),
            lambda: lora_jax.lora_delta(DORA),
            lambda: lora_jax.lora_bias_delta(DORA),
            lambda: lora_jax.merge_lora_weight(W, DORA),
            lambda: lora_jax.merge_lora_layer(W, None, DORA),
            lambda: lora_jax.unmerge_lora_layer(W, jnp.ones(9), DORA),
            lambda: lora_jax.unmerge_lora_weight(W, DORA),
            lambda: lora_jax.tree_lora_delta({"q": DORA}),
        ]),
    "entry 'A_bias' would be lost here: it shifts the layer's bias.*merge_lora_layer": (
        ValueError, [
            lambda: lora_jax.lora_delta(BIASED),
            lambda: lora_jax.merge_lora_weight(W, BIASED),
            lambda: lora_jax.unmerge_lora_weight(W, BIASED),
            lambda: lora_jax.tree_lora_delta({"q": BIASED}),
        ]),
    "'A_bias' would be lost here: a DoRA adapter": (ValueError, [
        lambda: dora(adapter=BIASED | DORA),
        lambda: lora_jax.merge_dora_weight(W, BIASED | DORA),
        lambda: lora_jax.dora_column_norm(W, BIASED),
    ]),
    r"'A_bias'\] does not fit: expected shape \(4,\)": (ValueError, [
        lambda: lora(adapter=BIASED | {"A_bias": jnp.ones(5)}),
    ]),
    r"'B_bias'\] does not fit: expected shape \(9,\)": (ValueError, [
        lambda: lora(adapter=BIASED | {"B_bias": jnp.ones(5)}),
    ]),
    "A and B do not fit each other: expected A .*look swapped or tr": (ValueError, [
        lambda: lora_jax.lora_delta({"A": B, "B": A}),
    ]),
    r"expected x \(3, ..., 12\), got \(5, 12\). The leading axes \(3,\) .*jax.vmap": (
        ValueError, [lambda: lora(STACKED.x[0], STACKED.weight, STACKED.adapter)]),
    "x does not fit": (ValueError, [lambda: jax.jit(lora)(jnp.ones((5, 11)))]),
    r"^bias does not fit: expected shape \(9,\), for a w": (ValueError, [
        lambda: lora(bias=jnp.ones(12)), lambda: dora(bias=jnp.ones(12)),
    ]),
    r"frozen_bias does not fit: expected shape \(9,\)": (ValueError, [
        lambda: lora_jax.merge_lora_layer(W, jnp.zeros(12), BIASED),
    ]),
    r"merged_bias does not fit: expected shape \(9,\)": (ValueError, [
        lambda: lora_jax.unmerge_lora_layer(W, jnp.zeros(12), BIASED),
    ]),
    "^bias must be floating point, got dtype int32": (TypeError, [
        lambda: lora(bias=jnp.ones(9, int)), lambda: dora(bias=jnp.ones(9, int)),
    ]),
    "alpha must be finite in float32, got nan": (ValueError, [
        lambda: lora_jax.lora_delta(CASE.adapter, float("nan")),
        lambda: lora_jax.lora_bias_delta(BIASED, float("nan")),
        lambda: lora_jax.merge_lora_weight(W, CASE.adapter, float("nan")),
        lambda: lora_jax.merge_lora_layer(W, None, BIASED, float("nan")),
        lambda: lora_jax.merge_dora_weight(W, DORA, float("nan")),
        lambda: lora_jax.dora_column_norm(W, DORA, float("nan")),
        lambda: lora_jax.tree_lora_delta({}, float("nan")),
    ]),
    "rank_stabilized must be True or False, got 1": (TypeError, [
        lambda: lora_jax.lora_delta(CASE.adapter, rank_stabilized=1),
        lambda: lora_jax.lora_bias_delta(BIASED, rank_stabilized=1),
        lambda: lora_jax.merge_lora_weight(W, CASE.adapter, rank_stabilized=1),
        lambda: lora_jax.merge_dora_weight(W, DORA, rank_stabilized=1),
        lambda: lora_jax.dora_column_norm(W, DORA, rank_stabilized=1),
    ]),
    "detach_norm must be True or False, got 'false'": (TypeError, [
        lambda: dora(detach_norm="false"),
    ]),
    "'pre', 'post', got 'before'": (ValueError, [lambda: lora(dropout_position="before")]),
    r"got 'Peft'. Did you mean 'peft'\?": (ValueError, [lambda: dora(dropout_mode="Peft")]),
    "norm_axis must be one of 'out', 'in', got 'x'": (ValueError, [
        lambda: dora(norm_axis="x"),
        lambda: lora_jax.dora_column_norm(W, norm_axis="x"),
        lambda: lora_jax.init_dora_adapter(KEY, W, 4, norm_axis="x"),
    ]),
    r"'m'\] does not fit: expected shape \(9,\), one magnitude for each output, since "
    r"norm_axis='out', got \(12,\)": (ValueError, [
        lambda: dora(adapter=DORA | {"m": jnp.ones(12)}),
    ]),
    r"expected shape \(12,\), one magnitude for each inp": (ValueError, [
        lambda: dora(norm_axis="in"),
    ]),
    r"^column_norm does not fit: expected shape \(9,\)": (ValueError, [
        lambda: dora(column_norm=jnp.ones(12)),
        lambda: lora_jax.unmerge_dora_weight(W, DORA, jnp.ones(12)),
    ]),
    r"weight_norm_squared does not fit: expected shape \(9,\)": (ValueError, [
        lambda: dora(weight_norm_squared=jnp.ones(12)),
    ]),
    "column_norm must be an array, got NoneType": (TypeError, [
        lambda: lora_jax.unmerge_dora_weight(W, DORA, None),
    ]),
    "weight_norm_squared and column_norm are both given": (ValueError, [
        lambda: dora(column_norm=jnp.ones(9), weight_norm_squared=jnp.ones(9)),
    ]),
    "scale_bias=True needs norm_axis='out'": (ValueError, [
        lambda: dora(adapter=DORA | {"m": jnp.ones(12)}, norm_axis="in", scale_bias=True),
    ]),
    "key must be a jax.random key": (TypeError, [
        lambda: lora_jax.init_lora_adapter(0, W, 4),
        lambda: lora_jax.init_lora_adapter(None, W, 4),
    ]),
    "key must be one jax.random key": (ValueError, [
        lambda: lora_jax.init_lora_adapter(jnp.ones(2), W, 4),
        lambda: lora_jax.init_lora_adapter(jax.random.split(KEY), W, 4),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    error, calls = REFUSALS[message]
    for call in calls:
        with pytest.raises(error, match=message):
            call()


def test_factors_that_happen_to_fit_each_other():
    assert lora_jax.lora_delta({"A": A, "B": A.T}).shape == (12, 12)


def test_numpy_float64_is_float32_where_jax_has_no_float64():
    weight, adapter = np.ones((12, 9)), {"A": np.ones((12, 4)), "B": np.ones((4, 9))}
    magnitude = {"m": np.ones(9)}
    for value in (
        lora_jax.init_lora_adapter(KEY, weight, 4)["A"],
        lora_jax.init_dora_adapter(KEY, weight, 4)["m"],
        lora_jax.lora_delta(adapter),
        lora_jax.merge_lora_weight(weight, adapter),
        lora_jax.merge_dora_weight(weight, adapter | magnitude),
        lora_jax.lora_linear(np.ones((5, 12)), weight, adapter),
        lora_jax.dora_linear(np.ones((5, 12)), weight, adapter | magnitude),
        lora_jax.merge_lora_layer(weight, None, adapter)[1],
    ):
        assert value.dtype == jnp.float32


class OddError(ValueError):
    """As those of json and of JAX, which are not made of a message."""

    def __init__(self, text, position):
        super().__init__(f"{text} at {position}")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OddError("bad", 3), OddError, "at 'a/w': bad at 3"),
        (KeyError("no x"), KeyError, "at 'a/w': no x"),
        (TypeError(), TypeError, "at 'a/w': "),
    ],
)
def test_an_error_of_any_class_gets_its_path(error, kind, message):
    with pytest.raises(kind) as raised, checks.at_path("a/w"):
        raise error
    assert type(raised.value) is kind
    assert raised.value.args == (message,)


def test_an_error_that_makes_its_own_text_has_its_path_in_a_note():
    with pytest.raises(UnicodeDecodeError) as raised, checks.at_path("a/w"):
        b"\xff".decode()
    assert raised.value.__notes__ == ["at 'a/w'"]
