"""What a config chooses, from uses written by hand."""

import jax
import jax.numpy as jnp
import pytest

from lora_jax import quant
from lora_jax._core import tree_paths
from lora_jax.plan import selection
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.config import LoraConfig
from lora_jax.plan.target import Use

ROLES = {"c": "contracted", "k": "kept", "x": "indexed", "s": "stacked", ".": ""}


def use(roles, primitive="dot_general", where="m.py:1", merged=""):
    linear = primitive == "dot_general" and not merged
    return Use(primitive, tuple(ROLES[role] for role in roles), where, merged, linear)


def shaped(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = {
    "embed": shaped(50, 12),
    "layers": {
        "q": {"kernel": shaped(12, 2, 3), "bias": shaped(2, 3)},
        "o": {"kernel": shaped(9, 12)},
        "norm": shaped(12),
        "conv": shaped(3, 12, 9),
        "sorted": shaped(12, 7),
        "twice": shaped(4, 5, 6),
    },
    "quantized": shaped(12, 9, dtype="int8"),
    "tiny": shaped(12, 9, dtype="float8_e4m3fn"),
    "unused": shaped(12, 9),
    "empty": shaped(12, 0),
    "head": shaped(12, 1),
    "step": 3,
}
USES = {
    "embed": (use("xk", "gather"),),
    "layers/q/kernel": (use("ckk"),),
    "layers/q/bias": (use("kk", "add", merged="no rule for add"),),
    "layers/o/kernel": (use("kc"), use("..", "sort", merged="no rule for sort")),
    "layers/conv": (use(".ck", "conv_general_dilated"),),
    "layers/sorted": (use("..", "sort", "m.py:5", "no rule for sort"),),
    "layers/twice": (use("ckk", where="m.py:7"), use("cck", where="m.py:8")),
    "unused": (),
    "empty": (use("ck"),),
    "head": (use("ck"),),
}


def plan(targets="all-linear", exclude=(), *, uses=USES, params=PARAMS, **fields):
    is_given = "*/twice" in fields.get("axes", ())
    if targets == "all-linear" and params is PARAMS and not is_given:
        exclude = (*([exclude] if exclude else []), "layers/twice")  # which is ambiguous
    config = LoraConfig(2, targets=targets, exclude=exclude, **fields)
    return selection.select(config, tree_paths.leaf_paths(params), uses)


def test_all_linear_does_not_pass_over_what_it_cannot_tell():
    config = LoraConfig(2)
    with pytest.raises(ValueError, match=r"(?s)'layers/twice': its uses contradict.*axes="):
        selection.select(config, tree_paths.leaf_paths(PARAMS), USES)


def test_all_linear_leaves_out_what_is_added():
    uses = {"w": (use("ck"), use("xx", "add", "m.py:3"))}
    params = {"w": shaped(12, 10)}
    with pytest.raises(ValueError, match=r"'w': it is added to something.*m.py:3"):
        plan(uses=uses, params=params)
    assert plan("w", uses=uses, params=params).targets["w"].axes == "io"


# ---------------------------------------------------------------------------- all-linear


def test_all_linear_is_what_matrix_products_use():
    axes = {path: target.axes for path, target in plan().targets.items()}
    assert axes == {"layers/q/kernel": "ioo", "layers/o/kernel": "oi"}


def test_each_other_leaf_has_its_reason():
    got = plan(exclude="*/o/*")
    reasons = {
        "embed": "no matrix product uses it, only gather at m.py:1 (indexed, kept)",
        "layers/q/bias": "no matrix product uses it, only add at m.py:1",
        "layers/o/kernel": "the pattern '*/o/*' of exclude matches it",
        "layers/norm": "it is a vector, (12,)",
        "layers/conv": "no matrix product uses it, only conv_general_dilated",
        "layers/sorted": "no matrix product uses it, only sort",
        "layers/twice": "the pattern 'layers/twice' of exclude matches it",
        "quantized": "its dtype int8 is not floating point",
        "tiny": "its dtype float8_e4m3fn has less than 16 bits",
        "unused": "the function never uses it",
        "empty": "it has no entries: its shape is (12, 0)",
        "head": "it is a vector: as a matrix it is (12, 1), of rank 1",
        "step": "it is not an array: int",
    }
    assert sorted(got.skipped) == sorted(reasons)
    for path, reason in reasons.items():
        assert got.skipped[path].startswith(reason)
        assert got.explain(path).startswith(f"{path}: no adapter, because {reason}")


def test_all_linear_without_a_function_is_every_matrix():
    got = plan(uses=None)
    matrices = ["embed", "layers/o/kernel", "layers/q/bias", "layers/sorted", "unused"]
    assert sorted(got.targets) == matrices
    assert {target.axes for target in got.targets.values()} == {"io"}
    assert "without a function only the axes of a 2-D" in got.skipped["layers/q/kernel"]
    assert "without a function" in got.explain("embed")


def test_all_linear_takes_what_axes_are_given_for():
    got = plan(uses=None, axes={"*/q/kernel": "ioo"})
    assert got.targets["layers/q/kernel"].axes == "ioo"
    got = plan(axes={"*/o/*": "io", "*/twice": "ioo"})
    assert got.targets["layers/twice"].axes == "ioo"


# ---------------------------------------------------------------------------- patterns


def test_patterns_choose_what_can_have_an_adapter():
    got = plan(("embed", "re:.*/conv", "*/q/*"), exclude="*/bias")
    axes = {path: target.axes for path, target in got.targets.items()}
    assert axes == {"embed": "io", "layers/conv": "iio", "layers/q/kernel": "ioo"}
    assert got.skipped["layers/o/kernel"] == "no pattern of targets matches it"
    assert "chosen by targets: 're:.*/conv'" in got.explain("layers/conv")


def test_numbers_of_a_target():
    options = {"rank_pattern": {"*/q/*": 4, "*/kernel": 6}, "alpha_pattern": {"embed": 1.0}}
    options |= {"alpha": 8.0, "dropout": 0.5, "use_dora": True}
    got = plan(("embed", "*/kernel"), **options)
    numbers = [(path, t.rank, t.scale) for path, t in got.targets.items()]
    kernels = ("layers/o/kernel", 6, 8.0 / 6), ("layers/q/kernel", 4, 2.0)
    assert sorted(numbers) == [("embed", 2, 0.5), *kernels]
    assert {(t.method, t.dropout) for t in got.targets.values()} == {("dora", 0.5)}


def test_total_counts_arrays_but_no_random_keys():
    params = {"w": shaped(12, 9), "n": shaped(3, dtype="int8"), "f": print, "none": None}
    params["key"] = jax.random.key(0)
    got = plan("w", uses=None, params=params)
    assert got.total == 12 * 9 + 3


def test_only_shapes_and_dtypes_are_used():
    arrays = {"w": jnp.ones((12, 9)), "b": jnp.ones(9)}
    abstract = jax.eval_shape(lambda: arrays)
    assert plan("w", uses=None, params=arrays) == plan("w", uses=None, params=abstract)


def test_a_large_rank_is_allowed_and_noted():
    got = plan("*/o/kernel", rank_pattern={"*": 64})
    assert "note: at rank 64 A and B have 1,344 entries" in got.explain("layers/o/kernel")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("quantized", "its dtype int8 is not floating point"),
        ("tiny", "float8_e4m3fn has less than 16 bits"),
        ("layers/norm", r"it is a vector, \(12,\)"),
        ("unused", "the function never uses it"),
        ("empty", r"it has no entries: its shape is \(12, 0\)"),
        ("layers/sorted", "every use of it needs the merged weight: sort at m.py:5"),
        ("head", r"as a matrix it is \(12, 1\)"),
    ],
)
def test_a_pattern_that_matches_what_cannot_have_an_adapter(path, reason):
    message = rf"(?s)cannot have an adapter:\n  '{path}': .*{reason}.*exclude=\('{path}',\)"
    with pytest.raises(ValueError, match=message):
        plan((path, "embed"))


