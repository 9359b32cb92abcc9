import re

import jax
import numpy as np
import pytest

from lora_jax import LoraConfig, plan_adapters
from lora_jax._core import tree_paths
from lora_jax._core.tree_paths import matches


@jax.tree_util.register_pytree_with_keys_class
class Box:
    """A variable whose leaf has the path of an `nnx.State`'s."""

    def __init__(self, value):
        self.value = value

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey("value"), self.value)], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_leaves_by_path_in_their_order():
    tree = {"b": [1, {"c": 2}], "a": Box(3), "none": None}
    leaves, treedef = tree_paths.flatten(tree)
    assert leaves == {"a/value": 3, "b/0": 1, "b/1/c": 2}
    assert list(leaves.values()) == jax.tree.leaves(tree)
    assert treedef == jax.tree.structure(tree)
    assert tree_paths.leaf_paths(5) == {"": 5}


def test_two_leaves_with_one_path():
    with pytest.raises(ValueError, match=r"path 'a/b': \['a'\]\['b'\] and \['a/b'\]\. Ren"):
        tree_paths.leaf_paths({"a": {"b": 1}, "a/b": 2})


@pytest.mark.parametrize(
    ("pattern", "path", "want"),
    [
        ("*/kernel", "a/b/kernel", True),
        ("*/kernel", "kernel", False),
        ("a/*", "a/b/c", True),
        ("a/?/c", "a/b/c", True),
        ("A/b", "a/b", False),
        ("*/[qv]/*", "layers/q/kernel", True),
        ("re:.*/(q|v)/kernel", "0/q/kernel", True),
        ("re:q", "0/q", False),
        ("re:(?i)A/B", "a/b", True),
        ("*/kernel", "a/kernel/value", True),
        ("re:a/kernel", "a/kernel/raw_value", True),
        ("a/kernel/value", "a/kernel/value", True),
        ("a/*/value", "a/kernel/value", True),
        ("a/kernel", "a/kernel/other", False),
        # An ending of NNX in the pattern, and none or the other one in the path.
        ("*/kernel/value", "a/kernel", True),
        ("kernel/value", "kernel/raw_value", True),
        ("re:.*/kernel/raw_value", "a/kernel", True),
        ("re:kernel/value", "kernel", True),
        ("*/value", "a/query", False),
        ("a/*/value", "a/query", False),
        ("a/query/value", "a/query/kernel", False),
        ("value", "value", True),
    ],
)
def test_matches(pattern, path, want):
    assert tree_paths.matches(pattern, path) is want


def test_only_paths_with_the_beginning_of_a_pattern_are_compared(monkeypatch):
    compared, compare = [], tree_paths._matches
    monkeypatch.setattr(
        tree_paths, "_matches", lambda *args: compared.append(args) or compare(*args)
    )
    paths = [f"blocks/{i}/kernel" for i in range(30)]
    assert not tree_paths.unmatched([f"blocks/{i}/*" for i in range(30)], paths)
    assert not tree_paths.unmatched(paths, paths)
    assert len(compared) <= 5 * len(paths)


def test_the_first_pattern_counts():
    values = {"a/*": 1, "*": 2}
    assert tree_paths.look_up(values, "a/b", 0) == 1
    assert tree_paths.look_up(values, "b", 0) == 2
    assert tree_paths.look_up({}, "b", 0) == 0
    assert tree_paths.first_match(["b", "c"], "a") is None
    assert tree_paths.unmatched(["a*", "b*"], ["a/b", "c"]) == ["b*"]


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("*/q", "*/q"),
        ("re:a|b", "re:a|b"),
        (re.compile("a|b"), "re:a|b"),
        (re.compile("(?i)a"), "re:(?i)a"),
        (re.compile("a", re.IGNORECASE), "re:(?i)a"),
        (re.compile("(?s)a", re.I | re.X), "re:(?isx)(?s)a"),
    ],
)
def test_text_of_patterns(pattern, text):
    assert tree_paths.as_text("targets", pattern) == text
    assert tree_paths.as_text("targets", text) == text
    if isinstance(pattern, re.Pattern):
        assert re.compile(text.removeprefix("re:")).flags == pattern.flags


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("re:(", ValueError, r"'re:\(' in targets is not a .* expression: missing \)"),
        ("", ValueError, r"a pattern in targets is empty: '\*' matches every path"),
        ("re:", ValueError, "a pattern in targets is empty"),
        (3, TypeError, r"a pattern in targets must be a string.*got 3 \(int\)"),
        (re.compile(b"a"), TypeError, "an re.Pattern of text, got re.compile"),
    ],
)
def test_bad_patterns(pattern, error, message):
    with pytest.raises(error, match=message):
        tree_paths.as_text("targets", pattern)


