"""The kernel suite: `pytest benchmarks --benchmark-only --benchmark-json=benchmarks/results/<name>.json`.

Each test replays to pytest-benchmark what was measured on the device: all providers of a case are checked and timed
together, in rotated order, when the first of them is asked for. `-k llama3_8b`, `-k "swiglu and alone"` and the like
run parts, whose results `python -m benchmarks.plot` merges.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config

# In a rehearsal the interpreter must be on before kernels are defined, so what imports them is imported in the tests.


class Replay:
    """A clock for pytest-benchmark that stands still except for what was measured."""

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
    if "cell" not in metafunc.fixturenames:
        return
    from benchmarks.measurement import directions
    from benchmarks.providers import providers
    from benchmarks.shapes import cases

    cells = [
        pytest.param((case, direction, provider.name), id=f"{case.key}-{direction}-{provider.name}")
        for case in cases(bool(metafunc.config.getoption("--smoke")))
        for direction in directions(case)
        for provider in providers(case)
    ]
    metafunc.parametrize("cell", cells)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cpu" if request.config.getoption("--smoke") else "cuda")


@pytest.fixture(scope="session")
def copy_speed(device: torch.device) -> float:
    from benchmarks.timing import copy_bandwidth

    return copy_bandwidth(device)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest, device: torch.device) -> Callable[..., Any]:
    """Measures a case when it is first asked for: the providers whose tests were selected, and no others. Only the last
    case is kept."""
    from benchmarks.measurement import measure_case

    smoke = bool(request.config.getoption("--smoke"))
    selected: dict[str, set[str]] = {}
    for item in request.session.items:
        cell: Any = item.callspec.params.get("cell") if hasattr(item, "callspec") else None  # pyright: ignore
        if cell is not None:
            case, _, provider = cell
            selected.setdefault(case.key, set()).add(provider)
    last: dict[str, Any] = {}

    def get(case: Any, provider: str) -> Any:
        if case.key not in last:
            last.clear()
            calls = 1 if smoke else 10 if case.context == "alone" else 4
            # Buffers that the backward pass gives away cannot be used by a second one; training gives them away.
            with functorch_config.patch(donated_buffer=False):
                backend = "aot_eager" if smoke else "inductor"
                passes = 1 if smoke else 5
                last[case.key] = measure_case(case, selected[case.key], device, backend, passes, calls)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return last[case.key][provider]

    return get


@pytest.mark.timeout(600)
@pytest.mark.benchmark(timer=CLOCK)
def test_operator(benchmark: Any, cell: tuple[Any, str, str], measured: Callable[..., Any], copy_speed: float) -> None:
    case, direction, provider = cell
    found = measured(case, provider)
    if found.wrong:
        pytest.fail(f"{provider} is wrong: {found.problem}")
    if found.problem:
        pytest.skip(found.problem)
    samples = found.samples[direction]
    benchmark.group = f"{case.key}-{direction}"
    benchmark.extra_info.update(
        op=case.op,
        model=case.model.name,
        tensor_parallel=case.tensor_parallel,
        tokens=case.tokens,
        context=case.context,
        direction=direction,
        provider=provider,
        switch=case.switch,
        median_us=samples.median * 1e6,
        p10_us=samples.quantile(0.1) * 1e6,
        p90_us=samples.quantile(0.9) * 1e6,
        queued=samples.queued,
        peak_bytes=found.peak_bytes,
        copy_gb_per_s=copy_speed / 1e9,
    )
    if case.traffic is not None:
        moved = case.traffic.backward if direction == "backward" else case.traffic.forward
        speed = moved / samples.median
        benchmark.extra_info.update(bytes=moved, gb_per_s=speed / 1e9, percent_of_copy=100 * speed / copy_speed)
    CLOCK.play(benchmark, samples.seconds)


def _host_calls() -> dict[str, Callable[[torch.device], Callable[[], object]]]:
    """Name -> a call at a size where the kernel is nothing: what is left is Python and the dispatcher."""
    import titan_kernels
    from titan_kernels import reference
    from titan_kernels.rms_norm import rms_norm_op

    def tensors(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.randn(4, 128, device=device, dtype=torch.bfloat16, requires_grad=True),
            torch.ones(128, device=device, dtype=torch.bfloat16, requires_grad=True),
        )

    def of(function: Callable[..., object]) -> Callable[[torch.device], Callable[[], object]]:
        def bind(device: torch.device) -> Callable[[], object]:
            x, weight = tensors(device)
            return lambda: function(x, weight)

        return bind

    def swiglu(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return titan_kernels.swiglu(x, x)

    def without_autograd(x: torch.Tensor, weight: torch.Tensor) -> object:
        with torch.no_grad():
            return titan_kernels.rms_norm(x, weight, 1e-5)

    return {
        "rms_norm": of(lambda x, weight: titan_kernels.rms_norm(x, weight, 1e-5)),
        "rms_norm-no_grad": of(without_autograd),
        "rms_norm-custom_op": of(lambda x, weight: rms_norm_op(x, weight, 1e-5)),
        "rms_norm-reference": of(lambda x, weight: reference.rms_norm(x, weight, 1e-5)),
        "swiglu": of(swiglu),
        "swiglu-reference": of(lambda x, _: reference.swiglu(x, x)),
    }


HOST_CALLS = ("rms_norm", "rms_norm-no_grad", "rms_norm-custom_op", "rms_norm-reference", "swiglu", "swiglu-reference")


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("name", HOST_CALLS)
def test_host_overhead(benchmark: Any, name: str, request: pytest.FixtureRequest, device: torch.device) -> None:
    """Host microseconds of one eager call, which the GPU must not wait for: below 30 is the aim."""
    from benchmarks.timing import host_seconds

    smoke = bool(request.config.getoption("--smoke"))
    call = _host_calls()[name](device)
    host_seconds(call, device, 2 if smoke else 50)
    seconds = host_seconds(call, device, 3 if smoke else 500)
    ordered = sorted(seconds)
    benchmark.group = "host_overhead"
    benchmark.extra_info.update(
        op=name, context="host", provider=name, direction="forward", median_us=ordered[len(ordered) // 2] * 1e6
    )
    CLOCK.play(benchmark, tuple(seconds))
