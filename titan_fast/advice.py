"""What to change: all combinations of batch, recomputation, tensor parallelism and resharding that fit; and how fast a
config is on more GPUs."""

import dataclasses
import itertools
import math
import multiprocessing
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from titan_fast.config import Config
from titan_fast.errors import ConfigError, TitanFastError
from titan_fast.estimate import SIZES, Plan, check, estimate

_RECOMPUTE: tuple[dict[str, str], ...] = (
    {"mode": "none"},
    {"mode": "pointwise"},
    {"mode": "selective", "selective_ac_option": "op"},
    {"mode": "selective", "selective_ac_option": "2"},
    {"mode": "selective", "selective_ac_option": "attention"},
    {"mode": "full"},
)
_WORTH_DOUBLING = 1.01
"""How many times as fast as the best of half its size or less a batch must be for a larger one to be tried."""
COSTS_NOTHING = 0.05
"""Fraction of the step above which communication counts as no longer hidden."""


@dataclass(frozen=True)
class Option:
    """One combination that fits."""

    changes: dict[str, Any]
    """The trainer's keys and their values."""
    tokens_per_second: float
    mfu_titan: float
    device_memory_gib: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """`config` with other values for some keys."""
    tables: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        table, _, key = name.partition(".")
        tables.setdefault(table, {})[key] = value
    fresh = {table: dataclasses.replace(getattr(config, table), **keys) for table, keys in tables.items()}
    return dataclasses.replace(config, **fresh)


def search(
    plan: Plan, processes: int = 1, tell: Callable[[str], None] = lambda text: None
) -> tuple[list[Option], list[str]]:
    """The combinations of local batch, recomputation, tensor-parallel degree and resharding that fit, best tokens/s
    first; and each reason, once, for which the trainer would refuse others.

    Batches are doubled until one does not fit or brings less than 1%; the config's own is counted too. Keeping gathered
    weights is not tried where nothing is gathered. `tell` is given lines of progress.
    """
    series = [
        (degree, recompute, reshard)
        for degree, recompute in itertools.product(_tensor_degrees(plan), _RECOMPUTE)
        for reshard in (("default", "never") if degree < plan.gpus else ("default",))
    ]
    if processes == 1:
        return _best_first(_batches(plan, *one) for one in series)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(series)), context, _end_when_interrupted) as pool:
        try:
            futures = [pool.submit(_batches, plan, *one) for one in series]
            for number, _ in enumerate(as_completed(futures), 1):
                tell(f"search: {number} of {len(series)} series of batches counted")
            return _best_first(future.result() for future in futures)
        except BrokenProcessPool as error:
            raise TitanFastError(
                "a process that counts batches was killed, perhaps out of memory: each needs half a gigabyte",
                "search on fewer processors, with `taskset -c 0-3` before the command",
            ) from error
        except BaseException:
            for worker in multiprocessing.active_children():  # else the pool waits for all that were begun
                worker.terminate()
            raise


