"""The adapters that a config selects for some params."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from lora_jax._core import checks, tree_paths
from lora_jax._core.immutable import FrozenDict
from lora_jax.plan import mesh_layout, parts, plan_json, plan_text
from lora_jax.plan.config import ALL_LINEAR, LoraConfig
from lora_jax.plan.mesh_layout import MeshLayout
from lora_jax.plan.target import Target, TrainedLeaf, Use

__all__ = ["AdapterPlan"]

_BY_PATH = {"targets": Target, "trained": TrainedLeaf, "skipped": str, "uses": tuple}

# The place of a use that the kind of a PEFT module shows, and no traced function.
FROM_CHECKPOINT = "the PEFT checkpoint"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class AdapterPlan:
    """The adapters of a model: which weights have one, and how. `print` shows a table.

    A plan also lists the leaves that are trained without an adapter. It is immutable and
    hashable. JAX treats it as a static value without leaves. Two plans are equal if their
    configs, targets and trained leaves are. The functions of this library read `targets`
    and `trained`; from the config of a plan they read `init`, `dtype`, `axes` and
    `products` only. So `replace`, `subset` and `|` change the targets and not these.

    Args:
        config: the config that selected the targets.
        targets: a dict from path to `Target`, in the order of the leaves of the params.
        skipped: a dict from path to the reason why that leaf has no adapter.
        uses: a dict from path to the uses of that leaf in the function; empty if there
            was no function.
        total: the number of parameters in the params; 0 if it is not known.
        trained: a dict from path to `TrainedLeaf`.
        layout: where the weights and the adapters of `init_adapters` lie on a mesh; None if
            the params lay on none.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if a path is in two of `targets`, `trained` and `skipped`; or if
            `dataclasses.replace` changes the config and not the targets, and the configs
            differ in more than `init`, `dtype` and `products`.

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
    trained: Mapping[str, TrainedLeaf] = FrozenDict()
    layout: MeshLayout | None = dataclasses.field(default=None, compare=False)
    # The config and targets before `dataclasses.replace`, which hands it on.
    _made: Any = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.config, LoraConfig):
            raise TypeError(
                f"config must be a LoraConfig, got {type(self.config).__name__}: the order "
                "is AdapterPlan(config, targets)."
            )
        for name, kind in _BY_PATH.items():
            object.__setattr__(self, name, _by_path(name, getattr(self, name), kind))
        leaves = self.by_leaf()
        for path in (*leaves, *self.trained):
            if (path in leaves) + (path in self.trained) + (path in self.skipped) > 1:
                raise ValueError(
                    f"the path {path!r} must be in one of targets, trained and skipped."
                )
        _check_disjoint(self)
        config, targets = self._made or (self.config, self.targets)
        if config != self.config and targets == self.targets:
            _check_same_targets(config, self.config)
        object.__setattr__(self, "_made", (self.config, self.targets))

    @property
    def parameters(self) -> int:
        """The number of parameters of all adapters and trained leaves."""
        return sum(entry.parameters for entry in self.entries.values())

    @property
    def entries(self) -> dict[str, Target | TrainedLeaf]:
        """The targets and the trained leaves by path, in the order of `init_adapters`."""
        return {**self.targets, **self.trained}

    def leaf(self, path: str) -> str:
        """The path of the leaf that an entry is, or is a part of."""
        target = self.targets.get(path)
        return path if target is None else path.removesuffix(target.suffix)

    def by_leaf(self) -> dict[str, list[str]]:
        """The paths of the targets of each weight, by the path of the weight."""
        found: dict[str, list[str]] = {}
        for path in self.targets:
            found.setdefault(self.leaf(path), []).append(path)
        return found

    @property
    def scales(self) -> dict[str, float]:
        """The scale of each target by its path, in the form of `adapt(..., scales=...)`."""
        return {path: target.scale for path, target in self.targets.items()}

    def replace(
        self,
        *,
        scale: float | Mapping[str, float] | None = None,
        dropout: float | Mapping[str, float] | None = None,
    ) -> "AdapterPlan":
        """Changes the scales or dropout rates of a plan.

        Args:
            scale: multiplies `A @ B`, instead of the scale of the plan: one number for all
                targets, or a dict from patterns to numbers. The first matching pattern
                wins; a target without a matching pattern keeps its scale. 0 switches an
                adapter off.
            dropout: the same for the probability that an entry of the adapter's input is
                dropped.

        Returns:
            A plan with the same paths, ranks and axes.

        Raises:
            TypeError: if a number has the wrong type. Traced numbers are not allowed here:
                pass them to `adapt(..., scales=...)`.
            ValueError: if a number is out of its range, or a pattern matches no target.
        """
        changes = {"scale": scale, "dropout": dropout}
        given = {name: value for name, value in changes.items() if value is not None}
        fields: dict[str, dict[str, float]] = {path: {} for path in self.targets}
        for name, value in given.items():
            if isinstance(value, Mapping):
                patterns = tree_paths.as_entries(name, value)
                parts.check_matched(name, patterns, self.targets, "target of the plan")
            else:
                patterns = {"*": value}
            for path, own in fields.items():
                if (pattern := self._first_match(patterns, path)) is not None:
                    own[name] = _static_number(name, patterns[pattern])
        targets = {}
        for path, target in self.targets.items():
            with checks.at_path(path):
                targets[path] = dataclasses.replace(target, **fields[path])
        return dataclasses.replace(self, targets=targets)

    def subset(self, patterns: tree_paths.Pattern | Sequence[Any]) -> "AdapterPlan":
        """Selects some of the targets and trained leaves.

        Args:
            patterns: of paths, as in `LoraConfig(targets=...)`.

        Returns:
            A plan of the targets and trained leaves that match a pattern. Its adapters are
            `{path: adapters[path] for path in subset.entries}`.

        Raises:
            TypeError: if a pattern has the wrong type.
            ValueError: if a pattern matches no target and no trained leaf of the plan.
        """
        texts = tree_paths.as_texts("the subset", patterns)
        if not texts:
            raise ValueError("patterns is empty: a subset has at least one target.")
        parts.check_matched("the subset", texts, self.entries, "target of the plan")
        kept = {path for path in self.entries if self._first_match(texts, path)}
        left = {self.leaf(path) for path in kept}
        leaves = map(self.leaf, self.entries)
        rest = {path: plan_text.NOT_IN_SUBSET for path in leaves if path not in left}
        return dataclasses.replace(
            self,
            targets={path: own for path, own in self.targets.items() if path in kept},
            trained={path: own for path, own in self.trained.items() if path in kept},
            skipped={**self.skipped, **rest},
        )

    def _first_match(self, patterns: Iterable[str], path: str) -> str | None:
        entry = self.targets.get(path) or self.trained[path]
        return parts.first_match(patterns, path, entry.suffix, entry.shape)

    def __or__(self, other: "AdapterPlan") -> "AdapterPlan":
        """Combines the targets and trained leaves of two plans for the same params.

        The adapters of `first | second` are `{**first_adapters, **second_adapters}`. The
        config is the first one, with the patterns of `targets`, `train`, `axes` and
        `products` of both.

        Raises:
            ValueError: if the plans have different entries for one path, or were made for
                params with different numbers of parameters, or if the `init` or `dtype`
                of their configs differ, or their equations for one function.
        """
        if not isinstance(other, AdapterPlan):
            return NotImplemented
        _check_joinable(self, other)
        leaves = {plan.leaf(path) for plan in (self, other) for path in plan.entries}
        skipped = {**other.skipped, **self.skipped}
        return AdapterPlan(
            config=_joined(self, other),
            targets={**self.targets, **other.targets},
            trained={**self.trained, **other.trained},
            skipped={path: why for path, why in skipped.items() if path not in leaves},
            uses={**other.uses, **self.uses},
            total=self.total or other.total,
            layout=mesh_layout.joined(self.layout, other.layout),
        )

    def __str__(self) -> str:
        """A table with a row for each target and trained leaf, and a row for their sum.

        Lines below the table list uses that `adapt` would have to merge, gradients that are
        stopped, and weights with two axes or more that are left out although no pattern
        excludes them. On a mesh, there are columns for the mesh axes that split each weight
        and the factors of `init_adapters`, and for the bytes of the adapter on each device.
        A share is a share of all parameters, of the params and the
        adapters, as in `count_parameters`.
        """
        return plan_text.table(self)

    def _repr_html_(self) -> str:
        return plan_text.html(self)

    def explain(self, path: str) -> str:
        """Explains why a leaf has an adapter or is trained, or why not.

        Args:
            path: of a leaf of the params. The ending `/value` of NNX may be omitted.

        Returns:
            Lines of text: the pattern that selected the leaf, its axes, and each use with
            its line in the source.

        Raises:
            KeyError: if the params have no such leaf.
        """
        return plan_text.explain(self, path)

    def to_json(self) -> str:
        """Writes the plan as JSON.

        Returns:
            A JSON object with all fields of the plan.

        Raises:
            TypeError: if the config's `init` is a function.
        """
        return plan_json.to_text({name: getattr(self, name) for name in plan_json.FIELDS})

    @classmethod
    def from_json(cls, text: str) -> "AdapterPlan":
        """Reads a plan that `to_json` wrote.

        Args:
            text: a JSON object.

        Returns:
            The plan, equal to the one that was written, with the same table and the same
            explanations.

        Raises:
            TypeError, ValueError: if the text is not JSON, a field is missing, unknown or
                there twice, or a value is not valid for its field.
        """
        return cls(**plan_json.from_text(text))


