"""What a run does first: connects its log to the console, sets seeds, and describes itself."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from titan_fast.checkpoint import Progress
from titan_fast.config import Config, Debug, MeshDegrees, grad_accum_steps, tokens_per_step, without_effect
from titan_fast.console import Console
from titan_fast.flavors import ModelShape
from titan_fast.flops import parameter_count
from titan_fast.ops import Ops
from titan_fast.optim import describe_schedule
from titan_fast.parallel import buffers_are_direct, gradients_are_wide, precision, uses_fsdp, weights_kept
from titan_fast.tokenizer import Tokenizer


@contextmanager
def logged_to_console(is_main: bool) -> Iterator[None]:
    """Shows on the console what the project's modules log; for all but the main process, errors only."""
    logger, handler = logging.getLogger("titan_fast"), logging.StreamHandler(Console(sys.stdout))
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def set_determinism(debug: Debug) -> None:
    """Seeds torch, and with `debug.deterministic` allows deterministic algorithms only."""
    torch.manual_seed(debug.seed)
    if debug.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # torch would exclude NVLS alone, whose name NCCL compares as a whole, and between hosts NVLSTree adds up in the
        # switch too.
        os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def startup_lines(
    config: Config,
    shape: ModelShape,
    degrees: MeshDegrees,
    device: torch.device,
    tokenizer: Tokenizer,
    data: str,
    ops: Ops,
    progress: Progress,
    code: str,
) -> list[tuple[str, str]]:
    """(label, text) for the model, the data, the mesh, how the batch is made up, and every choice with its reason.
    `data` is the loader's own description, `code` that of versions.py."""
    training, compiles = config.training, config.compile
    dtypes, devices = precision(training, device), degrees.data * degrees.tensor
    dtype = str(dtypes.param).removeprefix("torch.")
    sharded = uses_fsdp(config, devices, dtypes)
    direct = degrees.shard > 1 and buffers_are_direct(config.parallelism, device.type)  # one shard gathers nothing
    buffers = "direct" if direct else "flat"
    shards = f"float32 shards, gathered as {dtype} by FSDP2 through {buffers} buffers"
    if gradients_are_wide(config, degrees, device):
        shards += ", the matrices' gradients made in float32"
    kept = {
        "fsdp": shards if sharded else "float32",
        "masters": "bfloat16, with float32 masters that the optimizer updates",
        "bfloat16": "bfloat16 alone, as parallelism.single_device asks: small updates are lost",
    }
    accumulation = grad_accum_steps(training, degrees.data)
    lines = [
        ("code", code),
        ("model", f"{config.model.flavor}, {parameter_count(shape):,} parameters, computed in {dtype}"),
        ("tokenizer", f"{tokenizer.kind}, {tokenizer.vocab_size:,} pieces, {tokenizer.path}"),
        ("data", data),
        ("mesh", f"{degrees.replicate} replicate x {degrees.shard} shard x {degrees.tensor} tensor on {device.type}"),
        ("weights", kept[weights_kept(config, devices, dtypes)]),
        (
            "tokens per step",
            f"{training.local_batch_size} sequences x {training.seq_len} tokens x {degrees.data} data-parallel "
            f"x {accumulation} accumulated = {tokens_per_step(training, degrees.data):,}",
        ),
        ("learning rate", describe_schedule(config.lr_scheduler, config.optimizer.lr, training.steps)),
        (
            "compile",
            f"{', '.join(compiles.components)} by {compiles.backend}"
            if compiles.enable
            else "off: [compile] enable is False",
        ),
    ]
    torch_loss = config.loss.implementation == "torch"
    for operator, choice, reason in ops.reasons:
        without_ours = torch_loss and operator == "cross_entropy"
        lines.append((operator, "torch: loss.implementation asks for it" if without_ours else f"{choice}: {reason}"))
    lines += [("without effect", text) for text in without_effect(config, degrees.shard if sharded else 0)]
    lines.append(("run directory", str(Path(config.job.dump_folder))))
    if progress.step:
        lines.append(("goes on", f"after step {progress.step:,}, {progress.tokens_seen:,} tokens"))
    return lines