def _end_when_interrupted() -> None:
    """A worker ends silently, without a traceback. Not if the planner ignores interrupts."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _best_first(series: Iterable[tuple[list[Option], str]]) -> tuple[list[Option], list[str]]:
    found, refusals = zip(*series, strict=True)
    options = sorted(itertools.chain.from_iterable(found), key=lambda option: -option.tokens_per_second)
    return options, list(dict.fromkeys(filter(None, refusals)))


def _tensor_degrees(plan: Plan) -> list[int]:
    return [degree for degree in (1, 2, 4, 8) if degree <= min(plan.network.gpus_per_node, plan.gpus)]


def _batches(plan: Plan, degree: int, recompute: dict[str, str], reshard: str) -> tuple[list[Option], str]:
    """A series of batches, and the refusal that ended it, or ""."""
    parallelism, own = plan.config.parallelism, plan.config.training.local_batch_size
    changes: dict[str, Any] = {
        "parallelism.tensor_parallel_degree": degree,
        "parallelism.fsdp_reshard_after_forward": reshard,
        **{f"activation_checkpoint.{key}": value for key, value in recompute.items()},
    }
    if parallelism.data_parallel_shard_degree != -1:
        changes["parallelism.data_parallel_shard_degree"] = -1  # as many as the tensor-parallel degree leaves
    if degree > 1 and parallelism.fsdp_wide_gradients:
        changes["parallelism.fsdp_wide_gradients"] = None  # they exclude each other
    plan = dataclasses.replace(plan, config=changed(plan.config, changes))
    found: dict[int, Option] = {}
    ended = False
    try:
        for batch in _local_batches(plan):
            if ended and batch != own:
                continue
            with_batch = {"training.local_batch_size": batch, **changes}
            answer = estimate(dataclasses.replace(plan, config=changed(plan.config, with_batch)), check_depth=False)
            if not answer.fits:
                break
            found[batch] = Option(
                with_batch, answer.tokens_per_second, answer.mfu()["titan"], answer.device_memory / 2**30
            )
            half = [option.tokens_per_second for smaller, option in found.items() if 2 * smaller <= batch]
            ended |= bool(half) and answer.tokens_per_second <= _WORTH_DOUBLING * max(half)
    except ConfigError as refusal:
        return list(found.values()), str(refusal)
    return list(found.values()), ""


def _local_batches(plan: Plan) -> list[int]:
    """Powers of two, or if the global batch is set the next lower numbers that divide it; and the config's own."""
    training, doubled = plan.config.training, [2**doublings for doublings in range(21)]
    if training.global_batch_size == -1:
        return sorted({*doubled, training.local_batch_size})
    each = training.global_batch_size // plan.degrees.data
    small = [batch for batch in range(1, math.isqrt(each) + 1) if each % batch == 0]
    divisors = {1, *small, *(each // batch for batch in small)}  # 1 is refused where the degree divides nothing
    return sorted(
        {max(d for d in divisors if d <= limit) for limit in doubled} | divisors & {training.local_batch_size}
    )


@dataclass(frozen=True)
class ScalingPoint:
    """A config on some number of GPUs. `kind`: FSDP (all GPUs hold one copy) or HSDP."""

    kind: str
    gpus: int
    replicate: int
    shard: int
    tokens_per_second: float
    mfu_titan: float
    device_memory_gib: float
    fits: bool
    hidden: float
    """Fraction of FSDP's communication that is hidden behind computation."""
    communication: float
    """Fraction of the step that communication costs (StepTime.communication)."""


def scaling(plan: Plan, sizes: tuple[int, ...] = SIZES) -> list[ScalingPoint]:
    """Per-GPU speed of `plan`'s config, batch per GPU unchanged, with one copy over all GPUs, and with copies over the
    fewest nodes, a power of two, in which one fits. `plan.gpus` is ignored."""
    points = []
    for size in sizes:
        points.append(_point(plan, "FSDP", size, 1))
        points.append(_smallest_copy(plan, size))
    return points


def check_scaling(plan: Plan, sizes: tuple[int, ...] = SIZES) -> None:
    """ConfigError where `plan`'s config cannot run on one of `sizes`."""
    for size in sizes:
        try:
            for copies in (1, _most_copies(plan, size)):
                check(_on(plan, size, copies))
        except ConfigError as error:
            what = f"--scaling plans for {size} GPUs, where this is refused: {error.what}"
            raise ConfigError(what, "change that, or leave --scaling out", error.where) from error


def _on(plan: Plan, size: int, copies: int) -> Plan:
    changes = {
        "parallelism.data_parallel_replicate_degree": copies,
        "parallelism.data_parallel_shard_degree": -1,
        "training.global_batch_size": -1,
    }
    return dataclasses.replace(plan, config=changed(plan.config, changes), gpus=size)


def _most_copies(plan: Plan, size: int) -> int:
    return max(1, size // max(plan.network.gpus_per_node, plan.config.parallelism.tensor_parallel_degree))


def _smallest_copy(plan: Plan, size: int) -> ScalingPoint:
    copies = _most_copies(plan, size)
    point = _point(plan, "HSDP", size, copies)
    while not point.fits and copies > 1:
        copies //= 2
        point = _point(plan, "HSDP", size, copies)
    return point


def _point(plan: Plan, kind: str, size: int, copies: int) -> ScalingPoint:
    answer = estimate(_on(plan, size, copies))
    degrees = answer.plan.degrees
    return ScalingPoint(
        kind, size, degrees.replicate, degrees.shard, answer.tokens_per_second, answer.mfu()["titan"],
        answer.device_memory / 2**30, answer.fits, answer.time.hidden, answer.time.communication,
    )  # fmt: skip
