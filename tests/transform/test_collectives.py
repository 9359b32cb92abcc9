"""Adapters that lie by the rule add no collective to a program but their own small ones.

The program of a step is compiled for a mesh of eight CPU devices, and its collectives are
compared with those of the frozen program: the same function without adapters, with the
gradient of its input, so that both have a backward pass through every product. All sizes
are different, so that the size of a collective shows what it moves.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax
from tests import programs
from tests.support import set_mesh
from tests.transform.mesh_cases import Place
from tests.transform.support import plan_of
from tests.xla_flags import WITH_NEW_EMITTERS

RANK = 4
BATCH = ("data", "fsdp")
SLOTS = 8
"""So many that products gather the factors of each row."""
ROWS = 12
"""Tokens on each device: a batch of 8, split over four, of 6 tokens each."""
X = ((8, 6, 48), (BATCH, None, None))
TOKENS = ((8, 6), (BATCH, None))


@dataclasses.dataclass(frozen=True)
class Case:
    """A function `fn(params, inputs, place)`, and what its adapters may add.

    Attributes:
        fn: the function. Its result has the sharding that a model would give it.
        params: `{name: (shape, spec)}`, for each a weight that is adapted.
        inputs: `{name: (shape, spec)}`, of which `"tokens"` are integers.
        sums: how many arrays of `rows * rank` numbers are summed over devices, in the
            forward pass and in the whole step. They are the products with `A` whose inputs
            are split, and in the backward pass those with `B` whose outputs are.
        rows: of the input of each adapter, on each device.
        layers: how often each weight of a stack is used.
        recomputes: whether the backward pass computes the layers again.
        looked_up: the weights of which rows are looked up, and whether they are multiplied
            as well.
        whole: factors that lie whole where their weight is split, because the split axis is
            not the first of those that are folded. Their gradients are gathered.
        reductions: in how many steps gradients are summed over the axes of the tokens.
        groups: products are this many times as large, since the CPU multiplies the rows of
            all groups by the weights of each.
        kinds: the kinds of mesh axes that JAX has this function for.
    """

    fn: Callable[..., Any]
    params: Mapping[str, Any]
    inputs: Mapping[str, Any]
    sums: tuple[int, int]
    rows: int = ROWS
    layers: int = 1
    recomputes: bool = False
    looked_up: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    whole: tuple[tuple[str, str], ...] = ()
    reductions: int = 1
    groups: int = 1
    kinds: tuple[Any, ...] = (AxisType.Auto, AxisType.Explicit)


CASES: dict[str, Case] = {}


def case(sums, inputs=None, *, params, **options):
    """Adds a function to the cases."""

    def add(fn):
        given = {"x": X} if inputs is None else inputs
        CASES[fn.__name__] = Case(fn, params, given, sums, **options)
        return fn

    return add


def einsum(place, labels, x, w, *spec):
    """A product, with the sharding of its result."""
    return place.shard(jnp.einsum(labels, x, w, **place.out(*spec)), *spec)


UP, DOWN = ((48, 80), ("fsdp", "tensor")), ((80, 48), ("tensor", "fsdp"))


@case((1, 2), params={"up": UP, "down": DOWN})
def columns_and_rows(params, inputs, place):
    """The first product is column-parallel, the second one row-parallel."""
    h = einsum(place, "btd,df->btf", inputs["x"], params["up"], BATCH, None, "tensor")
    return einsum(place, "btf,fd->btd", jnp.tanh(h), params["down"], BATCH, None, None)


def stack(weight):
    """Three layers of a weight."""
    shape, spec = weight
    return (3, *shape), (None, *spec)


@case(
    (3, 9),
    params={"up": stack(UP), "down": stack(DOWN)},
    layers=3,
    recomputes=True,
)
def scan_of_checkpoints(params, inputs, place):
    @jax.checkpoint
    def step(x, layer):
        return x + columns_and_rows(layer, {"x": x}, place), None

    return lax.scan(step, inputs["x"], params)[0]


@case(
    (1, 2),
    params={
        "up": ((80, 48), ("tensor", "fsdp")),
        "down": ((48, 80), ("fsdp", "tensor")),
    },
)
def weights_of_torch(params, inputs, place):
    h = einsum(place, "btd,fd->btf", inputs["x"], params["up"], BATCH, None, "tensor")
    return einsum(place, "btf,df->btd", jnp.tanh(h), params["down"], BATCH, None, None)


@case(
    (1, 2),
    params={
        "qkv": ((48, 3, 4, 10), ("fsdp", None, "tensor", None)),
        "output": ((4, 10, 48), ("tensor", None, "fsdp")),
    },
    whole=(("qkv", "B"),),
)
def fused_heads(params, inputs, place):
    spec = BATCH, None, None, "tensor", None
    qkv = einsum(place, "btd,dchk->btchk", inputs["x"], params["qkv"], *spec)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    return einsum(place, "bthk,hkd->btd", q * k + v, params["output"], BATCH, None, None)


@case(
    (1, 2),
    {"x": ((4, 10, 48), ("fsdp", "data", None))},
    params={
        "up": ((4, 48, 80), ("fsdp", None, "tensor")),
        "down": ((4, 80, 48), ("fsdp", "tensor", None)),
    },
    rows=10,
)
def experts(params, inputs, place):
    """Experts that lie on an axis that splits examples elsewhere."""
    h = einsum(place, "ebd,edf->ebf", inputs["x"], params["up"], "fsdp", "data", "tensor")
    down = params["down"]
    return einsum(place, "ebf,efd->ebd", jnp.tanh(h), down, "fsdp", "data", None)


@case(
    (1, 2),
    {"x": ((16, 48), (BATCH, None)), "sizes": ((4,), (None,))},
    params={
        "up": ((4, 48, 80), (None, "fsdp", "tensor")),
        "down": ((4, 80, 48), (None, "tensor", "fsdp")),
    },
    rows=4,
    groups=4,
    kinds=(AxisType.Auto,),  # JAX infers no sharding of `ragged_dot` on explicit axes
)
def grouped_experts(params, inputs, place):
    h = lax.ragged_dot(inputs["x"], params["up"], inputs["sizes"])
    h = jnp.tanh(place.shard(h, BATCH, "tensor"))
    return place.shard(lax.ragged_dot(h, params["down"], inputs["sizes"]), BATCH, None)


@case(
    (0, 0),
    {"x": ((16, 48), (BATCH, None)), "sizes": ((4,), ("tensor",))},
    params={"w": ((4, 48, 80), ("tensor", None, None))},
    rows=4,
    groups=2,
)
def experts_in_a_shard_map(params, inputs, place):
    """Each device multiplies by its own experts, and the model sums over devices."""
    specs = (BATCH, None), ("tensor", None, None), ("tensor",)

    def local(x, w, sizes):
        return lax.psum(lax.ragged_dot(x, w, sizes), "tensor")

    mapped = jax.shard_map(
        local,
        mesh=place.mesh,
        in_specs=tuple(P(*spec) for spec in specs),
        out_specs=P(BATCH, None),
    )
    return mapped(inputs["x"], params["w"], inputs["sizes"])


def experts_over_devices(params, inputs, place):
    """Groups that a mesh axis splits, without `jax.shard_map`."""
    return place.shard(
        lax.ragged_dot(inputs["x"], params["w"], inputs["sizes"]), BATCH, None
    )


def look_up(place, table, tokens, *spec):
    """Rows of a table, with their sharding."""
    return place.shard(table.at[tokens].get(**place.out(*spec)), *spec)


@case(
    (1, 2),
    {"x": X, "tokens": TOKENS},
    params={"table": ((40, 48), ("tensor", "fsdp"))},
    looked_up={"table": True},
)
def tied_head(params, inputs, place):
    h = look_up(place, params["table"], inputs["tokens"], BATCH, None, None)
    h = jnp.tanh(h + inputs["x"])
    return einsum(place, "btd,vd->btv", h, params["table"], BATCH, None, "tensor")


@case(
    (0, 1),
    {"x": ((8, 6, 48), (BATCH, None, "tensor")), "tokens": TOKENS},
    params={"table": ((40, 48), ("fsdp", "tensor"))},
    looked_up={"table": False},
)
def embedding_split_along_its_width(params, inputs, place):
    spec = BATCH, None, "tensor"
    return look_up(place, params["table"], inputs["tokens"], *spec) + inputs["x"]


@case(
    (1, 1),
    {"x": X, "tokens": TOKENS},
    params={"table": ((40, 48), ("tensor", None))},
    looked_up={"table": False},
)
def embedding_split_along_its_rows(params, inputs, place):
    spec = BATCH, None, None
    return look_up(place, params["table"], inputs["tokens"], *spec) + inputs["x"]


@case(
    (1, 2),
    {"x": ((8, 6, 48), (BATCH, "tensor", None))},
    params={"up": UP, "down": DOWN},
)
def tokens_split_between_layers(params, inputs, place):
    h = columns_and_rows(params, {"x": place.shard(inputs["x"], BATCH, None, None)}, place)
    return place.shard(h, BATCH, "tensor", None)


@case(
    (0, 0),
    {"x": ((8, 6, 48), (BATCH, "tensor", None))},
    params={"up": ((48, 80), ("fsdp", None)), "down": ((80, 48), (None, "fsdp"))},
    rows=6,
    reductions=2,
)
def split_tokens(params, inputs, place):
    """Tokens that are split along both of their axes: these must not be folded."""
    h = einsum(place, "btd,df->btf", inputs["x"], params["up"], BATCH, "tensor", None)
    return einsum(place, "btf,fd->btd", jnp.tanh(h), params["down"], BATCH, "tensor", None)


class Step:
    """The programs of a case on a mesh, adapted and frozen."""

    def __init__(self, case, kind, *, use_dora=False):
        names = ("data", "fsdp", "tensor")
        mesh = jax.make_mesh((2, 2, 2), names, axis_types=(kind,) * 3)
        self.case, self.place, self.mesh = case, Place(mesh), mesh

        def array(shape, spec, dtype="float32"):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self.place.on(*spec))

        self.params = {name: array(*own) for name, own in case.params.items()}
        integers = {name: array(*own, dtype="int32") for name, own in case.inputs.items()}
        self.indices = {name: own for name, own in integers.items() if name != "x"}
        self.x = array(*case.inputs["x"])
        with set_mesh(mesh):
            self.plan = plan_of(
                self.fn,
                *(self.params, self.x, self.indices),
                rank=RANK,
                targets="*",
                use_dora=use_dora,
            )
        places = lora_jax.adapter_shardings(self.params, self.plan, data_axes=BATCH)
        self.adapters = {
            path: {
                name: jax.ShapeDtypeStruct(shape, "float32", sharding=places[path][name])
                for name, shape in target.adapter_shapes.items()
            }
            for path, target in self.plan.targets.items()
        }

    def fn(self, params, x, indices):
        return self.case.fn(params, {"x": x, **indices}, self.place)

    def compiled(self, function, *args):
        """The text of a program; gradients lie where their arguments lie."""
        out = None
        if args[0] is not self.params:
            out = jax.tree.map(lambda leaf: leaf.sharding, args[:-2])
        with set_mesh(self.mesh):
            jitted = jax.jit(function, out_shardings=out)
            return jitted.lower(*args).compile(WITH_NEW_EMITTERS).as_text()

    @functools.cached_property
    def frozen(self):
        """The text of the frozen program, its forward pass and the whole step."""
        name = self.case.fn.__name__
        if self.plan.config.use_dora and CASES.get(name) is self.case:  # the same program
            return step_of(name, self.mesh.axis_types[0]).frozen

        def loss(x, params, indices):
            return jnp.sum(jnp.sin(self.fn(params, x, indices)))

        forward = self.compiled(
            lambda params, x, indices: loss(x, params, indices),
            *(self.params, self.x, self.indices),
        )
        step = self.compiled(
            lambda *args: (jax.grad(loss)(*args),), self.x, self.params, self.indices
        )
        return forward, step

    @functools.cached_property
    def adapted(self):
        """The text of the adapted program, its forward pass and the whole step."""
        fn = lora_jax.adapt(self.fn, self.plan)

        def loss(adapters, x, params, indices):
            return jnp.sum(jnp.sin(fn(params, adapters, x, indices)))

        forward = self.compiled(
            lambda params, x, indices, adapters: loss(adapters, x, params, indices),
            *(self.params, self.x, self.indices, self.adapters),
        )
        step = jax.grad(loss, argnums=(0, 1))
        return forward, self.compiled(
            step, self.adapters, self.x, self.params, self.indices
        )

    @functools.cached_property
    def rows(self):
        """The text of a step in which each row has its own adapter."""

        def in_slots(array):
            spec = None, *array.sharding.spec
            return jax.ShapeDtypeStruct(
                (SLOTS, *array.shape), array.dtype, sharding=self.place.on(*spec)
            )

        shape, spec = self.case.inputs["x"]
        axis = next(i for i, axes in enumerate(spec) if axes in (BATCH, "data"))
        of_indices = {name: 0 if name == "tokens" else None for name in self.indices}
        fn = lora_jax.adapt_rows(self.fn, self.plan, (axis, of_indices))
        stacked = jax.tree.map(in_slots, self.adapters)
        scales = jax.ShapeDtypeStruct((SLOTS,), "float32", sharding=self.place.on(None))
        magnitudes = {path: scales for path, own in stacked.items() if "m" in own}
        rest = dict.fromkeys(stacked, scales), magnitudes
        slots = jax.ShapeDtypeStruct(
            shape[axis : axis + 1], "int32", sharding=self.place.on(spec[axis])
        )

        def loss(stacked, x, params, inputs):
            indices, slots, rest = inputs
            stack = lora_jax.AdapterStack(stacked, *rest)
            return jnp.sum(jnp.sin(fn(params, stack, slots, x, indices)))

        step, inputs = jax.grad(loss, argnums=(0, 1)), (self.indices, slots, rest)
        return self.compiled(step, stacked, self.x, self.params, inputs)

    def shard(self, array):
        """The number of entries of an array on one device, in one layer."""
        return math.prod(array.sharding.shard_shape(array.shape)) // self.case.layers

    def uses(self, path):
        """How often a weight is used in a layer, and how many of the uses are products."""
        multiplied = self.case.looked_up.get(path)
        return {None: (1, 1), True: (2, 1), False: (1, 0)}[multiplied]

    def allowed(self, backward):
        """The collectives of the adapters: how often each kind and number of entries.

        Norms of DoRA are not among them.
        """
        case, found = self.case, collections.Counter()
        found["all-reduce", case.rows * RANK] = case.sums[backward]
        for path, adapter in self.adapters.items() if backward else ():
            n = self.uses(path)[0] * case.layers * case.reductions
            for name, factor in adapter.items():
                is_whole = (path, name) in case.whole
                found["all-reduce", self.shard(factor) // (1 + is_whole)] += n
                if is_whole:
                    found["all-gather", factor.size] += 1
        return found

    def operations(self, backward):
        """The operations of the products with the factors, each with its own shard."""
        case, total = self.case, 0
        for path, target in self.plan.targets.items():
            weight = self.params[path]
            sizes = weight.sharding.shard_shape(weight.shape)
            whole = [
                n if axes in BATCH else own
                for n, own, axes in zip(
                    weight.shape, sizes, case.params[path][1], strict=True
                )
            ]
            n_in, n_out = (
                math.prod(whole[axis] for axis in axes)
                for axes in (target.in_axes, target.out_axes)
            )
            uses, products = self.uses(path)
            width = uses * n_out + products * n_in
            total += 2 * case.rows * RANK * width * case.layers * case.groups
        return total * (1, 4 if case.recomputes else 3)[backward]

    def norm_operations(self):
        """The operations of `A @ B` for DoRA's norms, on the shard of each weight."""
        shards = (w.sharding.shard_shape(w.shape) for w in self.params.values())
        return sum(2 * RANK * math.prod(shape) for shape in shards)

    def recomputed(self):
        """The collectives and the operations that a checkpoint repeats for DoRA alone.

        The gradient of a magnitude needs the output of its product.
        """
        if not self.case.recomputes:
            return collections.Counter(), 0
        (forward, _) = self.frozen
        return counted(programs.collectives(forward)), programs.product_flops(forward)


