"""The kernel suite from end to end without a GPU: it detects wrong and failing kernels, and times what a run uses."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import titan_kernels
import torch
import torch._functorch.config as functorch_config
from titan_kernels import reference
from titan_kernels.choice import SHAPE_KEYS, VARIANTS, Table
from titan_kernels.traffic import TRAFFIC
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import kernel_plan, measurement, providers, test_kernels, timing
from benchmarks.contests import contests
from benchmarks.measurement import DeviceLost, Measured, MeasuredCase, directions, gradients_like, measure_case
from benchmarks.shapes import OPERATORS, Case, cases
from titan_fast import compilation
from titan_fast.config import Loss
from titan_fast.flavors import FLAVORS
from titan_fast.ops import Workload

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are stood in for on the CPU")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    # pytest-benchmark times nothing if it believes that tests run in parallel.
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_XDIST_WORKER"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True
    )


@pytest.mark.slow
def test_suite_then_plot(tmp_path: Path) -> None:
    results, picture, measured = tmp_path / "kernels.json", tmp_path / "bandwidth-cpu.png", tmp_path / "measured"
    options = ("--benchmark-only", "--smoke", f"--benchmark-json={results}", "-q", "-p", "no:cacheprovider")
    suite = run("-m", "pytest", "benchmarks", *options)
    assert suite.returncode == 0, suite.stdout[-3000:]
    benchmarks = json.loads(results.read_text())["benchmarks"]
    infos = [benchmark["extra_info"] for benchmark in benchmarks]
    assert {info["op"] for info in infos} >= set(OPERATORS)
    assert all(info["median_us"] > 0 for info in infos)
    measured_tests = {b["name"] for b in benchmarks if b["name"].startswith("test_operator")}
    planned = {test: provider for case in cases(smoke=True) for test, provider in kernel_plan.cells(case)}
    needs_gpu = {test for test, provider in planned.items() if provider.name in ("liger", "quack", "auto")}
    assert measured_tests | needs_gpu == planned.keys()

    drawn = run("-m", "benchmarks.plot", str(results), "--pictures", str(tmp_path), "--measured", str(measured))
    assert drawn.returncode == 0, drawn.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = Table.from_json((measured / "cpu.json").read_text())
    assert {(cell.op, cell.compiled) for cell in table.cells} == {(op, c) for op in SHAPE_KEYS for c in (True, False)}
    assert {cell.variant for cell in table.cells} == {"", *VARIANTS}
    assert "not decided" not in drawn.stdout
    refused = run("-m", "benchmarks.plot", str(results))
    assert "must not decide anything" in refused.stderr


def test_without_a_gpu_and_without_smoke_it_skips() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = run("-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-k", "swiglu and llama3_8b and alone")
    assert "needs a GPU, and torch sees none here" in result.stdout
    assert " passed" not in result.stdout


def swiglu_case() -> Case:
    return next(case for case in cases(smoke=True) if case.op == "swiglu" and case.context == "alone")


def wrong_result(gate: Tensor, up: Tensor) -> Tensor:
    """With one wrong row."""
    product = reference.swiglu(gate, up)
    return torch.cat((product[:1] * 1.1, product[1:]))


def wrong_gradient(gate: Tensor, up: Tensor) -> Tensor:
    return reference.swiglu(gate, up * 1.05 - up.detach() * 0.05)


def measured(case: Case, names: set[str], **changes: Any) -> dict[str, Measured]:
    arguments: dict[str, Any] = {"device": CPU, "backend": "aot_eager", "passes": 1, "calls": 1, **changes}
    return measure_case(case, names, **arguments).providers


def smoke_case(op: str, degree: int = 1) -> Case:
    return next(case for case in cases(smoke=True) if (case.op, case.tensor_parallel) == (op, degree))


@on_cpu
@pytest.mark.parametrize(
    ("operator", "wrong"), [(wrong_result, True), (wrong_gradient, True), (reference.swiglu, False)]
)
def test_a_wrong_provider_is_not_timed(operator: Any, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(titan_kernels, "swiglu", operator)
    found = measured(swiglu_case(), {"ours", "eager"})
    assert found["ours"].failed == found["ours"].wrong == found["ours"].problem.startswith("wrong: ") == wrong
    assert bool(found["ours"].samples) != wrong
    assert found["eager"].samples.keys() == {"forward", "backward"}


def raises_at(call: int) -> Any:
    """swiglu that fails in its `call`-th call: the first is the check, later ones are timed."""
    calls = []

    def operator(gate: Tensor, up: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return reference.swiglu(gate, up)

    return operator


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        return reference.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 1 GiB")


@on_cpu
@pytest.mark.parametrize("operator", [raises_at(1), raises_at(2), raises_at(3), FailingBackward.apply])
def test_a_failing_provider_leaves_the_others(operator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(titan_kernels, "swiglu", operator)
    found = measured(swiglu_case(), {"ours", "eager", "compiled"})
    assert found["ours"].failed
    assert "OutOfMemoryError: tried to allocate 1 GiB" in found["ours"].problem
    for other in ("eager", "compiled"):
        assert not found[other].problem
        assert found[other].samples.keys() == {"forward", "backward"}


@on_cpu
def test_a_library_that_cannot_be_imported_is_a_problem_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_need", lambda package, installed_as: None)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    found = measured(swiglu_case(), {"liger", "eager"})
    assert found["liger"].failed
    assert "liger_kernel" in found["liger"].problem
    assert found["eager"].samples


@on_cpu
def test_without_a_reference_the_whole_case_has_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    monkeypatch.setattr(measurement, "make_inputs", out_of_memory)
    found = measured(swiglu_case(), {"ours", "eager"})
    assert all(m.failed and "tried to allocate" in m.problem for m in found.values())


@on_cpu
def test_a_lost_device_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def illegal_access(_: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(measurement, "_wait", illegal_access)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        measured(swiglu_case(), {"ours"})


@pytest.mark.parametrize("provider", ["ours", "liger"])
def test_whoever_is_wrong_fails_its_test(provider: str) -> None:
    def wrong(_: Case) -> MeasuredCase:
        return MeasuredCase({provider: Measured(problem="wrong: out0 by 1", failed=True, wrong=True)}, 1.0)

    with pytest.raises(pytest.fail.Exception, match="wrong: out0"):
        test_kernels.test_operator(None, (swiglu_case(), "forward", provider), wrong, lambda moved=None: 1.0)


def test_ours_failing_fails_a_test_and_a_peer_failing_skips_it() -> None:
    case = swiglu_case()

    def failed(_: Case) -> MeasuredCase:
        problem = Measured(problem="RuntimeError: no", failed=True)
        return MeasuredCase({"ours": problem, "liger": problem}, 1.0)

    with pytest.raises(pytest.fail.Exception, match="RuntimeError: no"):
        test_kernels.test_operator(None, (case, "forward", "ours"), failed, lambda moved=None: 1.0)
    with pytest.raises(pytest.skip.Exception, match="RuntimeError: no"):
        test_kernels.test_operator(None, (case, "forward", "liger"), failed, lambda moved=None: 1.0)


def test_a_provider_that_writes_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if correct results of the same size were in the same memory before."""
    case = swiglu_case()

    def build(case: Case, provider: providers.Provider, *rest: Any) -> providers.Function:
        if provider is providers.EAGER:
            return providers.build(case, provider, *rest)
        return lambda gate, up: (torch.empty_like(gate) + 0 * (gate + up),)

    monkeypatch.setattr(measurement, "build", build)
    measured = measurement.measure_case(case, {"ours"}, CPU, "eager", 1, 1)
    assert "wrong: result 0 is off by nan" in measured.providers["ours"].problem
    assert not torch.are_deterministic_algorithms_enabled()


