"""Files of mlx-lm, kohya and diffusers, written by hand from their formulas."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax import peft
from lora_jax._io.tensor_files import CheckpointError
from tests.peft import support
from tests.peft.support import CONFIG, abstract, draw
from tests.support import asarray

LAYERS = "text_encoder/layers/fc1/kernel"
SECOND = "text_encoder_2/layers/fc1/kernel"
# The names, with the path, the index, the shape of A and the outputs, the rank, and alpha.
MODULES = {
    "unet.down_blocks.0.attn_1.to_q": ("unet/down_blocks_0/attn_1/to_q/kernel", ()),
    "unet.down_blocks.0.conv_in": ("unet/down_blocks_0/conv_in/kernel", ()),
    "text_encoder.layers.0.fc1": (LAYERS, (0,)),
    "text_encoder.layers.1.fc1": (LAYERS, (1,)),
    "text_encoder_2.layers.0.fc1": (SECOND, (0,)),
    "text_encoder_2.layers.1.fc1": (SECOND, (1,)),
}
SHAPES = {"to_q": (2, 5, 7), "conv_in": (3, 2, 4), "fc1": (2, 5, 6)}
ALPHAS = dict(zip(MODULES, (3.0, 1.5, 2.0, 0.1, 7.0, 7.0), strict=True))
STACKS = {f"{path.split('/')[0]}.layers.{{}}.fc1": path for path in (LAYERS, SECOND)}
NAMES = STACKS | {
    "unet.down_blocks.{}.attn_1.to_q": "unet/down_blocks_{}/attn_1/to_q/kernel"
}
STARTS = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}
DIFFUSERS = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


def shapes():
    """The shapes of the weights, in JAX's layout."""
    found = {}
    for name, (path, index) in MODULES.items():
        _, n_in, n_out = SHAPES[name.rpartition(".")[2]]
        kernel = (3, 3) if "conv" in name else ()
        found[path] = (*((2,) if index else ()), *kernel, n_in, n_out)
    return found


@functools.cache
def params():
    return {path: asarray(draw(*shape, seed=1)) for path, shape in shapes().items()}


@functools.cache
def factors(dora=False):
    """A `(r, in, ...)`, B `(out, r, ...)` and the magnitude of each module, and its weight.

    The last is the weight `(out, in, ...)` with the adapter, in float64, from the formula.
    """
    found = {}
    for seed, (name, (path, index)) in enumerate(MODULES.items()):
        rank, n_in, n_out = SHAPES[name.rpartition(".")[2]]
        kernel = (3, 3) if "conv" in name else ()
        a = draw(rank, n_in, *kernel, seed=seed)
        b = draw(n_out, rank, *(1 for _ in kernel), seed=seed + 50)
        m = 2 + draw(n_out, seed=seed) ** 2 if dora else None
        weight = np.moveaxis(np.float64(params()[path])[index], (-1, -2), (0, 1))
        update = np.tensordot(np.float64(b.reshape(n_out, rank)), np.float64(a), 1)
        new = weight + ALPHAS[name] / rank * update
        if dora:
            axes = (-1, *(1 for _ in new.shape[1:]))
            norm = np.sqrt((new**2).sum(tuple(range(1, new.ndim))))
            new = new * (m / norm).reshape(axes)
        found[name] = a, b, m, new
    return found


def write(path, ends, rename=lambda name: name, metadata=None, *, alphas=True, dora=False):
    """Writes the file of a trainer that gives entries these ends, in its own shapes."""
    entries = {}
    for name, (a, b, m, _) in factors(dora).items():
        own = rename(name)
        entries |= {own + ends[0]: a, own + ends[1]: b}
        if dora:
            ones = (1,) * (a.ndim - 1)
            entries[own + ends[2]] = m.reshape(-1, *ones) if "dora" in ends[2] else m
        if alphas:
            entries[f"{own}.alpha"] = np.asarray(ALPHAS[name], "float64")
    save_file(entries, path, metadata)
    return path


def flat(name):
    model, _, rest = name.partition(".")
    return f"lora_{STARTS[model]}_{rest.replace('.', '_')}"


def write_kohya(path, **options):
    ends = ".lora_down.weight", ".lora_up.weight", ".dora_scale"
    return write(path, ends, flat, {"ss_sd_model_name": "base"}, **options)


