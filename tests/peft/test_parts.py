"""Modules that are parts of a leaf: some layers of a stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import peft
from lora_jax._io.tensor_files import CheckpointError
from tests.peft.support import PREFIX, draw, linear, read, update_of, write

LAYERS, WIDTH, HIDDEN = 6, 5, 7
STACK = {
    "layers": {
        "up": jnp.asarray(draw(LAYERS, WIDTH, HIDDEN, seed=1)),
        "down": jnp.asarray(draw(LAYERS, HIDDEN, WIDTH, seed=2)),
    }
}
X = jnp.asarray(draw(3, WIDTH))
NAMES = {f"model.layers.{{}}.{name}": f"layers/{name}" for name in ("up", "down")}


def scanned(params, x):
    def layer(x, own):
        return jnp.tanh(x @ own["up"]) @ own["down"], None

    return jax.lax.scan(layer, x, params["layers"])[0]


def by_hand(tensors, scales, dora):
    """The output of PEFT's model, in float64."""
    x = np.asarray(X, np.float64)
    for i in range(LAYERS):
        for name in ("up", "down"):
            module = f"model.layers.{i}.{name}"
            weight = np.asarray(STACK["layers"][name][i], np.float64)
            if module in scales:
                weight = weight + update_of(tensors, module, scales[module])
                if dora:
                    m = tensors[f"{module}.lora_magnitude_vector"]
                    weight = weight * m / np.sqrt(np.square(weight).sum(0))
            x = x @ weight
            x = np.tanh(x) if name == "up" else x
    return x


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("ranks", "config", "targets", "written"),
    [
        (
            {"up": {4: 2, 5: 2}},
            {"layers_to_transform": [4, 5]},
            {"up[4:]": 2},
            {"layers_to_transform": [4, 5], "target_modules": ["up"]},
        ),
        (
            {"up": {1: 2, 3: 2}, "down": {1: 2, 3: 2}},
            {"layers_to_transform": [1, 3], "layers_pattern": ["layers"]},
            {"down[1:4:2]": 2, "up[1:4:2]": 2},
            {"layers_to_transform": [1, 3], "target_modules": ["down", "up"]},
        ),
        (
            {"up": {0: 2, 2: 3, 3: 2, 5: 4}},
            {"layers_to_transform": [0, 2, 3, 5], "rank_pattern": {"2.up": 3, "5.up": 4}},
            {"up[::3]": 2, "up[2:3]": 3, "up[5:]": 4},
            {
                "layers_to_transform": [0, 2, 3, 5],
                "target_modules": ["up"],
                "rank_pattern": {
                    r"model\.layers\.2\.up": 3,
                    r"model\.layers\.5\.up": 4,
                },
            },
        ),
        (
            {"up": dict.fromkeys(range(6), 2), "down": {0: 2}},
            {},
            {"down[:1]": 2, "up": 2},
            {"layers_to_transform": None, "target_modules": sorted(
                [f"model.layers.{i}.up" for i in range(6)] + ["model.layers.0.down"]
            )},
        ),
        (
            {"up": {i: 2 + (i > 3) for i in range(6)}},
            {"rank_pattern": {"[45].up": 3}},
            {"up[:4]": 2, "up[4:]": 3},
            {"layers_to_transform": None},
        ),
    ],
)  # fmt: skip
def test_layers_of_a_stack(ranks, config, targets, written, dora, tmp_path):
    tensors, scales = {}, {}
    for name, own in ranks.items():
        sizes = (WIDTH, HIDDEN) if name == "up" else (HIDDEN, WIDTH)
        for i, rank in own.items():
            module = f"model.layers.{i}.{name}"
            tensors |= linear(module, *sizes, rank, seed=i, dora=dora)
            scales[module] = 4 / rank
    modules = [m.removeprefix("model.") for m in scales] if len(ranks) > 1 else ["up"]
    if "layers_to_transform" in config:
        modules = sorted(ranks)
    own = {"r": 2, "lora_alpha": 4, "target_modules": modules, "use_dora": dora}
    folder = write(tmp_path / "in", tensors, **own | config)
    loaded = peft.load(folder, STACK, scanned, X)
    got = {path: target.rank for path, target in loaded.plan.targets.items()}
    assert got == {f"layers/{path}": rank for path, rank in targets.items()}
    assert loaded.plan.parameters == sum(a.size for a in jax.tree.leaves(loaded.adapters))
    config_again = lora_jax.plan_adapters(loaded.plan.config, STACK, scanned, X)
    assert dict(config_again.targets) == dict(loaded.plan.targets)
    want = by_hand(tensors, scales, dora)
    got = lora_jax.adapt(scanned, loaded.plan)(STACK, loaded.adapters, X)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())

    for names in (NAMES, peft.match_names(folder, STACK, scanned, X)):
        peft.save(tmp_path / "out", loaded.adapters, loaded.plan, names=names)
        arrays, fields = read(tmp_path / "out")
        assert arrays.keys() == {PREFIX + name for name in tensors}
        for name, value in arrays.items():
            np.testing.assert_array_equal(value, tensors[name.removeprefix(PREFIX)])
        if names is NAMES:
            assert {name: fields[name] for name in written} == written
        again = peft.load(tmp_path / "out", STACK, scanned, X)
        assert again.plan.targets == loaded.plan.targets
        assert jax.tree.all(jax.tree.map(np.array_equal, again.adapters, loaded.adapters))


