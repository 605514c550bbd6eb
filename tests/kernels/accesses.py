"""Which elements of which tensors a kernel reads and writes, launch by launch, recorded in Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from titan_kernels.launch import Launch
from torch import Tensor

Counts = dict[str, NDArray[np.int64]]
"""By the name of a pointer, for each element of its tensor in order of address. A tensor given as several has the name
of the first."""


@dataclass
class Accesses:
    """Of one launch. AssertionError is raised while it runs: for an address that is no element of a tensor given to it;
    if two programs write an element, or one what another reads, because nothing orders them."""

    launch: Launch
    tensors: dict[str, Tensor]
    reads: Counts = field(default_factory=dict)
    writes: Counts = field(default_factory=dict)
    again: set[str] = field(default_factory=set)
    """Tensors with an element that one program writes and also reads, or writes again: on a GPU perhaps by two threads,
    between which there must be a barrier."""

    def bytes_read(self, name: str) -> int:
        """However often: each time counts."""
        return int(self.reads[name].sum()) * self.tensors[name].element_size()

    def bytes_moved(self, name: str) -> int:
        """Each element once if it is read, and once if it is written."""
        return (
            int(np.count_nonzero(self.reads[name]) + np.count_nonzero(self.writes[name]))
            * self.tensors[name].element_size()
        )


def addresses(tensor: Tensor) -> NDArray[np.uint64]:
    """Of each of its elements, ascending, without repetition."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * stride
    return np.unique(offsets.numpy()).astype(np.uint64) * tensor.element_size() + np.uint64(tensor.data_ptr())


_NOBODY, _SEVERAL = -1, -2  # instead of a program


class _Recorder:
    """Sorts the addresses of one launch into its tensors."""

    def __init__(self, launch: Launch, arguments: tuple[Any, ...]) -> None:
        given = {name: x for name, x in zip(launch.signature, arguments, strict=True) if isinstance(x, Tensor)}
        first: dict[int, str] = {}
        for name, tensor in given.items():
            first.setdefault(tensor.data_ptr(), name)
        self.result = Accesses(launch, {name: given[name] for name in first.values()})
        self.names = list(self.result.tensors)
        elements = [addresses(tensor) for tensor in self.result.tensors.values()]
        self.starts = np.cumsum([0, *map(len, elements)])
        self.everything = np.concatenate(elements)
        assert len(np.unique(self.everything)) == len(self.everything), "two different tensors share elements"
        self.order = np.argsort(self.everything)
        self.reads, self.writes = (np.zeros(len(self.everything), np.int64) for _ in range(2))
        self.reader, self.writer = (np.full(len(self.everything), _NOBODY) for _ in range(2))
        self.again = np.zeros(len(self.everything), bool)

    def access(self, program: int, pointers: Any, mask: Any, write: bool) -> None:
        wanted = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if not wanted.size:
            return
        what = f"{self.result.launch.name}: program {program} {'writes' if write else 'reads'}"
        place = np.minimum(np.searchsorted(self.everything, wanted, sorter=self.order), len(self.order) - 1)
        index = self.order[place]
        outside = self.everything[index] != wanted
        assert not outside.any(), f"{what} {outside.sum()} addresses of no tensor"
        unique, times = np.unique(index, return_counts=True)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for name in self._owners(unique):
            assert self.result.tensors[name].element_size() == size, f"{what} {name} in elements of {size} bytes"
        writer, reader = self.writer[unique], self.reader[unique]
        conflict = (writer != _NOBODY) & (writer != program)
        self.again[unique] |= writer == program
        if write:
            conflict |= (reader != _NOBODY) & (reader != program)
            self.again[unique] |= (reader == program) | (times > 1)
            self.writer[unique] = program
            self.writes[unique] += times
        else:
            self.reader[unique] = np.where((reader == _NOBODY) | (reader == program), program, _SEVERAL)
            self.reads[unique] += times
        assert not conflict.any(), f"{what} what another does: {self._owners(unique[conflict])}"

    def _owners(self, index: NDArray[np.int64]) -> list[str]:
        """The names of the tensors that have these elements."""
        return [self.names[owner] for owner in np.unique(np.searchsorted(self.starts, index, "right") - 1)]

    def finish(self) -> Accesses:
        for name, start, end in zip(self.names, self.starts[:-1], self.starts[1:], strict=True):
            self.result.reads[name], self.result.writes[name] = self.reads[start:end], self.writes[start:end]
            if self.again[start:end].any():
                self.result.again.add(name)
        return self.result


@contextmanager
def recorded() -> Iterator[list[Accesses]]:
    """Records every launch in the block."""
    from triton.runtime.interpreter import InterpreterBuilder

    launches: list[Accesses] = []
    running: list[_Recorder] = []
    run, load, store = Launch._run, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def recorded_run(launch: Launch, device: int, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        running.append(_Recorder(launch, arguments))
        run(launch, device, grid, arguments)
        launches.append(running.pop().finish())

    def recorded_load(builder: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        running[-1].access(builder.grid_idx[0], pointers, mask, write=False)
        return load(builder, pointers, mask, *others)

    def recorded_store(builder: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        running[-1].access(builder.grid_idx[0], pointers, mask, write=True)
        return store(builder, pointers, value, mask, *others)

    with (
        mock.patch.object(Launch, "_run", recorded_run),
        mock.patch.object(InterpreterBuilder, "create_masked_load", recorded_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", recorded_store),
    ):
        yield launches
