"""If a rank does not come, or is lost, the others end in time, with its number and the right exit status."""

import os
import re
import resource
import signal
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from children import CHILDREN
from worlds import CPU, CountedStore, Task, free_port, results, run_world

from titan_fast import distributed
from titan_fast.config import Comm, Debug, MeshDegrees
from titan_fast.distributed import World, start
from titan_fast.errors import CommunicationError, ConfigError, reported
from titan_fast.parallel import build_mesh
from titan_fast.startup import set_determinism

SIZE, LIMIT_SECONDS = 3, 5
WAITED_FOR = ("missing", "busy", "killed while one is busy")
"""Faults whose test lasts as long as the limit; in the others ranks that come late are no failure."""


def be_rank(rank: int, fault: str, port: int, output: Path, restarts: int | None) -> None:
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(SIZE), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    if restarts is not None:
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=str(restarts))
    distributed.SPARE_SECONDS = 0
    limit = LIMIT_SECONDS if fault in WAITED_FOR else 60
    if fault == "missing" and rank == 1:
        sys.exit(3)
    with reported(), start(Comm(init_timeout_seconds=limit), torch.device("cpu")) as world:
        dist.all_reduce(torch.ones(1))
        if fault in ("busy", "killed while one is busy") and rank == 0:
            time.sleep(LIMIT_SECONDS + 3)
        if fault == "killed while one is busy" and rank == 1:
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGKILL)
        world.barrier()
        if fault in ("killed", "killed before a further group") and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "killed before a further group":
            distributed.new_group(Comm(init_timeout_seconds=1), timedelta(hours=1))
        if fault == "failed" and rank == 1:
            raise OSError("the disk is full")
        if fault not in ("none", "busy"):
            dist.all_reduce(torch.ones(1))
            dist.all_reduce(torch.ones(1))
        print("left in peace", flush=True)  # noqa: T201


def world(
    fault: str, folder: Path, port: int | None = None, restarts: Sequence[int | None] = (None,) * SIZE
) -> list[tuple[int | None, str]]:
    """(exit status, output) of each rank of a small world, started without torchrun, like a batch system does. With a
    port: at an existing store, with `restarts` as torchrun counts them on each rank's host."""
    port = port or free_port()
    ranks = [CHILDREN.Process(target=be_rank, args=(r, fault, port, folder / str(r), restarts[r])) for r in range(SIZE)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(90)
    for rank in ranks:
        rank.kill()
    return [(rank.exitcode, (folder / str(number)).read_text()) for number, rank in enumerate(ranks)]


SENTENCES = {
    "missing": f"rank 1 of {SIZE} did not start within {LIMIT_SECONDS} s",
    "killed": f"rank 1 of {SIZE} is gone without a word",
    "killed before a further group": f"rank 1 of {SIZE} is gone without a word",
    "killed while one is busy": f"one of rank 0, 1 of {SIZE} is gone without a word",
    "failed": f"rank 1 of {SIZE} failed: OSError: the disk is full",
}


@pytest.mark.parametrize("fault", SENTENCES)
def test_the_others_name_who_is_not_there(fault: str, tmp_path: Path) -> None:
    found = world(fault, tmp_path)
    for rank in (0, 2) if "busy" not in fault else (2,):
        status, output = found[rank]
        assert status == 6, output
        lines = [line for line in output.splitlines() if line.startswith("titan_fast: ")]
        assert len(lines) == 1 and SENTENCES[fault] in lines[0], output


@pytest.mark.parametrize("fault", ["none", "busy"])
def test_nobody_is_missed_where_nobody_is_missing(fault: str, tmp_path: Path) -> None:
    """Nor if one prepares data for longer than set-up may take."""
    found = world(fault, tmp_path)
    assert [(status, output.strip()[-13:]) for status, output in found] == [(0, "left in peace")] * SIZE


def limits_of_groups(world: World) -> dict[str, float]:
    mesh = build_mesh(MeshDegrees(1, 2, 2), CPU)
    distributed.limit_collectives(world, Comm(init_timeout_seconds=60, timeout_seconds=90))
    further = distributed.new_group(Comm(init_timeout_seconds=60), timedelta(seconds=1000))
    groups = {"world": dist.group.WORLD, "patient": world.patient, "further": further} | {
        name: mesh.get_group(name) for name in ("shard", "tensor")
    }
    return {
        name: group._get_backend(CPU).options._timeout.total_seconds()  # type: ignore[union-attr]
        for name, group in groups.items()
    }


def test_a_collective_of_any_group_outlives_the_longest_phase(tmp_path: Path) -> None:
    """Its limit is that of the longest phase with some time to spare, not torch's 10 minutes."""
    found = results(run_world(4, [Task("limits", limits_of_groups)], tmp_path), "limits")
    longest = 90 + distributed.SPARE_SECONDS
    others = {"patient": 7 * 24 * 3600, "further": 1000}
    assert found == [{"world": longest, "shard": longest, "tensor": longest} | others] * 4


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "1"}, "environment variable RANK is 1, and WORLD_SIZE 1"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "environment variable RANK is 5, and WORLD_SIZE 2"),
        ({"WORLD_SIZE": "9" * 5000}, "environment variable WORLD_SIZE is '999"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "abc"},
            "environment variable MASTER_PORT is 'abc', not a number",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999999"}, "MASTER_PORT is 99999999, which is no port"),
    ],
)
def test_an_environment_that_torchrun_did_not_make_is_refused_at_once(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(words)), start(Comm(), CPU):
        pass


