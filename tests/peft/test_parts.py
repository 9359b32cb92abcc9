"""Modules that are parts of a leaf: some layers of a stack, parts of a fused weight."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import peft
from lora_jax._io.tensor_files import CheckpointError
from tests.peft.support import PREFIX, draw, linear, read, update_of, write
from tests.support import asarray

LAYERS, WIDTH, HIDDEN = 6, 5, 7
STACK = {
    "layers": {
        "up": asarray(draw(LAYERS, WIDTH, HIDDEN, seed=1)),
        "down": asarray(draw(LAYERS, HIDDEN, WIDTH, seed=2)),
    }
}
X = asarray(draw(3, WIDTH))
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
    got = jax.jit(lora_jax.adapt(scanned, loaded.plan))(STACK, loaded.adapters, X)
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
    stack = {"layers": {"w": asarray(draw(4, 3, 5, 7))}}
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
    delta = np.asarray(delta) - np.asarray(stack["layers"]["w"])
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


D, H, K, F, L, E = 8, 2, 5, 7, 3, 4


class Fused(NamedTuple):
    """A weight that holds several modules."""

    shape: tuple[int, ...]
    fn: Any
    """The product of `x` with the weight."""
    names: dict[str, Any]
    blocks: dict[str, Any]
    """The index of each module in the weight, in NumPy."""
    swapped: bool = False
    """Whether the blocks are `(out, in)`."""
    x: tuple[int, ...] = (3, D)

    def apply(self, params, x):
        return self.fn(params["w"], x)


CASES = {
    "(3, D, H, K)": Fused(
        (3, D, H, K),
        lambda w, x: jnp.einsum("bd,cdhk->cbhk", x, w),
        {"q": ("w[0]", "ioo"), "k": "w[1]", "v": "w[2]"},
        {"q": np.s_[0], "k": np.s_[1], "v": np.s_[2]},
    ),
    "(D, 3HK)": Fused(
        (D, 3 * H * K),
        lambda w, x: jnp.split(x @ w, 3, axis=-1),
        {"q": "w[:, :10]", "k": "w[:, 10:20]", "v": ("w[:, 20:]", "io")},
        {"q": np.s_[:, :10], "k": np.s_[:, 10:20], "v": np.s_[:, 20:]},
    ),
    "(2, H, D, K)": Fused(
        (2, H, D, K),
        lambda w, x: jnp.einsum("sd,chdk->cshk", x, w),
        {"k": "w[0]", "v": "w[1]"},
        {"k": np.s_[0], "v": np.s_[1]},
    ),
    "(2, F, D)": Fused(
        (2, F, D),
        lambda w, x: jnp.einsum("bd,cfd->cbf", x, w),
        {"gate": "w[0]", "up": ("w[1]", "oi")},
        {"gate": np.s_[0], "up": np.s_[1]},
        swapped=True,
    ),
    "(L, 3, D, D)": Fused(
        (L, 3, D, D),
        lambda w, x: jax.lax.scan(
            lambda x, w: (jnp.einsum("bd,cdk->cbk", x, w).sum(0) / 9, None), x, w
        )[0],
        {"h.{}.q": "w[:, 0]", "h.{}.k": "w[:, 1]", "h.{}.v": "w[:, 2]"},
        {f"h.{i}.{m}": np.s_[i, j] for j, m in enumerate("qkv") for i in range(L)},
    ),
    "(E, D, 2F)": Fused(
        (E, D, 2 * F),
        lambda w, x: jnp.einsum("ebd,edf->ebf", x, w),
        {"{}.gate": ("w[:, :, :7]", "bio"), "{}.up": "w[:,:,7:]"},
        {
            f"{i}.{m}": np.s_[i, :, own]
            for m, own in {"gate": np.s_[:F], "up": np.s_[F:]}.items()
            for i in range(E)
        },
        x=(E, 3, D),
    ),
    "(D + F, K)": Fused(
        (D + F, K),
        lambda w, x: x @ w,
        {"a": "w[:8]", "b": "w[8:]"},
        {"a": np.s_[:D], "b": np.s_[D:]},
        x=(3, D + F),
    ),
}


def block_of(case, weight, module):
    """A module's matrix `(in, out)`: the inputs are the first axis of D, or all but K."""
    block = np.asarray(weight, np.float64)[case.blocks[module]]
    if case.swapped:
        return block.T
    if block.ndim == 3:
        axis = block.shape.index(D)
        block = np.moveaxis(block, axis, 0).reshape(D, -1)
    return block


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_modules_of_a_fused_weight(case, dora, tmp_path):
    case, fn = CASES[case], CASES[case].apply
    params = {"w": asarray(draw(*case.shape))}
    x = asarray(draw(*case.x, seed=5))
    tensors = {}
    for seed, module in enumerate(case.blocks):
        sizes = block_of(case, params["w"], module).shape
        tensors |= linear(module, *sizes, 2, seed=seed, dora=dora)
    config = {"r": 2, "lora_alpha": 3, "target_modules": [*case.blocks], "use_dora": dora}
    folder = write(tmp_path / "in", tensors, **config)
    if dora and "a" in case.blocks:
        with pytest.raises(CheckpointError, match="DoRA scales whole columns, and the par"):
            peft.load(folder, params, fn, x, names=case.names)
        return
    loaded = peft.load(folder, params, fn, x, names=case.names)
    assert len(loaded.plan.targets) == len(case.names)

    @jax.jit
    def outputs(params, adapters):
        merged = lora_jax.merge_adapters(params, adapters, loaded.plan)
        return merged, lora_jax.adapt(fn, loaded.plan)(params, adapters, x), fn(merged, x)

    merged, adapted, wanted = outputs(params, loaded.adapters)
    for module in case.blocks:
        want = block_of(case, params["w"], module) + update_of(tensors, module, 1.5)
        if dora:
            m = tensors[f"{module}.lora_magnitude_vector"]
            want = want * m / np.sqrt(np.square(want).sum(0))
        got = block_of(case, merged["w"], module)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    for got, want in zip(jax.tree.leaves(adapted), jax.tree.leaves(wanted), strict=True):
        bound = 1e-4 * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=bound)

    table = peft.match_names(folder, params, fn, x, names=case.names)
    for names in (case.names, table):
        peft.save(tmp_path / "out", loaded.adapters, loaded.plan, names=names)
        written, _ = read(tmp_path / "out")
        assert written.keys() == {PREFIX + name for name in tensors}
        for name, value in written.items():
            np.testing.assert_array_equal(value, tensors[name.removeprefix(PREFIX)])
    again = peft.load(tmp_path / "out", params, names=table)
    assert again.adapters.keys() == loaded.adapters.keys()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_one_adapter_of_a_fused_weight(case, dora, tmp_path):
    case, fn = CASES[case], CASES[case].apply
    params = {"w": asarray(draw(*case.shape))}
    x = asarray(draw(*case.x, seed=5))
    config = lora_jax.LoraConfig(rank=2, use_dora=dora)
    plan = lora_jax.plan_adapters(config, params, fn, x)
    assert list(plan.targets) == ["w"]
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    noise = draw(1000, seed=3)
    noisy = lambda a: asarray(np.asarray(a) + noise[: a.size].reshape(a.shape))  # noqa: E731
    adapters = jax.tree.map(noisy, adapters)
    split_inputs = "a" in case.blocks
    if dora and split_inputs:
        with pytest.raises(ValueError, match="only some of the inputs, and a magnitude"):
            peft.save(tmp_path, adapters, plan, names=case.names)
        return
    peft.save(tmp_path, adapters, plan, names=case.names)
    written, _ = read(tmp_path)
    shared, split = ("B", "A") if split_inputs else ("A", "B")
    names = [m for m in case.blocks if m.rpartition(".")[0] in ("", "0", "h.0")]
    for entry, count in ((shared, 1), (split, len(names))):
        arrays = {written[f"{PREFIX}{m}.lora_{entry}.weight"].tobytes() for m in names}
        assert len(arrays) == count
    loaded = peft.load(tmp_path, params, fn, x, names=case.names)

    @jax.jit
    def merges(params, *both):
        pairs = zip(both, (plan, loaded.plan), strict=True)
        return [lora_jax.merge_adapters(params, *pair)["w"] for pair in pairs]

    want, got = merges(params, adapters, loaded.adapters)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


