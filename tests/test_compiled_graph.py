"""What a compiled graph moves and holds, counted by hand."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from titan_fast.compiled_graph import GraphPlan


def plan(function: Callable[..., object], *inputs: Tensor) -> GraphPlan:
    return GraphPlan.of(make_fx(function, tracing_mode="fake")(*inputs), backward=False)


def moved(function: Callable[..., object], *inputs: Tensor) -> list[float]:
    """Float32 numbers that each kernel reads and writes, in order."""
    return [operation.nbytes / 4 for operation in plan(function, *inputs).operations]


def test_one_kernel_makes_all_that_shares_an_input_and_has_its_size() -> None:
    x = torch.randn(8, 16)
    assert moved(lambda x: (x.sin(), x.cos() + 1), x) == [128 + 2 * 128]
    assert moved(lambda x, row: (x.sin(), x.cos() + row), x, torch.randn(16)) == [128 + 16 + 2 * 128]
    assert moved(lambda x, y: (x.sin(), y.cos()), x, torch.randn(8, 16)) == [256, 256], "nothing is shared"


def test_kernels_of_different_sizes_stay_apart() -> None:
    """A vector that both read does not make one kernel of a larger and a smaller product."""
    long, short, row = torch.randn(8, 16), torch.randn(4, 16), torch.randn(16)
    sizes = moved(lambda x, y, row: (x * row, y * row), long, short, row)
    assert sizes == [2 * 128 + 16, 2 * 64 + 16]


def test_what_a_product_lies_between_is_not_fused() -> None:
    """sin(x) is made before the product that reads it, and cos(x) + product after it."""
    x, weight = torch.randn(8, 16), torch.randn(16, 16)
    graph = plan(lambda x, weight: (x.sin() @ weight) + x.cos(), x, weight)
    assert [operation.kind for operation in graph.operations] == ["memory", "gemm", "memory"]
    assert [operation.nbytes / 4 for operation in graph.operations] == [2 * 128, 2 * 128 + 256, 3 * 128]


def test_an_input_that_ends_makes_room_after_its_last_use() -> None:
    """x (8 x 16) is read by the first product alone, whose result both later ones read."""
    x, first, second = torch.randn(8, 16), torch.randn(16, 64), torch.randn(64, 32)
    graph = plan(lambda x, first, second: (x @ first) @ second, x, first, second)
    made, result, freed = 4 * 8 * 64, 4 * 8 * 32, 4 * 8 * 16
    assert graph.highest(set()) == made + result
    assert graph.highest({0}) == max(made, made + result - freed)
    assert graph.highest({1}) == max(made, made + result - 4 * 16 * 64), "the first matrix is larger than the result"
    assert graph.highest({2}) == made + result, "what the last product reads is held until it has run"


def test_a_value_of_the_graph_is_freed_after_its_last_use() -> None:
    x, matrix = torch.randn(8, 16), torch.randn(16, 16)
    one = 4 * 8 * 16
    assert plan(lambda x, m: x @ m @ m @ m @ m, x, matrix).highest(set()) == 2 * one
    both = plan(lambda x, m: ((y := x @ m) @ m @ m, y), x, matrix)
    assert both.highest(set()) == 3 * one, "the first product is a result, which is never freed"
