"""What a compiled program does, read from XLA's text."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_BITS = re.compile(r"(?:bf|[a-z])(\d+)")
# A product that a library computes: cuBLAS on a GPU, oneDNN on a CPU.
_PRODUCT = re.compile(r'custom_call_target="__(?:cublas\$(?:gemm|lt\$)|onednn\$matmul)')
_ADDEND = re.compile(r'"beta":(?!0(?:\.0)?\b)')


KERNELS = ("add", "custom-call", "dot", "fusion")


class Array(NamedTuple):
    """An array of a program, as it is on one device."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        found = _BITS.match(self.dtype)
        return self.size * (int(found[1]) if found else 8) // 8


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    arrays: list[Array]
    opcode: str
    operands: list[str]
    attributes: str

    @property
    def called(self) -> list[str]:
        """What may be the name of a computation that it calls."""
        return _OPERAND.findall(self.attributes)

    @property
    def size(self) -> int:
        """The number of entries of the largest array."""
        return max((array.size for array in self.arrays), default=0)


Computations = Mapping[str, list[Instruction]]


def read(text: str) -> Computations:
    """The instructions of every computation of a compiled program, by its name."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if match := _COMPUTATION.fullmatch(line):
            current = found.setdefault(match[1], [])
        elif match := _INSTRUCTION.match(line):
            name, result, opcode, rest = match.groups()
            arrays = [
                Array(dtype, tuple(map(int, filter(None, sizes.split(",")))))
                for dtype, sizes in _ARRAY.findall(result)
            ]
            operands, _, attributes = rest.partition(")")
            operands = _OPERAND.findall(operands)
            current.append(Instruction(name, arrays, opcode, operands, attributes))
    return found


def count_sums(text: str, size: int) -> dict[str, int]:
    """How a compiled program adds to products that are arrays of at least `size` entries.

    Returns:
        The number of `"products"`; how many of them are `"accumulated"`, that is, add
        another array in the same kernel (`beta` of a GEMM, or a fusion of product and
        sum); and the number of `"passes"`: kernels that add such arrays and multiply none.
    """
    found = read(text)
    instructions = [one for body in found.values() for one in body]
    fused = {n for one in instructions if one.opcode == "fusion" for n in one.called}
    counts: dict[str, int] = {"products": 0, "accumulated": 0, "passes": 0}
    for name in found.keys() - fused:
        for one in found[name]:
            if one.size < size or one.opcode not in KERNELS:
                continue
            inside = [i for i in _inside(one, found) if i.size >= size]
            products = [i for i in inside if _is_product(i)]
            adds = any(i.opcode == "add" for i in inside)
            adds |= any(_ADDEND.search(i.attributes) for i in products)
            counts["products"] += bool(products)
            counts["accumulated" if products else "passes"] += adds
    return counts


def _inside(one: Instruction, found: Computations) -> Iterator[Instruction]:
    yield one
    if one.opcode == "fusion":
        for name in one.called:
            for inner in found.get(name, ()):
                yield from _inside(inner, found)


def _is_product(one: Instruction) -> bool:
    return one.opcode == "dot" or bool(_PRODUCT.search(one.attributes))
