"""What every operator asks of its inputs before it launches anything, else a ValueError that names them."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATING = (torch.bfloat16, torch.float16, torch.float32)


def shape(x: Tensor) -> list[int]:
    """x's shape as it is printed in messages."""
    return list(x.shape)


def require_dtypes(operator: str, x: Tensor, *others: Tensor) -> None:
    """x is bfloat16, float16 or float32, and the others are of the same dtype."""
    if x.dtype not in FLOATING:
        raise ValueError(f"{operator}: takes bfloat16, float16 or float32, not {x.dtype}")
    for other in others:
        if other.dtype != x.dtype:
            raise ValueError(
                f"{operator}: dtypes differ: {x.dtype} of shape {shape(x)}, {other.dtype} of shape {shape(other)}"
            )


def require_one_device(operator: str, x: Tensor, *others: Tensor) -> None:
    """All tensors are on one device."""
    for other in others:
        if other.device != x.device:
            raise ValueError(
                f"{operator}: tensors of shape {shape(x)} on {x.device} and {shape(other)} on {other.device}"
            )


def is_interpreted(kernel: Any) -> bool:
    """Whether `kernel` was decorated under TRITON_INTERPRET=1, and so runs on CPU tensors."""
    from triton import JITFunction  # here: the reference works where triton is not installed

    return not isinstance(kernel, JITFunction)


def require_device(operator: str, kernel: Any, x: Tensor, *others: Tensor) -> None:
    """All tensors are on one device, and the kernel can run there or need not, the tensors being fake."""
    require_one_device(operator, x, *others)
    device = x.device
    runs = device.type in ("cuda", "meta") or (device.type == "cpu" and is_interpreted(kernel))
    if not runs and not isinstance(x, FakeTensor):
        raise ValueError(
            f"{operator}: the Triton kernel needs CUDA tensors, got shape {shape(x)} on {device}; "
            "use titan_kernels.reference there, or set TRITON_INTERPRET=1 before the import to debug it"
        )
