"""Matrix products in float8, which tensor cores from Ada and Hopper on do at twice the rate of bfloat16.

    y = x W^T,  dx = dy W,  dw = dy^T x

All three are `product(a, b) = a b^T`, and float8 tensor cores need the inner dimension of both operands contiguous, so
x, W and dy are each rounded in two layouts. Before it is rounded, an operand is multiplied by a scale that brings its
largest magnitude, found anew each time, to the format's largest. Sums are float32, and the result is divided by the
scales. Depending on `recipe_name` the scale is one number, or one for every row (Micikevicius et al. 2022,
arXiv:2209.05433; the recipes are torchao's). Weights, gradients and everything else stay as they are.

The casts are plain PyTorch, for the compiler to fuse with the operators before them. Uncompiled, each takes several
passes over memory, in float32.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard

from titan_fast import config
from titan_fast.errors import ConfigError
from titan_fast.flavors import ModelShape

FORWARD = torch.float8_e4m3fn
GRADIENT = {"tensorwise": torch.float8_e5m2, "rowwise": torch.float8_e4m3fn}
"""The dtype of dy. With one scale for a whole tensor small gradients would be below e4m3's range; e5m2's is 2^14 times
larger."""
MULTIPLE = 16
"""What every size of a product must be divisible by: cuBLAS and CUTLASS read 16 bytes at a time."""
LEAST_CAPABILITY = (8, 9)
_WIDE = 8192  # with at least so many columns, rows are reduced one by one
_TINY = 1e-12  # in place of the largest magnitude of a tensor of zeros


def linear_with(recipe: str) -> Callable[..., Tensor]:
    """`titan_fast.ops.linear` in float8 by `recipe`, forward and backward. The function takes x [..., in] and weight
    [out, in] of one dtype, bfloat16 or float32, and returns [..., out] in that dtype. With tensorwise it may have a
    `port` [out, in]: the weight's gradient goes there, in its dtype."""

    def linear(x: Tensor, weight: Tensor, port: Tensor | None = None) -> Tensor:
        if isinstance(x, DTensor) and isinstance(weight, DTensor):
            return _on_shards(x, weight, recipe)
        return _Float8Linear.apply(x, weight, port, recipe)

    return linear


class Rounded(NamedTuple):
    """An operand of a product."""

    values: Tensor
    """[rows, columns] float8, contiguous."""
    scale: Tensor
    """What the values were multiplied by: float32, 0-dim, or [rows, 1] if rowwise."""


def rounded(x: Tensor, dtype: torch.dtype, recipe: str, scale: Tensor | None = None) -> Rounded:
    """x [rows, columns] in `dtype`, with the given scale, or the one that brings its largest magnitude to that of
    `dtype`. Values that are not finite become NaN, so that the guard of bad steps sees them."""
    most = torch.finfo(dtype).max
    if scale is None:
        largest = _largest(x) if recipe == "tensorwise" else x.abs().amax(1, keepdim=True)
        scale = most / largest.float().clamp(min=_TINY)
    return Rounded((x.float() * scale).clamp(-most, most).to(dtype).contiguous(), scale)


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude of x [rows, columns], 0-dim. Wide rows are reduced one by one first, because Inductor cuts
    a whole tensor into parts that may begin at odd places (16384 x 8192 into 528), where loads cannot be vectorised. A
    reduction for each narrow row would be too small, so there Inductor cuts."""
    magnitude = x.abs()
    return magnitude.amax(1).amax() if x.shape[1] >= _WIDE else magnitude.amax()


def product(a: Rounded, b: Rounded, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """a [M, K] and b [N, K] -> a b^T [M, N] in `dtype`. fast: Hopper sums within the tensor cores, whose accumulators
    keep about 14 bits."""
    scales = a.scale.reciprocal(), b.scale.reciprocal().t()
    return torch._scaled_mm(a.values, b.values.t(), *scales, out_dtype=dtype, use_fast_accum=fast)


class _Float8Linear(torch.autograd.Function):
    """Saves its inputs, and where a tensor has one scale, which serves both of its layouts, the scales too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, port: Tensor | None, recipe: str) -> Tensor:
        x8, weight8 = rounded(x.flatten(0, -2), FORWARD, recipe), rounded(weight, FORWARD, recipe)
        ctx.recipe, ctx.wide = recipe, None if port is None else port.dtype
        ctx.save_for_backward(x, weight, *((x8.scale, weight8.scale) if recipe == "tensorwise" else ()))
        return product(x8, weight8, x.dtype, fast=True).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, weight, *scales = ctx.saved_tensors
        recipe, dtype = ctx.recipe, GRADIENT[ctx.recipe]
        x_scale, weight_scale = scales or (None, None)
        dy = dy.flatten(0, -2)
        dy8 = rounded(dy, dtype, recipe)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = product(dy8, rounded(weight.t(), FORWARD, recipe, weight_scale), x.dtype).view(x.shape)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dy8 = rounded(dy.t(), dtype, recipe, dy8.scale if scales else None)
            dweight = product(dy8, rounded(x.flatten(0, -2).t(), FORWARD, recipe, x_scale), ctx.wide or x.dtype)
        return (dx, dweight, None, None) if ctx.wide is None else (dx, None, dweight, None)


