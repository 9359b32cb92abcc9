"""Params with some of their weights in few bits, made one leaf after the other."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer

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

Patterns = AdapterPlan | tree_paths.Pattern | Iterable[tree_paths.Pattern]
Quantize = Callable[..., QuantizedTensor]
Format = Literal["nf4", "int8", "fp8"] | Quantize

_FORMATS: dict[str, Quantize] = {
    "nf4": quantize_nf4,
    "int8": quantize_int8,
    "fp8": quantize_fp8,
}
_NO_SETTINGS = ("weight", "batch_axes")  # arguments that come with each leaf
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

    One after the other, each dense only while it is its turn: with leaves that are read
    from a file when they are needed, or with `donate`, the dense and the quantized model
    are never in memory together. With a format that has a name, all shapes and dtypes are
    checked first.

    Args:
        params: a pytree. Leaves to quantize are float32, bfloat16 or float16: arrays of
            JAX or NumPy, memory-mapped ones too; anything with a shape, a dtype, and
            `__array__` or `[...]`; slices of a safetensors file; or
            `jax.ShapeDtypeStruct`s, which give abstract quantized leaves.
        patterns: of paths, as in `LoraConfig`, or one pattern; or a plan, for the weights
            that it adapts.
        format: `"nf4"`, `"int8"` or `"fp8"`; or a function called as
            `format(weight, batch_axes=n)`, which returns a quantized tensor.
        batch_axes: how many leading axes of a weight are a stack of weights (layers,
            experts), each quantized on its own: pattern to number, or one number for all.
            Of others the plan says it, by the batch axes that lead, and without a plan
            there is no stack. A stack that is quantized as one weight is right, and dense
            as a whole wherever a layer of it is used, also in each step of a scan.
        plan: whose batch axes those are, if the patterns are not a plan.
        donate: delete each leaf that is an array of JAX as soon as it is quantized; those
            before it are gone if an error is raised. Without effect inside `jax.jit`.
        settings: of the format that has a name, such as `block_size` or `codec`: see
            `lora_jax.quant.quantize_nf4` and `lora_jax.quant.quantize_int8`.

    Returns:
        A tree like `params`, in which those leaves are quantized tensors and all others
        the same objects. The arrays of a sharded weight are sharded as it is, from the
        start: the codes of `"int8"` and `"fp8"` and what goes with each output always;
        `"nf4"`, and scales of blocks, wherever each shard is a whole number of blocks.
        Where it is not, NF4 writes a warning to the logger `"lora_jax"` that says which
        block sizes would do. Inside `jax.jit` that is so on a mesh with explicit axes, and
        else the compiler's choice.

    Raises:
        KeyError: if params lack a weight of the plan.
        TypeError: if a leaf is quantized already or is no such array, the format is no
            name or function or returns something else, or does not take a setting.
        ValueError: if a pattern matches nothing or there is none, a weight does not fit
            the format or has entries that are not finite (outside of a trace), or an
            array to donate is at two paths or deleted.

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
        plan_checks.check_none_is_shared(leaves, paths, "quantize with donate=False")
    stored = {}
    for path, count in counts.items():
        with _refusing(path):
            stored[path] = _stored(quantize, leaves[path], count)
        if donate and isinstance(leaves[path], jax.Array) and not _is_traced(leaves[path]):
            leaves[path].delete()
    return treedef.unflatten((leaves | stored).values())


def _quantizer(format: Format, settings: Mapping[str, Any]) -> Quantize:
    """The function that a format and its settings come to."""
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
            f"settings are for a format that has a name, got {', '.join(settings)}: give "
            "them to the function, with functools.partial."
        )
    return format


def _chosen(leaves: Mapping[str, Any], patterns: Patterns) -> list[str]:
    """The paths of the weights to quantize, in order."""
    if isinstance(patterns, AdapterPlan):
        return list(patterns.targets)
    if isinstance(patterns, Iterable) and not isinstance(patterns, str | Mapping):
        patterns = tuple(patterns)
    texts = tree_paths.as_texts("patterns", patterns)
    if not texts:
        raise ValueError("patterns is empty: give those of the weights to quantize.")
    if ALL_LINEAR in texts:
        raise ValueError(
            f"patterns={ALL_LINEAR!r} needs a function to find them: give the plan that "
            "plan_adapters makes with it."
        )
    tree_paths.check_matched("patterns", texts, leaves, "leaf")
    return [path for path in leaves if tree_paths.first_match(texts, path)]


def _plan_of(
    patterns: Patterns, plan: AdapterPlan | None, leaves: Mapping[str, Any]
) -> AdapterPlan | None:
    """The plan that was given, as patterns or besides them."""
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
    """How many leading axes of each weight are a stack."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(paths, given)
    texts = {tree_paths.as_text("batch_axes", pattern): n for pattern, n in given.items()}
    tree_paths.check_matched("batch_axes", texts, paths, "weight to quantize")
    targets = {} if plan is None else plan.targets
    letters = {path: targets[path].axes if path in targets else "" for path in paths}
    leading = {path: len(axes) - len(axes.lstrip("b")) for path, axes in letters.items()}
    return {path: tree_paths.look_up(texts, path, leading[path]) for path in paths}


