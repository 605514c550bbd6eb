"""Before a compiled run: do compiled gradients agree with plain PyTorch's? Compilers have silently got them wrong."""

import dataclasses
import gc
import logging

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from titan_fast import compilation, wide_gradients
from titan_fast.config import Compile, Config, MeshDegrees
from titan_fast.documents import split_in_two
from titan_fast.errors import ConfigError, NumericsError
from titan_fast.flavors import ModelShape
from titan_fast.model import Block, init_values, rope_tables
from titan_fast.ops import REFERENCE, Ops, attention_with, with_equal_heads
from titan_fast.parallel import gradients_are_wide, precision
from titan_fast.versions import installed

log = logging.getLogger(__name__)

FLOAT32_BOUND = 1e-4
"""Largest relative error (Frobenius) of a float32 gradient; a right one is about 1e-6."""
SLACK = 3.0
"""In a lower precision the compiled error against float32 may be this many times that of eager PyTorch."""


def check(config: Config, shape: ModelShape, ops: Ops, degrees: MeshDegrees, device: torch.device) -> None:
    """`check_compiled_gradients` at the run's own sizes and dtype, where the config compiles blocks and asks for it.
    With tensor parallelism, on a rank's part of the batch."""
    training, dtype = config.training, precision(config.training, device).param
    if not (config.compile.canary and config.compile.takes("blocks", "model")):
        return
    size = max(1, training.local_batch_size // degrees.tensor), training.seq_len
    wide = gradients_are_wide(config, degrees, device)
    log.info("compiling one block and comparing its gradients with plain PyTorch's (compile.canary)")
    try:
        check_compiled_gradients(
            shape, ops, config.compile, dtype, device, *size, wide=wide, document_mask=training.document_mask
        )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"out of memory in the comparison of a compiled block's gradients, before the model was built: "
            f"{str(error).splitlines()[0]}",
            f"lower training.local_batch_size (now {training.local_batch_size}), or leave the comparison out by "
            "--compile.canary False",
            where=str(device),
        ) from error
    gc.collect()  # a compiled module refers to itself, and a run does not look for garbage that is so old


def check_compiled_gradients(
    shape: ModelShape,
    ops: Ops,
    settings: Compile,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    seq_len: int,
    wide: bool = False,
    document_mask: bool = False,
) -> float:
    """Compares one compiled block, built on `ops`, with the same block in eager PyTorch and float32: the gradient of
    every parameter and of the input, on random values at the run's own sizes. wide: the compiled one's matrices have
    gradients in float32. document_mask: each sequence has two documents. Returns the largest relative error.

    NumericsError names the parameter. Every rank checks its own device.
    """
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(batch, seq_len, shape.dim, generator=generator, device=device)
    dy = torch.randn(batch, seq_len, shape.dim, generator=generator, device=device)
    rope = rope_tables(shape, seq_len, device)
    reference = exact_ops(device)
    exact = _one_by_one(_block(shape, reference, torch.float32, device), x, dy, rope, document_mask)
    compiled = _block(shape, ops, dtype, device)
    if wide:
        wide_gradients.widen(compiled, torch.float32, device)
    compiled.compile(**compilation.arguments(settings))
    bounds = split_in_two(batch, seq_len, device) if document_mask else None
    found = _gradients(compiled, x.to(dtype), dy.to(dtype), rope, bounds)
    largest = dict.fromkeys(exact, FLOAT32_BOUND)
    if dtype != torch.float32 or ops.linear is not REFERENCE.linear:
        # No fused attention of CUDA's but the reference's takes a mask.
        plain = dataclasses.replace(reference if document_mask else REFERENCE, linear=ops.linear)
        eager = _one_by_one(_block(shape, plain, dtype, device), x.to(dtype), dy.to(dtype), rope, document_mask)
        least = torch.finfo(dtype).eps
        largest = {name: SLACK * max(_error(eager[name], exact[name]), least) for name in exact}
    errors = {name: _error(found[name], exact[name]) for name in exact}
    wrong = [name for name in errors if not errors[name] <= largest[name]]  # `not <=`, so that NaN counts as wrong
    if wrong:
        name = max(wrong, key=lambda name: errors[name] / largest[name])
        raise NumericsError(
            f"the compiled gradient of {name} in a block is off by {errors[name]:.2e} (relative; at most "
            f"{largest[name]:.2e} would be rounding), with torch {torch.__version__}, "
            f"triton {installed('triton') or 'not installed'}, backend {settings.backend!r}",
            "do not train on it: set compile.enable False, or [kernels] to reference, or change torch's version; "
            "--compile.canary False turns this check off",
            where=f"{len(wrong)} of {len(errors)} gradients wrong on {device}",
        )
    return max(errors.values())


def exact_ops(device: torch.device) -> Ops:
    """The reference, with an attention in float32 that does not store all scores (32 GiB for 4 x 8192 tokens of the
    1B). On CUDA only the memory-efficient backend can do that, and it knows no grouped heads."""
    if device.type != "cuda":
        return REFERENCE
    return dataclasses.replace(REFERENCE, attention=with_equal_heads(attention_with([SDPBackend.EFFICIENT_ATTENTION])))


def _block(shape: ModelShape, ops: Ops, dtype: torch.dtype, device: torch.device) -> Block:
    with torch.device("meta"):
        block = Block(shape, dataclasses.replace(ops, carry_residual=False))
    block.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(init_values(f"blocks.0.{name}", parameter.shape, shape, 0, device))
    return block.to(dtype)


def _gradients(
    block: nn.Module, x: Tensor, dy: Tensor, rope: tuple[Tensor, Tensor], bounds: Tensor | None
) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    block(x, None, rope, None, bounds)[0].backward(dy)
    gradients = wide_gradients.gradients(block) | {"its input": x.grad}
    return {name: gradient.float() for name, gradient in gradients.items() if gradient is not None}


def _one_by_one(
    block: nn.Module, x: Tensor, dy: Tensor, rope: tuple[Tensor, Tensor], document_mask: bool
) -> dict[str, Tensor]:
    """`_gradients` of one sequence at a time, summed in float32: for a whole batch, eager PyTorch keeps several times
    as much memory as a run that recomputes."""
    bounds = split_in_two(1, x.shape[1], x.device) if document_mask else None
    inputs, total = [], {}
    for one, upstream in zip(x.split(1), dy.split(1), strict=True):
        found = _gradients(block, one, upstream, rope, bounds)
        inputs.append(found.pop("its input"))
        total = {name: total[name].add_(found[name]) if name in total else found[name] for name in found}
        block.zero_grad(set_to_none=True)
    return total | {"its input": torch.cat(inputs)}


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm().clamp(min=1e-30)).item()
