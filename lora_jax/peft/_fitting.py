"""Which axes of a weight are those of a module: by the shapes of both."""

import math
from collections.abc import Iterator
from typing import Literal

from lora_jax.peft._entries import Dims, Kind

Layout = Literal["jax", "torch"]
LAYOUTS = ("jax", "torch")

# Axes that a checkpoint has a module for each index of: layers, and layers with experts.
_MOST_STACKED = 2


def fitting_axes(
    shape: tuple[int, ...],
    kind: Kind,
    dims: Dims,
    layout: Layout,
    *,
    fan_in_fan_out: bool = False,
    stacked: int = 0,
) -> str | None:
    """One letter for each axis of a weight, if it can be that of a module.

    Args:
        shape: of the weight.
        kind: of the module.
        dims: the sizes that the module has.
        layout: `"jax"` or `"torch"`.
        fan_in_fan_out: what decides where a square torch weight may lie either way.
        stacked: how many axes the weight has that are indexes of modules. They are in
            front, or if there is one, wherever the shape leaves it.

    Returns:
        The letters of `LoraConfig.axes`; None if the shape does not fit.
    """
    for positions in _positions(len(shape), stacked):
        rest = tuple(n for axis, n in enumerate(shape) if axis not in positions)
        letters = _unstacked(rest, kind, dims, layout, fan_in_fan_out)
        if letters is not None:
            own = iter(letters)
            return "".join("b" if a in positions else next(own) for a in range(len(shape)))
    return None


def axes_fit(shape: tuple[int, ...], axes: str, dims: Dims, stacked: int) -> bool:
    """Whether a weight, with the letters of its axes, has the sizes of a module.

    Args:
        shape: of the weight.
        axes: one letter for each axis, as in `LoraConfig.axes`.
        dims: the sizes that the module has.
        stacked: how many of the batch axes, the first, are indexes of modules.
    """
    if len(axes) != len(shape):
        return False
    sizes = {letter: [] for letter in "iob"}
    for letter, size in zip(axes, shape, strict=True):
        sizes[letter].append(size)
    experts = sizes["b"][stacked:]
    return (
        math.prod(sizes["i"]) == dims.n_in * math.prod(dims.kernel)
        and math.prod(sizes["o"]) == dims.n_out
        and (experts == [dims.experts] or (not experts and dims.experts < 2))
    )


def _positions(ndim: int, stacked: int) -> Iterator[tuple[int, ...]]:
    if stacked > _MOST_STACKED or stacked >= ndim:
        return
    yield tuple(range(stacked))
    if stacked == 1:
        yield from ((axis,) for axis in range(1, ndim))


def _unstacked(
    shape: tuple[int, ...], kind: Kind, dims: Dims, layout: Layout, fan_in_fan_out: bool
) -> str | None:
    """The letters of a weight of one module."""
    if kind == "convolution":
        return _convolution(shape, dims, layout)
    if kind == "experts":
        return _experts(shape, dims, layout)
    if kind == "embedding" or layout == "jax":
        return _in_out(shape, dims)
    straight, turned = _in_out(shape, dims), _out_in(shape, dims)
    if straight and turned:
        return straight if fan_in_fan_out else turned
    return straight or turned


def _in_out(shape: tuple[int, ...], dims: Dims) -> str | None:
    """Some axes in, the others out: `(in, out)`, `(d, heads, k)`, `(heads, k, d)`."""
    for split in range(1, len(shape)):
        if math.prod(shape[:split]) == dims.n_in and math.prod(shape[split:]) == dims.n_out:
            return "i" * split + "o" * (len(shape) - split)
    return None


def _out_in(shape: tuple[int, ...], dims: Dims) -> str | None:
    return "oi" if shape == (dims.n_out, dims.n_in) else None


def _convolution(shape: tuple[int, ...], dims: Dims, layout: Layout) -> str | None:
    """`(*kernel, in, out)` in JAX, `(out, in, *kernel)` in torch."""
    inner = "i" * (len(dims.kernel) + 1)
    if layout == "jax":
        return inner + "o" if shape == (*dims.kernel, dims.n_in, dims.n_out) else None
    return "o" + inner if shape == (dims.n_out, dims.n_in, *dims.kernel) else None


def _experts(shape: tuple[int, ...], dims: Dims, layout: Layout) -> str | None:
    """`(experts, in, out)`, or `(experts, out, in)` in torch; one expert may have no axis.

    PEFT takes `(experts, out, in)` unless the module says that it is transposed, which a
    checkpoint does not: where both fit, none does.
    """
    if dims.experts == 1 and len(shape) == 2:
        shape = (1, *shape)
        letters = _experts(shape, dims, layout)
        return letters and letters[1:]
    straight = shape == (dims.experts, dims.n_in, dims.n_out)
    if layout == "jax":
        return "bio" if straight else None
    turned = shape == (dims.experts, dims.n_out, dims.n_in)
    if straight == turned:
        return None
    return "bio" if straight else "boi"
