"""The process group: the only reader of torchrun's environment."""

import os
import re
import resource
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from titan_fast.config import Comm
from titan_fast.errors import CommunicationError, ConfigError, TitanFastError

SPARE_SECONDS = 30
"""How much longer a collective may take than the phase that it is in, so that the watchdog, which knows more about it,
notices a hang first."""
_PATIENCE = timedelta(days=7)
_POLL_SECONDS = 0.2
_LINGER_SECONDS = 3.0
_BROKEN_CONNECTION = (
    "gloo",
    "Gloo",
    "NCCL",
    "Connection closed",
    "Connection reset",
    "Broken pipe",
    "timed out",
    "Timed out",
    "wait timeout",  # of the store, where ranks meet for a new group
)


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store = field(default_factory=dist.HashStore, compare=False)
    """The store through which the ranks found each other."""
    patient: dist.ProcessGroup | None = field(default=None, compare=False)
    """All ranks as a group whose collectives have no time limit; None: the default group."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all ranks, for hours if one of them is tokenizing. Ends with an error if a rank is lost."""
        if self.size > 1:
            dist.barrier(self.patient)


def world_size() -> int:
    """The number of processes that torchrun started; 1 without it."""
    return _integer("WORLD_SIZE", 1)


def is_main_process() -> bool:
    """Whether this is rank 0, before there is a process group."""
    return _integer("RANK", 0) == 0


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isdecimal() and len(text) < 10):
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
    """Joins the processes that torchrun started (or makes a world of one) and leaves them at the end.

    CommunicationError names the ranks that did not arrive within `comm.init_timeout_seconds`, and later, when a
    collective fails, the rank that was lost."""
    rank, size, port = _integer("RANK", 0), world_size(), _integer("MASTER_PORT", 0)
    if rank >= size:
        raise ConfigError(f"environment variable RANK is {rank}, and WORLD_SIZE {size}", "start with torchrun")
    if port > 65535:
        raise ConfigError(f"environment variable MASTER_PORT is {port}, which is no port", "start with torchrun")
    backend = "gloo"
    if device.type == "cuda":
        backend = "cuda:nccl,cpu:gloo"
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    late = timedelta(seconds=comm.init_timeout_seconds + SPARE_SECONDS)
    _stay_on_this_machine(size)
    _allow_many_files()
    try:
        store = _meet(_store(rank, size, timeout), rank, size, comm.init_timeout_seconds)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=late,
            device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
        patient = new_group(comm, _PATIENCE)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, TitanFastError):
            raise
        sentence = str(error).splitlines()[0]
        fix = "look at the first rank that failed"
        if re.search(r"address for: lo0?\b", sentence):
            fix = "bring the loopback interface up (ip link set lo up)"
        raise CommunicationError(f"rank {rank} of {size} could not join the others: {sentence}", fix) from error
    try:
        yield World(rank, size, device, store, patient)
    except BaseException as error:
        if size > 1:
            _name_the_lost(store, rank, size, error)
        raise
    finally:
        dist.destroy_process_group()


def _stay_on_this_machine(size: int) -> None:
    """If all processes are known to be on one machine, lets gloo listen on the loopback interface alone, unless the
    environment says otherwise."""
    if size == 1 or _integer("LOCAL_WORLD_SIZE", 0) == size:
        names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        if names:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