def added(adapted, frozen):
    """The collectives that a program has beyond those of another one."""
    return counted(programs.collectives(adapted) - programs.collectives(frozen))


def counted(found):
    """How often each kind and number of entries is exchanged."""
    sizes = collections.Counter()
    for one, times in found.items():
        sizes[one.kind, math.prod(one.shape)] += times
    return sizes


# Other cases are slow tests, but for adapters without norms on automatic axes.
SOME = ("columns_and_rows", "fused_heads", "scan_of_checkpoints", "tied_head")


def grid(*kinds):
    """Parameters for every case and kind of axes; for those of `kinds` no slow tests."""
    return [
        pytest.param(
            *(name, kind),
            marks=[pytest.mark.slow] * (name not in SOME and kind not in kinds),
        )
        for name, case in CASES.items()
        for kind in case.kinds
    ]


GRID = grid(AxisType.Auto)


@functools.cache
def step_of(name, kind, use_dora=False):
    return Step(CASES[name], kind, use_dora=use_dora)


@pytest.mark.mostly_slow(6)
@pytest.mark.parametrize(("name", "kind"), GRID)
def test_no_other_collective(name, kind):
    step = step_of(name, kind)
    for backward in (False, True):
        found = added(step.adapted[backward], step.frozen[backward])
        assert not found - step.allowed(backward)


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_no_product_is_computed_by_several_devices(name, kind):
    step = step_of(name, kind)
    for backward in (False, True):
        adapted, frozen = step.adapted[backward], step.frozen[backward]
        more = programs.product_flops(adapted) - programs.product_flops(frozen)
        assert 0 < more <= step.operations(backward)


