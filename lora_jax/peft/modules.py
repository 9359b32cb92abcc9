"""The modules of PEFT that adapters and full leaves become."""

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from lora_jax._io import tensor_files
from lora_jax.peft.adapters import cut_adapter, to_peft
from lora_jax.peft.keys import Kind
from lora_jax.peft.layout import Index, Layout, Site, part_axes, part_shape, to_matrix
from lora_jax.peft.name_table import Given, Names
from lora_jax.peft.names import (
    BIAS,
    WEIGHT,
    is_convolution,
    is_embedding,
    is_template,
    lacking_fields,
    split_name,
    split_path,
    template_fields,
    template_parts,
)
from lora_jax.plan import parts
from lora_jax.plan.adapter_plan import AdapterPlan, Target, Use
from lora_jax.plan.parts import LOOKUP, PRODUCT

_WRAPPED = ".base_layer"


class SavedModule(NamedTuple):
    """The adapter of one module, in PEFT's layout."""

    site: Site
    kind: Kind
    target: Target
    arrays: Mapping[str, np.ndarray]
    lies_in_out: bool
    """Whether it is a matrix `(in, out)`, which PyTorch would hold as `(out, in)`."""

    @property
    def name(self) -> str:
        """Of the module, or of the parameter of experts."""
        return self.site.name


def saved_modules(
    path: str,
    adapter: Mapping[str, object],
    plan: AdapterPlan,
    names: Names,
    layout: Layout,
) -> tuple[list[SavedModule], list[str]]:
    """Converts an adapter to the modules of PEFT.

    Args:
        path: of the target.
        adapter: of the plan.
        plan: the plan.
        names: the names that the caller gave.
        layout: of the weight.

    Returns:
        The modules; and the names of modules of the weight that are outside of the target.

    Raises:
        ValueError: if PEFT cannot represent it, or names are missing.
    """
    leaf, target = plan.leaf(path), plan.targets[path]
    arrays = {name: tensor_files.to_numpy(name, value) for name, value in adapter.items()}
    target, arrays = _as_used(target, arrays, plan.uses.get(leaf, ()))
    _check_named(leaf, target, names)
    modules, others, left = [], [], math.prod(target.alone.shape)
    for site in sites_of(leaf, names, target, layout):
        region = parts.as_text(site.region(target.shape), target.shape)
        if not parts.overlap(region, target.part, target.shape):
            others.append(site.name)
            continue
        entries = cut_adapter(site.name, region, target, arrays)
        left -= math.prod(map(parts.count, parts.entries(region, target.shape)))
        kind, axes = _kind(site, target, plan, layout), site.own_axes
        modules.append(
            SavedModule(
                site=site,
                kind=kind,
                target=target,
                arrays=to_peft(kind, axes, site.own_shape(target.shape), entries),
                lies_in_out=layout == "torch" and (kind, axes) == ("linear", "io"),
            )
        )
    if left:
        named = ", ".join(repr(each.name) for each in modules[:5]) or "no module"
        raise ValueError(
            f"names have {named} for {path!r}, and no module for the rest of it: give "
            "names={module: path} for all of it."
        )
    return modules, others


def _as_used(
    target: Target, arrays: Mapping[str, np.ndarray], uses: Sequence[Use]
) -> tuple[Target, Mapping[str, np.ndarray]]:
    """The target of one use of a weight, with the inputs and outputs of this use.

    A plan may have those of another use, as of a tied leaf.

    Raises:
        ValueError: if there are magnitudes, which belong to the outputs.
    """
    inputs = {
        axis
        for use in uses
        if use.kind(target.batch_axes) == target.use
        for axis, role in enumerate(use.roles)
        if role in ("contracted", "indexed")
    }
    if not target.use or inputs != {*target.out_axes}:
        return target, arrays
    if "m" in arrays:
        raise ValueError(
            f"the target is a {target.use}, whose outputs are the axes {target.in_axes}, "
            f"and its magnitudes belong to the axes {target.out_axes}: PEFT cannot "
            "represent them."
        )
    turned = dataclasses.replace(target, in_axes=target.out_axes, out_axes=target.in_axes)
    return turned, {"A": arrays["B"].swapaxes(-1, -2), "B": arrays["A"].swapaxes(-1, -2)}


