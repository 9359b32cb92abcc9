import pickle

import pytest

from lora_jax._core.immutable import FrozenDict


def test_it_is_a_mapping_in_order():
    frozen = FrozenDict({"b": 1, "a": 2})
    assert list(frozen) == ["b", "a"]
    assert len(frozen) == 2
    assert frozen["a"] == 2
    assert dict(frozen) == {"b": 1, "a": 2}
    assert repr(frozen) == "{'b': 1, 'a': 2}"
    assert FrozenDict([("a", 1)]) == FrozenDict(a for a in [("a", 1)])


def test_it_equals_mappings_and_its_hash_does_not_depend_on_the_order():
    frozen = FrozenDict({"b": 1, "a": 2})
    assert frozen == {"a": 2, "b": 1}
    assert frozen == FrozenDict({"a": 2, "b": 1})
    assert hash(frozen) == hash(FrozenDict({"a": 2, "b": 1}))
    assert frozen != {"a": 2}
    assert frozen != 3


def test_it_cannot_change_and_is_independent_of_its_source():
    source = {"a": 1}
    frozen = FrozenDict(source)
    source["a"] = 2
    assert frozen["a"] == 1
    with pytest.raises(TypeError, match="does not support item assignment"):
        frozen["a"] = 3
    with pytest.raises(AttributeError, match="no attribute"):
        frozen.other = 3


def test_unhashable_values_make_it_unhashable():
    with pytest.raises(TypeError, match="unhashable"):
        hash(FrozenDict({"a": []}))


def test_pickle():
    frozen = FrozenDict({"b": 1, "a": FrozenDict()})
    assert pickle.loads(pickle.dumps(frozen)) == frozen
