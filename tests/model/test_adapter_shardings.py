"""Where adapters lie on a mesh, and that they are made there."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax.layers import initializers
from lora_jax.model import initialization
from tests.support import assert_close, draw, needs_host_memory, normal

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = {"auto": (AUTO,) * 3, "explicit": (EXPLICIT,) * 3, "mixed": (EXPLICIT, AUTO, AUTO)}
NAMES = "data", "fsdp", "tensor"


def mesh_of(kind="auto", names=NAMES):
    return jax.make_mesh((2,) * len(names), names, axis_types=KINDS[kind][: len(names)])


@dataclasses.dataclass(frozen=True)
class Case:
    """A weight with its spec, and the specs of its adapter."""

    shape: tuple[int, ...]
    axes: str
    spec: Any
    a: Any
    b: Any
    m: Any
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "column": Case(
        (16, 32), "io", P("fsdp", "tensor"), P(None, None), P(None, "tensor"), P("tensor")
    ),
    "row": Case(
        (32, 16), "io", P("tensor", "fsdp"), P("tensor", None), P(None, None), P(None)
    ),
    "both on one axis": Case(
        (16, 32),
        "io",
        P(None, ("fsdp", "tensor")),
        P(None, None),
        P(None, "tensor"),
        P("tensor"),
    ),
    "short spec": Case(
        (16, 32), "io", P("tensor"), P("tensor", None), P(None, None), P(None)
    ),
    "out, in": Case(
        (32, 16), "oi", P("tensor", "fsdp"), P(None, None), P(None, "tensor"), P("tensor")
    ),
    "heads": Case(
        (16, 4, 8),
        "ioo",
        P("fsdp", "tensor", None),
        P(None, None),
        P(None, "tensor"),
        P("tensor"),
    ),
    "heads of the output": Case(
        (4, 8, 16),
        "iio",
        P("tensor", None, "fsdp"),
        P("tensor", None),
        P(None, None),
        P(None),
    ),
    "fused heads": Case(
        (16, 3, 4, 8),
        "iooo",
        P("fsdp", None, "tensor"),
        P(None, None),
        P(None, None),
        P(None),
    ),
    "an axis of size 1 before": Case(
        (16, 1, 4),
        "ioo",
        P(None, None, "tensor"),
        P(None, None),
        P(None, "tensor"),
        P("tensor"),
    ),
    "split down to 1": Case(
        (16, 2, 8),
        "ioo",
        P(None, "tensor", "data"),
        *(P(None, None), P(None, ("tensor", "data")), P(("tensor", "data"))),
        {"data_axes": "fsdp"},
    ),
    "data axes stay no gap": Case(
        (16, 2, 8), "ioo", P(None, "fsdp", "tensor"), P(None, None), P(None, None), P(None)
    ),
    "no data axes": Case(
        (16, 32),
        "io",
        P("fsdp", "tensor"),
        *(P("fsdp", None), P(None, "tensor"), P("tensor")),
        {"data_axes": ()},
    ),
    "layers": Case(
        (4, 16, 32),
        "bio",
        P(None, "fsdp", "tensor"),
        *(P(None, None, None), P(None, None, "tensor"), P(None, "tensor")),
    ),
    "experts": Case(
        (4, 16, 32),
        "bio",
        P("fsdp", None, "tensor"),
        *(P("fsdp", None, None), P("fsdp", None, "tensor"), P("fsdp", "tensor")),
    ),
    "convolution": Case(
        (3, 3, 8, 16),
        "iiio",
        P(None, None, "fsdp", "tensor"),
        *(P(None, None), P(None, "tensor"), P("tensor")),
    ),
    "embedding": Case(
        (64, 16), "io", P("tensor", "fsdp"), P("tensor", None), P(None, None), P(None)
    ),
    "part of the stack": Case(
        (4, 16, 32),
        "bio",
        P("data", None, "tensor"),
        *(P(None, None, None), P(None, None, "tensor"), P(None, "tensor")),
        {"part": "[2:]"},
    ),
    "one of a stack": Case(
        (4, 16, 32),
        "bio",
        P(None, "tensor", None),
        *(P("tensor", None), P(None, None), P(None)),
        {"part": "[1]"},
    ),
    "some outputs": Case(
        (16, 32),
        "io",
        P("tensor", "fsdp"),
        *(P("tensor", None), P(None, None), P(None)),
        {"part": "[:,:12]"},
    ),
}


SOME = "row", "heads", "experts"


def made(case, mesh, *, dtype="float32", abstract=False, method="dora"):
    """Params with one weight, and their plan."""
    place = NamedSharding(mesh, case.spec)
    if abstract:
        weight: Any = jax.ShapeDtypeStruct(case.shape, dtype, sharding=place)
    else:
        weight = jax.device_put(normal(*case.shape, dtype=dtype), place)
    part = case.config.get("part", "")
    config = lora_jax.LoraConfig(
        rank=4, targets=f"w{part}", axes={"w": case.axes}, use_dora=method == "dora"
    )
    return {"w": weight}, lora_jax.plan_adapters(config, {"w": weight})


def options(case):
    return {name: case.config[name] for name in ("data_axes",) if name in case.config}


def specs(tree):
    return {path: {k: own.spec for k, own in each.items()} for path, each in tree.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_the_rule(name, kind):
    case, mesh = CASES[name], mesh_of(kind)
    for method in ("lora", "dora"):
        params, plan = made(case, mesh, method=method)
        (path,) = plan.targets
        want = {"A": case.a, "B": case.b} | ({"m": case.m} if method == "dora" else {})
        got = lora_jax.adapter_shardings(params, plan, **options(case))
        assert specs(got) == {path: want}
        assert all(own.mesh == mesh for own in got[path].values())
        abstract, _ = made(case, mesh, method=method, abstract=True)
        assert lora_jax.adapter_shardings(abstract, plan, **options(case)) == got


@pytest.mark.parametrize("form", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("name", ["column", "row", "heads", "layers", "experts", "out, in"])
def test_adapters_of_quantized_weights_lie_as_those_of_dense_ones(
    name, kind, abstract, form
):
    case, mesh = CASES[name], mesh_of(kind)
    params, plan = made(case, mesh, abstract=abstract)
    n: dict[str, Any] = {"batch_axes": 1} if case.axes.startswith("b") else {}
    settings: dict[str, Any] = {"block_size": 4} if form == "nf4" else {}
    quantized = lora_jax.quantize_params(params, "w", form, **settings, **n)
    got = lora_jax.adapter_shardings(quantized, plan)
    assert specs(got) == {"w": {"A": case.a, "B": case.b, "m": case.m}}


BELONGING = [
    pytest.param(
        name, kind, marks=[pytest.mark.slow] * (name not in SOME or kind == "mixed")
    )
    for name in CASES
    for kind in KINDS
]


@pytest.mark.parametrize(("name", "kind"), BELONGING)
def test_new_adapters_are_made_where_they_belong(name, kind):
    """With the bits that one device makes."""
    case, mesh = CASES[name], mesh_of(kind)
    params, plan = made(case, mesh)
    (path,) = plan.targets
    key = jax.random.key(3)
    want = lora_jax.init_adapters(key, jax.device_get(params), plan)
    own = lora_jax.adapter_shardings(params, plan, **options(case))
    given = own if options(case) else None
    traced = jax.jit(lambda key, params: lora_jax.init_adapters(key, params, plan, own))
    results = [lora_jax.init_adapters(key, params, plan, given)]
    if (name, kind) == ("split down to 1", "mixed"):  # over tensor, and then over data
        with pytest.raises(ValueError, match=r"no axis can be split over tensor, data"):
            traced(key, params)
    else:
        results.append(traced(key, params))
    for got in results:
        for entry, value in got[path].items():
            assert value.sharding.is_equivalent_to(own[path][entry], value.ndim)
            if entry == "m":  # sums over split inputs have another order
                assert_close(value, want[path][entry], 4)
            else:
                np.testing.assert_array_equal(value, want[path][entry])


def test_inside_a_trace_explicit_axes_are_known():
    case, mesh = CASES["column"], mesh_of("explicit")
    params, plan = made(case, mesh)
    got = jax.jit(lambda key, params: lora_jax.init_adapters(key, params, plan))(
        jax.random.key(0), params
    )
    assert jax.typeof(got["w"]["B"]).sharding.spec == case.b
    shapes = jax.eval_shape(
        lambda p: lora_jax.init_adapters(jax.random.key(0), p, plan), params
    )
    assert shapes["w"]["B"].sharding.spec == case.b


def from_numpy(key, shape, dtype):
    seed = np.asarray(jax.random.key_data(key)).sum()
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


INITS = [
    *("orthogonal", ("zeros", "gaussian"), lora_jax.initializers.gaussian(0.5)),
    *(jax.nn.initializers.normal(0.1), from_numpy),
]


@pytest.mark.parametrize("init", INITS)
def test_every_initializer(init):
    params, plan = made(CASES["column"], mesh_of(), method="lora")
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, init=init))
    key = jax.random.PRNGKey(1)
    want = lora_jax.init_adapters(key, jax.device_get(params), plan)["w"]
    got = lora_jax.init_adapters(key, params, plan)["w"]
    assert got["B"].sharding.spec == P(None, "tensor")
    for name, value in got.items():
        assert_close(value, want[name], 4)


def test_functions_are_called_for_each_weight():
    """They may return other values in each call, which a compiled program would repeat."""
    count = iter(range(9))

    def counted(key, shape, dtype):
        del key
        return jnp.full(shape, next(count), dtype)

    place = NamedSharding(mesh_of(), P("tensor"))
    params = {name: jax.device_put(np.ones((8, 8), "float32"), place) for name in "ab"}
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=2, init=counted), params)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    assert [float(adapters[name]["A"][0, 0]) for name in "ab"] == [0, 1]


def test_keys_whose_numbers_depend_on_the_shape(monkeypatch):
    """A device's part of them would have other numbers: they are made whole, then split."""
    monkeypatch.setattr(initialization, "_compiled", None)  # which makes parts
    params, plan = made(CASES["row"], mesh_of(), method="lora")
    key = jax.random.key(0, impl="rbg")
    want = lora_jax.init_adapters(key, jax.device_get(params), plan)["w"]["A"]
    got = lora_jax.init_adapters(key, params, plan)["w"]["A"]
    assert got.sharding.spec == P("tensor", None)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian", "xavier_normal"])
