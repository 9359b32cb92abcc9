"""What a config comes to on some params: which weights, which axes, how many parameters."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lora_jax._core import checks, tree_paths
from lora_jax._core.immutable import FrozenDict
from lora_jax._core.tables import format_table
from lora_jax.plan.config import ALL_LINEAR, LoraConfig, from_fields, kept_patterns

__all__ = ["AdapterPlan", "Target", "Use"]

METHODS = ("lora", "dora")
NOT_FOLLOWED = "its axes cannot be followed through it"
_HEADER = ("path", "shape", "axes", "method", "rank", "scale", "parameters", "share")
_NUMBERS = (4, 5, 6, 7)  # the columns that are aligned on the right
_ROLES = ("contracted", "kept", "batch", "indexed", "stacked", "")
_LARGEST_SIZE = 2**63 - 1

# Where a use is from that no function has shown, but the kind of a module.
FROM_CHECKPOINT = "the PEFT checkpoint"

# Reasons why a leaf has no adapter that a printed plan has to tell apart.
NOT_CHOSEN = "no pattern of targets matches it"
EXCLUDED = "of exclude matches it"
_NOT_IN_SUBSET = "no pattern of the subset matches it"
WITHOUT_FUNCTION = "without a function only the axes of a 2-D weight are known"


class Use(NamedTuple):
    """One use of a weight in a function."""

    primitive: str
    """The name of JAX's primitive, such as `dot_general`."""
    roles: tuple[str, ...]
    """What the use does with each axis of the weight: `contracted`, `kept`, `batch`,
    `indexed`, `moved` (indexed, for a product that says what it is), `stacked` (scanned
    over), `stopped` (its gradient is), or an empty string where that is not known."""
    where: str = ""
    """The line of the source, where it is known."""
    merged: str = ""
    """Why this use needs the merged weight; empty where it does not."""
    linear: bool = False
    """Whether it is a product of matrices, and no convolution or look-up."""

    @property
    def is_followed(self) -> bool:
        """Whether the axes of the weight could be followed through the use."""
        return not self.merged.startswith(NOT_FOLLOWED)

    def __str__(self) -> str:
        roles = ", ".join(role or "unknown" for role in self.roles)
        where = f" at {self.where}" if self.where else ""
        merged = f"; merged: {self.merged}" if self.merged else ""
        return f"{self.primitive}{where} ({roles}){merged}"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Target:
    """One adapted weight: its method, numbers and axes.

    `A` and `B` see the weight as a matrix, or a stack of them: its batch axes, its input
    axes folded into one, its output axes folded into one, each in the order given here.

    Args:
        shape: of the weight.
        method: `"lora"` or `"dora"`.
        rank: of the adapter.
        scale: what multiplies `A @ B`.
        dropout: the probability that an entry of the adapter's input is dropped.
        in_axes: the axes of the weight that are contracted with an input.
        out_axes: the axes of the weight that an output has.
        batch_axes: the axes along which there is a matrix for each index.

    Raises:
        TypeError: if a number has the wrong type.
        ValueError: if the method is unknown, a number is out of its range, or the axes
            are not those of the shape, each once, with an input and an output.
    """

    shape: tuple[int, ...]
    method: str
    rank: int
    scale: float
    dropout: float
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("shape", "in_axes", "out_axes", "batch_axes"):
            object.__setattr__(self, name, _sizes(name, getattr(self, name)))
        checks.check_choice("method", self.method, METHODS)
        checks.check_rank(self.rank)
        checks.check_number("scale", self.scale)
        checks.check_rate("dropout", self.dropout)
        axes = (*self.batch_axes, *self.in_axes, *self.out_axes)
        complete = sorted(axes) == list(range(len(self.shape)))
        if not (complete and self.in_axes and self.out_axes):
            raise ValueError(
                f"each axis of the shape {self.shape} must be in one of in_axes, out_axes "
                f"and batch_axes, and the first two must not be empty, got {self.in_axes}, "
                f"{self.out_axes} and {self.batch_axes}."
            )

    @property
    def axes(self) -> str:
        """One letter for each axis of the weight: `i`, `o` or `b`."""
        groups = {"i": self.in_axes, "o": self.out_axes, "b": self.batch_axes}
        letters = {axis: letter for letter, axes in groups.items() for axis in axes}
        return "".join(letters[axis] for axis in range(len(self.shape)))

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """`(*batch, in, out)`, with the input axes and the output axes folded."""
        batch, n_in, n_out = (
            tuple(self.shape[axis] for axis in axes)
            for axes in (self.batch_axes, self.in_axes, self.out_axes)
        )
        return (*batch, math.prod(n_in), math.prod(n_out))

    @property
    def adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each entry of the adapter by its name."""
        *batch, n_in, n_out = self.matrix_shape
        shapes = {"A": (*batch, n_in, self.rank), "B": (*batch, self.rank, n_out)}
        return shapes | ({"m": (*batch, n_out)} if self.method == "dora" else {})

    @property
    def parameters(self) -> int:
        """The number of parameters of the adapter."""
        return sum(map(math.prod, self.adapter_shapes.values()))

    @property
    def alpha(self) -> float:
        """What gives `scale` when it is divided by the rank."""
        return self.scale * self.rank


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class AdapterPlan:
    """The record of what is adapted and how. `print` shows it as a table.

    Immutable and hashable; to JAX a static value without leaves. Two plans are equal if
    their configs and targets are. `targets` is what every function of this library reads;
    of `config`, a plan that exists is read for `init`, `dtype` and `axes` only. So
    `replace`, `subset` and `|` change the targets and leave the config.

    Args:
        config: what the plan was made of.
        targets: a dict from path to `Target`, in the order of the leaves of the params.
        skipped: a dict from path to the reason why that leaf has no adapter.
        uses: a dict from path to what the function does with that leaf; empty if there
            was no function.
        total: the number of parameters in the params; 0 if it is not known.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if a path is in both `targets` and `skipped`, or another config is put
            in place of the one that the targets were made with, and they differ in more
            than `init` and `dtype`.

    Example:
        >>> import lora_jax
        >>> target = lora_jax.Target((8, 16), "lora", 2, 2.0, 0.0, (0,), (1,))
        >>> plan = lora_jax.AdapterPlan(lora_jax.LoraConfig(rank=2), {"up": target})
        >>> plan.replace(scale=0.5).targets["up"].scale
        0.5
    """

    config: LoraConfig
    targets: Mapping[str, Target]
    skipped: Mapping[str, str] = dataclasses.field(default=FrozenDict(), compare=False)
    uses: Mapping[str, tuple[Use, ...]] = dataclasses.field(
        default=FrozenDict(), compare=False
    )
    total: int = dataclasses.field(default=0, compare=False)
    # The config and targets before `dataclasses.replace`, which hands it on.
    _made: Any = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.config, LoraConfig):
            raise TypeError(
                f"config must be a LoraConfig, got {type(self.config).__name__}: the order "
                "is AdapterPlan(config, targets)."
            )
        for name, kind in (("targets", Target), ("skipped", str), ("uses", tuple)):
            object.__setattr__(self, name, _by_path(name, getattr(self, name), kind))
        both = [path for path in self.targets if path in self.skipped]
        if both:
            raise ValueError(f"the path {both[0]!r} must be in one of targets and skipped.")
        config, targets = self._made or (self.config, self.targets)
        if config != self.config and targets == self.targets:
            _check_same_targets(config, self.config)
        object.__setattr__(self, "_made", (self.config, self.targets))

    @property
    def parameters(self) -> int:
        """The number of parameters of all adapters."""
        return sum(target.parameters for target in self.targets.values())

    @property
    def scales(self) -> dict[str, float]:
        """The scale of each target by its path, as `adapt(..., scales=...)` takes them."""
        return {path: target.scale for path, target in self.targets.items()}

    def replace(
        self,
        *,
        scale: float | Mapping[str, float] | None = None,
        dropout: float | Mapping[str, float] | None = None,
    ) -> "AdapterPlan":
        """Makes a plan with other scales or dropout rates for the same adapters.

        Args:
            scale: what multiplies `A @ B`, in place of the scale of the plan: one number
                for all targets, or a dict from patterns to numbers. The first pattern that
                matches counts; a target that none matches keeps its scale. 0 switches an
                adapter off.
            dropout: the same for the probability that an entry of the adapter's input is
                dropped.

        Returns:
            A plan with the same paths, ranks and axes.

        Raises:
            TypeError: if a number has the wrong type. A traced number is one: it belongs
                to `adapt(..., scales=...)`.
            ValueError: if a number is out of its range, or a pattern matches no target.
        """
        changes = {"scale": scale, "dropout": dropout}
        given = {name: value for name, value in changes.items() if value is not None}
        fields: dict[str, dict[str, float]] = {path: {} for path in self.targets}
        for name, value in given.items():
            if isinstance(value, Mapping):
                patterns = tree_paths.as_entries(name, value)
                tree_paths.check_matched(name, patterns, self.targets, "target of the plan")
            else:
                patterns = {"*": value}
            for path, own in fields.items():
                if (pattern := tree_paths.first_match(patterns, path)) is not None:
                    own[name] = _static_number(name, patterns[pattern])
        targets = {}
        for path, target in self.targets.items():
            with checks.at_path(path):
                targets[path] = dataclasses.replace(target, **fields[path])
        return dataclasses.replace(self, targets=targets)

    def subset(self, patterns: tree_paths.Pattern | Sequence[Any]) -> "AdapterPlan":
        """Makes a plan of some of the targets.

        Args:
            patterns: of paths, as in `LoraConfig(targets=...)`.

        Returns:
            A plan of the targets that a pattern matches. Its adapters are
            `{path: adapters[path] for path in subset.targets}`.

        Raises:
            TypeError: if a pattern has the wrong type.
            ValueError: if a pattern matches no target of the plan.
        """
        texts = tree_paths.as_texts("the subset", patterns)
        if not texts:
            raise ValueError("patterns is empty: a subset has at least one target.")
        tree_paths.check_matched("the subset", texts, self.targets, "target of the plan")
        kept = {
            path: target
            for path, target in self.targets.items()
            if tree_paths.first_match(texts, path) is not None
        }
        rest = {path: _NOT_IN_SUBSET for path in self.targets if path not in kept}
        return dataclasses.replace(self, targets=kept, skipped={**self.skipped, **rest})

    def __or__(self, other: "AdapterPlan") -> "AdapterPlan":
        """Makes a plan of the targets of both, for the same params.

        The adapters of `first | second` are `{**first_adapters, **second_adapters}`. The
        config is the first one, with the patterns of `targets` and `axes` of both.

        Raises:
            ValueError: if the plans have different targets for one path, a different
                number of parameters in the params, or configs with another `init` or
                `dtype`.
        """
        if not isinstance(other, AdapterPlan):
            return NotImplemented
        _check_joinable(self, other)
        targets = {**self.targets, **other.targets}
        skipped = {**other.skipped, **self.skipped}
        return AdapterPlan(
            config=_joined(self, other),
            targets=targets,
            skipped={path: why for path, why in skipped.items() if path not in targets},
            uses={**other.uses, **self.uses},
            total=self.total or other.total,
        )

    def __str__(self) -> str:
        """A row for each target, one for their sum, and what else is to be known.

        That is what `adapt` would refuse to merge, and each weight with two axes or more
        that is left out, though no pattern of the config says so. A share is of all
        parameters, those of the params and the adapters, as in `count_parameters`.
        """
        total = self.total and self.total + self.parameters
        rows: list[tuple[str, ...]] = [_HEADER]
        for path, target in self.targets.items():
            shape, count = str(target.shape), target.parameters
            numbers = str(target.rank), f"{target.scale:g}", *_counted(count, total)
            rows.append((path, shape, target.axes, target.method, *numbers))
        whole = _counted(self.parameters, total)
        rows.append((f"total of {len(self.targets)}", *[""] * 5, *whole))
        merged = [
            f"to be merged: {path!r}, {use}"
            for path in self.targets
            for use in self.uses.get(path, ())
            if use.merged
        ]
        stopped = [
            f"gradient stopped: {path!r}, {use}"
            for path in self.targets
            for use in self.uses.get(path, ())
            if "stopped" in use.roles
        ]
        table = format_table(rows, _NUMBERS)
        return "\n".join([*table, *merged, *stopped, *_left_out(self)])

    def explain(self, path: str) -> str:
        """Says why a leaf has an adapter, or why not.

        Args:
            path: of a leaf of the params. An ending `/value` of NNX may be left out.

        Returns:
            Some lines of text: which pattern chose the leaf, its axes, and each use of it
            with its line in the source.

        Raises:
            KeyError: if the params have no such leaf.
        """
        path = tree_paths.find(path, [*self.targets, *self.skipped])
        if path in self.skipped:
            lines = [f"{path}: no adapter, because {self.skipped[path]}."]
        elif path in self.targets:
            lines = [*_explained(self, path, self.targets[path])]
        else:
            hint = tree_paths.nearest_hint(path, [*self.targets, *self.skipped])
            raise KeyError(f"the params of this plan have no leaf at {path!r}{hint}.")
        uses = self.uses.get(path, ())
        return "\n  ".join([*lines, *(f"use: {use}" for use in uses)])

    def to_json(self) -> str:
        """Writes the plan as JSON.

        Returns:
            A JSON object with everything that the plan knows.

        Raises:
            TypeError: if the config's `init` is a function.
        """
        fields = {
            "config": json.loads(self.config.to_json()),
            "targets": {p: dataclasses.asdict(t) for p, t in self.targets.items()},
            "skipped": dict(self.skipped),
            "uses": {p: [use._asdict() for use in uses] for p, uses in self.uses.items()},
            "total": self.total,
        }
        return json.dumps(fields, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "AdapterPlan":
        """Reads a plan that `to_json` wrote.

        Args:
            text: a JSON object.

        Returns:
            The plan, equal to the one that was written, with the same table and the same
            explanations.

        Raises:
            TypeError, ValueError: if the text is no JSON, a field is missing or unknown or
                twice there, or a value is none that the plan takes.
        """
        with checks.reading_json("the JSON of a lora_jax AdapterPlan", text) as given:
            return _read(cls, given)


def _read(cls: type[AdapterPlan], given: Any) -> AdapterPlan:
    fields = _fields(cls, given)
    for name in ("targets", "skipped", "uses"):
        checks.check_json(name, fields[name], dict, "an object with paths as its names")
    targets, skipped = {}, fields["skipped"]
    for path, target in fields["targets"].items():
        with checks.at_path(path):
            targets[path] = Target(**_fields(Target, target))
    for path, reason in skipped.items():
        checks.check_json(f"skipped[{path!r}]", reason, str, "a reason")
    uses = {}
    for path, given in fields["uses"].items():
        with checks.at_path(path):
            uses[path] = _uses(given, targets.get(path))
    checks.check_json("total", fields["total"], int, "a number of parameters")
    if fields["total"] < 0:
        raise ValueError(f"total must be at least 0, got {fields['total']}.")
    return cls(
        config=from_fields(fields["config"]),
        targets=targets,
        skipped=skipped,
        uses=uses,
        total=fields["total"],
    )


def _by_path(name: str, given: Any, kind: type) -> FrozenDict[str, Any]:
    """A dict by path as a plan keeps it."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{name} must be a dict by path, got {given!r:.60} ({type(given).__name__})."
        )
    for path, value in given.items():
        if not isinstance(path, str):
            raise TypeError(
                f"the paths of {name} must be strings such as 'layers/0/kernel', got "
                f"{path!r} ({type(path).__name__})."
            )
        if not isinstance(value, kind):
            raise TypeError(
                f"{name}[{path!r}] must be a {kind.__name__}, got {value!r:.60} "
                f"({type(value).__name__})."
            )
    return given if isinstance(given, FrozenDict) else FrozenDict(given)