FUSED = {"q": (D, D), "k": (D, D), "v": (D, D)}


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [
        ((3, D, H, 4), dict.fromkeys("qkv", "w"), r"has an index: names={'k': 'w\[0\]'}"),
        ((D, 3 * D), dict.fromkeys("qkv", ("w", "io")), r"names={'k': 'w\[:,:8\]'}"),
        (
            (3, D, D),
            {"q": "w[0]", "k": "w[1:]", "v": "w[2]"},
            r"with 8 in and 8 out.* 'w\[1:\]' has the shape \(2, 8, 8\)",
        ),
        (
            (3, D, D),
            {"q": ("w[0]", "oi"), "k": ("w[1]", "io"), "v": ("w[0, :, :]", "oi")},
            r"'q' and 'v' both match 'w'",
        ),
        (
            (D, 3 * D),
            {"q": "w[:,:8]", "k": "w[:,4:12]", "v": "w[:,16:]"},
            r"both match entries of 'w', 'w\[:,4:12\]' and 'w\[:,:8\]'",
        ),
        (
            (3, D, D),
            {"q": "w[0]", "k": "w[3]", "v": "w[2]"},
            "index 3 of an axis of size 3",
        ),
    ],
)
def test_parts_that_do_not_fit(shape, names, message, tmp_path):
    tensors = {}
    for name, sizes in FUSED.items():
        tensors |= linear(name, *sizes, 2)
    folder = write(tmp_path, tensors, r=2, target_modules=[*FUSED])
    with pytest.raises(CheckpointError, match=message):
        peft.load(folder, {"w": asarray(draw(*shape))}, names=names, layout="jax")


