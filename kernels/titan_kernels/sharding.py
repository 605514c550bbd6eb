"""What operators share towards the rest of torch: how DTensor splits their tensors, how the FLOP counter counts them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

ROWS = "rows"  # sharded over the dimension in question
WHOLE = "whole"  # replicated
SUM = "sum"  # each rank holds a term of the sum


def no_matrix_product(*shapes: Any, **keywords: Any) -> int:
    """FLOPs as torch.utils.flop_counter counts them: matrix products only, so that a model counts the same with its
    kernels on and off."""
    return 0


def register_row_sharding(
    operator: OpOverload, outputs: Sequence[str], inputs: Sequence[str | None], n_dims: Callable[..., int]
) -> None:
    """Let DTensor run `operator` on shards over any of the first `n_dims(*arguments)` dimensions.

    outputs, inputs: what each tensor is then, ROWS, WHOLE or SUM; None for arguments that are no tensors. Nothing is
    registered where torch was built without distributed.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def rule(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
        # An optional tensor that is not given has no placement either.
        present = [None if argument is None else kind for kind, argument in zip(inputs, arguments, strict=True)]
        everywhere = [None if kind is None else Replicate() for kind in present]
        accepted: list[tuple[list[Any], list[Any]]] = [([Replicate()] * len(outputs), everywhere)]
        for dim in range(n_dims(*arguments)):
            placement = {ROWS: Shard(dim), WHOLE: Replicate(), SUM: Partial(), None: None}
            accepted.append(([placement[kind] for kind in outputs], [placement[kind] for kind in present]))
        return accepted

    register_sharding(operator)(rule)
