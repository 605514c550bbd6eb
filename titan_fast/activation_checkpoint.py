"""Memory against recomputation: what each block keeps for its backward pass and what it computes again."""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_fast import config, documents
from titan_fast.errors import ConfigError
from titan_fast.model import Block, Llama

_aten = torch.ops.aten

_PRODUCTS = frozenset({_aten.mm.default, _aten.addmm.default, _aten._scaled_mm.default})
_PRODUCTS_OF_A_BLOCK = 5
"""qkv, attention output, gate, up, down. Nothing in the block's backward pass reads the result of the last one, so it
is never worth keeping, and torch stops recomputing before it."""
_ATTENTION = frozenset(
    {
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_fused_attention_overrideable.default,
        documents.VARLEN,
        _aten.bmm.default,  # attention by its formula, where no fused one takes the inputs
    }
)
# Collectives of tensor parallelism with small results, which are cheaper to keep than to repeat. The gathered sequence
# is not small, and is gathered again.
_COLLECTIVES = frozenset(
    {
        torch.ops._c10d_functional.reduce_scatter_tensor.default,
        torch.ops._c10d_functional.all_reduce.default,
    }
)
# Norms, rotary embedding and SwiGLU (torch's or titan_kernels') are in none of these lists: every policy repeats them.

_SEE_A_BUDGET = (
    "inductor",
    "aot_eager",
    "aot_eager_decomp_partition",
    "aot_eager_decomp_partition_with_mode",
    "aot_eager_decomp_partition_crossref",
)
"""Backends of torch.compile that choose what to keep. Others never see the backward pass, or keep all that it reads."""

Policy = Callable[..., CheckpointPolicy]


def _keeping(products: Iterable[int]) -> Policy:
    """Keeps attention outputs and the products with these numbers, counted from 1 in the order of the block.

    The forward pass and its recomputation are counted separately, so that a number means the same product in both."""
    kept, seen = frozenset(products), {False: 0, True: 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _PRODUCTS:
            seen[context.is_recompute] += 1
            keep = seen[context.is_recompute] in kept
        else:
            last = seen[context.is_recompute] >= _PRODUCTS_OF_A_BLOCK
            keep = op in _ATTENTION or (op in _COLLECTIVES and not last)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def every_second_product() -> Policy:
    """`selective` with "op": attention output, qkv and gate are kept; the attention's projection and up run again."""
    return _keeping(range(1, _PRODUCTS_OF_A_BLOCK, 2))


def all_but_pointwise() -> Policy:
    """`pointwise`: norms, rotary embedding and SiLU x mul run again, no matrix product does."""
    return _keeping(range(1, _PRODUCTS_OF_A_BLOCK))


def attention_whole() -> Policy:
    """`selective` with "attention": qkv and the attention output are kept, the other products run again."""
    return _keeping((1,))


def attention_alone() -> Policy:
    """`full` where attention must not run again."""
    return _keeping(())


def nothing() -> Policy:
    """`full` in compiled blocks. Without a policy torch 2.11's compiler would not repeat what is in a
    `torch.autograd.Function`: products in float8, or with gradients in float32."""
    return lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = {"op": every_second_product, "attention": attention_whole}
"""Policies by `selective_ac_option`; other options are numbers."""


def _contexts(make_policy: Callable[[], Policy]) -> Any:
    return create_selective_checkpoint_contexts(make_policy())


def checkpoint_block(block: Block, make_policy: Callable[[], Policy] | None = None) -> None:
    """Checkpoints the block's forward, in place, since a wrapper would change parameter names. What the policy keeps is
    kept, the rest is computed again in the backward pass; without a policy, everything is."""
    context_fn: dict[str, Any] = {}
    if make_policy is not None:
        # A partial, because the compiler guards it together with its arguments. Of a closure it guards only the code,
        # so models with different policies would share the first one's graph. It has no `cache_hash`, with which torch
        # would find the graph again in a later process: with tensor parallelism that key is the same on all ranks.
        context_fn = {"context_fn": functools.partial(_contexts, make_policy)}
    inner = block.forward

    # A function of this module, not a partial of torch's: the compiler ignores frames that are torch's own.
    def forward(*args: Any) -> Any:
        # There is no dropout, so no random state to restore.
        return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=False, **context_fn)

    block.forward = forward  # type: ignore[method-assign]


