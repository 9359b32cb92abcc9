"""The factored value: an adapted weight during the evaluation of a program.

    value = prod(columns) * (base + sum over terms of scale * sum_r a[r] * b[r])

`base` is the frozen weight `(*axes)`. `a` and `b` have these axes and a rank axis, and
`columns` (DoRA's `m / norm`) are `(*axes)`. A factor or column *owns* an axis if it is as
long there as the weight. Along other axes it has size 1. Axes that only `a` owns are
inputs, axes that only `b` owns are outputs, and axes that both own are batch axes (stacked
layers, experts). So a primitive that moves axes acts on base, factors and columns alike,
and a primitive that contracts the weight contracts one factor after the other.

The scale is static. Factors keep their dtype until they are multiplied. Columns have at
least float32.

In `adapt_rows` the program runs under `jax.vmap` over the slots of a stack. Factors and
columns differ between slots, and all other values do not; see `_slots`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from lora_jax._core import compat, numerics
from lora_jax.lowrank import contraction
from lora_jax.lowrank.contraction import Named, Names
from lora_jax.transform._deferred import Deferred

Map: TypeAlias = Callable[[jax.Array], jax.Array]

# Stand for other axes where axes of the weight are given by number: the rank axis, and the
# slots of a factor that was collected from all slots.
RANK, SLOT = -1, -2


@dataclasses.dataclass(frozen=True)
class Label:
    """The static part of a term.

    Attributes:
        names: the paths of the weights, several if weights were stacked. In a call that is
            traced once for many weights, their numbers among the arguments.
        scale: multiplies the product of the factors.
        dropout: the dropout rate of the other operand of a product.
        use: the kind of use that the term is for, `"lookup"` or `"product"`; empty for any.
        swapped: for each name, whether `a` and `b` were exchanged to match the other
            weights of a stack; empty if none were.
        by_slot: whether the factors differ between slots.
    """

    names: tuple[str | int, ...]
    scale: float = 1.0
    dropout: float = 0.0
    swapped: tuple[bool, ...] = ()
    use: str = ""
    by_slot: bool = False


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stored", "scale"],
    meta_fields=["axes", "ndim"],
)
@dataclasses.dataclass(frozen=True)
class Factor:
    """One factor of a term, in its stored layout.

    The axes keep their stored order until a primitive moves them. The backward pass would
    keep a copy in another layout, and under `lax.scan` one copy for each layer.

    Attributes:
        stored: has the rank axis and some axes of the weight. The others have size 1.
        axes: for each axis of the array, its axis of the weight, or `RANK`.
        ndim: the number of axes of the weight.
        scale: a scalar that multiplies the stored array; None for 1.
    """

    stored: jax.Array
    axes: tuple[int, ...]
    ndim: int
    scale: jax.Array | None = None

    @property
    def array(self) -> jax.Array:
        """The stored array times the scale."""
        if self.scale is None:
            return self.stored
        wide = self.stored.astype(numerics.accumulation_dtype(self.stored.dtype))
        return numerics.multiply(wide, self.scale)

    @property
    def rank(self) -> int:
        """The size of the rank axis."""
        return self.stored.shape[self.axes.index(RANK)]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size of the factor along each axis of the weight."""
        known = dict(zip(self.axes, self.stored.shape, strict=True))
        return tuple(known.get(axis, 1) for axis in range(self.ndim))

    def leading(self) -> jax.Array:
        """The factor as an array `(rank, *axes)`."""
        return place(self.array, self.axes, (RANK, *range(self.ndim)))

    def map(self, function: Map) -> "Factor":
        """Applies `function` to `(*axes)` arrays; the rank axis is mapped over."""
        return from_leading(jax.vmap(function)(self.leading()))