def test_nothing_but_the_provider_allocates_while_its_peak_is_taken() -> None:
    """Between the two readings of the allocator no gradients of outputs are made."""
    case, seen = smoke_case("rope"), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    inputs = providers.make_inputs(case, CPU)
    function = providers.build(case, providers.EAGER, "eager", CPU)
    gradients = gradients_like(function(*inputs))
    with Watch():
        measurement.results(case, function, inputs, gradients)
    assert any("mul" in name for name in seen)
    assert not any("rand" in name or "normal" in name for name in seen)


def test_gradients_of_heads_come_token_by_token() -> None:
    case = smoke_case("rope")
    outputs = providers.build(case, providers.EAGER, "eager", CPU)(*providers.make_inputs(case, CPU))
    for gradient in gradients_like(outputs):
        assert gradient.transpose(1, 2).is_contiguous()
        assert not gradient.is_contiguous()


def test_what_decides_is_in_the_terms_of_a_run() -> None:
    """The sizes of every deciding case are those that a run of this model at this degree asks for; only the two norms
    decide the same cell; and each switch has eager and compiled cells at the 8B and the 70B."""
    found: Counter[str] = Counter()
    parts: dict[str, int] = {}
    variants: set[tuple[str, str]] = set()
    for case in cases(smoke=False):
        flavor = FLAVORS[case.model.name]
        sizes = Workload(flavor, case.tokens, case.tensor_parallel, Loss().chunk_size, compiled=True).sizes()
        for provider in providers.providers(case):
            for contest in contests(case, provider.name):
                assert contest.shape == sizes[contest.op]
                variants.add((contest.op, contest.variant))
                key = repr((contest.op, contest.compiled, contest.variant, contest.shape))
                found[key] += len(directions(case))
                parts[key] = contest.parts
                names = {p.name for p in providers.providers(case)}
                assert contest.against[0] in names
    assert found == parts
    assert {variant for _, variant in variants} == {"", *VARIANTS}
    assert ("rms_norm", "sequence sharded") in variants
    for op in SHAPE_KEYS:
        for compiled in (True, False):
            assert any(key.startswith(repr((op, compiled))[:-1]) for key in found)


