"""Tasks run in threads, a few at a time, and their results come in order."""

import threading

import jax
import pytest

from lora_jax.cli import _tasks
from lora_jax.cli._tasks import Task
from tests import support

THREADS, COUNT = 3, 40


@pytest.fixture(autouse=True)
def few_threads(monkeypatch):
    monkeypatch.setattr(_tasks, "_THREADS", THREADS)


def test_results_come_in_order_and_few_tasks_are_taken_ahead():
    taken, results, most, meet = [], [], [], threading.Barrier(THREADS)

    def tasks():
        for number in range(THREADS * COUNT):
            taken.append(number)
            most.append(len(taken) - len(results))
            # Each waits for two others, so it ends only if three run at once.
            yield Task(str(number), number, lambda n=number: (meet.wait(60), n)[1])

    _tasks.run_tasks(tasks(), lambda task, result: results.append((task.size, result)))
    assert results == [(number, number) for number in range(THREADS * COUNT)]
    assert max(most) <= 2 * THREADS + 1


def test_nothing_runs_beside_a_large_task():
    running, seen, lock = set(), {}, threading.Lock()

    def run(number):
        with lock:
            running.add(number)
            seen[number] = set(running)
        with lock:
            running.remove(number)

    tasks = [Task("", n, lambda n=n: run(n), alone=n % 5 == 2) for n in range(COUNT)]
    order = []
    _tasks.run_tasks(tasks, lambda task, _: order.append((task.size, set(seen))))
    assert [number for number, _ in order] == list(range(COUNT))
    for number, before in order:
        if number % 5 == 2:
            assert seen[number] == {number}
            assert before == set(range(number + 1))


@pytest.mark.parametrize("where", ["task", "done"])
def test_the_first_error_ends_the_tasks(where):
    started, done = [], []

    def run(number):
        started.append(number)
        if where == "task" and number >= 7:
            raise ArithmeticError(f"of {number}")

    def note(task, _):
        if where == "done" and task.size == 7:
            raise ArithmeticError("of 7")
        done.append(task.size)

    tasks = (Task("", n, lambda n=n: run(n)) for n in range(1000))
    with pytest.raises(ArithmeticError, match="of 7"):
        _tasks.run_tasks(tasks, note)
    assert done == list(range(7))
    assert len(started) <= 8 + 2 * THREADS


def test_tasks_have_64_bits_where_the_caller_has():
    def bits():
        found = set()
        tasks = [Task("", 0, lambda: jax.config.jax_enable_x64) for _ in range(5)]
        _tasks.run_tasks(tasks, lambda _, wide: found.add(wide))
        return found

    assert bits() == {False}
    with support.x64():
        assert bits() == {True}
