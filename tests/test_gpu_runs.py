"""Whole runs on a GPU through the real entry point: interrupted, they resume bit for bit, however weights are kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from titan_fast import loop

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
TRITON = {f"kernels__{operator}": "triton" for operator in ("rms_norm", "rope", "swiglu", "cross_entropy")}
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "FSDP2": {"parallelism__single_device": "fsdp"},
    "offloaded": {"training__enable_cpu_offload": True},
    "offloaded, compiled": {"training__enable_cpu_offload": True, "compile__enable": True},
    "foreach": {"optimizer__implementation": "foreach"},
    "for-loop": {"optimizer__implementation": "for-loop"},
    "two passes": {"training__global_batch_size": 4},
    "recorded": {"training__cuda_graph": True},
    "bfloat16": {"parallelism__single_device": "bfloat16"},
    "compiled": {"compile__enable": True},
    "triton": TRITON,
    "triton, re-emitting": TRITON | {"kernels__reemit": "triton", "kernels__carry_residual": True},
    "triton, compiled": TRITON | {"compile__enable": True},
    "float8": {"float8__enable": True},
    "float8, compiled": {"float8__enable": True, "float8__recipe_name": "rowwise", "compile__enable": True},
    "within documents": {"training__document_mask": True},
    "within documents, compiled": {"training__document_mask": True, "compile__enable": True},
    "saved in the background": {"checkpoint__async_mode": "async_with_pinned_mem"},
}


@pytest.fixture(autouse=True)
def only_here_deterministic() -> Iterator[None]:
    """Resets `debug.deterministic`, which a run never does."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_run_goes_on(way: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"checkpoint__interval": 3, "training__steps": 9, "training__mixed_precision_param": "bfloat16"}
    more |= {"model__dim": 256, "model__ffn_dim": 512}  # heads as wide as real ones
    more |= {"debug__deterministic": True} | runs.MEASURED | WAYS[way]
    runs.run(data, tmp_path / "whole", **more)
    true_step = loop.Run.step

    def step(self: loop.Run, number: int) -> Any:
        if number == 5:
            raise InterruptedError
        return true_step(self, number)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(loop.Run, "step", step)
        runs.run(data, tmp_path / "parts", **more)
    runs.run(data, tmp_path / "parts", **more)
    assert runs.losses(tmp_path / "whole") == runs.losses(tmp_path / "parts")
    runs.assert_same_tensors(runs.checkpoint(tmp_path / "whole", 9), runs.checkpoint(tmp_path / "parts", 9))