def test_compiled_operators_are_judged_in_blocks() -> None:
    """Except for norms on a sequence shard and the loss, which have no neighbours to be fused with."""
    for case in cases(smoke=False):
        for provider in providers.providers(case):
            for contest in contests(case, provider.name):
                if contest.compiled and contest.op != "cross_entropy":
                    sharded_norm = contest.op == "rms_norm" and case.tensor_parallel > 1
                    assert case.op.startswith("block") != sharded_norm
                    assert sharded_norm == (contest.variant == "sequence sharded")
    block = smoke_case("block")
    *_, x = providers.make_inputs(block, CPU)
    assert x.dim() == 3  # the compiler folds the residual add of flattened activations into a matrix product
    assert {p.name for p in providers.providers(block)} >= {"ours_compiled", "compiled+reemit", "auto"}


def test_reemit_is_judged_against_the_reference_that_a_run_has() -> None:
    """With the compiler's own choice of what to save; the smaller budget is a separate provider."""
    case, budgets = smoke_case("block"), {}
    inputs = providers.make_inputs(case, CPU)
    (contest,) = contests(case, "compiled+reemit")
    budget = f"compiled_budget_{providers.REEMIT_BUDGET}"
    compiling = ""

    def note(graph: Any, _: Any) -> Any:  # one backend for all, as in a run, so that compiled code could be shared
        budgets[compiling] = functorch_config.activation_memory_budget
        return graph.forward

    torch._dynamo.reset()
    for provider in providers.providers(case):
        if provider.name not in (*contest.against, budget):
            continue

        compiling = provider.name
        providers.build(case, provider, note, CPU)(*inputs)  # pyright: ignore[reportArgumentType]
    assert budgets == {**dict.fromkeys(contest.against, 1.0), budget: 0.7}


