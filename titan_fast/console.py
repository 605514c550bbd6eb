"""Standard output that never makes a run wait for its reader."""

import os
import select
import threading
import time
import weakref
from contextlib import suppress
from typing import TextIO

_PATIENCE_SECONDS = 1.0
_MOST_BYTES = 10
"""The most bytes of a character, where a console that is not UTF-8 shows it as an escape."""


class Console:
    """Behaves as `stream` for `print`, logging and rich. When the stream is full because nobody reads it (a paused
    pager, Ctrl-S), text is left out, and before the next line that it takes it is said how many lines were. When it
    becomes full there is one wait, of a second. A file, or an object that is no file at all, takes everything."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._is_full = False
        self._left_out = 0  # lines
        self._terminal: int | None = None
        if self.isatty():
            with suppress(OSError):
                # A terminal may make a writer wait although poll says that it has room. A descriptor of our own does
                # not wait; the stream's own shares that flag with the shell.
                self._terminal = os.open(os.ttyname(stream.fileno()), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
                weakref.finalize(self, os.close, self._terminal)

    @property
    def encoding(self) -> str:
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def flush(self) -> None:
        """Does nothing: `write` flushes."""

    def write(self, text: str) -> int:
        """Raises OSError if the stream is gone."""
        with self._lock:
            note = f"\n({self._left_out} lines were left out while nobody read; train.log has the steps)\n"
            if self._left_out and self._show(note):
                self._left_out += text.count("\n")
            else:
                rest = self._show(text)
                self._left_out = rest.count("\n") if isinstance(rest, str) else rest.count(b"\n")
        return len(text)

    def _show(self, text: str) -> str | bytes:
        """Writes as long as there is room. Returns the rest."""
        rest: str | bytes = text
        if self._terminal is not None:
            rest = text.encode(self._stream.encoding, self._stream.errors or "strict")
        give_up = time.monotonic() + (0.0 if self._is_full else _PATIENCE_SECONDS)
        while rest:
            has_room = self._has_room(max(0.0, give_up - time.monotonic()))
            if has_room and (written := self._write_some(rest)):
                rest, self._is_full = rest[written:], False
            elif time.monotonic() >= give_up:
                self._is_full = True
                break
            else:
                time.sleep(0.01)
        return rest

    def _write_some(self, content: str | bytes) -> int:
        """Writes what does not block, and returns how much."""
        if isinstance(content, str):
            size = select.PIPE_BUF // _MOST_BYTES  # a pipe that has room at all has room for so many bytes
            self._stream.write(content[:size])
            self._stream.flush()
            return size
        assert self._terminal is not None
        try:
            return os.write(self._terminal, content)
        except BlockingIOError:
            return 0

    def _has_room(self, seconds: float) -> bool:
        poll = select.poll()
        try:
            poll.register(self._stream.fileno(), select.POLLOUT)
        except (OSError, ValueError, AttributeError):  # it is no file
            return True
        return bool(poll.poll(1000 * seconds))
