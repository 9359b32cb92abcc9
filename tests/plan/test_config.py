import dataclasses
import json
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.layers import initializers
from lora_jax.plan.config import LoraConfig

FULL = LoraConfig(
    rank=4,
    alpha=2.5,
    targets=["*/q/*", re.compile("v", re.IGNORECASE)],
    exclude="*/bias",
    rank_pattern={"a/*": 2, "*": 6},
    alpha_pattern={re.compile("a/.*"): 8},
    axes={"*/emb": "io", "*/q": "bio"},
    rank_stabilized=True,
    use_dora=True,
    dropout=0.25,
    init=("zeros", "gaussian"),
    dtype="bfloat16",
)


def test_defaults():
    config = LoraConfig()
    assert (config.rank, config.alpha, config.targets) == (8, 16.0, "all-linear")
    assert config.exclude == ()
    assert config.rank_pattern == config.alpha_pattern == config.axes == {}
    assert (config.method, config.dropout, config.dtype) == ("lora", 0.0, None)


def test_fields_are_kept_in_one_form():
    assert FULL.targets == ("*/q/*", "re:(?i)v")
    assert FULL.exclude == ("*/bias",)
    assert FULL.alpha_pattern == {"re:a/.*": 8.0}
    assert LoraConfig(targets=re.compile("a")) == LoraConfig(targets=("re:a",))
    assert LoraConfig(rank=np.int64(8), alpha=np.float32(16)) == LoraConfig()
    assert LoraConfig(dtype=jnp.float16).dtype == "float16"
    assert LoraConfig(rank_pattern={"re:a": 1, re.compile("a"): 2}).rank_of("a") == 1


def test_it_is_hashable_static_and_frozen():
    again = dataclasses.replace(FULL)
    assert again == FULL
    assert hash(again) == hash(FULL)
    assert pickle.loads(pickle.dumps(FULL)) == FULL
    assert jax.tree.leaves(FULL) == []
    assert jax.jit(lambda config: jnp.full((), config.alpha))(FULL) == 2.5
    with pytest.raises(dataclasses.FrozenInstanceError, match="rank"):
        FULL.rank = 3


def test_what_holds_at_a_path():
    assert FULL.method == "dora"
    assert [FULL.rank_of(path) for path in ("a/b", "b")] == [2, 6]
    assert [FULL.alpha_of(path) for path in ("a/b", "b")] == [8.0, 2.5]
    assert FULL.scale_of("a/b") == 8.0 / 2**0.5
    assert dataclasses.replace(FULL, rank_stabilized=False).scale_of("a/b") == 4.0
    assert [FULL.axes_of(path) for path in ("x/emb", "x/q", "x")] == ["io", "bio", None]


@pytest.mark.parametrize("config", [LoraConfig(), FULL], ids=["default", "full"])
def test_json_round_trip(config):
    assert LoraConfig.from_json(config.to_json()) == config
    assert LoraConfig.from_json(config.to_json()).to_json() == config.to_json()


