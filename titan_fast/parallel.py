"""From one device to many, in one order: tensor parallel, activation checkpointing, compile per block, FSDP2."""

import dataclasses
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._pytree import tree_map_only

from titan_fast import activation_checkpoint, compilation, config, direct_fsdp, documents, float8, wide_gradients
from titan_fast.config import Config, MeshDegrees
from titan_fast.errors import ConfigError
from titan_fast.flavors import ModelShape
from titan_fast.loss import LinearCrossEntropy, has_torch_loss
from titan_fast.model import Head, Llama, Norm


def build_mesh(degrees: MeshDegrees, device: torch.device) -> DeviceMesh:
    """The mesh ("replicate", "shard", "tensor"), ranks in that order: tensor-parallel ranks are neighbours."""
    return init_device_mesh(
        device.type,
        (degrees.replicate, degrees.shard, degrees.tensor),
        mesh_dim_names=("replicate", "shard", "tensor"),
    )


@dataclass(frozen=True)
class Precision:
    """Dtypes of the computation and of the gradients' reduction; see `weights_kept` for the optimizer's."""

    param: torch.dtype
    reduce: torch.dtype


def precision(training: config.Training, device: torch.device) -> Precision:
    """`training.mixed_precision_*` with auto resolved."""
    name = training.mixed_precision_param
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return Precision(getattr(torch, name), getattr(torch, training.mixed_precision_reduce))


