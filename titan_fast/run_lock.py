"""A lock that a dead run cannot leave behind: one run at a time in a run directory, in a folder of checkpoints outside
it, and where token shards are written.

`run.lock` names the process that holds it. On the same machine a dead holder is recognised at once, by its process id
and start time. From another machine (or container) it is judged by its pulse: the holder keeps renewing the file's
time, which is compared with the file server's own clock, never with this machine's.
"""

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from titan_fast.config import Config, saved_checkpoint_folder
from titan_fast.errors import NO_ROOM, CheckpointError, ConfigError

NAME = "run.lock"
_GUARD = f".{NAME}.guard"
PULSE_SECONDS = 10.0
SILENT_SECONDS = 60.0
"""A holder on another machine whose pulse is older than this is considered dead."""
_PROC = Path("/proc")
_HIDDEN = "hidden"
_LARGEST_ID = 2**31 - 1


@contextmanager
def locked(config: Config, run_dir: Path) -> Iterator[Callable[[], None]]:
    """Locks the run directory. Where the checkpoints lie outside it, locks their folder too, and the run directory that
    this folder belongs to, if any. Yields a function that checks that all are still held."""
    checkpoints = run_dir / config.checkpoint.folder
    folders = {"job.dump_folder": run_dir}
    if config.checkpoint.enable and not checkpoints.resolve().is_relative_to(run_dir.resolve()):
        folders["checkpoint.folder"] = checkpoints
        if owner := _owner(checkpoints):
            folders["the run directory of checkpoint.folder"] = owner
    with ExitStack() as held:
        locks = [held.enter_context(RunLock(folder, key)) for key, folder in folders.items()]

        def check() -> None:
            for lock in locks:
                lock.check()

        yield check


def _owner(checkpoints: Path) -> Path | None:
    """The run directory that these checkpoints belong to and lie in, if there is one."""
    folder = checkpoints.resolve()
    guarded = (place for place in folder.parents if (place / _GUARD).exists())
    return next((place for place in guarded if saved_checkpoint_folder(place).resolve() == folder), None)


@contextmanager
def without_a_run(checkpoints: Path) -> Iterator[None]:
    """Keeps runs away from a folder of checkpoints; ConfigError where one is using it. The lock is in the folder or in
    the run directory above it, recognised by the guard file that its first run has left there."""
    folder = checkpoints.resolve()
    guarded = [place for place in (folder, *folder.parents) if (place / _GUARD).exists()]
    with ExitStack() as held:
        for place in guarded[: 1 + (folder in guarded)]:
            try:
                held.enter_context(RunLock(place, "these checkpoints"))
            except OSError as error:
                # On a full disk, which pruning is to help, go on without a lock unless somebody holds one.
                if error.errno not in NO_ROOM or (place / NAME).exists():
                    raise
        yield


class RunLock:
    """Held from `with` to its end; ConfigError where another live run holds the folder. key: the setting that names
    the folder, or words for it."""

    def __init__(self, folder: Path, key: str = "job.dump_folder") -> None:
        self.path, self._key = folder / NAME, key
        self._me = _identity()
        self._first_seen = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "RunLock":
        give_up = time.monotonic() + SILENT_SECONDS + PULSE_SECONDS
        while (holder := self._try()) is not None:
            if time.monotonic() > give_up or not holder.get("may_be_dead"):
                raise ConfigError(
                    f"another run is using {self._key}: process {holder.get('pid')} on {holder.get('host')} since "
                    f"{holder.get('since')}",
                    "stop it or choose another folder",
                    where=str(self.path),
                )
            time.sleep(1.0)
        self._thread = threading.Thread(target=self._pulse, name="titan_fast lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError):  # if the disk fails: others will see without this that the process has ended
            if _read(self.path).get("token") == self._me["token"]:
                self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """CheckpointError where another run has taken the folder because this one was silent for too long. A lock that
        somebody has deleted is written again; one that cannot be read, as on a file server that is away for a moment,
        is ignored."""
        try:
            holder = _parsed(self.path.read_text())
        except FileNotFoundError:
            if self.path.parent.is_dir():
                self._write()
            return
        except (OSError, ValueError):
            return
        if holder and holder.get("token") != self._me["token"]:
            raise CheckpointError(
                f"{self._key} is now held by process {holder.get('pid')} on {holder.get('host')}",
                "one run at a time can write there",
                where=str(self.path),
            )

    def _try(self) -> dict[str, Any] | None:
        """None once the lock is ours, else who holds it; "may_be_dead" where only time can tell."""
        with self.path.with_name(_GUARD).open("a") as guard:
            # For two starts at the same moment. On a file system without locks the later one wins; `check` notices.
            with suppress(OSError):
                fcntl.flock(guard, fcntl.LOCK_EX)
            holder = _read(self.path)
            if holder and (doubt := self._doubt(holder)) is not None:
                return holder | {"may_be_dead": doubt}
            self._write()
            return None

    def _write(self) -> None:
        temporary = self.path.with_name(f".{NAME}.{self._me['token']}")
        try:
            temporary.write_text(json.dumps(self._me))
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _doubt(self, holder: dict[str, Any]) -> bool | None:
        """None where the holder is dead, False where it is alive, True where only more time can tell."""
        if all(holder.get(key) == self._me[key] for key in ("machine", "namespace")):
            started = _start_time(holder["pid"])
            if started != _HIDDEN:
                return False if started == holder.get("started") else None
        now = self.path.with_name(f".{NAME}.{self._me['token']}")
        now.touch()
        try:
            seen = self.path.stat().st_mtime
            age = now.stat().st_mtime - seen
        except FileNotFoundError:  # the holder has just ended
            return None
        finally:
            now.unlink()
        if age > SILENT_SECONDS:
            return None
        self._first_seen = self._first_seen or seen
        return seen == self._first_seen

    def _pulse(self) -> None:
        while not self._stop.wait(PULSE_SECONDS):
            try:
                if _read(self.path).get("token") == self._me["token"]:
                    os.utime(self.path)
            except OSError:
                continue  # a file server that is away for a while


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "machine": _text("/proc/sys/kernel/random/boot_id") or socket.gethostname(),
        "namespace": _link("/proc/self/ns/pid"),
        "token": secrets.token_hex(8),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _start_time(process: int) -> str | None:
    """When the kernel says that a process started, None where there is no such process. Together with the id this is
    unique: ids alone are reused. A zombie counts as dead. Where other users' processes are hidden (hidepid) this is
    _HIDDEN, and where there is no /proc, "alive"."""
    try:
        fields = (_PROC / str(process) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        hidden = _HIDDEN if (_PROC / "self").exists() else "alive"
        return hidden if process > 0 and _is_there(process) else None
    return None if fields[0] in "ZX" else fields[19]


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:  # it is another user's
        return True
    except OSError:
        return False
    return True


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path.read_text())
    except (OSError, ValueError):
        return {}


def _parsed(text: str) -> dict[str, Any]:
    """What a lock says, {} where no lock was ever written so."""
    try:
        holder = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    process = holder.get("pid") if isinstance(holder, dict) else None
    return holder if isinstance(process, int) and 0 <= process <= _LARGEST_ID else {}
