"""CUDA graphs: forward and backward of a pass are recorded once, and from then on launched as one.

A step with short kernels waits for Python to launch each of them; a recorded one does not. A recording refers to memory
addresses, so weights, inputs and gradients have to stay where they are, as they do on one device without FSDP2.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from titan_fast.loader import Batch
from titan_fast.loss import root_gradient
from titan_fast.masters import gradient_of, set_gradient
from titan_fast.model import Llama

WARM_UP_STEPS = 2
"""Steps before the recording, in which code is compiled and libraries make their workspaces and plans."""

Replay = Callable[[], None]


class Recorder(Protocol):
    """Runs work and records it. The tests have one for the CPU."""

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Does `work` where recordings will be made."""
        ...

    def record(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """A function that does `work` again, and the tensor that its result will be in. `work` may or may not be done
        now."""
        ...


class CudaRecorder:
    """Works on a stream of its own, so that whatever libraries and autograd tie to the stream of their first use is
    tied to that of the recordings. Recordings share memory, so they must be replayed in the order in which they were
    made."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), None

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Does `work` after what the current stream has queued, and lets the current stream wait for it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Nothing is computed until the replay."""
        graph = torch.cuda.CUDAGraph()
        # Only this thread is restricted: the loader's may allocate pinned memory meanwhile, and NCCL's query its
        # events.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        self._pool = graph.pool()
        return graph.replay, result


class RecordedPasses:
    """`step.forward_backward` for one model and batches of one size, replaying recordings from the third call on."""

    def __init__(self, model: Llama, recorder: Recorder) -> None:
        self._model, self._recorder = model, recorder
        self._calls = 0
        self._inputs: tuple[Tensor, ...] = ()
        self._recordings: list[tuple[Replay, Tensor]] = []
        self._addresses: list[int] = []
        self._gradients: list[tuple[Tensor, Tensor]] = []

    def __call__(self, batches: Sequence[Batch], scale: Tensor) -> Tensor:
        """As `step.forward_backward`. Once there is a recording, gradients lie in its memory and last until the next
        call."""
        self._calls += 1
        if not self._inputs:
            self._inputs = tuple(tensor.clone() for tensor in (batches[0].tokens, batches[0].labels, scale))
        if self._calls > WARM_UP_STEPS and not self._recordings:
            self._record(len(batches))
        assert not self._recordings or self._addresses == self._weights(), "weights moved since they were recorded"
        total = torch.zeros_like(scale)
        for i, batch in enumerate(batches):
            for mine, given in zip(self._inputs, (batch.tokens, batch.labels, scale), strict=True):
                mine.copy_(given)
            total += self._replayed(i) if self._recordings else self._recorder.run(self._pass)
        for parameter, gradient in self._gradients:
            set_gradient(parameter, gradient)
        return total

    def _pass(self) -> Tensor:
        loss = self._model(*self._inputs)
        loss.backward(root_gradient(loss))
        return loss.detach()

    def _record(self, passes: int) -> None:
        """Records the first pass, which makes the gradients, and where there are more, one that adds to them."""
        self._addresses = self._weights()
        parameters = list(self._model.parameters())
        assert all(gradient_of(p) is None for p in parameters)
        self._recordings = [self._recorder.record(self._pass) for _ in range(min(passes, 2))]
        self._gradients = [(p, g) for p in parameters if (g := gradient_of(p)) is not None]

    def _replayed(self, i: int) -> Tensor:
        replay, loss = self._recordings[min(i, 1)]
        replay()
        return loss

    def _weights(self) -> list[int]:
        return [p.data_ptr() for p in self._model.parameters()]
