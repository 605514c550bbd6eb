"""The kernel suite: `pytest benchmarks --benchmark-only --benchmark-json=benchmarks/results/<name>.json`.

Each test replays to pytest-benchmark what was measured on the device: all providers of a case are checked and timed
together, in rotated order, when the first is needed. `python -m benchmarks.kernel_plan` lists the parts of a run, with
the minutes planned for each; `python -m benchmarks.plot` merges their results.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config

# In a rehearsal the interpreter must be enabled before kernels are defined, so they are imported inside the tests.


class Replay:
    """A clock for pytest-benchmark that advances only by measured times."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, benchmark: Any, seconds: tuple[float, ...]) -> None:
        remaining = iter(seconds)

        def advance() -> None:
            self.now += next(remaining)

        benchmark.pedantic(advance, rounds=len(seconds), iterations=1)


CLOCK = Replay()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    smoke = bool(metafunc.config.getoption("--smoke"))
    if "cell" in metafunc.fixturenames:
        from benchmarks.measurement import directions
        from benchmarks.providers import providers
        from benchmarks.shapes import cases

        cells = [
            pytest.param((case, direction, provider.name), id=f"{case.key}-{direction}-{provider.name}")
            for case in cases(smoke)
            for direction in directions(case)
            for provider in providers(case)
        ]
        metafunc.parametrize("cell", cells)
    if "host_call" in metafunc.fixturenames:
        from benchmarks.host_calls import HOST_CALLS

        metafunc.parametrize("host_call", HOST_CALLS, ids=str)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cpu" if request.config.getoption("--smoke") else "cuda")


@pytest.fixture(scope="session")
def copy_speed(device: torch.device) -> Callable[..., float]:
    """`copy_bandwidth`, measured once for each number of bytes."""
    from benchmarks.timing import copy_bandwidth

    return functools.cache(lambda moved=None: copy_bandwidth(device, moved))


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest, device: torch.device) -> Callable[..., Any]:
    """Measures a case when it is first needed: the providers whose tests were selected, and those that they are
    compared with. Only the last case is kept; one that was interrupted is not tried again."""
    from benchmarks.measurement import EFFORT, DeviceLost, measure_case

    smoke = bool(request.config.getoption("--smoke"))
    selected: dict[str, set[str]] = {}
    for item in request.session.items:
        cell: Any = item.callspec.params.get("cell") if hasattr(item, "callspec") else None  # pyright: ignore
        if cell is not None:
            case, _, provider = cell
            selected.setdefault(case.key, set()).add(provider)
    last: dict[str, Any] = {}

    def get(case: Any) -> Any:
        if case.key not in last:
            last.clear()
            last[case.key] = None
            passes, calls = (1, 1) if smoke else EFFORT[case.context]
            backend = "aot_eager" if smoke else "inductor"
            # A backward pass that donates buffers, as in training, cannot be run twice.
            with functorch_config.patch(donated_buffer=False):
                try:
                    last[case.key] = measure_case(case, selected[case.key], device, backend, passes, calls)
                except DeviceLost as error:
                    pytest.exit(f"the device no longer responds; start again from {case.key} on. {error}", returncode=1)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if last[case.key] is None:
            pytest.fail("measuring this case was interrupted by an earlier test's time limit")
        return last[case.key]

    return get


@pytest.mark.timeout(600)
@pytest.mark.benchmark(timer=CLOCK)
def test_operator(
    benchmark: Any, cell: tuple[Any, str, str], measured: Callable[..., Any], copy_speed: Callable[..., float]
) -> None:
    from benchmarks.contests import contests
    from benchmarks.providers import providers
    from benchmarks.shapes import DTYPE

    case, direction, name = cell
    of_case = measured(case)
    found = of_case.providers[name]
    provider = next(p for p in providers(case) if p.name == name)
    if found.wrong or (found.failed and not provider.is_peer):
        pytest.fail(f"{name}: {found.problem}", pytrace=False)
    if found.problem:
        pytest.skip(f"{name}: {found.problem}")
    samples = found.samples[direction]
    benchmark.group = f"{case.key}-{direction}"
    benchmark.extra_info.update(
        op=case.op,
        model=case.model.name,
        tensor_parallel=case.tensor_parallel,
        tokens=case.tokens,
        context=case.context,
        dtype=DTYPE,
        direction=direction,
        provider=name,
        provider_version=provider.version,
        median_us=samples.median * 1e6,
        p10_us=samples.quantile(0.1) * 1e6,
        p90_us=samples.quantile(0.9) * 1e6,
        queued=samples.queued,
        against={
            rival: {"slower_by_us": d.seconds * 1e6, "error_us": d.error * 1e6, "queued": d.queued}
            for rival, d in found.against[direction].items()
        },
        decides=[asdict(contest) for contest in contests(case, name)],
        peak_bytes=found.peak_bytes,
        copy_gb_per_s=copy_speed() / 1e9,
        case_seconds=of_case.seconds,
    )
    if case.traffic is not None:
        moved = case.traffic.backward if direction == "backward" else case.traffic.forward
        speed = moved / samples.median
        benchmark.extra_info.update(
            bytes=moved,
            gb_per_s=speed / 1e9,
            percent_of_copy=100 * speed / copy_speed(),
            percent_of_equal_copy=100 * speed / copy_speed(moved),
        )
    CLOCK.play(benchmark, samples.seconds)


@pytest.mark.benchmark(timer=CLOCK)
def test_host_overhead(benchmark: Any, host_call: Any, request: pytest.FixtureRequest, device: torch.device) -> None:
    """Host microseconds of one eager call, for which the GPU must not wait; the aim is below 30."""
    from benchmarks.timing import host_seconds

    smoke = bool(request.config.getoption("--smoke"))
    call = host_call.bind(device)
    host_seconds(call, device, 2 if smoke else 50)
    seconds = host_seconds(call, device, 3 if smoke else 500)
    ordered = sorted(seconds)
    benchmark.group = f"host-{host_call.op}-{host_call.direction}"
    benchmark.extra_info.update(
        op=host_call.op,
        context="host",
        provider=host_call.provider,
        direction=host_call.direction,
        variant=host_call.variant,
        median_us=ordered[len(ordered) // 2] * 1e6,
    )
    CLOCK.play(benchmark, tuple(seconds))
