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


_TRIPS = re.compile(r'known_trip_count":{"n":"(\d+)"')
COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all"
    r"|collective-permute|collective-broadcast)(-start)?"
)
# What moves or splits entries without computing any.
_VIEWS = {"all-gather", "bitcast", "collective-permute", "copy", "dynamic-slice"}
_VIEWS |= {"reshape", "slice", "transpose"}
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
    def fused(self) -> str | None:
        """The computation of a fusion; None for any other instruction."""
        found = re.search(r"calls=%?([\w.\-]+)", self.attributes)
        return found[1] if found and self.opcode == "fusion" else None

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


class Collective(NamedTuple):
    """An exchange of arrays between devices.

    Attributes:
        kind: the opcode, such as `"all-gather"`.
        nbytes: of the results on one device.
        group: the number of devices that exchange with each other.
        times: how often the program does it.
        branch: whether it is in a branch, and so may not happen at all.
    """

    kind: str
    nbytes: int
    group: int
    times: int
    branch: bool

    @property
    def moved(self) -> float:
        """The bytes that a device sends in all, if the devices of a group form a ring."""
        share = {
            "all-reduce": 2 * (self.group - 1) / self.group,
            "reduce-scatter": self.group - 1,
            "collective-permute": 1,
        }.get(self.kind, (self.group - 1) / self.group)
        return self.times * self.nbytes * share


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program.

    XLA on the CPU multiplies and sums 16-bit arrays in float32, and widens some of them
    before it exchanges them. Such arrays count with the 16 bits that they have on other
    devices.

    Raises:
        ValueError: if a collective is in a loop without a known number of iterations, or
            its group of devices cannot be read.
    """
    found = read(text)
    header = re.search(r"num_partitions=(\d+)", text)
    devices = int(header[1]) if header else 1
    result = []
    for one, body, times, branch in calls(found):
        if match := COLLECTIVE.fullmatch(one.opcode):
            nbytes = _exchanged(one, match, body, found)
            group = _group(one, devices)
            result.append(Collective(match[1], nbytes, group, times, branch))
    return result


def _exchanged(
    one: Instruction, match: re.Match[str], body: list[Instruction], found: Computations
) -> int:
    arrays = one.arrays
    if match[2] and match[1] != "all-reduce":  # the operands come before the results
        arrays = arrays[len(arrays) // 2 :]
    by_name = {other.name: other for other in body}
    operands = [by_name[name] for name in one.operands]
    if len(operands) != len(arrays):
        raise ValueError(f"{one.opcode} {one.name} has other operands than results.")
    # The name of the sum says it too, but not which of several arrays is meant.
    total, promoted = 0, len(arrays) == 1 and "_promoted" in one.attributes
    for operand, array in zip(operands, arrays, strict=True):
        widened = promoted or _is_widened(operand, by_name, found)
        total += array.nbytes // (2 if widened and array.dtype == "f32" else 1)
    return total


def _is_widened(
    one: Instruction, by_name: Mapping[str, Instruction], found: Computations
) -> bool:
    """Whether a float32 array is a 16-bit one, converted."""
    if one.opcode in _VIEWS:
        return _is_widened(by_name[one.operands[0]], by_name, found)
    if one.opcode == "convert":
        return by_name[one.operands[0]].arrays[0].dtype in ("bf16", "f16")
    if one.opcode == "fusion":
        body = found[next(name for name in one.called if name in found)]
        return _is_widened(body[-1], {other.name: other for other in body}, found)
    return False


def _group(one: Instruction, devices: int) -> int:
    """The number of devices in a group of a collective, in each of the ways to write it."""
    if "source_target_pairs" in one.attributes:
        return 2
    groups = one.attributes.partition("replica_groups=")[2]
    if match := re.match(r"\[\d+,(\d+)\]", groups):
        return int(match[1])
    if match := re.match(r"\{\{([\d,]+)\}", groups):
        return len(match[1].split(","))
    if groups.startswith("{}"):
        return devices
    match = re.match(r"mesh\[(.*?)\][^{]*\{(.*?)\}", groups)
    if match is None:
        raise ValueError(f"the groups of {one.opcode} {one.name} cannot be read.")
    sizes = dict(re.findall(r"('\w+')=(\d+)", match[1]))
    axes = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", match[2])
    return math.prod(int(part or sizes[name]) for name, part in axes)


class Call(NamedTuple):
    """An instruction, its computation, how often it runs, and whether in a branch."""

    one: Instruction
    body: list[Instruction]
    times: int
    branch: bool


def calls(found: Computations) -> Iterator[Call]:
    """Every instruction of a program, as often as its computation is called.

    Raises:
        ValueError: if a loop has collectives and no known number of iterations.
    """
    called = {n for body in found.values() for one in body for n in one.called}

    def visit(name, times, branch):
        for one in found[name]:
            yield Call(one, found[name], times, branch)
            trips = _TRIPS.search(one.attributes)
            n, below = int(trips[1]) if trips else 1, branch or one.opcode == "conditional"
            for inner in {n for n in one.called if n in found}:
                inside = list(visit(inner, times * n, below))
                exchanges = any(COLLECTIVE.fullmatch(call.one.opcode) for call in inside)
                if one.opcode == "while" and not trips and exchanges:
                    raise ValueError(f"the number of iterations of {one.name} is unknown.")
                yield from inside

    for name in found.keys() - called:
        yield from visit(name, 1, False)
