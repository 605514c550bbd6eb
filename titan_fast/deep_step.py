"""The step of a deep model from the steps of two shallow ones.

All blocks but the first and the last ones do the same, so the middle's operators are repeated, and memory grows by the
same amount with each block. That is checked, not assumed: a third depth is counted too, and must agree with what the
first two predict, except for the allocator's rounding of many small pieces.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from titan_fast.config import ActivationCheckpoint
from titan_fast.memory_count import PARTS, Peak
from titan_fast.step_record import Operation, Segment

CountDepth = Callable[[int], list[Segment]]


@dataclass(frozen=True)
class DeepStep:
    """The segments of a step, in order, and how they were found."""

    segments: list[Segment]
    how: str

    @property
    def peak(self) -> Segment:
        return max(self.segments, key=lambda segment: segment.peak.total)


def period(settings: ActivationCheckpoint) -> int:
    """After how many blocks the pattern repeats: N, where every Nth one is recomputed."""
    option = settings.selective_ac_option
    return int(option) if settings.mode == "selective" and option.isdecimal() else 1


def deep_step(
    count: CountDepth, n_layers: int, repeats_after: int = 1, whole: bool = False, check: bool = True
) -> DeepStep:
    """The step of `n_layers` blocks. `count` records a step of a given depth; `whole` counts all blocks; without
    `check` the third depth is left out, and with it a third of the time."""
    shallow = 3 * repeats_after + n_layers % repeats_after
    if whole or n_layers <= shallow + 2 * repeats_after:
        return DeepStep(count(n_layers), f"all {n_layers} blocks counted")
    depths = [shallow, shallow + repeats_after, shallow + 2 * repeats_after]
    first, second = count(depths[0]), count(depths[1])
    if check and not _agree(extrapolate(first, second, depths[0], repeats_after, depths[2]), count(depths[2])):
        return DeepStep(count(n_layers), f"all {n_layers} blocks counted: the first ones are not alike")
    segments = extrapolate(first, second, depths[0], repeats_after, n_layers)
    how = f"{depths[0]} and {depths[1]} blocks counted and continued to {n_layers}"
    return DeepStep(segments, f"{how}; {depths[2]} blocks, counted too, agree with that" if check else how)


def _agree(predicted: list[Segment], counted: list[Segment]) -> bool:
    if len(predicted) != len(counted):
        return False
    for ours, theirs in zip(predicted, counted, strict=True):
        same_place = (ours.phase, ours.unit, ours.batch) == (theirs.phase, theirs.unit, theirs.batch)
        if not same_place or not _close(ours.peak.total, theirs.peak.total):
            return False
        if not _close(sum(o.nbytes for o in ours.operations), sum(o.nbytes for o in theirs.operations)):
            return False
    return True


def _close(ours: float, theirs: float) -> bool:
    return abs(ours - theirs) <= TOLERANCE * theirs + ROUNDING


TOLERANCE, ROUNDING = 1e-5, 65_536.0
"""How far the third depth may be from what the first two predict: a fraction, and bytes."""


def _block(segment: Segment) -> int | None:
    return int(segment.unit.removeprefix("block ")) if segment.unit.startswith("block ") else None


def extrapolate(first: list[Segment], second: list[Segment], depth: int, step: int, n_layers: int) -> list[Segment]:
    """The segments at depth `n_layers` from those at `depth` and at `depth + step`."""
    more = (n_layers - depth - step) // step
    grown: list[Segment] = []
    run: list[Segment] = []  # a stretch of blocks, forward or backward
    for segment in second:
        if _block(segment) is not None:
            run.append(segment)
            continue
        grown += _grown_run(first, run, depth, step, n_layers)
        run = []
        grown.append(_grown(_twin(first, segment, 0), segment, more))
    return grown + _grown_run(first, run, depth, step, n_layers)


def _twin(first: list[Segment], segment: Segment, shift: int) -> Segment:
    """The same place in the shallower step, where blocks counted from the end have a number lower by `shift`."""
    block = _block(segment)
    unit = segment.unit if block is None else f"block {block - shift}"
    key = (segment.phase, unit, segment.batch)
    return next(other for other in first if (other.phase, other.unit, other.batch) == key)


def _grown_run(first: list[Segment], run: list[Segment], depth: int, step: int, n_layers: int) -> list[Segment]:
    """The blocks of one direction: the first and the last ones as they are, and the middle repeated."""
    if not run:
        return []
    deep, extra = depth + step, n_layers - depth - step
    more, by_number = extra // step, {_block(segment): segment for segment in run}
    head = {j: _grown(_twin(first, by_number[j], 0), by_number[j], more) for j in range(2 * step)}
    tail = {j + extra: _grown(_twin(first, by_number[j], step), by_number[j], more) for j in range(2 * step, deep)}
    ends = head | tail
    found: list[Segment] = []
    for number in range(n_layers):
        if number in ends:
            grown = ends[number]
        else:
            low = step + number % step
            high = low + extra + step
            grown = _between(head[low], tail[high], (number - low) / (high - low))
        found.append(dataclasses.replace(grown, unit=f"block {number}"))
    return found if run[0].phase == "forward" else found[::-1]


def _between(low: Segment, high: Segment, part: float) -> Segment:
    parts = {name: _mix(low.peak.parts[name], high.peak.parts[name], part) for name in PARTS}
    return dataclasses.replace(low, peak=Peak(_mix(low.peak.total, high.peak.total, part), parts))


def _mix(low: float, high: float, part: float) -> float:
    return low + part * (high - low)


def _grown(shallow: Segment, deep: Segment, more: int) -> Segment:
    """`deep`, plus `more` times its difference from `shallow`."""
    parts = {name: _mix(shallow.peak.parts[name], deep.peak.parts[name], more + 1) for name in PARTS}
    total = _mix(shallow.peak.total, deep.peak.total, more + 1)
    return dataclasses.replace(deep, peak=Peak(total, parts), operations=_grown_operations(shallow, deep, more))


def _grown_operations(shallow: Segment, deep: Segment, more: int) -> list[Operation]:
    """The operators of `deep`, extrapolated. Where their number grows with the depth, as the optimizer's over all
    parameters does, those of one kind are summed up."""
    if [o.nbytes for o in shallow.operations] == [o.nbytes for o in deep.operations]:
        return deep.operations
    if len(shallow.operations) == len(deep.operations):
        pairs = zip(shallow.operations, deep.operations, strict=True)
        return [dataclasses.replace(new, nbytes=_mix(old.nbytes, new.nbytes, more + 1)) for old, new in pairs]
    kinds = dict.fromkeys((o.kind, o.group, o.recomputed, o.compiled) for o in deep.operations)
    return [_grown_sum(shallow.operations, deep.operations, key, more) for key in kinds]


def _grown_sum(shallow: list[Operation], deep: list[Operation], key: tuple, more: int) -> Operation:
    def of_kind(operations: list[Operation]) -> list[Operation]:
        return [o for o in operations if (o.kind, o.group, o.recomputed, o.compiled) == key]

    old, new = of_kind(shallow), of_kind(deep)
    nbytes = _mix(sum(o.nbytes for o in old), sum(o.nbytes for o in new), more + 1)
    kernels = _mix(sum(o.kernels for o in old), sum(o.kernels for o in new), more + 1)
    return dataclasses.replace(new[0], nbytes=nbytes, kernels=kernels)
