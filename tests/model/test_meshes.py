"""Trees on a mesh: results lie where their weights lie, and no weight travels.

All layouts are weights of one tree, so that each function is compiled once. No adapter has
as many entries as a weight has on one device.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax.model import column_norms, decompose, losses, merging
from tests import programs, support

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = {"auto": (AUTO,) * 3, "explicit": (EXPLICIT,) * 3, "mixed": (AUTO, AUTO, EXPLICIT)}
RANK = 2


@dataclasses.dataclass(frozen=True)
class Layout:
    """A weight, and the part of it that is adapted."""

    axes: str
    shape: tuple[int, ...]
    spec: Any
    part: str = ""


LAYOUTS = {
    "column": Layout("io", (192, 128), P(None, "tensor")),
    "row": Layout("io", (192, 128), P("tensor")),
    "both": Layout("io", (192, 128), P("fsdp", "tensor")),
    "fused_heads": Layout("iooo", (192, 3, 4, 16), P("fsdp", None, "tensor")),
    "heads_of_inputs": Layout("iio", (4, 48, 128), P("tensor", None, "fsdp")),
    "stack": Layout("bio", (2, 192, 96), P(None, "fsdp", "tensor")),
    "experts": Layout("bio", (4, 144, 64), P("fsdp", None, "tensor")),
    "out_in": Layout("oi", (128, 192), P("tensor", "fsdp")),
    "out_in_stack": Layout("oib", (96, 144, 2), P("tensor", None, "fsdp")),
    "convolution": Layout("iiio", (3, 3, 32, 96), P(None, None, "fsdp", "tensor")),
    "vocabulary": Layout("io", (512, 64), P(("tensor", "fsdp"))),
    "some_outputs": Layout("io", (192, 128), P(None, "tensor"), "[:, :32]"),
    "listed_outputs": Layout("io", (192, 128), P("fsdp", "tensor"), "[:, [0, 3, 70]]"),
    "one_of_fused": Layout("iooo", (192, 3, 4, 16), P("fsdp", None, "tensor"), "[:, 1]"),
    "end_of_stack": Layout("bio", (3, 144, 64), P(None, "fsdp", "tensor"), "[1:]"),
    "some_experts": Layout("bio", (4, 144, 64), P("fsdp", None, "tensor"), "[2:]"),
    "some_inputs": Layout("io", (192, 128), P("fsdp", "tensor"), "[64:128]"),
}
LARGEST = 1024
"""The most entries of an array that devices may exchange."""


def tree(kind, method="lora", dtype="float32", names=tuple(LAYOUTS), memory=None):
    """Params, adapters and plan, and the params on a mesh."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=KINDS[kind])
    names = [n for n in names if method == "lora" or n != "some_inputs"]
    layouts = {name: LAYOUTS[name] for name in names}
    values = {n: support.normal(*own.shape, dtype=dtype) for n, own in layouts.items()}
    values["bias"] = support.normal(128, dtype="float32")
    params = jax.tree.map(support.asarray, values)
    config = lora_jax.LoraConfig(
        RANK,
        3.0,
        [name + own.part for name, own in layouts.items()],
        axes={name: own.axes for name, own in layouts.items()},
        use_dora=method == "dora",
        train=["bias"],
    )
    plan = lora_jax.plan_adapters(config, params)
    adapters = {
        path: {
            name: support.asarray(support.normal(*shape) + 12.0 * (name == "m"), "float32")
            for name, shape in entry.adapter_shapes.items()
        }
        for path, entry in plan.entries.items()
    }
    specs = {name: own.spec for name, own in layouts.items()} | {"bias": P("tensor")}
    placed = {
        name: jax.device_put(x, NamedSharding(mesh, specs[name], memory_kind=memory))
        for name, x in values.items()
    }
    for name, own in layouts.items():
        assert math.prod(placed[name].sharding.shard_shape(own.shape)) > LARGEST
    return params, adapters, plan, placed


def everything(params, adapters, plan):
    """The results of all functions, those with the shapes of the params first."""
    norms = lora_jax.adapted_column_norms(params, adapters, plan)
    merged = lora_jax.merge_adapters(params, adapters, plan)
    old = {"bias": params["bias"]}
    back = lora_jax.unmerge_adapters(
        merged, adapters, plan, column_norms=norms or None, originals=old
    )
    return (merged, back), norms, lora_jax.merge_losses(params, adapters, plan)


