"""What a config asks of the choice of kernels, and what a run chooses by a made-up table."""

import contextlib
import dataclasses
import re
from typing import Any
from unittest import mock

import pytest
import titan_kernels
import torch
from needs import needs_triton
from shapes import LLAMA3
from titan_kernels import choice
from titan_kernels.choice import Cell, Table
from torch.nn.attention import SDPBackend

from titan_fast import ops, parallel
from titan_fast.config import Config, MeshDegrees, mesh_degrees, parse
from titan_fast.dry_run import as_on_a_gpu
from titan_fast.errors import ConfigError
from titan_fast.ops import REFERENCE, Ops, Workload, build_ops
from titan_fast.step import workload

CPU = torch.device("cpu")
CUDNN, MATH = SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH
ONE = MeshDegrees(1, 1, 1)


def config_of(**options: str) -> Config:
    arguments = [part for key, value in options.items() for part in (f"--{key.replace('__', '.')}", *value.split())]
    return parse(arguments)


def of(**options: str) -> Workload:
    return workload(config_of(**options), LLAMA3, ONE)


@pytest.mark.parametrize(
    ("enable", "components", "blocks", "loss"),
    [
        ("False", "blocks loss", False, False),
        ("True", "blocks", True, False),
        ("True", "blocks norm loss", True, True),
        ("True", "norm loss", False, True),
        ("True", "model", True, True),
        ("True", "optimizer", False, False),
    ],
)
def test_each_operator_is_chosen_as_it_is_compiled(enable: str, components: str, blocks: bool, loss: bool) -> None:
    found = of(compile__enable=enable, compile__components=components)
    assert (found.compiled, found.loss_compiled) == (blocks, loss)


def test_the_dtype_is_that_of_activations_on_a_gpu() -> None:
    assert of().dtype == "bfloat16"
    assert of(training__mixed_precision_param="float32").dtype == "float32"


def test_sizes_are_those_of_a_ranks_own_calls() -> None:
    found = Workload(LLAMA3, 4096, tensor_degree=2, loss_chunk=1000, compiled=True)
    assert found.sizes() == {
        "rms_norm": {"rows": 2048, "width": 64},
        "rope": {"rows": 4096, "n_heads": 4, "n_kv_heads": 1, "head_dim": 8},
        "swiglu": {"rows": 4096, "width": 48},
        "cross_entropy": {"rows": 1000, "vocab": 64},
        "reemit": {"rows": 2048, "width": 64, "ffn_width": 48},
    }
    for all_at_once in (0, 5000):
        assert dataclasses.replace(found, loss_chunk=all_at_once).sizes()["cross_entropy"]["rows"] == 4096


def table(workload: Workload, **changes: Any) -> Table:
    """Compiled, the kernel wins for the loss and loses for the norm; eager, the reverse."""
    sizes = workload.sizes()

    def cell(op: str, compiled: bool, wins: bool) -> Cell:
        return Cell(op, compiled, sizes[op], 100.0, 200.0 if wins else 50.0, 1.0, **changes)

    contents = (("cross_entropy", True, True), ("cross_entropy", False, False))
    contents += (("rms_norm", True, False), ("rms_norm", False, True))
    return Table("sm_99", "Example GPU", {}, "0", tuple(cell(*content) for content in contents))


def chosen(monkeypatch: pytest.MonkeyPatch, **options: str) -> Ops:
    config = config_of(**options)
    found = workload(config, LLAMA3, ONE)
    monkeypatch.setattr(choice, "load_table", lambda *_: table(found))
    return build_ops(config.kernels, CPU, found, "sm_99")


@needs_triton
def test_blocks_compiled_and_the_loss_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = chosen(monkeypatch, compile__enable="True", compile__components="blocks")
    assert mixed.add_rms_norm is REFERENCE.add_rms_norm
    assert mixed.cross_entropy_with_grad_ is REFERENCE.cross_entropy_with_grad_
    compiled = chosen(monkeypatch, compile__enable="True", compile__components="blocks loss")
    assert compiled.add_rms_norm is REFERENCE.add_rms_norm
    assert compiled.cross_entropy_grad_ is titan_kernels.cross_entropy_grad_
    eager = chosen(monkeypatch, compile__enable="False")
    assert eager.add_rms_norm is titan_kernels.add_rms_norm
    assert eager.cross_entropy_stats is REFERENCE.cross_entropy_stats


@needs_triton
def test_a_run_in_float32_does_not_follow_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen(monkeypatch, training__mixed_precision_param="float32")
    assert found.add_rms_norm is REFERENCE.add_rms_norm
    assert "not measured in eager mode in float32" in {op: why for op, _, why in found.reasons}["rms_norm"]