def _check_disjoint(plan: AdapterPlan) -> None:
    """Raises if targets of a plan are of one entry of a weight, for the same use."""
    for path, target in plan.targets.items():
        if target.suffix and not path.endswith(target.suffix):
            raise ValueError(
                f"the path of a target of {target.suffix!r} must end so, got {path!r}."
            )
    for leaf, paths in plan.by_leaf().items():
        for i, path in enumerate(paths):
            target = plan.targets[path]
            for other in paths[:i]:
                own = plan.targets[other]
                if own.shape != target.shape:
                    raise ValueError(
                        f"{other!r} and {path!r} are parts of {leaf!r}, and have it with "
                        f"the shapes {own.shape} and {target.shape}."
                    )
                same_use = not (own.use and target.use and own.use != target.use)
                if same_use and parts.overlap(own.part, target.part, target.shape):
                    raise ValueError(
                        f"{other!r} and {path!r} overlap: an entry of a weight has one "
                        "adapter. Give them parts without a common entry, or leave one out."
                    )


def _by_path(name: str, given: Any, kind: type) -> FrozenDict[str, Any]:
    """Checks a dict by path and makes it immutable."""
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
    entries = first.entries
    for path, entry in second.entries.items():
        if entries.get(path, entry) != entry:
            raise ValueError(
                f"both plans adapt {path!r}, the first with {entries[path]}, the "
                f"second with {entry}: leave it out of one of them with plan.subset(...)."
            )
    if first.total and second.total and first.total != second.total:
        raise ValueError(
            f"the plans are of different params: the first of {first.total:,} parameters, "
            f"the second of {second.total:,}."
        )
    for name, text in second.config.products.items():
        if first.config.products.get(name, text) != text:
            raise ValueError(
                f"the plans state that {name!r} is {first.config.products[name]!r} and "
                f"{text!r}: products has one equation for each function."
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
    """The config of the union of two plans."""
    configs = first.config, second.config
    patterns, train = (
        tuple(dict.fromkeys(p for c in configs for p in getattr(c, name)))
        for name in ("targets", "train")
    )
    axes = {
        path: letters
        for plan in (first, second)
        for path in plan.by_leaf()
        if (letters := plan.config.axes_of(path)) is not None
    }
    return dataclasses.replace(
        first.config,
        targets=(ALL_LINEAR if ALL_LINEAR in [c.targets for c in configs] else patterns),
        train=train,
        axes={**axes, **second.config.axes, **first.config.axes},
        products={**second.config.products, **first.config.products},
    )


def _check_same_targets(old: LoraConfig, new: LoraConfig) -> None:
    """Raises if two configs differ in more than `init` and `dtype`."""
    changed = [
        f"{field.name} was {getattr(old, field.name)!r}, now {getattr(new, field.name)!r}"
        for field in dataclasses.fields(LoraConfig)
        if field.name not in ("init", "dtype", "products")
        and getattr(old, field.name) != getattr(new, field.name)
    ]
    if changed:
        raise ValueError(
            "another config would not change the targets of this plan, which were made "
            f"with the old one ({'; '.join(changed)}): make a new plan, with "
            "plan_adapters(config, params, fn, *args)."
        )
