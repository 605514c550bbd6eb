"""The one door to kernels: for each operator the reference or Triton, chosen once, when the model is built."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from titan_kernels import reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from titan_fast.config import Kernels
from titan_fast.errors import ConfigError

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Ops:
    """The operators that a model is built on; shapes and formulas are in titan_kernels.reference."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rope: Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    cross_entropy_stats: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    cross_entropy_grad_: Callable[[Tensor, Tensor, int, Tensor, Tensor, int, float], None]
    attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    carry_residual: bool = False
    reasons: tuple[tuple[str, str, str], ...] = ()
    """(operator, choice, reason) for the log."""


def attention_with(backends: list[SDPBackend]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Causal scaled dot-product attention by the first of `backends` that takes the inputs.

    The function takes q [B, H, S, E], k and v [B, K, T, E] and returns [B, H, S, E]. With S == T it is causal; with
    S == 1 (one new token against a cache) everything is visible.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal = q.shape[2] > 1
        assert not causal or q.shape[2] == k.shape[2], "a prompt is read in one piece"
        with sdpa_kernel(backends, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    return attention


def _choose_attention(setting: str, device: torch.device) -> tuple[list[SDPBackend], str, str]:
    """(backends in order, choice, reason)."""
    if setting != "auto":
        if setting in ("cudnn", "efficient") and device.type != "cuda":
            raise ConfigError(
                f"kernels.attention {setting!r} exists on CUDA only and this device is {device.type}",
                "take auto, flash or math",
            )
        return [_BACKENDS[setting]], setting, "as configured"
    if device.type != "cuda":
        return [_BACKENDS["flash"], _BACKENDS["math"]], "flash", "torch's fused CPU attention"
    if torch.cuda.get_device_capability(device) >= (9, 0):
        order = ["cudnn", "flash", "efficient", "math"]
        reason = "faster than flash on Hopper and newer by published figures; not measured here"
    else:
        order = ["flash", "cudnn", "efficient", "math"]
        reason = "faster than cuDNN before Hopper by published figures; not measured here"
    return [_BACKENDS[name] for name in order], order[0], reason


REFERENCE = Ops(
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    rope=reference.rope,
    swiglu=reference.swiglu,
    cross_entropy_stats=reference.cross_entropy_stats,
    cross_entropy_grad_=reference.cross_entropy_grad_,
    attention=attention_with([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]),
)


def build_ops(kernels: Kernels, device: torch.device) -> Ops:
    """The operators that `[kernels]` asks for on this device, with the reason of each choice."""
    backends, choice, reason = _choose_attention(kernels.attention, device)
    return Ops(
        rms_norm=reference.rms_norm,
        add_rms_norm=reference.add_rms_norm,
        rope=reference.rope,
        swiglu=reference.swiglu,
        cross_entropy_stats=reference.cross_entropy_stats,
        cross_entropy_grad_=reference.cross_entropy_grad_,
        attention=attention_with(backends),
        carry_residual=kernels.carry_residual,
        reasons=(("attention", choice, reason),),
    )
