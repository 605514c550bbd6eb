"""Standard output that never makes a run wait for its reader."""

import select
import threading
import time
from typing import TextIO

_PATIENCE_SECONDS = 1.0
_MOST_BYTES = 10
"""The most bytes of a character, where a console that is not UTF-8 shows it as an escape."""
_TERMINAL_ROOM = 128
"""A terminal that has room at all has room for this many bytes, even if carriage returns double them."""


class Console:
    """Behaves as `stream` for `print`, logging and rich. When the stream is full because nobody reads it (a paused
    pager, Ctrl-S), text is left out, and before the next line that it takes it is said how many lines were. When it
    becomes full there is one wait, of a second. A file, or an object that is no file at all, takes everything."""

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
        """Does nothing: `write` flushes."""

    def write(self, text: str) -> int:
        """Raises OSError if the stream is gone."""
        with self._lock:
            note = f"\n({self._left_out} lines were left out while nobody read; train.log has the steps)\n"
            if not self._left_out or self._show(note) == len(note):
                self._left_out = text.count("\n", self._show(text))
            else:
                self._left_out += text.count("\n")
        return len(text)

    def _show(self, text: str) -> int:
        """Writes pieces that are too small to block as long as there is room. Returns how many characters it wrote."""
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
