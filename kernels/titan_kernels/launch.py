"""What a kernel launch is made of, in one place: the same object launches the kernel and is compiled ahead of time.

Each kernel module builds its `Launch`es in cached functions of (shape, dtype) and has `launches(...)`, which lists
every one that an operator of that shape uses, for `titan_kernels.inspect`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton import JITFunction
from triton.compiler import CompiledKernel

MAX_BLOCKS = 32  # that a multiprocessor of any of the three architectures can hold at once

POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
"""Triton's name for a pointer to each dtype that a kernel takes."""


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that decides which binary runs; only the grid and the arguments are left open."""

    name: str
    """Unique within what `launches` returns, e.g. "rms_norm_forward"."""
    kernel: JITFunction[Any]
    """Under Triton's interpreter it is an InterpretedFunction instead."""
    signature: Mapping[str, str]
    """Triton type of every argument that is not a constexpr, in the order of the kernel's parameters."""
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    aligned: tuple[str, ...] = ()
    """Arguments divisible by 16 for contiguous tensors of this shape: pointers as addresses, integers as values."""
    bytes_read_twice: int = 0
    """What one program reads from memory and, when that is done, once more, counting on the level-2 cache."""
    max_resident: int = MAX_BLOCKS
    """The most blocks of a grid for each multiprocessor, where the grid is sized by their number."""
    _compiled: dict[tuple[Any, ...], Any] = field(init=False, repr=False, compare=False, default_factory=dict)
    """The binary for each kind of arguments seen so far. What is asked of Triton when a kernel is looked up (debugging,
    instrumentation, hooks before a run) is asked at the first launch of a kind only; launch hooks at every one."""

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Launch with `arguments` in the order of `signature`, on the device that holds the first of them."""
        device = arguments[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run(grid, arguments)
        else:
            self._run(grid, arguments)

    def _run(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        kind = (arguments[0].device.index, *map(_kind, arguments))
        if compiled := self._compiled.get(kind):
            compiled[(*grid, 1, 1)[:3]](*arguments, *self.constexprs.values())
        else:  # Triton's own way, which makes the binary or looks for it: 10 us of the host's 34 for a launch
            binary = self.kernel[grid](
                *arguments, **self.constexprs, num_warps=self.num_warps, num_stages=self.num_stages
            )
            # On ROCm a tensor's size decides too; the interpreter has no binary, nor has what is compiled meanwhile.
            if isinstance(binary, CompiledKernel) and not torch.version.hip:
                self._compiled[kind] = binary


def _kind(argument: Tensor | int) -> object:
    """Equal for arguments for which Triton takes the same binary: of a tensor it asks for the dtype, which a Launch
    has in its signature, and whether its address is divisible by 16; of an integer that too, whether it is 1, which it
    makes a constant of, and whether it needs 64 bits."""
    if isinstance(argument, Tensor):
        return argument.data_ptr() % 16 == 0
    return argument % 16 == 0, argument == 1, -(2**31) <= argument < 2**31


def power_of_two(n: int) -> int:
    """The least power of two that is not below n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def blocks(n: int, block: int) -> int:
    """How many blocks of `block` cover n."""
    return -(-n // block)


def is_interpreted(kernel: Any) -> bool:
    """Whether `kernel` was decorated under TRITON_INTERPRET=1, and so runs on CPU tensors."""
    return not isinstance(kernel, JITFunction)


def as_rows(x: Tensor) -> Tensor:
    """x [..., width] as [rows, width] with adjacent columns: a view wherever the strides allow it, else a copy."""
    width = x.shape[-1]
    if x.is_contiguous():
        return x.view(-1, width)
    rows = x.reshape(-1, width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def empty_rows(like: Tensor) -> Tensor:
    """Uninitialised memory of `like`'s shape, dtype and device, contiguous whatever the strides of `like`."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)
