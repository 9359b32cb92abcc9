"""Adapters in the trees of other libraries, against the formulas of their modules."""

import collections
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
import lora_jax.peft
from lora_jax import FoundAdapter, import_adapters
from tests.support import (
    asarray,
    assert_close,
    assert_same_bits,
    by_path,
    draw,
    normal,
    x64,
)

ULPS = 2**6
SCALE = 1.5
# Of the letters of equations: tokens, widths, heads, stacks, and the rank.
SIZES = dict(zip("tdfnhcelr", (5, 6, 7, 4, 3, 9, 8, 10, 2), strict=True))


class Case(NamedTuple):
    """A weight with factors as a library has them.

    Attributes:
        equation: what the model computes, of `x` and the weight.
        lora: what the library adds: one einsum of `x`, `a` and `b`; or one of `x` and `a`,
            and one of its result and `b`.
        axes: the letters of the weight in the plan.
        keys: of the weight, `a` and `b` in the module.
        a: the shape in the tree, if the library folds axes.
        b: the same.
        scale: what the library multiplies by.
    """

    equation: str
    lora: str
    axes: str
    keys: tuple[str, str, str]
    a: tuple[int, ...] | None = None
    b: tuple[int, ...] | None = None
    scale: float = SCALE

    def operands(self, equation):
        """The shapes of the operands of an equation."""
        words = equation.split("->")[0].split(",")
        return [tuple(SIZES[letter] for letter in word) for word in words]

    @property
    def shapes(self):
        """Of x, the weight, a and b."""
        first, _, second = self.lora.partition(";")
        b = self.operands(second or first)[-1]
        return (*self.operands(self.equation), self.operands(first)[1], b)

    @property
    def arrays(self):
        """x, the weight, a and b, in float64."""
        return [normal(*shape, seed=i) for i, shape in enumerate(self.shapes)]

    def want(self):
        """What the library computes with its factors."""
        x, w, a, b = self.arrays
        first, _, second = self.lora.partition(";")
        if second:
            added = np.einsum(second, np.einsum(first, x, a), b)
        else:
            added = np.einsum(first, x, a, b)
        return np.einsum(self.equation, x, w) + self.scale * added

    def leaves(self):
        """The leaves of the module, by their paths."""
        _, w, a, b = self.arrays
        a, b = a.reshape(self.a or a.shape), b.reshape(self.b or b.shape)
        return dict(zip(self.keys, map(asarray, (w, a, b)), strict=True))


# qwix, google/qwix, qwix/_src/providers/lora.py
qwix = functools.partial(Case, keys=("kernel", "kernel_lora_a", "kernel_lora_b"))
# openpi, Physical-Intelligence/openpi, src/openpi/models/lora.py
openpi = functools.partial(Case, keys=("w", "lora_a", "lora_b"))
# gemma, google-deepmind/gemma, gemma/peft/_lora.py and gemma/gm/nn/_lora.py
gemma = functools.partial(Case, keys=("kernel", "lora/a", "lora/b"), scale=1.0)


def named(stem, ends=("_lora_a", "_lora_b"), prefix=""):
    return (stem, *(prefix + end for end in ends))