@contextlib.contextmanager
def _refusing(path: str) -> Iterator[None]:
    """Puts the path in front of an error, and behind it how to leave the leaf out."""
    with checks.at_path(path):
        try:
            yield
        except (TypeError, ValueError) as error:
            # A function may raise a subclass, which cannot be made of a message.
            kind = TypeError if isinstance(error, TypeError) else ValueError
            advice = "To keep the leaf as it is, let no pattern match it."
            raise kind(f"{error} {advice}") from error


def _check_leaf(leaf: Any) -> None:
    """Raises unless it is a dense array of any kind, with values or abstract."""
    if is_quantized(leaf):
        raise TypeError(f"the weight is quantized already: {leaf!r}.")
    if _is_slice(leaf):
        return
    checks.check_abstract_array("the weight", leaf)
    if isinstance(leaf, jax.Array) and not _is_traced(leaf):
        checks.check_not_deleted("the weight", leaf)


def _check_fits(quantize: Quantize, leaf: Any, count: int) -> None:
    """Raises if a format with a name does not take a weight of that shape and dtype."""
    jax.eval_shape(functools.partial(quantize, batch_axes=count), _abstract(leaf))


def _stored(quantize: Quantize, leaf: Any, count: int) -> QuantizedTensor:
    """A leaf, quantized."""
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
    if any(compat.explicit_spec(weight)):  # there the format sees no values
        inputs.check_weight(weight, count)
    return jax.block_until_ready(placement.keep_sharding(store, weight)[0])


def _for_sharding(quantize: Quantize, leaf: Any, count: int) -> Quantize:
    """NF4 in rows that can be sharded as the leaf is; any other format as it is.

    The format itself knows the sharding of arrays that have values, and no other.
    """
    if not isinstance(quantize, functools.partial) or quantize.func is not quantize_nf4:
        return quantize
    if _is_slice(leaf) or quantize.keywords.get("row_axes") is not None:
        return quantize
    block = quantize.keywords.get("block_size", BLOCK_SIZE)
    parts = placement.parts(leaf)[count:]
    return functools.partial(quantize, row_axes=rows_for(leaf.shape[count:], block, parts))


def _check_made(made: Any, weight: jax.Array) -> None:
    """Raises unless a function made a quantized tensor of the weight."""
    what = "what the function given as format returned"
    if not is_quantized(made):
        raise TypeError(f"{what} must be a QuantizedTensor, got {type(made).__name__}.")
    if made.shape != weight.shape or made.dtype != weight.dtype:
        raise ValueError(
            f"{what} must have the shape {weight.shape} and the dtype {weight.dtype} of "
            f"the weight, got {made.shape} and {made.dtype}."
        )


def _with_sharding(abstract: QuantizedTensor, sharding: Any) -> QuantizedTensor:
    """An abstract quantized weight, with the shardings of its arrays."""
    shardings = placement.shardings(abstract, sharding)
    if shardings is None:
        return abstract
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )


def _values(leaf: Any) -> jax.Array:
    """A dense leaf, read if it is not in memory yet."""
    return jnp.asarray(leaf if hasattr(leaf, "__array__") else leaf[...])


def _is_slice(leaf: Any) -> bool:
    """Whether it is a slice of a safetensors file, which names shape and dtype its way."""
    return hasattr(leaf, "get_shape") and not hasattr(leaf, "shape")


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if _is_slice(leaf):
        shape, dtype = leaf.get_shape(), tensor_files.DTYPES.get(leaf.get_dtype())
        if dtype is None:
            raise TypeError(f"the dtype {leaf.get_dtype()} of the file is none of JAX's.")
    else:
        shape, dtype = leaf.shape, leaf.dtype
    return jax.ShapeDtypeStruct(tuple(shape), jax.dtypes.canonicalize_dtype(dtype))


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, Tracer)