@on_cpu
@pytest.mark.parametrize(
    ("op", "degree", "module", "name", "provider"),
    [
        ("cross_entropy", 1, titan_kernels, "cross_entropy_with_grad_", "ours"),
        ("cross_entropy", 1, compilation, "cross_entropy_with_grad_", "compiled"),
        ("cross_entropy_sharded", 2, titan_kernels, "cross_entropy_stats", "ours"),
        ("cross_entropy_sharded", 2, titan_kernels, "cross_entropy_grad_", "ours"),
        ("cross_entropy_sharded", 2, compilation, "cross_entropy_grad_", "compiled"),
    ],
)
def test_the_loss_is_timed_as_it_runs(
    op: str, degree: int, module: Any, name: str, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the function that a run would use fails, only this provider fails."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("the one that a run takes")

    monkeypatch.setattr(module, name, broken)
    found = measured(smoke_case(op, degree), {"eager", "compiled", "ours"}, backend="eager")
    assert {name for name, m in found.items() if m.problem} == {provider}
    assert "the one that a run takes" in found[provider].problem


def test_the_sharded_loss_reads_its_logits_twice() -> None:
    rows, vocab = 6, 50
    logits, labels = torch.randn(rows, vocab).bfloat16(), torch.zeros(rows, dtype=torch.int64)
    statistics = reference.cross_entropy_stats(logits, labels)
    logsumexp, gradient = statistics[0], logits
    tensors = (logits, labels, *statistics, logits, labels, logsumexp, gradient)
    moved = sum(x.numel() * x.element_size() for x in tensors)
    assert TRAFFIC["cross_entropy_sharded"](rows=rows, vocab=vocab).total == moved


def test_a_shard_of_a_block_is_that_part_of_it() -> None:
    """Compared with the whole block, heads, feed-forward columns and their matrices are divided, norms are not."""
    whole, part = (providers.parameter_sizes(smoke_case("block", degree)) for degree in (1, 2))
    assert whole == [(64,), (128, 64), (64, 64), (64,), (96, 64), (96, 64), (64, 96)]
    assert part == [(64,), (64, 64), (64, 32), (64,), (48, 64), (48, 64), (64, 48)]


def test_differences_are_of_the_same_pass() -> None:
    """A drift that both share cancels out; the error is that of the rest."""
    drift = [1.0, 1.0, 2.0, 2.0, 5.0, 5.0, 9.0, 9.0]
    mine = timing.Samples(tuple(x + 0.25 for x in drift), True, per_pass=2)
    theirs = timing.Samples(tuple(drift), True, per_pass=2)
    assert timing.difference(mine, theirs) == timing.Difference(0.25, 0.0, True)
    noisy = timing.Samples(
        tuple(x + d for x, d in zip(drift, (0, 0, 1, 1, 2, 2, 3, 3), strict=True)), False, per_pass=2
    )
    found = timing.difference(noisy, theirs)
    assert found.seconds == 1.5
    assert found.error == pytest.approx(1.2533 * 1.4826 * 1.0 / 2)  # half the root of the four passes
    assert not found.queued


@pytest.mark.parametrize(
    ("ran_dry", "queued", "longer"), [([False], True, 1), ([True, False], True, 2), ([True] * 4, False, 1)]
)
def test_a_queue_that_ran_dry_is_tried_again_behind_a_longer_delay(
    ran_dry: list[bool], queued: bool, longer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fake device. A delay that is never long enough is not kept, or it would double with each pass."""
    answers, delays = iter(ran_dry), []

    class Event:
        def __init__(self, enable_timing: bool = False) -> None: ...

        def record(self) -> None: ...

        def query(self) -> bool:
            return next(answers)

        def elapsed_time(self, other: Any) -> float:
            return 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", delays.append)
    monkeypatch.setattr(timing.time, "perf_counter", iter(range(100)).__next__)  # a second between readings
    seconds, found, delay = timing._cuda_pass(timing.Run(lambda: None), 3, lambda: None, 1.0)
    assert (seconds, found, delay) == ([5e-3] * 3, queued, float(longer))
    assert len(delays) == len(ran_dry)


def test_what_needs_no_pytest_runs_without_it() -> None:
    """All that the README names as `python -m benchmarks.X` or `python benchmarks/X.py`, as installed by its first
    command."""
    named = sorted(set(re.findall(r"python (?:-m benchmarks\.|benchmarks/)(\w+)", (ROOT / "README.md").read_text())))
    assert len(named) > 5
    program = f"""import importlib, sys
sys.modules["pytest"] = None
for name in {named}:
    importlib.import_module("benchmarks." + name)"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_cell_is_in_one_part_and_every_part_is_short() -> None:
    for case in cases(smoke=False):
        for test, provider in kernel_plan.cells(case):
            parts = [part.name for part in kernel_plan.PARTS if part.selects(test)]
            assert len(parts) == (0 if provider.is_auto else 1), (test, parts)
            assert kernel_plan.AUTO.selects(test) == provider.is_auto
    for part in (*kernel_plan.PARTS, kernel_plan.AUTO):
        assert 60 < kernel_plan.planned_seconds(part) < 60 * kernel_plan.MINUTES


def test_the_notes_plan_is_the_calculated_one() -> None:
    notes = (ROOT / "benchmarks" / "NOTES.md").read_text()
    for part in (*kernel_plan.PARTS, kernel_plan.AUTO):
        (minutes,) = re.findall(rf"^\| {part.name} \|.*\| ([\d.]+) \|$", notes, re.MULTILINE)
        assert float(minutes) == round(kernel_plan.planned_seconds(part) / 60, 1), part.name
        expression = " and ".join(part.words)
        assert f"suite {part.name} {expression}\n" in notes.replace('"', "")


def test_parts_are_what_pytest_selects() -> None:
    """Compared with pytest's own -k on the suite's tests."""
    part = kernel_plan.PARTS[0]
    expression = " and ".join(part.words)
    listed = run(
        "-m", "pytest", "benchmarks/test_kernels.py", "--collect-only", "-q", "--benchmark-only", "-k", expression
    )
    found = {line.split("::")[1] for line in listed.stdout.splitlines() if "::" in line}
    assert found == {test for case in cases(False) for test, _ in kernel_plan.cells(case) if part.selects(test)}


def test_other_launch_settings_are_launched_checked_and_forgotten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from titan_kernels import launch

    from benchmarks import kernel_settings

    for name in ("rms_norm", "rope", "swiglu", "cross_entropy"):  # as Dynamo leaves them once it has traced one
        module = sys.modules[f"titan_kernels.{name}"]
        monkeypatch.setattr(module, "__import_titan_kernels_dot_launch", launch, raising=False)
    unchanged = set()
    for contest in kernel_settings.contests(smoke=False):
        usual = kernel_settings.launches_of(contest.case)
        for setting in contest.settings:
            with setting.active():
                if kernel_settings.launches_of(contest.case) == usual:
                    unchanged.add(setting.label)
            assert kernel_settings.launches_of(contest.case) == usual
    of_grids = {"half the programs", "half as many programs again", "twice the programs"}
    todays = {"3 stages", "65536 columns, 32 warps", "32768 columns, 32 warps"}
    assert unchanged == of_grids | todays
    small = kernel_settings.contests(smoke=True)
    assert len(small) == 9  # both ways of four operators, the loss's step
    loss = next(one for one in small if one.direction == "step")
    in_parts = kernel_settings.Setting(
        "a row in parts",
        "cross_entropy",
        names=lambda module: {"_block_read_twice": lambda vocab, dtype: (128, 4)},
    )
    several_steps = replace(loss, settings=(*loss.settings, in_parts))
    assert not any("problem" in row for row in kernel_settings.measured(several_steps, CPU, 1, 1).values())
    contest = next(one for one in small if one.name.startswith("swiglu") and one.direction == "backward")
    # Blocks that the grid does not account for, so that a part of each row is left out.
    wrong = kernel_settings.Setting("wrong", "swiglu", constexprs={"BLOCK": 32})
    rows = kernel_settings.measured(replace(contest, settings=(*contest.settings, wrong)), CPU, 1, 1)
    assert "result 0 is off" in rows.pop("wrong")["problem"]
    assert all(row["median_us"] > 0 for row in rows.values()) and len(rows) == 1 + len(contest.settings)
    kernel_settings.run([contest], True, tmp_path)
    (written,) = tmp_path.glob("kernel-settings-*.json")
    assert list(json.loads(written.read_text())["contests"]) == [contest.name]
    content = json.loads(written.read_text())
    content["environment"]["versions"] = {"torch": "another"}
    content["contests"][contest.name].pop("versions")  # as files had it
    written.write_text(json.dumps(content))
    kernel_settings.run([replace(loss, settings=())], True, tmp_path)
    contests = json.loads(written.read_text())["contests"]
    assert list(contests) == [contest.name, loss.name], "one leaves the others"
    assert [one["versions"]["torch"] for one in contests.values()] == ["another", torch.__version__]
    lines = kernel_settings.report("x", 10, 5.0, {
        "as it is": {"median_us": 10.0, "queued": True},
        "better": {"median_us": 8.0, "queued": True, "slower_by_us": -2.0, "error_us": 0.5},
        "lucky": {"median_us": 9.5, "queued": True, "slower_by_us": -0.5, "error_us": 0.5},
        "host": {"median_us": 7.0, "queued": False, "slower_by_us": -3.0, "error_us": 0.1},
        "broken": {"problem": "ValueError: no"},
    })  # fmt: skip
    assert [line.split()[0] for line in lines[1:]] == ["host", "better", "lucky", "as", "broken"]
    assert ["FASTER" in line for line in lines[1:]] == [False, True, False, False, False]
