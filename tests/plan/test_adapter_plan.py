import copy
import dataclasses
import json
import math
import pickle

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.config import LoraConfig
from lora_jax.plan.mesh_layout import MeshLayout
from lora_jax.plan.target import Target, TrainedLeaf, Use
from tests.support import html_cells

TARGET = Target((5, 4, 2, 3), "dora", 2, 1.5, 0.1, (1,), (2, 3), (0,))
PRODUCT = Use("dot_general", ("contracted", "kept"), "model.py:7 (call)", linear=True)
SCAN = Use("dot_general", ("stacked", "contracted", "kept", "kept"), linear=True)
SORTED = Use("sort", ("", ""), "model.py:9 (call)", "no rule for sort")


def make_plan(**changes):
    which = {"targets": ("*/q", "stack"), "train": "norm/*", "axes": {"stack": "bioo"}}
    config = LoraConfig(4, **which, products={"f": "ab,bc->ac"})
    targets = {
        "a/q": Target((64, 32), "lora", 4, 2.0, 0.0, (0,), (1,)),
        "stack": Target((5, 4, 2, 3), "dora", 4, 1 / 3, 0.0, (1,), (2, 3), (0,)),
    }
    fields = {
        "config": config,
        "targets": targets,
        "skipped": {"a/bias": "it is a vector, (32,)"},
        "uses": {"a/q": (PRODUCT, SORTED), "stack": (SCAN,)},
        "total": 10_000,
        "trained": {"norm/scale": TrainedLeaf((32,))},
    }
    return AdapterPlan(**fields | changes)


# ---------------------------------------------------------------------------- targets


def test_shapes_of_a_target():
    assert TARGET.axes == "bioo"
    assert TARGET.matrix_shape == (5, 4, 6)
    assert TARGET.adapter_shapes == {"A": (5, 4, 2), "B": (5, 2, 6), "m": (5, 6)}
    assert TARGET.parameters == 5 * (8 + 12 + 6)
    lora = dataclasses.replace(TARGET, method="lora")
    assert lora.adapter_shapes == {"A": (5, 4, 2), "B": (5, 2, 6)}


@pytest.mark.parametrize("rank", [1, 3, 8, 64])
@pytest.mark.parametrize("alpha", [1.0, 16.0, 0.3])
def test_alpha_gives_the_scale_back(alpha, rank):
    target = dataclasses.replace(TARGET, rank=rank, scale=alpha / math.sqrt(rank))
    assert target.alpha / rank == pytest.approx(target.scale, rel=1e-15)


