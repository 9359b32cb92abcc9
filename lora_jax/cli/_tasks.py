"""Runs the steps of a command in a few threads, so that the disk and the cores work."""

import collections
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax._core import compat

# Even on one core, one thread computes while another one waits for the disk. More than a
# few would not be faster than the disk, and each has its own block in memory.
_THREADS = min(4, max(2, os.cpu_count() or 1))

# The C library of Linux returns freed memory to the system, unless a larger block was freed
# before, of up to 32 MiB. The system has to clear returned memory before its next use.
_KEPT = 32 * 2**20 - 8192


class Task(NamedTuple):
    """A step, which may run at the same time as others.

    Attributes:
        name: of the array.
        size: of the old values in bytes.
        run: does the step.
        alone: whether no other step may run meanwhile, because this one takes much memory.
    """

    name: str
    size: int
    run: Callable[[], Any]
    alone: bool = False


def run_tasks(tasks: Iterable[Task], done: Callable[[Task, Any], None]) -> None:
    """Runs tasks in threads, and gives each with its result to `done`, in their order.

    Only a few tasks are taken before the first of them is done, so that memory holds no
    more. The first error, in this order, is raised: tasks that have begun are completed
    before that, and no others are.
    """
    np.empty(_KEPT, np.uint8)  # is freed at once, and never used
    waiting = collections.deque[tuple[Task, Future[Any]]]()
    wide = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]

    def run(task: Task) -> Any:
        with compat.in_64_bits(wide):  # each thread has this setting for itself
            return task.run()

    def wait(most: int) -> None:
        while len(waiting) > most:
            task, future = waiting.popleft()
            done(task, future.result())

    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for task in tasks:
                if task.alone:
                    wait(0)
                waiting.append((task, pool.submit(run, task)))
                wait(0 if task.alone else 2 * _THREADS)
            wait(0)
        finally:
            for _, future in waiting:
                future.cancel()
