"""Quantizes the weights of a tree of params, one leaf after the other."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding

from lora_jax._core import checks, compat, placement, tree_paths
from lora_jax._core.immutable import FrozenDict
from lora_jax._core.quantized import QuantizedTensor, is_quantized
from lora_jax._io import tensor_files
from lora_jax.plan import plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.config import ALL_LINEAR
from lora_jax.quant import inputs
from lora_jax.quant.fp8 import quantize_fp8
from lora_jax.quant.int8 import quantize_int8
from lora_jax.quant.nf4 import BLOCK_SIZE, quantize_nf4, rows_for

__all__ = ["quantize_params"]

Patterns: TypeAlias = AdapterPlan | tree_paths.Pattern | Iterable[tree_paths.Pattern]
Quantize: TypeAlias = Callable[..., QuantizedTensor]
Format: TypeAlias = Literal["nf4", "int8", "fp8"] | Quantize

_FORMATS: dict[str, Quantize] = {
    "nf4": quantize_nf4,
    "int8": quantize_int8,
    "fp8": quantize_fp8,
}
_NO_SETTINGS = ("weight", "batch_axes")  # arguments that depend on the leaf
_NONE: Mapping[tree_paths.Pattern, int] = FrozenDict()


def quantize_params(
    params: tree_paths.Tree,
    patterns: Patterns,
    format: Format = "nf4",
    *,
    batch_axes: int | Mapping[tree_paths.Pattern, int] = _NONE,
    plan: AdapterPlan | None = None,
    donate: bool = False,
    **settings: Any,
) -> tree_paths.Tree:
    """Quantizes the weights whose paths match some patterns.

    Weights are quantized one after the other. If leaves are read from a file on demand, or
    with `donate`, the dense and the quantized model are never in memory together. If the
    format is a name, all shapes and dtypes are checked first.

    Args:
        params: a pytree. Leaves to quantize are float32, bfloat16 or float16: arrays of
            JAX or NumPy, memory-mapped ones too; anything with a shape, a dtype, and
            `__array__` or `[...]`; slices of a safetensors file; or
            `jax.ShapeDtypeStruct`s, which give abstract quantized leaves.
        patterns: patterns of paths, as in `LoraConfig`, or one pattern; or a plan, to
            quantize the weights that it adapts.
        format: `"nf4"`, `"int8"` or `"fp8"`; or a function called as
            `format(weight, batch_axes=n)`, which returns a quantized tensor.
        batch_axes: the number of leading axes of a weight that stack weights (layers,
            experts), which are then quantized separately: a dict from patterns to numbers,
            or one number for all. Weights that match no pattern use the number of leading
            batch axes in the plan, or 0 without a plan. A stack that is quantized as one
            weight gives correct results, but each use of one layer dequantizes the whole
            stack, also in each step of a scan.
        plan: the plan to take batch axes from, if `patterns` is not a plan.
        donate: delete each JAX array as soon as it is quantized. If an error is raised, the
            leaves before it are already deleted. No effect inside `jax.jit`.
        settings: options of the named format, such as `block_size` or `codec`: see
            `lora_jax.quant.quantize_nf4` and `lora_jax.quant.quantize_int8`.

    Returns:
        A tree like `params`, in which the matching leaves are quantized tensors and all
        other leaves are the same objects. The arrays of a sharded weight are created with
        its sharding. This always holds for the codes of `"int8"` and `"fp8"`, and for
        values per output. It holds for the arrays of `"nf4"` and the scales of blocks if
        each shard is a whole number of blocks; if not, NF4 writes a warning with suitable
        block sizes to the logger `"lora_jax"`. Inside `jax.jit` it holds on a mesh with
        explicit axes. On automatic axes the compiler decides: there give `"nf4"` the
        `row_axes`, and `jax.jit` the `out_shardings`, that abstract leaves with a sharding
        get.

    Raises:
        KeyError: if params lack a weight of the plan.
        TypeError: if a leaf is already quantized or not an array as described above, or
            the format is not a name or function, does not return a quantized tensor, or
            does not have a given setting.
        ValueError: if a pattern matches nothing or there is no pattern, a weight does not
            fit the format or has an infinity or a NaN (outside a trace), or an array to
            donate is at two paths or already deleted.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lora_jax.model.quantize import quantize_params
        >>> params = {"up": {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}}
        >>> quantized = quantize_params(params, "*/kernel", "int8", block_size=16)
        >>> quantized["up"]["kernel"]
        Int8Tensor(shape=(64, 32), dtype=float32, block_size=16)
        >>> quantized["up"]["bias"] is params["up"]["bias"]
        True
    """
    leaves, treedef = tree_paths.flatten(params)
    checks.check_flags(donate=donate)
    quantize = _quantizer(format, settings)
    plan = _plan_of(patterns, plan, leaves)
    paths = _chosen(leaves, patterns)
    counts = _batch_axes(paths, batch_axes, plan)
    for path, count in counts.items():
        with _refusing(path):
            _check_leaf(leaves[path])
            if isinstance(format, str):
                _check_fits(quantize, leaves[path], count)
    if donate:
        tree_paths.check_none_is_shared(leaves, paths, "quantize with donate=False")
    stored = {}
    for path, count in counts.items():
        with _refusing(path):
            stored[path] = _stored(quantize, leaves[path], count)
        if donate and isinstance(leaves[path], jax.Array) and not _is_traced(leaves[path]):
            leaves[path].delete()
    return treedef.unflatten((leaves | stored).values())


def _quantizer(format: Format, settings: Mapping[str, Any]) -> Quantize:
    """Resolves a format and its settings to a function."""
    if isinstance(format, str):
        checks.check_choice("format", format, tuple(_FORMATS))
        function = _FORMATS[format]
        names = [n for n in inspect.signature(function).parameters if n not in _NO_SETTINGS]
        unknown = [name for name in settings if name not in names]
        if unknown:
            raise TypeError(
                f"format={format!r} has the settings {', '.join(names) or 'none'}, got "
                f"{', '.join(unknown)}."
            )
        return functools.partial(function, **settings)
    if not callable(format):
        raise TypeError(
            f"format must be {', '.join(map(repr, _FORMATS))} or a function (weight, "
            f"batch_axes), got {format!r} ({type(format).__name__})."
        )
    if settings:
        raise TypeError(
            f"settings are only for formats given by name, got {', '.join(settings)}: give "
            "them to the function, with functools.partial."
        )
    return format


def _chosen(leaves: Mapping[str, Any], patterns: Patterns) -> list[str]:
    """The paths of the weights to quantize, in order."""
    if isinstance(patterns, AdapterPlan):
        return list(patterns.by_leaf())
    if isinstance(patterns, Iterable) and not isinstance(patterns, str | Mapping):
        patterns = tuple(patterns)
    texts = tree_paths.as_texts("patterns", patterns)
    if not texts:
        raise ValueError("patterns is empty: give patterns of the weights to quantize.")
    if ALL_LINEAR in texts:
        raise ValueError(
            f"patterns={ALL_LINEAR!r} needs a function to find the weights: give the plan "
            "that plan_adapters makes with this function."
        )
    tree_paths.check_matched("patterns", texts, leaves, "leaf")
    return [path for path in leaves if tree_paths.first_match(texts, path)]


def _plan_of(
    patterns: Patterns, plan: AdapterPlan | None, leaves: Mapping[str, Any]
) -> AdapterPlan | None:
    """The plan that was passed as `patterns` or as `plan`."""
    if isinstance(patterns, AdapterPlan):
        if plan is not None:
            raise ValueError("patterns is a plan already: leave out plan=.")
        plan = patterns
    if plan is not None:
        plan_checks.check_params(leaves, plan)
    return plan


def _batch_axes(
    paths: list[str],
    given: int | Mapping[tree_paths.Pattern, int],
    plan: AdapterPlan | None,
) -> dict[str, int]:
    """The number of leading axes of each weight that stack weights."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(paths, given)
    texts = {tree_paths.as_text("batch_axes", pattern): n for pattern, n in given.items()}
    tree_paths.check_matched("batch_axes", texts, paths, "weight to quantize")
    targets = {} if plan is None else plan.targets
    known = {plan.leaf(p): own.axes for p, own in targets.items()} if plan else {}
    letters = {path: known.get(path, "") for path in paths}
    leading = {path: len(axes) - len(axes.lstrip("b")) for path, axes in letters.items()}
    return {path: tree_paths.look_up(texts, path, leading[path]) for path in paths}