CASES = {
    "qwix": {
        "linear": qwix("td,df->tf", "td,dr,rf->tf", "io"),
        "transposed": qwix("td,fd->tf", "td,dr,rf->tf", "oi"),
        "heads out": qwix("td,dnh->tnh", "td,dr,rnh->tnh", "ioo", b=(2, 12)),
        "heads in": qwix("tnh,nhd->td", "tnh,nhr,rd->td", "iio", a=(12, 2)),
        "experts": qwix("etd,edf->etf", "etd,edr,erf->etf", "bio"),
        "experts inside": qwix("etd,def->etf", "etd,edr,erf->etf", "ibo"),
        "layers inside": qwix("ltd,dlf->ltf", "ltd,dlr,rlf->ltf", "ibo"),
        "layers of experts": qwix("letd,ledf->letf", "letd,ledr,lrf->letf", "bbio"),
        "einsum out": qwix("td,cndh->ctnh", "td,dr,rcnh->ctnh", "ooio"),
        "einsum in": qwix("tnh,nhd->td", "tnh,nhr,rd->td", "iio"),
        "einsum of experts": qwix("etd,edf->etf", "etd,edr,rf->etf", "bio"),
        "einsum inside": qwix("etd,def->etf", "etd,der,rf->etf", "ibo"),
    },
    "openpi": {
        "q": openpi("td,ndh->tnh", "td,ndr->tnr;tnr,nrh->tnh", "bio"),
        "kv": openpi("td,cndh->ctnh", "td,cndr->ctnr;ctnr,cnrh->ctnh", "bbio"),
        "out": openpi("tnh,nhd->td", "tnh,nhr->tr;tr,nrd->td", "iio"),
        "layers": openpi("ltnh,lnhd->ltd", "ltnh,lnhr->ltr;ltr,lnrd->ltd", "biio"),
        "gate": Case(
            "td,cdf->ctf",
            "td,cdr,crf->ctf",
            "bio",
            named("gating_einsum", prefix="gating_einsum"),
            scale=1.0,
        ),
        "down": Case(
            "tf,fd->td", "tf,fr,rd->td", "io", named("linear", prefix="linear"), scale=1.0
        ),
    },
    "gemma": {
        "dense": gemma("td,df->tf", "td,dr,rf->tf", "io"),
        "general out": gemma("td,dnh->tnh", "td,dr,rnh->tnh", "ioo"),
        "general in": gemma("tnh,nhd->td", "tnh,nhr,rd->td", "iio"),
        "general batch": gemma("etd,edf->etf", "etd,edr,erf->etf", "bio"),
        "q": gemma(
            "td,ndh->tnh",
            "td,dr,rnh->tnh",
            "oio",
            keys=named("w", ("/a", "/b"), "_LoRAEinsum_0/lora"),
        ),
        "mlp": gemma(
            "td,cfd->tcf",
            "td,dr,rcf->tcf",
            "ooi",
            keys=named("gating_einsum", ("/a", "/b"), "_LoRAEinsum_gating_einsum/lora"),
        ),
        "mlp ": gemma(
            "tf,fd->td",
            "tf,fr,rd->td",
            "io",
            keys=named("linear", ("/a", "/b"), "_LoRAEinsum_linear/lora"),
        ),
    },
}
EACH = pytest.mark.parametrize("layout", CASES)


@pytest.fixture(autouse=True, scope="module")
def settings():
    with x64():
        yield


def nested(leaves):
    """A tree of dicts from leaves by path."""
    tree = {}
    for path, leaf in leaves.items():
        *nodes, last = path.split("/")
        inner = tree
        for node in nodes:
            inner = inner.setdefault(node, {})
        inner[last] = leaf
    return tree


def path_of(name, case):
    return f"{name.strip()}/{case.keys[0]}"


@functools.cache
def model_of(layout):
    """The tree of a library, its model without adapters, and the inputs by name."""
    cases = CASES[layout]
    tree = nested(
        {
            f"{name.strip()}/{key}": leaf
            for name, case in cases.items()
            for key, leaf in case.leaves().items()
        }
    )
    inputs = {name: asarray(case.arrays[0]) for name, case in cases.items()}

    def fn(params, inputs):
        return {
            name: jnp.einsum(
                case.equation, inputs[name], params[name.strip()][case.keys[0]]
            )
            for name, case in cases.items()
        }

    return tree, fn, inputs


def imported(layout):
    tree, fn, inputs = model_of(layout)
    scale = None if layout == "gemma" else SCALE
    return import_adapters(tree, layout, fn, inputs, scale=scale)


def by_name(layout, outputs, of):
    """Compares the outputs of a model with those of `of`, for each weight."""
    for name, case in CASES[layout].items():
        assert_close(outputs[name], of(case), ULPS)


@EACH
def test_merged_and_adapted_outputs_are_those_of_the_library(layout):
    _, fn, inputs = model_of(layout)
    params, adapters, plan = imported(layout)
    merged = lora_jax.merge_adapters(params, adapters, plan)
    by_name(layout, jax.jit(fn)(merged, inputs), Case.want)
    adapted = jax.jit(lora_jax.adapt(fn, plan))
    by_name(layout, adapted(params, adapters, inputs), Case.want)


@EACH
def test_the_plan_has_the_axes_ranks_and_scales(layout):
    tree, _, _ = model_of(layout)
    params, adapters, plan = imported(layout)
    cases = {path_of(*item): item[1] for item in CASES[layout].items()}
    assert {*plan.targets} == {*adapters} == {*cases}
    assert [*by_path(params)] == [p for p in by_path(tree) if p in cases]
    for path, target in plan.targets.items():
        case = cases[path]
        assert (target.axes, target.rank, target.scale) == (case.axes, 2, case.scale)
        assert plan.config.scale_of(path) == case.scale
        assert plan.config.axes_of(path) == case.axes
        assert_same_bits(by_path(params)[path], by_path(tree)[path])