def old_name(name):
    return name.replace("attn_1.to_q", "attn_1.processor.to_q_lora") + (
        ".lora" if "to_q" not in name else ""
    )


def check(loaded, dora=False):
    """Compares merged weights with the formula."""
    merged = support.merged(params(), loaded)
    for name, (path, index) in MODULES.items():
        got = np.moveaxis(np.float64(merged[path])[index], (-1, -2), (0, 1))
        np.testing.assert_allclose(got, factors(dora)[name][-1], rtol=3e-6, atol=3e-6)
    assert {t.method for t in loaded.plan.targets.values()} == {"dora" if dora else "lora"}


def metadata(*, models=tuple(STARTS), **more):
    """The metadata of diffusers: a config of PEFT for each model."""
    fields = {}
    for model in models:
        own = {n.partition(".")[2]: n for n in MODULES if n.startswith(f"{model}.")}
        ranks = {short: len(factors()[name][0]) for short, name in own.items()}
        alphas = {short: ALPHAS[name] for short, name in own.items()}
        patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
        config = {"r": 8, "lora_alpha": 8, "peft_type": "LORA", **patterns, **more}
        fields |= {f"{model}.{name}": value for name, value in config.items()}
    return {"lora_adapter_metadata": json.dumps(fields)}


@pytest.mark.parametrize("dora", [False, True])
def test_kohya(dora, tmp_path):
    path = write_kohya(tmp_path / "in.safetensors", dora=dora)
    loaded = peft.load(path, params())
    check(loaded, dora)
    # Layers of one stack with two alphas are two targets.
    scales = {p: t.scale for p, t in loaded.plan.targets.items()}
    assert scales[f"{LAYERS}[:1]"] == 1.0
    assert scales[f"{LAYERS}[1:]"] == 0.1 / 2
    table = peft.match_names(path, params())
    assert (
        table["lora_unet_down_blocks_0_conv_in"] == MODULES["unet.down_blocks.0.conv_in"][0]
    )
    for names in (table, STACKS):
        out = tmp_path / "out.safetensors"
        peft.save(
            out, loaded.adapters, loaded.plan, names=names, dialect="kohya", base_model="b"
        )
        with safe_open(out, "numpy") as file:
            assert file.metadata() == {
                "format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": "2",
                "ss_network_alpha": "7", "ss_sd_model_name": "b",
            }  # fmt: skip
        old, new = load_file(path), load_file(out)
        assert old.keys() == new.keys()
        for name, value in old.items():
            np.testing.assert_array_equal(new[name], value, err_msg=name)
            assert new[name].shape == value.shape
        assert new["lora_te2_layers_0_fc1.alpha"].dtype == "float32"  # which holds 7
        assert new["lora_te1_layers_1_fc1.alpha"] == 0.1  # and not this


@pytest.mark.parametrize("dora", [False, True])
def test_diffusers(dora, tmp_path):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write(path, DIFFUSERS, metadata=metadata(use_dora=dora), alphas=False, dora=dora)
    for place in (path, tmp_path):
        loaded = peft.load(place, params())
        check(loaded, dora)
    out = tmp_path / "out.safetensors"
    peft.save(out, loaded.adapters, loaded.plan, names=NAMES, dialect="diffusers")
    check(peft.load(out, params()), dora)
    old, new = load_file(path), load_file(out)
    assert old.keys() == new.keys()
    for name, value in old.items():
        np.testing.assert_array_equal(new[name].reshape(-1), value.reshape(-1))
    with safe_open(out, "numpy") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
    assert fields["unet.rank_pattern"] in ({"down_blocks\\.0\\.conv_in": 3}, {
        "down_blocks\\.0\\.attn_1\\.to_q": 2
    })  # fmt: skip
    assert fields["text_encoder_2.alpha_pattern"] == {}
    assert fields["text_encoder_2.lora_alpha"] == 7


@pytest.mark.parametrize(
    ("ends", "rename"),
    [
        (DIFFUSERS, lambda name: name),
        ((".lora.down.weight", ".lora.up.weight"), lambda name: name),
        ((".lora_down.weight", ".lora_up.weight"), lambda name: name),
        ((".down.weight", ".up.weight"), old_name),
    ],
)
def test_alphas_of_entries(ends, rename, tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, ends, rename, alphas=rename is not old_name)
    loaded = peft.load(path, params())
    if rename is old_name:  # no alpha: it is the rank
        assert {t.scale for t in loaded.plan.targets.values()} == {1.0}
    else:
        check(loaded)