@contextlib.contextmanager
def _refusing(path: str) -> Iterator[None]:
    """Adds the path of the leaf to an error, and how to skip it."""
    with checks.at_path(path):
        try:
            yield
        except (TypeError, ValueError) as error:
            # An exception class of the user's function may need other arguments.
            kind = TypeError if isinstance(error, TypeError) else ValueError
            advice = "To skip this weight, narrow the patterns."
            raise kind(f"{error} {advice}") from error


def _check_leaf(leaf: Any) -> None:
    """Raises unless the leaf is a dense array, concrete or abstract."""
    if is_quantized(leaf):
        raise TypeError(f"the weight is quantized already: {leaf!r}.")
    if _is_slice(leaf):
        return
    checks.check_abstract_array("the weight", leaf)
    if isinstance(getattr(leaf, "sharding", None), NamedSharding):
        placement.check_divides(leaf.shape, leaf.sharding)
    if isinstance(leaf, jax.Array) and not _is_traced(leaf):
        checks.check_not_deleted("the weight", leaf)


def _check_fits(quantize: Quantize, leaf: Any, count: int) -> None:
    """Raises if a named format does not support the shape and dtype of a leaf."""
    jax.eval_shape(functools.partial(quantize, batch_axes=count), _abstract(leaf))


def _stored(quantize: Quantize, leaf: Any, count: int) -> QuantizedTensor:
    """Quantizes one leaf."""
    quantize = _for_sharding(quantize, leaf, count)

    def store(weight: jax.Array) -> tuple[QuantizedTensor, tuple[()]]:
        made = quantize(weight, batch_axes=count)
        _check_made(made, weight)
        return made, ()

    if isinstance(leaf, jax.ShapeDtypeStruct):
        made, _ = jax.eval_shape(store, _abstract(leaf))
        return _with_sharding(made, leaf.sharding)
    weight = _values(leaf)
    if _is_traced(weight):
        return placement.keep_sharding(store, weight)[0]
    if any(compat.explicit_spec(weight)):  # the format is traced and cannot check values
        inputs.check_weight(weight, count)
    return jax.block_until_ready(placement.keep_sharding(store, weight)[0])


