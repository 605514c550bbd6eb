"""Run by each process of test_sharding: every operator on DTensors, compared with the same on whole tensors.

TRITON_INTERPRET=1 python tests/kernels/sharded.py <rank> <world size> <file that does not exist>
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

EPS = 1e-5


def check(
    mesh: DeviceMesh,
    name: str,
    function: Any,
    inputs: list[tuple[Tensor, Placement]],
    outputs: list[Placement],
    gradients: list[Placement],
) -> None:
    """`function` of inputs with the given placements: its outputs and their gradients have the given placements,
    nothing is communicated, and gathered they equal the results for the whole inputs."""
    whole = [x.clone().requires_grad_() for x, _ in inputs]
    expected = function(*whole)
    expected = expected if isinstance(expected, tuple) else (expected,)
    downstream = [torch.randn_like(output) for output in expected]
    expected_gradients = torch.autograd.grad(expected, whole, downstream)

    leaves = [distribute_tensor(x, mesh, [placement]).requires_grad_() for x, placement in inputs]
    # A sum over ranks has one gradient, the same for each of its terms.
    incoming = [Replicate() if isinstance(placement, Partial) else placement for placement in outputs]
    placed = [distribute_tensor(d, mesh, [placement]) for d, placement in zip(downstream, incoming, strict=True)]
    with CommDebugMode() as communication:
        found = function(*leaves)
        found = found if isinstance(found, tuple) else (found,)
        found_gradients = torch.autograd.grad(found, leaves, placed)
    assert communication.get_total_counts() == 0, f"{name}: {communication.get_comm_counts()}"
    for kind, tensors, placements, truths in (
        ("output", found, outputs, expected),
        ("gradient", found_gradients, gradients, expected_gradients),
    ):
        for i, (tensor, placement, truth) in enumerate(zip(tensors, placements, truths, strict=True)):
            assert isinstance(tensor, DTensor)
            assert tensor.placements == (placement,), f"{name}: {kind} {i} is {tensor.placements}, not {placement}"
            torch.testing.assert_close(tensor.full_tensor(), truth, atol=1e-5, rtol=1e-5, msg=f"{name}: {kind} {i}")


def run(mesh: DeviceMesh) -> None:
    import titan_kernels as kernels

    torch.manual_seed(0)  # the same whole tensors on every rank
    x, residual, up = (torch.randn(2, 8, 32) for _ in range(3))
    weight, down = torch.randn(32), torch.randn(16, 32)
    whole, part = Replicate(), Partial()
    for dim in (0, 1):
        rows = Shard(dim)
        check(
            mesh,
            f"rms_norm over {dim}",
            lambda x, w: kernels.rms_norm(x, w, EPS),
            [(x, rows), (weight, whole)],
            [rows],
            [rows, part],
        )
        check(
            mesh,
            f"add_rms_norm over {dim}",
            lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS),
            [(x, rows), (residual, rows), (weight, whole)],
            [rows, rows],
            [rows, rows, part],
        )
    check(
        mesh,
        "rms_norm, replicated",
        lambda x, w: kernels.rms_norm(x, w, EPS),
        [(x, whole), (weight, whole)],
        [whole],
        [whole, whole],
    )
    for dim in (0, 1, 2):
        columns = Shard(dim)
        check(mesh, f"swiglu over {dim}", kernels.swiglu, [(x, columns), (up, columns)], [columns], [columns, columns])
    check(
        mesh,
        "swiglu_linear over columns",
        kernels.swiglu_linear,
        [(x, Shard(2)), (up, Shard(2)), (down, Shard(1))],
        [part],
        [Shard(2), Shard(2), Shard(1)],
    )
    check(
        mesh,
        "norm_linear over the batch",
        lambda x, r, w, a: kernels.norm_linear(x, r, w, EPS, (a,)),
        [(x, Shard(0)), (residual, Shard(0)), (weight, whole), (down, whole)],
        [Shard(0), Shard(0)],
        [Shard(0), Shard(0), part, part],
    )
    check(
        mesh,
        "norm_linear with two matrices over the batch",
        lambda x, w, a, b: kernels.norm_linear(x, None, w, EPS, (a, b))[:2],
        [(x, Shard(0)), (weight, whole), (down, whole), (down.flip(0), whole)],
        [Shard(0), Shard(0)],
        [Shard(0), part, part, part],
    )
    check_rope(mesh)
    check_cross_entropy(mesh)


def check_rope(mesh: DeviceMesh) -> None:
    import titan_kernels as kernels

    qkv, angle = torch.randn(2, 8, 64), torch.randn(8, 4)
    cos, sin = torch.cos(angle), torch.sin(angle)
    # over the batch, the sequence (the tables with it), the key/value heads with their groups
    for dim, out_dim, table in ((0, 0, Replicate()), (1, 2, Shard(0)), (2, 1, Replicate())):
        placed = [distribute_tensor(t, mesh, [table]) for t in (cos, sin)]

        def rope(qkv: Tensor, tables: list[DTensor] = placed) -> tuple[Tensor, ...]:
            cos_sin = tables if isinstance(qkv, DTensor) else (cos, sin)
            return kernels.rope(qkv, cos_sin[0], cos_sin[1], 4, 2)

        check(mesh, f"rope over {dim}", rope, [(qkv, Shard(dim))], [Shard(out_dim)] * 3, [Shard(dim)])


def check_cross_entropy(mesh: DeviceMesh) -> None:
    import titan_kernels as kernels

    labels = torch.tensor([0, 3, -100, 47, 5, 6, 7, -100])
    placed = distribute_tensor(labels, mesh, [Shard(0)])

    def cross_entropy(logits: Tensor) -> Tensor:
        return kernels.cross_entropy(logits, placed if isinstance(logits, DTensor) else labels)

    check(mesh, "cross_entropy", cross_entropy, [(torch.randn(8, 48), Shard(0))], [Shard(0)], [Shard(0)])


def main(rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    run(DeviceMesh("cpu", list(range(size))))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
