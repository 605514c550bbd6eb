"""The end-to-end benchmark's arithmetic: how long to time, the least step, the plan, and tables of invented figures."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import limits, step_timing, train_rows, train_table
from benchmarks.launch_time import STARTS
from benchmarks.least_step import BLOCK_MATRICES, PRODUCTS, Limits, Matrix, attention_call, least_step, matrices
from benchmarks.result_files import read, write
from benchmarks.step_timing import FULL, SLOW, Timed
from benchmarks.train_cells import AS_SHIPPED, PARTS, TABLE_PARTS, cells
from benchmarks.train_plan import estimated_seconds, plan
from benchmarks.train_record import described, known_limits, record
from benchmarks.workloads import (
    COMPILED,
    LLAMA_1B,
    MASTERS,
    NONE,
    POINTWISE,
    PURE,
    RANK0,
    SELECTIVE_OP,
    Cell,
    Options,
    config_of,
    shape_of,
)
from benchmarks.workloads import (
    FULL as FULL_RECOMPUTATION,
)
from titan_fast.flops import flops_per_token, parameters

CPU = torch.device("cpu")
H100 = "NVIDIA H100 80GB HBM3"


def test_contenders_take_turns_and_each_gets_its_steps() -> None:
    order = step_timing.turns(["a", "b"], {"a": FULL, "b": SLOW})
    assert sum(count for name, count in order if name == "a") == 50
    assert sum(count for name, count in order if name == "b") == 15
    assert [name for name, _ in order[:4]] == ["a", "b", "b", "a"]


def test_warm_up_is_longer_for_short_steps() -> None:
    calls = []
    found = step_timing.warm_up(lambda: calls.append(1), CPU, None, is_first=True)
    assert found == (FULL, 20) and len(calls) == 19  # one was run before
    assert step_timing.warm_up(lambda: None, CPU, None, is_first=False) == (FULL, 5)
    original, step_timing.SLOW_STEP_SECONDS = step_timing.SLOW_STEP_SECONDS, 0.01
    try:
        assert step_timing.warm_up(lambda: time.sleep(0.02), CPU, None, is_first=True) == (SLOW, 5)
    finally:
        step_timing.SLOW_STEP_SECONDS = original


def test_the_least_step_computes_what_the_model_does() -> None:
    """At one FLOP per second and infinite bandwidth, seconds are FLOPs: those of the MFU formula."""
    ones = Limits(1e30, {}, {}, assumed_gemm=1.0, assumed_attention=(1.0, 1.0))
    for work in (LLAMA_1B, RANK0["8b"], RANK0["70b"]):
        config, shape = config_of(work, {}, False), shape_of(work, False)
        parts = least_step(ones, config, shape, work.world)
        attention = flops_per_token(shape, work.seq_len, "titan") - 6 * parameters(shape).without_lookup
        matrices = 6 * (parameters(shape).without_lookup - (2 * shape.n_layers + 1) * shape.dim)
        assert parts["matrix products"] == pytest.approx(matrices * work.tokens)
        # Formulas count attention's backward as twice the forward; it is 2.5 times, because QK^T is computed again.
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


def test_the_least_step_in_float8_has_its_products_rates() -> None:
    """In blocks; the head's stay bfloat16."""
    work = LLAMA_1B
    slow: dict[str, float] = dict.fromkeys(PRODUCTS, 1.0)
    recipes: dict[str, dict[str, Any]] = {"tensorwise": dict.fromkeys(PRODUCTS, 2.0), "rowwise": {"error": "none"}}
    shape = shape_of(work, False)
    found = matrices(shape, work.tokens)
    keys = [found[name].key for name in BLOCK_MATRICES]
    attention = {attention_call(shape, work.batch, work.seq_len).key: {"cudnn": {"forward": 1e30, "backward": 1e30}}}
    gemm = {matrix.key: slow for matrix in found.values()}
    known = Limits(1e30, gemm, attention, dict.fromkeys(keys, recipes))

    def products(options: Options) -> float:
        config = config_of(work, COMPILED | options, False)
        assert known.knows(config, shape)
        return least_step(known, config, shape, 1)["matrix products"]

    head = 3 * found["head"].flops
    float8: Options = {"float8.enable": True}
    plain = products({})
    assert plain == pytest.approx(head + 3 * shape.n_layers * sum(found[name].flops for name in BLOCK_MATRICES))
    assert products(float8) == pytest.approx(head + (plain - head) / 2)
    rowwise = config_of(work, COMPILED | float8 | {"float8.recipe_name": "rowwise"}, False)
    other = config_of(work, COMPILED | float8 | {"training.local_batch_size": 1}, False)
    assert not known.knows(rowwise, shape) and not known.knows(other, shape)
    (cell,) = [cell for cell in cells(("levers-float8",)) if cell.workload.flavor == work.flavor]
    environment = {"device": H100, "versions": {}}
    for variant, has in (("compiled, auto", True), ("float8, tensorwise", True), ("float8, rowwise", False)):
        row = described(cell, timed(variant, 1.0), environment, known)
        assert ("fraction_of_limit" in row) == has and ("mfu" in row) == (variant == "compiled, auto")