def _name_budget(block: Block, budget: float) -> None:
    """Lets the compiler see the budget: it takes a graph that it has already made of the same code, such as the
    canary's, and does not ask with which budget that was."""
    inner = block.forward

    def forward(*args: Any) -> Any:
        assert budget >= 0  # what is read is guarded
        return inner(*args)

    block.forward = forward  # type: ignore[method-assign]


def _check_budget(compiles: config.Compile) -> None:
    if not compiles.takes("blocks", "model"):
        why = f"compile.components is {' '.join(compiles.components)}" if compiles.enable else "compile.enable is False"
        raise ConfigError(
            f"activation_checkpoint.mode 'memory_budget' is the choice of the blocks' compiler, and {why}",
            "compile the blocks, or use pointwise, selective or full",
        )
    if compiles.backend not in _SEE_A_BUDGET:
        raise ConfigError(
            "activation_checkpoint.mode 'memory_budget' is the choice of a compiler that decides what is kept for the "
            f"backward pass, and compile.backend is {compiles.backend!r}",
            "use inductor or aot_eager, or pointwise, selective or full",
        )
    if "model" in compiles.components:
        raise ConfigError(
            "activation_checkpoint.mode 'memory_budget' holds for each graph, and compile.components has model, whose "
            "backward pass would compute all blocks again at once, in more memory than if they were kept",
            "compile blocks, or use pointwise, selective or full",
        )


def check(settings: config.ActivationCheckpoint, compiles: config.Compile, n_layers: int) -> None:
    """ConfigError where the mode cannot work, or would do nothing."""
    if settings.mode == "memory_budget":
        _check_budget(compiles)
    option = settings.selective_ac_option
    if settings.mode == "selective" and option not in SELECTIVE and int(option) > n_layers:
        raise ConfigError(
            f"activation_checkpoint.selective_ac_option {option} is more than the model's {n_layers} blocks, so that "
            "none would be checkpointed",
            "lower it, or use mode none",
        )


def _not_about_in_place(record: logging.LogRecord) -> bool:
    """A log filter for a warning of torch.compile about in-place operators in a checkpoint; there are none."""
    return "Detected that context_fn is passed" not in record.getMessage()


def apply(
    model: Llama, settings: config.ActivationCheckpoint, compiles: config.Compile, keeps_attention: bool = False
) -> None:
    """Applies `[activation_checkpoint]` to every block. keeps_attention: even blocks that are recomputed in full keep
    attention's output."""
    import torch._functorch.config as functorch

    functorch.activation_memory_budget = settings.memory_budget if settings.mode == "memory_budget" else 1.0
    if hasattr(functorch, "unsafe_treat_script_objects_as_zero_size"):  # torch 2.13
        functorch.unsafe_treat_script_objects_as_zero_size = True  # meshes, in graphs of DTensors
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_not_about_in_place)
    whole = attention_alone if keeps_attention else nothing if compiles.takes("blocks", "model") else None
    for i, block in enumerate(cast(Iterable[Block], model.blocks)):
        if settings.mode == "full":
            checkpoint_block(block, whole)
        elif settings.mode == "memory_budget":
            _name_budget(block, settings.memory_budget)
        elif settings.mode == "pointwise":
            checkpoint_block(block, all_but_pointwise)
        elif settings.mode == "selective" and settings.selective_ac_option in SELECTIVE:
            checkpoint_block(block, SELECTIVE[settings.selective_ac_option])
        elif settings.mode == "selective" and (i + 1) % int(settings.selective_ac_option) == 0:
            checkpoint_block(block, whole)