def test_json_is_plain():
    fields = json.loads(FULL.to_json())
    assert fields["targets"] == ["*/q/*", "re:(?i)v"]
    assert fields["rank_pattern"] == {"a/*": 2, "*": 6}
    assert LoraConfig.from_json('{"rank": 2}') == LoraConfig(2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rnk": 2}', "a LoraConfig has no field 'rnk'; the nearest is 'rank'"),
        ("[1]", "a LoraConfig must be a JSON object, got list"),
        ('{"rank": 0}', "rank must be a positive integer, got 0"),
        ("{", "Expecting property name"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig.from_json(text)


@pytest.mark.parametrize("init", [initializers.zeros, ("zeros", initializers.zeros)])
def test_a_function_is_no_json(init):
    config = LoraConfig(init=init)
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(TypeError, match=r"init is the function .* use the name of an init"):
        config.to_json()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be a positive integer, got 0"),
        ({"rank": 2.0}, TypeError, "rank must be a positive integer, got 2.0"),
        ({"alpha": 0}, ValueError, "alpha must not be 0: the adapter would never act"),
        ({"alpha": float("nan")}, ValueError, "alpha must be finite in float32, got nan"),
        ({"alpha": "1"}, TypeError, "alpha must be a number or a scalar array, got '1'"),
        ({"alpha": jnp.ones(())}, TypeError, r"Python number.*use float\(alpha\)"),
        ({"targets": ()}, ValueError, "targets is empty: give patterns"),
        ({"targets": {"a"}}, TypeError, r"targets must be a pattern or a tuple.*\(set\)"),
        ({"targets": ("a", "all-linear")}, ValueError, "'all-linear' stands alone"),
        ({"targets": "re:["}, ValueError, r"'re:\[' in targets is not a valid regular ex"),
        ({"exclude": (3,)}, TypeError, "a pattern in exclude must be a string"),
        ({"train": ("",)}, ValueError, "a pattern in train is empty"),
        ({"rank_pattern": ("a", 2)}, TypeError, "rank_pattern must be a dict.*got tuple"),
        ({"rank_pattern": {"a": 0}}, ValueError, r"rank_pattern\['a'\].*integer, got 0"),
        ({"alpha_pattern": {"a": 0}}, ValueError, r"alpha_pattern\['a'\].*must not be 0"),
        ({"axes": {"a": "xo"}}, ValueError, r"axes\['a'\].*one i and one o, got 'xo'"),
        ({"axes": {"a": "ii"}}, ValueError, "one i and one o, got 'ii'"),
        ({"axes": {"a": (0, 1)}}, TypeError, "must be a string such as 'io'.*tuple"),
        ({"products": {"f": "x"}}, ValueError, r"products\['f'\].*one part for each op"),
        ({"products": {"f": "a,ab->"}}, ValueError, "'' is no part"),
        ({"products": {"f": "a1,1b->ab"}}, ValueError, "'a1' is no part"),
        ({"products": {"f": "aab,b->a"}}, ValueError, "'aab' has a letter twice"),
        ({"products": {"f": "ab,bc->ab,c"}}, ValueError, "must have one result"),
        ({"products": {"f": "_,_->ab"}}, ValueError, "two operands, or one"),
        ({"products": {"f": "ab,bc->a"}}, ValueError, "the letter 'c' is in one operand"),
        ({"products": {"f": "...ab,bc->ac"}}, ValueError, "'...' must be in an operand"),
        ({"products": {"f": "mk,gkn,g->nm"}}, ValueError, "as 'mk,gkn,g->mn'"),
        ({"products": {"f": "ab,bc->ac; "}}, ValueError, "'' states no product"),
        ({"products": {"f": ["ab,bc->ac"]}}, TypeError, "must be a text such as"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": "a"}, TypeError, "dropout must be a Python number"),
        ({"use_dora": 1}, TypeError, "use_dora must be True or False, got 1"),
        ({"rank_stabilized": None}, TypeError, "rank_stabilized must be True or False"),
        ({"init": "gausian"}, ValueError, "init must be one of .*Did you mean 'gaussian'"),
        ({"init": 3}, TypeError, "init must be a name"),
        ({"init": ("zeros", "orthogonal")}, ValueError, "makes A and B together"),
        ({"init": "orthogonal", "rank": 3}, ValueError, "rank must be even, got 3"),
        ({"dtype": "int8"}, TypeError, "at least 16 bits, got int8"),
        ({"dtype": "float8_e4m3fn"}, TypeError, "at least 16 bits, got float8_e4m3fn"),
        ({"dtype": "flot"}, TypeError, "dtype must be that of an array, got 'flot'"),
    ],
)
def test_bad_fields(fields, error, message):
    with pytest.raises(error, match=message):
        LoraConfig(**fields)
