"""Processes that start at once: children of multiprocessing's fork server, which has imported everything once.

They do what a fresh interpreter does, less the seconds that it takes to import torch. Their code lives here, and not in a test
file, because a child imports the module that its code is in.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import IO

REPOSITORY = Path(__file__).parents[1]
children = multiprocessing.get_context("forkserver")
# What a run imports late: optimizers pull in torch._dynamo.
children.set_forkserver_preload(
    ["dydiff.experiments.workers", "gymnasium", "mujoco", "pytest", "torch._dynamo", "tensorboard.summary"]
)


def run_script(script: str, arguments: list[str], environment: dict[str, str], output: Path) -> None:
    """The body of a child: a script of the repository as `python SCRIPT ARGUMENTS` runs it."""
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [script, *arguments]
    runpy.run_path(str(REPOSITORY / script), run_name="__main__")


class Forked:
    """What `dydiff.experiments.workers` and `dydiff.child` use of a subprocess.Popen, for the commands of `module_command`."""

    def __init__(
        self,
        command: Sequence[str],
        stdin: int | None = None,
        stdout: IO | None = None,
        stderr: int | None = None,
        env: dict[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        start_new_session: bool = True,
    ):
        assert start_new_session
        # Connections are what multiprocessing hands on, whatever lies behind them.
        passed = {str(number): Connection(os.dup(number)) for number in pass_fds}
        standard = {}
        if stdin is not None:
            standard[0], ours = multiprocessing.Pipe(duplex=False)
            self.stdin = os.fdopen(os.dup(ours.fileno()), "wb")
            ours.close()
        if stdout is not None:
            standard[1] = standard[2] = Connection(os.dup(stdout.fileno()), readable=False)
        self._process = children.Process(target=_work, args=(command[2:], env or dict(os.environ), standard, passed))
        self._process.start()
        self.pid = self._process.pid
        for connection in {*standard.values(), *passed.values()}:
            connection.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.returncode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _work(command: list[str], environment: dict[str, str], standard: dict[int, Connection], passed: dict[str, Connection]) -> None:
    """Do what `python -c CODE ARGUMENTS` does; numbers of files among the arguments become those that they have here."""
    os.setsid()
    for number, connection in standard.items():
        os.dup2(connection.fileno(), number)
    for connection in {*standard.values()}:
        connection.close()
    os.environ.clear()
    os.environ.update(environment)
    code, *arguments = command
    sys.argv = ["-c", *(str(passed[word].fileno()) if word in passed else word for word in arguments)]
    exec(code, {"__name__": "__main__"})


# In the place of the module `subprocess` in `dydiff.experiments.workers` and `dydiff.child`.
SUBPROCESS = SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT, TimeoutExpired=subprocess.TimeoutExpired)
