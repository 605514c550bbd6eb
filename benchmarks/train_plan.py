"""How long the end-to-end benchmark should take, from the device's limits or those assumed for an H100."""

from benchmarks.least_step import ASSUMED_H100, Limits, least_step
from benchmarks.step_profile import PROFILED_STEPS
from benchmarks.step_timing import FULL, LATER_WARM_UP, SEARCH, SLOW, SLOW_STEP_SECONDS
from benchmarks.train_cells import chosen_cells
from benchmarks.workloads import Cell, Variant, config_of, shape_of

# The least step's fraction of a real one (our lowest on an H100), and the assumed cost of a process, a variant and a
# trace.
EFFICIENCY = {"compiled": 0.85, "eager": 0.57}
START_SECONDS, COMPILE_SECONDS, EAGER_SECONDS, TRACE_SECONDS = 15.0, 12.0, 1.0, 2.0
LIMITS_SECONDS = 95.0
"""The start, 41 matrices with half a second of load before each (42 s), 10 in float8 by two recipes, and 9 attention
calls by three backends."""
LAUNCH_SECONDS = 170.0
"""For `launch`: text, a start up to step 10, which compiles, and one up to step 70."""


def estimated_seconds(cell: Cell, known: Limits) -> float:
    """How long the cell should take with cold compile caches."""
    total = START_SECONDS + cell.extra_seconds
    for variant in cell.variants:
        step, compiled = _step_seconds(cell, variant, known)
        steps = _steps(cell, step, is_first=variant is cell.variants[0])
        total += steps * step + (COMPILE_SECONDS if compiled else EAGER_SECONDS)
        total += 0.0 if cell.parity_steps or cell.searches else PROFILED_STEPS * step + TRACE_SECONDS
    return total


def _step_seconds(cell: Cell, variant: Variant, known: Limits) -> tuple[float, bool]:
    config, shape = config_of(cell.workload, variant.options, False), shape_of(cell.workload, False)
    kind = "compiled" if config.compile.enable else "eager"
    return least_step(known, config, shape, cell.workload.world)["total"] / EFFICIENCY[kind], config.compile.enable


def _steps(cell: Cell, step: float, is_first: bool) -> int:
    if cell.parity_steps:
        return cell.parity_steps
    if cell.searches:
        return SEARCH.warm_up + SEARCH.timed
    length = SLOW if step > SLOW_STEP_SECONDS else FULL
    warm_up = length.warm_up if is_first else min(length.warm_up, LATER_WARM_UP)
    turns = len(cell.variants) - 1 if is_first else 0  # the first runs beside each of the others' first blocks
    blocks = max(-(-length.timed // length.block), turns)
    return warm_up + blocks * (length.block + (1 if length is FULL else 0))


def plan(
    parts: tuple[str, ...], known: Limits | None, device: str = "", only: str = "", per_part: int | None = None
) -> list[str]:
    """Lines that say what would run. known: the limits of `device`, if any. only, per_part: see `chosen_cells`."""
    used = known or ASSUMED_H100
    rates = f"the limits measured on {device}" if known else "rates assumed for an H100 SXM"
    unknown = f"no limits of {device or 'this machine'} are known: " * (known is None)
    lines = [f"{unknown}estimates from {rates}, caches cold"]
    whole = 0.0
    without_cells = {"limits": LIMITS_SECONDS, "launch": LAUNCH_SECONDS}
    for part in parts:
        own = chosen_cells((part,), only, per_part)
        estimates = [estimated_seconds(cell, used) for cell in own]
        seconds = without_cells.get(part, sum(estimates))
        whole += seconds
        lines.append(f"{part:<16} {len(own):>3} processes  {seconds / 60:5.1f} min")
        lines += [f"    {cell.name:<72} {s:4.0f} s" for cell, s in zip(own, estimates, strict=True)]
    return [*lines, f"{'all':<16} {'':>13}  {whole / 60:5.1f} min"]
