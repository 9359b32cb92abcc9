"""What a compiled program makes, moves and keeps: read from XLA's text, and from shapes."""

import collections
import math
import pathlib
import re
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))
import _programs as hlo


class Collective(NamedTuple):
    """One array that devices exchange; `shape` is that of the result on one device."""

    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self):
        """The bytes of the result on one device."""
        return hlo.Array(self.dtype, self.shape).nbytes


def collectives(text):
    """How often a compiled program exchanges arrays, `Counter` of `Collective`.

    A collective in a loop counts as often as the loop runs, one in a branch once. Each
    array of a combined collective counts by itself.
    """
    found = collections.Counter()
    for one, _, times, _ in hlo.calls(hlo.read(text)):
        if match := hlo.COLLECTIVE.fullmatch(one.opcode):
            kind, start = match.groups()
            arrays = one.arrays
            if start and kind != "all-reduce":  # the operands come before the results
                arrays = arrays[len(arrays) // 2 :]
            for array in arrays:
                found[Collective(kind, *array)] += times
    return found


def product_flops(text, *, branches=True):
    """The operations of all products of a compiled program, those of loops included.

    Those in the branches of a condition all count, or without `branches` none of them.
    """
    total = 0
    for one, body, times, in_branch in hlo.calls(hlo.read(text)):
        if one.opcode == "dot" and (branches or not in_branch):
            (left,) = (other.arrays[0] for other in body if other.name == one.operands[0])
            (summed,) = re.findall(r"lhs_contracting_dims={([\d,]*)}", one.attributes)
            sizes = [left.shape[int(i)] for i in summed.split(",") if i]
            total += 2 * one.size * math.prod(sizes) * times
    return total


def large_arrays(text, size):
    """How a program makes its arrays of at least `size` entries.

    Args:
        text: of a compiled program.
        size: a number of entries.

    Returns:
        Pairs of the number of entries and what computes them, a set. Arguments of the
        program or of a loop are not made, and neither are views of them. What a fusion
        has inside is not in memory, but the operations there say what it computes.
    """
    found = hlo.read(text)
    return {
        (one.size, opcode)
        for one in _made(found)
        if one.size >= size
        for opcode in _opcodes(one, found, size)
    }


def made_shapes(text):
    """The shapes of all arrays that a program makes, as `large_arrays` has it."""
    return [array.shape for one in _made(hlo.read(text)) for array in one.arrays]


def _made(found):
    inside = {one.fused for body in found.values() for one in body}
    for name, body in found.items():
        by_name = {one.name: one for one in body}
        if name not in inside:
            yield from (one for one in body if not _is_there_already(one, by_name))


def _is_there_already(one, by_name):
    if one.opcode in ("parameter", "tuple", "while", "conditional", "call"):
        return True  # what leaves a loop is a get-tuple-element of it, and is counted
    if one.opcode in ("get-tuple-element", "bitcast"):
        source = by_name[one.operands[0]]
        return source.opcode == "parameter" or (
            source.opcode in ("get-tuple-element", "bitcast")
            and _is_there_already(source, by_name)
        )
    return False


def _opcodes(one, found, size):
    if one.fused is None:
        return {one.opcode}
    body = found[one.fused]
    views = {"parameter", "bitcast", "tuple"}
    return {i.opcode for i in body if i.size >= size} - views or {"copy"}


def kept(loss, trained, *rest):
    """Shapes and dtypes that the forward pass keeps for the gradient of `trained`."""

    def pull(trained, *rest):
        return jax.vjp(lambda trained: loss(trained, *rest), trained)[1]

    leaves = jax.tree.leaves(jax.eval_shape(pull, trained, *rest))
    return [(leaf.shape, leaf.dtype) for leaf in leaves]


def floats(kept):
    """The shapes of those arrays of real numbers that a forward pass keeps."""
    return [shape for shape, dtype in kept if jnp.issubdtype(dtype, jnp.floating)]


def float_shapes(program):
    """The shapes of all arrays of real numbers in the text of a program or a jaxpr."""
    found = re.findall(r"\b(?:f64|f32|bf16|f16)\[([\d,]+)\]", str(program))
    return [tuple(map(int, shape.split(","))) for shape in found]


def are_weights(shapes, plan):
    """Those that are shaped as an adapted weight, its part or an entry of a stack.

    In any order of the axes.
    """
    wanted = set()
    for target in (own for t in plan.targets.values() for own in (t, t.alone)):
        entry = [n for i, n in enumerate(target.shape) if i not in target.batch_axes]
        wanted |= {_sides(target.shape), _sides(entry)}
    return [shape for shape in shapes if _sides(shape) in wanted]


def _sides(shape):
    return tuple(sorted(n for n in shape if n > 1))


def equations(jaxpr):
    """All equations of a jaxpr, also inside calls and loops."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def flops(compiled):
    """The floating-point operations of a compiled program."""
    analysis = compiled.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def temporary(compiled):
    """The bytes of temporary memory of a compiled program."""
    return compiled.memory_analysis().temp_size_in_bytes


def number_of_bytes(tree):
    """Of all arrays of a tree, keys of `jax.random` included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
