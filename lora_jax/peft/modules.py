"""Adapters and whole leaves of a plan as the modules that PEFT has."""

from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from lora_jax._io import tensor_files
from lora_jax.peft.adapters import to_peft
from lora_jax.peft.given import Named, Naming, names_of
from lora_jax.peft.keys import Kind
from lora_jax.peft.layout import Layout, take_layer, to_matrix
from lora_jax.peft.names import BIAS, WEIGHT, is_convolution, is_embedding, split_path
from lora_jax.plan.adapter_plan import AdapterPlan, Target

_WRAPPED = ".base_layer"


class SavedModule(NamedTuple):
    """The adapter of one module, as PEFT has it."""

    name: str
    """Of the module, or of the parameter if it is that of experts."""
    kind: Kind
    path: str
    target: Target
    arrays: Mapping[str, np.ndarray]
    lies_in_out: bool
    """Whether it is a matrix that torch has the other way round."""


def saved_modules(
    path: str,
    adapter: Mapping[str, object],
    plan: AdapterPlan,
    names: Naming,
    layout: Layout,
) -> list[SavedModule]:
    """The modules that an adapter becomes.

    Args:
        path: of the weight.
        adapter: of the plan.
        plan: the plan.
        names: what the caller gave.
        layout: of the weight.

    Raises:
        ValueError: if PEFT has no form for it, or names are missing.
    """
    target = plan.targets[path]
    sizes = tuple(target.shape[axis] for axis in target.batch_axes)
    arrays = {name: tensor_files.to_numpy(name, value) for name, value in adapter.items()}
    modules = []
    for named in names_of(path, names, sizes, layout):
        name, indices = named.name, named.indices
        stacked = [target.batch_axes[each] for each in named.stack]
        own = [axis for axis in range(len(target.shape)) if axis not in stacked]
        axes = "".join(target.axes[axis] for axis in own)
        shape = tuple(target.shape[axis] for axis in own)
        kind = _kind(path, name, axes, plan, layout)
        entries = {
            entry: take_layer(value, named.stack, indices)
            for entry, value in arrays.items()
        }
        modules.append(
            SavedModule(
                name=name,
                kind=kind,
                path=path,
                target=target,
                arrays=to_peft(kind, axes, shape, entries),
                lies_in_out=layout == "torch" and (kind, axes) == ("linear", "io"),
            )
        )
    return modules


def _kind(path: str, name: str, axes: str, plan: AdapterPlan, layout: Layout) -> Kind:
    """What a module is: by what the plan knows of its uses, else by its axes and name."""
    if "b" in axes:
        if plan.targets[path].method == "dora" or axes.count("b") > 1:
            raise ValueError(
                f"PEFT has no DoRA for stacks of experts, and one axis of them, got "
                f"{axes!r}: give a name with {{}} to save each as a module of its own."
            )
        return "experts"
    if name.endswith(f".{WEIGHT}"):  # no module is called so, but a parameter
        if plan.targets[path].method == "dora":
            raise ValueError(f"PEFT has no DoRA for a parameter, {name!r}.")
        return "experts"
    primitives = {use.primitive for use in plan.uses.get(path, ())}
    if "gather" in primitives and len(primitives) > 1:
        raise ValueError(
            "the weight is an embedding and a matrix of a product, such as a tied output "
            "head, and a LoRA module of PEFT is one of both: merge the adapters instead, "
            "or save the merged weight in `replaced`."
        )
    if "gather" in primitives:
        return "embedding"
    if "conv_general_dilated" in primitives:
        return "convolution"
    return "linear" if primitives else _kind_by_axes(path, name, axes, layout)


def _kind_by_axes(path: str, name: str, axes: str, layout: Layout) -> Kind:
    """What a module is, of which no use is known."""
    inner = "i" * (len(axes) - 1)
    kernels = len(axes) > 3 or (len(axes) == 3 and is_convolution(name))
    if layout == "torch" and len(axes) > 2 and axes == f"o{inner}":
        return "convolution"
    if layout == "jax" and kernels and axes == f"{inner}o":
        return "convolution"
    embedding = axes == "io" and is_embedding(name, path)
    return "embedding" if embedding else "linear"


