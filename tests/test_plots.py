"""What the pictures show: read from the data that they draw."""

import sys

import jax
import numpy as np
import pytest

import lora_jax
from lora_jax import plots
from tests.support import draw

pytest.importorskip("matplotlib")


def rows_of(names):
    series = {name: plots.Series(np.array(i)) for i, name in enumerate(names)}
    return [(row.module, [*row.values]) for row in plots.make_rows(series)]


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["l/0/q", "l/1/q", "l/1/up", "head"], ["l/*/q 0 1", "l/*/up 1", "head None"]),
        (["m.l.10.q", "m.l.9.q"], ["m.l.*.q 10 9"]),
        (["net50/a1/0/w", "net50/a2/0/w"], ["net50/a*/0/w 1 2"]),
        (["l/3/e/0/w", "l/3/e/1/w"], ["l/3/e/*/w 0 1"]),
        (["l/3/q"], ["l/3/q None"]),
    ],
)
def test_the_layer_is_the_first_number_that_differs(names, rows):
    assert [f"{name} {' '.join(map(str, own))}" for name, own in rows_of(names)] == rows


def make(targets, **fields):
    params = {
        "up": draw(4, 6, 5),
        "experts": draw(4, 2, 6, 5),
        "blocks": [{"w": draw(6, 5)} for _ in range(3)],
        "head": draw(6, 3),
    }
    axes = {"up": "bio", "experts": "bbio"}
    axes = {
        name: axes[name] for name in axes if name[:2] in "".join(targets) or "*" in targets
    }
    config = lora_jax.LoraConfig(2, 3.0, targets, axes=axes, **fields)
    plan = lora_jax.plan_adapters(config, params)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    return plan, jax.tree.map(lambda x: x + draw(*x.shape), adapters)


def cells(figure):
    """The numbers of a heat map by module and layer."""
    axes = figure.axes[0]
    modules = [text.get_text() for text in axes.get_yticklabels()]
    layers = [text.get_text() for text in axes.get_xticklabels()]
    data = axes.images[0].get_array().filled(np.nan)
    assert data.shape == (len(modules), len(layers))
    found = {}
    for text in axes.texts:
        x, y = text.get_position()
        found[modules[y], layers[x]] = data[y, x]
    assert np.isfinite(data).sum() == len(found)
    return found


def test_a_heat_map_of_ranks():
    plan, _ = make(("*",), rank_pattern={"up[2:]": 4, "blocks/1/w": 3, "experts": 1})
    assert cells(lora_jax.plot_plan(plan)) == {
        **{("up", str(i)): 2 if i < 2 else 4 for i in range(4)},
        **{("experts", str(i)): 1 for i in range(4)},
        **{("blocks/*/w", str(i)): 3 if i == 1 else 2 for i in range(3)},
        ("head", "-"): 2,
    }


def test_heat_maps_and_spectra_are_of_the_updates():
    plan, adapters = make(("up[1]", "experts", "blocks/*", "head"))
    updates = {}
    for path, target in plan.targets.items():
        product = np.float64(adapters[path]["A"]) @ np.float64(adapters[path]["B"])
        updates[path] = target.scale * product
    want = {("up", "1"): updates["up[1]"], ("head", "-"): updates["head"]}
    want |= {("experts", str(i)): updates["experts"][i] for i in range(4)}
    want |= {("blocks/*/w", str(i)): updates[f"blocks/{i}/w"] for i in range(3)}
    shown = cells(lora_jax.plot_plan(plan, adapters))
    assert shown.keys() == want.keys()
    for cell, update in want.items():
        assert shown[cell] == pytest.approx(np.linalg.norm(update), rel=1e-6)
    figure = lora_jax.plot_spectra(adapters, plan)
    lines = {
        (axes.get_title(), i): line.get_ydata()
        for axes in figure.axes
        for i, line in enumerate(axes.lines)
    }
    assert len(lines) == len(want)
    for (module, layer), update in want.items():
        i = 0 if module in ("up", "head") else int(layer)
        values = np.linalg.svd(update, compute_uv=False)[..., :2]
        np.testing.assert_allclose(
            lines[module, i], values.reshape(-1, 2).mean(axis=0), rtol=1e-5
        )


def test_new_and_damaged_adapters_are_drawn(tmp_path):
    plan, adapters = make(("blocks/*",))
    for value in (0.0, np.nan, np.inf):
        adapters["blocks/0/w"]["B"] = np.full((2, 5), value, np.float32)
        texts = [t.get_text() for t in lora_jax.plot_plan(plan, adapters).axes[0].texts]
        assert float(texts[0]) == 0 if value == 0 else texts[0] == "nan"
        lora_jax.plot_spectra(adapters, plan).savefig(tmp_path / "a.png")
    zeros = jax.tree.map(np.zeros_like, adapters)
    figure = lora_jax.plot_spectra(zeros, plan)
    figure.savefig(tmp_path / "b.svg")
    assert figure.axes[0].texts[0].get_text() == "all are zero"
    lora_jax.plot_plan(plan, zeros).savefig(tmp_path / "b.pdf")


def test_errors(monkeypatch):
    plan, adapters = make(("head",))
    empty = lora_jax.AdapterPlan(plan.config, {})
    with pytest.raises(ValueError, match="there are no adapters to draw"):
        lora_jax.plot_plan(empty)
    with pytest.raises(KeyError, match="head"):
        lora_jax.plot_spectra({}, plan)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lora_jax\[plots\]"'):
        lora_jax.plot_plan(plan, adapters)
