"""From one device to many, in one order: mesh, compile per block, FSDP2."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from titan_fast import config
from titan_fast.config import MeshDegrees
from titan_fast.model import Llama


def build_mesh(degrees: MeshDegrees, device: torch.device) -> DeviceMesh:
    """The mesh ("replicate", "shard", "tensor"), ranks in that order, the last one the closest."""
    return init_device_mesh(
        device.type,
        (degrees.replicate, degrees.shard, degrees.tensor),
        mesh_dim_names=("replicate", "shard", "tensor"),
    )


@dataclass(frozen=True)
class Precision:
    """Dtypes of the computation and of the gradients' reduction; the optimizer's are float32."""

    param: torch.dtype
    reduce: torch.dtype


def precision(training: config.Training, device: torch.device) -> Precision:
    """`training.mixed_precision_*` with auto resolved."""
    name = training.mixed_precision_param
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return Precision(getattr(torch, name), getattr(torch, training.mixed_precision_reduce))


def compile_blocks(model: Llama, settings: config.Compile) -> None:
    """Compiles each block in place; blocks of one shape share one graph."""
    for block in model.blocks:
        block.compile(backend=settings.backend, fullgraph=True)


def graphs_compiled() -> int:
    """How many graphs torch.compile has made so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def shard(model: Llama, mesh: DeviceMesh, dtypes: Precision, reshard: str) -> None:
    """FSDP2 over ("replicate", "shard"): a unit per block, the embedding one, final norm and head one.

    A tied embedding and head are one parameter and so one unit, the root. Gradients are summed, never averaged: the
    loss already carries one over the global number of tokens.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtypes.param, reduce_dtype=dtypes.reduce, cast_forward_inputs=False)
    over = mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"]
    for i, block in enumerate(model.blocks):
        # The last block's backward comes right after its forward: freed, it would be gathered again at once.
        free = reshard == "always" or (reshard == "default" and i < len(model.blocks) - 1)
        fully_shard(block, mesh=over, mp_policy=policy, reshard_after_forward=free)
    if not model.shape.tied:
        fully_shard(model.embedding, mesh=over, mp_policy=policy, reshard_after_forward=reshard != "never")
        fully_shard([model.norm, model.head], mesh=over, mp_policy=policy, reshard_after_forward=reshard == "always")
    fully_shard(model, mesh=over, mp_policy=policy, reshard_after_forward=reshard == "always")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Without this a divide factor becomes a PREMUL_SUM, which gloo does not have.
            module.set_force_sum_reduction_for_comms(True)


def parallelize(
    model: Llama, mesh: DeviceMesh, dtypes: Precision, compile_settings: config.Compile, settings: config.Parallelism
) -> nn.Module:
    """Compile and FSDP2, in place. One float32 device needs no FSDP; one in bfloat16 has its casts from it."""
    if compile_settings.enable:
        compile_blocks(model, compile_settings)
    if mesh.size() > 1 or dtypes.param != torch.float32:
        shard(model, mesh, dtypes, settings.fsdp_reshard_after_forward)
    return model