@needs_triton
def test_compiled_blocks_in_float8_do_not_follow_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler fuses the casts with the reference. Uncompiled, and in the loss, nothing differs."""
    compiled = chosen(monkeypatch, compile__enable="True", float8__enable="True")
    reasons = {operator: reason for operator, _, reason in compiled.reasons}
    assert "not measured compiled in bfloat16 beside float8" in reasons["rms_norm"]
    assert compiled.cross_entropy_grad_ is titan_kernels.cross_entropy_grad_
    eager = chosen(monkeypatch, compile__enable="False", float8__enable="True")
    assert eager.add_rms_norm is titan_kernels.add_rms_norm


@needs_triton
def test_blocks_with_wide_gradients_do_not_reemit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Because re-emitting units' products would make them narrow."""
    monkeypatch.setattr("titan_fast.ops.choose", lambda *_, **__: choice.Choice("triton", "it wins"))
    for wide, found in (
        ("False", ("reemit", "triton", "it wins")),
        ("True", ("reemit", "reference", "its products do not write gradients in float32")),
    ):
        config = config_of(parallelism__fsdp_wide_gradients=wide)
        built = build_ops(config.kernels, CPU, workload(config, LLAMA3, ONE), "sm_99")
        assert found in built.reasons
        unused = ("swiglu", "triton", "not called: reemit's units have a SwiGLU of their own") in built.reasons
        assert unused == (built.swiglu_linear is not None)