def _for_sharding(quantize: Quantize, leaf: Any, count: int) -> Quantize:
    """Sets the rows of NF4 so that its arrays can be sharded like the leaf.

    Other formats are not changed. A format can see the sharding of concrete arrays only, so
    the rows are set here.
    """
    if not isinstance(quantize, functools.partial) or quantize.func is not quantize_nf4:
        return quantize
    if _is_slice(leaf) or quantize.keywords.get("row_axes") is not None:
        return quantize
    block = quantize.keywords.get("block_size", BLOCK_SIZE)
    parts = placement.parts(leaf)[count:]
    return functools.partial(quantize, row_axes=rows_for(leaf.shape[count:], block, parts))


def _check_made(made: Any, weight: jax.Array) -> None:
    """Raises unless a function returned a quantized tensor that fits the weight."""
    what = "what the function given as format returned"
    if not is_quantized(made):
        raise TypeError(f"{what} must be a QuantizedTensor, got {type(made).__name__}.")
    if made.shape != weight.shape or made.dtype != weight.dtype:
        raise ValueError(
            f"{what} must have the shape {weight.shape} and the dtype {weight.dtype} of "
            f"the weight, got {made.shape} and {made.dtype}."
        )


def _with_sharding(abstract: QuantizedTensor, sharding: Any) -> QuantizedTensor:
    """Adds the shardings of its arrays to an abstract quantized weight."""
    shardings = placement.shardings(abstract, sharding)
    if shardings is None:
        return abstract
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )


def _values(leaf: Any) -> jax.Array:
    """The array of a dense leaf; reads it from its file if needed."""
    return jnp.asarray(leaf if hasattr(leaf, "__array__") else leaf[...])


def _is_slice(leaf: Any) -> bool:
    """Whether a leaf is a slice of a safetensors file, which has its own attributes."""
    return hasattr(leaf, "get_shape") and not hasattr(leaf, "shape")


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if _is_slice(leaf):
        shape, dtype = leaf.get_shape(), tensor_files.DTYPES.get(leaf.get_dtype())
        if dtype is None:
            raise TypeError(f"the file has the dtype {leaf.get_dtype()}, which JAX lacks.")
    else:
        shape, dtype = leaf.shape, leaf.dtype
    return jax.ShapeDtypeStruct(tuple(shape), jax.dtypes.canonicalize_dtype(dtype))


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, Tracer)
