"""Saving and choosing the checkpoints of a run, all ranks together.

Nothing gets its final name before it is whole and on the disk, and nothing is loaded that does not match its manifest.
After each stage the ranks exchange results: where one failed, all raise the same error.
"""

import errno
import json
import math
import os
import secrets
import shlex
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import tomli_w
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from titan_fast import distributed, manifest
from titan_fast.agreement import Agreement
from titan_fast.checkpoint import Progress, Writer, cause, load_tensors, read_config, read_state, tensors_of
from titan_fast.config import Checkpoint, Config, model_shape, to_dict
from titan_fast.distributed import World
from titan_fast.errors import NO_ROOM, CheckpointError, ConfigError, NumericsError
from titan_fast.flops import parameter_count
from titan_fast.initial_weights import check_initial_weights
from titan_fast.masters import round_masters
from titan_fast.optim import rate_at
from titan_fast.prepared import is_prepared
from titan_fast.redaction import redacted
from titan_fast.run_directory import differences, note_saved
from titan_fast.shards import copies, local
from titan_fast.signals import may_wait_longer, seconds_to_stop
from titan_fast.tokenizer import Tokenizer, copy_tokenizer
from titan_fast.versions import code_version, kind_of_device

WENT_BACK = "went_back.json"
"""A file in the folder of checkpoints that notes to which `load_step` the run has gone back."""
_TOLD = ("training", "optimizer", "lr_scheduler", "loss", "parallelism", "compile", "float8", "kernels", "validation")
"""The tables of which a run that goes on tells what has changed."""
_SPARE_BYTES = 2**20  # beyond the tensors: the metadata, states, tokenizer

T = TypeVar("T")


def check(config: Config, device: torch.device) -> None:
    """ConfigError where `[checkpoint]` asks for what the device cannot do."""
    if config.checkpoint.async_mode == "async_with_pinned_mem" and device.type != "cuda":
        raise ConfigError(
            "checkpoint.async_mode 'async_with_pinned_mem' needs CUDA, and there is none", "use 'async' or 'disabled'"
        )


def check_start(config: Config, run_dir: Path, saved_bytes: int) -> list[str]:
    """CheckpointError where the step or the weights that the run is to begin from are missing or of another model, or
    where the disk has no room for one checkpoint of `saved_bytes` per parameter. Returns a warning where it has no room
    for all the checkpoints that it will hold. For one process, before anything is loaded."""
    settings, shape = config.checkpoint, model_shape(config.model)
    folder = run_dir / settings.folder
    found = manifest.checkpoints(folder) if settings.enable else {}
    # A run that went back at an earlier start may have deleted that step since; it simply continues.
    goes_on = (folder / WENT_BACK).exists()
    if settings.load_step != -1 and settings.load_step not in found and not goes_on:
        raise _no_such_step(settings.load_step, list(found), folder)
    if settings.initial_load_path is not None and not found:
        data = config.training.dataset_path
        names_tokenizer = bool(config.model.tokenizer_path or (data and is_prepared(Path(data))))
        path = Path(settings.initial_load_path)
        check_initial_weights(path, shape, settings.initial_load_changes, names_tokenizer)
    whole = [step for step, path in found.items() if manifest.problem(path, contents=False) is None]
    first = settings.load_step if settings.load_step != -1 and not goes_on else max(whole, default=0)
    if not settings.enable or first >= config.training.steps:
        return []
    need = parameter_count(shape) * saved_bytes + _SPARE_BYTES
    free, comes_free = shutil.disk_usage(folder).free, manifest.leftover_bytes(folder)
    and_more = f" and {comes_free:,} more in what a killed save has left" if comes_free else ""
    if free + comes_free < need:
        raise CheckpointError(
            f"a checkpoint of this model needs {need:,} bytes, and the disk has {free:,} bytes free{and_more}",
            _room(settings),
            str(folder),
        )
    more = _checkpoints_to_hold(config, first, sum(step <= first and not _stays(settings, step) for step in whole))
    if free + comes_free >= more * need:
        return []
    kept = f"checkpoint.keep_latest_k: {settings.keep_latest_k} stay while another is written"
    if settings.keep_every:
        kept += f", and each {settings.keep_every}th step's by checkpoint.keep_every"
    if not settings.keep_latest_k:
        kept = "checkpoint.keep_latest_k: all stay"
    return [
        f"WARNING: the disk has {free:,} bytes free{and_more}, and the run will need {more * need:,} for {more} "
        f"checkpoints more ({kept}); {_room(settings)}, or keep fewer"
    ]