def test_every_shape_in_float8_is_measured() -> None:
    known = limits.float8_matrices(smoke=False)
    for cell in cells(tuple(part for part in PARTS if "float8" in part)):
        for variant in cell.variants:
            config = config_of(cell.workload, variant.options, False)
            if config.float8.enable and not cell.parity_steps:
                found = matrices(shape_of(cell.workload, False), cell.workload.tokens)
                assert {found[name].key for name in BLOCK_MATRICES} <= known.keys(), cell.name


def test_a_block_is_timed_after_a_step_that_is_not() -> None:
    calls: list[int] = []
    timed = Timed()
    step_timing.run_block(lambda: calls.append(1), CPU, 10, timed)
    step_timing.run_block(lambda: calls.append(1), CPU, 5, timed)
    assert len(calls) == 11 + 5 and len(timed.seconds) == 15 and timed.wall_steps == 16
    assert timed.as_json()["timed"] == 15


def test_the_optimizer_moves_what_it_keeps() -> None:
    """Bytes per parameter: pure bfloat16 has no masters, and moments of half the size."""
    ones = Limits(1.0, {}, {}, assumed_gemm=1e30, assumed_attention=(1e30, 1e30))
    shape = shape_of(LLAMA_1B, False)
    for options, expected in ((MASTERS, 2 * 2 + 3 * 8 + 2), (PURE, 2 * 2 + 3 * 4), ({}, 30)):
        found = least_step(ones, config_of(LLAMA_1B, options, False), shape, 1)["optimizer"]
        assert found == expected * parameters(shape).total


def test_a_matrix_that_was_not_measured_is_taken_for_the_same_weights() -> None:
    def rates(value: float) -> dict[str, float]:
        return dict.fromkeys(("forward", "grad_input", "grad_weight"), value)

    known = Limits(1.0, {"1024x10x10": rates(1.0), "8192x10x10": rates(2.0), "8192x9x9": rates(9.0)}, {})
    assert known.product_seconds(Matrix(65_536, 10, 10), "forward") == 2 * 65_536 * 100 / 2.0
    assert known.product_seconds(Matrix(8192, 7, 7), "forward") == 2 * 8192 * 49 / 2.0  # the median


def test_every_timed_shape_is_measured() -> None:
    gemms, attention = limits.calls_of(smoke=False)
    for cell in cells(PARTS):
        if cell.searches or cell.parity_steps:
            continue
        work, shape = cell.workload, shape_of(cell.workload, False)
        assert {m.key for m in limits.matrices(shape, work.tokens).values()} <= gemms.keys(), cell.name
        assert limits.attention_call(shape, work.batch, work.seq_len).key in attention, cell.name


def test_tuning_is_planned_for_what_the_compiler_takes() -> None:
    ones = Limits(2.9e12, {}, {}, assumed_gemm=700e12, assumed_attention=(600e12, 500e12))
    (cell,) = cells(("levers-autotune",))
    assert estimated_seconds(cell, ones) > 150 and len(cell.variants) == 2


def test_the_table_fits_into_its_time() -> None:
    lines = plan(TABLE_PARTS, None)
    assert lines[-1].startswith("all") and float(lines[-1].split()[-2]) < 25
    minutes = {line.split()[0]: float(line.split()[-2]) for line in plan(PARTS, None) if line.endswith("min")}
    assert set(PARTS) < set(minutes)
    assert all(value < 8 for name, value in minutes.items() if name != "all")


