"""Everything that makes up a kernel launch: the same object launches the kernel and is compiled ahead of time.

Each kernel module builds its `Launch`es in cached functions of (shape, dtype). Its `launches(...)` lists all that an
operator of that shape uses, for `titan_kernels.inspect`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from triton import JITFunction, knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

MAX_BLOCKS = 32  # resident at once on a multiprocessor of any of the three architectures
_MOST_KEPT = 1024  # binaries of a launch, so that they do not accumulate if the number of rows keeps changing

POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
"""Triton's name for a pointer to each dtype that a kernel takes."""


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that decides which binary runs; only the grid and the arguments are left open."""

    name: str
    """Unique within what `launches` returns, e.g. "rms_norm_forward"."""
    kernel: JITFunction[Any]
    """With Triton's interpreter, an InterpretedFunction instead."""
    signature: Mapping[str, str]
    """The Triton type of every argument that is not a constexpr, in the order of the kernel's parameters."""
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    aligned: tuple[str, ...] = ()
    """Arguments that are divisible by 16 for contiguous tensors of this shape: addresses of pointers, values of
    integers."""
    bytes_read_twice: int = 0
    """Bytes that a program reads in full and then again, counting on the level-2 cache."""
    max_resident: int = MAX_BLOCKS
    """The most blocks per multiprocessor, if the number of multiprocessors decides the grid."""
    _compiled: dict[tuple[int, ...], Any] = field(init=False, repr=False, compare=False, default_factory=dict)
    """By device and integers, the binary for addresses divisible by 16. What Triton checks when it looks up a kernel
    (debugging, instrumentation, hooks before a run) is checked at the first launch of a kind only; launch hooks are
    called at every launch."""

    @cached_property
    def options(self) -> dict[str, Any]:
        """Triton's. Products are fused with sums, as in all measurements, and by default in Triton up to 3.9."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    @cached_property
    def _n_pointers(self) -> int:
        """The number of pointers, which are the first arguments."""
        return sum(kind.startswith("*") for kind in self.signature.values())

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Launch with `arguments` in the order of `signature`, on the device that holds the first of them."""
        device = arguments[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run(device, grid, arguments)
        else:
            self._run(device, grid, arguments)

    def _run(self, device: int, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """Bypasses Triton, which at every launch looks for the binary, asks the driver about every address and prepares
        data for hooks. That takes more of the host's time than the launch."""
        numbers = arguments[self._n_pointers :]
        addresses = [tensor.data_ptr() for tensor in arguments[: self._n_pointers]]
        kind = (device, *numbers)
        binary = None if reduce(or_, addresses) % 16 else self._compiled.get(kind)
        if binary is None:
            self._run_by_triton(kind, grid, arguments)
        elif _has_hook(knobs.runtime.launch_enter_hook) or _has_hook(knobs.runtime.launch_exit_hook):
            binary[(*grid, 1, 1)[:3]](*arguments, *self.constexprs.values())
        else:
            stream = driver.active.get_current_stream(device)  # pyright: ignore[reportAttributeAccessIssue]
            binary.run(
                *(*grid, 1, 1)[:3], stream, binary.function, binary.packed_metadata, None, None, None, *addresses,
                *numbers, *self.constexprs.values(),
            )  # fmt: skip

    def _run_by_triton(self, kind: tuple[int, ...], grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """Lets Triton find or compile the binary, which is then kept for these integers: Triton specialises it for
        those that are 1 or multiples of 16."""
        binary = self.kernel[grid](*arguments, **self.constexprs, **self.options)
        # On ROCm a tensor's size decides too. In the interpreter, and while it is being compiled, there is no binary.
        kept = isinstance(binary, CompiledKernel) and not torch.version.hip
        if kept and not any(address.data_ptr() % 16 for address in arguments[: self._n_pointers]):
            if len(self._compiled) >= _MOST_KEPT:
                self._compiled.clear()
            self._compiled[kind] = binary


def _has_hook(chain: Any) -> bool:
    """Whether there is one: Triton has a list of hooks, but a program may have set None or a function."""
    return bool(getattr(chain, "calls", chain))


def power_of_two(n: int) -> int:
    """The least power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def blocks(n: int, block: int) -> int:
    """How many blocks of `block` cover n."""
    return -(-n // block)


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """x [..., width] as rows of adjacent columns, and their stride: x itself, a view, or if its strides allow neither,
    a copy."""
    width = x.shape[-1]
    if x.is_contiguous():
        return x, width
    rows = x.reshape(-1, width)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def empty_rows(like: Tensor) -> Tensor:
    """An uninitialised tensor of `like`'s shape, dtype and device, contiguous whatever the strides of `like`."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)
