"""The modules of PEFT that adapters and full leaves become."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from lora_jax._io import tensor_files
from lora_jax.peft.adapters import cut_adapter, to_peft
from lora_jax.peft.formats.keys import (
    BIAS,
    WEIGHT,
    WRAPPED,
    Kind,
    is_convolution,
    is_embedding,
)
from lora_jax.peft.layout import Layout, Site, to_matrix
from lora_jax.peft.leaves import UNUSUAL_KERNEL, gathers
from lora_jax.peft.names import Names, find_modules
from lora_jax.peft.words import split_path
from lora_jax.plan import parts
from lora_jax.plan.adapter_plan import AdapterPlan, Target, Use
from lora_jax.plan.parts import LOOKUP, PRODUCT


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
    as_mlx: bool,
    of_leaf: Callable[..., "LeafModules"],
) -> tuple[list[SavedModule], list[str]]:
    """Converts the adapter of a target of a plan to the modules of PEFT.

    `of_leaf` is `LeafModules`, which may be cached, as a leaf may have hundreds of targets.
    If `as_mlx` is true, they are for mlx-lm: a tied embedding is one module, and each stack
    of experts is the parameter `weight` of a module.

    Returns:
        The modules; and the names of all modules of the weight, also outside of the target.
    """
    leaf, target = plan.leaf(path), plan.targets[path]
    if as_mlx and target.use:
        raise ValueError(
            f"the target is the {target.use} of the weight, and an adapter of mlx-lm acts "
            "on all uses of it: save with dialect='peft', or merge the adapters."
        )
    arrays = {name: tensor_files.to_numpy(name, value) for name, value in adapter.items()}
    target, arrays = _as_used(target, arrays, plan.uses.get(leaf, ()))
    _check_named(leaf, target, names)
    modules, left, shape = [], math.prod(target.alone.shape), target.shape
    every = of_leaf(
        *(leaf, names, shape, target.axes, layout, target.use, target.part != "")
    )
    for site, region in every.overlapping(target.part):
        entries = cut_adapter(site.name, region, target, arrays)
        left -= math.prod(map(parts.count, parts.entries(region, shape)))
        kind, axes = _kind(site, target, plan, layout, as_mlx), site.own_axes
        if as_mlx and kind == "experts":
            name = site.name.removesuffix(f".{WEIGHT}")
            site = site._replace(name=f"{name}.{WEIGHT}")
        modules.append(
            SavedModule(
                site=site,
                kind=kind,
                target=target,
                arrays=to_peft(kind, axes, site.own_shape(shape), entries),
                lies_in_out=layout == "torch" and (kind, axes) == ("linear", "io"),
            )
        )
    if left:
        named = ", ".join(repr(each.name) for each in modules[:5]) or "no module"
        raise ValueError(
            f"names have {named} for {path!r}, and no module for the rest of it: give "
            "names={module: path} for all of it."
        )
    return modules, every.names


class LeafModules:
    """The modules of a leaf, each with its region of the leaf as text.

    The arguments are those of `find_modules`.
    """

    def __init__(
        self,
        leaf: str,
        names: Names,
        shape: tuple[int, ...],
        axes: str,
        layout: Layout,
        use: str,
        partial: bool,
    ) -> None:
        sites = find_modules(leaf, names, shape, axes, layout, use, partial=partial)
        self.names = [site.name for site in sites]
        self._shape = shape
        regions = [site.region(shape) for site in sites]
        # The axes on which each module has one index: those of a stack.
        self._axes = [
            axis
            for axis, own in enumerate(zip(*regions, strict=True))
            if all(isinstance(entry, int) for entry in own)
        ]
        self._by_indices: dict[tuple[object, ...], list[tuple[Site, str]]] = {}
        for site, own in zip(sites, regions, strict=True):
            indices = tuple(own[axis] for axis in self._axes)
            pair = site, parts.as_text(own, shape)
            self._by_indices.setdefault(indices, []).append(pair)

    def overlapping(self, part: str) -> list[tuple[Site, str]]:
        """The modules that have an entry in common with a part, and their regions."""
        own = parts.entries(part, self._shape)
        indices = itertools.product(*(parts.indices_of(own[a]) for a in self._axes))
        near = (pair for index in indices for pair in self._by_indices.get(index, ()))
        return [pair for pair in near if parts.overlap(pair[1], part, self._shape)]


def _as_used(
    target: Target, arrays: Mapping[str, np.ndarray], uses: Sequence[Use]
) -> tuple[Target, Mapping[str, np.ndarray]]:
    """The target of one use of a weight, with the inputs and outputs of this use.

    A plan may have those of another use, as of a tied leaf. Magnitudes belong to the
    outputs, and raise an error then.
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
    embedding = is_embedding(split_path(path).words[-1], path)
    if target.use == PRODUCT and embedding and not names.of(path, target.use):
        raise ValueError(
            "the target is the product with an embedding, which is another module in "
            f"PEFT: give names={{'lm_head': '{path}@{PRODUCT}'}}."
        )


