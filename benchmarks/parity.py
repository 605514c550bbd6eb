"""Does a switch change training? Losses over many steps, from the same weights on the same few batches."""

import dataclasses
import gc
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.variants import DeviceLost, How, Row, Rows, failures_into, garbage_kept
from benchmarks.workloads import Cell, Variant, shape_of

HAS_LEARNT = 0.9
"""The mean loss of the last tenth must be below this fraction of ln(vocabulary), the loss of a model that has learnt
nothing. Otherwise gradients were not tested."""


class Trained(Protocol):
    """A model and its step."""

    loss: Tensor

    def switch_to(self, variant: Variant) -> Row: ...
    def step(self) -> None: ...
    def close(self) -> None: ...


def compare_losses(cell: Cell, build: Callable[[Cell], Trained], how: How) -> Rows:
    """A row for each variant: its losses, and in nats the largest difference of a step, and that of the mean over the
    last tenth, from the first variant. `build` makes a new model of a cell with one variant."""
    rows: Rows = []
    steps = how.length.timed if how.length is not None else cell.parity_steps
    chance = math.log(shape_of(cell.workload, how.smoke).vocab_size)
    expected: Tensor | None = None
    with garbage_kept():
        for variant in cell.variants:
            row: Row = {"variant": variant.name, "options": variant.options}
            rows.append(row)
            how.save(rows, variant.name)
            try:
                found = _losses(build, dataclasses.replace(cell, variants=(variant,)), row, steps)
            except DeviceLost:
                break
            if found is None:
                continue
            expected = found if variant is cell.variants[0] else expected
            row["losses"] = [round(loss, 5) for loss in found.tolist()]
            if expected is not None:
                row["parity"] = difference(found, expected, chance)
                row["complete"] = True
        how.save(rows, "")
    return rows


def _losses(build: Callable[[Cell], Trained], cell: Cell, row: Row, steps: int) -> Tensor | None:
    """Of each step, float64 on the CPU; None if the variant was refused, and then the row has the error."""
    trained = None
    try:
        with failures_into(row, ends_process=False):
            trained = build(cell)
            trained.switch_to(cell.variants[0])
            losses = []
            for _ in range(steps):
                trained.step()
                losses.append(trained.loss.clone())
            return torch.stack(losses).double().cpu()
    finally:
        if trained is not None:
            trained.close()
        del trained  # a compiled model is part of a reference cycle
        gc.collect()
    return None


def difference(found: Tensor, expected: Tensor, chance: float) -> dict[str, float | bool]:
    """How far `found` is from `expected`, both [steps], in nats, and whether there was any training to compare. Not
    relative, because what is memorised has a loss near 0. chance: the loss of a model that knows nothing."""
    tail = max(1, len(found) // 10)
    last = found[-tail:].mean()
    return {
        "steps": len(found),
        "first": found[0].item(),
        "last": last.item(),
        "learnt": bool(last < HAS_LEARNT * chance),
        "largest": (found - expected).abs().max().item(),
        "last tenth": abs(last - expected[-tail:].mean()).item(),
    }
