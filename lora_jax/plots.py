"""Pictures of plans and adapters: heat maps over layers and modules, and spectra."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_jax._core import tree_paths
from lora_jax.layers.lora import Adapter
from lora_jax.plan import parts, plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.target import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_plan", "plot_spectra"]

_MOST_NUMBERS = 400  # cells of a heat map that have their numbers in them
_LARGEST = 40.0  # inches


class Series(NamedTuple):
    """Values of the adapter at one path."""

    values: np.ndarray
    """`(*batch, ...)` or, if the adapter is no stack, of any shape."""
    target: Target | None = None
    """None for a module of PEFT, which is no stack of layers."""


class Row(NamedTuple):
    """The values of a module by layer; the layer None if the module is in no layer."""

    module: str
    values: dict[int | None, np.ndarray]


def plot_plan(plan: AdapterPlan, adapters: Mapping[str, Adapter] | None = None) -> "Figure":
    """Draws the ranks of a plan, or the sizes of updates, by layer and module.

    It needs matplotlib: `pip install "lora_jax[plots]"`.

    Args:
        plan: its targets are the cells of a heat map. A layer is a number in a path, or an
            entry of a stack.
        adapters: of the plan, if the color is to show the Frobenius norm of
            `scale * A @ B`, computed in float64 from the factors. None for the ranks.

    Returns:
        A `matplotlib.figure.Figure`; `savefig` writes it to a file.

    Raises:
        KeyError: if the paths or entries of the adapters are not the plan's.
        ModuleNotFoundError: if matplotlib is not installed.
        TypeError, ValueError: if the adapters do not fit the plan, or it has no targets.

    Example:
        >>> import jax, lora_jax
        >>> params = {"layers": [{"up": jax.numpy.ones((8, 16))} for _ in range(4)]}
        >>> plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=2), params)
        >>> figure = lora_jax.plot_plan(plan)
        >>> figure.axes[0].get_yticklabels()
        [Text(0, 0, 'layers/*/up')]
    """
    if adapters is None:
        ranks = {
            path: Series(np.full(target.matrix_shape[:-2][:1], target.rank), target)
            for path, target in plan.targets.items()
        }
        return heat_map(ranks, "rank")
    return heat_map(_spectra(adapters, plan), NORM)


NORM = "Frobenius norm of scale * A @ B"


def plot_spectra(adapters: Mapping[str, Adapter], plan: AdapterPlan) -> "Figure":
    """Draws the singular values of each update, a line for each layer.

    A fast decay shows that a smaller rank would do. It needs matplotlib:
    `pip install "lora_jax[plots]"`.

    Args:
        adapters: of the plan.
        plan: what `plan_adapters` returned.

    Returns:
        A `matplotlib.figure.Figure` with axes for each module. The singular values of
        `scale * A @ B` are computed in float64 from QR decompositions of the factors. If
        a layer has several (experts), the line shows their means.

    Raises:
        KeyError: if the paths or entries of the adapters are not the plan's.
        ModuleNotFoundError: if matplotlib is not installed.
        TypeError, ValueError: if the adapters do not fit the plan, or it has no targets.
    """
    rows = make_rows(_spectra(adapters, plan))
    across = min(4, len(rows))
    down = math.ceil(len(rows) / across)
    figure = _figure(3.0 * across + 1, 2.4 * down + 0.6)
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    layers = sorted({n for row in rows for n in row.values if n is not None})
    colors = _colors(layers)
    for axes, row in zip(grid.flat, rows, strict=False):
        positive = False
        for layer, values in row.values.items():
            means = values.reshape(-1, values.shape[-1]).mean(axis=0)
            positive |= bool((means > 0).any())
            x = np.arange(1, len(means) + 1)
            color = colors.to_rgba(layer) if layer is not None else "black"
            axes.plot(x, np.where(means > 0, means, np.nan), ".-", color=color, lw=1)
        axes.set_title(row.module, fontsize="small")
        if positive:
            axes.set_yscale("log")
        else:
            axes.text(0.5, 0.5, "all are zero", ha="center", transform=axes.transAxes)
    for axes in grid.flat[len(rows) :]:
        axes.set_visible(False)
    figure.supxlabel("singular value of scale * A @ B", fontsize="medium")
    if len(layers) > 1:
        figure.colorbar(colors, ax=grid, label="layer", shrink=0.8)
    return figure


def heat_map(series: Mapping[str, Series], label: str) -> "Figure":
    """Draws one number for each module and layer.

    Args:
        series: by path. Of several values for a layer, it is the root of the sum of their
            squares.
        label: of the colors.
    """
    rows = make_rows(series)
    layers = sorted(
        {n for row in rows for n in row.values}, key=lambda n: -1 if n is None else n
    )
    cells = np.full((len(rows), len(layers)), np.nan)
    for y, row in enumerate(rows):
        for layer, values in row.values.items():
            cells[y, layers.index(layer)] = np.linalg.norm(values)
    figure = _figure(4.5 + 0.32 * len(layers), 1.6 + 0.3 * len(rows))
    axes = figure.subplots()
    finite = cells[np.isfinite(cells)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    limits = (low, high) if low < high else (0.0, high or 1.0)
    shown = axes.imshow(np.ma.masked_invalid(cells), aspect="auto", clim=limits)
    axes.set_facecolor("0.9")
    figure.colorbar(shown, label=label)
    axes.set_yticks(range(len(rows)), [row.module for row in rows])
    step = math.ceil(len(layers) / 40)
    ticks = range(0, len(layers), step)
    axes.set_xticks(ticks, ["-" if layers[i] is None else str(layers[i]) for i in ticks])
    axes.set_xlabel("layer")
    if cells.size <= _MOST_NUMBERS:
        form = ".0f" if (finite % 1 == 0).all() else ".2f" if high < 10 else ".3g"
        for y, row in enumerate(rows):
            for layer in row.values:
                value = cells[y, x := layers.index(layer)]
                color = "white" if value < sum(limits) / 2 else "black"
                axes.text(x, y, f"{value:{form}}", ha="center", va="center", color=color)
    return figure


def singular_values(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """The singular values of `scale * A @ B`, without forming the product.

    With `A = Q R` and `B^T = P S` they are those of `R S^T`, `(rank, rank)`.

    Args:
        a: `(*batch, in, rank)`.
        b: `(*batch, rank, out)`.
        scale: what multiplies the product.

    Returns:
        `(*batch, k)`, float64, in descending order, with `k <= rank`. NaN if a factor has
        an infinity or a NaN.
    """
    factors = [np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)]
    finite = np.all([np.isfinite(x).all(axis=(-2, -1)) for x in factors], axis=0)
    a, b = (np.where(finite[..., None, None], factor, 0) for factor in factors)
    r: Any = np.linalg.qr(a, mode="r")
    s: Any = np.linalg.qr(b.swapaxes(-1, -2), mode="r")
    values = np.linalg.svd(r @ s.swapaxes(-1, -2), compute_uv=False)
    return np.where(finite[..., None], abs(scale) * values, np.nan)


def make_rows(series: Mapping[str, Series]) -> list[Row]:
    """Sorts values by module and layer.

    The layer is the first number in a path that differs from path to path. If there is
    none, it is the index on the first axis of a stack.
    """
    if not series:
        raise ValueError("there are no adapters to draw.")
    bases = {
        path: path if target is None else path.removesuffix(target.suffix)
        for path, (_, target) in series.items()
    }
    numbers: dict[str, set[str]] = {}
    for base in bases.values():
        for before, number, _ in _numbers(base):
            numbers.setdefault(tree_paths.without_numbers(before), set()).add(number)
    rows: dict[str, dict[int | None, np.ndarray]] = {}
    for path, (values, target) in series.items():
        base, suffix = bases[path], path.removeprefix(bases[path])
        layers, each = [None], [values]
        for before, number, after in _numbers(base):
            if len(numbers[tree_paths.without_numbers(before)]) > 1:
                base, layers = f"{before}*{after}", [int(number)]
                break
        else:
            if target is not None and target.batch_axes:
                own = [*parts.entries(target.part, target.shape)]
                axis = target.batch_axes[0]
                layers = parts.indices_of(own[axis])
                each = values[None] if isinstance(own[axis], int) else values
                own[axis] = range(target.shape[axis])
                suffix = dataclasses.replace(
                    target, part=parts.as_text(own, target.shape)
                ).suffix
        rows.setdefault(base + suffix, {}).update(zip(layers, each, strict=True))
    return [Row(*row) for row in rows.items()]


def _numbers(path: str) -> Iterator[tuple[str, str, str]]:
    """The numbers in a path, each with the text before and after it."""
    for match in re.finditer(r"\d+", path):
        yield path[: match.start()], match[0], path[match.end() :]


def _spectra(adapters: Mapping[str, Adapter], plan: AdapterPlan) -> dict[str, Series]:
    plan_checks.check_adapters(adapters, plan)
    spectra = {}
    for path, target in plan.targets.items():
        a, b = (np.asarray(adapters[path][name]) for name in "AB")
        spectra[path] = Series(singular_values(a, b, target.scale), target)
    return spectra


def _figure(width: float, height: float) -> "Figure":
    """A figure of some size in inches, without a window."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "pictures are drawn with the package matplotlib, which is not installed: "
            'pip install "lora_jax[plots]".'
        ) from None
    size = min(width, _LARGEST), min(height, _LARGEST)
    return Figure(size, dpi=150, layout="constrained")


def _colors(layers: list[int]) -> Any:
    """A map from layers to colors."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(layers[0], layers[-1]) if layers else None, "viridis")
