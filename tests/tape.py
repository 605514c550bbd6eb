"""A CPU replacement for CUDA graphs: a list of operators, on the memory that they had when they were recorded."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS_A_NUMBER = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero)


def _memory(values: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


class Tape(TorchDispatchMode):
    """Runs every operator and records it with its arguments. `replay` runs the same operators on the same memory. As
    with a CUDA graph, no Python in between runs again, and results overwrite the first ones."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in READS_A_NUMBER:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.entries.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.entries:
            again = func(*args, **kwargs)
            in_arguments = _memory((args, kwargs))
            for new, old in zip(tree_leaves(again), tree_leaves(result), strict=True):
                # Views and tensors written in place need no copy.
                if isinstance(old, Tensor) and not _memory(old) <= in_arguments:
                    old.copy_(new)


class TapeRecorder:
    """A `titan_fast.cuda_graph.Recorder`."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.replays = 0

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        return work()

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with Tape() as tape:
            result = work()
        self.tapes.append(tape)

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay, result