def test_no_device_makes_a_whole_factor(init):
    mesh = jax.make_mesh((8,), ("tensor",))
    out = {
        "A": NamedSharding(mesh, P("tensor")),
        "B": NamedSharding(mesh, P(None, "tensor")),
    }
    options = {"rank": 16, "dtype": jnp.dtype("float32"), "init": init}
    draw = initialization._compiled(
        "threefry2x32", (4096, 8), tuple(options.items()), tuple(out.items())
    )
    compiled = draw.lower(jax.random.key_data(jax.random.key(0))).compile()
    memory = compiled.memory_analysis()
    whole = 4096 * 16 * 4
    assert memory.output_size_in_bytes < whole / 7
    assert memory.temp_size_in_bytes < whole
    one = jax.jit(lambda key: initializers.init_factors(key, (4096, 8), **options))
    assert (
        one.lower(jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes >= whole
    )


def test_host_memory_stays_host_memory():
    needs_host_memory()
    mesh = mesh_of()
    place = NamedSharding(mesh, P("fsdp", "tensor"), memory_kind="pinned_host")
    params = {"w": jax.device_put(normal(16, 32).astype("float32"), place)}
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=4), params)
    own = lora_jax.adapter_shardings(params, plan)["w"]
    got = lora_jax.init_adapters(jax.random.key(0), params, plan)["w"]
    for name in ("A", "B"):
        assert own[name].memory_kind == got[name].sharding.memory_kind == "pinned_host"


