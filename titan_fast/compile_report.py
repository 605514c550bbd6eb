"""What torch.compile did during a run: how many graphs it made, how long that took, and why it compiled again."""

import time
from typing import Any

import torch._dynamo.utils
from torch._dynamo.callback import callback_handler

SETTLED_AFTER = 3
"""Steps after a start in which compiling is expected: the first pass, the last one of an accumulation, a sample."""


class CompileReport:
    """Listens from its creation until `close`. A graph is a forward pass with its backward pass."""

    def __init__(self) -> None:
        self.graphs = 0
        self.seconds = 0.0
        """Wall time, of forward and backward graphs together."""
        self._began: float | None = None
        self._open = 0
        self._reported = 0
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)

    def close(self) -> None:
        """Stops listening. May be called more than once."""
        for callbacks, own in (
            (callback_handler.start_callbacks, self._start),
            (callback_handler.end_callbacks, self._end),
        ):
            if own in callbacks:
                callbacks.remove(own)

    def _start(self, what: Any) -> None:
        if self._open == 0:
            self._began = time.perf_counter()
        self._open += 1
        self.graphs += what.callback_trigger.name == "DYNAMO"

    def _end(self, what: Any) -> None:
        self._open -= 1
        if self._open == 0 and self._began is not None:
            self.seconds += time.perf_counter() - self._began

    def summary(self, before: float, step_seconds: float) -> str:
        """A line for the log after the first step, which took `step_seconds`. before: `seconds` when it began."""
        self.expect()
        graphs = f"compiled {self.graphs} graph{'s' * (self.graphs != 1)} in {self.seconds:.1f} s"
        return f"{graphs}, {self.seconds - before:.1f} s of it in the first step, which took {step_seconds:.1f} s"

    def expect(self) -> None:
        """Graphs built so far were expected, as those of the first validation, and are not reported by `again`."""
        self._reported = self.graphs

    def again(self, step: int, first_step: int = 1) -> list[str]:
        """A line for each graph built since the last call, with the reason that torch gives; none in the first steps
        after a start, which begins with `first_step`. Costs only a comparison where nothing was compiled."""
        fresh, self._reported = self.graphs - self._reported, self.graphs
        if not fresh or step - first_step < SETTLED_AFTER:
            return []
        graphs = [m for m in torch._dynamo.utils.get_compilation_metrics() if m.co_name is not None]
        return [
            f"warning: torch.compile built another graph of {metrics.co_name} at step {step}: "
            f"{metrics.recompile_reason or 'for the first time'}"
            for metrics in graphs[-fresh:]
        ]
