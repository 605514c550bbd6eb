"""A step that is recorded and replayed trains exactly like one that Python runs."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from shapes import LLAMA3
from tape import Tape, TapeRecorder
from torch import Tensor

from titan_fast import parallel
from titan_fast.config import Comm, Config, from_options, mesh_degrees
from titan_fast.cuda_graph import WARM_UP_STEPS, CudaRecorder, RecordedPasses
from titan_fast.distributed import World, start
from titan_fast.errors import ConfigError
from titan_fast.flavors import ModelShape
from titan_fast.loader import Batch
from titan_fast.loss import IGNORE_INDEX
from titan_fast.masters import gradient_of
from titan_fast.model import Llama
from titan_fast.ops import build_ops
from titan_fast.optim import build_optimizer, clip_gradients, learning_rate, step_unless
from titan_fast.step import build_model, forward_backward, one_over_valid_tokens, workload

CPU = torch.device("cpu")
STEPS, SEQ_LEN, BATCH = 8, 16, 2
BFLOAT16 = {"training.mixed_precision_param": "bfloat16"}
PATHS: dict[str, dict[str, str]] = {
    "float32": {},
    "masters": BFLOAT16 | {"parallelism.single_device": "masters"},
    "bfloat16": BFLOAT16 | {"parallelism.single_device": "bfloat16"},
    "full recomputation": {"activation_checkpoint.mode": "full"},
    "selective": {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"},
    "re-emitting": {"kernels.reemit": "reference", "kernels.carry_residual": "True"},
}


@pytest.fixture
def world() -> Iterator[World]:
    with start(Comm(), CPU) as alone:
        yield alone


def config_of(options: dict[str, str]) -> Config:
    basic = {
        "training.seq_len": str(SEQ_LEN), "training.local_batch_size": str(BATCH), "optimizer.lr": "1e-2",
        "training.max_norm": "0.5", "metrics.sample_prompt": "", "loss.chunk_size": "12",
    }  # fmt: skip
    return from_options({key: [value] for key, value in (basic | options).items()})


def batches_of(step: int, passes: int, device: torch.device) -> list[Batch]:
    """Different text, and a different number of labels, in every step and pass."""
    generator = torch.Generator().manual_seed(step)
    batches = []
    for i in range(passes):
        text = torch.randint(LLAMA3.vocab_size, (BATCH, SEQ_LEN + 1), generator=generator).to(device)
        labels = text[:, 1:].clone()
        labels[i % BATCH, : step + i] = IGNORE_INDEX
        batches.append(Batch(text[:, :-1], labels))
    return batches


@dataclasses.dataclass
class Trained:
    numbers: list[tuple[float, float]]
    """Loss and gradient norm of each step."""
    model: Llama


def train(
    config: Config, passes: int, recorder: Any, device: torch.device = CPU, shape: ModelShape = LLAMA3
) -> Trained:
    torch._dynamo.reset()
    degrees = mesh_degrees(config.parallelism, 1)
    ops = build_ops(config.kernels, device, workload(config, shape, degrees))
    model = build_model(config, shape, ops, degrees, device)
    optimizer = build_optimizer(model, config.optimizer)
    recorded = RecordedPasses(model, recorder) if recorder is not None else None
    numbers: list[tuple[Tensor, Tensor]] = []
    for step in range(1, STEPS + 1):
        batches = batches_of(step, passes, device)
        scale = one_over_valid_tokens(batches, degrees)
        loss = recorded(batches, scale) if recorded else forward_backward(model, batches, scale)
        norm = clip_gradients(optimizer, config.training.max_norm, loss)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.lr_scheduler, config.optimizer.lr, STEPS)
        step_unless(optimizer, torch.tensor(float(step == 5), device=device))  # one is left out, as a bad one would be
        optimizer.zero_grad(set_to_none=True)
        numbers.append((loss.clone(), norm.clone()))
    return Trained([(loss.item(), norm.item()) for loss, norm in numbers], model)


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("passes", [1, 3])
def test_a_recorded_step_trains_as_an_eager_one(world: World, options: dict[str, str], passes: int) -> None:
    """Bit for bit: the operators are the same, on the same values."""
    # With bfloat16 weights sums of passes need their own memory; the batch size decides the number of passes.
    config = config_of(options | {"training.global_batch_size": str(BATCH * passes)})
    recorder = TapeRecorder()
    expected, found = train(config, passes, None), train(config, passes, recorder)
    assert len(recorder.tapes) == min(passes, 2)
    assert recorder.replays == passes * (STEPS - WARM_UP_STEPS)
    assert found.numbers == expected.numbers
    for (name, ours), theirs in zip(found.model.named_parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_recording_does_not_read_what_is_not_given_to_it(world: World) -> None:
    """The tape is as strict as a CUDA graph: Python's decisions are not repeated, and numbers cannot be read."""
    x, y = torch.zeros(2), torch.zeros(2)
    with Tape() as tape:
        y.copy_(x + 1)
        y.mul_(2)
    x.fill_(3)
    tape.replay()
    assert y.tolist() == [8, 8]
    with pytest.raises(RuntimeError, match="capturing"), Tape():
        x.sum().item()


def test_weights_that_moved_are_noticed(world: World) -> None:
    config = config_of({})
    degrees = mesh_degrees(config.parallelism, 1)
    ops = build_ops(config.kernels, CPU, workload(config, LLAMA3, degrees))
    model = build_model(config, LLAMA3, ops, degrees, CPU)
    recorded = RecordedPasses(model, TapeRecorder())
    batches = batches_of(0, 1, CPU)
    for _ in range(WARM_UP_STEPS + 1):
        recorded(batches, torch.tensor(0.1))
        assert all(gradient_of(p) is not None for p in model.parameters())
        model.zero_grad()
    model.norm.weight.data = model.norm.weight.data.clone()
    with pytest.raises(AssertionError, match="weights moved"):
        recorded(batches, torch.tensor(0.1))


@pytest.mark.parametrize(
    ("options", "device", "sentence"),
    [
        ({}, "cpu", "the device is cpu"),
        (BFLOAT16 | {"parallelism.single_device": "fsdp"}, "cuda", "FSDP2 gathers them anew"),
    ],
)
def test_what_cannot_be_recorded_is_refused(options: dict[str, str], device: str, sentence: str) -> None:
    config = config_of(options | {"training.cuda_graph": "True"})
    with pytest.raises(ConfigError, match=sentence):
        parallel.check(config, LLAMA3, mesh_degrees(config.parallelism, 1), torch.device(device))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("compiles", "kernels"), [("False", "reference"), ("True", "reference"), ("False", "triton"), ("True", "triton")]
)
@pytest.mark.parametrize("passes", [1, 3])
def test_a_cuda_graph_trains_as_its_steps_do(passes: int, compiles: str, kernels: str) -> None:
    device = torch.device("cuda", 0)
    shape = dataclasses.replace(LLAMA3, dim=256, n_heads=4, n_kv_heads=2, ffn_dim=512)  # heads as wide as real ones
    with start(Comm(), device):
        masters = PATHS["masters"] | {"compile.enable": compiles, "training.cuda_graph": "True"}
        masters |= {f"kernels.{operator}": kernels for operator in ("rms_norm", "rope", "swiglu", "cross_entropy")}
        config = config_of(masters | {"training.global_batch_size": str(BATCH * passes)})
        parallel.check(config, shape, mesh_degrees(config.parallelism, 1), device)
        expected = train(config, passes, None, device, shape)
        found = train(config, passes, CudaRecorder(device), device, shape)
    for ours, theirs in zip(found.numbers, expected.numbers, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-2)
