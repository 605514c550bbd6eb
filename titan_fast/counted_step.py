"""One step of a config as rank 0 of any world, on fake tensors: nothing is computed, everything is counted."""

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_fast.compilation import optimizer_compiler
from titan_fast.compiled_graph import Counter
from titan_fast.config import Config, MeshDegrees
from titan_fast.flavors import ModelShape
from titan_fast.loader import Batch
from titan_fast.masters import gradient_of, keep_weights, master_of
from titan_fast.model import Llama
from titan_fast.ops import Ops, kernels_on_any_device
from titan_fast.optim import build_optimizer, clip_gradients
from titan_fast.parallel import buffers_are_direct, build_mesh, parallelize, precision, weights_kept
from titan_fast.shards import local
from titan_fast.step import forward_backward, meta_model, one_over_valid_tokens
from titan_fast.step_record import Segment, StepRecorder, mark_units, note_direct_collectives, recording

_CPU = torch.device("cpu")


@contextmanager
def fake_world(size: int) -> Iterator[None]:
    """This process as rank 0 of `size` ranks that never answer; collectives take no time and change nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _forget_meshes()


def _forget_meshes() -> None:
    """Meshes of two worlds are equal if their shapes are, so compiled code and DTensor's caches would give the next
    world this one's, whose process groups no longer exist. There is also a limit to how often code is compiled."""
    from torch.distributed.tensor import debug

    torch.compiler.reset()
    clear = getattr(debug, "_clear_sharding_prop_cache", None)  # private; 2.11 and 2.13 have it
    if clear is not None:
        clear()


def units_of(model: Llama) -> dict[str, nn.Module]:
    """The parts of the model in the order of a step, by their names in reports."""
    blocks = {f"block {i}": block for i, block in enumerate(model.blocks)}
    return {"embedding": model.embedding, **blocks, "norm": model.norm, "head": model.head}


_COUNTER = Counter()


def count_step(
    config: Config, shape: ModelShape, ops: Ops, degrees: MeshDegrees, passes: int, for_gpu: bool = True
) -> list[Segment]:
    """The segments of a step with `passes` forward and backward passes, in the steady state: optimizer state exists.

    Needs a process group of `degrees`' size. Everything is as on a GPU but for the device's name.
    """
    recorder = _COUNTER.recorder = StepRecorder(for_gpu, degrees.tensor)
    if config.compile.enable:
        config = _compiled_by(_COUNTER, config)
    if for_gpu and buffers_are_direct(config.parallelism, "cuda"):
        config = dataclasses.replace(config, parallelism=dataclasses.replace(config.parallelism, fsdp_buffers="direct"))
    dtypes = precision(config.training, _CPU)
    model = meta_model(config, shape, ops)
    parallelize(model, build_mesh(degrees, _CPU), dtypes, config)
    note_direct_collectives(model, recorder)
    with FakeTensorMode(allow_non_fake_inputs=True), kernels_on_any_device():
        model.to_empty(device=_CPU)
        model.tie()
        model.init_buffers()
        keep_weights(model, weights_kept(config, degrees.data * degrees.tensor, dtypes), accumulates=passes > 1)
        mark_units(model, units_of(model), recorder)
        optimizer = build_optimizer(model, config.optimizer, optimizer_compiler(config.compile))
        size = (config.training.local_batch_size, config.training.seq_len)
        ids = functools.partial(torch.zeros, size, dtype=torch.int64)
        batches = [Batch(ids(), ids()) for _ in range(passes)]
        recorder.paused = True  # compiling leaves traces, so it is done before anything is counted
        if config.compile.enable:
            forward_backward(model, batches[:1], torch.ones(()))
        _make_state(model, optimizer)
        recorder.start()
        _see_what_stays(recorder, model, optimizer, batches)
        with recording(recorder):
            _step(recorder, model, optimizer, batches, config, degrees)
        return recorder.finish()


def _compiled_by(backend: Any, config: Config) -> Config:
    """`config` with another compiler, which has none of Inductor's settings. A model compiled as one graph is counted
    by its parts, because marks need their boundaries."""
    compiles: Any = config.compile
    changes: dict[str, Any] = {
        "backend": backend,
        "coordinate_descent": False,
        "max_autotune": False,
        "cache_folder": None,
    }
    if "model" in compiles.components:
        parts = {"blocks", "norm", "loss", *compiles.components} - {"model"}
        changes["components"] = tuple(sorted(parts))
    return dataclasses.replace(config, compile=dataclasses.replace(compiles, **changes))


def _make_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _local(tensors: Any) -> list[Tensor]:
    return [local(t) for t in tensors if isinstance(t, Tensor)]


def _see_what_stays(recorder: StepRecorder, model: nn.Module, optimizer: Any, batches: list[Batch]) -> None:
    with torch.no_grad():
        recorder.memory.see(_local([*model.parameters(), *map(master_of, model.parameters())]), "parameters")
        state = [v for entry in optimizer.state.values() for name, v in entry.items() if name != "step"]
        recorder.memory.see(_local(state), "optimizer state")
        recorder.memory.see(list(model.buffers()), "inputs and tables")
        recorder.memory.see(batches, "inputs and tables")


def _step(
    recorder: StepRecorder,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    config: Config,
    degrees: MeshDegrees,
) -> None:
    recorder.mark("forward", "inputs")
    scale = one_over_valid_tokens(batches, degrees)
    loss = forward_backward(model, batches, scale)
    with torch.no_grad():
        recorder.memory.see(_local(map(gradient_of, model.parameters())), "gradients", override=True)
    recorder.mark("clip", "all parameters")
    clip_gradients(optimizer, config.training.max_norm, loss)
    recorder.mark("optimizer", "all parameters")
    optimizer.step()
    recorder.mark("end", "")
    optimizer.zero_grad(set_to_none=True)
