"""A torchrun whose processes start with everything imported, which saves each of them seconds.

The agent is torch's own, as are its signals, restarts and reports; but it starts a rank by forking itself.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import runs
import torch
from children import CHILDREN
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler


class Torchrun:
    """The parts of a `subprocess.Popen` that are needed, for a torchrun in its own process group."""

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        file, name = tempfile.mkstemp()
        os.close(file)
        self._output = Path(name)
        self._process = CHILDREN.Process(target=_agent, args=(words, environment, self._output))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Waits for its end; (output, None). Raises subprocess.TimeoutExpired after the timeout."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("torchrun", timeout or 0.0)
        text = self._output.read_text()
        self._output.unlink()
        return text, None


def start(
    processes: int, data: Path, folder: Path, faults: list[dict[str, Any]], flags: tuple[str, ...] = (), **changes: Any
) -> Torchrun:
    """A tiny run under torchrun with faults."""
    words = [*runs.standalone(processes), *flags, str(runs.FAULTS), *runs.arguments(data, folder, **changes)]
    return Torchrun(words, runs.environment(FAULTS=json.dumps(faults)))


def _agent(words: list[str], environment: dict[str, str], output: Path) -> None:
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    with mock.patch.object(SubprocessHandler, "_popen", lambda self, args, env: _Rank(args, env)):
        run.main(words)


class _Rank:
    """The parts of a `subprocess.Popen` that the agent needs, for `python -u script words`."""

    def __init__(self, command: tuple[str, ...], environment: dict[str, str]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            _be(command, environment)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        give_up = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if give_up is not None and time.monotonic() >= give_up:
                raise subprocess.TimeoutExpired("rank", timeout or 0.0)
            time.sleep(0.02)
        return status


def _be(command: tuple[str, ...], environment: dict[str, str]) -> NoReturn:
    """Turns this fork of the agent into a rank's process, which ends as the interpreter would."""
    status = 1
    try:
        os.setsid()
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        _, unbuffered, script, *words = command
        assert unbuffered == "-u", command
        sys.argv = [script, *words]
        try:
            runpy.run_path(script, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as at an interpreter's end
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