def test_every_cell_is_a_config_that_parses() -> None:
    names = set()
    for cell in cells(PARTS):
        for variant in cell.variants:
            config = config_of(cell.workload, variant.options, smoke=False)
            assert config.training.seq_len == cell.workload.seq_len
            names.add((cell.name, variant.name))  # which is how rows of all parts are told apart
    assert len(names) == sum(len(cell.variants) for cell in cells(PARTS))


# Tables of invented figures


def timed(variant: str, seconds: float, **more: Any) -> dict[str, Any]:
    figures = {"median": seconds, "p10": seconds, "p90": seconds, "timed": 50}
    return {"variant": variant, "step_seconds": figures, "peak_bytes": 2**30} | more


def save(tmp_path: Path, cell: Cell, *rows: dict[str, Any], commit: str = "1", torch: str = "2.11") -> None:
    environment = {"device": H100, "versions": {"torch": torch}, "smoke": False, "commit": commit}
    record(cell, {"environment": environment, "rows": list(rows)}, tmp_path, None)


def written(tmp_path: Path, cell: Cell, variant: str, seconds: float) -> None:
    save(tmp_path, cell, timed(variant, seconds))


def test_mfu_is_that_of_the_published_row() -> None:
    """Llama 3 8B at 10,682 tokens/s on an H100 is 62.5% by `titan` (NVIDIA's published 62.47)."""
    cell, environment = cells(("rank0",))[0], {"device": H100, "versions": {}}
    row = described(cell, timed("compiled, auto", 8192 / 10_682), environment, None)
    assert row["mfu"]["titan"] == pytest.approx(0.625, abs=1e-3)


def test_slices_predict_the_full_depth(tmp_path: Path) -> None:
    for cell in cells(("slices",)):
        if "8B" in cell.name:
            layers = int(cell.workload.options["model.n_layers"])
            written(tmp_path, cell, "compiled, auto", 0.050 + 0.020 * layers)
    written(tmp_path, cells(("rank0",))[0], "compiled, auto", 0.700)
    (device,) = train_rows.load(tmp_path, rehearsal=False)
    line = train_table.slices_table(device).splitlines()[2]
    assert "| 20.00 | 690.0 | 700.0 | -1.4% |" in line
    assert train_table.NOT_MEASURED in train_table.slices_table(device).splitlines()[3]


def test_peers_are_compared_with_the_mean_of_ours_before_and_after(tmp_path: Path) -> None:
    own = cells(("peers",))
    for cell, seconds in zip(own, (0.30, 0.45, 0.60, 0.50, 0.31, 0.33), strict=True):
        written(tmp_path, cell, cell.variants[0].name, seconds)
    (device,) = train_rows.load(tmp_path, rehearsal=False)
    text = train_table.peers_table(device)
    mean = (1 / 0.30 + 1 / 0.33) / 2
    assert f"torchtitan pure bfloat16 | {16384 / 0.45:,.0f}" in text and f" {mean * 0.45:.2f} |" in text
    assert f"| {0.30 / 0.33 - 1:+.1%} |" in text


def test_torchtitan_as_shipped_is_compared_with_masters(tmp_path: Path) -> None:
    own = cells(("peers",))
    for cell, seconds in zip(own, (0.30, 0.45, 0.60, 0.50, 0.36, 0.30), strict=True):
        written(tmp_path, cell, cell.variants[0].name, seconds)
    (device,) = train_rows.load(tmp_path, rehearsal=False)
    line, *_ = [line for line in train_table.peers_table(device).splitlines() if "as shipped" in line and "1B" in line]
    assert line.endswith(f"| {0.60 / 0.36:.2f} |")


def test_torchtitan_as_shipped_is_compared_with_nothing_where_ours_has_no_masters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [cell for cell in cells(("peers",)) if cell.label != "masters"]
    monkeypatch.setattr(train_table, "PARTS", ("peers",))
    monkeypatch.setattr(train_table, "cells", lambda parts: own)
    for cell in own:
        written(tmp_path, cell, cell.variants[0].name, 0.30)
    (device,) = train_rows.load(tmp_path, rehearsal=False)
    (line,) = [line for line in train_table.peers_table(device).splitlines() if "as shipped" in line]
    assert line.endswith(f"| {train_table.NOT_MEASURED} |")