def test_a_plan_prints_where_things_lie_and_counts_their_bytes():
    mesh = mesh_of()

    def put(shape, *spec):
        return jax.device_put(np.ones(shape, "float32"), NamedSharding(mesh, P(*spec)))

    params = {
        "bias": put((16,), "fsdp"),
        "down": put((4, 8, 16), "tensor", None, ("data", "fsdp")),
        "up": put((16, 32), "fsdp", "tensor"),
    }
    config = lora_jax.LoraConfig(
        rank=2, targets=("up", "down"), train="bias", axes={"down": "iio", "up": "io"}
    )
    plan = lora_jax.plan_adapters(config, params)
    table = str(plan)
    *rows, below = table.splitlines()
    assert [row.split()[-4:] for row in rows[1:3]] == [
        ["tensor,-,data+fsdp", "tensor,-", "-,-", "256"],
        ["fsdp,tensor", "-,-", "-,tensor", "256"],
    ]
    assert [row.split()[-1] for row in rows] == ["bytes/device", "256", "256", "32", "544"]
    assert below == (
        "on the mesh data=2, fsdp=2, tensor=2: params of 800 bytes on each device"
    )
    again = lora_jax.AdapterPlan.from_json(plan.to_json())
    assert (str(again), again.layout) == (table, plan.layout)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)

    def on_a_device(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    count = lora_jax.count_parameters(params, plan)
    assert count.trainable_bytes == on_a_device(adapters)
    assert count.total_bytes == on_a_device(adapters) + on_a_device(params)
    assert f"{count.trainable_bytes:,}" in table.splitlines()[-2]
    assert f"params of {on_a_device(params):,} bytes" in table
    halves = plan.subset("up") | plan.subset(["down", "bias"])
    assert sorted(str(halves).splitlines()) == sorted(table.splitlines())


def test_bytes_without_a_mesh():
    params = {"w": draw(16, 32, dtype="bfloat16")}
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=2, use_dora=True), params)
    assert plan.layout is None
    count = lora_jax.count_parameters(params, plan)
    trainable, total = count
    assert (trainable, total) == (16 * 2 + 2 * 32 + 32, 16 * 32 + trainable)
    assert (count.trainable_bytes, count.total_bytes) == (
        4 * trainable,
        1024 + 4 * trainable,
    )
    config = dataclasses.replace(plan.config, dtype="bfloat16")  # of A and B, and not of m
    plan = lora_jax.plan_adapters(config, params)
    assert lora_jax.count_parameters(params, plan).trainable_bytes == 2 * 96 + 4 * 32


