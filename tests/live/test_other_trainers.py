"""Files of diffusers and mlx-lm, from these and back into them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
import lora_jax.peft
from tests.support import assert_close

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")

from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models import llama  # noqa: E402
from mlx_lm.tuner import utils as tuner  # noqa: E402

pytestmark = [
    pytest.mark.live,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ULPS = 2**6
PIPELINE = "StableDiffusionLoraLoaderMixin"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]


def unet():
    """A small U-Net with the same random values each time."""
    torch.manual_seed(0)
    attention = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    return diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=(attention[0], "DownBlock2D"),
        up_block_types=("UpBlock2D", attention[1]),
        cross_attention_dim=12, attention_head_dim=4,
    ).eval()  # fmt: skip


def sample(module):
    generator = torch.Generator().manual_seed(1)
    shapes = (1, 4, 8, 8), (1, 3, 12)
    noise, text = (torch.randn(shape, generator=generator) for shape in shapes)
    with torch.no_grad():
        return module(noise, 3, text).sample.numpy()


def params_of(module):
    return {k: jnp.asarray(v.numpy()) for k, v in module.state_dict().items()}


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def trained(request, tmp_path):
    """A U-Net with an adapter, saved by diffusers in a directory."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 3},
        use_dora=request.param, target_modules=TARGETS,
    )  # fmt: skip
    module = unet()
    module.add_adapter(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) / 8)
            elif "magnitude" in name:
                value.mul_(1.2)
    module.save_lora_adapter(tmp_path / "trained")
    return module, tmp_path / "trained"


def test_diffusers(trained, tmp_path):
    module, folder = trained
    params, want = params_of(unet()), sample(module)
    assert not np.allclose(want, sample(unet()), atol=0.1)
    loaded = lora_jax.peft.load(folder, params, layout="torch")
    scales = {(t.rank, t.scale) for t in loaded.plan.targets.values()}
    assert scales == {(4, 1.5), (2, 3.0), (4, 0.75)}
    merged = lora_jax.merge_adapters(params, loaded.adapters, loaded.plan)
    module.fuse_lora()
    fused = {k.replace(".base_layer", ""): v for k, v in module.state_dict().items()}
    for name, value in merged.items():
        assert_close(value, fused[name].numpy(), ULPS)

    path = tmp_path / "adapter.safetensors"
    files = [("diffusers", False), ("diffusers", True)]
    dora = any(t.method == "dora" for t in loaded.plan.targets.values())
    # diffusers reads neither kohya's dora_scale nor alphas of attention that differ.
    files += [] if dora else [("kohya", True)]
    mixin = getattr(diffusers.loaders, PIPELINE)
    for dialect, uniform in files:
        lora_jax.peft.save(
            path, loaded.adapters, loaded.plan, layout="torch", dialect=dialect,
            uniform=uniform, names=lambda name: f"unet.{name.removesuffix('.weight')}",
        )  # fmt: skip
        fresh = unet()
        state, alphas, metadata = mixin.lora_state_dict(
            str(path), return_lora_metadata=True
        )
        mixin.load_lora_into_unet(state, alphas, fresh, metadata=metadata)
        assert_close(sample(fresh), want, ULPS)
    lora_jax.peft.save(
        path, loaded.adapters, loaded.plan, layout="torch", dialect="diffusers"
    )
    fresh = unet()
    fresh.load_lora_adapter(str(path), prefix=None, use_safetensors=True)
    np.testing.assert_array_equal(sample(fresh), want)


def language_model(tied):
    """A small Llama of mlx-lm with the same random values each time."""
    mx.random.seed(0)
    settings = llama.ModelArgs(
        model_type="llama", hidden_size=16, num_hidden_layers=3, intermediate_size=24,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=32,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return llama.Model(settings)


def logits(module):
    module.eval()
    return np.array(module(mx.array([[1, 5, 9, 3]])))


@pytest.mark.parametrize(
    ("tied", "dora", "keys"),
    [
        (False, False, None),
        (False, True, ["self_attn.q_proj", "mlp.down_proj"]),
        (True, False, ["model.embed_tokens", "self_attn.v_proj"]),
    ],
)
def test_mlx(tied, dora, keys, tmp_path):
    module = language_model(tied)
    params = {k: jnp.asarray(np.array(v)) for k, v in tree_flatten(module.parameters())}
    own = {"rank": 4, "scale": 3.5, "dropout": 0.1} | ({"keys": keys} if keys else {})
    tuner.linear_to_lora_layers(module, 2, dict(own), use_dora=dora)
    for name, value in tree_flatten(module.trainable_parameters()):
        if name.endswith("lora_b"):
            module.load_weights([(name, mx.random.normal(value.shape) / 8)], strict=False)
        elif name.endswith(".m"):
            module.load_weights([(name, 1.2 * value)], strict=False)
    folder, ends = tmp_path / "trained", ("lora_a", "lora_b", "m")
    folder.mkdir()
    weights = {
        name: value
        for name, value in tree_flatten(module.parameters())
        if name.rpartition(".")[2] in ends
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    method = "dora" if dora else "lora"
    config = {"fine_tune_type": method, "num_layers": 2, "lora_parameters": own}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    want = logits(module)
    assert not np.allclose(want, logits(language_model(tied)), atol=0.1)

    loaded = lora_jax.peft.load(folder, params, layout="torch")
    merged = lora_jax.merge_adapters(params, loaded.adapters, loaded.plan)
    fused = {n: m.fuse().weight for n, m in module.named_modules() if hasattr(m, "fuse")}
    assert len(fused) == len(loaded.adapters)
    for name, value in fused.items():
        assert_close(merged[f"{name}.weight"], np.array(value), ULPS)
    lora_jax.peft.save(
        tmp_path / "saved", loaded.adapters, loaded.plan, layout="torch", dialect="mlx"
    )
    fresh = tuner.load_adapters(language_model(tied), str(tmp_path / "saved"))
    np.testing.assert_array_equal(logits(fresh), want)