def test_every_peer_has_one_of_ours_with_the_same_weights() -> None:
    for part in PARTS:
        own = [cell for cell in cells((part,)) if cell.workload.kind == "single"]
        if any(cell.peer == AS_SHIPPED for cell in own):
            assert any(cell.label == "masters" for cell in own), part


def test_each_is_compared_at_its_best_that_fits(tmp_path: Path) -> None:
    ours, theirs = (next(c for c in cells(("best",)) if c.peer == who) for who in ("", "torchtitan pure bfloat16"))
    no_room = {"error": "OutOfMemoryError: no room", "out_of_memory": True}
    save(tmp_path, ours, timed("batch 2", 0.25), timed("batch 4", 0.40), {"variant": "batch 8"} | no_room)
    cut_off = timed("batch 4", 0.10) | {"complete": False}  # which fits, but is no measurement
    save(tmp_path, theirs, timed("batch 2", 0.40), cut_off, {"variant": "batch 8"} | no_room)
    (device,) = train_rows.load(tmp_path, rehearsal=False)
    text = train_table.best_table(device)
    assert f"| titan_fast, pure bfloat16 | none | 4 | 8 does not | 4 | {4 * 8192 / 0.40:,.0f} |" in text
    assert f"| torchtitan pure bfloat16 | none | 4 | 8 does not | 2 | {2 * 8192 / 0.40:,.0f} |" in text
    assert "| ours / torchtitan pure bfloat16, each at its best |  |  |  |  | 2.00 |" in text


def test_a_lever_is_compared_with_the_base_of_its_process_or_of_its_model(tmp_path: Path) -> None:
    attention, _, fa3, _ = cells(("levers",))
    save(tmp_path, attention, timed("base", 0.10), timed("attention flash", 0.11))
    save(tmp_path, fa3, timed("attention fa3", 0.08))
    (device,) = train_rows.load(tmp_path, rehearsal=False)
    lines = train_table.levers_table(device).splitlines()
    assert any("attention flash | -9.1% |" in line for line in lines)
    assert any("attention fa3 | +25.0% |" in line for line in lines)


def test_rows_beyond_the_one_command_are_shown_too(tmp_path: Path) -> None:
    for part in ("rest-70b", "rest-8b"):
        for cell in cells((part,)):
            save(tmp_path, cell, *(timed(variant.name, 4096.0) for variant in cell.variants))
    (device,) = train_rows.load(tmp_path, rehearsal=False)
    lines = train_table.models_table(device).splitlines()
    assert any("Llama 2 70B |" in line and "| 2 x 4096 | full | compiled, auto | 2 |" in line for line in lines)
    assert any("Llama 3 8B |" in line and "eager, kernels | 2 |" in line for line in lines)


def test_a_variant_that_was_stopped_shows_what_it_did(tmp_path: Path) -> None:
    cell = cells(("rank0",))[0]
    save(tmp_path, cell, timed("compiled, auto", 0.8192, stopped="OutOfMemoryError: no room"))
    (device,) = train_rows.load(tmp_path, rehearsal=False)
    assert "| 10,000 (50 steps, then OutOfMemoryError: no room) |" in train_table.models_table(device)


def test_a_row_that_was_cut_off_says_so_and_is_compared_with_nothing(tmp_path: Path) -> None:
    ours, theirs, *_ = cells(("peers",))
    cut = timed("compiled", 0.40, complete=False)
    cut["step_seconds"] |= {"timed": 10, "planned": 50}
    written(tmp_path, ours, "compiled, auto", 0.30)
    save(tmp_path, theirs, cut)
    (device,) = train_rows.load(tmp_path, rehearsal=False)
    line, *_ = [line for line in train_table.peers_table(device).splitlines() if "torchtitan pure" in line]
    assert f"| {16384 / 0.40:,.0f} (10 of 50 steps) |" in line and line.endswith(f"| {train_table.NOT_MEASURED} |")


