"""Decisions that all ranks must take alike, agreed in the all-reduce that the gradient's norm needs anyway."""

from typing import NamedTuple

import torch
from torch import Tensor


class Agreed(NamedTuple):
    """The same on every rank at the same step."""

    stop: bool
    """A rank was told to stop."""
    save: bool
    """Rank 0's clock says that a checkpoint is due."""
    save_failed: bool
    """A rank knows that a save in the background has failed."""


class Agreement:
    """Asks before the reduction, answers after it.

    On CUDA the answer is that of the step before. It was copied to pinned host memory while this step was being queued,
    so reading it hardly waits.
    """

    @staticmethod
    def steps_to_stop(device: torch.device) -> int:
        """How many steps may still end after a signal: the one that is running, the one whose reduction carries the
        wish, and on CUDA the one after, which reads the answer."""
        return 3 if device.type == "cuda" else 2

    def __init__(self, device: torch.device) -> None:
        self._constants = torch.tensor([0.0, 1.0], device=device)  # kept on the device, so that asking copies nothing
        self._on_device = device.type == "cuda"
        self._copies: list[tuple[Tensor, torch.cuda.Event]] = []
        self._unanswered = Agreed(False, False, False)

    def ask(self, loss: Tensor, stop: bool, save: bool, save_failed: bool) -> Tensor:
        """[4] float32 to be summed over the ranks: this rank's part of the loss, then its wishes. A wish whose answer
        is still pending is not repeated, or it would be granted twice."""
        wishes = Agreed(stop, save, save_failed)
        new = [wish and not said for wish, said in zip(wishes, self._unanswered, strict=True)]
        self._unanswered = Agreed(*(a or b for a, b in zip(new, self._unanswered, strict=True)))
        return torch.stack([loss, *(self._constants[int(flag)] for flag in new)])

    def answer(self, summed: Tensor) -> Agreed:
        """`summed` is what `ask` gave, after the reduction."""
        agreed = self._answer(summed)
        self._unanswered = Agreed(*(a and not b for a, b in zip(self._unanswered, agreed, strict=True)))
        return agreed

    def _answer(self, summed: Tensor) -> Agreed:
        if not self._on_device:
            return _agreed(summed)
        host, event = self._copies.pop() if len(self._copies) == 2 else (_pinned(), torch.cuda.Event())
        host.copy_(summed, non_blocking=True)
        event.record()
        self._copies.insert(0, (host, event))
        if len(self._copies) < 2:
            return Agreed(False, False, False)
        host, event = self._copies[1]
        event.synchronize()
        return _agreed(host)


def _pinned() -> Tensor:
    return torch.empty(4, pin_memory=True)


def _agreed(summed: Tensor) -> Agreed:
    return Agreed(*(value > 0 for value in summed[1:].tolist()))
