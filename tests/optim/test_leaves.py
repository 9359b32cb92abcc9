"""The leaves of trees that hold adapters: what is one, which paths, which gaps."""

import re

import jax
import numpy as np
import optax
import pytest

from lora_jax._core import tree_paths
from lora_jax.optim import _leaves

GAP = optax.MaskedNode()
FORMS = {
    "factors": ({"A": 1, "B": 1}, True),
    "all entries": (dict.fromkeys(_leaves.ENTRIES, 1), True),
    "masked": ({"A": GAP, "B": None}, True),
    "no B": ({"A": 1, "m": 1}, False),
    "another entry": ({"A": 1, "B": 1, "C": 1}, False),
    "a tree below": ({"A": {"x": 1}, "B": 1}, False),
    "no dict": ((1, 1), False),
}


@pytest.mark.parametrize(("node", "is_adapter"), FORMS.values(), ids=FORMS)
def test_form_of_an_adapter(node, is_adapter):
    assert {leaf.adapter is not None for leaf in _leaves.flatten(node)[0]} == {is_adapter}


def test_names_of_the_leaves():
    tree = {"adapters": {"q/kernel": {"A": 1, "B": 2}}, "head": 3}
    a, b, head = _leaves.flatten(tree)[0]
    names = "q/kernel", "adapters/q/kernel", "q/kernel/A", "adapters/q/kernel/A"
    assert a.names == names
    assert (b.value, b.entry, b.weight) == (2, "B", "q/kernel")
    assert head == _leaves.Leaf(3, "head")
    assert head.names == ("head",)


def test_names_where_the_tree_is_one_adapter():
    assert [leaf.names for leaf in _leaves.flatten({"A": 1, "B": 2})[0]] == [("A",), ("B",)]


def test_gaps_keep_their_places():
    tree = {"w": {"A": GAP, "B": np.ones(2)}, "x": None, "y": GAP}
    leaves, structure = _leaves.flatten(tree)
    assert [leaf.path for leaf in leaves] == ["w/A", "w/B", "x", "y"]
    again = structure.unflatten(leaf.value for leaf in leaves)
    assert jax.tree.structure(again) == jax.tree.structure(tree)


def test_patterns_match_paths_of_weights_and_of_leaves():
    leaves, _ = _leaves.flatten({"adapters": {"q/kernel": {"A": 1, "B": 2}}, "head": 3})

    def chosen(*patterns):
        return _leaves.choose("patterns", patterns, leaves)

    assert chosen("q/kernel") == ["q/kernel", "q/kernel", None]
    assert chosen("adapters/*/B", "q/*") == ["q/*", "adapters/*/B", None]
    assert chosen("re:head|.*A") == ["re:head|.*A", None, "re:head|.*A"]


def test_pattern_for_what_is_masked():
    leaves, _ = _leaves.flatten({"adapters": {"w": {"A": 1, "B": 1}}, "head": GAP})
    assert _leaves.choose("exclude", ["head"], leaves) == [None, None, "head"]
    with pytest.raises(ValueError, match=r"masked: if the pattern .* leaf by leaf"):
        _leaves.choose("exclude", ["head/kernel"], leaves)


def test_tree_without_leaves_has_nothing_to_match():
    assert _leaves.choose("exclude", ["head"], []) == []
    _leaves.check_holds_adapters("lora_plus", [])


def test_patterns_as_text():
    assert tree_paths.as_texts("exclude", re.compile("a+")) == ("re:a+",)
    assert tree_paths.as_texts("exclude", ["a", "b"]) == ("a", "b")
    assert tree_paths.as_entries("rates", {re.compile("a"): 1, "re:a": 2}) == {"re:a": 1}