def _allow_many_files() -> None:
    """Raises the process's limit of open files, often 1024, to what it may be: gloo connects each rank with every other
    in each of three groups, so that 350 ranks need more."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS has a lower one beside it
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The store where the ranks meet: rank 0's, or with torchrun its agent's."""
    if size == 1 and "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), _integer("MASTER_PORT", 29500)
    try:
        # Does not wait for the others: torch would only count them, while `_meet` names those that are missing.
        return dist.TCPStore(host, port, size, _hosts_store(rank), timeout, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        raise CommunicationError(
            f"rank {rank} of {size} found nobody at {host}:{port} for {timeout.total_seconds():.0f} s, where rank 0 or "
            f"torchrun should be: {str(error).splitlines()[0]}",
            "look at the log of rank 0; MASTER_ADDR and MASTER_PORT must lead to it",
        ) from error


def _hosts_store(rank: int) -> bool:
    """Whether the store ends with this process. torchrun's agent says if the store is its own."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _meet(store: dist.Store, rank: int, size: int, limit_seconds: float) -> dist.Store:
    """Waits for all ranks and returns a part of the store that belongs to this meeting alone. CommunicationError with
    the ranks that did not arrive within the limit; the first rank to give up tells the others.

    torchrun keeps one store over restarts, with everything that dead processes wrote, and hosts may not agree on how
    often they were started, since only the one that lost a process counts that. So each process brings a new token.
    Rank 0 answers it together with its own token, which names the meeting; each rank confirms the answer; and when all
    have done so, the meeting begins.
    """
    own = secrets.token_hex(8)
    store.set(f"here/{rank}", own)
    answered = [""] * size  # rank 0's
    deadline = time.monotonic() + limit_seconds
    while True:
        if rank == 0:
            answers = [token and f"{own} {token}" for token in _read(store, "here", range(size))]
            for other in range(size):
                if answers[other] != answered[other]:
                    store.set(f"answer/{other}", answers[other])
            answered = answers
        (answer,) = _read(store, "answer", [rank])
        meeting, _, token = answer.partition(" ")
        is_met = token == own
        if is_met:
            store.set(f"confirmed/{rank}", answer)
            if rank == 0 and all(answered) and _read(store, "confirmed", range(size)) == answered:
                store.set(f"begun/{meeting}", "")
            if store.check([f"begun/{meeting}"]):
                return dist.PrefixStore(meeting, store)
        if time.monotonic() > deadline or (is_met and store.check([f"missing/{meeting}"])):
            names = _missing(store, meeting, size) if is_met else "0"
            if _hosts_store(rank):
                time.sleep(_LINGER_SECONDS)  # the store may end with this process, and others have yet to read it
            raise CommunicationError(
                f"rank {names} of {size} did not start within {limit_seconds:.0f} s; the others are here",
                "look at the log of what is missing; comm.init_timeout_seconds is how long the others wait",
                where=f"rank {rank}",
            )
        time.sleep(_POLL_SECONDS)


def _missing(store: dist.Store, meeting: str, size: int) -> str:
    """The ranks that have not confirmed. What the first rank to ask has found is returned to all."""
    if store.check([f"missing/{meeting}"]):
        return store.get(f"missing/{meeting}").decode()
    absent = [r for r, answer in enumerate(_read(store, "confirmed", range(size))) if answer.split(" ")[0] != meeting]
    return store.compare_set(f"missing/{meeting}", "", listed(absent)).decode()


def _read(store: dist.Store, name: str, ranks: Sequence[int]) -> list[str]:
    """What each of `ranks` has written under `name`; "" where nothing."""
    found = written(store, name, ranks)
    return [found.get(rank, "") for rank in ranks]


def written(store: dist.Store, name: str, ranks: Sequence[int]) -> dict[int, str]:
    """What each of `ranks` has written under `name`, without those that have written nothing. It takes few requests,
    since thousands of ranks may be asking; but one request for thousands of values is slower than several."""
    if not ranks:
        return {}
    keys = [f"{name}/{rank}" for rank in ranks]
    if store.check(keys):
        parts = (store.multi_get(keys[begin : begin + 256]) for begin in range(0, len(keys), 256))
        return dict(zip(ranks, (value.decode() for part in parts for value in part), strict=True))
    if len(ranks) == 1:
        return {}
    half = len(ranks) // 2
    return written(store, name, ranks[:half]) | written(store, name, ranks[half:])


def listed(ranks: Sequence[int]) -> str:
    """Ranks as a list in words, cut after the first 16."""
    more = f" and {len(ranks) - 16} more" if len(ranks) > 16 else ""
    return ", ".join(map(str, ranks[:16])) + more


def _name_the_lost(store: dist.Store, rank: int, size: int, error: BaseException) -> None:
    """Tells the others why this rank leaves. If another rank is the reason, raises CommunicationError that names it."""
    is_victim = isinstance(error, RuntimeError) and any(word in str(error) for word in _BROKEN_CONNECTION)
    first, silent = "", []
    try:
        store.set(f"left/{rank}", "")
        if not is_victim:
            store.compare_set("culprit", "", f"{rank} {type(error).__name__}: {error}".splitlines()[0])
            return
        if _appears(store, "culprit"):
            first = store.get("culprit").decode()
        else:
            silent = _silent(store, rank, size)
        if _hosts_store(rank):
            time.sleep(_LINGER_SECONDS)  # others may have noticed later
    except RuntimeError:  # the store is gone, and with it rank 0 or torchrun
        if not is_victim:
            return
        silent = [0]
    if first:
        culprit, _, reason = first.partition(" ")
        what = f"rank {culprit} of {size} failed: {reason}"
    elif silent:
        several = "one of " if len(silent) > 1 else ""  # others may be busy, and not know yet
        what = f"{several}rank {listed(silent)} of {size} is gone without a word"
    else:
        what = f"the ranks lost each other: {str(error).splitlines()[0]}"
    raise CommunicationError(what, "look at the log of the rank that ended first", where=f"rank {rank}") from error


def _appears(store: dist.Store, key: str) -> bool:
    """Whether some rank writes `key` within `_LINGER_SECONDS`."""
    deadline = time.monotonic() + _LINGER_SECONDS
    while not (is_there := store.check([key])) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return is_there


def _silent(store: dist.Store, rank: int, size: int) -> list[int]:
    """The ranks that have not said that they leave. The first rank to ask looks, and tells the others."""
    looks = store.compare_set("looks", "", str(rank)) == str(rank).encode()
    if looks or not _appears(store, "silent"):
        left = written(store, "left", range(size))
        store.set("silent", " ".join(str(other) for other in range(size) if other not in left))
    return [int(word) for word in store.get("silent").decode().split()]


def new_group(comm: Comm, timeout: timedelta) -> dist.ProcessGroup:
    """Another group of all ranks, on CPUs, whose collectives may take `timeout`. Its creation may take
    `comm.init_timeout_seconds`."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=comm.init_timeout_seconds))
    assert isinstance(group, dist.ProcessGroup)
    _set_timeout(timeout, group)
    return group


def _set_timeout(timeout: timedelta, group: dist.ProcessGroup) -> None:
    """By torch's public function, where it has one (2.14 and newer)."""
    (getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout)(timeout, group)


def limit_collectives(world: World, comm: Comm) -> None:
    """Limits the collectives of all groups that exist now to the longest phase of a step plus `SPARE_SECONDS`,
    including those of the mesh, to which torch gave a limit of its own. The patient group keeps its limit."""
    longest = max(comm.init_timeout_seconds, comm.timeout_seconds)
    for group in dist.distributed_c10d._world.pg_map:
        if group is not world.patient:
            _set_timeout(timedelta(seconds=longest + SPARE_SECONDS), group)
