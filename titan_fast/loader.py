"""The loop's view of data: steps of batches on the device, read ahead by one thread."""

import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from titan_fast.documents import Separators, any_number_of
from titan_fast.errors import CheckpointError

STEPS_AHEAD = 2
"""How many steps are kept ready."""


class Batch(NamedTuple):
    """One forward pass: int64 [B, S] each, contiguous, on the device. Labels are the tokens, each one place further
    on."""

    tokens: Tensor
    labels: Tensor
    bounds: Tensor | None = None
    """Of documents, see documents.py; None where attention does not stop at them."""


class Step(NamedTuple):
    """What a source gives for one optimizer step of one rank."""

    passes: list[tuple[np.ndarray, np.ndarray]]
    """(tokens, labels) per gradient-accumulation pass."""
    position: dict[str, int]
    """epoch, first_sample, last_sample: global, of the whole step."""
    state: Any
    """The source's state after this step."""


class Source(Protocol):
    """Where steps come from. Only one thread uses it at a time."""

    identity: dict[str, Any]
    """What must be equal for a saved state to be continued; JSON. It has a `rank` where each data-parallel rank has a
    state of its own."""

    def describe(self) -> str:
        """One line for the start of the log."""
        ...

    def next_step(self, stopping: threading.Event) -> Step:
        """The next step of this rank; a wait inside ends when `stopping` is set."""
        ...

    def state(self) -> Any:
        """The position after the last step. Later steps do not change the returned object."""
        ...

    def load_state(self, state: Any) -> None:
        """Continues from a state, or from what `state_to_json` made of one."""
        ...

    def state_to_json(self, state: Any) -> dict[str, Any]:
        """A state as JSON."""
        ...


class Share(NamedTuple):
    """A rank's part of each step."""

    dp_rank: int
    dp_degree: int
    local_batch_size: int
    passes: int

    @property
    def global_batch_size(self) -> int:
        return self.dp_degree * self.local_batch_size * self.passes


class Loader:
    """Steps of batches on the device, read ahead by one thread; `state_dict` is that of the last step handed out."""

    def __init__(self, source: Source, device: torch.device, separators: Separators | None = None) -> None:
        """separators: batches have the bounds of the documents between them."""
        self._source, self._device, self._separators = source, device, separators
        self._start_state = self._state = source.state()
        self._position: dict[str, int] = {}
        self._reader: _Reader | None = None
        self._left: threading.Thread | None = None  # of the reader that was closed
        self.wait_seconds = 0.0
        """How long `next` has waited for data, in all."""

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the tokens; None for a stream."""
        return self._source.identity.get("fingerprint")

    def describe(self) -> str:
        """One line for the start of the log."""
        return self._source.describe()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._reader is None:
            self._wait_for_the_last_reader()
            self._reader = _Reader(self._source, self._device, self._separators)
        started = time.perf_counter()
        step, passes = self._reader.get()
        self.wait_seconds += time.perf_counter() - started
        self._state, self._position = step.state, step.position
        batches = [Batch(*(part.to(self._device, non_blocking=True) for part in parts)) for parts in passes]
        return [b if b.bounds is None else b._replace(bounds=any_number_of(b.bounds)) for b in batches]

    def position(self) -> dict[str, int]:
        """Epoch, first and last global sample of the last step handed out. Empty before the first step."""
        return dict(self._position)

    def state_dict(self) -> dict[str, Any]:
        """What continues after the last step handed out; JSON."""
        identity, state = self._source.identity, self._source.state_to_json(self._state)
        assert not identity.keys() & state.keys()
        return identity | state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`. CheckpointError, naming what differs, if it belongs to other data."""
        wanted = self._source.identity
        if differing := [key for key in wanted if state.get(key) != wanted[key] and not _is_unsaid(key, state)]:
            values = ", ".join(f"{key} was {state.get(key)!r} and is {wanted[key]!r}" for key in differing)
            raise CheckpointError(
                f"the saved data position belongs to other data: {values}",
                "restore what it was (held_out_every follows from [validation] enable and dataset_path; shards made of "
                "text may still be in the run's folder data, and --training.dataset_path takes them), start a new run, "
                "or begin the data again by --checkpoint.data_state reset",
            )
        self._restart({key: value for key, value in state.items() if key not in wanted})

    def reset(self) -> None:
        """Starts again from the first sample."""
        self._restart(self._start_state)

    def _restart(self, state: Any) -> None:
        self.close()
        self._wait_for_the_last_reader()
        self._source.load_state(state)
        self._state = self._source.state()
        self._position = {}

    def close(self) -> None:
        """Ends the reading thread. The loader can be used again; steps read but not handed out are read again."""
        if self._reader is not None:
            self._left = self._reader.thread
            self._reader.close()
            self._reader = None
            self._source.load_state(self._state)

    def _wait_for_the_last_reader(self) -> None:
        """Its read may have outlasted `close`, and would move the source's position when another thread reads."""
        if self._left is not None:
            self._left.join()
            self._left = None
            self._source.load_state(self._state)


def _is_unsaid(key: str, state: dict[str, Any]) -> bool:
    """Whether `state` was saved by an older version, which did not save this key."""
    return key == "bos_and_eos" and key not in state


class _Reader:
    """The thread. It holds no reference to the loader, so it ends when the loader is garbage-collected, or with the
    interpreter."""

    def __init__(self, source: Source, device: torch.device, separators: Separators | None) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(STEPS_AHEAD)
        self._failure: BaseException | None = None
        stopping = threading.Event()
        given = source, device, separators, self._queue, stopping
        self.thread = threading.Thread(target=_read_ahead, args=given, name="titan_fast data", daemon=True)
        self.thread.start()
        self.close = weakref.finalize(self, _stop, self.thread, self._queue, stopping)

    def get(self) -> tuple[Step, list[tuple[Tensor, ...]]]:
        if self._failure is None:
            item = self._queue.get()
            if not isinstance(item, BaseException):
                return item
            self._failure = item
        raise self._failure


def _read_ahead(
    source: Source,
    device: torch.device,
    separators: Separators | None,
    steps: queue.Queue,
    stopping: threading.Event,
) -> None:
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # per thread; pinning on device 0 would make a context there
        while not stopping.is_set():
            step = source.next_step(stopping)
            arrays: list[tuple[np.ndarray, ...]] = [*step.passes]
            if separators is not None:
                arrays = [(*parts, separators.bounds(parts[0])) for parts in step.passes]
            # Views with gaps would pass through memory that is not pinned on their way to a GPU, for which the host
            # waits until the GPU is idle. Copied too where there is but one sequence, for the compiler guards strides.
            passes = [tuple(torch.from_numpy(part.copy()) for part in parts) for parts in arrays]
            if device.type == "cuda":
                passes = [tuple(part.pin_memory() for part in parts) for parts in passes]
            steps.put((step, passes))
    except BaseException as error:  # it is raised where the data is wanted
        steps.put(error)


def _stop(thread: threading.Thread, steps: queue.Queue, stopping: threading.Event) -> None:
    stopping.set()
    give_up = time.monotonic() + 10  # a read from the network may hang
    while thread.is_alive() and time.monotonic() < give_up:
        while not steps.empty():  # the thread may be waiting for room
            steps.get_nowait()
        thread.join(0.01)