def _checkpoints_to_hold(config: Config, first: int, kept: int) -> int:
    """How many checkpoints the disk will have to hold at once, while a run continues after step `first`: at most, and
    besides those that stay and the `kept` ones that will make room."""
    settings, steps = config.checkpoint, config.training.steps
    interval = settings.interval or steps
    to_come = math.ceil(steps / interval) - first // interval
    if not settings.keep_latest_k:
        return to_come
    stay = sum(_stays(settings, step) for step in range(first - first % interval + interval, steps + 1, interval))
    most = max(settings.keep_latest_k + 1 - kept, 1) + stay
    return most if settings.interval_minutes > 0 else min(to_come, most)


def _stays(settings: Checkpoint, step: int) -> bool:
    return settings.keep_every > 0 and step % settings.keep_every == 0


def _room(settings: Checkpoint) -> str:
    """What to do where the disk has no room."""
    key = "checkpoint.folder" if Path(settings.folder).is_absolute() else "job.dump_folder"
    return f"make room or choose another --{key}"


def _no_such_step(wanted: int, found: Sequence[int], folder: Path) -> CheckpointError:
    return CheckpointError(
        f"there is no checkpoint of step {wanted}; there are {list(found) or 'none'}",
        "change checkpoint.load_step",
        str(folder),
    )