def _check_named(path: str, target: Target, names: Names) -> None:
    """Raises for a product with an embedding whose name is not given.

    The path gives the name of the embedding, and PEFT has another module for the head.
    """
    named = any(names.of(path, target.use))
    if (
        target.use == PRODUCT
        and not named
        and is_embedding(split_path(path).words[-1], path)
    ):
        raise ValueError(
            "the target is the product with an embedding, which is another module in "
            f"PEFT: give names={{'lm_head': '{path}@{PRODUCT}'}}."
        )


def _kind(site: Site, target: Target, plan: AdapterPlan, layout: Layout) -> Kind:
    """The kind of a module, by the uses in the plan, or by its axes and its name."""
    axes, dora = site.own_axes, target.method == "dora"
    if "b" in axes:
        if dora or axes.count("b") > 1:
            raise ValueError(
                "PEFT has stacks of experts along one axis and without DoRA, got a "
                f"{target.method!r} adapter with the axes {axes!r}: give "
                "a name with {} to save each expert as a module of its own."
            )
        return "experts"
    if site.name.endswith(f".{WEIGHT}"):  # the name of a parameter
        if dora:
            raise ValueError(f"PEFT has no DoRA for a parameter, {site.name!r}.")
        return "experts"
    uses = plan.uses.get(site.path, ())
    primitives = {
        use.primitive for use in uses if target.use in ("", use.kind(target.batch_axes))
    }
    if target.use == LOOKUP:
        return "embedding"
    if "gather" in primitives and len(primitives) > 1:
        raise ValueError(
            "the weight is an embedding and a matrix of a product, such as a tied output "
            "head, and a LoRA module of PEFT is one of both: adapt one of both "
            f"('{site.path}@{LOOKUP}' or '@{PRODUCT}'), merge the adapters, or save the "
            "merged weight in `replaced`."
        )
    if "gather" in primitives:
        return "embedding"
    if "conv_general_dilated" in primitives:
        return "convolution"
    return "linear" if primitives else _kind_by_axes(site, layout)


def _kind_by_axes(site: Site, layout: Layout) -> Kind:
    """The kind of a module whose uses are not known."""
    axes = site.own_axes
    inner = "i" * (len(axes) - 1)
    kernels = len(axes) > 3 or (len(axes) == 3 and is_convolution(site.name))
    if layout == "torch" and len(axes) > 2 and axes == f"o{inner}":
        return "convolution"
    if layout == "jax" and kernels and axes == f"{inner}o":
        return "convolution"
    embedding = axes == "io" and is_embedding(site.name, site.path)
    return "embedding" if embedding else "linear"