@EACH
def test_imported_adapters_are_saved_stacked_and_served(layout, tmp_path):
    _, fn, inputs = model_of(layout)
    params, adapters, plan = imported(layout)
    lora_jax.save_adapters(tmp_path / "own", adapters, plan)
    assert_same_bits(lora_jax.load_adapters(tmp_path / "own")[0], adapters)
    names = {
        f"m{i}" + ".{}" * target.axes.count("b"): path
        for i, (path, target) in enumerate(plan.targets.items())
    }
    lora_jax.peft.save(tmp_path / "peft", adapters, plan, names=names)
    loaded = lora_jax.peft.load(tmp_path / "peft", params, plan=plan, names=names)
    assert_same_bits(loaded.adapters, adapters)
    stack_adapters = jax.jit(lora_jax.stack_adapters, static_argnames="slots")
    stack, stacked = stack_adapters([adapters, adapters], plan, slots=3)
    assert_same_bits(jax.jit(lora_jax.take_adapters)(stack, 1, plan=plan), adapters)
    rows = {name: case.equation.index("t") for name, case in CASES[layout].items()}
    serve = jax.jit(lora_jax.adapt_rows(fn, stacked, in_axes=(rows,)))
    by_name(layout, serve(params, stack, asarray([1, 0, 0, 1, 0]), inputs), Case.want)


# -------------------------------------------------------------- what shapes alone show


def ones(*shape, dtype="float32"):
    return asarray(np.ones(shape), dtype)


def dense(*shape, a=None, b=None, name="kernel"):
    """A module of qwix."""
    n_in, n_out = shape[-2:]
    factors = (a or (*shape[:-2], n_in, 2), b or (*shape[:-2], 2, n_out))
    keys = (name, f"{name}_lora_a", f"{name}_lora_b")
    return dict(zip(keys, (ones(*own) for own in (shape, *factors)), strict=True))


@pytest.mark.parametrize(
    ("tree", "axes"),
    [
        (dense(6, 7), "io"),
        (dense(7, 6, a=(6, 2), b=(2, 7)), "oi"),
        (dense(3, 6, 7), "bio"),
        (dense(6, 3, 7, a=(6, 3, 2), b=(2, 3, 7)), "ibo"),
        (dense(4, 3, 6, 7), "bbio"),
    ],
)
def test_shapes_show_the_axes(tree, axes):
    plan = import_adapters({"m": tree}, "qwix", scale=3.0).plan
    assert plan.targets["m/kernel"].axes == axes
    assert plan.targets["m/kernel"].rank == 2


