"""Saves arrays that lie on devices of several processes: one process writes.

The arrays are gathered one at a time, and process 0 writes the same file as a program of
one process. Adapters are a small part of a model. A file for each process would need a
directory that all processes share, and could not be replaced in one step.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils

from lora_jax._core import compat

T = TypeVar("T")

WAIT_SECONDS = 600.0
"""How long a process waits for the others to call the same function."""
PIECE_BYTES = 2**28
_LONGEST = 2000  # bytes of the message about a failed write
_KINDS = (OSError, TypeError, ValueError, RuntimeError)


def is_shared(value: Any) -> bool:
    """Whether an array lies on devices of other processes, too."""
    is_array = isinstance(value, jax.Array) and not isinstance(value, Tracer)
    return is_array and not value.is_fully_addressable


def to_host(value: Any) -> np.ndarray:
    """The values of an array.

    If the array is shared, all processes must call this. A sharded array is gathered to all
    devices; in pieces of `PIECE_BYTES` if its first axis is whole, as in stacks of layers.
    """
    if not is_shared(value) or value.is_fully_replicated:
        return np.asarray(value)
    gather = functools.partial(multihost_utils.process_allgather, tiled=True)
    own = value.sharding.shard_shape(value.shape)
    if own[:1] != value.shape[:1] or value.nbytes <= PIECE_BYTES:
        return gather(value)
    host = np.empty(value.shape, value.dtype)
    rows = max(1, PIECE_BYTES * len(host) // host.nbytes)
    for start in range(0, len(host), rows):
        stop = min(start + rows, len(host))
        # Indexing would refuse an array in the memory of the host.
        host[start:stop] = gather(jax.lax.slice_in_dim(value, start, stop))
    return host


def write_once(caller: str, tree: T, write: Callable[[T], None]) -> None:
    """Calls `write(tree)`, in process 0 alone if an array of the tree is shared.

    Then all processes must call this. Process 0 gets the tree with its shared arrays
    gathered to the host, one after the other. The others return when `write` has returned.
    If it raised an error, they raise one with the same message.

    Args:
        caller: the public function, for messages.
        tree: a pytree.
        write: writes files. It must not use shared arrays.

    Raises:
        TimeoutError: if the other processes do not call this.
        ValueError: if a process has no part of a shared array.
    """
    shared = list(filter(is_shared, jax.tree.leaves(tree)))
    if not shared:
        write(tree)
        return
    _check_everywhere(caller, shared)
    _wait(caller)
    writes, error = jax.process_index() == 0, None

    def gathered(value: Any) -> Any:
        if not is_shared(value) or jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return value
        array = to_host(value)
        return array if writes else None

    gathered_tree = jax.tree.map(gathered, tree)
    if writes:
        try:
            write(gathered_tree)
        except BaseException as raised:
            error = raised
    text = "" if error is None else f"{_kind(error)}{type(error).__name__}: {error}"
    sent = np.frombuffer(text.encode()[:_LONGEST].ljust(_LONGEST, b"\0"), np.uint8)
    received = bytes(multihost_utils.broadcast_one_to_all(sent)).rstrip(b"\0")
    if error is not None:
        raise error
    if received:
        kind, reason = received[:1].decode(), received[1:].decode(errors="replace")
        raise _KINDS[int(kind)](f"{caller} failed in process 0. {reason}")


def _kind(error: BaseException) -> int:
    """The index of the first kind that an error is of; that of RuntimeError for others."""
    found = (i for i, kind in enumerate(_KINDS) if isinstance(error, kind))
    return next(found, len(_KINDS) - 1)


def _check_everywhere(caller: str, shared: list[jax.Array]) -> None:
    everywhere = set(range(jax.process_count()))
    for value in shared:
        found = {device.process_index for device in value.sharding.device_set}
        if found != everywhere:
            raise ValueError(
                f"{caller} gathers arrays that lie on devices of all {len(everywhere)} "
                f"processes, got one on devices of the processes {sorted(found)}: move the "
                "arrays to one process or to all."
            )


def _wait(caller: str) -> None:
    try:
        compat.wait_for_processes(f"lora_jax: {caller}", WAIT_SECONDS)
    except RuntimeError as error:
        raise TimeoutError(
            f"not all of the {jax.process_count()} processes called {caller} within "
            f"{WAIT_SECONDS:.0f} seconds. Some arrays lie on devices of several processes, "
            "so every process must call it: it gathers them, and process 0 writes. Is the "
            "call inside `if jax.process_index() == 0`, or did another process stop?"
        ) from error
