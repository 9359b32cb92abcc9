"""`LoraConfig`: which weights to adapt or train, and how."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
from jax.typing import DTypeLike

from lora_jax._core import checks, tree_paths, unknown_names
from lora_jax._core.immutable import FrozenDict
from lora_jax.layers.initializers import Init, check_init
from lora_jax.plan import parts
from lora_jax.plan.products import parse_equations

__all__ = ["LoraConfig"]

ALL_LINEAR = "all-linear"


@jax.tree_util.register_static
@unknown_names.explain_fields
@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Selects the weights to adapt and sets the options of their adapters.

    A config is immutable and hashable. JAX treats it as a static value without leaves.
    `plan_adapters` resolves it against params.

    A *pattern* is a glob on a weight's whole path, such as `"*/query/kernel"`, where `*`
    also matches `/`. Or it is a regular expression that has to match the whole path, as an
    `re.Pattern` or as `"re:..."`. In a dict of patterns, the first matching pattern wins.

    A glob in `targets`, `exclude`, `rank_pattern` or `alpha_pattern` may end in a NumPy
    index, which selects a part of the weight: `"layers/up[4:]"`, `"*/qkv[0]"`,
    `"*/qkv[:, 64:]"`. Any pattern there may end in `"@lookup"` or `"@product"`, which
    selects only the look-ups of a table's rows or only its products.

    Args:
        rank: of the adapters, at least 1.
        alpha: a finite number other than 0. The update is multiplied by `alpha / rank`.
        targets: patterns of the paths of the weights to adapt, or one pattern. Or
            `"all-linear"`: every weight that a matrix product uses.
        exclude: patterns of paths not to adapt, or one pattern.
        train: patterns of leaves to train themselves, without an adapter, such as
            `("*/bias", "*/scale", "head/*")`. `"all-linear"` does not adapt them, and
            `exclude` does not apply to them.
        rank_pattern: a dict from patterns to ranks, for weights with another rank.
        alpha_pattern: a dict from patterns to alphas, for weights with another alpha.
        axes: a dict from patterns to strings such as `"oi"` or `"bio"`, with one letter
            for each axis of the weight: `i` for input, `o` for output, `b` for batch
            (stacked layers, experts). It overrides inferred axes, and gives axes that
            cannot be inferred.
        products: a dict from patterns of names of functions to equations. It is for
            functions that `adapt` does not look into: a `custom_vjp`, `custom_jvp` or
            `pallas_call`. It may also have jitted functions. See below.
        rank_stabilized: multiply by `alpha / sqrt(rank)` instead.
        use_dora: use DoRA, not LoRA.
        dropout: the probability that an entry of an adapter's input is dropped in
            training, in [0, 1).
        init: the initializer of the factors; see `lora_jax.initializers.init_factors`.
        dtype: of the factors, floating point and of at least 16 bits. None means the
            weight's dtype, but at least float32. Trained leaves have it too, but keep
            every bit of the leaf.

    An *equation* states that a function is a matrix product, as for `jnp.einsum`:
    `products={"mul": "...k,kn->...n"}`. The result is then
    `mul(x, W) + scale * (x @ A) @ B`. The function is called with the frozen weight, so its
    roundings and its custom derivative stay. `_` stands for an operand or result that is
    not part of the product, such as a scale: `"...k,kn,_->...n"`. Values that the function
    closes over need no `_`. The name is that of the Python function, as in errors and
    printed plans. There are three kinds of equations:

    - two operands: a product, in any layout that `jnp.einsum` takes.
    - three: a product of groups of rows, `"mk,gkn,g->mn"`, as `jax.lax.ragged_dot`.
    - one: a function that rounds or transposes a weight, `"kn,_->kn"`, or `"...,_->..."`
      for any number of axes. The update is added to its result, which a later product uses.

    If there are several equations, separated by `;`, the first that fits the shapes of a
    call is used.

    It is an error if no equation fits the shapes of a call, or if one contradicts the
    products in the body of the function. The body of a kernel is not checked.

    Raises:
        TypeError: if a field has the wrong type, or there is no such field.
        ValueError: if a number is out of its range, a name is unknown, there are no
            targets, or a pattern, the letters of axes or an equation is not valid.

    References:
        Rank stabilization: Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732. DoRA:
        Liu et al., 2024, https://arxiv.org/abs/2402.09353.

    Example:
        >>> import lora_jax
        >>> config = lora_jax.LoraConfig(
        ...     rank=4, targets=("*/query/kernel", "*/value/kernel"),
        ...     rank_pattern={"layers_0/*": 2},
        ... )
        >>> config.rank_of("layers_0/query/kernel"), config.rank_of("layers_1/query/kernel")
        (2, 4)
        >>> config.scale_of("layers_1/query/kernel")
        4.0
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | re.Pattern[str] | Iterable[str | re.Pattern[str]] = ALL_LINEAR
    exclude: str | re.Pattern[str] | Iterable[str | re.Pattern[str]] = ()
    _: dataclasses.KW_ONLY
    train: str | re.Pattern[str] | Iterable[str | re.Pattern[str]] = ()
    rank_pattern: Mapping[str, int] = FrozenDict()
    alpha_pattern: Mapping[str, float] = FrozenDict()
    axes: Mapping[str, str] = FrozenDict()
    products: Mapping[str, str] = FrozenDict()
    rank_stabilized: bool = False
    use_dora: bool = False
    dropout: float = 0.0
    init: Init = "kaiming_uniform"
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        checks.check_flags(rank_stabilized=self.rank_stabilized, use_dora=self.use_dora)
        checks.check_rate("dropout", self.dropout)
        kept = {
            "rank": _rank(self.rank),
            "alpha": _alpha(self.alpha),
            "targets": _targets(self.targets),
            "exclude": tree_paths.as_texts("exclude", self.exclude),
            "train": tree_paths.as_texts("train", self.train),
            "rank_pattern": _entries("rank_pattern", self.rank_pattern, _rank),
            "alpha_pattern": _entries("alpha_pattern", self.alpha_pattern, _alpha),
            "axes": _entries("axes", self.axes, _axes),
            "products": _entries("products", self.products, _equations),
            "rank_stabilized": bool(self.rank_stabilized),
            "use_dora": bool(self.use_dora),
            "dropout": float(self.dropout),
        }
        if self.dtype is not None:
            kept["dtype"] = checks.check_factor_dtype(self.dtype).name
        for name, value in kept.items():
            object.__setattr__(self, name, value)
        _check_init_of_ranks(self.init, (self.rank, *self.rank_pattern.values()))

    @property
    def method(self) -> Literal["lora", "dora"]:
        """The name of the method: `"lora"` or `"dora"`."""
        return "dora" if self.use_dora else "lora"

    def rank_of(self, path: str) -> int:
        """The rank of the adapter at a path."""
        return _look_up(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float:
        """The alpha of the adapter at a path."""
        return _look_up(self.alpha_pattern, path, self.alpha)

    def scale_of(self, path: str) -> float:
        """The scale of `A @ B` at a path: `alpha / rank`, or `alpha / sqrt(rank)`."""
        return resolved_scale(self, self.rank_of(path), self.alpha_of(path))

    def axes_of(self, path: str) -> str | None:
        """The letters of the weight's axes from `axes`, or None."""
        return tree_paths.look_up(self.axes, path, None)

    def to_json(self) -> str:
        """Writes the config as JSON.

        Returns:
            A JSON object with the fields of the config; patterns are text, regular
            expressions in the form `"re:..."`.

        Raises:
            TypeError: if `init` is a function.
        """
        for init in self.init if isinstance(self.init, tuple) else (self.init,):
            if not isinstance(init, str):
                raise TypeError(
                    f"init is the function {init!r}, which JSON cannot hold: use the name "
                    "of an initializer, or write dataclasses.replace(config, "
                    "init='kaiming_uniform') and give init again after reading."
                )
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps(fields, indent=2, default=dict)

    @classmethod
    def from_json(cls, text: str) -> "LoraConfig":
        """Reads a config that `to_json` wrote.

        Args:
            text: a JSON object with fields of the config; missing fields get their
                defaults.

        Returns:
            The config.

        Raises:
            TypeError, ValueError: if the text is not JSON, a field is unknown or comes
                twice, or a value is not valid for its field.
        """
        with checks.reading_json("the JSON of a LoraConfig", text) as given:
            return from_fields(given)