# LoRA on one kind of axes and DoRA on the other one, in turn: the kind of axes is in the
# types of the values, norms are computed from the weight alone, and rows know of neither.
ROWS_GRID = [
    pytest.param(name, kind, use_dora, marks=[pytest.mark.slow] * (name not in SOME))
    for i, (name, own) in enumerate(CASES.items())
    for kind in own.kinds
    for use_dora in (False, True)
    if len(own.kinds) == 1 or (i + (kind == AxisType.Auto) + use_dora) % 2
]


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize(("name", "kind", "use_dora"), ROWS_GRID)
def test_rows_exchange_the_gradients_of_all_slots(name, kind, use_dora):
    """And nothing else, and the products of LoRA cost what they cost with one adapter."""
    step, case = step_of(name, kind, use_dora), CASES[name]
    one, rows = (programs.collectives(text) for text in (step.adapted[1], step.rows))
    more, less = counted(rows - one), counted(one - rows)
    gradients = step.allowed(True)
    sums = "all-reduce", case.rows * RANK
    gradients.pop(sums, None)
    allowed = {(kind, SLOTS * size): n for (kind, size), n in gradients.items()}
    if case.reductions > 1:  # first over the tokens of each row, of which a device has 2
        allowed |= {(kind, 2 * size): n for (kind, size), n in gradients.items()}
    if case.groups > 1:  # which are multiplied by the factors of all slots
        allowed["all-reduce", SLOTS * sums[1]] = case.sums[1]
        allowed["all-reduce", SLOTS] = 2  # whether the factors of a slot are finite
    if not use_dora:
        assert not more - collections.Counter(allowed)
        assert more.total() <= less.total() + (case.groups > 1) * 2
        if case.groups == 1:
            flops = map(programs.product_flops, (step.rows, step.adapted[1]))
            assert next(flops) <= 1.0001 * next(flops)
        return
    outs = [math.prod(t.adapter_shapes["m"]) for t in step.plan.targets.values()]
    others = more - collections.Counter(allowed)
    assert max((size for _, size in others), default=0) <= SLOTS * max(outs)