def test_a_whole_row_gives_way_to_a_whole_one_alone(tmp_path: Path) -> None:
    cell = cells(("rank0",))[0]
    whole, error = timed("compiled, auto", 0.8192, complete=True), "ModuleNotFoundError: No module named 'x'"
    save(tmp_path, cell, whole)
    save(tmp_path, cell, timed("compiled, auto", 0.7, complete=False), commit="2", torch="2.13")
    save(tmp_path, cell, {"variant": "compiled, auto", "error": error}, commit="3", torch="2.13")
    (device,) = train_rows.load(tmp_path, rehearsal=False)
    (row,) = device.rows.values()
    assert (row["commit"], row["versions"]) == ("1", {"torch": "2.11"})
    text = train_table.markdown(device)
    assert f"| 10,000 (at 3 it came to: {error}) |" in text and "torch 2.11; commit 1;" in text
    save(tmp_path, cell, timed("compiled, auto", 0.4096, complete=True), commit="4")
    (device,) = train_rows.load(tmp_path, rehearsal=False)
    assert "| 20,000 |" in train_table.models_table(device)


@pytest.mark.parametrize("other", [{"commit": "2"}, {"torch": "2.13"}])
def test_a_ratio_of_different_code_or_versions_is_marked(tmp_path: Path, other: dict[str, str]) -> None:
    """Within and between files; the title has all versions."""
    own, (best_ours, best_theirs) = cells(("peers",)), (cells(("best",))[-1], cells(("best",))[0])
    written(tmp_path, own[0], "compiled, auto", 0.30)
    written(tmp_path, best_ours, "batch 2", 0.25)
    for cell, variant in ((own[1], "compiled"), (best_theirs, "batch 2")):
        save(tmp_path, cell, timed(variant, 0.45), **other)
    written(tmp_path, own[3], "compiled", 0.60)
    (device,) = train_rows.load(tmp_path, rehearsal=False)
    text = train_table.markdown(device)
    assert f" {0.45 / 0.30:.2f}* |" in text and f" {0.60 / 0.30:.2f} |" in text and f" {0.45 / 0.25:.2f}* |" in text
    assert text.endswith("* of rows of different commits or versions")
    assert ("torch 2.11 and 2.13;" if "torch" in other else "; commit 1, 2;") in text


def test_one_column_has_one_limit(tmp_path: Path) -> None:
    """A row with older limits gets its fraction of the current ones, by the attention that is now the fastest."""
    cell, variant = cells(("rank0",))[0], "compiled, auto"
    committed = read(limits.RESULTS / "limits-nvidia-h100-80gb-hbm3.json")
    assert committed is not None
    path = tmp_path / "limits-nvidia-h100-80gb-hbm3.json"
    write(committed, path)
    environment = {"device": H100, "versions": {}, "smoke": False, "commit": "1"}
    record(cell, {"environment": environment, "rows": [timed(variant, 0.8)]}, tmp_path, known_limits(tmp_path, H100))

    def shown() -> tuple[float, str]:
        (device,) = train_rows.load(tmp_path, rehearsal=False)
        return device.rows[cell.name, variant]["fraction_of_limit"], train_table.markdown(device)

    first, _ = shown()
    for products in committed["gemm_by_shape"].values():
        products.update({way: 1.1 * rate for way, rate in products.items()})
    write(committed, path)
    before, text = shown()
    assert "The limit is by attention of cudnn." in text and before < first - 0.03
    for backends in committed["attention_by_call"].values():
        backends["fa4"] = {way: 1.2 * rate for way, rate in backends["cudnn"].items()}
    write(committed, path)
    after, text = shown()
    assert "The limit is by attention of fa4." in text and before - 0.05 < after < before


