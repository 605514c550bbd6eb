"""How long each part of a run's start takes, from the process's first line to its first step."""

import time


class StartTimes:
    """Made before anything that takes long is imported."""

    def __init__(self) -> None:
        self.began = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}
        """Of each part, in order."""

    def lap(self, part: str) -> None:
        """Counts the time since the last call, or since the beginning, as `part`."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def describe(self) -> str:
        """One line, without parts shorter than 0.05 s."""
        parts = [f"{part} {seconds:.1f}" for part, seconds in self.seconds.items() if seconds >= 0.05]
        return f"{self._last - self.began:.1f} s{': ' * bool(parts)}{', '.join(parts)}"