def test_uniform_files_of_diffusers_need_no_metadata(tmp_path):
    loaded = peft.load(write_kohya(tmp_path / "in.safetensors"), params())
    out = tmp_path / "out.safetensors"
    options = {"names": NAMES, "dialect": "diffusers", "uniform": True}
    peft.save(out, loaded.adapters, loaded.plan, **options)
    save_file(load_file(out), out)
    again = peft.load(out, params())
    check(again)
    assert {(t.rank, t.scale) for t in again.plan.targets.values()} == {(3, 1.0)}


@pytest.mark.parametrize("dialect", ["mlx", "kohya", "diffusers"])
def test_rank_stabilized_parts_of_a_fused_weight(dialect, tmp_path):
    tree = {"unet/qkv": jnp.zeros((3, 5, 7)), "unet/proj": jnp.zeros((7, 5))}
    config = lora_jax.LoraConfig(
        rank=2, alpha=3.0, rank_stabilized=True, rank_pattern={"unet/proj": 3},
        targets=("unet/qkv[0]", "unet/qkv[2]", "unet/proj"), axes={"unet/qkv": "bio"},
    )  # fmt: skip
    plan = lora_jax.plan_adapters(config, tree)
    adapters = {
        path: {
            "A": asarray(draw(target.alone.shape[-2], target.rank, seed=i)),
            "B": asarray(draw(target.rank, target.alone.shape[-1], seed=i + 5)),
        }
        for i, (path, target) in enumerate(plan.targets.items())
    }
    names = {f"unet.to_{x}": f"unet/qkv[{i}]" for i, x in enumerate("qkv")}
    names["unet.proj"] = "unet/proj"
    place, options = tmp_path / "out", {"names": names, "dialect": dialect}
    if dialect == "mlx":
        with pytest.raises(
            ValueError, match=r"rank 2 with scale 2\.12.* give uniform=True"
        ):
            peft.save(place, adapters, plan, **options)
        options["uniform"] = True
    else:
        place = place.with_suffix(".safetensors")
    peft.save(place, adapters, plan, **options)
    if dialect == "kohya":
        names = {f"lora_{name.replace('.', '_')}": path for name, path in names.items()}
    loaded = peft.load(place, tree, names=names)
    support.same_updates(plan, loaded.plan, adapters, loaded.adapters)


def test_one_model_of_a_pipeline(tmp_path):
    """Params of one model take its modules, with or without the model's name."""
    path = write_kohya(tmp_path / "a.safetensors")
    inner = abstract({"layers": {"fc1": {"kernel": (2, 5, 6)}}})
    for tree in ({"text_encoder_2": inner}, {"text_encoder": inner}):
        with pytest.raises(CheckpointError, match="lora_unet_down_blocks_0_attn_1_to_q"):
            peft.load(path, tree)
        with pytest.warns(UserWarning, match="It was left out"):
            loaded = peft.load(path, tree, strict=False)
        (model,) = tree
        a = np.concatenate([own["A"] for own in loaded.adapters.values()])
        for i in range(2):
            want = factors()[f"{model}.layers.{i}.fc1"][0]
            np.testing.assert_array_equal(a[i], want.T)
    own = {k: v for k, v in load_file(path).items() if k.startswith("lora_te2_")}
    save_file(own, path)
    assert len(peft.load(path, inner).adapters) == 1


def test_names_for_flat_modules(tmp_path):
    path = write_kohya(tmp_path / "a.safetensors")
    own = {k: v for k, v in load_file(path).items() if "fc1" in k}
    save_file(own, path)
    tree = abstract({"first": (2, 5, 6), "second": (2, 5, 6)})
    names = {
        "lora_te1_layers_{}_fc1": "first",
        "lora_te2_layers_{}_fc1": "second",
    }
    loaded = peft.load(path, tree, names=names)
    assert list(loaded.adapters) == ["first[:1]", "first[1:]", "second"]


# mlx-lm

