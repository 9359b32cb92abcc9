"""What a compiled program makes and keeps: read from XLA's text, and from shapes."""

import math
import re
from typing import NamedTuple

import jax

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")
_ARRAY = re.compile(r"[a-z]\w*\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")


class Instruction(NamedTuple):
    """One line of a computation; `size` is the number of entries of its largest array."""

    name: str
    size: int
    opcode: str
    operands: list[str]
    fused: str | None


def _instruction(match):
    name, result, opcode, rest = match.groups()
    sizes = [
        math.prod(map(int, filter(None, s.split(",")))) for s in _ARRAY.findall(result)
    ]
    called = re.search(r"calls=%?([\w.\-]+)", rest) if opcode == "fusion" else None
    operands = _OPERAND.findall(rest.split(")")[0])
    return Instruction(name, max(sizes, default=0), opcode, operands, called and called[1])


def computations(text):
    """The instructions of every computation of a compiled program, by its name."""
    found, current = {}, []
    for line in text.splitlines():
        if match := _COMPUTATION.fullmatch(line):
            current = found.setdefault(match[1], [])
        elif match := _INSTRUCTION.match(line):
            current.append(_instruction(match))
    return found


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
    found = computations(text)
    inside = {one.fused for body in found.values() for one in body}
    made = set()
    for name, body in found.items():
        if name in inside:
            continue
        by_name = {one.name: one for one in body}
        for one in body:
            if one.size >= size and not _is_there_already(one, by_name):
                made |= {(one.size, opcode) for opcode in _opcodes(one, found, size)}
    return made


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


def number_of_bytes(tree):
    """Of all arrays of a tree, keys of `jax.random` included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