@functools.cache
def everything_on_one_device(method, dtype, names):
    """What `everything` returns, compiled as one program for all kinds of axes."""
    params, adapters, plan, _ = tree("auto", method, dtype, names)
    return jax.jit(functools.partial(everything, plan=plan))(params, adapters)


def in_turn(*numbers):
    """Every second layout: each weight with each method on half of the meshes.

    A layout says how a weight is cut, and its functions do not know the other weights.
    """
    return tuple(LAYOUTS)[sum(numbers) % 2 :: 2]


def travels(text):
    """The collectives of a compiled program that are too large for parts of an adapter."""
    return [c for c in programs.collectives(text) if math.prod(c.shape) > LARGEST]


def assert_alike(got, want, placed):
    """Asserts that trees have the values of others, and the shardings of the params."""
    for name, old in placed.items():
        assert got[name].sharding.is_equivalent_to(old.sharding, old.ndim), name
        assert got[name].sharding.memory_kind == old.sharding.memory_kind
        support.assert_close(got[name], want[name], 32)


def place(adapters, placed, plan, lie):
    adapters = jax.device_get(adapters)
    if lie == "by the rule":
        return jax.device_put(adapters, lora_jax.adapter_shardings(placed, plan))
    return jax.device_put(adapters, NamedSharding(placed["bias"].sharding.mesh, P()))


slow = pytest.mark.slow
PLACES = {
    ("auto", "by the rule"): (),
    ("explicit", "by the rule"): slow,
    ("auto", "replicated"): slow,
    ("mixed", "replicated"): (),
}
EACH = pytest.mark.parametrize(
    ("kind", "lie"), [pytest.param(*own, marks=marks) for own, marks in PLACES.items()]
)
METHODS = pytest.mark.parametrize("method", ["lora", "dora"])


@pytest.mark.mostly_slow(2)
@EACH
@METHODS
def test_no_weight_travels_inside_of_jit(method, kind, lie):
    names = in_turn([*PLACES].index((kind, lie)), method == "dora")
    if kind != "explicit":  # a trace does not know that automatic axes split the experts
        names = tuple(name for name in names if name != "some_experts")
    _, adapters, plan, placed = tree(kind, method, names=names)
    run = jax.jit(lambda params, adapters: everything(params, adapters, plan))
    compiled = run.lower(placed, place(adapters, placed, plan, lie)).compile()
    assert not travels(compiled.as_text())
    got = compiled(placed, place(adapters, placed, plan, lie))
    want = everything_on_one_device(method, "float32", names)
    if kind == "auto":  # a trained leaf is only copied, so it lies as its new value lies
        placed = {name: x for name, x in placed.items() if name in plan.by_leaf()}
    for own, other in zip(got[0], want[0], strict=True):
        assert_alike(own, other, placed)
    for own, other in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True):
        support.assert_close(own, other, 16)


@pytest.fixture
def compiled_texts(monkeypatch):
    """The text of each program that the eager functions compile."""
    texts = []

    def recorded(jitted):
        def run(*args):
            if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args)):
                return jitted(*args)
            statics = [x for x in args if isinstance(x, bool)]
            compiled = jitted.lower(*args).compile()
            texts.append(compiled.as_text())
            return compiled(*args[: len(args) - len(statics)])

        return run

    fold = merging._compiled_fold
    monkeypatch.setattr(merging, "_compiled_fold", lambda *own: recorded(fold(*own)))
    for module, name in ((column_norms, "_column_norms"), (losses, "_compiled_loss")):
        monkeypatch.setattr(module, name, recorded(getattr(module, name)))
    return texts


@pytest.mark.mostly_slow(2)
@EACH
@METHODS
def test_no_weight_travels_outside_of_jit(method, kind, lie, compiled_texts):
    names = in_turn([*PLACES].index((kind, lie)), method == "dora")
    _, adapters, plan, placed = tree(kind, method, "bfloat16", names)
    want = everything_on_one_device(method, "bfloat16", names)
    compiled_texts.clear()
    got = everything(placed, place(adapters, placed, plan, lie), plan)
    assert len(compiled_texts) == len(plan.targets) * (4 if method == "dora" else 3)
    assert not [found for text in compiled_texts for found in travels(text)]
    for own, other in zip(got[0], want[0], strict=True):
        assert_alike(own, other, placed)
    for own, other in zip(*map(jax.tree.leaves, (got[1:], want[1:])), strict=True):
        np.testing.assert_allclose(own, other, rtol=0.02, atol=1e-6)