def test_a_target_is_static_and_hashable():
    assert jax.tree.leaves(TARGET) == []
    again = dataclasses.replace(TARGET, in_axes=[1], shape=[5, 4, 2, 3])
    assert again == TARGET
    assert hash(again) == hash(TARGET)
    assert jax.jit(lambda target: jnp.zeros(target.matrix_shape))(TARGET).shape == (5, 4, 6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "dorra"}, ValueError, "method must be one of .*Did you mean 'dora'"),
        ({"rank": 0}, ValueError, "rank must be a positive integer"),
        ({"scale": float("inf")}, ValueError, "scale must be finite"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1"),
        ({"batch_axes": ()}, ValueError, r"each axis of the shape \(5, 4, 2, 3\)"),
        ({"in_axes": (), "batch_axes": (0, 1)}, ValueError, "must not be empty, got"),
        ({"out_axes": (2, 2, 3)}, ValueError, "must be in one of in_axes"),
        ({"shape": "5423"}, TypeError, "shape must be a tuple of integers, got '5423'"),
        ({"shape": (5, 4, 2, 3.0)}, TypeError, r"each of shape must be an integer.*float"),
        ({"shape": (-5, 4, 2, 3)}, ValueError, "shape must be integers from 0 to"),
        ({"batch_axes": (False,)}, TypeError, r"each of batch_axes .*False \(bool\)"),
        ({"rank": 2**40}, ValueError, r"rank must be below 2\*\*31"),
    ],
)
def test_bad_targets(changes, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(TARGET, **changes)


def test_text_of_a_use():
    assert str(PRODUCT) == "dot_general at model.py:7 (call) (contracted, kept)"
    assert str(SORTED).endswith("(unknown, unknown); merged: no rule for sort")
    assert str(Use("gather", ("indexed", "kept"))) == "gather (indexed, kept)"


# ---------------------------------------------------------------------------- plans


def test_equality_is_that_of_config_and_targets():
    plan = make_plan()
    other = make_plan(skipped={}, uses={}, total=3)
    assert plan == other
    assert hash(plan) == hash(other)
    assert plan != make_plan(config=LoraConfig())
    assert plan != make_plan(targets={"a/q": plan.targets["a/q"]})
    assert plan != make_plan(trained={"norm/scale": TrainedLeaf((16,))})
    assert jax.tree.leaves(plan) == []
    assert plan.parameters == 4 * 96 + 5 * (16 + 24 + 6) + 32
    assert list(plan.entries) == ["a/q", "stack", "norm/scale"]


def test_the_table():
    assert str(make_plan()).splitlines() == [
        "path        shape         axes  method   rank     scale  parameters    share",
        "a/q         (64, 32)      io    lora        4         2         384  3.607 %",
        "stack       (5, 4, 2, 3)  bioo  dora        4  0.333333         230  2.160 %",
        "norm/scale  (32,)               trained                          32  0.301 %",
        "total of 3                                                      646  6.068 %",
        "to be merged: 'a/q', sort at model.py:9 (call) (unknown, unknown); merged: no "
        "rule for sort",
    ]


def test_long_tables_keep_all_rows():
    target = TARGET
    targets = {f"layer_{i}/w": target for i in range(300)}
    plan = make_plan(targets=targets, trained={})
    lines = str(plan).splitlines()
    assert len(lines) == 302
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].split()[:4] == ["total", "of", "300", "39,000"]


def test_a_notebook_shows_the_same_table():
    plan = make_plan()
    shown = html_cells(plan)
    assert [" ".join(row).split() for row in shown] == [
        line.split() for line in str(plan).splitlines()[: len(shown)]
    ]
    assert "<pre>to be merged: &#x27;a/q&#x27;, sort at" in plan._repr_html_()


def test_a_notebook_shows_the_first_rows_of_a_long_table():
    names = [f"<b>layer_{i}</b>/w" for i in range(300)]
    plan = make_plan(targets=dict.fromkeys(names, TARGET), trained={})
    shown = [row[0] for row in html_cells(plan)]
    assert shown[1:61] == names[:60]
    assert shown[61:] == ["... and 240 more rows", "total of 300"]
    skipped = {name: f"a reason of {name}" for name in names}
    plan = make_plan(skipped=skipped, uses=dict.fromkeys(names, ()))
    assert plan._repr_html_().count("<pre>left out: &#x27;&lt;b&gt;layer_") == 60
    assert plan._repr_html_().endswith("<pre>... and 240 more lines</pre>")
    assert len(plan._repr_html_()) < 20_000
    assert "<b>" not in plan._repr_html_()


def test_shares_are_of_all_parameters_as_count_parameters_has_them():
    params = {"w": jax.ShapeDtypeStruct((12, 9), "float32")}
    plan = lora_jax.plan_adapters(LoraConfig(2), params)
    trainable, total = lora_jax.count_parameters(params, plan)
    assert (trainable, total) == (42, 12 * 9 + 42)
    assert str(plan).splitlines()[-1].split()[-2] == f"{100 * trainable / total:.3f}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, r"\(rank was 4, now 8\): make a new plan"),
        ({"alpha": 1.0, "dropout": 0.5}, r"alpha was 16.0, now 1.0; dropout was 0.0, now"),
        ({"targets": ("*",)}, "targets was .*'stack'.*, now .*plan_adapters"),
        ({"use_dora": True}, "use_dora was False, now True"),
    ],
)
def test_another_config_needs_a_new_plan(changes, message):
    plan = make_plan()
    config = dataclasses.replace(plan.config, **changes)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(plan, config=config)
    for other in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(other, config=config)
    targets = {"a/q": TARGET}
    by_hand = dataclasses.replace(plan, targets=targets)
    assert by_hand.targets == targets
    assert dataclasses.replace(plan, config=config, targets=targets).config == config
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(by_hand, config=config)


