"""Time spent training: wall time without the pauses for validation, checkpoints, samples and traces."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class TrainingClock:
    """Time without pauses.

    On CUDA the host runs ahead: when it begins a pause, the device is still training. The length of a pause is
    therefore measured on the device, between two events, and read when the device has passed them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began = time.perf_counter()
        self.paused_seconds = 0.0
        """Length of all pauses so far, as the host saw them."""
        self._pause_in_window = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._in_pause = False

    def restart(self) -> None:
        """Begins a window now."""
        self.began, self._pause_in_window = time.perf_counter(), 0.0
        self._events.clear()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside is not training time. A pause within a pause is part of it."""
        if self._in_pause:
            yield
            return
        began, start = time.perf_counter(), self._event()
        self._in_pause = True
        try:
            yield
        finally:
            self._in_pause = False
            end = self._event()
            seconds = time.perf_counter() - began
            self.paused_seconds += seconds
            if start is not None and end is not None:
                self._events.append((start, end))
            else:
                self._pause_in_window += seconds

    def _event(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def window(self) -> float:
        """Seconds since the last window, without pauses, always above 0. Begins the next window. Waits for the events
        of the pauses."""
        pauses = self._pause_in_window
        for start, end in self._events:
            end.synchronize()
            pauses += start.elapsed_time(end) / 1000
        seconds = time.perf_counter() - self.began - pauses
        self.restart()
        return max(seconds, 1e-9)  # two clocks are compared, and a test's step may take no time