MLX = {
    "model.layers.0.self_attn.q_proj": ("layers/self_attn/q_proj/kernel", (0,)),
    "model.layers.1.self_attn.q_proj": ("layers/self_attn/q_proj/kernel", (1,)),
    "model.layers.1.mlp.switch_mlp.up_proj": ("layers_1/switch_mlp/up_proj/kernel", ()),
    "model.embed_tokens": ("embed_tokens/embedding", ()),
}
MLX_SHAPES = {"q_proj": (5, 7), "up_proj": (3, 5, 6), "embed_tokens": (9, 5)}
MLX_NAMES = {
    "model.layers.{}.self_attn.q_proj": "layers/self_attn/q_proj/kernel",
    "model.layers.1.mlp.switch_mlp.up_proj": "layers_1/switch_mlp/up_proj/kernel",
    "model.embed_tokens": "embed_tokens/embedding",
}


def mlx_params():
    tree = {}
    for name, (path, index) in MLX.items():
        shape = MLX_SHAPES[name.rpartition(".")[2]]
        shape = (2, *shape) if index else shape
        tree[path] = asarray(draw(*shape, seed=3))
    return tree


def write_mlx(folder, names=tuple(MLX), *, dora=False, **parameters):
    folder.mkdir(exist_ok=True)
    entries = {}
    for seed, name in enumerate(names):
        *experts, n_in, n_out = MLX_SHAPES[name.rpartition(".")[2]]
        shapes = (n_in, 2), (2, n_out)
        if experts:
            shapes = (*experts, 2, n_in), (*experts, n_out, 2)
        entries[f"{name}.lora_a"] = draw(*shapes[0], seed=seed)
        entries[f"{name}.lora_b"] = draw(*shapes[1], seed=seed + 9)
        if dora:
            entries[f"{name}.m"] = 2 + draw(n_out, seed=seed) ** 2
    save_file(entries, folder / "adapters.safetensors")
    dropout = 0.25 if dora else 0.0  # there is none for stacks of experts
    own = {"rank": 2, "scale": 2.5, "dropout": dropout, "keys": ["a"]} | parameters
    config = {"fine_tune_type": "dora" if dora else "lora", "lora_parameters": own}
    config |= {"model": "org/model", "num_layers": 4, "iters": 7, "seed": None}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def tied_function(params, tokens):
    """Looks rows of the embedding up, and multiplies by it as the head."""
    x = params["embed_tokens/embedding"][tokens]
    for layer in params["layers/self_attn/q_proj/kernel"]:
        x = x + (x @ layer)[:, :5]
    experts = params["layers_1/switch_mlp/up_proj/kernel"]
    up = jnp.einsum("etd,edf->etf", jnp.stack([x] * 3), experts)
    return x @ params["embed_tokens/embedding"].T + up.sum()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_mlx(dora, traced, tmp_path):
    names = [*MLX][:2] if dora else [*MLX]
    folder, tree = write_mlx(tmp_path / "in", names, dora=dora), mlx_params()
    arguments = (tied_function, jnp.arange(4)) if traced else ()
    loaded = peft.load(folder, tree, *arguments)
    merged, entries = (
        support.merged(tree, loaded),
        load_file(folder / "adapters.safetensors"),
    )
    for name in names:
        path, index = MLX[name]
        a, b = (np.float64(entries[f"{name}.lora_{end}"]) for end in "ab")
        update = (b @ a).swapaxes(-1, -2) if a.ndim == 3 else a @ b
        new = np.float64(tree[path])[index] + 2.5 * update
        if dora:
            new *= entries[f"{name}.m"] / np.sqrt((new**2).sum(0))
        got = np.float64(merged[path])[index]
        np.testing.assert_allclose(got, new, rtol=3e-6, atol=3e-6)
    dropout = 0.25 if dora else 0.0
    assert loaded.plan.config.dropout == dropout
    out = tmp_path / "out"
    own = {k: v for k, v in MLX_NAMES.items() if not dora or "q_proj" in k}
    peft.save(out, loaded.adapters, loaded.plan, names=own, dialect="mlx", base_model="m")
    written = load_file(out / "adapters.safetensors")
    assert written.keys() == entries.keys()
    for name, value in entries.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name, strict=True)
    config = json.loads((out / CONFIG).read_text())
    keys = ["mlp.switch_mlp.up_proj", "model.embed_tokens", "self_attn.q_proj"]
    assert config == {
        "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": {
            "rank": 2, "scale": 2.5, "dropout": dropout, "keys": keys[2:] if dora else keys
        },
        "model": "m",
        "num_layers": -1,
    }  # fmt: skip
    config["lora_parameters"]["scale"] = 3.0
    (out / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="or was the config edited"):
        peft.load(out, tree)
    if not dora:  # an adapter of PEFT would act on the look-up alone
        with pytest.raises(ValueError, match="is an embedding and a matrix of a product"):
            peft.save(tmp_path / "peft", loaded.adapters, loaded.plan, names=own)