class SavedWholes:
    """Leaves that are written whole.

    Args:
        plan: of the adapters that are written with them.
        names: what the caller gave.
        layout: of the leaves.
        adapted: the modules of those adapters.
    """

    def __init__(
        self,
        plan: AdapterPlan,
        names: Naming,
        layout: Layout,
        adapted: Iterable[SavedModule],
    ) -> None:
        self._plan, self._names = plan, names
        self._layout: Layout = layout
        self._adapted = {module.name: module for module in adapted}
        self._weights = {
            split_path(path).words: path
            for path in (*plan.targets, *plan.skipped)
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
        """PEFT's word for the biases that are written, of modules that are not."""
        biased = self._biased.keys() - self.modules.keys()
        if not biased:
            return "none"
        return "lora_only" if biased <= self._adapted.keys() else "all"

    def check_complete(self, paths: Collection[str]) -> None:
        """Raises if the weight of a module without adapter comes without its bias.

        Raises:
            ValueError: because PEFT saves such modules whole.
        """
        for path in paths:
            words = split_path(path)
            bias = self._biases.get(words.words)
            if words.leaf != WEIGHT or bias is None or path in self._plan.targets:
                continue
            if bias not in paths:
                raise ValueError(
                    f"PEFT saves modules whole, and `replaced` has {path!r} without its "
                    f"bias: give {bias!r} too, as it is if it was not trained."
                )

    def put(self, path: str, array: np.ndarray) -> None:
        """Puts a leaf.

        Raises:
            ValueError: if PEFT has no form for it, or names are missing.
        """
        words = split_path(path)
        if not words.leaf:
            raise ValueError(
                "PEFT saves modules, and the leaf is called neither weight nor bias, nor "
                "what stands for these: kernel, embedding, scale, w, b."
            )
        owner = path
        if words.leaf == BIAS:
            owner = self._weights.get(words.words, path)
        for named in self._names_of(owner, array):
            name, indices = named.name, named.indices
            adapted = name in self._adapted
            if adapted and self._adapted[name].kind == "experts":
                raise ValueError("PEFT has no form for a stack of experts that is whole.")
            if words.leaf == BIAS:
                own = array[indices].reshape(-1)
                self._biased[name] = None
            else:
                batch = self._batch_axes(path, array.ndim)
                stack = tuple(batch[each] for each in named.stack)
                own = take_layer(array, stack, indices)
                own = self._as_torch(path, name, own)
                if not adapted:
                    self.modules[name] = None
            wrapped = _WRAPPED if adapted else ""
            self.tensors[f"{name}{wrapped}.{words.leaf}"] = np.ascontiguousarray(own)

    def _names_of(self, owner: str, array: np.ndarray) -> list[Named]:
        """The modules of a leaf, by the names that its weight has."""
        shape = array.shape
        if owner in self._plan.targets:
            shape = self._plan.targets[owner].shape
        sizes = tuple(shape[axis] for axis in self._batch_axes(owner, len(shape)))
        if owner not in self._plan.targets and not self._names.has(owner):
            sizes = ()
        return names_of(owner, self._names, sizes, self._layout)

    def _batch_axes(self, path: str, ndim: int) -> tuple[int, ...]:
        """The axes of a leaf that may be indexes of modules."""
        if path in self._plan.targets:
            return self._plan.targets[path].batch_axes
        axes = self._names.axes(path)
        if axes is None or len(axes) != ndim:
            return tuple(range(ndim))
        return tuple(axis for axis, letter in enumerate(axes) if letter == "b")

    def _as_torch(self, path: str, name: str, array: np.ndarray) -> np.ndarray:
        """A weight as torch has it."""
        if self._layout == "torch" or array.ndim < 2:
            return array
        module = self._adapted.get(name)
        if is_embedding(name, path) and array.ndim == 2:
            return array
        if module is not None and module.kind == "linear":
            axes = module.target.axes.replace("b", "")
            return to_matrix(array, axes).T
        if array.ndim == 3 and module is None and not self._convolves(path, name):
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