def test_some_experts_of_some_layers(tmp_path):
    stack = {"layers": {"w": jnp.asarray(draw(4, 3, 5, 7))}}
    chosen = [(0, 1), (0, 2), (2, 1), (2, 2), (3, 0)]
    tensors = {}
    for i, j in chosen:
        tensors |= linear(f"layers.{i}.experts.{j}.w", 5, 7, 2, seed=i + 10 * j)
    targets = [f"{i}.experts.{j}.w" for i, j in chosen]
    folder = write(tmp_path / "in", tensors, r=2, lora_alpha=2, target_modules=targets)
    names = {"layers.{}.experts.{}.w": ("layers/w", "bbio")}
    loaded = peft.load(folder, stack, names=names)
    assert list(loaded.adapters) == ["layers/w[::2,1:]", "layers/w[3:,:1]"]
    delta = lora_jax.merge_adapters(stack, loaded.adapters, loaded.plan)["layers"]["w"]
    delta = np.asarray(delta - stack["layers"]["w"])
    for index in np.ndindex(4, 3):
        want = np.zeros((5, 7))
        if index in chosen:
            want = update_of(tensors, f"layers.{index[0]}.experts.{index[1]}.w", 1.0)
        np.testing.assert_allclose(delta[index], want, rtol=1e-4, atol=1e-5)
    peft.save(tmp_path / "out", loaded.adapters, loaded.plan, names=names)
    arrays, fields = read(tmp_path / "out")
    assert fields["layers_to_transform"] is None
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, tensors[name.removeprefix(PREFIX)])


def test_what_no_module_has(tmp_path):
    def plan_of(targets):
        config = lora_jax.LoraConfig(rank=2, targets=targets)
        plan = lora_jax.plan_adapters(config, STACK, scanned, X)
        return lora_jax.init_adapters(jax.random.key(0), STACK, plan), plan

    few = {f"model.layers.{i}.up": "layers/up" for i in (2, 4)}
    for targets, names, message in (
        ("layers/up[3:]", few, r"'model.layers.4.up' for 'layers/up\[3:\]', and no module"),
        ("layers/up[:,:2]", NAMES, r"is \[0\] of the weight, and the target is \[:,:2\]"),
        ("layers/up", few, "must have one module for each index"),
    ):
        with pytest.raises(ValueError, match=message):
            peft.save(tmp_path, *plan_of(targets), names=names)
    tensors = linear("model.layers.7.up", WIDTH, HIDDEN, 2)
    folder = write(tmp_path, tensors, r=2, target_modules=["up"])
    with pytest.raises(CheckpointError, match=r"a stack without the index \[7\]"):
        peft.load(folder, STACK, scanned, X)