def test_ambiguous_axes_show_both_uses_and_can_be_given():
    message = r'(?s)m.py:7 .* and .*m.py:8 .*Give axes={\'layers/twice\': "..."} with one'
    with pytest.raises(ValueError, match=message):
        plan("*/twice")
    got = plan("*/twice", axes={"*/twice": "iio"})
    assert got.targets["layers/twice"].matrix_shape == (20, 6)
    assert "given by axes['*/twice']" in got.explain("layers/twice")


def test_axes_can_be_given_for_a_weight_that_every_use_merges():
    assert plan("*/sorted", axes={"*": "oi"}).targets["layers/sorted"].axes == "oi"


def test_more_than_two_axes_without_a_function():
    message = r"(?s)it has 3 axes, .*give plan_adapters the function .*Give axes={'layers/q"
    with pytest.raises(ValueError, match=message):
        plan("*/q/kernel", uses=None)
    assert plan("*/q/kernel", uses=None, axes={"*": "ioo"}).targets


def test_one_error_lists_all():
    with pytest.raises(ValueError, match=r"(?s)'layers/norm': .*'quantized': .*'unused': "):
        plan(("*/norm", "quantized", "unused", "*/kernel"))


@pytest.mark.parametrize("targets", ["all-linear", "*/kernel"])
def test_a_wrong_number_of_letters(targets):
    message = r"axes gives 'layers/q/kernel' the letters 'io', and its shape is \(12, 2"
    with pytest.raises(ValueError, match=message):
        plan(targets, axes={"*/q/*": "io"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("*/qq/kernel",)}, r"targets matches no array .*'layers/q/kernel'"),
        ({"targets": "step"}, "a pattern of targets matches no array of params: 'step'"),
        ({"exclude": "*/kernal"}, r"exclude matches no array .*'layers/./kernel'"),
        ({"train": "*/biass"}, r"train matches no array .*'layers/q/bias'"),
        ({"rank_pattern": {"embd": 2}}, "rank_pattern matches no weight that is adapted"),
        ({"rank_pattern": {"embed": 2}}, "'embed'; the first paths are 'layers/o/kernel'"),
        ({"alpha_pattern": {"x": 2}}, "alpha_pattern matches no weight that is adapted"),
        ({"axes": {"unused": "io"}}, "axes matches no weight that is adapted: 'unused'"),
    ],
)
def test_patterns_that_match_nothing(fields, message):
    with pytest.raises(ValueError, match=message):
        plan(**fields)


