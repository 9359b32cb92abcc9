import pytest

from lora_jax.peft.formats.keys import BIAS, WEIGHT, is_flat
from lora_jax.peft.names import Names, find_modules
from lora_jax.peft.words import (
    Found,
    fill_numbers,
    index_paths,
    lacking_fields,
    numbers_in,
    search_paths,
    split_name,
    split_path,
)


def names_of(path, names, sizes):
    """The names of the modules of a stack, each with its index."""
    sites = find_modules(path, Names(names), (*sizes, 5, 7), "b" * len(sizes) + "io")
    return [(site.name, site.indices) for site in sites]


def find(name, *paths, leaf=WEIGHT):
    index = index_paths(paths, flat=is_flat(name))
    return search_paths(split_name(name), (leaf, ""), index)


@pytest.mark.parametrize(
    ("path", "words", "leaf"),
    [
        ("params/layers_0/q_proj/kernel", "layers 0 q_proj", WEIGHT),
        ("layers/0/q_proj/kernel/value", "layers 0 q_proj", WEIGHT),
        ("model.layers.0.q_proj.weight", "model layers 0 q_proj", WEIGHT),
        ("block_11/dense/bias/raw_value", "block 11 dense", BIAS),
        ("tok/embedding", "tok", WEIGHT),
        ("norm/scale", "norm", WEIGHT),
        ("mlp/w1/w", "mlp w1", WEIGHT),
        ("mlp/w1", "mlp w1", ""),
        ("kernel", "kernel", ""),
    ],
)
def test_words_of_a_path(path, words, leaf):
    assert split_path(path) == (tuple(words.split()), leaf)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("model.layers.0.attn.q", "decoder/layers_0/attn/q/kernel"),
        ("model.layers.0.attn.q", "h/0/attn/q/w"),
        ("lm_head", "params/lm_head/kernel"),
        ("a.up", "a/up"),
    ],
)
def test_one_path(name, path):
    assert find(name, path, "other/leaf/kernel", "x/q_norm/scale") == [Found(path, ())]


@pytest.mark.parametrize(
    ("name", "path", "indices"),
    [
        ("lora_unet_mid_block_attn1_to_q", "mid_block/attn1/to_q/kernel", ()),
        ("lora_unet_mid_block_attn1_to_q", "unet/mid_block/attn1/to_q/kernel", ()),
        ("lora_unet_down_0_1_to_out_0", "down_0/1/to_out_0/kernel", ()),
        ("lora_unet_down_blocks_0_q", "params/down_blocks/q/kernel", (0,)),
        ("lora_te2_layers_3_fc1", "text_encoder_2/layers/3/fc1/kernel", ()),
        ("lora_te2_layers_3_fc1", "text_encoder_2/layers/fc1/kernel", (3,)),
        ("lora_te2_layers_3_fc1", "layers/fc1/kernel", (3,)),
        ("lora_te2_layers_3_fc1", "text_encoder/layers/fc1/kernel", None),
        ("lora_te_layers_3_fc1", "unet/layers/3/fc1/kernel", None),
        ("lora_unet_fc1", "text_encoder/fc1/kernel", None),
        ("lycoris_layers_0_fc1", "layers_0/fc1/kernel", ()),
        ("lora_unet_layers_0_fc1", "layers_1/fc1/kernel", None),
    ],
)
def test_flat_names(name, path, indices):
    """Their words are joined by underscores, and begin with a model of a pipeline."""
    assert find(name, path) == ([] if indices is None else [Found(path, indices)])
    if indices:
        assert [number for _, number in lacking_fields(name, path)] == [*indices]


def test_the_longest_common_end_wins():
    paths = "enc/layers_0/attn/q/kernel", "enc/layers_0/cross/q/kernel"
    assert find("m.layers.0.attn.q", *paths) == [Found(paths[0], ())]
    assert find("m.layers.0.other.q", *paths) == [Found(path, ()) for path in paths]


def test_a_path_that_is_all_of_the_end_wins():
    paths = "q/kernel", "a/q/kernel", "b/a/q/kernel"
    assert find("q", *paths) == [Found(paths[0], ())]
    assert find("a.q", *paths) == [Found(paths[1], ())]
    assert find("m.a.q", *paths) == [Found(paths[1], ())]
    assert find("c.q", *paths[1:]) == [Found(path, ()) for path in paths[1:]]


def test_numbers_have_to_agree():
    assert not find("layers.1.q", "layers_0/q/kernel")
    assert not find("layers.1.q", "layers_11/q/kernel")
    assert not find("layers.1.q", "blocks_1/layers_0/q/kernel")
    assert not find("q", "layers_0/q/kernel")
    assert find("layers.1.q", "layers/q/kernel") == [Found("layers/q/kernel", (1,))]
    assert find("l.1.e.2.q", "l/e/q/kernel") == [Found("l/e/q/kernel", (1, 2))]
    assert find("l.1.e.2.q", "l/1/e/q/kernel") == [Found("l/1/e/q/kernel", (2,))]
    assert not find("a.1.b.2.c.3.q", "a/b/c/q/kernel")