def _static_number(name: str, value: Any) -> float:
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} must be a Python number, because a plan is static, got {value!r}: use "
            "float(...), or adapt(..., scales=...) for scales that are arrays."
        )
    checks.check_number(name, value)
    return float(value)


def _check_joinable(first: AdapterPlan, second: AdapterPlan) -> None:
    for path, target in second.targets.items():
        if first.targets.get(path, target) != target:
            raise ValueError(
                f"both plans adapt {path!r}, the first with {first.targets[path]}, the "
                f"second with {target}: leave it out of one of them with plan.subset(...)."
            )
    if first.total and second.total and first.total != second.total:
        raise ValueError(
            f"the plans are of different params: the first of {first.total:,} parameters, "
            f"the second of {second.total:,}."
        )
    for name in ("init", "dtype"):
        values = getattr(first.config, name), getattr(second.config, name)
        if values[0] != values[1]:
            raise ValueError(
                f"the configs of the plans have different {name}, {values[0]!r} and "
                f"{values[1]!r}, and init_adapters takes one: give one of the plans the "
                f"other's with dataclasses.replace(plan, config=dataclasses.replace("
                f"plan.config, {name}=...))."
            )


def _joined(first: AdapterPlan, second: AdapterPlan) -> LoraConfig:
    """The config of two plans together."""
    patterns = [kept_patterns(plan.config.targets) for plan in (first, second)]
    axes = {
        path: letters
        for plan in (first, second)
        for path in plan.targets
        if (letters := plan.config.axes_of(path)) is not None
    }
    return dataclasses.replace(
        first.config,
        targets=(
            ALL_LINEAR
            if ALL_LINEAR in (first.config.targets, second.config.targets)
            else tuple(dict.fromkeys((*patterns[0], *patterns[1])))
        ),
        axes={**axes, **second.config.axes, **first.config.axes},
    )


