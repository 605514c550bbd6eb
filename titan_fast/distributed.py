"""The process group: the only reader of torchrun's environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from titan_fast.config import Comm
from titan_fast.errors import CommunicationError, ConfigError


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: dist.Store = field(default_factory=dist.HashStore, compare=False)
    """What the ranks met at."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def world_size() -> int:
    """The number of processes that torchrun started; 1 without it."""
    return _integer("WORLD_SIZE", 1)


def is_main_process() -> bool:
    """Whether this is rank 0, before there is a process group."""
    return _integer("RANK", 0) == 0


def restart_count() -> int:
    """How often torchrun has restarted these processes."""
    return _integer("TORCHELASTIC_RESTART_COUNT", 0)


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"environment variable {name} is {text!r}, not a number", "start with torchrun")
    return int(text)


def local_device() -> torch.device:
    """This process's own GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = _integer("LOCAL_RANK", 0)
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU, this host has {torch.cuda.device_count()}",
            "start as many processes per host as it has GPUs",
        )
    return torch.device("cuda", local_rank)


@contextmanager
def start(comm: Comm, device: torch.device) -> Iterator[World]:
    """Joins the processes that torchrun started (or makes a world of one) and leaves them at the end."""
    rank, size, local_rank = _integer("RANK", 0), world_size(), _integer("LOCAL_RANK", 0)
    backend = "gloo"
    if device.type == "cuda":
        backend = "cuda:nccl,cpu:gloo"
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    try:
        store = _store(size, timeout)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        sentence = str(error).splitlines()[0]
        raise CommunicationError(
            f"rank {rank} of {size} could not join the others: {sentence}", "look at the first rank that failed"
        ) from error
    try:
        yield World(rank, size, local_rank, device, store)
    finally:
        dist.destroy_process_group()


def _store(size: int, timeout: timedelta) -> dist.Store:
    if size == 1 and "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun keeps one store over restarts, and gloo would meet the dead attempt's addresses in it.
    return dist.PrefixStore(f"attempt_{restart_count()}", store)


def set_timeout(seconds: float) -> None:
    """How long a collective may take from now on."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))