def _kind(
    site: Site, target: Target, plan: AdapterPlan, layout: Layout, may_be_tied: bool
) -> Kind:
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
    if "gather" in primitives and len(primitives) > 1 and not may_be_tied:
        raise ValueError(
            "the weight is an embedding and a matrix of a product, such as a tied output "
            "head, and a LoRA module of PEFT is one of both: adapt one of both "
            f"('{site.path}@{LOOKUP}' or '@{PRODUCT}'), merge the adapters, or save the "
            "merged weight in `replaced`."
        )
    if "gather" in primitives:
        return "embedding"
    if "conv_general_dilated" in primitives:
        _check_kernel(site.path, target.shape, plan)
        return "convolution"
    return "linear" if primitives else _kind_by_axes(site, layout)


def _check_kernel(path: str, shape: tuple[int, ...], plan: AdapterPlan) -> None:
    for use in plan.uses.get(path, ()):
        sizes = shape if len(shape) == len(use.roles) else (2,) * len(use.roles)  # a part
        if not use.has_usual_kernel(sizes):
            raise ValueError(f"the weight {shape} {UNUSUAL_KERNEL}")


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
    """Collects full leaves as arrays of PEFT, beside the modules with adapters."""

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
        self._weights, self._biases = (
            {
                split_path(path).words: path
                for path in paths
                if split_path(path).leaf == leaf
            }
            for leaf, paths in (
                (WEIGHT, [*plan.by_leaf(), *plan.skipped]),
                (BIAS, plan.skipped),
            )
        )
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
        """Raises if a module without an adapter has its weight saved and not its bias."""
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
        """Adds a leaf."""
        words = split_path(path)
        if not words.leaf:
            raise ValueError(
                "PEFT saves modules, and the leaf is called neither weight nor bias, nor "
                "by another word for these: kernel, embedding, scale, w, b."
            )
        bias = words.leaf == BIAS
        owner = self._weights.get(words.words, path) if bias else path
        if not bias and self._layout == "jax":
            _check_kernel(path, array.shape, self._plan)
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
            wrapped = WRAPPED if adapted else ""
            self.tensors[f"{name}{wrapped}.{words.leaf}"] = np.ascontiguousarray(own)

    def _sites_of(self, owner: str, array: np.ndarray) -> list[Site]:
        """The modules of a leaf, by the names that its weight has."""
        names, shape, axes = self._names, array.shape, self._names.axes(owner)
        if owner in self._targets:
            shape, axes = self._targets[owner].shape, self._targets[owner].axes
        elif not names.has(owner):
            axes = "?" * array.ndim
        elif axes is None or len(axes) != array.ndim:
            axes = "b" * array.ndim  # any axis may be an index
        return find_modules(owner, names, shape, axes, self._layout)

    def _as_torch(self, path: str, site: Site, array: np.ndarray) -> np.ndarray:
        """A weight in PyTorch's layout."""
        if self._layout == "torch" or array.ndim < 2:
            return array
        name, kind = site.name, self._kinds.get(path)
        used = self._as_used(path, site, array)
        if used is not None:
            return used
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

    def _as_used(self, path: str, site: Site, array: np.ndarray) -> np.ndarray | None:
        """A table that is looked up, or a kernel with outputs first, if a use shows it."""
        for use in () if site.part else self._plan.uses.get(path, ()):
            own = [axis for axis in range(len(use.roles)) if axis not in site.stack]
            roles = [use.roles[axis] for axis in own]
            if len(own) == 2 and gathers(use) and roles.count("indexed") == 1:
                return array if roles[0] == "indexed" else array.T
            if use.window and own[0] not in use.window and roles[0] == "kept":
                return array
        return None

    def _convolves(self, path: str, name: str) -> bool:
        """Whether a leaf is the kernel of a convolution, by its uses or by its name."""
        uses = self._plan.uses.get(path, ())
        if uses:
            return any(use.primitive == "conv_general_dilated" for use in uses)
        given = self._names.axes(path) is not None
        return not given and is_convolution(name)
