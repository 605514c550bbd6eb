"""The error contract: `titan_fast: <what> [<where>]; <what to do>` on one line, and an exit status per kind."""

import atexit
import difflib
import errno
import gc
import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import NoReturn, ParamSpec

from titan_fast.redaction import redact

P = ParamSpec("P")

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a disk that is full, or has no room for this user or file."""

_FAILING = frozenset({errno.EIO, errno.ESTALE, errno.EROFS, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO})
"""Errors of a disk or file server that is failing."""
_NO_HANDLE = frozenset({errno.EMFILE, errno.ENFILE})
_AFTER_THE_FIRST = 2.0  # seconds
_NO_PATH = frozenset({errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP})


class TitanFastError(Exception):
    """A failure that the user can do something about. what: what went wrong, with the values. fix: what to do. where:
    the path, rank, step or key."""

    exit_status = 1

    def __init__(self, what: str, fix: str, where: str = "") -> None:
        self.what, self.fix, self.where = what, fix, where
        super().__init__(f"{what}{f' [{where}]' if where else ''}; {fix}")

    def __reduce__(self) -> tuple:  # the default would call __init__ with the whole sentence alone
        return type(self), (self.what, self.fix, self.where)


class ConfigError(TitanFastError, ValueError):
    """A setting, or a combination of settings, that cannot run."""

    exit_status = 2


class DataError(TitanFastError, ValueError):
    """Data or a tokenizer that is missing, unreadable or does not fit the model."""

    exit_status = 3


class CheckpointError(TitanFastError, RuntimeError):
    """A checkpoint that cannot be written, found, trusted or continued from."""

    exit_status = 4


class NumericsError(TitanFastError, ArithmeticError):
    """A loss or a gradient that is not finite, or a compiled block that disagrees with the eager one."""

    exit_status = 5


class CommunicationError(TitanFastError, RuntimeError):
    """Ranks that cannot reach each other, or one that hangs."""

    exit_status = 6


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The beginning of a hint, with the known word that is closest to a mistyped one; empty where none is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}? " if close else ""


def fail(error: TitanFastError) -> NoReturn:
    """Ends the process as the contract says. Secrets in the sentence are masked."""
    if isinstance(error, ConfigError) and os.environ.get("LOCAL_RANK", "0") != "0":
        # Usually all ranks have the same to say. Once the first has said it and has left, torchrun ends the others.
        time.sleep(_AFTER_THE_FIRST)
    try:
        sys.stdout.flush()
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in redact(str(error)))
        print(f"titan_fast: {line}", file=sys.stderr, flush=True)  # noqa: T201
    except OSError:  # that nobody reads changes no exit status
        leave_console()
    sys.exit(error.exit_status)


@contextmanager
def reported() -> Iterator[None]:
    """Turns a TitanFastError raised inside into its line and exit status. Does the same for a disk that is full or
    fails and for a path that this user may not use, which can happen anywhere. Other errors keep their traceback."""
    try:
        yield
    except TitanFastError as error:
        fail(error)
    except KeyboardInterrupt:
        print("titan_fast: interrupted; start again as before", file=sys.stderr, flush=True)  # noqa: T201
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        where = str(error.filename or "")
        if error.errno == errno.EFBIG:
            fail(
                CheckpointError(
                    f"a file is too large for its limit (ulimit -f) or its file system: {error.strerror}",
                    "raise the limit, or name another folder",
                    where,
                )
            )
        if error.errno in NO_ROOM:
            fail(CheckpointError(f"the disk is full: {error.strerror}", "make room and start again as before", where))
        if error.errno in _FAILING:
            fail(CheckpointError(f"the disk fails: {error.strerror}", "fix it and start again as before", where))
        if error.errno in _NO_HANDLE:
            fail(ConfigError(f"no file can be opened: {error.strerror}", "allow more (ulimit -n)", where))
        if error.errno in _NO_PATH and where:
            fail(ConfigError(f"no such path: {error.strerror}", "name another", where))
        if isinstance(error, PermissionError) and where:
            fail(ConfigError(f"not allowed: {error.strerror}", "give this user the right, or name another path", where))
        if isinstance(error, BrokenPipeError) and _nobody_reads():  # as in `... | head`
            leave_console()
            sys.exit(128 + signal.SIGPIPE)
        raise


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader is gone. A BrokenPipeError may also come from a connection."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except OSError:  # it is no file
        return False


def leave_console() -> None:
    """Redirects standard output to nowhere, and standard error too if it is the same file."""
    with suppress(OSError):  # it is no file
        gone, null = os.fstat(sys.stdout.fileno()), os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            if os.path.samestat(os.fstat(stream.fileno()), gone):
                os.dup2(null, stream.fileno())
        os.close(null)


def command(main: Callable[P, None]) -> Callable[P, None]:
    """Decorates the `main` of a command line. A console that is not UTF-8 shows other characters as escapes; one that
    was closed before the start shows nothing."""

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:
                setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        # Otherwise the interpreter looks for garbage among all of torch's objects at its end, which takes 1 to 2 s.
        atexit.register(gc.freeze)
        with reported():
            main(*args, **kwargs)
            sys.stdout.flush()

    return run
