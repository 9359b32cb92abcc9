"""Parts of a weight as they are written, and what a config makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.plan import parts

SHAPE = (6, 8)


@pytest.mark.parametrize(
    ("written", "kept"),
    {
        "[4:]": "[4:]",
        "[ 4 : 6 ]": "[4:]",
        "[-2:]": "[4:]",
        "[-1]": "[5]",
        "[-6]": "[0]",
        "[0:5:2]": "[::2]",
        "[1:4:2]": "[1:4:2]",
        "[3:5:2]": "[3:4]",
        "[[0, 1, 2]]": "[:3]",
        "[[0, 3]]": "[::3]",
        "[[1, 3, 5]]": "[1::2]",
        "[[0, 1, 3]]": "[[0,1,3]]",
        "[::1]": "",
        "[[2]]": "[2:3]",
        "[:, 2:4]": "[:,2:4]",
        "[1:, [0, 6, 7]]": "[1:,[0,6,7]]",
        "[:]": "",
        "[0:6, :]": "",
        "": "",
    }.items(),
)
def test_a_part_has_one_way_of_writing(written, kept):
    assert parts.canonical(written, SHAPE) == kept
    assert parts.canonical(kept, SHAPE) == kept
    index = eval(f"np.index_exp{written}") if written else ...
    want = np.arange(48).reshape(SHAPE)[index]
    array = jnp.arange(48).reshape(SHAPE)
    taken = parts.take(array, kept)
    np.testing.assert_array_equal(taken, want)
    put = parts.put(array, kept, -taken)
    changed = np.arange(48).reshape(SHAPE)
    changed[index] *= -1
    np.testing.assert_array_equal(put, changed)
    entries = parts.entries(kept, SHAPE)
    sizes = [parts.count(entry) for entry in entries]
    factor = jnp.stack([taken.reshape(sizes)] * 3)
    spread = parts.spread(factor, (-1, 0, 1), entries, SHAPE, 0)
    np.testing.assert_array_equal(spread[2], np.where(changed <= 0, -changed, 0))
    mask = parts.mask(kept, SHAPE)
    assert mask.shape == tuple(
        1 if n == size else size for n, size in zip(sizes, SHAPE, strict=True)
    )
    inside = np.broadcast_to(mask, SHAPE)
    np.testing.assert_array_equal(inside[1:], (changed < 0)[1:])


@pytest.mark.parametrize(
    ("part", "message"),
    {
        "[6]": "index 6 of an axis of size 6",
        "[-7]": "index -7 of an axis of size 6",
        "[6:]": "nothing of an axis of size 6",
        "[::-1]": "steps of at least 1",
        "[[3, 0]]": "each index once, in ascending order",
        "[[0, 0]]": "each index once, in ascending order",
        "[[0, 9]]": "index 9 of an axis of size 6",
        "[0, 0, 0]": "has 3 axes, and the weight is",
        "[[0, 1], [0, 1]]": "more than one list",
        "[a]": "must be an index such as",
        "4:": "must be an index such as",
        "(4)": "must be an index such as",
    }.items(),
)
def test_what_is_no_part_of_a_weight(part, message):
    with pytest.raises(ValueError, match=message):
        lora_jax.Target(SHAPE, "lora", 2, 1.0, 0.0, (0,), (1,), part=part)


@pytest.mark.parametrize(
    ("pattern", "reading"),
    {
        "layers/up": ("layers/up", "", ""),
        "layers/up[4:]": ("layers/up", "[4:]", ""),
        "*/up[[0, 3], 2:]": ("*/up", "[[0, 3], 2:]", ""),
        "table@lookup": ("table", "", "lookup"),
        "table[4:]@product": ("table", "[4:]", "product"),
        "table@rows": ("table@rows", "", ""),
        "layer_[0-9]": ("layer_[0-9]", "", ""),
        "layer_[ab]": ("layer_[ab]", "", ""),
        "re:up[4:]": ("re:up[4:]", "", ""),
        "re:.*table@lookup": ("re:.*table", "", "lookup"),
        "[4]": ("[4]", "", ""),
        "w[4:]": ("w", "[4:]", ""),
        "lookup": ("lookup", "", ""),
    }.items(),
)
def test_a_pattern_is_taken_apart(pattern, reading):
    assert parts.split(pattern) == reading


@pytest.mark.parametrize(
    ("alike", "one"),
    [
        (("[:2]", "[2:]"), [""]),
        (("[1:,4:6]", "[1:,:2]"), ["[1:,[0,1,4,5]]"]),
        (("[0,:4]", "[1:,4:]"), ["[0,:4]", "[1:,4:]"]),
    ],
)
def test_parts_that_differ_along_one_axis_are_one(alike, one):
    assert parts.joined(alike, SHAPE) == one


@pytest.mark.parametrize(
    ("pattern", "suffix", "shape", "matches"),
    [
        ("u*", "[4:]", SHAPE, True),
        (r"re:.p\[4:\]", "[4:]", SHAPE, True),
        ("up[:]", "", SHAPE, True),
        ("*p[3:]", "[4:]", SHAPE, True),
        ("up[3:]", "[4:]", None, False),
        ("up[4:]", "[4:]", None, True),
        ("*p[4:]", "[4:]", None, True),
        ("up@lookup", "[4:]@lookup", None, True),
        ("up[5:]", "[4:]", SHAPE, False),
        ("up[:, :, 0]", "[4:]", SHAPE, False),
        ("w[4:]", "[4:]", SHAPE, False),
        ("up[4:]", "", SHAPE, False),
        ("up@lookup", "[4:]@lookup", SHAPE, True),
        ("up@lookup", "[4:]@product", SHAPE, False),
        ("up@lookup", "[4:]", SHAPE, False),
        ("up[4:]", "[4:]@product", SHAPE, True),
    ],
)
def test_a_pattern_matches_what_is_inside_of_its_part(pattern, suffix, shape, matches):
    found = parts.first_match(["other", pattern], f"up{suffix}", suffix, shape)
    assert found == (pattern if matches else None)
    # A set of characters is no part.
    assert parts.first_match(["w[12]"], f"w1{suffix}", suffix, shape) == "w[12]"


SHAPES = {"up": (6, 8, 8), "w1": (8, 8)}
PARAMS = {path: jax.ShapeDtypeStruct(own, "float32") for path, own in SHAPES.items()}


def plan_of(targets, **options):
    config = lora_jax.LoraConfig(rank=2, targets=targets, axes={"up": "bio"}, **options)
    return lora_jax.plan_adapters(config, PARAMS)


@pytest.mark.parametrize(
    ("targets", "options", "found"),
    [
        ("up[4:]", {}, {"up[4:]": 2}),
        (("up[0]", "up[5]"), {}, {"up[0]": 2, "up[5]": 2}),
        ("up[-2:]", {"rank_pattern": {"up[4]": 4}}, {"up[4:5]": 4, "up[5:]": 2}),
        ("up", {"exclude": "up[:4]"}, {"up[4:]": 2}),
        ("up", {"exclude": ("up[0]", "up[[2, 5]]")}, {"up[[1,3,4]]": 2}),
        ("up", {"rank_pattern": {"up[::2]": 4}}, {"up[::2]": 4, "up[1::2]": 2}),
        ("up", {"rank_pattern": {"up[1:]": 4, "up": 6}}, {"up[:1]": 6, "up[1:]": 4}),
        ("up", {"rank_pattern": {"up": 6, "up[1:]": 4}}, {"up": 6}),
        ("up[1:, :, 4:]", {}, {"up[1:,:,4:]": 2}),
        ("w[12]", {}, {"w1": 2}),
        ("up@product", {}, {"up@product": 2}),
        ("up", {"exclude": "up@lookup"}, {"up@product": 2}),
        (("up@lookup", "up[1:]@product"), {}, {"up@lookup": 2, "up[1:]@product": 2}),
    ],
)
def test_targets_of_a_config(targets, options, found):
    axes = {"up": "bio"} if "up" in str(targets) else {}
    config = lora_jax.LoraConfig(rank=2, targets=targets, axes=axes, **options)
    plan = lora_jax.plan_adapters(config, PARAMS)
    assert {path: target.rank for path, target in plan.targets.items()} == found
    assert lora_jax.AdapterPlan.from_json(plan.to_json()) == plan
    for path, target in plan.targets.items():
        why = plan.explain(path)
        assert sum(f"by targets: {str(t)!r}" in why for t in np.ravel(targets)) == 1
        if target.part:
            assert "adapted in part" in plan.explain(plan.leaf(path))
        assert plan.subset(path).replace(scale={path: 0.5}).scales == {path: 0.5}


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (("up", "up[4:]"), {}, "'up' and 'up\\[4:\\]' overlap"),
        (("up[:5]", "up[4:]"), {}, "overlap: an entry of a weight has one adapter"),
        (("up", "up@lookup"), {}, "overlap"),
        ("up[6]", {}, "at 'up': the part \\[6\\] has the index 6"),
        ("down[4:]", {}, "matches no array of params: 'down'"),
        ("up@lookups", {}, "A use is '@lookup' or '@product'"),
        ("up", {"exclude": "up[:]"}, "nothing is adapted"),
        ("up", {"rank_pattern": {"w1[0]": 4}}, "'w1' has no adapter"),
        ("up", {"train": "w1[0]"}, "a part of it, but a leaf is trained as a whole"),
        ("up[4:]", {"train": "up"}, "the pattern 'up\\[4:\\]' of targets adapts it"),
        ("up[:, 0]", {}, "the part \\[:,0\\] is a vector"),
        ("up[1:, :4]", {"use_dora": True}, "only some of the inputs"),
    ],
)
def test_what_a_config_cannot_adapt(targets, options, message):
    with pytest.raises(ValueError, match=message):
        plan_of(targets, **options)


def test_brackets_that_can_be_read_in_two_ways():
    params = {"w": PARAMS["w1"], "w1": PARAMS["w1"]}
    config = lora_jax.LoraConfig(rank=2, targets="w[1]")
    with pytest.raises(ValueError, match=r"'w\[1\]' of targets can be read in two ways"):
        lora_jax.plan_adapters(config, params)
    config = lora_jax.LoraConfig(rank=2, targets="re:w[1]")
    assert list(lora_jax.plan_adapters(config, params).targets) == ["w1"]


def test_a_use_that_the_function_does_not_have():
    def fn(params, x):
        return x @ params["w1"]

    config = lora_jax.LoraConfig(rank=2, targets="w1@lookup")
    with pytest.raises(ValueError, match="has no look-up of its rows"):
        lora_jax.plan_adapters(config, PARAMS, fn, jnp.ones((3, 8)))


def test_plans_of_parts_as_values():
    plan = plan_of(("up[:2]", "up[4:]"))
    first, last = plan.subset("up[0:2]"), plan.subset("up[-2:]")
    assert list(first.targets) == ["up[:2]"]
    assert list(last.targets) == ["up[4:]"]
    assert "up" not in first.skipped
    assert (first | last).targets == plan.targets
    assert plan.replace(scale={"up[4:]": 0.5}).scales == {"up[:2]": 8.0, "up[4:]": 0.5}
    assert plan.replace(scale={"up": 0.5}).scales == {"up[:2]": 0.5, "up[4:]": 0.5}
    with pytest.raises(ValueError, match="overlap"):
        _ = plan | plan_of("up[1:3]")
    with pytest.raises(ValueError, match="must end so"):
        lora_jax.AdapterPlan(plan.config, {"up": plan.targets["up[:2]"]})
    other = lora_jax.Target((9, 8, 8), "lora", 2, 1.0, 0.0, (1,), (2,), (0,), part="[8]")
    with pytest.raises(ValueError, match="with the shapes"):
        lora_jax.AdapterPlan(plan.config, {**plan.targets, "up[8]": other})
    whole = plan_of("up").to_json()
    assert '"part"' not in whole
    assert '"use"' not in whole


def test_a_use_has_the_axes_of_its_own():
    """A table's look-ups have the rows as inputs, its products as outputs."""

    def tied(params, tokens):
        return params["table"][tokens] @ params["table"].T

    params = {"table": jax.ShapeDtypeStruct((20, 8), "float32")}
    uses = {"table@lookup": (20, 8), "table@product": (8, 20)}
    for targets, shapes in (
        *((use, {use: uses[use]}) for use in uses),
        (("table@product", "table@lookup"), uses),
        ("table", {"table": (20, 8)}),
    ):
        config = lora_jax.LoraConfig(rank=2, targets=targets)
        plan = lora_jax.plan_adapters(config, params, tied, jnp.arange(3))
        assert {k: target.matrix_shape for k, target in plan.targets.items()} == shapes
    given = lora_jax.LoraConfig(rank=2, targets="table@product", axes={"table": "io"})
    plan = lora_jax.plan_adapters(given, params, tied, jnp.arange(3))
    assert plan.targets["table@product"].axes == "io"
