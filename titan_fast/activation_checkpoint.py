"""Memory against recomputation: what each block keeps for its backward pass and what it computes again."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_fast import config
from titan_fast.errors import ConfigError
from titan_fast.model import Block, Llama

_aten = torch.ops.aten

MATRIX_PRODUCTS = frozenset({_aten.mm.default, _aten.addmm.default, _aten.bmm.default})
ATTENTION = frozenset(
    {
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_fused_attention_overrideable.default,
    }
)
# Communication of tensor parallelism: to repeat it costs more than to keep its result.
COLLECTIVES = frozenset(
    {
        torch.ops._c10d_functional.reduce_scatter_tensor.default,
        torch.ops._c10d_functional.all_reduce.default,
    }
)
"""Norms, rotary embedding and SwiGLU, ours or torch's, are in no list: they are cheap to repeat."""

Policy = Callable[..., CheckpointPolicy]


def every_second_matrix_product() -> Policy:
    """Keeps attention outputs and every second matrix product: `selective` with "op"."""
    seen = {False: 0, True: 0}  # forward, recomputation: both count alike, or they would keep different products

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in MATRIX_PRODUCTS:
            seen[context.is_recompute] += 1
            keep = seen[context.is_recompute] % 2 == 1
        else:
            keep = op in ATTENTION or op in COLLECTIVES
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def all_but_pointwise() -> Policy:
    """Keeps every matrix product and attention output: norms, rotary embedding and SiLU x mul run again, no matrix
    product does."""
    kept = MATRIX_PRODUCTS | ATTENTION | COLLECTIVES

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def checkpoint_block(block: Block, make_policy: Callable[[], Policy] | None = None) -> None:
    """Makes the block's forward a checkpoint, in place and without a wrapper that would change parameter names: what
    the policy keeps is kept, the rest is computed again in the backward pass; without a policy, all of it."""
    context_fn: dict[str, Any] = {}
    if make_policy is not None:
        context_fn = {"context_fn": lambda: create_selective_checkpoint_contexts(make_policy())}
    inner = block.forward

    # A function of this module and not a partial of torch's: the compiler starts at a frame that is not torch's own.
    def forward(*args: Any) -> Any:
        # There is no dropout, so no random state to put back.
        return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=False, **context_fn)

    block.forward = forward  # type: ignore[method-assign]


def check(settings: config.ActivationCheckpoint, compiles: bool) -> None:
    """ConfigError where the mode cannot work."""
    if settings.mode == "memory_budget" and not compiles:
        raise ConfigError(
            "activation_checkpoint.mode 'memory_budget' is the compiler's choice, and compile.enable is False",
            "enable compile, or take pointwise, selective or full",
        )


def apply(model: Llama, settings: config.ActivationCheckpoint) -> None:
    """Applies `[activation_checkpoint]` to every block."""
    if settings.mode == "memory_budget":
        torch._functorch.config.activation_memory_budget = settings.memory_budget
        return
    for i, block in enumerate(model.blocks):
        if settings.mode == "full":
            checkpoint_block(block)
        elif settings.mode == "pointwise":
            checkpoint_block(block, all_but_pointwise)
        elif settings.mode == "selective" and settings.selective_ac_option == "op":
            checkpoint_block(block, every_second_matrix_product)
        elif settings.mode == "selective" and (i + 1) % int(settings.selective_ac_option) == 0:
            checkpoint_block(block)
