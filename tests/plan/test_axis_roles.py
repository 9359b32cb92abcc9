"""Which axes are input, output and batch, from uses written by hand."""

import pytest

from lora_jax.plan import axis_roles
from lora_jax.plan.target import Target, Use

LETTERS = {"c": "contracted", "k": "kept", "b": "batch", "x": "indexed", "s": "stacked"}


def use(roles, where=""):
    """A use from one letter for each axis; a dot where the role is not known."""
    return Use("dot_general", tuple(LETTERS.get(role, "") for role in roles), where)


def letters(shape, *roles):
    axes = axis_roles.resolve_axes(shape, [use(role) for role in roles])
    return "".join(
        "iob"[[axis in group for group in axes].index(True)] for axis in range(len(shape))
    )


@pytest.mark.parametrize(
    ("shape", "roles", "want"),
    [
        ((4, 6), ["ck"], "io"),
        ((4, 6), ["kc"], "oi"),
        ((4, 2, 3), ["ckk"], "ioo"),
        ((2, 3, 4), ["cck"], "iio"),
        ((5, 4, 6), ["sck"], "bio"),
        ((5, 4, 6), ["bck"], "bio"),
        ((2, 5, 4, 6), ["sbkc"], "bboi"),
        ((5, 4, 6), ["xck"], "bio"),
        ((5, 4, 6), ["xck", "bck"], "bio"),
        ((5, 4, 6), ["x..", "bck"], "bio"),
        ((1, 4, 6), ["bck", "cck"], "bio"),
        ((3, 4, 6), ["ck.", ".kc"], "ioi"),
        # An embedding, also with an output head that is tied to it.
        ((10, 4), ["xk"], "io"),
        ((10, 4), ["x."], "io"),
        ((10, 4), ["xk", "kc"], "io"),
        ((10, 4), ["kc", "xk"], "oi"),
        ((3, 10, 4), ["bxk"], "bio"),
        ((3, 10, 4), ["sxk", "skc"], "bio"),
        # The first use decides, and the others may be swapped.
        ((4, 6), ["ck", "kc", "ck"], "io"),
        ((4, 6), ["kc", "ck"], "oi"),
        ((4, 6), ["..", "kk", "ck"], "io"),
        # What is not known belongs to the right neighbor, or the left one.
        ((1, 4, 6), [".ck"], "iio"),
        ((4, 1, 6), ["c.k"], "ioo"),
        ((4, 6, 1), ["ck."], "ioo"),
        ((1, 5, 4, 6), [".sck"], "bbio"),
        ((4, 2, 3), ["c.k", "ckk"], "ioo"),
        ((4, 2, 3), ["c.k", "kcc"], "ioo"),
        ((4, 1, 6), ["cck", "ckk"], "iio"),
    ],
)
def test_axes(shape, roles, want):
    assert letters(shape, *roles) == want


def test_groups_ascend():
    axes = axis_roles.resolve_axes((4, 2, 3, 5), [use("kckb")])
    assert axes == axis_roles.Resolved((1,), (0, 2), (3,))
    axes = axis_roles.from_letters("obio", (2, 3, 4, 5))
    assert axes == axis_roles.Resolved((2,), (0, 3), (1,))


def test_a_stack_run_through_in_blocks():
    axes = axis_roles.resolve_axes((6, 4, 5), [use("sxx"), use("kck")])
    assert axes == axis_roles.Resolved((1,), (2,), (0,))


@pytest.mark.parametrize(
    ("shape", "roles"),
    [
        ((4, 2, 3), ["ckk", "cck"]),
        ((2, 4, 6), ["bck", "cck"]),
        ((5, 4, 6), ["bck", "kck"]),
        ((5, 4, 6), ["sck", "cck"]),
        ((5, 4, 6), ["ckk", "kxk"]),
    ],
)
def test_uses_that_contradict_each_other(shape, roles):
    uses = [use(role, f"model.py:{i}") for i, role in enumerate(roles)]
    message = r"contradict each other.*at model.py:0 \(.*and dot_general at model.py:1 \("
    with pytest.raises(axis_roles.AmbiguousError, match=message):
        axis_roles.resolve_axes(shape, uses)


@pytest.mark.parametrize("roles", ["..", "cc", "kk", "sc", "bk"])
def test_no_low_rank_use(roles):
    message = r"none of its uses contracts some axes and keeps others: dot_general \("
    with pytest.raises(axis_roles.UnsuitableError, match=message):
        axis_roles.resolve_axes((4, 6), [use(roles)])


@pytest.mark.parametrize(
    ("shape", "roles"), [((4, 1), "ck"), ((1, 4), "ck"), ((5, 4, 1), "bck")]
)
def test_vectors(shape, roles):
    with pytest.raises(axis_roles.UnsuitableError, match="it is a vector: as a matrix it "):
        axis_roles.resolve_axes(shape, [use(roles)])


def sides(text, sizes):
    """The sides of a value: for each axis its letter in the plan and its role."""
    pairs = zip(text.split(), sizes, strict=True)
    return [axis_roles.Side(own[0], LETTERS.get(own[1], ""), n) for own, n in pairs]


@pytest.mark.parametrize(
    ("shape", "axes", "used", "sizes", "want"),
    [
        ((4, 6), "io", "ic ok", (4, 6), "io"),
        ((4, 6), "io", "ik oc", (4, 6), "oi"),
        ((4, 6), "io", "ix ok", (4, 6), "io"),
        ((4, 6), "io", "ic", (4,), None),
        ((4, 6), "io", "ic oc", (4, 6), None),
        ((4, 6), "io", "i. o.", (4, 6), None),
        ((4, 6), "io", "ik ok", (4, 6), None),
        ((4, 6), "io", "ik i. oc", (2, 2, 6), "oi"),
        ((4, 6), "io", "ik oc o.", (4, 2, 3), "oi"),
        ((4, 6), "io", "ik oc ok", (4, 2, 3), None),
        ((4, 2, 6), "iio", "ic ik oc", (4, 2, 6), "ioi"),
        ((4, 2, 6), "iio", "ic ik ok", (4, 2, 6), "ioo"),
        ((4, 2, 3), "ioo", "ik oc ok", (4, 2, 3), "oio"),
        ((4, 6), "io", "ib ok", (4, 6), "bo"),
        ((4, 6), "io", "ic ob", (4, 6), "ib"),
        # One axis of two, found by its size; in a reshaped value the plan is right.
        ((4, 2, 3), "ioo", "ic ok oc", (4, 2, 3), "ioi"),
        ((4, 2, 3), "ioo", "ic oc ok", (4, 2, 3), "iio"),
        ((4, 2, 3), "ioo", "ic ok ob", (4, 2, 3), "iob"),
        ((4, 2, 3), "ioo", "ic ok oc", (4, 2, 9), "iio"),
        ((4, 6), "io", "ic ok oc", (4, 2, 3), "io"),
        ((4, 1, 6), "ioo", "ic ok oc", (4, 2, 3), "ioo"),
        ((4, 6), "io", "ic ok ob", (4, 2, 3), "io"),
        ((4, 6), "io", "ib ok oc", (4, 2, 3), None),
        ((4, 6), "io", "ic ob o.", (4, 2, 3), None),
        ((4, 6), "io", "ik ic o.", (2, 2, 6), None),
    ],
)
def test_letters_of_a_use(shape, axes, used, sizes, want):
    groups = axis_roles.from_letters(axes, shape)
    target = Target(shape, "lora", 1, 1.0, 0.0, *groups)
    ndim = sum(size > 1 for size in sizes)
    assert axis_roles.as_used(target, sides(used, sizes), ndim) == want