SOME = ("both", "fused_heads", "convolution", "some_outputs")


# Where a result lies does not depend on the method.
@pytest.mark.parametrize(
    ("kind", "method"), [("auto", "lora"), ("explicit", "dora"), ("mixed", "lora")]
)
def test_jit_with_out_shardings_and_donation(method, kind):
    params, adapters, plan, placed = tree(kind, method, names=SOME)
    own = place(adapters, placed, plan, "by the rule")
    places = {name: x.sharding for name, x in placed.items()}
    merge = jax.jit(
        lambda params, adapters: lora_jax.merge_adapters(params, adapters, plan),
        out_shardings=places,
        donate_argnums=0,
    )
    memory = merge.lower(placed, own).compile().memory_analysis()
    assert memory is not None
    shapes = [places[name].shard_shape(params[name].shape) for name in SOME]
    share = 4 * sum(map(math.prod, shapes))
    assert memory.alias_size_in_bytes == share
    assert memory.temp_size_in_bytes < 3 * share
    (want, _), *_ = everything_on_one_device(method, "float32", SOME)
    old = {name: jax.device_put(np.asarray(x), places[name]) for name, x in params.items()}
    assert_alike(merge(placed, own), want, old)
    assert all(placed[name].is_deleted() for name in SOME)


def addresses(x):
    return {shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards}


@pytest.mark.parametrize("kind", KINDS)
def test_donated_weights_are_replaced_in_their_memory(kind):
    _, adapters, plan, placed = tree(kind, names=SOME)
    own = place(adapters, placed, plan, "replicated")
    held = {name: addresses(placed[name]) for name in SOME}
    got = lora_jax.merge_adapters(placed, own, plan, donate=True)
    (want, _), *_ = everything_on_one_device("lora", "float32", SOME)
    for name in SOME:
        assert placed[name].is_deleted()
        assert addresses(got[name]) == held[name]
        support.assert_close(got[name], want[name], 8)


@pytest.mark.parametrize("donate", [False, True])
@METHODS
def test_weights_in_the_memory_of_the_host(method, donate):
    # Where this JAX has several kinds on a CPU, one that is not the default.
    kinds = [memory.kind for memory in jax.devices()[0].addressable_memories()]
    kind = "pinned_host" if "pinned_host" in kinds else max(kinds)
    params, adapters, plan, placed = tree("auto", method, names=SOME, memory=kind)
    own = place(adapters, placed, plan, "by the rule")
    assert {x.sharding.memory_kind for x in jax.tree.leaves(own)} == {kind}
    old = {
        name: jax.device_put(np.asarray(x), placed[name].sharding)
        for name, x in params.items()
    }
    (want, want_back), *_ = everything_on_one_device(method, "float32", SOME)
    if not donate:
        got, back = everything(placed, own, plan)[0]
        assert_alike(back, want_back, old)
    else:
        got = lora_jax.merge_adapters(placed, own, plan, donate=True)
    assert_alike(got, want, old)
    assert {placed[name].is_deleted() for name in SOME} == {donate}


def test_an_adapter_on_another_mesh_than_its_weight():
    _, adapters, plan, placed = tree("auto", names=["both"])
    devices = jax.devices()[:4]
    other = jax.make_mesh((4,), ("x",), axis_types=(AUTO,), devices=devices)
    adapters = jax.device_put(adapters, NamedSharding(other, P()))
    with pytest.raises(ValueError, match="at 'both'"):
        lora_jax.merge_adapters(placed, adapters, plan)


FORMATS = {
    "nf4": {"block_size": 8, "scaler_block_size": 64},
    "int8": {},
    "fp8": {},
}


def quantized(placed, plan, form, names, **settings):
    return lora_jax.quantize_params(
        placed, names, form, plan=plan, **FORMATS[form], **settings
    )