def test_trained_leaves_are_not_adapted():
    got = plan(train=("*/bias", "layers/o/kernel", "layers/norm"))
    assert list(got.targets) == ["layers/q/kernel"]
    shapes = {"layers/norm": (12,), "layers/o/kernel": (9, 12), "layers/q/bias": (2, 3)}
    assert {path: leaf.shape for path, leaf in got.trained.items()} == shapes
    assert not got.trained.keys() & got.skipped.keys()
    assert "left out: 'layers/o/kernel'" not in str(got)
    # The patterns of exclude are about adapters.
    got = plan("layers/?/kernel", "*/o/*", train="*/o/kernel")
    assert [*got.targets, *got.trained] == ["layers/q/kernel", "layers/o/kernel"]


def test_what_cannot_be_trained():
    params = PARAMS | {"int8": quant.quantize_int8(jnp.ones((12, 9)))}
    with pytest.raises(ValueError, match="train matches leaves that cannot be") as raised:
        plan(("head", "*/o/*"), params=params, train="*")
    assert str(raised.value).splitlines()[1:] == [
        "  'head': the pattern 'head' of targets adapts it. To train it, give "
        "exclude=('head',)",
        "  'int8': it is quantized, so a step would change its codes",
        "  'layers/o/kernel': the pattern '*/o/*' of targets adapts it. To train it, give "
        "exclude=('layers/o/kernel',)",
        "  'quantized': its dtype int8 is not floating point",
        "  'tiny': its dtype float8_e4m3fn has less than 16 bits, and no meaning without "
        "its scales",
        "Narrow the patterns of train.",
    ]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"b": shaped(3)}, r"(?s)nothing is adapted with targets='all-linear':\n  'b': it"),
        ({}, "params has no leaves"),
        ({str(i): shaped(3) for i in range(9)}, "and 4 more"),
    ],
)
def test_nothing_to_adapt(params, message):
    with pytest.raises(ValueError, match=message):
        plan(params=params)
    with pytest.raises(ValueError, match=message):
        plan(params=params, uses=None)


def test_axes_for_a_weight_that_all_linear_leaves_out():
    message = r"axes matches no .*'layers/sorted' has no adapter: no matrix product uses it"
    with pytest.raises(ValueError, match=message):
        plan(axes={"*/sorted": "io"})


def test_matrices_are_left_out_with_a_word():
    left_out = [line for line in str(plan()).splitlines() if line.startswith("left out")]
    assert [line.split("'")[1] for line in left_out] == [
        *(
            "embed",
            "empty",
            "head",
            "layers/conv",
            "layers/q/bias",
            "layers/sorted",
            "unused",
        )
    ]
    without = str(plan(uses=None))
    assert "left out: 'layers/q/kernel': it has 3 axes, (12, 2, 3), and without" in without
    again = AdapterPlan.from_json(plan().to_json())
    assert str(again) == str(plan())


def test_nothing_to_adapt_lists_matrices_first():
    params = {f"{i}": {"scale": shaped(4 + i)} for i in range(7)}
    params |= {"name": "net", "size": 3, "codes": shaped(4, 4, dtype="int8")}
    params["layers"] = {f"{i}": {"w": shaped(4, 4)} for i in range(3)}
    params["z"] = shaped(4, 5)
    uses = {f"layers/{i}/w": (use("..", "sort", merged="no rule"),) for i in range(3)}
    with pytest.raises(ValueError, match="nothing is adapted") as error:
        plan(uses=uses, params=params)
    assert str(error.value).splitlines()[1:] == [
        "  3 weights 'layers/*/w': no matrix product uses it, only sort at m.py:1 "
        "(unknown, unknown); merged: no rule",
        "  'z': the function never uses it",
        "  '0/scale', '1/scale', '2/scale', '3/scale', '4/scale' and 2 more: it is a "
        "vector",
        "  'codes': its dtype int8 is not floating point",
        "  'name', 'size': it is not an array",
    ]
