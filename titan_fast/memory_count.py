"""Counts the memory of a step: every storage when it is made, resized and freed, and what it is for.

Works on real and on fake tensors alike. Sizes are those that CUDA's caching allocator would hand out
(`torch.cuda.memory_allocated`): multiples of 512 bytes.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

GRANULE = 512

PARTS: tuple[str, ...] = (
    "parameters",
    "unsharded parameters",
    "gradients",
    "optimizer state",
    "saved activations",
    "logits and loss",
    "collective buffers",
    "temporaries",
    "inputs and tables",
)


def is_on_device(value: Any) -> bool:
    """Whether this is a tensor in the device's memory. A fake tensor with a `constant` is a number in host memory, like
    the optimizer's step count, and asking for its storage frees that number's memory (torch 2.13)."""
    return isinstance(value, Tensor) and getattr(value, "constant", None) is None


def _rounded(nbytes: int) -> int:
    return -(-nbytes // GRANULE) * GRANULE


@dataclass
class Allocation:
    """One piece of memory. `part` is one of PARTS, or empty if it is to be derived from where the memory was made."""

    nbytes: int
    phase: str
    unit: str
    part: str = ""
    is_saved: bool = False

    @property
    def final_part(self) -> str:
        if self.part and not (self.is_saved and self.part == "collective buffers"):
            return self.part
        if self.phase == "forward" and self.unit == "head":
            return "logits and loss"
        return "saved activations" if self.is_saved else "temporaries"


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a stretch of events."""

    total: float
    parts: dict[str, float]


class MemoryCounter:
    """Every allocation, and the order of their beginnings and ends."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.events: list[tuple[int, int]] = []  # (index into allocations, change in bytes)
        self.phase, self.unit = "before", ""
        self.total = 0
        self._live: dict[
            int, tuple[int, Any]
        ] = {}  # address of a storage -> (index, weak reference that notices its end)

    def see(self, tree: Any, part: str = "", override: bool = False) -> list[Allocation]:
        """Notes the tensors in `tree`; those not seen before count as made now. `part`: what they are for, unless that
        is known already and `override` is False."""
        seen = []
        for tensor in tree_iter(tree):
            if not is_on_device(tensor):
                continue
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address not in self._live:
                self._add(address, storage)
            allocation = self.allocations[self._live[address][0]]
            if part and (override or not allocation.part):
                allocation.part = part
            seen.append(allocation)
        return seen

    def pulse(self, nbytes: int, at: int | None = None) -> None:
        """Memory that an operator takes and frees before it ends, now or before event number `at`."""
        if nbytes > 0:
            position = len(self.events) if at is None else at
            self.allocations.append(Allocation(_rounded(nbytes), self.phase, self.unit, "temporaries"))
            index = len(self.allocations) - 1
            self.events[position:position] = [(index, _rounded(nbytes)), (index, -_rounded(nbytes))]

    def is_alive(self, address: int) -> bool:
        return address in self._live

    def keep(self) -> None:
        """Marks everything that was made in a forward pass and is still alive as kept for the backward pass."""
        for index, _ in self._live.values():
            self.allocations[index].is_saved = self.allocations[index].phase == "forward"

    def peak(self, start: int, end: int) -> Peak:
        """The fullest moment of events[start:end], the state before them included."""
        total = sum(change for _, change in self.events[:start])
        highest, at = total, start
        for position in range(start, end):
            total += self.events[position][1]
            if total > highest:
                highest, at = total, position + 1
        return Peak(float(highest), self._parts_after(at))

    def _parts_after(self, position: int) -> dict[str, float]:
        parts = dict.fromkeys(PARTS, 0.0)
        for index, change in self.events[:position]:
            parts[self.allocations[index].final_part] += change
        return parts

    def _add(self, address: int, storage: torch.UntypedStorage) -> None:
        index = self._record(storage.nbytes())
        self._live[address] = (index, weakref.ref(storage, lambda _: self._end(address)))

    def _end(self, address: int) -> None:
        index, _ = self._live.pop(address)
        self._change(index, -self.allocations[index].nbytes)

    def _record(self, nbytes: int, part: str = "") -> int:
        self.allocations.append(Allocation(_rounded(nbytes), self.phase, self.unit, part))
        self._change(len(self.allocations) - 1, _rounded(nbytes))
        return len(self.allocations) - 1

    def _change(self, index: int, change: int) -> None:
        if change:
            self.total += change
            self.events.append((index, change))

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP frees a gathered parameter by resizing its storage to 0 bytes, and brings it back in the same way."""
        known = self._live.get(storage._cdata)
        if known is not None:
            index, reference = known
            self._change(index, -self.allocations[index].nbytes)
            self.allocations[index].nbytes, old = 0, self.allocations[index]
            self.allocations[index] = Allocation(0, old.phase, old.unit, "unsharded parameters")
            self._live[storage._cdata] = (self._record(storage.nbytes(), "unsharded parameters"), reference)

    @contextmanager
    def watching_resizes(self) -> Iterator[None]:
        """Notices when storages are resized, for which there is no operator that a dispatch mode could see."""
        resize = torch.UntypedStorage.resize_

        def watched(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._resized(storage)
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", watched):
            yield