def _fields(cls: type, given: Any) -> dict[str, Any]:
    """The fields of a dataclass or named tuple as they were read: all, and no others."""
    names = getattr(cls, "_fields", None)
    names = names or [field.name for field in dataclasses.fields(cls)]
    names = [name for name in names if not name.startswith("_")]
    what = f"the JSON of a lora_jax {cls.__name__}"
    checks.check_fields(what, given, names)
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(f"{what} lacks the fields {', '.join(missing)}.")
    return given


def _uses(given: Any, target: Target | None) -> tuple[Use, ...]:
    checks.check_json("uses", given, list, "a list of uses")
    uses = []
    for use in given:
        fields = _fields(Use, use)
        checks.check_json("roles", fields["roles"], list, "a list of words")
        for name in ("primitive", "where", "merged"):
            checks.check_json(name, fields[name], str, "a text")
        checks.check_json("linear", fields["linear"], bool, "true or false")
        for role in fields["roles"]:
            checks.check_choice("each of roles", role, _ROLES)
        if target is not None and len(fields["roles"]) != len(target.shape):
            raise ValueError(
                f"roles must have a word for each of the {len(target.shape)} axes of the "
                f"weight, got {len(fields['roles'])}."
            )
        uses.append(Use(**{**fields, "roles": tuple(fields["roles"])}))
    return tuple(uses)