def test_weights_without_a_mesh_beside_others():
    mesh = mesh_of()
    params = {
        "a": draw(8, 8),
        "b": jax.device_put(normal(8, 8, dtype="float32"), NamedSharding(mesh, P())),
    }
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=2), params)
    got = lora_jax.adapter_shardings(params, plan)
    assert got["a"] == got["b"]


def on(mesh, *spec, shape=(16, 32)):
    return jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, P(*spec)))


class Unnamed(jax.sharding.Sharding):
    """A sharding without a mesh."""

    def check_compatible_aval(self, shape):
        del shape


def test_errors():
    mesh = mesh_of()
    config = lora_jax.LoraConfig(rank=2)

    def shardings(params, **options):
        plan = lora_jax.plan_adapters(
            config, jax.tree.map(lambda x: normal(*x.shape, dtype="float32"), params)
        )
        return lora_jax.adapter_shardings(params, plan, **options)

    params = {"w": on(mesh, "fsdp", "tensor")}
    with pytest.raises(
        ValueError, match="no weight of the plan lies on a mesh: put the params"
    ):
        shardings({"w": draw(16, 32)})
    with pytest.raises(
        ValueError, match="data_axes has 'dat', which is no axis of the mesh"
    ):
        shardings(params, data_axes=("dat",))
    with pytest.raises(TypeError, match="data_axes must be names of mesh axes"):
        shardings(params, data_axes=3)
    assert shardings(params, data_axes="data")["w"]["A"].spec == P("fsdp", None)
    other = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    with pytest.raises(
        ValueError, match=r"must lie on one mesh: 'w' lies on .* and 'x' on"
    ):
        shardings(params | {"x": on(other)})
    both = params | {"x": on(other)}
    plan = lora_jax.plan_adapters(config, both)  # as of the stages of a pipeline
    assert plan.layout is None
    for path, where in (("w", mesh), ("x", other)):
        own = lora_jax.adapter_shardings(both, plan.subset(path))
        assert own[path]["B"].mesh == where
    with pytest.raises(
        ValueError, match=r"'w': .*'tensor'\) splits axis 1 .* size 15, into 2 parts"
    ):
        shardings({"w": on(mesh, None, "tensor", shape=(16, 15))})
    plan = lora_jax.plan_adapters(config, {"w": draw(16, 32)})
    with pytest.raises(KeyError, match="params lack weights that the plan adapts: 'w'"):
        lora_jax.adapter_shardings({"v": on(mesh)}, plan)
    with pytest.raises(TypeError, match="'w': the weight must have a jax"):
        shardings({"w": jax.ShapeDtypeStruct((16, 32), "float32", sharding=Unnamed())})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, KeyError, "shardings"),
        ({"w": {"A": NamedSharding(mesh_of(), P())}}, KeyError, "B"),
        (
            {"w": {"A": P(), "B": P()}},
            TypeError,
            "'w': the sharding of A must be a jax.sharding",
        ),
        (
            {"w": dict.fromkeys("AB", NamedSharding(mesh_of(), P("data")))},
            ValueError,
            r"'w': B of shape \(3, 32\) cannot be split as NamedSharding",
        ),
    ],
)
def test_bad_shardings_of_new_adapters(given, error, message):
    params = {"w": draw(16, 32)}
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=3), params)
    with pytest.raises(error, match=message):
        lora_jax.init_adapters(jax.random.key(0), params, plan, given)