class Checkpointer:
    """Saves and loads the checkpoints of one run. Every rank calls every method at the same step, unless its docstring
    says otherwise."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        world: World,
        tokenizer: Tokenizer,
        check_lock: Callable[[], None] = lambda: None,
    ) -> None:
        """check_lock: raises, on the main rank and before anything is written, where the folder is another run's."""
        self.config, self.settings, self.world = config, config.checkpoint, world
        self.folder, self.tokenizer = run_dir / config.checkpoint.folder, tokenizer
        self.run_dir = run_dir
        self.check_lock = check_lock
        # A group of its own: a save in the background must not interfere with the step's collectives.
        timeout = timedelta(seconds=self.settings.save_timeout_seconds + distributed.SPARE_SECONDS)
        world.barrier()  # waits for a rank whose set-up takes longer, but not for one that is lost
        self.group = distributed.new_group(config.comm, timeout)
        self.saved_step = -1
        """The step of the last save that was begun, or of the checkpoint that was loaded."""
        self.step_seconds = 0.0
        """How long a step takes, set by the caller. A run that is told to stop finishes its step before the last
        save."""
        self.stall_seconds = 0.0
        """How long saves have blocked their caller since the last `take_stall_seconds`."""
        self.goes_back = False
        """Whether this start goes back to checkpoint.load_step."""
        self._passed_over: set[int] = set()  # steps that were found damaged
        self._last_save = time.monotonic()
        self._code = code_version() if world.is_main else ""
        self._pending: Future[Path] | None = None
        self._failures = 0  # in a row
        self._warned_of_limit = False
        self._notes: deque[str] = deque()
        self._thread: ThreadPoolExecutor | None = None
        self._stager: DefaultStager | None = None
        if self.settings.async_mode != "disabled":
            # On this rank's GPU: a thread's own default is the first one.
            first = partial(torch.cuda.set_device, world.device) if world.device.type == "cuda" else None
            self._thread = ThreadPoolExecutor(1, "titan_fast checkpoint", initializer=first)

    def note(self, text: str) -> None:
        """Adds a line to what `notes` will return."""
        self._notes.append(text)

    def take_stall_seconds(self) -> float:
        """How long saves have blocked their caller since the last call."""
        seconds, self.stall_seconds = self.stall_seconds, 0.0
        return seconds

    def notes(self) -> list[str]:
        """Lines about what has happened since the last call. Any rank, any time."""
        return [self._notes.popleft() for _ in range(len(self._notes))]

    # Saving

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        must_succeed: bool = False,
        begins: Callable[[], None] = lambda: None,
    ) -> None:
        """Writes `step-N`; in an async mode copies what is to be written, for a thread to write. A failure is raised or
        noted, as `on_save_error` says. With `must_succeed` it is raised, and the thread is waited for. begins: called
        when the save before this one has been waited for."""
        started = time.monotonic()
        self.settle()
        begins()
        self._last_save = started
        tensors, files = tensors_of(model, optimizer), self._small_files(progress)
        self._refuse_non_finite(tensors, progress.step)
        self.saved_step = progress.step
        if self._thread is not None:
            self._pending = self._thread.submit(self._write, self._staged(tensors), files, progress.step)
            self._notes.append(f"step {progress.step}: the checkpoint is being written in the background")
        else:
            self._finish(lambda: self._write(tensors, files, progress.step), must_succeed)
        if must_succeed:
            self.settle(must_succeed)
        self.stall_seconds += time.monotonic() - started

    def _staged(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """A copy in host memory."""
        if self._stager is None:
            pinned = self.settings.async_mode == "async_with_pinned_mem"
            self._stager = DefaultStager(StagingOptions(pinned, False, False, use_non_blocking_copy=pinned))
        staged = self._stager.stage(tensors)
        assert isinstance(staged, dict)
        # torch 2.11's stager closes itself after each use, and would fail in the next.
        if not getattr(getattr(self._stager, "_state_dict_stager", None), "_deepcopy_dispatch", True):
            self._stager = None
        return staged

    @property
    def is_time(self) -> bool:
        """Whether `interval_minutes` have passed since the last save; False on all ranks but 0."""
        minutes = self.settings.interval_minutes
        return self.world.is_main and minutes > 0 and time.monotonic() - self._last_save >= 60 * minutes

    @property
    def has_failed(self) -> bool:
        """Whether a save in the background has failed on this rank and is not settled. Ranks may notice at different
        steps, so they must agree before they act. Any rank, any time."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def settle(self, must_succeed: bool = False) -> None:
        """Waits for the save in the background and raises or notes its failure."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._finish(pending.result, must_succeed)

    def close(self) -> None:
        """Waits for the thread, and notes where its save has failed. Any rank, any time."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        pending, self._pending = self._pending, None
        if pending is not None and (error := pending.exception()) is not None:
            self._notes.append(f"titan_fast: {error}")

    def _finish(self, write: Callable[[], Path], must_succeed: bool) -> None:
        try:
            write()
            self._failures = 0
        except CheckpointError as error:
            self._failures += 1
            tolerated = self.settings.on_save_error == "continue" and self._failures <= self.settings.max_failed_saves
            if must_succeed or not tolerated:
                raise
            self._notes.append(
                f"titan_fast: {error} (failed save {self._failures} in a row; the run goes on up to "
                f"{self.settings.max_failed_saves})"
            )

    def _refuse_non_finite(self, tensors: dict[str, Tensor], step: int) -> None:
        """NumericsError for a NaN or an infinity: every later start would continue from such a checkpoint."""
        by_device: dict[torch.device, list[str]] = {}
        for name, tensor in tensors.items():  # some implementations of AdamW count their steps in host memory
            if tensor.is_floating_point():
                by_device.setdefault(local(tensor).device, []).append(name)
        bad = []
        for names in by_device.values():
            norms = torch.stack([norm.float() for norm in torch._foreach_norm([local(tensors[n]) for n in names])])
            suspect = [name for name, ok in zip(names, torch.isfinite(norms).tolist(), strict=True) if not ok]
            # The norm of finite numbers may overflow float32.
            bad += [n for n in suspect if not torch.stack(local(tensors[n]).aminmax()).isfinite().all()]
        if found := [name for rank in self._together(lambda: bad) for name in rank]:
            raise NumericsError(
                f"{found[0]} is not finite after step {step}, and no checkpoint of it is written",
                "go on from the newest one with a lower optimizer.lr",
                where=f"{len(set(found))} tensors of step {step}",
            )

    def _small_files(self, progress: Progress) -> dict[str, bytes]:
        """This rank's files besides the tensors, with their content at this moment."""
        files = {f"rng-{self.world.rank}.safetensors": safetensors.torch.save(_rng_state(self.world.device))}
        if self.world.is_main:
            here = {"torch": torch.__version__, "code": self._code, "device": kind_of_device(self.world.device)}
            state = asdict(progress) | {"world_size": self.world.size} | here
            files["state.json"] = json.dumps(state, indent=1).encode()
            files["config.toml"] = tomli_w.dumps(redacted(to_dict(self.config))).encode()
        return files

    def _write(self, tensors: dict[str, Tensor], files: dict[str, bytes], step: int) -> Path:
        """The commit protocol. Runs on the main thread or on the saving one."""
        started = time.perf_counter()
        final = manifest.folder_of(self.folder, step)
        temporary = manifest.writing(final)
        # What several ranks hold is written by only one of them.
        own = sum(local(t).nbytes // copies(t) for t in tensors.values()) + sum(map(len, files.values()))
        need = sum(self._together(lambda: own)) + _SPARE_BYTES
        try:
            self._together(lambda: self._begin(temporary, need))
            self._write_tensors(tensors, temporary)
            found = self._together(lambda: self._write_files(files, temporary))
            known = {name: digest for digests in found for name, digest in digests.items()}
            self._together(lambda: self._publish(temporary, final, known, step, started))
        except (OSError, CheckpointError) as error:
            raise self._translated(error, need) from error
        return final

    def _begin(self, temporary: Path, need: int) -> None:
        if not self.world.is_main:
            return
        self.check_lock()
        if not self.folder.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the run directory is gone", str(self.folder.parent))
        manifest.clean(self.folder)  # leftovers of a failed save take room that this one needs
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
        if free < need:
            raise OSError(errno.ENOSPC, "No space left on device", str(temporary))

    def _write_tensors(self, tensors: dict[str, Tensor], temporary: Path) -> None:
        # Each file is synced when it is hashed (manifest.digests).
        writer = Writer(temporary, sync_files=False, overwrite=False)
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self.group)
        except (dcp.api.CheckpointException, RuntimeError, OSError) as error:
            raise CheckpointError(cause(error), "", str(temporary)) from error

    def _write_files(self, files: dict[str, bytes], temporary: Path) -> dict[str, manifest.Digest]:
        for name, content in files.items():
            manifest.write_file(temporary / name, content)
        own = [path.name for path in temporary.glob(f"__{self.world.rank}_*")]
        return manifest.digests(temporary, [*own, *files])

    def _publish(
        self, temporary: Path, final: Path, known: dict[str, manifest.Digest], step: int, started: float
    ) -> None:
        if not self.world.is_main:
            return
        copy_tokenizer(self.tokenizer, temporary / "tokenizer")
        manifest.publish(temporary, final, known, step=step, world_size=self.world.size)
        note_saved(self.run_dir, final)
        self._passed_over.discard(step)
        keep, every = self.settings.keep_latest_k, self.settings.keep_every
        try:
            _, left = manifest.prune(self.folder, keep, every, step, contents=False, damaged=self._passed_over)
        except OSError as error:  # the save itself has succeeded
            left = []
            self._notes.append(f"WARNING: what older checkpoints there are cannot be read: {error.strerror}")
        seconds = time.perf_counter() - started
        self._notes.append(f"saved {final} in {seconds:.1f} s")
        self._notes.extend(f"could not delete {path}" for path in left)
        steps = Agreement.steps_to_stop(self.world.device)
        whole = steps * self.step_seconds + seconds
        if (limit := seconds_to_stop()) is not None and whole > limit and not self._warned_of_limit:
            self._warned_of_limit = True
            remedy = f"give torchrun --shutdown-timeout {2 * math.ceil(whole)}"
            if not may_wait_longer():
                remedy = "this torch's torchrun cannot wait longer, so save often: what is newer than a save is lost"
            self._notes.append(
                f"WARNING: up to {steps} steps of {self.step_seconds:.1f} s and a save of {seconds:.0f} s follow a "
                f"signal, and torchrun kills {limit:.0f} s after it: that save will not end in time; {remedy}"
            )

    def _translated(self, error: OSError | CheckpointError, need: int) -> CheckpointError:
        """The error with bytes needed, bytes free and path, which the message of a full disk lacks."""
        what = error.what if isinstance(error, CheckpointError) else cause(error)
        try:
            have = f"{shutil.disk_usage(self.folder if self.folder.is_dir() else self.folder.parent).free:,}"
        except OSError:
            have = "no"
        fix = error.fix if isinstance(error, CheckpointError) else ""
        if os.strerror(errno.EFBIG) in what:
            fix = "raise the limit of file sizes (ulimit -f), or choose a file system that has none"
        elif any(word in what for word in ("disk full", *map(os.strerror, NO_ROOM))):
            what += f": needs {need:,} bytes, has {have} bytes free"
            fix = _room(self.settings)
        what = f"the checkpoint could not be written: {what}"
        return CheckpointError(what, f"{fix or 'see what is wrong there'}; {self._newest()}", str(self.folder))

    def _newest(self) -> str:
        """From what a run could continue, in words."""
        try:
            found = manifest.checkpoints(self.folder)
            problems = {step: manifest.problem(path, contents=False) for step, path in found.items()}
        except OSError as error:
            return f"what checkpoints there are cannot be read: {error.strerror}"
        if whole := [step for step, problem in problems.items() if problem is None]:
            return f"the newest whole checkpoint is of step {whole[-1]}"
        unread = [step for step, problem in problems.items() if isinstance(problem, manifest.Unread)]
        return f"that of step {unread[-1]} cannot be read" if unread else "there is no checkpoint yet"

    def _together(self, action: Callable[[], T]) -> list[T]:
        """The results of `action` on all ranks, in order. Where it raised OSError or CheckpointError on one rank,
        raises CheckpointError on all."""
        outcome: tuple[Any, str, str]
        try:
            outcome = action(), "", ""
        except CheckpointError as error:
            outcome = None, f"rank {self.world.rank}: {error.what}", error.fix
        except OSError as error:
            full = error.errno in NO_ROOM and error.errno != errno.EFBIG
            words = f"disk full ({cause(error)})" if full else cause(error)
            outcome = None, f"rank {self.world.rank}: {words}", ""
        outcomes: list[Any] = [None] * self.world.size
        try:
            dist.all_gather_object(outcomes, outcome, group=self.group)
        except RuntimeError as error:
            what = f"another rank is gone ({cause(error)})"
            raise CheckpointError(what, "look at the log of the first that failed", str(self.folder)) from error
        if failed := next(((words, fix) for _, words, fix in outcomes if words), None):
            raise CheckpointError(*failed, str(self.folder))
        return [result for result, _, _ in outcomes]

    # Loading

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Puts the newest checkpoint that verifies (or `load_step`'s) into the model and optimizer; None when there is
        no checkpoint at all. CheckpointError where the ranks do not share the folder, in which they are to save too."""
        self._check_shared()
        path = self._choose()
        if path is None:
            return None
        state = read_state(path)
        self._compare(read_config(path), state, path)
        load_tensors(tensors_of(model, optimizer), path)
        round_masters(model)
        rng = path / f"rng-{self.world.rank}.safetensors"
        if state["world_size"] == self.world.size and rng.exists():
            try:
                _set_rng_state(safetensors.torch.load_file(rng), self.world.device)
            except (OSError, safetensors.SafetensorError) as error:  # it was whole when it was verified
                raise CheckpointError(f"{rng.name} cannot be read: {cause(error)}", "start again", str(path)) from error
        self.saved_step = state["step"]
        return Progress(**{item.name: state[item.name] for item in fields(Progress) if item.name in state})

    def _check_shared(self) -> None:
        """CheckpointError where another rank does not see in its folder what rank 0 writes into its own."""
        if self.world.size == 1:
            return
        probe = self.folder / self._from_main(f".shared-{secrets.token_hex(8)}")
        try:
            self._together(lambda: probe.touch() if self.world.is_main else None)
            seen = self._together(lambda: (manifest.unseen(self.folder, {probe.name: 0}), str(self.folder.absolute())))
        finally:
            if self.world.is_main:
                probe.unlink(missing_ok=True)
        if (blind := next((rank for rank, (missing, _) in enumerate(seen) if missing), None)) is not None:
            raise CheckpointError(
                f"rank {blind} does not see in {seen[blind][1]} what rank 0 has written in {seen[0][1]}",
                "all ranks need one shared folder: name one by its absolute path",
                str(self.folder),
            )

    def _compare(self, before: dict[str, dict[str, Any]], state: dict[str, Any], path: Path) -> None:
        """CheckpointError where the run no longer computes what the checkpoint's did; other changes are noted.
        `before`, `state`: the checkpoint's config and state.json."""
        now, step, world_size = redacted(to_dict(self.config)), state["step"], state["world_size"]
        if refused := differences(before, now, path, reset_data=self.settings.data_state == "reset"):
            raise CheckpointError(
                f"the checkpoint is of another run: {'; '.join(refused)}",
                "go back to these values or choose another --job.dump_folder; --checkpoint.data_state reset accepts "
                "what concerns the data and begins it again",
                str(path),
            )
        changed = [
            f"{table}.{key} {before[table].get(key)} -> {now[table].get(key)}"
            for table in _TOLD
            for key in before.get(table, {}) | now[table]
            if table in before and before[table].get(key) != now[table].get(key)
        ]
        if changed:
            self._notes.append(f"changed since step {step}: {', '.join(changed)}")
        for what, was, here in (
            ("with torch", state.get("torch"), torch.__version__),
            ("with titan_fast", state.get("code"), self._code),
            ("on", state.get("device"), kind_of_device(self.world.device)),
        ):
            if was and here and was != here:
                self._notes.append(
                    f"step {step} was computed {what} {was}, and this is {here}: what follows may differ, at "
                    "least by rounding, from the same run without the change"
                )
        self._compare_initial_weights(path, before, now)
        self._compare_schedules(step, before, now)
        then, today = _global_batch_size(before, world_size), _global_batch_size(now, self.world.size)
        if then != today:
            self._notes.append(
                f"WARNING: a step was {then} sequences at world size {world_size} and is {today} at {self.world.size}; "
                f"{_keeps(then, now, self.world.size)}"
            )
            if self.config.validation.enable:
                self._notes.append(
                    f"a validation batch was {then} sequences and is {today}: its losses are of other text than before"
                )

    def _compare_initial_weights(self, path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Notes that the initial weights that the config names are not loaded."""
        was, given = (tables.get("checkpoint", {}).get("initial_load_path") for tables in (before, now))
        if given is not None and given != was:
            self._notes.append(
                f"WARNING: checkpoint.initial_load_path was {was!r} and is {given!r}, which is not read, for the run "
                f"goes on from {path.name}; to begin with these weights choose another --job.dump_folder"
            )
        elif given is not None:
            self._notes.append(f"goes on from {path.name}; checkpoint.initial_load_path is not read again")

    def _compare_schedules(self, step: int, before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> None:
        """Notes a jump of the learning rate: with more steps, the same schedule is higher at the step to continue
        from."""
        if step == 0:  # an imported model, trained by no schedule
            return
        was, would_be = (rate_at(step, tables) for tables in (before, now))
        if math.isclose(was, would_be):
            return
        length, today = (t["lr_scheduler"].get("total_steps") or t["training"]["steps"] for t in (before, now))
        keeps = f"; --lr_scheduler.total_steps {length} keeps the schedule" if length != today else ""
        self._notes.append(
            f"WARNING: step {step} was trained at a learning rate of {was:.2e}, which is {would_be:.2e} in today's "
            f"schedule, and the run goes on from there{keeps}"
        )

    def _choose(self) -> Path | None:
        """The checkpoint that every rank will load. The main rank names candidates, and all ranks check them."""
        wanted = self._from_main(self._wanted_step())
        candidates: list[int] = []
        if self.world.is_main:
            if self.folder.is_dir():
                self._notes.extend(f"{self.folder}: {line}" for line in manifest.clean(self.folder))
            found = list(manifest.checkpoints(self.folder))
            candidates = found[::-1] if wanted == -1 else [step for step in found if step == wanted]
            if wanted != -1 and not candidates:
                candidates = [-1, *found]
        candidates = self._from_main(candidates)
        if candidates[:1] == [-1]:
            raise _no_such_step(wanted, candidates[1:], self.folder)
        passed_over = []
        for step in candidates:
            path = manifest.folder_of(self.folder, step)
            reason = self._problem(path)
            if reason is None:
                self.goes_back = wanted != -1
                return path
            self._passed_over.add(step)
            passed_over.append(f"step-{step} is not loaded ({reason})")
            if self.settings.strict or wanted != -1:
                break
            self._notes.append(passed_over[-1])
        if passed_over:
            raise CheckpointError(
                "; ".join(passed_over),
                "restore it from a copy, or move it away to go on from an older one",
                str(self.folder),
            )
        return None

    @property
    def _went_back(self) -> Path:
        return self.folder / WENT_BACK

    def _wanted_step(self) -> int:
        """`load_step`; but -1 where this run has already gone back to it and has saved since, so that a job that is
        started again with the same command continues and loses nothing. The main rank's answer counts."""
        wanted = self.settings.load_step
        if wanted == -1:
            return -1
        try:
            before = json.loads(self._went_back.read_text())["load_step"]
        except (OSError, ValueError, KeyError):
            return wanted
        newest = max(manifest.checkpoints(self.folder), default=-1)
        if before != wanted or newest <= wanted:
            return wanted
        self._notes.append(
            f"the run went back to checkpoint.load_step {wanted} at an earlier start, has come to step {newest} "
            f"since, and goes on from there; delete {self._went_back} to go back again"
        )
        return -1

    def _problem(self, path: Path) -> str | None:
        """What is wrong with the checkpoint; the same answer on every rank. Each hashes a part of the files."""
        seen = self._from_main(_fingerprint(path))
        own = _fingerprint(path)
        reason = manifest.problem(path, part=(self.world.rank, self.world.size))
        answers = self._together(lambda: (own == seen, reason))
        blind = [rank for rank, (same, _) in enumerate(answers) if not same]
        if blind:
            raise CheckpointError(
                f"rank {blind[0]} does not see the manifest of {path.name} that rank 0 sees",
                "all ranks need one shared folder, and a network file system may need a moment",
                str(path),
            )
        reasons = [reason for _, reason in answers if reason]
        if unread := next((reason for reason in reasons if isinstance(reason, manifest.Unread)), None):
            raise CheckpointError(
                f"{path.name} may be whole and cannot be read: {unread}",
                "give this user the right to read it, or move it away to go on from an older one",
                str(path),
            )
        return next(iter(reasons), None)

    def begin(self) -> None:
        """Renames later checkpoints where the run goes back. To be called after everything is loaded, so that a start
        that is refused changes nothing."""
        if not (self.goes_back and self.world.is_main):
            return
        for later, path in manifest.checkpoints(self.folder).items():
            if later > self.saved_step:
                target = manifest.set_aside(path)
                self._notes.append(
                    f"{path.name} is now {target.name}: the run goes back to step {self.saved_step}; to delete it: "
                    f"python -m titan_fast.checkpoint prune {shlex.quote(str(self.folder))} --superseded"
                )
        self._went_back.write_text(json.dumps({"load_step": self.saved_step}))

    def _from_main(self, value: T) -> T:
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


def _global_batch_size(tables: dict[str, dict[str, Any]], world_size: int) -> int:
    """Sequences per optimizer step and per validation batch, for a config as tables on `world_size` processes."""
    training = tables["training"]
    if (asked := training["global_batch_size"]) != -1:
        return asked
    return _sequences_per_pass(tables, world_size)


def _sequences_per_pass(tables: dict[str, dict[str, Any]], world_size: int) -> int:
    """Over all devices, for a config as tables on `world_size` processes."""
    return tables["training"]["local_batch_size"] * world_size // tables["parallelism"]["tensor_parallel_degree"]


def _keeps(sequences: int, tables: dict[str, dict[str, Any]], world_size: int) -> str:
    """The settings with which `world_size` processes train on `sequences` per step."""
    batch = tables["training"]["local_batch_size"]
    ranks = _sequences_per_pass(tables, world_size) // batch
    fitting = [each for each in range(1, batch + 1) if sequences % (each * ranks) == 0]
    if not fitting:
        return f"{ranks} ranks cannot share {sequences} sequences out evenly"
    smaller = f" --training.local_batch_size {fitting[-1]}" if fitting[-1] != batch else ""
    return f"--training.global_batch_size {sequences}{smaller} keeps it"


def _fingerprint(path: Path) -> str:
    try:
        return manifest.sha256(path / manifest.NAME) if (path / manifest.NAME).is_file() else "no manifest"
    except OSError:
        return "no manifest"


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_rng_state(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
