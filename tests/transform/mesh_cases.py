"""Functions on meshes with explicit axes, which run on one device as well."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, auto_axes, explicit_axes
from jax.sharding import PartitionSpec as P

from tests.support import asarray, normal
from tests.transform.cases import mul

TOKENS = np.arange(24, dtype="int32").reshape(8, 3) % 16
ROWS, ROWS_SPEC = normal(8, 16), ("data", None)
X, X_SPEC = normal(8, 3, 16), ("data", None, None)


@dataclasses.dataclass(frozen=True)
class Place:
    """A mesh, or one device, where nothing is sharded."""

    mesh: Any = None

    @property
    def is_explicit(self):
        """Whether there are axes in the types."""
        return self.mesh is not None and AxisType.Explicit in self.mesh.axis_types

    def on(self, *spec):
        """A sharding on the mesh."""
        return NamedSharding(self.mesh, P(*spec))

    def out(self, *spec):
        """The keyword argument for a sharding of a result."""
        return {"out_sharding": self.on(*spec)} if self.is_explicit else {}

    def shard(self, x, *spec):
        """An array, sharded."""
        if self.is_explicit:
            return jax.sharding.reshard(x, self.on(*spec))
        return x if self.mesh is None else lax.with_sharding_constraint(x, self.on(*spec))

    def automatic(self, function, *spec):
        """A function with automatic axes, and its result sharded."""
        return auto_axes(function, **self.out(*spec)) if self.is_explicit else function

    def explicit(self, function, *specs):
        """A function with explicit axes, and its arguments sharded."""
        if not self.is_explicit:
            return function
        return explicit_axes(function, in_sharding=tuple(P(*spec) for spec in specs))

    def shard_map(self, function, specs, out, **options):
        """A function of shards and of what sums over "model"; elsewhere that is nothing."""
        if self.mesh is None:
            return lambda *args: function(lambda x: x, *args)
        return jax.shard_map(
            lambda *args: function(lambda x: lax.psum(x, "model"), *args),
            mesh=self.mesh,
            in_specs=tuple(P(*spec) for spec in specs),
            out_specs=P(*out),
            **options,
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """A function `fn(params, x, place)`.

    Attributes:
        fn: the function.
        params: `{name: (shape, spec)}`.
        x: the other argument.
        spec: of it.
        axes: of each weight that is adapted.
        config: for the plan.
    """

    fn: Callable[..., Any]
    params: Mapping[str, tuple[tuple[int, ...], tuple[Any, ...]]]
    x: np.ndarray
    spec: tuple[Any, ...]
    axes: Mapping[str, str]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


CASES: dict[str, Case] = {}


def case(x, spec, axes, config=None, **params):
    """Adds a function to the cases."""

    def add(fn):
        names = axes.split()
        named = dict(zip(params, names, strict=False))
        CASES[fn.__name__] = Case(fn, params, x, spec, named, config or {})
        return fn

    return add


def einsum(place, labels, x, w, *spec):
    """A product, with the sharding of its result."""
    return jnp.einsum(labels, x, w, **place.out(*spec))


@case(X, ("data", None, "model"), "io", w=((16, 32), ("model", None)))
def row_parallel(params, x, place):
    return einsum(place, "btd,df->btf", x, params["w"], "data", None, None)


@case(
    X, X_SPEC, "io", {"products": {"mul": "...k,kn->...n"}}, w=((16, 32), (None, "model"))
)
def stated(params, x, place):
    return jnp.tanh(mul(x, params["w"]))


@case(X, X_SPEC, "io", w=((16, 32), (None, "model")))
def column_parallel(params, x, place):
    return jnp.tanh(x @ params["w"])


@case(
    *(X, X_SPEC, "io io"),
    up=((16, 32), (None, "model")),
    down=((32, 16), ("model", None)),
)
def mlp(params, x, place):
    h = jnp.tanh(x @ params["up"])
    return einsum(place, "btf,fd->btd", h, params["down"], "data", None, None)


@case(TOKENS, ("data", None), "io", e=((16, 12), ("model", None)))
def tied_head(params, tokens, place):
    x = params["e"].at[tokens].get(**place.out("data", None, None))
    return einsum(place, "btd,vd->btv", jnp.tanh(x), params["e"], "data", None, "model")


@case(
    *(TOKENS, ("data", None), "io io", {"targets": "*"}),
    e=((16, 12), (None, "model")),
    up=((12, 8), ("model", None)),
)
def embedding(params, tokens, place):
    x = params["e"].at[tokens].get(**place.out("data", None, "model"))
    return einsum(place, "btd,df->btf", x, params["up"], "data", None, None)


@case(TOKENS, ("data", None), "io", w=((16, 12), ("model", None)))
def one_hot(params, tokens, place):
    x = jax.nn.one_hot(tokens, 16, dtype=params["w"].dtype)
    return einsum(place, "btv,vd->btd", x, params["w"], "data", None, None)


@case(X, X_SPEC, "io", w=((16, 32), (None, "model")))
def split_heads(params, x, place):
    w = params["w"].reshape(16, 8, 4)
    return einsum(place, "btd,dhk->bhtk", x, w, "data", "model", None, None)


@case(X, X_SPEC, "iooo", w=((16, 3, 8, 4), (None, None, "model", None)))
def fused_heads(params, x, place):
    spec = "data", None, None, "model", None
    qkv = einsum(place, "btd,dchk->btchk", x, params["w"], *spec)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    return q * k + v


@case(ROWS, ROWS_SPEC, "oi", w=((12, 16), ("model", None)))
def out_in(params, x, place):
    return x @ params["w"].T


@case(
    *(ROWS, ROWS_SPEC, "io io"),
    a=((16, 12), (None, "model")),
    b=((16, 8), (None, "model")),
)
def fused(params, x, place):
    return x @ jnp.concatenate([params["a"], params["b"]], 1)


@case(ROWS, ROWS_SPEC, "io", w=((16, 12), ("model", None)))
def scaled(params, x, place):
    scale = place.shard(jnp.arange(1, 17, dtype=x.dtype), "model")
    return einsum(place, "bd,df->bf", x, params["w"] * scale[:, None], "data", None)


@case(ROWS, ROWS_SPEC, "io", w=((16, 12), (None, "data")))
def gathered_before_use(params, x, place):
    return jnp.tanh(x @ place.shard(params["w"], None, None))


@case(ROWS, ROWS_SPEC, "bio", w=((4, 16, 12), (None, None, "model")))
def entries_of_a_stack(params, x, place):
    i = jnp.argmax(jnp.arange(3))
    return x @ params["w"][1] + x @ lax.dynamic_index_in_dim(params["w"], i, keepdims=False)


@case(X, X_SPEC, "bio", w=((3, 16, 16), (None, None, "model")))
def scan(params, x, place):
    def step(x, w):
        return place.shard(jnp.tanh(x @ w), "data", None, None), None

    return lax.scan(step, x, params["w"])[0]


@case(
    *(X, X_SPEC, "bio bio"),
    up=((3, 16, 32), (None, None, "model")),
    down=((3, 32, 16), (None, "model", None)),
)
def scan_of_checkpoints(params, x, place):
    @jax.checkpoint
    def step(x, layer):
        return x + mlp(layer, x, place), None

    return lax.scan(step, x, params)[0]


@case(ROWS, ROWS_SPEC, "io", w=((16, 12), (None, "model")))
def branches(params, x, place):
    chosen = jnp.sum(jnp.arange(3)) > 2
    return lax.cond(chosen, lambda w: x @ w, lambda w: x @ (2 * w), params["w"])


@case(X, X_SPEC, "io", w=((16, 12), (None, "model")))
def mapped(params, x, place):
    return jax.vmap(lambda x: x @ params["w"])(x)


@case(normal(4, 8, 16), (None, "data", None), "bio", w=((4, 16, 12), (None, None, "model")))
def mapped_with_the_weight(params, x, place):
    return jax.vmap(jnp.matmul)(x, params["w"])


@case(
    normal(4, 8, 16), ("model", "data", None), "bio", w=((4, 16, 12), ("model", None, None))
)
def experts(params, x, place):
    return einsum(place, "ebd,edf->ebf", x, params["w"], "model", "data", None)


@case(normal(6, 16), (None, None), "bio", w=((4, 16, 12), ("model", None, None)))
def grouped_experts(params, x, place):
    sizes = np.array([2, 1, 0, 3])
    if place.mesh is None:
        return lax.ragged_dot(x, params["w"], asarray(sizes))

    def local(sum_of, x, w):
        i, rows = lax.axis_index("model"), jnp.arange(6)
        start, size = asarray(np.cumsum(sizes) - sizes)[i], asarray(sizes)[i]
        own = (rows >= start) & (rows < start + size)
        out = lax.ragged_dot(x, w, jnp.array([6]))
        return sum_of(jnp.where(own[:, None], out, jnp.zeros_like(out)))

    specs = (None, None), ("model", None, None)
    mapped = place.shard_map(local, specs, (None, None), check_vma=False)
    return mapped(x, params["w"])


@case(ROWS, ("data", "model"), "io", w=((16, 12), ("model", None)))
def shards(params, x, place):
    specs = ("data", "model"), ("model", None)
    mapped = place.shard_map(lambda sum_of, x, w: sum_of(x @ w), specs, ("data", None))
    return mapped(x, params["w"])


@case(ROWS, ("data", "model"), "io", w=((16, 12), ("model", None)))
def shards_along_one_axis(params, x, place):
    specs, names = ((None, "model"), ("model", None)), {"model"}
    mapped = place.shard_map(
        lambda sum_of, x, w: sum_of(x @ w), specs, (None, None), axis_names=names
    )
    return mapped(x, params["w"])


@case(TOKENS, ("data", None), "io", {"targets": "*"}, e=((16, 12), (None, "model")))
def look_up_of_shards(params, tokens, place):
    specs = ("data", None), (None, "model")
    mapped = place.shard_map(lambda _, i, e: e[i], specs, ("data", None, "model"))
    return mapped(tokens, params["e"])


@case(ROWS, ROWS_SPEC, "io", w=((16, 12), ("model", None)))
def automatic(params, x, place):
    return place.automatic(lambda x, w: jnp.tanh(x @ w), "data", None)(x, params["w"])


@case(ROWS, ROWS_SPEC, "io", w=((16, 12), ("model", None)))
def explicit_inside_automatic(params, x, place):
    def product(x, w):
        return einsum(place, "bd,df->bf", x, w, "data", None)

    explicit = place.explicit(product, ("data", None), ("model", None))
    return place.automatic(lambda x, w: explicit(x, 2 * w), "data", None)(x, params["w"])


@case(
    *(normal(8, 6, 5, 4), ("data", None, None, None), "iiio", {"targets": "k"}),
    k=((3, 3, 4, 8), (None, None, None, "model")),
)
def convolution(params, x, place):
    def convolve(x, k):
        layout = "NHWC", "HWIO", "NHWC"
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=layout)

    spec = "data", None, None, "model"
    return place.automatic(convolve, *spec)(x, params["k"])


@case(X, X_SPEC, "io", w=((16, 12), (None, "model")))
def jitted_twice(params, x, place):
    @jax.jit
    def long(x, w):
        for _ in range(30):
            x = jnp.sin(x)
        return x @ w

    return long(x, params["w"]) + long(x + 1, params["w"])