def _on_shards(x: DTensor, weight: DTensor, recipe: str) -> DTensor:
    """The same with tensor parallelism; each rank has the scales of its own shards. If the weight is cut by rows, so is
    the output; if by columns, the ranks' outputs are to be summed."""
    (placement,), mesh = weight.placements, weight.device_mesh
    last = Shard(x.ndim - 1)
    of_gradient, of_output = (Partial(), last) if placement == Shard(0) else (last, Partial())
    local = x.to_local(grad_placements=[of_gradient])
    return DTensor.from_local(_Float8Linear.apply(local, weight.to_local(), None, recipe), mesh, [of_output])


def check(settings: config.Config, shape: ModelShape, tensor_degree: int, dtype: torch.dtype, on_gpu: bool) -> None:
    """ConfigError for what float8 cannot do. dtype: that of the computation."""
    if not settings.float8.enable:
        return
    sizes = {
        "dim": shape.dim,
        "(n_heads + 2 n_kv_heads) x head_dim": shape.qkv_dim,
        "n_heads x head_dim": shape.n_heads * shape.head_dim,
        "ffn_dim": shape.ffn_dim,
    }
    sizes = {name: size // (1 if name == "dim" else tensor_degree) for name, size in sizes.items()}
    sizes["seq_len x local_batch_size"] = settings.training.seq_len * settings.training.local_batch_size
    wrong = [f"{name} is {size}" for name, size in sizes.items() if size % MULTIPLE]
    if wrong:
        cut = f" after tensor_parallel_degree {tensor_degree} has cut them" if tensor_degree > 1 else ""
        raise ConfigError(
            f"float8 products need sizes that {MULTIPLE} divides{cut}, and {', '.join(wrong)}",
            "change that, or turn float8.enable off",
        )
    if settings.kernels.reemit == "triton":
        raise ConfigError(
            "kernels.reemit 'triton' joins norms and SwiGLU to products that are not float8, and float8.enable is True",
            "use reemit auto or reference, or turn float8 off",
        )
    if on_gpu and dtype != torch.bfloat16:
        raise ConfigError(
            f"float8.enable gives results in bfloat16, and training.mixed_precision_param is "
            f"{str(dtype).removeprefix('torch.')}",
            "change one",
        )


def check_device(settings: config.Float8, device: torch.device) -> None:
    """ConfigError for a device without float8 products. CPUs have slow ones, for trying things out."""
    if not settings.enable:
        return
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise ConfigError(
            f"float8.enable needs a GPU of compute capability {'.'.join(map(str, LEAST_CAPABILITY))} or newer (Ada, "
            f"Hopper), and {torch.cuda.get_device_name(device)} has "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}",
            "turn it off",
        )
    if device.type == "cpu" and settings.recipe_name == "rowwise" and not cpu_has_rowwise():
        raise ConfigError(
            f"float8.recipe_name 'rowwise' is not in torch {torch.__version__}'s products on a CPU",
            "use tensorwise here, or a newer torch",
        )


@cache
def cpu_has_rowwise() -> bool:
    """torch 2.13's has, 2.11's has not."""
    x = rounded(torch.ones(MULTIPLE, MULTIPLE), FORWARD, "rowwise")
    try:
        product(x, x, torch.float32)
    except RuntimeError:
        return False
    return True
