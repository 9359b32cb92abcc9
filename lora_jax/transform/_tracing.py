"""Traces a function to a jaxpr; arguments that are not arrays stay static."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from lora_jax._core import checks, compat, placement, quantized, tree_paths

Function: TypeAlias = Callable[..., Any]


class Traced(NamedTuple):
    """A function, traced for its arguments.

    Attributes:
        jaxpr: the closed jaxpr. Quantized weights are dense arguments of it.
        arguments: the arrays and quantized weights among the function's arguments, in the
            order of the jaxpr's arguments.
        paths: the path in the params of each argument; None for other arguments.
        names: the name of each argument, for messages.
        result: from the outputs of the jaxpr, what the function returns.
    """

    jaxpr: Any
    arguments: list[Any]
    paths: list[str | None]
    names: list[str]
    result: Callable[[Sequence[Any]], Any]

    def check_values(self) -> None:
        """Raises if an argument has no values, such as a `jax.ShapeDtypeStruct`."""
        for name, value in zip(self.names, self.arguments, strict=True):
            checks.check_has_values(name, value)

    @property
    def types(self) -> list[Any]:
        """The types of the arguments in the program."""
        jaxpr, _ = compat.open_jaxpr(self.jaxpr)
        return [atom.aval for atom in jaxpr.invars]

    @property
    def unused(self) -> set[str]:
        """The paths of arrays that the function neither uses nor returns."""
        jaxpr, _ = compat.open_jaxpr(self.jaxpr)
        atoms = [atom for equation in jaxpr.eqns for atom in equation.invars]
        used = set(map(id, (*atoms, *jaxpr.outvars)))
        pairs = zip(self.paths, jaxpr.invars, strict=True)
        return {path for path, atom in pairs if path and id(atom) not in used}


def is_array(value: Any) -> bool:
    """Whether a leaf is traced: arrays are, Python and NumPy numbers are not.

    NumPy arrays of objects, strings or dates are not traced: JAX does not support them.
    """
    if isinstance(value, np.ndarray):
        return checks.has_jax_dtype(value)
    return isinstance(value, jax.Array | jax.ShapeDtypeStruct)


_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
_HINT = (
    "lora_jax traces the function as jax.jit does, so the values of arrays in params and "
    "arguments are not known: decide by Python values, or with jax.lax.cond."
)


def trace(
    function: Function, params: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Traced:
    """Traces `function(params, *args, **kwargs)`.

    Functions, flags, strings and numbers stay static, in arguments and in results. The
    constants of the jaxpr may be values of an outer trace, so it must not be cached.

    Raises:
        TypeError: if an array has a byte order that JAX does not support.
    """
    by_path = tree_paths.leaf_paths(params)
    with_keys, tree = jax.tree_util.tree_flatten_with_path(
        (params, args, dict(kwargs)), is_leaf=quantized.is_quantized
    )
    leaves = [leaf for _, leaf in with_keys]
    positions = [
        i for i, leaf in enumerate(leaves) if is_array(leaf) or quantized.is_quantized(leaf)
    ]
    paths = [*by_path, *[None] * (len(leaves) - len(by_path))]
    names = [paths[i] or _name(key) for i, (key, _) in enumerate(with_keys)]
    for i in positions:
        checks.check_byte_order(names[i], leaves[i])
    returned: list[tuple[Any, list[Any]]] = []

    def flat(*arrays):
        filled = list(leaves)
        for position, array in zip(positions, arrays, strict=True):
            filled[position] = array
        params, args, kwargs = jax.tree.unflatten(tree, filled)
        outputs, out_tree = jax.tree.flatten(function(params, *args, **kwargs))
        static = [None if is_array(leaf) else (leaf,) for leaf in outputs]
        returned.append((out_tree, static))
        return [leaf for leaf in outputs if is_array(leaf)]

    arguments = [placement.varying_with(leaves[i]) for i in positions]
    try:
        with jax.disable_jit(False):  # otherwise control flow would need values
            jaxpr = jax.make_jaxpr(flat)(*map(placement.as_abstract, arguments))
    except _NEEDS_VALUES as error:
        error.add_note(_HINT)
        raise
    except TypeError as error:
        if not (static_arrays := _not_of_jax(names, leaves)):
            raise
        raise TypeError(
            f"{error}\nThe function was given arrays that JAX does not support, "
            f"{', '.join(static_arrays)}: they reach the function unchanged. If it "
            "computes with one, convert it to an array of numbers, for example with "
            "np.asarray(values, 'float32')."
        ) from error
    ((out_tree, static),) = returned

    def result(outputs):
        left = iter(outputs)
        filled = [next(left) if leaf is None else leaf[0] for leaf in static]
        return jax.tree.unflatten(out_tree, filled)

    return Traced(
        jaxpr,
        arguments,
        [paths[i] for i in positions],
        [names[i] for i in positions],
        result,
    )


def _not_of_jax(names: Sequence[str], leaves: Sequence[Any]) -> list[str]:
    """The names and dtypes of the NumPy arrays that JAX does not support."""
    return [
        f"{name} (dtype {leaf.dtype})"
        for name, leaf in zip(names, leaves, strict=True)
        if isinstance(leaf, np.ndarray) and not is_array(leaf)
    ]


def _name(key: tuple[Any, ...]) -> str:
    """The name of a leaf of `(params, args, kwargs)`, given its key path."""
    return ("params", "args", "kwargs")[key[0].idx] + jax.tree_util.keystr(key[1:])