def test_known_limit_of_groups_that_an_axis_splits():
    """The product with `B` is summed over devices by itself, not with the frozen product.

    XLA on the CPU does not join the two sums. Inside `jax.shard_map` they are one sum.
    """
    params = {"w": ((4, 48, 80), ("tensor", None, None))}
    inputs = {"x": ((16, 48), (BATCH, None)), "sizes": ((4,), (None,))}
    case = Case(experts_over_devices, params, inputs, (1, 2), rows=4, groups=4)
    step = Step(case, AxisType.Auto)
    for backward, width in ((False, 80), (True, 48)):
        found = added(step.adapted[backward], step.frozen[backward])
        more = found - step.allowed(backward)
        assert more["all-reduce", case.rows * width] == 1


# A norm is a sum of squares on three scales, each of which is summed over devices; then it
# is gathered where the weight, but not the adapter, is split along its outputs.
NORMS = 8
"""How many arrays of as many numbers as the outputs DoRA exchanges, for each weight."""


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize(("name", "kind"), grid())
def test_norms_of_dora_exchange_numbers_of_outputs(name, kind):
    step = step_of(name, kind, use_dora=True)
    outs = {path: t.adapter_shapes["m"] for path, t in step.plan.targets.items()}
    for backward in (False, True):
        adapted, frozen = step.adapted[backward], step.frozen[backward]
        more = added(adapted, frozen) - step.allowed(backward)
        flops = programs.product_flops(adapted) - programs.product_flops(frozen)
        flops -= step.operations(backward) + step.norm_operations()
        if backward:
            collectives, operations = step.recomputed()
            more, flops = more - collectives, flops - operations
        largest = max((size for _, size in more), default=0)
        assert largest <= max(map(math.prod, outs.values()))
        numbers = sum(size * times for (_, size), times in more.items())
        assert numbers <= NORMS * sum(map(math.prod, outs.values()))
        assert flops <= 0


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_norms_of_long_columns_exchange_products_with_factors(kind):
    """Norms of more than 128 entries are factored: `A^T W` is summed over devices."""
    params = {
        "up": ((160, 192), ("fsdp", "tensor")),
        "down": ((192, 160), ("tensor", "fsdp")),
    }
    inputs = {"x": ((8, 6, 160), (BATCH, None, None))}
    step = Step(Case(columns_and_rows, params, inputs, (1, 2)), kind, use_dora=True)
    for backward in (False, True):
        found = added(step.adapted[backward], step.frozen[backward])
        assert max(size for _, size in found) <= RANK * 192


