"""A gradient that must be there."""

from torch import Tensor


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