@pytest.mark.parametrize("lost", [0, 1])
def test_hosts_that_count_restarts_differently_meet_again(lost: int, tmp_path: Path) -> None:
    """torchrun's store keeps what the dead attempt wrote, and only the host that lost a process counts a restart."""
    agents = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    counts = [0] * SIZE
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        found = world("none", folder, agents.port, counts)
        assert [(status, output.strip()[-13:]) for status, output in found] == [(0, "left in peace")] * SIZE
        counts[lost] += 1
    del agents


def test_of_a_thousand_ranks_one_looks_who_is_lost_and_the_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_LINGER_SECONDS", 0.0)
    store, size = CountedStore(), 1024
    for rank in range(size):
        if rank != 700:
            store.set(f"left/{rank}", "")
    asked = []
    for rank in (3, 2):
        store.asked = 0
        with pytest.raises(CommunicationError, match=f"rank 700 of {size} is gone without a word"):
            distributed._name_the_lost(store, rank, size, RuntimeError("Connection closed by peer"))
        asked.append(store.asked)
    assert asked[0] < 40 and asked[1] < 4, asked
    distributed._name_the_lost(store, 700, size, OSError("the disk is full"))
    with pytest.raises(CommunicationError, match=f"rank 700 of {size} failed: OSError: the disk is full"):
        distributed._name_the_lost(store, 1, size, RuntimeError("Connection closed by peer"))


def test_an_own_failure_is_not_put_down_to_a_store_that_is_gone() -> None:
    class GoneStore(dist.HashStore):
        def set(self, *words: Any) -> None:  # type: ignore[override]
            raise dist.DistNetworkError("Broken pipe")

    distributed._name_the_lost(GoneStore(), 1, 2, OSError("the disk is full"))
    with pytest.raises(CommunicationError, match="rank 0 of 2 is gone without a word"):
        distributed._name_the_lost(GoneStore(), 1, 2, RuntimeError("Connection closed by peer"))


def test_a_process_may_have_as_many_connections_as_the_machine_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1000, before[1]), before[1]))
    try:
        with start(Comm(), CPU):
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(("given", "left"), [(None, "^NVLS,NVLSTree"), ("Ring", "Ring")])
def test_deterministic_runs_do_not_add_up_in_the_switch(
    given: str | None, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {} if given is None else {"NCCL_ALGO": given})
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with torch.random.fork_rng(devices=[]):
        set_determinism(Debug())
        assert os.environ.get("NCCL_ALGO") == given
        set_determinism(Debug(deterministic=True))
    assert os.environ["NCCL_ALGO"] == left
