"""The arrays of an adapter, from the layout of PEFT to that of this library, and back.

PEFT's factors are those of torch: `lora_A (r, in)`, `lora_B (out, r)`. NumPy throughout:
reading and writing turns axes round, and computes nothing.
"""

import math
from collections.abc import Mapping

import numpy as np

from lora_jax._io import tensor_files
from lora_jax.peft._entries import Kind

Arrays = Mapping[str, np.ndarray]


def from_peft(kind: Kind, axes: str, experts: int, arrays: Arrays) -> dict[str, np.ndarray]:
    """The entries of one module.

    Args:
        kind: of the module.
        axes: the letters of the axes of the module's weight, without those of a stack.
        experts: how many the factors are of; 0 for none.
        arrays: `A` and `B`, and `m` if there is one, as in the checkpoint.

    Returns:
        `A (in, r)` and `B (r, out)` and `m (out,)`, or `(experts, in, r)` and so on.
    """
    a, b = arrays["A"], arrays["B"]
    if kind == "experts":  # (experts * r, in) and (out, r * experts)
        rank = a.shape[0] // experts
        a = a.reshape(experts, rank, -1).transpose(0, 2, 1)
        b = b.reshape(-1, rank, experts).transpose(2, 1, 0)
        own = {"A": a, "B": b}
        return own if "b" in axes else {name: value[0] for name, value in own.items()}
    if kind == "convolution":  # (r, in, *kernel) and (out, r, 1, ...)
        if axes.endswith("o"):
            a = np.moveaxis(a, 1, -1)
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[:2])
    magnitude = {"m": arrays["m"].reshape(-1)} if "m" in arrays else {}
    return {"A": a.T, "B": b.T, **magnitude}


def to_peft(
    kind: Kind, axes: str, shape: tuple[int, ...], arrays: Arrays
) -> dict[str, np.ndarray]:
    """Undoes `from_peft`.

    Args:
        kind: of the module.
        axes: the letters of the axes of the module's weight, without those of a stack.
        shape: of that weight.
        arrays: `A` and `B`, and `m` if there is one.

    Returns:
        The entries as PEFT has them.
    """
    a, b = arrays["A"], arrays["B"]
    if kind == "experts":
        if "b" not in axes:
            a, b = a[None], b[None]
        *_, n_in, _ = a.shape
        *_, n_out = b.shape
        a, b = a.transpose(0, 2, 1), b.transpose(2, 1, 0)
        return {"A": a.reshape(-1, n_in), "B": b.reshape(n_out, -1)}
    entries = {"A": a.T, "B": b.T} | ({"m": arrays["m"]} if "m" in arrays else {})
    if kind == "convolution":
        rank = a.shape[-1]
        inner = [n for n, letter in zip(shape, axes, strict=True) if letter == "i"]
        entries["A"] = a.T.reshape(rank, *inner)
        if axes.endswith("o"):
            entries["A"] = np.moveaxis(entries["A"], -1, 1)
        ones = (1,) * (len(inner) - 1)
        entries["B"] = b.T.reshape(-1, rank, *ones)
        if "m" in entries:
            entries["m"] = entries["m"].reshape(1, -1, *ones)
    return entries


def stack(
    matrices: Mapping[tuple[int, ...], tuple[Arrays, float]], sizes: tuple[int, ...]
) -> tuple[dict[str, np.ndarray], float]:
    """Stacks the adapters of several modules, whose weights are stacked.

    A smaller rank is filled up with zeros, and where scales differ, `B` takes up the
    quotient: the update of each is what it was. Where there is no module, the update is 0.

    Args:
        matrices: `A`, `B`, and `m` if there is one, and the scale, by index in the stack.
        sizes: of the axes of the stack.

    Returns:
        The entries with the axes of the stack in front, and their scale.
    """
    scale = next(iter(matrices.values()))[1]
    rank = max(arrays["A"].shape[-1] for arrays, _ in matrices.values())
    dtypes: dict[str, set[np.dtype]] = {}
    for arrays, _ in matrices.values():
        for name, value in arrays.items():
            dtypes.setdefault(name, set()).add(value.dtype)
    stacked: dict[str, np.ndarray] = {}
    for index, (arrays, own) in matrices.items():
        for name, value in fill_up(arrays, rank, own / scale).items():
            value = tensor_files.cast(name, value, arrays[name].dtype)
            if name not in stacked:
                dtype = common_dtype(*dtypes[name])
                stacked[name] = np.zeros((*sizes, *value.shape), dtype)
            stacked[name][index] = value
    return stacked, scale


def in_order(arrays: Arrays, batch: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The entries of a stack with their first axes in the order of a weight's.

    Args:
        arrays: with the axes of the stack in front.
        batch: which axis of the weight each of these is.
    """
    order = [*map(int, np.argsort(batch))]
    return {
        name: value.transpose(*order, *range(len(order), value.ndim))
        for name, value in arrays.items()
    }


def common_dtype(*dtypes: np.dtype) -> np.dtype:
    """The dtype that holds the values of all; NumPy has none for the two of 16 bits."""
    if len({dtype for dtype in dtypes if dtype.itemsize == 2}) > 1:
        dtypes = (*(d for d in dtypes if d.itemsize != 2), np.dtype(np.float32))
    return np.result_type(*dtypes)


def fill_up(arrays: Arrays, rank: int, factor: float) -> dict[str, np.ndarray]:
    """An adapter at a larger rank, with a factor in its `B`.

    Args:
        arrays: the entries.
        rank: at least that of the adapter; the rest is zeros.
        factor: of the update. Where it is not 1, `B` is float64, not rounded yet.
    """
    filled = dict(arrays)
    missing = rank - arrays["A"].shape[-1]
    a, b = arrays["A"], arrays["B"]
    if missing:
        filled["A"] = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)])
        filled["B"] = np.pad(b, [(0, 0)] * (b.ndim - 2) + [(0, missing), (0, 0)])
    if not math.isclose(factor, 1, rel_tol=1e-12):
        filled["B"] = filled["B"].astype(np.float64) * factor
    return filled