PATHS = ["decoder/0/query/kernel", "decoder/0/query/bias", "decoder/0/mlp/up_proj/w", "emb"]


@pytest.mark.parametrize(
    ("pattern", "first"),
    [
        ("decoder/*/qurey/kernel", PATHS[0]),
        ("*/up_proj", PATHS[2]),
        ("re:.*/QUERY", PATHS[0]),
        ("embedding", PATHS[3]),
    ],
)
def test_nearest(pattern, first):
    near = tree_paths.nearest(pattern, PATHS)
    assert near[0] == first
    assert len(near) <= 3


def test_nearest_to_something_else_are_the_first():
    assert tree_paths.nearest("zzz", PATHS) == []
    hint = tree_paths.nearest_hint("zzz", PATHS)
    assert "the first paths are 'decoder/0/query/kernel'" in hint
    assert tree_paths.nearest_hint("zzz", []).endswith("are none")


def test_a_path_with_brackets_names_itself():
    assert tree_paths.matches("layers[0]/kernel", "layers[0]/kernel")
    assert not tree_paths.matches("layers[0]/kernel", "layers1/kernel")
    assert tree_paths.matches("layers[0]/kernel", "layers0/kernel")  # as a glob


def test_a_path_is_found_with_and_without_the_ending_of_nnx():
    assert tree_paths.find("a/kernel", ["a/kernel/value", "b"]) == "a/kernel/value"
    assert tree_paths.find("a/kernel/value", ["a/kernel", "b"]) == "a/kernel"
    assert tree_paths.find("a/kernel/value", ["a/kernel/raw_value"]) == "a/kernel/raw_value"
    assert tree_paths.find("a/value", ["a/value", "a"]) == "a/value"
    assert tree_paths.find("c/value", ["a/value", "b"]) == "c/value"


def test_the_index_finds_what_matches_in_order():
    patterns = ("a/value", "a", "*/value", "b", "re:b|a", "a/value/value", "a[b]", "A")
    paths = ("a", "a/value", "a/raw_value", "b/value", "a/value/value", "ab", "a[b]", "c")
    index = tree_paths.PatternIndex(patterns)
    for path in paths:
        want = [i for i, pattern in enumerate(patterns) if matches(pattern, path)]
        assert [*index.matching(path)] == want
        first = patterns[want[0]] if want else None
        assert tree_paths.first_match(patterns, path) == first
    assert tree_paths.unmatched(patterns, ("b/value", "re:b|a")) == [
        p for p in patterns if p not in ("*/value", "b", "re:b|a")
    ]


def test_the_time_for_many_exact_patterns_does_not_grow_with_its_square(monkeypatch):
    tree = {f"w{i}": np.ones((2, 3), np.float32) for i in range(100)}
    calls = []

    def counted(pattern, path):
        calls.append(path)
        return matches(pattern, path)

    monkeypatch.setattr(tree_paths, "matches", counted)
    config = LoraConfig(targets=tuple(tree), axes=dict.fromkeys(tree, "io"))
    assert len(plan_adapters(config, tree).targets) == 100
    assert len(calls) < 20 * len(tree)