class SavedFull:
    """Collects full leaves as arrays of PEFT.

    Args:
        plan: of the adapters in the same file.
        names: the names that the caller gave.
        layout: of the leaves.
        adapted: the modules of these adapters.
    """

    def __init__(
        self,
        plan: AdapterPlan,
        names: Names,
        layout: Layout,
        adapted: Iterable[SavedModule],
    ) -> None:
        self._plan, self._names = plan, names
        self._targets = {
            leaf: plan.targets[paths[0]] for leaf, paths in plan.by_leaf().items()
        }
        self._layout: Layout = layout
        self._adapted = {module.name: module for module in adapted}
        self._kinds = {each.site.path: each.kind for each in self._adapted.values()}
        self._weights = {
            split_path(path).words: path
            for path in (*plan.by_leaf(), *plan.skipped)
            if split_path(path).leaf == WEIGHT
        }
        self._biases = {
            split_path(path).words: path
            for path in plan.skipped
            if split_path(path).leaf == BIAS
        }
        self.tensors: dict[str, np.ndarray] = {}
        """By name, without the prefix of the format."""
        self.modules: dict[str, None] = {}
        """The names of `modules_to_save`."""
        self._biased: dict[str, None] = {}

    @property
    def bias(self) -> Literal["none", "all", "lora_only"]:
        """PEFT's word for the biases that are saved without their modules."""
        biased = self._biased.keys() - self.modules.keys()
        if not biased:
            return "none"
        return "lora_only" if biased <= self._adapted.keys() else "all"

    def check_complete(self, paths: Collection[str]) -> None:
        """Raises if a module without an adapter has its weight saved and not its bias.

        Raises:
            ValueError: because PEFT saves such modules whole.
        """
        for path in paths:
            words = split_path(path)
            bias = self._biases.get(words.words)
            if words.leaf != WEIGHT or bias is None or path in self._targets:
                continue
            if bias not in paths:
                raise ValueError(
                    f"PEFT saves modules whole, and `replaced` has {path!r} without its "
                    f"bias: give {bias!r} too, unchanged if it was not trained."
                )

    def put(self, path: str, array: np.ndarray) -> None:
        """Adds a leaf.

        Raises:
            ValueError: if PEFT cannot represent it, or names are missing.
        """
        words = split_path(path)
        if not words.leaf:
            raise ValueError(
                "PEFT saves modules, and the leaf is called neither weight nor bias, nor "
                "by another word for these: kernel, embedding, scale, w, b."
            )
        bias = words.leaf == BIAS
        owner = self._weights.get(words.words, path) if bias else path
        for site in self._sites_of(owner, array):
            name, adapted = site.name, site.name in self._adapted
            if adapted and self._adapted[name].kind == "experts":
                raise ValueError("PEFT cannot represent a full stack of experts.")
            if bias:
                if site.part:
                    raise ValueError(
                        f"the module {name!r} is a part of {owner!r}, and names do not say "
                        "which part of the bias it has: PEFT needs a leaf for each module."
                    )
                own = array[site.indices].reshape(-1)
                self._biased[name] = None
            else:
                own = self._as_torch(path, site, site.view(array))
                if not adapted:
                    self.modules[name] = None
            wrapped = _WRAPPED if adapted else ""
            self.tensors[f"{name}{wrapped}.{words.leaf}"] = np.ascontiguousarray(own)

    def _sites_of(self, owner: str, array: np.ndarray) -> list[Site]:
        """The modules of a leaf, by the names that its weight has."""
        axes = self._names.axes(owner)
        if owner in self._targets:
            whole = dataclasses.replace(self._targets[owner], part="", use="")
            return sites_of(owner, self._names, whole, self._layout)
        if not self._names.has(owner):
            axes = "?" * array.ndim
        elif axes is None or len(axes) != array.ndim:
            axes = "b" * array.ndim  # any axis may be an index
        return find_modules(owner, self._names, array.shape, axes, self._layout)

    def _as_torch(self, path: str, site: Site, array: np.ndarray) -> np.ndarray:
        """A weight in PyTorch's layout."""
        if self._layout == "torch" or array.ndim < 2:
            return array
        name, kind = site.name, self._kinds.get(path)
        if is_embedding(name, path) and array.ndim == 2:
            return array
        if kind == "linear":
            return to_matrix(array, site.own_axes).T
        if array.ndim == 3 and kind is None and not self._convolves(path, name):
            axes = self._names.axes(path)
            if axes is None:
                raise ValueError(
                    "the leaf has three axes and may be the kernel of a convolution or a "
                    "matrix with heads: give names={module: (path, axes)}, with axes such "
                    "as 'ioo'."
                )
            return to_matrix(array, axes).T
        return np.moveaxis(array, (-1, -2), (0, 1))

    def _convolves(self, path: str, name: str) -> bool:
        """Whether a leaf is the kernel of a convolution, by its uses or by its name."""
        uses = self._plan.uses.get(path, ())
        if uses:
            return any(use.primitive == "conv_general_dilated" for use in uses)
        given = self._names.axes(path) is not None
        return not given and is_convolution(name)


