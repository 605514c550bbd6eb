"""The host never waits for the GPU in a training step: whole runs through the real entry point, with loader, agreement,
guard, compiled code and optimizer, while CUDA's sync debug mode turns every wait into an error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from titan_fast import loop
from titan_fast.config import parse

WARM_UP_STEPS, STEPS = 4, 8
"""Code is compiled, memory is taken and a CUDA graph recorded in the first of them."""
COMPILED = ["--compile.enable", "True", "--compile.components", "blocks", "norm", "loss"]
TRITON = [w for o in ("rms_norm", "rope", "swiglu", "cross_entropy") for w in (f"--kernels.{o}", "triton")]
WAYS: dict[str, list[str]] = {
    "eager": [],
    "eager, FSDP2": ["--parallelism.single_device", "fsdp"],
    "compiled": COMPILED,
    "compiled, FSDP2": [*COMPILED, "--parallelism.single_device", "fsdp"],
    "compiled, one-pass AdamW": [*COMPILED, "optimizer"],
    "compiled, one-pass AdamW, FSDP2": [*COMPILED, "optimizer", "--parallelism.single_device", "fsdp"],
    "compiled, pointwise": [*COMPILED, "optimizer", "--activation_checkpoint.mode", "pointwise"],
    "compiled, float8": [*COMPILED, "optimizer", "--float8.enable", "True"],
    "triton": TRITON,
    "triton, compiled": [*COMPILED, "optimizer", *TRITON],
    "two passes": [*COMPILED, "optimizer", "--training.global_batch_size", "8"],
    "compiled, within documents": [*COMPILED, "--training.document_mask", "True"],
    "recorded": [*COMPILED, "optimizer", "--training.cuda_graph", "True"],
}


def watched_run(words: list[str], set_mode: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose later steps are watched, but not what is done between steps, above all logging."""
    true_step = loop.Run.step

    def step(self: loop.Run, number: int) -> Any:
        if number <= WARM_UP_STEPS:
            return true_step(self, number)
        set_mode("error")
        try:
            return true_step(self, number)
        finally:
            set_mode("default")

    monkeypatch.setattr(loop.Run, "step", step)
    loop.train(parse(words))


def words_of(data: Path, folder: Path, seq_len: int) -> list[str]:
    """4 x 1024 tokens: from 3072 on, GPUs sum an embedding's gradients in another way."""
    more = {"training__steps": STEPS, "training__seq_len": seq_len, "training__local_batch_size": 4}
    more |= {"model__dim": 256, "model__ffn_dim": 512}  # heads as wide as real ones
    more |= {"metrics__log_freq": 100, "checkpoint__enable": False, "compile__canary": False}
    return runs.arguments(data, folder, **more, training__mixed_precision_param="bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_a_step_on_a_gpu_never_waits(way: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    words = [*words_of(data, tmp_path / "run", 1024), *WAYS[way]]
    watched_run(words, torch.cuda.set_sync_debug_mode, monkeypatch)
    assert runs.losses(tmp_path / "run").keys() == {1, STEPS}


@pytest.mark.gpu
def test_a_wait_in_a_step_is_noticed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = loop.learning_rate
    ones = torch.ones(1, device="cuda")
    monkeypatch.setattr(loop, "learning_rate", lambda *a: honest(*a) * ones.item())
    with pytest.raises(RuntimeError, match="synchroniz"):
        watched_run(words_of(data, tmp_path / "run", 1024), torch.cuda.set_sync_debug_mode, monkeypatch)


@pytest.mark.parametrize("way", ["eager", "compiled, one-pass AdamW"])
def test_the_later_steps_are_watched_and_nothing_between_them(
    way: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same runs on the CPU, which has no sync debug mode."""
    torch._dynamo.reset()
    modes: list[str] = []
    words = [*words_of(data, tmp_path / "run", 16), *WAYS[way], "--compile.backend", "aot_eager"]
    watched_run(words, modes.append, monkeypatch)
    assert modes == ["error", "default"] * (STEPS - WARM_UP_STEPS)
    assert runs.losses(tmp_path / "run").keys() == {1, STEPS}