def test_what_initializes_may_be_replaced():
    config = dataclasses.replace(make_plan().config, init="gaussian", dtype="bfloat16")
    assert dataclasses.replace(make_plan(), config=config).config == config


def test_a_plan_without_a_total_has_no_shares():
    assert "%" not in str(make_plan(total=0))


def test_explanations():
    plan = make_plan()
    assert plan.explain("a/q").splitlines() == [
        "a/q: lora, rank 4, scale 2, 384 parameters.",
        "  chosen by targets: '*/q'",
        "  axes: io of (64, 32): (64, 32)",
        "  use: dot_general at model.py:7 (call) (contracted, kept)",
        "  use: sort at model.py:9 (call) (unknown, unknown); merged: no rule for sort",
    ]
    lines = plan.explain("stack").splitlines()
    assert lines[2] == "  axes: bioo of (5, 4, 2, 3), given by axes['stack']: 5 of (4, 6)"
    assert lines[3].startswith("  note: at rank 4 A and B have 40 entries for the 24 of ")
    assert plan.explain("norm/scale").splitlines() == [
        "norm/scale: trained without an adapter, 32 parameters.",
        "  chosen by train: 'norm/*'",
    ]
    assert plan.explain("a/bias") == "a/bias: no adapter, because it is a vector, (32,)."


def test_explanations_of_all_linear():
    config = LoraConfig(4)
    assert "since a matrix product uses it" in make_plan(config=config).explain("a/q")
    plan = make_plan(config=config, uses={})
    assert "which without a function means every" in plan.explain("a/q")


def test_explaining_an_unknown_path():
    with pytest.raises(KeyError, match=r"no leaf at 'a/k'; the nearest paths are 'a/q'"):
        make_plan().explain("a/k")


@pytest.mark.parametrize("uses", [make_plan().uses, {}], ids=["uses", "none"])
def test_json_round_trip(uses):
    plan = make_plan(uses=uses)
    again = AdapterPlan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert (again.skipped, again.uses, again.total) == (plan.skipped, uses, plan.total)
    assert str(again) == str(plan)
    for path in [*plan.entries, *plan.skipped]:
        assert again.explain(path) == plan.explain(path)