def test_axes_say_what_shapes_do_not():
    tree = {"m": dense(6, 6)}
    tree["m"]["kernel_lora_a"] = draw(6, 2)
    for axes in ("io", "oi"):
        read = import_adapters(tree, "qwix", scale=3.0, axes={"m/*": axes})
        update = read.adapters["m/kernel"]["A"] @ read.adapters["m/kernel"]["B"]
        delta = lora_jax.merge_adapters(*read)["m"]["kernel"] - tree["m"]["kernel"]
        assert_close(delta, 3 * np.asarray(update if axes == "io" else update.T), ULPS)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_has_no_groups(groups):
    tree = {"kernel": draw(3, 4 // groups, 6), "kernel_lora_b": draw(2, 6)}
    tree["kernel_lora_a"] = draw(3, 4 // groups, 2)
    x = draw(2, 5, 4)

    def convolve(kernel):
        numbers = {"dimension_numbers": ("NHC", "HIO", "NHC")}
        options = {"feature_group_count": groups, **numbers}
        return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", **options)

    def fn(params):
        return jax.jit(convolve)(params["kernel"])

    def of_layers(params):
        return jax.lax.scan(lambda _, w: (None, fn({"kernel": w})), None, params["kernel"])

    if groups == 2:
        layers = {name: jnp.stack([leaf] * 5) for name, leaf in tree.items()}
        for own, model in ((tree, fn), (layers, of_layers)):
            with pytest.raises(
                ValueError, match=r"'kernel' is the kernel of .* feature groups"
            ):
                import_adapters(own, "qwix", model, scale=SCALE)
    else:
        read = import_adapters(tree, "qwix", fn, scale=SCALE)
        added = convolve(tree["kernel_lora_a"]) @ tree["kernel_lora_b"]
        want = np.asarray(fn(read.params)) + SCALE * np.asarray(added)
        assert_close(fn(lora_jax.merge_adapters(*read)), want, ULPS)


def test_look_ups_of_a_tied_table_are_not_adapted():
    tree = {"e": draw(9, 6), "e_lora_a": draw(6, 2), "e_lora_b": draw(2, 9)}
    ids = asarray([3, 1, 4], "int32")

    def fn(params, ids):
        return params["e"][ids] @ params["e"].T

    e, a, b = (np.asarray(tree[name]) for name in ("e", "e_lora_a", "e_lora_b"))
    want = e[ids] @ e.T + SCALE * e[ids] @ a @ b
    for axes in (None, {"e": "oi"}):
        read = import_adapters(tree, "qwix", fn, ids, scale=SCALE, axes=axes)
        adapted = lora_jax.adapt(fn, read.plan)
        assert_close(adapted(read.params, read.adapters, ids), want, ULPS)
        assert (*read.plan.targets,) == (*read.adapters,) == ("e@product",)
        assert read.plan.config.axes_of("e") == "oi"
    with pytest.raises(ValueError, match="Untie them first"):
        lora_jax.merge_adapters(*read)


def test_scales_go_by_patterns():
    tree = {"a": dense(6, 7), "b": dense(6, 5), "c": dense(6, 4)}
    plan = import_adapters(tree, "qwix", scale={"b/*": 2.0, "*": 0.25}).plan
    assert plan.scales == {"a/kernel": 0.25, "b/kernel": 2.0, "c/kernel": 0.25}
    plan = import_adapters({"m": GEMMA}, "gemma", scale={"m/*": 2.0}).plan
    assert plan.scales == {"m/kernel": 2.0}


def test_a_sum_over_heads_is_wide():
    case = CASES["openpi"]["out"]
    _, w, a, b = (asarray(x, "bfloat16") for x in case.arrays)
    tree = {"w": w, "lora_a": a, "lora_b": b}
    adapter = import_adapters(tree, "openpi", scale=1.0, axes={"w": "iio"}).adapters["w"]
    assert adapter["A"].dtype == jnp.bfloat16
    assert adapter["B"].dtype == jnp.float32
    assert_close(adapter["B"], np.asarray(b, "float64").sum(0), ULPS)


def test_nodes_keep_their_types():
    inner = collections.defaultdict(list, dense(6, 7), bias=ones(7))
    tree = {"blocks": [inner, (ones(2), dense(6, 5))], "step": 3, "empty": {}}
    params = import_adapters(tree, "qwix", scale=1.0).params
    assert params["blocks"][0].default_factory is list
    assert [*params["blocks"][0]] == ["kernel", "bias"]
    assert [*params["blocks"][1][1]] == ["kernel"]
    assert (params["step"], params["empty"]) == (3, {})
    assert len(tree["blocks"][0]) == 4
    plain = [ones(6, 7), {"lora_a": ones(6, 2)}, ones(2, 7)]
    assert import_adapters(plain, of_list, scale=1.0).params[1:] == [None, None]


# ------------------------------------------------------------------ a layout of one's own


def of_list(found):
    """A list of a weight, a dict with the first factor, and the second factor."""
    if found.path != "0":
        return None
    a, b = found.beside["1/lora_a"], found.beside["2"]
    return FoundAdapter({"A": a, "B": b}, "io", ("1/lora_a", "2"))


def turned(found):
    """PyTorch's way round: `down (r, in)` and `up (out, r)`, with DoRA's magnitude."""
    if not found.path.endswith("/kernel"):
        return None
    down, up = found.beside["down"], found.beside["up"]
    adapter = {"A": down.T, "B": up.T, "m": found.beside["m"]}
    return FoundAdapter(adapter, "oi", ("down", "up", "m"))


def test_a_function_is_a_layout():
    tree = {"kernel": normal(7, 6), "down": normal(2, 6), "up": normal(7, 2)}
    tree = {"x": {**tree, "m": normal(7) + 3, "bias": normal(7)}, "y": {"w": normal(3, 2)}}
    read = import_adapters(tree, turned, scale=1.5)
    target = read.plan.targets["x/kernel"]
    assert (target.axes, target.method, target.scale) == ("oi", "dora", 1.5)
    assert by_path(read.params).keys() == {"x/bias", "x/kernel", "y/w"}
    x = tree["x"]
    summed = x["kernel"] + 1.5 * x["up"] @ x["down"]
    want = x["m"][:, None] * summed / np.linalg.norm(summed, axis=1, keepdims=True)
    assert_close(lora_jax.merge_adapters(*read)["x"]["kernel"], want, ULPS)


# ------------------------------------------------------------------------------- errors

GEMMA = {"kernel": ones(6, 7), "lora": {"a": ones(6, 2), "b": ones(2, 7)}}
OPENPI = {"w": ones(4, 6, 7), "lora_a": ones(4, 6, 2), "lora_b": ones(4, 2, 7)}
QUANTIZED = {**dense(6, 7), "kernel": {"array": {"qvalue": ones(6, 7)}}}


def without(tree, key):
    return {name: leaf for name, leaf in tree.items() if name != key}


def bad(adapter=(6, 2, 7), axes="io", leaves=("kernel_lora_a", "kernel_lora_b")):
    n_in, rank, n_out = adapter
    made = {"A": ones(n_in, rank), "B": ones(rank, n_out)}
    return lambda found: (
        FoundAdapter(made, axes, leaves) if found.path == "m/kernel" else None
    )


ERRORS = {
    "no scale": (dense(6, 7), "qwix", {}, "scale is missing.*alpha / rank of its LoraRule"),
    "no scale of openpi": (OPENPI, "openpi", {}, "scale is missing.*scaling_value"),
    "no scale of a function": (dense(6, 7), bad(), {}, "scale is missing"),
    "a scale for some": (
        {"m": dense(6, 7), "n": dense(6, 7)},
        "qwix",
        {"scale": {"*/m/*": 1.0}},
        "scale has no pattern for 'm/n/kernel': qwix multiplies by",
    ),
    "a scale for none": (
        dense(6, 7),
        "qwix",
        {"scale": {"m/w": 1.0, "*": 2.0}},
        "a pattern of scale matches no weight that has a scale: 'm/w'",
    ),
    "scale 0": (dense(6, 7), "qwix", {"scale": 0}, "would never act"),
    "an array as a scale": (dense(6, 7), "qwix", {"scale": ones()}, r"use float\(scale"),
    "unknown layout": (dense(6, 7), "qwicks", {}, "layout must be one of 'qwix'"),
    "no adapters": ({"kernel": ones(6, 7)}, "qwix", {}, "params have no adapters.*'m/kern"),
    "openpi as qwix": (OPENPI, "qwix", {}, "'m/lora_a': it looks .*layout='openpi'"),
    "qwix as openpi": (dense(6, 7), "openpi", {}, "kernel_lora_a': it looks.*'qwix'"),
    "qwix as gemma": (dense(6, 7), "gemma", {}, "kernel_lora_a': it looks.*'qwix'"),
    "gemma as qwix": (GEMMA, "qwix", {}, "'m/lora/b': it looks like a factor.*'gemma'"),
    "half": (
        without(dense(6, 7), "kernel_lora_b"),
        "qwix",
        {},
        "'m/kernel_lora_a': the other factor of the adapter is missing",
    ),
    "no weight": (
        without(dense(6, 7), "kernel"),
        "qwix",
        {},
        "'m/kernel_lora_a', 'm/kernel_lora_b': there is no weight 'm/kernel'",
    ),
    "a weight of integers": (
        {**dense(6, 7), "kernel": ones(6, 7, dtype="int32")},
        "qwix",
        {},
        "there is no weight 'm/kernel' of floating-point values",
    ),
    "quantized": (QUANTIZED, "qwix", {}, "'m/kernel' is quantized: dequantize it first"),
    "a vector": (dense(6, 1), "qwix", {}, r"'m/kernel' is a vector, \(6, 1\)"),
    "a left-over": (
        {**dense(6, 7), "x": {"lora_a": ones(2)}},
        "qwix",
        {},
        "'m/x/lora_a': it looks like a factor, and is none in this layout",
    ),
    "integers": (
        {**dense(6, 7), "kernel_lora_a": ones(6, 2, dtype="int32")},
        "qwix",
        {},
        "at 'm/kernel_lora_a': .*must be floating point",
    ),
    "a square": (
        dense(6, 6),
        "qwix",
        {},
        r"shapes do not show.*\(6, 6\), A \(6, 2\) and B \(2, 6\): 'io' or 'oi'.*Give",
    ),
    "heads in or apart": (OPENPI, "openpi", {}, "'m/w'.*: 'iio' or 'bio'"),
    "two readings": (
        dense(6, 6, 6, a=(6, 6, 6), b=(6, 6, 6)),
        "qwix",
        {"axes": {"*": "ibo"}},
        "'ibo', in several ways.*write the layout as a function",
    ),
    "two adapters": (
        {**GEMMA, "_LoRAEinsum_0": {"lora": GEMMA["lora"]}},
        "gemma",
        {},
        "'m/kernel' has two adapters: 'm/_LoRAEinsum_0/lora/a',",
    ),
    "another size": (dense(6, 7, a=(5, 2)), "qwix", {}, "B \\(2, 7\\): no axes fit"),
    "other axes": (
        dense(6, 7, a=(5, 2)),
        "qwix",
        {"axes": {"*": "io"}},
        r"axes 'io' need A \(6, r\) and B \(r, 7\)",
    ),
    "other axes of a feed-forward module": (
        {"linear": ones(6, 7), "linear_lora_a": ones(6, 2), "linear_lora_b": ones(2, 7)},
        "openpi",
        {"axes": {"*": "oi"}},
        "axes 'oi' need another layout",
    ),
    "ranks": (dense(6, 7, a=(6, 3)), "qwix", {}, "no axes fit"),
    "axes of nothing": (dense(6, 7), "qwix", {"axes": {"z": "io"}}, "axes matches no weig"),
    "too many axes": (dense(6, 7), "qwix", {"axes": {"*": "ioo"}}, "one letter for each"),
    "axes and a function": (dense(6, 7), bad(), {"axes": {"*": "io"}}, "leave axes out"),
    "no record": (dense(6, 7), lambda found: 3, {}, "must return a FoundAdapter.*got int"),
    "a text of leaves": (dense(6, 7), bad(leaves="x"), {}, "leaves must be a tuple"),
    "unknown leaves": (dense(6, 7), bad(leaves=("lora_a",)), {}, "no such name.*kernel_lo"),
    "left by a function": (
        dense(6, 7),
        bad(leaves=("kernel_lora_a",)),
        {},
        "'m/kernel_lora_b': it looks like a factor",
    ),
    "sizes of a function": (dense(6, 7), bad((5, 2, 7)), {}, "axes 'io' need A"),
    "axes of a function": (dense(6, 7), bad(axes="bio"), {}, "one letter for each axis"),
    "a leaf of two": (
        {"v": ones(6, 7), **dense(6, 7)},
        lambda found: bad()(found._replace(path=re.sub("/v$", "/kernel", found.path))),
        {},
        "takes the leaf 'm/kernel_lora_a' for the weights 'm/kernel' and 'm/v'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_read_is_an_error(name):
    tree, layout, options, message = ERRORS[name]
    default = {} if name.startswith("no scale") else {"scale": 1.0}
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
        import_adapters({"m": tree}, layout, **{**default, **options})


def test_an_adapter_finds_its_weight_among_others():
    tree = {**GEMMA, "other": ones(5, 7)}
    for fn in (
        None,
        lambda params: (ones(3, 6) @ params["kernel"], params["other"] @ ones(7)),
    ):
        plan = import_adapters(tree, "gemma", fn).plan
        assert [*plan.targets] == ["kernel"]
        assert "no adapter" in plan.explain("other")


def test_a_weight_that_the_function_does_not_use_is_an_error():
    with pytest.raises(ValueError, match="the function never uses it") as error:
        import_adapters({"m": GEMMA}, "gemma", lambda params: params["m"]["kernel"].shape)
    assert "leave fn out and give axes" in error.value.__notes__[0]


def test_a_function_comes_behind_the_layout():
    tree = {"m": dense(6, 7)}
    with pytest.raises(TypeError, match=r"fn must be a function.*layout, fn, \*args"):
        import_adapters(tree, "qwix", ones(3, 6), scale=1.0)
    with pytest.raises(TypeError, match="there are arguments and no function"):
        import_adapters(tree, "qwix", None, ones(3, 6), scale=1.0)
    with pytest.raises(ValueError, match="axes 'oi' need"):  # of the function
        import_adapters(
            tree, "qwix", lambda p, x: x @ p["m"]["kernel"].T, ones(3, 7), scale=1.0
        )


def test_a_name_with_a_wildcard_is_no_pattern():
    """The config of the plan selects this weight, and not another that would match."""
    tree = {"w?": normal(4, 5), "wx": normal(4, 5, seed=1)}
    tree |= {"w?_lora_a": normal(4, 2, seed=2), "w?_lora_b": normal(2, 5, seed=3)}
    made = lora_jax.import_adapters(tree, "qwix", scale=2.0, axes={"*": "io"})
    assert lora_jax.plan_adapters(made.plan.config, made.params) == made.plan
