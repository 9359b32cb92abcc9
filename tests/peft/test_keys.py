import pytest

from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.keys import (
    Dims,
    Module,
    as_experts,
    nesting,
    sort_entries,
    without_wrapper,
)

P = "base_model.model."
PAIR = {"q__lora_A__weight": (2, 5), "q__lora_B__weight": (7, 2)}


def sort(**shapes):
    return sort_entries(
        "the file", {P + k.replace("__", "."): v for k, v in shapes.items()}
    )


def test_kinds_and_sizes():
    modules = sort(
        q__lora_A__weight=(2, 5),
        q__lora_B__weight=(7, 2),
        q__lora_B__bias=(7,),
        tok__lora_embedding_A=(2, 11),
        tok__lora_embedding_B=(3, 2),
        conv__lora_A__weight=(2, 4, 3, 5),
        conv__lora_B__weight=(6, 2, 1, 1),
        conv__lora_magnitude_vector=(1, 6, 1, 1),
    ).modules
    kinds = {name: (m.kind, m.dims, m.rank) for name, m in modules.items()}
    assert kinds == {
        "q": ("linear", Dims(5, 7), 2),
        "tok": ("embedding", Dims(11, 3), 2),
        "conv": ("convolution", Dims(4, 6, (3, 5)), 2),
    }
    assert modules["q"].keys["B_bias"] == P + "q.lora_B.bias"


def test_names_that_older_versions_wrote():
    modules = sort(
        tok__lora_embedding_A__weight=(2, 11),
        tok__lora_embedding_B__weight=(3, 2),
        tok__lora_magnitude_vector__weight=(3,),
    ).modules
    assert modules["tok"].shapes == {"A": (2, 11), "B": (3, 2), "m": (3,)}


def test_what_is_whole_and_what_is_rows():
    entries = sort(
        head__weight=(3, 4),
        q__base_layer__bias=(3,),
        emb__token_adapter__trainable_tokens_delta=(2, 4),
    )
    assert entries.wholes == {
        "head.weight": P + "head.weight",
        "q.bias": P + "q.base_layer.bias",
    }
    assert entries.tokens == {"emb": f"{P}emb.token_adapter.trainable_tokens_delta"}
    assert not entries.modules


def test_only_whole_words_are_wrappers():
    assert without_wrapper("a.base_layer.base_layer.b") == "a.b"
    assert (
        without_wrapper("a.base_layers.0.base_layer_norm")
        == "a.base_layers.0.base_layer_norm"
    )
    assert nesting("a.experts.base_layer.base_layer") == ("a.experts", 2)
    assert nesting("a.base_layer.b") == ("a.base_layer.b", 0)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q__lora_A__weight": (2, 5)}, "'q' must have one lora_A and one lora_B"),
        ({"q__lora_magnitude_vector": (5,)}, "must have one lora_A and one lora_B"),
        (
            {"q__lora_embedding_A": (2, 5), "q__lora_B__weight": (3, 2)},
            "must have one lora_A and one lora_B",
        ),
        (
            {"q__lora_A__weight": (2, 5), "q__lora_B__weight": (7, 3)},
            "do not fit each other",
        ),
        ({"q__lora_A__weight": (2,), "q__lora_B__weight": (7, 2)}, "do not fit each other"),
        (
            {"q__lora_A__weight": (0, 5), "q__lora_B__weight": (7, 0)},
            "do not fit each other",
        ),
        (
            {"q__lora_A__weight": (2, 5, 3), "q__lora_B__weight": (7, 2, 3)},
            "do not fit each other",
        ),
        (
            {"q__lora_embedding_A": (2, 5, 3), "q__lora_embedding_B": (7, 2, 1)},
            "do not fit each other",
        ),
        ({"q__lora_diag": (2,)}, "kind of the entry .* is not known"),
        ({"q__lora_A__default__weight": (2, 5)}, "kind of the entry .* is not known"),
        ({"q__bias": (2,), "q__base_layer__bias": (2,)}, "are the same"),
        (
            {"q__lora_magnitude_vector": (2,), "q__lora_magnitude_vector__weight": (2,)},
            "are the same",
        ),
        (PAIR | {"q__lora_magnitude_vector": (5,)}, r"must have the shape \(7,\)"),
        (PAIR | {"q__lora_B__bias": (1, 7)}, r"must have the shape \(7,\)"),
        (
            {
                "q__lora_embedding_A": (2, 5),
                "q__lora_embedding_B": (7, 2),
                "q__lora_B__bias": (7,),
            },
            "bias of an embedding",
        ),
    ],
)
def test_entries_that_do_not_fit(shapes, message):
    with pytest.raises(CheckpointError, match=message):
        sort(**shapes)


def test_a_prefix_is_needed():
    with pytest.raises(CheckpointError, match=r"does not start with 'base_model.model.'"):
        sort_entries("the file", {"q.lora_A.weight": (2, 5)})


def experts(rows, ranks, parameters=("moe.up", "moe.down")):
    modules = {}
    for depth, count in enumerate(reversed(rows)):
        name = "h.0.moe" + ".base_layer" * depth
        shapes = {"A": (count, 5), "B": (7, count)}
        modules[name] = Module(name, "linear", shapes, {})
    marked = as_experts("the file", modules, parameters, ranks.__getitem__)
    return [marked[name].experts for name in reversed(modules)]


def test_the_number_of_experts():
    up, down = "h.0.moe.up", "h.0.moe.down"
    assert experts([6, 12], {up: 2, down: 2}) == [3, 6]
    assert experts([6, 12], {up: 2, down: 4}) == [3, 3]
    assert experts([12, 6], {up: 2, down: 4}) == [3, 3]
    assert experts([6], {}, ("other.up",)) == [0]


@pytest.mark.parametrize("rows", [[7], [6, 6]])
def test_a_number_of_experts_that_does_not_follow(rows):
    with pytest.raises(CheckpointError, match="do not give a number of experts"):
        experts(rows, {"h.0.moe.up": 2, "h.0.moe.down": 6 if len(rows) == 2 else 2})