def changed(**fields):
    return json.dumps(json.loads(make_plan().to_json()) | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "an? lora_jax AdapterPlan lacks the fields config, targets"),
        (changed(target={}), "AdapterPlan has no field 'target'; the nearest is 'targets'"),
        (changed(targets={"a": {"shpe": 1}}), "Target has no field 'shpe'; .* 'shape'"),
        (changed(targets={"a": {"shape": [1]}}), "Target lacks the fields method, rank"),
        (changed(targets={"a": []}), "Target must be a JSON object, got list"),
        (changed(uses={"a": [{"wher": ""}]}), "Use has no field 'wher'; .* 'where'"),
        (changed(config={"rank": -1}), "rank must be a positive integer"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(ValueError, match=message):
        AdapterPlan.from_json(text)


OTHERS = (
    *(None, True, False, 0, -1, 1, 2.0, 1e300, 10**400, "", "65", "io", "re:("),
    *([], [1], ["a"], [[1]], [-6, 5], [6.0, 5], [True, False], [10**30, 3], [[], {}]),
    *({}, {"a": 1}, {"": None}, {"a": {"b": []}}, "bfloat16", "\ud800"),
)


def mutations(value):
    """A JSON value with each of its parts left out, renamed, doubled, or made another."""
    yield from OTHERS
    if isinstance(value, dict):
        for key, part in value.items():
            rest = {name: other for name, other in value.items() if name != key}
            yield rest
            yield rest | {f"{key}x": part}
            yield from (value | {key: other} for other in mutations(part))
    if isinstance(value, list):
        yield value + value
        for i, part in enumerate(value):
            yield value[:i] + value[i + 1 :]
            for other in mutations(part):
                yield [*value[:i], other, *value[i + 1 :]]


@pytest.mark.parametrize(
    "written",
    [
        make_plan(),
        LoraConfig(4, axes={"a": "io"}, init=("zeros", "gaussian"), dtype="float32"),
    ],
    ids=["plan", "config"],
)
def test_whatever_a_json_text_holds(written):
    read = 0
    for value in mutations(json.loads(written.to_json())):
        try:
            got = type(written).from_json(json.dumps(value))
        except (TypeError, ValueError):
            continue
        read += 1
        again = type(written).from_json(got.to_json())
        assert again == got
        assert str(again) == str(got)
    assert read > 30


@pytest.mark.parametrize("cls", [AdapterPlan, LoraConfig])
@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("[", ValueError, "cannot be read: Expecting value.* Pass what to_json returned"),
        (b"\xff", ValueError, "cannot be read: 'utf-8'"),
        ("NaN", ValueError, "cannot be read: it has the number NaN"),
        ('{"rank": -Infinity}', ValueError, "the number -Infinity"),
        ('{"rank": 1, "rank": 1}', ValueError, "has the field 'rank' twice"),
        ("9" * 5000, ValueError, "cannot be read: Exceeds the limit"),
        ("[" * 100_000, ValueError, "nested too deeply"),
        ('{"config": ' * 100_000, ValueError, "nested too deeply"),
        (None, TypeError, "must be a text, got NoneType: pass what to_json returned"),
    ],
)
def test_texts_that_are_no_json(cls, text, error, message):
    with pytest.raises(error, match=message):
        cls.from_json(text)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"total": True}, TypeError, r"total must be a number of param.* True \(bool\)"),
        ({"total": -1}, ValueError, "total must be at least 0, got -1"),
        ({"targets": []}, TypeError, "targets must be an object with paths"),
        ({"skipped": {"x": 3}}, TypeError, r"skipped\['x'\] must be a reason, got 3"),
        ({"skipped": {"a/q": "?"}}, ValueError, "'a/q' must be in one of targets, tra"),
        ({"uses": {"a/q": [3]}}, ValueError, "at 'a/q': .*Use must be a JSON object"),
        ({"uses": {"a/q": {}}}, TypeError, "at 'a/q': uses must be a list of uses"),
        ({"uses": {"a/q": [PRODUCT._asdict() | {"roles": [""]}]}}, ValueError, "2 axes"),
        ({"uses": {"x": [PRODUCT._asdict() | {"linear": 1}]}}, TypeError, "true or false"),
        ({"uses": {"x": [{"primitive": "dot"}]}}, ValueError, "lacks the fields roles"),
        ({"uses": {"x": [PRODUCT._asdict() | {"window": [2]}]}}, ValueError, "axes of the"),
    ],
)
def test_json_of_wrong_kinds(fields, error, message):
    with pytest.raises(error, match=message):
        AdapterPlan.from_json(changed(**fields))


# ------------------------------------------------------------------- plans from plans


def test_a_plan_of_a_plain_dict():
    plan = make_plan(targets=dict(make_plan().targets))
    assert plan == make_plan()
    assert hash(plan) == hash(make_plan())
    assert plan.scales == {"a/q": 2.0, "stack": 1 / 3}
    with pytest.raises(TypeError, match="does not support item assignment"):
        plan.targets["b"] = TARGET


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"config": {}}, TypeError, r"config must be a LoraConfig, got dict: the order is"),
        ({"targets": [TARGET]}, TypeError, r"targets must be a dict by path, got \[Target"),
        ({"targets": {"a": 3}}, TypeError, r"targets\['a'\] must be a Target, got 3 \(int"),
        ({"targets": {1: TARGET}}, TypeError, r"the paths of targets must be strings"),
        ({"uses": {"a/q": PRODUCT._asdict()}}, TypeError, r"uses\['a/q'\] must be a tuple"),
        ({"skipped": {"stack": "why"}}, ValueError, r"'stack' must be in one of targets"),
        ({"trained": {"stack": TrainedLeaf((2,))}}, ValueError, "'stack' must be in one"),
        ({"trained": {"b": (2,)}}, TypeError, r"trained\['b'\] must be a TrainedLeaf, got"),
    ],
)
def test_plans_that_are_none(changes, error, message):
    with pytest.raises(error, match=message):
        make_plan(**changes)


