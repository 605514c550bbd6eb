"""Registers operators with torch: how DTensor shards their tensors, and how the FLOP counter counts them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

ROWS = "rows"  # sharded over the dimension in question
WHOLE = "whole"  # replicated
SUM = "sum"  # each rank holds a term of the sum


_Code = int | str | None
_Choice = tuple[Sequence[_Code], Sequence[_Code]]


def no_matrix_product(*shapes: Any, **keywords: Any) -> int:
    """0 FLOPs, since torch.utils.flop_counter counts matrix products only: a model counts the same with kernels on and
    off."""
    return 0


def register_row_sharding(
    operator: OpOverload, outputs: Sequence[str], inputs: Sequence[str | None], n_dims: Callable[..., int]
) -> None:
    """Let DTensor run `operator` on shards over any one of the first `n_dims(*arguments)` dimensions.

    outputs, inputs: what each tensor then is, ROWS, WHOLE or SUM; None for arguments that are not tensors.
    """
    numbered: dict[str | None, _Code] = {WHOLE: None, SUM: SUM, None: None}

    def accepted(*arguments: Any) -> list[_Choice]:
        return [
            ([numbered.get(kind, dim) for kind in outputs], [numbered.get(kind, dim) for kind in inputs])
            for dim in range(n_dims(*arguments))
        ]

    register_placements(operator, accepted)


def register_placements(operator: OpOverload, accepted: list[_Choice] | Callable[..., list[_Choice]]) -> None:
    """Let DTensor run `operator` replicated, or as in one of `accepted` (a list, or a function of the arguments).

    An element of the list is (outputs, inputs). In each an integer stands for a tensor sharded over that dimension,
    None for a replicated one (or an argument that is not a tensor), and SUM for terms of a sum. Nothing is registered
    if torch was built without distributed.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def placement(code: _Code) -> Any:
        if code is None:
            return Replicate()
        return Partial() if code == SUM else Shard(int(code))

    n_outputs = len(operator._schema.returns)

    def rule(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
        # DTensor passes a description of each tensor; numbers, and tensors that are not given, have no placement.
        is_tensor = [hasattr(argument, "placements") for argument in arguments]
        everywhere: _Choice = ([None] * n_outputs, [None] * len(arguments))
        choices = accepted(*arguments) if callable(accepted) else accepted
        return [
            (
                [placement(code) for code in outputs],
                [placement(code) if given else None for code, given in zip(inputs, is_tensor, strict=True)],
            )
            for outputs, inputs in [everywhere, *choices]
        ]

    register_sharding(operator)(rule)
