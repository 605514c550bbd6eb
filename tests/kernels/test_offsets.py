"""Offsets beyond 2^31 elements: rows 2^30 elements apart, of which only a few pages are ever touched.

A 32-bit offset would read outside the allocation and kill the process, so each operator runs in a process of its own.
"""

import multiprocessing

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

import titan_kernels
from titan_kernels import reference

ROWS, WIDTH, STRIDE = 3, 96, 2**30


def far_apart(values: Tensor) -> Tensor:
    """The rows of values [ROWS, WIDTH] with the last one beyond 2^31 elements."""
    memory = torch.empty((ROWS - 1) * STRIDE + WIDTH, dtype=values.dtype, device=values.device)
    return memory.as_strided((ROWS, WIDTH), (STRIDE, 1)).copy_(values)


def check_alone(operator: str, device: torch.device) -> None:
    torch.set_num_threads(1)  # OpenMP's threads did not come along in the fork, and it would wait for them
    check(operator, device)


def check(operator: str, device: torch.device) -> None:
    torch.manual_seed(0)
    x, other, dy = (torch.randn(ROWS, WIDTH, device=device) for _ in range(3))
    weight = torch.randn(WIDTH, device=device)
    angle = torch.randn(ROWS, 6, device=device)
    labels, scale = torch.tensor([0, 5, WIDTH - 1], device=device), torch.ones((), device=device)
    far_x, far_dy = far_apart(x).requires_grad_(), far_apart(dy)
    near_x = x.clone().requires_grad_()
    if operator == "rms_norm":
        outputs = [f(y, weight, 1e-5) for f, y in ((titan_kernels.rms_norm, far_x), (reference.rms_norm, near_x))]
    elif operator == "swiglu":
        outputs = [f(y, other) for f, y in ((titan_kernels.swiglu, far_x), (reference.swiglu, near_x))]
    elif operator == "rope":
        outputs = [
            f(y[None], torch.cos(angle), torch.sin(angle), 4, 2)[0]
            for f, y in ((titan_kernels.rope, far_x), (reference.rope, near_x))
        ]
        # the gradient of q [1, 4, ROWS, 12] with its tokens far apart
        far_dy = far_apart(dy)[:, :48].view(1, ROWS, 4, 12).transpose(1, 2)
        dy = far_dy.contiguous()
    else:
        losses = [titan_kernels.cross_entropy_with_grad_(far_x.detach(), labels, scale)]
        losses.append(reference.cross_entropy_with_grad_(near_x.detach(), labels, scale))
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(far_x.detach().contiguous(), near_x.detach())
        return
    torch.testing.assert_close(outputs[0], outputs[1])
    (found,) = torch.autograd.grad(outputs[0], far_x, far_dy)
    (expected,) = torch.autograd.grad(outputs[1], near_x, dy)
    torch.testing.assert_close(found.contiguous(), expected)


@pytest.mark.parametrize("operator", ["rms_norm", "swiglu", "rope", "cross_entropy"])
def test_offsets_beyond_32_bits(operator: str, device: torch.device) -> None:
    if device.type == "cuda":  # a CUDA context does not survive a fork, and the GPU reports a bad address by itself
        check(operator, device)
        return
    process = multiprocessing.get_context("fork").Process(target=check_alone, args=(operator, device))
    process.start()
    process.join(120)
    assert process.exitcode == 0, f"exit code {process.exitcode}"
