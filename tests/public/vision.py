"""Images."""

import jax
import jax.numpy as jnp

from tests.public.building import of_equinox, of_haiku, of_linen, of_nnx, public
from tests.public.checks import normal, tokens


@public("haiku")
def haiku_resnet():
    import haiku as hk
    return of_haiku(lambda is_training, x: hk.nets.ResNet((1, 1, 1, 1), 5, bottleneck=True, channels_per_group=(8, 8, 12, 12))(x, is_training=is_training), normal(2, 16, 16, 3), config={"targets": "*/w"})


@public("haiku")
def haiku_mobilenet():
    import haiku as hk
    return of_haiku(lambda is_training, x: hk.nets.MobileNetV1(channels=(8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8), num_classes=5)(x, is_training=is_training), normal(2, 32, 32, 3), config={"targets": "*/w"})


@public("jimm")
def jimm_vit():
    import jimm
    return of_nnx(lambda rngs: jimm.models.vit.vit_model.VisionTransformer(num_classes=5, img_size=8, patch_size=4, num_layers=2, num_heads=2, mlp_dim=16, hidden_size=12, rngs=rngs), normal(2, 8, 8, 3))


@public("equimo")
def equimo_vit():
    import equimo.models.vit as vit
    return of_equinox(lambda key: vit.VisionTransformer(8, 3, 12, 4, 2, [2], num_classes=5, key=key), normal(2, 3, 8, 8), call=lambda m, x: jax.vmap(lambda x: m(x, key=jax.random.key(0), inference=True))(x), left_out=("reg_tokens", "*/proj/weight", "global_pos_embed/*"))


@public("jax_resnet")
def jax_resnet_resnest():
    import jax_resnet
    return of_linen(jax_resnet.ResNeSt50(n_classes=5, stage_sizes=(1, 1)), normal(2, 16, 16, 3), config={"targets": "*/kernel"})


@public("nanodl")
def nanodl_mixer():
    import nanodl
    return of_linen(nanodl.Mixer(patch_size=(4, 4), num_layers=2, hidden_dim=12, num_heads=2, feedforward_dim=16, n_outputs=5, dropout=0.0), normal(2, 8, 8, 3), left_out=("*/Embed_0/embedding",))


@public("nanodl")
def nanodl_unet():
    import nanodl
    return of_linen(nanodl.UNet((8, 8), [4, 6], 1, 4, 1.0, 10.0), normal(2, 8, 8, 3), normal(2, 1, 1, 1), config={"targets": "*/kernel"})
