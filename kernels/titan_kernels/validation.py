"""Checks of an operator's inputs before anything is launched; each raises a ValueError that describes them."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATING = (torch.bfloat16, torch.float16, torch.float32)


def shape(x: Tensor) -> list[int]:
    """x's shape for messages."""
    return list(x.shape)


def require_dtypes(operator: str, x: Tensor, *others: Tensor) -> None:
    """Requires x to be bfloat16, float16 or float32, and the others to have the same dtype."""
    if x.dtype not in FLOATING:
        raise ValueError(f"{operator}: takes bfloat16, float16 or float32, not {x.dtype} of shape {shape(x)}")
    for other in others:
        if other.dtype != x.dtype:
            raise ValueError(
                f"{operator}: dtypes differ: {x.dtype} of shape {shape(x)}, {other.dtype} of shape {shape(other)}"
            )


def require_one_device(operator: str, x: Tensor, *others: Tensor) -> None:
    """Requires all tensors to be on one device."""
    for other in others:
        if other.device != x.device:
            raise ValueError(
                f"{operator}: tensors of shape {shape(x)} on {x.device} and {shape(other)} on {other.device}"
            )


def is_interpreted(kernel: Any) -> bool:
    """Whether `kernel` was decorated under TRITON_INTERPRET=1, and so runs on CPU tensors."""
    from triton import JITFunction  # here, because the reference works without triton

    return not isinstance(kernel, JITFunction)


def require_device(operator: str, kernel: Any, x: Tensor, *others: Tensor) -> None:
    """Requires all tensors to be on one device, on which the kernel can run unless they are fake."""
    require_one_device(operator, x, *others)
    device = x.device
    runs = device.type in ("cuda", "meta") or (device.type == "cpu" and is_interpreted(kernel))
    if not runs and not isinstance(x, FakeTensor):
        raise ValueError(
            f"{operator}: the Triton kernel needs CUDA tensors, got shape {shape(x)} on {device}; "
            "use titan_kernels.reference there, or set TRITON_INTERPRET=1 before the import to debug it"
        )