@needs_triton
@pytest.mark.parametrize(
    ("variant", "options", "degree"),
    [
        ("residual carried", {"kernels__carry_residual": "True"}, 1),
        ("residual not carried", {}, 1),
        ("sequence sharded", {"parallelism__tensor_parallel_degree": "2"}, 2),
    ],
)
def test_norms_follow_the_variant_that_runs(
    variant: str, options: dict[str, str], degree: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(**options)
    found = workload(config, LLAMA3, mesh_degrees(config.parallelism, degree))
    for measured in ("residual carried", "residual not carried", "sequence sharded"):
        monkeypatch.setattr(choice, "load_table", lambda *_, v=measured: table(found, variant=v))
        ops = build_ops(config.kernels, CPU, found, "sm_99")
        assert (ops.rms_norm is titan_kernels.rms_norm) == (measured == variant)


@pytest.mark.parametrize(
    ("backends", "tokens", "cudnn"), [([CUDNN, MATH], 1, False), ([CUDNN, MATH], 8, True), ([CUDNN], 1, True)]
)
def test_one_token_against_a_cache_needs_no_plan_of_cudnns(
    backends: list[SDPBackend], tokens: int, cudnn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def attend(q: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return q

    monkeypatch.setattr(ops.F, "scaled_dot_product_attention", attend)
    ops.attention_with(backends)(torch.ones(1, 2, tokens, 4), torch.ones(1, 2, 8, 4), torch.ones(1, 2, 8, 4))
    assert seen == [cudnn]


def test_memory_efficient_attention_gets_a_head_of_k_for_each_of_q(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's does not support shared heads; and it is the fused one for float32 on a GPU."""
    seen: list[tuple[int, ...]] = []
    attend = ops.F.scaled_dot_product_attention

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((q.shape[1], k.shape[1], v.shape[1], options.pop("enable_gqa")))
        return attend(q, k, v, **options)

    monkeypatch.setattr(ops.F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(ops, "sdpa_kernel", lambda *_, **__: contextlib.nullcontext())
    wanted = of(training__mixed_precision_param="float32")
    gpu = torch.device("cuda")
    for kernels in ("auto", "efficient"):
        built = build_ops(config_of(kernels__attention=kernels).kernels, gpu, wanted, "sm_90")
        assert built.reasons[0][:2] == ("attention", "efficient")
        q, k, v = torch.randn(1, 8, 5, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
        found = built.attention(q, k, v)
        assert seen.pop() == (8, 8, 8, False)
        torch.testing.assert_close(found, attend(q, k, v, is_causal=True, enable_gqa=True))
    for name in ("flash", "cudnn", "fa3"):
        with pytest.raises(ConfigError, match=rf"kernels\.attention '{name}' takes no float32 on CUDA"):
            build_ops(config_of(kernels__attention=name).kernels, gpu, wanted, "sm_90")


@pytest.mark.parametrize("mode", ["default", "warn", "error"])
def test_cudnns_attention_is_not_named_where_torch_would_leave_it_out(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `debug.deterministic`, which is the mode "error"; to warn, torch takes cuDNN's."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu, before = torch.device("cuda"), torch.get_deterministic_debug_mode()
    try:
        torch.set_deterministic_debug_mode(mode)
        refused = pytest.raises(ConfigError, match=r"kernels\.attention 'cudnn' has no deterministic backward pass")
        with refused if mode == "error" else contextlib.nullcontext():
            built = build_ops(config_of(kernels__attention="cudnn").kernels, gpu, of(), "sm_90")
            assert built.reasons[0] == ("attention", "cudnn", "as configured")
        _, choice, reason = build_ops(config_of().kernels, gpu, of(), "sm_90").reasons[0]
        assert choice == ("flash" if mode == "error" else "cudnn")
        assert ("debug.deterministic" in reason) == (mode == "error")
    finally:
        torch.set_deterministic_debug_mode(before)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (
            ValueError("too many values to unpack (expected 2)\nmore"),
            r"too many values to unpack \(expected 2\); install",
        ),
        (None, "its dv is off by (99|100)[.][0-9]%; install"),
        (ImportError(), "ImportError; install"),
    ],
)
def test_another_flash_attention_is_tried_before_it_is_taken(
    problem: Exception | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the model's heads. Here the CPU's replaces the package's kernels."""
    activated: list[str] = []
    monkeypatch.setattr("torch.nn.attention.activate_flash_attention_impl", activated.append)
    monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda: (activated or [None])[-1])
    monkeypatch.setattr("torch.nn.attention.restore_flash_attention_impl", activated.clear)
    ops._try_flash.cache_clear()
    for version in ("fa4", "fa3", "fa4"):
        ops.activate_flash(version, 4, 16, torch.bfloat16, CPU)
    assert activated == ["FA4", "FA3", "FA4"]
    assert ops._try_flash.cache_info().hits == 1, "it is tried once"
    attend = ops.F.scaled_dot_product_attention

    def attend_otherwise(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        if problem is not None:
            raise problem
        return attend(q, k, v if q.dtype == torch.float32 else v + v - v.detach(), **options)

    monkeypatch.setattr(ops.F, "scaled_dot_product_attention", attend_otherwise)
    with pytest.raises(
        ConfigError, match=rf"'fa4' is not available with torch {re.escape(torch.__version__)}: {said} flash-attn-4=="
    ):
        ops.activate_flash("fa4", 2, 16, torch.bfloat16, CPU)
    assert not activated, "torch's own is back"
    for of_the_device in (torch.OutOfMemoryError, torch.AcceleratorError):
        monkeypatch.setattr(ops, "_try_flash", mock.Mock(side_effect=of_the_device("CUDA error")))
        with pytest.raises(of_the_device):
            ops.activate_flash("fa4", 4, 16, torch.bfloat16, CPU)


def test_no_kernel_of_ours_within_torchs_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "has_torch_loss", lambda: True)
    config = config_of(loss__implementation="torch", kernels__cross_entropy="triton")
    with pytest.raises(ConfigError, match=r"takes no kernel of ours, and kernels.cross_entropy is 'triton'"):
        parallel.check(config, LLAMA3, ONE, CPU)
    parallel.check(config_of(loss__implementation="torch"), LLAMA3, ONE, CPU)


@pytest.mark.parametrize(
    ("options", "degree", "carried"),
    [
        ({"compile__enable": "True"}, 1, True),
        ({"compile__enable": "True", "compile__components": "model"}, 1, True),
        ({"compile__enable": "True", "kernels__carry_residual": "False"}, 1, False),
        ({}, 1, False),
        ({"compile__enable": "True", "compile__components": "loss"}, 1, False),
        ({"kernels__carry_residual": "True"}, 1, True),
        ({"compile__enable": "True", "activation_checkpoint__mode": "selective"}, 1, False),
        ({"compile__enable": "True", "activation_checkpoint__mode": "memory_budget"}, 1, False),
        ({"compile__enable": "True", "float8__enable": "True"}, 1, False),
        ({"compile__enable": "True", "parallelism__tensor_parallel_degree": "2"}, 2, False),
    ],
)
def test_where_the_residual_is_carried(options: dict[str, str], degree: int, carried: bool) -> None:
    """On a GPU; on the CPU only if asked for. A dry run counts what the GPU would do."""
    config = config_of(**options)
    degrees = mesh_degrees(config.parallelism, degree)
    work = workload(config, LLAMA3, degrees)
    built = build_ops(config.kernels, CPU, work, "sm_90")
    assert built.carry_residual == carried
    assert ("residual", "carried" if carried else "added") in [line[:2] for line in built.reasons]
    asked = options.get("kernels__carry_residual") == "True"
    assert build_ops(config.kernels, CPU, work).carry_residual == asked
    assert as_on_a_gpu(config, degrees).kernels.carry_residual == carried
