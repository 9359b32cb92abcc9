import pytest

from lora_jax._io.tensor_files import CheckpointError
from lora_jax.peft.formats.keys import (
    Dims,
    Module,
    as_experts,
    nesting,
    sort_entries,
    without_wrapper,
)

P = "base_model.model."
# Suffixes of entries by the names of this test.
SUFFIXES = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "bias": "lora_B.bias",
    "m": "lora_magnitude_vector",
    "old_m": "lora_magnitude_vector.weight",
    "EA": "lora_embedding_A",
    "EB": "lora_embedding_B",
    "old_EA": "lora_embedding_A.weight",
    "old_EB": "lora_embedding_B.weight",
    "rows": "token_adapter.trainable_tokens_delta",
}


def sort(**modules):
    """Sorts entries: for each module its shapes by suffix."""
    shapes = {
        f"{P}{module}.{SUFFIXES.get(suffix, suffix)}": shape
        for module, own in modules.items()
        for suffix, shape in own.items()
    }
    return sort_entries("the file", shapes)


def test_kinds_and_sizes():
    modules = sort(
        q={"A": (2, 5), "B": (7, 2), "bias": (7,)},
        tok={"EA": (2, 11), "EB": (3, 2)},
        conv={"A": (2, 4, 3, 5), "B": (6, 2, 1, 1), "m": (1, 6, 1, 1)},
    ).modules
    kinds = {name: (m.kind, m.dims, m.rank) for name, m in modules.items()}
    assert kinds == {
        "q": ("linear", Dims(5, 7), 2),
        "tok": ("embedding", Dims(11, 3), 2),
        "conv": ("convolution", Dims(4, 6, (3, 5)), 2),
    }
    assert modules["q"].keys["B_bias"] == P + "q.lora_B.bias"
    older = sort(tok={"old_EA": (2, 11), "old_EB": (3, 2), "old_m": (3,)}).modules
    assert older["tok"].shapes == {"A": (2, 11), "B": (3, 2), "m": (3,)}


def test_what_is_whole_and_what_is_rows():
    wholes = {"head": {"weight": (3, 4)}, "q": {"base_layer.bias": (3,)}}
    entries = sort(**wholes, emb={"rows": (2, 4)})
    assert entries.wholes == {
        "head.weight": P + "head.weight",
        "q.bias": P + "q.base_layer.bias",
    }
    assert entries.tokens == {"emb": f"{P}emb.token_adapter.trainable_tokens_delta"}
    assert not entries.modules


def test_only_whole_words_are_wrappers():
    assert without_wrapper("a.base_layer.base_layer.b") == "a.b"
    other = "a.base_layers.0.base_layer_norm"
    assert without_wrapper(other) == other
    assert nesting("a.experts.base_layer.base_layer") == ("a.experts", 2)
    assert nesting("a.base_layer.b") == ("a.base_layer.b", 0)


INCOMPLETE, UNFIT = "'q' must have one lora_A and one lora_B", "do not fit each other"
UNKNOWN, SIZE = "kind of the entry .* is not known", r"must have the shape \(7,\)"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"A": (2, 5)}, INCOMPLETE),
        ({"m": (5,)}, INCOMPLETE),
        ({"EA": (2, 5), "B": (3, 2)}, INCOMPLETE),
        ({"A": (2, 5), "B": (7, 3)}, UNFIT),
        ({"A": (2,), "B": (7, 2)}, UNFIT),
        ({"A": (0, 5), "B": (7, 0)}, UNFIT),
        ({"A": (2, 5, 3), "B": (7, 2, 3)}, UNFIT),
        ({"EA": (2, 5, 3), "EB": (7, 2, 1)}, UNFIT),
        ({"lora_diag": (2,)}, UNKNOWN),
        ({"lora_A.default.weight": (2, 5)}, UNKNOWN),
        ({"weight": (2,), "base_layer.weight": (2,)}, "are the same"),
        ({"m": (2,), "old_m": (2,)}, "are the same"),
        ({"A": (2, 5), "B": (7, 2), "m": (5,)}, SIZE),
        ({"A": (2, 5), "B": (7, 2), "bias": (1, 7)}, SIZE),
        ({"EA": (2, 5), "EB": (7, 2), "bias": (7,)}, "bias of an embedding"),
    ],
)
def test_entries_that_do_not_fit(shapes, message):
    with pytest.raises(CheckpointError, match=message):
        sort(q=shapes)


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
