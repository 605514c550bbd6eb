"""The end-to-end benchmark, rehearsed: parts run, measure what they say, and tables are what the JSON holds."""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tape import TapeRecorder

from benchmarks import fake_world, limits, step_timing, train_cell, train_suite, train_table
from benchmarks.limits import Limits, least_step
from benchmarks.step_timing import FULL, SLOW, Length, Timed
from benchmarks.train_cell import Bench, How, _face, _put_on, _Running, run_cell, world_of
from benchmarks.workloads import (
    COMPILED,
    COMPILED_AUTO,
    EAGER_REFERENCE,
    LLAMA_1B,
    NONE,
    PARTS,
    POINTWISE,
    RANK0,
    REFERENCE,
    SELECTIVE_OP,
    TABLE_PARTS,
    Cell,
    Variant,
    cells,
    config_of,
    rehearsed,
    shape_of,
)
from benchmarks.workloads import (
    FULL as FULL_RECOMPUTATION,
)
from titan_fast import parallel
from titan_fast.checkpoint import tensors_of
from titan_fast.cuda_graph import WARM_UP_STEPS
from titan_fast.flops import flops_per_token, parameters

CPU = torch.device("cpu")
HOW = How(smoke=True, length=Length(1, 2, 1), profiles=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a rehearsal of the first cell of three parts wrote."""
    folder = tmp_path_factory.mktemp("results")
    train_suite.main("", ["--smoke", "--cells", "1", "--parts", "limits,rank0,peers", "--out", str(folder)])
    return folder


def test_a_rehearsal_leaves_a_file_per_part(results: Path) -> None:
    assert {path.name for path in results.iterdir()} == {
        "limits-cpu.json", "train-cpu-rank0.json", "train-cpu-peers.json",
    }  # fmt: skip
    rows = json.loads((results / "train-cpu-rank0.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["compiled, auto", "compiled, kernels"]
    for row in rows:
        assert "error" not in row and row["world"] == 64 and row["communication"].startswith("left out")
        assert row["step_seconds"]["timed"] == 2
        assert row["tokens_per_second"] == pytest.approx(row["tokens_per_step"] / row["step_seconds"]["median"])
        assert 0 < row["fraction_of_limit"] == pytest.approx(row["least_step"]["total"] / row["step_seconds"]["median"])
    assert "titan" not in rows[0].get("mfu", {})  # a CPU has no known peak
    assert rows[0]["profile"]["seconds"]["idle"] >= 0 and "triton" in rows[1]["choices"]["swiglu"]


def test_tables_show_what_the_files_hold(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "train.png"
    arguments = ["--results", str(results), "--picture", str(picture)]
    assert train_table.main([*arguments, "--rehearsal"]) == 0
    text = capsys.readouterr().out
    row = json.loads((results / "train-cpu-rank0.json").read_text())["rows"][0]
    assert f"| compiled, auto | {row['tokens_per_second']:,.0f} |" in text
    assert picture.with_stem("train-cpu").stat().st_size > 5000
    train_table.main(arguments)  # rehearsals are not shown unless asked for
    assert "No device has been measured." in capsys.readouterr().out


def test_a_cell_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    options = train_suite._arguments("").parse_args(["--smoke", "--no-profile", "--out", str(tmp_path)])
    (cell,) = [cell for cell in cells(("slices",)) if "8B, 2 layers" in cell.name]
    options.cache = tmp_path / "cache"
    answer = train_suite.run_in_child(cell, options)
    (row,) = answer["rows"]
    assert "error" not in row and row["step_seconds"]["median"] > 0
    assert answer["environment"]["smoke"] and list(tmp_path.glob(".answer*")) == []


def test_a_process_that_dies_is_a_row_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = train_suite._arguments("").parse_args(["--smoke", "--out", str(tmp_path)])
    monkeypatch.setattr(train_suite.sys, "executable", "/bin/false")
    answer = train_suite.run_in_child(cells(("rank0",))[0], options)
    assert [row["error"] for row in answer["rows"]] == ["the process ended with status 1"] * 2


# Switching


@pytest.fixture
def bench() -> Iterator[Bench]:
    cell = rehearsed(Cell("single", LLAMA_1B, (EAGER_REFERENCE,)))
    with world_of(cell, CPU, smoke=True) as world:
        made = Bench(cell, world, smoke=True)
        yield made
        made.close()


def test_a_switched_model_computes_the_same_loss(bench: Bench) -> None:
    tokens = torch.randint(128, (2, 8), generator=torch.Generator().manual_seed(0))
    losses, scale = {}, torch.tensor(1 / 16)
    plain = REFERENCE | NONE
    variants = {
        "plain": plain,
        "compiled": COMPILED | plain,
        "pointwise": COMPILED | REFERENCE | POINTWISE,
        "selective": REFERENCE | SELECTIVE_OP,
        "carried": plain | {"kernels.carry_residual": True},
        "no chunks": plain | {"loss.chunk_size": 0},
        "plain again": plain,
    }
    for name, options in variants.items():
        bench.switch_to(config_of(bench.cell.workload, options, smoke=True))
        losses[name] = bench.model(tokens, tokens, scale).item()
        if name == "carried":
            assert all(block.carry_residual for block in bench.model.blocks)
    assert losses["plain again"] == losses["plain"]
    assert all(loss == pytest.approx(losses["plain"], rel=1e-2) for loss in losses.values())


def test_a_variant_is_put_on_again_as_it_was(bench: Bench) -> None:
    work = bench.cell.workload
    bench.switch_to(config_of(work, COMPILED | REFERENCE | POINTWISE, smoke=True))
    block = bench.model.blocks[0]
    before = (block._compiled_call_impl, block.forward, bench.model.head.loss)
    kept = _Running(COMPILED_AUTO, bench.config, {}, _face(bench), FULL, Timed())
    bench.switch_to(config_of(work, REFERENCE, smoke=True))
    assert block._compiled_call_impl is None and "forward" not in block.__dict__
    _put_on(bench, kept)
    assert (block._compiled_call_impl, block.forward, bench.model.head.loss) == before
    assert bench.config is kept.config


def test_a_recorded_variant_takes_turns_with_an_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the CPU's stand-in for a CUDA graph; without it, the row says that there is nothing to record."""
    (cell,) = cells(("levers-graph",))
    eager, recorded = (v for v in cell.variants if v.name in ("eager, reference", "eager, reference, CUDA graph"))
    few = rehearsed(dataclasses.replace(cell, variants=(eager, recorded)))
    assert "the device is cpu" in run_cell(few, CPU, HOW)[1]["error"]
    recorders: list[TapeRecorder] = []

    def new_recorder(device: torch.device) -> TapeRecorder:
        recorders.append(TapeRecorder())
        return recorders[-1]

    monkeypatch.setattr(parallel, "check_cuda_graph", lambda device, shards: None)
    monkeypatch.setattr(train_cell, "CudaRecorder", new_recorder)
    how = dataclasses.replace(HOW, length=Length(3, 4, 2))
    rows = run_cell(few, CPU, how)
    assert [row["variant"] for row in rows] == ["eager, reference", "eager, reference, CUDA graph"]
    assert all("error" not in row and row["step_seconds"]["timed"] == 4 for row in rows)
    (recorder,) = recorders
    assert recorder.replays == 3 + 4 - WARM_UP_STEPS


def test_what_comes_to_the_same_code_runs_once_and_what_fails_is_reported() -> None:
    torchs = Variant("no such attention", REFERENCE | {"kernels.attention": "cudnn"})
    auto = Variant("eager, auto", {})
    rows = run_cell(rehearsed(Cell("single", LLAMA_1B, (EAGER_REFERENCE, auto, torchs))), CPU, HOW)
    assert rows[1]["same_as"] == "eager, reference" and rows[1]["step_seconds"] == rows[0]["step_seconds"]
    assert "'cudnn' exists on CUDA only" in rows[2]["error"] and "step_seconds" not in rows[2]


def test_losses_of_levers_are_compared_with_plain_ones() -> None:
    (cell,) = cells(("parity",))
    few = tuple(v for v in cell.variants if v.name in ("plain", "compiled, reference", "chunk 1024", "full"))
    rows = run_cell(
        rehearsed(dataclasses.replace(cell, variants=few)), CPU, dataclasses.replace(HOW, length=Length(1, 5, 1))
    )
    assert len(rows) == 4 and rows[0]["parity"]["largest"] == 0
    assert all(0 <= row["parity"]["largest"] < 2e-2 and len(row["losses"]) == 5 for row in rows)


# Rank 0 of many


def rank0_cell() -> Cell:
    return rehearsed(Cell("rank0", RANK0["8b"], (EAGER_REFERENCE,)))


def test_gathered_weights_are_random_and_gradients_real() -> None:
    cell = rank0_cell()
    with world_of(cell, CPU, smoke=True) as world:
        bench = Bench(cell, world, smoke=True)
        assert world.size == 4 and tensors_of(bench.model)["model.embedding.weight"].to_local().shape[0] == 128 // 4  # type: ignore[attr-defined]
        bench.switch_to(bench.config)
        batches = next(bench.loader)
        bench.model(batches[0].tokens, batches[0].labels, torch.tensor(0.1)).backward()
        fake_world.assert_reduces_real_gradients(bench.model)
        bench.close()


@pytest.mark.parametrize("broken", ["zeros", "unwritten"])
def test_a_gather_that_is_not_real_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(self: object, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, **_: Any) -> None:
        output_tensor.view(group.size(), -1)[1:].fill_(0.0 if broken == "zeros" else float("nan"))

    monkeypatch.setattr(fake_world.CopyToAll, "__call__", call)
    cell = rank0_cell()
    with world_of(cell, CPU, smoke=True) as world, pytest.raises(AssertionError, match="is not random"):
        Bench(cell, world, smoke=True)


def test_a_gradient_that_is_not_real_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(self: object, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, **_: Any) -> None:
        output_tensor.fill_(0.0)

    monkeypatch.setattr(fake_world.TakeOwn, "__call__", call)
    cell = rank0_cell()
    with world_of(cell, CPU, smoke=True) as world:
        bench = Bench(cell, world, smoke=True)
        batches = next(bench.loader)
        bench.model(batches[0].tokens, batches[0].labels, torch.tensor(0.1)).backward()
        with pytest.raises(AssertionError, match="is no gradient"):
            fake_world.assert_reduces_real_gradients(bench.model)
        bench.close()


# Timing, limits, plan


def test_contenders_take_turns_and_each_gets_its_steps() -> None:
    order = step_timing.turns(["a", "b"], {"a": FULL, "b": SLOW})
    assert sum(count for name, count in order if name == "a") == 50
    assert sum(count for name, count in order if name == "b") == 15
    assert [name for name, _ in order[:4]] == ["a", "b", "b", "a"]


def test_warm_up_is_longer_for_short_steps() -> None:
    calls = []
    tens = []
    found = step_timing.warm_up(
        lambda: calls.append(1), CPU, None, is_first=True, at_ten=lambda: tens.append(len(calls))
    )
    assert found == (FULL, 20) and len(calls) == 19 and tens == [9]  # one was run before
    assert step_timing.warm_up(lambda: None, CPU, None, is_first=False) == (FULL, 5)
    original, step_timing.SLOW_STEP_SECONDS = step_timing.SLOW_STEP_SECONDS, 0.01
    try:
        assert step_timing.warm_up(lambda: time.sleep(0.02), CPU, None, is_first=True) == (SLOW, 5)
    finally:
        step_timing.SLOW_STEP_SECONDS = original


def test_the_least_step_computes_what_the_model_does() -> None:
    """At a rate of one FLOP a second and endless bandwidth, seconds are FLOPs: those of the MFU formula."""
    ones = Limits(1e30, {}, {}, assumed_gemm=1.0, assumed_attention=(1.0, 1.0))
    for work in (LLAMA_1B, RANK0["8b"], RANK0["70b"]):
        config, shape = config_of(work, {}, False), shape_of(work, False)
        parts = least_step(ones, config, shape, work.world)
        attention = flops_per_token(shape, work.seq_len, "titan") - 6 * parameters(shape).without_lookup
        matrices = 6 * (parameters(shape).without_lookup - (2 * shape.n_layers + 1) * shape.dim)
        assert parts["matrix products"] == pytest.approx(matrices * work.tokens)
        # Formulas count the backward pass twice the forward one; it is two and a half times: QK^T is computed again.
        assert parts["attention"] == pytest.approx(attention / 2 * 3.5 / 3 * work.tokens)
        assert parts["total"] == pytest.approx(sum(v for k, v in parts.items() if k != "total"))


def test_recomputation_costs_what_is_recomputed() -> None:
    ones = Limits(1e30, {}, {}, assumed_gemm=1.0, assumed_attention=(1.0, 1.0))
    work = RANK0["8b"]
    shape = shape_of(work, False)
    costs = {
        name: least_step(ones, config_of(work, options, False), shape, 64)["recomputed"]
        for name, options in {
            "none": NONE,
            "pointwise": POINTWISE,
            "op": SELECTIVE_OP,
            "full": FULL_RECOMPUTATION,
        }.items()
    }
    per_token = 2 * shape.n_layers * shape.dim
    assert costs["none"] == 0 and costs["pointwise"] < 1
    assert costs["op"] == pytest.approx(per_token * (shape.dim + shape.ffn_dim) * work.tokens)
    attention = shape.n_layers * 2 * shape.n_heads * shape.head_dim * work.seq_len * work.tokens
    gemm = per_token * (shape.qkv_dim + shape.dim + 2 * shape.ffn_dim) * work.tokens
    assert costs["full"] == pytest.approx(gemm + attention)


def test_measured_limits_calibrate_the_planner(results: Path) -> None:
    content = json.loads((results / "limits-cpu.json").read_text())
    assert set(content["rates"]) == {"gemm", "bandwidth", "attention_forward", "attention_backward"}
    assert all(rate > 0 for rate in content["rates"].values()) and content["attention"] == "flash"
    assert limits.limits_from(content).bandwidth == content["rates"]["bandwidth"]


def test_the_table_fits_into_its_time() -> None:
    lines = train_suite.plan(TABLE_PARTS, None)
    assert lines[-1].startswith("all") and float(lines[-1].split()[-2]) < 25
    minutes = {
        line.split()[0]: float(line.split()[-2]) for line in train_suite.plan(PARTS, None) if line.endswith("min")
    }
    assert set(PARTS) < set(minutes)
    assert all(value < 8 for name, value in minutes.items() if name != "all")


def test_every_cell_is_a_config_that_parses() -> None:
    names = set()
    for cell in cells(PARTS):
        for variant in cell.variants:
            config = config_of(cell.workload, {} if cell.peer else variant.options, smoke=False)
            assert config.training.seq_len == cell.workload.seq_len
            names.add((cell.part, cell.name, variant.name))
    assert len(names) == sum(len(cell.variants) for cell in cells(PARTS))


# Tables of invented figures


def invented(cell: Cell, variant: str, seconds: float) -> dict[str, Any]:
    answer = {"environment": {"device": "NVIDIA H100 80GB HBM3", "versions": {}}, "gpu": []}
    row = {"variant": variant, "step_seconds": {"median": seconds, "p10": seconds, "p90": seconds}, "peak_bytes": 2**30}
    return train_suite.described(cell, row, answer, None, smoke=False)


def written(tmp_path: Path, cell: Cell, variant: str, seconds: float) -> None:
    environment = {"device": "NVIDIA H100 80GB HBM3", "versions": {}, "smoke": False}
    row = {"variant": variant, "step_seconds": {"median": seconds, "p10": seconds, "p90": seconds}, "peak_bytes": 2**30}
    train_suite.record(cell, {"environment": environment, "gpu": [], "rows": [row]}, tmp_path, None)


def test_mfu_is_that_of_the_published_row() -> None:
    """Llama 3 8B at 10,682 tokens/s on an H100 is 62.5% by `titan` (NVIDIA's published 62.47)."""
    row = invented(cells(("rank0",))[0], "compiled, auto", 8192 / 10_682)
    assert row["mfu"]["titan"] == pytest.approx(0.625, abs=1e-3)


def test_slices_predict_the_full_depth(tmp_path: Path) -> None:
    for cell in cells(("slices",)):
        if "8B" in cell.name:
            layers = int(cell.workload.options["model.n_layers"])
            written(tmp_path, cell, "compiled, auto", 0.050 + 0.020 * layers)
    written(tmp_path, cells(("rank0",))[0], "compiled, auto", 0.700)
    (device,) = train_table.load(tmp_path, rehearsal=False)
    line = train_table.slices_table(device).splitlines()[2]
    assert "| 20.00 | 690.0 | 700.0 | -1.4% |" in line
    assert train_table.NOT_MEASURED in train_table.slices_table(device).splitlines()[3]


def test_peers_are_compared_with_the_mean_of_ours_before_and_after(tmp_path: Path) -> None:
    own = cells(("peers",))
    for cell, seconds in zip(own, (0.30, 0.45, 0.60, 0.50, 0.31, 0.33), strict=True):
        written(tmp_path, cell, cell.variants[0].name, seconds)
    (device,) = train_table.load(tmp_path, rehearsal=False)
    text = train_table.peers_table(device)
    mean = (1 / 0.30 + 1 / 0.33) / 2
    assert f"torchtitan pure bfloat16 | {16384 / 0.45:,.0f}" in text and f" {mean * 0.45:.2f} |" in text
    assert f"| {0.30 / 0.33 - 1:+.1%} |" in text


def test_a_part_run_again_replaces_its_rows(tmp_path: Path) -> None:
    cell = cells(("rank0",))[0]
    for variant, seconds in (("compiled, auto", 0.9), ("compiled, kernels", 0.8), ("compiled, auto", 0.7)):
        written(tmp_path, cell, variant, seconds)
    (device,) = train_table.load(tmp_path, rehearsal=False)
    found = {row["variant"]: row["step_seconds"]["median"] for row in device.rows.values()}
    assert found == {"compiled, auto": 0.7, "compiled, kernels": 0.8}


def test_without_a_device_every_table_says_so() -> None:
    text = train_table.markdown(None)
    assert text.startswith("No device has been measured.") and text.count(train_table.NOT_MEASURED) > 100
