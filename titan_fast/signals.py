"""SIGTERM, SIGINT and SIGUSR1 ask the run to finish its step, save and exit."""

import atexit
import os
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from titan_fast.distributed import under_torchrun
from titan_fast.redaction import redact

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers the first signal after `listen`. Later ones change nothing, even while the run and then the interpreter
    end, because one Ctrl-C arrives twice: from the terminal, and once more from torchrun. SIGQUIT and SIGKILL still end
    the process at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        """The signal's name."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        return self

    def listen(self) -> None:
        """From now on there is something to save. Until now signals had their usual effect."""
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            atexit.register(_ignore)


def _ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def resume_command() -> str:
    """The command that started this run (torchrun's, where torchrun started it), without the option that would take it
    back to an earlier step. Secrets in it are masked."""
    words = _command_line(os.getppid() if under_torchrun() else os.getpid())
    kept, skip = [], False
    for word in words:
        name = word.partition("=")[0].replace("-", "_")
        if name.endswith("__checkpoint.load_step"):
            skip = "=" not in word
        elif not skip:
            kept.append(redact(word))
        else:
            skip = False
    return shlex.join(kept)


def seconds_to_stop() -> float | None:
    """How long torchrun waits after a signal before it kills: its --shutdown-timeout, 30 s without one. None where
    torchrun did not start this process."""
    if not under_torchrun():
        return None
    words = [word.replace("_", "-") for word in _command_line(os.getppid())]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name == "--shutdown-timeout":
            try:
                return float(value or following)
            except ValueError:
                break
    return 30.0


def may_wait_longer() -> bool:
    """Whether this torch's torchrun has --shutdown-timeout; 2.11's has not."""
    from torch.distributed.run import get_args_parser

    return "--shutdown-timeout" in get_args_parser().format_usage()


def _command_line(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").removesuffix("\0").split("\0")
    except OSError:  # no /proc, as on macOS
        return [sys.executable, "-m", "titan_fast.train", *sys.argv[1:]]
