"""What a run tells on standard output, without ever waiting for who reads it."""

import select
import threading
import time
from typing import TextIO

_PATIENCE_SECONDS = 1.0
_MOST_BYTES = 10
"""Of a character, where a console that is not UTF-8 shows it as an escape."""
_TERMINAL_ROOM = 128
"""Bytes that a terminal has room for, twice for carriage returns, if it has room at all."""


class Console:
    """As `stream`, for `print`, logging and rich. Text that it has no room for, for nobody reads (a paused pager,
    Ctrl-S), is left out; how many lines were is said before the next one that it takes. One that becomes full is
    waited for, a second once. A file, and what is no file at all, takes everything."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._is_full = False
        self._left_out = 0  # lines

    @property
    def encoding(self) -> str:
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def flush(self) -> None:
        """Nothing: what was written has been flushed."""

    def write(self, text: str) -> int:
        """Raises the OSError of a stream that has gone."""
        with self._lock:
            note = f"\n({self._left_out} lines were left out while nobody read; train.log has the steps)\n"
            if not self._left_out or self._show(note) == len(note):
                self._left_out = text.count("\n", self._show(text))
            else:
                self._left_out += text.count("\n")
        return len(text)

    def _show(self, text: str) -> int:
        """Writes pieces that cannot block where there is room; how many characters it came to."""
        size = max(1, (_TERMINAL_ROOM if self.isatty() else select.PIPE_BUF) // _MOST_BYTES)
        give_up = time.monotonic() + (0.0 if self._is_full else _PATIENCE_SECONDS)
        for begin in range(0, len(text), size):
            self._is_full = not self._has_room(max(0.0, give_up - time.monotonic()))
            if self._is_full:
                return begin
            self._stream.write(text[begin : begin + size])
            self._stream.flush()
        return len(text)

    def _has_room(self, seconds: float) -> bool:
        poll = select.poll()
        try:
            poll.register(self._stream.fileno(), select.POLLOUT)
        except (OSError, ValueError, AttributeError):  # it is no file
            return True
        return bool(poll.poll(1000 * seconds))