def from_leading(array: jax.Array) -> Factor:
    """The factor with the array `(rank, *axes)`."""
    ndim = array.ndim - 1
    return Factor(array, (RANK, *range(ndim)), ndim)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["label"]
)
@dataclasses.dataclass(frozen=True)
class Term:
    """One low-rank term: two factors and their static part."""

    a: Factor
    b: Factor
    label: Label

    def map(self, function: Callable[[Factor], Factor]) -> "Term":
        """The term with both factors mapped."""
        return dataclasses.replace(self, a=function(self.a), b=function(self.b))

    def named(self, names: tuple[str | int, ...]) -> "Term":
        """The term with other names for its weights."""
        swapped = self.label.swapped if names else ()
        label = dataclasses.replace(self.label, names=names, swapped=swapped)
        return dataclasses.replace(self, label=label)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "terms", "columns"],
    meta_fields=["gathered", "column_uses"],
)
@dataclasses.dataclass(frozen=True)
class Factored:
    """A weight with its low-rank terms.

    Attributes:
        base: `(*axes)`, the frozen weight; deferred if it is quantized.
        terms: see `Term`. A quantized weight without an adapter has none.
        columns: `(*axes)` each; they multiply the value.
        gathered: says how rows of a table were looked up; empty for other values.
            `"data"`: by indices that depend on arguments. `"constants"`: by indices that
            do not, which may only reorder the rows. The frozen program has an array of this
            size too, so a merge is cheap and is not reported.
        column_uses: the kind of use of each column, as `Label.use`; empty if all columns
            are for any use.
    """

    base: jax.Array | Deferred
    terms: tuple[Term, ...]
    columns: tuple[jax.Array, ...] = ()
    gathered: Literal["", "data", "constants"] = ""
    column_uses: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return self.base.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the weight."""
        return self.base.dtype

    @property
    def names(self) -> tuple[str | int, ...]:
        """The names of the weights in the value, each once."""
        return tuple(dict.fromkeys(n for term in self.terms for n in term.label.names))

    @property
    def by_slot(self) -> bool:
        """Whether the factors and columns differ between slots."""
        return any(term.label.by_slot for term in self.terms)

    @property
    def has_uses(self) -> bool:
        """Whether a term or column is for one kind of use only."""
        return any(self.column_uses) or any(term.label.use for term in self.terms)

    def for_use(self, use: str) -> "Factored":
        """The value for a `"lookup"` or `"product"`, without terms for the other use."""
        kinds = ("", use)
        terms = tuple(
            dataclasses.replace(term, label=dataclasses.replace(term.label, use=""))
            for term in self.terms
            if term.label.use in kinds
        )
        uses = self.column_uses or ("",) * len(self.columns)
        pairs = zip(self.columns, uses, strict=True)
        columns = tuple(column for column, own in pairs if own in kinds)
        return self.replace(terms=terms, columns=columns, column_uses=())

    def replace(self, **changes) -> "Factored":
        """The value with other fields."""
        return dataclasses.replace(self, **changes)

    def map(self, base: Any, function: Map) -> "Factored":
        """The value with `base`, and `function` applied to every factor and column.

        The function gets `(*axes)` arrays: the rank axis is mapped over.
        """
        return self.replace(
            base=base,
            terms=tuple(term.map(lambda p: p.map(function)) for term in self.terms),
            columns=tuple(function(column) for column in self.columns),
        )

    def owned(self, factor: Factor | jax.Array) -> frozenset[int]:
        """The axes of the weight along which a factor or a column varies."""
        sizes = factor.sizes if isinstance(factor, Factor) else factor.shape
        return frozenset(
            axis for axis, size in enumerate(sizes) if size != 1 and self.shape[axis] != 1
        )

    def is_thin(self) -> bool:
        """Whether one factor of each term owns all axes of the other.

        Then a merged value is no larger than a factor.
        """

        def thin(term: Term) -> bool:
            a, b = self.owned(term.a), self.owned(term.b)
            return a <= b or b <= a

        return all(map(thin, self.terms))


def is_factored(value: object) -> bool:
    """Whether a value of the program is a factored weight."""
    return isinstance(value, Factored)


def base_of(value: Any) -> Any:
    """The frozen weight of a factored value; other values unchanged."""
    return value.base if isinstance(value, Factored) else value


def with_base(value: Any, base: Any) -> Any:
    """A factored value with the frozen weight `base`; `base` itself for other values."""
    return value.replace(base=base) if isinstance(value, Factored) else base


def full(value: Factored, array: jax.Array, axis: int) -> jax.Array:
    """Broadcasts a column, or a factor without its rank axis, along an axis."""
    if array.shape[axis] == value.shape[axis]:
        return array
    shape = (*array.shape[:axis], value.shape[axis], *array.shape[axis + 1 :])
    return jnp.broadcast_to(array, shape)


def specs(value: Factored, spec: Sequence[Any]) -> Factored:
    """The partition spec of each array of a value, given that of the weight.

    A factor or a column is sharded along the axes that it owns.
    """
    whole = (*spec, *[None] * (value.ndim - len(spec)))

    def of(owned: frozenset[int]) -> list[Any]:
        return [axes if axis in owned else None for axis, axes in enumerate(whole)]

    def of_factor(p: Factor) -> Factor:
        own = of(value.owned(p))
        stored: Any = PartitionSpec(*(None if i == RANK else own[i] for i in p.axes))
        scale: Any = None if p.scale is None else PartitionSpec()
        return dataclasses.replace(p, stored=stored, scale=scale)

    terms = tuple(term.map(of_factor) for term in value.terms)
    columns: Any = tuple(PartitionSpec(*of(value.owned(c))) for c in value.columns)
    base: Any = PartitionSpec(*spec)
    return value.replace(base=base, terms=terms, columns=columns)


def mesh_axes(values: Sequence[Any], mesh: AbstractMesh) -> frozenset[str]:
    """The axes of `mesh` that split factors, columns and indices among the values.

    All of them if a factor is on automatic axes, where its type does not show it.
    """
    factors = jax.tree.leaves(
        [(v.terms, v.columns) for v in values if isinstance(v, Factored)]
    )
    if not all(compat.has_explicit_axes(compat.mesh_of(jax.typeof(p))) for p in factors):
        return frozenset(mesh.axis_names)
    arrays = [v for v in values if not isinstance(v, Factored)]
    indices = [v for v in arrays if jnp.issubdtype(v.dtype, jnp.integer)]
    return compat.explicit_names((*factors, *indices))


def retyped(value: Any, kind: Any, names: frozenset[str]) -> Any:
    """A value with the sharding of `kind`, its type in the program.

    A factor or a column is sharded as the weight is, along the axes that it owns, but only
    over the mesh axes in `names`. The other mesh axes of the weight split the examples, and
    a factor that lay on them would be gathered for each product.
    """
    mesh = compat.mesh_of(kind)
    if not mesh.axis_names:
        return value
    if not isinstance(value, Factored):
        return compat.retyped(value, kind.sharding)
    # A deferred weight gets this sharding when it is computed.
    base = compat.retyped(value.base, kind.sharding)
    places = specs(value, [compat.only(axes, names) for axes in kind.sharding.spec])
    factors = jax.tree.map(
        lambda p, spec: compat.retyped(p, NamedSharding(mesh, spec)),
        (value.terms, value.columns),
        (places.terms, places.columns),
    )
    return value.replace(base=base, terms=factors[0], columns=factors[1])


def owned(value: Factored, factor: Factor, names: Names) -> Named:
    """A factor without the axes that it does not own, given the names of all axes."""
    kept = {RANK, SLOT, *value.owned(factor)}
    sizes = zip(factor.axes, factor.stored.shape, strict=True)
    axes = [(axis, size) for axis, size in sizes if axis in kept]
    others = {RANK: contraction.RANK, SLOT: contraction.SLOT}
    own = tuple(others[i] if i < 0 else names[i] for i, _ in axes)
    return Named(factor.array, own, tuple(size for _, size in axes))


def place(array: jax.Array, have: Sequence, want: Sequence) -> jax.Array:
    """Transposes axes named `have` to the order `want`; missing axes get size 1."""
    order = [have.index(name) for name in want if name in have]
    if order != sorted(order):
        array = lax.transpose(array, order)
    missing = [i for i, name in enumerate(want) if name not in have]
    return lax.expand_dims(array, missing) if missing else array


def times(x: jax.Array, by: jax.Array) -> jax.Array:
    """`x * by`, computed in at least float32 and rounded to the dtype of `x`.

    If `by` is complex, the result is complex and is not rounded.
    """
    wide = numerics.accumulation_dtype(x.dtype, by.dtype)
    out = x.astype(wide) * by.astype(wide)
    return out if jnp.iscomplexobj(by) else out.astype(x.dtype)
