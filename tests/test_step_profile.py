"""Kernels in a profile are classified correctly by the names that Inductor, torch and our own kernels have."""

import json
import re
from pathlib import Path

import pytest
import titan_kernels
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import inductor_bytes, step_profile
from benchmarks.step_profile import kind_of

COMPILED, EAGER = "compiled pointwise and reductions", "eager pointwise and reductions"
PRODUCTS = "matrix products"


def test_kernels_that_inductor_generated_for_a_block_are_compiled_ones() -> None:
    blocks = json.loads(inductor_bytes.RECORD.read_text())["blocks"]
    names = {part[0] for block in blocks for way in ("forward", "backward") for part in block[way]["parts"]}
    generated = {name for name in names if name.startswith("triton_")}
    assert len(generated) > 50
    assert {name: kind_of(name) for name in generated} == dict.fromkeys(generated, COMPILED)


def test_every_kernel_of_ours_is_known() -> None:
    folder = Path(str(titan_kernels.__file__)).parent
    names = {n for path in folder.glob("*.py") for n in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)}
    assert len(names) >= 6
    assert {name: kind_of(name) for name in names} == dict.fromkeys(names, "our kernels")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", PRODUCTS),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", PRODUCTS),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x256_32x3_nn_align8>", PRODUCTS),
        ("triton_tem_fused_mm_silu_3", PRODUCTS),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>", "attention"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<>>>", "attention"),
        # Inductor's names of masters.update, with and without masters, and of the cross entropy.
        ("triton_poi_fused__to_copy_add_copy_copy__div_mul_ne_rsub_sqrt_sub_unbind_where_0", "optimizer"),
        ("triton_poi_fused_add_copy__div_mul_ne_rsub_sqrt_sub_unbind_where_0", "optimizer"),
        ("triton_red_fused__to_copy_add_arange_copy_copy__eq_exp_logsumexp_mul_ne_pow_scalar_tensor_sub_1", COMPILED),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_copy_0", COMPILED),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<LpNormFunctor>", "optimizer"),
        (
            "void multi_tensor_apply_kernel<TensorListMetadata<2>, CopyFunctor<float>, at::native::Copy<a, b> >",
            "copies",
        ),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("void at::native::vectorized_elementwise_kernel<4, add>", EAGER),
        ("void at::native::(anonymous namespace)::compute_grad_weight<c10::BFloat16>", EAGER),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2u>>", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("_rms_norm_backward_kernel", "Liger's kernels"),
        ("liger_cross_entropy_kernel", "Liger's kernels"),
        ("something new", "other"),
    ],
)
def test_kernels_are_told_apart(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_busy_time_counts_overlap_once() -> None:
    assert step_profile._union([("a", 0, 4), ("b", 2, 5), ("c", 8, 9)]) == (6, 0, 9)


def test_a_profile_adds_up_what_ran() -> None:
    x = torch.randn(512, 512)
    found = step_profile.breakdown(lambda: (x.cos().sin_(), None)[1], torch.device("cpu"))
    assert found["steps"] == 2 and found["seconds"][EAGER] > 0 and found["seconds"]["idle"] >= 0
    assert {name for name, _ in found["longest"]} >= {"aten::cos", "aten::sin_"}