def test_other_scales_and_rates():
    plan = make_plan()
    new = plan.replace(scale=0, dropout={"a/*": 0.5})
    assert new.scales == {"a/q": 0.0, "stack": 0.0}
    assert [t.dropout for t in new.targets.values()] == [0.5, 0.0]
    assert new.config == plan.config
    assert AdapterPlan.from_json(new.to_json()) == new != plan
    assert plan.replace() == plan
    # The first pattern counts; without one a target stays as it is.
    scales = plan.replace(scale={"re:a.*": 3, "a/q": 4}).scales
    assert scales == {"a/q": 3.0, "stack": 1 / 3}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scale": {"b/*": 1.0}}, ValueError, r"pattern of scale matches no target of the"),
        ({"scale": jnp.ones(())}, TypeError, r"a plan is static, .* adapt\(.*, scales="),
        ({"scale": float("inf")}, ValueError, r"^scale must be finite"),
        ({"scale": "2"}, TypeError, r"scale must be a number"),
        ({"dropout": 1.0}, ValueError, r"at 'a/q': dropout"),
        ({"rank": 3}, TypeError, r"unexpected keyword argument 'rank'"),
    ],
)
def test_what_cannot_be_replaced(changes, error, message):
    with pytest.raises(error, match=message):
        make_plan().replace(**changes)


def test_subsets_and_unions():
    plan = make_plan()
    first, second = plan.subset("a/q"), plan.subset(["stack", "norm/*"])
    assert dict(first.entries) == {"a/q": plan.targets["a/q"]}
    assert list(second.entries) == ["stack", "norm/scale"]
    assert dict(plan.subset("norm/scale").targets) == {}
    assert "no pattern of the subset matches it" in first.explain("stack")
    assert "left out: 'stack'" not in str(first)
    both = first | second
    assert both == plan
    assert str(both) == str(plan)
    assert both.explain("a/q") == plan.explain("a/q")
    assert both | plan == plan
    here, there = (MeshLayout({"x": size}, 8, {}) for size in (2, 4))
    placed = dataclasses.replace(plan, layout=here)
    assert (placed | placed).layout == here
    for layout in (None, there):
        other = dataclasses.replace(plan, layout=layout)
        assert (placed | other).layout is (other | placed).layout is None
    with pytest.raises(ValueError, match=r"of the subset matches no target.*nearest.*'a/q"):
        plan.subset("b/q")
    with pytest.raises(ValueError, match=r"a subset has at least one target"):
        plan.subset(())
    with pytest.raises(TypeError, match=r"unsupported operand"):
        plan | {}


def test_the_config_of_a_union_has_the_patterns_of_both():
    config = LoraConfig(2, targets="b", axes={"b": "oi"}, train="bias")
    other = AdapterPlan(config, {"b": TARGET}, trained={"bias": TrainedLeaf((3,))})
    union = make_plan() | other
    assert union.config.targets == ("*/q", "stack", "b")
    assert union.config.train == ("norm/*", "bias")
    assert list(union.trained) == ["norm/scale", "bias"]
    assert union.config.axes_of("b") == "oi"
    assert union.config.axes_of("stack") == "bioo"
    assert "chosen by targets: 'b'" in union.explain("b")
    linear = AdapterPlan(LoraConfig(2), {"b": TARGET}) | make_plan()
    assert linear.config.targets == "all-linear"
    assert dict(linear.config.products) == {"f": "ab,bc->ac"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": {"stack": TARGET}}, "plans adapt 'stack', the first with Target"),
        ({"trained": {"norm/scale": TrainedLeaf((3,))}}, "'norm/scale', .* with Trained"),
        ({"total": 3}, r"of different params: the first of 10,000 parameters, the second"),
        ({"config": LoraConfig(init="gaussian")}, "different init, 'kaiming_uniform'"),
        ({"config": LoraConfig(products={"f": "ab,cb->ac"})}, "'ab,bc->ac' and 'ab,cb->a"),
        ({"config": LoraConfig(dtype="bfloat16")}, r"have different dtype, None and 'bfl"),
    ],
)
def test_plans_that_do_not_join(changes, message):
    with pytest.raises(ValueError, match=message):
        make_plan() | make_plan(**{"skipped": {}} | changes)