def test_mlx_has_one_rank_and_one_scale(tmp_path):
    loaded = peft.load(write_kohya(tmp_path / "in.safetensors"), params())
    adapters = {k: v for k, v in loaded.adapters.items() if "fc1" in k}
    plan = loaded.plan.subset("*fc1*")
    names = dict(STACKS)
    with pytest.raises(ValueError, match=r"these have 3.*give uniform=True"):
        peft.save(tmp_path / "out", adapters, plan, names=names, dialect="mlx")
    peft.save(tmp_path / "out", adapters, plan, names=names, dialect="mlx", uniform=True)
    tree = {path: params()[path] for path in (LAYERS, SECOND)}
    merged = support.merged(tree, peft.load(tmp_path / "out", tree))
    for name in [*MODULES][2:]:
        path, index = MODULES[name]
        want = factors()[name][-1].T
        np.testing.assert_allclose(merged[path][index], want, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(("one", "other"), [("mlx", "peft"), ("peft", "mlx")])
def test_a_directory_has_one_format(one, other, tmp_path):
    folder, tree = write_mlx(tmp_path / "in", [*MLX][:2]), mlx_params()
    adapters, plan, _ = peft.load(folder, tree)
    names = {name: path for name, path in MLX_NAMES.items() if "q_proj" in name}
    for _ in range(2):
        peft.save(tmp_path / "out", adapters, plan, names=names, dialect=one)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(
        FileExistsError, match=r"in another format, adapter.*another direct"
    ):
        peft.save(tmp_path / "out", adapters, plan, names=names, dialect=other)
    after = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert before == after


def test_older_stacks_of_experts(tmp_path):
    name = "model.layers.1.mlp.switch_mlp.up_proj"
    folder, tree = write_mlx(tmp_path, [name]), mlx_params()
    new = peft.load(folder, tree)
    entries = load_file(folder / "adapters.safetensors")
    entries[f"{name}.lora_a"] = entries[f"{name}.lora_a"].reshape(6, 5)
    save_file(entries, folder / "adapters.safetensors")
    old = peft.load(folder, tree)
    support.same_updates(new.plan, old.plan, new.adapters, old.adapters)
    with pytest.raises(CheckpointError, match=r"up_proj' is a stack of experts, .* to 0"):
        peft.load(write_mlx(tmp_path, [name], dropout=0.5), tree)


# What is refused.

A, B = {"q.lora_A.weight": draw(2, 5)}, {"q.lora_B.weight": draw(7, 2)}
DOWN, UP = {"q.lora_down.weight": draw(2, 5)}, {"q.lora_up.weight": draw(7, 2)}
ALPHA = {"q.alpha": np.full((), 3.0)}
TREE = abstract({"q": {"kernel": (5, 7)}})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"x.hada_w1_a": draw(2)}, r"'x.hada_w1_a' looks like LoHa .*: merge it"),
        ({"x.lokr_w2": draw(2)}, "looks like LoKr"),
        ({"x.oft_blocks": draw(2)}, "looks like OFT"),
        ({"x.a1.weight": draw(2)}, "looks like GLoRA"),
        ({"x.weight": draw(2), "x.on_input": draw(2)}, "looks like IA3"),
        ({"x.diff": draw(2)}, "looks like weights trained in full"),
        ({"emb_params": draw(2, 3)}, "looks like textual inversion"),
        ({"lora_controlnet": draw(1)}, "looks like Control-LoRA"),
        ({"q.lora_a.weight": draw(2, 5)}, "looks like torchtune.*load_torchtune"),
        ({"base_model.model.q.lora_A.weight": draw(2, 5)}, "looks like PEFT.*directory"),
        ({"q.kernel": draw(5, 7)}, "looks like the weights of a model"),
        ({"q.zebra": draw(5, 7)}, "'q.zebra' is not of an adapter that is known here"),
        ({}, "'' is not of an adapter"),
        (A | B | {"emb_params": draw(2, 3)}, "'emb_params' looks like textual inversion"),
        (DOWN | UP | {"q.lora_mid.weight": draw(2, 2)}, "looks like a Tucker"),
        (A | B | DOWN, r"of several trainers: .*of diffusers and .*of kohya"),
        (A | B | {"q.lora.up.weight": draw(7, 2)}, "are the same entry"),
        (A, "'q' must have both factors of an adapter"),
        (DOWN | B | {}, "of several trainers"),
        (DOWN | UP | {"q.alpha": draw(2)}, "'q.alpha' must be one number"),
        (DOWN | UP | {"q.alpha": np.zeros(())}, "read 0 as the rank"),
        (DOWN | UP | {"q.alpha": np.full((), np.nan)}, "one number that is finite"),
        (
            DOWN | UP | {"q.dora_scale": draw(1, 5)},
            r"one magnitude for each output, got \(1",
        ),
        (DOWN | UP | {"q.dora_scale": draw(7, 5)}, "one magnitude for each output"),
        (A | {"q.lora_B.weight": draw(7, 3)}, "do not fit each other"),
        (A | {"q.lora_B.weight": np.ones((7, 2), "int32")}, "is int32"),
    ],
)
def test_files_that_are_no_adapters(entries, message, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(entries, path)
    with pytest.raises(CheckpointError, match=message) as error:
        peft.load(path, TREE)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.gguf", b"GGUF\3\0\0\0", "is a GGUF file"),
        ("a.pt", b"\x80\2", "looks like a pickle"),
        ("a.safetensors", b"PK\3\4abc", "looks like a pickle"),
        ("a.safetensors", b"abcdefghijk", "cannot be read as safetensors"),
    ],
)
def test_other_kinds_of_files(name, content, message, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no "):
        peft.load(tmp_path / name, TREE)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        peft.load(tmp_path / name, TREE)


@pytest.mark.parametrize(
    ("fields", "entries", "message"),
    [
        ("[", A | B, "is not JSON|JSON"),
        ({"r": 3}, A | B, "says rank 3 .* for 'q', whose entries have rank 2"),
        ({"r": 2, "velora_config": {"a": 1}}, A | B, "velora_config is"),
        ({"unet.r": 2}, A | B, "has no config for 'q'"),
        ({"r": 2, "use_dora": True}, A | B, "use_dora True for 'q'.* use_dora False"),
        ({"r": 2}, A | B | ALPHA, "has alphas twice"),
        ({"r": 2, "lora_alpha": 0}, A | B, "alpha of 'q' is 0"),
        (metadata(lora_dropout=0.5), None, None),
        (metadata(models=["unet"]), None, "no config for 'text_encoder.layers.0.fc1'"),
        (
            {"a.r": 2, "b.r": 2, "b.lora_dropout": 0.5},
            {f"{n}.{k}": v for n in "ab" for k, v in (A | B).items()},
            "models with different settings",
        ),
    ],
)
def test_metadata_of_diffusers(fields, entries, message, tmp_path):
    path = tmp_path / "a.safetensors"
    if entries is None:
        write(path, DIFFUSERS, metadata=fields, alphas=False)
    else:
        text = fields if isinstance(fields, str) else json.dumps(fields)
        save_file(entries, path, {"lora_adapter_metadata": text})
    tree = TREE if entries else params()
    if message is None:
        assert peft.load(path, tree).plan.config.dropout == 0.5
        return
    with pytest.raises(CheckpointError, match=message) as error:
        peft.load(path, tree)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fine_tune_type": "full"}, "expected the fine_tune_type lora or dora"),
        ({"lora_parameters": None}, "expected .* lora_parameters"),
        ({"lora_parameters": {"rank": 3, "scale": 1.0}}, "has the rank 3, and 'q'"),
        ({"lora_parameters": {"rank": 2, "scale": "x"}}, "scale must be a number, got 'x'"),
        ({"lora_parameters": {"rank": 2, "scale": 0.0}}, "alpha of 'q' is 0"),
        ({"lora_parameters": {"rank": 2, "scale": 1e308}}, "lora_alpha"),
        ({"lora_parameters": {"rank": 2, "scale": 1, "dropout": 2}}, "lora_dropout"),
        (
            {"lora_parameters": {"rank": 2, "scale": 1, "new": 2}},
            r"allow_fields=\('new',\)",
        ),
        ({"fine_tune_type": "dora"}, "has no magnitude"),
    ],
)
def test_configs_of_mlx(config, message, tmp_path):
    own = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 1.0}}
    save_file(
        {"q.lora_a": draw(5, 2), "q.lora_b": draw(2, 7)}, tmp_path / "adapters.safetensors"
    )
    with pytest.raises(FileNotFoundError, match=r"no file .*adapter_config\.json"):
        peft.load(tmp_path, TREE)
    (tmp_path / CONFIG).write_text(json.dumps(own | config))
    with pytest.raises(CheckpointError, match=message) as error:
        peft.load(tmp_path, TREE)
    assert str(tmp_path) in str(error.value)
    if "new" in message:
        assert peft.load(tmp_path, TREE, allow_fields=["new"]).adapters


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("q", [(5, 2), (7, 2)], "do not fit each other"),
        ("q", [(3, 2, 5), (2, 7, 2)], r"expected \(in, r\) and \(r, out\), or \(experts"),
        ("q", [(5,), (2, 7)], r"expected \(in, r\)"),
        (
            "embed_tokens",
            [(5, 2), (2, 7), (5,)],
            "a magnitude for each row of an embedding",
        ),
    ],
)
def test_shapes_of_mlx(name, shapes, message, tmp_path):
    ends = "lora_a", "lora_b", "m"
    own = {f"{name}.{e}": draw(*s) for e, s in zip(ends, shapes, strict=False)}
    save_file(own, tmp_path / "adapters.safetensors")
    parameters = {"rank": 2, "scale": 1.0}
    (tmp_path / CONFIG).write_text(json.dumps({"lora_parameters": parameters}))
    with pytest.raises(CheckpointError, match=message):
        peft.load(tmp_path, TREE)