def test_a_row_of_a_variant_that_is_no_more_is_no_error(tmp_path: Path) -> None:
    cell = cells(("levers-fsdp",))[0]
    environment, seconds = {"device": H100, "versions": {}}, {"median": 0.7, "p10": 0.7, "p90": 0.7, "timed": 50}
    row = {"cell": cell.name, "part": cell.part, "variant": "chunk 1", "world": 64, "step_seconds": seconds}
    write({"environment": environment, "rows": [row]}, tmp_path / "train-x-levers-fsdp.json")
    content = {"rates": {"bandwidth": 1.0}, "gemm_by_shape": {}, "attention_by_call": {}}
    write({"device": H100, "environment": environment} | content, tmp_path / "limits-nvidia-h100-80gb-hbm3.json")
    (device,) = train_rows.load(tmp_path, rehearsal=False)
    assert "fraction_of_limit" not in device.rows[cell.name, "chunk 1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"environment": {"dev', "not JSON: "), ('{"rows": []}', "no environment that names their device")],
)
def test_a_file_that_cannot_be_read_is_named_in_a_sentence(
    tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train-x-peers.json").write_text(text)
    with pytest.raises(SystemExit):
        train_table.main(["--results", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("titan_fast: ") and words in line and "train-x-peers.json]; measure" in line


def test_clocks_of_the_timed_steps_stand_above_the_tables(tmp_path: Path) -> None:
    cell = cells(("rank0",))[0]
    for variant, clock in (("compiled, auto", 980.0), ("compiled, kernels", 1755.0)):
        gpu = {"sm_mhz": [345.0, clock, 1980.0], "watts_limit": [700.0] * 3, "slowed_by": ["power limit"]}
        save(tmp_path, cell, timed(variant, 0.8, gpu=gpu))
    (device,) = train_rows.load(tmp_path, rehearsal=False)
    text = train_table.markdown(device)
    assert "SM clock 980 to 1755 MHz" in text and "power limit 700 W" in text
    assert "slowed by power limit" in text and "| 1.0 | 980 MHz | 1 |" in text and "| 1.0 | 1755 MHz | 1 |" in text


def test_losses_that_did_not_fall_are_marked(tmp_path: Path) -> None:
    (cell,) = cells(("parity-compile",))
    parity = {"steps": 200, "first": 11.7, "last": 11.6, "learnt": False, "largest": 1e-3, "last tenth": 1e-4}
    save(tmp_path, cell, {"variant": "plain", "parity": parity})
    (device,) = train_rows.load(tmp_path, rehearsal=False)
    assert "| 11.70 to 11.60, no training | 1.0e-03 | 1.0e-04 |" in train_table.parity_table(device)


def test_the_time_to_a_step_is_shown(tmp_path: Path) -> None:
    rows = [{"cell": "launch", "part": "launch", "variant": STARTS[1], "seconds_to_step_1": 9.0,
             "seconds_to_step_10": 12.34, "tokens_per_second": 54321.0,
             "start": "7.2 s: imports 5.0, data 2.2"}]  # fmt: skip
    write({"environment": {"device": H100, "versions": {}}, "rows": rows}, tmp_path / "train-x-launch.json")
    (device,) = train_rows.load(tmp_path, rehearsal=False)
    assert f"| {STARTS[1]} | 9.0 | 12.3 | 54,321 | 7.2 s: imports 5.0, data 2.2 |" in train_table.launch_table(device)


def test_readmes_rows_are_in_the_committed_files() -> None:
    """The tables of whole steps: each line has its figures from one row."""
    (device,) = train_rows.load(limits.RESULTS, rehearsal=False)
    measured = set()
    for row in device.rows.values():
        if "tokens_per_second" in row and "peak_bytes" in row:
            found = (row.get("mfu", {}).get("titan"), row.get("fraction_of_limit"))
            shares = [f"{share:.1%}" if share else "" for share in found]
            measured.add((f"{row['tokens_per_second']:,.0f}", *shares, f"{row['peak_bytes'] / 2**30:.1f}"))
    text = (Path(__file__).parents[1] / "README.md").read_text()
    models = re.findall(r"^\|[^|\n]*\| (?:titan_fast|torchtitan|Hugging).*\|$", text, re.MULTILINE)
    figures = [tuple(cell.strip() for cell in line.split("|")[3:7]) for line in models]
    assert len(figures) > 15 and set(figures) <= measured
    both = re.findall(r"([\d,]+); ([\d.]+)", text[text.index("| | kernels off | kernels `auto`") :].split("\n\n")[0])
    assert len(both) == 5 and set(both) <= {(speed, peak) for speed, _, _, peak in measured}


def test_a_part_run_again_replaces_its_rows(tmp_path: Path) -> None:
    cell = cells(("rank0",))[0]
    for variant, seconds in (("compiled, auto", 0.9), ("compiled, kernels", 0.8), ("compiled, auto", 0.7)):
        written(tmp_path, cell, variant, seconds)
    (device,) = train_rows.load(tmp_path, rehearsal=False)
    found = {row["variant"]: row["step_seconds"]["median"] for row in device.rows.values()}
    assert found == {"compiled, auto": 0.7, "compiled, kernels": 0.8}


def test_without_a_device_every_table_says_so() -> None:
    text = train_table.markdown(None)
    assert text.startswith("No device has been measured.") and text.count(train_table.NOT_MEASURED) > 100