# Each format with one method, and one of them with both: a format is dequantized before the
# method sees it.
FIRST = {("nf4", "lora"), ("nf4", "dora"), ("int8", "lora"), ("fp8", "dora")}


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("kind", ["auto", pytest.param("explicit", marks=slow)])
@pytest.mark.parametrize(
    ("form", "method"),
    [
        pytest.param(form, method, marks=() if (form, method) in FIRST else slow)
        for form in FORMATS
        for method in ("lora", "dora")
    ],
)
def test_quantized_weights_do_not_travel(method, kind, form, compiled_texts):
    names = ("both", "fused_heads", "convolution", "experts", "stack")
    params, adapters, plan, placed = tree(kind, method, "bfloat16", names)
    stored = quantized(placed, plan, form, names)
    own = place(adapters, placed, plan, "by the rule")

    merge = jax.jit(lambda stored, own: lora_jax.merge_adapters(stored, own, plan))
    compiled = merge.lower(stored, own).compile()
    assert not travels(compiled.as_text())

    @jax.jit
    def on_one_device(params, adapters):
        own = quantized(params, plan, form, names)
        return lora_jax.merge_adapters(own, adapters, plan)

    want = on_one_device(params, adapters)
    compiled_texts.clear()
    for merged in (compiled(stored, own), lora_jax.merge_adapters(stored, own, plan)):
        assert_alike(merged, want, placed)
    lora_jax.adapted_column_norms(stored, own, plan)
    assert compiled_texts
    assert not [found for text in compiled_texts for found in travels(text)]
    again = lora_jax.merge_adapters(stored, own, plan, requantize=True)
    for one, other in zip(*map(jax.tree.leaves, (again, stored)), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


# ----------------------------------------------------------------- decompositions

KEY = jax.random.key(0)
METHODS_OF_WEIGHTS = {
    "olora": ("olora", {}),
    "randomized": ("pissa", {"key": KEY, "iterations": 2}),
    "quantized": ("pissa", {"key": KEY, "iterations": 2, "quantize": support.coarse}),
    "exact": ("pissa", {}),
    "loftq": ("loftq", {"quantize": support.coarse}),
    "orthogonal": ("orthogonal", {"key": KEY}),
}
FLAT = ("row", "both", "experts")
WIDTH = RANK + 10
"""The columns of the randomized SVD."""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("olora", "auto"), ("randomized", "auto")),
        *(pytest.param(name, "mixed", marks=slow) for name in METHODS_OF_WEIGHTS),
    ],
)
def test_decompositions(name, kind, monkeypatch, caplog):
    """Only exact ones gather weights, and say so."""
    method, options = METHODS_OF_WEIGHTS[name]
    params, _, plan, placed = tree(kind, "dora", names=(*FLAT, "fused_heads"))
    compiled, texts = decompose._compiled, {}

    def recorded(*own):
        def run(weight, target, key):
            made = compiled(*own).lower(weight, target, key).compile()
            texts[target.shape, own[-1].spec] = made.as_text()
            return made(weight, target, key)

        return run

    monkeypatch.setattr(decompose, "_compiled", recorded)
    with caplog.at_level("INFO", "lora_jax"):
        base, adapters = lora_jax.decompose_params(placed, plan, method, **options)
    # The vectors of a randomized or of a nearly repeated value may differ; the sums do not.
    if name in ("olora", "orthogonal"):
        made = functools.partial(lora_jax.decompose_params, plan=plan, method=method)
        want, _ = jax.jit(functools.partial(made, **options))(params)
        assert_alike(base, want, placed)
    if not options.get("quantize"):
        merged = lora_jax.merge_adapters(base, adapters, plan)
        assert_alike(merged, params, placed)
    places = lora_jax.adapter_shardings(placed, plan)
    for own, other in zip(*map(jax.tree.leaves, (adapters, places)), strict=True):
        assert own.sharding.is_equivalent_to(other, own.ndim)
    gathered = {record.message.split(":")[0] for record in caplog.records}
    if name == "orthogonal":
        assert not gathered
    elif name in ("exact", "loftq"):
        assert gathered == {*FLAT, "fused_heads"}
    else:
        assert gathered == {"fused_heads"}
        for name in FLAT:
            *batch, n_in, n_out = shape = LAYOUTS[name].shape
            found = programs.collectives(texts[shape, placed[name].sharding.spec])
            largest = math.prod(batch) * max(n_in, n_out) * WIDTH
            assert max((math.prod(c.shape) for c in found), default=0) <= largest