def _sizes(name: str, values: Any) -> tuple[int, ...]:
    """Sizes or axes of a weight, as plain integers."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise TypeError(
            f"{name} must be a tuple of integers, got {values!r:.60} "
            f"({type(values).__name__})."
        )
    sizes = tuple(checks.as_index(f"each of {name}", value) for value in values)
    if sizes and not 0 <= min(sizes) <= max(sizes) <= _LARGEST_SIZE:
        raise ValueError(f"{name} must be integers from 0 to 2**63 - 1, got {sizes}.")
    return sizes


def _check_same_targets(old: LoraConfig, new: LoraConfig) -> None:
    """Raises if the targets of a plan that one config made are not those of another."""
    changed = [
        f"{field.name} was {getattr(old, field.name)!r}, now {getattr(new, field.name)!r}"
        for field in dataclasses.fields(LoraConfig)
        if field.name not in ("init", "dtype")
        and getattr(old, field.name) != getattr(new, field.name)
    ]
    if changed:
        raise ValueError(
            "another config would not change the targets of this plan, which were made "
            f"with the old one ({'; '.join(changed)}): make a new plan, with "
            "plan_adapters(config, params, fn, *args)."
        )


def _counted(count: int, total: int) -> tuple[str, str]:
    """A number of parameters, and its share of all of them."""
    return f"{count:,}", f"{100 * count / total:.3f} %" if total else ""


def _left_out(plan: AdapterPlan) -> Iterable[str]:
    """A line for each reason why weights that look like matrices have no adapter."""
    lines: dict[tuple[str, str], list[str]] = {}
    for path, reason in plan.skipped.items():
        if looks_like_matrix(plan.uses.get(path), reason):
            lines.setdefault((tree_paths.without_numbers(path), reason), []).append(path)
    for (pattern, reason), paths in lines.items():
        yield f"left out: {alike(pattern, paths)}: {reason}"


def looks_like_matrix(uses: Sequence[Use] | None, reason: str) -> bool:
    """Whether a weight without an adapter may be one that its user expects to have one.

    Args:
        uses: of a floating-point weight with two axes or more; None for any other.
        reason: why it has none.
    """
    if uses is None:  # of no such weight, or without a function
        return WITHOUT_FUNCTION in reason
    chosen = not reason.endswith((NOT_CHOSEN, EXCLUDED, _NOT_IN_SUBSET))
    return chosen and not any(_of_vectors(use.roles) for use in uses)


def _of_vectors(roles: tuple[str, ...]) -> bool:
    """Whether a use runs over a stack of vectors: biases or scales of layers."""
    return 0 < len(roles) - 1 <= roles.count("stacked")


def alike(pattern: str, paths: Sequence[str]) -> str:
    """Names weights whose paths differ in numbers only."""
    if len(paths) == 1:
        return repr(paths[0])
    return f"{len(paths)} weights {pattern!r}"


def _explained(plan: AdapterPlan, path: str, target: Target) -> Iterable[str]:
    """The lines about a target, without those about its uses."""
    yield (
        f"{path}: {target.method}, rank {target.rank}, scale {target.scale:g}, "
        f"{target.parameters:,} parameters."
    )
    yield f"chosen by targets: {_choice(plan, path)}"
    *batch, n_in, n_out = target.matrix_shape
    stack = f"{' x '.join(map(str, batch))} of " if batch else ""
    pattern = tree_paths.first_match(plan.config.axes, path)
    given = "" if pattern is None else f", given by axes[{pattern!r}]"
    yield f"axes: {target.axes} of {target.shape}{given}: {stack}({n_in}, {n_out})"
    if target.rank * (n_in + n_out) >= n_in * n_out:
        yield (
            f"note: at rank {target.rank} A and B have {target.rank * (n_in + n_out):,} "
            f"entries for the {n_in * n_out:,} of each matrix: a smaller rank would do"
        )


def _choice(plan: AdapterPlan, path: str) -> str:
    """Which pattern chose a target."""
    targets = plan.config.targets
    if targets != ALL_LINEAR:
        return repr(tree_paths.first_match(kept_patterns(targets), path))
    if plan.uses:
        return "'all-linear', since a matrix product uses it"
    return "'all-linear', which without a function is every floating-point matrix"