def sites_of(path: str, names: Names, target: Target, layout: Layout = "jax") -> list[Site]:
    """The modules of the leaf of a target, or of more of the leaf than the target.

    Args:
        path: of the leaf.
        names: the argument of `save`.
        target: of the plan.
        layout: of the weight.

    Raises:
        ValueError: if there is no name, or there are fewer names than indexes.
    """
    shape, axes, use = target.shape, target.axes, target.use
    return find_modules(path, names, shape, axes, layout, use, partial=target.part != "")


def find_modules(
    path: str,
    names: Names,
    shape: tuple[int, ...],
    axes: str,
    layout: Layout = "jax",
    use: str = "",
    *,
    partial: bool = False,
) -> list[Site]:
    """The modules of a leaf, with their sites.

    Args:
        path: of a weight.
        names: the argument of `save`.
        shape: of the weight.
        axes: the letters of its axes. The `b` may be indexes of modules.
        layout: of the weight.
        use: of the weight that is adapted; as in `Target`.
        partial: whether names of some of the indexes will do.

    Returns:
        One module for the leaf, or for each part that has a name; or one for each index on
        some of the batch axes.

    Raises:
        ValueError: if there is no name, or there are fewer names than indexes.
    """
    by_part: dict[str, list[Given]] = {}
    for given in names.of(path, use):
        by_part.setdefault(parts.canonical(given.part, shape), []).append(given)
    for one, other in itertools.combinations(by_part, 2):
        if parts.overlap(one, other, shape):
            raise ValueError(
                f"names has the parts {one or 'all'} and {other or 'all'} of {path!r}, "
                "which have entries in common."
            )
    sites = []
    for part, found in (by_part or {"": []}).items():
        own_shape, own_axes = part_shape(part, shape), part_axes(part, shape, axes)
        own = _part_modules(path, found, own_shape, own_axes, layout, partial)
        sites += [site._replace(part=part, use=use) for site in own]
    return sites


def _part_modules(
    path: str,
    found: list[Given],
    shape: tuple[int, ...],
    axes: str,
    layout: Layout,
    partial: bool,
) -> list[Site]:
    """The modules of a leaf, or of one part of it, without the part in their sites.

    Args:
        path: of the leaf.
        found: the names of the modules, each with the letters of axes or an empty text.
        shape: of the part, and so are `axes`.
        axes: as in `find_modules`, and so are `layout` and `partial`.
        layout: of the weight.
        partial: whether names of some of the indexes will do.
    """
    batch = tuple(axis for axis, letter in enumerate(axes) if letter == "b")
    sizes = tuple(shape[axis] for axis in batch)
    given = [each.name for each in found] or _derived(path, sizes, layout)
    shown = " x ".join(map(str, sizes)) or "none"
    if not given:
        raise ValueError(
            f"the weight is a stack of {shown}, and its path does not contain the names "
            f"of the modules: give names={{'name.{{}}.of': {path!r}}}, with {{}} for each "
            "number."
        )
    fields = found[0].fields if found else ()
    templates = [name for name in given if is_template(name)]
    if len(given) == 1 and templates:
        modules, order = _fill_template(path, templates[0], sizes, fields)
    elif templates:
        raise ValueError(
            f"names has {len(given)} names for {path!r}, {given[0]!r} and others: give one "
            "template, or a name for each index."
        )
    else:
        modules, order = _numbered(path, given, sizes, fields, partial)
        if not modules and len(given) == 1:
            modules = {(): given[0]}
    if not modules:
        raise ValueError(
            f"names must have one module for each index of {path!r}, a stack of "
            f"{shown}, got {', '.join(given[:5])}." + _parts_hint(path, given, shape)
        )
    stack = tuple(batch[each] for each in order)
    return [
        Site(name, name, path, axes, index, stack if index else ())
        for index, name in modules.items()
    ]