TEXT = """
%body (p.1: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %p.1 = (s32[], f32[4,2]{1,0}) parameter(0)
  %x.1 = f32[4,2]{1,0} get-tuple-element(%p.1), index=1
  %dot.1 = f32[4,4]{1,0} dot(%x.1, %x.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %start.1 = (f32[4,2]{1,0}, f32[8,2]{1,0}) all-gather-start(%x.1), dimensions={0}
  ROOT %t.1 = (s32[], f32[4,2]{1,0}) tuple(%i.1, %x.1)
}

ENTRY %main (a.1: f32[4,2]) -> f32[4,2] {
  %a.1 = f32[4,2]{1,0} parameter(0)
  %sums.1 = (bf16[6]{0}, s8[2,3]{1,0}) all-reduce(%a.1, %a.1), to_apply=%add
  %loop.1 = (s32[], f32[4,2]{1,0}) while(%t.2), condition=%less, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
}
""".replace("\\\n", "")


def test_collectives_and_products_of_a_program_are_counted():
    found = programs.collectives(TEXT)
    assert found == {
        programs.Collective("all-gather", "f32", (8, 2)): 3,
        programs.Collective("all-reduce", "bf16", (6,)): 1,
        programs.Collective("all-reduce", "s8", (2, 3)): 1,
    }
    assert sorted(one.bytes for one in found) == [6, 12, 64]
    assert programs.product_flops(TEXT) == 3 * 2 * 4 * 4 * 2
