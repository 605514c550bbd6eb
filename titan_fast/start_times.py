"""What the start of a run takes, part by part, from the process's first line to its first step."""

import time


class StartTimes:
    """Made before anything that takes long is imported."""

    def __init__(self) -> None:
        self.began = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}
        """Of each part, in order."""

    def lap(self, part: str) -> None:
        """What came since the last call, or since the beginning, was `part`."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def describe(self) -> str:
        """A line, in which parts of less than 0.05 s are left out."""
        parts = [f"{part} {seconds:.1f}" for part, seconds in self.seconds.items() if seconds >= 0.05]
        return f"{self._last - self.began:.1f} s{': ' * bool(parts)}{', '.join(parts)}"