def test_weights_and_biases_are_apart():
    paths = "h/0/q/kernel", "h/0/q/bias"
    assert find("h.0.q", *paths) == [Found(paths[0], ())]
    assert find("h.0.q", *paths, leaf=BIAS) == [Found(paths[1], ())]


def test_templates():
    assert numbers_in("l.{}.q", "l.12.q") == (12,)
    assert numbers_in("l.{}.q", "lx12.q") is None
    assert numbers_in("l.{}.q", "l.x.q") is None
    assert numbers_in("l.q", "l.q") == ()
    assert fill_numbers("l.{}.e.{}", (3,)) == "l.3.e.{}"
    assert fill_numbers("{odd}.{}", (3,)) == "{odd}.3"
    assert lacking_fields("l.1.e.2.q", "x/l_2/q/kernel") == (("l", 1),)


def test_names_of_paths():
    assert names_of("params/layers_0/q/kernel", None, ()) == [("layers.0.q", ())]
    assert names_of("h/q", {"x.y": "h/q", "z": "h/k"}, ()) == [("x.y", ())]
    assert names_of("h/q", {"x.y": ("h/q", "oi")}, ()) == [("x.y", ())]
    assert names_of("h/q", lambda path: path.replace("/", "."), ()) == [("h.q", ())]
    assert names_of("h/7/q", {"m.{}.q": "h/{}/q"}, ()) == [("m.7.q", ())]


def test_names_of_stacks():
    by_index = [("m.0.q", (0,)), ("m.1.q", (1,))]
    assert names_of("h/q", {"m.{}.q": "h/q"}, (2,)) == by_index
    assert names_of("h/q", {"m.{}.q": "h/q"}, (2, 3)) == by_index
    assert names_of("h/q", {"m.1.q": "h/q", "m.0.q": "h/q"}, (2,)) == by_index
    assert names_of("h/q", {"m.1.q": "h/q", "m.0.q": "h/q"}, (2, 3)) == by_index
    assert names_of("moe/up", {"h.moe.up": "moe/up"}, (3,)) == [("h.moe.up", ())]
    both = names_of("l/4/e/w", {"l.{}.e.{}.w": "l/{}/e/w"}, (2,))
    assert both == [("l.4.e.0.w", (0,)), ("l.4.e.1.w", (1,))]


def test_a_stack_of_one_layer_is_no_parameter():
    assert names_of("h/q", {"m.0.q": "h/q"}, (1,)) == [("m.0.q", (0,))]
    assert names_of("h/moe", {"m.0.moe": "h/moe"}, (1, 3)) == [("m.0.moe", (0,))]
    assert names_of("h/0/moe", {"m.0.moe": "h/0/moe"}, (1,)) == [("m.0.moe", ())]


@pytest.mark.parametrize(
    ("path", "names", "sizes", "message"),
    [
        ("h/q", None, (2,), r"stack of 2, .* names=\{'name.\{\}.of': 'h/q'\}"),
        ("h/q", {"m.{}.{}.q": "h/q"}, (2,), "has 2 numbers, and 'h/q' has 1 stacked axes"),
        ("h/q", {"m.0.q": "h/q", "m.2.q": "h/q"}, (2,), "one module for each index"),
        ("h/q", {"m.0.q": "h/q", "m.0.k": "h/q"}, (2,), "one module for each index"),
        ("h/q", {"m.a": "h/q", "m.b": "h/q"}, (), "one module for each index"),
        ("h/q", {"m.{}": "h/q", "m.1": "h/q"}, (2,), "give one template"),
        ("h/7/q", {"m": "h/{}/q"}, (), "has fewer numbers"),
    ],
)
def test_names_that_are_not_enough(path, names, sizes, message):
    with pytest.raises(ValueError, match=message):
        names_of(path, names, sizes)


def test_a_function_has_to_give_names():
    with pytest.raises(TypeError, match="names must return the name of a module, got None"):
        names_of("h/q", lambda path: None, ())


def test_the_order_of_names():
    names = {"m.up": "h/up", "l.{}.down": "h/down"}
    naming = Names(names)
    assert [naming.position(n) for n in ("m.up", "l.3.down", "?")] == [0, 1, 0]
    assert Names(None).position("m.up") == 0
    given = Names({"m": ("h/q", "oi"), "n": "h/k"})
    assert given.axes("h/q") == "oi"
    assert given.axes("h/k") is None
