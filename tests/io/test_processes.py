"""Arrays of one process are written by it; `tests/processes` has two real processes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax._io import processes


def sharded():
    sharding = NamedSharding(jax.make_mesh((4,), ("data",)), P("data"))
    return jax.device_put(jnp.arange(8.0), sharding)


def test_arrays_of_one_process_are_not_gathered():
    tree, seen = {"a": sharded(), "b": np.ones(2), "c": "text"}, []
    processes.write_once("save", tree, seen.append)
    assert seen[0] is tree
    assert np.array_equal(processes.to_host(tree["a"]), np.arange(8.0))


def test_arrays_of_some_processes_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "is_shared", lambda value: True)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    text = "save gathers arrays that lie on devices of all 3 processes, got one on devices "
    with pytest.raises(ValueError, match=re.escape(text + "of the processes [0]")):
        processes.write_once("save", sharded(), print)