def _parts_hint(path: str, names: list[str], shape: tuple[int, ...]) -> str:
    """The end of an error about modules that may be parts of a fused weight."""
    axis = next((axis for axis, n in enumerate(shape) if n == len(names)), None)
    if axis is None:
        return ""
    index = ":," * axis
    written = (f"{name!r}: '{path}[{index}{i}]'" for i, name in enumerate(names))
    return f" If they are parts of a fused weight, give names={{{', '.join(written)}}}."


def _derived(path: str, sizes: tuple[int, ...], layout: Layout) -> list[str]:
    """The name that a path gives, without the word of its leaf; empty for a stack.

    `layers_0` becomes `layers.0`. Trees of PyTorch keep such words, and so do paths in
    which numbers are words: `ln_1` is a name in `h/0/ln_1/scale`.
    """
    if sizes:
        return []
    as_they_are = split_path(path, numbers_apart=False).words
    if layout == "torch" or any(map(str.isdecimal, as_they_are)):
        return [".".join(as_they_are)]
    return [".".join(split_path(path).words)]


def _fill_template(
    path: str, template: str, sizes: tuple[int, ...], fields: tuple[str, ...]
) -> tuple[dict[Index, str], Index]:
    """The names of a template by index, and the batch axis of each number."""
    own = template_fields(template)
    if len(own) > len(sizes):
        raise ValueError(
            f"the template {template!r} has {len(own)} numbers, and {path!r} has "
            f"{len(sizes)} stacked axes."
        )
    order = _order(own, fields)
    indexes = np.ndindex(*(sizes[each] for each in order))
    return {
        index: "".join(_filled(template_parts(template), index)) for index in indexes
    }, order


def _filled(parts: list[str], index: Index) -> Iterator[str]:
    for part, number in itertools.zip_longest(parts, index, fillvalue=""):
        yield f"{part}{number}"


def _order(own: tuple[str, ...], fields: tuple[str, ...]) -> tuple[int, ...]:
    """The batch axis that each number of a name is an index on.

    Args:
        own: the fields of the numbers.
        fields: the field that the caller gave each batch axis, or an empty text.

    Raises:
        ValueError: if some of the numbers are named, and not all.
    """
    if not any(fields):
        return tuple(range(len(own)))
    if not set(own) <= set(fields):
        raise ValueError(
            f"the axes name the indexes {', '.join(filter(None, fields))}, and the numbers "
            f"of the module are called {', '.join(own)}: name the axis of each."
        )
    return tuple(fields.index(field) for field in own)


def _numbered(
    path: str,
    names: list[str],
    sizes: tuple[int, ...],
    fields: tuple[str, ...],
    partial: bool = False,
) -> tuple[dict[Index, str], Index]:
    """Names of single modules by the numbers in them, if these are indexes; else empty.

    The numbers are those that the path lacks, as in `load`, or else those in which the
    names differ. The batch axis of each number comes second. Names of some indexes will do
    if `partial` is true.
    """
    lacking = [lacking_fields(name, path) for name in names]
    own = tuple(field for field, _ in lacking[0])
    order = _order(own, fields) if own else ()
    by_path = [tuple(number for _, number in each) for each in lacking]
    for indices in (by_path, _differing(names)):
        found = dict(zip(indices, names, strict=True))
        count = len(indices[0])
        ordered = order if count == len(order) else tuple(range(count))
        if not count or count > len(sizes) or len({*map(len, indices)}) > 1:
            continue
        every = [*np.ndindex(*(sizes[each] for each in ordered))]
        if sorted(indices) == every or (partial and {*indices} <= {*every}):
            return dict(sorted(found.items())), ordered
    return {}, ()


def _differing(names: list[str]) -> list[tuple[int, ...]]:
    """The numbers in which some names differ; empty if words differ."""
    words = [split_name(name) for name in names]
    columns = [column for column in zip(*words, strict=False) if len(set(column)) > 1]
    if any(not word.isdecimal() for column in columns for word in column):
        return [() for _ in names]
    return [tuple(int(column[i]) for column in columns) for i in range(len(names))]
