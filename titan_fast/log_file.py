"""A file of lines that a run adds to, and whose disk may fail without ending the run."""

import logging
import threading
from contextlib import suppress
from io import FileIO
from pathlib import Path

logger = logging.getLogger(__name__)

_MOST_WAITING = 2**26  # bytes


class LogFile:
    """Lines at the end of the file at `path`, each on its way to the disk when `write` returns.

    What the disk refuses waits in memory (the newest 64 MiB) and is written as soon as the disk takes a line again.
    Both are reported on the console."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._waiting = b""
        self._told = False
        self._lock = threading.RLock()  # the watchdog's thread writes too

    def write(self, text: str) -> None:
        """Adds `text`, which is whole lines. Any thread."""
        with self._lock:
            self._add(text)

    def _add(self, text: str) -> None:
        self._waiting = (self._waiting + text.encode("utf-8", "backslashreplace"))[-_MOST_WAITING:]
        try:
            self._file = self._file or FileIO(self.path, "a")
            while self._waiting:  # a full disk may take a part
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            self._let_go()  # another handle may work where this one is stale
            if not self._told:
                logger.warning(
                    f"WARNING: {self.path} cannot be written: {error.strerror}; the run goes on, and its lines wait in "
                    "memory until the disk takes them"
                )
            self._told = True
        else:
            if self._told:
                logger.warning(f"{self.path} is written again, with the lines that waited")
            self._told = False

    def close(self) -> None:
        """Tries once more to write what waits."""
        with self._lock:
            if self._waiting:
                self.write("")
            if self._waiting:
                lost = self._waiting.count(b"\n")
                logger.warning(f"WARNING: {self.path} lacks the last {lost} lines, which the disk has refused")
                self._waiting = b""
            self._let_go()

    def _let_go(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None