def test_full_arrays_and_templates_of_parts(tmp_path):
    params = {"w": asarray(draw(3, D, F)), "bias": asarray(draw(3, F))}
    tensors = linear("q", D, F, 2) | {"k.weight": draw(F, D)}
    folder = write(tmp_path, tensors, r=2, target_modules=["q"], modules_to_save=["k"])
    names = {"q": "w[0]", "k": "w[1]"}
    with pytest.raises(
        CheckpointError, match=r"'k.weight' is a part of a leaf, 'w\[1\]', and"
    ):
        peft.load(folder, params, names=names)
    with pytest.raises(ValueError, match="':' stands for all layers of a stack"):
        peft.load(folder, params, names={"{}.q": "w[{}, 0]"})
    folder = write(tmp_path, linear("q", D, F, 2), r=2, target_modules=["q", "k"])
    loaded = peft.load(folder, params, names={"q": "w[0]"})
    with pytest.raises(ValueError, match="is \\[:2\\] of the weight, and the target is"):
        peft.save(tmp_path, loaded.adapters, loaded.plan, names={"q": "w[:2]"})
    with pytest.raises(ValueError, match="parts \\[0\\] and \\[:2\\] of 'w'"):
        peft.save(tmp_path, loaded.adapters, loaded.plan, names={"q": "w[0]", "k": "w[:2]"})


@pytest.mark.parametrize("stacked", [False, True])
def test_a_part_that_other_layers_have_is_missed(stacked, tmp_path):
    tensors = {}
    for i, module in ((0, "q"), (0, "k"), (1, "q")):
        tensors |= linear(f"h.{i}.{module}", D, F, 2)
    folder = write(tmp_path, tensors, r=2, target_modules=["q", "k"])
    params = {"h": {i: {"w": asarray(draw(3, D, F))} for i in "01"}}
    path = "h/{}/w[%s]"
    if stacked:
        params, path = {"h": {"w": asarray(draw(2, 3, D, F))}}, "h/w[:,%s]"
    names = {f"h.{{}}.{module}": path % i for i, module in enumerate("qkv")}
    with pytest.raises(CheckpointError, match=r"the config targets 'h.1.k', which is") as e:
        peft.load(folder, params, names=names, layout="jax")
    assert str(e.value).count("the config targets") == 1
    write(tmp_path, tensors, r=2, target_modules=["q", "0.k"])
    assert len(peft.load(folder, params, names=names, layout="jax").adapters) == 3 - stacked
