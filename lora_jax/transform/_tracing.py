"""Traces a function to a jaxpr, with everything that is not an array left as it is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax._core import checks, compat, placement, quantized, tree_paths

Function = Callable[..., Any]


class Traced(NamedTuple):
    """A function, traced for its arguments.

    Attributes:
        jaxpr: closed.
        arguments: the arrays among the arguments, in the order of the jaxpr's, and
            quantized weights, which are dense in there.
        paths: the path in the params of each argument; None for those not in there.
        names: of the arguments, in messages.
        result: makes what the function returns of the outputs of the jaxpr.
    """

    jaxpr: Any
    arguments: list[Any]
    paths: list[str | None]
    names: list[str]
    result: Callable[[Sequence[Any]], Any]

    def check_values(self) -> None:
        """Raises if an argument has no values to compute with."""
        for name, value in zip(self.names, self.arguments, strict=True):
            checks.check_has_values(name, value)

    @property
    def types(self) -> list[Any]:
        """The types of the arguments in the program."""
        jaxpr, _ = compat.open_jaxpr(self.jaxpr)
        return [atom.aval for atom in jaxpr.invars]

    @property
    def unused(self) -> set[str]:
        """The paths of arrays that no equation of the function takes."""
        jaxpr, _ = compat.open_jaxpr(self.jaxpr)
        atoms = [atom for equation in jaxpr.eqns for atom in equation.invars]
        used = set(map(id, (*atoms, *jaxpr.outvars)))
        pairs = zip(self.paths, jaxpr.invars, strict=True)
        return {path for path, atom in pairs if path and id(atom) not in used}


def is_array(value: Any) -> bool:
    """Whether a leaf is traced: arrays are, Python and NumPy numbers are not.

    Neither are NumPy arrays of objects, strings or dates, of which JAX has none.
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
    "lora_jax traces the function, so the values of arrays in params and arguments are not "
    "known in it, as under jax.jit: decide by Python values, or with jax.lax.cond."
)


def trace(
    function: Function, params: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Traced:
    """Traces `function(params, *args, **kwargs)`.

    Functions, flags, strings and numbers stay static, in arguments and in results. The
    constants of the jaxpr may be values of an outer trace, so it is not kept.

    Raises:
        TypeError: if an array has a byte order that JAX does not take.
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

    arguments = [leaves[i] for i in positions]
    try:
        with jax.disable_jit(False):  # else control flow would need values
            jaxpr = jax.make_jaxpr(flat)(*map(placement.as_abstract, arguments))
    except _NEEDS_VALUES as error:
        error.add_note(_HINT)
        raise
    except TypeError as error:
        if not (static_arrays := _not_of_jax(names, leaves)):
            raise
        raise TypeError(
            f"{error}\nOf the arrays that the function was given, JAX cannot have "
            f"{', '.join(static_arrays)}: they reach the function unchanged. If it "
            "computes with one, make it an array of numbers, for example with "
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
    """The NumPy arrays of which JAX has no counterpart, by name and dtype."""
    return [
        f"{name} (dtype {leaf.dtype})"
        for name, leaf in zip(names, leaves, strict=True)
        if isinstance(leaf, np.ndarray) and not is_array(leaf)
    ]


def _name(key: tuple[Any, ...]) -> str:
    """The name of a leaf of `(params, args, kwargs)`, from its key there."""
    return ("params", "args", "kwargs")[key[0].idx] + jax.tree_util.keystr(key[1:])