def check(settings: Config, shape: ModelShape, degrees: MeshDegrees, device: torch.device) -> None:
    """ConfigError, with the numbers, for what cannot be parallelized as asked."""
    tensor, seq_len = degrees.tensor, settings.training.seq_len
    for name, value in (("n_heads", shape.n_heads), ("n_kv_heads", shape.n_kv_heads), ("ffn_dim", shape.ffn_dim)):
        if value % tensor:
            divisors = [n for n in range(1, value + 1) if shape.n_kv_heads % n == 0 and shape.ffn_dim % n == 0]
            raise ConfigError(
                f"{name} {value} is not divisible by tensor_parallel_degree {tensor}",
                f"for this model the degree may be one of {divisors}",
            )
    if (tensor - 1) * -(-shape.vocab_size // tensor) >= shape.vocab_size:
        raise ConfigError(
            f"a vocabulary of {shape.vocab_size} leaves the last of {tensor} tensor-parallel ranks nothing",
            "lower tensor_parallel_degree",
        )
    if seq_len % tensor:
        raise ConfigError(
            f"training.seq_len {seq_len} is not divisible by tensor_parallel_degree {tensor}, which cuts sequences too",
            "change one of them",
        )
    activation_checkpoint.check(settings.activation_checkpoint, settings.compile, shape.n_layers)
    check_single_device(settings, degrees, precision(settings.training, device))
    world = degrees.data * tensor
    shards = uses_fsdp(settings, world, precision(settings.training, device))
    compilation.check(settings.compile, shards)
    check_optimizer(settings)
    if settings.parallelism.fsdp_buffers == "direct" and (problem := direct_fsdp.unsupported()):
        raise ConfigError(problem, "use flat", "parallelism.fsdp_buffers direct")
    float8.check(settings, shape, tensor, precision(settings.training, device).param, device.type == "cuda")
    wide_gradients.check(*_of_gradients(settings, degrees, device))
    if settings.training.document_mask and device.type == "cuda":
        param = precision(settings.training, device).param
        documents.check(settings.kernels.attention, str(param).removeprefix("torch."))
    if settings.training.cuda_graph:
        check_cuda_graph(device, shards, settings.training.document_mask)
    if settings.loss.implementation == "torch":
        check_torch_loss(settings.loss, tensor, settings.kernels.cross_entropy)
    if settings.parallelism.enable_async_tensor_parallel:
        lacks = [
            what
            for what, there in (
                ("a tensor_parallel_degree above 1", tensor > 1),
                (
                    "blocks compiled by inductor",
                    settings.compile.takes("blocks", "model") and settings.compile.backend == "inductor",
                ),
                ("CUDA", device.type == "cuda"),
            )
            if not there
        ]
        if lacks:
            raise ConfigError(
                f"parallelism.enable_async_tensor_parallel cannot work without {' and '.join(lacks)}", "turn it off"
            )


def parallelize(model: Llama, mesh: DeviceMesh, dtypes: Precision, settings: Config) -> Llama:
    """Makes a meta-device model this rank's part of it, in place. Give it memory and values after this."""
    if mesh["tensor"].size() > 1:
        apply_tensor_parallel(model, mesh["tensor"], settings.parallelism.enable_async_tensor_parallel)
    # To recompute attention, torch.compile would save the CPU's random state, and torch 2.13 confuses that with the
    # DeviceMesh that it saves for DTensor gradients. CUDA's random state is kept in another way.
    keeps_attention = settings.compile.enable and mesh["tensor"].size() > 1 and mesh.device_type == "cpu"
    activation_checkpoint.apply(model, settings.activation_checkpoint, settings.compile, keeps_attention)
    if settings.compile.enable:
        compilation.compile_model(model, settings.compile)
    if uses_fsdp(settings, mesh.size(), dtypes):
        apply_fsdp(model, mesh, dtypes, settings)
    return model


def uses_fsdp(settings: Config, world_size: int, dtypes: Precision) -> bool:
    """Whether FSDP2 is used: on several devices, with offloading, and on a single device that computes in bfloat16
    where `single_device` says so."""
    if world_size > 1 or settings.training.enable_cpu_offload:
        return True
    return dtypes.param != torch.float32 and weights_kept(settings, world_size, dtypes) == "fsdp"


def weights_kept(settings: Config, world_size: int, dtypes: Precision) -> Literal["fsdp", "masters", "bfloat16"]:
    """`parallelism.single_device` with auto resolved. auto is "fsdp" also where the setting does not apply: on several
    devices, or in float32."""
    choice = settings.parallelism.single_device
    if choice != "auto":
        return choice
    alone = world_size == 1 and dtypes.param == torch.bfloat16 and not settings.training.enable_cpu_offload
    return "masters" if alone and settings.optimizer.implementation == "fused" else "fsdp"


def saved_bytes(settings: Config, world_size: int, dtypes: Precision) -> int:
    """Bytes of one parameter in a checkpoint: the weight and its two moments."""
    return 3 * (2 if weights_kept(settings, world_size, dtypes) == "bfloat16" else 4)


def buffers_are_direct(settings: config.Parallelism, device_type: str) -> bool:
    """`parallelism.fsdp_buffers` with auto resolved."""
    if settings.fsdp_buffers == "auto":
        return device_type == "cuda" and not direct_fsdp.unsupported()
    return settings.fsdp_buffers == "direct"


def gradients_are_wide(settings: Config, degrees: MeshDegrees, device: torch.device) -> bool:
    """`parallelism.fsdp_wide_gradients` with None resolved."""
    return wide_gradients.wanted(*_of_gradients(settings, degrees, device))


def _of_gradients(
    settings: Config, degrees: MeshDegrees, device: torch.device
) -> tuple[Config, int, int, torch.dtype, bool]:
    param, direct = precision(settings.training, device).param, buffers_are_direct(settings.parallelism, device.type)
    return settings, degrees.shard, degrees.tensor, param, direct


def check_single_device(settings: Config, degrees: MeshDegrees, dtypes: Precision) -> None:
    """ConfigError where `single_device` asks for what only a single bfloat16 device can do."""
    choice, devices = settings.parallelism.single_device, degrees.data * degrees.tensor
    if choice in ("auto", "fsdp"):
        return
    where, hint = f"parallelism.single_device {choice}", "use fsdp"
    if devices > 1:
        raise ConfigError(f"{choice} is for one device, and there are {devices}", hint, where)
    if dtypes.param == torch.float32:
        raise ConfigError(f"{choice} keeps bfloat16 weights, and this run computes in float32", hint, where)
    if settings.training.enable_cpu_offload:
        raise ConfigError(f"{choice} keeps weights on the device, and enable_cpu_offload in host memory", hint, where)


def check_optimizer(settings: Config) -> None:
    """ConfigError where `optimizer.implementation` is not the one that the other settings need."""
    asked = settings.optimizer.implementation
    if asked == "fused":
        return
    if settings.parallelism.single_device == "masters":
        why, other = "parallelism.single_device masters", "another single_device"
    elif settings.compile.takes("optimizer"):
        why, other = "compile.components with optimizer", "components without it"
    else:
        return
    raise ConfigError(f"optimizer.implementation is {asked}, and {why} has a step of its own", f"use fused, or {other}")


def check_cuda_graph(device: torch.device, shards: bool, document_mask: bool) -> None:
    """ConfigError where steps cannot be recorded."""
    if device.type != "cuda":
        raise ConfigError(
            f"training.cuda_graph records the work of a GPU, and the device is {device.type}", "turn it off"
        )
    if shards:
        raise ConfigError(
            "training.cuda_graph needs weights that stay where they are, and FSDP2 gathers them anew in every step",
            "turn it off, or on a single device use parallelism.single_device masters",
        )
    if document_mask:
        raise ConfigError(
            "training.cuda_graph needs inputs of one size, and with training.document_mask the number of documents "
            "changes",
            "turn one of them off",
        )


def check_torch_loss(loss: config.Loss, tensor_degree: int, kernel: str) -> None:
    """ConfigError where torch's own linear_cross_entropy cannot do what is asked."""
    if not has_torch_loss():
        problem = f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy"
    elif loss.z_loss:
        problem = f"torch's linear_cross_entropy has no z_loss, and it is {loss.z_loss}"
    elif tensor_degree > 1:
        problem = f"torch's linear_cross_entropy needs the whole vocabulary; tensor_parallel_degree is {tensor_degree}"
    elif kernel == "triton":
        problem = "torch's linear_cross_entropy takes no kernel of ours, and kernels.cross_entropy is 'triton'"
    else:
        return
    raise ConfigError(problem, "use chunked", "loss.implementation torch")


# Tensor parallel with sequence parallel: inside attention, feed-forward and head each rank has all positions and 1 /
# degree of the heads, features or vocabulary; between them it has seq_len / degree positions. All modules take and
# return plain local tensors.
_SEQUENCE, _WHOLE = Shard(1), Replicate()

MODEL_PLAN: dict[str, Callable[[], ParallelStyle]] = {
    "embedding": lambda: RowwiseParallel(input_layouts=_WHOLE, output_layouts=_SEQUENCE),
    "norm": lambda: SequenceShardNorm(),
    "head": lambda: VocabularyParallelHead(),
}
BLOCK_PLAN: dict[str, Callable[[], ParallelStyle]] = {
    "attention_norm": lambda: SequenceShardNorm(),
    "attention": lambda: PrepareModuleInput(
        input_layouts=(_SEQUENCE, None, None, None), desired_input_layouts=(_WHOLE, None, None, None)
    ),
    "attention.qkv": lambda: ColwiseParallel(),
    "attention.out": lambda: RowwiseParallel(output_layouts=_SEQUENCE),
    "feed_forward_norm": lambda: SequenceShardNorm(),
    "feed_forward": lambda: PrepareModuleInput(input_layouts=(_SEQUENCE,), desired_input_layouts=(_WHOLE,)),
    "feed_forward.gate": lambda: ColwiseParallel(),
    "feed_forward.up": lambda: ColwiseParallel(),
    "feed_forward.down": lambda: RowwiseParallel(output_layouts=_SEQUENCE),
}


def apply_tensor_parallel(model: Llama, mesh: DeviceMesh, asynchronous: bool) -> None:
    """Cuts matrices over `mesh` and sequences between them."""
    parallelize_module(model, mesh, {name: style() for name, style in MODEL_PLAN.items()})
    for block in model.blocks:
        parallelize_module(block, mesh, {name: style() for name, style in BLOCK_PLAN.items()})
    model.tie()
    check_styles(model)
    for module in (model.embedding, model.blocks[-1]):
        module.register_forward_hook(_arrived)
    if asynchronous:
        overlap_collectives(mesh)


def check_styles(model: nn.Module) -> None:
    """ConfigError for a parameter that no tensor parallel style has taken: the ranks' copies of it would get different
    gradients and drift apart."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise ConfigError(f"{name} has no tensor parallel style", "give it one in BLOCK_PLAN or MODEL_PLAN")


def overlap_collectives(mesh: DeviceMesh) -> None:
    """Lets Inductor cut matrix products into pieces, and send each over symmetric memory while it computes the next."""
    import torch._inductor.config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: AsyncCollectiveTensor) -> Tensor:
        return x.wait()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def _arrived(module: nn.Module, arguments: Any, output: Any) -> Any:
    """A forward hook for modules whose output may go into a compiled one: torch.compile (2.13) loses the gradient of an
    input whose collective is still running. The next operator would have waited for it anyway."""
    return tree_map_only(AsyncCollectiveTensor, _Wait.apply, output)


class SequenceShardNorm(ParallelStyle):
    """A norm on this rank's positions. It communicates nothing; `finish_gradients` sums the ranks' weight gradients.

    The operators see plain tensors, since DTensor's dispatch would take more host time than the norm itself."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Norm)
        module.weight = nn.Parameter(distribute_tensor(module.weight, device_mesh, [Replicate()]))
        module.ops = dataclasses.replace(
            module.ops,
            rms_norm=_with_local_weight(module.ops.rms_norm),
            add_rms_norm=_with_local_weight(module.ops.add_rms_norm),
        )
        return module


def _with_local_weight(operator: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        return operator(*(a.to_local() if isinstance(a, DTensor) else a for a in arguments))

    return run


def finish_gradients(model: Llama) -> None:
    """Sums the norms' gradients over the tensor-parallel ranks, each of which has computed them from its own positions.
    Once a step, after the last backward pass and before clipping.

    All of them take one float32 all-reduce. If they were partial DTensors instead, FSDP would reduce each by itself in
    the middle of the backward pass, in the dtype of the computation whatever its reduce_dtype.
    """
    norms = [module.weight for module in model.modules() if isinstance(module, Norm)]
    gradients = [weight.grad for weight in norms if isinstance(weight.grad, DTensor)]
    if not gradients or "tensor" not in (gradients[0].device_mesh.mesh_dim_names or ()):
        return
    local = [gradient.to_local() for gradient in gradients]
    flat = torch.cat([gradient.float() for gradient in local])
    dist.all_reduce(flat, group=gradients[0].device_mesh["tensor"].get_group())
    torch._foreach_copy_(local, list(flat.split([gradient.numel() for gradient in local])))


class VocabularyParallelHead(ParallelStyle):
    """The head's rows, that is the vocabulary, cut over the ranks. Its loss exchanges three numbers per token."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Head)
        weight = distribute_tensor(module.weight, device_mesh, [Shard(0)])
        module.weight = nn.Parameter(weight)
        if isinstance(module.loss, LinearCrossEntropy):
            _, offset = compute_local_shape_and_global_offset(weight.shape, device_mesh, [Shard(0)])
            module.loss = dataclasses.replace(module.loss, vocab_group=device_mesh.get_group(), vocab_offset=offset[0])
        gather = PrepareModuleInput(
            input_layouts=(_SEQUENCE, None, None), desired_input_layouts=(_WHOLE, None, None), use_local_output=True
        )
        return gather._apply(module, device_mesh)


def apply_fsdp(model: Llama, mesh: DeviceMesh, dtypes: Precision, settings: Config) -> None:
    """FSDP2 over ("replicate", "shard"): a unit per block, one for the embedding, one for final norm and head.

    A tied embedding and head are one parameter and so belong to one unit, the root. Gradients are summed, never
    averaged: the loss already carries one over the global number of tokens.
    """
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    common: dict[str, Any] = {
        "mesh": mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"],
        "mp_policy": MixedPrecisionPolicy(dtypes.param, dtypes.reduce, cast_forward_inputs=False),
        "offload_policy": offload if settings.training.enable_cpu_offload else OffloadPolicy(),
    }
    for block in model.blocks:
        fully_shard(block, **common)
    if not model.shape.tied:
        fully_shard(model.embedding, **common)
        fully_shard([model.norm, model.head], **common)
    fully_shard(model, **common)
    degrees = MeshDegrees(*(mesh[name].size() for name in ("replicate", "shard", "tensor")))
    set_fsdp_policy(model, settings, degrees, torch.device(mesh.device_type))
    alone = degrees.data == 1
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if not alone:  # a single rank does not divide; told to divide by 1, it would make a copy
                module.set_gradient_divide_factor(1.0)
            # Without this the factor would make FSDP2 use PREMUL_SUM, which gloo does not have.
            module.set_force_sum_reduction_for_comms(True)
    _prefetch(model)
    if isinstance(model.embedding, FSDPModule):  # its gradient needs no weight
        model.embedding.set_unshard_in_backward(False)
        # Itself, which is therefore not gathered. With none named, FSDP2 would gather the unit that ran before it: the
        # head, after a forward pass without a backward one, as in validation; and nobody would free it.
        model.embedding.set_modules_to_backward_prefetch([model.embedding])
    # FSDP warns of in-place operators on such an output; the model has none.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor", category=UserWarning)


def set_fsdp_policy(model: Llama, settings: Config, degrees: MeshDegrees, device: torch.device) -> None:
    """Those settings of FSDP2 that can be changed between steps: when gathered weights are freed, through which buffers
    weights and gradients go, and in which dtype gradients are made."""
    reshard = settings.parallelism.fsdp_reshard_after_forward
    if reshard == "default" and degrees.shard == 1:
        reshard = "never"  # nothing to gather again, only the cast would be repeated in the backward pass
    ends = (model.norm, model.head, model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Freed, these would be gathered again at once: the backward pass begins with them.
            kept = module is model.blocks[-1] or module in ends
            module.set_reshard_after_forward(reshard == "always" or (reshard == "default" and not kept), recurse=False)
    direct_fsdp.use(model, buffers_are_direct(settings.parallelism, device.type))
    wide_gradients.use(model, torch.float32 if gradients_are_wide(settings, degrees, device) else None, device)


def free_gathered_weights(model: nn.Module) -> None:
    """To be called after forward passes without a backward pass: gives every FSDP2 unit its sharded parameters back,
    which the optimizer and checkpoints know. A backward pass does this by itself."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def replicate_only_after_last(model: nn.Module, is_last: bool) -> None:
    """With gradient accumulation, lets HSDP's replicas exchange gradients only after the last pass. Within a replica
    every pass reduces them, so that no rank holds more than its shard of the gradient."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(is_last)


def _prefetch(model: Llama) -> None:
    """Gathers each unit while the one before it computes, in forward and backward order. By itself FSDP would use the
    order that it saw in the first step."""
    ends = [] if model.shape.tied else [[model.embedding], [model.norm, model.head]]
    units = [*ends[:1], *([block] for block in model.blocks), *ends[1:]]
    first = [unit[0] for unit in units]
    for now, then in itertools.pairwise(first):
        if isinstance(now, FSDPModule) and isinstance(then, FSDPModule):
            now.set_modules_to_forward_prefetch([then])
            then.set_modules_to_backward_prefetch([now])