@pytest.mark.parametrize(
    ("dialect", "options", "message"),
    [
        ("kohya", {}, "needs? .*ends in .safetensors|one file"),
        ("kohya", {"replaced": True}, "hold no full arrays, and 'score.weight'"),
        (
            "mlx",
            {"names": {"conv": "q/kernel"}, "kernel": True},
            "of the kind 'convolution'",
        ),
        ("kohya", {"names": {"embed": "q/embedding"}}, "of the kind 'embedding'"),
        ("mlx", {"names": {"lora_unet_q": "q/kernel"}}, "has lost its dots, and mlx"),
        ("diffusers", {"names": {"unet.q": "q/kernel"}}, "is in no model of a pipeline"),
        ("kohya", {"names": {"k.v": "q/kernel"}}, "'k_v' and 'k.v' would both be"),
        ("gguf", {}, "dialect must be"),
    ],
)
def test_adapters_that_a_dialect_does_not_have(dialect, options, message, tmp_path):
    leaf = next(iter(options.get("names", {"": "q/kernel"}).values()))
    tree = {leaf: jnp.ones((2, 5, 7) if options.get("kernel") else (5, 7))}
    tree["k_v/kernel"] = jnp.ones((5, 7))
    tree["score/kernel"] = jnp.ones((7, 3))
    axes = {leaf: "iio"} if options.get("kernel") else {}
    config = lora_jax.LoraConfig(rank=2, targets=(leaf, "k_v/*"), axes=axes)
    plan = lora_jax.plan_adapters(config, tree)
    adapters = lora_jax.init_adapters(jax.random.key(0), tree, plan)
    path = tmp_path / ("out" if "one file" in message else "out.safetensors")
    replaced = {"score/kernel": tree["score/kernel"]} if options.get("replaced") else None
    with pytest.raises(ValueError, match=message):
        peft.save(
            path, adapters, plan, dialect=dialect, names=options.get("names"),
            replaced=replaced,
        )  # fmt: skip
    assert not path.is_file()
