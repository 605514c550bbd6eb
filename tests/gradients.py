"""Access to a gradient that must exist."""

from torch import Tensor


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
