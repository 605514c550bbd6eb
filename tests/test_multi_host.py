"""Two hosts (network namespaces of this machine): one is disconnected and comes back, and no data is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runs import (
    FAULTS,
    ROOT,
    arguments,
    assert_same_tensors,
    checkpoint,
    environment,
    finish,
    losses,
    prepare,
    torchrun,
)

STEPS, INTERVAL = 12, 4
LIMIT_SECONDS = 150


def why_not() -> str | None:
    """What this machine lacks for the test, if anything."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    probe = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


@pytest.fixture(scope="module")
def hosts() -> Iterator["Hosts"]:
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts() as made:
        yield made


class Hosts:
    """Network namespaces `a` and `b`, joined by a cable."""

    def __init__(self, name: str) -> None:
        self.a, self.b = f"{name}a", f"{name}b"
        self.address = {self.a: "10.213.7.1", self.b: "10.213.7.2"}

    def cable(self, state: str) -> None:
        """Plugs it in or out, "up" or "down", at host b."""
        ip("-n", self.b, "link", "set", "cable", state)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    hosts = Hosts(f"titan{os.getpid()}")
    try:
        for host in (hosts.a, hosts.b):
            ip("netns", "add", host)
        ip("link", "add", "cable", "netns", hosts.a, "type", "veth", "peer", "name", "cable", "netns", hosts.b)
        for host in (hosts.a, hosts.b):
            ip("-n", host, "addr", "add", f"{hosts.address[host]}/24", "dev", "cable")
            ip("-n", host, "link", "set", "cable", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in (hosts.a, hosts.b):
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def start(hosts: Hosts, host: str, words: list[str], faults: list[dict], log: Path) -> "subprocess.Popen[bytes]":
    """torchrun on one of the hosts; the rendezvous is at host a."""
    # is_host, since torchrun would look for the endpoint among the addresses of its host's name, which both share.
    launch = [
        "ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
        "--rdzv-backend=c10d", f"--rdzv-endpoint={hosts.address[hosts.a]}:29400", "--rdzv-id=test",
        f"--rdzv-conf=is_host={int(host == hosts.a)}", f"--local-addr={hosts.address[host]}", "--max-restarts=3",
        "--monitor-interval=0.5", str(FAULTS), *words,
    ]  # fmt: skip
    with log.open("wb") as output:
        return subprocess.Popen(
            launch, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT,
            env=environment(FAULTS=json.dumps(faults), GLOO_SOCKET_IFNAME="cable"),
        )  # fmt: skip


def wait_until(condition: Callable[[], bool], what: str, logs: list[Path], limit_seconds: float = 60) -> None:
    deadline = time.monotonic() + limit_seconds
    while not condition():
        tails = "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in logs)
        assert time.monotonic() < deadline, f"{what} not within {limit_seconds} s\n{tails}"
        time.sleep(0.1)


def logged_steps(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    return sorted(losses(folder)) if path.exists() else []


def ledger(path: Path) -> dict[int, list]:
    """Step -> the tokens that this rank saw when the step was last done."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["step"]: record["tokens"] for record in records}


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS + 60)
def test_a_host_that_is_cut_off_comes_back(hosts: Hosts, tmp_path: Path) -> None:
    data = prepare(tmp_path)
    options = {"training__steps": STEPS, "checkpoint__interval": INTERVAL, "comm__timeout_seconds": 6,
               "comm__init_timeout_seconds": 40}  # fmt: skip

    def faults(name: str, slow: bool) -> list[dict]:
        made = [{"what": "ledger", "path": str(tmp_path / name), "rank": None, "attempt": None}]
        return made + [{"what": "slow", "step": 0, "seconds": 0.7, "rank": None}] * slow

    whole = torchrun(2, str(FAULTS), *arguments(data, tmp_path / "whole", **options),
                     env={"FAULTS": json.dumps(faults("whole-ledger", False))})  # fmt: skip
    parts, logs = tmp_path / "parts", [tmp_path / "a.log", tmp_path / "b.log"]
    words = arguments(data, parts, **options)
    running = [
        start(hosts, host, words, faults("parts-ledger", True), log)
        for host, log in zip((hosts.a, hosts.b), logs, strict=True)
    ]
    try:
        wait_until(lambda: len(logged_steps(parts)) > INTERVAL + 1, "the first steps", logs)
        hosts.cable("down")
        cut = max(logged_steps(parts))
        wait_until(lambda: "hangs" in logs[0].read_text() + logs[1].read_text(), "the watchdog's verdict", logs)
        hosts.cable("up")
        wait_until(lambda: all(p.poll() is not None for p in running), "the end", logs, LIMIT_SECONDS - 60)
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        finish(whole)
    assert [process.returncode for process in running] == [0, 0], logs[0].read_text()[-3000:]
    # It resumed from the last checkpoint before the cut, with the same tokens, to the same weights bit for bit.
    assert INTERVAL < cut < STEPS
    assert "goes on" in (parts / "train.log").read_text()
    for rank in range(2):
        expected, found = (ledger(tmp_path / f"{name}-ledger-{rank}") for name in ("whole", "parts"))
        assert list(expected) == list(range(1, STEPS + 1)) and found == expected
    assert_same_tensors(checkpoint(tmp_path / "whole", STEPS), checkpoint(parts, STEPS))
