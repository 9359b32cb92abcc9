"""The other end of `_field_worker.py`: environments, processes and their answers."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from _field_case import Case
from _language_case import LanguageCase

HERE = pathlib.Path(__file__).parent
ENVIRONMENTS = ("jax", "torch")


class WorkerError(RuntimeError):
    """A worker that could not be started, ended, or did not do what it was asked."""


def make_environment(
    name: str, directory: pathlib.Path, requirements: pathlib.Path | None = None
) -> pathlib.Path:
    """Makes a virtual environment, or finds the one that was made before.

    The first requirement is installed on its own before the others, so that none of them
    chooses another version or build of it.

    Args:
        name: of the environment.
        directory: the environment is the folder of that name in it.
        requirements: the file that pins them, by default `field/requirements-NAME.txt`.

    Returns:
        Its Python.

    Raises:
        WorkerError: if something cannot be installed.
    """
    requirements = requirements or HERE / "field" / f"requirements-{name}.txt"
    wanted = requirements.read_text()
    folder = directory / name
    record, python = folder / "requirements.txt", folder / "bin" / "python"
    if record.exists() and record.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    lines = [line for line in wanted.splitlines() if line and not line.startswith("#")]
    install = [str(python), "-m", "pip", "install", "--quiet"]
    _run([sys.executable, "-m", "venv", str(folder)])
    if lines:
        _run([*install, lines[0]])
        _run([*install, "-r", str(requirements)])
    record.write_text(wanted)  # the last thing, so that half an environment is made anew
    return python


def _run(command: list[str]) -> None:
    # Output goes to the other stream: standard output is the table.
    try:
        subprocess.run(command, check=True, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        raise WorkerError(f"its environment could not be made: {error}") from error


class Client:
    """A worker in a process of its own.

    Args:
        python: the interpreter of its environment.
        environment: which contestants it has.
        case: the sizes and the file of arrays.
        script: what the process runs, beside this file.

    Raises:
        WorkerError: if it does not start.
    """

    def __init__(
        self,
        python: str | os.PathLike[str],
        environment: str,
        case: Case | LanguageCase,
        script: str = "_field_worker.py",
    ):
        self.environment = environment
        command = [os.fspath(python), str(HERE / script), environment]
        try:
            self._process = subprocess.Popen(
                [*command, case.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=worker_variables(os.environ, case.threads),
            )
        except OSError as error:
            raise WorkerError(f"{python} does not start: {error}") from error

    def ask(self, command: str, **options: Any) -> dict[str, Any]:
        """Sends a command and waits for the answer.

        Raises:
            WorkerError: if the worker ended, or answered with an error.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        try:
            print(
                json.dumps({"command": command, **options}),
                file=self._process.stdin,
                flush=True,
            )
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass  # said below, with the status
        asked = " ".join([command, *(str(value) for value in options.values())])
        if not line:
            raise WorkerError(
                f"the worker of {self.environment} ended, with status "
                f"{self._process.wait()}, when it was asked to {asked!r}."
            )
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(
                f"the worker of {self.environment} could not {asked!r}: {answer['error']}"
            )
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def worker_variables(variables: Mapping[str, str], threads: int) -> dict[str, str]:
    """The environment variables of a worker. Threads that wait take no processor."""
    path = [str(HERE.parent), *filter(None, [variables.get("PYTHONPATH")])]
    own = {
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        # Workers share the memory of an accelerator.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if threads:
        own["OMP_NUM_THREADS"] = own["MKL_NUM_THREADS"] = str(threads)
    return {**variables, **own}
