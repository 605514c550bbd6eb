"""How many graphs are built, that depth adds none, and the warning if one is built late."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import torch
from shapes import LLAMA3

from titan_fast.activation_checkpoint import apply
from titan_fast.compilation import arguments, compile_model
from titan_fast.compile_report import SETTLED_AFTER, CompileReport
from titan_fast.config import ActivationCheckpoint, Compile
from titan_fast.loss import LinearCrossEntropy
from titan_fast.model import Llama, init_weights
from titan_fast.ops import REFERENCE

TRACED = Compile(enable=True, backend="aot_eager", components=("blocks",))


@pytest.fixture
def report() -> Iterator[CompileReport]:
    torch._dynamo.reset()
    made = CompileReport()
    yield made
    made.close()


def model_of(n_layers: int) -> Llama:
    model = Llama(dataclasses.replace(LLAMA3, n_layers=n_layers), REFERENCE, LinearCrossEntropy(REFERENCE))
    init_weights(model, 0)
    apply(model, ActivationCheckpoint("pointwise"), TRACED)
    compile_model(model, TRACED)
    return model


def one_pass(model: Llama, seq_len: int = 16) -> None:
    tokens = torch.arange(2 * seq_len).view(2, seq_len)
    model(tokens, tokens, torch.ones(())).backward()


def test_what_the_compiler_is_told() -> None:
    """Graphs may not break, and no size is dynamic."""
    told = {"backend": "inductor", "fullgraph": True, "dynamic": False}
    assert arguments(Compile()) == told
    tuned = Compile(coordinate_descent=True, max_autotune=True)
    assert arguments(tuned) == told | {"options": {"coordinate_descent_tuning": True, "max_autotune": True}}
    assert arguments(Compile(coordinate_descent=True))["options"] == {"coordinate_descent_tuning": True}


def test_more_graphs_than_dynamos_limit_do_not_end_a_run() -> None:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        model = model_of(1)
        for seq_len in range(1, 12):
            one_pass(model, seq_len)


def test_depth_adds_no_graph() -> None:
    seconds = {}
    for n_layers in (2, 32):
        torch._dynamo.reset()  # which forgets who listens, too
        report = CompileReport()
        one_pass(model_of(n_layers))
        assert report.graphs == 1
        seconds[n_layers] = report.seconds
    assert 0 < seconds[32] < 3 * seconds[2] + 30.0, seconds


def test_seconds_are_those_of_compiling(report: CompileReport) -> None:
    model = model_of(2)
    began = time.perf_counter()
    one_pass(model)
    assert 0 < report.seconds < time.perf_counter() - began
    before = report.seconds
    one_pass(model)
    assert report.seconds == before
    report.seconds = 16.0  # of which a dry step may have taken most
    assert report.summary(15.0, 1.5) == "compiled 1 graph in 16.0 s, 1.0 s of it in the first step, which took 1.5 s"


def test_a_late_graph_is_a_warning_that_names_the_guard(report: CompileReport) -> None:
    model = model_of(2)
    one_pass(model)
    report.expect()
    assert report.again(SETTLED_AFTER + 1) == []
    one_pass(model, seq_len=24)
    (line,) = report.again(SETTLED_AFTER + 2)
    assert line.startswith("warning:") and f"step {SETTLED_AFTER + 2}" in line
    assert "size mismatch" in line and "24" in line
    assert report.again(SETTLED_AFTER + 3) == []
    one_pass(model, seq_len=8)
    assert report.again(SETTLED_AFTER) == []  # it is early enough
    one_pass(model, seq_len=12)
    assert report.again(100 + SETTLED_AFTER - 1, first_step=100) == [], "early after that start"


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("components", ["blocks", "model"])
def test_the_dry_steps_graph_serves_the_run(
    components: str, batch: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes inputs like those that the loader gives, alike in layout and in sharing no memory."""
    torch._dynamo.reset()
    more = {"compile__enable": True, "compile__backend": "aot_eager", "compile__components": components}
    more |= {"compile__canary": False, "training__dry_step": "always", "training__local_batch_size": batch}
    runs.run(data, tmp_path, **more, training__steps=2, checkpoint__enable=False)
    assert "compiled 1 graph in" in capsys.readouterr().out


def test_a_closed_report_hears_nothing(report: CompileReport) -> None:
    report.close()
    report.close()
    one_pass(model_of(1))
    assert report.graphs == 0
