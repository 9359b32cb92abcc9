"""Models of images."""

import jax

from tests.public.building import of_equinox, of_haiku, of_linen, public
from tests.public.checks import normal

EVERY_KERNEL = {"targets": "*/kernel"}  # "all-linear" leaves convolutions out


@public("haiku")
def haiku_resnet():
    import haiku as hk

    def images(is_training, x):
        channels = (8, 8, 12, 12)
        net = hk.nets.ResNet((1,) * 4, 5, bottleneck=False, channels_per_group=channels)
        return net(x, is_training=is_training)

    return of_haiku(images, normal(2, 32, 32, 3), config={"targets": "*/w"})


@public("haiku")
def haiku_mobilenet():
    import haiku as hk

    def images(is_training, x):
        net = hk.nets.MobileNetV1(channels=(6,) * 13, num_classes=5)
        return net(x, is_training=is_training)

    return of_haiku(images, normal(2, 32, 32, 3), config={"targets": "*/w"})


@public("equimo")
def equimo_vision_transformer():
    from equimo.models.vit import VisionTransformer

    def make(key):
        return VisionTransformer(8, 3, 12, 4, 2, [2], num_classes=5, key=key)

    def call(model, x):
        key = jax.random.key(0)
        return jax.vmap(lambda x: model(x, key=key, inference=True))(x)

    return of_equinox(
        make,
        normal(2, 3, 8, 8),
        call=call,
        left_out=("reg_tokens", "*/proj/weight", "global_pos_embed/*"),
        dtype="float32",
        ulps=2**12,
    )


@public("jax_resnet")
def jax_resnet_split_attention():
    import jax_resnet

    model = jax_resnet.ResNeSt50(n_classes=5, stage_sizes=(1,))
    return of_linen(model, normal(2, 16, 16, 3), config=EVERY_KERNEL)


@public("nanodl")
def nanodl_mixer():
    import nanodl

    model = nanodl.Mixer(
        patch_size=(4, 4),
        num_layers=2,
        hidden_dim=12,
        num_heads=2,
        feedforward_dim=16,
        n_outputs=5,
        dropout=0.0,
    )
    return of_linen(model, normal(2, 8, 8, 3), left_out=("*/Embed_0/embedding",))


@public("nanodl")
def nanodl_diffusion_unet():
    import nanodl

    model = nanodl.UNet((8, 8), [4, 6], 1, 4, 1.0, 10.0)
    return of_linen(model, normal(2, 8, 8, 3), normal(2, 1, 1, 1), config=EVERY_KERNEL)