def resolved_scale(config: LoraConfig, rank: int, alpha: float) -> float:
    """The scale of `A @ B` for a rank and an alpha."""
    return alpha / (math.sqrt(rank) if config.rank_stabilized else rank)


def _look_up(values: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value for a path, which may be that of a part of a weight."""
    suffix = path.removeprefix(parts.split(path).base)
    pattern = parts.first_match(values, path, suffix, None)
    return default if pattern is None else values[pattern]


def from_fields(given: Any) -> LoraConfig:
    """Creates a config from the fields of a JSON object."""
    names = [field.name for field in dataclasses.fields(LoraConfig)]
    checks.check_fields("a LoraConfig", given, names)
    fields = dict(given)
    if isinstance(fields.get("init"), list):
        fields["init"] = tuple(fields["init"])
    if fields.get("dtype") is not None:
        checks.check_json("dtype", fields["dtype"], str, "the name of a dtype, or null")
    return LoraConfig(**fields)


def _rank(rank: Any) -> int:
    checks.check_rank(rank)
    return int(rank)


def _alpha(alpha: Any) -> float:
    if isinstance(alpha, jax.Array):
        raise TypeError(
            f"alpha must be a Python number, because a config is static, got {alpha!r}: "
            "use float(alpha)."
        )
    checks.check_number("alpha", alpha)
    if alpha == 0:
        raise ValueError("alpha must not be 0: the adapter would never act.")
    return float(alpha)


def _axes(letters: Any) -> str:
    if not isinstance(letters, str):
        raise TypeError(
            "the axes of a weight must be a string such as 'io', one letter for each axis, "
            f"got {letters!r} ({type(letters).__name__})."
        )
    if not {"i", "o"} <= set(letters) <= {"i", "o", "b"}:
        raise ValueError(
            "the axes of a weight must be a string of the letters i (input), o (output) "
            f"and b (batch), with at least one i and one o, got {letters!r}."
        )
    return letters


def _equations(text: Any) -> str:
    return "; ".join(equation.text for equation in parse_equations(text))


def _targets(targets: Any) -> str | tuple[str, ...]:
    if isinstance(targets, str) and targets == ALL_LINEAR:
        return targets
    patterns = tree_paths.as_texts("targets", targets)
    if not patterns:
        raise ValueError("targets is empty: give patterns of paths, or 'all-linear'.")
    if ALL_LINEAR in patterns:
        raise ValueError(
            f"'all-linear' stands alone and is no pattern, got targets={patterns!r}: give "
            "targets='all-linear', or patterns only."
        )
    return patterns


def _entries(name: str, entries: Any, check: Callable[[Any], Any]) -> FrozenDict[str, Any]:
    checked = {}
    for pattern, value in tree_paths.as_entries(name, entries).items():
        with checks.at_path(f"{name}[{pattern!r}]"):
            checked[pattern] = check(value)
    return FrozenDict(checked)


def _check_init_of_ranks(init: Any, ranks: Iterable[int]) -> None:
    check_init(init)
    odd = [rank for rank in ranks if rank % 2]
    if isinstance(init, str) and init == "orthogonal" and odd:
        raise ValueError(
            "init='orthogonal' halves the rank, so each rank must be even, got "
            f"{', '.join(map(str, odd))}."
        )
